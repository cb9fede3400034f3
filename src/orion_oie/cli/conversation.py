"""A conversation with an engine: each question is asked with the turns before it."""

import contextlib
import json
import uuid
from pathlib import Path
from typing import Any, Protocol

from orion_oie import Message, OrionError, OrionInferenceEngine, RequestHandle
from orion_oie.models.files import atomic_write


class Conversation(Protocol):
    """What the commands need of `engine.chat()`."""

    @property
    def history(self) -> list[Message]: ...

    def stream(self, question: str, **options: Any) -> RequestHandle: ...

    def clear(self) -> None: ...

    def save(self, path: Path) -> None: ...


def conversation(
    engine: OrionInferenceEngine, agent: str | None, system_prompt: str | None
) -> Conversation:
    """A new conversation."""
    chat = getattr(engine, "chat", None)
    return _Turns(engine, agent, system_prompt) if chat is None else chat(agent, system_prompt)


class _Turns:
    """The turns so far. A question that was not answered as a whole leaves none."""

    def __init__(
        self, engine: OrionInferenceEngine, agent: str | None, system_prompt: str | None
    ) -> None:
        if agent is not None:
            engine.registry.agent(agent)
        self._engine = engine
        self._options: dict[str, Any] = {
            "agent": agent,
            "system_prompt": system_prompt,
            "on_overflow": "drop_oldest",
            "session_id": f"chat-{uuid.uuid4().hex}",
        }
        self._turns: list[Message] = []
        self._asked: tuple[str, RequestHandle] | None = None

    @property
    def history(self) -> list[Message]:
        if self._asked is not None and self._asked[1].done():
            (question, handle), self._asked = self._asked, None
            with contextlib.suppress(OrionError):  # its reader heard of it
                answer = handle.result().content
                self._turns += [
                    Message(role="user", content=question),
                    Message(role="assistant", content=answer),
                ]
        return list(self._turns)

    def stream(self, question: str, **options: Any) -> RequestHandle:
        before = self.history
        handle = self._engine.stream(
            question, **{**self._options, **options, "conversation_history": before}
        )
        self._asked = question, handle
        return handle

    def clear(self) -> None:
        self._asked, self._turns = None, []

    def save(self, path: Path) -> None:
        kept = {
            "format": "orion-oie chat",
            "version": 1,
            "agent": self._options["agent"],
            "system_prompt": self._options["system_prompt"],
            "messages": [turn.model_dump() for turn in self.history],
        }
        atomic_write(path, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
