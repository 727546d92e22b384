"""The few calls of Orbit's HTTP API that the driver needs, as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from driver.children import DriverFailed


@dataclass(frozen=True, slots=True)
class Started:
    """What a trigger did for one run profile: `cycle_id`, or the `reason` for skipping it."""

    run_profile_id: str
    cycle_id: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Job:
    """One item for one endpoint; `digest` is SHA-256 in hexadecimal, `size` in bytes."""

    job_id: str
    endpoint_key: str
    state: str
    attempts: int
    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Cycle:
    """A cycle as far as it has come; `state` is running, finished or failed."""

    cycle_id: str
    state: str
    stage: str
    reason: str
    jobs: tuple[Job, ...]

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state != "running"


class OrbitApi:
    """A client of one Orbit node, with an access key of it.

    Any answer but 2xx raises DriverFailed with its text.
    """

    def __init__(self, url: str, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False)

    def close(self) -> None:
        """Closes its connections."""
        self._client.close()

    def trigger_all(self) -> list[Started]:
        """Starts a cycle of every enabled run profile."""
        answer = self._ask("POST", "/run-profiles/trigger")
        return [
            Started(item["runProfileId"], item.get("cycleRunId"), item.get("reason") or "")
            for item in answer["items"]
        ]

    def cycle(self, cycle_id: str) -> Cycle:
        """How far a cycle is."""
        return read_cycle(cycle_id, self._ask("GET", f"/cycles/{cycle_id}"))

    def _ask(self, method: str, path: str) -> Mapping[str, Any]:
        try:
            answer = self._client.request(method, path)
            answer.raise_for_status()
            content: Mapping[str, Any] = answer.json()
        except httpx.HTTPStatusError as error:
            status, text = error.response.status_code, error.response.text[:500]
            raise DriverFailed(f"{method} {path} answered {status}: {text}") from error
        except (httpx.TransportError, ValueError) as error:
            raise DriverFailed(f"{method} {path} failed: {error!r}") from error
        return content


def read_cycle(cycle_id: str, content: Mapping[str, Any]) -> Cycle:
    """A cycle from the JSON of `GET /cycles/{id}`."""
    jobs = tuple(
        Job(
            job_id=job["jobId"],
            endpoint_key=job["endpointKey"],
            state=job["state"],
            attempts=job["attempts"],
            digest=job["digest"],
            size=job["size"],
        )
        for job in content.get("jobs", [])
    )
    cycle = content["cycle"]
    return Cycle(cycle_id, cycle["state"], cycle["stage"] or "", cycle["reason"] or "", jobs)
