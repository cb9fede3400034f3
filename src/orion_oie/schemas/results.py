"""What comes out of a request: the answer, its receipt, and the pieces of a stream."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import PrivateAttr

from orion_oie.errors import InvalidRequestError
from orion_oie.schemas.base import Schema


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

    def take_feedback(self, keep: Callable[[str], None] | None) -> None:
        """Have `feedback` call `keep(correct_agent)`; None keeps none."""
        self._feedback = keep

    def feedback(self, correct_agent: str) -> None:
        """Keep the question as an example of what an agent should answer, for training the router.

        Raises `InvalidRequestError` unless the engine was told where, `UnknownAgentError`.
        """
        if self._feedback is None:
            raise InvalidRequestError(
                "feedback is not kept: name a file with EngineConfig.router.feedback"
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
