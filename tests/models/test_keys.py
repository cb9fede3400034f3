"""A key names a model in a variant, with its adapters, and is its own text."""

import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.models.keys import ModelKey

words = st.text("abcxyz0129._-", min_size=1, max_size=6)


@given(words, words, st.lists(words, max_size=3).map(tuple))
def test_a_key_is_its_text(model_id: str, variant: str, adapters: tuple[str, ...]) -> None:
    """It equals its text, hashes like it, and keeps its parts."""
    key = ModelKey(model_id, variant, adapters)
    text = "+".join([f"{model_id}@{variant}", *adapters])
    assert key == text
    assert {text: 1}[key] == 1
    assert (key.model_id, key.variant, key.adapters) == (model_id, variant, adapters)
    assert json.loads(json.dumps([key])) == [text]


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda k: pickle.loads(pickle.dumps(k))]
)
def test_a_copy_keeps_the_parts(copied) -> None:
    """Copies and pickles are keys, not texts."""
    key = copied(ModelKey("m", "q4", ("a",)))
    assert (type(key), key.model_id, key.adapters) == (ModelKey, "m", ("a",))


def test_adapters_make_another_key() -> None:
    """The same weights with another adapter are another thing to load."""
    assert ModelKey("m", "q4") != ModelKey("m", "q4", ("a",)) != ModelKey("m", "q4", ("b",))
