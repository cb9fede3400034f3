"""Every example runs offline with the smollm2 extra and says something."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
PROGRESS = {"batch": r"3 of 3 questions, 1 failed, .*\n"}  # the only one that has stderr for it


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, smollm2: Path, tmp_path: Path) -> None:
    """It ends with status 0, prints, and has nothing to complain about."""
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(PROGRESS.get(path.stem, ""), done.stderr)
    assert len(done.stdout.split()) > 20


def test_the_quickstart_shows_four_agents_on_one_model(smollm2: Path) -> None:
    """At least four answers from at least four agents, one model loaded once, with receipts."""
    path = next(path for path in EXAMPLES if path.stem == "quickstart")
    out = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    summary = out.strip().splitlines()[-1].split()
    answers, agents = int(summary[0]), int(summary[3])
    assert answers >= 4
    assert agents >= 4
    assert "models loaded: 1 (smollm2-135m-instruct@q4_1)" in out
    assert out.count("  time ") == answers
