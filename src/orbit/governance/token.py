"""An access key as a text: `orb_<id>_<secret>`. Knows no database, so that a command is quick.

64 bits find the key, 256 prove it. Nothing here shows, logs or stores the secret.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass

_TOKEN = re.compile(r"orb_([0-9a-f]{16})_([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Token:
    """A key as it is shown: never logged, never stored; `repr` leaves the secret out."""

    key_id: str
    secret: str

    def __repr__(self) -> str:
        return f"Token({self.key_id})"

    @property
    def text(self) -> str:
        """What goes behind `Bearer`."""
        return f"orb_{self.key_id}_{self.secret}"

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the secret, 32 bytes."""
        return hashlib.sha256(self.secret.encode()).digest()

    @staticmethod
    def make() -> Token:
        """A new one from the operating system's randomness."""
        return Token(secrets.token_hex(8), secrets.token_hex(32))

    @staticmethod
    def of(text: str) -> Token | None:
        """The token that a text is; None if it cannot be one."""
        found = _TOKEN.fullmatch(text)
        return None if found is None else Token(found[1], found[2])
