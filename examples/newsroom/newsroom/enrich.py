"""The HTTP step, as a service of its own that could be written in any language.

`python -m newsroom.enrich --port 9000`. `POST /enrich` takes a bundle of articles as JSON and
answers it with `reading_minutes`, `keywords` and `slug` added to each; `GET /health` says that
it is up. What it cannot read is a 400 with the reason. It keeps nothing between requests.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any

from newsroom.text import keywords, slug, words

_WORDS_PER_MINUTE = 220
_KEYWORDS = 5
_MAX_BYTES = 16 * 1024 * 1024


def enrich(bundle: dict[str, Any]) -> dict[str, Any]:
    """The bundle with reading time (minutes, rounded up), keywords and slug per article."""
    return bundle | {"articles": [article | _facts(article) for article in bundle["articles"]]}


def _facts(article: dict[str, Any]) -> dict[str, Any]:
    return {
        "reading_minutes": -(-len(words(article["body"])) // _WORDS_PER_MINUTE),
        "keywords": keywords(f"{article['title']} {article['body']}", _KEYWORDS),
        "slug": slug(article["title"]),
    }


class Handler(BaseHTTPRequestHandler):
    """One connection; HTTP/1.1, so that it is kept open for the next request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(HTTPStatus.OK, {"status": "ok"})
        else:
            self._answer(HTTPStatus.NOT_FOUND, {"error": "POST /enrich or GET /health"})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _MAX_BYTES:
            self.close_connection = True
            self._answer(HTTPStatus.LENGTH_REQUIRED, {"error": "a length up to 16 MiB, please"})
            return
        body = self.rfile.read(int(length))
        if self.path != "/enrich":
            self._answer(HTTPStatus.NOT_FOUND, {"error": "POST /enrich or GET /health"})
            return
        try:
            self._answer(HTTPStatus.OK, enrich(json.loads(body)))
        except (ValueError, KeyError, TypeError) as error:
            self._answer(HTTPStatus.BAD_REQUEST, {"error": f"no bundle of articles: {error!r}"})

    def _answer(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """A thread per connection; many may wait to be accepted."""

    request_queue_size = 128


def stop(signum: int, frame: FrameType | None) -> None:
    """Ends the process with code 0, by way of `with` and `finally`."""
    sys.exit(0)


def main() -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m newsroom.enrich")
    parser.add_argument("--port", type=int, default=9000)
    port = parser.parse_args().port
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        server = Server(("127.0.0.1", port), Handler)
    except OSError as error:
        print(f"enrich: cannot listen on 127.0.0.1:{port}: {error.strerror}", file=sys.stderr)
        return 1
    with server:
        print(f"enrich on http://127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever(poll_interval=0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
