"""What one look of `doctor` gave, as a person and as a program see it.

A warning is neither good nor bad: it does not change the exit code. Messages and hints carry no
token, no header's value and no URL's path or query; `facts` are the same in numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look gave: good (True), not good (False), or only to be known (None).

    `is_warning` marks what is to be known soon rather than some time. `facts` hold, under
    camelCase keys, what the message is made of.
    """

    name: str
    is_good: bool | None
    message: str
    hint: str = ""
    is_warning: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """As a person sees it."""
        mark = "!" if self.is_warning else {True: "✓", False: "✗", None: "·"}[self.is_good]
        first, *others = self.message.splitlines() or [""]
        yield f"{mark} {self.name}: {first}"
        yield from (f"    {line}" for line in others)
        if self.hint and not self.is_good:
            yield f"    → {self.hint}"

    def as_json(self) -> dict[str, Any]:
        """As `--json` shows it; what is good needs no hint."""
        values = asdict(self)
        values["isGood"] = values.pop("is_good")
        values["isWarning"] = values.pop("is_warning")
        if self.is_good:
            del values["hint"]
        return values
