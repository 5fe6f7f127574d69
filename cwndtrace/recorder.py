# SPDX-License-Identifier: Apache-2.0
"""The loop that records: what a session yields goes to a capture's writer and to whoever observes it."""

from __future__ import annotations

import time
from collections.abc import Callable

from cwndtrace.capture.session import Batch, Session, checkpoint, ending
from cwndtrace.errors import CaptureError
from cwndtrace.store import CaptureWriter, ThreadedWriter
from cwndtrace.store.writer import FLUSH_SECONDS


class Observer:
    """Is told what a recorder does. This one does nothing, and lets the recording end when the disk refuses rows."""

    def turn(self, batches: list[Batch]) -> bool:  # noqa: ARG002
        """Take the batches of one turn, of which there may be none; returns whether to go on."""
        return True

    def refused(self, error: CaptureError) -> None:
        """The disk refused rows, which wait in memory. Called at each attempt; what it raises ends the recording."""
        raise error

    def stopping(self) -> None:
        """The loop has ended, for whatever reason."""

    def finish(self, batches: list[Batch]) -> None:
        """Take the last batches."""


class Recorder:
    """Drives a session into a writer; ``run`` it once, and the capture is closed whatever happens.

    What a killed process couldn't say any more, its losses and the steps of the wall clock, goes into meta.json while
    it runs.
    """

    def __init__(self, session: Session, writer: CaptureWriter | ThreadedWriter, observer: Observer) -> None:
        self._session = session
        self._writer = writer
        self._observer = observer
        self._checkpointed = self._state()
        self._next_checkpoint = 0.0

    def run(self, stop: Callable[[], bool], duration_s: float | None = None) -> None:
        """Record until ``stop`` returns true, the observer doesn't go on, the source ends or the time is over.

        Raises what the session, the writer and the observer raise; the capture's status is ``failed`` then.
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
        """Write the rows that are due, and a checkpoint where there is news."""
        try:
            self._writer.flush()
            now = time.monotonic()
            # Not at each turn: losses come where there is no time to spare.
            if now >= self._next_checkpoint and (state := self._state()) != self._checkpointed:
                self._next_checkpoint = now + FLUSH_SECONDS
                self._writer.update_meta(**checkpoint(self._session))
                self._checkpointed = state
        except CaptureError as e:
            self._observer.refused(e)

    def _state(self) -> tuple[object, ...]:
        tally = self._session.tally
        lost, left_out = sum(tally.lost.values()), sum(tally.left_out.values())
        return lost, left_out, len(self._session.clock.all), self._session.lacking
