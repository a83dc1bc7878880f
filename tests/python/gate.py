"""A gate in front of the S3 server, at which tasks that embed can be held in the middle of their work: one of their units is done, others are not.

Everything passes, byte for byte. While the gate is shut, only the first receipt of each process does: the request for its second one waits, and so does
the process, until the gate is opened or the process has ended.
"""

import os
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from check import check
from processes import TIMEOUT_SECS, owner

RECEIPT = re.compile(rb"PUT \S*/_lookalike/receipts/latents/")
CHUNK = 1 << 16


class Gate:
    """The gate, and the address behind which the program is to look for the server. It is shut at first."""

    def __init__(self) -> None:
        server = urlsplit(os.environ["AWS_ENDPOINT"])
        self.server = server.hostname, server.port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.opened = threading.Event()
        self.changed = threading.Condition()
        self.receipts: dict[int, int] = {}
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            client, (_, port) = self.listener.accept()
            server = socket.create_connection(self.server)
            threading.Thread(target=self.requests, args=(client, server, port), daemon=True).start()
            threading.Thread(target=self.answers, args=(server, client), daemon=True).start()

    def requests(self, client: socket.socket, server: socket.socket, port: int) -> None:
        with suppress(OSError):
            while data := client.recv(CHUNK):
                # A request begins with a packet of its own.
                if not self.opened.is_set() and RECEIPT.match(data):
                    self.pass_or_wait(owner(port))
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def answers(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(CHUNK):
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_WR)

    def pass_or_wait(self, pid: int) -> None:
        with self.changed:
            self.receipts[pid] = self.receipts.get(pid, 0) + 1
            self.changed.notify_all()
            is_first = self.receipts[pid] == 1
        if not is_first:
            self.opened.wait()

    def held(self, is_wanted: Callable[[int], bool] = lambda _: True) -> int:
        """Waits for a process that is in the middle of its work, and returns it."""
        found: list[int] = []

        def is_there() -> bool:
            found.extend(pid for pid, count in self.receipts.items() if count > 1 and is_wanted(pid))
            return bool(found)

        with self.changed:
            check(self.changed.wait_for(is_there, TIMEOUT_SECS), f"waited {TIMEOUT_SECS} s for a task in the middle of its work")
        return found[0]

    def open(self) -> None:
        self.opened.set()
