"""The one way in which verbs ask: the JSON API, over HTTP or in this process.

Where a node answers (ORBIT_URL, else the address of the settings), it is asked. Else, unless
ORBIT_URL says that there must be one, the same API runs in this process over the same database,
so that an operator can look and act while no node is up. In-process nothing is started: what is
accepted waits for a node. A database that isn't there is not made by asking.

A node is shown ORBIT_API_KEY, else the embedded instance's own key, which is never sent to an
address of ORBIT_URL. Who has the database but no key asks in this process: it has everything.
The brake and keys go there too, without ORBIT_URL, where a node does not let in: a key that has
ended, or an address that has to wait, stops no emergency.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orbit import __version__
from orbit.cli.outcome import ApiProblem, NodeUnreachable
from orbit.cli.terminal import note
from orbit.errors import SettingInvalid

if TYPE_CHECKING:
    import httpx

    from orbit.profiles.model import Documents
    from orbit.profiles.overlays import Overlay
    from orbit.settings import Settings

_ANSWER_SECONDS = 60.0
_HELLO_SECONDS = 3.0
_KEPT_OUT = {
    401: {"unauthenticated"},
    429: {"too_many_attempts"},
    503: {"not_started", "draining"},
}
_HEADERS = {"User-Agent": f"orbit-cli/{__version__}", "Accept": "application/json"}

Send = Callable[..., "httpx.Response"]


class Api:
    """Asks the API and gives its JSON; `address` is the node's, None in-process.

    Every method raises ApiProblem for an answer that isn't 2xx, and NodeUnreachable if there
    is none.
    """

    def __init__(
        self, send: Send, address: str | None, else_in_process: Callable[[], Send] | None = None
    ) -> None:
        """`else_in_process` gives the way that is taken where the node does not let in."""
        self._send, self.address, self._else = send, address, else_in_process

    @property
    def is_in_process(self) -> bool:
        """Whether no node was found, so that this process asks the database itself."""
        return self.address is None

    def get(self, path: str, **params: Any) -> Any:
        """`GET path`; parameters that are None are left out."""
        given = {key: value for key, value in params.items() if value is not None}
        return self._ask("GET", path, params=given)

    def post(self, path: str, body: Any = None, **headers: str) -> Any:
        """`POST path` with a JSON body, and headers by keyword (`Idempotency_Key=...`)."""
        return self._ask("POST", path, json=body, headers=_named(headers))

    def _ask(self, method: str, path: str, **given: Any) -> Any:
        import httpx

        try:
            response = self._send(method, path, **given)
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise NodeUnreachable(f"{self.address} does not answer: {reason}") from error
        content = _content(response)
        if response.is_success:
            return content
        if self._else is not None and _is_kept_out(response.status_code, content):
            note(f"{self.address} does not let in ({content['detail']}): straight on the database")
            self._send, self.address, self._else = self._else(), None, None
            return self._ask(method, path, **given)
        raise ApiProblem(response.status_code, content if isinstance(content, dict) else {})


def _is_kept_out(status: int, content: Any) -> bool:
    """Whether a node answered before it looked at what was asked: nothing has happened."""
    code = content.get("code") if isinstance(content, dict) else None
    return status in _KEPT_OUT and code in _KEPT_OUT[status]


def _named(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@contextmanager
def connected(
    given: Settings,
    *,
    is_direct: bool = False,
    is_urgent: bool = False,
    patience_seconds: float = _ANSWER_SECONDS,
) -> Iterator[Api]:
    """The API of a node, or of this process; only that if `is_direct`.

    With `is_urgent`, and without ORBIT_URL, it is this process's too where the node lets nobody
    in with the key at hand, or not now.
    An answer is waited for `patience_seconds`, or a minute if that is longer.
    Raises NodeUnreachable where neither a node nor a database is to be found, and whatever
    opening the database raises.
    """
    import httpx

    with ExitStack() as stack:
        patience_seconds = max(patience_seconds, _ANSWER_SECONDS)
        if is_direct:
            _refuse_without_database(given, "the address")
            yield Api(stack.enter_context(_in_process(given, patience_seconds)), None)
            return
        named, key = _named_address(), api_key(given)
        address = named or own_address(given)
        client = stack.enter_context(
            httpx.Client(
                base_url=address,
                headers=_HEADERS | authorization(key),
                timeout=patience_seconds,
                trust_env=named is not None,
            )
        )
        if named is not None:
            _refuse_stranger(client, address)
        is_let_in = "api" in given.roles and (key is not None or given.auth == "off")
        if named is not None or (is_let_in and answers(client)):

            def in_process() -> Send:
                return stack.enter_context(_in_process(given, patience_seconds))

            has_database = given.database_url is not None or has_embedded_data(given)
            may_turn = is_urgent and named is None and has_database
            yield Api(client.request, address, in_process if may_turn else None)
            return
        _refuse_without_database(given, address)
        yield Api(stack.enter_context(_in_process(given, patience_seconds)), None)


def api_key(given: Settings) -> str | None:
    """The access key to show: ORBIT_API_KEY, else that of the embedded instance here."""
    from orbit.governance import local_key

    key = os.environ.get("ORBIT_API_KEY", "").strip()
    if key and not (key.isascii() and key.isprintable()):
        raise SettingInvalid("ORBIT_API_KEY: accepted is an access key, orb_…")
    if key or given.database_url is not None or _named_address() is not None:
        return key or None
    return local_key.read(given.data_dir)


def authorization(key: str | None) -> dict[str, str]:
    """The header that shows a key; without one there is none."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


@dataclass(frozen=True, slots=True)
class InForce:
    """What a node that runs here has in force: files if others than ours, and overlays."""

    other_revision: str | None = None
    overlays: Sequence[Overlay] = ()


def in_force(given: Settings, documents: Documents) -> InForce:
    """What is in force on the node that runs here, as it is to these documents.

    Nothing if no node answers: asking is an extra and never fails.
    """
    import httpx

    from orbit.profiles.revision import revision_of

    address = _named_address() or own_address(given)
    headers = _HEADERS | authorization(api_key(given))
    with httpx.Client(base_url=address, headers=headers, trust_env=False) as client:
        if not answers(client):
            return InForce()
        try:
            answer = client.get("/config", timeout=_HELLO_SECONDS)
            found = answer.json() if answer.is_success else {}
            overlays = [_overlay(one) for one in found.get("overlays", ())]
        except (httpx.TransportError, ValueError, AttributeError, KeyError):
            return InForce()
    files = found.get("declaredRevision")
    return InForce(
        files if files not in (None, revision_of(documents).revision) else None, overlays
    )


def _overlay(told: Mapping[str, Any]) -> Overlay:
    from orbit.profiles.overlays import Move, Origin, Overlay, Target

    return Overlay(
        told["overlayId"],
        Target(told["target"]),
        told["targetId"],
        Origin(told["origin"]),
        tuple(Move(one["path"], one["before"], one["value"]) for one in told["changes"]),
        (),
        told["actor"],
        told["reason"],
    )


def own_address(given: Settings) -> str:
    """The address that a node with these settings listens on."""
    host = f"[{given.host}]" if ":" in given.host else given.host
    return f"http://{host}:{given.port}"


def answers(client: httpx.Client) -> bool:
    """Whether an Orbit node is at the client's address; another service there is none."""
    import httpx

    try:
        response = client.get("/health", timeout=_HELLO_SECONDS)
        content = response.json()
    except (httpx.TransportError, ValueError):
        return False
    return response.is_success and isinstance(content, dict) and _is_orbit(content)


def _refuse_stranger(client: httpx.Client, address: str) -> None:
    """Raises NodeUnreachable where something answers at ORBIT_URL that is no Orbit node."""
    import httpx

    try:
        response = client.get("/health")
    except httpx.TransportError:
        return  # said by what is asked next
    try:
        is_ours = _is_orbit(response.json())
    except (ValueError, AttributeError):
        is_ours = False
    if not is_ours:
        raise NodeUnreachable(
            f"what answers at {address} is no Orbit node (status {response.status_code} to "
            "/health): correct ORBIT_URL"
        )


def _is_orbit(health: Mapping[str, Any]) -> bool:
    return {"status", "version", "nodeId"} <= health.keys()


def _named_address() -> str | None:
    address = os.environ.get("ORBIT_URL", "").strip().rstrip("/")
    if address and not address.startswith(("http://", "https://")):
        raise SettingInvalid(f"ORBIT_URL={address!r}: accepted is an http:// or https:// URL")
    return address or None


def _refuse_without_database(given: Settings, address: str) -> None:
    if given.database_url is None and not has_embedded_data(given):
        raise NodeUnreachable(
            f"no node answers at {address}, and there is no database in {given.data_dir}: "
            "start a node with `orbit up`, or set ORBIT_URL or DATABASE_URL"
        )


def has_embedded_data(given: Settings) -> bool:
    """Whether the data folder has a database already."""
    from orbit.database.embedded_place import LOCATION_FILE

    folder = given.data_dir
    return (folder / "postgres" / "data").exists() or (folder / LOCATION_FILE).exists()


@contextmanager
def _in_process(given: Settings, patience_seconds: float) -> Iterator[Send]:
    """The application around a node without any service, on an event loop of its own."""
    import httpx

    from orbit.api.server import create_application
    from orbit.app import Node
    from orbit.governance.actor import actor_here
    from orbit.logging import configure_logging

    small = given.model_copy(
        update={"database_pool_min": 1, "database_pool_max": 4, "log_level": "warning"}
    )
    configure_logging(small)
    node = Node(small, roles=frozenset())
    with asyncio.Runner() as runner:
        try:
            runner.run(node.open())
            transport = httpx.ASGITransport(
                create_application(node, local=actor_here()), raise_app_exceptions=False
            )
            client = httpx.AsyncClient(
                transport=transport,
                base_url="http://localhost",
                headers=_HEADERS,
                timeout=patience_seconds,
            )

            def send(method: str, path: str, **asked: Any) -> httpx.Response:
                return runner.run(_awaited(client.request(method, path, **asked)))

            yield send
            runner.run(client.aclose())
        finally:
            runner.run(node.close())


async def _awaited(response: Awaitable[httpx.Response]) -> httpx.Response:
    return await response


def _content(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        text = " ".join(response.text.split())[:200]
        return {"detail": f"status {response.status_code}, and no JSON: {text or 'nothing'}"}
