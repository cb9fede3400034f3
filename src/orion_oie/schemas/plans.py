"""The plan of a request: the variants considered, the model chosen, the resources needed."""

from enum import StrEnum

from orion_oie.schemas.base import Schema
from orion_oie.schemas.results import Route


class QuantizationLevel(StrEnum):
    """Levels of quantization, by bits per weight."""

    Q4 = "q4"  # up to 6: Q4 and Q5 of every kind, and anything smaller (Q1 to Q3, IQ, TQ)
    Q8 = "q8"  # up to 9: Q6_K and Q8_0
    F16 = "f16"  # 16: F16 and BF16
    F32 = "f32"  # 32: not reduced


class ConsideredVariant(Schema):
    """A variant that was considered, and the reason why it was chosen or not."""

    variant: str
    quantization: str
    level: QuantizationLevel | None
    is_chosen: bool
    reason: str


class VariantChoice(Schema):
    """The variant to use, or None if none can be used, with the reason. `reduction` is the share of
    the size that it saves compared with 32 bits per weight: 0.84 is five bits instead of 32."""

    variant: str | None
    reason: str
    considered: list[ConsideredVariant] = []
    reduction: float | None = None


class PlannedModel(Schema):
    """One model of the chain.

    variant: the variant that would be used. is_here: its files are on this machine. needed_bytes:
    the memory that it may take, None if unknown; is_measured: from a measurement, not an estimate.
    why_not: the reason why it would not be tried; empty if it would.
    """

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
    """The effects of a request if it were made now.

    model: would answer; None if none could. loads: it would have to be loaded. evicts: models that
    would be unloaded for it. waits_for: models in use that would have to become idle first.
    fetch_bytes: would be downloaded. load_s: estimated seconds of the load, None if unknown because
    of a download. answer_in_s: seconds until the model could begin to answer if no other request
    came first, None if that depends on a download or on other users of memory. budget_bytes,
    reserved_bytes: the memory budget and the part of it in use. waiting: requests in the queue.
    considered: the whole chain, in order.
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
