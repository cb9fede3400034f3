"""A prompt as routers read it, prepared once for all stages."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orion_oie.models.specs import RouteFeature
from orion_oie.routing.text.excerpt import excerpt
from orion_oie.routing.text.features import measure
from orion_oie.routing.text.language import (
    Language,
    detect,
)
from orion_oie.routing.text.ngrams import (
    Grams,
    grams,
)
from orion_oie.routing.text.segments import (
    Segments,
    split,
)
from orion_oie.routing.text.signals import signals


@dataclass(frozen=True, eq=False)
class Prompt:
    """An excerpt of a text and its features. `signals` has one number for each of `SIGNALS`, shape
    (signals,)."""

    text: str
    parts: Segments
    language: Language
    shapes: Mapping[RouteFeature, float]
    grams: Grams
    signals: NDArray[np.float32]

    @property
    def has_words(self) -> bool:
        """False for a text without a single letter or digit."""
        return any(map(str.isalnum, self.text))


def read(text: str) -> Prompt:
    """Extract the features of a text. Raises for no text and takes a bounded time."""
    text = excerpt(text)
    parts, language = split(text), detect(text)
    shapes = measure(text, language)
    return Prompt(
        text,
        parts,
        language,
        shapes,
        grams(parts.instruction, parts.payload),
        np.array(signals(text, parts, language, shapes), np.float32),
    )
