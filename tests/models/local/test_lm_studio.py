"""Models of LM Studio, found without it."""

import json
from pathlib import Path

import pytest
from stores import GGUF, home

from orion_oie.errors import ModelNotFoundError
from orion_oie.models.local.lm_studio import (
    find_lm_studio,
    lm_studio_folders,
    lm_studio_models,
)
from orion_oie.models.source_names import LMStudioName, parse_source_name

__all__ = ["home"]


def add(folder: Path, *names: str, content: bytes = GGUF) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return paths


@pytest.fixture
def folder(home: Path) -> Path:
    return home / ".lmstudio" / "models"


def find(text: str) -> tuple[Path, ...]:
    name = parse_source_name(text)
    assert isinstance(name, LMStudioName)
    return find_lm_studio(name)


def refused(text: str) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        find(text)
    return caught.value.message


def test_the_list(folder: Path) -> None:
    """The shortest source that is clear; projectors are no models; what is typed finds it."""
    add(folder, "pub/One-GGUF/One-Q4_K_M.gguf", "pub/One-GGUF/mmproj-F16.gguf")
    add(folder, "pub/two/a-Q4_K_M.gguf", "pub/two/b-Q4_K_M.gguf", "pub/two/b-Q8_0.gguf")
    add(folder, *(f"pub/big/big-0000{number}-of-00002.gguf" for number in (1, 2)))
    found = lm_studio_models()
    assert [(model.source, model.quantization, model.size_bytes) for model in found.models] == [
        ("lmstudio:pub/One-GGUF", "Q4_K_M", 64),
        ("lmstudio:pub/big", None, 128),
        ("lmstudio:pub/two/a-Q4_K_M.gguf", "Q4_K_M", 64),
        ("lmstudio:pub/two/b-Q4_K_M.gguf", "Q4_K_M", 64),
        ("lmstudio:pub/two:Q8_0", "Q8_0", 64),
    ]
    assert found.unusable == ()
    for model in found.models:
        assert find(model.source) == model.paths
        assert model.where == "lmstudio"


def test_names(folder: Path) -> None:
    """Case does not count, and without a quantization the usual one is taken."""
    small, large = add(folder, "Pub/Repo/m-Q4_K_M.gguf", "Pub/Repo/m-Q8_0.gguf")
    assert find("lmstudio:pub/repo") == find("lmstudio:pub/repo:q4_k_m") == (small,)
    assert find("lmstudio:Pub/Repo/M-q8_0.gguf") == (large,)


def test_what_is_not_there(folder: Path) -> None:
    """The closest name and how to fetch it."""
    add(folder, "pub/repo/m-Q4_K_M.gguf")
    assert "(did you mean 'pub/repo'?): fetch it in LM Studio" in refused("lmstudio:pub/rep")
    assert "; it has pub/repo: fetch" in refused("lmstudio:x/yz")
    assert "has no quantization 'Q8_0'; there are Q4_K_M" in refused("lmstudio:pub/repo:Q8_0")


def test_no_lm_studio_at_all(home: Path) -> None:
    """Where it was looked for."""
    assert lm_studio_models().models == ()
    assert f"looked in {home}/.lmstudio/models" in refused("lmstudio:a/b")


def test_where_it_looks(home: Path, tmp_path: Path) -> None:
    """In the home that LM Studio has noted, and in the folder of its settings."""
    (home / ".lmstudio-home-pointer").write_text(f"{tmp_path / 'moved'}\n")
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "settings.json").write_text(
        json.dumps({"downloadsFolder": str(tmp_path / "disk")})
    )
    assert lm_studio_folders()[:3] == [
        tmp_path / "disk",
        tmp_path / "moved" / "models",
        home / ".lmstudio" / "models",
    ]
    (path,) = add(tmp_path / "disk", "a/b/c.gguf")
    assert find("lmstudio:a/b") == (path,)
    for broken in ("", "[1]", '{"downloadsFolder": 5}', "[" * 100_000):
        (tmp_path / "moved" / "settings.json").write_text(broken)
        assert lm_studio_folders()[0] == tmp_path / "moved" / "models"


def test_what_is_unusable(folder: Path) -> None:
    """Missing parts, half-fetched files, broken links: a reason for each."""
    add(folder, "pub/big/big-00001-of-00002.gguf", "pub/half/m.gguf.part")
    add(folder, "pub/none/none.gguf", content=b"")
    (folder / "pub" / "gone").mkdir()
    (folder / "pub" / "gone" / "gone.gguf").symlink_to(folder / "nothing")
    found = lm_studio_models()
    assert found.models == ()
    reasons = {one.name: one.reason for one in found.unusable}
    assert reasons["lmstudio:pub/big/big-00001-of-00002.gguf"] == "1 of its parts are missing"
    assert reasons["lmstudio:pub/none"] == "its file is empty"
    assert reasons[str(folder / "pub/half/m.gguf.part")] == "its download has not finished"
    assert "does not exist" in reasons[str(folder / "pub/gone/gone.gguf")]
    assert "parts of its split model are missing" in refused("lmstudio:pub/big")


@pytest.mark.timeout(20)
def test_links_and_files_elsewhere(folder: Path, tmp_path: Path) -> None:
    """Linked folders are entered once, loops end, and a file too high up is named by its path."""
    (path,) = add(tmp_path / "disk", "m-Q8_0.gguf")
    (high,) = add(folder, "high.gguf")
    (folder / "pub").mkdir()
    (folder / "pub" / "linked").symlink_to(tmp_path / "disk")
    (folder / "pub" / "loop").symlink_to(folder)
    found = lm_studio_models()
    assert [model.source for model in found.models] == ["lmstudio:pub/linked", str(high)]
    assert find("lmstudio:pub/linked")[0].samefile(path)
