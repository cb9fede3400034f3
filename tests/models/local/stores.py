"""Folders of Ollama, of LM Studio and of the hub's library, imitated in a test's own folder."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from orion_oie.models.local import ollama

GGUF = b"GGUF" + bytes(60)
COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without any program; the machine's own stores and settings are out of
    sight."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("OLLAMA_MODELS", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(ollama, "SYSTEM_STORES", (str(tmp_path / "system"),))
    return home


class OllamaStore:
    """A store of Ollama."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs").mkdir(parents=True)
        (folder / "manifests").mkdir()

    def blob(self, content: bytes) -> str:
        """Add a blob; return its digest."""
        digest = hashlib.sha256(content).hexdigest()
        self.path(digest).write_bytes(content)
        return digest

    def path(self, digest: str) -> Path:
        return self.folder / "blobs" / f"sha256-{digest}"

    def layer(self, kind: str, content: bytes) -> dict[str, Any]:
        return {
            "mediaType": f"application/vnd.ollama.image.{kind}",
            "digest": f"sha256:{self.blob(content)}",
            "size": len(content),
        }

    def manifest(self, place: str, layers: list[Any], file_type: str = "Q4_K_M") -> Path:
        """Add a manifest at HOST/NAMESPACE/NAME/TAG."""
        settings = json.dumps({"model_format": "gguf", "file_type": file_type}).encode()
        config = {"digest": f"sha256:{self.blob(settings)}", "size": len(settings)}
        path = self.folder / "manifests" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schemaVersion": 2, "config": config, "layers": layers}))
        return path

    def add(self, place: str, content: bytes = GGUF, *others: str) -> Path:
        """Add a model with layers of other kinds; return the path of its file."""
        layers = [self.layer("model", content)]
        layers += [self.layer(kind, kind.encode()) for kind in ("license", *others)]
        self.manifest(place, layers)
        return self.path(hashlib.sha256(content).hexdigest())


def add_snapshot(
    cache: Path, repository: str, names: list[str], commit: str = COMMIT, ref: str = "main"
) -> dict[str, Path]:
    """Add files to a cache of the hub's library; return the links to them."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    if ref:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    links = {}
    for name in names:
        content = GGUF + f"{commit}/{name}".encode()
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        links[name] = link
    return links
