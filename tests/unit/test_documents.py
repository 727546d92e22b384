"""Configuration files: accepted whole, or refused with every problem at its line and pointer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema_rs import meta

from orbit.canonical import canonical_digest
from orbit.errors import ConfigurationInvalid, Problem
from orbit.execution.plugin import PluginUnusable, no_op, resolve
from orbit.profiles.complaints import complaints, schema
from orbit.profiles.documents import (
    Documents,
    RetryPolicy,
    document_body,
    documents_from_body,
    read_documents,
)

_PROFILE: dict[str, Any] = {"profile_id": "nova", "label": "Nova", "state": "enabled"}
_RUN_PROFILE: dict[str, Any] = {
    "run_profile_id": "nova-daily",
    "profile_id": "nova",
    "namespace": "brand-a",
    "state": "enabled",
    "execution_policy": {
        "schedule": "0 6 * * *",
        "timezone": "Europe/Zurich",
        "misfire": "fire_once",
        "overlap": "skip",
        "jitter_seconds": 0,
        "initiation": {"use": "json:loads"},
        "tiers": {
            "tier1": [{"use": "operator:add", "options": {"a": [1]}, "retry": {"max_attempts": 1}}],
            "tier2": [{"use": "http", "url": "http://127.0.0.1:9/enrich", "timeout_seconds": 20}],
            "tier3": [],
        },
        "retry": {"max_attempts": 3, "base_seconds": 0.5, "factor": 2.0, "cap_seconds": 30.0},
        "normalization": {"use": "orbit:no_op", "split": "operator:add", "batch_size": 100},
    },
    "asset_bundle": {},
    "distribution_targets": ["default-endpoint"],
    "value_tags": {"cost_center": "brand-a"},
}


def _write(folder: Path, profiles: object, run_profiles: object, indent: int | None = 1) -> None:
    for name, content in (("profiles.json", profiles), ("runProfiles.json", run_profiles)):
        text = content if isinstance(content, str) else json.dumps(content, indent=indent)
        (folder / name).write_text(text, "utf-8")


def _read(folder: Path, check_imports: bool | Callable[[str], object] = False) -> Documents:
    keys = ["default-endpoint", "archive"]
    return read_documents(folder, endpoint_keys=keys, check_imports=check_imports)


def _problems(folder: Path, *, check_imports: bool = False) -> list[Problem]:
    with pytest.raises(ConfigurationInvalid) as caught:
        _read(folder, check_imports)
    return list(caught.value.problems)


def _changed(entry: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A deep copy with one place set; `...` takes it away."""
    made = deepcopy(entry)
    *parents, last = path.split("/")
    place: Any = made
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    key: Any = int(last) if isinstance(place, list) else last
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return made


def test_the_documented_example_is_read(tmp_path: Path) -> None:
    """Every key arrives in its place; a step's own retry is put over the policy's."""
    _write(tmp_path, {"profiles": [_PROFILE]}, {"$schema": "x", "run_profiles": [_RUN_PROFILE]})
    documents = _read(tmp_path, check_imports=True)
    profile, run_profile = documents.profile("nova"), documents.run_profile("nova-daily")
    assert profile is not None
    assert run_profile is not None
    policy = run_profile.execution_policy
    assert (profile.label, profile.is_enabled, profile.style_vector) == ("Nova", True, {})
    assert (run_profile.namespace, run_profile.distribution_targets) == (
        "brand-a",
        ("default-endpoint",),
    )
    assert (policy.schedule, policy.timezone, policy.catch_up_limit) == (
        "0 6 * * *",
        "Europe/Zurich",
        None,
    )
    (brief,), (enrich,) = policy.tiers.tier1, policy.tiers.tier2
    assert (brief.use, brief.options, brief.retry) == (
        "operator:add",
        {"a": [1]},
        RetryPolicy(max_attempts=1),
    )
    assert (enrich.url, enrich.timeout_seconds) == ("http://127.0.0.1:9/enrich", 20.0)
    assert enrich.retry == policy.retry == RetryPolicy(3, 0.5, 2.0, 30.0)
    assert policy.initiation is not None
    assert (policy.initiation.use, policy.normalization.split) == ("json:loads", "operator:add")


def test_the_least_that_is_needed_has_the_documented_defaults(tmp_path: Path) -> None:
    """Only ids, label, namespace and state are required."""
    names = ("run_profile_id", "profile_id", "namespace", "state")
    least = {name: _RUN_PROFILE[name] for name in names}
    _write(tmp_path, {"profiles": [_PROFILE]}, {"run_profiles": [least]})
    (run_profile,) = _read(tmp_path, check_imports=True).run_profiles
    policy = run_profile.execution_policy
    assert (policy.schedule, policy.timezone, policy.misfire) == (None, "UTC", "fire_once")
    assert (policy.normalization.use, policy.normalization.batch_size) == ("orbit:no_op", 100)
    assert run_profile.distribution_targets == ()


@pytest.mark.parametrize("name", ["profiles", "run-profiles"])
def test_the_shipped_schemas_are_valid_and_describe_every_key(name: Any) -> None:
    """Editors complete and explain from them, so no key may lack its title or description."""
    root = schema(name)
    meta.validate(root)
    assert root["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert root["$id"].startswith("urn:")
    for place, properties in _property_lists(root, ""):
        for key, rule in properties.items():
            assert "description" in rule, f"{place}/{key}"
            assert "title" in rule or key == "$schema", f"{place}/{key}"


def _property_lists(rule: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in rule.items() if isinstance(rule, dict) else ():
        if key == "properties" and not place.endswith(("/if", "/then", "/else")):
            yield place, value
        yield from _property_lists(value, f"{place}/{key}")


_ALLOWED: dict[str, Any] = {
    "path": "/execution_rules/pace/0",
    "minimum": 1,
    "maximum": 10,
    "step": 2,
    "per_day": 4,
    "on": {"low_performance": -1},
}
_ALLOWANCE_CASES = [
    ("path", ..., "", 'expected the key "path"'),
    ("step", ..., "", 'expected the key "step"'),
    ("step", 0, "step", "expected a number above 0"),
    ("path", "/label", "path", "a JSON Pointer to a number in style_vector"),
    ("path", "/execution_rules", "path", "a JSON Pointer to a number in style_vector"),
    ("path", "/execution_rules/a~b", "path", "a JSON Pointer to a number in style_vector"),
    ("path", "/execution_rules/pace/1", "path", "a JSON Pointer to a number of this profile"),
    ("path", "/execution_rules/pace/01", "path", "a JSON Pointer to a number of this profile"),
    ("path", "/execution_rules/name", "path", "a JSON Pointer to a number of this profile"),
    ("minimum", 6, "path", "expected the number there to lie between 6 and 10"),
    ("maximum", 4, "path", "expected the number there to lie between 1 and 4"),
    ("maximum", "x", "maximum", "expected a number, found a string"),
    ("on", {"mine": 3}, "on", "mine: expected a change of at most 2, up or down"),
    ("on", {"mine": 0}, "on", "mine: expected a change of at most 2, up or down"),
    ("on", {"mine": "1"}, "on/mine", "a number"),
    ("per_day", -1, "per_day", "expected a number above 0"),
    ("often", 1, "often", "unknown key"),
]


@pytest.mark.parametrize(("key", "value", "pointer", "message"), _ALLOWANCE_CASES)
def test_a_bad_allowance_is_refused_at_its_place(
    tmp_path: Path, key: str, value: Any, pointer: str, message: str
) -> None:
    """What may move is a number that is there, within its bounds, by steps that are allowed."""
    rules = {"pace": [5], "name": "x"}
    entry = {**_PROFILE, "execution_rules": rules}
    entry["autonomy"] = {"allow": [_changed(_ALLOWED, key, value)]}
    _write(tmp_path, {"profiles": [entry]}, {"run_profiles": []})
    (problem,) = _problems(tmp_path)
    assert problem.pointer == "/profiles/0/autonomy/allow/0" + (f"/{pointer}" if pointer else "")
    assert message in problem.message


def test_a_number_is_allowed_to_move_once(tmp_path: Path) -> None:
    """Two entries for one path would leave open which of them holds."""
    entry = {**_PROFILE, "execution_rules": {"pace": [5]}}
    entry["autonomy"] = {"allow": [_ALLOWED, _ALLOWED]}
    _write(tmp_path, {"profiles": [entry]}, {"run_profiles": []})
    (problem,) = _problems(tmp_path)
    assert problem.pointer == "/profiles/0/autonomy/allow/1/path"
    entry["autonomy"] = {"allow": [_ALLOWED]}
    _write(tmp_path, {"profiles": [entry]}, {"run_profiles": []})
    (found,) = _read(tmp_path).profiles
    (allowed,) = found.allowances
    assert (allowed.path, allowed.step, found.number_at(allowed.path)) == (_ALLOWED["path"], 2, 5)


_PROFILE_CASES = [
    ("profile_id", ..., "", 'expected the key "profile_id"'),
    ("label", ..., "", 'expected the key "label"'),
    ("state", ..., "", 'expected the key "state"'),
    ("profile_id", 7, "profile_id", "expected a string, found the number 7"),
    ("profile_id", "", "profile_id", "1 to 128 of A-Z a-z 0-9"),
    ("profile_id", "a b", "profile_id", "1 to 128 of A-Z a-z 0-9"),
    ("profile_id", "a\n", "profile_id", "1 to 128 of A-Z a-z 0-9"),
    ("profile_id", ".a", "profile_id", "1 to 128 of A-Z a-z 0-9"),
    ("profile_id", "a" * 129, "profile_id", "1 to 128 of A-Z a-z 0-9"),
    ("label", "", "label", "expected a string of 1 or more characters"),
    ("label", None, "label", "expected a string, found null"),
    ("state", "on", "state", 'expected "enabled" or "disabled"'),
    ("state", True, "state", 'expected "enabled" or "disabled"'),
    ("style_vector", [], "style_vector", "expected an object, found an array"),
    ("value_tags", {"a": {}}, "value_tags/a", "a string or a number or true or false"),
    ("lable", "x", "lable", "unknown key; did you mean label?"),
    ("zzz", "x", "zzz", "unknown key; expected profile_id or label or state"),
    ("label", "a\x00b", "label", "expected text without the character U+0000"),
    ("style_vector", {"a": 2**53}, "style_vector/a", "expected an integer up to 9007199254740991"),
    ("style_vector", {"a": 1e308 * 10}, "style_vector/a", "expected a finite number"),
    ("style_vector", {"a": float("nan")}, "style_vector/a", "expected a finite number"),
    ("style_vector", {"a": "\ud800"}, "style_vector/a", "expected text without half a surrogate"),
]


@pytest.mark.parametrize(("path", "value", "pointer", "message"), _PROFILE_CASES)
def test_a_bad_profile_is_refused_at_its_place(
    tmp_path: Path, path: str, value: Any, pointer: str, message: str
) -> None:
    """One mistake is one problem, with file, pointer and what was expected."""
    entry = _changed(_PROFILE, path, value)
    _write(tmp_path, {"profiles": [entry]}, {"run_profiles": []})
    (problem,) = _problems(tmp_path)
    assert problem.file == str(tmp_path / "profiles.json")
    assert problem.pointer == "/profiles/0" + (f"/{pointer}" if pointer else "")
    assert message in problem.message
    assert problem.line is not None


_POLICY = "execution_policy"
_RUN_PROFILE_CASES = [
    ("namespace", ..., "", 'expected the key "namespace"'),
    ("namespace", "brand a", "namespace", "1 to 128 of A-Z a-z 0-9"),
    ("namespace", "orbit-drill-a", "namespace", "that does not begin with orbit-drill-"),
    ("profile_id", "nov", "profile_id", "expected a profile of profiles.json; did you mean nova?"),
    (
        "distribution_targets",
        ["archive", "default-endpont"],
        "distribution_targets/1",
        "did you mean default-endpoint? (known: archive, default-endpoint)",
    ),
    ("distribution_targets", ["archive"] * 2, "distribution_targets", "each entry only once"),
    ("distribution_targets", "archive", "distribution_targets", "expected an array, found a str"),
    ("execution_polcy", {}, "execution_polcy", "did you mean execution_policy?"),
    (f"{_POLICY}", [], _POLICY, "expected an object, found an array"),
    (f"{_POLICY}/shedule", "", f"{_POLICY}/shedule", "did you mean schedule?"),
    (f"{_POLICY}/schedule", "61 * * * *", f"{_POLICY}/schedule", 'bad minute "61"'),
    (f"{_POLICY}/schedule", "0 0 30 2 *", f"{_POLICY}/schedule", "cron expression"),
    (f"{_POLICY}/schedule", 5, f"{_POLICY}/schedule", "expected a string or null, found"),
    (f"{_POLICY}/timezone", "Europe", f"{_POLICY}/timezone", "expected an IANA time zone"),
    (f"{_POLICY}/timezone", 1, f"{_POLICY}/timezone", "expected a string, found the number 1"),
    (f"{_POLICY}/misfire", "never", f"{_POLICY}/misfire", '"skip" or "fire_once" or "catch_up"'),
    (f"{_POLICY}/overlap", "", f"{_POLICY}/overlap", '"skip" or "queue" or "allow"'),
    (f"{_POLICY}/jitter_seconds", -1, f"{_POLICY}/jitter_seconds", "a number of at least 0"),
    (f"{_POLICY}/catch_up_limit", 1.5, f"{_POLICY}/catch_up_limit", "a whole number or null"),
    (f"{_POLICY}/retry/max_attempts", 0, f"{_POLICY}/retry/max_attempts", "at least 1"),
    (f"{_POLICY}/retry/factor", 0.5, f"{_POLICY}/retry/factor", "at least 1"),
    (f"{_POLICY}/retry/cap_second", 1, f"{_POLICY}/retry/cap_second", "mean cap_seconds?"),
    (f"{_POLICY}/tiers/tier4", [], f"{_POLICY}/tiers/tier4", "did you mean tier"),
    (f"{_POLICY}/tiers/tier1/0/use", ..., f"{_POLICY}/tiers/tier1/0", 'expected the key "use"'),
    (f"{_POLICY}/tiers/tier1/0/use", 3, f"{_POLICY}/tiers/tier1/0/use", "expected a string"),
    (f"{_POLICY}/tiers/tier1/0", "json:loads", f"{_POLICY}/tiers/tier1/0", "expected an object"),
    (
        f"{_POLICY}/tiers/tier1/0/timeout_seconds",
        0,
        f"{_POLICY}/tiers/tier1/0/timeout_seconds",
        "expected a number above 0",
    ),
    (
        f"{_POLICY}/tiers/tier1/0/url",
        "http://x",
        f"{_POLICY}/tiers/tier1/0/url",
        "expected no url, since use is not http",
    ),
    (
        f"{_POLICY}/tiers/tier2/0/url",
        ...,
        f"{_POLICY}/tiers/tier2/0",
        'expected the key "url", since use is http',
    ),
    *(
        (
            f"{_POLICY}/tiers/tier2/0/url",
            url,
            f"{_POLICY}/tiers/tier2/0/url",
            "expected an http:// or https:// URL of visible ASCII",
        )
        for url in ("ftp://x", "http://", "http://me:pw@x", "http://x/#a", "http://x/ y", "x")
    ),
    (f"{_POLICY}/normalization/use", "http", f"{_POLICY}/normalization", 'the key "url"'),
    (f"{_POLICY}/normalization/batch_size", 0, f"{_POLICY}/normalization/batch_size", "least 1"),
    (f"{_POLICY}/normalization/split", "http", f"{_POLICY}/normalization/split", "(not http)"),
    (f"{_POLICY}/initiation/use", "http", f"{_POLICY}/initiation/use", "(not http)"),
    (f"{_POLICY}/initiation/url", "http://x", f"{_POLICY}/initiation/url", "unknown key"),
]


@pytest.mark.parametrize(("path", "value", "pointer", "message"), _RUN_PROFILE_CASES)
def test_a_bad_run_profile_is_refused_at_its_place(
    tmp_path: Path, path: str, value: Any, pointer: str, message: str
) -> None:
    """One mistake is one problem, with file, pointer and what was expected."""
    entry = _changed(_RUN_PROFILE, path, value)
    _write(tmp_path, {"profiles": [_PROFILE]}, {"run_profiles": [entry]})
    (problem,) = _problems(tmp_path)
    assert problem.file == str(tmp_path / "runProfiles.json")
    assert problem.pointer == "/run_profiles/0" + (f"/{pointer}" if pointer else "")
    assert message in problem.message
    assert problem.line is not None


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('{"profiles": [\n  {"a": 1,}\n]}', 2, "broken JSON: "),
        ("", 1, "broken JSON: "),
        ('{"profiles": []}\n[]', 2, "broken JSON: Extra data (column 1)"),
        ("[]", 1, "expected an object, found an array"),
        ('\n{"profile": []}', 2, "unknown key; did you mean profiles?"),
        ('{"profiles": {}}', 1, "expected an array, found an object"),
        ('{"profiles": [3]}', 1, "expected an object, found the number 3"),
        ('{"profiles": [],\n\n "profiles": []}', 3, "the key is there more than once"),
        ('{"profiles": [],\n "$schema": NaN}', 2, "expected a finite number"),
        ('{"profiles": [' + "[" * 62 + "\n[[]]" + "]" * 63 + "}", 2, "at most 64 levels"),
        ("[" * 100_000, None, "at most 64 levels"),
        ('{"profiles": ' + "1" * 5000 + "}", None, "expected numbers of at most 4300 digits"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    tmp_path: Path, text: str, line: int | None, message: str
) -> None:
    """Text that is not JSON, or is JSON of another shape, is named with its line."""
    _write(tmp_path, text, {"run_profiles": []})
    found = [(problem.line, problem.message) for problem in _problems(tmp_path)]
    assert any(at == line and message in said for at, said in found), found


def test_missing_files_are_named_with_the_least_that_is_expected(tmp_path: Path) -> None:
    """Both at once."""
    first, second = _problems(tmp_path / "nowhere")
    assert first.file.endswith("profiles.json")
    assert first.message == 'the file is missing; expected at least {"profiles": []}'
    assert second.file.endswith("runProfiles.json")
    assert second.message == 'the file is missing; expected at least {"run_profiles": []}'


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    """The operating system's reason is passed on."""
    _write(tmp_path, {"profiles": []}, {"run_profiles": []})
    (tmp_path / "profiles.json").unlink()
    (tmp_path / "profiles.json").mkdir()
    (problem,) = _problems(tmp_path)
    assert problem.message == "the file cannot be read: Is a directory"


def test_other_encodings_are_refused_at_the_first_wrong_byte(tmp_path: Path) -> None:
    """UTF-8 only; its byte order mark is let pass."""
    _write(tmp_path, "\ufeff" + '{"profiles": []}', {"run_profiles": []})
    assert _read(tmp_path) == Documents()
    (tmp_path / "profiles.json").write_bytes('{"profiles":\n "é"}'.encode("latin-1"))
    (problem,) = _problems(tmp_path)
    assert (problem.line, problem.message) == (
        2,
        "expected UTF-8; byte 15 of the file (0xe9) is not",
    )


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    """Sixteen MiB are enough for tens of thousands of run profiles."""
    _write(tmp_path, " " * (16 << 20) + '{"profiles": []}', {"run_profiles": []})
    (problem,) = _problems(tmp_path)
    assert problem.message == "the file is larger than 16 MiB"


def test_a_repeated_id_names_the_line_of_the_first(tmp_path: Path) -> None:
    """Run profile ids are unique over all namespaces."""
    other = {**_RUN_PROFILE, "namespace": "brand-b"}
    profiles = '{"profiles": [\n' + ",\n".join([json.dumps(_PROFILE)] * 3) + "]}"
    _write(tmp_path, profiles, {"run_profiles": [_RUN_PROFILE, other]}, indent=None)
    found = [(problem.line, problem.message) for problem in _problems(tmp_path)]
    assert found == [
        (3, "expected a unique profile_id; the first is on line 2"),
        (4, "expected a unique profile_id; the first is on line 2"),
        (1, "expected a unique run_profile_id; the first is on line 1"),
    ]


def test_every_problem_of_both_files_is_reported_at_once(tmp_path: Path) -> None:
    """Shape, references, schedules and code are all looked at, in the order of the files."""
    bad = _changed(_RUN_PROFILE, "execution_policy/schedule", "never")
    bad = _changed(bad, "execution_policy/tiers/tier1/0/use", "no_such_module_here:step")
    bad = {**bad, "profile_id": "x", "distribution_targets": ["y"], "zz": 1}
    _write(tmp_path, {"profiles": [{**_PROFILE, "state": "on"}]}, {"run_profiles": [bad]})
    problems = _problems(tmp_path, check_imports=True)
    assert [problem.pointer.rsplit("/", 1)[-1] for problem in problems] == [
        "state",
        "profile_id",
        "schedule",
        "use",
        "0",
        "zz",
    ]
    lines = [problem.line for problem in problems[1:] if problem.line]
    assert lines == sorted(lines)


def test_a_broken_profiles_file_does_not_blame_the_run_profiles(tmp_path: Path) -> None:
    """References into a file that could not be read are not looked at."""
    _write(tmp_path, "{", {"run_profiles": [_RUN_PROFILE]})
    (problem,) = _problems(tmp_path)
    assert "broken JSON" in problem.message


def test_an_unprintable_key_cannot_break_the_report(tmp_path: Path) -> None:
    """A problem is one line of text that any terminal takes."""
    _write(tmp_path, {"profiles": [{**_PROFILE, "a\n\ud800\x1b[31m": 1}]}, {"run_profiles": []})
    for problem in _problems(tmp_path):
        assert str(problem).isprintable()
        str(problem).encode()


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path with good and bad modules."""
    folder = tmp_path / "plugins"
    (folder / "pkg_for_orbit").mkdir(parents=True)
    modules = {
        "good": "async def step(payload, context): return payload\nnumber = 7\n"
        "class Box:\n    @staticmethod\n    def step(payload, context): return payload\n",
        "raising": "raise RuntimeError('no\\nlicence')\n",
        "leaving": "import sys\nsys.exit(3)\n",
        "needing": "import a_module_that_nobody_has\n",
        "broken": "def step(:\n",
        "__init__": "",
    }
    for name, text in modules.items():
        (folder / "pkg_for_orbit" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [name for name in sys.modules if name.startswith("pkg_for_orbit")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("no_such_module_here:step", "there is no module no_such_module_here on the import path"),
        ("pkg_for_orbit.none:step", "there is no module pkg_for_orbit.none on the import path"),
        ("pkg_for_orbit.good:setp", "module pkg_for_orbit.good has no setp"),
        ("pkg_for_orbit.good:Box.setp", "module pkg_for_orbit.good has no Box.setp"),
        ("pkg_for_orbit.good:number", "is not callable; it is of type int"),
        ("pkg_for_orbit.raising:step", "failed with RuntimeError: no licence"),
        ("pkg_for_orbit.leaving:step", "failed with SystemExit: 3"),
        ("pkg_for_orbit.needing:step", "failed with ModuleNotFoundError: No module named 'a_mod"),
        ("pkg_for_orbit.broken:step", "failed with SyntaxError"),
        ("pkg_for_orbit.good", "is neither module:name, nor http, nor an entry point"),
        ("a b:c", "'a b:c' is not module:name"),
        ("pkg_for_orbit.good:", "is not module:name"),
        (":step", "is not module:name"),
        ("..good:step", "is not module:name"),
        ("orbit:nop", "has no nop"),
        ("http", "is neither module:name"),
    ],
)
@pytest.mark.usefixtures("plugins")
def test_what_cannot_be_called_is_refused_with_the_reason(use: str, message: str) -> None:
    """Whatever the user's module does on import, it ends in one clear line."""
    with pytest.raises(PluginUnusable) as caught:
        resolve(use)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("plugins")
def test_what_can_be_called_is_found() -> None:
    """Functions, dotted names, and Orbit's own."""
    assert resolve("pkg_for_orbit.good:step").__name__ == "step"
    assert resolve("pkg_for_orbit.good:Box.step").__name__ == "step"
    assert resolve("orbit:no_op") is no_op


def test_an_entry_point_is_found_by_its_name(plugins: Path) -> None:
    """An installed distribution offers steps in the group orbit.steps."""
    info = plugins / "orbit_steps_test-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: orbit-steps-test\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[orbit.steps]\nbrief = pkg_for_orbit.good:step\nlost = pkg_for_orbit.good:none\n"
    )
    assert resolve("brief").__name__ == "step"
    with pytest.raises(PluginUnusable, match="has no none"):
        resolve("lost")


@pytest.mark.parametrize(
    ("place", "use", "given"),
    [
        ("tiers/tier1/0/use", "json:loads", "(payload, context)"),
        ("tiers/tier1/0/use", "contextlib:nullcontext", "(payload, context)"),
        ("initiation/use", "operator:add", "(context)"),
        ("normalization/use", "json:loads", "(batch, context)"),
        ("normalization/split", "json:loads", "(payload, context)"),
    ],
)
def test_what_cannot_take_its_arguments_is_a_problem(
    tmp_path: Path, place: str, use: str, given: str
) -> None:
    """A callable is judged by its signature in the place where it stands; it is not called."""
    bad = _changed(_RUN_PROFILE, f"execution_policy/{place}", use)
    _write(tmp_path, {"profiles": [_PROFILE]}, {"run_profiles": [bad]})
    (problem,) = _problems(tmp_path, check_imports=True)
    assert problem.pointer == f"/run_profiles/0/execution_policy/{place}"
    assert f"it is called with {given}, and takes (" in problem.message


@pytest.mark.usefixtures("plugins")
def test_an_unimportable_step_is_a_problem_at_every_place_that_uses_it(tmp_path: Path) -> None:
    """Initiation, steps, split and normaliser are all tried, each name once."""
    bad = "pkg_for_orbit.raising:step"
    entry = deepcopy(_RUN_PROFILE)
    entry["execution_policy"] |= {
        "initiation": {"use": bad},
        "tiers": {"tier3": [{"use": "pkg_for_orbit.good:step"}, {"use": bad}]},
        "normalization": {"use": bad, "split": bad},
    }
    _write(tmp_path, {"profiles": [_PROFILE]}, {"run_profiles": [entry]})
    problems = _problems(tmp_path, check_imports=True)
    assert sorted(problem.pointer.split("/", 4)[-1] for problem in problems) == [
        "initiation/use",
        "normalization/split",
        "normalization/use",
        "tiers/tier3/1/use",
    ]
    tried: list[str] = []
    _read(tmp_path, check_imports=tried.append)
    assert sorted(tried) == ["pkg_for_orbit.good:step", bad]


_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
_NUMBERS = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
_SCALARS = st.none() | st.booleans() | _NUMBERS | _TEXT
_JSON = st.recursive(
    _SCALARS, lambda inner: st.lists(inner) | st.dictionaries(_TEXT, inner), max_leaves=4
)
_FREE = st.dictionaries(_TEXT, _JSON, max_size=3)
_TAGS = st.dictionaries(_TEXT, st.booleans() | _NUMBERS | _TEXT, max_size=3)
_KEYS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:~-]{0,10}", fullmatch=True)
_STATES = st.sampled_from(["enabled", "disabled"])
_SECONDS = st.integers(1, 3600) | st.floats(0.001, 3600)
_RETRIES = st.fixed_dictionaries(
    {},
    optional={
        "max_attempts": st.integers(1, 9) | st.just(3.0),
        "base_seconds": _SECONDS,
        "factor": st.floats(1, 9),
        "cap_seconds": _SECONDS,
    },
)
_EXTRAS = {"timeout_seconds": _SECONDS, "options": _FREE, "retry": _RETRIES}
_PYTHON_STEPS = st.fixed_dictionaries({"use": st.just("json:loads")}, optional=_EXTRAS)
_HTTP_STEPS = st.fixed_dictionaries(
    {"use": st.just("http"), "url": st.sampled_from(["http://x", "https://[::1]:9/a?b=c"])},
    optional=_EXTRAS,
)
_STEPS = st.lists(_PYTHON_STEPS | _HTTP_STEPS, max_size=2)
_POLICIES = st.fixed_dictionaries(
    {},
    optional={
        "schedule": st.sampled_from([None, "", "@daily", "0 6 * * *", " */5 * * * 1-5 "]),
        "timezone": st.sampled_from(["UTC", "Europe/Zurich"]),
        "misfire": st.sampled_from(["skip", "fire_once", "catch_up"]),
        "overlap": st.sampled_from(["skip", "queue", "allow"]),
        "jitter_seconds": st.integers(0, 60) | st.floats(0, 60),
        "catch_up_limit": st.none() | st.integers(0, 99) | st.just(2.0),
        "initiation": _PYTHON_STEPS,
        "tiers": st.fixed_dictionaries({}, optional=dict.fromkeys(["tier1", "tier3"], _STEPS)),
        "retry": _RETRIES,
        "normalization": st.fixed_dictionaries(
            {}, optional={"batch_size": st.integers(1, 99) | st.just(7.0), **_EXTRAS}
        ),
    },
)
_FREE_NAMES = ["style_vector", "asset_bindings", "execution_rules", "distribution_map"]
_PROFILES = st.fixed_dictionaries(
    {"profile_id": _KEYS, "label": _TEXT.filter(bool), "state": _STATES},
    optional={"value_tags": _TAGS, **dict.fromkeys(_FREE_NAMES, _FREE)},
)


_PROFILE_ID = itemgetter("profile_id")


@st.composite
def _configurations(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    profiles = draw(st.lists(_PROFILES, min_size=1, max_size=3, unique_by=_PROFILE_ID))
    ids = st.sampled_from([profile["profile_id"] for profile in profiles])
    run_profile = st.fixed_dictionaries(
        {"run_profile_id": _KEYS, "profile_id": ids, "namespace": _KEYS, "state": _STATES},
        optional={
            "execution_policy": _POLICIES,
            "asset_bundle": _FREE,
            "distribution_targets": st.permutations(["default-endpoint", "archive"]),
            "value_tags": _TAGS,
        },
    )
    runs = draw(st.lists(run_profile, max_size=3, unique_by=itemgetter("run_profile_id")))
    return {"profiles": profiles}, {"run_profiles": runs}


@settings(deadline=None)
@given(files=_configurations(), random=st.randoms())
def test_any_valid_configuration_survives_its_body_and_any_reordering(
    tmp_path_factory: pytest.TempPathFactory, files: tuple[Any, Any], random: Any
) -> None:
    """Body and documents are each other's inverse; the digest ignores order and defaults."""
    folder = tmp_path_factory.mktemp("config")
    _write(folder, *files)
    documents = _read(folder)
    body = document_body(documents)
    stored = json.loads(json.dumps(body))
    assert stored == body
    assert documents_from_body(stored) == documents
    _write(folder, *(_shuffled(file, random) for file in files))
    assert canonical_digest(document_body(_read(folder))) == canonical_digest(body)
    filled = {"profiles": body["profiles"]}, {"run_profiles": body["run_profiles"]}
    for file in filled[1]["run_profiles"]:
        _drop_absent(file["execution_policy"])
    _write(folder, *filled)
    assert canonical_digest(document_body(_read(folder))) == canonical_digest(stored)


def _drop_absent(policy: dict[str, Any]) -> None:
    """A body writes out what is absent as null, which the files leave away."""
    steps = [step for tier in policy["tiers"].values() for step in tier]
    for part in (policy, policy["normalization"], *steps):
        for key in [key for key in ("url", "split", "initiation") if part.get(key, 0) is None]:
            del part[key]


def _shuffled(value: Any, random: Any, *, is_file: bool = True) -> Any:
    """The same content with the keys of every object, and the top-level list, in another order."""
    if isinstance(value, list):
        return [_shuffled(item, random, is_file=False) for item in value]
    if not isinstance(value, dict):
        return value
    items = [(key, _shuffled(item, random, is_file=False)) for key, item in value.items()]
    random.shuffle(items)
    for key, item in items:
        if is_file and key in ("profiles", "run_profiles"):
            random.shuffle(item)
    return dict(items)


@settings(deadline=None)
@given(_JSON)
def test_no_json_value_makes_the_schema_check_fail(value: Any) -> None:
    """Anything that is JSON is either fine or complained of in words."""
    for tree in (value, {"run_profiles": [value]}, {"run_profiles": [{"execution_policy": value}]}):
        for _, message in complaints("run-profiles", tree):
            assert message
