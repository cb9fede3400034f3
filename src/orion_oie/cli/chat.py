"""`orion-oie chat`: a conversation in the terminal.

Parses, calls the library, prints. Keeps nothing but what `/save` writes.
"""

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orion_oie import OrionError, OrionInferenceEngine
from orion_oie.cli.asking import (
    account,
    answer_options,
    engine_for,
    engine_options,
    notes,
    print_answer,
    progress,
    who_options,
)
from orion_oie.cli.console import given, print_note, printable
from orion_oie.cli.hints import message_of
from orion_oie.cli.places import Places, pass_places
from orion_oie.cli.question import no_text
from orion_oie.schemas.validation import did_you_mean

if TYPE_CHECKING:  # only this command needs it
    from orion_oie import Chat

_PROMPT, _NEXT_LINE = "> ", "  "
_QUOTES = '"""'

_ENDS = ["/exit"], ["/quit"], ["/bye"]

_COMMANDS = {
    "/help": "show this list",
    "/clear": "forget the conversation so far",
    "/save FILE": "write the conversation into a file, as JSON",
    "/exit": "end the chat; so does Ctrl-D",
}


@click.command()
@who_options
@answer_options
@click.option(
    "--load",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="continue a conversation that /save has written",
)
@click.option("-v", "--verbose", is_flag=True, help="say after each answer how it was made")
@engine_options
@pass_places
def chat(
    places: Places,
    /,
    load: Path | None,
    verbose: bool,
    context_length: int | None,
    auto_download: bool,
    is_strict: bool,
    agent: str | None,
    system_prompt: str | None,
    **options: Any,
) -> None:
    """Talk with a model in the terminal, question by question.

    Each question is answered with the conversation before it in mind. /help lists the commands,
    Ctrl-C stops an answer, Ctrl-D ends the chat. A question of several lines begins and ends with
    three quotes. Nothing of it is kept, unless /save writes it into a file. Questions may also come
    through a pipe, one in each line.

    \b
    Examples:
      orion-oie chat
      orion-oie chat --agent code --temperature 0.2
      orion-oie chat --load conversation.json
      orion-oie chat -s "You are a patient teacher. Answer in one sentence."
    """
    if load is not None and (agent is not None or system_prompt is not None):
        raise click.UsageError("--load brings its own agent and system prompt")
    with engine_for(places, context_length, auto_download, is_strict) as engine:
        talk = _Talk(
            engine,
            engine.chat(agent, system_prompt) if load is None else _loaded(load, engine),
            given(**options),
            is_verbose=verbose,
            is_terminal=sys.stdin is not None and sys.stdin.isatty(),
        )
        talk.run()


def _loaded(path: Path, engine: OrionInferenceEngine) -> "Chat":
    from orion_oie import Chat

    return Chat.load(path, engine)


@dataclass
class _Talk:
    """A conversation with whoever is at the standard input."""

    engine: OrionInferenceEngine
    talk: "Chat"
    options: dict[str, Any]
    is_verbose: bool
    is_terminal: bool
    said: set[str] = field(default_factory=set)
    saved: set[Path] = field(default_factory=set)

    def run(self) -> None:
        """Take questions until the end of the input, /exit, or Ctrl-C twice."""
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (gives input() its line editing)
            print_note("Ask a question; /help lists the commands, Ctrl-D ends the chat.")
        was_interrupted = False
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                if was_interrupted or not self.is_terminal:
                    raise
                was_interrupted = True
                click.echo()
                print_note("Ctrl-D, /exit or Ctrl-C once more ends the chat.")
                continue
            was_interrupted = False
            if line is None or line.split()[:1] in _ENDS:
                return
            if line.strip():
                self._answer(line)

    def _answer(self, line: str) -> None:
        """Do what a line says. At a terminal, what goes wrong is said, and the chat goes on."""
        try:
            self._take(line)
        except KeyboardInterrupt:
            if not self.is_terminal:
                raise
            print_note("stopped; the question is forgotten")
        except BrokenPipeError:  # nobody reads the answers any more
            raise
        except (OrionError, OSError) as error:
            if not self.is_terminal:
                raise
            text = message_of(error) if isinstance(error, OrionError) else str(error)
            print_note(f"error: {text}")

    def _read(self) -> str | None:
        """The next question or command; None at the end."""
        line = self._line(_PROMPT)
        if line is None or not line.lstrip().startswith(_QUOTES):
            return line
        text = line.lstrip().removeprefix(_QUOTES)
        while not text.rstrip().endswith(_QUOTES):
            line = self._line(_NEXT_LINE)
            if line is None:
                return text
            text += f"\n{line}"
        return text.rstrip().removesuffix(_QUOTES)

    def _line(self, prompt: str) -> str | None:
        try:
            return input(prompt if self.is_terminal else "")
        except EOFError:
            if self.is_terminal:
                click.echo()
            return None
        except UnicodeDecodeError as error:
            raise no_text() from error

    def _take(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        if not word.startswith("/") or "/" in word[1:]:  # a path is no command
            self._ask(line)
        elif word == "/clear":
            self.talk.clear()
            print_note("the conversation is forgotten")
        elif word == "/save":
            self._save(rest.strip())
        elif word == "/help":
            for name, what in _COMMANDS.items():
                click.echo(f"{name:12}{what}", err=True)
        else:
            known = [name.split()[0] for name in _COMMANDS]
            print_note(f"there is no command {word}{did_you_mean(word, known)}; /help lists them")

    def _ask(self, question: str) -> None:
        with (
            progress(self.engine) as close_display,
            self.talk.stream(question, **self.options) as handle,
        ):
            result = print_answer(handle, close_display)
        for note in [*notes(result), *self.talk.notes]:
            if note not in self.said:
                self.said.add(note)
                print_note(f"note: {note}")
        if self.is_verbose:
            print_note(account(result))
        if self.is_terminal:
            click.echo()

    def _save(self, name: str) -> None:
        if not name:
            print_note("/save needs the name of a file")
            return
        path = Path(name).expanduser()
        if path.exists() and path not in self.saved:
            print_note(f"{printable(name)} is there already: choose another name")
            return
        self.talk.save(path)
        self.saved.add(path)
        turns = len(self.talk.history) // 2
        print_note(f"{printable(name)}: {turns} question{'' if turns == 1 else 's'} and answers")
