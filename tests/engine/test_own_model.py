"""One's own model: named in one line, checked where it is named, and never replaced in silence."""

import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from helpers import BOUND_S, Running, config_with
from tiny import write_tiny_llama

from orion_oie import (
    AgentModels,
    AgentSpec,
    DigestMismatchError,
    Event,
    InvalidRequestError,
    ModelCorruptError,
    ModelError,
    ModelNotFoundError,
    ModelRegistry,
    OrionInferenceEngine,
    RegistryError,
)
from orion_oie.backends.fake import FakeAnswer, FakeBackend
from orion_oie.errors import OrionError

QUICK: dict[str, Any] = {
    "slots": 1,
    "threads": 1,
    "context_length": 256,
    "keep_spare_worker": False,
    "predictive": False,
    "stages": ["explicit", "hints", "sessions", "linear"],
}
NOISE = {"max_tokens": 4, "seed": 1}


def engine_with(
    model: str | Path | None, registry: ModelRegistry | Path | None = None, **config: Any
) -> OrionInferenceEngine:
    return OrionInferenceEngine(registry, config_with(**{**QUICK, **config}), model=model)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the user's own."""
    return write_tiny_llama(
        tmp_path_factory.mktemp("own") / "mine.gguf", token_bias={"<|im_end|>": -40}
    )


# One line of Python, one of shell


def test_two_lines_of_python(smollm2: Path, tmp_path: Path) -> None:
    """A program of two lines, beside the file, answers with it; the name is relative."""
    (tmp_path / "mine.gguf").symlink_to(smollm2)
    program = textwrap.dedent(
        """\
        from orion_oie import OrionInferenceEngine
        print(OrionInferenceEngine(model="mine.gguf").infer("Name France's capital", temperature=0))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Paris" in done.stdout


def test_every_agent_answers_with_it(own: Path) -> None:
    """Routing chooses the persona; the model is the named one, and it stands in for nothing."""
    with engine_with(own) as engine:
        for agent in ("code", "creative", "conversation"):
            result = engine.infer("Hello?", agent=agent, **NOISE)
            assert (result.agent_id, result.model_id) == (agent, "mine")
            assert (result.is_stand_in, result.wanted_model_id) == (False, "mine")
        assert list(engine.stats().models) == ["mine@f16"]
        assert engine.stats().stand_ins == 0
        assert engine.health().status == "healthy"


def test_all_facts_come_from_the_header(own: Path) -> None:
    """Only the path was given."""
    with engine_with(own) as engine:
        model = engine.infer("Hello?", **NOISE).receipt.model
    assert model is not None
    assert (model.name, model.architecture, model.quantization) == ("tiny", "llama", "F16")
    assert model.license == "apache-2.0"
    assert (model.size_bytes, model.context_length) == (own.stat().st_size, 256)


def test_a_path_is_absolute_at_once(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that changes its directory afterwards still has its model."""
    monkeypatch.chdir(own.parent)
    with engine_with("mine.gguf") as engine:
        monkeypatch.chdir(tmp_path)
        assert engine.infer("Hello?", **NOISE).model_id == "mine"


def test_a_registry_is_absolute_at_once(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths in a registry file start at its folder, whatever the directory is later."""
    (own.parent / "models.json").write_text(
        json.dumps({"extends": "packaged", "models": {"mine": {"source": {"path": "mine.gguf"}}}})
    )
    monkeypatch.chdir(own.parent)
    registry = ModelRegistry.load("models.json")
    monkeypatch.chdir(tmp_path)
    with engine_with("mine", registry) as engine:
        assert engine.infer("Hello?", **NOISE).model_id == "mine"


@pytest.mark.parametrize("spelled", ["~/mine.gguf", "{path}", "file://{path}", "./mine.gguf"])
def test_a_path_is_spelled_in_many_ways(
    own: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    """Each means the same file."""
    monkeypatch.setenv("HOME", str(own.parent))
    monkeypatch.chdir(own.parent)
    registry = ModelRegistry.packaged()
    found = registry.add_gguf(spelled.format(path=own))
    assert found == "mine"
    assert registry.models["mine"].variants["f16"].source.path == str(own)
    assert registry.add_gguf(own) == "mine"  # it is known already


def test_a_split_model_is_named_by_its_first_file(tmp_path: Path) -> None:
    """All its parts are found, and its id does not count them."""
    first = write_tiny_llama(tmp_path / "parts.gguf", tensors_per_file=4)
    assert "-00001-of-" in first.name
    with engine_with(first) as engine:
        result = engine.infer("Hello?", **NOISE)
    assert result.model_id == "parts"
    assert result.receipt.model is not None
    size = sum(file.stat().st_size for file in tmp_path.glob("*.gguf"))
    assert result.receipt.model.size_bytes == size


# For one request


def test_a_request_names_its_model(own: Path, smollm2: Path) -> None:
    """By a path, an id or a variant; the next request is as before."""
    with engine_with(own) as engine:
        other = engine.infer("Hello?", model=smollm2, **NOISE)
        assert (other.model_id, other.is_stand_in) == ("SmolLM2-135M-Instruct.Q4_1", False)
        assert other.wanted_model_id == other.model_id
        by_id = engine.infer("Hello?", model="smollm2-135m-instruct@q4_1", **NOISE)
        assert (by_id.model_id, by_id.variant) == ("smollm2-135m-instruct", "q4_1")
        assert engine.plan("Hello?", model=smollm2).model is not None
        assert engine.infer("Hello?", **NOISE).model_id == "mine"


def test_a_request_falls_back_to_nothing(make_engine: Callable[..., Any]) -> None:
    """Whoever names a model gets it or its error, not the agent's others."""
    backend = FakeBackend(
        {"*": FakeAnswer("yes")}, load_errors={"named": [ModelCorruptError("bad")]}
    )
    engine = make_engine(backend, {"conversation": ["main", "spare"], "other": ["named"]})
    with pytest.raises(ModelCorruptError, match="bad"):
        engine.infer("Hello?", agent="conversation", model="named")
    assert engine.infer("Hello?", agent="conversation", model="spare").model_id == "spare"
    assert engine.infer("Hello?", agent="conversation").model_id == "main"


def test_a_named_model_is_not_pinned_with_the_agent(make_engine: Callable[..., Any]) -> None:
    """What one request names may be evicted again, also where the agent's own models may not."""
    engine = make_engine(
        agents={"conversation": ["main"], "other": ["named"]}, pinned=["conversation"]
    )
    engine.infer("Hello?", agent="conversation", model="named")
    engine.infer("Hello?", agent="conversation")
    models = engine.stats().models
    assert (models["named@q4"].is_pinned, models["main@q4"].is_pinned) == (False, True)


def test_many_threads_name_many_models(tmp_path: Path) -> None:
    """Each gets its own, and none of them is lost."""
    files = [write_tiny_llama(tmp_path / f"m{n}.gguf", seed=n) for n in range(6)]
    registry = ModelRegistry.packaged()
    running = [Running(lambda file=file: registry.add_gguf(file)) for file in files * 4]
    found = {one.join() for one in running}
    assert found == {f"m{n}" for n in range(6)}
    assert found <= set(registry.models)


def test_files_of_one_name_are_two_models(tmp_path: Path) -> None:
    """Their ids differ, and are the same again the next time."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tiny_llama(tmp_path / folder / "model.gguf")
    registry = ModelRegistry.packaged()
    first, second = (registry.add_gguf(tmp_path / f / "model.gguf") for f in ("a", "b"))
    assert first == "model"
    assert second.startswith("model-")
    assert registry.add_gguf(tmp_path / "b" / "model.gguf") == second


def test_a_file_of_the_registry_is_that_model(own: Path, tmp_path: Path) -> None:
    """It is not loaded a second time under another name."""
    path = tmp_path / "models.json"
    models = {"known": {"source": {"path": str(own)}}}
    path.write_text(json.dumps({"extends": "packaged", "models": models}))
    registry = ModelRegistry.load(path)
    assert registry.add_gguf(own) == "known"
    both = {"source": {"path": str(own)}}, {"source": {"path": str(tmp_path / "other.gguf")}}
    registry = ModelRegistry.packaged()
    registry.add_model("two", {"variants": dict(zip(("a", "b"), both, strict=True))})
    assert registry.add_gguf(own) == "mine"  # this file, and no other variant


def test_names_that_lack_their_ending(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file beside the program is suggested, and nothing that is only alike by its ending."""
    monkeypatch.chdir(own.parent)
    for name in ("mine", "mine.guf", "mien"):
        with pytest.raises(ModelNotFoundError, match=r"did you mean 'mine\.gguf'"):
            engine_with(name)
    with pytest.raises(ModelNotFoundError) as caught:
        engine_with("zzzz.gguf")
    assert "did you mean" not in caught.value.message


def test_a_configuration_may_be_a_dictionary(make_engine: Callable[..., Any]) -> None:
    """Checked like the class; anything else is told."""
    backend = FakeBackend({"*": FakeAnswer("yes")})
    with OrionInferenceEngine(config={"stand_in": "error"}, backend=backend) as engine:
        assert engine.config.stand_in == "error"
    with pytest.raises(InvalidRequestError, match="did you mean"):
        OrionInferenceEngine(config={"stand_inn": "error"}, backend=backend)
    for wrong in (3, [1], "warn"):
        with pytest.raises(InvalidRequestError, match="config"):
            OrionInferenceEngine(config=wrong, backend=backend)


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    """Nothing was written down about it that the new one could contradict."""
    path = write_tiny_llama(tmp_path / "mine.gguf", weights="F16")
    with engine_with(path) as engine:
        assert engine.infer("Hello?", **NOISE).receipt.model.quantization == "F16"
        engine.unload("conversation")
        engine.unload("multilingual")
        write_tiny_llama(tmp_path / "new.gguf", weights="Q8_0", width=128).rename(path)
        again = engine.infer("Hello?", agent="conversation", **NOISE)
        assert again.receipt.model.quantization == "Q8_0"


# What is wrong with a file


def cut(path: Path, source: Path) -> Path:
    path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    return path


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def unix_socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path)[-90:] if len(str(path)) > 100 else str(path))
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def broken_link(path: Path) -> Path:
    path.symlink_to(path.parent / "gone.gguf")
    return path


def split_without(path: Path, missing: int) -> Path:
    first = write_tiny_llama(path, tensors_per_file=4)
    parts = sorted(path.parent.glob(f"{path.stem}-*.gguf"))
    parts[missing].unlink()
    return first if missing else parts[1]


def zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return path


def safetensors(path: Path) -> Path:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return written(path, struct.pack("<Q", len(header)) + header + b"\0\0\0\0")


def corrupted(path: Path, source: Path) -> Path:
    content = bytearray(source.read_bytes())
    content[8:16] = struct.pack("<Q", 2**60)  # the number of tensors
    return written(path, bytes(content))


Broken = Callable[[Path, Path], Path]
KINDS: dict[str, tuple[Broken, type[OrionError], str]] = {
    "a typo": (lambda f, _: f / "mien.gguf", ModelNotFoundError, "mine.gguf"),
    "another case": (lambda f, _: f / "MINE.gguf", ModelNotFoundError, "mine.gguf"),
    "no such folder": (lambda f, _: f / "modles" / "m.gguf", ModelNotFoundError, "modles"),
    "an empty file": (lambda f, _: written(f / "e.gguf", ""), ModelCorruptError, "empty"),
    "a cut file": (lambda f, own: cut(f / "c.gguf", own), ModelCorruptError, "cut off"),
    "a cut header": (
        lambda f, own: written(f / "h.gguf", own.read_bytes()[:40]),
        ModelCorruptError,
        "h.gguf",
    ),
    "a web page": (
        lambda f, _: written(f / "w.gguf", "<!DOCTYPE html><html><body>Sign in</body></html>"),
        ModelCorruptError,
        "web page",
    ),
    "an LFS pointer": (
        lambda f, _: written(
            f / "l.gguf", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
        ModelCorruptError,
        "LFS",
    ),
    "an error of a server": (
        lambda f, _: written(f / "j.gguf", '{"error":"Repository not found"}'),
        ModelCorruptError,
        "j.gguf",
    ),
    "a folder": (lambda f, _: folder(f / "d.gguf"), ModelNotFoundError, "folder"),
    "its folder": (lambda f, _: f, ModelNotFoundError, "mine.gguf"),
    "a broken link": (lambda f, _: broken_link(f / "b.gguf"), ModelNotFoundError, "link"),
    "a pipe": (lambda f, _: fifo(f / "p.gguf"), ModelCorruptError, "pipe"),
    "a device": (lambda _f, _: Path("/dev/zero"), ModelCorruptError, "device"),
    "a missing part": (
        lambda f, _: split_without(f / "s.gguf", 1),
        ModelNotFoundError,
        "00002-of-",
    ),
    "the second part": (
        lambda f, _: split_without(f / "t.gguf", 0),
        ModelNotFoundError,
        "first part",
    ),
    "a checkpoint of PyTorch": (lambda f, _: zipped(f / "z.gguf"), ModelCorruptError, "PyTorch"),
    "safetensors": (lambda f, _: safetensors(f / "x.gguf"), ModelCorruptError, "safetensors"),
    "a compressed file": (
        lambda f, own: written(f / "g.gguf", b"\x1f\x8b\x08" + own.read_bytes()),
        ModelCorruptError,
        "gzip",
    ),
    "an unfinished download": (
        lambda f, own: written(f / "u.gguf.part", own.read_bytes()[:-9]),
        ModelCorruptError,
        "not finished",
    ),
    "a wrong count": (lambda f, own: corrupted(f / "n.gguf", own), ModelCorruptError, "tensor"),
    "another version": (
        lambda f, _: written(f / "v.gguf", b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + b"\0" * 40),
        ModelCorruptError,
        "version",
    ),
    "random bytes": (
        lambda f, _: written(f / "r.gguf", bytes(range(200))),
        ModelCorruptError,
        "GGUF",
    ),
    "a name that cannot be": (lambda f, _: f / ("x" * 300), ModelNotFoundError, "xxx"),
}


@pytest.fixture
def broken(own: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        (tmp_path / "mine.gguf").symlink_to(own)
        return KINDS[kind][0](tmp_path, own)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_broken_raises_where_it_is_named(broken: Any, kind: str) -> None:
    """The right error with the absolute path: by the engine, by a request, by the registry."""
    path = broken(kind)
    _, error, word = KINDS[kind]
    for name in (lambda: engine_with(path), lambda: ModelRegistry.packaged().add_gguf(path)):
        with pytest.raises(error) as caught:
            name()
        assert word in caught.value.message
        assert str(path) in caught.value.message
    backend = FakeBackend({"*": FakeAnswer("yes")})
    with OrionInferenceEngine(config=config_with(**QUICK), backend=backend) as engine:
        for ask in (engine.infer, engine.plan):
            with pytest.raises(error, match=word):
                ask("Hello?", model=str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_broken_in_a_registry_raises_when_it_is_asked(broken: Any, kind: str) -> None:
    """Also the fifth time; the demonstration model does not answer in its place."""
    path = broken(kind)
    _, error, word = KINDS[kind]
    registry = ModelRegistry.packaged()
    registry.add_model("mine", {"source": {"path": str(path)}})
    registry.update_agent("code", models={"primary": "mine"})
    with engine_with(None, registry) as engine:
        for _ in range(5):
            with pytest.raises(error) as caught:
                engine.infer("Write a function that adds two numbers", agent="code")
            assert word in caught.value.message
            assert str(path) in caught.value.message
        with pytest.raises(error):
            engine.preload("code")


def test_a_wrong_digest_raises(own: Path) -> None:
    """The digest in a registry is checked for local files, too."""
    registry = ModelRegistry.packaged()
    for number, digest in enumerate([sha256(own.read_bytes()).hexdigest(), "0" * 64]):
        source = {"path": str(own), "sha256": [digest]}
        registry.add_model(f"m{number}", {"source": source})
    with engine_with(None, registry) as engine:
        assert engine.infer("Hello?", model="m0", **NOISE).model_id == "m0"
        for _ in range(4):
            with pytest.raises(DigestMismatchError, match=r"mine\.gguf has the SHA-256"):
                engine.infer("Hello?", model="m1")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_raises(own: Path, tmp_path: Path) -> None:
    """The reason is in the message."""
    path = written(tmp_path / "secret.gguf", own.read_bytes())
    path.chmod(0)
    with pytest.raises(ModelNotFoundError, match=r"secret\.gguf.*ermission"):
        engine_with(path)


def test_a_file_that_goes_away_later(own: Path, tmp_path: Path) -> None:
    """A model in memory answers on; when it has to be loaded again, its path is named."""
    path = written(tmp_path / "gone.gguf", own.read_bytes())
    with engine_with(path) as engine:
        engine.infer("Hello?", agent="conversation", **NOISE)
        path.unlink()
        engine.unload("conversation")
        with pytest.raises(ModelNotFoundError, match=r"gone\.gguf"):
            engine.infer("Hello?", agent="conversation", **NOISE)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("cod", "no model 'cod'"),
        ("code", "agent='code'"),
        ("smollm2-135m-instrct", "did you mean 'smollm2-135m-instruct'"),
        ("smollm2-135m-instruct@q8", "q4_1"),
        ("olama:llama3", "ollama"),
        ("ftp://host/m.gguf", "ftp"),
        ("bartowski/SmolLM2-360M-Instruct-GGUF", "hf:bartowski/SmolLM2-360M-Instruct-GGUF"),
        ("llama3.2:1b", "ollama:llama3.2:1b"),
        ("models.json", r"OrionInferenceEngine\('models.json'\)"),
    ],
)
def test_a_name_that_means_nothing(name: str, word: str) -> None:
    """The message has the closest name, or the forms that there are."""
    with pytest.raises((ModelNotFoundError, InvalidRequestError), match=word):
        engine_with(name)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_model_is_no_registry(own: Path, tmp_path: Path, is_there: bool) -> None:
    """Who passes it as the first argument learns the right one."""
    path = own if is_there else tmp_path / "gone.gguf"
    with pytest.raises(RegistryError, match=r"OrionInferenceEngine\(model='\w+\.gguf'\)"):
        OrionInferenceEngine(path)


@pytest.mark.parametrize("name", [7, b"m.gguf", "", " ", True, ["m"]])
def test_a_name_that_is_none(make_engine: Callable[..., Any], name: Any) -> None:
    """A clear error, and nothing is lost."""
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match="model"):
        engine.infer("Hello?", model=name)
    assert engine.infer("Hello?").model_id == "main"
    with pytest.raises(InvalidRequestError, match="model"):
        engine_with(name)


def test_an_embedding_model_does_not_answer(own: Path, tmp_path: Path) -> None:
    """It is told apart by its header, in each place that names one."""
    from minilm import write_minilm

    path = write_minilm(tmp_path / "minilm.gguf")
    with pytest.raises(ModelError, match="embedding model"):
        engine_with(path)
    registry = ModelRegistry.packaged()
    assert registry.model(registry.add_gguf(path)).type == "embedding"
    with pytest.raises(RegistryError, match="embedding model"):
        registry.add_gguf(path, agent="code")
    registry.add_model("claims", {"source": {"path": str(path)}})
    with engine_with(None, registry) as engine, pytest.raises(ModelError, match="embedding model"):
        engine.infer("Hello?", model="claims")


# What a registry states about a file


@pytest.fixture
def stating(own: Path) -> Iterator[Callable[..., OrionInferenceEngine]]:
    engines = []

    def make(variant: dict[str, Any] | None = None, **model: Any) -> OrionInferenceEngine:
        registry = ModelRegistry.packaged()
        variants = {"v": {**(variant or {}), "source": {"path": str(own)}}}
        registry.add_model("mine", {**model, "variants": variants})
        registry.update_agent("conversation", models={"primary": "mine"})
        engines.append(engine_with(None, registry))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown(0.0)


def test_a_wrong_quantization_is_an_error(stating: Any) -> None:
    """It is chosen by, so another one is another model."""
    engine = stating({"quantization": "Q4_K_M"})
    with pytest.raises(ModelCorruptError, match=r"states Q4_K_M .*is F16"):
        engine.infer("Hello?", agent="conversation")


@pytest.mark.parametrize(
    ("variant", "model", "word"),
    [
        ({"quantization": "BF16"}, {}, "quantization"),
        ({}, {"context_length": 999_999}, "context_length"),
        ({"size_mb": 4000}, {}, "4.00 GB"),
    ],
)
def test_what_is_harmless_is_a_warning(
    stating: Any, variant: dict[str, Any], model: dict[str, Any], word: str
) -> None:
    """The model answers, and the log says what is wrong."""
    engine = stating(variant, **model)
    assert engine.infer("Hello?", agent="conversation", **NOISE).model_id == "mine"
    lines = [e["line"] for e in engine.export_logs() if e["event"] == "model.log"]
    assert any(word in line for line in lines), lines


def test_a_context_that_the_model_does_not_have(own: Path) -> None:
    """It is lowered to what the model was trained on, and the log says so."""
    with engine_with(own, context_length=100_000) as engine:
        model = engine.infer("Hello?", **NOISE).receipt.model
        lines = [e["line"] for e in engine.export_logs() if e["event"] == "model.log"]
    assert model is not None
    assert model.context_length == 512
    assert any("100000 was asked for" in line for line in lines)


@pytest.mark.parametrize("sign", ["100000 was asked for", "loading_shard"])
def test_a_subscriber_may_close_what_it_hears_of(own: Path, sign: str) -> None:
    """A line of the log or a step of the load: the thread that reads the worker's messages goes on,
    and sees it end."""
    engine = engine_with(own, context_length=100_000)
    closed = threading.Event()

    def close(event: Event) -> None:
        if sign in str(event.fields):
            engine.shutdown(0.0)
            closed.set()

    engine.subscribe(close)
    handle = engine.submit("Hello?", **NOISE)
    assert closed.wait(BOUND_S)
    with pytest.raises(OrionError):
        handle.result(BOUND_S)


# Base models


def test_a_base_model_says_what_it_is(tmp_path: Path) -> None:
    """Without a chat template it does not answer; on request it continues the text."""
    base = write_tiny_llama(tmp_path / "base.gguf", chat_template=None)
    with engine_with(base) as engine:
        for _ in range(4):
            with pytest.raises(InvalidRequestError, match=r"base model.*prompt_format='plain'"):
                engine.infer("Once upon a time", **NOISE)
        result = engine.infer("Once upon a time", prompt_format="plain", **NOISE)
        assert result.usage.prompt_tokens <= len("Once upon a time")
        with pytest.raises(InvalidRequestError, match="prompt_format"):
            engine.infer("Once", prompt_format="chatml")


def test_a_base_model_may_always_be_plain(tmp_path: Path) -> None:
    """The registry can say so; the agent's persona stays out of the text then."""
    base = write_tiny_llama(tmp_path / "base.gguf", chat_template=None)
    registry = ModelRegistry.packaged()
    registry.add_gguf(base, agent="creative", prompt_format="plain")
    with engine_with(None, registry) as engine:
        short = engine.infer("Once", agent="creative", **NOISE).usage.prompt_tokens
        long = engine.infer(
            "Once", agent="creative", system_prompt="A tale.", **NOISE
        ).usage.prompt_tokens
    assert short < 8 < long


def test_plain_is_for_every_model(own: Path) -> None:
    """A model with a template continues a text, too, if it is asked to."""
    with engine_with(own) as engine:
        chat = engine.infer("Once", agent="code", **NOISE).usage.prompt_tokens
        plain = engine.infer("Once", agent="code", prompt_format="plain", **NOISE)
    assert plain.usage.prompt_tokens < chat


# The registry at run time


def test_a_gguf_for_an_agent(own: Path) -> None:
    """The agent answers with it, and with no other."""
    registry = ModelRegistry.packaged()
    assert registry.add_gguf(own, "my-model", agent="code") == "my-model"
    assert registry.agent("code").models == AgentModels(primary="my-model")
    assert [link.model_id for link in registry.chain("code")] == ["my-model"]
    assert len(registry.chain("creative")) > 1
    with pytest.raises(RegistryError, match="choose another id"):
        registry.add_gguf(own, "qwen2.5-7b-instruct")
    with pytest.raises(OrionError, match="no agent 'cod'"):
        registry.add_gguf(own, agent="cod")


def test_an_engine_leaves_the_registry_as_it_was(own: Path) -> None:
    """`model=` is the engine's; the same registry may serve others."""
    registry = ModelRegistry.packaged()
    before = registry.data
    with engine_with(own, registry) as engine:
        assert engine.registry.agent("code").models.primary == "mine"
        engine.registry.add_agent("new", AgentSpec(models=AgentModels(primary="mine")))
        assert engine.infer("Hello?", agent="new", **NOISE).agent_id == "new"
    assert registry.data is before
