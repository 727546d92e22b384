"""A cursor that converts each statement once.

The driver's own cursor keeps the conversion of its placeholders to PostgreSQL's only for short
statements; for ours, which are static and long, it would take as long as the round trip.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Self

from psycopg import AsyncRawCursor
from psycopg.types.array import ListBinaryDumper

_PLACEHOLDER = re.compile(rb"%(?:%|(?:\((\w+)\))?([sbt]))")


class BinaryList(list[bytes]):
    """Bytes that go as a binary array: a `%(name)b` placeholder's list."""


class BinaryListDumper(ListBinaryDumper):
    """Registered for BinaryList on each connection."""


class Cursor(AsyncRawCursor[Any]):
    """Takes statements with `%(name)s` or `%s`, as the driver's own does."""

    async def execute(self, query: Any, params: Any = None, **how: Any) -> Self:
        """Runs a statement; `params` is a mapping or a sequence."""
        if params is not None:
            query, names = converted(query if isinstance(query, bytes) else query.encode())
            params = _ordered(params, names)
        return await super().execute(query, params, **how)


@lru_cache(maxsize=2048)
def converted(query: bytes) -> tuple[bytes, tuple[tuple[str | int, bool], ...]]:
    """The statement with `$1`, `$2` …, and what each stands for: a name or place, binary or not."""
    found: dict[tuple[str | int, bool], int] = {}

    def replace(match: re.Match[bytes]) -> bytes:
        if match[2] is None:
            return b"%"
        key: str | int = len(found) if match[1] is None else match[1].decode()
        return b"$%d" % found.setdefault((key, match[2] == b"b"), len(found) + 1)

    return _PLACEHOLDER.sub(replace, query), tuple(found)


def _ordered(
    params: Mapping[str, Any] | Sequence[Any], names: Sequence[tuple[str | int, bool]]
) -> list[Any]:
    return [
        BinaryList(value) if is_binary and isinstance(value, list) else value
        for value, is_binary in ((params[name], is_binary) for name, is_binary in names)  # type: ignore[index]
    ]
