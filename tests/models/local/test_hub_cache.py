"""The cache of the hub's library, read by hand."""

import sys
from pathlib import Path

import pytest
from stores import COMMIT, OLDER, add_snapshot, home

from orion_oie.errors import ModelNotFoundError
from orion_oie.models.local.hub_cache import (
    cached_files,
    find_in_hub_cache,
    hub_cache_folders,
    hub_cache_models,
)
from orion_oie.models.local.survey import local_models, survey
from orion_oie.models.local.walk import Walk
from orion_oie.models.source_names import HubName, parse_source_name

__all__ = ["home"]


@pytest.fixture
def cache(home: Path) -> Path:
    return home / ".cache" / "huggingface" / "hub"


def find(text: str) -> tuple[Path, ...]:
    name = parse_source_name(text)
    assert isinstance(name, HubName)
    return find_in_hub_cache(name)


def test_the_list(cache: Path) -> None:
    """Models with GGUF files alone, each with what to type for it."""
    add_snapshot(cache, "org/repo", ["m-Q4_K_M.gguf", "Q8_0/m-Q8_0.gguf", "mmproj-F16.gguf"])
    add_snapshot(cache, "org/two", ["a-Q8_0.gguf", "b-Q8_0.gguf"])
    add_snapshot(cache, "org/plain", ["model.safetensors"])
    (cache / "datasets--org--x").mkdir()
    found = hub_cache_models()
    assert [(model.source, model.quantization) for model in found.models] == [
        ("hf:org/repo:Q8_0", "Q8_0"),
        ("hf:org/repo:Q4_K_M", "Q4_K_M"),
        ("hf:org/two/a-Q8_0.gguf", "Q8_0"),
        ("hf:org/two/b-Q8_0.gguf", "Q8_0"),
    ]
    for model in found.models:
        assert find(model.source) == model.paths
    assert local_models() == list(found.models)
    assert survey().unusable == ()


def test_revisions(cache: Path) -> None:
    """A branch, a commit, a short commit; without one `main`, and then the newest that has it."""
    old = add_snapshot(cache, "org/repo", ["m-Q4_K_M.gguf", "m-Q8_0.gguf"], OLDER, "v1")
    new = add_snapshot(cache, "org/repo", ["m-Q4_K_M.gguf"], COMMIT, "main")
    add_snapshot(cache, "org/repo", [], COMMIT, "refs/pr/1")
    assert find("hf:org/repo") == find("hf:Org/Repo@refs/pr/1") == (new["m-Q4_K_M.gguf"],)
    assert find("hf:org/repo@v1") == find(f"hf:org/repo@{OLDER}") == (old["m-Q4_K_M.gguf"],)
    assert find(f"hf:org/repo:q8_0@{OLDER[:8]}") == (old["m-Q8_0.gguf"],)
    assert find("hf:org/repo:q8_0") == (old["m-Q8_0.gguf"],)
    for text in ("hf:org/repo@v2", f"hf:org/repo@{'c' * 40}"):
        with pytest.raises(ModelNotFoundError, match="not in the hub's cache"):
            find(text)
    with pytest.raises(ModelNotFoundError, match="has no quantization 'Q8_0'; there are Q4_K_M"):
        find(f"hf:org/repo:q8_0@{COMMIT}")
    assert [model.paths for model in hub_cache_models().models] == [(new["m-Q4_K_M.gguf"],)]


def test_what_is_known_of_the_files(cache: Path) -> None:
    """The commit, the sizes, and the digests that the files lie under."""
    add_snapshot(cache, "Org/Repo", ["m-Q4_K_M.gguf"])
    found = cached_files(HubName("org/repo"))
    assert (found.repository, found.commit) == ("Org/Repo", COMMIT)
    (file,) = found.chosen.files
    assert file.size == found.paths[0].stat().st_size
    assert file.sha256 == found.paths[0].resolve().name


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("HF_HUB_CACHE", "{}/x", "{}/x"),
        ("HUGGINGFACE_HUB_CACHE", "{}/x", "{}/x"),
        ("HF_HOME", "{}/x", "{}/x/hub"),
        ("XDG_CACHE_HOME", "{}/x", "{}/x/huggingface/hub"),
        ("HF_HOME", "~/x", "{}/home/x/hub"),
        ("HF_HOME", "$HOME/x", "{}/home/x/hub"),
    ],
)
def test_where_it_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    """Where the hub's library would."""
    monkeypatch.setenv(variable, value.format(tmp_path))
    assert hub_cache_folders() == [Path(expected.format(tmp_path))]


def test_what_is_missing(cache: Path) -> None:
    """A closed name, a link whose content was removed, parts that were never fetched."""
    links = add_snapshot(cache, "org/repo", ["a-Q8_0.gguf", "b-Q4_0-00001-of-00002.gguf"])
    links["a-Q8_0.gguf"].resolve().unlink()
    with pytest.raises(ModelNotFoundError, match=r"did you mean 'org/repo'"):
        find("hf:org/rep")
    with pytest.raises(ModelNotFoundError, match="are missing"):
        find("hf:org/repo")
    found = hub_cache_models()
    assert found.models == ()
    reasons = {one.name: one.reason for one in found.unusable}
    assert "does not exist" in reasons["org/repo/a-Q8_0.gguf"]
    assert (
        reasons["hf:org/repo/b-Q4_0-00001-of-00002.gguf"] == "1 of its parts have not been fetched"
    )


def test_files_without_links(cache: Path) -> None:
    """On disks without links the files themselves lie in the snapshot."""
    links = add_snapshot(cache, "org/repo", ["m-Q8_0.gguf"])
    content = links["m-Q8_0.gguf"].read_bytes()
    links["m-Q8_0.gguf"].unlink()
    links["m-Q8_0.gguf"].write_bytes(content)
    found = cached_files(HubName("org/repo"))
    assert found.chosen.files[0].sha256 is None
    assert found.paths == (links["m-Q8_0.gguf"],)


def test_a_walk_is_bounded(tmp_path: Path) -> None:
    """It stops at its number of entries, and says so."""
    for number in range(50):
        (tmp_path / f"{number}.gguf").touch()
    walk = Walk(tmp_path, 1, most_entries=20)
    assert len(walk.files) == 20
    assert walk.problems == [(".", "it has more than 20 entries; the rest was not looked at")]


def test_the_library_is_not_needed(cache: Path) -> None:
    """The files are found without it; it may not be installed."""
    add_snapshot(cache, "org/repo", ["m-Q8_0.gguf"])
    assert find("hf:org/repo")
    names = [name for name in sys.modules if name.startswith("orion_oie.models.local")]
    assert all("huggingface_hub" not in vars(sys.modules[name]) for name in names)
