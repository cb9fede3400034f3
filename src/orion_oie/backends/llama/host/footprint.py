"""The memory that a model will take in its worker, estimated from headers and settings.

Pure: the features of the processor and the size of an idle worker are parameters. All weights count
as memory of the host, also those that go to a GPU. During a load, pages of the files are in memory
beside copies of them for a moment; the system can take these pages back, so they are not counted.

The constants were measured with llama-cpp-python 0.3.36 and CPython 3.11 on Linux.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from orion_oie.backends.base import DEFAULT_CONTEXT_LENGTH, Footprint, usable_context
from orion_oie.backends.llama.host.scratch import (
    Batch,
    buffer_bytes,
    work_bytes,
)
from orion_oie.backends.llama.host.shape import (
    ModelShape,
    shape_of,
)
from orion_oie.models.downloads.parts import Run
from orion_oie.models.formats.gguf import (
    GGUFHeader,
    TensorInfo,
)

# An idle worker, before one was measured: interpreter, numpy, llama.cpp.
PROCESS_BYTES = 54 << 20
# Added by the first answers: more of the libraries, the template engine, threads.
_SERVING_BYTES = 10 << 20
_TOKEN_BYTES = 150  # of the vocabulary, in llama.cpp's tables
_MERGE_BYTES = 140
_CANDIDATE_BYTES = 20  # a token, in the tables of candidates
_PIECE_BYTES = 170  # a generated token, in the table of its text

_FLOAT_BYTES = 4
_CACHE_BYTES = 2  # half floats
_CELLS_STEP = 256
_PAGE_BYTES = 4096
_BATCH_TOKENS = 512
EMBEDDED_TOKENS = 128
EMBEDDED_TEXTS = 16
_SHORTEST_OFFLOADED = 32  # tokens

# The types that llama.cpp repacks during the load: the features of the processor for which it does
# so, and the number that the rows must be a multiple of.
_REPACKED: dict[str, dict[str, int]] = {
    "Q4_0": {"AVX2": 8, "DOTPROD": 4, "VXE": 4, "AMX_INT8": 1},
    "Q4_1": {"AMX_INT8": 1},
    "Q4_K": {"AVX2": 8, "DOTPROD": 8, "AMX_INT8": 1},
    "Q2_K": {"AVX512": 8},
    "Q5_K": {"DOTPROD": 8, "AMX_INT8": 1},
    "Q6_K": {"DOTPROD": 8, "AMX_INT8": 1},
    "Q8_0": {"DOTPROD": 4, "AMX_INT8": 1},
    "Q1_0": {"DOTPROD": 4},
    "IQ4_NL": {"AVX2": 8, "DOTPROD": 4},
    "IQ4_XS": {"AMX_INT8": 1},
    "MXFP4": {"AVX2": 8, "DOTPROD": 4},
}
_LOOKED_UP = ("token_embd", "position_embd", "token_types", "per_layer_token_embd")


@dataclass(frozen=True, slots=True)
class Use:
    """The intended use of a model; see `LoadSpec`. `context_length` is the requested one."""

    context_length: int | None
    slots: int
    threads: int
    host_cache_bytes: int | None = None
    is_embedding: bool = False


def footprint(
    headers: Sequence[GGUFHeader],
    use: Use,
    features: Collection[str],
    process_bytes: int = PROCESS_BYTES,
) -> Footprint:
    """The footprint of a model, from the headers of its files, the first one first.

    `features` are the processor's, by llama.cpp's names; `process_bytes` is the size of an idle
    worker.
    """
    copied = repacked(headers, features)
    stored_bytes = sum(tensor.n_bytes for header in headers for tensor in header.tensors)
    repacked_bytes = sum(tensor.n_bytes for _, tensor in copied)
    mapped_bytes = stored_bytes - sum(t.n_bytes for _, t in copied if not _is_looked_up(t))
    kind = _Embedding if use.is_embedding else _Generation
    contexts = kind(shape_of(headers), use, headers)
    kv_bytes, compute_bytes = contexts.taken_bytes()
    return Footprint(
        weights_bytes=mapped_bytes + repacked_bytes,
        kv_bytes=kv_bytes,
        compute_bytes=compute_bytes,
        process_bytes=process_bytes + _SERVING_BYTES + _vocabulary_bytes(headers[0]),
        growth_bytes=contexts.growth_bytes(),
        mapped_bytes=mapped_bytes,
        repacked_bytes=repacked_bytes,
    )


def estimate(
    expected_bytes: int, use: Use, process_bytes: int = PROCESS_BYTES, *, is_arriving: bool = True
) -> Footprint:
    """The footprint of a model of which only the size of its files is known: that of usual models
    of this size. With `is_arriving` it is loaded while it arrives, in an additional context."""
    # Measured with models of 8 billion weights in 4.5 GB; the rest of the footprint grows with the
    # square root of the weights.
    scale = (expected_bytes / 4.5e9) ** 0.5
    kv_bytes = (
        0
        if use.is_embedding
        else int(131_072 * scale * _cells(use.context_length or DEFAULT_CONTEXT_LENGTH))
    )
    compute_bytes = int(125e6 * scale)
    host_cache_bytes = kv_bytes if use.host_cache_bytes is None else use.host_cache_bytes
    arriving_bytes = kv_bytes + 4 * compute_bytes if is_arriving and not use.is_embedding else 0
    return Footprint(
        weights_bytes=expected_bytes,
        kv_bytes=kv_bytes,
        compute_bytes=compute_bytes,
        process_bytes=process_bytes + _SERVING_BYTES + int(40e6 * min(1.0, scale)),
        growth_bytes=host_cache_bytes + arriving_bytes,
        mapped_bytes=expected_bytes,
    )


def repacked(
    headers: Sequence[GGUFHeader], features: Collection[str]
) -> list[tuple[int, TensorInfo]]:
    """The matrices that llama.cpp copies into another layout, each with the number of its file.
    They include the embeddings if these are the output matrix, too."""
    names = {tensor.name for header in headers for tensor in header.tensors}
    is_output_shared = "output.weight" not in names
    return [
        (number, tensor)
        for number, header in enumerate(headers)
        for tensor in header.tensors
        if _is_repacked(tensor, features)
        and (
            not _is_looked_up(tensor)
            or (is_output_shared and tensor.name == "token_embd.weight" and _has_logits(header))
        )
    ]


def discardable_runs(headers: Sequence[GGUFHeader], features: Collection[str]) -> list[Run]:
    """The whole pages of the files that are not read after the load, because llama.cpp repacked all
    of their content."""
    spans = sorted(
        (number, tensor.offset, tensor.offset + tensor.n_bytes)
        for number, tensor in repacked(headers, features)
        if not _is_looked_up(tensor)
    )
    joined: list[Run] = []
    for number, start, end in spans:
        if joined and joined[-1][0] == number and start - joined[-1][2] < headers[number].alignment:
            joined[-1] = (number, joined[-1][1], end)
        else:
            joined.append((number, start, end))
    inner = [
        (number, -(-start // _PAGE_BYTES) * _PAGE_BYTES, end // _PAGE_BYTES * _PAGE_BYTES)
        for number, start, end in joined
    ]
    return [run for run in inner if run[1] < run[2]]


def _is_repacked(tensor: TensorInfo, features: Collection[str]) -> bool:
    is_matrix = len(tensor.shape) > 1 and tensor.name.endswith(".weight")
    steps = _REPACKED.get(tensor.type_name, {})
    return is_matrix and any(
        feature in features and tensor.shape[1] % step == 0 for feature, step in steps.items()
    )


def _is_looked_up(tensor: TensorInfo) -> bool:
    """True for tables of which single rows are read; llama.cpp does not repack them for that."""
    return tensor.name.removesuffix(".weight") in _LOOKED_UP


def _has_logits(header: GGUFHeader) -> bool:
    return shape_of([header]).has_logits


def _vocabulary_bytes(header: GGUFHeader) -> int:
    merges = header.array_length("tokenizer.ggml.merges")
    return header.vocabulary_size * (_TOKEN_BYTES + _CANDIDATE_BYTES) + merges * _MERGE_BYTES


def _cells(tokens: int) -> int:
    """The number of cells that llama.cpp makes for this many tokens."""
    return -(-tokens // _CELLS_STEP) * _CELLS_STEP


class _Context:
    """The memory of a model's contexts, beside the weights."""

    def __init__(self, shape: ModelShape, use: Use, headers: Sequence[GGUFHeader]) -> None:
        self.length = usable_context(use.context_length, headers[0].context_length)
        self.shape = shape
        self.use = use
        self._has_halves = any(
            tensor.type_name in ("F16", "BF16") for header in headers for tensor in header.tensors
        )

    @property
    def cell_bytes(self) -> int:
        """The size of a token in the KV cache."""
        layers = self.shape.layers
        return sum(layer.cached_key + layer.cached_value for layer in layers) * _CACHE_BYTES

    @property
    def state_bytes(self) -> int:
        """The size of a sequence's state in recurrent layers."""
        return sum(layer.recurrent for layer in self.shape.layers) * _FLOAT_BYTES

    def step_bytes(self, batch: Batch) -> int:
        """The memory in which a batch is computed."""
        threads, has_halves = self.use.threads, self._has_halves
        work = work_bytes(self.shape, batch, threads=threads, has_halves=has_halves)
        return buffer_bytes(self.shape, batch) + work


class _Generation(_Context):
    """See `NativeModel`."""

    def taken_bytes(self) -> tuple[int, int]:
        """The KV cache with recurrent states; the compute buffer with the logits."""
        slots = self.use.slots
        has_two_more = not (self.shape.is_recurrent or self.shape.window)
        sequences = slots + 2 if has_two_more else slots
        cells = _cells(self.length)
        batch = Batch(min(self.length, _BATCH_TOKENS), sequences, cells, sequences)
        logits_bytes = sequences * self.shape.vocabulary * _FLOAT_BYTES
        kv_bytes = self.cell_bytes * cells + self.state_bytes * slots
        return kv_bytes, logits_bytes + self.step_bytes(batch)

    def growth_bytes(self) -> int:
        """The host cache, and the table of token texts."""
        host_cache_bytes = self.use.host_cache_bytes
        if host_cache_bytes is None:
            # As many bytes per token as the first offloaded state has.
            each_bytes = self.cell_bytes + self.state_bytes // _SHORTEST_OFFLOADED
            host_cache_bytes = _cells(self.length) * each_bytes
        return host_cache_bytes + self.shape.vocabulary * _PIECE_BYTES


class _Embedding(_Context):
    """See `Embedder`."""

    def taken_bytes(self, longest: int = EMBEDDED_TOKENS) -> tuple[int, int]:
        """The same two, while the longest text has this many tokens."""
        cells = _cells(longest)
        batch = Batch(longest, EMBEDDED_TEXTS, cells, longest)
        # llama.cpp reserves memory for the logits of each token, even if the model has none.
        outputs_bytes = longest * (self.shape.vocabulary + self.shape.embedding) * _FLOAT_BYTES
        kv_bytes = self.cell_bytes * cells + self.state_bytes * EMBEDDED_TEXTS
        return kv_bytes, outputs_bytes + self.step_bytes(batch)

    def growth_bytes(self) -> int:
        """The additional memory for the longest possible text."""
        longest = max(EMBEDDED_TOKENS, self.length)
        return sum(self.taken_bytes(longest)) - sum(self.taken_bytes())
