"""Which files of a repository a quantization means, as people name both."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_oie.errors import ModelNotFoundError
from orion_oie.models.quant_choice import (
    PREFERRED,
    FileSet,
    ListedFile,
    choose_files,
    file_sets,
    quantization_of,
    role_of_name,
)

SOURCE = "hf:org/repo"


def listed(*names: str) -> list[ListedFile]:
    return [ListedFile(name, 1000 * (at + 1), f"{at:064x}") for at, name in enumerate(names)]


def chosen(names: list[str], quantization: str | None = None, file: str | None = None) -> str:
    found = choose_files(listed(*names), SOURCE, quantization=quantization, file=file)
    return found.shown


def refused(names: list[str], quantization: str | None = None, file: str | None = None) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        choose_files(listed(*names), SOURCE, quantization=quantization, file=file)
    assert caught.value.details["source"] == SOURCE
    return caught.value.message


BARTOWSKI = [
    ".gitattributes",
    "README.md",
    *(
        f"Llama-3.2-1B-Instruct-{q}.gguf"
        for q in ("IQ3_M", "Q3_K_XL", "Q4_0", "Q4_0_4_8", "Q4_K_L")
    ),
    *(f"Llama-3.2-1B-Instruct-{q}.gguf" for q in ("Q4_K_M", "Q4_K_S", "Q6_K", "Q6_K_L", "Q8_0")),
    "Llama-3.2-1B-Instruct-f16.gguf",
    "Llama-3.2-1B-Instruct.imatrix",
]
UNSLOTH = [
    *(f"BF16/Qwen3-32B-BF16-0000{number}-of-00002.gguf" for number in (2, 1)),
    "Qwen3-32B-IQ4_XS.gguf",
    "Qwen3-32B-Q4_K_M.gguf",
    "Qwen3-32B-UD-IQ2_XXS.gguf",
    "Qwen3-32B-UD-Q4_K_XL.gguf",
    "mmproj-BF16.gguf",
    "imatrix_unsloth.gguf",
    "config.json",
]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("llama-2-7b-chat.Q4_0.gguf", "Q4_0"),
        ("ggml-model-q4_k_s.gguf", "Q4_K_S"),
        ("model-fp16.gguf", "F16"),
        ("model.bf16.gguf", "BF16"),
        ("Q8_0/model-00001-of-00002.gguf", "Q8_0"),
        ("Qwen3-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("m.i1-IQ2_XXS.gguf", "IQ2_XXS"),
        ("m-Q4_0_4_8.gguf", "Q4_0_4_8"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("F16-merge-Q5_K_M.gguf", "Q5_K_M"),
        ("model_Q4_K_M_imat.gguf", "Q4_K_M"),
        ("model-q8.gguf", "Q8"),
        ("Qwen2.5-0.5B.gguf", None),
        ("SEQ4_0X.gguf", None),
    ],
)
def test_labels_in_names(name: str, label: str | None) -> None:
    """The last one in the file's name, else that of its folder; real names of all publishers."""
    assert quantization_of(name) == label


@pytest.mark.parametrize(
    ("name", "is_model"),
    [
        ("mmproj-model-f16.gguf", False),
        ("gemma-3-mmproj-BF16.gguf", False),
        ("imatrix.gguf", False),
        ("m.imatrix.gguf", False),
        ("m-Q4_K_M.imatrix.gguf", False),
        ("m-imatrix-Q4_K_M.gguf", True),
        ("my-lora-f16.gguf", False),
        ("adapter.gguf", False),
        ("my-lora-merged-f16.gguf", True),
        ("my-lora-Q4_K_M.gguf", True),
        ("ggml-vocab-llama-bpe.gguf", False),
        ("explora-7b-f16.gguf", True),
    ],
)
def test_what_is_no_model(name: str, is_model: bool) -> None:
    """By its name; a model made with an adapter or a matrix is one."""
    assert (role_of_name(name) is None) == is_model


@pytest.mark.parametrize(
    ("names", "quantization", "expected"),
    [
        (BARTOWSKI, None, "Q4_K_M"),
        (BARTOWSKI, "q4_k_m", "Q4_K_M"),
        (BARTOWSKI, "Q4_K_L", "Q4_K_L"),
        (BARTOWSKI, "Q4_0", "Q4_0"),
        (BARTOWSKI, "Q4", "Q4_K_M"),
        (BARTOWSKI, "Q4_K", "Q4_K_M"),
        (BARTOWSKI, "Q6_K", "Q6_K"),
        (BARTOWSKI, "Q8", "Q8_0"),
        (BARTOWSKI, "FP16", "f16"),
        (BARTOWSKI, "Q3_K_XL", "Q3_K_XL"),
    ],
)
def test_a_repository_of_many(names: list[str], quantization: str | None, expected: str) -> None:
    """The one that is named, whatever the case; a family is its usual member."""
    assert chosen(names, quantization) == f"Llama-3.2-1B-Instruct-{expected}.gguf"


def test_folders_splits_and_dynamic_quantizations() -> None:
    """A folder's split in order, with sizes and digests; UD- may be left out where it is the
    only one."""
    found = choose_files(listed(*UNSLOTH), SOURCE, quantization="BF16")
    assert found.names == tuple(
        f"BF16/Qwen3-32B-BF16-0000{number}-of-00002.gguf" for number in (1, 2)
    )
    assert found.size_bytes == 3000
    assert (
        chosen(UNSLOTH, "UD-Q4_K_XL") == chosen(UNSLOTH, "Q4_K_XL") == "Qwen3-32B-UD-Q4_K_XL.gguf"
    )
    assert chosen(UNSLOTH) == "Qwen3-32B-Q4_K_M.gguf"
    both = ["m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf"]
    assert chosen(both, "Q4_K_M") == chosen(both) == "m-Q4_K_M.gguf"
    assert chosen(both, "UD-Q4_K_M") == "m-UD-Q4_K_M.gguf"


def test_a_token_that_is_no_label() -> None:
    """Any word of a name can be named, whole words alone."""
    names = ["thinking-Q4_K_M.gguf", "thinking-Q8_0.gguf", "plain-Q8_0.gguf", "v1/Q4_K_M-x.gguf"]
    assert chosen(names, "THINKING") == "thinking-Q4_K_M.gguf"
    assert chosen(names, "PLAIN-Q8_0") == "plain-Q8_0.gguf"
    assert "no quantization 'THINK'" in refused(names, "THINK")
    assert chosen(["model.gguf"], None) == "model.gguf"
    assert chosen(["only-SMALL.gguf", "only-BIG.gguf"], "big") == "only-BIG.gguf"


def test_no_such_quantization() -> None:
    """The error suggests one and lists all with their sizes, the preferred first."""
    message = refused(BARTOWSKI, "Q4K_M")
    assert "hf:org/repo has no quantization 'Q4K_M' (did you mean 'Q4_K_M'?)" in message
    assert "; there are Q4_K_M (8.0 kB), Q4_K_S (9.0 kB), Q4_K_L (7.0 kB), Q4_0 (5.0 kB)" in message
    assert "F16" in refused(BARTOWSKI, "Q1_0")
    assert "the models there are model.gguf" in refused(["model.gguf"], "Q4_K_M")


def test_several_models() -> None:
    """The error lists them, and shows what to type."""
    names = ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "a-Q8_0.gguf"]
    for quantization in (None, "Q4_K_M"):
        message = refused(names, quantization)
        assert "has 2 models of the quantization Q4_K_M: name the file of one" in message
        assert "such as 'hf:org/repo/a-Q4_K_M.gguf'; they are a-Q4_K_M.gguf, b-Q4" in message
    with pytest.raises(ModelNotFoundError, match=r"such as 'hf:org/repo/a-Q4_K_M\.gguf@v1'"):
        choose_files(listed(*names), f"{SOURCE}@v1")
    assert chosen(names, file="b-Q4_K_M.gguf") == "b-Q4_K_M.gguf"
    assert "has 2 models: " in refused(["one.gguf", "two.gguf"])


def test_a_file_by_name() -> None:
    """In any case, without its folders where that is clear; a split by its first file."""
    assert chosen(BARTOWSKI, file="llama-3.2-1b-instruct-q8_0.gguf").endswith("Q8_0.gguf")
    first = "BF16/Qwen3-32B-BF16-00001-of-00002.gguf"
    assert chosen(UNSLOTH, file=first) == chosen(UNSLOTH, file=first[5:]) == first
    message = refused(UNSLOTH, file=first.replace("-00001-", "-00002-"))
    assert f"is part 2 of 2 of a split model: name the first, '{first}'" in message
    assert "did you mean 'Qwen3-32B-Q4_K_M.gguf'" in refused(UNSLOTH, file="Qwen3-32B-Q4_KM.gguf")
    assert "is a projector (mmproj), not a model" in refused(UNSLOTH, file="mmproj-BF16.gguf")
    assert "is no GGUF file" in refused(UNSLOTH, file="config.json")


def test_missing_parts() -> None:
    """They are named; without a named quantization, a complete model is taken instead."""
    names = ["m-Q4_K_M-00001-of-00003.gguf", "m-Q4_K_M-00003-of-00003.gguf"]
    expected = "1 of the 3 parts of its split model are missing: m-Q4_K_M-00002-of-00003.gguf"
    assert expected in refused(names)
    assert chosen([*names, "m-Q8_0.gguf"]) == "m-Q8_0.gguf"
    assert expected in refused([*names, "m-Q8_0.gguf"], "Q4_K_M")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "and no model in any other format"),
        (["README.md"], "and no model in any other format"),
        (
            ["model-00001-of-00002.safetensors"],
            "a repository of the same name that ends in '-GGUF'",
        ),
        (["mmproj-F16.gguf"], "only a projector (mmproj)"),
    ],
)
def test_no_gguf_at_all(names: list[str], reason: str) -> None:
    """The reason says where to look instead."""
    message = refused(names, "Q4_K_M")
    assert message.startswith("hf:org/repo has no GGUF model, ")
    assert reason in message


def test_the_order_of_preference() -> None:
    """What is taken when nothing is named, from the best on."""
    names = [f"m-{label}.gguf" for label in PREFERRED]
    random.Random(1).shuffle(names)
    for label in PREFERRED:
        assert chosen(names) == f"m-{label}.gguf"
        names.remove(f"m-{label}.gguf")
    assert PREFERRED.index("Q4_K_M") < PREFERRED.index("Q8_0") < PREFERRED.index("Q2_K")


def test_a_vast_count_of_parts() -> None:
    """A name that claims 99999 parts costs no more than its own list, and a short message."""
    message = refused([f"m-{number:05d}-of-99999.gguf" for number in range(1, 2000)])
    assert "98000 of the 99999 parts" in message
    assert len(message) < 500


NAMES = st.lists(
    st.builds(
        "{}{}-{}{}.gguf".format,
        st.sampled_from(["", "x/", "Q4_K_M/"]),
        st.sampled_from(["a", "b", "mmproj", "lora"]),
        st.sampled_from(["Q4_K_M", "q8_0", "UD-Q4_K_XL", "bf16", "none"]),
        st.sampled_from(["", "-00001-of-00002", "-00002-of-00002"]),
    ),
    unique=True,
)


@settings(deadline=None)
@given(
    NAMES, st.none() | st.sampled_from(["Q4_K_M", "Q4", "UD-Q4_K_XL", "NONE", "A"]), st.randoms()
)
def test_any_listing(names: list[str], quantization: str | None, order: random.Random) -> None:
    """One complete model or the one error, whatever the order; every file is in at most one set."""

    def outcome(of: list[str]) -> FileSet | str:
        try:
            return choose_files(
                [ListedFile(name, len(name)) for name in of], SOURCE, quantization=quantization
            )
        except ModelNotFoundError as error:
            return error.message

    first = outcome(names)
    shuffled = order.sample(names, len(names))
    assert outcome(shuffled) == first
    if isinstance(first, FileSet):
        assert set(first.names) <= set(names)
        assert not first.missing
        assert not any(role_of_name(name) for name in first.names)
    used = [name for one in file_sets(listed(*names)) for name in one.names]
    assert len(used) == len(set(used))
