"""What a request would do: the variants considered, the model chosen, what it would cost."""

from enum import StrEnum

from orion_oie.schemas.base import Schema
from orion_oie.schemas.results import Route


class QuantizationLevel(StrEnum):
    """How far the weights of a variant are reduced, by bits for each weight."""

    Q4 = "q4"  # up to 6: Q4 and Q5 of every kind, and all that is smaller (Q1 to Q3, IQ, TQ)
    Q8 = "q8"  # up to 9: Q6_K and Q8_0
    F16 = "f16"  # 16: F16 and BF16
    F32 = "f32"  # as most models were computed with


class ConsideredVariant(Schema):
    """One variant that could have been chosen, and why it was or was not."""

    variant: str
    quantization: str
    level: QuantizationLevel | None
    is_chosen: bool
    reason: str


class VariantChoice(Schema):
    """The variant to use, None when none can be; and why. `reduction` is the share of the size
    that it saves against 32 bits for each weight: 0.84 is five bits instead of 32."""

    variant: str | None
    reason: str
    considered: list[ConsideredVariant] = []
    reduction: float | None = None


class PlannedModel(Schema):
    """One model of the chain. `needed_bytes` is the memory it may take, None where that cannot be
    known; `why_not` says why it would not be tried, empty if it would. `variant` explains the
    quantization."""

    agent_id: str
    model_id: str
    role: str
    variant: VariantChoice
    is_here: bool
    is_loaded: bool
    needed_bytes: int | None = None
    is_measured: bool = False
    why_not: str = ""


class Plan(Schema):
    """What a request would do now.

    `model` would answer; None when none could. `loads` says whether it would have to be loaded,
    `evicts` what would be unloaded for it, `waits_for` which models in use would have to become
    idle first. `fetch_bytes` would be downloaded. `load_s` estimates the load: None when it cannot
    be known, because of a download. `answer_in_s` is when the model could begin to answer if no
    other request came before: None when that depends on a download, or on others who use memory.
    `considered` is the whole chain, in its order.
    """

    route: Route
    model: PlannedModel | None
    loads: bool = False
    evicts: list[str] = []
    waits_for: list[str] = []
    fetch_bytes: int = 0
    load_s: float | None = 0.0
    answer_in_s: float | None = None
    budget_bytes: int
    reserved_bytes: int
    waiting: int = 0
    considered: list[PlannedModel] = []
