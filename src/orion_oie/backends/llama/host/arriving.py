"""The files of a model that is still arriving: which are here, which are coming, how far it is.

Loads nothing: what can be done with what is here is the loader's business.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from orion_oie.backends.llama.host.load_order import ForwardOrder
from orion_oie.errors import ModelCorruptError
from orion_oie.models.downloads.fetch import Download
from orion_oie.models.downloads.parts import (
    Run,
    map_path,
    part_path,
)
from orion_oie.models.formats.gguf import (
    GGUFHeader,
    parse_header,
    read_header,
)
from orion_oie.schemas.loading import LoadProgress

_POLL_S = 0.02


class Arriving:
    """The files of one model, of which some are here and some are being fetched."""

    def __init__(self, paths: Sequence[Path], download: Download) -> None:
        self.paths = paths
        self.download = download
        # By place among all files: the place among those that are fetched.
        self._numbers = {paths.index(path): number for number, path in enumerate(download.paths)}
        self.order = ForwardOrder((), (), 0)
        self.mode: str = "sequential"
        self.note = ""

    def read_headers(self) -> list[GGUFHeader]:
        """The header of each file. What is found to be no model is thrown away."""
        headers = []
        try:
            for place, path in enumerate(self.paths):
                number = self._numbers.get(place)
                if number is None:
                    headers.append(read_header(path))
                else:
                    read_at = partial(self.download.read, number)
                    headers.append(parse_header(read_at, self.download.sizes[number], str(path)))
        except ModelCorruptError:
            self.download.discard()
            raise
        except BaseException:
            self.download.close()
            raise
        return headers

    def start(self) -> None:
        """Fetch the rest, in the order of the forward pass."""
        self.download.start(self._fetched(self.order.runs))

    def files(self) -> list[Path]:
        """Where the files lie now."""
        return [
            part_path(path) if place in self._numbers else path
            for place, path in enumerate(self.paths)
        ]

    def maps(self) -> list[Path | None]:
        """The map of each file that is being fetched."""
        return [
            map_path(path) if place in self._numbers else None
            for place, path in enumerate(self.paths)
        ]

    def wait_for_initial_shards(self, on_progress: Callable[[], None]) -> None:
        """Return when enough shards are here to begin with. Raises what ended the download."""
        while self._shards_here() < self.order.initial_shards:
            if self.download.error is not None:
                raise self.download.error
            on_progress()
            threading.Event().wait(_POLL_S)

    def progress(self, phase: str) -> LoadProgress:
        """How far it is."""
        here = sum(
            path.stat().st_size
            for place, path in enumerate(self.paths)
            if place not in self._numbers and path.exists()
        )
        total = here + self.download.total_bytes
        arrived = here + self.download.arrived_bytes
        speed = self.download.bytes_per_s
        return LoadProgress(
            phase,  # type: ignore[arg-type]
            fraction=arrived / total if total else 1.0,
            shards=len(self.order.shards),
            shards_loaded=self._shards_here(),
            bytes_total=total,
            bytes_loaded=arrived,
            bytes_per_s=speed or None,
            seconds_left=(total - arrived) / speed if speed else None,
            mode=self.mode,  # type: ignore[arg-type]
            note=self.note,
        )

    def _shards_here(self) -> int:
        maps = self.download.maps
        return sum(
            all(maps[number].has(start, end) for number, start, end in self._fetched(shard))
            for shard in self.order.shards
        )

    def _fetched(self, runs: Sequence[Run]) -> list[Run]:
        """The same runs as the download counts its files; without what is here."""
        numbers = self._numbers
        return [(numbers[n], start, end) for n, start, end in runs if n in numbers]
