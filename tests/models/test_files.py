"""Files that are replaced as a whole."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orion_oie.models.files import atomic_write, replacing


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize(("data", "expected"), [("é\n", "é\n".encode()), (b"\0\xff", b"\0\xff")])
def test_the_new_content_takes_the_place_of_the_old(
    tmp_path: Path, data: str | bytes, expected: bytes, sync: bool
) -> None:
    """Text and bytes, over a file or where there was none; nothing else is left in the folder."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for target in (path, tmp_path / "another"):
        atomic_write(target, data, sync=sync)
        assert target.read_bytes() == expected
    assert {each.name for each in tmp_path.iterdir()} == {"file", "another"}


def test_an_interrupted_writer_changes_nothing(tmp_path: Path) -> None:
    """The old content stays, also after Ctrl-C, and the temporary file is removed."""
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half() -> None:
        with replacing(path) as fresh:
            assert fresh.parent == tmp_path
            fresh.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_is_raised(tmp_path: Path) -> None:
    """A folder in the way stays, and the temporary file is removed."""
    path = tmp_path / "file"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        atomic_write(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `sync`, the file is synchronized before it is renamed; without, it is not."""
    steps: list[str] = []

    def noting(name: str) -> Callable[..., None]:
        function = getattr(os, name)

        def note(*arguments: object) -> None:
            steps.append(name)
            function(*arguments)

        return note

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noting(name))
    atomic_write(tmp_path / "file", b"new", sync=True)
    assert steps == ["fsync", "replace"]
    atomic_write(tmp_path / "file", b"newer")
    assert steps == ["fsync", "replace", "replace"]


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    """The last one to finish wins, with its own content."""
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write_bytes(b"first")
        with replacing(path) as second:
            second.write_bytes(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
