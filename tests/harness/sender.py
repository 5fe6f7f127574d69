# SPDX-License-Identifier: Apache-2.0
"""A program whose thread "sender" sends bursts to another thread of it, with idle time between them.

It runs where cwndtrace isn't: in containers and in other virtual machines. reno is allowed to all users, and idle time
resets its window.
"""

import ctypes
import socket
import threading
import time

PR_SET_NAME = 15  # include/uapi/linux/prctl.h


def main() -> None:
    """Send until the process is ended."""
    listener = socket.create_server(("127.0.0.1", 5000))
    sending = socket.socket()
    sending.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    sending.connect(listener.getsockname())
    receiving, _ = listener.accept()

    def receive() -> None:
        while receiving.recv(1 << 20):
            pass

    def send() -> None:
        ctypes.CDLL(None).prctl(PR_SET_NAME, b"sender")
        while True:
            sending.sendall(bytes(4_000_000))
            time.sleep(0.6)

    threading.Thread(target=receive, daemon=True).start()
    thread = threading.Thread(target=send)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
