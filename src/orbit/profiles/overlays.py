"""Overlays: files declare, overlays adjust, and both are shown.

An overlay is a JSON Patch on one profile or run profile: each place is tested for the value that
was there and then replaced, so it fits no file that says something else there by now. What does
not fit is `broken`: whoever brings new files hears of it, and nothing is dropped unless they say
so. A file that says itself what an overlay says has adopted it. The inverse takes an overlay away.
All of this is pure. Only a state, and numbers of a profile's free objects, are ever replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from orbit.errors import OverlaysBroken
from orbit.profiles.model import Documents, Profile, RunProfile

STATE = "/state"


class Target(StrEnum):
    """What an overlay lies on."""

    PROFILE = "profile"
    RUN_PROFILE = "run_profile"


class Origin(StrEnum):
    """Whose overlay it is."""

    PERSON = "person"
    AUTONOMY = "autonomy"


@dataclass(frozen=True, slots=True)
class Move:
    """One place (a JSON Pointer) and what becomes of its value."""

    path: str
    old: Any
    new: Any


@dataclass(frozen=True, slots=True)
class Overlay:
    """An overlay as it is stored; `namespaces`: where its target ran when it was made."""

    overlay_id: str
    target: Target
    target_id: str
    origin: Origin
    moves: tuple[Move, ...]
    namespaces: tuple[str, ...]
    actor: str
    reason: str | None
    created_at: datetime | None = None

    @property
    def name(self) -> str:
        """The target in words."""
        return f"{self.target.value.replace('_', ' ')} {self.target_id}"


@dataclass(frozen=True, slots=True)
class Broken:
    """An overlay that does not fit, and why."""

    overlay: Overlay
    why: str

    def __str__(self) -> str:
        moves = ", ".join(f"{one.path} {one.old!r} to {one.new!r}" for one in self.overlay.moves)
        return f"{self.overlay.name} ({moves}, by {self.overlay.actor}): {self.why}"


@dataclass(frozen=True, slots=True)
class Laid:
    """What files come to with overlays, and which of these they say themselves or do not fit."""

    documents: Documents
    adopted: tuple[Overlay, ...] = ()
    broken: tuple[Broken, ...] = ()


def json_patch(moves: Sequence[Move]) -> list[dict[str, Any]]:
    """The moves as a JSON Patch (RFC 6902) that tests before it replaces."""
    return [
        operation
        for one in moves
        for operation in (
            {"op": "test", "path": one.path, "value": one.old},
            {"op": "replace", "path": one.path, "value": one.new},
        )
    ]


def moves_of(patch: Sequence[Mapping[str, Any]]) -> tuple[Move, ...]:
    """The moves that `json_patch` made this of."""
    pairs = zip(patch[::2], patch[1::2], strict=True)
    return tuple(Move(new["path"], old["value"], new["value"]) for old, new in pairs)


def inverse_of(moves: Sequence[Move]) -> tuple[Move, ...]:
    """The moves back."""
    return tuple(Move(one.path, one.new, one.old) for one in reversed(moves))


def lay(documents: Documents, overlays: Sequence[Overlay]) -> Laid:
    """The documents with the overlays on them, in the order in which they were made."""
    adopted: list[Overlay] = []
    broken: list[Broken] = []
    for place, overlay in enumerate(overlays):
        found = target_of(documents, overlay.target, overlay.target_id)
        if found is None:
            broken.append(Broken(overlay, "the files do not have it"))
            continue
        said = [value_at(found, one.path) for one in overlay.moves]
        if all(map(_is_same, said, (one.new for one in overlay.moves))):
            adopted.append(overlay)
            continue
        why = _misfit(found, overlay, said)
        if why is None:
            documents = _replaced(documents, moved(found, overlay.moves))
        elif _is_overtaken(overlay, said, overlays[place + 1 :]):
            adopted.append(overlay)
        else:
            broken.append(Broken(overlay, why))
    return Laid(documents, tuple(adopted), tuple(broken))


def _is_overtaken(overlay: Overlay, said: Sequence[Any], later: Sequence[Overlay]) -> bool:
    """Whether the files say of each of its places what a later overlay makes of it."""
    target = (overlay.target, overlay.target_id)
    made = [move for one in later if (one.target, one.target_id) == target for move in one.moves]
    return all(
        any(move.path == own.path and _is_same(value, move.new) for move in made)
        for own, value in zip(overlay.moves, said, strict=True)
    )


def moved(found: Profile | RunProfile, moves: Sequence[Move]) -> Profile | RunProfile:
    """The profile or run profile with the values replaced; all of their places are there."""
    for one in moves:
        first, *others = _parts(one.path)
        value = _with(getattr(found, first), others, one.new)
        found = replace(found, **{first: value})
    return found


def target_of(documents: Documents, target: Target, target_id: str) -> Profile | RunProfile | None:
    """What an overlay lies on, where there is such a thing."""
    if target is Target.PROFILE:
        return documents.profile(target_id)
    return documents.run_profile(target_id)


def namespaces_of(documents: Documents, target: Target, target_id: str) -> tuple[str, ...]:
    """Where a profile or run profile runs, in order; `*` where it runs nowhere."""
    key = "profile_id" if target is Target.PROFILE else "run_profile_id"
    found = {one.namespace for one in documents.run_profiles if getattr(one, key) == target_id}
    return tuple(sorted(found)) or ("*",)


def value_at(found: Profile | RunProfile, path: str) -> Any:
    """The state, or a number of a profile's free objects; None for any other place."""
    if path == STATE:
        return found.state
    return found.number_at(path) if isinstance(found, Profile) else None


def misfits(broken: Sequence[Broken]) -> OverlaysBroken:
    """The refusal of files that these overlays do not fit."""
    text = "overlay does" if len(broken) == 1 else "overlays do"
    return OverlaysBroken(
        f"{len(broken)} {text} not fit the files: {'; '.join(map(str, broken))}; change the files, "
        "or say that overlays may be dropped (--drop-overlays)",
        overlays=[{"overlayId": one.overlay.overlay_id, "why": one.why} for one in broken],
    )


def _misfit(found: Profile | RunProfile, overlay: Overlay, said: Sequence[Any]) -> str | None:
    for one, value in zip(overlay.moves, said, strict=True):
        if value is None:
            return f"there is nothing at {one.path} that it could replace"
        if not _is_same(value, one.old):
            return f"it replaces {one.old!r} at {one.path}, and there is {value!r} by now"
        if overlay.origin is Origin.AUTONOMY and isinstance(found, Profile):
            allowed = found.allowance(one.path)
            if allowed is None:
                return f"autonomy may not move {one.path} any more"
            if not allowed.minimum <= one.new <= allowed.maximum:
                return f"{one.new!r} at {one.path} is not within what autonomy may set any more"
    return None


def _is_same(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _replaced(documents: Documents, by: Profile | RunProfile) -> Documents:
    if isinstance(by, Profile):
        profiles = (by if one.profile_id == by.profile_id else one for one in documents.profiles)
        return replace(documents, profiles=tuple(profiles))
    run_profiles = (
        by if one.run_profile_id == by.run_profile_id else one for one in documents.run_profiles
    )
    return replace(documents, run_profiles=tuple(run_profiles))


def _with(value: Any, parts: Sequence[str], new: Any) -> Any:
    """The JSON value with another at a place that is there."""
    if not parts:
        return new
    first, *others = parts
    if isinstance(value, Mapping):
        return {**value, first: _with(value[first], others, new)}
    index = int(first)
    return [*value[:index], _with(value[index], others, new), *value[index + 1 :]]


def _parts(pointer: str) -> list[str]:
    parts = pointer.removeprefix("/").split("/")
    return [part.replace("~1", "/").replace("~0", "~") for part in parts]
