"""A conversation with its history: `engine.chat()`.

It asks through the public calls of an engine, like any application, and keeps the questions and
answers, which an engine does not. A turn is a question with its answer; one that is cancelled or
fails leaves no trace. Text only: of a question with images the text is kept.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_oie.callbacks import host_log
from orion_oie.engine.answer_stream import AnswerStream
from orion_oie.engine.chat_file import ChatFile
from orion_oie.engine.loop import until_done
from orion_oie.engine.turn_line import Place, TurnLine
from orion_oie.errors import InvalidRequestError, UnknownAgentError
from orion_oie.guardrails.requests import checked_options
from orion_oie.schemas.requests import Message, RequestOptionsDict

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping
    from typing import Unpack

    from orion_oie.engine.engine import OrionInferenceEngine
    from orion_oie.engine.handle import RequestHandle
    from orion_oie.engine.streaming import ChunkBy
    from orion_oie.schemas.results import InferenceResult, TokenEvent

_OWN_OPTIONS = ("conversation_history", "session_id")


class Chat:
    """A conversation with its history. Thread-safe: turns are taken one after the other, in the
    order of the calls, and each question sees the answers before it.

    `engine.chat()` makes one, `Chat.load` reads one from a file. Calls take the options of
    `OrionInferenceEngine.infer`, but `conversation_history` and `session_id`, which are the chat's.
    When the history does not fit the context, the model is not shown the oldest messages, unless
    the call says `on_overflow="error"`; `history` keeps them, and `notes` tells of it.
    """

    def __init__(
        self,
        engine: OrionInferenceEngine,
        agent: str | None = None,
        system_prompt: str | None = None,
    ) -> None:
        """agent: answers every question; None lets the router choose. system_prompt: replaces the
        agent's. Raises `UnknownAgentError`, `InvalidRequestError`."""
        checked_options({"agent": agent, "system_prompt": system_prompt})
        chat = ChatFile(agent=agent, system_prompt=system_prompt)
        chat.check(engine.config.guardrails.max_query_chars)
        if agent is not None:
            engine.registry.agent(agent)
        self._engine = engine
        self._agent = agent
        self._system_prompt = system_prompt
        self._session_id = f"chat-{uuid.uuid4().hex}"
        self._line = TurnLine()
        self._lock = threading.RLock()  # a signal handler may call the library, anywhere
        self._said = _Said()
        self._turn: _Turn | None = None
        self._place: Place | None = None  # to be left

    @classmethod
    def load(cls, path: str | os.PathLike[str], engine: OrionInferenceEngine) -> Chat:
        """A chat that `save` has written, to be continued with an engine.

        Raises `InvalidRequestError` for a file that cannot be read or is no chat,
        `UnknownAgentError` if the engine does not know its agent.
        """
        path = Path(path)
        file = ChatFile.read(path, max_chars=engine.config.guardrails.max_query_chars)
        try:
            chat = cls(engine, file.agent, file.system_prompt)
        except UnknownAgentError as error:
            raise UnknownAgentError(f"{path}: {error.message}", **error.details) from error
        chat._said = _Said(tuple(file.messages))
        return chat

    # -- questions

    def ask(self, question: str, **options: Unpack[RequestOptionsDict]) -> InferenceResult:
        """Ask and wait for the answer. Raises what `infer` raises; then the history is as before.

        Another question that is not answered yet is waited for, without limit: `deadline` counts
        from the end of that turn.
        """
        merged = self._merged(options)
        with self._line.place() as place:
            place.result()
            result = self._engine.infer(question, **self._with_history(merged))
            return self._taken(question, result)

    async def aask(self, question: str, **options: Unpack[RequestOptionsDict]) -> InferenceResult:
        """`ask` for asynchronous callers; cancelling the task cancels the request."""
        merged = self._merged(options)
        with self._line.place() as place:
            await until_done(place)
            result = await self._engine.ainfer(question, **self._with_history(merged))
            return self._taken(question, result)

    def stream(
        self,
        question: str,
        *,
        chunk_by: ChunkBy = "token",
        typewriter_delay: float = 0.0,
        on_event: Callable[[TokenEvent], None] | None = None,
        **options: Unpack[RequestOptionsDict],
    ) -> RequestHandle:
        """Ask and iterate over the answer while it is written, see `OrionInferenceEngine.stream`.

        The history gets the turn when the answer is complete. It stays as it was if the request
        fails or is cancelled, as by leaving a loop or a `with` block early, or dropping the handle.
        """
        merged = self._merged(options)
        how = {"chunk_by": chunk_by, "typewriter_delay": typewriter_delay, "on_event": on_event}
        place = Place()
        try:
            self._line.enter(place)
            place.result()
            return self._begun(question, how, merged, place)
        except BaseException:  # Ctrl-C too
            self._line.leave(place)
            raise

    def astream(
        self,
        question: str,
        *,
        chunk_by: ChunkBy = "token",
        typewriter_delay: float = 0.0,
        on_event: Callable[[TokenEvent], None] | None = None,
        **options: Unpack[RequestOptionsDict],
    ) -> AnswerStream:
        """`stream` for asynchronous callers. The turn begins with the first step of the loop, or
        with `await stream.started()`, which raise what is wrong with the request."""
        merged = self._merged(options)
        how = {"chunk_by": chunk_by, "typewriter_delay": typewriter_delay, "on_event": on_event}

        async def start() -> RequestHandle:
            place = Place()
            try:
                self._line.enter(place)
                await until_done(place)
                return self._begun(question, how, merged, place)
            except BaseException:  # a cancelled task too
                self._line.leave(place)
                raise

        return AnswerStream(start)

    # -- what was said

    @property
    def agent(self) -> str | None:
        """The agent that answers; None if the router chooses one for each question."""
        return self._agent

    @property
    def system_prompt(self) -> str | None:
        """The system prompt instead of the agent's; None if that is used."""
        return self._system_prompt

    @property
    def session_id(self) -> str:
        """The name under which the engine finds the state of the last turn again."""
        return self._session_id

    @property
    def history(self) -> list[Message]:
        """The complete turns, oldest first, a question and its answer each. A copy."""
        self._settle()
        return list(self._said.messages)

    @property
    def notes(self) -> list[str]:
        """Remarks on what the model was not shown, oldest first. A copy; the log has them too."""
        self._settle()
        return list(self._said.notes)

    @property
    def dropped_turns(self) -> int:
        """The number of oldest messages of the history that the model was not shown for its last
        answer, because they did not fit."""
        self._settle()
        return self._said.dropped_turns

    def undo(self) -> list[Message]:
        """Forget the last turn; returns its question and answer, or an empty list if there is none.

        Raises `InvalidRequestError` while a question is not answered yet.
        """
        with self._at_rest("undo"):
            kept, forgotten = self._said.messages[:-2], self._said.messages[-2:]
            self._said = replace(self._said, messages=kept)
            return list(forgotten)

    def clear(self) -> None:
        """Forget all turns and notes. Raises `InvalidRequestError` while a question is not answered
        yet."""
        with self._at_rest("clear"):
            self._said = _Said()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the complete turns, the agent and the system prompt to a JSON file, which is
        replaced as a whole. Raises `OSError` if it cannot be written."""
        file = ChatFile(agent=self._agent, system_prompt=self._system_prompt, messages=self.history)
        file.write(path)

    def __repr__(self) -> str:
        self._settle()
        agent = "any agent" if self._agent is None else f"agent '{self._agent}'"
        count = len(self._said.messages) // 2
        return f"<Chat with {agent}, {count} turn{'' if count == 1 else 's'}>"

    # -- one turn after the other

    @contextlib.contextmanager
    def _at_rest(self, what: str) -> Iterator[None]:
        """Keep turns away, and hold the lock, while the block runs."""
        self._settle()
        with self._line.place_if_free() as place:
            if place is None:
                raise InvalidRequestError(
                    f"chat.{what}: a question is not answered yet; wait for its answer or cancel it"
                )
            with self._lock:
                yield

    def _begun(
        self, question: str, how: Mapping[str, Any], options: RequestOptionsDict, place: Place
    ) -> RequestHandle:
        """A request under way. With it ends its turn, and the place is left."""
        handle = self._engine.stream(question, **how, **self._with_history(options))
        view = handle.view()  # whoever drops the handle ends the request
        with self._lock:
            self._turn = _Turn(question, view, place)
        view.at_end(self._settle)
        return handle

    def _settle(self) -> None:
        """Take the answer of a stream that has ended: its reader may be faster than its callback.

        What an interrupt leaves undone, the next call does.
        """
        with self._lock:
            before, turn = self._said, self._turn
            after = before
            if turn is not None and turn.handle.done():
                if turn.handle.answer is not None:
                    after = before.after(turn.question, turn.handle.answer)
                self._said, self._turn, self._place = after, None, turn.place
            if self._place is not None:
                self._line.leave(self._place)
                self._place = None
        self._report(before, after)

    def _taken(self, question: str, result: InferenceResult) -> InferenceResult:
        with self._lock:
            before = self._said
            after = self._said = before.after(question, result)
        self._report(before, after)
        return result

    def _report(self, before: _Said, after: _Said) -> None:
        for note in after.notes[len(before.notes) :]:
            host_log.log(logging.WARNING, "%s: %s", self._session_id, note)

    # -- options

    def _merged(self, options: RequestOptionsDict) -> RequestOptionsDict:
        """The options of a call over those of the chat."""
        for name in _OWN_OPTIONS:
            if name in options:
                raise InvalidRequestError(
                    f"{name}: a chat has its own; ask the engine itself to bring another one"
                )
        self._settle()
        merged: RequestOptionsDict = {
            "agent": self._agent,
            "system_prompt": self._system_prompt,
            "on_overflow": "drop_oldest",
        }
        merged.update(options)
        return merged

    def _with_history(self, options: RequestOptionsDict) -> RequestOptionsDict:
        with self._lock:  # a turn whose place was left has been taken
            history = list(self._said.messages)
        return {**options, "conversation_history": history, "session_id": self._session_id}


@dataclass(frozen=True, slots=True)
class _Said:
    """What a chat has by some moment. It is replaced in one step."""

    messages: tuple[Message, ...] = ()
    notes: tuple[str, ...] = ()
    dropped_turns: int = 0

    def after(self, question: str, result: InferenceResult) -> _Said:
        """What it has after a turn."""
        notes = self.notes
        dropped = result.receipt.dropped_turns
        if dropped > self.dropped_turns:
            notes += (
                f"answer {len(self.messages) // 2 + 1}: the context of {result.model_id} is full; "
                f"it was not shown the oldest {dropped} messages of the conversation",
            )
        turn = (
            Message(role="user", content=question),
            Message(role="assistant", content=result.content),
        )
        return _Said(self.messages + turn, notes, dropped)


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """A streamed turn whose answer has not been taken."""

    question: str
    handle: RequestHandle
    place: Place
