"""Conversion of a BERT embedding model from a folder of sentence-transformers to one GGUF file.

llama.cpp can then embed with it, without torch. The only importer of `gguf`. It quantizes by
rounding, and fetches nothing.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from orion_oie.errors import InvalidRequestError, ModelCorruptError, ModelError
from orion_oie.foundry.bert_folder import (
    CONTINUES,
    SPECIAL,
    BertFolder,
    read_bert_folder,
)
from orion_oie.models.files import replacing
from orion_oie.models.formats.safetensors import Safetensors

Quantization = Literal["f32", "f16", "q8_0"]

_BEGINS = "\u2581"  # llama.cpp's prefix of a piece that begins a word
_Q8_BLOCK = 32
_OLD_PREFIX = "bert."  # of the tensors of models that were saved with a head


class _Part(NamedTuple):
    """A tensor and its bias: the name in the original, the name in GGUF files, the shape."""

    original: str
    name: str
    shape: tuple[int, ...]
    has_bias: bool = True
    is_matrix: bool = True


def write_bert_gguf(folder: Path, out: Path, *, quantization: Quantization = "f16") -> Path:
    """Write the model in `folder` to `out`, replacing an existing file; return `out`.

    `quantization` is that of the matrices and of the token embeddings; small tensors stay in 32
    bits. The file gets its name once it is complete.

    Raises `InvalidRequestError` for an unknown quantization or an impossible path, the errors of
    `read_bert_folder` and `Safetensors`, `ModelError` when the extra is not installed or the model
    does not exist in this quantization, `OSError` when writing fails.
    """
    if quantization not in get_args(Quantization):
        raise InvalidRequestError(
            f"quantization is '{quantization}', but it must be one of "
            f"{', '.join(get_args(Quantization))}",
            quantization=quantization,
        )
    if out.is_dir():
        raise InvalidRequestError(f"{out} is a folder; name a file to write", path=str(out))
    if not out.parent.is_dir():
        raise InvalidRequestError(f"there is no folder {out.parent} to write into", path=str(out))
    gguf = _library()
    model = read_bert_folder(folder)
    weights = Safetensors(model.weights)
    with (
        replacing(out, sync=True) as fresh,
        closing(gguf.GGUFWriter(fresh, "bert")) as writer,
    ):
        _add_settings(writer, gguf, model, quantization, out.stem)
        _add_vocabulary(writer, gguf, model)
        for name, tensor, is_matrix in _tensors(model, weights):
            _add_tensor(writer, gguf, name, tensor, quantization if is_matrix else "f32")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return out


def _library() -> Any:
    try:
        import gguf  # not always installed
        import gguf.quants
    except ImportError as error:
        raise ModelError(
            "writing GGUF files needs gguf: pip install 'orion-oie[convert]'", extra="convert"
        ) from error
    return gguf


def _add_settings(
    writer: Any, gguf: Any, model: BertFolder, quantization: Quantization, name: str
) -> None:
    file_types = gguf.LlamaFileType
    writer.add_name(name)
    if model.license:
        writer.add_license(model.license)
    writer.add_file_type(
        {
            "f32": file_types.ALL_F32,
            "f16": file_types.MOSTLY_F16,
            "q8_0": file_types.MOSTLY_Q8_0,
        }[quantization]
    )
    writer.add_context_length(model.positions)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.feed_forward)
    writer.add_block_count(model.layers)
    writer.add_head_count(model.heads)
    writer.add_layer_norm_eps(model.norm_epsilon)
    writer.add_causal_attention(False)
    poolings = {"mean": gguf.PoolingType.MEAN, "cls": gguf.PoolingType.CLS}
    writer.add_pooling_type(poolings[model.pooling])


def _add_vocabulary(writer: Any, gguf: Any, model: BertFolder) -> None:
    kinds = gguf.TokenType
    tokens = [f"[PAD{number}]" for number in range(model.tokens)]  # numbers without a piece
    types = [kinds.UNUSED] * model.tokens
    for piece, number in model.vocabulary.items():
        kind = types[number] = _kind(kinds, piece)
        tokens[number] = _in_llama(piece) if kind == kinds.NORMAL else piece
    numbers = {role: model.vocabulary[token] for role, token in SPECIAL.items()}
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(model.token_types)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(numbers["cls"])
    writer.add_eos_token_id(numbers["sep"])
    writer.add_sep_token_id(numbers["sep"])
    writer.add_pad_token_id(numbers["pad"])
    writer.add_unk_token_id(numbers["unk"])
    writer.add_mask_token_id(numbers["mask"])


def _kind(kinds: Any, piece: str) -> Any:
    if piece == SPECIAL["unk"]:
        return kinds.UNKNOWN
    if piece in SPECIAL.values():
        return kinds.CONTROL
    return kinds.UNUSED if piece.startswith("[unused") else kinds.NORMAL


def _in_llama(piece: str) -> str:
    """A piece as llama.cpp writes it: it marks pieces that begin a word, BERT those that continue
    one."""
    return piece.removeprefix(CONTINUES) if piece.startswith(CONTINUES) else _BEGINS + piece


# -- tensors


def _tensors(
    model: BertFolder, weights: Safetensors
) -> Iterator[tuple[str, NDArray[np.float32], bool]]:
    """The tensors of a GGUF file: the name, the numbers, and True for a matrix."""
    prefix = _OLD_PREFIX if any(name.startswith(_OLD_PREFIX) for name in weights) else ""
    taken = {f"{prefix}embeddings.position_ids"}  # merely 0, 1, 2, ...
    for part in _parts(model):
        for kind, shape in (("weight", part.shape), ("bias", part.shape[:1])):
            if kind == "bias" and not part.has_bias:
                continue
            original = f"{prefix}{part.original}.{kind}"
            taken.add(original)
            if original not in weights:
                raise ModelCorruptError(
                    f"{model.weights} has no {original}", path=str(model.weights)
                )
            tensor = weights[original]
            if tensor.shape != shape:
                raise ModelCorruptError(
                    f"{model.weights}: {original} has the shape {tensor.shape}, but by config.json "
                    f"it is {shape}",
                    path=str(model.weights),
                )
            yield f"{part.name}.{kind}", tensor, part.is_matrix and kind == "weight"
    ours = (f"{prefix}embeddings.", f"{prefix}encoder.")
    others = [name for name in weights if name.startswith(ours) and name not in taken]
    if others:
        raise ModelError(
            f"{model.weights} has tensors that are not BERT's: {', '.join(others[:5])}",
            path=str(model.weights),
        )


def _parts(model: BertFolder) -> Iterator[_Part]:
    width, inner = model.width, model.feed_forward
    square, vector = (width, width), (width,)
    table = "embeddings.word_embeddings"
    yield _Part(table, "token_embd", (model.tokens, width), has_bias=False)
    for original, name, rows in (
        ("position_embeddings", "position_embd", model.positions),
        ("token_type_embeddings", "token_types", model.token_types),
    ):
        yield _Part(f"embeddings.{original}", name, (rows, width), has_bias=False, is_matrix=False)
    yield _Part("embeddings.LayerNorm", "token_embd_norm", vector, is_matrix=False)
    for number in range(model.layers):
        for part in (
            _Part("attention.self.query", "attn_q", square),
            _Part("attention.self.key", "attn_k", square),
            _Part("attention.self.value", "attn_v", square),
            _Part("attention.output.dense", "attn_output", square),
            _Part("attention.output.LayerNorm", "attn_output_norm", vector, is_matrix=False),
            _Part("intermediate.dense", "ffn_up", (inner, width)),
            _Part("output.dense", "ffn_down", (width, inner)),
            _Part("output.LayerNorm", "layer_output_norm", vector, is_matrix=False),
        ):
            yield part._replace(
                original=f"encoder.layer.{number}.{part.original}", name=f"blk.{number}.{part.name}"
            )


def _add_tensor(
    writer: Any, gguf: Any, name: str, tensor: NDArray[np.float32], quantization: Quantization
) -> None:
    largest = np.finfo(np.float32 if quantization == "f32" else np.float16).max
    if not (np.abs(tensor) <= largest).all():
        raise ModelError(
            f"{name} has numbers that {quantization} cannot hold, or that are none", tensor=name
        )
    if quantization == "q8_0" and tensor.shape[-1] % _Q8_BLOCK:
        raise ModelError(
            f"{name} has rows of {tensor.shape[-1]} numbers; q8_0 needs a multiple of {_Q8_BLOCK}: "
            "take f16",
            tensor=name,
        )
    kind = gguf.GGMLQuantizationType[quantization.upper()]
    writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
