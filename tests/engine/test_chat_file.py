"""The file of a chat: whole, of its kind and of its version, or refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from orion_oie import InvalidRequestError, Message
from orion_oie.engine.chat_file import ChatFile

TURN = [Message(role="user", content="Hé?"), Message(role="assistant", content="")]
PLAIN = {
    "format": "orion-oie chat",
    "version": 1,
    "agent": None,
    "system_prompt": None,
    "messages": [
        {"role": "user", "content": "Hé?"},
        {"role": "assistant", "content": ""},
    ],
}


def read(path: Path, content: Any, max_chars: int = 1000) -> ChatFile:
    """The chat of a file with this content: bytes, text, or what becomes JSON."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
    return ChatFile.read(path, max_chars=max_chars)


def test_a_chat_comes_back(tmp_path: Path) -> None:
    """What is written is read, and is plain JSON in UTF-8 with a format and a version."""
    path = tmp_path / "chat.json"
    for chat in (ChatFile(), ChatFile(agent="a", system_prompt="", messages=TURN)):
        chat.write(path)
        assert ChatFile.read(path, max_chars=3) == chat
    ChatFile(messages=TURN).write(str(path))
    assert json.loads(path.read_bytes()) == PLAIN
    assert "Hé?" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    """A folder that is not there, or a folder in the place, is the error of the system."""
    with pytest.raises(FileNotFoundError):
        ChatFile().write(tmp_path / "none" / "chat.json")
    with pytest.raises(OSError, match="directory"):
        ChatFile().write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is no chat: it is not JSON"),
        (b"\xff\xfe\x00", "is no chat: it is not JSON"),
        ('{"format": "orion-oie chat", ', "is no chat: it is not JSON"),
        ("[" * 100_000, "is no chat: it is not JSON"),
        ("[]", 'is no chat: it has no "format": "orion-oie chat"'),
        ("null", "is no chat"),
        ('"orion-oie chat"', "is no chat"),
        ({"version": "1.0", "models": {}, "agents": {}}, "is no chat"),
        ({**PLAIN, "format": "another chat"}, "is no chat"),
        ({**PLAIN, "version": 2}, "is a chat of version 2, and this library reads version 1"),
        ({**PLAIN, "version": 0}, "is a chat of version 0"),
        ({**PLAIN, "version": True}, "is a chat of version True"),
        ({**PLAIN, "version": 1.0}, "is a chat of version 1.0"),
        ({k: v for k, v in PLAIN.items() if k != "version"}, "is a chat of version None"),
        ({**PLAIN, "agent": 3}, "is a broken chat: agent: .*got 3"),
        ({**PLAIN, "system_prompt": []}, "is a broken chat: system_prompt: "),
        ({**PLAIN, "colour": "red"}, "is a broken chat: colour: unknown key"),
        ({**PLAIN, "messages": "hi"}, "is a broken chat: messages: "),
        ({**PLAIN, "messages": [{"role": "robot", "content": "x"}]}, "broken chat: messages.0.rol"),
        ({**PLAIN, "messages": [{"role": "user"}]}, "messages.0.content: missing"),
        (
            {**PLAIN, "messages": [{"role": "system", "content": "x"}]},
            r"messages\[0\] has the role 'system', and 'user' is due",
        ),
        (
            {**PLAIN, "messages": PLAIN["messages"][::-1]},
            r"messages\[0\] has the role 'assistant', and 'user' is due",
        ),
        ({**PLAIN, "messages": PLAIN["messages"][:1]}, r"messages\[0\] has no answer"),
        (
            {**PLAIN, "messages": [PLAIN["messages"][0]] * 2},
            r"messages\[1\] has the role 'user', and 'assistant' is due",
        ),
        (
            {**PLAIN, "messages": [{"role": "user", "content": "\ud800"}, PLAIN["messages"][1]]},
            r"history\[0\] is not valid Unicode",
        ),
        (
            {**PLAIN, "messages": [{"role": "user", "content": "x" * 21}, PLAIN["messages"][1]]},
            r"history\[0\] has 21 characters, the limit is 20",
        ),
        ({**PLAIN, "system_prompt": "x" * 21}, "system_prompt has 21 characters"),
    ],
)
def test_what_is_no_chat_is_refused(tmp_path: Path, content: Any, reason: str) -> None:
    """With the name of the file and what is wrong with it."""
    path = tmp_path / "talk.json"
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        read(path, content, max_chars=20)
    assert str(path) in caught.value.message


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    """As for options."""
    with pytest.raises(InvalidRequestError) as caught:
        read(tmp_path / "chat.json", {**PLAIN, "agent": 3, "colour": "red"})
    assert len(caught.value.details["problems"]) == 2


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """One that is not there, and a folder."""
    missing = tmp_path / "none.json"
    with pytest.raises(InvalidRequestError, match=f"cannot read the chat {missing}: No such file"):
        ChatFile.read(missing, max_chars=9)
    with pytest.raises(InvalidRequestError, match=r"cannot read the chat .*directory"):
        ChatFile.read(str(tmp_path), max_chars=9)
