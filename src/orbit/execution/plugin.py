"""Finds the Python callable that a `use` names: validation and execution ask the same function.

A `use` is `module:name` (the name may be dotted), the name of an entry point of the group
`orbit.steps`, or one of Orbit's own. `http` is no callable and is refused here. Importing runs
the user's code, so whatever it raises, even an exit, becomes one clear refusal. Whether the
callable takes what its place gives is judged by its signature; it is not called.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module, invalidate_caches
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

from orbit.errors import NotHere

ENTRY_POINT_GROUP = "orbit.steps"


class PluginUnusable(NotHere):
    """A `use` names nothing that can be called; the message says what is missing."""

    code: ClassVar[str] = "plugin_unusable"


async def no_op(payload: Any, context: Any) -> Any:
    """Hands on what it was given: the default normaliser, and a step that does nothing."""
    return payload


_BUILT_IN: Mapping[str, Callable[..., Any]] = {"orbit:no_op": no_op}


def resolve(use: str) -> Callable[..., Any]:
    """The callable that `use` names; PluginUnusable says why there is none."""
    if use in _BUILT_IN:
        return _BUILT_IN[use]
    module, _, name = use.partition(":")
    is_path = ":" in use
    found = _attribute(_imported(module, use), name, use) if is_path else _from_entry_point(use)
    if not callable(found):
        raise PluginUnusable(f"{use} is not callable; it is of type {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def check_arguments(function: Callable[..., Any], names: Sequence[str]) -> None:
    """Raises PluginUnusable unless the callable takes these arguments, by position.

    What tells no signature (some callables written in C) is let be.
    """
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return
    try:
        signature.bind(*names)
    except TypeError:
        given = ", ".join(names)
        shown = str(signature.replace(return_annotation=inspect.Signature.empty))[:200]
        raise PluginUnusable(f"it is called with ({given}), and takes {shown}") from None


def _imported(module: str, use: str) -> Any:
    if not all(part.isidentifier() for part in module.split(".")):
        raise PluginUnusable(f"{use!r} is not module:name")
    if module not in sys.modules:
        invalidate_caches()  # the file may be newer than this process's look at its folder
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise PluginUnusable(f"there is no module {error.name} on the import path") from error
        raise _import_failed(module, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(module, error) from error


def _import_failed(name: str, error: BaseException) -> PluginUnusable:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return PluginUnusable(f"importing {name} failed with {reason[:300]}")


def _attribute(module: Any, name: str, use: str) -> Any:
    found = module
    if not all(part.isidentifier() for part in name.split(".")):
        raise PluginUnusable(f"{use!r} is not module:name")
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise PluginUnusable(f"module {module.__name__} has no {name}") from None
    return found


@cache
def _entry_points(_import_path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """Looks through every installed distribution, so it is done once for an import path."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _from_entry_point(use: str) -> Any:
    points = _entry_points(tuple(sys.path))
    point = points.get(use)
    if point is None:
        known = ", ".join(sorted(points)) or "none are installed"
        raise PluginUnusable(
            f"{use!r} is neither module:name, nor http, "
            f"nor an entry point of the group {ENTRY_POINT_GROUP} (known: {known})"
        )
    module, _, name = point.value.partition(":")
    return _attribute(_imported(module.strip(), use), name.split("[")[0].strip(), use)
