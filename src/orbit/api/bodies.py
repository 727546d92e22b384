"""Request bodies: read to a bound, parsed strictly, checked whole.

A body over the limit is refused while it arrives, before anything of it is kept. Refused too is
what JSON parsers pass and later floors cannot carry: repeated keys, NaN, half surrogate pairs,
bottomless nesting. Large bodies share a budget of memory with each other.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from orbit.api.problems import HttpRefusal, request_invalid
from orbit.errors import PayloadTooLarge, RequestInvalid
from orbit.execution.memory import PayloadMemory
from orbit.reading.view import camel_case
from orbit.vocabulary import check_instant, check_key

_LARGE_BYTES = 64 << 10
_ARRIVAL_SECONDS = 60.0
_COPIES = 3  # a body is there as bytes, as text and as its values for a moment
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")

Key = Annotated[str, AfterValidator(check_key)]
Instant = Annotated[AwareDatetime, Field(strict=False), AfterValidator(check_instant)]
MOST_CHARACTERS = 1000  # of a reason
Reason = Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]


class Body(BaseModel):
    """Base of request bodies: camelCase, strict types, no unknown keys."""

    model_config = ConfigDict(
        alias_generator=camel_case, extra="forbid", strict=True, hide_input_in_errors=True
    )


class Filter(BaseModel):
    """Base of query parameters: camelCase, no unknown names."""

    model_config = ConfigDict(alias_generator=camel_case, extra="forbid", hide_input_in_errors=True)


class PageFilter(Filter):
    """How lists are paged: `cursor` is the `nextCursor` of the page before."""

    limit: int = Field(50, ge=1, le=200)
    cursor: str | None = Field(None, max_length=2000)


Model = TypeVar("Model", bound=Body)


class Bodies:
    """Reads the bodies of one application's requests.

    Args:
        limit_bytes: the largest body.
        memory_bytes: what all large bodies under way may hold together.
    """

    def __init__(self, limit_bytes: int, memory_bytes: int) -> None:
        self._limit = limit_bytes
        self._memory = PayloadMemory(max(limit_bytes * _COPIES, memory_bytes))

    def of(self, model: type[Model]) -> Callable[[Request], AsyncIterator[Model]]:
        """A dependency that gives a request's body; no body is an empty object."""

        async def read(request: Request) -> AsyncIterator[Model]:
            size = _announced(request)
            if size is not None and size > self._limit:
                raise self._too_large()
            expected = self._limit if size is None else size
            if expected <= _LARGE_BYTES:
                yield _noted(request, _validated(model, _parsed(await self._content(request))))
                return
            async with self._memory.reserve(expected * _COPIES):
                content = await self._content(request)
                parsed = await asyncio.to_thread(_parsed, content)
                del content
                yield _noted(request, _validated(model, parsed))

        return read

    async def _content(self, request: Request) -> bytes:
        content = bytearray()
        try:
            async with asyncio.timeout(_ARRIVAL_SECONDS):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > self._limit:
                        raise self._too_large()
        except TimeoutError:
            text = f"the body did not arrive within {_ARRIVAL_SECONDS:g} s"
            raise HttpRefusal(HTTPStatus.REQUEST_TIMEOUT, "request_timeout", text) from None
        if content:
            _check_type(request.headers.get("content-type", ""))
        return bytes(content)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"the request's body is larger than {self._limit:,} bytes (ORBIT_MAX_PAYLOAD_BYTES)"
        )


def body_schema(model: type[Body], *, is_required: bool) -> dict[str, Any]:
    """What OpenAPI is told of a body that a dependency reads."""
    schema = model.model_json_schema(by_alias=True)
    return {
        "requestBody": {
            "required": is_required,
            "content": {"application/json": {"schema": schema}},
        }
    }


def idempotency_key(request: Request) -> str | None:
    """The request's Idempotency-Key; raises RequestInvalid if it is none."""
    values = request.headers.getlist("idempotency-key")
    if not values:
        return None
    if len(values) > 1 or not _IDEMPOTENCY_KEY.fullmatch(values[0]):
        raise RequestInvalid("Idempotency-Key: expected once, 1 to 255 visible ASCII characters")
    return values[0]


def _noted(request: Request, body: Model) -> Model:
    """The body; its reason is kept beside the request, should this be refused."""
    request.state.reason = getattr(body, "reason", None)
    return body


def _announced(request: Request) -> int | None:
    """The body's size by its header: None if it comes in chunks, 0 if there is none."""
    text = request.headers.get("content-length")
    if text is None:
        return None if "transfer-encoding" in request.headers else 0
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _check_type(content_type: str) -> None:
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise HttpRefusal(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "the body has to be application/json",
        )


def _parsed(content: bytes) -> Any:
    if not content:
        return {}
    try:
        value = json.loads(
            content.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
        if _SURROGATE_ESCAPE.search(content):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise RequestInvalid(f"the body is not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise RequestInvalid("the body has text with half a surrogate pair") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise RequestInvalid(f"the body is not JSON: {error.msg} ({place})") from None
    except RecursionError:
        raise RequestInvalid("the body is nested too deeply") from None
    except ValueError as error:
        raise RequestInvalid(f"the body is not JSON: {error}") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("an object has a key more than once")
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _validated(model: type[Model], value: Any) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise request_invalid(error.errors(include_url=False, include_input=False)) from None
