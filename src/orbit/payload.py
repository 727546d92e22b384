"""A payload: opaque bytes and what to call them. Orbit never looks inside."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from orbit.canonical import sha256_hex
from orbit.errors import RequestInvalid

DEFAULT_CONTENT_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Payload:
    """Opaque bytes with a content type (an RFC 9110 media type, visible ASCII)."""

    content: bytes = field(repr=False)
    content_type: str = DEFAULT_CONTENT_TYPE
    digest: str = field(init=False, repr=False, compare=False)
    """SHA-256 of the content, 64 hexadecimal digits."""

    def __post_init__(self) -> None:
        if not isinstance(self.content, bytes):
            kind = type(self.content).__name__
            raise RequestInvalid(f"a payload's content is bytes, not {kind}")
        if not isinstance(self.content_type, str) or not is_header_value(self.content_type):
            raise RequestInvalid(
                "a payload's content type is 1 to 255 visible ASCII characters or spaces"
            )
        object.__setattr__(self, "digest", sha256_hex(self.content))

    @classmethod
    def of_text(cls, text: str, content_type: str = "text/plain; charset=utf-8") -> Payload:
        """A payload of UTF-8 text."""
        return cls(text.encode(), content_type)

    @classmethod
    def of_json(cls, value: Any) -> Payload:
        """A payload of compact JSON."""
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return cls(text.encode(), "application/json")

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content)

    def text(self) -> str:
        """The content as UTF-8 text."""
        return self.content.decode()

    def json(self) -> Any:
        """The content parsed as JSON."""
        return json.loads(self.content)


def is_header_value(text: str) -> bool:
    """Whether text can travel as a short HTTP header value: visible ASCII, inner spaces."""
    return 0 < len(text) <= 255 and text.isascii() and text.isprintable() and text == text.strip()
