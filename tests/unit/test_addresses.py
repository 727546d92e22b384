"""Where requests may go: nothing that is dangerous passes, in whatever dress it comes."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbit.addresses import refusal

METADATA = ("169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254")
DANGEROUS = [
    ip_network(text)
    for text in (
        "169.254.0.0/16",
        "0.0.0.0/8",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "fe80::/10",
        "ff00::/8",
    )
]
INTERNAL = [
    ip_network(text)
    for text in (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "127.0.0.0/8",
        "100.64.0.0/10",
        "fc00::/7",
        "::1/128",
    )
]


def within(
    networks: Sequence[IPv4Network | IPv6Network],
) -> st.SearchStrategy[IPv4Address | IPv6Address]:
    """Addresses of any of the networks."""
    return st.one_of([st.ip_addresses(network=network) for network in networks])


def dressed(address: IPv4Address) -> list[str]:
    """The IPv6 addresses by which an IPv4 one can be reached too."""
    number = int(address)
    return [
        str(IPv6Address((0xFFFF << 32) | number)),
        str(IPv6Address((0x2002 << 112) | (number << 80))),
        str(IPv6Address((0x64FF9B << 96) | number)),
        str(IPv6Address((0x20010000 << 96) | (number << 64) | 0xF7F7F7F7)),
        str(IPv6Address((0x20010000 << 96) | (0x08080808 << 64) | (number ^ 0xFFFFFFFF))),
    ]


@pytest.mark.parametrize("address", METADATA)
def test_metadata_services_are_never_reached(address: str) -> None:
    """They hand out credentials, so no setting opens them."""
    assert refusal(address, allow_private=True) == "a metadata address"
    assert refusal(address, allow_private=False) == "a metadata address"


@given(within(DANGEROUS), st.booleans())
def test_what_is_no_host_is_never_reached(
    address: IPv4Address | IPv6Address, allow_private: bool
) -> None:
    """Link-local, unspecified, multicast, broadcast, reserved: refused with a reason."""
    assert refusal(str(address), allow_private=allow_private)


@given(within(INTERNAL))
def test_private_addresses_are_a_matter_of_the_setting(address: IPv4Address | IPv6Address) -> None:
    """Refused where the setting says so; allowed otherwise, but for the metadata among them."""
    assert refusal(str(address), allow_private=False)
    assert refusal(str(address), allow_private=True) in (None, "a metadata address")


@given(st.ip_addresses(v=4), st.booleans())
def test_an_ipv4_address_cannot_hide_in_an_ipv6_one(
    address: IPv4Address, allow_private: bool
) -> None:
    """Mapped, 6to4, NAT64, Teredo's server and client: refused whenever it is itself."""
    for text in dressed(address):
        if refusal(str(address), allow_private=allow_private):
            assert refusal(text, allow_private=allow_private), text


@given(st.ip_addresses())
def test_a_public_address_is_allowed_and_only_a_public_one(
    address: IPv4Address | IPv6Address,
) -> None:
    """What Python calls global is the most that may pass without private addresses."""
    if refusal(str(address), allow_private=False) is None:
        assert address.is_global or _is_translated(address)
        assert not address.is_multicast


def _is_translated(address: IPv4Address | IPv6Address) -> bool:
    """Ways to public IPv4 addresses, and what RFC 6890 sets aside within the public ones."""
    prefixes = ("64:ff9b::/96", "::ffff:0:0/96", "2001::/23", "2002::/16", "192.88.99.0/24")
    return any(address in ip_network(prefix) for prefix in (*prefixes, "3fff::/20", "5f00::/16"))


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_public_addresses_are_allowed(address: str) -> None:
    """The rule does not refuse the world."""
    assert refusal(str(ip_address(address)), allow_private=False) is None


@pytest.mark.parametrize("text", ["", "localhost", "127.1", "0x7f000001", "1.2.3.4.5", "fe80::1%e"])
def test_what_is_not_a_plain_address_is_refused(text: str) -> None:
    """The guard is asked for addresses; whatever else comes is not let through."""
    assert refusal(text, allow_private=True)


@given(st.ip_addresses(v=4), st.sampled_from([48, 56, 64, 96]))
def test_an_ipv4_address_cannot_hide_behind_a_networks_own_nat64(
    address: IPv4Address, prefix_bits: int
) -> None:
    """Wherever RFC 6052 lets it stand, whatever follows it: refused if it is a host and refused."""
    packed = bytearray(bytes.fromhex("0064ff9b0001") + bytes(9) + b"\x01")
    places = [at for at in range(prefix_bits // 8, 16) if at != 8][:4]
    for at, octet in zip(places, address.packed, strict=True):
        packed[at] = octet
    text = str(IPv6Address(bytes(packed)))
    assert refusal(text, allow_private=False)
    if 0 < address.packed[0] < 224 and refusal(str(address), allow_private=True):
        assert refusal(text, allow_private=True), text


@pytest.mark.parametrize(
    "text",
    ["64:ff9b:1::a9fe:a9fe", "64:ff9b:1:a9fe:a9:fe00::", "64:ff9b:1:a9:fe:a9fe::"],
)
def test_the_metadata_service_is_not_reached_by_local_nat64(text: str) -> None:
    """Not even where private addresses are allowed."""
    assert refusal(text, allow_private=True) == "a metadata address"


@pytest.mark.parametrize(
    "text", ["64:ff9b:1::808:808", "64:ff9b:1:fffe::808:808", "64:ff9b:1:808:8:800::"]
)
def test_local_nat64_to_the_world_is_private_and_no_more(text: str) -> None:
    """A network that has its own is not cut off from what is public."""
    assert refusal(text, allow_private=True) is None
    assert refusal(text, allow_private=False) == "private"
