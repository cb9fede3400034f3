"""The configuration: checked once when it is made, everything wrong with it said at once."""

import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from orion_oie.config import (
    BreakerConfig,
    EngineConfig,
    LoadingConfig,
    MemoryConfig,
    RouterConfig,
    RouteStage,
    ServingConfig,
    ShardingConfig,
)
from orion_oie.errors import InvalidRequestError

# setting: (what is allowed, values at the borders, values beyond them)
NUMBERS: dict[str, tuple[str, list[Any], list[Any]]] = {
    "serving.slots": ("integer >= 1 and <= 64", [1, 64], [0, -1, 65]),
    "serving.threads": ("integer >= 1 and <= 1024", [1, 1024], [0, -1, 1025]),
    "serving.context_length": (
        "integer >= 64 and < 2147483648",
        [64, 2**31 - 1],
        [0, 63, 2**32 + 64],
    ),
    "serving.nice": ("integer >= 0 and <= 19", [0, 19], [-1, 20]),
    "serving.max_queue": ("integer >= 1", [1], [0, -1]),
    "serving.model_turn_s": ("number > 0 and <= 1000000", [0.001, 1e6], [0, -1, 1e308]),
    "serving.priority_aging_s": ("number > 0 and <= 1000000", [0.001, 1e6], [0, -1, 1e308]),
    "serving.stuck_after_s": ("number > 0 and <= 1000000", [0.001, 1e6], [0, -1, 1e308]),
    "serving.cancel_grace_s": ("number > 0 and <= 1000000", [0.001, 1e6], [0, -1, 1e308]),
    "shutdown_timeout_s": ("number >= 0 and <= 1000000", [0, 1e6], [-1, 1e308]),
    "memory.max_models": ("integer >= 1", [1], [0, -1]),
    "memory.host_cache_bytes": ("integer >= 0", [0, 2**33], [-1]),
    "memory.prefix_store_bytes": ("integer >= 0", [0, 2**40], [-1]),
    "loading.timeout_s": ("number > 0 and <= 1000000", [0.001, 1e6], [0, -1, 1e308]),
    "loading.sharding.num_shards": ("integer >= 1 and <= 1024", [1, 1024], [0, -1, 1025]),
    "loading.sharding.initial_shards": ("integer >= 0 and <= 1024", [0, 1024], [-1, 1025]),
    "download.connections": ("integer >= 1 and <= 32", [1, 32], [0, -1, 33]),
    "download.retries": ("integer >= 0 and <= 100", [0, 100], [-1, 101]),
    "download.timeout_s": ("number > 0 and <= 1000000", [0.001, 1e6], [0, -1, 1e308]),
    "breaker.failure_threshold": ("integer >= 1", [1], [0, -1]),
    "breaker.reset_timeout_s": ("number > 0 and <= 1000000", [0.001, 1e6], [0, -1, 1e308]),
    "router.threshold": ("number >= 0 and <= 1", [0, 1], [-0.1, 1.1]),
    "router.residency_s": ("number >= 0 and <= 1000000", [0, 1e6], [-1, 1e308]),
    "embeddings.cache_entries": ("integer >= 0", [0], [-1]),
    "guardrails.max_query_chars": ("integer >= 1", [1], [0, -1]),
    "logs.max_events": ("integer >= 0", [0], [-1]),
}
BORDERS = [(name, value) for name, (_, good, _) in NUMBERS.items() for value in good]
BEYOND = [(name, value) for name, (_, _, bad) in NUMBERS.items() for value in bad]
NO_NUMBERS = [math.nan, math.inf, -math.inf, "many", [1], {}]


def nested(path: str, value: Any) -> dict[str, Any]:
    """A setting by its dotted path, as keyword arguments of `EngineConfig`."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings, by dotted path, the sections among them."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields_of(field.annotation, f"{prefix}{name}.")


def problems(**settings: Any) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        EngineConfig(**settings)
    found: list[str] = caught.value.details["problems"]
    assert caught.value.message == "EngineConfig: " + "; ".join(found)
    return found


def test_every_number_has_a_range() -> None:
    """A new number in the configuration must be added to the table of this file."""
    numbers = {
        path
        for path, field in fields_of(EngineConfig)
        if field.annotation in (int, float, int | None)
    }
    assert numbers == set(NUMBERS)


def test_every_setting_is_described() -> None:
    """The description stands at the field, a sentence or more."""
    for path, field in fields_of(EngineConfig):
        assert field.description, path
        assert field.description[0].isupper() or field.description[0] == '"', path
        assert field.description.endswith("."), path


def test_the_defaults_are_valid() -> None:
    """A configuration made of its own defaults is the default configuration."""
    assert EngineConfig(**EngineConfig().model_dump()) == EngineConfig()


@pytest.mark.parametrize(("path", "value"), BEYOND)
def test_a_setting_out_of_range_is_explained(path: str, value: Any) -> None:
    """The line names the setting, the allowed range and the value given."""
    (line,) = problems(**nested(path, value))
    assert line.startswith(f"{path}: ")
    assert line.endswith(f"; allowed: {NUMBERS[path][0]}, got {value!r}")


@pytest.mark.parametrize(("path", "value"), BORDERS)
def test_the_borders_of_a_range_are_allowed(path: str, value: Any) -> None:
    """The message and the check speak of the same range."""
    found: Any = EngineConfig(**nested(path, value))
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused(path: str, value: Any) -> None:
    """NaN, the infinities and other things than numbers are clear errors."""
    (line,) = problems(**nested(path, value))
    assert line.startswith(f"{path}: ")
    assert line.endswith(f"; allowed: {NUMBERS[path][0]}, got {value!r}")


def test_unknown_settings_are_errors_with_a_suggestion() -> None:
    """A misspelt setting is not ignored, and the right one is offered, also inside a section."""
    assert problems(lods={}) == ["lods: unknown key (did you mean 'logs'?)"]
    assert problems(breaker={"failure_treshold": 2}) == [
        "breaker.failure_treshold: unknown key (did you mean 'failure_threshold'?)"
    ]
    (line,) = problems(zzz=1)
    assert line == f"zzz: unknown key; known are {', '.join(sorted(EngineConfig.model_fields))}"


@pytest.mark.parametrize(
    ("path", "home"),
    [
        ("slots", "serving.slots"),
        ("max_queu", "serving.max_queue"),
        ("cache_dir", "download.cache_dir"),
        ("sharding", "loading.sharding"),
        ("num_shards", "loading.sharding.num_shards"),
        ("timeout_s", "loading.timeout_s or download.timeout_s"),
        ("memory_budget", "memory.budget"),
        ("auto_download", "download.auto"),
        ("loading_strategy", "loading.strategy"),
        ("load_timeout_s", "loading.timeout_s"),
        ("enable_lite_first", "loading.lite_first"),
        ("enable_circuit_breaker", "breaker.enabled"),
        ("router_weights", "router.weights"),
        ("embedding_cache_entries", "embeddings.cache_entries"),
        ("log_content", "logs.include_content"),
        ("serving.max_models", "memory.max_models"),
        ("memory.cach_dir", "download.cache_dir"),
        ("loading.sharding.connections", "download.connections"),
    ],
)
def test_a_setting_in_the_wrong_place_is_led_to_its_section(path: str, home: str) -> None:
    """By its name alone, or by a flat name that has the words of its path."""
    assert problems(**nested(path, 1)) == [f"{path}: unknown key; did you mean {home}?"]


def test_a_section_of_its_own_is_checked_like_the_whole() -> None:
    """It raises the same error, which knows the other sections."""
    with pytest.raises(InvalidRequestError) as caught:
        ServingConfig(slots=0, max_models=2)  # type: ignore[call-arg]
    assert caught.value.message == "ServingConfig: " + "; ".join(caught.value.details["problems"])
    range_line, place_line = caught.value.details["problems"]
    assert range_line.startswith("slots: ")
    assert range_line.endswith("; allowed: integer >= 1 and <= 64, got 0")
    assert place_line == "max_models: unknown key; did you mean memory.max_models?"


def test_all_problems_come_at_once() -> None:
    """Nobody has to repair a configuration one error at a time."""
    lines = problems(
        slot=2,
        serving={"slots": 0, "thread": 1},
        loading={"sharding": {"num_shards": 0}},
        logs={"max_events": -1},
        breaker={"failure_threshold": 0},
    )
    assert [line.partition(":")[0] for line in lines] == [
        "serving.slots",
        "serving.thread",
        "loading.sharding.num_shards",
        "breaker.failure_threshold",
        "logs.max_events",
        "slot",
    ]


def test_weights_that_nobody_would_read_are_refused() -> None:
    """A file of weights without the stage that reads them: the error names both settings."""
    (line,) = problems(router={"weights": "weights.npz", "stages": ["hints"]})
    assert line.startswith("router: ")
    assert "weights" in line
    assert "stages without 'linear'" in line
    assert "linear" in RouterConfig(weights="weights.npz").stages
    assert RouterConfig(stages=("hints",)).weights is None


def test_stages_are_names_that_come_once() -> None:
    """All but the tie-break by default; an unknown name and one named twice are errors."""
    assert {*RouterConfig().stages, "tie_break"} == set(get_args(RouteStage))
    assert EngineConfig(router={"stages": ["hints", "linear"]}).router.stages == ("hints", "linear")
    assert RouterConfig(stages=()).stages == ()
    (line,) = problems(router={"stages": ["explicit", "lineer"]})
    assert line.startswith("router.stages.1: ")
    assert "(did you mean 'linear'?)" in line
    (line,) = problems(router={"stages": ["hints", "explicit", "hints"]})
    assert line.startswith("router.stages: ")
    assert "'hints' is named more than once" in line
    (line,) = problems(router={"stages": "hints"})
    assert line.startswith("router.stages: ")


def test_sections_may_be_dictionaries() -> None:
    """A section of the configuration may come as its class or as a plain dictionary."""
    section = BreakerConfig(failure_threshold=5, reset_timeout_s=1.5)
    assert EngineConfig(breaker=section.model_dump()) == EngineConfig(breaker=section)
    inner = ShardingConfig(num_shards=3)
    assert EngineConfig(loading={"sharding": inner}) == EngineConfig(
        loading=LoadingConfig(sharding={"num_shards": 3})  # type: ignore[arg-type]
    )


def test_slots_are_a_number_once_an_engine_has_resolved_them() -> None:
    """None leaves them to the machine, of which a configuration knows nothing."""
    assert ServingConfig(slots=3).slot_count == 3
    with pytest.raises(ValueError, match=r"serving\.slots"):
        _ = ServingConfig().slot_count


def test_a_configuration_does_not_change() -> None:
    """An engine can rely on what it was given."""
    config = EngineConfig()
    with pytest.raises(ValidationError):
        config.serving = ServingConfig()  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.serving.slots = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("serving.slots", True),
        ("memory.max_models", "3"),
        ("logs.include_content", "yes"),
        ("breaker", 3),
        ("breaker", MemoryConfig()),
    ],
)
def test_nothing_is_converted(path: str, value: object) -> None:
    """A value of another type is refused, not read as what it may have meant."""
    (line,) = problems(**nested(path, value))
    assert line.startswith(f"{path}: ")
