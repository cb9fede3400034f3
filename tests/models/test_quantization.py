"""Quantizations: what their names mean, and that the best variant that fits is chosen."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.errors import InvalidRequestError
from orion_oie.models.formats.ggml_types import (
    FILE_TYPES,
    TENSOR_TYPES,
)
from orion_oie.models.quantization import (
    QuantizationLevel,
    VariantChoice,
    VariantOption,
    bits_per_weight,
    choose_variant,
    level_of,
    quality_of,
)

MB = 10**6
NAMES = ["IQ2_XS", "Q3_K_M", "Q4_0", "Q4_1", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "BF16", "F32"]
LEVELS = list(QuantizationLevel)
LAYOUTS = {kind.name: 8 * kind.type_size / kind.block_size for kind in TENSOR_TYPES.values()}


def candidate(quantization: str, needed_mb: int | None, **more: Any) -> VariantOption:
    """A variant that is here, unless told otherwise, named like its quantization."""
    size_bytes = more.pop("size_mb", needed_mb) * MB
    needed_bytes = None if needed_mb is None else needed_mb * MB
    facts = {"is_here": True, **more}
    return VariantOption(quantization.lower(), quantization, size_bytes, needed_bytes, **facts)


def needs(one: VariantOption) -> int:
    return one.size_bytes if one.needed_bytes is None else one.needed_bytes


@st.composite
def variants(draw: st.DrawFn, **fixed: Any) -> list[VariantOption]:
    """Up to six variants of any size, here or not, of known and unknown quantizations."""
    names = draw(st.lists(st.sampled_from([*NAMES, "odd"]), max_size=6))
    return [
        VariantOption(
            f"v{number}",
            name,
            draw(st.integers(1, 60)),
            draw(st.none() | st.integers(1, 60)),
            fixed.get("is_here", draw(st.booleans())),
            draw(st.booleans()),
        )
        for number, name in enumerate(names)
    ]


@st.composite
def real_variants(draw: st.DrawFn) -> list[VariantOption]:
    """Variants that are here, of different quantizations: more bits need more memory."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=6))
    sizes = {name: int(10 * (bits_per_weight(name) or 0)) for name in names}
    return [VariantOption(name.lower(), name, sizes[name], sizes[name], True) for name in names]


budgets = st.none() | st.integers(0, 70)
wishes = st.sampled_from(["auto", *LEVELS])


def found(choice: VariantChoice, candidates: list[VariantOption]) -> VariantOption | None:
    return next((c for c in candidates if c.variant == choice.variant), None)


def fits(one: VariantOption, budget: int | None, limit: int | None = None) -> bool:
    in_budget = budget is None or needs(one) <= budget
    in_limit = limit is None or one.size_bytes <= limit
    return in_budget and in_limit and (one.is_here or one.can_be_fetched)


# -- names


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("Q4_K_M", "q4"),
        ("q4_k_m", "q4"),
        ("Q2_K", "q4"),
        ("Q3_K_L", "q4"),
        ("IQ1_S", "q4"),
        ("IQ4_NL", "q4"),
        ("Q5_1", "q4"),
        ("Q5_K_M", "q4"),
        ("MXFP4_MOE", "q4"),
        ("UD-Q4_K_XL", "q4"),
        ("q4", "q4"),
        ("Q6_K", "q8"),
        ("Q6_K_L", "q8"),
        ("Q8_0", "q8"),
        ("q8", "q8"),
        ("F16", "f16"),
        ("fp16", "f16"),
        ("BF16", "f16"),
        ("F32", "f32"),
        ("AWQ", None),
        ("", None),
        ("Q77", None),
    ],
)
def test_names_have_levels(name: str, level: str | None) -> None:
    """Names of files, of other tools and of levels; what says nothing has no level."""
    assert level_of(name) == level
    assert (bits_per_weight(name) is None) == (level is None)


@pytest.mark.parametrize("name", FILE_TYPES.values())
def test_every_kind_of_file_has_its_bits(name: str) -> None:
    """The bits of each file type are those of its blocks as llama.cpp lays them out, and up to one
    more for the finer layers of a mixture."""
    base = re.sub("_MOE$", "", name)
    base = base if base in LAYOUTS else re.sub("(_XS|_S|_M|_L)$", "", base)
    base = {"IQ2": "IQ2_S", "IQ3": "IQ3_XXS"}.get(base, base)
    bits = bits_per_weight(name)
    assert bits is not None
    assert LAYOUTS[base] - 0.01 <= bits <= LAYOUTS[base] + 0.9
    assert quality_of(name) > 0


def test_more_bits_are_better_but_for_the_older_formats() -> None:
    """Quality goes with bits; Q4_1 and Q5_1 are worth less than a mixture of about their size."""
    order = ["Q2_K", "Q3_K_M", "Q4_0", "Q4_1", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_M", "Q6_K", "Q8_0"]
    assert sorted(order, key=quality_of) == order
    assert quality_of("F32") > quality_of("F16") == quality_of("BF16") > quality_of("Q8_0")
    assert quality_of("what is that") == 0


# -- choosing freely


def test_auto_takes_the_best_that_is_here() -> None:
    """Not the first, and not the best that would have to be fetched."""
    choice = choose_variant(
        [
            candidate("Q4_K_M", 500),
            candidate("Q8_0", 900),
            candidate("F16", 1700, is_here=False),
        ]
    )
    assert choice.variant == "q8_0"
    assert choice.reason == "the best quality of what is here and fits"
    assert [(one.variant, one.is_chosen, one.reason) for one in choice.considered] == [
        ("q4_k_m", False, "fits too, with less quality than q8_0"),
        ("q8_0", True, "chosen"),
        ("f16", False, "would have to be fetched; q8_0 is here"),
    ]


def test_auto_fetches_the_first_that_fits() -> None:
    """If none is here, the order of the registry counts, not the quality."""
    away = [
        candidate("F16", 1700, is_here=False),
        candidate("Q4_K_M", 500, is_here=False),
        candidate("Q8_0", 900, is_here=False),
    ]
    choice = choose_variant(away, budget_bytes=1000 * MB)
    assert choice.variant == "q4_k_m"
    assert choice.reason == (
        "no variant is here; the first of the registry that fits and can be fetched"
    )
    assert [one.reason for one in choice.considered] == [
        "needs 1.70 GB, more than the 1.00 GB that may be used",
        "chosen; it has to be fetched",
        "fits too; the registry has q4_k_m first",
    ]
    choice = choose_variant([candidate("F32", 3000), *away], budget_bytes=600 * MB)
    assert choice.variant == "q4_k_m"
    assert choice.reason.startswith("f32 needs 3.00 GB, more than the 0.60 GB that may be used; ")


def test_what_cannot_be_fetched_is_not_wished_for() -> None:
    """A variant of a source that is not here, or that may not be fetched, is none."""
    gone = candidate("Q4_0", 1, is_here=False, can_be_fetched=False)
    choice = choose_variant([gone])
    assert (choice.variant, choice.reason) == (None, "no variant is here, and none can be fetched")
    assert choice.considered[0].reason == "is not here and cannot be fetched"
    assert choose_variant([gone, candidate("Q8_0", 9, is_here=False)]).variant == "q8_0"


# -- choosing a level


@pytest.mark.parametrize(
    ("wanted", "budget_mb", "variant", "reason"),
    [
        ("q8", 2000, "q8_0", "the best q8 variant that fits"),
        ("q8", 800, "q6_k", "the best q8 variant that fits"),
        (
            "q8",
            650,
            "q5_k_m",
            "q6_k needs 0.70 GB, more than the 0.65 GB that may be used; q8_0 needs 0.90 GB, more "
            "than the 0.65 GB that may be used; q4 is the next lower level that fits",
        ),
        ("q4", 2000, "q5_k_m", "the best q4 variant that fits"),
        (
            "f16",
            2000,
            "q8_0",
            "there is no f16 variant; q8 is the next lower level that fits",
        ),
    ],
)
def test_a_level_is_kept_to(wanted: Any, budget_mb: int, variant: str, reason: str) -> None:
    """The best of the level that fits, else of the next lower one, and the reason says so."""
    here = [
        candidate("Q4_K_M", 500),
        candidate("Q5_K_M", 600),
        candidate("Q6_K", 700),
        candidate("Q8_0", 900),
        candidate("F32", 3400),
    ]
    choice = choose_variant(here, wanted=wanted, budget_bytes=budget_mb * MB)
    assert (choice.variant, choice.reason) == (variant, reason)


def test_a_higher_level_is_the_last_resort() -> None:
    """It is used if nothing else can be had, and the reason says so."""
    f16, q8 = candidate("F16", 1700), candidate("Q8_0", 900)
    choice = choose_variant([f16, q8], wanted="q4")
    assert choice.variant == "q8_0"
    assert choice.reason == "there is no q4 variant; nothing but q8 can be had"
    assert choice.considered[0].reason == "fits too, but q4 is wanted"
    gone = candidate("Q4_0", 500, is_here=False, can_be_fetched=False)
    choice = choose_variant([gone, f16], wanted=QuantizationLevel.Q4)
    assert choice.variant == "f16"
    reason = "q4_0 is not here and cannot be fetched; nothing but f16 can be had"
    assert choice.reason == reason


def test_a_level_that_is_here_is_not_fetched_again() -> None:
    """Of a level, what is here comes before what would be better; another level is fetched."""
    here, better = candidate("Q4_0", 450), candidate("Q5_K_M", 600, is_here=False)
    assert choose_variant([better, here], wanted="q4").variant == "q4_0"
    q8 = candidate("Q8_0", 900, is_here=False)
    assert choose_variant([here, q8], wanted="q8").variant == "q8_0"


def test_an_unknown_quantization_is_better_than_none() -> None:
    """A name that says nothing has no level and the least quality, but it can be used."""
    odd, known = candidate("homemade", 500), candidate("Q2_K", 300)
    assert choose_variant([odd, known]).variant == "q2_k"
    for wanted in ("auto", "q8"):
        choice = choose_variant([odd], wanted=wanted)
        assert choice.variant == "homemade"
        assert choice.reduction is None
    assert choice.reason == "there is no q8 variant; nothing but homemade can be had"


def test_an_unknown_level_is_refused() -> None:
    """The error lists the levels."""
    with pytest.raises(InvalidRequestError, match="'q5'; there are auto, q4, q8, f16, f32"):
        choose_variant([candidate("Q5_K_M", 1)], wanted="q5")  # type: ignore[arg-type]


# -- limits


def test_when_nothing_fits_the_smallest_is_named() -> None:
    """The reason has what it needs, and what there is, and where."""
    both = [candidate("Q8_0", 900), candidate("Q4_0", None, size_mb=450)]
    choice = choose_variant(both, budget_bytes=400 * MB, device="CUDA0")
    assert choice.variant is None
    assert choice.reduction is None
    assert choice.reason == (
        "no variant fits: the smallest, q4_0, needs at least 0.45 GB, more than the 0.40 GB that "
        "may be used on CUDA0"
    )
    assert not any(one.is_chosen for one in choice.considered)
    assert choose_variant([]).reason == "there are no variants to choose from"


def test_the_size_of_files_can_be_limited() -> None:
    """A variant whose files are larger than wanted is none, whatever the memory."""
    both = [candidate("Q8_0", 900), candidate("Q4_0", 600, size_mb=450)]
    choice = choose_variant(both, size_limit_bytes=450 * MB)
    assert choice.variant == "q4_0"
    assert choice.considered[0].reason == "has 0.90 GB, more than the wanted size of 0.45 GB"
    assert choose_variant(both, size_limit_bytes=449 * MB).variant is None


@pytest.mark.parametrize(
    ("name", "size_mb", "parameters", "reduction"),
    [
        ("Q4_1", 1, None, 0.84375),
        ("F32", 1, None, 0.0),
        ("Q8_0", 500, 10**9, 0.875),
        ("homemade", 500, 10**9, 0.875),
        ("F32", 4001, 10**9, 0.0),  # a header more
    ],
)
def test_the_reduction(name: str, size_mb: int, parameters: int | None, reduction: float) -> None:
    """It is measured by the size where the parameters are known, else told from the name."""
    choice = choose_variant([candidate(name, size_mb)], parameter_count=parameters)
    assert choice.reduction == pytest.approx(reduction)


# -- for all variants


@given(candidates=variants(), budget=budgets, limit=budgets, wanted=wishes)
def test_what_is_chosen_fits(
    candidates: list[VariantOption], budget: int | None, limit: int | None, wanted: Any
) -> None:
    """Something is chosen just when something fits, and it keeps to both limits."""
    choice = choose_variant(candidates, wanted=wanted, budget_bytes=budget, size_limit_bytes=limit)
    chosen = found(choice, candidates)
    assert (chosen is not None) == any(fits(c, budget, limit) for c in candidates)
    assert chosen is None or fits(chosen, budget, limit)
    assert [c.variant for c in choice.considered] == [c.variant for c in candidates]
    assert [c.variant for c in choice.considered if c.is_chosen] == [
        name for name in [choice.variant] if name
    ]
    assert choice.reason
    assert all(c.reason for c in choice.considered)


@given(candidates=variants(is_here=True), budget=budgets, more=st.integers(0, 60))
def test_more_memory_never_gets_less_quality(
    candidates: list[VariantOption], budget: int | None, more: int
) -> None:
    """Of what is here: a larger budget gives the same or a better one, no limit the best."""
    sizes = [budget, budget and budget + more, None]
    chosen = [found(choose_variant(candidates, budget_bytes=b), candidates) for b in sizes]
    qualities = [quality_of(one.quantization) if one else -1 for one in chosen]
    assert qualities == sorted(qualities)


@given(candidates=real_variants(), wanted=wishes, budget=st.integers(0, 400), more=budgets)
def test_more_memory_never_gets_less_quality_of_a_level(
    candidates: list[VariantOption], wanted: Any, budget: int, more: int | None
) -> None:
    """So it is for a level, too, where more bits need more memory."""
    chosen = [
        found(choose_variant(candidates, wanted=wanted, budget_bytes=b), candidates)
        for b in (budget, None if more is None else budget + more)
    ]
    less, full = (quality_of(one.quantization) if one else -1 for one in chosen)
    assert full >= less


@given(candidates=variants(), wanted=st.sampled_from(LEVELS), budget=budgets)
def test_never_more_than_asked_for_without_need(
    candidates: list[VariantOption], wanted: QuantizationLevel, budget: int | None
) -> None:
    """The level is the highest that can be had up to the wanted one; a higher one, or none, only
    when there is no such."""
    chosen = found(choose_variant(candidates, wanted=wanted, budget_bytes=budget), candidates)
    usable = [c for c in candidates if fits(c, budget)]
    had = {level_of(c.quantization) for c in usable}
    wished = [level for level in LEVELS[LEVELS.index(wanted) :: -1] if level in had]
    if wished:
        assert chosen is not None
        assert level_of(chosen.quantization) is wished[0]


@given(candidates=variants(is_here=False), budget=budgets)
def test_what_is_not_here_comes_in_the_order_of_the_registry(
    candidates: list[VariantOption], budget: int | None
) -> None:
    """The first that fits and can be fetched."""
    usable = [c.variant for c in candidates if fits(c, budget)]
    assert choose_variant(candidates, budget_bytes=budget).variant == next(iter(usable), None)
