"""The cost of an answer, from its token counts and a price list."""

from orion_oie.models.specs import PriceSpec
from orion_oie.schemas.results import Usage


def cost_of(usage: Usage, price: PriceSpec | None) -> float:
    """The cost in US dollars; 0 for a model without a price."""
    if price is None:
        return 0.0
    return (
        usage.prompt_tokens * price.prompt + usage.completion_tokens * price.completion
    ) / 1_000_000
