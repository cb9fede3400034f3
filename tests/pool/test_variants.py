"""Each agent gets the variant that it wants, that is here, and that fits; else it hears why not."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from engines import MakeEngine, ended
from helpers import config_with, registry_with
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny_llama

from orion_oie import InsufficientMemoryError, ModelCorruptError
from orion_oie.backends.base import Footprint, LoadSpec
from orion_oie.backends.fake import FakeAnswer, FakeBackend
from orion_oie.backends.llama.host.loader import LlamaBackend
from orion_oie.engine.build import resolved
from orion_oie.models.downloads.cache import ModelCache
from orion_oie.models.registry import ModelRegistry
from orion_oie.pool.candidate import Candidate
from orion_oie.pool.files import ModelFiles
from orion_oie.pool.footprint_ledger import FootprintLedger
from orion_oie.pool.sizes import ModelSizes
from orion_oie.pool.variants import VariantSelector

MIB = 2**20
SIZES_MB = {"f16": 200, "q8": 100, "q4": 50}
NAMES = {"f16": "F16", "q8": "Q8_0", "q4": "Q4_K_M"}


def variant(name: str, **source: Any) -> dict[str, Any]:
    return {
        "quantization": NAMES[name],
        "size_mb": SIZES_MB[name],
        "min_ram_gb": 0.1,
        "source": source or {"path": f"{name}.gguf"},
    }


def variants(*names: str) -> dict[str, Any]:
    return {"main": {"variants": {name: variant(name) for name in names or NAMES}}}


def remote(name: str) -> dict[str, Any]:
    return variant(name, url="https://example.org/models", shards=[f"{name}.gguf"])


class World:
    """A selector, and what it asks: files, sizes, the budget, what is in memory."""

    def __init__(
        self,
        folder: Path,
        models: Mapping[str, Mapping[str, Any]],
        *,
        here: Sequence[str] = tuple(NAMES),
        agent: Mapping[str, Any] | None = None,
        footprint: Callable[[LoadSpec], Footprint] | None = None,
        **config: Any,
    ) -> None:
        self.folder = folder
        for name in here:
            (folder / f"{name}.gguf").touch()
        self.budget_bytes = 10**9
        self.resident: set[str] = set()
        self.needs: dict[str, int] = {name: mb * 10**6 for name, mb in SIZES_MB.items()}
        self.ledger = FootprintLedger()
        self.sizes = ModelSizes(footprint or self.footprint, self.ledger)
        self.registry = registry_with(
            folder, {"conversation": {"models": {"primary": "main"}, **(agent or {})}}, models
        )
        settings = resolved(config_with(**config))
        cache = ModelCache(folder / "cache")
        self.files = ModelFiles(self.registry, settings, cache, footprint or self.footprint)
        self.variants = VariantSelector(
            self.registry,
            settings,
            self.files,
            self.sizes,
            lambda: self.budget_bytes,
            lambda key: key in self.resident,
        )

    def footprint(self, spec: LoadSpec) -> Footprint:
        needed = self.needs[spec.info.variant]
        return Footprint(needed, kv_bytes=0, compute_bytes=0, process_bytes=0)

    def choice(self) -> Candidate:
        """The first one."""
        return self.variants.candidates("conversation")[0]

    def wish(self, **fields: Any) -> None:
        """Change the agent."""
        old = self.registry.agent("conversation").model_dump(mode="json", exclude_defaults=True)
        self.registry.add_agent("conversation", {**old, **fields})

    def load(self) -> str:
        """Choose, and have it in memory."""
        choice = self.choice()
        self.resident.add(choice.key)
        return choice.key.variant


@pytest.mark.parametrize(
    ("wanted", "chosen"), [("auto", "f16"), ("q4", "q4"), ("q8", "q8"), ("f16", "f16")]
)
def test_an_agent_gets_the_level_it_wants(tmp_path: Path, wanted: str, chosen: str) -> None:
    """`quantization` names a level; without one the best that fits is taken, and says why."""
    choice = World(tmp_path, variants(), agent={"quantization": wanted}).choice()
    assert choice.key.variant == chosen
    assert choice.load_spec.files == (tmp_path / f"{chosen}.gguf",)
    assert [c.variant for c in choice.picked.considered if c.is_chosen] == [chosen]
    assert all(c.reason for c in choice.picked.considered)
    assert choice.picked.reduction is not None


def test_a_level_that_is_not_there_gives_the_next_lower_one(tmp_path: Path) -> None:
    """Who wants f16 of a model that has none gets q8, and the reason says so."""
    choice = World(tmp_path, variants("q4", "q8"), agent={"quantization": "f16"}).choice()
    assert choice.key.variant == "q8"
    assert "no f16 variant" in choice.picked.reason


def test_an_agent_may_limit_the_size_of_its_file(tmp_path: Path) -> None:
    """`optimized_size` is in megabytes, and leaves out what is larger, not what is as large."""
    world = World(tmp_path, variants(), agent={"optimized_size": 100})
    assert world.choice().key.variant == "q8"
    world.wish(optimized_size=99.5)
    assert world.choice().key.variant == "q4"


@pytest.mark.parametrize("of_agent", ["progressive", "sequential", None])
@pytest.mark.parametrize("of_engine", ["progressive", "sequential"])
def test_the_agents_loading_strategy_comes_first(
    tmp_path: Path, of_agent: str | None, of_engine: str
) -> None:
    """An agent's strategy goes over the engine's, down to what the backend is told."""
    agent = {} if of_agent is None else {"loading_strategy": of_agent}
    world = World(tmp_path, variants(), agent=agent, strategy=of_engine)
    expected = of_agent or of_engine
    assert world.variants.loading_strategy("conversation") == expected
    assert world.choice().load_spec.is_progressive is (expected == "progressive")


def test_shards_as_the_agent_the_variant_and_the_engine_say(tmp_path: Path) -> None:
    """The agent's `sharding` goes over the variant's, that over the engine's, of which the other
    settings stay."""
    models = variants("q4")
    world = World(tmp_path, models, sharding={"num_shards": 3, "priority_layers": ["output"]})
    told = world.choice().load_spec.sharding
    assert told is not None
    assert (told.num_shards, told.initial_shards) == (3, 0)

    models["main"]["variants"]["q4"]["sharding"] = {"num_shards": 5, "initial_shards": 2}
    world = World(tmp_path, models, sharding={"num_shards": 3, "priority_layers": ["output"]})
    told = world.choice().load_spec.sharding
    assert told is not None
    assert (told.num_shards, told.initial_shards) == (5, 2)
    assert told.priority_layers == ["output"]

    world.wish(sharding={"num_shards": 7})
    told = world.choice().load_spec.sharding
    assert told is not None
    assert (told.num_shards, told.initial_shards) == (7, 0)
    assert told.enabled  # it said nothing of that
    world.wish(sharding={"enabled": False, "num_shards": 7})
    told = world.choice().load_spec.sharding
    assert told is not None
    assert not told.enabled


def test_the_spec_says_all_that_the_engine_says(tmp_path: Path) -> None:
    """Slots, context, threads and what may be parked reach the backend; size is in bytes."""
    world = World(
        tmp_path, variants("q4"), slots=3, context_length=512, threads=2, host_cache_bytes=12345
    )
    spec = world.choice().load_spec
    assert (spec.slots, spec.context_length, spec.threads) == (3, 512, 2)
    assert (spec.host_cache_bytes, spec.expected_bytes) == (12345, 50 * 10**6)
    assert spec.key == "main@q4"


def test_what_does_not_fit_is_not_chosen(tmp_path: Path) -> None:
    """The best variant within the budget; the others say what they need."""
    world = World(tmp_path, variants())
    world.budget_bytes = 150 * 10**6
    choice = world.choice()
    assert choice.key.variant == "q8"
    reasons = {c.variant: c.reason for c in choice.picked.considered}
    assert "needs 0.20 GB" in reasons["f16"]
    assert "0.15 GB" in reasons["f16"]


def test_what_is_here_comes_before_what_would_be_better(tmp_path: Path) -> None:
    """Files that are not there are not chosen, whatever their quality."""
    assert World(tmp_path, variants(), here=["q4"]).choice().key.variant == "q4"


def test_what_was_measured_counts(tmp_path: Path) -> None:
    """A variant that was seen to take more than there is is not chosen again."""
    world = World(tmp_path, variants())
    world.budget_bytes = 210 * 10**6
    choice = world.choice()
    assert choice.key.variant == "f16"
    world.sizes.note_peak(choice.load_spec, 220 * 10**6)
    assert world.choice().key.variant == "q8"


def test_a_variant_in_memory_stays_while_it_fits(tmp_path: Path) -> None:
    """More room does not load the model a second time; less than it needs does choose again, and
    so does everything once it is out of memory."""
    world = World(tmp_path, variants())
    world.budget_bytes = 120 * 10**6
    assert world.load() == "q8"
    world.budget_bytes = 10**9
    assert world.choice().key.variant == "q8"
    world.budget_bytes = 60 * 10**6
    assert world.choice().key.variant == "q4"
    world.budget_bytes = 120 * 10**6
    assert world.load() == "q8"
    world.resident.clear()
    world.budget_bytes = 10**9
    assert world.choice().key.variant == "f16"


def test_a_variant_stays_though_it_was_measured(tmp_path: Path) -> None:
    """What the monitor finds out of a model in memory is no reason to load another variant."""
    world = World(tmp_path, variants())
    world.budget_bytes = 120 * 10**6
    assert world.load() == "q8"
    world.sizes.note_peak(world.choice().load_spec, 110 * 10**6)
    world.budget_bytes = 10**9
    assert world.choice().key.variant == "q8"


def test_a_new_estimate_is_no_reason_to_load_another_variant(tmp_path: Path) -> None:
    """Estimates move with each load of whatever model; what is in memory and fits stays."""
    world = World(tmp_path, variants())
    world.budget_bytes = 120 * 10**6
    assert world.load() == "q8"
    world.budget_bytes = 10**9
    world.needs["q8"] += 1000
    world.needs["f16"] -= 1000
    world.files.look_again()
    assert world.choice().key.variant == "q8"


def test_a_new_wish_is_heard_though_another_variant_is_in_memory(tmp_path: Path) -> None:
    """Changes of the registry are seen by the next request."""
    world = World(tmp_path, variants())
    assert world.load() == "f16"
    world.wish(quantization="q4")
    assert world.choice().key.variant == "q4"
    world.wish(quantization="auto", optimized_size=120)
    assert world.choice().key.variant == "q8"


def test_a_file_that_came_is_seen_though_another_variant_is_in_memory(tmp_path: Path) -> None:
    """Who fetches a better variant wants it to be used."""
    world = World(tmp_path, variants(), here=["q4"])
    assert world.load() == "q4"
    (tmp_path / "q8.gguf").touch()
    assert world.choice().key.variant == "q4"  # a request for what is in memory does not look
    world.files.look_again()  # as the memory manager does every two seconds
    assert world.choice().key.variant == "q8"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(30, 250), min_size=1, max_size=12), st.data())
def test_choices_over_time(
    tmp_path_factory: pytest.TempPathFactory, budgets_mb: list[int], data: st.DataObject
) -> None:
    """Whatever the budget does: what is in memory stays chosen while it fits, what is chosen fits
    if anything does, and else it is the smallest."""
    world = World(tmp_path_factory.mktemp("world"), variants())
    before: str | None = None
    for budget_mb in budgets_mb:
        world.budget_bytes = budget_mb * 10**6
        chosen = world.load()
        if before is not None and SIZES_MB[before] <= budget_mb:
            assert chosen == before
        elif budget_mb >= 50:
            assert SIZES_MB[chosen] <= budget_mb
        else:
            assert chosen == "q4"
        before = chosen
        if data.draw(st.booleans(), "evicted"):
            world.resident.clear()
            before = None


def test_when_nothing_fits_the_smallest_is_a_choice(tmp_path: Path) -> None:
    """It is among the choices, with the reason why it will not do."""
    world = World(tmp_path, variants())
    world.budget_bytes = 10 * 10**6
    choice = world.choice()
    assert choice.key.variant == "q4"
    assert choice.is_on_disk
    assert "no variant fits" in choice.picked.reason


def test_what_may_be_fetched_is_chosen_when_that_is_allowed(tmp_path: Path) -> None:
    """With `download.auto` the first of the registry that fits; it says where it comes from."""
    models = {"main": {"variants": {"q4": remote("q4"), "q8": remote("q8")}}}
    world = World(tmp_path, models, here=(), download={"auto": True})
    choice = world.choice()
    assert (choice.key.variant, choice.is_on_disk) == ("q4", False)
    spec = choice.load_spec
    assert spec.source is not None
    assert spec.source.url == "https://example.org/models"
    assert spec.expected_bytes == 50 * 10**6
    world.wish(quantization="q8")
    assert world.choice().key.variant == "q8"


def test_nothing_is_chosen_to_be_fetched_when_that_is_not_allowed(tmp_path: Path) -> None:
    """Without `download.auto` what is here is taken, whatever was wanted; with nothing here, the
    choice says why it is of no use."""
    both = {"main": {"variants": {"q4": variant("q4"), "q8": remote("q8")}}}
    world = World(tmp_path, both, here=["q4"], agent={"quantization": "q8"})
    assert world.choice().key.variant == "q4"
    world = World(tmp_path, {"main": {"variants": {"q8": remote("q8")}}}, here=())
    choice = world.choice()
    assert not choice.is_on_disk
    assert "not downloaded" in choice.why_unavailable


def test_what_is_here_is_used_before_anything_is_fetched(tmp_path: Path) -> None:
    """Without a wish nothing is fetched while something fits; a level that is wanted is fetched."""
    both = {"main": {"variants": {"q8": remote("q8"), "q4": variant("q4")}}}
    world = World(tmp_path, both, here=["q4"], download={"auto": True})
    assert world.choice().key.variant == "q4"
    world.wish(quantization="q8")
    assert world.choice().key.variant == "q8"


def test_broken_files_do_not_stop_the_choice_of_others(tmp_path: Path) -> None:
    """A variant whose header is corrupt is taken to need the size of its file; the others are
    chosen as ever."""
    backend = LlamaBackend(cache=ModelCache(tmp_path / "cache"))
    world = World(tmp_path, variants("f16", "q8"), footprint=backend.footprint)
    write_tiny_llama(tmp_path / "q8.gguf")
    (tmp_path / "f16.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    world.budget_bytes = 190 * 10**6  # less than the registry says that f16 has
    choice = world.choice()
    assert choice.key.variant == "q8"
    assert backend.footprint(choice.load_spec).max_bytes < 190 * 10**6
    world.budget_bytes = 10**9
    assert world.choice().key.variant == "f16"  # nobody knows better: who loads it hears
    with pytest.raises(ModelCorruptError):
        backend.footprint(world.choice().load_spec)


def test_a_candidate_outlives_the_registry_it_came_from(tmp_path: Path) -> None:
    """A request that waited while its model was replaced gets the model that was chosen for it; the
    next one gets the new one."""
    world = World(tmp_path, {})
    custom = {"name": "C", "license": "x", "context_length": 512}
    world.registry.add_model("own", {**custom, "variants": {"q4": variant("q4")}})
    world.wish(models={"primary": "own"})
    candidate = world.choice()
    world.registry.add_model("own", {**custom, "variants": {"q8": variant("q8")}})
    assert candidate.load_spec.files == (tmp_path / "q4.gguf",)
    assert world.choice().key == "own@q8"


# -- what an engine says when nothing fits

BIG = {"main@f16": 300 * MIB, "main@q8": 80 * MIB, "main@q4": 30 * MIB, "held": 60 * MIB}
AGENTS = {"conversation": ["main"], "other": ["held"]}


def engine_of(make_engine: MakeEngine, tmp_path: Path, **settings: Any) -> Any:
    for name in NAMES:
        (tmp_path / f"{name}.gguf").touch()
    backend = FakeBackend({"*": FakeAnswer("Yes.")}, footprints=BIG)
    settings = {"budget": 100 * MIB, **settings}
    return make_engine(backend, AGENTS, models=variants(), **settings)


def test_the_receipt_says_which_variant_answered(make_engine: MakeEngine, tmp_path: Path) -> None:
    """Quantization, level, what is saved, why, and what was reserved of what."""
    report = engine_of(make_engine, tmp_path).infer("Hello?").receipt.variant
    assert report is not None
    assert (report.quantization, report.level) == ("Q8_0", "q8")
    assert (report.reserved_bytes, report.budget_bytes) == (80 * MIB, 100 * MIB)
    assert report.reduction == pytest.approx(1 - 8.5 / 32)
    assert "fits" in report.reason


@pytest.mark.parametrize("call", ["infer", "preload"])
def test_an_error_about_memory_says_all(make_engine: MakeEngine, tmp_path: Path, call: str) -> None:
    """Need, budget, what is pinned, and which variant would fit beside that; nothing is evicted."""
    engine = engine_of(make_engine, tmp_path, pinned=["other"])
    engine.infer("Hello?", agent="other")
    with pytest.raises(InsufficientMemoryError) as caught:
        engine.infer("Hello?") if call == "infer" else engine.preload("conversation")
    message = caught.value.message
    assert "main@q8 needs 80 MiB" in message
    assert "the memory budget is 100 MiB" in message
    assert "pinned are held@q4 (60 MiB)" in message
    assert "this would fit: q4 (30 MiB)" in message
    assert caught.value.details["would_fit"] == ["q4"]
    assert caught.value.details["needed_bytes"] == 80 * MIB
    assert engine.stats().models.keys() == {"held@q4"}


def test_an_error_about_memory_when_no_variant_would_fit(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    """It says that, too, and what the smallest one needs."""
    for name in NAMES:
        (tmp_path / f"{name}.gguf").touch()
    engine = make_engine(FakeBackend(footprints=BIG), models=variants(), budget=20 * MIB)
    with pytest.raises(InsufficientMemoryError, match=r"main@q4 needs 30 MiB.*none of its other"):
        engine.infer("Hello?")


def test_the_number_of_models_is_no_matter_of_variants(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    """Where what is pinned leaves no place at all, no smaller variant is recommended."""
    settings = {"budget": 200 * MIB, "max_models": 1}
    engine = engine_of(make_engine, tmp_path, pinned=["other"], **settings)
    engine.infer("Hello?", agent="other")
    handle = ended(engine.submit("Hello?", agent="conversation"))
    with pytest.raises(InsufficientMemoryError, match="at most 1 models") as caught:
        handle.result()
    assert "would fit" not in caught.value.message


def test_what_is_nowhere_is_not_recommended(make_engine: MakeEngine, tmp_path: Path) -> None:
    """A variant whose file is neither here nor anywhere else is no way out."""
    (tmp_path / "q8.gguf").touch()
    engine = make_engine(
        FakeBackend(footprints={"main@q8": 80 * MIB}), models=variants(), budget=60 * MIB
    )
    with pytest.raises(InsufficientMemoryError, match="none of its other variants"):
        engine.infer("Hello?")


def test_the_packaged_registry_can_be_placed(tmp_path: Path) -> None:
    """Every agent that ships has choices, all of them with a variant and its reason."""
    registry = ModelRegistry.packaged()
    cache = ModelCache(tmp_path)
    sizes = ModelSizes(LlamaBackend(cache=cache).footprint, FootprintLedger())
    config = resolved(config_with(download={"auto": True}))
    files = ModelFiles(registry, config, cache, LlamaBackend(cache=cache).footprint)
    selector = VariantSelector(
        registry, config, files, sizes, lambda: 4 * 10**9, lambda _key: False
    )
    for agent_id in registry.agents:
        for one in selector.candidates(agent_id):
            assert one.picked.reason
            assert one.key.variant in registry.model(one.model_id).variants
            assert one.load_spec.key == one.key == f"{one.model_id}@{one.key.variant}"
