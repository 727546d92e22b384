"""Confidence: how often such a signal was right in replay, at that level of evidence.

Measured, not derived: E says how surprising the data are, not how likely the claim is, which also
depends on how many profiles truly change and on what else happens. Here a quarter of the profiles
change in four scenarios of five (`gate.calibration`, seed 1000, 40 fleets of each), all of the
signals count, repeated ones too, and the share is shrunk as if one more right and one more wrong
had been seen. Evidence far over the threshold is hardly a better sign: it comes from sudden falls,
and some of those are outages that the peers do not show yet. A fleet in which fewer change has
more false alarms among its signals. All counts are of shares delivered, of 0 or 1 each; scores and
latencies borrow them.
"""

from __future__ import annotations

from dataclasses import dataclass

from orbit.insight.signals import BaselineKind, SignalName

_STRONG = 2000.0  # twice the threshold
SEED, FLEETS = 1000, 40


@dataclass(frozen=True, slots=True)
class Hits:
    """Of `all` signals, how many were `right`."""

    right: int
    all: int

    @property
    def share(self) -> float:
        """The share that was right, with one right and one wrong added."""
        return (self.right + 1) / (self.all + 2)


MEASURED: dict[tuple[SignalName, BaselineKind, bool], Hits] = {
    (SignalName.ELEVATED, BaselineKind.OWN_HISTORY, False): Hits(1217, 1300),
    (SignalName.ELEVATED, BaselineKind.PEERS, False): Hits(825, 867),
    (SignalName.LOW, BaselineKind.OWN_HISTORY, False): Hits(2428, 3938),
    (SignalName.LOW, BaselineKind.OWN_HISTORY, True): Hits(1171, 1928),
    (SignalName.LOW, BaselineKind.PEERS, False): Hits(1617, 1703),
    (SignalName.LOW, BaselineKind.PEERS, True): Hits(392, 410),
    (SignalName.STABLE, BaselineKind.OWN_HISTORY, False): Hits(1112, 1149),
    (SignalName.STABLE, BaselineKind.PEERS, False): Hits(1142, 1185),
}


def is_strong(name: SignalName, evidence: float) -> bool:
    """Whether the evidence is of the upper of two levels; only `low_performance` has two.

    Of the others none so strong was measured: there is no such room above a healthy baseline.
    """
    return name is SignalName.LOW and evidence >= _STRONG


def confidence_of(name: SignalName, kind: BaselineKind, evidence: float) -> float:
    """The share of such signals that were right in replay, to two digits."""
    return round(MEASURED[name, kind, is_strong(name, evidence)].share, 2)
