"""The pictures of the router: SVGs that say what they show, always in the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "plot_routing.py"
SVG = "{http://www.w3.org/2000/svg}"
NAMES = ["routing-confidence.svg", "routing-confusion.svg"]
PICTURE = {
    "confusion": [["code", "code", 3], ["code", "data", 1], ["vision", "vision", 2]],
    "bins": [[0.4, 0.5, 2], [0.95, 0.97, 4]],
}
DATA: dict[str, Any] = {
    "real, core": PICTURE,
    "real, embeddings": PICTURE,
    "curve": [
        {"prompts": prompts, "name": name, "lenient": 0.8}
        for prompts in (100, 200)
        for name in ("core", "embeddings")
    ],
}


def plot(
    folder: Path, data: object, *, seed: str = "0", settings: str = "", before: str = "pass"
) -> subprocess.CompletedProcess[str]:
    """Run the script on data from a file; it writes to `out` in the folder. `seed` is that of the
    hashes, `settings` are the user's for matplotlib, `before` is code that runs first."""
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "matplotlibrc").write_text(settings)
    (folder / "out").mkdir(exist_ok=True)
    run = f"import runpy; {before}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", run, "data.json", "--out", "out"],
        cwd=folder,
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def drawn(folder: Path, data: object, **options: str) -> dict[str, bytes]:
    done = plot(folder, data, **options)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}


def test_it_draws_what_it_was_given(tmp_path: Path) -> None:
    """Both pictures are there, with titles, axes and counts in text."""
    pytest.importorskip("matplotlib")
    pictures = drawn(tmp_path, DATA)
    assert list(pictures) == NAMES
    confidence, confusion = (
        {"".join(text.itertext()) for text in ElementTree.fromstring(one).iter(f"{SVG}text")}
        for one in pictures.values()
    )
    assert confidence >= {"Learning curve", "confidence", *DATA} - {"curve"}
    assert confusion >= {
        "Core install: 75 % right",
        "With embeddings: 75 % right",
        "code (4)",
        "75",
        "25",
    }


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    """In another process, in which sets have another order, and with the user's own settings, the
    files are the same; with other data they are others."""
    pytest.importorskip("matplotlib")
    first = drawn(tmp_path, DATA, seed="1")
    settings = "axes.facecolor: black\nfont.size: 30\nsavefig.dpi: 50\n"
    assert drawn(tmp_path, DATA, seed="2", settings=settings) == first
    other = {"confusion": PICTURE["confusion"][:1], "bins": PICTURE["bins"][:1]}
    changed = drawn(tmp_path, {**DATA, "real, core": other})
    assert all(changed[name] != first[name] for name in NAMES)


@pytest.mark.parametrize("missing", list(DATA))
def test_a_run_without_the_real_prompts_cannot_be_drawn(tmp_path: Path, missing: str) -> None:
    """One line says what is missing, and no picture is written."""
    pytest.importorskip("matplotlib")
    done = plot(tmp_path, {key: value for key, value in DATA.items() if key != missing})
    assert done.returncode == 1
    told = f"{missing!r} is missing: it takes a full run, with the real prompts"
    assert done.stderr == f"data.json: {told}\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    """The script itself starts without the extra, and names it."""
    done = plot(tmp_path, DATA, before="import sys; sys.modules['matplotlib'] = None")
    assert done.returncode == 1
    assert "pip install 'orion-oie[bench]'" in done.stderr
    assert "Traceback" not in done.stderr
