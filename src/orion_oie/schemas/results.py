"""The output of a request: the answer, its receipt, and the pieces of a stream."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, PrivateAttr

from orion_oie.errors import InvalidRequestError
from orion_oie.schemas.base import Schema


class RouteCandidate(Schema):
    """An agent that was considered. score: orders the candidates; a probability, or a sum of
    weights from the `KeywordRouter`. evidence: the words, shapes and hints that speak most for it.
    stages: its score after each stage that was used."""

    agent_id: str
    score: float
    evidence: dict[str, float] = Field(default_factory=dict)
    stages: dict[str, float] = Field(default_factory=dict)


class Route(Schema):
    """The agent that answers, and the reason. confidence: in [0, 1]. stages: those that were used,
    in order. notes: effects of the conversation, of models in memory, and of stages that failed."""

    agent_id: str
    confidence: float
    reason: str
    language: str | None = None
    candidates: list[RouteCandidate] = Field(default_factory=list)
    stages: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class Usage(Schema):
    """Token counts. `cached_tokens` of the prompt were in the cache and not computed again."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class TokenAlternative(Schema):
    """A token that the model could have generated. `logprob` is the natural logarithm of its
    probability before any sampling setting; `text` has U+FFFD for a part of a character."""

    text: str
    token: int
    logprob: float


class TokenLogprob(TokenAlternative):
    """A token of an answer, and the most probable tokens in its place, best first."""

    top: list[TokenAlternative] = Field(default_factory=list)


class Timings(Schema):
    """The times of a request, in milliseconds of wall time.

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
    """A model that could have answered, and its outcome.

    outcome: `answered`, `unavailable` (its files are not on this machine), `loading` (it is being
    loaded, for the next request), `circuit_open`, `failed` (see `error`), `restarted` (it failed
    after text had been sent, and the caller wanted to start over), or `not_needed` (an earlier
    model answered).
    """

    agent_id: str
    model_id: str
    role: Literal["primary", "lite", "fallback"]
    outcome: Outcome
    reason: str = ""
    error: str | None = None


class LoadReport(Schema):
    """The load of the model that answered, as of the end of the answer.

    mode: "progressive" if the model computed while its shards arrived. shards_loaded, bytes_loaded:
    the part of `shards` and `bytes_total` on this machine. note: the reason if the mode is not the
    one that was requested.
    """

    mode: Literal["progressive", "sequential"] = "sequential"
    shards: int = 1
    shards_loaded: int = 1
    bytes_total: int = 0
    bytes_loaded: int = 0
    note: str = ""


class VariantReport(Schema):
    """The variant of the model that answered. level: q4, q8, f16 or f32. reduction: the share of
    the size that it saves compared with 32 bits per weight. reason: why it was chosen among the
    variants. reserved_bytes: memory reserved for it out of `budget_bytes`."""

    quantization: str
    level: str | None = None
    reduction: float | None = None
    reason: str = ""
    reserved_bytes: int = 0
    budget_bytes: int | None = None


FinishReason = Literal["stop", "length"]


class Receipt(Schema):
    """The record of one request, which explains the agent, the model and the time taken.
    finish_reason: "length" if the answer was cut off at `max_tokens` or at the end of the context;
    None without an answer."""

    request_id: str
    route: Route | None = None
    considered: list[Consideration] = Field(default_factory=list)
    model: ModelInfo | None = None
    seed: int | None = None
    cold_load: bool = False
    load: LoadReport | None = None
    variant: VariantReport | None = None
    evicted: list[str] = Field(default_factory=list)
    replays: int = 0
    dropped_turns: int = 0
    removed_characters: int = 0
    finish_reason: FinishReason | None = None
    state_ms: dict[str, float] = Field(default_factory=dict)

    def __str__(self) -> str:
        from orion_oie.schemas.receipt_table import receipt_table  # nobody else needs it

        return receipt_table(self)


class InferenceResult(Schema):
    """An answer with everything needed to judge it; `str()` of it is the answer.

    wanted_model_id: the model that should have answered: the agent's primary one, or the one that
    was named. is_stand_in: another one answered; the receipt says why. cost: in US dollars.
    logprobs: None unless requested.
    """

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
    wanted_model_id: str = ""
    is_stand_in: bool = False
    _feedback: Callable[[str], None] | None = PrivateAttr(default=None)

    @property
    def text(self) -> str:
        """The answer; the same as `content`."""
        return self.content

    def __str__(self) -> str:
        return self.content

    def __repr__(self) -> str:
        return f"<InferenceResult {self._line()}: {_shortened(self.content)!r}>"

    def _line(self) -> str:
        stood_in = f" in place of {self.wanted_model_id}" if self.is_stand_in else ""
        return (
            f"{self.agent_id}, {self.model_id}@{self.variant}{stood_in}, "
            f"{self.usage.completion_tokens} tokens, {self.timings.total_ms / 1e3:.2f} s, "
            f"{self.finish_reason}"
        )

    def take_feedback(self, keep: Callable[[str], None] | None) -> None:
        """Have `feedback` call `keep(correct_agent)`; None keeps none."""
        self._feedback = keep

    def feedback(self, correct_agent: str) -> None:
        """Store the question as a training example for the router: `correct_agent` should answer.

        Raises `UnknownAgentError`, and `InvalidRequestError` if the engine has no feedback file.
        """
        if self._feedback is None:
            raise InvalidRequestError(
                "feedback is not kept: name a file with EngineConfig.router.feedback"
            )
        self._feedback(correct_agent)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One piece of a streamed answer.

    The content of the result is the joined `text` of all `kind="text"` events since the last
    `kind="restart"` event. A `restart` invalidates the text received so far.
    """

    text: str
    index: int
    elapsed_ms: float
    kind: Literal["text", "restart"] = "text"


@dataclass(frozen=True, slots=True)
class StreamStats:
    """The speed of one stream so far. `tokens` counts model tokens, not events."""

    tokens: int
    ttft_ms: float | None
    tokens_per_second: float | None


_SHOWN_CHARS = 40


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARS else f"{line[: _SHOWN_CHARS - 3]}..."
