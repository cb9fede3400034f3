"""The picture of the engine beside other programs: an SVG, always in the same bytes."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "plot_beside.py"
DATA = {
    "tokens": [index / 100 for index in range(800)],
    "threads": [[index / 20, 1 if 40 < index < 100 else 2] for index in range(160)],
    "came": [2.0],
    "went": [5.0],
}


def plot(folder: Path, data: object, out: str = "out.svg") -> subprocess.CompletedProcess[str]:
    pytest.importorskip("matplotlib", reason="needs the bench extra")
    (folder / "data.json").write_text(json.dumps(data))
    command = [sys.executable, str(SCRIPT), str(folder / "data.json"), "--out", str(folder / out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_says_what_it_shows_in_the_same_bytes(tmp_path: Path) -> None:
    assert plot(tmp_path, DATA).returncode == 0
    assert plot(tmp_path, DATA, "again.svg").returncode == 0
    image = (tmp_path / "out.svg").read_bytes()
    assert image == (tmp_path / "again.svg").read_bytes()
    texts = "\n".join(ElementTree.fromstring(image).itertext())
    for expected in ("tokens/s", "threads", "seconds", "another process comes and goes"):
        assert expected in texts


@pytest.mark.parametrize("data", [{**DATA, "tokens": []}, {"tokens": [1]}])
def test_data_without_a_plot_in_it_is_refused(tmp_path: Path, data: object) -> None:
    """With the name of the file, and no picture."""
    done = plot(tmp_path, data)
    assert done.returncode == 1
    assert "data.json" in done.stderr
    assert not (tmp_path / "out.svg").exists()
