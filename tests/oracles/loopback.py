"""A server on this machine that answers as a test says, and stops with the test."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Call:
    """One request."""

    path: str
    headers: dict[str, str]
    body: Any
    number: int


@dataclass
class Answer:
    """One answer; bytes go out as they are, anything else as JSON."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Loopback:
    """A running server."""

    url: str
    calls: list[Call]


@contextmanager
def serve(answer: Callable[[Call], Answer]) -> Iterator[Loopback]:
    """Run a server that answers every POST by `answer`, from a thread of its own."""
    calls: list[Call] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                call = Call(self.path, dict(self.headers.items()), json.loads(data), len(calls))
                calls.append(call)
            reply = answer(call)
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            try:
                self.send_response(reply.status)
                for name, value in ({"Content-Length": str(len(content))} | reply.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # the client has gone

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield Loopback(f"http://127.0.0.1:{server.server_port}", calls)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
