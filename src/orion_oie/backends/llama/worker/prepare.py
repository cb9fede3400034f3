"""Preparation of requests: a job becomes a task for the batcher, rendered, tokenized and checked.

Everything that can be wrong with a request is found in this step, before anything is computed. It
may run on another thread than the one that owns the model.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from orion_oie.backends.llama.protocol import GenerateCommand
from orion_oie.backends.llama.worker.chat import (
    ChatTemplate,
    PlainFormat,
    PlainText,
    Segment,
    prefix_of,
)
from orion_oie.backends.llama.worker.grammar import parse_grammar
from orion_oie.backends.llama.worker.native import NativeModel
from orion_oie.backends.llama.worker.schema_grammar import gbnf_of_schema
from orion_oie.backends.llama.worker.tasks import Task
from orion_oie.backends.llama.worker.vocabulary import Vocabulary
from orion_oie.errors import ContextOverflowError, InvalidRequestError
from orion_oie.models.specs import PromptFormat
from orion_oie.schemas.requests import GenerationOptions, Message

PromptForm = ChatTemplate | PlainFormat | PlainText


class NoForm:
    """In place of the format of a base model, which has none: a request must ask for plain text."""

    def __init__(self, name: object) -> None:
        self._name = name

    def render(self, _messages: Sequence[Message]) -> list[Segment]:
        """Raises `InvalidRequestError`."""
        raise InvalidRequestError(
            f"{self._name} has no chat template: it is a base model, which continues a text and "
            "does not answer. Ask for that with prompt_format='plain', or set 'prompt_format' for "
            "this model in models.json"
        )


def prompt_form(
    model: NativeModel, prompt_format: PromptFormat | None, name: object = "the model"
) -> PromptForm | NoForm:
    """The format of conversations: `prompt_format`, or else the model's own chat template. In
    messages the model is called `name`."""
    if prompt_format is not None:
        return PlainFormat(prompt_format)
    if model.chat_template is None:
        return NoForm(name)
    words = model.vocabulary
    return ChatTemplate(
        model.chat_template, words.special_text(words.bos), words.special_text(words.eos)
    )


def prepared(command: GenerateCommand, model: NativeModel, form: PromptForm | NoForm) -> Task:
    """The task of a command.

    1. Render and tokenize the conversation.
    2. If it does not fit the context and the options allow it, drop the oldest turns, as few as
       possible, found by bisection.
    3. Resolve the logit bias and parse the grammar.

    Raises `ContextOverflowError` for a prompt that does not fit, and `InvalidRequestError`.
    """
    job, options = command.job, command.job.options
    form = PlainText() if job.is_plain else form
    messages = list(job.messages)
    kept = 1 if messages and messages[0].role == "system" else 0
    requested = options.max_tokens if options.max_tokens_asked else 1

    def tokens_of(segments: list[Segment]) -> list[int]:
        return model.vocabulary.tokenize(
            [(segment.text, segment.is_control) for segment in segments]
        )

    def rendered_without(dropped: int) -> list[Segment]:
        return form.render(messages[:kept] + messages[kept + dropped :])

    def fits(tokens: list[int]) -> bool:
        return len(tokens) + requested <= model.context_length

    dropped = 0
    segments = rendered_without(dropped)
    tokens = tokens_of(segments)
    if not fits(tokens) and options.on_overflow == "drop_oldest":
        choices = [0, *_droppable(messages[kept:])]
        least = bisect_left(
            choices, True, key=lambda count: fits(tokens_of(rendered_without(count)))
        )
        dropped = choices[min(least, len(choices) - 1)]
        segments = rendered_without(dropped)
        tokens = tokens_of(segments)
    if not fits(tokens):
        raise _overflow(len(tokens), requested, model.context_length, dropped)
    if not tokens:
        raise InvalidRequestError("the prompt is empty: there is nothing to answer")
    return Task(
        command.id,
        tokens,
        options,
        session_id=job.session_id,
        dropped_turns=dropped,
        prefix_tokens=len(tokens_of(prefix_of(segments, messages[0]))),
        is_prefix_public=job.is_prefix_public,
        priority=job.priority,
        is_streamed=job.is_streamed,
        bias=[(_token_of(key, model.vocabulary), value) for key, value in options.logit_bias],
        grammar=_grammar_of(options, model),
    )


def _token_of(key: int | str, vocabulary: Vocabulary) -> int:
    """The token for a key of `logit_bias`."""
    if isinstance(key, int):
        if not 0 <= key < vocabulary.size:
            raise InvalidRequestError(
                f"logit_bias: there is no token {key}; the model has {vocabulary.size}"
            )
        return key
    tokens = vocabulary.text_tokens(key)
    if len(tokens) != 1:
        raise InvalidRequestError(
            f"logit_bias: {key!r} is {len(tokens)} tokens of this model; only single tokens can "
            "be made more or less likely"
        )
    return tokens[0]


def _grammar_of(options: GenerationOptions, model: NativeModel) -> Any:
    """The grammar sampler of the options; None without a grammar."""
    text = options.grammar
    if options.json_schema is not None:
        text = gbnf_of_schema(options.json_schema)
    return None if text is None else parse_grammar(model.vocabulary.handle, text)


def _droppable(messages: list[Message]) -> list[int]:
    """The numbers of oldest messages that may be dropped: whole turns, a question with its answer,
    but never the last one."""
    return [count for count in range(1, len(messages)) if messages[count].role != "assistant"]


def _overflow(prompt: int, requested: int, limit: int, dropped: int) -> ContextOverflowError:
    after = f" (after dropping {dropped} turns)" if dropped else ""
    return ContextOverflowError(
        f"the prompt has {prompt} tokens{after} and the answer may take {requested}, but the "
        f"context holds {limit}; shorten the question or the history, lower max_tokens, pass "
        'on_overflow="drop_oldest", or raise EngineConfig.serving.context_length',
        prompt_tokens=prompt,
        requested_tokens=requested,
        limit=limit,
    )
