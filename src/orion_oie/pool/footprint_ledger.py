"""The measured memory and load times of models, kept in a file for later loads.

Measures nothing itself. If the file cannot be read or written, nothing is remembered, and estimates
are used as they are.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from orion_oie.models.files import atomic_write

FILE_NAME = "footprints.json"
_MOST_RECORDS = 500
_WORTH_WRITING = 0.02  # the relative change of a size that is written


@dataclass(frozen=True, slots=True)
class Record:
    """The measurements of one model: its peak memory, and the time of its last load; 0 if not
    measured yet."""

    peak_bytes: int = 0
    load_s: float = 0.0


class FootprintLedger:
    """Records by the identity of a load. Thread-safe.

    `on_error(message)` is called when the file cannot be read or written.
    """

    def __init__(
        self, path: Path | None = None, on_error: Callable[[str], None] = lambda _message: None
    ) -> None:
        self._path = path
        self._on_error = on_error
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._records: dict[str, Record] | None = None
        self._written: dict[str, Record] = {}
        self.revision = 0  # grows with every new measurement

    def get(self, identity: str) -> Record:
        """The record of a model; zeros if there is none."""
        with self._lock:
            return self._known().get(identity, Record())

    def note_peak(self, identity: str, resident_bytes: int) -> None:
        """Note the measured memory of a model."""
        with self._lock:
            records = self._known()
            record = records.pop(identity, Record())
            if resident_bytes > record.peak_bytes:
                record = Record(resident_bytes, record.load_s)
                self.revision += 1
            records[identity] = record  # at the end: the latest records are kept

    def note_load(self, identity: str, load_s: float) -> None:
        """Note the time in which a model was loaded from local files."""
        with self._lock:
            records = self._known()
            record = records.pop(identity, Record())
            records[identity] = Record(record.peak_bytes, load_s)
            self.revision += 1

    def save(self) -> None:
        """Write the changes if they are large enough. The file is replaced at once."""
        if self._path is None:
            return
        with self._lock:
            records = dict(self._known())
            if not _is_news(records, self._written):
                return
            self._written = records
        with self._writing:
            all_records = {**self._read(), **records}  # another process may have written, too
            last = dict(list(all_records.items())[-_MOST_RECORDS:])
            text = json.dumps({name: asdict(record) for name, record in last.items()})
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self._path, text)
            except OSError as error:
                self._on_error(f"measured sizes of models cannot be kept: {error}")

    def _known(self) -> dict[str, Record]:
        if self._records is None:
            self._records = self._read()
            self._written = dict(self._records)
        return self._records

    def _read(self) -> dict[str, Record]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            return {
                name: Record(int(record["peak_bytes"]), float(record["load_s"]))
                for name, record in data.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._on_error(f"measured sizes of models cannot be read: {error}")
            return {}


def _is_news(records: dict[str, Record], written: dict[str, Record]) -> bool:
    for name, record in records.items():
        before = written.get(name)
        if before is None or before.load_s == 0.0 < record.load_s:
            return True
        if record.peak_bytes > before.peak_bytes * (1 + _WORTH_WRITING):
            return True
    return False
