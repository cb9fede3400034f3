"""Costs: dollars per million tokens, and nothing for what has no price."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.engine.costs import cost_of
from orion_oie.models.specs import PriceSpec
from orion_oie.schemas.results import Usage

counts = st.integers(0, 10**9)
prices = st.floats(0, 1000)


@pytest.mark.parametrize(
    ("prompt_tokens", "completion_tokens", "dollars"),
    [(0, 0, 0.0), (1_000_000, 0, 3.0), (0, 1_000_000, 15.0), (2000, 100, 0.0075)],
)
def test_prompt_and_answer_have_their_own_price(
    prompt_tokens: int, completion_tokens: int, dollars: float
) -> None:
    """Each kind of token costs its price per million."""
    usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    assert cost_of(usage, PriceSpec(prompt=3.0, completion=15.0)) == pytest.approx(dollars)


@given(prompt=counts, completion=counts)
def test_a_model_without_a_price_is_free(prompt: int, completion: int) -> None:
    """No price list, and an empty one, make any answer cost nothing."""
    usage = Usage(prompt_tokens=prompt, completion_tokens=completion)
    assert cost_of(usage, None) == cost_of(usage, PriceSpec()) == 0.0


@given(first=st.tuples(counts, counts), second=st.tuples(counts, counts), price=prices)
def test_two_answers_cost_what_they_cost_apart(
    first: tuple[int, int], second: tuple[int, int], price: float
) -> None:
    """Costs may be added up over requests."""
    prices_ = PriceSpec(prompt=price, completion=2 * price)

    def cost(prompt: int, completion: int) -> float:
        usage = Usage(prompt_tokens=prompt, completion_tokens=completion)
        return cost_of(usage, prices_)

    both = cost(first[0] + second[0], first[1] + second[1])
    assert both == pytest.approx(cost(*first) + cost(*second))
    assert both >= 0


def test_tokens_from_memory_are_not_charged_twice() -> None:
    """Cached tokens are part of the prompt tokens: they change nothing."""
    price = PriceSpec(prompt=1.0)
    usage = Usage(prompt_tokens=1000, cached_tokens=900)
    assert cost_of(usage, price) == cost_of(Usage(prompt_tokens=1000), price)
