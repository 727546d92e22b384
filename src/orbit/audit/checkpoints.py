"""Checkpoints: what a log was at a time, signed with Ed25519, a line of JSON each.

A manifest says of an export what it has to have: the last checkpoint of each log.

A checkpoint says how many entries a log had and what the last one's hash was, which stands for
all before it. A folder has a file of them for each log. Whoever has the public key can tell
whether a line is the signer's; nothing else here is believed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from orbit.canonical import canonical_json

_DOMAIN = b"orbit.audit.checkpoint.v1\x00"
_EXPORT_DOMAIN = b"orbit.audit.export.v1\x00"
_SUFFIX = ".jsonl"
PUBLIC_KEY = "public-key.pem"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A log had `size` entries, the last with the hash `head` (32 bytes), at `at` (RFC 3339)."""

    log: str
    size: int
    head: bytes
    at: str

    @property
    def body(self) -> bytes:
        """The bytes that are signed, after the domain."""
        return canonical_json(self.value)

    @property
    def value(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"at": self.at, "head": self.head.hex(), "log": self.log, "size": self.size}


@dataclass(frozen=True, slots=True)
class Manifest:
    """An export of `log`, or of every log, was begun at `at`, after these last checkpoints."""

    at: str
    log: str | None
    checkpoints: tuple[Checkpoint, ...]

    @property
    def body(self) -> bytes:
        """The bytes that are signed, after the domain."""
        last = [one.value for one in self.checkpoints]
        return canonical_json({"at": self.at, "checkpoints": last, "log": self.log})


class CheckpointInvalid(ValueError):
    """A line is no checkpoint or manifest, or its signature is not the key's."""


def sign(checkpoint: Checkpoint, key: Ed25519PrivateKey) -> bytes:
    """The checkpoint as a line: canonical JSON with its signature."""
    return canonical_json(_signed("checkpoint", _DOMAIN, checkpoint.body, key)) + b"\n"


def sign_manifest(manifest: Manifest, key: Ed25519PrivateKey) -> dict[str, Any]:
    """The manifest as a value with its signature."""
    return _signed("manifest", _EXPORT_DOMAIN, manifest.body, key)


def _signed(name: str, domain: bytes, body: bytes, key: Ed25519PrivateKey) -> dict[str, Any]:
    signature = base64.b64encode(key.sign(domain + body)).decode()
    return {name: json.loads(body), "signature": signature}


def read_signed(value: Any, key: Ed25519PublicKey) -> Checkpoint:
    """The checkpoint in a parsed line. Raises CheckpointInvalid."""
    try:
        found = _checkpoint(value["checkpoint"])
        key.verify(base64.b64decode(value["signature"]), _DOMAIN + found.body)
    except (ValueError, KeyError, TypeError, InvalidSignature) as error:
        raise CheckpointInvalid("a checkpoint is not signed by this key, or was altered") from error
    return found


def read_manifest(value: Any, key: Ed25519PublicKey) -> Manifest:
    """The manifest in a parsed line. Raises CheckpointInvalid."""
    try:
        told = value["manifest"]
        last = tuple(map(_checkpoint, told["checkpoints"]))
        found = Manifest(told["at"], told["log"], last)
        key.verify(base64.b64decode(value["signature"]), _EXPORT_DOMAIN + found.body)
    except (ValueError, KeyError, TypeError, InvalidSignature) as error:
        raise CheckpointInvalid("the manifest is not signed by this key, or was altered") from error
    return found


def _checkpoint(told: Any) -> Checkpoint:
    return Checkpoint(told["log"], told["size"], bytes.fromhex(told["head"]), told["at"])


def read_folder(
    folder: Path, key: Ed25519PublicKey, only: str | None = None
) -> Iterator[tuple[Path, int, Checkpoint | CheckpointInvalid]]:
    """Every checkpoint of a folder, or of one log, with its file and line; what is none too."""
    for path in files(folder):
        if only is not None and log_of(path) != only:
            continue
        for number, line in enumerate(whole_lines(path), 1):
            yield path, number, read_line(line, key, log_of(path))


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file; one without its end was being written, or its writer died."""
    return path.read_bytes().split(b"\n")[:-1]


def file_of(folder: Path, log: str) -> Path:
    """The file that has a log's checkpoints."""
    return folder / f"{quote(log, safe='')}{_SUFFIX}"


def files(folder: Path) -> list[Path]:
    """Every file of checkpoints in a folder."""
    return sorted(folder.glob(f"*{_SUFFIX}"))


def log_of(path: Path) -> str:
    """The log whose checkpoints a file has."""
    return unquote(path.name.removesuffix(_SUFFIX))


def read_line(line: bytes, key: Ed25519PublicKey, name: str) -> Checkpoint | CheckpointInvalid:
    """The checkpoint of a log in a line of its file, or why there is none."""
    try:
        found = read_signed(json.loads(line), key)
    except CheckpointInvalid as error:
        return error
    except ValueError:
        return CheckpointInvalid("a line is no JSON")
    return found if found.log == name else CheckpointInvalid("it is another log's checkpoint")
