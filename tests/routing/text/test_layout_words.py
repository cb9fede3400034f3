"""Words of page layout count together, not alone."""

import pytest
from hypothesis import given, settings
from routes import ANY_TEXT

from orion_oie.routing.text.layout_words import layout


@pytest.mark.parametrize(
    ("text", "strength"),
    [
        ("The header is not centered on my phone.", 1.0),
        ("the sidebar overlaps; why?", 0.5),
        ("put the caption beside the image", 0.5),
        ("Who wrote this paragraph?", 0.0),
        ("", 0.0),
        ("The header is not centered on my phone. " * 20, 0.0),  # a long text is about more
    ],
)
def test_strengths(text: str, strength: float) -> None:
    assert layout(text) == strength


@given(ANY_TEXT)
@settings(deadline=None)
def test_any_text(text: str) -> None:
    assert 0 <= layout(text) <= 1
