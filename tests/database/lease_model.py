"""The lease protocol of dispatch without a database: what is true of jobs, step by step.

Pure and small, so that it can be read as the protocol's definition: who may hold an attempt,
what a settlement moves and what it only records, and what the facts alone still say when every
lease is lost. It refuses, by assertion, a claim that the protocol does not allow.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from orbit.execution.dispatch import ClaimedJob
from orbit.execution.wire import Outcome


@dataclass(slots=True)
class Job:
    """What is true of a job; `holder` is the node and lease number of its open attempt."""

    cycle: str
    lane: str
    max_attempts: int
    attempt: int = 0
    spared: int = 0
    number: int = 0
    holder: tuple[str, int] | None = None
    is_probe: bool = False
    is_retry: bool = False
    end: str | None = None


@dataclass(slots=True)
class Model:
    """The protocol, without a database: jobs, receipts, the receipts tallied, and the halt."""

    jobs: dict[str, Job] = field(default_factory=dict)
    receipts: dict[tuple[str, int], Outcome] = field(default_factory=dict)
    probes: Counter[str] = field(default_factory=Counter)
    tallies: Counter[tuple[str, str]] = field(default_factory=Counter)
    is_halted: bool = False
    epoch: int = 0

    def halt(self, epoch: int) -> None:
        """Nothing is claimed from here on; each halt has the next epoch."""
        assert epoch == self.epoch + 1
        self.is_halted, self.epoch = True, epoch

    def resume(self) -> None:
        """What waits may be claimed again, under the epoch of the last halt."""
        self.is_halted = False

    def in_flight(self) -> dict[str, tuple[str, int]]:
        """The open attempts, each with who holds it."""
        return {job_id: job.holder for job_id, job in self.jobs.items() if job.holder}

    def claim(self, given: ClaimedJob, node_id: str) -> None:
        """Opens the next attempt; nobody else may hold the job, and it may not be over."""
        job = self.jobs[given.job_id]
        assert not self.is_halted, "a claim of a halted namespace"
        assert given.epoch == self.epoch, "claimed under another epoch than the last halt's"
        assert job.end is None, "a job that is over was sent again"
        assert job.holder is None, "two nodes hold one job"
        assert given.attempt == job.attempt + 1
        assert given.spared == job.spared + given.is_probe
        assert given.lease_number > job.number
        job.attempt, job.spared, job.number = given.attempt, given.spared, given.lease_number
        job.holder, job.is_probe = (node_id, given.lease_number), given.is_probe

    def release(self, job_id: str, holder: tuple[str, int]) -> None:
        """Takes the open attempt back, if it is still the holder's."""
        job = self.jobs[job_id]
        if job.holder == holder:
            job.attempt, job.spared, job.holder = job.attempt - 1, job.spared - job.is_probe, None

    def settle(
        self, given: ClaimedJob, holder: tuple[str, int], outcome: Outcome, *, is_final: bool
    ) -> None:
        """Keeps the first receipt of an attempt; moves the job if the lease is the holder's."""
        job = self.jobs[given.job_id]
        if (given.job_id, given.attempt) not in self.receipts:
            self.receipts[given.job_id, given.attempt] = outcome
            self.probes[given.job_id] += given.is_probe
            self.tallies[job.lane, outcome.value] += 1
        if job.holder == holder:
            self._move(job, outcome, is_final=is_final)

    def recover(self, job_id: str) -> None:
        """Settles an open attempt as unknown: its worker is gone."""
        job = self.jobs[job_id]
        if (job_id, job.attempt) not in self.receipts:
            self.receipts[job_id, job.attempt] = Outcome.UNKNOWN
            self.probes[job_id] += job.is_probe
            self.tallies[job.lane, Outcome.UNKNOWN.value] += 1
        self._move(job, Outcome.UNKNOWN, is_final=False)

    def rebuild(self) -> None:
        """What facts say of the jobs when all leases are lost."""
        for job_id, job in self.jobs.items():
            if job.end is None:
                known = {at: got for (of, at), got in self.receipts.items() if of == job_id}
                job.attempt, job.spared = max(known, default=0), self.probes[job_id]
                job.holder, job.is_retry = None, bool(known)
                if Outcome.DELIVERED in known.values():
                    job.end = "delivered"

    def counters(self) -> dict[str, tuple[int, ...]]:
        """Each cycle's jobs: all, outstanding, delivered, dead; and the attempts of those over."""
        cycles: dict[str, list[Job]] = {}
        for job in self.jobs.values():
            cycles.setdefault(job.cycle, []).append(job)
        return {
            cycle: (
                len(jobs),
                sum(job.end is None for job in jobs),
                sum(job.end == "delivered" for job in jobs),
                sum(job.end == "dead" for job in jobs),
                sum(job.attempt for job in jobs if job.end),
            )
            for cycle, jobs in cycles.items()
        }

    def _move(self, job: Job, outcome: Outcome, *, is_final: bool) -> None:
        job.holder = None
        if outcome is Outcome.DELIVERED:
            job.end = "delivered"
        elif is_final or job.attempt - job.spared >= job.max_attempts:
            job.end = "dead"
        else:
            job.is_retry = True
