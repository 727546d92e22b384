"""The newsroom example: its steps on all articles, its HTTP step, and what its driver relies on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

import run as newsroom_run
from driver.children import Child, DriverFailed, free_port
from driver.orbit_api import Cycle, Job, read_cycle
from driver.report import problems
from newsroom import brief, desk, items, posts
from newsroom.articles import ArticleInvalid, parse, read_articles
from newsroom.enrich import enrich
from newsroom.text import clip, keywords, sentences, slug
from orbit.execution.context import ExecutionContext
from orbit.payload import Payload
from orbit.profiles.documents import read_documents
from orbit.profiles.instruction import synthesize

HOME = Path(newsroom_run.__file__).parent


# Read as Orbit reads it: schemas, references, schedules, and every step imported.
DOCUMENTS = read_documents(HOME / "config", endpoint_keys={"newsletter", "social"})
RUN_PROFILES = {one.run_profile_id: one for one in DOCUMENTS.run_profiles}
PROFILES = {one.run_profile_id: DOCUMENTS.profile(one.profile_id) for one in DOCUMENTS.run_profiles}


def context(
    run_profile_id: str, slot_at: str | None = None, **changes: Mapping[str, Any]
) -> ExecutionContext:
    """What the steps of a run profile get; changes replace parts of its instruction."""
    run_profile, profile = RUN_PROFILES[run_profile_id], PROFILES[run_profile_id]
    assert profile is not None
    return ExecutionContext(
        namespace=run_profile.namespace,
        cycle_id="0198f1b5-0000-7000-8000-000000000000",
        profile_id=run_profile.profile_id,
        run_profile_id=run_profile_id,
        stage="tier1_complete",
        step=1,
        attempt=1,
        idempotency_key="key",
        instruction=synthesize(profile, run_profile) | changes,
        options={},
        initiation={},
        slot_at=slot_at,
        traceparent="",
    )


def whole_pipeline(context: ExecutionContext) -> list[Payload]:
    """Every tier and the normaliser, as the run profile has them."""
    payload = desk.select(Payload(b"{}"), context)
    payload = brief.write(payload, context)
    payload = Payload.of_json(enrich(payload.json()))
    payload = posts.compose(payload, context)
    return list(items.normalize(list(items.split(payload, context)), context))


def of_all_articles(run_profile_id: str) -> ExecutionContext:
    """A context whose profile takes every article and writes for every platform."""
    tags: dict[str, Any] = {"tags": ["city", "science"]}
    rules: dict[str, Any] = {"articles_per_edition": 100}
    bundle: dict[str, Any] = {
        "articles_folder": "articles",
        "platforms": ["short", "newsletter", "card"],
    }
    return context(run_profile_id, asset_bindings=tags, execution_rules=rules, asset_bundle=bundle)


def test_the_articles_are_real_ones() -> None:
    """Nine articles or so, each of 400 to 700 words, newest first."""
    articles = read_articles(HOME / "articles")
    assert 8 <= len(articles) <= 10
    assert all(400 <= len(article.body.split()) <= 700 for article in articles)
    dates = [article.published for article in articles]
    assert dates == sorted(dates, reverse=True)


@pytest.mark.parametrize("run_profile_id", RUN_PROFILES)
def test_the_same_input_gives_the_same_bytes_in_another_process(run_profile_id: str) -> None:
    """A step called again after a crash, elsewhere, changes nothing."""
    here = [item.digest for item in whole_pipeline(context(run_profile_id))]
    code = (
        "import tests.unit.test_newsroom as t;"
        f"print(*[i.digest for i in t.whole_pipeline(t.context({run_profile_id!r}))])"
    )
    paths = os.pathsep.join([str(HOME.parent.parent), str(HOME)])
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": paths}
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert there.stdout.split() == here
    assert len(set(here)) == len(here) > 0


@pytest.mark.parametrize("run_profile_id", ["nova-social", "terra-weekly"])
def test_every_post_of_every_article_keeps_its_platforms_limits(run_profile_id: str) -> None:
    """Texts are within the limits, not empty, and say where they come from."""
    limits = context(run_profile_id).instruction["distribution_map"]
    made = [item.json() for item in whole_pipeline(of_all_articles(run_profile_id))]
    assert len(made) == 3 * len(read_articles(HOME / "articles"))
    for post in made:
        limit = limits[post["platform"]]
        if post["platform"] == "card":
            assert 0 < len(post["headline"]) <= limit["headline_characters"]
            assert 0 < len(post["text"]) <= limit["standfirst_characters"]
        else:
            assert 60 < len(post["text"]) <= limit["max_characters"]
            assert post["article"] in post["text"]


@pytest.mark.parametrize("size", [0, 60, 90])
def test_a_limit_too_small_for_anything_is_said(size: int) -> None:
    """Rather an error than a post that is over its limit."""
    distribution = {key: {"max_characters": size} for key in ("short", "newsletter")}
    bundle = {"platforms": ["newsletter"]}
    with pytest.raises(ValueError, match="too short"):
        whole_pipeline(context("terra-weekly", distribution_map=distribution, asset_bundle=bundle))


def test_tight_limits_are_kept() -> None:
    """Where little fits, whole sentences go first, then words."""
    for size in range(120, 400, 7):
        distribution = {key: {"max_characters": size} for key in ("short", "newsletter")}
        bundle = {"platforms": ["newsletter", "short"]}
        tight = context("nova-social", distribution_map=distribution, asset_bundle=bundle)
        made = whole_pipeline(tight)
        assert all(len(item.json()["text"]) <= size for item in made)


def test_items_are_json_with_sorted_keys() -> None:
    """Equal posts are equal bytes."""
    for item in whole_pipeline(of_all_articles("nova-social")):
        assert item.content_type == "application/json"
        post = item.json()
        assert list(post) == sorted(post)
        assert all(post[key] for key in items.REQUIRED)


def test_a_post_without_text_is_refused() -> None:
    """The normaliser lets nothing through that a receiver could not use."""
    with pytest.raises(items.PostInvalid, match="post of bread lacks platform, text"):
        items.normalize([Payload.of_json({"article": "bread"})], context("nova-social"))


def test_each_day_has_its_own_edition_and_each_article_its_day() -> None:
    """Slots a day apart choose other articles, and in time all of the profile's are used."""
    seen: list[list[str]] = []
    for day in range(1, 28):
        slot = context("nova-social", slot_at=f"2026-02-{day:02}T05:30:00Z")
        bundle = desk.select(Payload(b""), slot).json()
        seen.append([article["name"] for article in bundle["articles"]])
        assert all("city" in article["tags"] for article in bundle["articles"])
    assert all(a != b for a, b in pairwise(seen))
    of_the_city = {a.name for a in read_articles(HOME / "articles") if "city" in a.tags}
    assert {name for edition in seen for name in edition} == of_the_city


def test_an_empty_folder_is_a_clear_error(tmp_path: Path) -> None:
    """It names the folder."""
    with pytest.raises(ArticleInvalid, match=f"no articles .* in {tmp_path}"):
        read_articles(tmp_path)


def test_no_fitting_article_is_a_clear_error() -> None:
    """It names the tags."""
    with pytest.raises(ArticleInvalid, match="no article has any of the tags opera"):
        desk.choose(read_articles(HOME / "articles"), frozenset({"opera"}), 3, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.md:1: expected ---"),
        ("---\ntitle: T\n---\nText", "lacks desk, date, tags"),
        ("---\ntitel: T\n---\nText", "a.md:2: expected one of title"),
        ("---\ntitle: T\ndesk: d\ndate: May\ntags: x\n---\nText", "date is not like"),
        ("---\ntitle: T\ndesk: d\ndate: 2026-01-01\ntags: x\n---\n\n", "no text"),
    ],
)
def test_a_bad_article_is_named_with_its_fault(text: str, message: str) -> None:
    """Whoever writes articles can put them right."""
    with pytest.raises(ArticleInvalid, match=message):
        parse("a", text)


def test_a_brief_is_made_of_the_articles_own_sentences_in_order() -> None:
    """Extractive: nothing is invented."""
    for article in read_articles(HOME / "articles"):
        chosen = brief.summarize(article.body, 4)
        places = [article.body.index(sentence) for sentence in chosen]
        assert len(chosen) == 4
        assert places == sorted(places)


def test_text_is_taken_apart_as_a_reader_would() -> None:
    """Sentences, keywords, slugs and cuts."""
    assert sentences('It grew 0.9 m. "Why?" he asked. Yes!') == [
        "It grew 0.9 m.",
        '"Why?" he asked.',
        "Yes!",
    ]
    assert keywords("Bees dance. A bee dances for bees; the hive waits.", 1) == ["bee"]
    assert slug("Why Zürich's bread goes stale!") == "why-zurichs-bread-goes-stale"
    assert clip("one two three", 13) == "one two three"
    assert clip("one two three", 8) == "one two…"
    assert clip("onetwothree", 5) == "onet…"


def eventually(is_so: Callable[[], bool]) -> bool:
    """Whether something becomes true within 20 seconds."""
    deadline = time.monotonic() + 60
    while not (result := is_so()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return result


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A child's log."""
    return tmp_path / "logs" / "child.log"


CHILD_ENVIRONMENT = os.environ | {"PYTHONPATH": str(HOME), "PYTHONUNBUFFERED": "1"}


def test_the_enrich_step_answers_over_http_and_stops_with_code_0(log: Path) -> None:
    """In another process: facts added, nonsense refused, the same answer twice."""
    port = free_port(0)
    command = [sys.executable, "-m", "newsroom.enrich", "--port", str(port)]
    child = Child("the step", command, CHILD_ENVIRONMENT, log)
    try:
        child.wait_until_up(f"http://127.0.0.1:{port}/health", 60, lambda text: None)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            bundle = desk.select(Payload(b""), context("terra-weekly")).json()
            answers = [client.post("/enrich", json=bundle) for _ in range(2)]
            assert answers[0].content == answers[1].content
            assert answers[0].json() == enrich(bundle)
            assert answers[0].json()["articles"][0]["reading_minutes"] == 3
            assert client.post("/enrich", content=b"{]").status_code == 400
            assert client.post("/enrich", json={"articles": [{}]}).status_code == 400
            assert client.post("/elsewhere", json=bundle).status_code == 404
    finally:
        assert child.stop(60) == 0


def test_a_child_that_dies_is_shown_with_its_last_lines(log: Path) -> None:
    """The message has the exit code, what it wrote, and where the log is."""
    command = [sys.executable, "-c", "print('no [bold] database'); raise SystemExit(3)"]
    child = Child("Orbit", command, CHILD_ENVIRONMENT, log)
    with pytest.raises(DriverFailed) as failure:
        child.wait_until_up("http://127.0.0.1:9/", 60, lambda text: None)
    assert "Orbit ended with exit code 3." in str(failure.value)
    assert "  | no [bold] database" in str(failure.value)
    assert str(log) in str(failure.value)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_children_die_with_a_driver_that_is_killed(tmp_path: Path, log: Path) -> None:
    """Killing the driver leaves nothing running."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from driver.children import Child\n"
        "waiting = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'\n"
        f"log = Path({str(log)!r})\n"
        "Child('child', [sys.executable, '-c', waiting], os.environ, log)\n"
        "signal.pause()\n"
    )
    driver = subprocess.Popen([sys.executable, str(script)], env=CHILD_ENVIRONMENT)
    try:
        assert eventually(lambda: log.exists() and log.read_text().endswith("\n"))
        child = int(log.read_text())
        assert is_running(child)
    finally:
        driver.kill()
        driver.wait(60)
    assert eventually(lambda: not is_running(child))


def is_running(process: int) -> bool:
    """Whether a process exists and is no zombie."""
    with suppress(FileNotFoundError, ProcessLookupError):
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


def test_a_taken_port_is_replaced() -> None:
    """The default if it is free, else another one."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port(port) != port
    assert free_port(port) == port


def test_the_configuration_follows_the_enrich_steps_port(tmp_path: Path) -> None:
    """As it is with the default port; a copy with the other URL otherwise."""
    places = newsroom_run.Places(3000, 8787, 9000, tmp_path)
    assert newsroom_run.configuration(places) == HOME / "config"
    copy = newsroom_run.configuration(replace(places, enrich_port=9123))
    text = (copy / "runProfiles.json").read_text()
    assert text.count("http://127.0.0.1:9123/enrich") == len(RUN_PROFILES)
    assert ":9000" not in text
    assert (copy / "profiles.json").read_text() == (HOME / "config/profiles.json").read_text()


def test_orbits_environment_is_the_examples_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the caller has set for another Orbit does not reach this one."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://elsewhere/")
    monkeypatch.setenv("ORBIT_GLOBAL_PAUSE", "true")
    made = newsroom_run.environment(newsroom_run.Places(3001, 8788, 9000, tmp_path))
    assert not {"DATABASE_URL", "ORBIT_GLOBAL_PAUSE"} & set(made)
    assert made["PORT"] == "3001"
    endpoints = {one["key"]: one for one in json.loads(made["ORBIT_DISPATCH_ENDPOINTS"])}
    targets = {key for one in RUN_PROFILES.values() for key in one.distribution_targets}
    assert set(endpoints) == targets
    assert endpoints["newsletter"]["url"] == "http://127.0.0.1:8788/newsletter"
    assert [key for key, one in endpoints.items() if "token" in one] == ["newsletter"]


JOB = Job("j1", "social", "delivered", 1, "d1", 10)
CYCLE = Cycle("c1", "finished", "cycle_finished", "", (JOB,))
STORED = {"outcome": "stored", "jobId": "j1", "digest": "d1"}


def test_a_delivery_that_the_receiver_confirms_is_no_problem() -> None:
    """Failures and duplicates around it are no matter."""
    others = [STORED | {"outcome": "failed_on_purpose"}, STORED | {"outcome": "duplicate"}]
    assert problems({"nova": CYCLE}, [others[0], STORED, others[1]]) == []


@pytest.mark.parametrize(
    ("cycle", "arrivals", "words"),
    [
        (CYCLE, [], "the receiver stored it 0 times"),
        (CYCLE, [STORED, STORED], "the receiver stored it 2 times"),
        (CYCLE, [STORED | {"digest": "d2"}], "the receiver stored d2"),
        (replace(CYCLE, jobs=(replace(JOB, state="dead_letter"),)), [STORED], "is dead_letter"),
        (replace(CYCLE, jobs=()), [], "made no job"),
        (replace(CYCLE, state="failed", reason="tier2 raised"), [STORED], "failed. tier2 raised"),
    ],
)
def test_whatever_differs_from_what_the_receiver_holds_is_a_problem(
    cycle: Cycle, arrivals: list[dict[str, str]], words: str
) -> None:
    """The run fails, and says which job and how."""
    [found] = problems({"nova": cycle}, arrivals)
    assert words in found


def test_a_cycle_is_read_from_orbits_answer() -> None:
    """The driver takes what it shows from the cycle's whole lineage."""
    job = {"jobId": "j1", "endpointKey": "social", "state": "delivered", "digest": "d1"}
    job |= {"size": 10, "attempts": 1}  # type: ignore[dict-item]
    cycle = {"state": "finished", "stage": "cycle_finished", "reason": None}
    content: dict[str, Any] = {"cycle": cycle, "jobs": [job]}
    assert read_cycle("c1", content) == CYCLE
    assert CYCLE.is_over
