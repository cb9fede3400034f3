"""The picture of memory over time: an SVG that says what it shows, always in the same bytes."""

import json
import os
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
    "budget_bytes": 1200 * MIB,
    "samples": [
        {
            "t": t,
            "workers_bytes": (100 + 10 * t) * MIB,
            "private_bytes": 50 * MIB,
            "models": {"small@q4": 80 * MIB, **({"large@q8": 10 * t * MIB} if t > 3 else {})},
        }
        for t in range(10)
    ],
    "loads": [{"t": 0, "key": "small@q4"}, {"t": 3, "key": "large@q8"}],
    "evictions": [{"t": 2, "key": "tiny <&> other"}],
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


def test_it_draws_what_it_was_given(tmp_path: Path) -> None:
    """The SVG has the size of a page's width, names axes with units, models and budget in text,
    and has one tick for each load and each eviction."""
    pytest.importorskip("matplotlib")
    root = ElementTree.fromstring(drawn(tmp_path, DATA))
    assert root.tag == f"{SVG}svg"
    assert (root.get("width"), root.get("height")) == ("675pt", "315pt")  # 900 by 420 pixels
    texts = {"".join(text.itertext()) for text in root.iter(f"{SVG}text")}
    assert texts >= {
        "time (s)",
        "memory (MiB)",
        "budget 1,200 MiB",
        "small@q4",
        "large@q8",
        "tiny <&> other",
        "all workers",
        "all workers, private",
        "loads",
        "evictions",
    }
    ticks = [
        len(group.findall(f"{SVG}path"))
        for group in root.iter(f"{SVG}g")
        if group.get("id", "").startswith("LineCollection")
    ]
    assert ticks == [2, 1]


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
        ({key: value for key, value in DATA.items() if key != "loads"}, "'loads' is missing"),
    ],
    ids=["one sample", "no sample", "no loads"],
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
