"""Writes docs/reference from the program (`make docs`); a test holds that it is current."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import typer.core
import typer.main

import orbit.errors
from orbit import metrics
from orbit.api.access import declared_scopes
from orbit.api.application import create_application
from orbit.api.metrics import NodeCollector, SharedCollector
from orbit.api.problems import status_of
from orbit.app import Node
from orbit.cli.outcome import ExitCode, exit_code_of
from orbit.cli.program import app
from orbit.errors import OrbitError
from orbit.settings import env_example, load_settings
from orbit.telemetry.catalogue import CATALOGUE

FOLDER = Path(__file__).with_name("reference")
_METAVARS = {str: "TEXT", int: "NUMBER", float: "NUMBER", Path: "PATH"}
_MADE = "<!-- Made by `make docs` from the program. -->"


def pages() -> dict[str, str]:
    """Every page by its file's name."""
    node = Node(load_settings({}, None))
    made = {
        "settings.md": ("Settings", _settings()),
        "configuration.md": ("Configuration files", _configuration()),
        "api.md": ("HTTP API", _api(node)),
        "cli.md": ("Command line", _cli()),
        "events.md": ("Telemetry events", _events()),
        "metrics.md": ("Metrics", _metrics(node)),
        "codes.md": ("Exit codes and error codes", _codes()),
    }
    listed = [f"- [{title}]({name})" for name, (title, _) in made.items()]
    text = {name: _page(title, lines) for name, (title, lines) in made.items()}
    return text | {"README.md": _page("Reference", listed)}


def _page(title: str, lines: Iterator[str] | Sequence[str]) -> str:
    body = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return f"{_MADE}\n\n# {title}\n\n{body}\n"


def _table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(names) + " |"
    yield "| " + " | ".join("---" for _ in names) + " |"
    for row in rows:
        yield "| " + " | ".join(_cell(str(one)) for one in row) + " |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _settings() -> Iterator[str]:
    yield "Read from the environment, then from `.env`."
    rows: list[tuple[str, str, str]] = []
    about: list[str] = []
    for line in env_example().splitlines():
        if section := re.fullmatch(r"# --- (.*) ---", line):
            yield from _settings_of(rows)
            rows, about = [], []
            yield f"\n## {section[1]}\n"
        elif found := re.fullmatch(r"# ([A-Z0-9_*]+)(?:=(.*))?", line):
            rows.append((f"`{found[1]}`", f"`{found[2]}`" if found[2] else "", " ".join(about)))
            about = []
        elif line.startswith("# "):
            about.append(line[2:])
        else:
            about = []
    yield from _settings_of(rows)


def _settings_of(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if rows:
        yield from _table(("variable", "default", "meaning"), rows)


def _configuration() -> Iterator[str]:
    yield "Keys are as in the JSON Schemas (2020-12) that come with the package."
    for name, file in (("profiles.json", "profiles"), ("runProfiles.json", "run-profiles")):
        place = files("orbit.profiles").joinpath("schemas", f"{file}.schema.json")
        schema = json.loads(place.read_text("utf-8"))
        yield f"\n## `config/{name}`\n\n{schema['description']}\n"
        (entries,) = (one for key, one in schema["properties"].items() if key != "$schema")
        rows = list(_keys(schema, _resolved(schema, entries["items"]), ""))
        yield from _table(("key", "is", "default", "meaning"), rows)


def _keys(
    schema: Mapping[str, Any], node: Mapping[str, Any], before: str
) -> Iterator[tuple[str, str, str, str]]:
    required = node.get("required", ())
    for name, given in node.get("properties", {}).items():
        one = _resolved(schema, given)
        default = f"`{json.dumps(one['default'])}`" if "default" in one else ""
        default = "required" if name in required else default
        yield f"`{before}{name}`", _kind(schema, one), default, one.get("description", "")
        yield from _keys(schema, one, f"{before}{name}.")
        if isinstance(one.get("items"), dict):
            yield from _keys(schema, _resolved(schema, one["items"]), f"{before}{name}[].")


def _resolved(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = node.get("$ref")
    if reference is None:
        return node
    target = schema["$defs"][reference.removeprefix("#/$defs/")]
    return {**target, **{key: value for key, value in node.items() if key != "$ref"}}


def _kind(schema: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    if "enum" in node:
        return ", ".join(f"`{json.dumps(one)}`" for one in node["enum"])
    for several in ("anyOf", "oneOf"):
        if several in node:
            return " or ".join(_kind(schema, _resolved(schema, one)) for one in node[several])
    kind = node.get("type", "any")
    text = " or ".join(kind) if isinstance(kind, list) else str(kind)
    low, high = node.get("minimum"), node.get("maximum")
    if low is not None or high is not None:
        text += f" {'' if low is None else low} to {'' if high is None else high}".rstrip()
    return text


def _api(node: Node) -> Iterator[str]:
    yield "Bodies and answers are JSON in camelCase; errors are problem documents (RFC 9457) with a"
    yield "stable `code`. `scope` is the least that opens a route ([access](../access.md))."
    application = create_application(node)
    scopes = declared_scopes(application)
    described = application.openapi()
    for path, methods in described["paths"].items():
        for method, one in methods.items():
            (scope,) = scopes[method.upper(), path]
            yield f"\n## `{method.upper()} {path}`\n"
            yield f"{one['summary']}. Scope: {scope}.\n"
            if one.get("description"):
                yield one["description"] + "\n"
            body = _body(one).get("description")
            if body:
                yield f"The body: {body}\n"
            rows = list(_inputs(described, one))
            if rows:
                yield from _table(("name", "in", "is", "meaning"), rows)


def _inputs(
    described: Mapping[str, Any], one: Mapping[str, Any]
) -> Iterator[tuple[str, str, str, str]]:
    for given in one.get("parameters", ()):
        kind = _kind({"$defs": described["components"]["schemas"]}, given.get("schema", {}))
        need = ", required" if given.get("required") and given["in"] != "path" else ""
        yield f"`{given['name']}`", given["in"], kind + need, given.get("description", "")
    schema = _body(one)
    for name, given in schema.get("properties", {}).items():
        shown = _schema_kind(schema, given)
        need = ", required" if name in schema.get("required", ()) else ""
        yield f"`{name}`", "body", shown + need, given.get("description", "")


def _body(one: Mapping[str, Any]) -> Mapping[str, Any]:
    content = one.get("requestBody", {}).get("content", {}).get("application/json", {})
    found: Mapping[str, Any] = content.get("schema", {})
    return found


def _schema_kind(schema: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    reference = given.get("$ref")
    if reference is not None:
        given = schema.get("$defs", {}).get(reference.rpartition("/")[2], {})
    return _kind(schema, given)


def _cli() -> Iterator[str]:
    yield "Every verb takes `--json`, `-h` and `--help` where that makes sense."
    command = typer.main.get_command(app)
    yield from _verbs(command, "orbit")


def _verbs(command: Any, name: str) -> Iterator[str]:
    inner: Mapping[str, Any] = getattr(command, "commands", {})
    rows = [_parameter(one) for one in command.params if one.name != "help"]
    if not inner or (rows and name != "orbit"):  # a group that does something by itself
        yield f"\n## `{name}`\n\n{command.help or ''}\n"
        if rows:
            yield from _table(("takes", "default", "meaning"), rows)
    for verb, one in inner.items():
        yield from _verbs(one, f"{name} {verb}")


def _parameter(one: Any) -> tuple[str, str, str]:
    is_option = isinstance(one, typer.core.TyperOption)
    names = [*one.opts, *one.secondary_opts] if is_option else [one.metavar or one.name.upper()]
    value = "" if getattr(one, "is_flag", False) or not is_option else f" {_metavar(one)}"
    shown = " ".join(f"`{name}{value}`" for name in names)
    default = one.default
    is_plain = isinstance(default, int | float | str | Path) and not isinstance(default, bool)
    need = "required" if one.required else f"`{default}`" if is_plain and default != "" else ""
    return shown, need, getattr(one, "help", None) or ""


def _metavar(one: Any) -> str:
    annotation = one.type_descriptor.annotation
    choices = [str(choice) for choice in get_args(annotation)]
    return one.metavar or "|".join(choices) or _METAVARS.get(annotation, "VALUE")


def _events() -> Iterator[str]:
    yield "CloudEvents 1.0 of type `orbit.<name>.v<version>`; [telemetry](../telemetry.md) says how"
    yield "they are read. `data` has `namespace`, `profileId`, `runProfileId` and `runId`, and:\n"
    rows = [
        (
            f"`{name.value}`",
            one.version,
            one.meaning,
            "; ".join(f"`{field}`: {text}" for field, text in one.fields.items()),
        )
        for name, one in CATALOGUE.items()
    ]
    yield from _table(("event", "version", "says", "fields"), rows)


def _metrics(node: Node) -> Iterator[str]:
    yield "`GET /metrics`, in base units. Python's own (`python_*`, `process_*`) come with them.\n"
    rows = []
    for one in vars(metrics).values():
        if hasattr(one, "describe") and hasattr(one, "_labelnames"):
            (family,) = one.describe()
            labels = ", ".join(f"`{name}`" for name in one._labelnames)
            name = family.name + ("_total" if family.type == "counter" else "")
            rows.append((f"`{name}`", family.type, labels, family.documentation))
    rows += [
        (
            f"`{one.name}`",
            one.type,
            "`version`" if one.name.endswith("info") else "",
            one.documentation,
        )
        for one in (*NodeCollector(node).collect(), *SharedCollector().collect())
    ]
    yield from _table(("metric", "type", "labels", "counts"), sorted(rows))


def _codes() -> Iterator[str]:
    yield "## Exit codes\n"
    yield from _table(("code", "means"), [(f"`{int(code)}`", code.meaning) for code in ExitCode])
    yield "\n## Error codes\n"
    yield "`code` in problem documents, in `--json` and in logs. They never change.\n"
    rows = [
        (f"`{kind.code}`", _status(kind), int(exit_code_of(_sample(kind))), _first(kind))
        for kind in _kinds(OrbitError)
    ]
    yield from _table(("code", "HTTP", "exit", "means"), sorted(set(rows)))


def _kinds(base: type[OrbitError]) -> Iterator[type[OrbitError]]:
    for kind in base.__subclasses__():
        if kind.__module__ == orbit.errors.__name__:
            yield kind
            yield from _kinds(kind)


def _sample(kind: type[OrbitError]) -> OrbitError:
    return kind(()) if kind is orbit.errors.ConfigurationInvalid else kind("")


def _status(kind: type[OrbitError]) -> int:
    return int(status_of(kind))


def _first(kind: type[OrbitError]) -> str:
    return (kind.__doc__ or "").splitlines()[0]


def main() -> None:
    """Writes the pages, and takes away what is none of them."""
    FOLDER.mkdir(exist_ok=True)
    made = pages()
    for stale in {path.name for path in FOLDER.glob("*.md")} - made.keys():
        (FOLDER / stale).unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    sys.stdout.write(f"{len(made)} pages in {FOLDER}\n")


if __name__ == "__main__":
    main()
