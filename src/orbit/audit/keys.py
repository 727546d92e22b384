"""The key that signs checkpoints: Ed25519, in a PEM file that only its owner reads.

The embedded mode makes one beside its data; elsewhere a verb does, and a setting names the file.
Its public half
is what an auditor needs, and nothing else.
"""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from orbit.errors import AuditKeyInvalid


def load_signing_key(path: Path, *, is_made: bool = False) -> Ed25519PrivateKey:
    """The private key in a file; with `is_made` one that is not there is made (mode 0600).

    Raises AuditKeyInvalid if it cannot be read, others can read it, or it is no Ed25519 key.
    """
    try:
        if is_made and not path.exists():
            _make(path)
        if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise AuditKeyInvalid(f"others than its owner can read {path}; run: chmod 600 {path}")
        found = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise AuditKeyInvalid(f"the key file {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, Ed25519PrivateKey):
        raise AuditKeyInvalid(f"{path} holds no Ed25519 private key (PEM, without a password)")
    return found


def load_public_key(path: Path) -> Ed25519PublicKey:
    """The public key in a PEM file. Raises AuditKeyInvalid."""
    try:
        found = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise AuditKeyInvalid(f"the key file {path} cannot be read: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, Ed25519PublicKey):
        raise AuditKeyInvalid(f"{path} holds no Ed25519 public key (PEM)")
    return found


def public_pem(key: Ed25519PublicKey) -> bytes:
    """The public key as PEM."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _make(path: Path) -> None:
    """Appears whole or not at all, and of two makers the first wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Ed25519PrivateKey.generate()
    descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(aside, path)
    finally:
        Path(aside).unlink()
