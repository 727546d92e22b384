"""What a node knows of halted namespaces, by its last look.

A help, not the proof: an attempt that is claimed and has not begun is given back as soon as its
node hears of the halt, rather than sent. That nothing is sent after a halt has said so rests on
the fence in the database and on leases (`halt`). A namespace's epoch never falls here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orbit.errors import NamespaceHalted


class Fences:
    """The halted namespaces and the highest epoch that was seen of each."""

    def __init__(self) -> None:
        self._epochs: dict[str, int] = {}
        self._halted: frozenset[str] = frozenset()

    def learn(self, halted: Iterable[Mapping[str, Any]]) -> bool:
        """Takes in all that are halted now, by `namespace` and `epoch`; whether any is new."""
        rows = list(halted)
        fresh = [row for row in rows if row["epoch"] > self._epochs.get(row["namespace"], 0)]
        self._epochs.update((row["namespace"], row["epoch"]) for row in fresh)
        self._halted = frozenset(row["namespace"] for row in rows)
        return bool(fresh)

    def may_send(self, namespace: str, epoch: int) -> bool:
        """Whether what was claimed under this epoch was not overtaken by a halt."""
        return epoch >= self._epochs.get(namespace, 0)

    def check(self, namespace: str) -> None:
        """Raises NamespaceHalted if the namespace is halted."""
        if namespace in self._halted:
            raise halted(namespace)


def halted(namespace: str) -> NamespaceHalted:
    """The refusal of what a halted namespace does not do."""
    return NamespaceHalted(f"namespace {namespace} is halted", namespace=namespace)
