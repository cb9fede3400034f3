"""The input of a request: messages, sampling settings, options."""

from pathlib import Path
from typing import Annotated, Any, Literal

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
    """Sampling settings that an agent may preset; None leaves the choice to the next level.

    `temperature` 0 is greedy decoding. `top_k` 0 considers every token. `min_p` drops tokens
    less probable than this fraction of the most probable one. `repeat_penalty` above 1 makes
    recent tokens less likely.
    """

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repeat_penalty: RepeatPenalty | None = None
    max_tokens: MaxTokens | None = None
    stop: StopStrings | None = None


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
    stop: StopStrings = []
    logit_bias: list[tuple[BiasKey, Bias]] = []
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    logprobs: TopLogprobs | None = None
    on_overflow: Literal["error", "drop_oldest"] = "error"


class RequestOptions(SamplingDefaults):
    """The keyword options of `OrionInferenceEngine.infer` and its siblings.

    agent: who answers; None lets the router choose. images: what the question is about, as paths or
    as the bytes of files. conversation_history: earlier turns of user and assistant, as messages
    or as {"role", "content"}. session_id: requests with one id find the state of their last turn
    again, as long as it is in memory, and the agent that answered it; no text is kept.
    system_prompt: replaces the agent's. seed: None draws one; the receipt names it.
    logit_bias: what to add to the logits of tokens, by number or by a text that is one token of
    the model; -100 all but forbids one. json_schema: the answer is JSON that validates against
    it. grammar: the answer is in the language of this GBNF grammar, whose first rule is `root`.
    logprobs: return the log-probability of each token, and of as many alternatives.
    deadline: seconds for everything, from the call to the last token. priority: higher is served
    first. local_only: nothing leaves this machine, whatever fails.
    on_overflow: what to do with a history that does not fit the context; "drop_oldest" drops
    whole turns, and the receipt counts them.
    on_stream_failure: a model that fails after its text was seen is an error, or "restart"
    begins again and says so in the stream.
    """

    agent: str | None = None
    images: Images = []
    conversation_history: list[Message] = []
    session_id: str | None = Field(default=None, min_length=1, max_length=256)
    system_prompt: str | None = None
    seed: Seed | None = None
    logit_bias: dict[BiasKey, Bias] = {}
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    logprobs: TopLogprobs | None = None
    deadline: Annotated[float, Field(strict=True, gt=0, le=LONGEST_WAIT_S)] | None = None
    priority: Annotated[int, Field(strict=True, ge=-100, le=100)] = 0
    local_only: Annotated[bool, Field(strict=True)] = False
    on_overflow: Literal["error", "drop_oldest"] = "error"
    on_stream_failure: Literal["error", "restart"] = "error"
