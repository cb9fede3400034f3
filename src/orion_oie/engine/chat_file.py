"""The file of a chat: what `Chat.save` writes and `Chat.load` reads.

A file of another kind, of a newer version or with a broken conversation is refused as a whole.
"""

import json
import os
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError

from orion_oie.errors import InvalidRequestError
from orion_oie.guardrails.requests import check_history, check_text
from orion_oie.models.files import atomic_write
from orion_oie.schemas.base import Schema
from orion_oie.schemas.requests import Message
from orion_oie.schemas.validation import problems_of

_FORMAT: Final = "orion-oie chat"
_VERSION: Final = 1


class ChatFile(Schema):
    """The content of the file. messages: questions and answers in turn, oldest first."""

    format: Literal["orion-oie chat"] = _FORMAT
    version: Literal[1] = _VERSION
    agent: str | None = None
    system_prompt: str | None = None
    messages: list[Message] = Field(default_factory=list)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Replace the file as a whole. Raises `OSError`."""
        atomic_write(Path(path), self.model_dump_json(indent=2) + "\n", sync=True)

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, max_chars: int) -> "ChatFile":
        """Read and check a file whose texts have `max_chars` characters at most.

        Raises `InvalidRequestError`, which names the file and what is wrong with it.
        """
        path = Path(path)
        try:
            raw = json.loads(path.read_bytes())
        except OSError as error:
            raise InvalidRequestError(
                f"cannot read the chat {path}: {error.strerror or error}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"{path} is no chat: it is not JSON: {error}") from error
        _check_kind(raw, path)
        try:
            chat = cls.model_validate(raw)
        except ValidationError as error:
            problems = problems_of(error, cls)
            raise InvalidRequestError(
                f"{path} is a broken chat: " + "; ".join(problems), problems=problems
            ) from error
        try:
            chat.check(max_chars)
        except InvalidRequestError as error:
            raise InvalidRequestError(
                f"{path} is a broken chat: {error.message}", **error.details
            ) from error
        return chat

    def check(self, max_chars: int) -> None:
        """Raise `InvalidRequestError` for texts that no engine takes, and for messages that are not
        questions and answers in turn."""
        check_text(self.system_prompt or "", "system_prompt", max_chars)
        for index, message in enumerate(self.messages):
            due = "assistant" if index % 2 else "user"
            if message.role != due:
                raise InvalidRequestError(
                    f"messages[{index}] has the role '{message.role}', and '{due}' is due"
                )
        if len(self.messages) % 2:
            raise InvalidRequestError(f"messages[{len(self.messages) - 1}] has no answer")
        check_history(self.messages, max_chars)


def _check_kind(raw: Any, path: Path) -> None:
    """Raise `InvalidRequestError` for what is another file, or one of another version."""
    if not isinstance(raw, dict) or raw.get("format") != _FORMAT:
        raise InvalidRequestError(
            f'{path} is no chat: it has no "format": "{_FORMAT}", as Chat.save writes'
        )
    version = raw.get("version")
    if type(version) is not int or version != _VERSION:
        raise InvalidRequestError(
            f"{path} is a chat of version {version!r}, and this library reads version {_VERSION}; "
            "update the library or save the chat again"
        )
