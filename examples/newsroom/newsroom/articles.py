"""Reads a folder of Markdown articles with front matter.

An article is a file `*.md`: between two lines `---` stand `title`, `desk`, `date` (ISO) and
`tags` (separated by commas), one a line; then the text, paragraphs separated by empty lines.
A folder without articles, or an article that lacks something, is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

_FIELDS = ("title", "desk", "date", "tags")


class ArticleInvalid(ValueError):
    """The folder or an article in it cannot be used; the text says where and why."""


@dataclass(frozen=True, slots=True)
class Article:
    """One article; `name` is its file's name without `.md`, `published` an ISO date."""

    name: str
    title: str
    desk: str
    published: str
    tags: tuple[str, ...]
    body: str

    def as_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self) | {"tags": list(self.tags)}


def read_articles(folder: Path) -> list[Article]:
    """All articles of a folder, newest first, then by name. Raises ArticleInvalid."""
    files = sorted(folder.glob("*.md"))
    if not files:
        raise ArticleInvalid(f"no articles (*.md) in {folder}")
    articles = [parse(path.stem, path.read_text(encoding="utf-8")) for path in files]
    return sorted(articles, key=lambda article: article.published, reverse=True)


def parse(name: str, text: str) -> Article:
    """One article from its file's text. Raises ArticleInvalid."""
    lines = iter(text.splitlines())
    if next(lines, "").strip() != "---":
        raise ArticleInvalid(f"{name}.md:1: expected --- and the front matter")
    fields = _front_matter(name, lines)
    body = "\n".join(lines).strip()
    if not body:
        raise ArticleInvalid(f"{name}.md: there is no text after the front matter")
    tags = tuple(tag.strip() for tag in fields["tags"].split(",") if tag.strip())
    return Article(name, fields["title"], fields["desk"], fields["date"], tags, body)


def _front_matter(name: str, lines: Iterator[str]) -> dict[str, str]:
    """Takes lines up to the closing `---`."""
    fields: dict[str, str] = {}
    for number, line in enumerate(lines, 2):
        if line.strip() == "---":
            break
        key, separator, value = line.partition(":")
        if not separator or key.strip() not in _FIELDS:
            known = ", ".join(_FIELDS)
            raise ArticleInvalid(f"{name}.md:{number}: expected one of {known}, then a colon")
        fields[key.strip()] = value.strip()
    missing = [field for field in _FIELDS if not fields.get(field)]
    if missing:
        raise ArticleInvalid(f"{name}.md: the front matter lacks {', '.join(missing)}")
    try:
        date.fromisoformat(fields["date"])
    except ValueError as error:
        raise ArticleInvalid(f"{name}.md: date is not like 2026-03-02") from error
    return fields
