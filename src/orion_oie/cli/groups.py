"""Groups of commands: help that is arranged by task, and suggestions for what is misspelled."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from orion_oie.schemas.validation import did_you_mean


class Group(click.Group):
    """A group that suggests the command that was meant.

    sections: the names of its commands by the titles under which the help lists them. A command of
    a command is named with both names.
    """

    def __init__(
        self, *arguments: Any, sections: Mapping[str, Sequence[str]] | None = None, **settings: Any
    ) -> None:
        super().__init__(*arguments, **settings)
        self.sections = sections or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        listed = [name for names in self.sections.values() for name in names]
        return sorted(
            super().list_commands(ctx),
            key=lambda name: (listed.index(name) if name in listed else len(listed), name),
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in (self.sections or {"Commands": self.list_commands(ctx)}).items():
            with formatter.section(title):
                formatter.write_dl([(name, first_sentence(self._find(name))) for name in names])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        is_option = name.startswith("-")
        if ctx.resilient_parsing or is_option or self.get_command(ctx, name) is not None:
            return super().resolve_command(ctx, args)
        if not ctx.parent and (" " in name or len(args) > 2):
            raise click.UsageError(
                "a question goes to the command 'run': orion-oie run \"Why is the sky blue?\"", ctx
            )
        raise click.UsageError(
            f"there is no command '{name}'{did_you_mean(name, self.list_commands(ctx))}", ctx
        )

    def _find(self, name: str) -> click.Command:
        found: click.Command = self
        for word in name.split():
            assert isinstance(found, click.Group)
            found = found.commands[word]
        return found


def first_sentence(command: click.Command) -> str:
    """The first paragraph of a command's help, in one line."""
    return " ".join((command.help or "").partition("\n\n")[0].split())
