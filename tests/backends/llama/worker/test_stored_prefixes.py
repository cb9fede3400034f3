"""System prompts outlive the worker that computed them: their states are read from the disk."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_llama

from orion_oie.backends.base import Completion, GenerationJob, LoadSpec
from orion_oie.backends.llama.host.loader import (
    LlamaBackend,
    LoaderSettings,
)
from orion_oie.cancellation import CancelScope
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.schemas.requests import (
    GenerationOptions,
    Message,
)
from orion_oie.schemas.results import ModelInfo

INFO = ModelInfo(model_id="tiny", variant="v", name="T", version="1", license="")
SYSTEM = "You are the keeper of a long and detailed list of rules. " * 4


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A model, beside a cache."""
    return write_tiny_llama(tmp_path / "tiny.gguf", context_length=2048)


def asked(
    file: Path, *, limit: int = 2**30, is_public: bool = True, system: str = SYSTEM, **spec: Any
) -> tuple[str, Completion, list[str]]:
    """An answer of a worker that was started for it; what it said, and the lines it logged."""
    lines: list[str] = []
    backend = LlamaBackend(
        LoaderSettings(prefix_store_bytes=limit),
        cache=ModelCache(file.parent / "cache"),
        on_log=lambda _level, line, _model: lines.append(line),
    )
    loaded = LoadSpec(INFO, (file,), **{"slots": 2, "context_length": 1024, **spec})
    model = backend.load(loaded, CancelScope(), lambda _progress: None)
    pieces: list[str] = []
    try:
        messages = (Message(role="system", content=system), Message(role="user", content="Hi"))
        options = GenerationOptions(temperature=0.0, max_tokens=12)
        job = GenerationJob(messages, options, is_prefix_public=is_public)
        done = model.generate(job, CancelScope(), lambda text, _tokens: pieces.append(text))
    finally:
        model.close()
    return "".join(pieces), done, lines


def stored(file: Path) -> list[Path]:
    return sorted((file.parent / "cache" / "snapshots").glob("*.kv"))


def test_a_worker_starts_where_the_last_one_was(files: Path) -> None:
    """The second worker computes only what follows the system prompt, and says the same."""
    text, first, _ = asked(files)
    assert first.usage.cached_tokens == 0
    assert len(stored(files)) == 1
    again, second, lines = asked(files)
    assert second.usage.cached_tokens > 0.8 * second.usage.prompt_tokens
    assert again == text
    assert lines == []


@pytest.mark.parametrize("damage", ["flipped", "truncated", "foreign"])
def test_a_damaged_state_is_made_again(damage: str, files: Path) -> None:
    """It is not used, said so, and written anew."""
    text, _, _ = asked(files)
    (path,) = stored(files)
    good = path.read_bytes()
    bad = {
        "flipped": good[:-100] + bytes([good[-100] ^ 1]) + good[-99:],
        "truncated": good[: len(good) // 2],
        "foreign": b"something else",
    }[damage]
    path.write_bytes(bad)
    again, done, lines = asked(files)
    assert done.usage.cached_tokens == 0
    assert again == text
    assert any("stored prefix" in line for line in lines)
    assert path.read_bytes() == good


@pytest.mark.parametrize("change", ["context", "slots", "file", "prompt"])
def test_a_state_of_something_else_is_not_used(change: str, files: Path) -> None:
    """Another context, another file, another prompt: nothing is taken over."""
    asked(files)
    spec: dict[str, Any] = {}
    if change == "context":
        spec = {"context_length": 512}
    elif change == "slots":
        spec = {"slots": 3}
    elif change == "file":
        write_tiny_llama(files, context_length=2048, seed=7)
    else:
        spec = {"system": "Other rules. " * 12}
    _, done, _ = asked(files, **spec)
    assert done.usage.cached_tokens == 0
    assert len(stored(files)) == 2


def test_a_callers_own_prompt_stays_in_memory(files: Path) -> None:
    """The state of a system prompt that is not the registry's is not written to the disk."""
    asked(files, is_public=False)
    assert stored(files) == []


def test_none_are_kept_without_room(files: Path) -> None:
    """With a limit of 0 bytes there are no files."""
    asked(files, limit=0)
    assert not (files.parent / "cache" / "snapshots").exists()


def test_a_moved_cache_is_only_slower(files: Path) -> None:
    """Without its stored states, a worker computes again."""
    asked(files)
    shutil.rmtree(files.parent / "cache")
    _, done, _ = asked(files)
    assert done.usage.cached_tokens == 0
