"""Secrets at rest: the ring, the fingerprint, and the key file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbit.errors import SecretUnreadable, SettingInvalid
from orbit.vault import Vault, fingerprint, generate_key, load_or_create_key_file

_OLD, _NEW, _OTHER = generate_key(), generate_key(), generate_key()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_is_encrypted_is_decrypted(text: str) -> None:
    """Any text that can be stored comes back, and stands nowhere in its token."""
    vault = Vault([_NEW])
    token = vault.encrypt(text)
    assert vault.decrypt(token) == text
    assert len(text) < 8 or text.encode() not in token


def test_a_rotated_ring_reads_old_secrets_and_writes_with_the_newest_key() -> None:
    """A key in front takes over; what the old one wrote stays readable until it is dropped."""
    old = Vault([_OLD]).encrypt("s3cret")
    rotated = Vault([_NEW, _OLD])
    assert rotated.decrypt(old) == "s3cret"
    assert Vault([_NEW]).decrypt(rotated.encrypt("s3cret")) == "s3cret"


@pytest.mark.parametrize(("kept", "added"), [(-4, b"AAA="), (0, b""), (0, b"x"), (40, b"")])
def test_an_altered_token_is_unreadable(kept: int, added: bytes) -> None:
    """Whatever is not exactly a token of this ring is refused with the stable error."""
    vault = Vault([_NEW])
    with pytest.raises(SecretUnreadable):
        vault.decrypt(vault.encrypt("s3cret")[:kept] + added)


def test_a_secret_of_another_ring_is_unreadable_and_the_message_names_the_setting() -> None:
    """The operator learns which setting lacks a key; neither key nor secret is quoted."""
    token = Vault([_OTHER]).encrypt("s3cret")
    with pytest.raises(SecretUnreadable, match="ORBIT_SECRET_KEYS") as caught:
        Vault([_NEW, _OLD]).decrypt(token)
    assert _NEW not in str(caught.value)


@pytest.mark.parametrize("keys", [[], ["not a key"], [_NEW, "AAAA"], ["é" * 44]])
def test_a_ring_without_valid_keys_is_refused(keys: list[str]) -> None:
    """There is no vault that could not encrypt."""
    with pytest.raises(SettingInvalid):
        Vault(keys)


def test_fingerprints_tell_secrets_apart_and_do_not_depend_on_the_ring() -> None:
    """Short, stable, different for different secrets, and no part of the secret."""
    assert fingerprint("token-a") == fingerprint("token-a") == "1ed461d2b85f"
    assert fingerprint("token-a") != fingerprint("token-b")
    assert len(fingerprint("")) == 12


def test_the_key_file_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    """The second look finds the first one's key; nothing else is left in the folder."""
    path = tmp_path / "secret.keys"
    keys = load_or_create_key_file(path)
    assert load_or_create_key_file(path) == keys
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert Vault(keys).decrypt(Vault(keys).encrypt("x")) == "x"


def test_a_key_file_with_two_keys_is_a_ring(tmp_path: Path) -> None:
    """A person rotates by putting a line in front."""
    path = tmp_path / "secret.keys"
    path.write_text(f"{_NEW}\n{_OLD}\n")
    path.chmod(0o600)
    assert load_or_create_key_file(path) == [_NEW, _OLD]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_key_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    """The message says what to do; the key is not in it."""
    path = tmp_path / "secret.keys"
    path.write_text(_NEW)
    path.chmod(mode)
    with pytest.raises(SettingInvalid, match="chmod 600") as caught:
        load_or_create_key_file(path)
    assert _NEW not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n", b"nonsense\n", b"\xff\xfe\x00"])
def test_a_key_file_without_keys_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    """A damaged file is never replaced: that would make stored secrets unreadable for ever."""
    path = tmp_path / "secret.keys"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(SettingInvalid, match="cannot be used"):
        load_or_create_key_file(path)
    assert path.read_bytes() == content


def test_a_key_file_in_a_missing_folder_is_refused_with_the_reason(tmp_path: Path) -> None:
    """The operating system's reason is passed on, in one line."""
    with pytest.raises(SettingInvalid, match="No such file or directory"):
        load_or_create_key_file(tmp_path / "missing" / "secret.keys")


@pytest.mark.skipif(os.name != "posix", reason="forks are posix")
def test_processes_that_come_at_once_agree_on_one_key(tmp_path: Path) -> None:
    """Eight processes make the same file at the same time; all get the key that stays."""
    path = tmp_path / "secret.keys"
    program = (
        "import sys, pathlib\n"
        "from orbit.vault import load_or_create_key_file\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(load_or_create_key_file(pathlib.Path(sys.argv[1]))[0])\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    keys = {racer.communicate(timeout=30)[0].strip() for racer in racers}
    assert keys == set(load_or_create_key_file(path))
    assert list(tmp_path.iterdir()) == [path]
