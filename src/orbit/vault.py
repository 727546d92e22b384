"""Secrets at rest: encrypted under a ring of Fernet keys, the newest first.

The newest key encrypts, every key of the ring decrypts, so a key is rotated by putting a new
one in front. Without `DATABASE_URL` the ring lives in a file that only its owner may read, and
that is made once, whichever of two processes comes first. Refuses a key file that others can
read, and never puts a key or a secret into a message.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from orbit.errors import SecretUnreadable, SettingInvalid

_FINGERPRINT_DOMAIN = b"orbit secret fingerprint v1\x00"
_NOT_FOR_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Vault:
    """Encrypts and decrypts with a key ring, newest key first."""

    def __init__(self, keys: Sequence[str]) -> None:
        """`keys`: Fernet keys. Raises SettingInvalid when there is none, or one is not a key."""
        if not keys:
            raise SettingInvalid("the vault needs at least one key")
        try:
            self._ring = MultiFernet([Fernet(key) for key in keys])
        except ValueError:
            raise SettingInvalid("the vault's keys are not all Fernet keys") from None
        self.newest = fingerprint(keys[0])  # which key encrypts, without telling anything of it

    def encrypt(self, text: str) -> bytes:
        """The Fernet token of a text, under the newest key; different on every call."""
        return self._ring.encrypt(text.encode())

    def decrypt(self, token: bytes) -> str:
        """The text that `encrypt` was given; SecretUnreadable when no key of the ring fits."""
        try:
            return self._ring.decrypt(bytes(token)).decode()
        except InvalidToken:
            raise SecretUnreadable(
                "a stored secret cannot be decrypted with the keys at hand: "
                "ORBIT_SECRET_KEYS lacks the key it was encrypted with, or it was altered"
            ) from None


def fingerprint(text: str) -> str:
    """Twelve hexadecimal digits by which a person tells two secrets apart, or one as the same.

    The first 48 bits of HMAC-SHA-256 under a fixed, public key: the same on every node and
    after a change of the key ring, different from any plain SHA-256 of the secret kept
    elsewhere. It cannot be reversed; like any digest it can confirm a guess, so it is no
    protection for a secret that can be guessed.
    """
    return hmac.new(_FINGERPRINT_DOMAIN, text.encode(), hashlib.sha256).hexdigest()[:12]


def generate_key() -> str:
    """A new random Fernet key: 32 bytes as 44 characters of URL-safe base64."""
    return Fernet.generate_key().decode()


def load_or_create_key_file(path: Path) -> list[str]:
    """The key ring in `path`, one key a line, newest first; a missing file is made (0600).

    Two processes that come at once both get the one ring that ends up in the file. Raises
    SettingInvalid when the file cannot be made or read, others than its owner can read it, or
    it holds no valid keys.
    """
    try:
        if not path.exists():
            create_private(path, generate_key())
        keys = read_private(path).split()
        Vault(keys)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SettingInvalid(f"the key file {path} cannot be used: {reason}") from None
    except SettingInvalid as error:
        raise SettingInvalid(f"the key file {path} cannot be used: {error}") from None
    return keys


def create_private(path: Path, line: str) -> None:
    """Writes a complete file aside, then links it into place: it appears whole or not at all.

    A link fails where a rename would replace, so the first of two processes wins. The file
    aside has the mode 0600 from its first moment.
    """
    descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(aside, path)
    finally:
        Path(aside).unlink()


def read_private(path: Path) -> str:
    """The text of a file that only its owner may read; raises SettingInvalid if others can."""
    with path.open(encoding="utf-8") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if os.name == "posix" and mode & _NOT_FOR_OTHERS:
            raise SettingInvalid(
                f"others than its owner can read it (mode {mode:04o}); run: chmod 600 {path}"
            )
        return file.read()
