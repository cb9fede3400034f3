"""What a user's path names: the parts of a split model, and the right error for all else."""

import os
import socket
from pathlib import Path
from struct import pack
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny_llama

from orion_oie.errors import ModelCorruptError, ModelError, ModelNotFoundError
from orion_oie.models.formats.impostors import impostor
from orion_oie.models.split_files import (
    SplitName,
    check_gguf_file,
    split_name,
    split_parts,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    """A folder with one good model, `Model-Q4_K_M.gguf`."""
    (tmp_path / "Model-Q4_K_M.gguf").write_bytes(tiny.read_bytes())
    return tmp_path


def refused(path: Path | str, kind: type[ModelError] = ModelCorruptError) -> str:
    with pytest.raises(ModelError) as caught:
        check_gguf_file(path)
    assert type(caught.value) is kind
    assert caught.value.details["path"] in caught.value.message
    return caught.value.message


# -- names of splits


@settings(deadline=None)
@given(st.text("ab-01/.", min_size=1), st.integers(1, 400), st.integers(1, 400))
def test_names_of_splits_are_read_as_they_are_written(stem: str, number: int, count: int) -> None:
    """Any stem, also one that looks like a split itself; a number beyond the count is no split."""
    name = f"{stem}-{number:05d}-of-{count:05d}.gguf"
    expected = SplitName(stem, number, count) if number <= count else None
    assert split_name(name) == expected
    if expected is not None:
        assert expected.part(number) == name
        assert expected.parts[number - 1] == name


@settings(deadline=None)
@given(st.text())
def test_any_other_name_is_none(name: str) -> None:
    """Whatever is no split name gives None, and never an exception."""
    found = split_name(name)
    assert found is None or found.part(found.number).lower() == name.lower()


def test_all_parts_are_returned(tmp_path: Path) -> None:
    """In order, absolute, also for the parts that a real writer made; a whole file is alone."""
    first = write_tiny_llama(tmp_path / "m.gguf", tensors_per_file=10)
    parts = split_parts(first)
    assert len(parts) == 3
    assert [part.name for part in parts] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for part in parts:
        assert check_gguf_file(part).split_count == 3
    assert split_parts("x/whole.gguf") == (Path.cwd() / "x" / "whole.gguf",)


def test_missing_parts_are_listed(tmp_path: Path) -> None:
    """By name, with their number and the place where they belong."""
    names = SplitName("big", 1, 9).parts
    for name in names[:2]:
        (tmp_path / name).touch()
    with pytest.raises(ModelNotFoundError) as caught:
        split_parts(tmp_path / names[0])
    message = caught.value.message
    assert "7 of the 9 parts of this split model are missing: big-00003-of-00009.gguf" in message
    assert message.endswith(f"and 1 more; all of them belong into {tmp_path}")
    assert caught.value.details["missing"] == list(names[2:])


def test_another_part_than_the_first(tmp_path: Path) -> None:
    """The error names the first."""
    with pytest.raises(
        ModelNotFoundError, match=r"part 2 of 3 .* name the first part, /.*-00001-of"
    ):
        split_parts(tmp_path / "m-00002-of-00003.gguf")


def test_without_the_first_part_the_path_is_what_is_missing(tmp_path: Path) -> None:
    """The check of the file says it better than a list of all parts."""
    first = tmp_path / "m-00001-of-00003.gguf"
    assert split_parts(first) == (first,)
    assert "there is no such" in refused(first, ModelNotFoundError)


def test_a_part_that_was_renamed(tmp_path: Path) -> None:
    """The others cannot be found then, and llama.cpp refuses it too."""
    first = write_tiny_llama(tmp_path / "m.gguf", tensors_per_file=10)
    first.rename(tmp_path / "renamed.gguf")
    message = refused(tmp_path / "renamed.gguf", ModelError)
    assert "part 1 of 3" in message
    assert "NAME-00001-of-00003.gguf" in message


# -- what is a model


def test_a_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an absolute path, a relative one, one below the home, through a link, under any name."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    (folder / "sha256-0123").symlink_to("Model-Q4_K_M.gguf")
    for path in (folder / "Model-Q4_K_M.gguf", "Model-Q4_K_M.gguf", "~/Model-Q4_K_M.gguf",
                 "sha256-0123"):  # fmt: skip
        assert check_gguf_file(path).architecture == "llama"


def test_nothing_there(folder: Path) -> None:
    """The error suggests a neighbour: the same in another case first, then a close one, then
    all."""
    missing = ModelNotFoundError
    assert "did you mean 'Model-Q4_K_M.gguf'" in refused(folder / "model-q4_k_m.GGUF", missing)
    assert "did you mean 'Model-Q4_K_M.gguf'" in refused(folder / "Model-Q4_K_M", missing)
    assert "did you mean 'Model-Q4_K_M.gguf'" in refused(folder / "Model-Q4_KM.gguf", missing)
    assert "in its folder are Model-Q4_K_M.gguf" in refused(folder / "xyz", missing)
    message = refused(folder / "modles" / "deep" / "x.gguf", missing)
    assert f"{folder / 'modles'} does not exist" in message
    message = refused(folder / "Model-Q4_K_M.gguf" / "x.gguf", missing)
    assert "is a file, not a folder" in message


@pytest.mark.parametrize("path", ["", "a\0b.gguf", "x" * 5000])
def test_no_path_at_all(path: str) -> None:
    """Paths that the system does not take give the same type of error."""
    with pytest.raises(ModelNotFoundError):
        check_gguf_file(path)


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    """A broken link names its target; a circle of links ends."""
    (tmp_path / "a.gguf").symlink_to(tmp_path / "gone")
    message = refused(tmp_path / "a.gguf", ModelNotFoundError)
    assert f"a link to {tmp_path / 'gone'}, which does not exist" in message
    (tmp_path / "b.gguf").symlink_to("c.gguf")
    (tmp_path / "c.gguf").symlink_to("b.gguf")
    assert "symbolic links" in refused(tmp_path / "b.gguf", ModelNotFoundError)


def test_a_folder_lists_its_models(folder: Path) -> None:
    """Of a split model, the first part alone; other kinds of models are told."""
    for name in SplitName("big", 1, 3).parts:
        (folder / name).touch()
    message = refused(folder, ModelNotFoundError)
    assert message.endswith("GGUF files, Model-Q4_K_M.gguf, big-00001-of-00003.gguf")
    (folder / "empty").mkdir()
    assert "without any GGUF" in refused(folder / "empty", ModelNotFoundError)
    (folder / "empty" / "model.safetensors").touch()
    assert "convert it to GGUF" in refused(folder / "empty", ModelNotFoundError)


@pytest.mark.timeout(20)
def test_special_files_are_never_opened(tmp_path: Path) -> None:
    """Opening a pipe would block, reading a device would never end."""
    os.mkfifo(tmp_path / "pipe")
    assert "it is a pipe" in refused(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket"))
        assert "it is a socket" in refused(tmp_path / "socket")
    assert "it is a device" in refused("/dev/zero")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(folder: Path) -> None:
    """The system's reason."""
    (folder / "Model-Q4_K_M.gguf").chmod(0)
    assert "Permission denied" in refused(folder / "Model-Q4_K_M.gguf", ModelNotFoundError)


@pytest.mark.parametrize(
    "name",
    ["m.gguf.part", "blob.incomplete", "m.gguf.crdownload", "sha256-00-partial", "m.gguf.PARTIAL"],
)
def test_downloads_that_have_not_finished(tmp_path: Path, tiny: Path, name: str) -> None:
    """Even when they look whole: space may have been allocated in advance."""
    (tmp_path / name).write_bytes(tiny.read_bytes())
    assert "has not finished" in refused(tmp_path / name)


def test_a_download_that_is_still_beside_the_name(folder: Path) -> None:
    """The name that a download will have is missing for that reason; aria2 keeps notes beside."""
    (folder / "new.gguf.part").touch()
    message = refused(folder / "new.gguf", ModelNotFoundError)
    assert "has not finished (new.gguf.part is there)" in message
    (folder / "Model-Q4_K_M.gguf.aria2").touch()
    assert "has not finished" in refused(folder / "Model-Q4_K_M.gguf")


def test_pieces_of_a_cut_file(tmp_path: Path, tiny: Path) -> None:
    """Cut by hand, not by llama.cpp: they are joined, not loaded."""
    (tmp_path / "m.gguf-split-a").write_bytes(tiny.read_bytes())
    assert "join all pieces with 'cat'" in refused(tmp_path / "m.gguf-split-a")


SAFETENSORS = pack("<Q", 60) + b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(20)
CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty: download it again"),
    "page": (b"\n <!doctype html><html>", "a web page, not a model: use the download link"),
    "bom": (b"\xef\xbb\xbf<html>", "a web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "refused the download"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run 'git lfs pull'"),
    "json": (b'{"error":"Invalid username or password."}', "it says: 'Invalid username or"),
    "json object": (b'{"error": {"code": 5}}', 'it reports an "error"'),
    "config": (b'{"architectures": ["LlamaForCausalLM"]}', "give the path of the .gguf file"),
    "safetensors": (SAFETENSORS, "a safetensors file: convert"),
    "zip": (b"PK\3\4" + bytes(40), "a zip archive or a PyTorch checkpoint"),
    "pickle": (b"\x80\x02}q\0" + bytes(40), "a PyTorch checkpoint"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "a gzip archive: unpack it"),
    "xz": (b"\xfd7zXZ\0" + bytes(40), "an xz archive: unpack it"),
    "ggjt": (b"tjgg\3\0\0\0" + bytes(40), "an old GGML file"),
    "ggml": (b"lmgg\0\0\0\0" + bytes(40), "an old GGML file"),
    "zeros": (bytes(5000), "nothing but zeros"),
    "text": (b"404: Not Found", "it starts with b'404:', not with b'GGUF'"),
    "big": (b"GGUF" + pack(">IQQ", 3, 0, 0), "a big-endian GGUF file"),
    "new": (b"GGUF" + pack("<IQQ", 9, 0, 0), "GGUF version 9 is not supported"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_is_no_gguf_file(tmp_path: Path, kind: str) -> None:
    """Each is called by its name, with what to do."""
    content, expected = CONTENTS[kind]
    (tmp_path / "m.gguf").write_bytes(content)
    assert expected in refused(tmp_path / "m.gguf")


def test_a_file_that_was_cut_off(tmp_path: Path, tiny: Path) -> None:
    """The sizes by the header and on the disk; both are numbers to compare with the web page."""
    whole = tiny.read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: len(whole) // 2])
    message = refused(tmp_path / "m.gguf")
    assert f"it needs {len(whole)} bytes, but it has {len(whole) // 2}" in message


def write_gguf(path: Path, architecture: str, kind: str, **texts: Any) -> Path:
    writer = GGUFWriter(path, architecture)
    if kind:
        writer.add_type(kind)
    for name, text in texts.items():
        writer.add_string(name.replace("__", "."), text)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "kind", "expected"),
    [
        ("clip", "mmproj", "a projector for images"),
        ("clip", "", "a projector for images"),
        ("llama", "adapter", "an adapter (LoRA)"),
        ("imatrix", "imatrix", "an importance matrix"),
        ("controlvector", "", "a control vector"),
        ("llama", "", "a vocabulary without any weights"),
    ],
)
def test_sound_files_that_are_no_model(
    tmp_path: Path, architecture: str, kind: str, expected: str
) -> None:
    """They are not corrupt, but nothing answers with them."""
    path = write_gguf(tmp_path / "m.gguf", architecture, kind)
    message = refused(path, ModelError)
    assert expected in message
    assert "name the model's own file" in message


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_can_be_sniffed(start: bytes) -> None:
    """No exception, and a short answer without control characters."""
    found = impostor(start)
    assert found is None or (len(found.what) < 300 and found.what.isprintable())
