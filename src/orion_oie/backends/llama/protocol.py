"""The messages between the host and a worker: one type each, JSON on the wire.

    host -> worker   commands: Load, Generate, Embed, Threads, Occupancy, Complete, Cancel, Close
    worker -> host   reports:  Hello, Loading, Loaded, Failed, Completed, Step, Embedded,
                               Occupancy, Log

A worker sends `HelloReport` when it is ready for its `LoadCommand`, and answers with
`LoadingReport`s and then a `LoadedReport` or a `FailedReport`. If the load named arrival maps, a
`CompleteCommand` follows when the download has ended; `CompletedReport` confirms that the worker
no longer waits for weights. `ThreadsCommand` has no answer.

The reader checks every message against its type: a malformed one raises `WorkerError`.
"""

from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from orion_oie import errors
from orion_oie.backends.base import Completion, GenerationJob, Occupancy
from orion_oie.errors import InvalidRequestError, OrionError, WorkerError
from orion_oie.models.downloads.parts import Run
from orion_oie.models.specs import PromptFormat

_SHOWN_CHARS = 500

MessageT = TypeVar("MessageT")

# -- commands


@dataclass(frozen=True, slots=True)
class LoadCommand:
    """Load a model from `files` and get ready to serve it.

    `threads` is the most that a step uses; with `is_adaptive`, fewer while other programs use the
    cores.
    `host_cache_bytes` None makes the host cache as large as the KV cache. `arrival_maps` holds,
    for files that are still being downloaded, one map for each file (None for a complete file);
    it is None when all files are complete. `discardable` are byte ranges of the files that are
    not read after the load. Prefix states are stored in `prefix_folder`, up to
    `prefix_store_bytes`; 0 stores none.
    """

    files: tuple[Path, ...]
    slots: int
    context_length: int
    threads: int
    is_adaptive: bool
    host_cache_bytes: int | None
    is_embedding: bool
    prompt_format: PromptFormat | None
    gpu_layers: int
    arrival_maps: tuple[Path | None, ...] | None
    discardable: tuple[Run, ...]
    prefix_folder: Path
    prefix_store_bytes: int
    kind: Literal["load"] = "load"


@dataclass(frozen=True, slots=True)
class GenerateCommand:
    """Answer a job; the answer comes in `StepReport`s."""

    id: int
    job: GenerationJob
    kind: Literal["generate"] = "generate"


@dataclass(frozen=True, slots=True)
class EmbedCommand:
    """Embed texts; the answer is an `EmbeddedReport`."""

    id: int
    texts: tuple[str, ...]
    kind: Literal["embed"] = "embed"


@dataclass(frozen=True, slots=True)
class ThreadsCommand:
    """Use this many threads from the next step on."""

    threads: int
    kind: Literal["threads"] = "threads"


@dataclass(frozen=True, slots=True)
class OccupancyCommand:
    """Report what the worker is busy with."""

    id: int
    kind: Literal["occupancy"] = "occupancy"


@dataclass(frozen=True, slots=True)
class CompleteCommand:
    """Replace the context that waits for weights: all of them have arrived, in `files`."""

    files: tuple[Path, ...]
    kind: Literal["complete"] = "complete"


@dataclass(frozen=True, slots=True)
class CancelCommand:
    """Stop a request. The worker confirms it, even when the request has ended already."""

    id: int
    kind: Literal["cancel"] = "cancel"


@dataclass(frozen=True, slots=True)
class CloseCommand:
    """End the process."""

    kind: Literal["close"] = "close"


Command = (
    LoadCommand
    | GenerateCommand
    | EmbedCommand
    | ThreadsCommand
    | OccupancyCommand
    | CompleteCommand
    | CancelCommand
    | CloseCommand
)

# -- reports


@dataclass(frozen=True, slots=True)
class WireError:
    """An error of the tree in `errors.py`."""

    name: str
    message: str
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class HelloReport:
    """The worker is ready to load. `why_no_gate` is the reason why it cannot compute while a model
    arrives, empty if it can. `device` is "gpu" if it can put layers on one, else "cpu"."""

    why_no_gate: str
    device: str
    kind: Literal["hello"] = "hello"


@dataclass(frozen=True, slots=True)
class LoadingReport:
    """This fraction of the weights is loaded."""

    fraction: float
    kind: Literal["loading"] = "loading"


@dataclass(frozen=True, slots=True)
class LoadedReport:
    """The model takes requests."""

    context_length: int
    threads: int
    device: str
    kind: Literal["loaded"] = "loaded"


@dataclass(frozen=True, slots=True)
class FailedReport:
    """The model cannot be loaded; the worker ends."""

    error: WireError
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True, slots=True)
class CompletedReport:
    """The worker left the context that waits for weights, or kept it because of `error`."""

    error: WireError | None = None
    kind: Literal["completed"] = "completed"


TextPiece = tuple[int, str, int]
"""New text of a request: its id, the text, and the number of tokens behind it."""

Logprob = tuple[str, int, float, tuple[tuple[str, int, float], ...]]
"""Text, token and log-probability of a token, and the same of the most probable ones."""


@dataclass(frozen=True, slots=True)
class Done:
    """A request that ended with an answer. `completion` comes without its `logprobs`."""

    id: int
    completion: Completion
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that ended without an answer: it was cancelled if `error` is None."""

    id: int
    error: WireError | None = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """Everything that one batch step produced."""

    texts: tuple[TextPiece, ...] = ()
    done: tuple[Done, ...] = ()
    ended: tuple[Ended, ...] = ()
    kind: Literal["step"] = "step"

    # The logits of a broken model, and so its logprobs, may be infinite or not a number.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(ser_json_inf_nan="constants")


@dataclass(frozen=True, slots=True)
class EmbeddedReport:
    """Vectors of `shape` (texts, dimensions): little-endian 32-bit floats in Base64."""

    id: int
    shape: tuple[int, int]
    data: str
    kind: Literal["embedded"] = "embedded"


@dataclass(frozen=True, slots=True)
class OccupancyReport:
    """The answer to `OccupancyCommand`."""

    id: int
    occupancy: Occupancy
    kind: Literal["occupancy"] = "occupancy"


@dataclass(frozen=True, slots=True)
class LogReport:
    """A line of llama.cpp's log."""

    level: str
    line: str
    kind: Literal["log"] = "log"


Report = (
    HelloReport
    | LoadingReport
    | LoadedReport
    | FailedReport
    | CompletedReport
    | StepReport
    | EmbeddedReport
    | OccupancyReport
    | LogReport
)

# -- the wire


def encode_command(command: Command) -> bytes:
    """The wire form of a command. Raises `InvalidRequestError` for text that is not Unicode."""
    try:
        return _encode(command)
    except (PydanticSerializationError, UnicodeEncodeError) as error:
        raise InvalidRequestError(f"the request cannot be sent to a worker: {error}") from error


def receive_load_command(connection: "Connection[Any, Any]") -> LoadCommand:
    """Read the first command, which must be a `LoadCommand`. Raises like `receive_command`."""
    return _checked(TypeAdapter(LoadCommand), connection.recv_bytes(), "host")


def receive_command(connection: "Connection[Any, Any]") -> Command:
    """Read one command.

    Raises `WorkerError` for a malformed one, EOFError or OSError when the host is gone.
    """
    return _checked(_commands(), connection.recv_bytes(), "host")


def send_report(connection: "Connection[Any, Any]", report: Report) -> None:
    """Write one report. Raises OSError when the host is gone."""
    connection.send_bytes(_encode(report))


class Receiver(Protocol):
    """The end of a connection that messages come from."""

    def recv_bytes(self) -> bytes: ...


def receive_report(connection: Receiver) -> Report:
    """Read one report.

    Raises `WorkerError` for a malformed one, EOFError or OSError when the worker is gone.
    """
    return _checked(_reports(), connection.recv_bytes(), "worker")


def warm_up() -> None:
    """Build the decoder of commands now: it takes tens of milliseconds, which the first request
    would have to wait for."""
    _commands()


def _checked(adapter: TypeAdapter[MessageT], data: bytes, sender: str) -> MessageT:
    try:
        return adapter.validate_json(data, strict=True)
    except ValidationError as error:
        problems = [
            ": ".join(filter(None, [".".join(map(str, problem["loc"])), problem["msg"]]))
            for problem in error.errors(include_url=False, include_input=False)
        ]
        raise WorkerError(
            f"the {sender} sent a malformed message ({'; '.join(problems)[:_SHOWN_CHARS]})",
            problems=problems,
        ) from None


# Decoders and encoders are built on first use: the larger ones take milliseconds.
@cache
def _commands() -> TypeAdapter[Command]:
    return TypeAdapter(Annotated[Command, Field(discriminator="kind")])


@cache
def _reports() -> TypeAdapter[Report]:
    return TypeAdapter(Annotated[Report, Field(discriminator="kind")])


_encoders: dict[type, TypeAdapter[Any]] = {}


def _encode(message: Command | Report) -> bytes:
    encoder = _encoders.get(type(message))
    if encoder is None:
        encoder = _encoders[type(message)] = TypeAdapter(type(message))
    return encoder.dump_json(message)


def error_to_wire(error: OrionError) -> WireError:
    """The message for an error. Lone surrogates, which no wire carries, become "?"."""
    text = error.message.encode("utf-8", "replace").decode()
    return WireError(type(error).__name__, text, error.details)


def error_from_wire(wire: WireError) -> OrionError:
    """The error that `error_to_wire` was given; a `WorkerError` if its type is unknown."""
    kind = getattr(errors, wire.name, None)
    if not (isinstance(kind, type) and issubclass(kind, OrionError)):
        kind = WorkerError
    error: OrionError = kind(wire.message, **wire.details)
    return error
