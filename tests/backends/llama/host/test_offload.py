"""Layers on a GPU: what is planned fits, and one more layer would not."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.backends.llama.host.offload import (
    GpuPlan,
    choose_gpu_layers,
)
from orion_oie.errors import InvalidRequestError

GB = 10**9
SIZES = {
    "output_bytes": 2 * GB,
    "kv_bytes_per_layer": 1 * GB,
    "compute_bytes": 3 * GB,
    "reserve_bytes": 1 * GB,
}
BLOCKS = [4 * GB, 5 * GB]  # all of it: 3 for computing, 2 for the output, 5 + 1 and 4 + 1

small = st.integers(0, 50)
models = st.fixed_dictionaries(
    {
        "layer_bytes": st.lists(small, max_size=8),
        "output_bytes": small,
        "kv_bytes_per_layer": small,
        "compute_bytes": small,
        "reserve_bytes": small,
    }
)


def needed(model: Mapping[str, Any], layers: int) -> int:
    """What so many layers take: the output first, then the last blocks with their caches."""
    if layers == 0:
        return 0
    blocks: Sequence[int] = model["layer_bytes"][len(model["layer_bytes"]) - (layers - 1) :]
    caches = model["kv_bytes_per_layer"] * len(blocks)
    return int(model["compute_bytes"] + model["output_bytes"] + sum(blocks) + caches)


@pytest.mark.parametrize(
    ("free_gb", "layers", "needed_gb", "words"),
    [
        (17, 3, 16, "all 3 layers fit: 16.00 GB; 16.00 GB of the device's memory may be used"),
        (16, 2, 11, "2 of 3 layers fit: 11.00 GB, with one more 16.00 GB; 15.00 GB"),
        (6, 1, 5, "1 of 3 layers fit: 5.00 GB, with one more 11.00 GB"),
        (5, 0, 0, "no layer fits: the first would take 5.00 GB; 4.00 GB"),
        (0, 0, 0, "(0.00 GB free, 1.00 GB kept)"),
    ],
)
def test_examples(free_gb: int, layers: int, needed_gb: int, words: str) -> None:
    """The cases one would draw on paper, and that the reason has the numbers."""
    plan = choose_gpu_layers(BLOCKS, free_bytes=free_gb * GB, **SIZES)
    assert (plan.layers, plan.needed_bytes) == (layers, needed_gb * GB)
    assert words in plan.reason


@given(model=models, free=st.integers(0, 900))
def test_a_plan_fits_and_is_the_largest(model: dict[str, Any], free: int) -> None:
    """What is planned fits beside the reserve, and with one layer more it would not."""
    plan = choose_gpu_layers(**model, free_bytes=free)
    budget = max(0, free - model["reserve_bytes"])
    assert plan.needed_bytes == needed(model, plan.layers) <= budget
    if plan.layers <= len(model["layer_bytes"]):
        assert needed(model, plan.layers + 1) > budget


@given(model=models, free=st.integers(0, 900), more=small)
def test_more_memory_never_gets_fewer_layers(model: dict[str, Any], free: int, more: int) -> None:
    """The plan grows with the memory, and shrinks with the reserve."""
    layers = choose_gpu_layers(**model, free_bytes=free).layers
    assert choose_gpu_layers(**model, free_bytes=free + more).layers >= layers
    model["reserve_bytes"] += more
    assert choose_gpu_layers(**model, free_bytes=free).layers <= layers


@pytest.mark.parametrize("name", ["free_bytes", *SIZES])
def test_a_size_below_zero_is_refused(name: str) -> None:
    """A wrong number does not become a plan."""
    sizes = {**SIZES, "free_bytes": GB, name: -1}
    with pytest.raises(InvalidRequestError):
        choose_gpu_layers(BLOCKS, **sizes)
    with pytest.raises(InvalidRequestError):
        choose_gpu_layers([1, -1], **{**SIZES, "free_bytes": GB})


def test_nothing_kept_is_not_mentioned() -> None:
    """Without a reserve, the reason speaks of none."""
    sizes = {**SIZES, "reserve_bytes": 0, "free_bytes": 99 * GB}
    reason = "all 3 layers fit: 16.00 GB; 99.00 GB of the device's memory may be used"
    assert choose_gpu_layers(BLOCKS, **sizes) == GpuPlan(3, 16 * GB, reason)
