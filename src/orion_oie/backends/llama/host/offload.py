"""The number of layers for a GPU: pure arithmetic over sizes that were measured elsewhere.

Loads nothing and queries no device. It plans for one device; llama.cpp spreads layers over several.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from orion_oie.errors import InvalidRequestError
from orion_oie.schemas.units import in_gb


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """`layers` is llama.cpp's `n_gpu_layers`: it counts the output layer, so a whole model with N
    blocks has N + 1. They take `needed_bytes` on the GPU."""

    layers: int
    needed_bytes: int
    reason: str


def choose_gpu_layers(
    layer_bytes: Sequence[int],
    *,
    output_bytes: int,
    kv_bytes_per_layer: int,
    compute_bytes: int,
    free_bytes: int,
    reserve_bytes: int,
) -> GpuPlan:
    """As many layers as fit: all of them, the last ones, or none, with the reason.

    llama.cpp moves the output layer first, then blocks from the last one backwards; the KV cache of
    a block is on the device of the block.

    layer_bytes: the weights of each block, first block first. output_bytes: the weights of the
    output layer; for a model that uses its embeddings twice, a copy of them. compute_bytes: the
    compute buffer, needed as soon as one layer is on the device. reserve_bytes of `free_bytes` are
    left free. Raises `InvalidRequestError` for a size below zero.
    """
    sizes = [*layer_bytes, output_bytes, kv_bytes_per_layer, compute_bytes]
    if min(*sizes, free_bytes, reserve_bytes) < 0:
        raise InvalidRequestError("a size below zero: layers of a model cannot be placed")
    budget_bytes = max(0, free_bytes - reserve_bytes)
    layers, needed_bytes = 0, 0
    with_next = compute_bytes + output_bytes
    upcoming = iter(reversed(layer_bytes))
    while with_next <= budget_bytes:
        layers, needed_bytes = layers + 1, with_next
        block = next(upcoming, None)
        if block is None:
            break
        with_next += block + kv_bytes_per_layer
    memory = f"{in_gb(budget_bytes)} of the device's memory may be used"
    if reserve_bytes:
        memory += f" ({in_gb(free_bytes)} free, {in_gb(reserve_bytes)} kept)"
    all_layers = len(layer_bytes) + 1
    if layers == 0:
        found = f"no layer fits: the first would take {in_gb(with_next)}"
    elif layers == all_layers:
        found = f"all {layers} layers fit: {in_gb(needed_bytes)}"
    else:
        found = f"{layers} of {all_layers} layers fit: {in_gb(needed_bytes)}"
        found += f", with one more {in_gb(with_next)}"
    return GpuPlan(layers, needed_bytes, f"{found}; {memory}")
