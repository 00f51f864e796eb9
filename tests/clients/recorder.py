"""A wire-tap between a client and the server: passes bytes both ways, and keeps what was asked and answered.

It works on TCP, so that a client's going away reaches the server as it would without it. HTTP/1.1 without pipelining.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_REQUEST = re.compile(rb"(?:GET|POST|PUT|DELETE|HEAD|OPTIONS) (\S+) HTTP/1\.[01]\r\n")


@dataclass
class Exchange:
    path: str
    request: bytearray = field(default_factory=bytearray)
    response: bytearray = field(default_factory=bytearray)

    def __str__(self) -> str:
        """The request line, the status line, and both bodies."""
        head, _, sent = bytes(self.request).partition(b"\r\n\r\n")
        answer, _, got = bytes(self.response).partition(b"\r\n\r\n")
        lines = (head.split(b"\r\n")[0], sent, b"-> " + answer.split(b"\r\n")[0], got)
        return "\n".join(line.decode(errors="replace").strip() for line in lines if line.strip())


class Recorder:
    """Listens on a port of its own until ``close``."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._exchanges: list[Exchange] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def take(self) -> list[Exchange]:
        """What was asked since the last call, but for the readings of ``/metrics``."""
        taken, self._exchanges = self._exchanges, []
        return [exchange for exchange in taken if not exchange.path.startswith("/metrics")]

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self._server) as server:
            current: list[Exchange] = []
            back = threading.Thread(target=self._answers, args=(server, client, current), daemon=True)
            back.start()
            while data := client.recv(65536):
                begins = _REQUEST.match(data)
                if begins and (not current or current[-1].response):
                    current.append(Exchange(begins[1].decode()))
                    self._exchanges.append(current[-1])
                if current:
                    current[-1].request += data
                server.sendall(data)
            server.shutdown(socket.SHUT_RDWR)  # the client is gone, and the server must see it

    @staticmethod
    def _answers(server: socket.socket, client: socket.socket, current: list[Exchange]) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if current:
                    current[-1].response += data
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)
