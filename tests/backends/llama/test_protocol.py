"""The messages between a worker and its host: what goes in comes out, and what is malformed is an
error of the side that reads it."""

import math
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie import errors
from orion_oie.backends.base import Completion, GenerationJob, Occupancy
from orion_oie.backends.llama.protocol import (
    CancelCommand,
    CloseCommand,
    Command,
    CompleteCommand,
    CompletedReport,
    Done,
    EmbedCommand,
    EmbeddedReport,
    Ended,
    FailedReport,
    GenerateCommand,
    HelloReport,
    LoadCommand,
    LoadedReport,
    LoadingReport,
    LogReport,
    OccupancyCommand,
    OccupancyReport,
    Report,
    StepReport,
    ThreadsCommand,
    WireError,
    encode_command,
    error_from_wire,
    error_to_wire,
    receive_command,
    receive_load_command,
    receive_report,
    send_report,
)
from orion_oie.errors import (
    ContextOverflowError,
    InvalidRequestError,
    OrionError,
    WorkerError,
)
from orion_oie.models.specs import PromptFormat
from orion_oie.schemas.requests import GenerationOptions, Message
from orion_oie.schemas.results import Usage

KINDS = sorted(
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, OrionError)
)
LOAD = LoadCommand(
    files=(Path("/models/a é.gguf"), Path("/models/b.gguf")),
    slots=4,
    context_length=2048,
    threads=2,
    is_adaptive=True,
    host_cache_bytes=None,
    is_embedding=False,
    prompt_format=PromptFormat(user_prefix="<u>", assistant_prefix="<a>"),
    gpu_layers=0,
    arrival_maps=(None, Path("/models/b.map")),
    discardable=((0, 4096, 8192),),
    prefix_folder=Path("/cache"),
    prefix_store_bytes=2**30,
)
OPTIONS = GenerationOptions(
    temperature=0.1,
    stop=["\n"],
    logit_bias=[(5, -100.0), ("no", 1)],
    json_schema={"type": "object", "properties": {"a": {"minimum": 10**30, "const": 0.1}}},
)
JOB = GenerationJob(
    (Message(role="system", content="s"), Message(role="user", content="é\x00\u2028")),
    OPTIONS,
    session_id="one",
    priority=-3,
    is_streamed=False,
    is_prefix_public=True,
)
COMMANDS = [
    LOAD,
    GenerateCommand(1, JOB),
    EmbedCommand(2, ("a", "")),
    ThreadsCommand(3),
    OccupancyCommand(4),
    CompleteCommand((Path("/models/a.gguf"),)),
    CancelCommand(10**9),
    CloseCommand(),
]
ERROR = WireError("WorkerError", "it broke: \ud7ff", {"limit": 4, "log": ["a"], "signal": None})
REPORTS = [
    HelloReport("", "cpu"),
    LoadingReport(0.25),
    LoadedReport(2048, 2, "gpu"),
    FailedReport(ERROR),
    CompletedReport(),
    CompletedReport(ERROR),
    StepReport(
        ((1, "a", 1), (2, "\x00é", 3)),
        (
            Done(
                3,
                Completion("length", Usage(prompt_tokens=5), 1.5, 2.0, 3.0, 1),
                (("a", 7, -0.5, (("b", 8, -math.inf),)),),
            ),
        ),
        (Ended(4), Ended(5, ERROR)),
    ),
    EmbeddedReport(1, (2, 384), "AAAA"),
    OccupancyReport(1, Occupancy(1, 2, 3, 4, 5, 6, 7)),
    LogReport("warning", "line"),
]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.fixture
def ends() -> Iterator[tuple["Connection[Any, Any]", "Connection[Any, Any]"]]:
    """The two ends of a pipe."""
    ours, theirs = Pipe()
    with ours, theirs:
        yield ours, theirs


def test_the_examples_are_complete() -> None:
    """Each type of message is among those that the tests send."""
    assert {type(command) for command in COMMANDS} == set(get_args(Command))
    assert {type(report) for report in REPORTS} == set(get_args(Report))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.kind)
def test_a_command_arrives_as_it_was_sent(command: Command, ends: tuple[Any, Any]) -> None:
    """Every command comes through, with all that is in it."""
    ours, theirs = ends
    ours.send_bytes(encode_command(command))
    assert receive_command(theirs) == command


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.kind)
def test_a_report_arrives_as_it_was_sent(report: Report, ends: tuple[Any, Any]) -> None:
    """Every report comes through, with all that is in it."""
    ours, theirs = ends
    send_report(ours, report)
    assert receive_report(theirs) == report


@given(piece=texts, tokens=st.integers(0, 2**31), line=texts)
def test_any_text_comes_through(piece: str, tokens: int, line: str) -> None:
    """Text arrives as it was sent, whatever characters are in it."""
    ours, theirs = Pipe()
    with ours, theirs:
        for report in (StepReport(((1, piece, tokens),)), LogReport("error", line)):
            send_report(ours, report)
            assert receive_report(theirs) == report
        ours.send_bytes(encode_command(EmbedCommand(1, (piece, line))))
        assert receive_command(theirs) == EmbedCommand(1, (piece, line))


def test_a_logprob_may_be_no_number(ends: tuple[Any, Any]) -> None:
    """What a broken model says of its tokens is passed on, and does not end its worker."""
    ours, theirs = ends
    completion = Completion("stop", Usage())
    send_report(ours, StepReport(done=(Done(1, completion, (("a", 1, math.nan, ()),)),)))
    (done,) = receive_report(theirs).done
    assert math.isnan(done.logprobs[0][2])


def test_the_first_command_is_a_load(ends: tuple[Any, Any]) -> None:
    """A worker begins with a load, and with nothing else."""
    ours, theirs = ends
    ours.send_bytes(encode_command(LOAD))
    assert receive_load_command(theirs) == LOAD
    ours.send_bytes(encode_command(CancelCommand(1)))
    with pytest.raises(WorkerError, match="the host sent a malformed message"):
        receive_load_command(theirs)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[]", "should be an object"),
        (b"{}", "kind"),
        (b'{"kind":"?"}', "'\\?' found using 'kind'"),
        (b'{"kind":"cancel"}', "cancel.id: Field required"),
        (b'{"kind":"cancel","id":"1"}', "cancel.id: Input should be a valid integer"),
        (b'{"kind":"embed","id":1,"texts":[1]}', "embed.texts.0: Input should be a valid string"),
        (b'{"kind":"hello","why_no_gate":"","device":"cpu"}', "'hello' found using 'kind'"),
    ],
)
def test_a_malformed_command_is_an_error(data: bytes, problem: str, ends: tuple[Any, Any]) -> None:
    """The worker learns what is wrong, and where."""
    ours, theirs = ends
    ours.send_bytes(data)
    with pytest.raises(
        WorkerError, match=f"the host sent a malformed message .*{problem}"
    ) as caught:
        receive_command(theirs)
    assert caught.value.details["problems"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"null", "should be"),
        (b'{"kind":"cancel","id":1}', "'cancel' found using 'kind'"),
        (b'{"kind":"loading","fraction":"half"}', "loading.fraction"),
        (b'{"kind":"step","texts":[[1,"a"]]}', "step.texts.0.2"),
    ],
)
def test_a_malformed_report_is_an_error(data: bytes, problem: str, ends: tuple[Any, Any]) -> None:
    """The host learns what is wrong, and where."""
    ours, theirs = ends
    ours.send_bytes(data)
    with pytest.raises(WorkerError, match=f"the worker sent a malformed message .*{problem}"):
        receive_report(theirs)


def test_what_is_no_unicode_is_the_callers_error() -> None:
    """A lone surrogate is refused before anything is sent."""
    with pytest.raises(InvalidRequestError, match="surrogates not allowed"):
        encode_command(EmbedCommand(1, ("\ud800",)))


def test_the_other_side_is_gone() -> None:
    """Reading from a closed side is EOFError, writing to it OSError."""
    ours, theirs = Pipe()
    theirs.close()
    with ours:
        with pytest.raises(OSError, match="pipe"):
            send_report(ours, CompletedReport())
        with pytest.raises((EOFError, OSError)):
            receive_report(ours)
        with pytest.raises((EOFError, OSError)):
            receive_command(ours)


@pytest.mark.parametrize("name", KINDS)
def test_every_error_survives_the_way(name: str, ends: tuple[Any, Any]) -> None:
    """Each type of the error tree comes back as itself, with its message and its numbers."""
    error = getattr(errors, name)("it broke: 3 of 4", limit=4, log=["a", "b"])
    ours, theirs = ends
    send_report(ours, FailedReport(error_to_wire(error)))
    back = error_from_wire(receive_report(theirs).error)
    assert type(back) is type(error)
    assert (back.message, back.details) == (error.message, error.details)


@pytest.mark.parametrize("name", ["NoSuchError", "annotations", "Any", ""])
def test_an_unknown_error_is_a_worker_error(name: str) -> None:
    """A name that is no error of this library comes back as WorkerError."""
    back = error_from_wire(WireError(name, "hm", {"limit": 1}))
    assert type(back) is WorkerError
    assert back.details["limit"] == 1


def test_an_error_with_a_lone_surrogate_is_sent(ends: tuple[Any, Any]) -> None:
    """A complaint that is no Unicode, as templates may make one, does not end the worker."""
    ours, theirs = ends
    send_report(ours, FailedReport(error_to_wire(InvalidRequestError("no \ud800"))))
    assert receive_report(theirs).error.message == "no ?"


def test_counts_are_numbers_again() -> None:
    """What callers read from an error's details is still there after the way."""
    error = ContextOverflowError("no", prompt_tokens=5, requested_tokens=1, limit=4)
    assert error_from_wire(error_to_wire(error)).details["prompt_tokens"] == 5
