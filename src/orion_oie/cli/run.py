"""`orion-oie run`: ask one question, and show the answer as it comes.

Parses, calls the library, prints.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from orion_oie.cli.asking import (
    account,
    answer_options,
    engine_for,
    engine_options,
    notes,
    print_answer,
    progress,
    read_schema,
    read_text,
    who_options,
)
from orion_oie.cli.console import given, print_json, print_note
from orion_oie.cli.places import Places, pass_places
from orion_oie.cli.question import read_question


@click.command()
@click.argument("words", nargs=-1, metavar="[QUESTION...]")
@who_options
@answer_options
@click.option(
    "--json-schema",
    callback=read_schema,
    metavar="SCHEMA",
    help="answer in JSON of this schema, given as a file or as it is",
)
@click.option(
    "--grammar",
    type=click.Path(path_type=Path),
    callback=read_text,
    metavar="FILE",
    help="answer in the language of this GBNF grammar",
)
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="an image of the question; may be given several times",
)
@click.option(
    "--logprobs",
    type=int,
    metavar="N",
    help="with --json: how likely each token was, and the N likeliest in its place",
)
@click.option("--json", "is_json", is_flag=True, help="print the whole result as JSON")
@click.option("-q", "--quiet", is_flag=True, help="print the answer and nothing else")
@click.option(
    "--stdin/--no-stdin",
    "reads_stdin",
    default=None,
    help="wait for a piped text without end, or do not read one; default: wait 30 s for its start",
)
@click.option(
    "--sequential", is_flag=True, help="compute nothing before the whole model has arrived"
)
@engine_options
@pass_places
def run(
    places: Places,
    /,
    words: Sequence[str],
    is_json: bool,
    quiet: bool,
    reads_stdin: bool | None,
    sequential: bool,
    context_length: int | None,
    auto_download: bool,
    is_strict: bool,
    images: Sequence[Path],
    **options: Any,
) -> None:
    """Answer a question, and show the answer while it is written.

    Several words are one question. A text that is piped into the command follows the question;
    "-" reads the question itself from the standard input. The answer goes to the standard output,
    remarks on it go to the standard error.

    \b
    Examples:
      orion-oie run "Why is the sky blue?"
      orion-oie run why is the sky blue
      orion-oie run "Write a haiku" --agent creative --max-tokens 40
      orion-oie run "Write a haiku" -m my-model.gguf
      cat letter.txt | orion-oie run "Summarise this letter" --quiet
      orion-oie run "Rate: I love it" --json-schema schema.json
      orion-oie run "Why is the sky blue?" --json | jq .usage
    """
    question = read_question(words, reads_stdin)
    options = given(**options, images=list(images) or None)
    made = engine_for(
        places,
        context_length,
        auto_download,
        is_strict,
        strategy="sequential" if sequential else "progressive",
        lite_first=False,  # no second question follows, for the full model to answer
    )
    with made as engine, progress(engine, is_shown=not quiet) as close_display:
        if is_json:
            print_json(engine.infer(question, **options).model_dump(mode="json"))
            return
        with engine.stream(question, **options) as handle:
            result = print_answer(handle, close_display)
    if not quiet:
        for note in notes(result):
            print_note(f"note: {note}")
        print_note(account(result))
