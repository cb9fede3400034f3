"""GGUF files of any size that hold no weights: a header, and then nothing, which reads as zeros.

They take no room on the disk. llama.cpp loads them as it loads any model; what they say is the same
token over and over.
"""

import os
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

_ALIGNMENT = 32
_KERNEL, _STATE = 4, 16

Shapes = dict[str, tuple[int, ...]]


def write_outline(
    path: Path,
    *,
    architecture: str = "llama",
    layers: int = 3,
    width: int = 256,
    ffn: int = 768,
    heads: int = 4,
    kv_heads: int = 2,
    head: int | None = None,
    vocabulary: int = 1000,
    experts: int = 0,
    used_experts: int = 0,
    weights: str = "Q4_0",
    has_output: bool = False,
    window: int = 0,
    merges: int = 2,
    context_length: int = 131_072,
) -> Path:
    """Write a model of an architecture among llama, qwen3, phi3, gemma3, mamba; return its path.

    `experts` take the place of the feed-forward part, each `ffn` wide.
    """
    head = head or width // heads
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(context_length)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(used_experts)
        writer.add_expert_feed_forward_length(ffn)
    if window:
        writer.add_sliding_window(window)
    if architecture == "mamba":
        writer.add_ssm_conv_kernel(_KERNEL)
        writer.add_ssm_inner_size(2 * width)
        writer.add_ssm_state_size(_STATE)
        writer.add_ssm_time_step_rank(width // 16)
    _add_vocabulary(writer, vocabulary, merges)
    shapes: Shapes = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    if has_output:
        shapes["output.weight"] = (vocabulary, width)
    for layer in range(layers):
        parts = _recurrent(width) if architecture == "mamba" else {}
        if not parts:
            parts = _attention(architecture, width, heads, kv_heads, head)
            parts |= _feed_forward(architecture, width, ffn, experts)
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    size = sum(_announce(writer, name, shape, weights) for name, shape in shapes.items())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    end = _aligned(writer.fout[0].tell())
    writer.close()
    os.truncate(path, end + size)
    return path


def _add_vocabulary(writer: GGUFWriter, size: int, merges: int) -> None:
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"token{index}" for index in range(size)])
    writer.add_token_types([1] * size)
    writer.add_token_merges([f"a{index} b{index}" for index in range(merges)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _attention(architecture: str, width: int, heads: int, kv_heads: int, head: int) -> Shapes:
    parts: Shapes = {"attn_norm.weight": (width,), "attn_output.weight": (width, heads * head)}
    if architecture == "phi3":
        parts["attn_qkv.weight"] = ((heads + 2 * kv_heads) * head, width)
    else:
        parts["attn_q.weight"] = (heads * head, width)
        parts["attn_k.weight"] = parts["attn_v.weight"] = (kv_heads * head, width)
    if architecture in ("qwen3", "gemma3"):
        parts["attn_q_norm.weight"] = parts["attn_k_norm.weight"] = (head,)
    if architecture == "gemma3":
        parts["post_attention_norm.weight"] = parts["post_ffw_norm.weight"] = (width,)
    return parts


def _feed_forward(architecture: str, width: int, ffn: int, experts: int) -> Shapes:
    parts: Shapes = {"ffn_norm.weight": (width,)}
    if experts:
        parts["ffn_gate_inp.weight"] = (experts, width)
        parts["ffn_gate_exps.weight"] = parts["ffn_up_exps.weight"] = (experts, ffn, width)
        parts["ffn_down_exps.weight"] = (experts, width, ffn)
    elif architecture == "phi3":
        parts |= {"ffn_up.weight": (2 * ffn, width), "ffn_down.weight": (width, ffn)}
    else:
        parts["ffn_gate.weight"] = parts["ffn_up.weight"] = (ffn, width)
        parts["ffn_down.weight"] = (width, ffn)
    return parts


def _recurrent(width: int) -> Shapes:
    inner, rank = 2 * width, width // 16
    return {
        "attn_norm.weight": (width,),
        "ssm_in.weight": (2 * inner, width),
        "ssm_conv1d.weight": (inner, _KERNEL),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (rank + 2 * _STATE, inner),
        "ssm_dt.weight": (inner, rank),
        "ssm_dt.bias": (inner,),
        "ssm_a": (inner, _STATE),
        "ssm_d": (inner,),
        "ssm_out.weight": (width, inner),
    }


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], weights: str) -> int:
    """Put a tensor into the table; returns the bytes that it takes in the file."""
    is_plain = len(shape) == 1 or name.split(".", 2)[-1].startswith(("ssm_", "ffn_gate_inp"))
    kind = GGMLQuantizationType["F32" if is_plain else weights]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    row_bytes = shape[-1] // block * block_bytes
    size = row_bytes * int(np.prod(shape[:-1], dtype=np.int64))
    writer.add_tensor_info(name, (*shape[:-1], row_bytes), np.dtype(np.uint8), size, raw_dtype=kind)
    return _aligned(size)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
