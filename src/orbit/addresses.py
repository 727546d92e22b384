"""Which addresses requests may go to: judged after resolution, where a name can no longer lie.

Never: link-local addresses, the clouds' metadata services (which hand out credentials to whoever
asks), and what is no host at all (unspecified, multicast, broadcast, reserved). Private ones and
this machine's own only where the settings allow it. An IPv6 address that carries an IPv4 one
(mapped, 6to4, NAT64, Teredo) is judged by what it carries as well; where a network's own NAT64
leaves open where the IPv4 address stands, by each place at which it can. A NAT64 prefix out of
a network's public addresses can't be told from hosts. Pure; what is not an address is refused too.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

_Address = IPv4Address | IPv6Address
_Rules = tuple[tuple[str, tuple[IPv4Network | IPv6Network, ...]], ...]


def _networks(*texts: str) -> tuple[IPv4Network | IPv6Network, ...]:
    return tuple(map(ip_network, texts))


# In the order in which they are asked: the first that holds names the reason.
_NEVER: _Rules = (
    (
        "a metadata address",
        _networks(
            "169.254.169.254",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "fd00:ec2::254",
            "fd20:ce::254",
            "fd00:c1::a9fe:a9fe",
        ),
    ),
    ("link-local", _networks("169.254.0.0/16", "fe80::/10")),
    ("unspecified", _networks("0.0.0.0/8", "::")),
    ("broadcast", _networks("255.255.255.255")),
    ("multicast", _networks("224.0.0.0/4", "ff00::/8")),
    ("reserved", _networks("240.0.0.0/4", "192.0.0.0/24")),
)
_NOT_PUBLIC: _Rules = (
    ("loopback", _networks("127.0.0.0/8", "::1")),
    (
        "private",
        _networks(
            "10.0.0.0/8",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "100.64.0.0/10",  # carriers' NAT
            "198.18.0.0/15",  # benchmarks, and the three that are for documents
            "192.0.2.0/24",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "fc00::/7",
            "fec0::/10",
            "2001:db8::/32",
            "64:ff9b:1::/48",  # RFC 8215: a network's own NAT64
        ),
    ),
)
_PUBLIC_IPV6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_LOCAL_NAT64 = IPv6Network("64:ff9b:1::/48")
_UNIVERSAL_BITS = 8  # RFC 6052: bits 64 to 71, of which no IPv4 address is a part


def refusal(address: str, *, allow_private: bool) -> str | None:
    """Why nothing may be sent to a literal address; None if it may."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return "not an address"
    carried = list(_carried(parsed))
    for one in (parsed, *carried):
        reason = _named(one, _NEVER) or (None if allow_private else _named(one, _NOT_PUBLIC))
        if reason is not None:
            return reason
    is_known = isinstance(parsed, IPv4Address) or parsed in _PUBLIC_IPV6 or carried
    return None if is_known or _named(parsed, _NOT_PUBLIC) else "reserved"


def _carried(address: _Address) -> Iterator[IPv4Address]:
    if isinstance(address, IPv4Address):
        return
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    if address in _NAT64:
        yield IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _LOCAL_NAT64:
        yield from _carried_locally(int(address))


def _carried_locally(number: int) -> Iterator[IPv4Address]:
    """Behind a prefix of 48, 56, 64 or 96 bits; readings that can be no host are wrong ones."""
    high, low = number >> 64, number & ((1 << (64 - _UNIVERSAL_BITS)) - 1)
    without = high << (64 - _UNIVERSAL_BITS) | low
    readings = [without >> shift & 0xFFFFFFFF for shift in (40, 32, 24)]
    for reading in (*readings, number & 0xFFFFFFFF):
        if 0 < reading >> 24 < 224:
            yield IPv4Address(reading)


def _named(address: _Address, rules: _Rules) -> str | None:
    for reason, networks in rules:
        if any(address in network for network in networks):
            return reason
    return None
