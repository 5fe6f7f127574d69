# SPDX-License-Identifier: Apache-2.0
"""Both ends of a gRPC channel, as processes: ``python -m tests.harness.channel serve|call ADDRESS:PORT SIZE``.

The server answers each call with SIZE bytes. The client makes a call for each line on stdin, and prints a line when
it has the whole answer.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import grpc


def serve(address: str, size: int) -> None:
    """Answer calls until the process is ended."""
    handler = grpc.unary_unary_rpc_method_handler(lambda _request, _context: bytes(size))
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("programs", {"Get": handler}),))
    server.add_insecure_port(address)
    server.start()
    server.wait_for_termination()


def call(address: str, size: int) -> None:
    """Call over one channel, once per line on stdin."""
    with grpc.insecure_channel(address) as channel:
        get = channel.unary_unary("/programs/Get")
        for _ in sys.stdin:
            assert len(get(b"", timeout=20)) == size
            print("done", flush=True)


if __name__ == "__main__":
    {"serve": serve, "call": call}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
