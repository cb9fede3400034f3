"""Models by their address, and models that other programs have fetched, in an engine."""

import asyncio
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import config_with
from loopback import LoopbackRequest, LoopbackServer, Misbehaviour
from tiny import write_tiny_llama

from orion_oie import (
    DownloadError,
    ModelNotFoundError,
    ModelRegistry,
    OrionInferenceEngine,
)
from orion_oie.models.local import ollama

COMMIT = "c" * 40
REPOSITORY = "Org/Tiny-GGUF"
NAMES = ("tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf")
NOISE: dict[str, Any] = {"max_tokens": 3, "seed": 1}


class Hub:
    """One repository with two quantizations of a tiny model, on this machine."""

    def __init__(self, folder: Path) -> None:
        place = folder / REPOSITORY / "resolve" / COMMIT
        place.mkdir(parents=True)
        for number, name in enumerate(NAMES):
            write_tiny_llama(place / name, seed=number)
        self.digests = {
            name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in NAMES
        }
        self.sizes = {name: (place / name).stat().st_size for name in NAMES}
        self.server = LoopbackServer(folder, misbehave=self._answer)

    @property
    def lists(self) -> int:
        """How often the list of files was asked for."""
        return sum("/api/models/" in request.path for request in self.server.requests)

    def _answer(self, request: LoopbackRequest) -> Misbehaviour | None:
        if request.path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [
                {
                    "rfilename": name,
                    "size": self.sizes[name],
                    "blobId": "0" * 40,
                    "lfs": {"sha256": digest, "size": self.sizes[name], "pointerSize": 1},
                }
                for name, digest in self.digests.items()
            ]
            about = {"id": REPOSITORY, "sha": COMMIT, "private": False, "tags": []}
            body = json.dumps({**about, "downloads": 0, "likes": 0, "siblings": siblings})
            return Misbehaviour(
                status=200, body=body.encode(), headers={"Content-Type": "application/json"}
            )
        found = re.search(r"/resolve/[^/]+/([^?]+)", request.path)
        if found is None or found[1] not in self.digests:
            return Misbehaviour(status=404, headers={"X-Error-Code": "EntryNotFound"})
        digest = self.digests[found[1]]
        return Misbehaviour(headers={"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"'})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    hub = Hub(tmp_path / "served")
    template = hub.server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    hub.server.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without any other program."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("OLLAMA_MODELS", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(ollama, "SYSTEM_STORES", ())
    return home


def engine_with(tmp_path: Path, model: str | None, **config: Any) -> OrionInferenceEngine:
    settings: dict[str, Any] = {
        "slots": 1,
        "threads": 1,
        "context_length": 256,
        "keep_spare_worker": False,
        "predictive": False,
        "cache_dir": tmp_path / "cache",
        "stages": ["explicit", "hints", "sessions", "linear"],
    }
    return OrionInferenceEngine(config=config_with(**{**settings, **config}), model=model)


# The hub


def test_a_repository_is_asked_for_by_its_name(hub: Hub, tmp_path: Path) -> None:
    """Its files are fetched, since its address asks for them; its list is asked for once."""
    with engine_with(tmp_path, f"hf:{REPOSITORY}") as engine:
        result = engine.infer("Hello?", agent="code", **NOISE)
        assert (result.variant, result.is_stand_in) == ("q4_k_m", False)
        assert engine.infer("Hello?", agent="creative", **NOISE).model_id == result.model_id
    assert hub.lists == 1


@pytest.mark.parametrize(
    "name",
    [
        "hf:{repository}:q8_0",
        "hf.co/{repository}:Q8_0",
        "hf:{repository}/tiny-Q8_0.gguf",
        "https://huggingface.co/{repository}/blob/main/tiny-Q8_0.gguf",
    ],
)
def test_a_quantization_is_named(hub: Hub, tmp_path: Path, name: str) -> None:
    """As people write it, for one request; the list is not asked for again."""
    named = name.format(repository=REPOSITORY)
    with engine_with(tmp_path, None) as engine:
        first = engine.infer("Hello?", model=named, **NOISE)
        assert first.receipt.model is not None
        assert first.receipt.model.size_bytes == hub.sizes["tiny-Q8_0.gguf"]
        asked = len(hub.server.requests)
        engine.infer("Hello?", model=named, **NOISE)
        assert len(hub.server.requests) == asked


def test_it_is_there_without_a_network(hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    """What was fetched answers in the next program, too, offline."""
    from huggingface_hub import constants

    with engine_with(tmp_path, f"hf:{REPOSITORY}") as engine:
        engine.infer("Hello?", **NOISE)
    hub.server.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with engine_with(tmp_path, f"hf:{REPOSITORY}") as engine:
        assert engine.infer("Hello?", **NOISE).variant == "q4_k_m"
    with pytest.raises((DownloadError, ModelNotFoundError), match="Other/Repo"):
        engine_with(tmp_path, "hf:Other/Repo")


def test_who_forbids_downloads_gets_none(hub: Hub, tmp_path: Path) -> None:
    """The setting counts more than the address; the error says so."""
    with engine_with(tmp_path, f"hf:{REPOSITORY}", download={"auto": False}) as engine:
        with pytest.raises(ModelNotFoundError, match="not downloaded"):
            engine.infer("Hello?", **NOISE)
        assert not any("/resolve/" in request.path for request in hub.server.requests)
        (path,) = engine.pull(f"hf:{REPOSITORY}")
        assert path.name == "tiny-Q4_K_M.gguf"
        assert engine.infer("Hello?", **NOISE).variant == "q4_k_m"


def test_an_event_loop_is_not_held_up(hub: Hub, tmp_path: Path) -> None:
    """The list is asked for off the loop."""

    async def ask() -> tuple[str, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticking = asyncio.create_task(tick())
        with engine_with(tmp_path, None) as engine:
            result = await engine.ainfer("Hello?", model=f"hf:{REPOSITORY}", **NOISE)
        ticking.cancel()
        return result.variant, ticks

    variant, ticks = asyncio.run(ask())
    assert variant == "q4_k_m"
    assert ticks > 0


def test_wrong_names_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    """What there is instead is named."""
    with pytest.raises(ModelNotFoundError, match=r"Q4_K_M.*Q8_0"):
        engine_with(tmp_path, f"hf:{REPOSITORY}:Q5_K_M")
    assert not any("/resolve/" in request.path for request in hub.server.requests)


# Addresses


def test_a_signed_address(hub: Hub, tmp_path: Path) -> None:
    """The signature is sent and never shown; a new one finds the same file."""
    place = f"{hub.server.url}/{REPOSITORY}/resolve/{COMMIT}/tiny-Q8_0.gguf"
    with engine_with(tmp_path, None) as engine:
        first = engine.infer("Hello?", model=f"{place}?X-Amz-Signature=secret1", **NOISE)
        fetched = len(hub.server.requests)
        assert any("secret1" in request.path for request in hub.server.requests)
        second = engine.infer("Hello?", model=f"{place}?X-Amz-Signature=secret2", **NOISE)
        assert first.model_id == second.model_id
        assert len(hub.server.requests) == fetched
        engine.registry.save(tmp_path / "saved.json")
        shown = [json.dumps(engine.export_logs()), str(first.receipt), repr(engine.registry.models)]
    assert "secret" not in "".join(shown) + (tmp_path / "saved.json").read_text()


# Other programs


def test_models_of_other_programs(home: Path, tmp_path: Path) -> None:
    """Each is read where it lies, and nothing is copied."""
    made = write_tiny_llama(tmp_path / "made.gguf")
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    store = home / ".ollama" / "models"
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    manifest.parent.mkdir(parents=True)
    (store / "blobs").mkdir()
    blob = store / "blobs" / f"sha256-{digest}"
    blob.write_bytes(made.read_bytes())
    layer = {
        "mediaType": "application/vnd.ollama.image.model",
        "digest": f"sha256:{digest}",
        "size": made.stat().st_size,
    }
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [layer]}))
    studio = home / ".lmstudio" / "models" / "maker" / "tiny-GGUF" / "tiny-F16.gguf"
    studio.parent.mkdir(parents=True)
    studio.write_bytes(made.read_bytes())
    with engine_with(tmp_path, None) as engine:
        for source, path in (("ollama:tiny", blob), ("lmstudio:maker/tiny-GGUF", studio)):
            result = engine.infer("Hello?", model=source, **NOISE)
            (variant,) = engine.registry.model(result.model_id).variants.values()
            assert variant.source.path == str(path)
        assert not list((tmp_path / "cache").rglob("*.gguf"))
    with pytest.raises(ModelNotFoundError, match="tiny"):
        ModelRegistry.packaged().add_gguf("ollama:tinny")
