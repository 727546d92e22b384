"""The endpoints that dispatch goes to, as ORBIT_DISPATCH_ENDPOINTS declares them.

Reads a JSON array and reports every problem at once, each under its JSON pointer. Refuses what
would leak (credentials in a URL), what would surprise (fragments, unknown keys) and headers
that Orbit sets itself. No message carries a token, a header's value or a URL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from orbit.vocabulary import check_key, nearest, printable
from orbit.webhooks import SigningKeys

_OWN_HEADERS = frozenset(
    {
        "authorization",
        "connection",
        "content-digest",
        "content-length",
        "content-type",
        "host",
        "idempotency-key",
        "traceparent",
        "transfer-encoding",
    }
)
_OWN_PREFIXES = ("webhook-", "orbit-")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True, slots=True)
class Breaker:
    """When a lane stops sending, and for how long; all seconds.

    It opens after `failures` in a row, or when `share` of at least `least` attempts within
    `window_seconds` failed. Then it holds the lane for `hold_seconds`, twice as long after each
    probe that fails, up to `longest_hold_seconds`.
    """

    failures: int = 10
    share: float = 0.7
    least: int = 20
    window_seconds: float = 60.0
    hold_seconds: float = 10.0
    longest_hold_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where dispatch goes. Timeouts in seconds; `rate_per_second` None is unlimited.

    `max_concurrency` and `rate_per_second` hold for each lane (a namespace's queue for this
    endpoint), over all nodes. `on_unknown` "hold" leaves a job whose attempt may have arrived to
    a person. `check_url` is asked by `doctor` whether it accepts the token. `breaker` None is off.
    """

    key: str
    url: str = field(repr=False)
    method: str = "POST"
    token: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_seconds: float = 30.0
    max_concurrency: int = 16
    rate_per_second: float | None = None
    signing_secret: str | None = field(default=None, repr=False)
    permanent_statuses: frozenset[int] = frozenset()
    breaker: Breaker | None = field(default_factory=Breaker)
    on_unknown: str = "retry"
    proxy: str | None = field(default=None, repr=False)
    check_url: str | None = field(default=None, repr=False)


def without_query(url: str) -> str:
    """A URL as it may be kept and shown; `?…` stands for a query, since that often has keys."""
    shown, mark, _ = url.partition("?")
    return f"{shown}?…" if mark else url


def parse_endpoints(text: str) -> tuple[Endpoint, ...]:
    """Parses the JSON array; raises ValueError that says what is accepted, problem by problem."""
    entries = _parsed(text)
    if not isinstance(entries, list):
        raise ValueError("a JSON array of endpoints")  # noqa: TRY004 - a bad value, not a bad call
    problems: list[str] = []
    endpoints = [_endpoint(entry, index, problems) for index, entry in enumerate(entries)]
    keys = [entry.key if entry else None for entry in endpoints]
    for index, key in enumerate(keys):
        if key is not None and keys.index(key) < index:
            problems.append(f"/{index}/key: a unique key (/{keys.index(key)} is {key} too)")
    if problems:
        raise ValueError("a JSON array of endpoints; " + printable("; ".join(problems)))
    return tuple(entry for entry in endpoints if entry)


def _parsed(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"a JSON array of endpoints ({error.msg} at {place})") from None
    except RecursionError:
        raise ValueError("a JSON array of endpoints (this one is nested too deeply)") from None


def _endpoint_url(text: str) -> str:
    """Refuses what would leak (credentials) or surprise (fragments) in a stored URL."""
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError("a URL of visible ASCII characters (percent-encode the others)")
    try:
        parts = urlsplit(text)
        valid_port = parts.port != 0
    except ValueError:
        raise ValueError("a URL with a legal host, and a port from 1 to 65535") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an absolute http:// or https:// URL")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL without credentials; put them in token or headers")
    if "#" in text:
        raise ValueError("a URL without a fragment")
    if not valid_port:
        raise ValueError("a URL with a port from 1 to 65535")
    return text


def _proxy_url(text: str) -> str:
    """A forward proxy; unlike an endpoint's URL it may carry credentials, and has no path."""
    if not _is_proxy(text):
        raise ValueError("a proxy as http://host:port, with user:password@ before it if need be")
    return text


def _is_proxy(text: str) -> bool:
    if not (text.isascii() and text.isprintable()) or " " in text:
        return False
    try:
        parts = urlsplit(text)
        is_address = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return is_address and parts.path in ("", "/") and not (parts.query or parts.fragment)


def _visible_ascii(text: str) -> str:
    if not text or len(text) > 8192 or not re.fullmatch(r"[!-~]+", text):
        raise ValueError("1 to 8192 visible ASCII characters, no spaces")
    return text


def _signing_secret(text: str) -> str:
    SigningKeys.parse(text)
    return text


def _headers(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a legal HTTP header name")
        if name.lower() in _OWN_HEADERS or name.lower().startswith(_OWN_PREFIXES):
            raise ValueError(f"{name} is set by Orbit itself and cannot be overridden")
        if len(value) > 8192 or not re.fullmatch(r"[!-~]([ -~]*[!-~])?", value):
            raise ValueError(f"the value of {name}: visible ASCII and inner spaces only")
    if len({name.lower() for name in headers}) < len(headers):
        raise ValueError("the same header twice")
    return headers


class _BreakerDocument(BaseModel):
    """An endpoint's `breaker`, as written."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    enabled: bool = True
    failures: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    share: Annotated[float, Field(gt=0, le=1)] = 0.7
    least: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    window_seconds: Annotated[float, Field(ge=1, le=3600)] = 60.0
    hold_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 10.0
    longest_hold_seconds: Annotated[float, Field(ge=0.1, le=86_400)] = 300.0


class _EndpointDocument(BaseModel):
    """One entry of ORBIT_DISPATCH_ENDPOINTS, as written."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    key: Annotated[str, AfterValidator(check_key)]
    url: Annotated[str, AfterValidator(_endpoint_url)]
    method: Literal["POST", "PUT", "PATCH", "DELETE"] = "POST"
    token: Annotated[str, AfterValidator(_visible_ascii)] | None = None
    headers: Annotated[dict[str, str], AfterValidator(_headers)] = {}
    timeout_seconds: float = Field(30.0, gt=0, le=3600)
    max_concurrency: int = Field(16, ge=1, le=10_000)
    rate_per_second: float | None = Field(None, gt=0, le=1_000_000)
    signing_secret: Annotated[str, AfterValidator(_signing_secret)] | None = None
    permanent_statuses: list[Annotated[int, Field(ge=100, le=599)]] = []
    breaker: _BreakerDocument = _BreakerDocument()
    on_unknown: Literal["retry", "hold"] = "retry"
    proxy: Annotated[str, AfterValidator(_proxy_url)] | None = None
    check_url: Annotated[str, AfterValidator(_endpoint_url)] | None = None

    def endpoint(self) -> Endpoint:
        """The endpoint in the form that dispatch works with."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        values["headers"] = MappingProxyType(self.headers)
        knobs = self.breaker.model_dump(exclude={"enabled"})
        values["breaker"] = Breaker(**knobs) if self.breaker.enabled else None
        values["permanent_statuses"] = frozenset(self.permanent_statuses)
        return Endpoint(**values)


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"a JSON array whose objects have each key once ({twice!r} is twice)")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"a JSON array ({name} is not JSON)")


def _endpoint(entry: object, index: int, problems: list[str]) -> Endpoint | None:
    try:
        return _EndpointDocument.model_validate(entry).endpoint()
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=False):
            pointer = "".join(f"/{_escape(part)}" for part in (index, *detail["loc"]))
            problems.append(f"{pointer}: {_endpoint_problem(detail)}")
    return None


def _endpoint_problem(detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden":
        is_breaker = detail["loc"][0] == "breaker" and len(detail["loc"]) > 1
        known = list((_BreakerDocument if is_breaker else _EndpointDocument).model_fields)
        hint = nearest(str(detail["loc"][-1]), known)
        what = "a breaker" if is_breaker else "an endpoint"
        return f"not a key of {what}" + (hint or f" (known: {', '.join(known)})")
    if detail["type"] == "missing":
        return "is required"
    if detail["type"] == "model_type":
        return "a JSON object" + ("" if detail["loc"] else " with key and url")
    return reason(detail)


def _escape(part: int | str) -> str:
    return str(part).replace("~", "~0").replace("/", "~1")


def reason(detail: ErrorDetails) -> str:
    """What was wrong, in our validators' words or in pydantic's."""
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    return detail["msg"][:1].lower() + detail["msg"][1:]
