"""Payloads: bytes and a name for them, refused early when they are neither."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbit.errors import RequestInvalid
from orbit.payload import Payload, is_header_value


@given(st.binary(max_size=200))
def test_a_payload_is_its_bytes(content: bytes) -> None:
    """Size and digest are those of the content, which stays as it came."""
    payload = Payload(content)
    assert (payload.content, payload.size) == (content, len(content))
    assert payload.digest == Payload(content, "text/plain").digest
    assert payload.content_type == "application/octet-stream"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_goes_there_and_back(text: str) -> None:
    """As UTF-8 text and as JSON."""
    assert Payload.of_text(text).text() == text
    assert Payload.of_json({"text": text}).json() == {"text": text}


@pytest.mark.parametrize("content", ["text", bytearray(b"x"), None, 3])
def test_content_is_bytes(content: Any) -> None:
    """A step that returns text is told so, by the name of what it returned."""
    with pytest.raises(RequestInvalid, match=type(content).__name__):
        Payload(content)


@pytest.mark.parametrize("name", ["", " text/plain", "text/plain\r\nX: y", "tëxt", "x" * 256, None])
def test_a_content_type_travels_in_a_header(name: Any) -> None:
    """What would break or forge a header never becomes a content type."""
    with pytest.raises(RequestInvalid):
        Payload(b"", name)


@given(st.text())
def test_a_header_value_is_one_visible_line(text: str) -> None:
    """Whatever passes is ASCII, printable, and short."""
    if is_header_value(text):
        assert text.encode("ascii").decode("ascii").strip() == text
        assert not any(ord(one) < 32 or ord(one) > 126 for one in text)


def test_a_payload_cannot_be_changed() -> None:
    """A payload is handed from stage to stage: none can change it under another."""
    with pytest.raises(AttributeError):
        Payload(b"x").content = b"y"  # type: ignore[misc]  # that is the point
