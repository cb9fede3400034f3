"""The size of llama.cpp's compute buffer, from a simulation of its allocator.

When a context is made, llama.cpp gives each result of the largest graph a place in one buffer, and
reuses the place after the last use of the result. This module does the same for an outline of the
graph: each kind of layer of the model, in the order in which llama.cpp computes. The result is
exact to some kilobytes for plain decoders, dense or with experts; for other layers, everything that
a layer computes is counted at once. It holds for CPUs: other devices place some results elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from orion_oie.backends.llama.host.shape import (
    LayerShape,
    ModelShape,
)

_ALIGNMENT = 64
_FLOAT_BYTES = 4
_HALF_BYTES = 2
_INDEX_BYTES = 8

# Beside the buffer, llama.cpp keeps the inputs of a matrix in the type of the matrix, and for each
# thread tiles of attention and of matrices.
_CONVERTED_BYTES = 1.2  # per number; 2 for matrices of half floats
_THREAD_BYTES = 640 << 10


@dataclass(frozen=True, slots=True)
class Batch:
    """The largest batch of a context: `tokens` of `sequences`, which attend to `cells`; the logits
    or vectors of `outputs` tokens are wanted."""

    tokens: int
    sequences: int
    cells: int
    outputs: int

    @property
    def reserved_tokens(self) -> int:
        """The tokens that llama.cpp reserves for: equally many of each sequence."""
        return -(-self.tokens // self.sequences) * self.sequences


def buffer_bytes(shape: ModelShape, batch: Batch) -> int:
    """The size of the buffer that llama.cpp reserves for its graph."""
    return _Sketch(shape, batch).graph.peak_bytes()


def work_bytes(shape: ModelShape, batch: Batch, *, threads: int, has_halves: bool) -> int:
    """The memory of kernels beside the buffer. `has_halves`: matrices are of 16-bit floats."""
    each = _HALF_BYTES if has_halves else _CONVERTED_BYTES
    return int(batch.reserved_tokens * shape.longest_row * each) + threads * _THREAD_BYTES


class _Graph:
    """Results in the order in which they are computed, with the sources of each."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._sources: list[tuple[int, ...]] = []
        self._is_in_place: list[bool] = []

    def result(self, size: int, *sources: int, in_place: bool = False) -> int:
        """Add a result of `size` bytes, or an input if it has no sources: all inputs come first.
        With `in_place`, it replaces a source of its size that nothing else uses."""
        self._sizes.append(-(-size // _ALIGNMENT) * _ALIGNMENT)
        self._sources.append(sources)
        self._is_in_place.append(in_place)
        return len(self._sizes) - 1

    def peak_bytes(self) -> int:
        """The size of the buffer."""
        uses = [0] * len(self._sizes)
        for sources in self._sources:
            for source in sources:
                uses[source] += 1
        buffer = _Buffer()
        places: dict[int, int] = {}
        for index, size in enumerate(self._sizes):
            taken = self._place_to_take(index, uses) if self._is_in_place[index] else None
            places[index] = buffer.allocate(size) if taken is None else places.pop(taken)
            for source in self._sources[index]:
                uses[source] -= 1
                if not uses[source] and source in places:
                    buffer.free(places.pop(source), self._sizes[source])
        return buffer.peak_bytes

    def _place_to_take(self, index: int, uses: Sequence[int]) -> int | None:
        for source in self._sources[index]:
            if uses[source] == 1 and self._sizes[source] == self._sizes[index]:
                return source
        return None


class _Buffer:
    """The buffer: a result gets the smallest gap that is large enough, or else the end."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._gaps: list[tuple[int, int]] = []  # start and end, in order
        self._end = 0

    def allocate(self, size: int) -> int:
        fitting = [gap for gap in self._gaps if gap[1] - gap[0] >= size]
        if not fitting:
            start, self._end = self._end, self._end + size
            self.peak_bytes = max(self.peak_bytes, self._end)
            return start
        start, end = min(fitting, key=lambda gap: (gap[1] - gap[0], -gap[0]))
        self._gaps.remove((start, end))
        self.free(start + size, end - start - size)
        return start

    def free(self, start: int, size: int) -> None:
        if not size:
            return
        joined: list[tuple[int, int]] = []
        for gap in sorted([*self._gaps, (start, start + size)]):
            if joined and joined[-1][1] == gap[0]:
                gap = (joined.pop()[0], gap[1])
            joined.append(gap)
        if joined[-1][1] == self._end:
            self._end = joined.pop()[0]
        self._gaps = joined


class _Sketch:
    """The graph of a model. A `row` is the size of one number for each token: for all tokens, or
    for those with outputs in the last layer."""

    def __init__(self, shape: ModelShape, batch: Batch) -> None:
        self._shape = shape
        self._batch = batch
        self.graph = _Graph()
        tokens = batch.reserved_tokens
        self._row = tokens * _FLOAT_BYTES
        self._last_row = batch.outputs * _FLOAT_BYTES
        add = self.graph.result
        add(shape.embedding * self._row)  # vectors in place of tokens: reserved, but never used
        said = add(self._row)
        self._positions = add(self._row)
        has_attention = any(layer.key for layer in shape.layers)
        cells = batch.cells if shape.has_cache else tokens
        kinds = 2 if shape.window else 1
        self._masks = [
            add(cells * tokens * _HALF_BYTES) for _ in range(kinds if has_attention else 0)
        ]
        self._cells = [add(tokens * _INDEX_BYTES) for _ in self._masks for _ in "kv"]
        self._wanted = add(self._last_row)
        if not shape.has_cache:
            add(tokens * batch.sequences * _FLOAT_BYTES)  # the weight of each token in a mean
        stream = add(shape.embedding * self._row, said)
        if shape.is_scaled:
            stream = add(shape.embedding * self._row, stream, in_place=True)
        self._add_layers(stream)

    def _add_layers(self, stream: int) -> None:
        # Three equal layers leave the allocator in the same state as any larger number.
        layers = [layer for _, same in groupby(self._shape.layers) for layer in list(same)[:3]]
        for number, layer in enumerate(layers):
            stream = self._add_layer(layer, stream, is_last=number == len(layers) - 1)
        size = self._shape.embedding * self._last_row
        normed = self.graph.result(size, stream, in_place=True)
        if self._shape.has_logits:
            self.graph.result(self._shape.vocabulary * self._last_row, normed)

    def _add_layer(self, layer: LayerShape, stream: int, *, is_last: bool) -> int:
        """Add a layer; returns the input of the next one."""
        add = self.graph.result
        row = self._row
        size = self._shape.embedding * row
        mixed = add(size, stream)
        if layer.key:
            mixed = self._add_attention(layer, mixed)
        if layer.inner:
            mixed = self._add_recurrence(layer, mixed)
        if layer.others:
            every = [add(other * row, mixed) for other in layer.others]
            mixed = add(size, *every)
        if is_last:
            row = self._last_row
            size = self._shape.embedding * row
            mixed, stream = add(size, mixed, self._wanted), add(size, stream, self._wanted)
        if layer.has_post_norms:
            mixed = add(size, mixed, in_place=True)
        stream = add(size, mixed, stream, in_place=True)
        if not layer.ffn:
            return stream
        add_fed = self._add_experts if layer.experts else self._add_feed_forward
        fed = add_fed(layer, add(size, stream), row)
        if layer.has_post_norms:
            fed = add(size, fed, in_place=True)
        return add(size, fed, stream, in_place=True)

    def _add_attention(self, layer: LayerShape, normed: int) -> int:
        # Queries and keys are viewed as heads, and no result takes the place of a view: so each
        # exists twice, before and after its rotation.
        add, positions = self.graph.result, self._positions
        sizes = [width * self._row for width in (layer.query, layer.key, layer.value)]
        query_bytes, key_bytes, value_bytes = sizes
        if layer.is_fused:
            fused = add(sum(sizes), normed)
            query = add(query_bytes, fused, positions)
            key, value = add(key_bytes, fused, positions), fused
        else:
            query = add(query_bytes, add(query_bytes, normed), positions)
            value = -1 if self._shape.is_scaled else add(value_bytes, normed)
            key = add(key_bytes, add(key_bytes, normed), positions)
            value = add(value_bytes, normed) if self._shape.is_scaled else value
        if self._shape.has_cache:
            add(0, key, value, *self._cells)
            seen = add(query_bytes, query, *self._masks)
        else:
            key, value = add(key_bytes // 2, key), add(value_bytes // 2, value)
            seen = add(query_bytes, query, key, value, *self._masks)
        return add(self._shape.embedding * self._row, seen)

    def _add_recurrence(self, layer: LayerShape, normed: int) -> int:
        add = self.graph.result
        inner_bytes = layer.inner // 2 * self._row
        both = add(layer.inner * self._row, normed)
        convolved = add(inner_bytes, add(inner_bytes, both))
        steps = add(inner_bytes, convolved)
        state_bytes = layer.state * self._batch.sequences * _FLOAT_BYTES
        scanned = add(inner_bytes + state_bytes, convolved, steps)
        gate = add(inner_bytes, both)
        gated = add(inner_bytes, gate, add(inner_bytes, scanned))
        return add(self._shape.embedding * self._row, gated)

    def _add_feed_forward(self, layer: LayerShape, normed: int, row: int) -> int:
        add = self.graph.result
        if layer.has_gate:
            gate, up = add(layer.ffn * row, normed), add(layer.up * row, normed)
            active = add(layer.ffn * row, gate, up)
        else:
            active = add(layer.ffn * row, add(layer.up * row, normed), in_place=True)
        return add(self._shape.embedding * row, active)

    def _add_experts(self, layer: LayerShape, normed: int, row: int) -> int:
        add, used = self.graph.result, layer.used_experts
        size = self._shape.embedding * row
        rated = add(layer.experts * row, normed)
        chosen = add(layer.experts * row, rated)
        shares = add(used * row, rated, chosen)
        shares = add(used * row, shares, add(row, shares), in_place=True)
        up = add(layer.up * used * row, normed, chosen)
        gate = add(layer.ffn * used * row, normed, chosen)
        each = add(used * size, add(layer.ffn * used * row, gate, up), chosen)
        each = add(used * size, each, shares, in_place=True)
        total = add(size, each)
        for _ in range(used - 1):
            total = add(size, total, each, in_place=True)
        return total
