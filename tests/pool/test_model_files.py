"""What was seen of the files of models is kept for a while, and looked at again in time."""

import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import BOUND_S, Clock, Running, config_with, registry_with, wait_until

from orion_oie import ModelCorruptError, ModelNotFoundError
from orion_oie.backends.base import Footprint, LoadSpec
from orion_oie.engine.build import resolved
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.pool.files import LOOK_AGAIN_S, ModelFiles


class World:
    """The files of one registry, and how often their headers were read."""

    def __init__(self, folder: Path, missing: tuple[str, ...] = ()) -> None:
        self.clock = Clock()
        self.read: list[str] = []
        self.error: ModelCorruptError | None = None
        self.on_read: Callable[[], object] = lambda: None
        self.registry = registry_with(folder, {"conversation": ["a", "b"]}, missing=missing)
        self.files = ModelFiles(
            self.registry,
            resolved(config_with(slots=3)),
            ModelCache(folder / "cache"),
            self.footprint,
            self.clock,
        )

    def footprint(self, spec: LoadSpec) -> Footprint:
        self.read.append(spec.info.model_id)
        self.on_read()
        if self.error is not None:
            raise self.error
        return Footprint(1000, 0, 0, 0)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., World]:
    return lambda **options: World(tmp_path, **options)


def test_a_look_is_kept_for_its_time(make: Callable[..., World]) -> None:
    """One look serves until it is as old as the caller allows."""
    world = make()
    first = world.files.of("a")
    world.clock.tick(LOOK_AGAIN_S / 2)
    assert world.files.of("a") is first
    assert world.read == ["a"]
    world.clock.tick(LOOK_AGAIN_S / 2)
    assert world.files.of("a", math.inf) is first
    assert world.files.of("a") is not first
    assert world.read == ["a", "a"]
    world.files.of("a", 0.0)
    assert world.read == ["a"] * 3


def test_a_slow_look_does_not_replace_a_later_one(make: Callable[..., World]) -> None:
    """A thread that was held up while it looked must not bring back what it saw."""
    world = make()
    looking, go_on = threading.Event(), threading.Event()

    def be_slow() -> None:
        if len(world.read) == 1:
            looking.set()
            assert go_on.wait(BOUND_S)

    world.on_read = be_slow
    slow = Running(world.files.of, "a")
    wait_until(looking.is_set)
    world.clock.tick(1.0)
    later = world.files.of("a")
    go_on.set()
    assert slow.join() is later
    assert world.files.of("a", math.inf) is later


def test_a_look_says_what_there_is(make: Callable[..., World], tmp_path: Path) -> None:
    """Files, their size, how to load them, and what that would take."""
    (tmp_path / "a.gguf").write_bytes(b"x" * 70)
    (seen,) = make().files.of("a").variants
    assert seen.is_on_disk
    assert (seen.key.model_id, seen.file_bytes) == ("a", 70)
    assert seen.spec is not None
    assert (seen.spec.slots, seen.spec.files) == (3, (tmp_path / "a.gguf",))
    assert seen.estimate == Footprint(1000, 0, 0, 0)


def test_what_is_missing_is_said(make: Callable[..., World]) -> None:
    """There is nothing to load, and the reason is kept."""
    (seen,) = make(missing=("a",)).files.of("a").variants
    assert not seen.is_on_disk
    assert (seen.spec, seen.estimate, seen.file_bytes) == (None, None, 0)
    assert "there is no such file" in seen.state.why_not_here


def test_a_broken_header_is_said(make: Callable[..., World]) -> None:
    """It can be tried, and the reason why its size is unknown is kept."""
    world = make()
    world.error = ModelCorruptError("not a GGUF")
    (seen,) = world.files.of("a").variants
    assert (seen.estimate, seen.error) == (None, world.error)
    assert seen.spec is not None


def test_only_news_change_the_revision(make: Callable[..., World], tmp_path: Path) -> None:
    """Looking again at the same files says the same; a file that comes or goes is news."""
    world = make()
    before = world.files.of("a").variants
    revision = world.files.revision
    world.files.look_again()
    assert world.files.of("a").variants is before
    assert world.files.revision == revision
    (tmp_path / "a.gguf").unlink()
    world.files.look_again()
    assert world.files.revision > revision
    assert not world.files.of("a").variants[0].is_on_disk


def test_a_changed_registry_is_looked_at_again(make: Callable[..., World]) -> None:
    """A model that was replaced is seen at once, and one that is gone is forgotten."""
    world = make()
    spec = world.registry.model("a")
    world.registry.add_model("own", spec)
    first, other = world.files.of("own", math.inf), world.files.of("a", math.inf)
    world.registry.add_model("own", spec.model_copy(update={"version": "2"}))
    assert world.files.of("own", math.inf) is not first
    assert world.files.of("a", math.inf) is other  # nothing has changed there
    with pytest.raises(ModelNotFoundError):
        world.files.of("nobody's")


def test_a_failing_file_system_keeps_what_was_seen(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that the memory manager makes does not raise, and loses nothing."""
    world = make()
    before = world.files.of("a").variants

    def fail(*_: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(world.registry, "variants", fail)
    world.files.look_again()
    assert world.files.of("a", math.inf).variants is before


def test_what_is_recent(make: Callable[..., World]) -> None:
    """A look is recent as long as a newer one of its model is."""
    world = make()
    looks = [world.files.of(name) for name in "ab"]
    assert world.files.are_recent(looks)
    world.clock.tick(LOOK_AGAIN_S)
    assert not world.files.are_recent(looks)
    world.files.look_again()
    assert world.files.are_recent(looks)
