"""Bounded walks through folders of other programs: no loops, no endless trees, no waiting.

Raises nothing: what cannot be read is left out, with the reason.
"""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

MOST_ENTRIES = 20_000
"""How many entries of all folders together one walk looks at."""

_SMALL_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class SeenFile:
    """A regular file, by its path below the start of the walk; `size` is in bytes."""

    name: str
    path: Path
    size: int


@dataclass
class Walk:
    """The files below a folder, in order of their names, at most `depth` folders deep."""

    root: Path
    depth: int
    files: list[SeenFile] = field(default_factory=list, init=False)
    problems: list[tuple[str, str]] = field(default_factory=list, init=False)
    """What could not be read, by its path below the start, and why."""
    most_entries: int = MOST_ENTRIES
    _count: int = field(default=0, init=False)
    _seen: set[tuple[int, int]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._enter(self.root, "", self.depth)

    def _enter(self, folder: Path, below: str, depth: int) -> None:
        try:
            facts = os.stat(folder)
            if (facts.st_dev, facts.st_ino) in self._seen:  # a loop, or a second link to it
                return
            self._seen.add((facts.st_dev, facts.st_ino))
            names = self._names(folder)
        except OSError as error:
            self.problems.append((below or ".", _reason(error)))
            return
        for name in names:
            self._look(folder / name, f"{below}/{name}" if below else name, depth)

    def _names(self, folder: Path) -> list[str]:
        names = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if self._count == self.most_entries:
                    why = f"it has more than {self._count} entries; the rest was not looked at"
                    if (".", why) not in self.problems:
                        self.problems.append((".", why))
                    break
                self._count += 1
                if not entry.name.startswith("."):
                    names.append(entry.name)
        return sorted(names)

    def _look(self, path: Path, below: str, depth: int) -> None:
        try:
            facts = os.stat(path)
        except FileNotFoundError:
            target = os.path.realpath(path)
            self.problems.append((below, f"it is a link to {target}, which does not exist"))
        except OSError as error:
            self.problems.append((below, _reason(error)))
        else:
            if stat.S_ISDIR(facts.st_mode) and depth > 0:
                self._enter(path, below, depth - 1)
            elif stat.S_ISREG(facts.st_mode):
                self.files.append(SeenFile(below, path, facts.st_size))


def read_small(path: Path) -> str:
    """The text of a small regular file. Raises `OSError` or `ValueError`; never blocks."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _SMALL_BYTES:
            raise ValueError("it is no small regular file")
        return file.read(_SMALL_BYTES).decode("utf-8")


def is_forbidden(path: Path) -> bool:
    """Whether the system forbids even to look whether a path exists."""
    try:
        os.stat(path)
    except PermissionError:
        return True
    except (OSError, ValueError):
        pass
    return False


def _reason(error: OSError) -> str:
    return f"it cannot be read ({error.strerror or error})"
