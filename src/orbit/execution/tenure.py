"""Whether a cycle in hand may begin its next call: its lease is ours, its namespace not halted.

A call may send, as a job does: it begins only while the cycle's lease is certainly this node's by
the monotonic clock, and not after the node has heard of a halt. Where the lease may be over, a call
waits for the heartbeat, which prolongs the lease or takes the cycle out of hand. What a step does
that runs already is its own; its result may still be committed.
"""

from __future__ import annotations

from collections.abc import Iterable

from orbit.clock import Clock
from orbit.errors import LeaseLost
from orbit.governance.fence import Fences


class Tenure:
    """Until when this node certainly holds each cycle that it carries on."""

    def __init__(self, fences: Fences, clock: Clock, lease_seconds: float) -> None:
        self._fences, self._clock, self._lease_seconds = fences, clock, lease_seconds
        self._expires: dict[str, float] = {}

    def hold(self, cycle_ids: Iterable[str], asked_at: float) -> None:
        """These were claimed or prolonged by what was asked at this monotonic time."""
        self._expires.update(dict.fromkeys(cycle_ids, asked_at + self._lease_seconds))

    def drop(self, cycle_id: str) -> None:
        """The cycle is out of hand."""
        self._expires.pop(cycle_id, None)

    def check(self, namespace: str, cycle_id: str) -> None:
        """Raises NamespaceHalted or LeaseLost if no request of the cycle may leave here."""
        self._fences.check(namespace)
        if self.seconds_left(cycle_id) <= 0:
            raise LeaseLost(f"the lease of cycle {cycle_id} is over, or not ours")

    def seconds_left(self, cycle_id: str) -> float:
        """For how long the cycle is certainly ours; not above 0 if it is not."""
        return self._expires.get(cycle_id, 0.0) - self._clock.monotonic()

    def check_halted(self, namespace: str) -> None:
        """Raises NamespaceHalted if nothing more of the namespace may begin.

        A lease that may be over is no hindrance to what calls nothing: its commit needs the lease.
        """
        self._fences.check(namespace)
