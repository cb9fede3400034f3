"""The measured memory and load times of models, kept in a file for later loads.

Measures nothing itself. Several engines, also of several processes, share one file: each writes
what it has measured, and takes over what the others have. If the file cannot be read or written,
nothing is remembered, and estimates are used as they are.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from orion_oie.models.files import atomic_write
from orion_oie.telemetry.callbacks import call_safely

FILE_NAME = "footprints.json"
_MOST_RECORDS = 500
_MOST = 2**62  # of anything: what is more was not measured
_POLL_S = 0.01
_WORTH_WRITING = 0.02  # the relative change of a size that is written


@dataclass(frozen=True, slots=True)
class Record:
    """The measurements of one model: its peak memory, and the time of its last load; 0 if not
    measured yet."""

    peak_bytes: int = 0
    load_s: float = 0.0


_NOTHING = Record()


class FootprintLedger:
    """Records by the identity of a load. Thread-safe.

    `on_error(message)` is called with no lock held when the file cannot be read or written, once
    for each problem.
    """

    def __init__(
        self, path: Path | None = None, on_error: Callable[[str], None] = lambda _message: None
    ) -> None:
        self._path = path
        self._on_error = on_error
        self._lock = threading.Lock()  # never held while the file is read or written
        self._records: dict[str, Record] | None = None
        self._written: Mapping[str, Record] = {}  # as it was last seen in the file
        self._problems: set[str] = set()
        self.revision = 0  # grows with every new measurement

    def get(self, identity: str) -> Record:
        """The record of a model; zeros if there is none."""
        records = self._known()
        with self._lock:
            return records.get(identity, _NOTHING)

    def note_peak(self, identity: str, resident_bytes: int) -> None:
        """Note the measured memory of a model."""
        records = self._known()
        with self._lock:
            record = records.pop(identity, _NOTHING)
            if resident_bytes > record.peak_bytes:
                record = Record(resident_bytes, record.load_s)
                self.revision += 1
            records[identity] = record  # at the end: the latest records are kept

    def note_load(self, identity: str, load_s: float) -> None:
        """Note the time in which a model was loaded from local files."""
        records = self._known()
        with self._lock:
            record = records.pop(identity, _NOTHING)
            records[identity] = Record(record.peak_bytes, load_s)
            self.revision += 1

    def save(self, wait_s: float = 0.0) -> None:
        """Write the changes if they are large enough; the file is replaced at once. While another
        engine is writing, and for longer than `wait_s`, nothing is: the next call writes them."""
        if self._path is None:
            return
        records = self._known()
        with self._lock:
            changed = {
                name: record
                for name, record in records.items()
                if record != self._written.get(name)
            }
            before = self._written
        if not _is_news(changed, before):
            return
        problem = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._path.parent, wait_s) as is_locked:
                if is_locked:
                    problem = self._merge(self._path, changed, before)
        except OSError as error:
            problem = f"measured sizes of models cannot be kept: {error}"
        self._complain(problem)

    def _merge(
        self, path: Path, changed: Mapping[str, Record], before: Mapping[str, Record]
    ) -> str | None:
        """Add changes to the file; returns what was wrong with it."""
        there, problem = _read(path)
        merged = {name: record for name, record in there.items() if name not in changed}
        for name, record in changed.items():
            merged[name] = _united(before.get(name, _NOTHING), there.get(name, _NOTHING), record)
        merged = dict(list(merged.items())[-_MOST_RECORDS:])
        atomic_write(path, json.dumps({name: asdict(one) for name, one in merged.items()}))
        records = self._known()
        with self._lock:
            self._written = merged
            for name, record in merged.items():
                known = records.get(name)
                # What was measured meanwhile stays, and is written next.
                if known != record and known in (None, changed.get(name), before.get(name)):
                    records[name] = record
                    self.revision += 1
        return problem

    def _known(self) -> dict[str, Record]:
        """The records, which the first call reads."""
        records = self._records
        if records is not None:
            return records
        read, problem = ({}, None) if self._path is None else _read(self._path)
        with self._lock:
            if self._records is None:  # no other thread was faster
                self._records, self._written = read, dict(read)
            records = self._records
        self._complain(problem)  # last: who hears of it may ask for a record
        return records

    def _complain(self, problem: str | None) -> None:
        if problem is None:
            return
        with self._lock:
            is_new = problem not in self._problems
            self._problems.add(problem)
        if is_new:
            call_safely(self._on_error, problem)


@contextmanager
def _locked(folder: Path, wait_s: float) -> Iterator[bool]:
    """Exclude the other ledgers of a folder, also those of other processes. False if one of them
    holds it for longer than `wait_s`."""
    ends_at = time.monotonic() + wait_s
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= ends_at:
                    yield False
                    return
                time.sleep(_POLL_S)
            else:
                yield True
                return
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a fork may hold a copy of the descriptor
        os.close(descriptor)


def _read(path: Path) -> tuple[dict[str, Record], str | None]:
    """The records of a file that are whole, and what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}, None
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"measured sizes of models cannot be read: {error}"
    if not isinstance(data, dict):
        return {}, f"measured sizes of models cannot be read: {path} holds no JSON object"
    records = {name: record for name, raw in data.items() if (record := _record(raw)) is not None}
    damaged = len(data) - len(records)
    problem = f"{path}: {damaged} of {len(data)} measured sizes are damaged" if damaged else None
    return records, problem


def _record(raw: object) -> Record | None:
    """A record from its JSON; None for what is none."""
    if not isinstance(raw, dict):
        return None
    peak_bytes, load_s = raw.get("peak_bytes"), raw.get("load_s")
    if not isinstance(peak_bytes, int) or not 0 <= peak_bytes < _MOST:
        return None
    if not isinstance(load_s, int | float) or not 0 <= load_s < _MOST:
        return None
    return Record(peak_bytes, float(load_s))


def _united(before: Record, there: Record, mine: Record) -> Record:
    """A record that two engines have changed since it was `before`."""
    load_s = there.load_s if mine.load_s == before.load_s else mine.load_s
    return Record(max(there.peak_bytes, mine.peak_bytes), load_s)


def _is_news(records: Mapping[str, Record], written: Mapping[str, Record]) -> bool:
    for name, record in records.items():
        before = written.get(name)
        if before is None or before.load_s == 0.0 < record.load_s:
            return True
        if record.peak_bytes > before.peak_bytes * (1 + _WORTH_WRITING):
            return True
    return False
