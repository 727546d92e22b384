"""Receipts as people read them: what a receiver answered, in a form that is safe to show.

An answer is somebody else's bytes: text is handed out as text, anything else in base64, never
more than what is stored. Of a URL the query is left out, since it may hold a key.
"""

from __future__ import annotations

import base64
import codecs
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from orbit.reading.view import View

STORED_ANSWER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Answer(View):
    """The beginning of an answer's body: `text` if it is UTF-8, else `base64`.

    `is_withheld`: there is a body, which who asks may not see.
    """

    content_type: str | None
    text: str | None
    base64: str | None
    is_truncated: bool
    is_withheld: bool = False


@dataclass(frozen=True, slots=True)
class Latency(View):
    """Where an attempt's time went, in seconds from its beginning; queueing apart."""

    queue_seconds: float | None
    connect_seconds: float | None
    first_byte_seconds: float | None
    total_seconds: float | None


@dataclass(frozen=True, slots=True)
class Receipt(View):
    """What became of one attempt on the wire.

    `is_probe`: it probed a held lane, and is not counted against its job. `is_reused`: it went
    out on a connection that was open already; None if nothing left.
    """

    attempt: int
    outcome: str
    status: int | None
    error: str | None
    digest: str
    size: int
    latency: Latency
    answer: Answer | None
    is_probe: bool
    is_reused: bool | None
    node_id: str
    started_at: datetime | None
    created_at: datetime


def receipt_of(row: Mapping[str, Any]) -> Receipt:
    """A receipt from its row."""
    return Receipt(
        attempt=row["attempt"],
        outcome=row["outcome"],
        status=row["status"],
        error=row["error"],
        digest=row["digest"],
        size=row["size"],
        latency=Latency(
            row["queue_seconds"],
            row["connect_seconds"],
            row["first_byte_seconds"],
            row["total_seconds"],
        ),
        answer=answer_of(row["answer"], row["answer_content_type"]),
        is_probe=row["is_probe"],
        is_reused=row["is_reused"],
        node_id=row["node_id"],
        started_at=row["started_at"],
        created_at=row["created_at"],
    )


def without_answer(receipt: Receipt) -> Receipt:
    """The receipt as who may not see payloads sees it: an answer may repeat what was sent."""
    if receipt.answer is None:
        return receipt
    kind, is_truncated = receipt.answer.content_type, receipt.answer.is_truncated
    return replace(receipt, answer=Answer(kind, None, None, is_truncated, is_withheld=True))


def answer_of(content: bytes | None, content_type: str | None) -> Answer | None:
    """An answer's body as stored; None if there was none."""
    if not content:
        return None
    is_truncated = len(content) >= STORED_ANSWER_BYTES
    try:
        # A body that was cut may end within a character: only that is forgiven.
        text = codecs.getincrementaldecoder("utf-8")().decode(content, final=not is_truncated)
    except UnicodeDecodeError:
        return Answer(content_type, None, base64.b64encode(content).decode(), is_truncated)
    return Answer(content_type, text, None, is_truncated)


def safe_url(url: str) -> str:
    """The URL without its query."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query="…")) if parts.query else url
