"""What a model takes is known before it is loaded: against llama.cpp's own account, and against
real workers."""

import mmap
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from dryrun import DryRun, dry_run
from helpers import BOUND_S, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import LoopbackServer
from minilm import write_minilm
from outlines import write_outline
from tiny import broken_files, write_tiny_llama, write_tiny_recurrent, write_tiny_windowed

from orion_oie.backends.base import Footprint, GenerationJob, LoadSpec
from orion_oie.backends.fake import FAKE_BYTES, FakeBackend
from orion_oie.backends.llama.host import loader
from orion_oie.backends.llama.host.client import LlamaModel
from orion_oie.backends.llama.host.footprint import (
    EMBEDDED_TEXTS,
    EMBEDDED_TOKENS,
    Use,
    discardable_runs,
    estimate,
    footprint,
    repacked,
)
from orion_oie.backends.llama.host.loader import (
    LlamaBackend,
    LoaderSettings,
)
from orion_oie.backends.llama.host.scratch import (
    Batch,
    buffer_bytes,
)
from orion_oie.backends.llama.host.shape import shape_of
from orion_oie.backends.llama.worker import native
from orion_oie.backends.llama.worker.embedder import (
    BATCH_TEXTS,
    BATCH_TOKENS,
)
from orion_oie.cancellation import CancelScope
from orion_oie.errors import ModelCorruptError, ModelNotFoundError
from orion_oie.hardware.cpu import this_cpu
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.formats.gguf import read_header
from orion_oie.models.specs import SourceSpec
from orion_oie.schemas.requests import (
    GenerationOptions,
    Message,
)
from orion_oie.schemas.results import ModelInfo

INFO = ModelInfo(model_id="m", variant="v", name="M", version="1", license="?")
MIB = 2**20
ROUNDED_MIB = 0.0051  # the log has two places
SLOTS = 4

on_linux = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="this system does not say what is resident"
)


@pytest.fixture(scope="module")
def llama() -> Iterator[DryRun]:
    with dry_run() as process:
        yield process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def use_of(**given: Any) -> Use:
    return Use(**{"context_length": 2048, "slots": SLOTS, "threads": 2, **given})


def footprint_of(*files: Path, **given: Any) -> Footprint:
    headers = [read_header(file) for file in files]
    return footprint(headers, use_of(**given), this_cpu().features)


def buffer_mib(file: Path, context_length: int, sequences: int, batch_tokens: int = 512) -> float:
    cells = -(-context_length // 256) * 256
    batch = Batch(min(context_length, batch_tokens), sequences, cells, sequences)
    return buffer_bytes(shape_of([read_header(file)]), batch) / MIB


# -- against llama.cpp's account


@settings(deadline=None, max_examples=50)  # it asks another process
@given(
    architecture=st.sampled_from(["llama", "qwen3"]),
    width=st.integers(1, 40).map(lambda n: 32 * n),
    ffn=st.integers(1, 80).map(lambda n: 32 * n),
    heads=st.sampled_from([(4, 4), (8, 2), (6, 3), (8, 1)]),
    head=st.sampled_from([32, 64, 128]),
    vocabulary=st.sampled_from([300, 20_000]),
    context_length=st.integers(16, 6000),
    slots=st.integers(1, 9),
    batch_tokens=st.sampled_from([512, 2048]),
)
def test_plain_decoders_are_known_exactly(
    llama: DryRun,
    folder: Path,
    architecture: str,
    width: int,
    ffn: int,
    heads: tuple[int, int],
    head: int,
    vocabulary: int,
    context_length: int,
    slots: int,
    batch_tokens: int,
) -> None:
    """Whatever the shape and the settings: cache, buffer and logits are as llama.cpp says, but for
    some kilobytes."""
    file = write_outline(
        folder / "plain.gguf",
        architecture=architecture,
        width=width,
        ffn=ffn,
        heads=heads[0],
        kv_heads=heads[1],
        head=head,
        vocabulary=vocabulary,
    )
    sequences = slots + 2
    said = llama.ask(
        file, context_length=context_length, sequences=sequences, batch_tokens=batch_tokens
    )
    ours = buffer_mib(file, context_length, sequences, batch_tokens)
    assert ours == pytest.approx(said["buffer"], abs=3 * ROUNDED_MIB)
    told = footprint_of(file, context_length=context_length, slots=slots)
    assert told.kv_bytes / MIB == pytest.approx(said["kv"], abs=ROUNDED_MIB)
    assert sequences * vocabulary * 4 / MIB == pytest.approx(said["output"], abs=ROUNDED_MIB)


OTHERS: dict[str, tuple[dict[str, Any], float]] = {
    "two experts of eight": ({"experts": 8, "used_experts": 2}, 0.001),
    "eight experts of 64": ({"experts": 64, "used_experts": 8, "ffn": 64}, 0.001),
    "sliding window": ({"architecture": "gemma3", "layers": 7, "window": 64}, 0.001),
    "fused matrices": ({"architecture": "phi3"}, 0.001),
    "recurrent": ({"architecture": "mamba", "width": 512}, 0.02),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_are_known_closely(llama: DryRun, folder: Path, kind: str) -> None:
    """Experts, windows and fused matrices as well, recurrent states within two percent."""
    given_shape, tolerance = OTHERS[kind]
    file = write_outline(folder / "other.gguf", **given_shape)
    shape = shape_of([read_header(file)])
    sequences = SLOTS if shape.window or shape.is_recurrent else SLOTS + 2
    said = llama.ask(file, context_length=4096, sequences=sequences)
    assert buffer_mib(file, 4096, sequences) == pytest.approx(said["buffer"], rel=tolerance)
    told = footprint_of(file, context_length=4096)
    assert told.kv_bytes / MIB == pytest.approx(said["kv"] + said["state"], abs=2 * ROUNDED_MIB)


def test_the_real_model_is_known_exactly(llama: DryRun, smollm2: Path) -> None:
    """Cache and buffer of SmolLM2 are as llama.cpp says."""
    said = llama.ask(smollm2, context_length=4096)
    assert buffer_mib(smollm2, 4096, SLOTS + 2) == pytest.approx(said["buffer"], abs=ROUNDED_MIB)
    told = footprint_of(smollm2, context_length=4096)
    assert told.kv_bytes / MIB == pytest.approx(said["kv"], abs=ROUNDED_MIB)


@pytest.mark.parametrize("vocabulary", [8000, 8004])
@pytest.mark.parametrize("has_output", [True, False])
@pytest.mark.parametrize(
    "weights", ["F16", "Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_NL"]
)
def test_what_is_copied_is_known(
    llama: DryRun, folder: Path, weights: str, has_output: bool, vocabulary: int
) -> None:
    """The matrices that llama.cpp copies on this machine: of some types, with a number of rows that
    fits; and of embeddings those that are the output matrix, too."""
    file = write_outline(
        folder / "copied.gguf", weights=weights, has_output=has_output, vocabulary=vocabulary
    )
    said = llama.ask(file, has_weights=True)
    told = footprint_of(file)
    assert told.repacked_bytes / MIB == pytest.approx(said["repacked"], abs=ROUNDED_MIB)
    stored_bytes = sum(tensor.n_bytes for tensor in read_header(file).tensors)
    embeddings_bytes = read_header(file).tensors[0].n_bytes
    assert told.weights_bytes == told.mapped_bytes + told.repacked_bytes
    assert told.weights_bytes - stored_bytes in (0, embeddings_bytes)


def test_experts_are_copied_too(llama: DryRun, folder: Path) -> None:
    """A matrix of several experts counts whole."""
    file = write_outline(folder / "experts.gguf", experts=8, used_experts=2)
    said = llama.ask(file, has_weights=True)
    assert footprint_of(file).repacked_bytes / MIB == pytest.approx(
        said["repacked"], abs=ROUNDED_MIB
    )


def test_the_processor_has_what_llama_cpp_was_built_for(llama: DryRun) -> None:
    """The features that decide what is copied are those that llama.cpp uses here."""
    deciding = {"AVX2", "AVX512", "DOTPROD", "AMX_INT8"}
    assert deciding & set(this_cpu().features) == deciding & llama.features()


# -- the parts


def test_split_models_are_one(tmp_path: Path) -> None:
    """A model in several files takes what it takes in one."""
    whole = write_tiny_llama(tmp_path / "whole.gguf", weights="Q4_0")
    write_tiny_llama(tmp_path / "split.gguf", weights="Q4_0", tensors_per_file=5)
    parts = sorted(tmp_path.glob("split-*"))
    assert len(parts) > 2
    assert footprint_of(*parts) == footprint_of(whole)


@pytest.mark.parametrize(("asked", "cells"), [(1, 256), (1000, 1024), (None, 2048), (9999, 2048)])
def test_the_context_is_what_the_worker_makes_of_it(
    tmp_path: Path, asked: int | None, cells: int
) -> None:
    """The cache comes in steps of 256 cells, and is no longer than the model was trained for."""
    file = write_tiny_llama(tmp_path / "tiny.gguf", layers=2, width=64, context_length=2048)
    kept = 2 * 2 * 32 * 2  # two layers, keys and values of two heads of 16, half floats
    assert footprint_of(file, context_length=asked).kv_bytes == kept * cells


def test_what_is_offloaded_is_growth(tmp_path: Path) -> None:
    """States outside the cache may take what was allowed, or as much as the cache has; it is no
    more at the beginning when more is offloaded."""
    file = write_tiny_llama(tmp_path / "tiny.gguf")
    none, some, default = (footprint_of(file, host_cache_bytes=n) for n in (0, 10 * MIB, None))
    assert none.total_bytes == some.total_bytes == default.total_bytes
    assert some.growth_bytes - none.growth_bytes == 10 * MIB
    assert default.growth_bytes - none.growth_bytes == default.kv_bytes
    assert some.max_bytes == some.total_bytes + some.growth_bytes


def test_threads_and_an_idle_worker_count(tmp_path: Path) -> None:
    """Each thread has a place to work in; what an idle worker takes is part of every model."""
    file = write_tiny_llama(tmp_path / "tiny.gguf")
    assert footprint_of(file, threads=9).compute_bytes > footprint_of(file, threads=8).compute_bytes
    headers = [read_header(file)]
    one, other = (footprint(headers, use_of(), (), process_bytes=n) for n in (MIB, 3 * MIB))
    assert other.process_bytes - one.process_bytes == 2 * MIB


def test_texts_are_counted_in_the_batches_of_the_embedder() -> None:
    """The numbers are written twice, so that an estimate need not import the embedder."""
    assert (EMBEDDED_TOKENS, EMBEDDED_TEXTS) == (BATCH_TOKENS, BATCH_TEXTS)


def test_an_embedding_model_grows_with_its_texts(tmp_path: Path) -> None:
    """An encoder has no cache; a decoder that embeds has one for its longest text, which may take
    much more than the usual ones."""
    encoder = footprint_of(write_minilm(tmp_path / "minilm.gguf"), is_embedding=True)
    assert encoder.kv_bytes == 0
    outputs = (512 - 128) * 30522 * 4  # it reads 512 tokens at most
    assert outputs < encoder.growth_bytes < 1.5 * outputs
    file = write_outline(tmp_path / "decoder.gguf", vocabulary=20_000)
    decoder = footprint_of(file, is_embedding=True, context_length=2048)
    assert 0 < decoder.kv_bytes < footprint_of(file, context_length=2048).kv_bytes
    assert decoder.growth_bytes > 3 * 512 * 20_000 * 4


@pytest.mark.parametrize("weights", ["Q4_0", "F32"])
def test_discardable_pages_hold_nothing_else(tmp_path: Path, weights: str) -> None:
    """Whole pages, each inside of tensors that were copied; none where nothing is copied."""
    file = write_tiny_llama(tmp_path / "tiny.gguf", width=256, ffn=512, weights=weights)
    header = read_header(file)
    runs = discardable_runs([header], ["AVX2"])
    assert bool(runs) == (weights == "Q4_0")
    for number, start, end in runs:
        assert number == 0
        assert start % mmap.PAGESIZE == end % mmap.PAGESIZE == 0
        inside = [t for t in header.tensors if t.offset < end and t.offset + t.n_bytes > start]
        assert {t.type_name for t in inside} == {"Q4_0"}
        assert "token_embd.weight" not in {t.name for t in inside}
    assert sum(t.n_bytes for _, t in repacked([header], ["AVX2"])) >= sum(
        end - start for _, start, end in runs
    )


@pytest.mark.parametrize(
    ("megabytes", "shape"),
    [
        (105, {"layers": 30, "width": 576, "ffn": 1536, "heads": 9, "kv_heads": 3}),
        (608, {"layers": 16, "width": 2048, "ffn": 8192, "heads": 32, "kv_heads": 8}),
        (4600, {"layers": 32, "width": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8}),
    ],
)
def test_a_guess_is_near(tmp_path: Path, megabytes: int, shape: dict[str, int]) -> None:
    """Of models as they usually are, the size of the files alone tells what they take within a
    third."""
    file = write_outline(tmp_path / "usual.gguf", vocabulary=50_000, merges=50_000, **shape)
    use = use_of(context_length=4096)
    told = footprint([read_header(file)], use, this_cpu().features)
    guess = estimate(megabytes * 1_000_000, use, is_arriving=False)
    assert guess.total_bytes == pytest.approx(told.total_bytes, rel=1 / 3)
    assert estimate(megabytes * 1_000_000, use).max_bytes > guess.max_bytes


# -- what the backend says


def spec_of(file: Path, **given: Any) -> LoadSpec:
    return LoadSpec(INFO, (file,), **{"context_length": 2048, "host_cache_bytes": 0, **given})


def test_unusable_files_are_refused_like_by_a_load(tmp_path: Path) -> None:
    """A missing file is not found, a broken one corrupt."""
    with pytest.raises(ModelNotFoundError):
        LlamaBackend().footprint(spec_of(tmp_path / "absent.gguf", expected_bytes=1000))
    good = write_tiny_llama(tmp_path / "good.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(broken_files(good)["truncated data"])
    with pytest.raises(ModelCorruptError):
        LlamaBackend().footprint(spec_of(broken))


def test_a_model_that_is_elsewhere_is_guessed(tmp_path: Path) -> None:
    """From the size that the registry tells; without one, it is not found. That it will be computed
    while it arrives takes more later."""
    source = SourceSpec(url="http://localhost/", shards=["far.gguf"])
    spec = spec_of(tmp_path / "far.gguf", source=source, expected_bytes=10**9)
    told = LlamaBackend().footprint(spec)
    assert told.total_bytes > 10**9
    plain = LlamaBackend(LoaderSettings(is_progressive=False)).footprint(spec)
    assert plain.total_bytes == told.total_bytes
    assert plain.max_bytes < told.max_bytes
    with pytest.raises(ModelNotFoundError, match="its size is not known"):
        LlamaBackend().footprint(spec_of(tmp_path / "far.gguf", source=source))


def test_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is looked into once, however often it is asked for and however it is to be used; again
    when it changed."""
    read: list[Path] = []

    def counting(path: Path) -> Any:
        read.append(path)
        return read_header(path)

    monkeypatch.setattr(loader, "check_gguf_file", counting)
    file = write_tiny_llama(tmp_path / "tiny.gguf", layers=2)
    backend = LlamaBackend()
    small = backend.footprint(spec_of(file))
    assert backend.footprint(spec_of(file)) == small
    assert backend.footprint(spec_of(file, slots=9)).compute_bytes > small.compute_bytes
    assert len(read) == 1
    write_tiny_llama(file, layers=3)
    assert backend.footprint(spec_of(file)).weights_bytes > small.weights_bytes
    assert len(read) == 2


def test_the_fake_takes_what_it_is_told_to() -> None:
    """By the key of a load, or by the model; any other takes a little, beside what it is said to
    have."""
    backend = FakeBackend(footprints={"m": 5000, "m@large": 9000})
    spec = LoadSpec(INFO, ())
    large = replace(spec, info=INFO.model_copy(update={"variant": "large"}))
    assert backend.footprint(spec).total_bytes == 5000
    assert backend.footprint(large).total_bytes == 9000
    plain = FakeBackend().footprint(replace(spec, expected_bytes=10**9))
    assert plain.total_bytes == 10**9 + FAKE_BYTES


# -- against real workers


def ask(model: LlamaModel, question: str, max_tokens: int = 8) -> tuple[str, int]:
    """The answer, and how long the prompt was in tokens."""
    pieces: list[str] = []
    options = GenerationOptions(temperature=0.0, max_tokens=max_tokens)
    job = GenerationJob((Message(role="user", content=question),), options)
    done = model.generate(job, CancelScope(), lambda text, _tokens: pieces.append(text))
    return "".join(pieces), done.usage.prompt_tokens


def loaded(backend: LlamaBackend, spec: LoadSpec) -> LlamaModel:
    return backend.load(spec, CancelScope(), lambda _progress: None)


def resident_bytes(model: LlamaModel) -> int:
    return int(psutil.Process(model.pid).memory_info().rss)


def write(kind: str, path: Path) -> Path:
    if kind == "recurrent":
        return write_tiny_recurrent(path, context_length=2048)
    if kind == "sliding window":
        return write_tiny_windowed(path, context_length=2048)
    return write_tiny_llama(path, context_length=2048, weights=kind)  # type: ignore[arg-type]


@on_linux
@pytest.mark.parametrize("kind", ["F16", "Q4_0", "recurrent", "sliding window"])
def test_a_tiny_worker_takes_what_was_told(tmp_path: Path, kind: str) -> None:
    """Within 10 % of what is resident after a long prompt and short ones: hardly any of it is the
    model's own."""
    backend = LlamaBackend()
    spec = spec_of(write(kind, tmp_path / "tiny.gguf"))
    model = loaded(backend, spec)
    try:
        assert ask(model, "hello " * 330)[1] > 600
        for number in range(3):
            ask(model, f"hello {number}")
        assert backend.footprint(spec).total_bytes == pytest.approx(resident_bytes(model), rel=0.1)
    finally:
        model.close()


@on_linux
def test_the_real_worker_takes_what_was_told(smollm2: Path) -> None:
    """Within 10 % for SmolLM2, with a cache of 4096 tokens, after a prompt read in large pieces."""
    backend = LlamaBackend()
    spec = spec_of(smollm2, context_length=4096)
    model = loaded(backend, spec)
    try:
        assert ask(model, "word " * 670)[1] > 680
        ask(model, "Hello?")
        assert backend.footprint(spec).total_bytes == pytest.approx(resident_bytes(model), rel=0.1)
    finally:
        model.close()


@on_linux
def test_an_embedding_worker_takes_what_was_told(tmp_path: Path) -> None:
    """Within 10 % for MiniLM, after a full batch of texts."""
    backend = LlamaBackend()
    spec = spec_of(write_minilm(tmp_path / "minilm.gguf"), is_embedding=True)
    model = loaded(backend, spec)
    try:
        model.embed(["hello world " * 30] * 8, CancelScope())
        assert backend.footprint(spec).total_bytes == pytest.approx(resident_bytes(model), rel=0.1)
    finally:
        model.close()


@on_linux
def test_room_for_a_long_text_is_given_back(tmp_path: Path) -> None:
    """After texts of 500 tokens, of which each needs 60 MB, a worker takes what it took before."""
    model = loaded(LlamaBackend(), spec_of(write_minilm(tmp_path / "m.gguf"), is_embedding=True))
    try:
        model.embed(["hello world " * 60, "hello world"], CancelScope())
        before = resident_bytes(model)
        for words in (200, 500, 300):
            model.embed(["hello world " * 30] * 3 + ["cat " * words], CancelScope())
            model.embed(["hello world"], CancelScope())
            assert resident_bytes(model) < before + 6 * MIB
    finally:
        model.close()


@on_linux
def test_an_idle_worker_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was believed of an idle worker is forgotten with the first load."""
    monkeypatch.setattr(loader, "PROCESS_BYTES", 10**9)
    backend = LlamaBackend()
    spec = spec_of(write_tiny_llama(tmp_path / "tiny.gguf"))
    assert backend.footprint(spec).process_bytes > 10**9
    loaded(backend, spec).close()
    assert backend.footprint(spec).process_bytes < 200 * MIB


# -- pages that are given back


def file_bytes(model: LlamaModel) -> int:
    """Pages of files in a worker's memory."""
    status = Path(f"/proc/{model.pid}/status").read_text()
    found = re.search(r"RssFile:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 12 MB, most of which is copied when it is loaded."""
    file = tmp_path_factory.mktemp("copied") / "tiny.gguf"
    write_tiny_llama(file, layers=6, width=512, ffn=2048, heads=8, weights="Q4_0")
    if not discardable_runs([read_header(file)], this_cpu().features):
        pytest.skip("llama.cpp copies nothing on this machine")
    return file


@on_linux
def test_copied_weights_are_there_once(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a load, the pages of weights that were copied are no longer in the worker's memory; its
    answers are the same."""
    runs = discardable_runs([read_header(copied)], this_cpu().features)
    # What lies at the end of the file, llama.cpp gives back by itself.
    max_bytes = 0.8 * sum(end - start for _, start, end in runs)
    question, backend = "hello world, hello world", LlamaBackend()
    with monkeypatch.context() as patch:
        patch.setattr(loader, "discardable_runs", lambda _headers, _features: [])
        model = loaded(backend, spec_of(copied))
        answer = ask(model, question, 40)
        before = file_bytes(model)
        model.close()
    model = loaded(backend, spec_of(copied))
    try:
        assert ask(model, question, 40) == answer
        wait_until(lambda: file_bytes(model) < before - max_bytes)
        assert ask(model, question, 40) == answer
        assert file_bytes(model) < before - max_bytes
    finally:
        model.close()


@on_linux
@pytest.mark.usefixtures("only_this_machine")
def test_weights_that_arrived_are_there_once(copied: Path, tmp_path: Path) -> None:
    """A model that was computed while it arrived is in memory like any other in the end."""
    local = loaded(LlamaBackend(), spec_of(copied))
    ask(local, "hello")
    with LoopbackServer(copied.parent) as server:
        cache = ModelCache(tmp_path / "cache")
        source = SourceSpec(url=server.url, shards=[copied.name])
        spec = replace(spec_of(copied), files=cache.paths(source), source=source)
        arrived = loaded(LlamaBackend(cache=cache), spec)
        try:
            ask(arrived, "hello")
            arrived.completion.result(BOUND_S)
            assert arrived.load_progress.mode == "progressive"
            wait_until(lambda: file_bytes(arrived) < file_bytes(local) + 4 * MIB)
        finally:
            arrived.close()
            local.close()


def mapped_kb(path: Path) -> int:
    """How much of a file this process has in memory."""
    parts = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    ours = [part for part in parts if part.split("\n", 1)[0].endswith(str(path))]
    return sum(int(found) for part in ours for found in re.findall(r"Rss:\s+(\d+) kB", part))


@on_linux
def test_only_the_runs_are_released(tmp_path: Path) -> None:
    """What is inside the runs leaves the memory, what is outside stays; all can still be read.
    Links make no difference, nor do files that are not mapped."""
    page, pages = mmap.PAGESIZE, 64
    content = bytes(number for number in range(pages) for _ in range(page))
    file, link, other = (tmp_path / name for name in ("a file.gguf", "link.gguf", "other.gguf"))
    file.write_bytes(content)
    other.write_bytes(content)
    link.symlink_to(file)
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapping,
    ):
        assert mapping[:] == content
        whole = mapped_kb(file)
        native.release_pages([other, link], [(1, 4 * page, 20 * page), (0, 0, pages * page)])
        assert mapped_kb(file) == whole - 16 * page // 1024
        native.release_pages([link], [(0, 60 * page, 99 * page)])
        assert mapped_kb(file) == whole - 20 * page // 1024
        assert mapping[:] == content
