"""The looks of `doctor` at each endpoint: what is in force, and whether dispatch can reach it.

Name, connection, certificate, token, clock, retries, breaker; a look that cannot be made because an
earlier one failed is left out. No payload is sent: the token goes to `check_url` alone, and
without one the clock is read from the answer to OPTIONS, without token, headers and query.
All endpoints are looked at side by side, each look in bounded time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from orbit.addresses import refusal
from orbit.cli.finding import Finding
from orbit.cli.reaching import (
    Heard,
    Target,
    ask,
    authority,
    connect,
    handshake,
    resolve,
)
from orbit.cli.terminal import count, duration, utc
from orbit.clock import SystemClock

if TYPE_CHECKING:
    from orbit.endpoints import Breaker, Endpoint
    from orbit.settings import Settings

_LEAST_CERTIFICATE_TIME = timedelta(days=21)
_SKEW_RESOLUTION_SECONDS = 1.5  # a Date has whole seconds
_SKEW_WARNING_SECONDS = 5.0
_SKEW_LIMIT_SECONDS = 240.0
_REFUSED_TOKEN = (401, 403)


def preflight(given: Settings) -> Iterator[Finding]:
    """Every finding on every endpoint, in the order of the endpoints."""
    yield from asyncio.run(_all(given))


async def _all(given: Settings) -> list[Finding]:
    looks = (_collected(_looks(one, given)) for one in given.dispatch_endpoints)
    return [finding for found in await asyncio.gather(*looks) for finding in found]


async def _collected(looks: AsyncIterator[Finding]) -> list[Finding]:
    return [finding async for finding in looks]


async def _looks(endpoint: Endpoint, given: Settings) -> AsyncIterator[Finding]:
    yield in_force(endpoint)
    target = Target.of(endpoint.url, endpoint.proxy)
    name, addresses = await _name(endpoint, target, given)
    yield name
    if addresses:
        connection, address = await _connection(endpoint, target, addresses)
        yield connection
        if address is not None:
            certificate = await _certificate(endpoint, target, address)
            if certificate is not None:
                yield certificate
            if certificate is None or certificate.is_good is not False:
                async for finding in _answers(endpoint, target, address, given):
                    yield finding
    yield retries(endpoint, given)
    if endpoint.breaker is not None and given.max_dispatch_retries < endpoint.breaker.failures:
        yield _late_breaker(endpoint, endpoint.breaker, given.max_dispatch_retries + 1)


def in_force(endpoint: Endpoint) -> Finding:
    """What the endpoint's knobs say, in one line; only the origin of its URL is shown."""
    target = Target.of(endpoint.url, endpoint.proxy)
    rate = endpoint.rate_per_second
    proxy = authority(*target.first_hop) if endpoint.proxy else None
    said = [
        f"{endpoint.method} {target.scheme}://{target.authority}",
        f"proxy {proxy}" if proxy else "",
        "with token" if endpoint.token else "no token",
        "signed" if endpoint.signing_secret else "not signed",
        f"timeout {duration(endpoint.timeout_seconds)}",
        f"up to {endpoint.max_concurrency} at once",
        f"{rate:g} a second" if rate else "no rate limit",
        _breaker(endpoint.breaker),
        f"unknown outcomes: {endpoint.on_unknown}",
    ]
    facts = {
        "origin": f"{target.scheme}://{target.authority}",
        "method": endpoint.method,
        "proxy": proxy,
        "hasToken": endpoint.token is not None,
        "isSigned": endpoint.signing_secret is not None,
        "timeoutSeconds": endpoint.timeout_seconds,
        "maxConcurrency": endpoint.max_concurrency,
        "ratePerSecond": rate,
        "hasBreaker": endpoint.breaker is not None,
        "onUnknown": endpoint.on_unknown,
    }
    return _finding(endpoint, "", None, ", ".join(filter(None, said)), facts=facts)


def _breaker(breaker: Breaker | None) -> str:
    if breaker is None:
        return "no breaker"
    return (
        f"breaker after {breaker.failures} failures in a row or {breaker.share:.0%} of "
        f"{breaker.least} in {duration(breaker.window_seconds)}"
    )


async def _name(endpoint: Endpoint, target: Target, given: Settings) -> tuple[Finding, list[str]]:
    """Whether the first hop's name resolves, and to which addresses dispatch would go."""
    host, port = target.first_hop
    found, reason = await resolve(host, port)
    facts: dict[str, Any] = {"host": host, "addresses": found, "refused": {}}
    if not found:
        hint = "check the URL and DNS"
        text = f"{host} does not resolve: {reason}"
        return _finding(endpoint, "name", False, text, hint, facts=facts), []
    refused = _refused(found, given)
    facts["refused"] = refused
    allowed = [address for address in found if address not in refused]
    text = f"{host} is an address" if found == [host] else f"{host} is {', '.join(found)}"
    if refused:
        named = "; ".join(f"{address} ({why})" for address, why in refused.items())
        text += f", of which dispatch refuses {named}"
    hint = "correct the URL or DNS"
    if any(refusal(address, allow_private=True) is None for address in refused):
        hint += "; ORBIT_PRIVATE_ADDRESSES=allow lets private addresses be"
    is_good = None if refused and allowed else bool(allowed)
    return _finding(
        endpoint, "name", is_good, text, hint, is_warning=is_good is None, facts=facts
    ), allowed


def _refused(addresses: list[str], given: Settings) -> dict[str, str]:
    """The addresses that dispatch would not connect to, each with the reason."""
    is_private_allowed = given.private_addresses == "allow"
    reasons = {one: refusal(one, allow_private=is_private_allowed) for one in addresses}
    return {address: reason for address, reason in reasons.items() if reason}


async def _connection(
    endpoint: Endpoint, target: Target, addresses: list[str]
) -> tuple[Finding, str | None]:
    """Whether the first hop accepts connections; an address that does."""
    host, port = target.first_hop
    what = ("the proxy " if endpoint.proxy else "") + authority(host, port)
    reasons = await connect(addresses, port)
    good = [address for address, reason in reasons.items() if reason is None]
    bad = {address: reason for address, reason in reasons.items() if reason}
    facts = {"accepting": good, "notAccepting": bad}
    if not good:
        why = "; ".join(dict.fromkeys(map(str, bad.values())))
        hint = "start it, or correct the URL; for trying out there is `orbit receiver`"
        text = f"{what} does not accept connections: {why}"
        return _finding(endpoint, "connection", False, text, hint, facts=facts), None
    text = f"{what} accepts connections"
    if bad:
        text += " at " + ", ".join(good) + ", not at "
        text += ", ".join(f"{address} ({reason})" for address, reason in bad.items())
    return _finding(endpoint, "connection", True, text, facts=facts), good[0]


async def _certificate(endpoint: Endpoint, target: Target, address: str) -> Finding | None:
    """Whether TLS comes about, and how long its certificate is good for; None without TLS."""
    if not target.is_tls:
        return None
    made = await handshake(target, address)
    if made.expires_at is None:
        text = f"no TLS with {target.authority}: {made.reason}"
        hint = "renew or correct the certificate, or the URL; SSL_CERT_FILE adds authorities"
        facts = {"reason": made.reason}
        return _finding(endpoint, "certificate", False, text, hint, facts=facts)
    left = made.expires_at - SystemClock().now()
    is_soon = left < _LEAST_CERTIFICATE_TIME
    days = count(left.days, "day")
    text = f"valid for {target.host}, for {days} more (until {utc(made.expires_at)})"
    return _finding(
        endpoint,
        "certificate",
        None if is_soon else True,
        text,
        "have it renewed",
        is_warning=is_soon,
        facts={"expiresAt": utc(made.expires_at), "daysLeft": left.days},
    )


async def _answers(
    endpoint: Endpoint, target: Target, address: str, given: Settings
) -> AsyncIterator[Finding]:
    """The token and the clock, from one answer."""
    if endpoint.check_url is None:
        given_with = " with this token" if endpoint.token else ""
        hint = f"set check_url: an address that answers 2xx to GET{given_with}"
        text = "not checked, since the endpoint has no check_url"
        yield _finding(endpoint, "token", None, text, hint, facts={"status": None})
        bare = endpoint.url.partition("?")[0]
        yield _clock(
            endpoint, await ask("OPTIONS", bare, {}, proxy=endpoint.proxy, address=address)
        )
        return
    heard = await _checked(endpoint, endpoint.check_url, target, address, given)
    yield _token(endpoint, heard)
    yield _clock(endpoint, heard)


async def _checked(
    endpoint: Endpoint, check_url: str, target: Target, address: str, given: Settings
) -> Heard:
    """The answer of check_url, which may be another host; the same guard holds there."""
    other = Target.of(check_url, endpoint.proxy)
    if other.first_hop != target.first_hop:
        found, reason = await resolve(*other.first_hop)
        refused = _refused(found, given)
        allowed = [one for one in found if one not in refused]
        if not allowed:
            return Heard(reason=reason or "; ".join(refused.values()))
        reached = await connect(allowed, other.first_hop[1])
        address = next((one for one, why in reached.items() if why is None), allowed[0])
    headers = dict(endpoint.headers)
    if endpoint.token is not None:
        headers["Authorization"] = f"Bearer {endpoint.token}"
    return await ask("GET", check_url, headers, proxy=endpoint.proxy, address=address)


def _token(endpoint: Endpoint, heard: Heard) -> Finding:
    facts = {"status": heard.status, "reason": heard.reason}
    what = "token" if endpoint.token else "request without a token"
    match heard.status:
        case None:
            text, hint = f"check_url cannot be asked: {heard.reason}", "correct check_url"
            return _finding(endpoint, "token", False, text, hint, facts=facts)
        case status if status in _REFUSED_TOKEN:
            text, hint = f"{what} refused (status {status})", "correct the endpoint's token"
            return _finding(endpoint, "token", False, text, hint, facts=facts)
        case status if 200 <= status < 300:
            text = f"{what} accepted (status {status})"
            return _finding(endpoint, "token", True, text, facts=facts)
        case status:
            text = f"check_url answers with status {status}, which says nothing about the token"
            hint = "check_url is to answer 2xx, or 401 or 403 to a wrong token"
            return _finding(endpoint, "token", None, text, hint, is_warning=True, facts=facts)


def _clock(endpoint: Endpoint, heard: Heard) -> Finding:
    """How far apart this machine and the endpoint are, by the answer's `Date`."""
    skew = heard.skew_seconds
    if skew is None:
        why = heard.reason or "its answer has no Date"
        facts: dict[str, Any] = {"skewSeconds": None, "reason": why}
        return _finding(endpoint, "clock", None, f"unknown: {why}", facts=facts)
    is_far = abs(skew) > _SKEW_LIMIT_SECONDS
    is_odd = endpoint.signing_secret is not None and abs(skew) > _SKEW_WARNING_SECONDS
    where = "ahead of" if skew >= 0 else "behind"
    text = f"this machine is {duration(abs(skew))} {where} the endpoint"
    if abs(skew) < _SKEW_RESOLUTION_SECONDS:
        text = "this machine and the endpoint agree, to the second"
    return _finding(
        endpoint,
        "clock",
        False if is_far else None if is_odd else True,
        text,
        "synchronise both clocks: a signature is good for 5 minutes",
        is_warning=is_odd and not is_far,
        facts={"skewSeconds": round(skew, 1)},
    )


def retries(endpoint: Endpoint, given: Settings) -> Finding:
    """How far retries stretch, and what an outage that is longer means."""
    from orbit.execution.retry import Backoff, retry_span

    number = given.max_dispatch_retries
    backoff = Backoff(
        given.dispatch_retry_base_seconds,
        given.dispatch_retry_factor,
        given.dispatch_retry_cap_seconds,
    )
    span = retry_span(backoff, number)
    latest = span.longest_seconds + (number + 1) * endpoint.timeout_seconds
    if endpoint.breaker is None:
        outage = "There is no breaker: a longer outage ends in dead letters."
    else:
        outage = (
            "A longer outage does not empty the queue: the breaker holds the lane, and held jobs "
            "spend no attempts."
        )
    text = (
        f"{number} after the first attempt; their waits add up to "
        f"{duration(span.expected_seconds)} on average ({duration(span.shortest_seconds)} to "
        f"{duration(span.longest_seconds)}), and a dead letter comes after {duration(latest)} "
        f"of attempts at the latest, unless a Retry-After lengthens a wait, each up to "
        f"{duration(backoff.cap_seconds)}.\n{outage}"
    )
    facts = {
        "retries": number,
        "shortestSeconds": span.shortest_seconds,
        "expectedSeconds": span.expected_seconds,
        "longestSeconds": span.longest_seconds,
        "deadLetterAfterSeconds": latest,
    }
    return _finding(endpoint, "retries", None, text, facts=facts)


def _late_breaker(endpoint: Endpoint, breaker: Breaker, attempts: int) -> Finding:
    """That a lane with few jobs loses the first of them before its breaker opens."""
    failures = count(breaker.failures, "failure")
    lost = count(max(breaker.failures // attempts, 1), "dead letter")
    text = (
        f"it opens after {failures} in a row, and a job has {count(attempts, 'attempt')}: where "
        "few jobs come, an outage longer than a job's retries makes dead letters before the "
        f"breaker opens and holds the lane (up to {lost} an outage)"
    )
    hint = f"set ORBIT_MAX_DISPATCH_RETRIES to {breaker.failures} or more"
    if attempts > 1:
        hint += f", or failures of this endpoint's breaker to {attempts - 1} or less"
    facts = {"attempts": attempts, "failures": breaker.failures}
    return _finding(endpoint, "breaker", None, text, hint, facts=facts)


def _finding(
    endpoint: Endpoint,
    look: str,
    is_good: bool | None,
    message: str,
    hint: str = "",
    *,
    is_warning: bool = False,
    facts: dict[str, Any],
) -> Finding:
    name = f"endpoint {endpoint.key} {look}".rstrip()
    known = {"endpoint": endpoint.key, "look": look or "settings", **facts}
    return Finding(name, is_good, message, hint, is_warning, known)
