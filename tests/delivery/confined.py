"""Runs a command within what a unit file allows its service: confined.py UNIT COMMAND ...

As systemd does, without systemd: the system calls of SystemCallFilter and the address families of
RestrictAddressFamilies by seccomp, everything else refused with EPERM, for the command and all that
it starts. Which calls a set like @system-service stands for, systemd-analyze says.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

ALLOW, REFUSE, EQUAL = 0x7FFF0000, 0x00050000 | errno.EPERM, 4


class Comparison(ctypes.Structure):
    """One argument of a call, held against a value (`struct scmp_arg_cmp`)."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("unused", ctypes.c_uint64),
    )


def given(unit: str, name: str) -> list[str]:
    """The values of a directive, in order."""
    return re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE)


def members(name: str) -> set[str]:
    """The calls that a name of a filter stands for."""
    if not name.startswith("@"):
        return {name}
    command = ["systemd-analyze", "syscall-filter", name]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = [line.strip() for line in said.splitlines()[1:]]
    return set().union(*(members(word) for word in words if word and not word.startswith("#")))


def allowed_calls(unit: str) -> set[str]:
    """What the unit's filters leave, one after the other."""
    allowed = set[str]()
    for value in given(unit, "SystemCallFilter"):
        found = set().union(*map(members, value.removeprefix("~").split()))
        allowed = allowed - found if value.startswith("~") else allowed | found
    return allowed


def confine(unit: str) -> None:
    """Binds this process and its children, for good. Raises OSError if the kernel refuses."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(REFUSE))
    one = ctypes.POINTER(Comparison)

    def add(call: str, comparison: Comparison | None = None) -> None:
        number = library.seccomp_syscall_resolve_name(call.encode())
        compared = None if comparison is None else one(comparison)
        count = 0 if comparison is None else 1
        if number >= 0:  # else it is none of this machine's
            code = library.seccomp_rule_add_array(context, ALLOW, number, count, compared)
            if code:
                raise OSError(-code, f"no rule for {call}")

    for call in allowed_calls(unit) - {"socket"}:
        add(call)
    for family in " ".join(given(unit, "RestrictAddressFamilies")).split():
        add("socket", Comparison(0, EQUAL, int(getattr(socket, family)), 0))
    code = library.seccomp_load(context)
    if code:
        raise OSError(-code, "the filter is refused")


if __name__ == "__main__":
    confine(Path(sys.argv[1]).read_text())
    os.execvp(sys.argv[2], sys.argv[2:])
