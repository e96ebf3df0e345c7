"""An optional /metrics page for Prometheus, served by the process that restarts the ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from longcat.errors import ConfigError


def render(gauges: Mapping[str, float | None]) -> str:
    """Prometheus's text format; values that are not known yet are left out."""
    known = {f"longcat_{name}": value for name, value in gauges.items() if value is not None}
    return "".join(f"# TYPE {name} gauge\n{name} {value!r}\n" for name, value in known.items())


@contextmanager
def serving(port: int, gauges: Callable[[], Mapping[str, float | None]]) -> Iterator[None]:
    """Serve `/metrics` on localhost while the context lasts; nothing at port 0.

    Raises:
        ConfigError: the port is taken.
    """
    if not port:
        yield
        return

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404, "see /metrics")
                return
            body = render(gauges()).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            """Requests are not logged: they come every few seconds."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ConfigError(f"launch.metrics_port={port} cannot be used ({error.strerror}); choose another") from error
    thread = threading.Thread(target=server.serve_forever, daemon=True, name="metrics")
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
