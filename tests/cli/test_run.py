"""`orion-oie run`: questions in, answers out."""

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shops import Shop
from terminals import COMMAND, Terminal
from tiny import write_tiny_llama

from orion_oie import (
    InferenceResult,
    ModelRegistry,
    OrionInferenceEngine,
    RequestOptions,
)
from orion_oie.cli.main import main
from orion_oie.cli.run import run

Capture = pytest.CaptureFixture[str]
Asked = list[tuple[str, dict[str, Any]]]
TIMINGS = re.compile(
    r"(?P<agent>\S+), (?P<model>\S+@\S+), load \d+ ms, first token \d+ ms, [\d.]+ tokens/s, "
    r"total \d+ ms, tokens \d+ in \(\d+ cached\), (?P<out>\d+) out"
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What engines of this test were asked, with the options."""
    found: Asked = []
    real = OrionInferenceEngine.stream

    def stream(engine: OrionInferenceEngine, query: str, **options: Any) -> Any:
        found.append((query, options))
        return real(engine, query, **options)

    monkeypatch.setattr(OrionInferenceEngine, "stream", stream)
    return found


Stdin = Callable[[int], None]


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stdin]:
    """Makes a file descriptor the standard input."""
    with contextlib.ExitStack() as files:

        def set_stdin(fd: int) -> None:
            file = files.enter_context(open(fd, encoding="utf-8"))
            monkeypatch.setattr(sys, "stdin", file)

        yield set_stdin


def piped(content: bytes) -> int:
    """The end of a pipe that has some bytes, and no writer any more."""
    ours, theirs = os.pipe()
    os.write(theirs, content)
    os.close(theirs)
    return ours


def account(err: str) -> dict[str, str]:
    """The last line of a run."""
    found = TIMINGS.fullmatch(err.splitlines()[-1])
    assert found is not None, err
    return found.groupdict()


def test_run_answers(smollm2: Path, capsys: Capture) -> None:
    """The answer goes to the standard output; the standard error ends with its account, before
    which it says that the small model stood in."""
    question = ["What is the capital of France?", "--agent", "conversation"]
    assert main(["run", *question, "--temperature", "0", "--max-tokens", "24"]) == 0
    shown = capsys.readouterr()
    assert "Paris" in shown.out
    assert shown.out.endswith("\n")
    told = account(shown.err)
    assert (told["agent"], told["model"]) == ("conversation", "smollm2-135m-instruct@q4_1")
    assert 0 < int(told["out"]) <= 24
    primary = ModelRegistry.packaged().agent("conversation").models.primary
    assert f"note: {primary} is not on this machine, smollm2-135m-instruct stood in" in shown.err


def test_run_reads_the_question_from_the_standard_input(
    shop: Shop, asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """`run -` takes a text of any length, as it is."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("A question\nof two lines.\n"))
    assert main(["run", "-", "--max-tokens", "5", *shop.options]) == 0
    assert asked == [("A question\nof two lines.\n", {"max_tokens": 5})]
    assert account(capsys.readouterr().err)["out"] == "5"


def test_run_fetches_when_it_may(shop: Shop, capsys: Capture) -> None:
    """Without `--auto-download` a model that is not here answers nothing, with it it does."""
    question = ["run", "Hello?", "--agent", "writer", "--max-tokens", "4", *shop.options]
    assert main(question) == 0
    shown = capsys.readouterr()
    assert account(shown.err)["model"] == "local@f16"
    assert "note: tiny is not on this machine, local stood in" in shown.err
    assert main([*question, "--auto-download"]) == 0
    shown = capsys.readouterr()
    assert account(shown.err)["model"] == "tiny@f32"
    assert "tiny@f32: " in shown.err
    assert "stood in" not in shown.err


@pytest.mark.parametrize("how", [[], ["--sequential"]], ids=["progressive", "sequential"])
def test_run_waits_for_the_full_model(how: list[str], shop: Shop, capsys: Capture) -> None:
    """Nobody asks a second question: the full model answers, and no lite one meanwhile."""
    question = ["run", "Hello?", "--agent", "writer", "--max-tokens", "4", "--auto-download"]
    assert main([*question, *how, *shop.options]) == 0
    shown = capsys.readouterr()
    assert account(shown.err)["model"] == "tiny@f32"
    assert "stood in" not in shown.err


def test_run_refuses_what_the_library_refuses(shop: Shop, capsys: Capture) -> None:
    """An unknown agent gets the closest name, a wrong option its limits; nothing is answered."""
    assert main(["run", "Hello?", "--agent", "reeder", *shop.options]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "error: --agent: there is no agent 'reeder' (did you mean 'reader'?)" in shown.err
    assert main(["run", "Hello?", "--temperature", "90", *shop.options]) == 1
    assert capsys.readouterr().err.startswith("error: --temperature: ")
    assert main(["run", " ", *shop.options]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_run_ends_with_its_reader(shop: Shop) -> None:
    """A reader who goes away in the middle of an answer ends the run quietly."""
    command = [*COMMAND, "run", "Hello?", "--max-tokens", "400", *shop.options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) != ""
        process.stdout.close()
        err = process.stderr.read()
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_ctrl_c_ends_a_run(shop: Shop) -> None:
    """Ctrl-C in the middle of an answer ends it with status 130 and no traceback."""
    command = [*COMMAND, "run", "Hello?", "--max-tokens", "400", *shop.options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) != ""
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err


# -- the question


def test_several_words_are_one_question(shop: Shop, asked: Asked) -> None:
    """No quotes are needed; a dash among them is a word."""
    assert main(["run", *["what", "is", "3", "-", "2"], "--max-tokens", "1", *shop.options]) == 0
    assert [question for question, _ in asked] == ["what is 3 - 2"]


@pytest.mark.parametrize(
    ("words", "content", "question"),
    [
        (["Summarise", "this"], "One.\n\nTwo.\n", "Summarise this\n\nOne.\n\nTwo."),
        ([], "What is it?\n", "What is it?"),
        (["Hello?"], "", "Hello?"),
        (["Hello?"], " \n\n", "Hello?"),
        (["Sens"], "déjà 日本\n", "Sens\n\ndéjà 日本"),
    ],
    ids=["joined", "alone", "empty", "blank", "of any script"],
)
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_piped_text_follows_the_question(
    words: list[str],
    content: str,
    question: str,
    kind: str,
    shop: Shop,
    asked: Asked,
    stdin: Stdin,
    tmp_path: Path,
) -> None:
    """After a blank line; without a text, or without a question, there is only the other."""
    if kind == "pipe":
        stdin(piped(content.encode()))
    else:
        (tmp_path / "text").write_text(content, encoding="utf-8")
        stdin(os.open(tmp_path / "text", os.O_RDONLY))
    assert main(["run", *words, "--max-tokens", "1", *shop.options]) == 0
    assert [found for found, _ in asked] == [question]


@pytest.mark.parametrize("kind", ["/dev/null", "terminal", "closed"])
def test_no_pipe_changes_nothing(
    kind: str, shop: Shop, asked: Asked, stdin: Stdin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal is never read, and neither is what cron and CI have in its place."""
    ours = None
    if kind == "terminal":
        ours, theirs = pty.openpty()
        stdin(theirs)
    elif kind == "closed":
        monkeypatch.setattr(sys, "stdin", None)
    else:
        stdin(os.open(kind, os.O_RDONLY))
    assert main(["run", "Hello?", "--max-tokens", "1", *shop.options]) == 0
    assert [question for question, _ in asked] == ["Hello?"]
    if ours is not None:
        os.close(ours)


def test_a_pipe_that_stays_silent_is_given_up(
    shop: Shop, asked: Asked, stdin: Stdin, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The question is answered without it, and that is said, even with --quiet: somebody may have
    wanted a text to be read. --no-stdin does not wait at all."""
    monkeypatch.setattr("orion_oie.cli.question.PATIENCE_S", 0.01)
    ours, theirs = os.pipe()
    stdin(ours)
    assert main(["run", "Hello?", "--max-tokens", "1", "--quiet", *shop.options]) == 0
    assert "nothing came through the pipe in 0.01 s" in capsys.readouterr().err
    assert main(["run", "Hello?", "--no-stdin", "--max-tokens", "1", "-q", *shop.options]) == 0
    assert capsys.readouterr().err == ""
    os.close(theirs)
    assert [question for question, _ in asked] == ["Hello?"] * 2


@pytest.mark.parametrize("options", [[], ["--stdin"]], ids=str)
def test_a_pipe_that_begins_late_is_waited_for(
    options: list[str],
    shop: Shop,
    asked: Asked,
    stdin: Stdin,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within the patience, and beyond it with --stdin."""
    monkeypatch.setattr("orion_oie.cli.question.PATIENCE_S", 0.01 if options else 30)
    ours, theirs = os.pipe()
    stdin(ours)

    def write() -> None:
        time.sleep(0.1)  # it does not matter how long this takes
        with open(theirs, "w", encoding="utf-8") as file:
            file.write("Late.")

    writer = threading.Thread(target=write)
    writer.start()
    assert main(["run", "What?", "--max-tokens", "1", *options, *shop.options]) == 0
    writer.join()
    assert [question for question, _ in asked] == ["What?\n\nLate."]


@pytest.mark.parametrize("content", [b"", b" \n"])
def test_nothing_to_ask_is_wrong_usage(content: bytes, stdin: Stdin, capsys: Capture) -> None:
    """It says how to ask."""
    stdin(piped(content))
    assert main(["run"]) == 2
    assert 'there is no question; ask one: orion-oie run "Why' in capsys.readouterr().err


@pytest.mark.parametrize("words", [["-"], ["Hello?"]], ids=str)
def test_bytes_that_are_no_text_are_refused(
    words: list[str], stdin: Stdin, capsys: Capture
) -> None:
    """Before a model is loaded."""
    stdin(piped(b"\xff\xfe"))
    assert main(["run", *words]) == 2
    assert "is no text in UTF-8" in capsys.readouterr().err


def test_a_pipeline_of_a_shell(shop: Shop, tmp_path: Path) -> None:
    """Two processes, as somebody would type them."""
    (tmp_path / "text").write_text("Some text.\n", encoding="utf-8")
    options = ["--max-tokens", "2", "--json", *shop.options]
    with open(tmp_path / "text", "rb") as text:
        done = subprocess.run(
            [*COMMAND, "run", "Summarise this", *options],
            stdin=text,
            capture_output=True,
            text=True,
            check=True,
        )
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 2


# -- options

NOT_OPTIONS = {
    "conversation_history": "a run has none; chat does",
    "session_id": "nothing follows in the same process",
    "logit_bias": "tokens are the business of programs",
    "priority": "nothing else is asked",
    "local_only": "everything is local",
    "on_overflow": "there is no history to drop",
    "on_stream_failure": "what was printed stays",
}


def test_run_has_an_option_for_each_option_of_a_request() -> None:
    """Those of the library, or a reason."""
    names = {parameter.name for parameter in run.params}
    assert set(RequestOptions.model_fields) - names == set(NOT_OPTIONS)


def test_the_options_reach_the_engine(
    shop: Shop, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the names and types of the library; what is not given is left to it."""
    (tmp_path / "g.gbnf").write_text('root ::= "a"', encoding="utf-8")
    arguments = {
        "--agent": ("agent", "conversation"),
        "--system": ("system_prompt", "Be brief."),
        "--max-tokens": ("max_tokens", 5),
        "--temperature": ("temperature", 0.5),
        "--top-p": ("top_p", 0.9),
        "--top-k": ("top_k", 7),
        "--min-p": ("min_p", 0.1),
        "--repeat-penalty": ("repeat_penalty", 1.1),
        "--seed": ("seed", 7),
        "--deadline": ("deadline", 50.0),
        "--logprobs": ("logprobs", 2),
    }
    words = [word for option, (_, value) in arguments.items() for word in (option, str(value))]
    assert main(["run", "Hello?", *words, *shop.options]) == 0
    assert main(["run", "Hello?", "--stop", "a", "--stop", "b", *shop.options]) == 0
    assert main(["run", "Hello?", "--grammar", str(tmp_path / "g.gbnf"), *shop.options]) == 0
    assert [options for _, options in asked] == [
        dict(arguments.values()),
        {"stop": ["a", "b"]},
        {"grammar": 'root ::= "a"'},
    ]


SCHEMA = {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"]}


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "text"])
def test_an_answer_of_a_schema(is_file: bool, shop: Shop, tmp_path: Path, capsys: Capture) -> None:
    """The schema is a file or JSON itself."""
    schema = json.dumps(SCHEMA)
    if is_file:
        (tmp_path / "s.json").write_text(schema, encoding="utf-8")
        schema = str(tmp_path / "s.json")
    assert main(["run", "Hello?", "-q", "--json-schema", schema, *shop.options]) == 0
    assert json.loads(capsys.readouterr().out) == {"n": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json-schema", "{x"], "'--json-schema': it is not JSON: "),
        (["--json-schema", "/nowhere"], "'--json-schema': /nowhere cannot be read: No such file"),
        (["--grammar", "/nowhere"], "'--grammar': /nowhere cannot be read: No such file"),
    ],
)
def test_files_that_cannot_be_used(options: list[str], message: str, capsys: Capture) -> None:
    """Wrong usage, before an engine is made."""
    assert main(["run", "Hello?", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json-schema", '{"type": 1}'], "error: --json-schema"),
        (["--image", "/nowhere"], "error: --image: there is no file '/nowhere'"),
        (["--top-p", "2"], "error: --top-p: "),
        (["--seed", "-1"], "error: --seed: "),
        (["--context-length", "1"], "error: --context-length: "),
        (["--context-length", "64", "--max-tokens", "60"], "or raise --context-length"),
    ],
    ids=str,
)
def test_what_the_library_refuses_names_the_option(
    options: list[str], message: str, shop: Shop, capsys: Capture
) -> None:
    """Not the argument or the setting of Python."""
    assert main(["run", "Hello? " * 300, *options, *shop.options]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "EngineConfig" not in err


def test_a_model_that_is_not_here_names_the_option(shop: Shop, capsys: Capture) -> None:
    """--auto-download, and -m."""
    registry = json.loads(shop.registry.read_text(encoding="utf-8"))
    registry["agents"] = {"reader": registry["agents"]["reader"] | {"fallback_agent": None}}
    shop.registry.write_text(json.dumps(registry), encoding="utf-8")
    assert main(["run", "Hello?", *shop.options]) == 1
    err = capsys.readouterr().err
    assert "add --auto-download" in err
    assert "EngineConfig" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", ["-m", "--model"])
def test_a_model_of_ones_own_answers(option: str, tmp_path: Path, capsys: Capture) -> None:
    """`-m FILE.gguf`, whatever the registry has."""
    path = write_tiny_llama(tmp_path / "own.gguf", name="own", token_bias={"<|im_end|>": -40})
    assert main(["run", "Hello?", option, str(path), "--max-tokens", "3", "--json"]) == 0
    result = InferenceResult.model_validate_json(capsys.readouterr().out)
    assert result.receipt.model is not None
    assert result.receipt.model.name == "own"


def test_no_stand_in_is_wanted(shop: Shop, capsys: Capture) -> None:
    """--no-stand-in fails where another model would answer, and names itself."""
    options = ["--agent", "writer", "--max-tokens", "1", *shop.options]
    assert main(["run", "Hello?", "--no-stand-in", *options]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "tiny cannot answer for agent 'writer'" in shown.err
    assert "local could, but --no-stand-in was given" in shown.err
    assert "Warning" not in shown.err


# -- what is printed


def test_json_is_the_whole_result(shop: Shop, capsys: Capture) -> None:
    """And nothing else is on the standard output, nor notes on the other."""
    assert main(["run", "Hello?", "--json", "--max-tokens", "3", *shop.options]) == 0
    shown = capsys.readouterr()
    result = InferenceResult.model_validate_json(shown.out)
    assert result.usage.completion_tokens == 3
    assert result.receipt.considered
    assert "stood in" not in shown.err
    assert not TIMINGS.search(shown.err)


def test_quiet_prints_the_answer_alone(shop: Shop, capsys: Capture) -> None:
    """No notes, no account, no progress."""
    options = ["--agent", "writer", "--max-tokens", "3", *shop.options]
    assert main(["run", "Hello?", "--quiet", *options]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.strip()
    assert main(["run", "Hello?", "-q", "--json", "--auto-download", *options]) == 0
    assert capsys.readouterr().err == ""


def test_remarks_fit_the_terminal(shop: Shop) -> None:
    """They are wrapped; the answer is left to the terminal."""
    arguments = ["run", "Hello?", "--agent", "writer", "--max-tokens", "1", *shop.options]
    with Terminal(arguments, columns=60) as terminal:
        status, shown = terminal.end()
    assert status == 0
    assert "note: tiny is not on this machine" in shown
    assert "'orion-oie pull writer'" in shown  # unbroken, to be copied
    assert max(map(len, shown.splitlines())) <= 60


# -- models of one's own, for the other commands


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A model file that no registry names."""
    return str(write_tiny_llama(tmp_path / "own.gguf", name="own", token_bias={"<|im_end|>": -40}))


def test_pull_prints_the_file_of_a_model_of_ones_own(own: str, capsys: Capture) -> None:
    """By -m or as a name; nothing is fetched."""
    for arguments in (["-m", own], [own], ["conversation", "-m", own]):
        assert main(["pull", *arguments]) == 0
        assert capsys.readouterr().out.splitlines() == [own]
    assert main(["pull", "/nowhere/x.gguf"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_chat_and_route_take_a_model_of_ones_own(
    own: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """It answers the chat; the route of a question is shown as before."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello?\n"))
    assert main(["chat", "-m", own, "--max-tokens", "2", "--verbose"]) == 0
    assert "own@" in capsys.readouterr().err
    assert main(["route", "Fix my code", "-m", own, "--no-embeddings"]) == 0
    assert capsys.readouterr().out.startswith("code  ")


@pytest.mark.parametrize(
    "arguments",
    [["run", "Hello?"], ["chat"], ["route", "Hello?"], ["pull", "conversation"]],
    ids=lambda arguments: arguments[0],
)
def test_a_model_that_is_not_there_is_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Status 1, and nothing else is shown."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main([*arguments, "-m", "/nowhere/x.gguf"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"error: /nowhere/x.gguf.*\n", shown.err)
