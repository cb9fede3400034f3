"""The input of a request: messages, sampling settings, options."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from pydantic import BeforeValidator, Field

from orion_oie.schemas.base import LONGEST_WAIT_S, Schema

Role = Literal["system", "user", "assistant"]


class Message(Schema):
    """One turn of a conversation."""

    role: Role
    content: str


def _one_or_many(value: object) -> object:
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, tuple) else value


def _path_or_bytes(value: object) -> object:
    if not isinstance(value, (str, Path, bytes)):
        raise ValueError("a path or the bytes of a file are needed")
    return value


def _named_model(value: object) -> object:
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError("an id, a source or a path is needed")
    name = os.fspath(value)
    if not isinstance(name, str) or not name.strip():
        raise ValueError("an id, a source or a path is needed")
    return name if isinstance(value, str) else Path(name)


ModelName = Annotated[str | Path, BeforeValidator(_named_model)]

_INT32_MAX = 2**31 - 1  # llama.cpp uses 32-bit integers: a larger number would overflow

Temperature = Annotated[float, Field(strict=True, ge=0, le=5)]

TopP = Annotated[float, Field(strict=True, gt=0, le=1)]

TopK = Annotated[int, Field(strict=True, ge=0, le=_INT32_MAX)]

MinP = Annotated[float, Field(strict=True, ge=0, lt=1)]

RepeatPenalty = Annotated[float, Field(strict=True, ge=0.1, le=10)]

MaxTokens = Annotated[int, Field(strict=True, ge=1, le=_INT32_MAX)]

Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32 - 1)]

TopLogprobs = Annotated[int, Field(strict=True, ge=0, le=20)]

BiasKey = Annotated[int, Field(strict=True)] | Annotated[str, Field(strict=True, min_length=1)]

Bias = Annotated[float, Field(strict=True, ge=-100, le=100)]

StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(max_length=16), BeforeValidator(_one_or_many)
]

Images = Annotated[
    list[Annotated[str | Path | bytes, BeforeValidator(_path_or_bytes)]], Field(max_length=16)
]


class SamplingDefaults(Schema):
    """Sampling settings that an agent may preset. None leaves the choice to the next level."""

    temperature: Temperature | None = Field(
        default=None,
        description="Spread of the distribution that tokens are drawn from. 0 is greedy decoding.",
    )

    top_p: TopP | None = Field(
        default=None,
        description="Probability that the most probable tokens, from which one is drawn, have "
        "together. 1 considers every token.",
    )

    top_k: TopK | None = Field(
        default=None,
        description="Number of most probable tokens considered. 0 considers every token.",
    )

    min_p: MinP | None = Field(
        default=None,
        description="Least probability of a token, as a fraction of that of the most probable one.",
    )

    repeat_penalty: RepeatPenalty | None = Field(
        default=None, description="Penalty of recent tokens. Above 1 makes them less likely."
    )

    max_tokens: MaxTokens | None = Field(default=None, description="Most tokens of the answer.")

    stop: StopStrings | None = Field(
        default=None, description="Text, or several, before which the answer ends."
    )


class GenerationOptions(Schema):
    """The settings of one generation, fully resolved, without defaults left to apply.

    `max_tokens_asked` is True if the caller set `max_tokens`: such a number that does not fit is an
    error, while a preset one is lowered to what fits. `logit_bias` holds pairs of a token and the
    value to add to its logit.
    """

    temperature: Temperature = 0.7
    top_p: TopP = 0.95
    top_k: TopK = 40
    min_p: MinP = 0.05
    repeat_penalty: RepeatPenalty = 1.0
    seed: Seed = 0
    max_tokens: MaxTokens = 512
    max_tokens_asked: bool = False
    stop: StopStrings = Field(default_factory=list)
    logit_bias: list[tuple[BiasKey, Bias]] = Field(default_factory=list)
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    logprobs: TopLogprobs | None = None
    on_overflow: Literal["error", "drop_oldest"] = "error"


class RequestOptions(SamplingDefaults):
    """The keyword options of `OrionInferenceEngine.infer` and its siblings.

    `RequestOptionsDict` lists the same options for type checkers and editors.
    """

    agent: str | None = Field(
        default=None, description="Agent that answers. None lets the router choose."
    )

    model: ModelName | None = Field(
        default=None,
        description="Model that answers instead of the agent's, and no other: the id of a model "
        "in the registry (`ID@VARIANT` for one variant), a GGUF file, or a source such as "
        '"hf:org/repo:Q4_K_M", "ollama:name" or an https address.',
    )

    images: Images = Field(
        default_factory=list,
        description="Images of the question, as paths or as the bytes of files.",
    )

    conversation_history: list[Message] = Field(
        default_factory=list,
        description="Earlier turns of user and assistant, as `Message`s or as dictionaries with "
        '"role" and "content".',
    )

    session_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="Name of a conversation. Its next request finds the state of the last turn "
        "again, as long as it is in memory, and the agent that answered. No text is kept.",
    )

    system_prompt: str | None = Field(
        default=None, description="System prompt that replaces the agent's."
    )

    prompt_format: Literal["plain"] | None = Field(
        default=None,
        description='"plain" lets a base model, which has no chat template, continue the text: '
        "history and question are joined by blank lines, and the agent's system prompt is left "
        "out. None takes the model's own format.",
    )

    seed: Seed | None = Field(
        default=None,
        description="Seed of the random numbers. None draws one, which the receipt names.",
    )

    logit_bias: dict[BiasKey, Bias] = Field(
        default_factory=dict,
        description="Added to the logits of tokens. A token is given by its number, or by a text "
        "that is one token of the model; -100 all but forbids it.",
    )

    json_schema: dict[str, Any] | None = Field(
        default=None,
        description="JSON Schema. The answer is JSON that validates against it.",
    )

    grammar: str | None = Field(
        default=None,
        description="GBNF grammar with the first rule `root`. The answer is in its language.",
    )

    logprobs: TopLogprobs | None = Field(
        default=None,
        description="Return the log-probability of each token, and of this many alternatives.",
    )

    deadline: Annotated[float, Field(strict=True, gt=0, le=LONGEST_WAIT_S)] | None = Field(
        default=None,
        description="Seconds for everything, from the call to the last token.",
    )

    priority: Annotated[int, Field(strict=True, ge=-100, le=100)] = Field(
        default=0, description="Requests of higher priority are served first."
    )

    local_only: Annotated[bool, Field(strict=True)] = Field(
        default=False, description="Let nothing leave this machine, whatever fails."
    )

    on_overflow: Literal["error", "drop_oldest"] = Field(
        default="error",
        description='Treatment of a history that does not fit the context. "drop_oldest" drops '
        "whole turns, and the receipt counts them.",
    )

    on_stream_failure: Literal["error", "restart"] = Field(
        default="error",
        description="Treatment of a model that fails after some of its text was read. "
        '"restart" begins again and reports that in the stream.',
    )


class RequestOptionsDict(TypedDict, total=False):
    """The keyword options of a request as a type: `**options: Unpack[RequestOptionsDict]`.

    Each is described at the field of `RequestOptions` with the same name, which checks it.
    """

    agent: str | None
    model: str | os.PathLike[str] | None
    images: Sequence[str | Path | bytes]
    conversation_history: Sequence[Message | Mapping[str, str]]
    session_id: str | None
    system_prompt: str | None
    prompt_format: Literal["plain"] | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repeat_penalty: float | None
    seed: int | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    logit_bias: Mapping[int, float] | Mapping[str, float] | Mapping[int | str, float]
    json_schema: dict[str, Any] | None
    grammar: str | None
    logprobs: int | None
    deadline: float | None
    priority: int
    local_only: bool
    on_overflow: Literal["error", "drop_oldest"]
    on_stream_failure: Literal["error", "restart"]
