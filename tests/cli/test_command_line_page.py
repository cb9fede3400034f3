"""docs/command-line.md: what it shows is what the commands print."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orion_oie.cli.main import SECTIONS

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SPEEDS = re.compile(r"\d+(\.\d+)?(?= (ms|tokens/s|cached))")
PROGRESS = re.compile(r"^\S+: (loading|loaded).*\n", re.MULTILINE)


def comparable(text: str) -> str:
    """Without what differs from run to run, and without the progress of slow loads."""
    return SPEEDS.sub("N", PROGRESS.sub("", text))


def examples(block: str) -> list[tuple[str, str]]:
    """The commands of a block, with what they print, both outputs together."""
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][2:40])
def test_the_examples_print_what_the_page_shows(block: str, smollm2: Path, tmp_path: Path) -> None:
    """Offline, with the model of the smollm2 extra; "..." stands for anything."""
    (tmp_path / smollm2.name).symlink_to(smollm2)
    shim = tmp_path / "bin" / "orion-oie"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m orion_oie "$@"\n', encoding="utf-8")
    shim.chmod(0o755)
    (shim.parent / "python").symlink_to(sys.executable)
    env = {**os.environ, "PATH": f"{shim.parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    for command, expected in examples(block):
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=tmp_path,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        checker, printed = doctest.OutputChecker(), comparable(done.stdout)
        assert checker.check_output(comparable(expected), printed, doctest.ELLIPSIS), (
            f"{command}\n{printed}"
        )


def test_the_page_is_about_every_command() -> None:
    """Each of them is named, and so are all statuses and shells."""
    for names in SECTIONS.values():
        for name in names:
            assert re.search(rf"orion-oie {name}\b|`{name}\b", PAGE), name
    for shell in ("bash", "zsh", "fish"):
        assert f"_ORION_OIE_COMPLETE={shell}_source orion-oie" in PAGE
    assert len(BLOCKS) > 10
