"""A service under a real server, and genuine deliveries to it."""

from __future__ import annotations

import base64
import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from starlette.types import ASGIApp

from orbit.clock import SystemClock
from orbit.webhooks import sign

TOKEN = "t0ken"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@contextmanager
def serving(app: ASGIApp, root_path: str = "") -> Iterator[httpx.Client]:
    """Serves an application with uvicorn in a thread; gives a client for it."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    config = uvicorn.Config(
        app, log_config=None, timeout_graceful_shutdown=5, root_path=root_path, http="h11"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        # No kept connections: uvicorn closes one whose request ended in an exception.
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60, limits=limits) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def genuine(job_id: str, body: bytes, secret: str = SECRET) -> dict[str, str]:
    """The headers that Orbit sends with a body."""
    at = int(SystemClock().now().timestamp())
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    return {
        "Authorization": f"Bearer {TOKEN}",
        "Content-Type": "application/octet-stream",
        "Idempotency-Key": job_id,
        "webhook-id": job_id,
        "webhook-timestamp": str(at),
        "webhook-signature": sign(secret, job_id, at, body),
        "Content-Digest": f"sha-256=:{digest}:",
        "Orbit-Namespace": "brand-a",
        "Orbit-Job-Id": job_id,
        "Orbit-Attempt": "1",
    }
