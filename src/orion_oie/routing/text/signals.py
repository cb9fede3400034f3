"""Signals: named numbers in [0, 1] that describe the shape of a prompt for the linear model.

Language, shapes of code, formulas and tables, kinds of payload, length, questions, options.
"""

import math
from collections.abc import Mapping

from orion_oie.models.specs import RouteFeature
from orion_oie.routing.text.compiled import compiled
from orion_oie.routing.text.language import Language
from orion_oie.routing.text.layout_words import layout
from orion_oie.routing.text.opaque import PLACE
from orion_oie.routing.text.segment_patterns import QUESTION_MARKS
from orion_oie.routing.text.segments import Segments

SIGNALS = (
    "non_english",
    "language_unknown",
    "code_shape",
    "math_shape",
    "table_shape",
    "code_payload",
    "table_payload",
    "log_payload",
    "quote_payload",
    "document_payload",
    "list_payload",
    "no_instruction",
    "payload_share",
    "length",
    "length_squared",
    "lines",
    "digits",
    "question",
    "options",
    "blanks",
    "backticks",
    "quotation_marks",
    "address",
    "substance",
    "layout",
)

_LONGEST_LOG = 8.0  # a text of about 3,000 characters
_KINDS = ("code", "table", "log", "quote", "document", "list")
_OPTIONS = r"(?m)(?:^|\s)[(\[]?[A-Da-d][.):\]]\s"


def signals(
    text: str,
    parts: Segments,
    language: Language,
    shapes: Mapping[RouteFeature, float],
    substance: float,
) -> list[float]:
    """One number for each of `SIGNALS`. `text` is an excerpt, the other arguments are its own."""
    size = max(1, len(text))
    length = min(1.0, math.log1p(len(text)) / _LONGEST_LOG)
    asked = parts.instruction.rstrip()
    return [
        shapes.get("non_english", 0.0),
        float(language.code is None),
        shapes.get("code_shape", 0.0),
        shapes.get("math_shape", 0.0),
        shapes.get("table_shape", 0.0),
        *(float(kind in parts.kinds) for kind in _KINDS),
        float(not parts.instruction),
        min(1.0, len(parts.payload) / size),  # its pieces are joined with spaces
        length,
        length * length,
        min(1.0, text.count("\n") / 20),
        min(1.0, 5 * sum(map(text.count, "0123456789")) / size),
        float(asked.endswith(QUESTION_MARKS)),
        float(len(compiled(_OPTIONS).findall(text)) > 1),
        float("___" in text or "[MASK]" in text),
        float("`" in text),
        float('"' in text or "\u201c" in text),
        float(PLACE in text),
        substance,
        layout(text),
    ]
