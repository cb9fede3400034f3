"""The data that crosses the library's border: what goes into a request and what comes out.

Everything here is immutable and holds no behaviour beyond small derived values and what others put
there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from orion_oie.errors import InvalidRequestError


class Schema(BaseModel):
    """Base of the public schemas: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), defer_build=True
    )


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


_INT32_MAX = 2**31 - 1  # llama.cpp counts with 32 bits: a larger number would wrap around
LONGEST_WAIT_S = 1_000_000  # a wait of centuries overflows the clocks of the system

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
    """How one answer is generated: fully resolved, nothing left to a default.

    `max_tokens_asked` tells an explicit `max_tokens` of the caller from a preset: an explicit
    one that cannot fit is an error, a preset one is lowered to what fits. `logit_bias` is
    (token, added logit) pairs.
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


class RouteCandidate(Schema):
    """One agent that was considered. `score` orders the candidates: a probability, unless the
    router is the `KeywordRouter`, which adds up weights. `evidence`: the words, shapes and hints
    that count most for it. `stages`: its score after each stage that was asked."""

    agent_id: str
    score: float
    evidence: dict[str, float] = {}
    stages: dict[str, float] = {}


class Route(Schema):
    """Which agent answers, and why. `confidence` is in [0, 1]. `stages` that were asked, in order;
    `notes` on what the conversation, the models in memory or a stage that failed changed."""

    agent_id: str
    confidence: float
    reason: str
    language: str | None = None
    candidates: list[RouteCandidate] = []
    stages: list[str] = []
    notes: list[str] = []


class Usage(Schema):
    """Token counts. `cached_tokens` of the prompt were found in memory and not computed again."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class TokenAlternative(Schema):
    """A token that the model might have said. `logprob` is the natural logarithm of its
    probability before any sampling setting; `text` has U+FFFD for a part of a character."""

    text: str
    token: int
    logprob: float


class TokenLogprob(TokenAlternative):
    """A token of an answer, and the most probable ones in its place, best first."""

    top: list[TokenAlternative] = []


class Timings(Schema):
    """Where the time went, in milliseconds of wall time.

    `ttft_ms` runs from the call to the first piece of text. `tokens_per_second` counts the
    decode phase only: the tokens after the first, over the time after the first.
    """

    queue_ms: float = 0.0
    route_ms: float = 0.0
    load_ms: float = 0.0
    ttft_ms: float | None = None
    total_ms: float = 0.0
    tokens_per_second: float | None = None


class ModelInfo(Schema):
    """The loaded weights that answered."""

    model_id: str
    variant: str
    name: str
    version: str
    license: str
    architecture: str = ""
    quantization: str = ""
    size_bytes: int = 0
    context_length: int = 0
    device: str = "cpu"
    threads: int = 0


Outcome = Literal[
    "answered", "unavailable", "loading", "circuit_open", "failed", "restarted", "not_needed"
]


class Consideration(Schema):
    """One model that could have answered, and what became of it.

    `outcome`: `answered`, `unavailable` (its files are not here), `loading` (it is on its way, and
    answers the next request), `circuit_open`, `failed`
    (see `error`), `restarted` (failed after text had been sent, and the caller asked to start
    over), or `not_needed` (a model before it answered).
    """

    agent_id: str
    model_id: str
    role: Literal["primary", "lite", "fallback"]
    outcome: Outcome
    reason: str = ""
    error: str | None = None


class LoadReport(Schema):
    """How the model that answered came into memory, as far as it was at the end of the answer.

    `mode` "progressive": it was computed while its shards arrived. `shards_loaded` of `shards` and
    `bytes_loaded` of `bytes_total` were here. `note` says why, if that is not what was asked for.
    """

    mode: Literal["progressive", "sequential"] = "sequential"
    shards: int = 1
    shards_loaded: int = 1
    bytes_total: int = 0
    bytes_loaded: int = 0
    note: str = ""


class VariantReport(Schema):
    """Which variant of the model answered. `level` is q4, q8, f16 or f32; `reduction` the share of
    the size that it saves against 32 bits for each weight. `reason` says why it was chosen among
    the variants. `reserved_bytes` of memory were set aside for it out of `budget_bytes`."""

    quantization: str
    level: str | None = None
    reduction: float | None = None
    reason: str = ""
    reserved_bytes: int = 0
    budget_bytes: int | None = None


class Receipt(Schema):
    """The account of one request: why this answer came from this model in this time."""

    request_id: str
    route: Route | None = None
    considered: list[Consideration] = []
    model: ModelInfo | None = None
    seed: int | None = None
    cold_load: bool = False
    load: LoadReport | None = None
    variant: VariantReport | None = None
    evicted: list[str] = []
    replays: int = 0
    dropped_turns: int = 0
    removed_characters: int = 0
    state_ms: dict[str, float] = {}


FinishReason = Literal["stop", "length"]


class InferenceResult(Schema):
    """An answer with everything needed to judge it. `cost` is in US dollars. `logprobs` is None
    unless they were asked for. `feedback` is what may be said about it."""

    content: str
    agent_id: str
    model_id: str
    model_version: str
    variant: str
    confidence: float
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    receipt: Receipt
    cost: float = 0.0
    logprobs: list[TokenLogprob] | None = None
    _feedback: Callable[[str], None] | None = PrivateAttr(default=None)

    def feedback(self, correct_agent: str) -> None:
        """Keep the question as an example of what an agent should answer, for training the router.

        Raises `InvalidRequestError` unless the engine was told where, `UnknownAgentError`.
        """
        if self._feedback is None:
            raise InvalidRequestError(
                "feedback is not kept: name a file with EngineConfig(router_feedback=...)"
            )
        self._feedback(correct_agent)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One piece of a streamed answer.

    The `text` of all `kind="text"` events since the last `kind="restart"` event, joined, is the
    content of the result. After a `restart` the text received so far is void.
    """

    text: str
    index: int
    elapsed_ms: float
    kind: Literal["text", "restart"] = "text"


@dataclass(frozen=True, slots=True)
class StreamStats:
    """Speed of one stream so far. `tokens` counts model tokens, not events."""

    tokens: int
    ttft_ms: float | None
    tokens_per_second: float | None
