"""The embedded instance's own admin key: in a file of the data folder, for its owner only.

Whoever can read the folder has the database anyway, so the key gives nothing away; it lets the
command line speak to a running node without being asked. The file comes first and the database
takes the key over from it, so a crash between the two leaves nothing half made. A key that has
ended, since somebody revoked or rotated it, makes way for another at the next start.
"""

from __future__ import annotations

from pathlib import Path

from orbit.errors import SettingInvalid
from orbit.governance.token import Token
from orbit.vault import create_private, read_private

FILE_NAME = "admin.key"


def load_or_create(data_dir: Path) -> Token:
    """The key in the folder; a missing one is made (0600).

    Raises SettingInvalid when it cannot be made or read, others can read it, or it is no key.
    """
    path = data_dir / FILE_NAME
    try:
        if not path.exists():
            create_private(path, Token.make().text)
        token = Token.of(read_private(path).strip())
    except (OSError, UnicodeDecodeError, SettingInvalid) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SettingInvalid(f"the key file {path} cannot be used: {reason}") from None
    if token is None:
        raise SettingInvalid(f"the key file {path} cannot be used: it holds no access key")
    return token


def replace(data_dir: Path, ended: Token) -> Token:
    """Another key in the place of one that has ended, if that is still there; as above."""
    if read(data_dir) == ended.text:
        (data_dir / FILE_NAME).unlink(missing_ok=True)
    return load_or_create(data_dir)


def read(data_dir: Path) -> str | None:
    """The key in the folder as a text; None if there is none that this user can read."""
    try:
        return read_private(data_dir / FILE_NAME).strip() or None
    except (OSError, UnicodeDecodeError, SettingInvalid):
        return None
