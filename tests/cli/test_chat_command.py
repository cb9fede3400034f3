"""`orion-oie chat`: questions and commands, from a terminal and through a pipe."""

import io
import json
import signal
import sys
from pathlib import Path

import pytest
from shops import Shop
from terminals import COMMAND, Terminal
from tiny import write_tiny_llama

from orion_oie.cli.main import main

Capture = pytest.CaptureFixture[str]
SHORT = ["--max-tokens", "3"]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, shop: Shop):  # type: ignore[no-untyped-def]
    """Runs a chat with lines from a pipe; returns the status."""

    def chat(text: str, *options: str) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return main(["chat", *SHORT, *options, *shop.options])

    return chat


def saved(path: Path) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in json.loads(path.read_text("utf-8"))["messages"]]


def test_a_conversation_through_a_pipe(typed, tmp_path: Path, capsys: Capture) -> None:  # type: ignore[no-untyped-def]
    """A question a line; the answers, and nothing else, on the standard output. The history holds
    both."""
    path = tmp_path / "chat.json"
    assert typed(f"One?\n\nTwo?\n/save {path}\n") == 0
    shown = capsys.readouterr()
    turns = saved(path)
    assert [text for role, text in turns if role == "user"] == ["One?", "Two?"]
    answers = [text for role, text in turns if role == "assistant"]
    assert shown.out == "".join(f"{text}\n" for text in answers)
    assert "chat.json: 2 questions and answers" in shown.err
    assert "> " not in shown.err


def test_the_model_sees_the_conversation(smollm2: Path, monkeypatch, capsys: Capture) -> None:  # type: ignore[no-untyped-def]
    """The tokens of the first turn are in the prompt of the second, and are not computed again."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("My name is Ann.\nAnd yours?\n"))
    options = ["--agent", "conversation", "--max-tokens", "8", "--temperature", "0", "--verbose"]
    assert main(["chat", *options]) == 0
    accounts = [line for line in capsys.readouterr().err.splitlines() if " cached)" in line]
    assert len(accounts) == 2
    cached = [int(line.partition(" in (")[2].partition(" ")[0]) for line in accounts]
    assert cached[1] > cached[0]


def test_clear_forgets(typed, tmp_path: Path, capsys: Capture) -> None:  # type: ignore[no-untyped-def]
    """What came before is not in the file."""
    assert typed(f"One?\n/clear\nTwo?\n/save {tmp_path / 'c.json'}\n") == 0
    assert [text for role, text in saved(tmp_path / "c.json") if role == "user"] == ["Two?"]
    assert "the conversation is forgotten" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye", " /exit now"])
def test_exit_ends(word: str, typed, capsys: Capture) -> None:  # type: ignore[no-untyped-def]
    """Nothing after it is asked. It has the names that other programs give it."""
    assert typed(f"{word}\nOne?\n") == 0
    assert capsys.readouterr().out == ""


def test_what_the_model_is_not_shown_is_said(shop: Shop, monkeypatch, capsys: Capture) -> None:  # type: ignore[no-untyped-def]
    """When the conversation is longer than the context, its oldest turns are left out."""
    long = "word " * 52
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{long}\n{long}\n"))
    assert main(["chat", "--context-length", "256", "--max-tokens", "20", *shop.options]) == 0
    assert "was not shown the oldest 2 messages" in capsys.readouterr().err


def test_a_reader_who_goes_away_ends_a_chat(shop: Shop, tmp_path: Path) -> None:
    """Also at a terminal: nothing is asked in vain."""
    (tmp_path / "sh").write_text(
        f'"{COMMAND[0]}" -m orion_oie chat --max-tokens 400 --registry "{shop.registry}"'
        " | head -c 1",
        encoding="utf-8",
    )
    with Terminal([str(tmp_path / "sh")], command=["sh"]) as terminal:
        terminal.wait_for("Ctrl-D ends the chat.")
        terminal.type("Go on?\n")
        status, shown = terminal.end()
    assert status == 0
    assert "Traceback" not in shown


def test_help_and_unknown_commands(typed, capsys: Capture) -> None:  # type: ignore[no-untyped-def]
    """A misspelled command is no question."""
    assert typed("/help\n/claer\n/save\n") == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    for text in ("/clear      forget", "/save FILE", "/exit", "(did you mean '/clear'?)", "needs"):
        assert text in shown.err


def test_a_path_is_a_question(typed, capsys: Capture) -> None:  # type: ignore[no-untyped-def]
    """Only a word with one slash is a command."""
    assert typed("/etc/passwd\n") == 0
    assert capsys.readouterr().out.strip()


def test_several_lines_are_one_question(typed, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Between three quotes, and to the end of the input if they are not closed."""
    path = tmp_path / "c.json"
    assert typed(f'"""One\ntwo"""\n/save {path}\n"""three\nfour\n') == 0
    assert saved(path)[0] == ("user", "One\ntwo")


def test_a_file_is_not_replaced_by_accident(typed, tmp_path: Path, capsys: Capture) -> None:  # type: ignore[no-untyped-def]
    """One that this chat wrote is; another keeps its content."""
    path = tmp_path / "c.json"
    path.write_text("precious", encoding="utf-8")
    assert typed(f"/save {path}\n") == 0
    assert path.read_text("utf-8") == "precious"
    assert "is there already" in capsys.readouterr().err
    path.unlink()
    assert typed(f"/save {path}\nOne?\n/save {path}\n") == 0
    assert len(saved(path)) == 2


def test_an_error_ends_a_piped_chat(typed, capsys: Capture) -> None:  # type: ignore[no-untyped-def]
    """With status 1, and what it is about is the option."""
    assert typed("One?\n", "--agent", "reeder") == 1
    assert "error: --agent: there is no agent 'reeder'" in capsys.readouterr().err
    assert typed("One?\nTwo?\n", "--temperature", "9") == 1
    assert capsys.readouterr().err.count("error: --temperature: ") == 1


def test_bytes_that_are_no_text(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong usage, without a traceback."""
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["chat", *shop.options]) == 2


def test_a_saved_conversation_goes_on(typed, tmp_path: Path, capsys: Capture) -> None:  # type: ignore[no-untyped-def]
    """--load FILE; another agent cannot be named with it."""
    path = str(tmp_path / "c.json")
    assert typed(f"One?\n/save {path}\n") == 0
    assert typed(f"Two?\n/save {path}2\n", "--load", path) == 0
    turns = saved(Path(f"{path}2"))
    assert [text for role, text in turns if role == "user"] == ["One?", "Two?"]
    assert typed("Two?\n", "--load", path, "--agent", "writer") == 2
    assert typed("Two?\n", "--load", "/nowhere") == 1
    assert "error: cannot read the chat /nowhere" in capsys.readouterr().err


# -- at a terminal


def test_a_chat_at_a_terminal(shop: Shop) -> None:
    """It has a prompt; what goes wrong does not end it; Ctrl-D does."""
    with Terminal(["chat", *SHORT, *shop.options]) as terminal:
        terminal.wait_for("Ctrl-D ends the chat.")
        terminal.wait_for("> ")
        terminal.type("One?\n")
        terminal.wait_for("> ")
        terminal.type("/save /nowhere/c.json\n")
        assert "error: " in terminal.wait_for("> ")
        terminal.type("\x04")
        status, _ = terminal.end()
    assert status == 0


def test_ctrl_c_stops_an_answer_and_then_the_chat(shop: Shop, tmp_path: Path) -> None:
    """The question that was stopped is forgotten; at the prompt, Ctrl-C twice ends the chat."""
    # Large enough that its answer takes seconds on any machine: it must not end by itself.
    endless = write_tiny_llama(
        tmp_path / "endless.gguf",
        layers=6,
        width=512,
        ffn=2048,
        heads=8,
        context_length=4096,
        token_bias={"<|im_end|>": -40},
    )
    with Terminal(["chat", "-m", str(endless), "--max-tokens", "3500", *shop.options]) as terminal:
        terminal.wait_for("> ")
        terminal.type("Go on?\n")
        terminal.wait_for("Go on?\n")
        terminal.wait_for_more()
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("stopped; the question is forgotten")
        terminal.wait_for("> ")
        terminal.interrupt_prompt()
        terminal.wait_for("Ctrl-C once more ends the chat.")
        terminal.wait_for("> ")
        terminal.interrupt_prompt()
        status, shown = terminal.end()
    assert status == 130
    assert "Traceback" not in shown
