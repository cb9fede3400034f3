"""A model that may answer for an agent, with the facts that the stages of a request need."""

from dataclasses import dataclass, field

from orion_oie.backends.base import Footprint, LoadSpec
from orion_oie.errors import ModelError, OrionError
from orion_oie.models.choices import ChoiceRole
from orion_oie.models.keys import ModelKey
from orion_oie.models.specs import PriceSpec
from orion_oie.schemas.plans import VariantChoice


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One model of an agent's chain, in the variant chosen for it. Chosen once, then passed along.
    `picked` has the reason for the variant.

    agent_id: the agent whose model it is: the routed one, or one that it falls back to.
    spec: the spec that loads it; None when there is nothing to load.
    footprint: the memory that it would take; None when its files cannot be read, and then `error`
        says why.
    max_bytes: the memory in bytes to reserve for it; None like the footprint.
    load_s: seconds that its last load from local files took; None if there was none.
    file_bytes: the size of its files on this machine.
    is_on_disk, is_available: a model whose files are not on this machine is available if it may be
        fetched; else `why_unavailable` says why not.
    can_be_fetched: it comes from an address.
    """

    agent_id: str
    model_id: str
    role: ChoiceRole
    picked: VariantChoice
    key: ModelKey
    quantization: str
    spec: LoadSpec | None
    footprint: Footprint | None
    load_s: float | None
    file_bytes: int
    is_on_disk: bool
    is_available: bool
    can_be_fetched: bool
    is_progressive: bool
    why_unavailable: str = ""
    error: OrionError | None = None
    max_bytes: int | None = field(init=False)

    def __post_init__(self) -> None:
        max_bytes = None if self.footprint is None else self.footprint.max_bytes
        object.__setattr__(self, "max_bytes", max_bytes)  # a field, since every request reads it

    price: PriceSpec | None = None

    @property
    def why_not(self) -> str:
        """The reason that it cannot answer, as far as its files are concerned; empty if it can."""
        return self.why_unavailable or (self.error.message if self.error else "")

    def check_files(self) -> None:
        """Raise what is wrong with its files, without a load, so that each request gets it."""
        if isinstance(self.error, ModelError):
            raise type(self.error)(self.error.message, **self.error.details) from self.error

    @property
    def load_spec(self) -> LoadSpec:
        """The spec that loads it. Raises `ValueError` for a candidate that is not available."""
        if self.spec is None:
            raise ValueError(f"{self.key} cannot be loaded: {self.why_unavailable}")
        return self.spec
