"""Many records: runs made one after the other into a file of JSON lines that survives being killed.

A record is on disk (one line, fsync'd) before the next run begins. What is on disk is never made again, so an
interrupted sweep is finished by starting it again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sdeflow.errors import InvalidInput
from sdeflow.measure import Record


@dataclass(frozen=True)
class Run:
    """A record to be made.

    Attributes:
        key: what tells this run from every other: the `key` of the record it makes.
        measure: makes the record.
    """

    key: str
    measure: Callable[[], Record]


@dataclass(frozen=True)
class Step:
    """One run of a sweep: its place in the list, its record, and whether that was made now or found on disk."""

    index: int
    record: Record
    made: bool


def sweep(runs: Iterable[Run], path: str | Path) -> Iterator[Step]:
    """Make the records that `path` does not hold yet, in the order of the runs; yield all of them in that order.

    Args:
        runs: the runs; two with one key are one run.
        path: the file, one JSON record a line; made with its folder if missing. Records of other runs in it are kept.

    Raises:
        InvalidInput: the file holds a complete line that is no record, or a run made a record with another key.
    """
    path = Path(path)
    mend(path)
    done = {record.key: record for record in read(path)}
    for index, run in enumerate(runs):
        made = run.key not in done
        if made:
            record = run.measure()
            if record.key != run.key:
                raise InvalidInput(
                    f"the run with key {run.key!r} made a record with key {record.key!r}; build both from one place"
                )
            append(path, record)
            done[run.key] = record
        yield Step(index, done[run.key], made)


def read(path: str | Path) -> list[Record]:
    """The records of a file, in its order; none if it does not exist. A torn last line (no line end) is left out.

    Raises:
        InvalidInput: a complete line is no record.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(Record.from_json(line.decode("utf-8")))
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInput(
                f"{path} line {number} is no record of this version ({error}); delete that line, or give another "
                "output folder"
            ) from error
    return records


def append(path: str | Path, record: Record) -> None:
    """Add one record to the file: a single write of a whole line, on disk when this returns."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = record.to_json()
    if "\n" in line:
        raise InvalidInput("a record must be one line of JSON; its to_json() holds a line end")
    new = not path.exists()
    with open(path, "ab", buffering=0) as file:
        file.write(line.encode("utf-8") + b"\n")
        os.fsync(file.fileno())
    if new:
        _sync_folder(path.parent)


def mend(path: str | Path) -> None:
    """Cut off a last line without line end, which a killed process or a full disk left behind."""
    path = Path(path)
    if not path.exists():
        return
    whole = path.read_bytes().rfind(b"\n") + 1
    if whole != path.stat().st_size:
        with open(path, "r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # the new name must be on disk too; not every system can open a folder
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
