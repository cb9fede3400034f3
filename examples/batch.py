"""Many questions from a file: one JSON object a line in, one JSON object a line out.

    python batch.py questions.jsonl answers.jsonl
    python batch.py                                 three questions of its own

A line has a "question", and may have an "id" and any option of `infer`:

    {"id": "a", "question": "What is rain?", "agent": "conversation", "max_tokens": 50}

Answers are written as they come, each with the number of its line. An error is written down, and
the rest goes on. Run it again after an interruption, and it asks what has no answer yet.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from orion_oie import (
    EngineConfig,
    InvalidRequestError,
    OrionError,
    OrionInferenceEngine,
    RequestHandle,
    ServingConfig,
)

OWN_QUESTIONS = [
    {"id": "rain", "question": "What is rain?", "agent": "conversation"},
    {"id": "code", "question": "Write a Python function that adds two numbers."},
    {"id": "oops", "question": "Hello?", "agent": "nobody"},
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Answer a file of questions.")
    parser.add_argument("questions", nargs="?", type=Path, help="JSONL; default: three examples")
    parser.add_argument("answers", nargs="?", type=Path, help="JSONL; default: answers.jsonl")
    parser.add_argument("--registry", type=Path, help="models.json; default: the packaged one")
    parser.add_argument(
        "-m", "--model", default="smollm2-135m-instruct", help="who answers: an id or a GGUF file"
    )
    parser.add_argument("--max-tokens", type=int, default=200, help="longest answer, unless asked")
    parser.add_argument("--at-once", type=int, default=32, help="questions under way at a time")
    given = parser.parse_args(arguments)
    if given.at_once < 1:
        parser.error("--at-once: at least 1")
    with tempfile.TemporaryDirectory() as folder:
        if given.questions is None:
            given.questions = Path(folder) / "questions.jsonl"
            given.questions.write_text("\n".join(json.dumps(one) for one in OWN_QUESTIONS))
            given.answers, given.max_tokens = Path(folder) / "answers.jsonl", 24
        elif given.answers is None:
            given.answers = Path("answers.jsonl")
        try:
            failed = answer_all(given)
        except KeyboardInterrupt:
            print("\ninterrupted; run it again to go on", file=sys.stderr)
            return 130
        except (OSError, OrionError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if given.questions.parent == Path(folder):
            print(given.answers.read_text(encoding="utf-8"), end="")
            return 0
    return 1 if failed else 0


def answer_all(given: argparse.Namespace) -> int:
    """Ask what has no answer yet; returns the number of questions that failed."""
    done = numbers_done(given.answers)
    serving = ServingConfig(max_queue=max(256, given.at_once))
    with (
        given.questions.open(encoding="utf-8") as questions,
        given.answers.open("a", encoding="utf-8") as answers,
        OrionInferenceEngine(
            given.registry, EngineConfig(serving=serving), model=given.model
        ) as engine,
    ):
        todo = [
            (number, line)
            for number, line in enumerate(questions, 1)
            if line.strip() and number not in done
        ]
        progress = Progress(len(todo), len(done))
        for record in records(engine, todo, given):
            answers.write(json.dumps(record, ensure_ascii=False) + "\n")
            answers.flush()
            progress.count("error" in record)
        return progress.end()


def numbers_done(path: Path) -> set[int]:
    """The lines with an answer, or with an error that would come again. An interruption may have
    cut the last line: it is taken out."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    try:
        old = [json.loads(line) for line in whole.splitlines()]
        done = {record["line"] for record in old if not record.get("retryable")}
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise InvalidRequestError(f"{path} has other content than answers: {error!r}") from error
    if whole != content:
        path.write_bytes(whole)
    return done


def records(
    engine: OrionInferenceEngine, todo: list[tuple[int, str]], given: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The records of all questions, as they are answered; `at_once` are under way at a time."""
    ended: SimpleQueue[RequestHandle] = SimpleQueue()
    under_way: dict[str, dict[str, Any]] = {}
    for number, line in todo:
        record: dict[str, Any] = {"line": number}
        if len(under_way) >= given.at_once:
            yield of_ended(ended.get(), under_way)
        try:
            question, options = parsed(line, record)
            handle = engine.submit(question, **{"max_tokens": given.max_tokens, **options})
        except (InvalidRequestError, TypeError) as error:  # TypeError: an option called "query"
            yield record | shown(error)
            continue
        under_way[handle.id] = record
        handle.add_done_callback(ended.put)
    while under_way:
        yield of_ended(ended.get(), under_way)


def parsed(line: str, record: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The question and the options of a line; its id goes into the record."""
    try:
        options = json.loads(line)
    except ValueError as error:
        raise InvalidRequestError(f"the line is not JSON: {error}") from error
    if not isinstance(options, dict) or "question" not in options:
        raise InvalidRequestError('the line is no object with a "question"')
    if "id" in options:
        record["id"] = options.pop("id")
    return options.pop("question"), options


def of_ended(handle: RequestHandle, under_way: dict[str, dict[str, Any]]) -> dict[str, Any]:
    record = under_way.pop(handle.id)
    try:
        result = handle.result()
    except OrionError as error:
        return record | shown(error)
    return record | {
        "answer": result.content,
        "agent": result.agent_id,
        "model": result.model_id,
        "finish_reason": result.finish_reason,
        "tokens": result.usage.completion_tokens,
    }


def shown(error: Exception) -> dict[str, Any]:
    is_retryable = isinstance(error, OrionError) and error.retryable
    return {"error": f"{type(error).__name__}: {error}", "retryable": is_retryable}


class Progress:
    """Tells on stderr how far it is: in one line of a terminal, or at the end."""

    def __init__(self, total: int, skipped: int, out: TextIO | None = None) -> None:
        self._total = total
        self._skipped = skipped
        self._out = out or sys.stderr
        self._ended = self._failed = 0
        self._started_at = time.monotonic()

    def count(self, is_failed: bool) -> None:
        self._ended += 1
        self._failed += is_failed
        if self._out.isatty():
            print(f"\r{self._line()}", end="", file=self._out, flush=True)

    def end(self) -> int:
        print(f"\r{self._line()}" if self._out.isatty() else self._line(), file=self._out)
        return self._failed

    def _line(self) -> str:
        per_s = self._ended / max(time.monotonic() - self._started_at, 1e-9)
        return (
            f"{self._ended} of {self._total} questions, {self._failed} failed, {per_s:.1f}/s"
            f"; {self._skipped} were answered before"
        )


if __name__ == "__main__":
    sys.exit(main())
