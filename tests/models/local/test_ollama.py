"""Models of Ollama, found without it: whatever its store has, and every way in which it is
broken."""

import json
import os
from pathlib import Path

import pytest
from stores import GGUF, OllamaStore, home
from tiny import write_tiny_llama

from orion_oie.errors import ModelCorruptError, ModelError, ModelNotFoundError
from orion_oie.models.local import ollama
from orion_oie.models.local.found import LocalModel
from orion_oie.models.local.ollama import find_ollama, ollama_models, ollama_stores
from orion_oie.models.source_names import OllamaName, parse_source_name
from orion_oie.models.split_files import check_gguf_file

__all__ = ["home"]
LIBRARY = "registry.ollama.ai/library"


@pytest.fixture
def store(home: Path) -> OllamaStore:
    return OllamaStore(home / ".ollama" / "models")


def find(text: str) -> tuple[Path, ...]:
    name = parse_source_name(text)
    assert isinstance(name, OllamaName)
    return find_ollama(name)


def refused(text: str, kind: type[ModelError] = ModelNotFoundError) -> str:
    with pytest.raises(ModelError) as caught:
        find(text)
    assert type(caught.value) is kind
    return caught.value.message


def test_names(store: OllamaStore) -> None:
    """The tag, the namespace and the host may be left out, and case does not count."""
    latest = store.add(f"{LIBRARY}/llama3.2/latest", GGUF + b"1")
    small = store.add(f"{LIBRARY}/llama3.2/1b", GGUF + b"2", "template", "params", "projector")
    mine = store.add("registry.ollama.ai/me/Mine/v1", GGUF + b"3")
    hub = store.add("hf.co/org/Repo-GGUF/Q4_K_M", GGUF + b"4")
    assert find("ollama:llama3.2") == find("ollama:llama3.2:latest") == (latest,)
    assert find("ollama:llama3.2:1B") == find("ollama:library/llama3.2:1b") == (small,)
    assert find("ollama:me/mine:v1") == (mine,)
    assert find("ollama:hf.co/org/repo-gguf:q4_k_m") == (hub,)


def test_the_list(store: OllamaStore) -> None:
    """Each with what to type, its size and its quantization; what is typed finds it again."""
    paths = [
        store.add("hf.co/org/Repo-GGUF/Q8_0", GGUF + b"1"),
        store.add(f"{LIBRARY}/qwen3/0.6b", GGUF + b"22"),
    ]
    found = ollama_models()
    assert found.unusable == ()
    assert list(found.models) == [
        LocalModel("ollama:hf.co/org/Repo-GGUF:Q8_0", "hf.co/org/Repo-GGUF:Q8_0", (paths[0],), 65,
                   "ollama", "Q4_K_M"),
        LocalModel("ollama:qwen3:0.6b", "qwen3:0.6b", (paths[1],), 66, "ollama", "Q4_K_M"),
    ]  # fmt: skip
    for model in found.models:
        assert find(model.source) == model.paths


def test_a_real_model_needs_no_suffix(store: OllamaStore, tmp_path: Path) -> None:
    """A blob is read like any other file."""
    content = write_tiny_llama(tmp_path / "tiny.gguf").read_bytes()
    path = store.add(f"{LIBRARY}/tiny/latest", content)
    assert check_gguf_file(*find("ollama:tiny")).architecture == "llama"
    assert path.suffix == ""


def test_where_it_looks(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of the variable first, then in the user's and the system's."""
    named, system = OllamaStore(tmp_path / "named"), OllamaStore(tmp_path / "system")
    in_system = system.add(f"{LIBRARY}/both/latest", GGUF + b"1")
    assert find("ollama:both") == (in_system,)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "named"))
    in_named = named.add(f"{LIBRARY}/both/latest", GGUF + b"2")
    assert find("ollama:both") == (in_named,)
    assert ollama_stores() == [tmp_path / "named", home / ".ollama" / "models", tmp_path / "system"]
    assert [model.paths for model in ollama_models().models] == [(in_named,), (in_system,)]


def test_no_ollama_at_all(home: Path) -> None:
    """What to do, and where it was looked for."""
    assert ollama_models().models == ()
    message = refused("ollama:llama3.2")
    assert "Ollama has no models on this machine; 'ollama pull llama3.2:latest' fetches" in message
    assert str(home / ".ollama" / "models") in message


def test_no_such_model(store: OllamaStore) -> None:
    """The closest name, the tags that there are, or all names."""
    store.add(f"{LIBRARY}/llama3.2/1b")
    assert "has no tag 'latest' of it here, only 1b; 'ollama pull" in refused("ollama:llama3.2")
    assert "(did you mean 'llama3.2:1b'?)" in refused("ollama:lama3.2:1b")
    message = refused("ollama:mistral")
    assert message.endswith("; it has llama3.2:1b; 'ollama pull mistral:latest' fetches it")


def test_a_store_that_may_not_be_read(store: OllamaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the service belongs to its own user: the group is what helps."""
    store.add(f"{LIBRARY}/llama3.2/1b")
    system = ollama_stores()[-1] / "manifests"
    monkeypatch.setattr(ollama, "is_forbidden", lambda path: path == system)
    assert find("ollama:llama3.2:1b")
    assert "usermod -aG ollama" in refused("ollama:mistral")
    (unusable,) = ollama_models().unusable
    assert (unusable.name, len(ollama_models().models)) == (str(system.parent), 1)
    assert "Permission denied" in unusable.reason


BROKEN = {
    "empty": "",
    "cut": '{"layers": [',
    "list": "[]",
    "no layers": "{}",
    "layers of another kind": '{"layers": {"a": 1}}',
    "numbers": '{"layers": [1, 2]}',
    "deep": "[" * 100_000,
    "binary": "\0" * 9,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_manifests(store: OllamaStore, kind: str) -> None:
    """An error when named, a line with the reason in the list, and no harm to the others."""
    path = store.manifest(f"{LIBRARY}/bad/latest", [])
    path.write_text(BROKEN[kind])
    good = store.add(f"{LIBRARY}/good/latest")
    message = refused("ollama:bad", ModelCorruptError)
    assert "is broken" in message
    assert "'ollama pull bad:latest'" in message
    found = ollama_models()
    assert [model.paths for model in found.models] == [(good,)]
    assert [(one.name, one.reason) for one in found.unusable] == [("ollama:bad:latest", message)]


def test_files_that_are_not_whole(store: OllamaStore) -> None:
    """A missing one, one that is still fetched, and one that was cut off."""
    path = store.add(f"{LIBRARY}/m/latest")
    path.write_bytes(GGUF[:-1])
    assert "has 63 bytes instead of 64: fetch it again" in refused("ollama:m")
    path.rename(f"{path}-partial")
    assert "its download has not finished: fetch it" in refused("ollama:m")
    Path(f"{path}-partial").unlink()
    assert f"its file {path} is missing" in refused("ollama:m")
    assert ollama_models().models == ()
    assert len(ollama_models().unusable) == 1


@pytest.mark.parametrize("digest", [None, "", "sha256:../../etc/passwd", "md5:00", 5])
def test_digests_are_checked(store: OllamaStore, digest: object) -> None:
    """No path is made of what is none."""
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest}
    store.manifest(f"{LIBRARY}/m/latest", [layer])
    assert "names no digest" in refused("ollama:m", ModelCorruptError)


def test_models_that_are_no_gguf_file(store: OllamaStore) -> None:
    """Safetensors, the cloud, an adapter, another format: each is told."""
    tensor = {"mediaType": "application/vnd.ollama.image.tensor; name=x", "digest": "sha256:0"}
    store.manifest(f"{LIBRARY}/tensors/latest", [tensor])
    store.manifest(f"{LIBRARY}/cloud/latest", [])
    store.add(f"{LIBRARY}/tuned/latest", GGUF, "adapter")
    store.add(f"{LIBRARY}/other/latest", b"PK\3\4" + bytes(60))
    expected = {"tensors": "as safetensors", "cloud": "no file on this machine",
                "tuned": "changed by an adapter", "other": "starts with b'PK"}  # fmt: skip
    for name, reason in expected.items():
        assert reason in refused(f"ollama:{name}", ModelError)
    assert len(ollama_models().unusable) == 4


def test_old_stores(store: OllamaStore) -> None:
    """They have a colon in the names of their files, and no sizes."""
    path = store.add(f"{LIBRARY}/old/latest")
    manifest = store.folder / "manifests" / LIBRARY / "old" / "latest"
    layers = json.loads(manifest.read_text())["layers"]
    for layer in layers:
        del layer["size"]
    manifest.write_text(json.dumps({"layers": layers}))
    old = path.with_name(path.name.replace("-", ":"))
    path.rename(old)
    assert find("ollama:old") == (old,)
    assert ollama_models().models[0].quantization is None


@pytest.mark.timeout(20)
def test_loops_pipes_and_strange_depths(store: OllamaStore) -> None:
    """The walk ends, nothing blocks, and what is too deep or too high is no manifest."""
    good = store.add(f"{LIBRARY}/good/latest")
    folder = store.folder / "manifests"
    (folder / "loop").symlink_to(folder)
    (folder / LIBRARY / "good" / "loop").symlink_to(folder / LIBRARY)
    (folder / "high").write_text("{}")
    (folder / "a" / "b" / "c" / "d").mkdir(parents=True)
    (folder / "a" / "b" / "c" / "d" / "deep").write_text("{}")
    os.mkfifo(folder / LIBRARY / "good" / "pipe")
    found = ollama_models()
    assert [model.paths for model in found.models] == [(good,)]
    assert "is broken" in refused("ollama:good:pipe", ModelCorruptError)
