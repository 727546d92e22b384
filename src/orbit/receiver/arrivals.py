"""The reference receiver's folder: bodies under their names, and a line for every arrival.

`DIR/<namespace>/<run profile>/<job id>.<extension>` holds each body that took effect, once.
`DIR/received.jsonl` has one line per arrival, in order, written before it is answered:
duplicates, failures on purpose and refused ones too, so that every send on the wire can be
accounted for. `DIR/seen.index` is what deduplication remembers. A body is first written to
`DIR/.incoming` and then renamed, so that no half file ever stands under a final name.

Names come from headers and are used only if they match the id pattern, with what some file
systems dislike percent-encoded; a place for which there was no header is called `_`.
"""

from __future__ import annotations

import hashlib
import json
import mimetypes
import os
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from orbit.receiver.seen import FileSeen, Verdict, sync_folder
from orbit.receiver.verify import BodyTooLarge, Delivery

_EXTENSIONS = {
    "application/json": ".json",
    "application/octet-stream": ".bin",
    "text/html": ".html",
    "text/markdown": ".md",
    "text/plain": ".txt",
}
_NO_NAME = "_"
_IN_MEMORY_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request that came in, and what became of it.

    `outcome` is stored, duplicate, conflict, failed_on_purpose, hung, refused, broken_off, or
    failed where the disk would not take the body.
    `digest` is the body's SHA-256 in hexadecimal, None where the body was not read to its end.
    `file` is relative to the folder. `position` counts arrivals from 1, over restarts too.
    """

    position: int
    at: str
    id: str
    digest: str | None
    size: int
    content_type: str
    namespace: str
    profile_id: str
    run_profile_id: str
    cycle_run_id: str
    job_id: str
    attempt: int
    duplicate: bool
    outcome: str
    status: int
    method: str
    path: str
    file: str | None
    reason: str

    def as_json(self) -> dict[str, Any]:
        """With camelCase keys, as in `received.jsonl` and `GET /received`."""
        return {key: getattr(self, name) for name, key in _KEYS.items()}


class IncomingBody:
    """A body on its way in: hashed as it comes, in memory while small, then in a file."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._head = bytearray()
        self._file: BinaryIO | None = None
        self._path = folder
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, chunk: bytes) -> None:
        """Takes the next bytes; raises BodyTooLarge."""
        self.size += len(chunk)
        if self.size > self._max_bytes:
            raise BodyTooLarge(f"the body is over {self._max_bytes} bytes")
        self._sha256.update(chunk)
        if self.size <= _IN_MEMORY_BYTES:
            self._head += chunk
        else:
            self._in_file().write(chunk)

    @property
    def sha256(self) -> bytes:
        """Of what came so far, 32 bytes."""
        return self._sha256.digest()

    def move_to(self, target: Path) -> None:
        """Makes the body durable under its final name."""
        file = self._in_file()
        file.flush()
        os.fsync(file.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        self._path.replace(target)
        sync_folder(target.parent)

    def discard(self) -> None:
        """Closes, and removes the file unless it was moved."""
        if self._file is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)

    def _in_file(self) -> BinaryIO:
        if self._file is None:
            descriptor, name = tempfile.mkstemp(dir=self._folder)
            self._file, self._path = os.fdopen(descriptor, "wb"), Path(name)
            self._file.write(self._head)
            self._head = bytearray()
        return self._file


class Arrivals:
    """The folder of a reference receiver; one process at a time.

    Raises SeenFileInUse, or OSError where the folder cannot be written. `store` and `append`
    may be called from many threads.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._incoming = folder / ".incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._seen = FileSeen(folder / "seen.index")
        for left_over in self._incoming.iterdir():
            left_over.unlink()
        self._log = (folder / "received.jsonl").open("ab+")
        self._guard = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.position = self._recover_log()

    def close(self) -> None:
        """Gives the folder to another process."""
        self._log.close()
        self._seen.close()

    def receive(self, max_bytes: int) -> IncomingBody:
        """A place for a body that is about to come."""
        return IncomingBody(self._incoming, max_bytes)

    def store(
        self, delivery: Delivery, body: IncomingBody, content_type: str
    ) -> tuple[Verdict, Path]:
        """Keeps the body if its id is new, durably; returns the path relative to the folder."""
        path = payload_path(delivery, content_type)
        target = self._folder / path
        verdict = self._seen.once(delivery.id, body.sha256.hex(), lambda: body.move_to(target))
        return verdict, path

    def append(self, **fields: Any) -> Arrival:
        """Writes the line of one arrival and returns it with its position."""
        with self._guard:
            arrival = Arrival(position=self.position + 1, **fields)
            line = json.dumps(arrival.as_json(), ensure_ascii=False, separators=(",", ":"))
            self._log.write(line.encode() + b"\n")
            self._log.flush()
            self.position += 1
            self.counts[arrival.outcome] += 1
        return arrival

    def read(self, since: int, limit: int) -> list[dict[str, Any]]:
        """The newest `limit` arrivals after position `since`, newest last."""
        newest: deque[bytes] = deque(maxlen=limit)
        for line in self._lines():
            newest.append(line)
        return [entry for entry in map(json.loads, newest) if entry["position"] > since]

    def _lines(self) -> Iterator[bytes]:
        with (self._folder / "received.jsonl").open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))

    def _recover_log(self) -> int:
        """Cuts off a line torn by a crash, counts outcomes, and returns the last position."""
        length = position = 0
        for line in self._lines():
            length += len(line)
            entry = json.loads(line)
            position = entry["position"]
            self.counts[entry["outcome"]] += 1
        self._log.truncate(length)
        return position


def payload_path(delivery: Delivery, content_type: str) -> Path:
    """Where a delivery's body goes, relative to the folder.

    Named after the job; where the delivery's id is another one, it is added, so that no two
    deliveries share a file.
    """
    parts = {delivery.job_id or delivery.id: None, delivery.id: None}
    stem = "+".join(quote(part, safe="") for part in parts)
    namespace, run_profile = (
        quote(name, safe="") or _NO_NAME for name in (delivery.namespace, delivery.run_profile_id)
    )
    return Path(namespace, run_profile, stem + _extension(content_type))


def _extension(content_type: str) -> str:
    media_type = content_type.partition(";")[0].strip().lower()
    return _EXTENSIONS.get(media_type) or mimetypes.guess_extension(media_type) or ".bin"


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(map(str.capitalize, rest))


_KEYS = {field.name: _camel(field.name) for field in fields(Arrival)}
