"""What models really took: measured at earlier loads, kept in a file, used at the next ones.

Measures nothing itself. A file that cannot be read or written costs only the memory of it: the
estimates go on as they were.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from orion_oie.models.files import atomic_write

FILE_NAME = "footprints.json"
_MOST_RECORDS = 500
_WORTH_WRITING = 0.02  # a change of so much of the size


@dataclass(frozen=True, slots=True)
class Record:
    """One model as it was loaded: the most memory it was seen to take, and the time to load it;
    0 for what was not measured yet."""

    peak_bytes: int = 0
    load_s: float = 0.0


class FootprintLedger:
    """Records by identity: whatever makes two loads the same. Thread-safe.

    `on_error(message)` hears of a file that cannot be read or written.
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
        self.revision = 0  # grows with everything new that is noted

    def get(self, identity: str) -> Record:
        """What is known of a model; a record of zeros if nothing is."""
        with self._lock:
            return self._known().get(identity, Record())

    def note_peak(self, identity: str, resident_bytes: int) -> None:
        """A model was seen to take so much."""
        with self._lock:
            records = self._known()
            record = records.pop(identity, Record())
            if resident_bytes > record.peak_bytes:
                record = Record(resident_bytes, record.load_s)
                self.revision += 1
            records[identity] = record  # the last seen are kept

    def note_load(self, identity: str, load_s: float) -> None:
        """A model was loaded in so many seconds, from files that were here."""
        with self._lock:
            records = self._known()
            record = records.pop(identity, Record())
            records[identity] = Record(record.peak_bytes, load_s)
            self.revision += 1

    def save(self) -> None:
        """Write what is new, if it is worth it. The file is the old one or the complete new one."""
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
