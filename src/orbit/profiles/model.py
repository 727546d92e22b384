"""Profiles and run profiles as checked, frozen objects, and their canonical body.

The body is plain JSON in which every default is filled in and everything is sorted by id, so
that files which mean the same have the same body and the same digest. A cycle is pinned to a
stored body: building from one needs no file, no schema and no import, and trusts what it gets.
Free objects are handed on as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from orbit.execution.retry import Backoff

NO_OP = "orbit:no_op"
_DIGIT = 1e-9  # what floating point may add to a sum of steps

State = Literal["enabled", "disabled"]
Free = Mapping[str, Any]
Tags = Mapping[str, str | int | float | bool]


FREE_OBJECTS = frozenset(
    {"style_vector", "asset_bindings", "execution_rules", "distribution_map", "value_tags"}
)
"""What of a profile may be changed: Orbit hands it on without reading it."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """A number of a profile that may move: by `step` at once, from `minimum` to `maximum`.

    `on` has, by rule, the change that it may suggest. `per_day` None: any number of steps.
    """

    path: str
    minimum: float
    maximum: float
    step: float
    per_day: float | None = None
    on: Mapping[str, float] = field(default_factory=dict)

    def permits(self, present: float, value: float) -> bool:
        """Whether one change may make this of the present value; a digit at the end is forgiven."""
        within_step = abs(value - present) <= self.step * (1 + _DIGIT)
        return self.minimum <= value <= self.maximum and within_step

    def has_room(self, moved: float, change: float) -> bool:
        """Whether a day in which it was moved so far already has room for a change."""
        return self.per_day is None or moved + abs(change) <= self.per_day * (1 + _DIGIT)


@dataclass(frozen=True, slots=True)
class Profile:
    """Who: the free objects' meaning is the user's."""

    profile_id: str
    label: str
    state: State
    style_vector: Free = field(default_factory=dict)
    asset_bindings: Free = field(default_factory=dict)
    execution_rules: Free = field(default_factory=dict)
    distribution_map: Free = field(default_factory=dict)
    value_tags: Tags = field(default_factory=dict)
    autonomy: Free = field(default_factory=dict)

    @property
    def is_enabled(self) -> bool:
        """Whether the file lets its run profiles run."""
        return self.state == "enabled"

    @property
    def allowances(self) -> tuple[Allowance, ...]:
        """The numbers that may move, as declared."""
        return tuple(Allowance(**entry) for entry in self.autonomy.get("allow", ()))

    def allowance(self, pointer: str) -> Allowance | None:
        """How the number at a JSON Pointer may move; None where it may not."""
        return next((one for one in self.allowances if one.path == pointer), None)

    def number_at(self, pointer: str) -> int | float | None:
        """The number at a JSON Pointer into the free objects; None where there is none."""
        first, *others = (
            part.replace("~1", "/").replace("~0", "~")
            for part in pointer.removeprefix("/").split("/")
        )
        found: Any = getattr(self, first) if first in FREE_OBJECTS else None
        for part in others:
            found = _member(found, part)
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return found if is_number else None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Attempts in all, the first included, and the delays between them, in seconds."""

    max_attempts: int = 3
    base_seconds: float = 0.5
    factor: float = 2.0
    cap_seconds: float = 30.0

    @property
    def backoff(self) -> Backoff:
        """The delays, as phase 1 takes them."""
        return Backoff(self.base_seconds, self.factor, self.cap_seconds)


@dataclass(frozen=True, slots=True)
class StepSpec:
    """One transformation; `retry` is the policy's with the step's own values put over it."""

    use: str
    url: str | None = None
    timeout_seconds: float = 60.0
    options: Free = field(default_factory=dict)
    retry: RetryPolicy = RetryPolicy()


@dataclass(frozen=True, slots=True)
class NormalizationSpec:
    """How the last payload becomes items; `split` None means that it is the one input."""

    use: str = NO_OP
    url: str | None = None
    split: str | None = None
    batch_size: int = 100
    timeout_seconds: float = 60.0
    options: Free = field(default_factory=dict)
    retry: RetryPolicy = RetryPolicy()


@dataclass(frozen=True, slots=True)
class InitiationSpec:
    """What makes a cycle's first payload in place of the initiation object itself."""

    use: str
    timeout_seconds: float = 60.0
    options: Free = field(default_factory=dict)
    retry: RetryPolicy = RetryPolicy()


@dataclass(frozen=True, slots=True)
class Tiers:
    """The three lists of transformations."""

    tier1: tuple[StepSpec, ...] = ()
    tier2: tuple[StepSpec, ...] = ()
    tier3: tuple[StepSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class ExecutionPolicy:
    """When and how a run profile runs. `schedule` None: never by itself.

    `catch_up_limit` None: the node's `catch_up_limit` setting.
    """

    schedule: str | None = None
    timezone: str = "UTC"
    misfire: Literal["skip", "fire_once", "catch_up"] = "fire_once"
    overlap: Literal["skip", "queue", "allow"] = "skip"
    jitter_seconds: float = 0.0
    catch_up_limit: int | None = None
    initiation: InitiationSpec | None = None
    tiers: Tiers = Tiers()
    retry: RetryPolicy = RetryPolicy()
    normalization: NormalizationSpec = NormalizationSpec()


@dataclass(frozen=True, slots=True)
class RunProfile:
    """A profile bound to an execution surface; `distribution_targets` are endpoint keys."""

    run_profile_id: str
    profile_id: str
    namespace: str
    state: State
    execution_policy: ExecutionPolicy = ExecutionPolicy()
    asset_bundle: Free = field(default_factory=dict)
    distribution_targets: tuple[str, ...] = ()
    value_tags: Tags = field(default_factory=dict)

    @property
    def is_enabled(self) -> bool:
        """Whether the file lets it run; its profile must be enabled too."""
        return self.state == "enabled"


@dataclass(frozen=True, slots=True)
class Documents:
    """One whole configuration, each part sorted by id."""

    profiles: tuple[Profile, ...] = ()
    run_profiles: tuple[RunProfile, ...] = ()

    def profile(self, profile_id: str) -> Profile | None:
        """The profile of that id."""
        return next((one for one in self.profiles if one.profile_id == profile_id), None)

    def run_profile(self, run_profile_id: str) -> RunProfile | None:
        """The run profile of that id."""
        found = (one for one in self.run_profiles if one.run_profile_id == run_profile_id)
        return next(found, None)


def document_body(documents: Documents) -> dict[str, Any]:
    """The canonical body: plain JSON values, every default written out."""
    body: dict[str, Any] = _plain(documents)
    return body


def documents_from_body(body: Mapping[str, Any]) -> Documents:
    """Documents from a checked body or from checked files' content; missing keys are defaults."""
    profiles = (Profile(**entry) for entry in body["profiles"])
    run_profiles = (_run_profile(entry) for entry in body["run_profiles"])
    return Documents(
        tuple(sorted(profiles, key=lambda one: one.profile_id)),
        tuple(sorted(run_profiles, key=lambda one: one.run_profile_id)),
    )


def _member(found: Any, part: str) -> Any:
    """What a part of a JSON Pointer names in an object or an array; None where there is none."""
    if isinstance(found, Mapping):
        return found.get(part)
    is_index = isinstance(found, list | tuple) and re.fullmatch("0|[1-9][0-9]{0,8}", part)
    return found[int(part)] if is_index and int(part) < len(found) else None


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _run_profile(entry: Mapping[str, Any]) -> RunProfile:
    values = dict(entry)
    values["execution_policy"] = _execution_policy(entry.get("execution_policy", {}))
    values["distribution_targets"] = tuple(entry.get("distribution_targets", ()))
    return RunProfile(**values)


def _execution_policy(entry: Mapping[str, Any]) -> ExecutionPolicy:
    values = dict(entry)
    retry = _retry(entry.get("retry", {}), RetryPolicy())
    limit, initiation = entry.get("catch_up_limit"), entry.get("initiation")
    values["schedule"] = (entry.get("schedule") or "").strip() or None
    values["jitter_seconds"] = float(entry.get("jitter_seconds", 0))
    values["catch_up_limit"] = None if limit is None else int(limit)
    values["initiation"] = InitiationSpec(**_step(initiation, retry)) if initiation else None
    values["retry"] = retry
    values["tiers"] = Tiers(
        **{
            name: tuple(StepSpec(**_step(step, retry)) for step in steps)
            for name, steps in entry.get("tiers", {}).items()
        }
    )
    normalization = _step(entry.get("normalization", {}), retry)
    normalization["batch_size"] = int(normalization.get("batch_size", 100))
    values["normalization"] = NormalizationSpec(**normalization)
    return ExecutionPolicy(**values)


def _step(entry: Mapping[str, Any], policy: RetryPolicy) -> dict[str, Any]:
    """What a step, a normaliser and an initiator have in common, with numbers of one type."""
    values = dict(entry)
    values["timeout_seconds"] = float(entry.get("timeout_seconds", 60))
    values["retry"] = _retry(entry.get("retry", {}), policy)
    return values


def _retry(entry: Mapping[str, Any], base: RetryPolicy) -> RetryPolicy:
    """JSON writes 3 and 3.0 for the same number; here each value has its own type."""
    values: dict[str, Any] = {name: float(value) for name, value in entry.items()}
    if "max_attempts" in values:
        values["max_attempts"] = int(values["max_attempts"])
    return replace(base, **values)
