"""The progress of loading a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

LoadPhase = Literal["initializing", "downloading", "loading_shard", "ready", "complete"]


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """The progress of one load.

    phase: `initializing` (locating the files, starting a process), `downloading` (nothing can be
    computed yet), `loading_shard` (shards become usable, one after another), `ready` (all files are
    on this machine and verified), `complete` (nothing runs in the background any more).
    fraction: the part that is done, in [0, 1]. shards_loaded: the number of the `shards` that can
    be used. bytes_loaded: the bytes of `bytes_total` that are on this machine. bytes_per_s,
    seconds_left: None while unknown. mode: `progressive` computes while shards arrive, `sequential`
    after that. note: the reason if the mode is not the one that was requested.
    """

    phase: LoadPhase
    fraction: float = 0.0
    shards: int = 1
    shards_loaded: int = 0
    bytes_total: int = 0
    bytes_loaded: int = 0
    bytes_per_s: float | None = None
    seconds_left: float | None = None
    mode: Literal["progressive", "sequential"] = "sequential"
    note: str = ""


OnProgress = Callable[[LoadProgress], None]
"""A callback for each step of a load, called on the thread that loads; must return quickly."""
