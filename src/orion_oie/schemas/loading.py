"""How far the load of a model is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

LoadPhase = Literal["initializing", "downloading", "loading_shard", "ready", "complete"]


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a load is.

    `phase`: `initializing` (finding out what there is, starting a process), `downloading` (nothing
    can be computed yet), `loading_shard` (shards become usable, one after another), `ready` (all is
    here and checked), `complete` (nothing goes on in the background any more).

    `fraction` of all is done, in [0, 1]. `shards_loaded` of `shards` can be used. `bytes_loaded` of
    `bytes_total` are here; `bytes_per_s` and `seconds_left` are None while nobody can know. `mode`:
    `progressive` computes while shards arrive, `sequential` after that; `note` says why, if that is
    not what was asked for.
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
"""Called with each step of a load, on the thread that loads; must return quickly."""
