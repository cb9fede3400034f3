"""A registry of models that a server of this test offers, or that lie beside it."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from loopback import (
    LoopbackRequest,
    LoopbackServer,
    Misbehaviour,
)
from tiny import write_tiny_llama

from orion_oie.models.downloads.cache import ModelCache

WRONG_DIGEST = "0" * 64


@pytest.fixture
def shop_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelCache:
    """A cache of this test, in place of the user's."""
    monkeypatch.setenv("ORION_CACHE_DIR", str(tmp_path / "cache"))
    return ModelCache()


@dataclass
class Shop:
    """A server with files, and a registry of models that come from it or lie beside it."""

    folder: Path
    server: LoopbackServer
    registry: Path
    is_down: threading.Event

    @property
    def options(self) -> list[str]:
        return ["--registry", str(self.registry)]

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def source(url: str, *names: str, **more: Any) -> dict[str, Any]:
    return {"url": url, "shards": list(names), **more}


def model(**sources: dict[str, Any]) -> dict[str, Any]:
    variant = {"size_mb": 0.75, "min_ram_gb": 0.1}
    return {
        "name": "Tiny",
        "license": "apache-2.0",
        "context_length": 512,
        "variants": {name: {**variant, "source": source} for name, source in sources.items()},
    }


def agent(primary: str, lite: str | None = None) -> dict[str, Any]:
    models = {"primary": primary, **({"lite": lite} if lite else {})}
    return {"name": "A", "description": "", "system_prompt": "Go on.", "models": models}


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    folder = tmp_path / "served"
    (folder / "copy").mkdir(parents=True)
    is_down = threading.Event()

    def misbehave(_request: LoopbackRequest) -> Misbehaviour | None:
        return Misbehaviour(status=503) if is_down.is_set() else None

    never_ends = {"<|im_end|>": -40}
    write_tiny_llama(folder / "big.gguf", weights="F32", layers=4, token_bias=never_ends)
    shutil.copy(folder / "big.gguf", folder / "copy")
    write_tiny_llama(folder / "small.gguf", name="small", token_bias=never_ends)
    write_tiny_llama(tmp_path / "local.gguf", name="local", token_bias=never_ends)
    with LoopbackServer(folder, misbehave=misbehave) as server:
        registry = {
            "version": "1",
            "models": {
                "tiny": model(
                    f32=source(server.url, "big.gguf"), f16=source(server.url, "small.gguf")
                ),
                "wrong": model(f32=source(f"{server.url}/copy", "big.gguf", sha256=[WRONG_DIGEST])),
                "gone": model(f32=source(f"{server.url}/nowhere", "big.gguf")),
                "local": model(f16={"path": "local.gguf"}),
                "missing": model(f16={"path": "missing.gguf"}),
            },
            "agents": {
                "conversation": agent("local"),
                "reader": {**agent("tiny"), "fallback_agent": "conversation"},
                "writer": agent("tiny", "local"),
            },
        }
        path = tmp_path / "shop.json"
        path.write_text(json.dumps(registry), encoding="utf-8")
        yield Shop(folder, server, path, is_down)
