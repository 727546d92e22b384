"""The middleware in an application under a real server: every check, and one effect per id."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from orbit.receiver import (
    Delivery,
    FileSeen,
    MemorySeen,
    OrbitDeliveries,
    PostgresSeen,
    Seen,
    Verdict,
    claim,
    create_table,
    forget,
)
from tests.scenario.receiving import SECRET, TOKEN, genuine, serving

BODY = b'{"headline": "Good morning"}'


class Service:
    """An application that notes each delivery, and fails or dawdles when told to."""

    def __init__(self) -> None:
        self.taken: list[tuple[Delivery, bytes]] = []
        self.failures: list[int | Exception] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.at_work = self.most_at_work = 0

    async def deliver(self, request: Request) -> Response:
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        self.entered.set()
        try:
            body = await request.body()
            await asyncio.to_thread(self.gate.wait, 30)
            connection = request.state.connection
            if connection is not None:
                delivery = request.state.delivery
                await connection.execute("INSERT INTO effects VALUES (%s)", (delivery.id,))
            if self.failures:
                failure = self.failures.pop(0)
                if isinstance(failure, Exception):
                    raise failure
                return JSONResponse({}, failure)
            self.taken.append((request.state.delivery, body))
            return PlainTextResponse("taken", 201)
        finally:
            self.at_work -= 1


Start = Callable[..., httpx.Client]


@pytest.fixture
def service() -> Service:
    """The application's state."""
    return Service()


@pytest.fixture
def start(service: Service) -> Iterator[Start]:
    """Serves the service behind the middleware, with its settings."""
    with ExitStack() as stack:

        def start_one(lifespan: Any = None, **settings: Any) -> httpx.Client:
            methods = ["POST", "PUT", "PATCH", "DELETE"]
            routes = [
                Route("/in", service.deliver, methods=methods),
                Route("/health", lambda _: PlainTextResponse("up"), methods=["GET", "POST"]),
            ]
            app = Starlette(routes=routes, lifespan=lifespan)
            secrets = {"token": TOKEN, "signing_secret": SECRET, "path": "/in"}
            app.add_middleware(OrbitDeliveries, **(secrets | settings))
            serve: AbstractContextManager[httpx.Client] = serving(app)
            return stack.enter_context(serve)

        yield start_one


def post(client: httpx.Client, job_id: str, body: bytes = BODY, **changed: str) -> httpx.Response:
    """Delivers once; `webhook_id="x"` replaces a header."""
    headers = httpx.Headers(genuine(job_id, body))
    headers.update({name.replace("_", "-"): value for name, value in changed.items()})
    return client.post("/in", content=body, headers=headers)


@pytest.mark.parametrize(
    "body",
    [b"", BODY, bytes(range(256)), b"\xff\xfe\xc3(", b"\x1f\x8b\x08\x00", bytes(10 * 1024 * 1024)],
    ids=["empty", "json", "all-bytes", "invalid-utf8", "gzip", "10-mib"],
)
def test_a_genuine_delivery_arrives_unchanged(start: Start, service: Service, body: bytes) -> None:
    """Any bytes reach the application as they were sent, with what the headers say."""
    answer = post(start(), "j1", body)
    assert (answer.status_code, answer.text) == (201, "taken")
    [(delivery, taken)] = service.taken
    assert taken == body
    assert delivery == Delivery("j1", "brand-a", job_id="j1", attempt=1)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_every_delivering_method_is_checked(start: Start, service: Service, method: str) -> None:
    """No method goes round the checks."""
    client = start()
    assert client.request(method, "/in", content=BODY).status_code == 401
    headers = genuine("j1", BODY)
    assert client.request(method, "/in", content=BODY, headers=headers).status_code == 201
    assert len(service.taken) == 1


def test_other_paths_pass_untouched(start: Start) -> None:
    """The service's other routes need no token of Orbit's."""
    client = start()
    assert client.get("/health").text == client.post("/health").text == "up"
    assert client.get("/in").status_code == 405


@pytest.mark.parametrize(
    ("changed", "status", "code"),
    [
        ({"authorization": "Bearer x"}, 401, "bearer_invalid"),
        ({"webhook_signature": "v1,AAAA"}, 401, "signature_invalid"),
        ({"webhook_timestamp": "7"}, 401, "signature_invalid"),
        ({"webhook_id": "j2"}, 401, "signature_invalid"),
        ({"idempotency_key": "j2"}, 400, "header_invalid"),
        (
            {"content_digest": f"sha-256=:{base64.b64encode(bytes(32)).decode()}:"},
            400,
            "body_altered",
        ),
        ({"orbit_namespace": "../x"}, 400, "header_invalid"),
    ],
)
def test_what_is_not_genuine_is_refused_and_not_passed_on(
    start: Start, service: Service, changed: dict[str, str], status: int, code: str
) -> None:
    """A problem document names the reason, and the id stays free for the genuine delivery."""
    client = start()
    answer = post(client, "j1", BODY, **changed)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert service.taken == []
    assert post(client, "j1").status_code == 201


def test_a_header_that_comes_twice_is_not_read_as_one(start: Start) -> None:
    """A second id behind the signed one does not pass as the first."""
    headers = [*genuine("j1", BODY).items(), ("webhook-id", "j2")]
    answer = start().post("/in", content=BODY, headers=headers)
    assert answer.json()["code"] == "signature_invalid"


def test_a_body_over_the_bound_is_refused(start: Start, service: Service) -> None:
    """By its announced length, and by what comes where none is announced."""
    client = start(max_body_bytes=1000)
    assert post(client, "j1", bytes(1000)).status_code == 201
    assert post(client, "j2", bytes(1001)).json()["code"] == "body_too_large"
    pieces = iter([bytes(600)] * 2)
    answer = client.post("/in", content=pieces, headers=genuine("j3", bytes(1200)))
    assert answer.status_code == 413
    assert len(service.taken) == 1


def seen_of(kind: str, folder: Path) -> Seen:
    """A memory of either kind."""
    return MemorySeen() if kind == "memory" else FileSeen(folder / "index")


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_repetition_is_answered_without_the_application(
    start: Start, service: Service, kind: str, tmp_path: Path
) -> None:
    """2xx for the same bytes, 409 for others; the application is called once."""
    client = start(seen=seen_of(kind, tmp_path))
    assert post(client, "j1").status_code == 201
    again = post(client, "j1")
    assert (again.status_code, again.json()["duplicate"]) == (200, True)
    conflict = post(client, "j1", b"other")
    assert (conflict.status_code, conflict.json()["code"]) == (409, "id_conflict")
    assert len(service.taken) == 1


@pytest.mark.parametrize("failure", [500, 404, 302, ZeroDivisionError("the effect failed")])
def test_what_failed_is_not_remembered(
    start: Start, service: Service, failure: int | Exception
) -> None:
    """The sender sees the failure, comes again, and then it takes effect, once."""
    service.failures = [failure]
    client = start()
    first = post(client, "j1").status_code
    assert first == (failure if isinstance(failure, int) else 500)
    assert [post(client, "j1").status_code for _ in range(2)] == [201, 200]
    assert len(service.taken) == 1


@pytest.mark.parametrize("is_failing_first", [False, True])
def test_concurrent_deliveries_of_one_id_take_effect_once(
    start: Start, service: Service, is_failing_first: bool
) -> None:
    """Twenty at a time: never two at work, one effect; if the first fails another one is tried."""
    client = start(wait_seconds=60)
    service.failures = [500] * is_failing_first
    service.gate.clear()
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(post, client, "j1") for _ in range(20)]
        assert service.entered.wait(30)
        service.gate.set()
        statuses = sorted(answer.result(60).status_code for answer in answers)
    assert statuses == sorted([201] + [500] * is_failing_first + [200] * (19 - is_failing_first))
    assert (len(service.taken), service.most_at_work) == (1, 1)


def test_who_has_waited_long_enough_is_told_to_come_again(start: Start, service: Service) -> None:
    """503 with Retry-After while the first is at work, and no second call."""
    client = start(wait_seconds=0)
    service.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, client, "j1")
        assert service.entered.wait(30)
        busy = post(client, "j1")
        service.gate.set()
        assert first.result(30).status_code == 201
    assert (busy.status_code, busy.json()["code"]) == (503, "id_busy")
    assert busy.headers["retry-after"] == "1"
    assert post(client, "j1").status_code == 200


@pytest.mark.parametrize(
    ("token", "signing_secret"), [(None, None), ("", SECRET), (["t", ""], None), (TOKEN, "")]
)
def test_an_unset_variable_does_not_open_the_door(
    token: str | list[str] | None, signing_secret: str | None
) -> None:
    """Without secrets, or with an empty one, the middleware does not start."""
    with pytest.raises(ValueError, match=r"token|whsec_"):
        OrbitDeliveries(Starlette(), token=token, signing_secret=signing_secret)


class Table:
    """The receiver's own database, with a table for its effects."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.pool: AsyncConnectionPool[Any] | None = None
        with psycopg.connect(dsn) as connection:
            create_table(connection)
            connection.execute("CREATE TABLE effects (id text)")

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with AsyncConnectionPool(self.dsn, min_size=1, max_size=4) as self.pool:
            yield

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        assert self.pool is not None
        async with self.pool.connection() as connection:
            yield connection

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn) as connection:
            return connection.execute(query.encode()).fetchall()


@pytest.fixture
def table(owner_dsn: str) -> Table:
    """A fresh database of the receiver's."""
    return Table(owner_dsn)


def test_effect_and_id_commit_together_or_not_at_all(
    start: Start, service: Service, table: Table
) -> None:
    """Failed and raised: neither row; then both rows; repetitions are counted."""
    client = start(table.lifespan, seen=PostgresSeen(table.connect))
    service.failures = [503, ZeroDivisionError("after the insert")]
    assert [post(client, "j1").status_code for _ in range(2)] == [503, 500]
    assert table.rows("SELECT id FROM effects") == table.rows("SELECT id FROM orbit_deliveries")
    assert table.rows("SELECT id FROM effects") == []
    assert [post(client, "j1").status_code for _ in range(3)] == [201, 200, 200]
    assert post(client, "j1", b"other").status_code == 409
    assert table.rows("SELECT id FROM effects") == [("j1",)]
    assert table.rows("SELECT id, repeats FROM orbit_deliveries") == [("j1", 3)]


@pytest.mark.parametrize("is_failing_first", [False, True])
def test_twenty_concurrent_deliveries_to_two_servers_take_effect_once(
    start: Start, service: Service, table: Table, is_failing_first: bool
) -> None:
    """Two servers that share nothing but the table: one effect."""
    other = Table.__new__(Table)
    other.dsn = table.dsn
    clients = [
        start(each.lifespan, seen=PostgresSeen(each.connect), wait_seconds=60)
        for each in (table, other)
    ]
    service.failures = [500] * is_failing_first
    service.gate.clear()
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(post, clients[n % 2], "j1") for n in range(20)]
        assert service.entered.wait(30)
        service.gate.set()
        statuses = sorted(answer.result(60).status_code for answer in answers)
    assert statuses == sorted([201] + [500] * is_failing_first + [200] * (19 - is_failing_first))
    assert table.rows("SELECT id FROM effects") == [("j1",)]
    assert (len(service.taken), service.most_at_work) == (1, 1)


def test_claims_of_one_id_in_two_transactions(table: Table) -> None:
    """Busy while the other is open; new after its rollback; duplicate after its commit."""
    with psycopg.connect(table.dsn) as one, psycopg.connect(table.dsn) as two:
        assert claim(one, "a", "d") is Verdict.NEW
        assert claim(two, "a", "d") is Verdict.BUSY
        assert claim(two, "b", "d") is Verdict.NEW
        one.rollback()
        assert claim(two, "a", "d") is Verdict.NEW
        two.commit()
        assert claim(one, "a", "d") is Verdict.DUPLICATE
        assert claim(one, "a", "e") is Verdict.CONFLICT
        one.rollback()
        two.execute("UPDATE orbit_deliveries SET received_at = now() - interval '8 d' WHERE id='a'")
        two.commit()
        assert forget(two, timedelta(days=7)) == 1
        assert claim(two, "b", "d") is Verdict.DUPLICATE


def test_a_claim_that_would_hold_nothing_is_refused(table: Table) -> None:
    """In autocommit it needs a transaction of its own."""
    with psycopg.connect(table.dsn, autocommit=True) as connection:
        with pytest.raises(ValueError, match="transaction"):
            claim(connection, "a", "d")
        with connection.transaction():
            assert claim(connection, "a", "d") is Verdict.NEW


def test_a_hundred_threads_with_a_claim_each_have_one_effect(table: Table) -> None:
    """Whoever is busy comes again, until all have been told what became of the id."""

    def deliver(_: int) -> Verdict:
        with psycopg.connect(table.dsn) as connection:
            while (verdict := claim(connection, "a", "d")) is Verdict.BUSY:
                connection.rollback()
            if verdict is Verdict.NEW:
                connection.execute("INSERT INTO effects VALUES ('a')")
            return verdict

    with ThreadPoolExecutor(20) as pool:
        verdicts = list(pool.map(deliver, range(100)))
    assert (verdicts.count(Verdict.NEW), verdicts.count(Verdict.DUPLICATE)) == (1, 99)
    assert table.rows("SELECT id FROM effects") == [("a",)]


@pytest.mark.parametrize("path", ["/inn", "/in-2", "/x/in", "/"])
def test_a_path_that_only_looks_alike_passes(start: Start, path: str) -> None:
    """It is the application's to answer: there is no such route."""
    assert start().post(path).status_code == 404


@pytest.mark.parametrize("statement", ["INSERT INTO effects VALUES ('taken')", "ROLLBACK"])
def test_a_transaction_that_cannot_commit_is_not_answered_with_success(
    table: Table, statement: str
) -> None:
    """An SQL error that the application went on from: 500, nothing remembered, tried again."""
    with psycopg.connect(table.dsn) as connection:
        connection.execute("ALTER TABLE effects ADD PRIMARY KEY (id)")
        connection.execute("INSERT INTO effects VALUES ('taken')")
    statements = [statement]

    async def deliver(request: Request) -> Response:
        with contextlib.suppress(psycopg.errors.UniqueViolation):
            for each in statements:
                await request.state.connection.execute(each)
        return PlainTextResponse("taken")

    app = Starlette(routes=[Route("/in", deliver, methods=["POST"])], lifespan=table.lifespan)
    app.add_middleware(OrbitDeliveries, token=TOKEN, seen=PostgresSeen(table.connect))
    with serving(app) as client:
        assert post(client, "j1").status_code == 500
        assert table.rows("SELECT id FROM orbit_deliveries") == []
        statements.clear()
        assert [post(client, "j1").status_code for _ in range(2)] == [200, 200]
    assert table.rows("SELECT id, repeats FROM orbit_deliveries") == [("j1", 1)]


def test_an_sql_error_within_a_savepoint_is_the_applications_own(table: Table) -> None:
    """Caught around an inner transaction it harms neither the id nor the other writes."""

    async def deliver(request: Request) -> Response:
        connection = request.state.connection
        await connection.execute("INSERT INTO effects VALUES ('j1')")
        with contextlib.suppress(psycopg.errors.UndefinedTable):
            async with connection.transaction():
                await connection.execute("INSERT INTO nowhere VALUES (1)")
        return PlainTextResponse("taken")

    app = Starlette(routes=[Route("/in", deliver, methods=["POST"])], lifespan=table.lifespan)
    app.add_middleware(OrbitDeliveries, token=TOKEN, seen=PostgresSeen(table.connect))
    with serving(app) as client:
        assert post(client, "j1").status_code == 200
    assert table.rows("SELECT id FROM effects") == [("j1",)]
    assert table.rows("SELECT id FROM orbit_deliveries") == [("j1",)]
