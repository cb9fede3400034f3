"""Every benchmark runs, and writes its rows. What they say of speed is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("[a-z]*.py"))
COLUMNS = {"name", "value", "unit", "bar", "higher_is_better", "ok"}


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmark_writes_its_rows(path: Path, smollm2: Path, tmp_path: Path) -> None:
    """`--quick --json FILE` writes rows with all columns; the status is 1 if a bar is missed."""
    file = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, str(path), "--quick", "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.stderr == ""
    rows = json.loads(file.read_text())["rows"]
    assert rows
    assert all(set(row) >= COLUMNS for row in rows)
    assert done.returncode == int(any(row["ok"] is False for row in rows))
