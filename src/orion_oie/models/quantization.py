"""Names of quantizations, and a pure choice among the variants of a model.

Sizes, needs and availability of variants are inputs: this module measures nothing, looks for no
file and fetches nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orion_oie.errors import InvalidRequestError
from orion_oie.schemas.plans import (
    ConsideredVariant,
    QuantizationLevel,
    VariantChoice,
)
from orion_oie.schemas.units import in_gb

# Bits per weight of a whole file. For the plain formats these follow from the layout of their
# blocks. For the mixtures, llama.cpp's authors measured them on a model of 8 billion parameters;
# the smaller the mixture, the larger its share of finer layers.
_BITS = {
    **{"Q1_0": 1.125, "Q2_0": 2.25, "TQ1_0": 1.69, "TQ2_0": 2.06},
    **{"IQ1_S": 2.0, "IQ1_M": 2.15, "IQ2_XXS": 2.38, "IQ2_XS": 2.59, "IQ2_S": 2.74, "IQ2_M": 2.93},
    **{"IQ3_XXS": 3.25, "IQ3_XS": 3.5, "IQ3_S": 3.66, "IQ3_M": 3.76},
    **{"IQ4_XS": 4.46, "IQ4_NL": 4.68, "MXFP4": 4.25, "MXFP4_MOE": 4.25, "NVFP4": 4.5},
    **{"Q2_K_S": 2.97, "Q2_K": 3.16, "Q3_K_S": 3.64, "Q3_K_M": 4.0, "Q3_K_L": 4.3},
    **{"Q4_0": 4.5, "Q4_1": 5.0, "Q4_K_S": 4.67, "Q4_K_M": 4.89},
    **{"Q5_0": 5.5, "Q5_1": 6.0, "Q5_K_S": 5.57, "Q5_K_M": 5.7, "Q6_K": 6.56, "Q8_0": 8.5},
    **{"F16": 16.0, "BF16": 16.0, "F32": 32.0},
}

# The older formats make less of their bits. By the perplexities that llama.cpp's authors publish,
# each ranks right above the mixture of `_BITS` with the next smaller number.
_OLDER_FORMATS = {"Q4_0": 4.35, "Q4_1": 4.4, "Q5_0": 5.4, "Q5_1": 5.5}

_F32_BITS = 32.0
_FAMILY = re.compile(r"(?:I|T)?Q\d+(?:_K)?")


_MOST_BITS = {QuantizationLevel.Q4: 6.0, QuantizationLevel.Q8: 9.0, QuantizationLevel.F16: 16.0}
_LEVELS = list(QuantizationLevel)

Wanted = Literal["auto", "q4", "q8", "f16", "f32"]


def bits_per_weight(name: str) -> float | None:
    """The bits per weight of a quantization in a typical model, by its name in GGUF files
    (`Q4_K_M`); None for an unknown name.

    Case does not matter. A name that llama.cpp does not know (`UD-Q4_K_XL`, `q4`) counts as the
    largest of its family.
    """
    key = _key(name)
    if key in _BITS:
        return _BITS[key]
    family = _FAMILY.match(key)
    if family is None:
        return None
    return max((b for n, b in _BITS.items() if f"{n}_".startswith(f"{family[0]}_")), default=None)


def level_of(name: str) -> QuantizationLevel | None:
    """The level of a quantization, by its name in GGUF files; None for an unknown name."""
    bits = bits_per_weight(name)
    if bits is None:
        return None
    return next((lvl for lvl, most in _MOST_BITS.items() if bits <= most), QuantizationLevel.F32)


def quality_of(name: str) -> float:
    """A rank of quality: the larger, the closer to the original weights; 0 for unknown names."""
    return _OLDER_FORMATS.get(_key(name), bits_per_weight(name) or 0.0)


def _key(name: str) -> str:
    key = name.strip().upper().removeprefix("UD-").replace("-", "_")
    return key if not key.startswith("FP") else f"F{key[2:]}"


@dataclass(frozen=True, slots=True)
class VariantOption:
    """A variant to choose from.

    size_bytes: the size of its files. needed_bytes: the memory that it takes when it is loaded;
    None counts as the size of its files. can_be_fetched: it may be used even if its files are not
    on this machine.
    """

    variant: str
    quantization: str
    size_bytes: int
    needed_bytes: int | None
    is_here: bool
    can_be_fetched: bool = True

    @property
    def memory_bytes(self) -> int:
        """The memory that it is assumed to take."""
        return self.size_bytes if self.needed_bytes is None else self.needed_bytes


def choose_variant(
    candidates: Sequence[VariantOption],
    *,
    wanted: QuantizationLevel | Wanted = "auto",
    budget_bytes: int | None = None,
    size_limit_bytes: int | None = None,
    device: str = "cpu",
    parameter_count: int | None = None,
) -> VariantChoice:
    """Choose among the variants that fit: those that need at most `budget_bytes` and whose files
    have at most `size_limit_bytes`. None is no limit. `candidates` come in the registry's order.

    "auto" takes the best quality on this machine; if there is none, the first of the registry that
    can be fetched. A level takes its best variant on this machine, else its best variant that can
    be fetched; then come the next lower levels, and the higher ones last.

    device: the device with the budget, for the reasons. parameter_count: makes the reduction exact.
    Raises `InvalidRequestError` for an unknown level.
    """
    if wanted != "auto" and wanted not in _LEVELS:
        known = ", ".join(["auto", *_LEVELS])
        raise InvalidRequestError(f"there is no quantization level '{wanted}'; there are {known}")
    where = "" if device == "cpu" else f" on {device}"
    obstacles = {c: _obstacle(c, budget_bytes, size_limit_bytes, where) for c in candidates}
    usable = [c for c in candidates if not obstacles[c]]
    if not usable:
        chosen, reason = None, _why_none(obstacles)
    elif wanted == "auto":
        chosen, reason = _choose_freely(usable, obstacles)
    else:
        chosen, reason = _choose_level(usable, obstacles, QuantizationLevel(wanted))
    return VariantChoice(
        variant=None if chosen is None else chosen.variant,
        reason=reason,
        considered=[_considered(c, chosen, wanted, obstacles[c]) for c in candidates],
        reduction=None if chosen is None else _reduction(chosen, parameter_count),
    )


_Obstacles = dict[VariantOption, str]


def _obstacle(one: VariantOption, budget: int | None, size_limit: int | None, where: str) -> str:
    """The reason that a variant cannot be used; empty when it can."""
    if not one.is_here and not one.can_be_fetched:
        return "is not here and cannot be fetched"
    if size_limit is not None and one.size_bytes > size_limit:
        return f"has {in_gb(one.size_bytes)}, more than the wanted size of {in_gb(size_limit)}"
    if budget is not None and one.memory_bytes > budget:
        least = "at least " if one.needed_bytes is None else ""
        needed = f"needs {least}{in_gb(one.memory_bytes)}"
        return f"{needed}, more than the {in_gb(budget)} that may be used{where}"
    return ""


def _choose_freely(usable: list[VariantOption], obstacles: _Obstacles) -> tuple[VariantOption, str]:
    here = [c for c in usable if c.is_here]
    if here:
        return _best(here), "the best quality of what is here and fits"
    unfit = [f"{c.variant} {why}" for c, why in obstacles.items() if c.is_here]
    found = "; ".join(unfit) or "no variant is here"
    return usable[0], f"{found}; the first of the registry that fits and can be fetched"


def _choose_level(
    usable: list[VariantOption], obstacles: _Obstacles, wanted: QuantizationLevel
) -> tuple[VariantOption, str]:
    levels = {c: level_of(c.quantization) for c in obstacles}
    at = _LEVELS.index(wanted)
    for level in (*_LEVELS[at::-1], *_LEVELS[at + 1 :], None):
        group = [c for c in usable if levels[c] is level]
        if group:
            break
    chosen = _best([c for c in group if c.is_here] or group)
    if level is wanted:
        return chosen, f"the best {wanted} variant that fits"
    found = "; ".join(f"{c.variant} {why}" for c, why in obstacles.items() if levels[c] is wanted)
    if level in _LEVELS[:at]:
        outcome = f"{level} is the next lower level that fits"
    else:
        outcome = f"nothing but {level or chosen.quantization} can be had"
    return chosen, f"{found or f'there is no {wanted} variant'}; {outcome}"


def _best(group: list[VariantOption]) -> VariantOption:
    return max(group, key=lambda one: quality_of(one.quantization))  # among equals the first


def _why_none(obstacles: _Obstacles) -> str:
    if not obstacles:
        return "there are no variants to choose from"
    had = [c for c in obstacles if c.is_here or c.can_be_fetched]
    if not had:
        return "no variant is here, and none can be fetched"
    smallest = min(had, key=lambda one: one.memory_bytes)
    return f"no variant fits: the smallest, {smallest.variant}, {obstacles[smallest]}"


def _considered(
    one: VariantOption, chosen: VariantOption | None, wanted: str, obstacle: str
) -> ConsideredVariant:
    if one is chosen:
        reason = "chosen" if one.is_here else "chosen; it has to be fetched"
    elif obstacle or chosen is None:
        reason = obstacle
    else:
        reason = _why_not(one, chosen, wanted)
    return ConsideredVariant(
        variant=one.variant,
        quantization=one.quantization,
        level=level_of(one.quantization),
        is_chosen=one is chosen,
        reason=reason,
    )


def _why_not(one: VariantOption, chosen: VariantOption, wanted: str) -> str:
    """The reason that a usable variant was not chosen."""
    if chosen.is_here and not one.is_here:
        return f"would have to be fetched; {chosen.variant} is here"
    if quality_of(one.quantization) < quality_of(chosen.quantization):
        return f"fits too, with less quality than {chosen.variant}"
    if wanted != "auto" and level_of(one.quantization) is not level_of(chosen.quantization):
        return f"fits too, but {wanted} is wanted"
    return f"fits too; the registry has {chosen.variant} first"


def _reduction(one: VariantOption, parameter_count: int | None) -> float | None:
    if parameter_count:
        bits: float | None = 8 * one.size_bytes / parameter_count
    else:
        bits = bits_per_weight(one.quantization)
    return None if bits is None else max(0.0, 1 - bits / _F32_BITS)
