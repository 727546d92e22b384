"""Runs the steps of a Dockerfile without a container, in a folder that stands for its root.

What the real builder does and this does not: fetch the base image, isolate, and keep layers. The
instructions are read as they are written; absolute folders of the image become folders here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its word in capitals, and the rest on one line."""

    word: str
    rest: str

    @property
    def exec_form(self) -> list[str]:
        """The words of a JSON array."""
        return [str(part) for part in json.loads(self.rest[self.rest.index("[") :])]


def stages(text: str) -> list[list[Instruction]]:
    """The stages of a Dockerfile, each beginning with its FROM."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    found: list[list[Instruction]] = []
    for line in joined.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            found.append([])
        found[-1].append(Instruction(word, rest.strip()))
    return found


def environment(stage: Sequence[Instruction]) -> dict[str, str]:
    """What its ENV instructions set."""
    pairs = [pair for one in stage if one.word == "ENV" for pair in one.rest.split()]
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def last(stage: Sequence[Instruction], word: str) -> Instruction:
    """The last instruction with this word, which is the one that counts."""
    return [one for one in stage if one.word == word][-1]


def placed(text: str, places: Mapping[str, Path]) -> str:
    """The text with the image's folders where they are here."""
    for folder, place in places.items():
        text = re.sub(rf"(?<![\w/.]){re.escape(folder)}(?=[/:\s]|$)", str(place), text)
    return text


def copy(instruction: Instruction, context: Path, allowed: Sequence[str], workdir: Path) -> None:
    """COPY from the context, if .dockerignore lets it through.

    Raises FileNotFoundError where a builder would find nothing to copy.
    """
    *sources, target = instruction.rest.split()
    for source in sources:
        if not any(source == one or source.startswith(f"{one}/") for one in allowed):
            raise FileNotFoundError(f"{source} is kept out by .dockerignore")
        found, place = context / source, workdir / target
        if found.is_dir():
            shutil.copytree(found, place, dirs_exist_ok=True)
        else:
            is_folder = target.endswith(("/", "."))
            place = place / found.name if is_folder else place
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, place)


def let_through(ignore: str) -> Iterator[str]:
    """What a .dockerignore that begins with `*` lets through again."""
    lines = [line for line in ignore.splitlines() if line and not line.startswith("#")]
    if lines[0] != "*":
        raise ValueError("expected a .dockerignore that keeps everything out at first")
    return (line[1:] for line in lines if line.startswith("!"))
