"""The settings of a BERT model in a folder of sentence-transformers, read and checked.

Reads the JSON files and the vocabulary, but no weights. It refuses any model for which llama.cpp
would compute other embeddings than the original: nearly right ones would go unnoticed.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from orion_oie.errors import ModelCorruptError, ModelError, ModelNotFoundError

SPECIAL = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
CONTINUES = "##"  # the prefix of a piece that continues a word

_LAYERS = ("Transformer", "Pooling")
_ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh")
_POOLINGS: dict[str, Literal["mean", "cls"]] = {
    "mean": "mean",
    "pooling_mode_mean_tokens": "mean",
    "cls": "cls",
    "pooling_mode_cls_token": "cls",
}
_LICENSE = re.compile(r"\A---\n(?:(?!---\n).*\n)*?license: *([\w.+-]+) *\n")

_Shape = TypeVar("_Shape")


@dataclass(frozen=True, slots=True)
class BertFolder:
    """A model that can become a GGUF file. `vocabulary` maps pieces to their numbers; pieces that
    continue a word begin with ##. `license` is empty if the folder names none."""

    weights: Path
    width: int
    feed_forward: int
    layers: int
    heads: int
    positions: int
    token_types: int
    tokens: int
    norm_epsilon: float
    pooling: Literal["mean", "cls"]
    vocabulary: dict[str, int]
    license: str


class _Config(BaseModel):
    model_type: str
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    type_vocab_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    layer_norm_eps: float = Field(default=1e-12, gt=0)
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    is_decoder: bool = False


class _Module(BaseModel):
    path: str
    type: str


class _Pooling(BaseModel, extra="allow"):
    pooling_mode: str | list[str] | None = None


class _Pieces(BaseModel):
    type: str
    vocab: Any = None  # a table for WordPiece, something else for others
    continuing_subword_prefix: str = CONTINUES


class _Normalizer(BaseModel):
    type: str
    lowercase: bool = True
    strip_accents: bool | None = None
    handle_chinese_chars: bool = True


class _AddedToken(BaseModel):
    content: str
    id: int
    special: bool


class _Tokenizer(BaseModel):
    model: _Pieces
    normalizer: _Normalizer | None = None
    added_tokens: list[_AddedToken] = []


class _TokenizerConfig(BaseModel):
    do_lower_case: bool = True
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool = True


def read_bert_folder(folder: Path) -> BertFolder:
    """Read and check the model in `folder`.

    Raises `ModelNotFoundError` for a missing file, `ModelCorruptError` for a damaged one,
    `ModelError` for a model of another kind.
    """
    transformer, pooling = _parts(folder)
    config = _read(transformer / "config.json", _Config)
    if config.model_type != "bert" or config.is_decoder:
        kind = "a decoder" if config.is_decoder else f"of the kind '{config.model_type}'"
        raise _other_kind(transformer, f"its model is {kind}, not a BERT encoder")
    if config.position_embedding_type != "absolute":
        raise _other_kind(transformer, f"its positions are '{config.position_embedding_type}'")
    if config.hidden_act not in _ACTIVATIONS:
        raise _other_kind(transformer, f"its activation is '{config.hidden_act}', not GELU")
    if config.hidden_size % config.num_attention_heads:
        raise ModelCorruptError(
            f"{transformer / 'config.json'}: {config.num_attention_heads} heads cannot share "
            f"{config.hidden_size} numbers",
            path=str(transformer / "config.json"),
        )
    return BertFolder(
        weights=_weights(transformer),
        width=config.hidden_size,
        feed_forward=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        positions=config.max_position_embeddings,
        token_types=config.type_vocab_size,
        tokens=config.vocab_size,
        norm_epsilon=config.layer_norm_eps,
        pooling=_pooling(pooling),
        vocabulary=_vocabulary(transformer, config.vocab_size),
        license=_license(folder),
    )


def _parts(folder: Path) -> tuple[Path, Path]:
    """The folders of the encoder and of its pooling."""
    if not folder.is_dir():
        raise ModelNotFoundError(f"there is no folder {folder}", path=str(folder))
    modules = _read(folder / "modules.json", list[_Module])
    names = tuple(module.type.rpartition(".")[2] for module in modules)
    # A layer "Normalize" changes nothing: vectors are normalized in any case.
    if names[:2] != _LAYERS or set(names[2:]) - {"Normalize"}:
        raise _other_kind(folder, f"its layers are {', '.join(names) or 'none'}")
    return folder / modules[0].path, folder / modules[1].path


def _pooling(folder: Path) -> Literal["mean", "cls"]:
    config = _read(folder / "config.json", _Pooling)
    given = config.pooling_mode
    if given is None:
        extra = config.model_extra or {}
        modes = [
            name for name, is_on in extra.items() if name.startswith("pooling_mode_") and is_on
        ]
        modes = modes or ["mean"]  # the default of the original
    else:
        modes = [given] if isinstance(given, str) else given
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise _other_kind(folder, f"it pools by {' and '.join(modes)}, not by mean or cls")
    return _POOLINGS[modes[0]]


def _weights(folder: Path) -> Path:
    path = folder / "model.safetensors"
    if not path.is_file():
        others = sorted(p.name for p in folder.glob("*model*") if p.suffix in (".bin", ".json"))
        hint = f", and {', '.join(others)} cannot be read" if others else ""
        raise ModelNotFoundError(f"there is no file {path}{hint}", path=str(path))
    return path


def _license(folder: Path) -> str:
    """The license in the front matter of the model's card."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""  # a card is optional
    found = _LICENSE.match(card)
    return found[1] if found else ""


# -- the vocabulary


def _vocabulary(folder: Path, limit: int) -> dict[str, int]:
    if (folder / "tokenizer.json").exists():
        vocabulary = _of_tokenizer(folder / "tokenizer.json")
    else:
        vocabulary = _of_list(folder)
    missing = [token for token in SPECIAL.values() if token not in vocabulary]
    if missing:
        raise _other_kind(folder, f"its vocabulary has no {', '.join(missing)}")
    if min(vocabulary.values()) < 0 or max(vocabulary.values()) >= limit:
        raise ModelCorruptError(
            f"{folder}: its vocabulary goes up to {max(vocabulary.values())}, but its model knows "
            f"{limit} tokens",
            path=str(folder),
        )
    return vocabulary


def _of_tokenizer(path: Path) -> dict[str, int]:
    tokenizer = _read(path, _Tokenizer)
    pieces, normalizer = tokenizer.model, tokenizer.normalizer
    if pieces.type != "WordPiece" or pieces.continuing_subword_prefix != CONTINUES:
        raise _other_kind(path, f"its vocabulary is {pieces.type}, not BERT's WordPiece")
    if normalizer is None or normalizer.type != "BertNormalizer":
        kind = "nothing" if normalizer is None else normalizer.type
        raise _other_kind(path, f"its texts are prepared by {kind}, not by BertNormalizer")
    _check_letters(
        path,
        lowers=normalizer.lowercase,
        strips=normalizer.strip_accents,
        parts_chinese=normalizer.handle_chinese_chars,
    )
    words = [token.content for token in tokenizer.added_tokens if not token.special]
    if words:
        raise _other_kind(path, f"it has added words that are looked for first, like {words[0]!r}")
    table = _checked(path, pieces.vocab, dict[str, int])
    return table | {token.content: token.id for token in tokenizer.added_tokens}


def _of_list(folder: Path) -> dict[str, int]:
    settings = _TokenizerConfig()
    if (folder / "tokenizer_config.json").exists():
        settings = _read(folder / "tokenizer_config.json", _TokenizerConfig)
    path = folder / "vocab.txt"
    _check_letters(
        path,
        lowers=settings.do_lower_case,
        strips=settings.strip_accents,
        parts_chinese=settings.tokenize_chinese_chars,
    )
    try:
        # Not `splitlines`: only "\n" ends a line of a vocabulary.
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"{folder} has no WordPiece vocabulary: neither tokenizer.json nor vocab.txt",
            path=str(folder),
        ) from error
    except UnicodeDecodeError as error:
        raise ModelCorruptError(f"{path} is not UTF-8: {error}", path=str(path)) from error
    return {token: number for number, token in enumerate(lines)}


def _check_letters(path: Path, *, lowers: bool, strips: bool | None, parts_chinese: bool) -> None:
    """Check the treatment of letters: llama.cpp lowers them all, strips accents, and separates
    Chinese characters."""
    faults = {
        "tells small letters from large ones": not lowers,
        "tells letters from those with accents": strips is False,
        "does not part Chinese characters": not parts_chinese,
    }
    for fault, is_so in faults.items():
        if is_so:
            raise _other_kind(path, f"its vocabulary {fault}")


# -- files


def _read(path: Path, shape: type[_Shape]) -> _Shape:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"there is no file {path}: is this the folder of a sentence-transformers model?",
            path=str(path),
        ) from error
    except ValueError as error:
        raise ModelCorruptError(f"{path} is not JSON: {error}", path=str(path)) from error
    return _checked(path, content, shape)


def _checked(path: Path, content: object, shape: type[_Shape]) -> _Shape:
    try:
        return TypeAdapter(shape).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelCorruptError(f"{path}: {where}: {first['msg']}", path=str(path)) from error


def _other_kind(path: Path, why: str) -> ModelError:
    return ModelError(
        f"{path}: {why}; what can be converted are BERT encoders with an uncased WordPiece "
        "vocabulary, pooled by mean or cls, as sentence-transformers keeps them",
        path=str(path),
    )
