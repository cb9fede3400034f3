"""The shape of a model, as far as memory is concerned: the widths of its layers.

Reads the table of tensors, and of the metadata only what no tensor shows. It deliberately knows
nothing of bytes: `footprint.py` computes the sizes.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orion_oie.models.formats.gguf import (
    GGUFHeader,
    TensorInfo,
)

_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight")
_KEPT_BY_GEMMA3N = 20  # layers with a cache of their own; a constant of llama.cpp, not in the file
_TOKEN_SHIFTS = 2


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer. Widths are numbers per token; 0 for parts that the layer does not have.

    `key` and `value` are computed, `cached_key` and `cached_value` are kept for each token.
    `is_fused`: one matrix gives query, key and value. `recurrent` numbers are kept for each
    sequence. `up` is the output of the matrix before the activation, `ffn` the output of the
    activation; `used_experts` of `experts` are computed. `others` are the outputs of all other
    matrices.
    """

    query: int = 0
    key: int = 0
    value: int = 0
    is_fused: bool = False
    has_post_norms: bool = False
    cached_key: int = 0
    cached_value: int = 0
    recurrent: int = 0
    inner: int = 0
    state: int = 0
    up: int = 0
    ffn: int = 0
    has_gate: bool = False
    experts: int = 0
    used_experts: int = 0
    others: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model: its layers, and the parts around them.

    `has_logits`: it rates all of its `vocabulary` tokens. `head` is the width of an attention head,
    `longest_row` that of the widest input of a matrix. `window` > 0: some layers attend to that
    many tokens only. `has_cache` False: an encoder, which reads a whole text at once.
    """

    layers: tuple[LayerShape, ...]
    embedding: int
    vocabulary: int
    has_logits: bool
    head: int
    longest_row: int
    window: int
    is_scaled: bool
    has_cache: bool

    @property
    def is_recurrent(self) -> bool:
        """True when some layers keep a state instead of a cache."""
        return any(layer.recurrent for layer in self.layers)


def shape_of(headers: Sequence[GGUFHeader]) -> ModelShape:
    """The shape of a model from the headers of its files, the first one first."""
    header = headers[0]
    tensors = {tensor.name: tensor for each in headers for tensor in each.tensors}
    by_layer: defaultdict[int, dict[str, TensorInfo]] = defaultdict(dict)
    for name, tensor in tensors.items():
        found = _LAYER.fullmatch(name)
        if found is not None:
            by_layer[int(found[1])][found[2]] = tensor
    has_cache = not ("bert" in header.architecture or header.architecture == "gemma-embedding")
    caching = _caching_layers(header) if has_cache else 0
    layers = tuple(
        _layer(header, by_layer[number], has_cache=number < caching) for number in sorted(by_layer)
    )
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) > 1]
    heads = header.number("attention.head_count")
    width = header.embedding_length
    return ModelShape(
        layers=layers,
        embedding=width,
        vocabulary=header.vocabulary_size,
        has_logits=has_cache,
        head=header.number("attention.key_length") or (width // heads if heads else 0),
        longest_row=max((tensor.shape[0] for tensor in matrices), default=0),
        window=header.number("attention.sliding_window"),
        is_scaled=header.architecture.startswith("gemma"),
        has_cache=has_cache,
    )


def _caching_layers(header: GGUFHeader) -> int:
    """The number of layers, from the first one, that have a cache of their own."""
    if header.architecture == "gemma3n":
        return _KEPT_BY_GEMMA3N
    return header.block_count - header.number("attention.shared_kv_layers")


def _layer(header: GGUFHeader, tensors: Mapping[str, TensorInfo], *, has_cache: bool) -> LayerShape:
    rows = {name: _rows(tensor) for name, tensor in tensors.items()}
    recurrent = _recurrent(header, tensors)
    out = tensors.get("attn_output")
    query = rows.get("attn_q", rows.get("attn_q_b", out.shape[0] if out else 0))
    is_fused = "attn_qkv" in rows and not recurrent
    key, value = rows.get("attn_k", 0), rows.get("attn_v", rows.get("attn_k", 0))
    cached_key, cached_value = key, value
    if is_fused:
        cached_key = cached_value = key = value = max(0, rows["attn_qkv"] - query) // 2
    elif "attn_kv_a_mqa" in rows:  # one compressed key for all heads, or its expanded form
        heads = header.number("attention.head_count")
        cached_key = heads * header.number("attention.key_length")
        cached_value = heads * header.number("attention.value_length")
        if "attn_kv_b" not in rows:
            cached_key, cached_value = rows["attn_kv_a_mqa"], 0
        key, value = cached_key, cached_value or cached_key
    expert = rows.get("ffn_down_exps", 0) and tensors["ffn_down_exps"].shape[0]
    ffn = expert or (tensors["ffn_down"].shape[0] if "ffn_down" in tensors else 0)
    has_mixer = bool(key or "ssm_in" in rows)
    return LayerShape(
        query=query if key else 0,
        key=key,
        value=value,
        is_fused=is_fused,
        has_post_norms="post_attention_norm" in rows and "post_ffw_norm" in rows,
        cached_key=cached_key if has_cache else 0,
        cached_value=cached_value if has_cache else 0,
        recurrent=recurrent,
        inner=rows.get("ssm_in", 0),
        state=header.number("ssm.inner_size") * header.number("ssm.state_size"),
        up=expert or rows.get("ffn_up", 0),
        ffn=ffn,
        has_gate=bool(expert) or "ffn_gate" in rows,
        experts=rows.get("ffn_gate_inp", 0) if expert else 0,
        used_experts=header.number("expert_used_count") if expert else 0,
        others=() if has_mixer else tuple(rows[name] for name in tensors if _is_other(name)),
    )


def _is_other(name: str) -> bool:
    return not (name.startswith("ffn_") or "norm" in name)


def _recurrent(header: GGUFHeader, tensors: Mapping[str, TensorInfo]) -> int:
    """The numbers that a layer keeps for each sequence: of its convolution, and of its state."""
    width = header.embedding_length
    if any(name.startswith("ssm_") for name in tensors):
        inner, state = header.number("ssm.inner_size"), header.number("ssm.state_size")
        groups = header.number("ssm.group_count")
        kept = max(0, header.number("ssm.conv_kernel") - 1)
        return kept * (inner + 2 * groups * state) + inner * state
    if any(name.startswith("shortconv") for name in tensors):
        return width * max(0, header.number("shortconv.l_cache") - 1)
    if any(name.startswith("time_mix") for name in tensors):
        shifts = header.number("token_shift_count") or _TOKEN_SHIFTS
        return width * (shifts + header.number("wkv.head_size"))
    return 0


def _rows(tensor: TensorInfo) -> int:
    """The width of a matrix's output; 0 for a vector."""
    return tensor.shape[1] if len(tensor.shape) > 1 else 0
