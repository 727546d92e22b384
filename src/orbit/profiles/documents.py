"""Reads `profiles.json` and `runProfiles.json` and accepts them whole, or not at all.

Every problem of both files is reported at once, each with its file, line, JSON pointer and
what was expected. Three looks: the text (UTF-8, JSON, nothing that JSON or PostgreSQL cannot
carry), the shape (the shipped JSON Schemas), and what no schema can say (references, unique
ids, schedules, code that can be imported). Reading changes nothing and touches no database.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from orbit.cron import parse_cron, time_zone
from orbit.errors import ConfigurationInvalid
from orbit.execution.plugin import PluginUnusable, check_arguments, resolve
from orbit.profiles.complaints import SchemaName, complaints, schema
from orbit.profiles.model import (
    FREE_OBJECTS,
    Documents,
    ExecutionPolicy,
    InitiationSpec,
    NormalizationSpec,
    Profile,
    RetryPolicy,
    RunProfile,
    StepSpec,
    Tiers,
    document_body,
    documents_from_body,
)
from orbit.profiles.source import Place, SourceFile
from orbit.vocabulary import DRILL_PREFIX, is_drill, nearest

__all__ = [
    "PROFILES_FILE",
    "RUN_PROFILES_FILE",
    "Documents",
    "ExecutionPolicy",
    "InitiationSpec",
    "NormalizationSpec",
    "Profile",
    "RetryPolicy",
    "RunProfile",
    "StepSpec",
    "Tiers",
    "document_body",
    "documents_from_body",
    "read_documents",
    "schema",
]

PROFILES_FILE = "profiles.json"
RUN_PROFILES_FILE = "runProfiles.json"

Call = tuple[str, ...]
_STEP_CALL: Call = ("payload", "context")
_CALLS: tuple[tuple[str, str, Call], ...] = (
    ("initiation", "use", ("context",)),
    ("normalization", "use", ("batch", "context")),
    ("normalization", "split", _STEP_CALL),
)


def read_documents(
    config_dir: Path,
    *,
    endpoint_keys: Collection[str],
    check_imports: bool | Callable[[str], object] = True,
) -> Documents:
    """Reads and checks both files.

    `endpoint_keys`: what `distribution_targets` may name. `check_imports`: whether every `use`
    is imported, or what to try it with instead (it raises PluginUnusable). Raises
    ConfigurationInvalid with every problem of both files.
    """
    profiles = SourceFile(config_dir / PROFILES_FILE, "profiles")
    run_profiles = SourceFile(config_dir / RUN_PROFILES_FILE, "run_profiles")
    shapes: dict[SchemaName, SourceFile] = {"profiles": profiles, "run-profiles": run_profiles}
    for name, file in shapes.items():
        if file.read():
            for place, sentence in complaints(name, file.tree):
                file.report(place, sentence)
    _check_unique(profiles, "profile_id")
    _check_unique(run_profiles, "run_profile_id")
    if profiles.tree is not None:
        _check_profile_ids(run_profiles, profiles)
    _check_allowances(profiles)
    _check_namespaces(run_profiles)
    _check_targets(run_profiles, endpoint_keys)
    _check_schedules(run_profiles)
    if check_imports:
        _check_uses(run_profiles, resolve if check_imports is True else check_imports)
    problems = profiles.problems() + run_profiles.problems()
    if problems:
        raise ConfigurationInvalid(problems)
    return documents_from_body({**profiles.tree, **run_profiles.tree})


def _check_unique(file: SourceFile, id_key: str) -> None:
    first: dict[str, int] = {}
    repeats: list[tuple[int, int]] = []
    for index, entry in file.entries():
        identity = entry.get(id_key)
        if isinstance(identity, str) and first.setdefault(identity, index) != index:
            repeats.append((index, first[identity]))
    lines = file.lines([(file.list_key, earlier, id_key) for _, earlier in repeats])
    for index, earlier in repeats:
        line = lines[file.list_key, earlier, id_key]
        where = f"the first is on line {line}"
        file.report((file.list_key, index, id_key), f"expected a unique {id_key}; {where}")


def _check_profile_ids(run_profiles: SourceFile, profiles: SourceFile) -> None:
    known = {str(entry.get("profile_id")) for _, entry in profiles.entries()}
    for index, entry in run_profiles.entries():
        identity = entry.get("profile_id")
        if isinstance(identity, str) and identity not in known:
            message = f"expected a profile of {PROFILES_FILE}{_choice(identity, known)}"
            run_profiles.report((run_profiles.list_key, index, "profile_id"), message)


def _check_allowances(file: SourceFile) -> None:
    """What may move is there, is a number within its bounds, and is declared once."""
    for index, entry in file.entries():
        autonomy = entry.get("autonomy")
        allow = autonomy.get("allow") if isinstance(autonomy, dict) else None
        known: set[str] = set()
        for number, one in enumerate(allow if isinstance(allow, list) else ()):
            place = (file.list_key, index, "autonomy", "allow", number)
            for key, message in _allowance_complaints(entry, one, known):
                file.report((*place, key), message)


def _allowance_complaints(
    profile: Mapping[str, Any], one: Any, known: set[str]
) -> Iterator[tuple[str, str]]:
    """Of an allowance whose shape is right: the key, and what was expected."""
    shape = {"path": str, "minimum": int | float, "maximum": int | float, "step": int | float}
    if not isinstance(one, dict) or not all(
        isinstance(one.get(key), kind) for key, kind in shape.items()
    ):
        return
    path, low, high = one["path"], one["minimum"], one["maximum"]
    pattern = schema("profiles")["$defs"]["allowance"]["properties"]["path"]["pattern"]
    if not re.search(pattern, path) or one["step"] <= 0:
        return
    free = {key: profile[key] for key in FREE_OBJECTS if isinstance(profile.get(key), dict)}
    found = Profile("", "", "enabled", **free).number_at(path)
    if found is None:
        yield "path", "expected a JSON Pointer to a number of this profile"
    elif not low <= found <= high:
        yield "path", f"expected the number there to lie between {low} and {high}"
    if path in known:
        yield "path", "expected each path once"
    known.add(path)
    on = one.get("on")
    for rule, change in on.items() if isinstance(on, dict) else ():
        if isinstance(change, int | float) and not 0 < abs(change) <= one["step"]:
            yield "on", f"{rule}: expected a change of at most {one['step']}, up or down"


def _check_namespaces(file: SourceFile) -> None:
    for index, entry in file.entries():
        namespace = entry.get("namespace")
        if isinstance(namespace, str) and is_drill(namespace):
            message = f"expected a name that does not begin with {DRILL_PREFIX}: drills have these"
            file.report((file.list_key, index, "namespace"), message)


def _check_targets(file: SourceFile, known: Collection[str]) -> None:
    for index, entry in file.entries():
        targets = entry.get("distribution_targets")
        for number, target in enumerate(targets if isinstance(targets, list) else ()):
            if isinstance(target, str) and target not in known:
                message = f"expected an endpoint's key{_choice(target, known)}"
                file.report((file.list_key, index, "distribution_targets", number), message)


def _choice(name: str, known: Collection[str]) -> str:
    """The nearest known name, or all of them while they are few."""
    if not known:
        return "; there are none"
    listed = ", ".join(sorted(known)[:20]) + (", …" if len(known) > 20 else "")
    return nearest(name, known) + f" (known: {listed})"


def _policies(file: SourceFile) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    for index, entry in file.entries():
        policy = entry.get("execution_policy")
        if isinstance(policy, dict):
            yield (file.list_key, index, "execution_policy"), policy


def _check_schedules(file: SourceFile) -> None:
    for place, policy in _policies(file):
        zone, expression = policy.get("timezone", "UTC"), policy.get("schedule")
        if not isinstance(zone, str):
            continue
        try:
            time_zone(zone)
        except ValueError as error:
            file.report((*place, "timezone"), str(error))
            zone = "UTC"
        if isinstance(expression, str) and expression.strip():
            try:
                parse_cron(expression, zone)
            except ValueError as error:
                file.report((*place, "schedule"), str(error))


def _check_uses(file: SourceFile, attempt: Callable[[str], object]) -> None:
    """Tries every `use` that is not http, each name once, and what it takes for each call."""
    tried: dict[str, object] = {}
    outcome: dict[tuple[str, Call], str | None] = {}
    for policy_place, policy in _policies(file):
        for place, use, call in _uses(policy):
            if use == "http":
                continue
            if use not in tried:
                tried[use] = _tried(use, attempt)
            if (use, call) not in outcome:
                outcome[use, call] = _complaint_about(tried[use], call)
            message = outcome[use, call]
            if message:
                file.report((*policy_place, *place), f"expected a usable plug-in: {message}")


def _tried(use: str, attempt: Callable[[str], object]) -> object:
    """What the attempt gave, or how it was refused."""
    try:
        return attempt(use)
    except PluginUnusable as error:
        return error


def _complaint_about(tried: object, call: Call) -> str | None:
    if isinstance(tried, PluginUnusable):
        return str(tried)
    try:
        if callable(tried):
            check_arguments(tried, call)
    except PluginUnusable as error:
        return str(error)
    return None


def _uses(policy: Mapping[str, Any]) -> Iterator[tuple[Place, str, Call]]:
    """Every `use` and `split` of a policy with how it is called, whatever else may be wrong."""
    for name, key, call in _CALLS:
        part = policy.get(name)
        if isinstance(part, dict) and isinstance(part.get(key), str):
            yield (name, key), part[key], call
    tiers = policy.get("tiers")
    for tier, steps in tiers.items() if isinstance(tiers, dict) else ():
        for index, step in enumerate(steps if isinstance(steps, list) else ()):
            if isinstance(step, dict) and isinstance(step.get("use"), str):
                yield ("tiers", tier, index, "use"), step["use"], _STEP_CALL
