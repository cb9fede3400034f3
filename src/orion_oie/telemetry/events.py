"""The catalogue of events: one class for everything that an engine reports.

    engine.subscribe(lambda event: print(event.name, event.fields))

`docs/events.md` is generated from this module by `orion-oie events`. Publishes nothing itself: see
`event_log.py`.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from orion_oie.schemas.loading import LoadProgress

Level = Literal["debug", "info", "warning", "error"]

Content = Annotated[str, "content"]
"""A text of a user or a model, or one that may quote it. Subscribers and logs see its length only,
unless `EngineConfig.logs.include_content` is True."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events. An event is made where it happens, and published at once."""

    name: ClassVar[str]
    """Dotted name, as in logs and exports."""
    default_level: ClassVar[Level] = "info"

    request_id: str | None = None
    """Request that it belongs to; None for events of the engine and its models."""
    at: float = field(default_factory=time.time)
    """Time of the event, in seconds since the epoch."""

    @property
    def level(self) -> Level:
        """Severity in the log."""
        return self.default_level

    @property
    def fields(self) -> dict[str, Any]:
        """The event's own fields by name: JSON-compatible, without `request_id`, `at`, `level`."""
        return {name: getattr(self, name) for name in names_of(type(self)).own}

    def in_one_line(self) -> str:
        """Its name and its short facts, without texts of users or models."""
        content = names_of(type(self)).content
        facts = [
            f"{name}={_short(value)}"
            for name, value in self.fields.items()
            if name not in content and isinstance(value, (str, int, float)) and value != ""
        ]
        if self.request_id is not None:
            facts.append(f"request_id={self.request_id}")
        return " ".join([self.name, *facts])


# -- the engine


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStarted(Event):
    """Published once, when an engine has been built. No model is loaded yet."""

    name = "engine.started"

    version: str
    """Version of this library."""
    pid: int
    """Process that the engine belongs to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineClosed(Event):
    """Published once, when an engine has been shut down and its workers have ended."""

    name = "engine.closed"


CallbackKind = Literal[
    "subscriber", "done callback", "on_event", "router note", "warning hook", "logging"
]
"""Kinds of code of the application that an engine calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallbackFailed(Event):
    """Published when code of the application raised that the engine called. For a subscriber, and
    for the application's logging, only the first time. `engine.stats().callback_errors` counts
    all."""

    name = "callback.failed"
    default_level = "error"

    kind: CallbackKind
    """Kind of code: `subscriber`, `done callback`, `on_event`, `router note`, `warning hook` or
    `logging` (a handler or a filter)."""
    callback: str
    """Name of the function, or of its class."""
    error: str
    """Type of what it raised."""
    where: str
    """File, line and function that raised it."""
    text: Content
    """Message of what it raised."""


# -- requests


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestReceived(Event):
    """Published when a request comes in, before it is checked."""

    name = "request.received"
    default_level = "debug"

    query: Content
    """The question. Its type in angle brackets when it is not a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStateChanged(Event):
    """Published when a request enters another state."""

    name = "request.state"
    default_level = "debug"

    old: str
    """State before, a value of `RequestState`."""
    new: str
    """State from now on, a value of `RequestState`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRouted(Event):
    """Published when the agent that answers has been chosen."""

    name = "request.routed"
    default_level = "debug"

    agent_id: str
    """Agent that answers."""
    confidence: float
    """Confidence of the router, in [0, 1]."""
    stages: list[str]
    """Stages of the router that were asked, in order."""
    text: Content
    """Reason for the choice. It quotes the question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFallback(Event):
    """Published when a model failed and the next one of the chain is tried."""

    name = "request.fallback"
    default_level = "warning"

    error: str
    """Type and message of the error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestReplayed(Event):
    """Published when a worker crashed and its model is tried once more."""

    name = "request.replayed"
    default_level = "warning"

    error: str
    """Type and message of the error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSucceeded(Event):
    """Published when a request has been answered, before its caller gets the answer."""

    name = "request.succeeded"

    agent_id: str
    """Agent that answered."""
    model_id: str
    """Model that answered."""
    completion_tokens: int
    """Tokens of the answer."""
    total_ms: float
    """Time from the call to the answer, in milliseconds."""
    content: Content
    """The answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFailed(Event):
    """Published when a request ends with an error. Level "error" for one that is not an
    `OrionError`: a bug in the library or in code of the application that it called."""

    name = "request.failed"

    error: str
    """Type of the error, with its message if that cannot quote the caller."""
    text: Content | None = None
    """Message of an error that may quote the caller. Logs and exports leave it out if there is
    none."""
    level: Level = "info"

    @property
    def fields(self) -> dict[str, Any]:
        """The error, and its message if it may quote the caller."""
        own = {"error": self.error}
        return own if self.text is None else {**own, "text": self.text}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCancelled(Event):
    """Published when a request ends because its caller cancelled it or the engine was closed."""

    name = "request.cancelled"

    error: str
    """Type and message of the error that the request ends with."""


# -- models


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoading(Event):
    """Published at each step of a load or a download, several times a second."""

    name = "model.loading"
    default_level = "debug"

    key: str
    """Model and variant, as in `model@variant`."""
    progress: LoadProgress
    """How far it is. In `fields`, logs and exports the fields of `LoadProgress` take its place:
    `phase`, `fraction`, `shards`, `shards_loaded`, `bytes_total`, `bytes_loaded`, `bytes_per_s`,
    `seconds_left`, `mode`, `note`."""

    @property
    def fields(self) -> dict[str, Any]:
        """The key, and the fields of `LoadProgress`."""
        return {"key": self.key, **asdict(self.progress)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoaded(Event):
    """Published when a model can answer."""

    name = "model.loaded"

    key: str
    """Model and variant, as in `model@variant`."""
    pid: int | None
    """Process of its worker; None for a backend without workers."""
    load_ms: float
    """Duration of the load, in milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFetched(Event):
    """Published when `engine.pull` has all files of a model."""

    name = "model.fetched"

    key: str
    """Model and variant, as in `model@variant`."""
    bytes: int
    """Size of its files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoadFailed(Event):
    """Published when a load or a download ends with an error."""

    name = "model.load_failed"
    default_level = "warning"

    key: str
    """Model and variant, as in `model@variant`."""
    error: str
    """Type and message of the error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoadingAhead(Event):
    """Published when the load of a model begins that is likely to be needed next."""

    name = "model.loading_ahead"

    key: str
    """Model and variant, as in `model@variant`."""
    agent_id: str
    """Agent that is likely to be asked next."""
    probability: float
    """Probability that it is, in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLog(Event):
    """Published for a warning or an error that llama.cpp or a worker logs."""

    name = "model.log"

    model_id: str
    """Model of the worker."""
    line: str
    """The line."""
    level: Level = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCrashed(Event):
    """Published when the process of a model died."""

    name = "worker.crashed"
    default_level = "error"

    model_id: str
    """Model of the worker."""
    error: str
    """Message of the error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerChanged(Event):
    """Published when a circuit breaker changes its state."""

    name = "breaker.changed"
    default_level = "warning"

    breaker: str
    """Model and operation, as in `model:load`."""
    old: str
    """State before, a value of `BreakerState`."""
    new: str
    """State from now on, a value of `BreakerState`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterDegraded(Event):
    """Published when a stage of the router fails: once, until the stage works again."""

    name = "router.degraded"
    default_level = "warning"

    stage: str
    """Stage that is left out meanwhile."""
    error: str
    """Type and message of the error."""


# -- memory


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolEvicted(Event):
    """Published when an idle model was unloaded because its memory was needed."""

    name = "pool.evicted"

    key: str
    """Model and variant, as in `model@variant`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolUnloaded(Event):
    """Published when a model was unloaded by `engine.unload`."""

    name = "pool.unloaded"

    key: str
    """Model and variant, as in `model@variant`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPressure(Event):
    """Published when the memory of the machine gets shorter or recovers. Level "warning" when the
    new pressure is high or critical."""

    name = "memory.pressure"

    old: str
    """Pressure before: `low`, `medium`, `high` or `critical`."""
    new: str
    """Pressure from now on."""
    available_bytes: int
    """Memory that can be had without swapping."""
    total_bytes: int
    """All memory of the machine or the container."""
    limited_by: Literal["system", "cgroup"]
    """Origin of the limit: the machine or its control group."""
    workers_bytes: int
    """Memory that the workers take."""
    advice: list[str]
    """Recommendations, in sentences."""
    level: Level = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRelieved(Event):
    """Published when idle models were unloaded because memory is short."""

    name = "memory.relieved"
    default_level = "warning"

    pressure: str
    """Pressure that was measured: `high` or `critical`."""
    keys: list[str]
    """Models that were unloaded, each as `model@variant`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTrouble(Event):
    """Published when memory cannot be watched, or the size of a model cannot be kept."""

    name = "memory.trouble"
    default_level = "warning"

    error: str
    """Description of the problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreloadTrouble(Event):
    """Published when loading ahead failed unexpectedly. The answer before it was given."""

    name = "preload.trouble"
    default_level = "error"

    text: Content
    """Type and message of the error. It may quote the question."""


_LINE_CHARS = 300


def _short(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    if isinstance(value, str) and (not text.isprintable() or " " in text):
        text = repr(text)
    return text if len(text) <= _LINE_CHARS else f"{text[:_LINE_CHARS]}..."


CATALOGUE: Mapping[str, type[Event]] = {
    kind.name: kind
    for kind in list(globals().values())
    if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
}
"""Every event by its name, in the order of this module."""

_COMMON_FIELDS = frozenset({"request_id", "at", "level"})


class FieldNames(NamedTuple):
    """Names of the fields of a class of events."""

    all: tuple[str, ...]
    own: tuple[str, ...]  # without those that every event has
    content: tuple[str, ...]  # texts of users or models


_names: dict[type[Event], FieldNames] = {}  # asked for at every event


def names_of(kind: type[Event]) -> FieldNames:
    """Names of the fields of a class of events."""
    names = _names.get(kind)
    if names is None:
        every = fields(kind)
        names = FieldNames(
            all=tuple(one.name for one in every),
            own=tuple(one.name for one in every if one.name not in _COMMON_FIELDS),
            content=tuple(
                one.name for one in every if one.type is Content or Content in get_args(one.type)
            ),
        )
        _names[kind] = names
    return names


def redacted(event: Event) -> Event:
    """The event with every text of a user or a model replaced by its length."""
    names = names_of(type(event))
    if not names.content:
        return event
    # `dataclasses.replace` takes three times as long, and every request waits for this.
    copy = object.__new__(type(event))
    for name in names.all:
        value = getattr(event, name)
        if name in names.content and isinstance(value, str):
            value = f"<{len(value)} characters>"
        object.__setattr__(copy, name, value)
    return copy
