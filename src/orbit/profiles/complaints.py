"""Checks a tree against a shipped JSON Schema and says in sentences what was expected, and where.

The schemas carry the words: where a value has a form of its own (a key, a URL), the sentence is
the schema's description. A found text is never repeated, since it may hold a secret.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from jsonschema_rs import Draft202012Validator, ValidationError

from orbit.profiles.source import Place
from orbit.vocabulary import nearest

SchemaName = Literal["profiles", "run-profiles"]

_TYPES = {
    "array": "an array",
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "object": "an object",
    "string": "a string",
}
_BOUNDS = {
    "minimum": "a number of at least {}",
    "maximum": "a number of at most {}",
    "exclusiveMinimum": "a number above {}",
    "minLength": "a string of {} or more characters",
    "maxLength": "a string of at most {} characters",
    "maxItems": "an array of at most {} entries",
}


@cache
def schema(name: SchemaName) -> dict[str, Any]:
    """The shipped JSON Schema (2020-12) of a file."""
    source = files("orbit.profiles") / "schemas" / f"{name}.schema.json"
    loaded: dict[str, Any] = json.loads(source.read_text("utf-8"))
    return loaded


def complaints(name: SchemaName, tree: Any) -> Iterator[tuple[Place, str]]:
    """Everything in which a JSON value departs from the schema: place and sentence."""
    for error in _validator(name).iter_errors(tree):
        yield from _complaints_of(error, schema(name))


@cache
def _validator(name: SchemaName) -> Draft202012Validator:
    return Draft202012Validator(schema(name))


def _complaints_of(error: ValidationError, root: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    place = tuple(error.instance_path)
    found, keyword = error.kind.as_dict(), error.kind.name
    rule = _rule(root, error.schema_path)
    match keyword:
        case "additionalProperties":
            known = list(rule["properties"])
            for key in found["unexpected"]:
                hint = nearest(key, known) or f"; expected {' or '.join(known)}"
                yield (*place, key), f"unknown key{hint}"
        case "required":
            why = ", since use is http" if "then" in error.schema_path else ""
            yield place, f'expected the key "{found["property"]}"{why}'
        case _:
            yield place, f"expected {_expected(keyword, rule, error.instance)}"


def _rule(root: Mapping[str, Any], path: Sequence[str | int]) -> Mapping[str, Any]:
    """The schema whose last-named keyword was broken."""
    rule: Any = root
    for part in path[:-1]:
        rule = rule[part]
    return rule  # type: ignore[no-any-return]


def _expected(keyword: str, rule: Mapping[str, Any], found: Any) -> str:
    match keyword:
        case "type":
            names = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
            return f"{' or '.join(_TYPES[name] for name in names)}, found {_kind(found)}"
        case "enum":
            return " or ".join(f'"{value}"' for value in rule["enum"])
        case "uniqueItems":
            return "each entry only once"
        case bound if bound in _BOUNDS:
            return _BOUNDS[bound].format(rule[bound])
        case _:
            return str(rule["description"]).rstrip(".")


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {value}"
        case str():
            return "a string"
        case dict():
            return "an object"
        case _:
            return "an array"
