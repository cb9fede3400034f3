"""The files of a model that is being downloaded: complete ones, arriving ones, and the progress.

Loads nothing: the loader decides what to do with the files that have arrived.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

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
from orion_oie.schemas.loading import LoadPhase, LoadProgress

_POLL_S = 0.02


def download_progress(
    arrived_bytes: int, total_bytes: int, bytes_per_s: float = 0.0, note: str = ""
) -> LoadProgress:
    """The progress of a download. `bytes_per_s` 0 means unknown."""
    return LoadProgress(
        "downloading",
        fraction=arrived_bytes / total_bytes if total_bytes else 0.0,
        bytes_total=total_bytes,
        bytes_loaded=arrived_bytes,
        bytes_per_s=bytes_per_s or None,
        seconds_left=(total_bytes - arrived_bytes) / bytes_per_s if bytes_per_s else None,
        note=note,
    )


class Arriving:
    """The files of one model, of which some are complete and some are being downloaded."""

    def __init__(self, paths: Sequence[Path], download: Download) -> None:
        self.paths = paths
        self.download = download
        # The index among the downloaded files, by the index among all files.
        self._numbers = {paths.index(path): number for number, path in enumerate(download.paths)}
        self.order = ForwardOrder((), (), 0)
        self.mode: Literal["progressive", "sequential"] = "sequential"
        self.note = ""

    def read_headers(self) -> list[GGUFHeader]:
        """The header of each file. Discards the download if a file is no model."""
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
        """Download the rest, in the order of the forward pass."""
        self.download.start(self._fetched(self.order.runs))

    def files(self) -> list[Path]:
        """The current paths of the files."""
        return [
            part_path(path) if place in self._numbers else path
            for place, path in enumerate(self.paths)
        ]

    def maps(self) -> list[Path | None]:
        """The arrival map of each file that is being downloaded; None for complete files."""
        return [
            map_path(path) if place in self._numbers else None
            for place, path in enumerate(self.paths)
        ]

    def wait_for_initial_shards(self, on_progress: Callable[[], None]) -> None:
        """Return when the initial shards have arrived. Raises the error that ended the download."""
        while self._shards_arrived() < self.order.initial_shards:
            if self.download.error is not None:
                raise self.download.error
            on_progress()
            time.sleep(_POLL_S)

    def progress(self, phase: LoadPhase) -> LoadProgress:
        """The current progress of the load."""
        complete_bytes = sum(
            path.stat().st_size
            for place, path in enumerate(self.paths)
            if place not in self._numbers and path.exists()
        )
        transferred = download_progress(
            complete_bytes + self.download.arrived_bytes,
            complete_bytes + self.download.total_bytes,
            self.download.bytes_per_s,
        )
        return replace(
            transferred,
            phase=phase,
            shards=len(self.order.shards),
            shards_loaded=self._shards_arrived(),
            mode=self.mode,
            note=self.note,
        )

    def _shards_arrived(self) -> int:
        maps = self.download.maps
        return sum(
            all(maps[number].has(start, end) for number, start, end in self._fetched(shard))
            for shard in self.order.shards
        )

    def _fetched(self, runs: Sequence[Run]) -> list[Run]:
        """The runs with the download's numbers of files, without those in complete files."""
        numbers = self._numbers
        return [(numbers[n], start, end) for n, start, end in runs if n in numbers]
