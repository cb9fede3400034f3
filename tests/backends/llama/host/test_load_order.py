"""In which order the bytes of a model are fetched, and in which shards they come."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_tiny_llama

from orion_oie.backends.llama.host.load_order import (
    ForwardOrder,
    forward_order,
)
from orion_oie.config import ShardingConfig
from orion_oie.models.downloads.parts import Run
from orion_oie.models.formats.gguf import (
    GGUFHeader,
    TensorInfo,
    read_header,
)


def header_of(names: list[str], size: int = 5000) -> GGUFHeader:
    """A header whose tensors lie in the file in this order."""
    tensors = tuple(
        TensorInfo(name, (size,), 0, "F32", 10_000 + index * size, size)
        for index, name in enumerate(names)
    )
    return GGUFHeader(3, 10_000 + len(names) * size, 10_000, 32, {}, tensors)


def names_in_order(header: GGUFHeader, order: ForwardOrder) -> list[str]:
    """The tensors in the order in which their first bytes are fetched."""
    starts = {tensor.offset: tensor.name for tensor in header.tensors}
    return [
        starts[at] for _, start, end in order.runs for at in sorted(starts) if start <= at < end
    ]


MIXED = [
    "output.weight",
    "blk.1.ffn_up.weight",
    "blk.1.attn_q.weight",
    "blk.10.attn_q.weight",
    "blk.0.ffn_down.weight",
    "output_norm.weight",
    "blk.2.attn_norm.weight",
    "token_embd.weight",
    "blk.0.attn_k.weight",
]


def test_bytes_come_as_the_first_pass_needs_them() -> None:
    """Header, embeddings, layers by number with attention first, output."""
    header = header_of(MIXED)
    order = forward_order([header], ShardingConfig())
    assert order.runs[0] == (0, 0, 10_000)
    assert names_in_order(header, order) == [
        "token_embd.weight",
        "blk.0.attn_k.weight",
        "blk.0.ffn_down.weight",
        "blk.1.attn_q.weight",
        "blk.1.ffn_up.weight",
        "blk.2.attn_norm.weight",
        "blk.10.attn_q.weight",
        "output.weight",
        "output_norm.weight",
    ]


def test_what_is_asked_for_first_comes_first() -> None:
    """`priority_layers` go before everything but the header, in their own order."""
    header = header_of(MIXED)
    sharding = ShardingConfig(priority_layers=["output", 10, 1])
    names = names_in_order(header, forward_order([header], sharding))
    assert names[:5] == [
        "output.weight",
        "output_norm.weight",
        "blk.10.attn_q.weight",
        "blk.1.attn_q.weight",
        "blk.1.ffn_up.weight",
    ]
    assert names[5] == "token_embd.weight"


def test_a_real_model_is_covered_once(tmp_path: Path) -> None:
    """Every byte of every tensor is in exactly one run, and in exactly one shard."""
    header = read_header(write_tiny_llama(tmp_path / "tiny.gguf", layers=3))
    order = forward_order([header], ShardingConfig(num_shards=5))
    assert len(order.shards) == 5
    for runs in (order.runs, [run for shard in order.shards for run in shard]):
        covered = sorted((start, end) for _, start, end in runs)
        assert all(a[1] <= b[0] for a, b in pairwise(covered))
        for tensor in header.tensors:
            inside = sum(
                max(0, min(end, tensor.offset + tensor.n_bytes) - max(start, tensor.offset))
                for start, end in covered
            )
            assert inside == tensor.n_bytes


def test_the_files_of_a_split_model_are_its_shards(tmp_path: Path) -> None:
    """One shard for each file, whatever `num_shards` says; layers still come in their order."""
    first = write_tiny_llama(tmp_path / "tiny.gguf", tensors_per_file=8)
    files = sorted(tmp_path.glob(re.sub(r"00001-of", "*-of", first.name)))
    headers = [read_header(file) for file in files]
    order = forward_order(headers, ShardingConfig(num_shards=2, initial_shards=50))
    assert len(order.shards) == len(files) > 2
    assert order.initial_shards == len(files)
    for number, shard in enumerate(order.shards):
        assert {run[0] for run in shard} == {number}


@given(
    sizes=st.lists(st.integers(min_value=1, max_value=10**6), min_size=1, max_size=20),
    count=st.integers(min_value=1, max_value=40),
)
def test_shards_are_of_about_the_same_size(sizes: list[int], count: int) -> None:
    """Shards cover the runs without a gap, and differ by a byte at most."""
    names = [f"blk.{index}.attn_q.weight" for index in range(len(sizes))]
    offset = 4096
    tensors = []
    for name, size in zip(names, sizes, strict=True):
        tensors.append(TensorInfo(name, (size,), 0, "F32", offset, size))
        offset += size + 8192  # so that no two runs are neighbours
    header = GGUFHeader(3, offset, 4096, 32, {}, tuple(tensors))
    order = forward_order([header], ShardingConfig(num_shards=count))

    def bytes_of(runs: tuple[Run, ...]) -> int:
        return sum(end - start for _, start, end in runs)

    lengths = [bytes_of(shard) for shard in order.shards]
    assert sum(lengths) == bytes_of(order.runs) == 4096 + sum(sizes)
    assert max(lengths) - min(lengths) <= 1
    assert len(lengths) == min(count, sum(lengths))


@pytest.mark.parametrize("shards", [0, 1, 3, 8])
def test_initial_shards_are_no_more_than_there_are(shards: int) -> None:
    """To ask for more shards at first than there are is to ask for all."""
    order = forward_order([header_of(MIXED)], ShardingConfig(num_shards=3, initial_shards=shards))
    assert order.initial_shards == min(shards, 3)
