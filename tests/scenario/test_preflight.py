"""What `doctor` finds at endpoints: real servers, good and bad, with certificates made here."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from orbit.cli import preflight as preflight_module
from orbit.cli import reaching
from orbit.cli.finding import Finding
from orbit.cli.preflight import preflight
from orbit.clock import SystemClock
from orbit.settings import load_settings
from tests.scenario.test_cli import free_port

TOKEN = "s3cret-token"
HEADER = "s3cret-header"
QUERY = "s3cret-query"
SECRET = "whsec_" + base64.b64encode(bytes(24)).decode()


@dataclass
class Site:
    """A server that answers all with one status and a `Date` that may be off."""

    url: str = ""
    status: int = 200
    date_offset: timedelta | None = timedelta()
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)


@contextmanager
def serving(site: Site, context: ssl.SSLContext | None = None) -> Iterator[Site]:
    """The site, up on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            site.seen.append((self.command, self.path, headers))
            self.send_response_only(site.status)
            if site.date_offset is not None:
                at = SystemClock().now() + site.date_offset
                self.send_header("Date", format_datetime(at, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_OPTIONS = do_CONNECT = answer  # noqa: N815 - the names that the server asks for

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *given: None  # type: ignore[method-assign]
        if context is not None:
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        scheme = "http" if context is None else "https"
        site.url = f"{scheme}://localhost:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield site
        finally:
            server.shutdown()


class Authority:
    """Makes certificates that tests trust, and others that they don't."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._made("the authority", self._key.public_key(), 100, "the authority")
        self.file = folder / "authority.pem"
        self.file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def context(
        self, days: int, name: str = "localhost", *, is_own: bool = False
    ) -> ssl.SSLContext:
        """A server's context with a certificate that ends in `days`; `is_own` is self-signed."""
        key = ec.generate_private_key(ec.SECP256R1())
        signer, issuer = (key, name) if is_own else (self._key, "the authority")
        made = self._made(name, key.public_key(), days, issuer, signer)
        path = self._folder / "server.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + made.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    def _made(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        days: int,
        issuer: str,
        signer: ec.EllipticCurvePrivateKey | None = None,
    ) -> x509.Certificate:
        now = SystemClock().now()
        signer = signer or self._key
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=90))
            .not_valid_after(now + timedelta(days=days, minutes=5))
            .add_extension(x509.BasicConstraints(name == "the authority", None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
                critical=False,
            )
        )
        if name != "the authority":
            names = x509.SubjectAlternativeName([x509.DNSName(name)])
            builder = builder.add_extension(names, critical=False)
        else:
            usage = x509.KeyUsage(
                key_cert_sign=True,
                crl_sign=True,
                digital_signature=False,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            )
            builder = builder.add_extension(usage, critical=True)
        return builder.sign(signer, hashes.SHA256())


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """An authority that this process trusts, as the system's would be."""
    made = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.file))
    return made


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Site]]:
    """Starts sites that end with the test, and that have time to answer on a busy machine."""
    monkeypatch.setattr(reaching, "LIMIT_SECONDS", 60.0)
    monkeypatch.setattr(preflight_module, "_SKEW_WARNING_SECONDS", 30.0)
    with ExitStack() as stack:

        def started(context: ssl.SSLContext | None = None, **given: Any) -> Site:
            return stack.enter_context(serving(Site(**given), context))

        yield started


def looks(
    url: str, *, private_addresses: str = "allow", max_dispatch_retries: int = 3, **more: Any
) -> dict[str, Finding]:
    """The findings on one endpoint by the name of the look; nothing secret is in any."""
    entry = {"key": "k", "url": f"{url}/posts?key={QUERY}", "token": TOKEN, **more}
    entry.setdefault("headers", {"X-Key": HEADER})
    given = load_settings(
        {
            "ORBIT_DISPATCH_ENDPOINTS": json.dumps([entry]),
            "ORBIT_PRIVATE_ADDRESSES": private_addresses,
            "ORBIT_MAX_DISPATCH_RETRIES": str(max_dispatch_retries),
        },
        env_file=None,
    )
    found = list(preflight(given))
    text = json.dumps([one.as_json() for one in found]) + "".join(
        line for one in found for line in one.lines()
    )
    assert "s3cret" not in text
    return {one.facts["look"]: one for one in found}


def test_a_good_endpoint(authority: Authority, serve: Callable[..., Site]) -> None:
    """Name, connection, certificate, token and clock are good; only the check got the token."""
    site = serve(authority.context(days=60))
    found = looks(site.url, check_url=f"{site.url}/check?key={QUERY}")
    order = [
        "settings",
        "name",
        "connection",
        "certificate",
        "token",
        "clock",
        "retries",
        "breaker",
    ]
    assert list(found) == order
    assert [found[look].is_good for look in order[1:-2]] == [True] * 5
    assert found["certificate"].facts["daysLeft"] == 60
    assert "127.0.0.1" in found["name"].message
    assert found["token"].message == "token accepted (status 200)"
    ((method, path, headers),) = site.seen
    assert (method, path) == ("GET", f"/check?key={QUERY}")
    assert (headers["authorization"], headers["x-key"]) == (f"Bearer {TOKEN}", HEADER)
    assert headers["host"] == site.url.removeprefix("https://")


def test_a_certificate_that_ends_soon_is_a_warning(
    authority: Authority, serve: Callable[..., Site]
) -> None:
    """Ten days before its end a certificate is a warning, and all other looks go on."""
    found = looks(serve(authority.context(days=10)).url)
    certificate = found["certificate"]
    assert (certificate.is_good, certificate.is_warning) == (None, True)
    assert "for 10 days more" in certificate.message
    assert found["clock"].is_good


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"days": -3}, "its certificate expired on 2"),
        ({"days": 60, "is_own": True}, "its certificate is self-signed"),
        ({"days": 60, "name": "other.test"}, "is for other.test, not for localhost"),
    ],
)
def test_a_bad_certificate_says_why(
    authority: Authority, serve: Callable[..., Site], given: dict[str, Any], words: str
) -> None:
    """An expired, self-signed or misnamed certificate is said in words; no request is made."""
    site = serve(authority.context(**given))
    found = looks(site.url, check_url=f"{site.url}/check")
    assert found["certificate"].is_good is False
    assert words in found["certificate"].message
    assert "token" not in found
    assert site.seen == []


def test_a_server_without_tls_is_told_apart(serve: Callable[..., Site]) -> None:
    """An https URL to a plain server is not taken for a bad certificate."""
    found = looks(serve().url.replace("http:", "https:"))
    assert "does not speak TLS" in found["certificate"].message


@pytest.mark.parametrize(
    ("status", "is_good", "is_warning", "words"),
    [
        (401, False, False, "token refused (status 401)"),
        (403, False, False, "token refused (status 403)"),
        (404, None, True, "status 404, which says nothing"),
        (302, None, True, "status 302, which says nothing"),
    ],
)
def test_the_check_of_the_token(
    serve: Callable[..., Site], status: int, is_good: bool | None, is_warning: bool, words: str
) -> None:
    """401 and 403 refuse the token; another answer says nothing about it."""
    site = serve(status=status)
    token = looks(site.url, check_url=f"{site.url}/check")["token"]
    assert (token.is_good, token.is_warning) == (is_good, is_warning)
    assert words in token.message


def test_the_check_may_be_elsewhere_and_be_down(serve: Callable[..., Site]) -> None:
    """A check_url on another host is reached there; where it is down that is said, and guarded."""
    site, other = serve(), serve()
    assert looks(site.url, check_url=f"{other.url}/check")["token"].is_good
    assert len(other.seen) == 1
    assert site.seen == []
    closed = looks(site.url, check_url=f"http://127.0.0.1:{free_port()}/")["token"]
    assert "check_url cannot be asked: no connection" in closed.message
    guarded = looks(site.url, check_url="http://169.254.169.254/")["token"]
    assert "check_url cannot be asked: a metadata address" in guarded.message


@pytest.mark.parametrize(
    ("offset_seconds", "secret", "is_good", "is_warning"),
    [
        (0, SECRET, True, False),
        (-60, None, True, False),
        (-60, SECRET, None, True),
        (600, None, False, False),
    ],
)
def test_the_clock(
    serve: Callable[..., Site],
    offset_seconds: int,
    secret: str | None,
    is_good: bool | None,
    is_warning: bool,
) -> None:
    """Without check_url the clock is read from OPTIONS, which has no token and no query."""
    site = serve(status=405, date_offset=timedelta(seconds=offset_seconds))
    found = looks(site.url, signing_secret=secret)
    assert (found["clock"].is_good, found["clock"].is_warning) == (is_good, is_warning)
    assert abs(found["clock"].facts["skewSeconds"] + offset_seconds) < 30
    assert found["token"].facts["status"] is None
    assert "check_url" in found["token"].hint
    ((method, path, headers),) = site.seen
    assert (method, path) == ("OPTIONS", "/posts")
    assert not {"authorization", "x-key"} & headers.keys()


def test_no_date_is_unknown(serve: Callable[..., Site]) -> None:
    """An answer without Date leaves the clock unknown, which is neither good nor bad."""
    clock = looks(serve(date_offset=None).url)["clock"]
    assert (clock.is_good, clock.message) == (None, "unknown: its answer has no Date")


def test_what_cannot_be_reached() -> None:
    """A closed port, a name that is none and an address that is never sent to are told apart."""
    closed = looks(f"http://127.0.0.1:{free_port()}")
    assert closed["connection"].is_good is False
    assert "does not accept connections: Connection refused" in closed["connection"].message
    nobody = looks("http://nobody.invalid")
    assert list(nobody) == ["settings", "name", "retries", "breaker"]
    assert "nobody.invalid does not resolve" in nobody["name"].message
    metadata = looks("http://169.254.10.20")
    assert list(metadata) == ["settings", "name", "retries", "breaker"]
    assert metadata["name"].facts["refused"] == {"169.254.10.20": "link-local"}


def test_a_server_that_says_nothing_ends_in_time() -> None:
    """A port that accepts and never speaks ends TLS as not good, and leaves the clock unknown."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        tls = looks(f"https://127.0.0.1:{port}")
        plain = looks(f"http://127.0.0.1:{port}")
    assert tls["certificate"].facts["reason"] == "no answer within 3 s"
    assert plain["connection"].is_good
    assert plain["clock"].facts == {
        "endpoint": "k",
        "look": "clock",
        "skewSeconds": None,
        "reason": "no answer within 3 s",
    }


def test_a_tunnel_through_a_proxy_is_verified(
    authority: Authority, serve: Callable[..., Site]
) -> None:
    """TLS goes through the proxy's tunnel; a proxy that opens none is said to be the reason."""
    site = serve(authority.context(days=60))
    with tunnelling(int(site.url.rpartition(":")[2])) as proxy:
        found = looks(site.url, proxy=proxy, check_url=f"{site.url}/check")
    assert found["certificate"].is_good
    assert found["token"].is_good
    refusing = serve(status=407)
    found = looks("https://nobody.invalid", proxy=refusing.url)
    assert "the proxy answers with status " in found["certificate"].message


@contextmanager
def tunnelling(port: int) -> Iterator[str]:
    """A forward proxy whose every tunnel leads to this port; its URL."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    class Tunnel(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            self.send_response_only(200)
            self.end_headers()
            with socket.create_connection(("127.0.0.1", port)) as target:
                back = threading.Thread(target=pump, args=(target, self.connection), daemon=True)
                back.start()
                pump(self.connection, target)
                back.join()
            self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Tunnel) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_private_addresses_can_be_refused(serve: Callable[..., Site]) -> None:
    """Where private addresses are refused, this machine's own is named and not connected to."""
    found = looks(serve().url, private_addresses="refuse")
    assert found["name"].is_good is False
    assert "loopback" in found["name"].message
    assert "ORBIT_PRIVATE_ADDRESSES=allow" in found["name"].hint
    never = looks("http://169.254.169.254", private_addresses="refuse")
    assert never["name"].hint == "correct the URL or DNS"
    assert "connection" not in found


def test_a_proxy_is_what_is_connected_to(serve: Callable[..., Site]) -> None:
    """With a proxy the endpoint's name is the proxy's matter; its password is not shown."""
    site = serve()
    proxy = site.url.replace("localhost", "u:s3cret-password@localhost")
    found = looks("http://nobody.invalid", proxy=proxy, check_url="http://nobody.invalid/check")
    assert found["connection"].message.startswith("the proxy localhost:")
    assert found["token"].is_good
    ((_, path, headers),) = site.seen
    assert path == "http://nobody.invalid/check"
    assert headers["host"] == "nobody.invalid"


def test_what_is_in_force_is_shown() -> None:
    """One line has the lane's knobs; the retries say what a longer outage means."""
    url = f"http://127.0.0.1:{free_port()}"
    found = looks(url, rate_per_second=5, on_unknown="hold")
    for words in ("5 a second", "unknown outcomes: hold", "breaker after 10 failures"):
        assert words in found["settings"].message
    assert "does not empty the queue" in found["retries"].message
    bare = looks(url, breaker={"enabled": False})
    assert "no breaker" in bare["settings"].message
    assert "ends in dead letters" in bare["retries"].message
    facts = bare["retries"].facts
    assert facts["shortestSeconds"] < facts["expectedSeconds"] < facts["longestSeconds"]


@pytest.mark.parametrize(
    ("failures", "retries", "words"),
    [
        (10, 3, ("a job has 4 attempts", "up to 2 dead letters", "10 or more", "to 3 or less")),
        (1, 0, ("after 1 failure in a row, and a job has 1 attempt:", "up to 1 dead letter ")),
        (4, 3, ("after 4 failures", "up to 1 dead letter ", "to 3 or less")),
        (3, 3, ()),
    ],
)
def test_a_breaker_that_opens_after_the_last_attempt_is_named(
    failures: int, retries: int, words: tuple[str, ...]
) -> None:
    """Both numbers are said, and which to set; where a retry is left at its opening nothing is."""
    url = f"http://127.0.0.1:{free_port()}"
    found = looks(url, max_dispatch_retries=retries, breaker={"failures": failures})
    assert ("breaker" in found) is bool(words)
    if words:
        breaker = found["breaker"]
        assert (breaker.is_good, breaker.is_warning) == (None, False)
        numbers = {"attempts": retries + 1, "failures": failures}
        assert breaker.facts.items() >= numbers.items()
        assert all(word in f"{breaker.message} {breaker.hint}" for word in words), breaker
    assert "breaker" not in looks(url, max_dispatch_retries=retries, breaker={"enabled": False})
