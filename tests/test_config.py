"""The configuration: checked once when it is made, everything wrong with it said at once."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from orion_oie.config import BreakerConfig, EngineConfig
from orion_oie.errors import InvalidRequestError

# setting: (what is allowed, values at the borders, values beyond them)
NUMBERS: dict[str, tuple[str, list[Any], list[Any]]] = {
    "slots": ("integer >= 1 and <= 64", [1, 64], [0, -1, 65]),
    "max_models": ("integer >= 1", [1], [0, -1]),
    "max_queue": ("integer >= 1", [1], [0, -1]),
    "context_length": ("integer >= 64 and < 2147483648", [64, 2**31 - 1], [0, 63, 2**32 + 64]),
    "threads": ("integer >= 1 and <= 1024", [1, 1024], [0, -1, 1025]),
    "parked_bytes": ("integer >= 0", [0, 2**33], [-1]),
    "snapshot_bytes": ("integer >= 0", [0, 2**40], [-1]),
    "embedding_cache_entries": ("integer >= 0", [0], [-1]),
    "max_query_chars": ("integer >= 1", [1], [0, -1]),
    "load_timeout_s": ("number > 0 and <= 1000000", [0.001, 1e6], [0, -1, 1e308]),
    "cancel_grace_s": ("number > 0 and <= 1000000", [0.001, 1e6], [0, -1, 1e308]),
    "model_turn_s": ("number > 0 and <= 1000000", [0.001, 1e6], [0, -1, 1e308]),
    "priority_aging_s": ("number > 0 and <= 1000000", [0.001, 1e6], [0, -1, 1e308]),
    "stuck_after_s": ("number > 0 and <= 1000000", [0.001, 1e6], [0, -1, 1e308]),
    "router_threshold": ("number >= 0 and <= 1", [0, 1], [-0.1, 1.1]),
    "route_residency_s": ("number >= 0 and <= 1000000", [0, 1e6], [-1, 1e308]),
    "log_events": ("integer >= 0", [0], [-1]),
}
BORDERS = [(name, value) for name, (_, good, _) in NUMBERS.items() for value in good]
BEYOND = [(name, value) for name, (_, _, bad) in NUMBERS.items() for value in bad]
NO_NUMBERS = [math.nan, math.inf, -math.inf, "many", [1], {}]


def problems(**settings: Any) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        EngineConfig(**settings)
    found: list[str] = caught.value.details["problems"]
    assert caught.value.message == "EngineConfig: " + "; ".join(found)
    return found


def test_every_number_has_a_range() -> None:
    """A new number in the configuration must be added to the table of this file."""
    numbers = {
        name
        for name, field in EngineConfig.model_fields.items()
        if field.annotation in (int, float, int | None)
    }
    assert numbers == set(NUMBERS)


def test_the_defaults_are_valid() -> None:
    """A configuration made of its own defaults is the default configuration."""
    assert EngineConfig(**EngineConfig().model_dump()) == EngineConfig()


@pytest.mark.parametrize(("name", "value"), BEYOND)
def test_a_setting_out_of_range_is_explained(name: str, value: Any) -> None:
    """The line names the setting, the allowed range and the value given."""
    (line,) = problems(**{name: value})
    assert line.startswith(f"{name}: ")
    assert line.endswith(f"; allowed: {NUMBERS[name][0]}, got {value!r}")


@pytest.mark.parametrize(("name", "value"), BORDERS)
def test_the_borders_of_a_range_are_allowed(name: str, value: Any) -> None:
    """The message and the check speak of the same range."""
    assert getattr(EngineConfig(**{name: value}), name) == value


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    """NaN, the infinities and other things than numbers are clear errors."""
    (line,) = problems(**{name: value})
    assert line.startswith(f"{name}: ")
    assert line.endswith(f"; allowed: {NUMBERS[name][0]}, got {value!r}")


def test_unknown_settings_are_errors_with_a_suggestion() -> None:
    """A misspelt setting is not ignored, and the right one is offered, also inside a part."""
    assert problems(max_model=1) == ["max_model: unknown key (did you mean 'max_models'?)"]
    assert problems(breaker={"failure_treshold": 2}) == [
        "breaker.failure_treshold: unknown key (did you mean 'failure_threshold'?)"
    ]
    (line,) = problems(zzz=1)
    assert line == f"zzz: unknown key; known are {', '.join(sorted(EngineConfig.model_fields))}"


def test_all_problems_come_at_once() -> None:
    """Nobody has to repair a configuration one error at a time."""
    lines = problems(slot=2, slots=0, log_events=-1, breaker={"failure_threshold": 0})
    assert [line.partition(":")[0] for line in lines] == [
        "breaker.failure_threshold",
        "slots",
        "log_events",
        "slot",
    ]


def test_weights_that_nobody_would_read_are_refused() -> None:
    """A file of weights without the stage that reads them: the error names both settings."""
    (line,) = problems(router_weights="weights.npz", enable_linear_router=False)
    assert "router_weights" in line
    assert "enable_linear_router=False" in line
    assert EngineConfig(router_weights="weights.npz").enable_linear_router
    assert EngineConfig(enable_linear_router=False).router_weights is None


def test_parts_may_be_dictionaries() -> None:
    """A part of the configuration may come as its class or as a plain dictionary."""
    part = BreakerConfig(failure_threshold=5, reset_timeout_s=1.5)
    assert EngineConfig(breaker=part.model_dump()) == EngineConfig(breaker=part)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 1e308])
def test_a_pause_of_a_breaker_is_finite(value: float) -> None:
    """A breaker that never tries again, or at no time, is an error."""
    (line,) = problems(breaker={"reset_timeout_s": value})
    assert line.startswith("breaker.reset_timeout_s: ")
    assert line.endswith(f"got {value!r}")


def test_a_configuration_does_not_change() -> None:
    """An engine can rely on what it was given."""
    config = EngineConfig()
    with pytest.raises(ValidationError):
        config.slots = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    "settings", [{"slots": True}, {"max_models": "3"}, {"log_content": "yes"}, {"breaker": 3}]
)
def test_nothing_is_converted(settings: dict[str, object]) -> None:
    """A value of another type is refused, not read as what it may have meant."""
    with pytest.raises(InvalidRequestError, match=next(iter(settings))):
        EngineConfig(**settings)
