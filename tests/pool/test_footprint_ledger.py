"""One file of measurements, shared by several engines in one process and in several."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Running, config_with, one_model_registry, run_all

from orion_oie import OrionInferenceEngine
from orion_oie.backends.fake import FakeBackend
from orion_oie.pool.footprint_ledger import FILE_NAME, FootprintLedger, Record

WRITER = """
import sys
from pathlib import Path
from orion_oie.pool.footprint_ledger import FootprintLedger
path, name = Path(sys.argv[1]), sys.argv[2]
ledger = FootprintLedger(path, lambda problem: sys.exit(problem))
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    ledger.note_load(f"{name}{number}", 1.0 + number)
    ledger.save(10.0)
"""


def test_ledgers_of_several_processes_lose_nothing(tmp_path: Path) -> None:
    """Each writes many times while the others do."""
    path = tmp_path / FILE_NAME
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "abc"
    ]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    for writer in writers:
        writer.communicate("go\n", timeout=30)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    ledger = FootprintLedger(path)
    found = [ledger.get(f"{name}{number}").load_s for name in "abc" for number in range(40)]
    assert found == [1.0 + number for number in range(40)] * 3


def test_ledgers_of_one_process_lose_nothing(tmp_path: Path) -> None:
    """Two engines, several threads each."""
    ledgers = [FootprintLedger(tmp_path / FILE_NAME) for _ in range(2)]

    def write(index: int) -> None:
        for number in range(10):
            ledgers[index % 2].note_peak(f"{index}-{number}", 100 + number)
            ledgers[index % 2].save(10.0)

    runs = run_all([lambda index=index: write(index) for index in range(4)])
    assert [run.error for run in runs] == [None] * 4
    for ledger in ledgers:
        ledger.save(10.0)
    kept = FootprintLedger(tmp_path / FILE_NAME)
    assert all(kept.get(f"{i}-{n}") == Record(100 + n) for i in range(4) for n in range(10))


def test_what_another_engine_measured_is_not_undone(tmp_path: Path) -> None:
    """Of one model, the larger peak counts, and the load that was timed since."""
    path = tmp_path / FILE_NAME
    first = FootprintLedger(path)
    first.note_peak("a", 100)
    first.note_load("a", 1.0)
    first.save()
    one, other = FootprintLedger(path), FootprintLedger(path)
    assert one.get("a") == other.get("a")
    other.note_peak("a", 300)
    other.note_load("a", 9.0)
    other.save()
    one.note_peak("a", 200)
    one.save()
    assert FootprintLedger(path).get("a") == Record(300, 9.0)
    assert one.get("a") == Record(300, 9.0)


def test_a_file_that_another_writes_is_left_to_it(tmp_path: Path) -> None:
    """A save does not wait for a process that is stopped; the next one writes."""
    holder = subprocess.Popen(
        [
            sys.executable, "-c",
            "import fcntl, os, sys; fd = os.open(sys.argv[1], 0); fcntl.flock(fd, 2);"
            "print(1, flush=True); sys.stdin.read()",
            str(tmp_path),
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    ledger = FootprintLedger(tmp_path / FILE_NAME)
    ledger.note_peak("a", 1)
    ledger.save()
    assert not (tmp_path / FILE_NAME).exists()
    holder.communicate()
    ledger.save()
    assert FootprintLedger(tmp_path / FILE_NAME).get("a") == Record(1)


DAMAGED = [
    "",
    "\x00" * 100,
    "[" * 100_000,
    "[1]",
    '{"a": 3}',
    '{"a": {"peak_bytes": 1}}',
    '{"a": {"peak_bytes": Infinity, "load_s": 1}}',
    '{"a": {"peak_bytes": 1, "load_s": NaN}}',
    '{"a": {"peak_bytes": -5, "load_s": 1}}',
    '{"a": {"peak_bytes": 1, "load_s": 1' + "0" * 400 + "}}",
    '{"a": {"peak_bytes": "1", "load_s": 1}}',
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_told_once(tmp_path: Path, text: str) -> None:
    """However often it is read; it is whole again after the next save."""
    path = tmp_path / FILE_NAME
    path.write_text(text)
    told: list[str] = []
    ledger = FootprintLedger(path, told.append)
    assert ledger.get("a") == ledger.get("b") == Record()
    ledger.note_peak("b", 3)
    ledger.save()
    ledger.get("a")
    assert len(told) == 1
    assert json.loads(path.read_text()) == {"b": {"peak_bytes": 3, "load_s": 0.0}}


def test_a_damaged_record_costs_no_other(tmp_path: Path) -> None:
    """What is whole is kept."""
    path = tmp_path / FILE_NAME
    path.write_text('{"a": {"peak_bytes": 5, "load_s": 2}, "b": null}')
    told: list[str] = []
    ledger = FootprintLedger(path, told.append)
    assert ledger.get("a") == Record(5, 2.0)
    assert "1 of 2" in told[0]


@pytest.mark.parametrize("path", ["a folder", "a file in the way"])
def test_who_hears_of_a_problem_may_ask_the_ledger(tmp_path: Path, path: str) -> None:
    """No lock is held, neither when it is read nor when it is written."""
    if path == "a folder":
        (tmp_path / FILE_NAME).mkdir()
        place = tmp_path / FILE_NAME
    else:
        (tmp_path / "file").write_text("")
        place = tmp_path / "file" / FILE_NAME
    heard: list[Record] = []

    def ask(_problem: str) -> None:
        ledger.note_load("a", 2.0)
        ledger.save()
        heard.append(ledger.get("a"))

    ledger = FootprintLedger(place, ask)
    Running(ledger.note_peak, "a", 7).join()
    Running(ledger.save).join()
    assert heard
    assert ledger.get("a").peak_bytes == 7


def test_a_subscriber_that_plans_stops_no_request(tmp_path: Path, tiny_model: Path) -> None:
    """Of an engine whose ledger is damaged: it is told inside of a request."""
    (tmp_path / FILE_NAME).write_text("{")
    config = config_with(cache_dir=tmp_path)
    told: list[str] = []
    registry = one_model_registry(tiny_model)
    with OrionInferenceEngine(registry, config, backend=FakeBackend()) as engine:

        def plan(event: object) -> None:
            if getattr(event, "name", "") == "memory.trouble":
                told.append(engine.plan("Hello?").route.agent_id)

        engine.subscribe(plan)
        assert Running(engine.infer, "Hello?").join().content
        assert Running(engine.infer, "Hello?").join().content
    assert told == ["conversation"]
