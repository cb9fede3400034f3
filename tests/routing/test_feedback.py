"""Feedback on routes: whole lines in a file, also with concurrent writers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_all

from orion_oie.errors import InvalidRequestError
from orion_oie.routing.feedback import FeedbackStore

AWKWARD = 'Two\nlines, "quotes", \\n, \u2028, \x85, a tab\t and 写一首诗 🌊'


def add(store: FeedbackStore, text: str) -> None:
    store.add(text, "code", routed="creative", confidence=0.5)


def texts(store: FeedbackStore) -> list[str]:
    return [example.text for example in store.examples()]


def test_any_text_comes_back(tmp_path: Path) -> None:
    """As it was asked, with the label; nothing stands in the way of a reader of JSON Lines."""
    store = FeedbackStore(tmp_path / "deep" / "feedback.jsonl")
    assert store.examples() == []
    for text in (AWKWARD, "x" * 100_000, AWKWARD):
        add(store, text)
    assert texts(store) == [AWKWARD, "x" * 100_000, AWKWARD]
    assert {example.label for example in store.examples()} == {"code"}
    assert len(store.path.read_bytes().splitlines()) == 3


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    """A line cut off by a killed process is reported by number, and the next line is whole."""
    store = FeedbackStore(tmp_path / "feedback.jsonl")
    add(store, "first")
    with store.path.open("ab") as file:
        file.write(b'{"text": "cut sh')
    add(store, "second")
    with pytest.raises(InvalidRequestError, match=r"line 2: "):
        store.examples()
    assert json.loads(store.path.read_text("utf-8").splitlines()[2])["text"] == "second"


def test_what_cannot_be_written_whole_is_not_written(tmp_path: Path) -> None:
    """A disk that is full in the middle of a line leaves the file as it was."""
    store = FeedbackStore(tmp_path / "feedback.jsonl")
    add(store, "first")
    before = store.path.read_bytes()
    program = (
        "import resource, sys; from orion_oie.routing.feedback import FeedbackStore\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))\n"
        "try: FeedbackStore(sys.argv[1]).add('x' * 100, 'a', routed='b', confidence=1.0)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    limit = str(len(before) + 50)
    done = subprocess.run(
        [sys.executable, "-c", program, str(store.path), limit], capture_output=True, text=True
    )
    assert done.stdout.startswith("InvalidRequestError the feedback cannot be kept: 50 of ")
    assert store.path.read_bytes() == before


def test_threads_and_processes_write_whole_lines(tmp_path: Path) -> None:
    """However many write at the same time, every line is one of theirs, and none is lost."""
    store = FeedbackStore(tmp_path / "feedback.jsonl")
    program = (
        "import sys; from orion_oie.routing.feedback import FeedbackStore\n"
        "for n in range(50): FeedbackStore(sys.argv[1]).add("
        "f'other {n} ' + 'y' * 5000, 'a', routed='b', confidence=1.0)"
    )
    others = subprocess.Popen([sys.executable, "-c", program, str(store.path)])
    runs = run_all(
        [
            lambda k=k: [add(store, f"thread {k} {n} " + "x" * 5000) for n in range(25)]
            for k in range(4)
        ]
    )
    for run in runs:
        run.join()
    assert others.wait(60) == 0
    found = [text.rstrip("xy") for text in texts(store)]
    wanted = [f"thread {k} {n} " for k in range(4) for n in range(25)]
    assert sorted(found) == sorted(wanted + [f"other {n} " for n in range(50)])


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    """It holds what people asked."""
    old = os.umask(0)
    try:
        store = FeedbackStore(tmp_path / "feedback.jsonl")
        add(store, "secret")
    finally:
        os.umask(old)
    assert store.path.stat().st_mode & 0o777 == 0o600


def test_a_home_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`~` is the user's folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FeedbackStore("~/feedback.jsonl").path == tmp_path / "feedback.jsonl"
