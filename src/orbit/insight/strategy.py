"""Strategy: rules that find something in a profile's signals and figures, and what they suggest.

A rule says what it found, never what a field means. What may be done about it is declared by the
profile: an entry of `autonomy.allow` names, under `on`, the rules that may move its field, and by
how much. Without such an entry nothing is suggested. All of this is pure: the same situation
always gives the same suggestions, to the byte.

Rules of one's own are entry points of the group `orbit.rules`: an object with a `name` and
`find(situation) -> Finding | None`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol

import structlog

from orbit.canonical import canonical_json, sha256_hex
from orbit.insight.evidence import wilson_bounds
from orbit.insight.signals import SignalName
from orbit.profiles.model import Profile

ENTRY_POINT_GROUP = "orbit.rules"

_SIGMAS = 1.96
_UNKNOWN_MARGIN = 0.02
_LEAST_ATTEMPTS = 50
_FLAPS = 4
_LEAST_REPORTS = 20
_VALUE_KEPT = 0.8
_ID_DIGITS = 32
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SaidSignal:
    """What was said last of a metric, under the revision in force."""

    signal_id: str
    metric: str
    name: str
    confidence: float
    recent: float
    baseline: float
    from_position: int
    to_position: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What events of a stretch of time came to; `opened`: of the profile's lanes."""

    cycles: int = 0
    attempts: int = 0
    unknown: int = 0
    opened: int = 0
    values: int = 0
    value: float = 0.0
    costs: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Situation:
    """What a rule may look at: one profile in one namespace.

    `recent` is the last whole UTC day (`day`), `before` the seven days before it; both rest on
    the positions from `from_position` to `to_position`.
    """

    namespace: str
    profile: Profile
    signals: Sequence[SaidSignal] = ()
    day: str = ""
    recent: Figures = Figures()
    before: Figures = Figures()
    from_position: int = 0
    to_position: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule found: why in plain words, the effect to expect, and what it rests on.

    `evidence` is JSON: another evidence is another proposal. Positions are of telemetry.
    """

    why: str
    expected: str
    evidence: Mapping[str, Any]
    from_position: int
    to_position: int


class Rule(Protocol):
    """Looks at a situation; None where there is nothing to say."""

    @property
    def name(self) -> str:
        """Under which a profile's `on` names it."""
        ...

    def find(self, situation: Situation) -> Finding | None:
        """Pure: nothing but the situation counts."""
        ...


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A change of a profile; `patch` is a JSON Patch of `replace` on its body.

    `body` is canonical JSON with all of it, `digest` its SHA-256, and the id begins that.
    """

    profile_id: str
    rule: str
    profile_digest: str
    patch: Sequence[Mapping[str, Any]]
    body: str
    digest: str
    from_position: int
    to_position: int

    @property
    def proposal_id(self) -> str:
        """The same whenever the same is suggested on the same grounds."""
        return self.digest[:_ID_DIGITS]

    def again(self, times: int) -> Suggestion:
        """The same once more, which was superseded so many times: a suggestion of its own."""
        if not times:
            return self
        body = canonical_json({**json.loads(self.body), "again": times})
        return replace(self, body=body.decode(), digest=sha256_hex(body))


@dataclass(frozen=True, slots=True)
class _Signals:
    """The last word on at least one metric is this signal."""

    signal: SignalName
    expected: str

    @property
    def name(self) -> str:
        return self.signal.value

    def find(self, situation: Situation) -> Finding | None:
        found = [one for one in situation.signals if one.name == self.signal]
        if not found:
            return None
        said = "; ".join(
            f"{one.metric} came to {one.recent:.2f} lately, to {one.baseline:.2f} in its baseline "
            f"(such signals were right in {one.confidence:.0%} of replays)"
            for one in found
        )
        return Finding(
            why=f"{self.signal.value}: {said}.",
            expected=self.expected,
            evidence={"signals": [one.signal_id for one in found]},
            from_position=min(one.from_position for one in found),
            to_position=max(one.to_position for one in found),
        )


@dataclass(frozen=True, slots=True)
class _UnknownShare:
    """Of more attempts than before nobody knows the end."""

    name: str = "unknown_share_rising"

    def find(self, situation: Situation) -> Finding | None:
        recent, before = situation.recent, situation.before
        if min(recent.attempts, before.attempts) < _LEAST_ATTEMPTS:
            return None
        shares = recent.unknown / recent.attempts, before.unknown / before.attempts
        low, _ = wilson_bounds(shares[0], recent.attempts, _SIGMAS)
        _, high = wilson_bounds(shares[1], before.attempts, _SIGMAS)
        if low <= high + _UNKNOWN_MARGIN:
            return None
        return _of_day(
            situation,
            f"{recent.unknown} of {recent.attempts} attempts ended unknown on {situation.day} "
            f"({shares[0]:.1%}), {before.unknown} of {before.attempts} in the seven days before "
            f"({shares[1]:.1%}).",
            "Fewer attempts that nobody knows the end of, and so fewer items sent twice.",
            {"attempts": [recent.attempts, before.attempts]}
            | {"unknown": [recent.unknown, before.unknown]},
        )


@dataclass(frozen=True, slots=True)
class _Flapping:
    """Breakers of the profile's lanes opened again and again within a day."""

    name: str = "breaker_flapping"

    def find(self, situation: Situation) -> Finding | None:
        opened, a_day = situation.recent.opened, situation.before.opened / 7
        if opened < _FLAPS or opened <= 2 * a_day:
            return None
        return _of_day(
            situation,
            f"Breakers of this profile's lanes opened {opened} times on {situation.day}, "
            f"{a_day:.1f} times a day in the seven days before.",
            "A receiver that is asked for less may hold; breakers would open less often.",
            {"opened": [opened, situation.before.opened]},
        )


@dataclass(frozen=True, slots=True)
class _ValuePerCost:
    """What was reported as `value` fell against what was reported as `cost`."""

    name: str = "value_per_cost_falling"

    def find(self, situation: Situation) -> Finding | None:
        recent, before = situation.recent, situation.before
        counts = (recent.values, recent.costs, before.values, before.costs)
        if min(counts) < _LEAST_REPORTS or min(recent.cost, before.cost, before.value) <= 0:
            return None
        ratios = recent.value / recent.cost, before.value / before.cost
        if ratios[0] >= _VALUE_KEPT * ratios[1]:
            return None
        return _of_day(
            situation,
            f"Value per cost came to {ratios[0]:.3g} on {situation.day}, to {ratios[1]:.3g} in the "
            "seven days before. That is a comparison of sums and no test: look at the reports.",
            "More reported value for the same reported cost.",
            {"value": [recent.value, before.value], "cost": [recent.cost, before.cost]},
        )


SHIPPED: tuple[Rule, ...] = (
    _Signals(SignalName.LOW, "The metrics named come back to their baseline."),
    _Signals(SignalName.ELEVATED, "What works better here is carried a step further."),
    _UnknownShare(),
    _Flapping(),
    _ValuePerCost(),
)


@cache
def rules() -> tuple[Rule, ...]:
    """The shipped rules and those of installed packages; one that cannot be used is logged."""
    found = list(SHIPPED)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            rule = point.load()
            rule = rule() if isinstance(rule, type) else rule
            is_new = rule.name not in {one.name for one in found} and callable(rule.find)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's code, whatever it does
            log.warning("rule_unusable", rule=point.name, error=str(error))
            continue
        if is_new:
            found.append(rule)
        else:
            log.warning("rule_unusable", rule=point.name, error="its name is taken")
    return tuple(found)


def profile_body(profile: Profile) -> dict[str, Any]:
    """A profile as its canonical body has it."""
    return {name: getattr(profile, name) for name in Profile.__dataclass_fields__}


def profile_digest(profile: Profile) -> str:
    """The SHA-256 of a profile's canonical body: another one is another profile."""
    return sha256_hex(canonical_json(profile_body(profile)))


def reactions(profile: Profile, rule: str) -> Iterator[tuple[str, float]]:
    """The fields that the profile lets a rule move, by JSON Pointer, with their new values.

    A step that a bound cuts short is taken as far as the bound; one of no length is left out.
    """
    for allowed in profile.allowances:
        change, present = allowed.on.get(rule), profile.number_at(allowed.path)
        if change is None or present is None:
            continue
        wanted = present + max(-allowed.step, min(allowed.step, change))
        value = max(allowed.minimum, min(allowed.maximum, wanted))
        # A number that a file has put beyond its bounds by more than a step is a person's.
        if value == present or not allowed.permits(present, value):
            continue
        is_whole = isinstance(present, int) and float(value).is_integer()
        yield allowed.path, int(value) if is_whole else value


def suggestions(situation: Situation, using: Iterable[Rule]) -> tuple[list[Suggestion], set[str]]:
    """What rules suggest, one each at most, and the names of the rules that answered.

    One that fails is logged: whether it would suggest anything nobody knows.
    """
    digest = profile_digest(situation.profile)
    found: list[Suggestion] = []
    answered: set[str] = set()
    for rule in using:
        changes = sorted(reactions(situation.profile, rule.name))
        if not changes:
            continue
        try:
            finding = rule.find(situation)
            if finding is not None:
                found.append(_suggestion(situation, rule.name, digest, changes, finding))
            answered.add(rule.name)
        except Exception as error:  # noqa: BLE001 - the user's code; the other rules go on
            log.warning("rule_failed", rule=rule.name, error=type(error).__name__)
    return found, answered


def declares_reaction(profile: Profile) -> bool:
    """Whether any rule may suggest anything for the profile."""
    return any(allowed.on for allowed in profile.allowances)


def _suggestion(
    situation: Situation,
    rule: str,
    digest: str,
    changes: Sequence[tuple[str, float]],
    finding: Finding,
) -> Suggestion:
    patch = [{"op": "replace", "path": path, "value": value} for path, value in changes]
    body = canonical_json(
        {
            "namespace": situation.namespace,
            "profileId": situation.profile.profile_id,
            "profileDigest": digest,
            "rule": rule,
            "patch": patch,
            "replaced": [situation.profile.number_at(path) for path, _ in changes],
            "why": finding.why,
            "expected": finding.expected,
            "evidence": dict(finding.evidence),
            "fromPosition": finding.from_position,
            "toPosition": finding.to_position,
        }
    )
    return Suggestion(
        profile_id=situation.profile.profile_id,
        rule=rule,
        profile_digest=digest,
        patch=patch,
        body=body.decode(),
        digest=sha256_hex(body),
        from_position=finding.from_position,
        to_position=finding.to_position,
    )


def _of_day(situation: Situation, why: str, expected: str, evidence: Mapping[str, Any]) -> Finding:
    return Finding(
        why,
        expected,
        {"day": situation.day, **evidence},
        situation.from_position,
        situation.to_position,
    )
