# SPDX-License-Identifier: Apache-2.0
"""The recording loop, which passes a session's batches to a capture's writer and to an observer."""

from __future__ import annotations

import time
from collections.abc import Callable

from cwndtrace.capture.session import Batch, Session, checkpoint, ending
from cwndtrace.errors import CaptureError
from cwndtrace.store import CaptureWriter, ThreadedWriter
from cwndtrace.store.writer import FLUSH_SECONDS


class Observer:
    """A receiver of a recorder's batches and events, to be subclassed.

    This base class does nothing, except that it ends the recording when the disk refuses rows.
    """

    def turn(self, batches: list[Batch]) -> bool:  # noqa: ARG002
        """Take the batches of one turn, of which there may be none. Returns False to end the recording."""
        return True

    def refused(self, error: CaptureError) -> None:
        """Handle ``error``, which says that the disk refused rows; they wait in memory.

        This is called after each attempt to write them. An error that it raises ends the recording.
        """
        raise error

    def stopping(self) -> None:
        """Handle the end of the loop, which may have any reason."""

    def finish(self, batches: list[Batch]) -> None:
        """Take the last batches."""


class Observers(Observer):
    """Several observers as one, which ends the recording when one of them does."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def turn(self, batches: list[Batch]) -> bool:
        """Pass the batches to each."""
        going = [each.turn(batches) for each in self._observers]
        return all(going)

    def refused(self, error: CaptureError) -> None:
        """Tell each."""
        for each in self._observers:
            each.refused(error)

    def stopping(self) -> None:
        """Tell each."""
        for each in self._observers:
            each.stopping()

    def finish(self, batches: list[Batch]) -> None:
        """Pass the last batches to each."""
        for each in self._observers:
            each.finish(batches)


class Recorder:
    """A loop that writes a session's batches to a capture. ``run`` may be called once, and always closes the capture.

    The numbers of lost records and the steps of the wall clock are written to meta.json while it runs, so that they
    aren't missing if the process is killed.
    """

    def __init__(self, session: Session, writer: CaptureWriter | ThreadedWriter, observer: Observer) -> None:
        self._session = session
        self._writer = writer
        self._observer = observer
        self._checkpointed = self._state()
        self._next_checkpoint = 0.0
        self._next_note = 0.0

    def run(self, stop: Callable[[], bool], duration_s: float | None = None) -> None:
        """Record until ``stop`` returns true, the observer's ``turn`` returns False, the source ends or the time is up.

        Raises the errors of the session, the writer and the observer; the capture's status is ``failed`` then.
        """
        status = "failed"
        try:
            for batches in self._session.turns(stop, duration_s):
                self._add(batches)
                going = self._observer.turn(batches)
                self._save()
                if not going:
                    break
            status = "complete"
        finally:
            self._finish(status)

    def _finish(self, status: str) -> None:
        self._observer.stopping()
        try:
            last = self._session.finish()
            self._add(last)
            self._observer.finish(last)
        except BaseException:
            status = "failed"
            raise
        finally:
            self._writer.close(status, **ending(self._session))

    def _add(self, batches: list[Batch]) -> None:
        for batch in batches:
            self._writer.add(batch.event, batch.rows)

    def _save(self) -> None:
        """Write the rows that are due, and a checkpoint if the state has changed."""
        try:
            self._writer.flush()
            now = time.monotonic()
            # Checkpoints are rate-limited, because records are lost when there is no time to spare.
            if now >= self._next_checkpoint and (state := self._state()) != self._checkpointed:
                self._next_checkpoint = now + FLUSH_SECONDS
                self._writer.update_meta(**checkpoint(self._session))
                self._checkpointed = state
            if now >= self._next_note:
                self._next_note = now + FLUSH_SECONDS  # resets may end a thousand turns a second
                if self._writer.asked():
                    self._writer.note_written(self._session.read_ns)
        except CaptureError as e:
            self._observer.refused(e)

    def _state(self) -> tuple[object, ...]:
        tally = self._session.tally
        lost, left_out = sum(tally.lost.values()), sum(tally.left_out.values())
        return lost, left_out, len(self._session.clock.all), self._session.lacking
