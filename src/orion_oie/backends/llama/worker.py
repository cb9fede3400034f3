"""The process that holds one loaded model: `python -m orion_oie.backends.llama.worker FD`.

Three threads: the main one owns the model and runs the batches, one reads commands, one turns
conversations into tokens. It writes nothing to stdout, ignores Ctrl-C, and ends at once when its
parent is gone.
"""

import faulthandler
import os
import queue
import resource
import sys
import threading
import traceback
from bisect import bisect_left
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from orion_oie.backends.llama import native
from orion_oie.backends.llama.batcher import Batcher, Task
from orion_oie.backends.llama.chat import ChatTemplate, PlainFormat
from orion_oie.backends.llama.protocol import Packet, error_to_wire, receive, send
from orion_oie.errors import (
    ContextOverflowError,
    InvalidRequestError,
    ModelError,
    OrionError,
    WorkerError,
)
from orion_oie.schemas import GenerationOptions, Message
from orion_oie.specs import PromptFormat

_PARENT_CHECK_S = 2.0
_LOG_LEVELS_SENT = frozenset({"warning", "error"})
_PROGRESS_STEP = 0.05


class Worker:
    """Wires the three threads together."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._send_lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Packet] = queue.SimpleQueue()
        self._to_prepare: queue.SimpleQueue[Packet] = queue.SimpleQueue()
        self._preparing: set[int] = set()
        self._abort = native.AbortFlag()
        self._parent = os.getppid()

    def run(self) -> None:
        """Load the model that the first command names, then serve until told to close."""
        native.capture_logs(self._on_native_log)
        spec = receive(self._connection)
        threading.Thread(target=self._read_commands, name="commands", daemon=True).start()
        try:
            model = self._load(spec)
            form = _prompt_form(model, spec)
        except Exception as error:  # noqa: BLE001 (the host decides what a failed load means)
            self._send({"ev": "failed", "error": error_to_wire(_as_orion(error))})
            return
        threading.Thread(
            target=self._prepare_tasks, args=(model, form), name="prepare", daemon=True
        ).start()
        self._send(
            {
                "ev": "loaded",
                "context_length": model.context_length,
                "threads": spec["threads"],
                "device": model.device,
            }
        )
        self._serve(Batcher(model))

    def _load(self, spec: Packet) -> native.NativeModel:
        shown = 0.0

        def on_progress(fraction: float) -> None:
            nonlocal shown
            if fraction - shown >= _PROGRESS_STEP:
                shown = fraction
                self._send({"ev": "loading", "fraction": fraction})

        model = native.NativeModel(
            [Path(file) for file in spec["files"]],
            slots=spec["slots"],
            context_length=spec["context_length"],
            threads=spec["threads"],
            abort=self._abort,
            on_progress=on_progress,
        )
        if not model.can_generate:
            raise ModelError(f"{spec['files'][0]} is not a model that writes text")
        return model

    # -- main thread

    def _serve(self, batcher: Batcher) -> None:
        while True:
            for command in self._commands(wait=not batcher.has_work):
                if command["op"] == "close":
                    return
                self._obey(command, batcher)
            output = batcher.step()
            if output:
                self._send(
                    {"ev": "step", "text": output.text, "done": output.done, "error": output.error}
                )

    def _commands(self, *, wait: bool) -> list[Packet]:
        commands = [self._inbox.get()] if wait else []
        while True:
            try:
                commands.append(self._inbox.get_nowait())
            except queue.Empty:
                return commands

    def _obey(self, command: Packet, batcher: Batcher) -> None:
        if command["op"] == "cancel":
            self._abort.lower()
            # A task that is still being prepared is dropped when it comes out.
            self._preparing.discard(command["id"])
            batcher.cancel(command["id"])
            self._send_end({"id": command["id"]})
            return
        if command["id"] not in self._preparing:
            return
        self._preparing.discard(command["id"])
        if command["op"] == "task":
            batcher.add(command["task"])
        else:
            self._send_end({"id": command["id"], "error": command["error"]})

    # -- command thread

    def _read_commands(self) -> None:
        try:
            while True:
                while not self._connection.poll(_PARENT_CHECK_S):
                    if os.getppid() != self._parent:
                        os._exit(0)
                self._accept(receive(self._connection))
        except (EOFError, OSError):
            os._exit(0)
        except Exception:  # noqa: BLE001 (a worker that no longer listens must not live on)
            traceback.print_exc()
            os._exit(1)

    def _accept(self, command: Packet) -> None:
        if command["op"] == "generate":
            self._preparing.add(command["id"])
            self._to_prepare.put(command)
        else:
            self._abort.raise_()
            self._inbox.put(command)

    # -- preparing thread

    def _prepare_tasks(self, model: native.NativeModel, form: "ChatTemplate | PlainFormat") -> None:
        while True:
            command = self._to_prepare.get()
            if command["id"] not in self._preparing:
                continue  # cancelled while it waited
            try:
                task = _prepared(command, model, form)
                self._inbox.put({"op": "task", "id": task.id, "task": task})
            except Exception as error:  # noqa: BLE001 (one bad request must not end the thread)
                wire = error_to_wire(_as_orion(error))
                self._inbox.put({"op": "rejected", "id": command["id"], "error": wire})

    # -- sending

    def _send_end(self, end: Packet) -> None:
        """Report that a task ended without an answer: with an error, or cancelled."""
        self._send({"ev": "step", "text": [], "done": [], "error": [end]})

    def _send(self, message: Packet) -> None:
        with self._send_lock:
            try:
                send(self._connection, message)
            except OSError:
                os._exit(0)

    def _on_native_log(self, level: str, line: str) -> None:
        # While a decode is being aborted, llama.cpp reports what was asked of it as errors.
        if level in _LOG_LEVELS_SENT and not self._abort.is_raised:
            self._send({"ev": "log", "level": level, "line": line})


def _as_orion(error: Exception) -> OrionError:
    if isinstance(error, OrionError):
        return error
    return WorkerError(f"the worker met {type(error).__name__}: {error}")


def _prompt_form(model: native.NativeModel, spec: Packet) -> "ChatTemplate | PlainFormat":
    if spec["prompt_format"] is not None:
        return PlainFormat(PromptFormat.model_validate(spec["prompt_format"]))
    if model.chat_template is None:
        raise ModelError(
            f"{spec['files'][0]} has no chat template; set 'prompt_format' in models.json"
        )
    return ChatTemplate(
        model.chat_template, model.special_text(model.bos), model.special_text(model.eos)
    )


def _prepared(
    command: Packet, model: native.NativeModel, form: "ChatTemplate | PlainFormat"
) -> Task:
    """The task of a "generate" command; raises `ContextOverflowError` if it can never fit."""
    options = GenerationOptions.model_validate(command["options"])
    messages = [Message.model_validate(message) for message in command["messages"]]
    kept = 1 if messages and messages[0].role == "system" else 0
    requested = options.max_tokens if options.max_tokens_asked else 1

    def tokens_without(dropped: int) -> list[int]:
        segments = form.render(messages[:kept] + messages[kept + dropped :])
        return model.tokenize([(segment.text, segment.is_control) for segment in segments])

    def fits(tokens: list[int]) -> bool:
        return len(tokens) + requested <= model.context_length

    dropped = 0
    tokens = tokens_without(dropped)
    if not fits(tokens) and options.on_overflow == "drop_oldest":
        choices = [0, *_droppable(messages[kept:])]
        least = bisect_left(choices, True, key=lambda count: fits(tokens_without(count)))
        dropped = choices[min(least, len(choices) - 1)]
        tokens = tokens_without(dropped)
    if not fits(tokens):
        raise _overflow(len(tokens), requested, model.context_length, dropped)
    if not tokens:
        raise InvalidRequestError("the prompt is empty: there is nothing to answer")
    return Task(command["id"], tokens, options, command["session_id"], dropped)


def _droppable(messages: list[Message]) -> list[int]:
    """How many of the oldest may go: whole turns, a question with its answer; never the last."""
    return [count for count in range(1, len(messages)) if messages[count].role != "assistant"]


def _overflow(prompt: int, requested: int, limit: int, dropped: int) -> ContextOverflowError:
    after = f" (after dropping {dropped} turns)" if dropped else ""
    return ContextOverflowError(
        f"the prompt has {prompt} tokens{after} and the answer may take {requested}, but the "
        f"context holds {limit}; shorten the question or the history, lower max_tokens, pass "
        'on_overflow="drop_oldest", or raise EngineConfig(context_length=...)',
        prompt_tokens=prompt,
        requested_tokens=requested,
        limit=limit,
    )


def main() -> None:
    """Entry point of the process."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    Worker(connection).run()
    # Freeing a context that other threads may still look at is not worth the risk.
    os._exit(0)


if __name__ == "__main__":
    main()
