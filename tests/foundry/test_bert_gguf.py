"""Embedding models from the folders of sentence-transformers: the file embeds like the original,
and what would not is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contracts import INFO
from gguf import GGUFReader, GGUFWriter
from helpers import config_with
from minilm import minilm_folder, original_minilm, write_minilm
from numpy.typing import NDArray

from orion_oie import ModelRegistry, OrionInferenceEngine
from orion_oie.backends.base import LoadSpec
from orion_oie.backends.llama.host.loader import LlamaBackend
from orion_oie.backends.llama.worker.embedder import Embedder
from orion_oie.backends.llama.worker.thread_choice import ThreadChoice
from orion_oie.cancellation import CancelScope
from orion_oie.cli.main import main
from orion_oie.errors import (
    InvalidRequestError,
    ModelCorruptError,
    ModelError,
    ModelNotFoundError,
)
from orion_oie.foundry.bert_gguf import (
    Quantization,
    write_bert_gguf,
)
from orion_oie.models.formats.gguf import read_header

Array = NDArray[np.float32]
Change = Callable[[Path], None]

TEXTS = [
    "Hello",
    "What is the capital of France, and how do I get there by train?",
    "naïve café déjà vu Ångström İSTANBUL",
    "Привет, мир",
    "日本語のテキスト",
    "한국어 문장입니다",
    "👍 well done 🎉",
    "def f(x):\n    return x**2  # a square",
    "the quick brown fox jumps over the lazy dog " * 30,
]


@pytest.fixture(scope="module")
def reference() -> Any:
    return original_minilm()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """MiniLM's folder, whose small files may be changed."""
    folder = tmp_path / "copy"
    shutil.copytree(minilm_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").symlink_to(minilm_folder() / "model.safetensors")
    return folder


def embedded(file: Path, texts: list[str]) -> Array:
    """By a worker of its own."""
    backend = LlamaBackend()
    model = backend.load(LoadSpec(INFO, (file,), is_embedding=True), CancelScope(), lambda _p: None)
    try:
        return model.embed(texts, CancelScope())
    finally:
        model.close()


# -- the real model


@pytest.mark.parametrize(
    ("quantization", "cosine"), [("f32", 0.999), ("f16", 0.999), ("q8_0", 0.99)]
)
def test_vectors_are_those_of_the_original(
    quantization: Quantization, cosine: float, reference: Any, tmp_path: Path
) -> None:
    """In all scripts, for short texts and long ones."""
    file = write_minilm(tmp_path / "minilm.gguf", quantization=quantization)
    expected = reference.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    cosines = np.sum(embedded(file, TEXTS) * expected, axis=1)
    wrong = {text[:40]: c for text, c in zip(TEXTS, cosines, strict=True) if c < cosine}
    assert wrong == {}


def test_pooling_by_the_first_token(copy: Path, reference: Any, tmp_path: Path) -> None:
    """What 1_Pooling says is in the file."""
    write_json(copy / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    file = write_bert_gguf(copy, tmp_path / "cls.gguf")
    tokens = reference.encode(TEXTS, output_value="token_embeddings", show_progress_bar=False)
    expected = np.stack([rows[0].numpy() / np.linalg.norm(rows[0].numpy()) for rows in tokens])
    assert np.sum(embedded(file, TEXTS) * expected, axis=1).min() > 0.999


@pytest.mark.parametrize("quantization", ["f32", "f16", "q8_0"])
def test_the_header_says_what_it_is(quantization: Quantization, tmp_path: Path) -> None:
    """Where it comes from, and how it is quantized: all matrices and the table of tokens."""
    header = read_header(write_minilm(tmp_path / "some-name.gguf", quantization=quantization))
    assert header.is_embedding_model
    assert (header.architecture, header.name, header.license) == ("bert", "some-name", "apache-2.0")
    assert (header.context_length, header.embedding_length, header.block_count) == (512, 384, 6)
    assert header.vocabulary_size == 30522
    assert header.quantization == quantization.upper()
    names = [t.name for t in header.tensors if t.type_name == quantization.upper()]
    if quantization != "f32":
        assert len(names) == 6 * 6 + 1
        assert "token_embd.weight" in names


def test_what_the_library_saves_today_is_the_same(reference: Any, tmp_path: Path) -> None:
    """Other names in the JSON files, no vocab.txt: the same file."""
    reference.save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "vocab.txt").exists()
    (tmp_path / "old").mkdir()
    old = write_minilm(tmp_path / "old" / "minilm.gguf", quantization="q8_0")
    new = write_bert_gguf(tmp_path / "saved", tmp_path / "minilm.gguf", quantization="q8_0")
    assert new.read_bytes() == old.read_bytes()


def test_the_list_of_words_will_do(copy: Path, tmp_path: Path) -> None:
    """A folder without tokenizer.json has the same vocabulary in vocab.txt."""
    one = write_bert_gguf(copy, tmp_path / "minilm.gguf", quantization="q8_0").read_bytes()
    (copy / "tokenizer.json").unlink()
    other = write_bert_gguf(copy, tmp_path / "minilm.gguf", quantization="q8_0").read_bytes()
    assert one == other


# -- tiny models


WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[unused0]",
    "a",
    "##b",
    "cat",
    ".",
    "\u2028",
]
CONFIG = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "vocab_size": 13,
}


def tiny_tensors(prefix: str = "", width: int = 32) -> dict[str, Array]:
    dice = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (13, width),
        "embeddings.position_embeddings.weight": (16, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    for name, shape in {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "attention.output.LayerNorm": (width,),
        "intermediate.dense": (64, width),
        "output.dense": (width, 64),
        "output.LayerNorm": (width,),
    }.items():
        shapes[f"encoder.layer.0.{name}.weight"] = shape
        shapes[f"encoder.layer.0.{name}.bias"] = shape[:1]
    return {
        prefix + name: dice.standard_normal(shape).astype(np.float16).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_weights(folder: Path, tensors: dict[str, Array], kind: str = "F32") -> None:
    header, data = {}, b""
    for name, tensor in tensors.items():
        stored = tensor.astype(np.float16 if kind == "F16" else np.float32).tobytes()
        places = [len(data), len(data) + len(stored)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": places}
        data += stored
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data
    (folder / "model.safetensors").write_bytes(content)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with all that is needed, and no more: of an older sentence-transformers."""
    folder = tmp_path / "tiny"
    (folder / "1_Pooling").mkdir(parents=True)
    layers = [("", "models.Transformer"), ("1_Pooling", "models.Pooling")]
    modules = [{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in layers]
    write_json(folder / "modules.json", modules)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    write_weights(folder, tiny_tensors())
    return folder


def tensors_of(file: Path) -> dict[str, Array]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(file).tensors}


def test_a_tiny_model_embeds(tiny: Path, tmp_path: Path) -> None:
    """llama.cpp loads it, in each quantization; numbers without a piece have a place."""
    for quantization in ("f32", "f16", "q8_0"):
        file = write_bert_gguf(tiny, tmp_path / "tiny.gguf", quantization=quantization)
        model = Embedder(
            (file,), threads=ThreadChoice(1), context_length=None, on_progress=lambda _f: None
        )
        vectors = model.embed(["a cat", "cat.", "ab"])
        model.close()
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert model.max_tokens == 16
    tokens = GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
    begun = ["\u2581a", "b", "\u2581cat", "\u2581.", "\u2581\u2028"]
    assert tokens == [*WORDS[:6], *begun, "[PAD11]", "[PAD12]"]


def test_the_encoder_may_lie_deeper_and_have_a_prefix(tiny: Path, tmp_path: Path) -> None:
    """As in older folders, and in models that were trained with a head, which is left out."""
    plain = write_bert_gguf(tiny, tmp_path / "a.gguf")
    inner = tiny / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        (tiny / name).rename(inner / name)
    modules = json.loads((tiny / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    write_json(tiny / "modules.json", modules)
    tensors = tiny_tensors("bert.") | {"cls.predictions.bias": np.zeros(13, np.float32)}
    tensors["bert.pooler.dense.bias"] = np.zeros(32, np.float32)
    tensors["bert.embeddings.position_ids"] = np.zeros(16, np.float32)
    write_weights(inner, tensors)
    deep = write_bert_gguf(tiny, tmp_path / "b.gguf")
    for name, tensor in tensors_of(plain).items():
        np.testing.assert_array_equal(tensors_of(deep)[name], tensor)


def test_weights_of_16_bits_are_the_same(tiny: Path, tmp_path: Path) -> None:
    """These have no more digits than half floats have."""
    one = write_bert_gguf(tiny, tmp_path / "a.gguf", quantization="f32")
    tensors = tensors_of(one)
    write_weights(tiny, tiny_tensors(), "F16")
    other = tensors_of(write_bert_gguf(tiny, tmp_path / "b.gguf", quantization="f32"))
    assert tensors.keys() == other.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(other[name], tensor)


# -- what is refused


def json_with(name: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, {**known, **values})

    return change


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def content(name: str, text: str | bytes) -> Change:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(data) and None


def modules(*kinds: str) -> Change:
    return lambda folder: write_json(
        folder / "modules.json", [{"path": "", "type": f"x.{kind}"} for kind in kinds]
    )


def tokenizer(**values: object) -> Change:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    whole = {
        "model": {"type": "WordPiece", "vocab": vocabulary},
        "normalizer": {"type": "BertNormalizer", "lowercase": True, "strip_accents": None},
    }
    return lambda folder: write_json(folder / "tokenizer.json", {**whole, **values})


def weights(**values: Array | None) -> Change:
    changes = {name.replace("__", "."): tensor for name, tensor in values.items()}

    def change(folder: Path) -> None:
        tensors = {**tiny_tensors(), **changes}
        write_weights(folder, {n: tensor for n, tensor in tensors.items() if tensor is not None})

    return change


POOLING = "1_Pooling/config.json"
CASED = {"type": "BertNormalizer", "lowercase": False}
ACCENTED = {"type": "BertNormalizer", "strip_accents": False}
UNPARTED = {"type": "BertNormalizer", "handle_chinese_chars": False}
ADDED = {"content": "covid", "id": 12, "special": False}
LAST = "encoder__layer__0__output__LayerNorm__bias"
TABLE = "embeddings__word_embeddings__weight"
DISTANCE = "encoder__layer__0__attention__self__distance_embedding__weight"

OTHERS: dict[str, tuple[Change, str]] = {
    "another architecture": (json_with("config.json", model_type="roberta"), "kind 'roberta'"),
    "a decoder": (json_with("config.json", is_decoder=True), "a decoder, not a BERT encoder"),
    "relative positions": (
        json_with("config.json", position_embedding_type="relative_key"),
        "positions are 'relative_key'",
    ),
    "another activation": (json_with("config.json", hidden_act="relu"), "'relu', not GELU"),
    "no pooling": (modules("Transformer"), "layers are Transformer;"),
    "no layers": (modules(), "layers are none"),
    "one more layer": (
        modules("Transformer", "Pooling", "Dense", "Normalize"),
        "layers are Transformer, Pooling, Dense, Normalize",
    ),
    "another pooling": (json_with(POOLING, pooling_mode="max"), "pools by max, not by mean or cls"),
    "two poolings": (
        json_with(POOLING, pooling_mode_cls_token=True),
        "pooling_mode_mean_tokens and pooling_mode_cls_token",
    ),
    "two poolings, as of late": (
        json_with(POOLING, pooling_mode=["mean", "cls"]),
        "pools by mean and cls",
    ),
    "another vocabulary": (tokenizer(model={"type": "Unigram", "vocab": [["a", 1]]}), "is Unigram"),
    "another mark": (
        tokenizer(model={"type": "WordPiece", "vocab": {}, "continuing_subword_prefix": "@@"}),
        "is WordPiece, not BERT's",
    ),
    "no normalizer": (tokenizer(normalizer=None), "prepared by nothing"),
    "another normalizer": (tokenizer(normalizer={"type": "NFKC"}), "prepared by NFKC"),
    "large letters": (tokenizer(normalizer=CASED), "tells small letters from large ones"),
    "large letters, by the list": (
        json_with("tokenizer_config.json", do_lower_case=False),
        "tells small letters from large ones",
    ),
    "accents": (tokenizer(normalizer=ACCENTED), "tells letters from those with accents"),
    "whole Chinese": (tokenizer(normalizer=UNPARTED), "does not part Chinese characters"),
    "added words": (tokenizer(added_tokens=[ADDED]), "added words .* like 'covid'"),
    "no control tokens": (
        content("vocab.txt", "[PAD]\n[UNK]\na\n"),
        r"no \[CLS\], \[SEP\], \[MASK\]",
    ),
    "a tensor of its own": (weights(**{DISTANCE: np.zeros((3, 4), np.float32)}), "are not BERT's"),
    "numbers beyond f16": (
        weights(**{TABLE: np.full((13, 32), 1e6, np.float32)}),
        "f16 cannot hold",
    ),
    "numbers that are none": (
        weights(**{LAST: np.full(32, np.nan, np.float32)}),
        "f32 cannot hold",
    ),
}

CORRUPT: dict[str, tuple[Change, str]] = {
    "no JSON": (content("config.json", "{"), r"config\.json is not JSON"),
    "no UTF-8": (content("config.json", b"\xff"), r"config\.json is not JSON"),
    "no size": (json_with("config.json", hidden_size=None), r"config\.json: hidden_size: "),
    "a size of nothing": (json_with("config.json", num_hidden_layers=0), "num_hidden_layers: "),
    "heads that do not share": (json_with("config.json", num_attention_heads=5), "5 heads cannot"),
    "modules that are none": (content("modules.json", '{"a": 1}'), r"modules\.json: "),
    "words that are no text": (content("vocab.txt", b"\xff\xfe"), r"vocab\.txt is not UTF-8"),
    "a table of words that is none": (
        tokenizer(model={"type": "WordPiece", "vocab": [1]}),
        r"tokenizer\.json: ",
    ),
    "more words than numbers": (
        json_with("config.json", vocab_size=8),
        "goes up to 10, .* 8 tokens",
    ),
    "a tensor is missing": (weights(**{LAST: None}), r"has no encoder\.layer\.0\.output"),
    "a tensor of another shape": (
        weights(**{LAST: np.zeros(31, np.float32)}),
        r"shape \(31,\), but by config\.json it is \(32,\)",
    ),
    "weights that are cut off": (content("model.safetensors", b"\1"), "no whole safetensors file"),
}

MISSING: dict[str, tuple[Change, str]] = {
    "folder": (shutil.rmtree, "there is no folder"),
    "modules.json": (without("modules.json"), r"modules\.json: is this the folder of a sentence"),
    "config.json": (without("config.json"), r"tiny.config\.json: is this"),
    "pooling": (without(POOLING), r"1_Pooling.config\.json: is this"),
    "vocabulary": (without("vocab.txt"), r"neither tokenizer\.json nor vocab\.txt"),
    "weights": (without("model.safetensors"), r"no file .*model\.safetensors$"),
}


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        pytest.param(error, *case, id=name)
        for error, cases in (
            (ModelError, OTHERS),
            (ModelCorruptError, CORRUPT),
            (ModelNotFoundError, MISSING),
        )
        for name, case in cases.items()
    ],
)
def test_what_would_embed_otherwise_is_refused(
    error: type[ModelError], change: Change, message: str, tiny: Path, tmp_path: Path
) -> None:
    """Each with the error of its kind, which names the reason; nothing is written."""
    change(tiny)
    with pytest.raises(ModelError, match=message) as caught:
        write_bert_gguf(tiny, tmp_path / "tiny.gguf")
    assert type(caught.value) is error
    assert not list(tmp_path.glob("*.gguf*")) + list(tmp_path.glob(".*"))


def test_weights_of_another_format_are_named(tiny: Path, tmp_path: Path) -> None:
    """Who has only those knows why it does not go on."""
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match=r"and pytorch_model\.bin cannot be read"):
        write_bert_gguf(tiny, tmp_path / "tiny.gguf")


def test_rows_that_blocks_do_not_fill(tiny: Path, tmp_path: Path) -> None:
    """A width that is no multiple of 32 is told, with what goes instead."""
    json_with("config.json", hidden_size=40)(tiny)
    write_weights(tiny, tiny_tensors(width=40))
    with pytest.raises(ModelError, match=r"token_embd\.weight has rows of 40 .*: take f16"):
        write_bert_gguf(tiny, tmp_path / "tiny.gguf", quantization="q8_0")
    assert write_bert_gguf(tiny, tmp_path / "tiny.gguf").exists()


def test_what_cannot_be_written_is_said_first(tiny: Path, tmp_path: Path) -> None:
    """Neither the model nor the place is looked at in vain."""
    with pytest.raises(InvalidRequestError, match="'q4_k_m', but it must be one of f32, f16, q8_0"):
        write_bert_gguf(tiny, tmp_path / "a.gguf", quantization="q4_k_m")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="is a folder"):
        write_bert_gguf(tiny, tiny)
    with pytest.raises(InvalidRequestError, match="there is no folder"):
        write_bert_gguf(tiny, tmp_path / "nowhere" / "a.gguf")


def test_without_the_extra_it_says_what_to_install(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gguf is not among what the library needs."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'orion-oie\[convert\]'") as caught:
        write_bert_gguf(tiny, tmp_path / "a.gguf")
    assert caught.value.details == {"extra": "convert"}


def test_a_file_is_the_old_one_or_the_new_one(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end in the middle leaves what was there, and nothing beside it."""
    file = write_bert_gguf(tiny, tmp_path / "tiny.gguf")
    before = file.read_bytes()
    write_tensors = GGUFWriter.write_tensors_to_file

    def fail(writer: GGUFWriter) -> None:
        write_tensors(writer)
        raise OSError("the disk is full")

    monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_bert_gguf(tiny, file, quantization="f32")
    assert file.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [tiny, file]


# -- the command


def test_the_command_says_how_to_name_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it prints is a models.json, and the model embeds."""
    out = tmp_path / "minilm.gguf"
    assert main(["convert", str(minilm_folder()), str(out), "--type", "q8_0"]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"{out}: {out.stat().st_size / 1e6:.1f} MB; a models.json with it:\n"
    (tmp_path / "models.json").write_text(shown.out, encoding="utf-8")
    registry = ModelRegistry.load(tmp_path / "models.json")
    (variant,) = registry.variants("minilm")
    assert (registry.model("minilm").type, variant.spec.quantization) == ("embedding", "Q8_0")
    config = config_with(
        cache_dir=tmp_path / "cache", keep_spare_worker=False, embeddings={"model": "minilm"}
    )
    with OrionInferenceEngine(registry, config) as engine:
        assert engine.embed(["Hello"]).shape == (1, 384)


def test_the_command_fails_in_words(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1 for what the library refuses, 2 for a type that there is not."""
    assert main(["convert", str(tmp_path / "gone"), str(tmp_path / "a.gguf")]) == 1
    assert capsys.readouterr().err == f"error: there is no folder {tmp_path / 'gone'}\n"
    assert main(["convert", str(tiny), str(tmp_path / "a.gguf"), "--type", "q4_0"]) == 2
    assert not (tmp_path / "a.gguf").exists()
