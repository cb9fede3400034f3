"""examples/batch.py as a program: lines in, lines out, errors written down, continued after a stop.

The backend is a fake one.
"""

import importlib.util
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from engines import TEXT
from helpers import BOUND_S, Held

from orion_oie import WorkerTimeoutError
from orion_oie.backends.base import GenerationJob
from orion_oie.backends.fake import FakeAnswer

Lines = list[dict[str, Any]]


@pytest.fixture
def batch() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "batch.py"
    spec = importlib.util.spec_from_file_location("batch_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Run:
    """Runs the program on a file in a folder of its own."""

    def __init__(
        self, batch: ModuleType, make_engine: Any, folder: Path, patch: pytest.MonkeyPatch
    ) -> None:
        self.batch = batch
        self.questions = folder / "questions.jsonl"
        self.answers = folder / "answers.jsonl"
        self.jobs: list[GenerationJob] = []
        self.script: Callable[[GenerationJob], FakeAnswer] = lambda _job: FakeAnswer(TEXT)
        self.seen_slots: list[int] = []
        patch.setattr(
            batch,
            "OrionInferenceEngine",
            lambda *_, model: make_engine({"*": self._answer}, slots=4),
        )

    def _answer(self, job: GenerationJob) -> FakeAnswer:
        self.jobs.append(job)
        return self.script(job)

    def __call__(self, *options: str) -> int:
        status: int = self.batch.main([str(self.questions), str(self.answers), *options])
        return status

    def ask(self, *lines: Any) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.questions.write_text("\n".join(texts) + "\n", encoding="utf-8")

    def records(self) -> Lines:
        text = self.answers.read_text(encoding="utf-8")
        return sorted(map(json.loads, text.splitlines()), key=lambda record: record["line"])

    def asked(self) -> list[str]:
        return sorted(job.messages[-1].content for job in self.jobs)


@pytest.fixture
def run(
    batch: ModuleType, make_engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    return Run(batch, make_engine, tmp_path, monkeypatch)


def test_every_line_has_its_answer(run: Run, capsys: Any) -> None:
    """With the number of its line, its id if it has one, and who answered; options are used."""
    run.ask(
        {"id": "a", "question": "One?"},
        "",
        {"question": "Zwei äöü?", "max_tokens": 2, "agent": "conversation"},
    )
    assert run("--max-tokens", "50") == 0
    one, two = run.records()
    assert one == {
        "line": 1,
        "id": "a",
        "answer": TEXT,
        "agent": "conversation",
        "model": "main",
        "finish_reason": "stop",
        "tokens": 3,
    }
    assert (two["line"], two["finish_reason"], two["tokens"]) == (3, "length", 2)
    assert sorted(job.options.max_tokens for job in run.jobs) == [2, 50]
    assert capsys.readouterr().err.startswith("2 of 2 questions, 0 failed, ")


def test_errors_are_written_down_and_the_rest_goes_on(run: Run, capsys: Any) -> None:
    """What is no question, what the engine refuses, and what fails; the status says so."""
    run.script = lambda job: FakeAnswer(
        TEXT, error=WorkerTimeoutError("stuck") if "bad" in job.messages[-1].content else None
    )
    run.ask(
        "{broken",
        "[1]",
        {"text": "no question"},
        {"question": None},
        {"question": "x", "temprature": 1},
        {"question": "x", "query": "y"},
        {"question": "x", "agent": "nobody"},
        {"question": "bad"},
        {"question": "good"},
    )
    assert run("--at-once", "2") == 1
    records = run.records()
    assert [record["line"] for record in records] == list(range(1, 10))
    errors = [record.get("error", "").split(":")[0] for record in records]
    invalid = "InvalidRequestError"
    assert errors == [
        *[invalid] * 5,
        "TypeError",
        "UnknownAgentError",
        "WorkerTimeoutError",
        "",
    ]
    assert [record.get("retryable") for record in records[6:]] == [False, True, None]
    assert capsys.readouterr().err.startswith("9 of 9 questions, 8 failed")


def test_it_goes_on_after_an_interruption(run: Run, capsys: Any) -> None:
    """What has an answer, or an error that would come again, is not asked again; a line that was
    cut off is."""
    run.ask(*({"question": f"Number {n}?"} for n in range(1, 6)))
    old = [
        {"line": 1, "answer": "old"},
        {"line": 2, "error": "UnknownAgentError: x", "retryable": False},
        {"line": 3, "error": "QueueFullError: x", "retryable": True},
    ]
    text = "\n".join(map(json.dumps, old)) + '\n{"line": 4, "answ'
    run.answers.write_text(text, encoding="utf-8")
    assert run() == 0
    assert run.asked() == ["Number 3?", "Number 4?", "Number 5?"]
    assert [record["line"] for record in run.records()] == [1, 2, 3, 3, 4, 5]
    assert "2 were answered before" in capsys.readouterr().err
    before = run.answers.read_bytes()
    assert run() == 0
    assert run.answers.read_bytes() == before
    assert len(run.jobs) == 3


def test_ctrl_c_keeps_what_was_answered(run: Run, monkeypatch: Any, capsys: Any) -> None:
    """The status is that of an interrupted program, and the next run goes on."""
    run.ask(*({"question": f"Number {n}?"} for n in range(1, 6)))
    ended = 0
    of_ended = run.batch.of_ended

    def interrupted(*arguments: Any) -> Any:
        nonlocal ended
        ended += 1
        if ended == 3:
            raise KeyboardInterrupt
        return of_ended(*arguments)

    monkeypatch.setattr(run.batch, "of_ended", interrupted)
    assert run() == 130
    assert "run it again" in capsys.readouterr().err
    assert len(run.records()) == 2
    assert run() == 0
    assert [record["line"] for record in run.records()] == [1, 2, 3, 4, 5]


def test_so_many_are_under_way_at_a_time(run: Run) -> None:
    """No more than asked for are submitted."""
    held = Held(FakeAnswer(TEXT))
    run.script = held
    run.ask(*({"question": f"Number {n}?"} for n in range(6)))
    program = threading.Thread(target=run, args=("--at-once", "2"))
    program.start()
    held.wait_for(2)
    assert len(held.jobs) == 2
    held.let_go.set()
    program.join(BOUND_S)
    assert len(run.records()) == 6


@pytest.mark.parametrize("content", ["no JSON\n", "[1]\n", '"text"\n', '{"answer": "x"}\n'])
def test_a_file_of_something_else_is_left_alone(run: Run, content: str, capsys: Any) -> None:
    """Nothing is asked, nothing is changed."""
    run.ask({"question": "One?"})
    run.answers.write_text(content)
    assert run() == 2
    assert "has other content than answers" in capsys.readouterr().err
    assert run.answers.read_text() == content
    assert run.jobs == []


def test_a_missing_file_and_a_wrong_number_are_named(run: Run, capsys: Any) -> None:
    """As by any command."""
    assert run() == 2
    assert "questions.jsonl" in capsys.readouterr().err
    run.ask({"question": "One?"})
    with pytest.raises(SystemExit):
        run("--at-once", "0")
    assert "--at-once: at least 1" in capsys.readouterr().err


def test_a_terminal_sees_the_progress_in_one_line(batch: ModuleType) -> None:
    """Other outputs get the last one only."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out, lines in ((Terminal(), 3), (io.StringIO(), 1)):
        progress = batch.Progress(2, 1, out)
        progress.count(False)
        progress.count(True)
        assert progress.end() == 1
        parts = out.getvalue().strip().split("\r")
        assert len(parts) == lines
        assert parts[-1].startswith("2 of 2 questions, 1 failed, ")
        assert parts[-1].endswith("; 1 were answered before")
