"""What the pages for users show runs as it stands there, on the real model, and passes mypy."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_tiny_llama

TOP = Path(__file__).parents[1]
PAGES = ["README.md", "docs/own-model.md", "docs/quickstart.fr.md"]
BLOCK = re.compile(
    r"(?:^`(?P<file>[\w.-]+)`:\n\n)?^```(?P<kind>python|json)\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
MYPY = """
[mypy]
strict = true
follow_imports = silent
"""


def program_of(page: str, folder: Path) -> str:
    """The Python of a page, in its order; its files are written into `folder`."""
    found = []
    for block in BLOCK.finditer((TOP / page).read_text(encoding="utf-8")):
        text = block["text"]
        if block["kind"] == "python":
            found.append(text)
        else:
            json.loads(text)
            if block["file"]:
                (folder / block["file"]).write_text(text, encoding="utf-8")
    assert found
    return "\n".join(found)


@pytest.fixture
def place(tmp_path: Path, smollm2: Path) -> Path:
    """The folder of a reader, with the files that the pages name."""
    (tmp_path / "my-model.gguf").symlink_to(smollm2)
    write_tiny_llama(tmp_path / "base.gguf", chat_template=None)
    (tmp_path / "home").mkdir()
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a page, one after the other, as a reader would type them."""
    program = place / "page.py"
    program.write_text(program_of(page, place), encoding="utf-8")
    monkeypatch.setenv("HOME", str(place / "home"))
    done = subprocess.run(
        [sys.executable, program.name],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.strip()


def test_the_pages_pass_mypy(place: Path) -> None:
    """In its strict mode."""
    files = []
    for number, page in enumerate(PAGES):
        files.append(place / f"page{number}.py")
        files[-1].write_text(program_of(page, place), encoding="utf-8")
    (place / "mypy.ini").write_text(MYPY)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", *(file.name for file in files)],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout
