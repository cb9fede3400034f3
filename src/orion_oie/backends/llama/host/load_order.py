"""The order in which the first forward pass needs the bytes of a model, and its shards.

Pure: reads headers, downloads nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from orion_oie.config import ShardingConfig
from orion_oie.models.downloads.parts import Run
from orion_oie.models.formats.gguf import (
    GGUFHeader,
    TensorInfo,
)

_LAYER = re.compile(r"blk\.(\d+)\.(.*)")
_AFTER_ALL_LAYERS = 2**31

_Stage = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class ForwardOrder:
    """The bytes of a model in the order in which they are needed: `runs`, adjacent ones joined.

    `shards` are the parts that progress reports count, each as runs: the files of a split model, or
    parts of about the same size. The first `initial_shards` must have arrived before anything is
    computed.
    """

    runs: tuple[Run, ...]
    shards: tuple[tuple[Run, ...], ...]
    initial_shards: int


def forward_order(headers: Sequence[GGUFHeader], sharding: ShardingConfig) -> ForwardOrder:
    """The order for the files of one model: the headers, then embeddings, layers, output."""
    pieces: list[tuple[_Stage, Run]] = []
    for number, header in enumerate(headers):
        pieces.append(((-3, 0, 0), (number, 0, header.data_offset)))
        pieces += [
            (_stage(tensor, sharding), (number, tensor.offset, tensor.offset + tensor.n_bytes))
            for tensor in header.tensors
            if tensor.n_bytes
        ]
    runs = _joined([run for _, run in sorted(pieces)])
    shards = _by_file(runs, len(headers)) if len(headers) > 1 else _cut(runs, sharding.num_shards)
    return ForwardOrder(runs, shards, min(sharding.initial_shards, len(shards)))


def _stage(tensor: TensorInfo, sharding: ShardingConfig) -> _Stage:
    """Sort key: the time at which a tensor is first needed."""
    found = _LAYER.match(tensor.name)
    if found is None:
        is_output = tensor.name.startswith("output")
        name: int | str = "output" if is_output else "embedding"
        stage = _AFTER_ALL_LAYERS if is_output else -1
        part = 0
    else:
        name = stage = int(found[1])
        part = int(not found[2].startswith(("attn", "ssm")))  # the feed-forward part comes second
    if name in sharding.priority_layers:
        return (-2, sharding.priority_layers.index(name), part)
    return (stage, part, 0)


def _joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The same runs, with adjacent ones joined across the padding between tensors."""
    joined: list[Run] = []
    for number, start, end in runs:
        if joined and joined[-1][0] == number and 0 <= start - joined[-1][2] < 4096:
            joined[-1] = (number, joined[-1][1], end)
        else:
            joined.append((number, start, end))
    return tuple(joined)


def _by_file(runs: Sequence[Run], files: int) -> tuple[tuple[Run, ...], ...]:
    return tuple(tuple(run for run in runs if run[0] == number) for number in range(files))


def _cut(runs: Sequence[Run], count: int) -> tuple[tuple[Run, ...], ...]:
    """The runs cut into `count` parts of the same size, fewer when there are fewer bytes."""
    ends = list(accumulate(end - start for _, start, end in runs))
    total = ends[-1] if ends else 0
    count = max(1, min(count, total))
    shards: list[list[Run]] = [[] for _ in range(count)]
    at = 0
    for number, start, end in runs:
        while start < end:
            index = min(at * count // total, count - 1)
            limit = -(-(index + 1) * total // count)
            size = min(end - start, limit - at)
            shards[index].append((number, start, start + size))
            start += size
            at += size
    return tuple(tuple(shard) for shard in shards)
