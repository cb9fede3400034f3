"""Tests go through the front door. What only a private part shows is reached by a named function
that says why."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # public, in spite of their names
BY_NAME = {"setattr", "getattr", "hasattr", "delattr", "object", "attrgetter", "methodcaller"}


def is_private(name: str) -> bool:
    """True for `_name`, and for neither `__name__` nor the public methods of named tuples."""
    return name.startswith("_") and not name.endswith("__") and name not in NAMED_TUPLE


def is_own(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def private_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the text of each use of a private name of somebody else's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            names = [*module, *(alias.name for alias in node.names)]
            yield from ((node.lineno, f"import {name}") for name in names if is_private(name))
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            texts = [one.value for one in node.args if isinstance(one, ast.Constant)]
            names = [text.rpartition(".")[2] for text in texts if isinstance(text, str)]
            if called in BY_NAME and any(map(is_private, names)):
                yield node.lineno, ast.unparse(node)


def is_helper(node: ast.stmt) -> bool:
    """True for a function of a module that is no test and says in its docstring what it is for."""
    return (
        isinstance(node, ast.FunctionDef)
        and not node.name.startswith("test_")
        and ast.get_docstring(node) is not None
    )


def violations(source: str) -> list[str]:
    """The uses of private names outside helpers, as `line: text`."""
    return [
        f"{line}: {text}"
        for node in ast.parse(source).body
        if not is_helper(node)
        for line, text in private_uses(node)
    ]


@pytest.mark.parametrize(
    "path", sorted(TESTS.rglob("*.py")), ids=lambda p: str(p.relative_to(TESTS))
)
def test_only_named_helpers_look_inside(path: Path) -> None:
    """No test reads, replaces or imports what is private to another class or module."""
    assert violations(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "queue._idle",
        "self.queue._idle",
        "monkeypatch.setattr(module, '_LIMIT_S', 1)",
        "monkeypatch.setattr('package.module._LIMIT_S', 1)",
        "from module import _hidden",
        "getattr(thing, '_hidden')",
    ],
)
def test_every_way_in_is_seen(line: str) -> None:
    """In a test, in a class and in a function without a docstring; not in a helper with one."""
    for head in ("def test_it():", "def fixture():", "class A:\n def see(self):\n  'Why.'"):
        assert violations(f"{head}\n  {line}")
    assert violations(line)
    assert not violations(f"def see():\n  'Why.'\n  {line}")


@pytest.mark.parametrize("line", ["self._own", "cls._own", "one._replace(a=1)", "one.__dict__"])
def test_what_is_public_or_own_is_free(line: str) -> None:
    """A class of the tests uses its own parts as it likes."""
    assert violations(f"class A:\n def see(self):\n  {line}") == []
