"""A prompt as routers read it, prepared once for all stages."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orion_oie.models.specs import RouteFeature
from orion_oie.routing.text.excerpt import excerpt
from orion_oie.routing.text.exclusions import without_exclusions
from orion_oie.routing.text.features import measure
from orion_oie.routing.text.keyword_lists import without_keyword_lists
from orion_oie.routing.text.language import (
    Language,
    detect,
)
from orion_oie.routing.text.ngrams import (
    Grams,
    grams,
)
from orion_oie.routing.text.opaque import without_opaque
from orion_oie.routing.text.segments import (
    PayloadKind,
    Segments,
    split,
)
from orion_oie.routing.text.signals import signals
from orion_oie.routing.text.substance import substance

_SHAPED = 0.5  # strength of a shape that says what a text without words is
_SHAPING_SIGNS = "(){}[]=+*<>;$|^"


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is left of an excerpt of a text, and its features.

    text: without addresses, what the prompt excludes and lists of keywords. addresses: those that
    were in it. excluded: the topics that it excludes. substance: how much there is to read, in
    [0, 1]. signals: one number for each of `SIGNALS`, shape (signals,).
    """

    text: str
    parts: Segments
    language: Language
    shapes: Mapping[RouteFeature, float]
    grams: Grams
    signals: NDArray[np.float32]
    addresses: tuple[str, ...]
    excluded: frozenset[str]
    substance: float


def read(text: str) -> Prompt:
    """Extract the features of a text. Raises for no text and takes a bounded time."""
    whole = excerpt(text)
    clear, addresses = without_opaque(whole)
    parts = split(clear)
    exclusions = without_exclusions(parts.instruction)
    # Beside a payload, and below a list of points, words without a sentence are options or data.
    is_plain = not parts.payload and "\n-" not in exclusions.text
    asked, listed = without_keyword_lists(exclusions.text, only_piles=not is_plain)
    if asked != parts.instruction:
        clear = f"{asked}\n{parts.payload}" if parts.payload else asked
        kinds: frozenset[PayloadKind] = parts.kinds
        if listed:
            kinds = frozenset((*kinds, "list"))
        parts = Segments(asked, parts.payload, kinds)
    language = detect(clear)
    shapes = measure(clear, language)
    much = 1.0 if _is_shaped(clear, shapes) else substance(clear)
    return Prompt(
        clear,
        parts,
        language,
        shapes,
        grams(parts.instruction, parts.payload),
        np.array(signals(clear, parts, language, shapes, much), np.float32),
        addresses,
        exclusions.topics,
        much,
    )


def _is_shaped(text: str, shapes: Mapping[RouteFeature, float]) -> bool:
    """True for code, formulas and tables, which need no words."""
    strongest = max(shapes.get(name, 0.0) for name in ("code_shape", "math_shape", "table_shape"))
    if strongest < _SHAPED or not any(map(str.isalnum, text)):
        return False
    return any(sign in text for sign in _SHAPING_SIGNS)
