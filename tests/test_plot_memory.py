"""The picture of memory over time: an SVG that says what it shows, always in the same bytes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "plot_memory.py"
SVG = "{http://www.w3.org/2000/svg}"
MIB = 2**20
DATA: dict[str, Any] = {
    "requests": 7,
    "budget_bytes": 1200 * MIB,
    "samples": [
        {
            "t": t,
            "workers": {
                **({"1": 80 * MIB} if t < 6 else {}),
                **({"2": 100 * t * MIB} if t > 3 else {}),
            },
        }
        for t in range(10)
    ],
    "loads": [
        {"t": 1, "key": "a <&> b@q4", "worker": "1"},
        {"t": 5, "key": "large@q8", "worker": "2"},
    ],
    "evictions": [{"t": 5, "key": "a <&> b@q4"}],
}


def plot(
    folder: Path, data: object, *, seed: str = "0", settings: str = "", before: str = "pass"
) -> subprocess.CompletedProcess[str]:
    """Run the script on data from a file; it writes `plot.svg` in the folder. `seed` is that of
    the hashes, `settings` are the user's for matplotlib, `before` is code that runs first."""
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "matplotlibrc").write_text(settings)
    run = f"import runpy; {before}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", run, "data.json", "plot.svg"],
        cwd=folder,
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def drawn(folder: Path, data: object, **options: str) -> bytes:
    done = plot(folder, data, **options)
    assert done.returncode == 0, done.stderr
    return (folder / "plot.svg").read_bytes()


def texts(svg: bytes) -> set[str]:
    """What is written in a picture."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}text")
    return {"".join(text.itertext()) for text in found}


def test_it_says_what_it_was_given(tmp_path: Path) -> None:
    """The SVG has the width of a page and a background; its title states the finding, and models,
    budget, peak and axes are named where they are, with units, in letters of 12 pixels or more."""
    pytest.importorskip("matplotlib")
    svg = drawn(tmp_path, DATA)
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert (root.get("width"), root.get("height")) == ("675pt", "352.5pt")  # 900 by 470 pixels
    assert texts(svg) >= {
        "2 models of 780 MiB in all take turns within a budget of 1,200 MiB",
        "7 requests, 2 loads, 1 eviction: an idle model leaves when the next one needs its memory",
        "memory of all workers (MiB)",
        "time (s)",
        "budget 1,200 MiB",
        "peak 900 MiB",
        "a <&> b",
        "large",
        "80 MiB, 1 load",
        "700 MiB, 1 load",
    }
    styles = [text.get("style", "") for text in root.iter(f"{SVG}text")]
    sizes = [float(size) for style in styles for size in re.findall(r"([\d.]+)px", style)]
    assert len(sizes) == len(styles)
    assert min(sizes) >= 9  # of 675 units in all; 12 of 900 pixels
    background = root.find(f".//{SVG}g[@id='patch_1']/{SVG}path")
    assert background is not None
    assert background.get("style") == "fill: #ffffff"


def test_a_budget_that_was_exceeded(tmp_path: Path) -> None:
    """The title says so, and by how much."""
    pytest.importorskip("matplotlib")
    title = "2 models of 780 MiB in all exceed their budget of 890 MiB by 10 MiB"
    assert title in texts(drawn(tmp_path, {**DATA, "budget_bytes": 890 * MIB}))


def test_workers_for_which_there_is_no_room(tmp_path: Path) -> None:
    """Names are left out, not written over each other; the rows still
    have every model."""
    pytest.importorskip("matplotlib")
    lives = range(300)
    data = {
        **DATA,
        "samples": [{"t": t / 2, "workers": {str(t // 2): 80 * MIB}} for t in range(600)],
        "loads": [{"t": t + 0.2, "key": f"m{t % 3}@q4", "worker": str(t)} for t in lives],
        "evictions": [{"t": t + 0.6, "key": f"m{t % 3}@q4"} for t in lives],
    }
    svg = drawn(tmp_path, data)
    names = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert [names.count(f"m{number}") for number in range(3)] == [1, 1, 1]
    assert "80 MiB, 100 loads" in names


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    """In another process, in which sets have another order, with the user's own settings, and
    with samples in any order, the file is the same; with other data it is another."""
    pytest.importorskip("matplotlib")
    shuffled = {**DATA, "samples": DATA["samples"][::-1]}
    first = drawn(tmp_path, DATA, seed="1")
    settings = "axes.facecolor: black\nfont.size: 30\nsavefig.dpi: 50\n"
    assert drawn(tmp_path, shuffled, seed="2", settings=settings) == first
    assert drawn(tmp_path, {**DATA, "budget_bytes": 1300 * MIB}) != first


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**DATA, "samples": DATA["samples"][:1]}, "two samples or more; there are 1"),
        ({**DATA, "samples": []}, "two samples or more; there are 0"),
        ({**DATA, "loads": []}, "no worker of the samples loaded a model"),
        ({key: value for key, value in DATA.items() if key != "loads"}, "'loads' is missing"),
    ],
    ids=["one sample", "no sample", "no loads", "loads missing"],
)
def test_data_that_cannot_be_drawn(tmp_path: Path, data: object, message: str) -> None:
    """One line says what is wrong, and no picture is written."""
    pytest.importorskip("matplotlib")
    done = plot(tmp_path, data)
    assert done.returncode == 1
    assert done.stderr.startswith("data.json: ")
    assert done.stderr.endswith(f"{message}\n")
    assert not (tmp_path / "plot.svg").exists()


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    """The script itself starts without the extra, and names it."""
    done = plot(tmp_path, DATA, before="import sys; sys.modules['matplotlib'] = None")
    assert done.returncode == 1
    assert "pip install 'orion-oie[bench]'" in done.stderr
    assert "Traceback" not in done.stderr
