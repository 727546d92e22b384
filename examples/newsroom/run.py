"""Runs the newsroom: the receiver, the enrich step and Orbit, and every run profile once.

`make run` calls it. It shows each cycle's stages as they come, then what was delivered where,
checked against what the receiver stored, and stays up until Ctrl-C; with `--once` it stops
everything and ends. Exit code 0 if all was delivered, 1 with the reason if anything failed.
Ports that are taken are replaced by free ones. All files are made below `--data` (`.orbit`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from rich.console import Console
from rich.live import Live

from driver.children import Child, DriverFailed, free_port
from driver.orbit_api import Cycle, OrbitApi
from driver.report import deliveries, problems, stages_table

HOME = Path(__file__).parent
DEFAULT_PORTS = {"Orbit": 3000, "the receiver": 8787, "the enrich step": 9000}
EXAMPLE_TOKEN = "newsroom-example-token"  # noqa: S105  (guards an example on this machine)
_START_SECONDS = 120.0
_CYCLE_SECONDS = 120.0
_DRAIN_SECONDS = 40.0


@dataclass(frozen=True, slots=True)
class Places:
    """Where everything is: ports on 127.0.0.1, folders, and the URLs made of them."""

    orbit_port: int
    receiver_port: int
    enrich_port: int
    data: Path

    @property
    def orbit(self) -> str:
        return f"http://127.0.0.1:{self.orbit_port}"

    @property
    def receiver(self) -> str:
        return f"http://127.0.0.1:{self.receiver_port}"

    @property
    def enrich(self) -> str:
        return f"http://127.0.0.1:{self.enrich_port}"

    @property
    def own(self) -> Path:
        """The example's own folder, beside Orbit's."""
        return self.data / "newsroom"

    @property
    def received(self) -> Path:
        return self.own / "received"


class Newsroom:
    """The three processes and what the driver does with them."""

    def __init__(self, places: Places, console: Console) -> None:
        self._places = places
        self._console = console
        self._children: list[Child] = []

    @contextmanager
    def up(self) -> Iterator[None]:
        """Starts all three; at the end stops them in reverse order, Orbit first."""
        with ExitStack() as stack:
            for name, command, health in self._commands():
                child = Child(name, command, environment(self._places), self._log(name))
                self._children.append(child)
                stack.callback(self._stop, child)
                started = time.monotonic()
                with self._console.status(f"starting {name}") as status:
                    child.wait_until_up(health, _START_SECONDS, status.update)
                took = time.monotonic() - started
                self._console.print(f"[green]✓[/] {name} up after {took:.1f} s: {health}")
            yield

    def check(self) -> None:
        """Raises DriverFailed if one of the processes has died."""
        for child in self._children:
            child.check()

    def _commands(self) -> list[tuple[str, list[str], str]]:
        places = self._places
        receiver = ["-m", "orbit.receiver", "--port", str(places.receiver_port)]
        receiver += ["--store", str(places.received), "--path-token"]
        receiver += [f"/newsletter={EXAMPLE_TOKEN}"]
        enrich = ["-m", "newsroom.enrich", "--port", str(places.enrich_port)]
        return [
            ("the receiver", [sys.executable, *receiver], f"{places.receiver}/health"),
            ("the enrich step", [sys.executable, *enrich], f"{places.enrich}/health"),
            ("Orbit", [*orbit_command(), "up"], f"{places.orbit}/ready"),
        ]

    def _log(self, name: str) -> Path:
        return (
            self._places.own / "logs" / f"{name.removeprefix('the ').replace(' ', '-').lower()}.log"
        )

    def _stop(self, child: Child) -> None:
        with self._console.status(f"stopping {child.name}"):
            code = child.stop(_DRAIN_SECONDS)
        if code != 0:
            self._console.print(f"{child.name} ended with code {code}: {child.log}", markup=False)


def orbit_command() -> list[str]:
    """The `orbit` command of this very Python."""
    script = Path(sys.executable).with_name("orbit")
    return [str(script)] if script.exists() else [sys.executable, "-m", "orbit"]


def environment(places: Places) -> dict[str, str]:
    """The children's environment: the caller's without its Orbit settings, and the example's."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("ORBIT_") and key not in {"DATABASE_URL", "NODE_ENV"}
    }
    endpoints: list[dict[str, Any]] = [
        {"key": "social", "url": f"{places.receiver}/social"},
        {"key": "newsletter", "url": f"{places.receiver}/newsletter", "token": EXAMPLE_TOKEN},
    ]
    paths = [str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PORT": str(places.orbit_port),
        "ORBIT_CONFIG_DIR": str(configuration(places)),
        "ORBIT_DATA_DIR": str(places.data),
        "ORBIT_CRON_SCHEDULE": "",
        "ORBIT_DISPATCH_ENDPOINTS": json.dumps(endpoints),
    }


def configuration(places: Places) -> Path:
    """The example's configuration; a copy with the enrich step's real port if that differs."""
    source = HOME / "config"
    if places.enrich_port == DEFAULT_PORTS["the enrich step"]:
        return source
    copy = places.own / "config"
    copy.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        default = f"http://127.0.0.1:{DEFAULT_PORTS['the enrich step']}/"
        text = text.replace(default, f"{places.enrich}/")
        (copy / file.name).write_text(text, encoding="utf-8")
    return copy


def find_places(data: Path, console: Console) -> Places:
    """Ports that are free now; says so where a default one is taken."""
    ports = {name: free_port(port) for name, port in DEFAULT_PORTS.items()}
    for name, port in ports.items():
        if port != DEFAULT_PORTS[name]:
            console.print(f"Port {DEFAULT_PORTS[name]} is taken; {name} uses {port}.")
    orbit, receiver, enrich = ports.values()
    return Places(orbit, receiver, enrich, data.resolve())


def run_all(newsroom: Newsroom, places: Places, console: Console) -> None:
    """Triggers every run profile, follows the cycles, shows and checks the deliveries.

    Raises DriverFailed.
    """
    api = OrbitApi(places.orbit, (places.data / "admin.key").read_text().strip())
    try:
        started = api.trigger_all()
        skipped = {one.run_profile_id: one.reason for one in started if not one.cycle_id}
        cycle_ids = {one.run_profile_id: one.cycle_id for one in started if one.cycle_id}
        cycles = follow(api, newsroom, cycle_ids, skipped, console)
    finally:
        api.close()
    arrivals = received(places)
    console.print()
    console.print(deliveries(cycles, arrivals))
    console.print()
    found = problems(cycles, arrivals) + [f"{key}: skipped, {why}" for key, why in skipped.items()]
    if found or not cycles:
        raise DriverFailed("\n".join(found) or "no run profile is enabled")
    count = sum(len(cycle.jobs) for cycle in cycles.values())
    console.print(f"[green]✓[/] {count} posts delivered; the receiver holds the same digests.")


def follow(
    api: OrbitApi,
    newsroom: Newsroom,
    cycle_ids: dict[str, str],
    skipped: dict[str, str],
    console: Console,
) -> dict[str, Cycle]:
    """Shows the cycles' stages live until all are over, and returns them."""
    deadline = time.monotonic() + _CYCLE_SECONDS
    with Live(console=console, refresh_per_second=10) as live:
        while True:
            newsroom.check()
            cycles = {key: api.cycle(cycle_id) for key, cycle_id in cycle_ids.items()}
            live.update(stages_table(cycles, skipped))
            if all(cycle.is_over for cycle in cycles.values()):
                return cycles
            if time.monotonic() > deadline:
                raise DriverFailed(f"the cycles are not over after {_CYCLE_SECONDS:.0f} s")
            time.sleep(0.1)


def received(places: Places) -> list[dict[str, Any]]:
    """What came in at the receiver, as it says itself."""
    answer = httpx.get(f"{places.receiver}/received", timeout=30, trust_env=False)
    items: list[dict[str, Any]] = answer.raise_for_status().json()["items"]
    return items


def show_where_to_look(places: Places, console: Console) -> None:
    """What to open and to type next."""
    orbit = f"PORT={places.orbit_port} {orbit_command()[0]}"
    rows = [
        (f"{places.orbit}/docs", "Orbit's API"),
        (f"{places.orbit}/cycles/recent", "the last cycles"),
        (f"{places.receiver}/received", "what came in at the receiver"),
        (str(places.received), "the posts: namespace/run profile/job.json"),
        (f"{orbit} cycles", "the last cycles, in the terminal"),
        (f"{orbit} trace ID", "a cycle's or job's whole story"),
    ]
    console.print("\nLook next:")
    for what, why in rows:
        console.print(f"  {what}\n      {why}", markup=False, soft_wrap=True)


def show_what_stays(places: Places, console: Console) -> None:
    """What is left when all has ended."""
    text = (
        f"All is stopped again. The posts are in {places.received}; run without ONCE=1 to look on."
    )
    console.print(text, markup=False, soft_wrap=True)


def stay_up(newsroom: Newsroom, console: Console) -> None:
    """Until Ctrl-C, or until a process dies (DriverFailed)."""
    console.print("Everything stays up, schedules included. Ctrl-C ends it.")
    while True:
        newsroom.check()
        time.sleep(0.5)


def interrupt(signum: int, frame: FrameType | None) -> None:
    """SIGTERM ends the driver as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Runs the newsroom example.")
    parser.add_argument("--once", action="store_true", default=os.environ.get("ONCE", "0") != "0")
    parser.add_argument("--data", type=Path, default=Path(".orbit"), help="%(default)s")
    options = parser.parse_args()
    console = Console()
    signal.signal(signal.SIGTERM, interrupt)
    has_run = False
    try:
        places = find_places(options.data, console)
        newsroom = Newsroom(places, console)
        with newsroom.up():
            run_all(newsroom, places, console)
            has_run = True
            if not options.once:
                show_where_to_look(places, console)
                stay_up(newsroom, console)
        show_what_stays(places, console)
    except DriverFailed as error:
        console.print("[red]✗[/] The run failed.")
        console.print(str(error), markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 0 if has_run else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
