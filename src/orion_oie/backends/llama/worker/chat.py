"""Rendering of a conversation with a model's chat template, with text and control kept apart.

The template never gets a message's content, but a mark in its place. Its output is then cut at the
marks into segments, so that only the template's own text can become control tokens. This module
does not tokenize.
"""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orion_oie.errors import InvalidRequestError, ModelCorruptError, OrionError, described
from orion_oie.models.specs import PromptFormat
from orion_oie.schemas.requests import Message

# Em spaces around the mark reveal a template that strips contents.
_PAD = "\u2003"
_MARK = re.compile(f"({_PAD}?)\ue000([0-9]+)\ue001({_PAD}?)")

# Templates of reasoning models cut earlier answers like this; a mark leaves nothing to cut.
_CUTS_REASONING = re.compile(r"""split\(\s*['"]</think>['"]\s*\)""")

RENDER_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of the prompt. Only in a control segment may text stand for control tokens."""

    text: str
    is_control: bool


class ChatTemplate:
    """A Jinja chat template of a GGUF, in a sandbox."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        self._template = _compiled(source)
        self._cuts_reasoning = bool(_CUTS_REASONING.search(source))
        self._special = {"bos_token": bos_token, "eos_token": eos_token}

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """The prompt that asks for the next assistant turn.

        A template without a system role gets the system text at the head of the first user turn,
        one that knows only lists of typed parts gets such lists. Raises `InvalidRequestError`
        with the template's own complaint, e.g. about the order of roles, and `ModelCorruptError`
        when the template leaves a message out, fails, or takes longer than `RENDER_LIMIT_S`.
        """
        if self._cuts_reasoning:
            messages = [_without_reasoning(message) for message in messages]
        ways = [(messages, False), (messages, True)]
        folded = _fold_system(messages)
        if len(folded) < len(messages):
            ways = [ways[0], (folded, False), ways[1], (folded, True)]
        refusals: list[_TemplateRefusalError | ModelCorruptError] = []
        for way, is_typed in ways:
            try:
                return self._render(way, is_typed)
            except (_TemplateRefusalError, ModelCorruptError) as refusal:
                refusals.append(refusal)
            except _OutOfTimeError:
                raise ModelCorruptError(
                    f"the chat template of the model does not end within {RENDER_LIMIT_S:g} s; "
                    "set 'prompt_format' for this model in models.json"
                ) from None
        first = refusals[0]
        raise first if isinstance(first, ModelCorruptError) else _complaint(first)

    def _render(self, messages: Sequence[Message], is_typed: bool) -> list[Segment]:
        marked = [
            {"role": message.role, "content": _mark(index, message, is_typed)}
            for index, message in enumerate(messages)
        ]
        try:
            with _time_limit(RENDER_LIMIT_S):
                text = self._template.render(
                    messages=marked,
                    add_generation_prompt=True,
                    raise_exception=_refuse,
                    strftime_now=_strftime_now,
                    tools=None,
                    documents=None,
                    **self._special,
                )
            return _cut_at_marks(text, messages)
        except _TemplateRefusalError:
            raise
        except Exception as error:  # a template is foreign code: it may raise anything
            raise ModelCorruptError(
                f"the chat template of the model fails: {described(error)}; "
                "set 'prompt_format' for this model in models.json"
            ) from error


class PlainText:
    """No format at all: the texts, joined by blank lines, for the model to continue."""

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """The prompt, which ends with the last message."""
        text = "\n\n".join(message.content for message in messages if message.content)
        return [Segment(text, is_control=False)]


class PlainFormat:
    """The `prompt_format` of models.json, in place of a template."""

    def __init__(self, form: PromptFormat) -> None:
        self._form = form

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """The prompt that asks for the next assistant turn."""
        form = self._form
        prefixes = {
            "system": form.system_prefix,
            "user": form.user_prefix,
            "assistant": form.assistant_prefix,
        }
        segments = []
        for message in messages:
            segments.append(Segment(prefixes[message.role], is_control=True))
            segments.append(Segment(message.content, is_control=False))
            segments.append(Segment(form.eos_token, is_control=True))
        segments.append(Segment(form.assistant_prefix, is_control=True))
        return _merged(segments)


class _TemplateRefusalError(Exception):
    """The template called `raise_exception`."""


class _OutOfTimeError(BaseException):
    """The template runs for too long. Nothing that it calls may catch this."""


class _LeftOutError(_TemplateRefusalError):
    """The template dropped a message."""


def _refuse(message: object) -> None:
    raise _TemplateRefusalError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@contextmanager
def _time_limit(limit_s: float) -> Iterator[None]:
    """Ends Python code inside the `with` block, on this thread, soon after the limit."""
    end = time.monotonic() + limit_s

    def on_line(_frame: object, _event: str, _argument: object) -> Any:
        if time.monotonic() > end:
            raise _OutOfTimeError
        return on_line

    before = sys.gettrace()
    sys.settrace(on_line)
    try:
        yield
    finally:
        sys.settrace(before)


def _mark(index: int, message: Message, is_typed: bool) -> str | list[dict[str, str]]:
    # Empty content gets no mark: templates test for it.
    text = f"{_PAD}\ue000{index}\ue001{_PAD}" if message.content else ""
    return [{"type": "text", "text": text}] if is_typed else text


def _without_reasoning(message: Message) -> Message:
    if message.role != "assistant" or "</think>" not in message.content:
        return message
    answer = message.content.rpartition("</think>")[2].lstrip("\n")
    return Message(role="assistant", content=answer)


def _complaint(refusal: _TemplateRefusalError) -> OrionError:
    if isinstance(refusal, _LeftOutError):
        return ModelCorruptError(
            f"the chat template of the model {refusal}; "
            "set 'prompt_format' for this model in models.json"
        )
    return InvalidRequestError(
        f"the chat template of the model refuses this conversation: {refusal}; "
        "check the order of the roles in conversation_history"
    )


class _Generation(Extension):
    """Accepts the tag that marks the assistant's tokens for training, and ignores it."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    try:
        return environment.from_string(source)
    except Exception as error:  # Python's compiler has limits of its own
        raise ModelCorruptError(
            f"the chat template of the model cannot be read: {described(error)}; "
            "set 'prompt_format' for this model in models.json"
        ) from error


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    """The conversation with a leading system message moved into the first user turn."""
    if len(messages) < 2 or messages[0].role != "system" or messages[1].role != "user":
        return list(messages)
    first = "\n\n".join(message.content for message in messages[:2] if message.content)
    return [Message(role="user", content=first), *messages[2:]]


def _cut_at_marks(text: str, messages: Sequence[Message]) -> list[Segment]:
    segments = []
    seen = set()
    end = 0
    for mark in _MARK.finditer(text):
        index = int(mark[2])
        seen.add(index)
        content = messages[index].content
        content = content if mark[1] else content.lstrip()
        content = content if mark[3] else content.rstrip()
        segments.append(Segment(text[end : mark.start()], is_control=True))
        segments.append(Segment(content, is_control=False))
        end = mark.end()
    segments.append(Segment(text[end:], is_control=True))
    missing = [
        messages[i].role for i in range(len(messages)) if messages[i].content and i not in seen
    ]
    if missing:
        raise _LeftOutError(f"leaves out the {' and '.join(sorted(set(missing)))} message")
    return _merged(segments)


def prefix_of(segments: Sequence[Segment], first: Message) -> list[Segment]:
    """The common beginning of all conversations with the same system prompt: the segments before
    the first text that is not the system's. `first` is the first message of the conversation."""
    system = first.content.strip() if first.role == "system" else ""
    prefix: list[Segment] = []
    for segment in segments:
        if not segment.is_control:
            if not system or segment.text.strip() != system:
                break
            system = ""  # a question may repeat it
        prefix.append(segment)
    return prefix


def _merged(segments: list[Segment]) -> list[Segment]:
    merged: list[Segment] = []
    for segment in segments:
        if merged and segment.is_control and merged[-1].is_control:
            merged[-1] = Segment(merged[-1].text + segment.text, is_control=True)
        elif segment.text:
            merged.append(segment)
    return merged
