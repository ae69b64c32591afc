"""The files of a run: atomic writes, the JSON-lines log, and the lock on the folder."""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orthlin.errors import OptionError

LOG, CHECKPOINT, RESULT, CURVES = "log.jsonl", "checkpoint.pt", "result.json", "curves.png"


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace a file in one step: after a crash at any moment it is the old one or the new one, whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, on the systems that can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON atomically."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, or None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole records of a log; one that a crash cut short ends it."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return
    for line in lines[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not isinstance(record, dict):
            return
        yield record


class Log:
    """A JSON-lines file: a header, then one record for each step; for None, nothing is written."""

    def __init__(self, folder: Path | None, header: Mapping[str, Any], step: int) -> None:
        self.records: list[Mapping[str, Any]] = []
        self._file: io.BufferedWriter | None = None
        if folder is not None:
            path = folder / LOG
            if step:
                self.records += [record for record in read_log(path) if record.get("step", step + 1) <= step]
            write_atomically(path, b"".join(map(_line, [header, *self.records])))
            self._file = path.open("ab")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, soon to be on disk."""
        self.records.append(record)
        if self._file:
            self._file.write(_line(record))

    def flush(self) -> None:
        """Have every record on disk."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        if self._file:
            self.flush()
            self._file.close()


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n").encode()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, where the system has such locks; they end with the process."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OptionError(f"--out {folder}: another process is writing there") from None
        yield


def clear(folder: Path) -> None:
    """Remove what an earlier run or an interrupted write left."""
    for name in (LOG, CHECKPOINT, RESULT, CURVES):
        (folder / name).unlink(missing_ok=True)
    clear_parts(folder)


def clear_parts(folder: Path) -> None:
    """Remove what interrupted writes left."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)
