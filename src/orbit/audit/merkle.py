"""Merkle trees as RFC 6962 (2.1) has them, with SHA-256.

A leaf's hash begins with a zero byte and a node's with a one, so neither can stand for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

HASH_BYTES = 32


def leaf_hash(content: bytes) -> bytes:
    """The 32 bytes that stand for a leaf."""
    return sha256(b"\x00" + content).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes, 32 bytes. Of nothing it is the SHA-256 of nothing."""
    if not leaves:
        return sha256().digest()
    level = list(leaves)
    while len(level) > 1:
        # The last of an odd number goes up as it is: the same tree as splitting by powers of two.
        odd = level[-1:] if len(level) % 2 else []
        pairs = zip(level[::2], level[1::2], strict=False)
        level = [sha256(b"\x01" + left + right).digest() for left, right in pairs] + odd
    return level[0]
