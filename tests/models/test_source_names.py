"""The one text that names a model: all its spellings, its id, and what it never repeats."""

import re
import string
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from orion_oie.errors import InvalidRequestError
from orion_oie.models.queries import lasting_query, without_query
from orion_oie.models.source_names import (
    HUB_EXAMPLE,
    LM_STUDIO_EXAMPLE,
    OLLAMA_EXAMPLE,
    URL_EXAMPLE,
    HubName,
    LMStudioName,
    OllamaName,
    UrlName,
    parse_source_name,
    source_hint,
)
from orion_oie.models.specs import Identifier

SECRET = "5ecre7"
SIGNED = (
    "https://bucket.s3.eu-west-1.amazonaws.com/models/m-Q4_K_M.gguf?X-Amz-Algorithm=AWS4-HMAC-SHA256"
    f"&X-Amz-Credential=AKIA%2F20260101&X-Amz-Expires=3600&X-Amz-Signature={SECRET}"
)

HUB = {
    "hf:org/repo": HubName("org/repo"),
    "HF:org/repo": HubName("org/repo"),
    "hf://org/repo": HubName("org/repo"),
    " hf:org/repo/ ": HubName("org/repo"),
    "huggingface:org/repo:q8_0": HubName("org/repo", "Q8_0"),
    "hf:org/repo:q4_k_m": HubName("org/repo", "Q4_K_M"),
    "hf:org/repo:IQ2_XXS": HubName("org/repo", "IQ2_XXS"),
    "hf:org/repo:UD-Q4_K_XL@v1": HubName("org/repo", "UD-Q4_K_XL", None, "v1"),
    "hf:org/repo@refs/pr/2:bf16": HubName("org/repo", "BF16", None, "refs/pr/2"),
    "hf:org/repo:latest": HubName("org/repo"),
    "hf:org/repo:Latest@main": HubName("org/repo"),
    "hf.co/org/repo:Q4": HubName("org/repo", "Q4"),
    "hf:hf.co/org/repo:Q4": HubName("org/repo", "Q4"),
    "huggingface.co/org/repo": HubName("org/repo"),
    "HuggingFace.co/org/repo/": HubName("org/repo"),
    "https://huggingface.co/org/repo": HubName("org/repo"),
    "http://www.huggingface.co/org/repo#models": HubName("org/repo"),
    "https://huggingface.co/org/repo.git": HubName("org/repo"),
    "https://hf.co/org/repo:Q4_0": HubName("org/repo", "Q4_0"),
    "https://huggingface.co/org/repo/tree/main": HubName("org/repo"),
    "https://huggingface.co/org/repo/tree/v2/BF16": HubName("org/repo", "BF16", None, "v2"),
    "https://huggingface.co/org/repo/blob/main/m.gguf": HubName("org/repo", None, "m.gguf"),
    "https://huggingface.co/org/repo/resolve/main/m.gguf?download=true": HubName(
        "org/repo", None, "m.gguf"
    ),
    "https://huggingface.co/org/repo/resolve/refs%2Fpr%2F1/d/a%20b.gguf": HubName(
        "org/repo", None, "d/a b.gguf", "refs/pr/1"
    ),
    "https://huggingface.co/org/repo/blob/refs/pr/1/m.gguf": HubName(
        "org/repo", None, "m.gguf", "refs/pr/1"
    ),
    "https://huggingface.co/org/repo?show_file_info=Q8%2Fm.gguf": HubName(
        "org/repo", None, "Q8/m.gguf"
    ),
    "hf:org/repo/m.gguf": HubName("org/repo", None, "m.gguf"),
    "hf:org/repo/BF16/m.GGUF@abc": HubName("org/repo", None, "BF16/m.GGUF", "abc"),
    "hf.co/org/repo:m-Q4_K_M.gguf": HubName("org/repo", None, "m-Q4_K_M.gguf"),
    "hf:org/repo/a%40b%3A.gguf": HubName("org/repo", None, "a@b:.gguf"),
    HUB_EXAMPLE: HubName("bartowski/Llama-3.2-1B-Instruct-GGUF", "Q4_K_M"),
}
URLS = {
    "https://h/p/m.gguf": UrlName("https://h/p", "m.gguf"),
    "HTTPS://Host:8443/P/m.gguf": UrlName("https://host:8443/P", "m.gguf"),
    "http://h/m.gguf#top": UrlName("http://h", "m.gguf"),
    "https://h/a%20b/c%2Bd%20e.gguf": UrlName("https://h/a%20b", "c+d e.gguf"),
    "https://h/download?id=7": UrlName("https://h", "download", "id=7"),
    "https://h/files/7/": UrlName("https://h/files", "7"),
    URL_EXAMPLE: UrlName("https://example.org/models", "model-Q4_K_M.gguf"),
}
OLLAMA = {
    "ollama:llama3.2": OllamaName("llama3.2"),
    "ollama://llama3.2:1b": OllamaName("llama3.2", "1b"),
    "Ollama:me/mine:7b-q4": OllamaName("mine", "7b-q4", "me"),
    "ollama:hf.co/org/repo:Q4": OllamaName("repo", "Q4", "org", "hf.co"),
    "ollama:localhost:5000/ns/name:t": OllamaName("name", "t", "ns", "localhost:5000"),
    "https://ollama.com/library/qwen3:0.6b": OllamaName("qwen3", "0.6b"),
    OLLAMA_EXAMPLE: OllamaName("llama3.2", "1b"),
}
LM_STUDIO = {
    "lmstudio:pub/repo": LMStudioName("pub", "repo"),
    "LM-Studio:pub/repo:q4_k_m": LMStudioName("pub", "repo", "Q4_K_M"),
    "lmstudio:pub/repo/m v2.gguf": LMStudioName("pub", "repo", None, "m v2.gguf"),
    LM_STUDIO_EXAMPLE: LMStudioName("lmstudio-community", "Qwen2.5-0.5B-Instruct-GGUF"),
}
ALL = {**HUB, **URLS, **OLLAMA, **LM_STUDIO}


@pytest.mark.parametrize("text", ALL)
def test_spellings(text: str) -> None:
    """Each is recognized, and what to type for it says the same."""
    name = parse_source_name(text)
    assert name == ALL[text]
    assert name is not None
    assert parse_source_name(name.text) == name


@pytest.mark.parametrize(
    "text",
    [
        *("", "model.gguf", "./model.gguf", "/a/b.gguf", "~/m.gguf", "org/repo", "org/repo:Q4"),
        *("smollm2-135m", "qwen2.5-0.5b-instruct@q8_0", "hf", "hf.co", "a:b.gguf", "é:x"),
        *("ollama", "folder/hf:org/repo", "smollm2:latest"),
    ],
)
def test_paths_and_ids(text: str) -> None:
    """Whatever is of no form is left to others."""
    assert parse_source_name(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hf:", "a repository is ORG/NAME"),
        ("hf:gpt2", "a repository is ORG/NAME"),
        ("hf:/repo", "a repository is ORG/NAME"),
        ("hf:org/re po", "'re po' cannot be part of a repository's name"),
        ("hf:../repo", "'..' cannot be part"),
        ("hf:a--b/repo", "cannot be part"),
        ("hf:org/repo/Q4_K_M", "put ':' before a quantization, not '/'"),
        ("hf:org/repo/README.md:Q4", "'README.md' is no GGUF file"),
        ("hf:org/repo/../m.gguf", "cannot be a file"),
        ("hf:org/repo/m.gguf:Q4", "it names a file and a quantization"),
        ("hf:org/repo:", "'' cannot be a quantization"),
        ("hf:org/repo:Q4:Q5", "too many"),
        ("hf:org/repo@", "'' cannot be a revision"),
        ("hf:org/repo@a..b", "cannot be a revision"),
        ("hf:org/repo@v1/m.gguf", "the revision comes last, after the file"),
        ("https://huggingface.co/", "a repository is ORG/NAME"),
        ("https://huggingface.co/datasets/org/repo", "no repository of a model"),
        ("https://huggingface.co/org/repo/blob/main/config.json", "'config.json' is no GGUF file"),
        ("https://huggingface.co/org/repo/discussions/1", "'discussions/1' is no GGUF file"),
    ],
)
def test_wrong_repositories(text: str, reason: str) -> None:
    """The reason, and a right example."""
    with pytest.raises(InvalidRequestError, match=re.escape(reason)) as caught:
        parse_source_name(text)
    assert caught.value.message.endswith(f"for example {HUB_EXAMPLE}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("https://", URL_EXAMPLE),
        ("https://host", "the address names no file"),
        ("https://host/?id=3", "the address names no file"),
        ("https://host/a%2Fb", "the address names no file"),
        ("https://host:x/m.gguf", "this is no address"),
        ("https://[1/m.gguf", "this is no address"),
        ("https://host/my model.gguf", "%20"),
        ("https://host/m-00002-of-00003.gguf?x", "name the first, m-00001-of-00003.gguf"),
        ("ftp://host/m.gguf", "'ftp' addresses cannot be fetched"),
        ("s3://bucket/m.gguf", "'s3' addresses cannot be fetched"),
        ("file:///a%20b/m.gguf", "give the path itself, /a b/m.gguf"),
        ("olama:llama3", "did you mean 'ollama'?"),
        ("lmstuido:a/b", "did you mean 'lmstudio'?"),
        ("ollama:", OLLAMA_EXAMPLE),
        ("ollama:a/b/c/d", OLLAMA_EXAMPLE),
        ("ollama:../x", OLLAMA_EXAMPLE),
        ("ollama:name:", OLLAMA_EXAMPLE),
        ("lmstudio:repo", LM_STUDIO_EXAMPLE),
        ("lmstudio:../../etc", LM_STUDIO_EXAMPLE),
        ("lmstudio:a/b/c.gguf:Q4", LM_STUDIO_EXAMPLE),
        ("https://ollama.com/", OLLAMA_EXAMPLE),
    ],
)
def test_other_mistakes(text: str, reason: str) -> None:
    """Each has its reason or its example."""
    with pytest.raises(InvalidRequestError, match=re.escape(reason)):
        parse_source_name(text)


def test_a_split_model_at_an_address() -> None:
    """By its first file; the names of the others follow from it."""
    name = parse_source_name("https://h/p/m-00001-of-00003.gguf?sig=1")
    assert isinstance(name, UrlName)
    assert name.files == tuple(f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3))
    assert name.query == "sig=1"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("org/repo", "hf:org/repo"),
        ("bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M", None),
        ("org/repo:Q4@main", None),
        ("llama3.2:1b", "ollama:llama3.2:1b"),
        ("models/m.gguf", ""),
        ("smollm2-135m", ""),
        ("/a/b", ""),
        ("a/b/c", ""),
        ("a b/c", ""),
    ],
)
def test_hints(text: str, hint: str | None) -> None:
    """A name without its kind: what to type instead, if it is clear."""
    meant = f"hf:{text}" if hint is None else hint
    assert source_hint(text) == (f" (did you mean '{meant}'?)" if meant else "")
    assert not meant or parse_source_name(meant) is not None


# -- secrets


def test_a_signature_is_in_nothing_that_is_shown() -> None:
    """It is kept for requests alone, and another one makes no other source."""
    name = parse_source_name(SIGNED)
    assert isinstance(name, UrlName)
    assert SECRET in name.query
    for shown in (repr(name), str(name), name.text, name.model_id):
        assert SECRET not in shown
        assert "AKIA" not in shown
    other = parse_source_name(SIGNED.replace(SECRET, "other"))
    assert isinstance(other, UrlName)
    assert other == name
    assert other.model_id == name.model_id


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@host/m.gguf",
        f"https://host/?token={SECRET}",
        f"https://huggingface.co/gpt2?token={SECRET}",
        f"https://user:{SECRET}@huggingface.co/org/repo",
        f"ftp://user:{SECRET}@host/m.gguf?token={SECRET}",
        f"https://host/a b.gguf?{SECRET}",
        f"hf:gpt2?{SECRET}",
    ],
)
def test_no_error_repeats_a_secret(text: str) -> None:
    """Neither its message nor its details."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_source_name(text)
    assert SECRET not in f"{caught.value.message} {caught.value.details}"


@pytest.mark.parametrize(
    ("query", "file", "lasting"),
    [
        ("X-Amz-Signature=a&X-Amz-Date=b", "m.gguf", ""),
        ("sv=1&sig=2&se=3", "download", ""),
        ("id=7&token=s&name=a%20b", "download", "id=7&name=a+b"),
        ("b=1&a=2", "download", "a=2&b=1"),
        ("whatever=s", "m.gguf", ""),
        ("versionId=5&X-Amz-Signature=a", "m.gguf", "versionId=5"),
        ("", "x", ""),
    ],
)
def test_what_of_a_query_lasts(query: str, file: str, lasting: str) -> None:
    """What chooses the file; nothing that may sign."""
    assert lasting_query(query, file) == lasting


def test_addresses_in_messages() -> None:
    """Without query, fragment and password; other texts lose their query too."""
    assert without_query("https://a:b@h/p?x=1#y") == "https://h/p"
    assert without_query("hf:org/repo?x") == "hf:org/repo"


# -- ids

IDENTIFIER = TypeAdapter(Identifier)
NAME = st.text(string.ascii_letters + string.digits + "._", min_size=1, max_size=30).filter(
    lambda text: text.strip(".") == text and ".." not in text
)
NAMES = st.one_of(
    st.builds(
        HubName,
        st.builds("{}/{}".format, NAME, NAME.filter(lambda text: not text.endswith(".git"))),
        st.none() | st.sampled_from(["Q4_K_M", "UD-IQ2_XXS", "BF16"]),
    ),
    st.builds(
        HubName,
        st.just("org/repo"),
        st.none(),
        st.builds("{}.gguf".format, st.text(string.printable[:95], min_size=1)).filter(
            lambda text: "/" not in text and "\\" not in text and text[0] != "."
        ),
    ),
    st.builds(UrlName, st.just("https://h"), st.builds("{}.gguf".format, NAME)),
    st.builds(OllamaName, NAME.filter(lambda text: text[0] != "_"), NAME),
    st.builds(LMStudioName, NAME, NAME),
)


@settings(deadline=None)
@given(NAMES)
def test_every_name_has_a_text_and_a_valid_id(name: HubName | UrlName | OllamaName) -> None:
    """What to type is parsed to the same name, and the id fits a registry."""
    IDENTIFIER.validate_python(name.model_id)
    parsed = parse_source_name(name.text)
    assert parsed == name
    assert parsed is not None
    assert parsed.model_id == name.model_id


@settings(deadline=None)
@given(NAMES, NAMES)
def test_no_two_names_share_an_id(
    one: HubName | UrlName | OllamaName, other: HubName | UrlName | OllamaName
) -> None:
    """Not even when they look alike."""
    assert (one.model_id == other.model_id) == (one.text == other.text)


def test_ids_say_what_they_are() -> None:
    """A name that a person recognizes, and the same on every machine."""
    assert re.fullmatch(
        r"Llama-3.2-1B-Instruct-GGUF-Q4_K_M-[0-9a-f]{10}", ALL[HUB_EXAMPLE].model_id
    )
    assert ALL["ollama:llama3.2"].model_id == "llama3.2-latest-b1d7f011d8"
    assert HubName("a/b-c").model_id != HubName("a/b", "C").model_id
    assert UrlName("https://h", "模型.gguf").model_id.startswith("model-")
    assert len(UrlName("https://h", "x" * 300).model_id) <= 128


@settings(deadline=None)
@given(
    st.text() | st.builds("{}{}".format, st.sampled_from(["hf:", "https://", "ollama:"]), st.text())
)
def test_any_text(text: str) -> None:
    """A name, None, or the one error."""
    with suppress(InvalidRequestError):
        name = parse_source_name(text)
        assert name is None or name.model_id
