"""What is shipped: the wheel carries everything that the library needs at run time."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, timeout=120)
    return next(out.glob("*.whl"))


def test_the_wheel_carries_registry_schema_and_types(wheel: Path) -> None:
    """models.json and its schema in the wheel are those of the repository; py.typed is there."""
    with zipfile.ZipFile(wheel) as archive:
        for name in ("models.json", "models.schema.json"):
            assert archive.read(f"orion_oie/{name}") == (ROOT / name).read_bytes()
        assert "orion_oie/py.typed" in archive.namelist()


def test_the_wheel_holds_no_test_code(wheel: Path) -> None:
    """Beside the library and its metadata there is nothing, and no module of the library imports a
    test tool or is one of those in `tests`."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        sources = {name: archive.read(name).decode() for name in names if name.endswith(".py")}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"orion_oie"}
    helpers = {path.name for path in (ROOT / "tests").glob("*.py")}
    assert not [name for name in sources if Path(name).name in helpers]
    test_tool = re.compile(r"^\s*(import|from) (pytest|hypothesis|unittest)\b", re.MULTILINE)
    assert not [name for name, source in sources.items() if test_tool.search(source)]


def test_the_unpacked_wheel_works(wheel: Path, tmp_path: Path) -> None:
    """Imported from the wheel's content alone, the packaged registry loads."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import orion_oie; "
        "assert orion_oie.__file__.startswith(sys.argv[1]), orion_oie.__file__; "
        "print(len(orion_oie.ModelRegistry.packaged().agents))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "site")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(done.stdout) >= 6
