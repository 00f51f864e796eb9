"""How commands talk to a server."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import uvicorn

from serve.cli import talk


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_connection_that_was_idle_is_not_used_again_since_the_server_may_be_closing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert uvicorn.Config("").timeout_keep_alive / 2 > talk.IDLE_S
    monkeypatch.setattr(talk, "IDLE_S", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ports = []
        try:
            with talk.http_client(base_url=f"http://127.0.0.1:{server.server_port}") as client:
                for pause in (0.0, 0.0, 0.5):
                    time.sleep(pause)
                    stream = client.get("/").extensions["network_stream"]
                    ports.append(stream.get_extra_info("client_addr")[1])
        finally:
            server.shutdown()
    first, second, after = ports
    assert first == second != after
