"""`orion-oie run`: ask one question, and show the answer as it comes.

Parses, calls the library, prints.
"""

import sys
from collections.abc import Iterator
from typing import Any

import click

from orion_oie import InferenceResult
from orion_oie.cli.console import given, printable
from orion_oie.cli.places import Places, both_places, pass_places
from orion_oie.models.keys import ModelKey
from orion_oie.telemetry.progress import LoadDisplay


@click.command()
@click.argument("question")
@click.option("--agent", metavar="A", help="who answers; default: whom the question suits")
@click.option("--max-tokens", type=int, metavar="N", help="longest answer")
@click.option("--temperature", type=float, metavar="T", help="0 always says the likeliest")
@click.option("--seed", type=int, metavar="N", help="what chance draws from; default: a new one")
@click.option(
    "--system", "system_prompt", metavar="TEXT", help="replaces the agent's system prompt"
)
@click.option("--auto-download", is_flag=True, help="fetch models that are not here")
@click.option("--sequential", is_flag=True, help="compute nothing before the whole model is here")
@both_places
@pass_places
def run(
    places: Places, /, question: str, auto_download: bool, sequential: bool, **options: Any
) -> None:
    """Answer QUESTION; "-" reads it from the standard input."""
    if question == "-":
        question = sys.stdin.read()
    loading = {
        "strategy": "sequential" if sequential else "progressive",
        "lite_first": False,  # no second question follows, for the full model to answer
    }
    made = places.engine(loading=loading, download={"auto": auto_download})
    with LoadDisplay() as display, made as engine:
        engine.subscribe(display.show)
        with engine.stream(question, **given(**options)) as handle:
            try:
                for event in handle:
                    display.close()  # the terminal belongs to the answer now
                    click.echo(event.text, nl=False)
            finally:
                if handle.text and not handle.text.endswith("\n"):
                    click.echo()
        result = handle.result()
    for note in _notes(result):
        click.echo(f"note: {printable(note)}", err=True)
    click.echo(_account(result), err=True)


def _notes(result: InferenceResult) -> Iterator[str]:
    """The reasons that another model answered than the intended one."""
    for skipped in result.receipt.considered:
        if skipped.outcome == "unavailable" and skipped.role == "primary":
            yield (
                f"{skipped.model_id} is not on this machine, {result.model_id} stood in; fetch it "
                f"with 'orion-oie pull {skipped.agent_id}' or --auto-download"
            )
        elif skipped.error is not None:
            yield f"{skipped.model_id} did not answer: {skipped.error}"


def _account(result: InferenceResult) -> str:
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
