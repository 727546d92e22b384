"""Bounds: whether a profile lets autonomy make a change, and why not.

A change moves numbers that the profile's `autonomy.allow` names, each by a step at most, within
its minimum and maximum, and within what a day has room for. Pure. What is not written there is
not allowed: neither by a proposal, nor by whoever approved it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from orbit.profiles.model import Profile
from orbit.profiles.overlays import Move


class Why(StrEnum):
    """Why a function of autonomy did nothing."""

    DISABLED = "phase4_disabled"
    NO_MUTATION = "mutation_not_allowed"
    PAUSED = "global_pause"
    HALTED = "namespace_halted"
    NOT_ARMED = "not_armed"
    IN_FLIGHT = "change_in_flight"
    NOT_RUNNING = "profile_not_running"
    CHANGED = "profile_changed"
    UNFOUNDED = "evidence_changed"
    NOT_ALLOWED = "not_allowed"
    BEYOND = "beyond_bounds"
    DAY_SPENT = "day_spent"
    NO_BASELINE = "no_baseline"

    @property
    def words(self) -> str:
        """The reason in words."""
        return _WORDS[self]


_WORDS = {
    Why.DISABLED: "ORBIT_PHASE4_ENABLED is not true",
    Why.NO_MUTATION: "ORBIT_PHASE4_ALLOW_MUTATION is not true",
    Why.PAUSED: "ORBIT_GLOBAL_PAUSE is set",
    Why.HALTED: "a namespace of the profile is halted",
    Why.NOT_ARMED: "the profile is not armed, or was not since a halt",
    Why.IN_FLIGHT: "a change of the profile is on probation",
    Why.NOT_RUNNING: "the profile is disabled, runs nowhere, or is not configured any more",
    Why.CHANGED: "the profile is another than the one that the change was approved for",
    Why.UNFOUNDED: "the rules do not suggest the change any more, or its rule does not answer",
    Why.NOT_ALLOWED: "the profile's autonomy.allow does not name what the change moves",
    Why.BEYOND: "the change goes beyond a bound or a step of autonomy.allow",
    Why.DAY_SPENT: "it was moved within 24 hours as far as per_day lets it",
    Why.NO_BASELINE: "there are too few cycles yet to notice whether the change does harm",
}


def moves_in(profile: Profile, patch: Sequence[Mapping[str, Any]]) -> tuple[Move, ...] | Why:
    """The moves of an approved patch, if it replaces numbers that may be moved."""
    moves: list[Move] = []
    for one in patch:
        path, value = one.get("path"), one.get("value")
        if one.get("op") != "replace" or not isinstance(path, str) or not _is_number(value):
            return Why.NOT_ALLOWED
        present = profile.number_at(path)
        if present is None or profile.allowance(path) is None:
            return Why.NOT_ALLOWED
        moves.append(Move(path, present, value))
    is_each_once = len({one.path for one in moves}) == len(moves) > 0
    return tuple(moves) if is_each_once else Why.NOT_ALLOWED


def why_not(
    profile: Profile, moves: Sequence[Move], of_today: Iterable[Sequence[Move]]
) -> Why | None:
    """Why the profile does not let autonomy make these moves; None where it does.

    `of_today` are the changes that autonomy made within 24 hours, those taken back included.
    """
    moved: dict[str, float] = {}
    for change in of_today:
        for one in change:
            moved[one.path] = moved.get(one.path, 0.0) + abs(one.new - one.old)
    for one in moves:
        allowed = profile.allowance(one.path)
        if allowed is None:
            return Why.NOT_ALLOWED
        if not allowed.permits(one.old, one.new):
            return Why.BEYOND
        if not allowed.has_room(moved.get(one.path, 0.0), one.new - one.old):
            return Why.DAY_SPENT
    return None


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
