"""What `orion-oie run` and `orion-oie chat` have in common: the options of a request and of the
engine that answers it, and the remarks on an answer."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from orion_oie import InferenceResult, OrionInferenceEngine
from orion_oie.cli.completion import complete_agent
from orion_oie.cli.console import given, printable
from orion_oie.cli.hints import in_options
from orion_oie.cli.places import Places, both_places, model_place
from orion_oie.models.keys import ModelKey
from orion_oie.telemetry.progress import LoadDisplay

if TYPE_CHECKING:  # imports the engine
    from orion_oie import RequestHandle

_Command = TypeVar("_Command", bound=Callable[..., None])


def _all_of(*options: Callable[[Any], Any]) -> Callable[[_Command], _Command]:
    """A decorator that adds options, which the help lists in this order."""

    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _list_or_none(
    _context: click.Context, _option: click.Parameter, values: tuple[Any, ...]
) -> list[Any] | None:
    return list(values) or None


def read_schema(_context: click.Context, _option: click.Parameter, value: str | None) -> Any:
    """A JSON Schema, from its text or the name of a file."""
    if value is None:
        return None
    text = value
    if not value.lstrip().startswith("{"):
        try:
            text = Path(value).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise click.BadParameter(_unreadable(value, error)) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = "it" if text is value else printable(value)
        raise click.BadParameter(
            f"{where} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error


def read_text(_context: click.Context, _option: click.Parameter, path: Path | None) -> str | None:
    """The content of a file."""
    if path is None:
        return None
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(_unreadable(str(path), error)) from error


def _unreadable(name: str, error: OSError | UnicodeDecodeError) -> str:
    reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
    return f"{printable(name)} cannot be read: {reason}"


who_options = _all_of(
    click.option(
        "--agent",
        metavar="A",
        shell_complete=complete_agent,
        help="the agent that answers, see 'orion-oie agents'; default: the one that the question "
        "suits",
    ),
    model_place,
)

answer_options = _all_of(
    click.option(
        "-s",
        "--system",
        "system_prompt",
        metavar="TEXT",
        help="what the model is told to be, in place of the agent's system prompt",
    ),
    click.option("--max-tokens", type=int, metavar="N", help="longest answer, in tokens"),
    click.option(
        "--temperature",
        type=float,
        metavar="T",
        help="how freely it chooses its words, from 0 (always the likeliest) to 5",
    ),
    click.option(
        "--top-p",
        type=float,
        metavar="P",
        help="choose among the likeliest words that have this probability together, up to 1 (all)",
    ),
    click.option(
        "--top-k", type=int, metavar="N", help="choose among the N likeliest words; 0: all"
    ),
    click.option(
        "--min-p",
        type=float,
        metavar="P",
        help="leave out words less likely than this share of the likeliest one",
    ),
    click.option(
        "--repeat-penalty",
        type=float,
        metavar="X",
        help="above 1: say what was just said less likely again",
    ),
    click.option(
        "--seed",
        type=int,
        metavar="N",
        help="the same seed gives the same answer again; default: a new one each time",
    ),
    click.option(
        "--stop",
        multiple=True,
        callback=_list_or_none,
        metavar="TEXT",
        help="end the answer before this text; may be given several times",
    ),
    click.option(
        "--prompt-format",
        type=click.Choice(["plain"]),
        help="plain: let a model without a chat template continue the text",
    ),
    click.option(
        "--deadline",
        type=float,
        metavar="S",
        help="give up after so many seconds, loading included",
    ),
)

engine_options = _all_of(
    click.option(
        "--context-length",
        type=int,
        metavar="N",
        help="how much question and answer may take together, in tokens; default: what the model "
        "can, at most 4096",
    ),
    click.option(
        "--auto-download",
        is_flag=True,
        help="fetch the model first if it is not on this machine; one that -m names by its "
        "address is fetched in any case",
    ),
    click.option(
        "--no-stand-in",
        "is_strict",
        is_flag=True,
        help="fail where another model would answer than the one that should",
    ),
    both_places,
)


def engine_for(
    places: Places,
    context_length: int | None,
    auto_download: bool,
    is_strict: bool,
    **loading: Any,
) -> OrionInferenceEngine:
    """An engine for the values of `engine_options`, and settings of its loading."""
    return places.engine(
        stand_in="error" if is_strict else "allow",
        serving=given(context_length=context_length),
        loading=loading,
        download={"auto": auto_download or None},  # None: what is named by its address
    )


@contextlib.contextmanager
def progress(
    engine: OrionInferenceEngine, *, is_shown: bool = True
) -> Iterator[Callable[[], None]]:
    """A display of the loads of an engine, on the standard error. Gives the function that ends
    it."""
    with LoadDisplay() as display:
        end = engine.subscribe(display.show) if is_shown else lambda: None

        def close() -> None:
            end()  # what happened before is shown
            display.close()

        try:
            yield close
        finally:
            close()


def print_answer(handle: "RequestHandle", close_display: Callable[[], None]) -> InferenceResult:
    """Print an answer as it comes. What follows begins on a line of its own."""
    try:
        for event in handle:
            close_display()  # the terminal belongs to the answer now
            click.echo(event.text, nl=False)
    finally:
        if handle.text and not handle.text.endswith("\n"):
            click.echo()
    return handle.result()


def notes(result: InferenceResult) -> Iterator[str]:
    """What is odd about an answer: another model than the intended one gave it, or it was cut
    off."""
    if result.finish_reason == "length":
        yield (
            f"the answer was cut off after {result.usage.completion_tokens} tokens; --max-tokens "
            "allows more"
        )
    for skipped in result.receipt.considered:
        if skipped.outcome == "unavailable" and skipped.role == "primary":
            if "not downloaded" in skipped.reason:
                why = "is not on this machine"
                advice = f"; fetch it with 'orion-oie pull {skipped.agent_id}' or --auto-download"
            else:
                why, advice = f"cannot answer ({in_options(skipped.reason)})", ""
            yield f"{skipped.model_id} {why}, {result.model_id} stood in{advice}"
        elif skipped.error is not None:
            yield f"{skipped.model_id} did not answer: {in_options(skipped.error)}"


def account(result: InferenceResult) -> str:
    """Who answered, how fast, and in how many tokens: one line."""
    timings, usage = result.timings, result.usage
    parts = [
        result.agent_id,
        ModelKey(result.model_id, result.variant),
        f"load {timings.load_ms:.0f} ms",
        f"first token {timings.ttft_ms or 0:.0f} ms",
        f"{timings.tokens_per_second or 0:.1f} tokens/s",
        f"total {timings.total_ms:.0f} ms",
        f"tokens {usage.prompt_tokens} in ({usage.cached_tokens} cached), "
        f"{usage.completion_tokens} out",
    ]
    return ", ".join(parts)
