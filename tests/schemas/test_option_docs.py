"""The page of all options is what their fields say."""

from pathlib import Path

import pytest

from orion_oie import EngineConfig, RequestOptions
from orion_oie.cli.main import main
from orion_oie.schemas import option_docs

TOP = Path(__file__).parents[2]


def test_the_page_is_in_step() -> None:
    """docs/options.md is what the library generates: `python -m orion_oie options`."""
    written = (TOP / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == option_docs.document(EngineConfig)


def test_every_option_is_described() -> None:
    """Each option and each setting has a row, with a meaning."""
    rows = [line for line in option_docs.document(EngineConfig).splitlines() if "| `" in line]
    names = [row.split("`")[1] for row in rows]
    assert set(RequestOptions.model_fields) <= set(names)
    assert {"stand_in", "serving.slots", "loading.sharding.num_shards"} <= set(names)
    assert all(row.rstrip(" |").split("|")[-1].strip().endswith(".") for row in rows)


def test_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """`orion-oie options` prints it."""
    assert main(["options"]) == 0
    assert capsys.readouterr().out == option_docs.document(EngineConfig)
