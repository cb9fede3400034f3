"""Weights in safetensors files: read as they are, or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.errors import ModelCorruptError, ModelError, ModelNotFoundError
from orion_oie.models.formats.safetensors import Safetensors

NUMBERS = np.array([[1.0, -2.5, 0.0], [65536.0, 2.0**-20, 3.140625]], np.float32)


def pack(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(kind: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


def file_of(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    """All tensors of a file of the original writer, with their shapes."""
    library = pytest.importorskip("safetensors.numpy")
    tensors = {
        "a": NUMBERS,
        "b": NUMBERS[:1].astype(np.float16),
        "none": np.zeros((0, 3), np.float32),
        "one": np.array(7, np.float32),
    }
    library.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = Safetensors(tmp_path / "model.safetensors")
    assert set(found) == set(tensors)
    assert len(found) == 4
    for name, tensor in tensors.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == tensor.shape
        np.testing.assert_array_equal(found[name], tensor)


def test_brain_floats_are_the_upper_half(tmp_path: Path) -> None:
    """These numbers have no more digits than bfloat16 has, so nothing of them is lost."""
    halves = (NUMBERS.view(np.uint32) >> 16).astype("<u2").tobytes()
    path = file_of(tmp_path, pack({"a": entry("BF16", [2, 3], 0, 12)}, halves))
    np.testing.assert_array_equal(Safetensors(path)["a"], NUMBERS)


def test_other_numbers_are_refused_when_they_are_asked_for(tmp_path: Path) -> None:
    """A file may have integers that nobody needs."""
    header = {"ids": entry("I64", [1], 0, 8), "a": entry("F32", [1], 8, 12)}
    found = Safetensors(file_of(tmp_path, pack(header, bytes(12))))
    assert found["a"].tolist() == [0.0]
    with pytest.raises(ModelError, match="ids is of type I64; F32, F16, BF16 can be read"):
        found["ids"]
    with pytest.raises(KeyError):
        found["b"]


FAULTS = {
    "empty": (b"", "is empty"),
    "shorter than a length": (b"\1\0\0", "has 3 bytes"),
    "header beyond the end": (pack({})[:-1], "header would end at"),
    "length of all bits": (b"\xff" * 20, "header would end at"),
    "no JSON": ((5).to_bytes(8, "little") + b"hello", "not JSON"),
    "no UTF-8": ((2).to_bytes(8, "little") + b"\xff\xff", "not JSON"),
    "no object": (pack([1, 2]), "not a JSON object"),
    "no place": (pack({"a": {"dtype": "F32", "shape": [1]}}), "says no place of a"),
    "no shape": (pack({"a": entry("F32", None, 0, 4)}, bytes(4)), "says no place"),  # type: ignore[arg-type]
    "an entry that is none": (pack({"a": 1}), "says no place of a"),
    "beyond the end": (pack({"a": entry("F32", [2], 0, 8)}, bytes(7)), "of shape"),
    "in the header": (pack({"a": entry("F32", [1], -4, 0)}, bytes(4)), "of shape"),
    "backwards": (pack({"a": entry("F32", [1], 4, 0)}, bytes(4)), "of shape"),
    "more numbers than bytes": (pack({"a": entry("F32", [3], 0, 8)}, bytes(8)), "of shape"),
    "sides below zero": (pack({"a": entry("F32", [-1, -2], 0, 8)}, bytes(8)), "of shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_refused(fault: str, tmp_path: Path) -> None:
    """By name, with what is wrong."""
    content, message = FAULTS[fault]
    path = file_of(tmp_path, content)
    with pytest.raises(ModelCorruptError, match=message) as caught:
        Safetensors(path)["a"]
    assert caught.value.details == {"path": str(path)}


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    """It is no damaged one."""
    with pytest.raises(ModelNotFoundError, match=r"no file .*gone"):
        Safetensors(tmp_path / "gone")


@given(place=st.integers(0, 110), byte=st.integers(0, 255), cut=st.integers(0, 30))
def test_whatever_is_wrong_with_it(
    place: int, byte: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A byte that changed or an end that is gone gives numbers or a `ModelError`."""
    good = pack({"a": entry("F32", [2, 3], 0, 24), "b": entry("F16", [2], 24, 28)}, bytes(28))
    bad = bytearray(good)
    bad[place] = byte
    path = file_of(tmp_path_factory.getbasetemp(), bytes(bad[: len(bad) - cut]))
    try:
        found = Safetensors(path)
        shapes = [found[name].shape for name in found]
    except ModelError:
        return
    assert len(shapes) == len(found)
