"""Grammars for an answer: those that llama.cpp can follow pass; for all others an
error says why."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp import llama_grammar

from orion_oie.errors import InvalidRequestError
from orion_oie.guardrails import gbnf
from orion_oie.guardrails.gbnf import check_grammar


def verdict(text: str) -> str | None:
    """The message of the check; any other error fails the test."""
    try:
        check_grammar(text)
    except InvalidRequestError as error:
        return error.message
    return None


FINE = {
    "plain": 'root ::= "a" [b-d]* ("e" | "f")+ . x\nx ::= "y"{2} [^z]{0,3}',
    "lines": '# a comment\r\nroot ::=\n  "a" | # another\n  ( "b"\n    "c" )\n\nx ::= "d"',
    "escapes": r'root ::= "\x41\u00e9\U0001F600\n\t\r\\\"\[\]" [\]\[\-\\\n-]',
    "classes": r'root ::= [a-z-9] [-a] [a-] [--a] [^\x00-\x1F"\\] [\x00-\x7F]',
    "raw": 'root ::= "a\n漢" [ぁ-ゖ]',
    "empty": "root ::= ",
    "alternatives": 'root ::= | "a" |',
    "recursion": 'root ::= "(" root ")" | item*\nitem ::= "x" root "y"',
    "optional": 'root ::= ws? "a" ws\nws ::= [ \\t]*',
    "counts": 'root ::= "a"{0} "b"{ 1 } "c"{1,} [d]{ 2 , 3 } "e"{1999}',
    "names": '1 ::= "a"\n-x- ::= 1\nroot ::= -x- 1',
    "not ascii": r"root ::= [^\x00-\x7F]+",
}


@pytest.mark.parametrize("text", FINE.values(), ids=FINE)
def test_a_grammar_passes(text: str) -> None:
    """Everything that GBNF has for characters is let through."""
    check_grammar(text)


@pytest.mark.parametrize("name", [name for name in dir(llama_grammar) if name.endswith("_GBNF")])
def test_known_grammars_pass(name: str) -> None:
    """The grammars that come with llama-cpp-python are fine."""
    check_grammar(getattr(llama_grammar, name))


FAULTY = {
    # would be no grammar at all, and no limit on the answer
    "": "has no rule 'root'",
    " \n# root ::= 1": "has no rule 'root'",
    'a ::= "x"': "has no rule 'root'",
    # would end, stall or fill up the process that holds the model
    'root ::= b root "x" | "y"\nb ::= c\nc ::= ""': "root begins with itself (left recursion)",
    'root ::= b root "x" | "y"\nb ::= [a]*': "root begins with itself",
    'root ::= x "a"\nx ::= (root | "b")': "begins with itself",
    'root ::= "a"{5,3}': "line 1: '{5,3}' must go upwards",
    "root ::= " + "(" * 65 + '"a"' + ")" * 65: "nested more than 64 deep",
    "root ::= r0\n" + "".join(f"r{n} ::= r{n + 1}\n" for n in range(600)) + 'r600 ::= "a"': (
        "begins in too many ways"
    ),
    "root ::= r0\n" + "".join(f"r{n} ::= r{n + 1} | r{n + 1}\n" for n in range(40)) + "r40 ::= .": (
        "begins in too many ways"
    ),
    'root ::= a{0,1000}\na ::= b{0,1000}\nb ::= c{0,1000}\nc ::= "x"?': "repeats what may be empty",
    'root ::= (("a"*)*)*': "repeats what may be empty",
    'root ::= x+\nx ::= y\ny ::= "a"?': "the rule 'root' repeats what may be empty",
    'root ::= "' + "a" * 1000 + '"{1000}': "too large with its repetitions",
    # would leave no token, or take something else for one
    'root ::= "a\\x00"': "a character that no answer can have",
    'root ::= "\\UFFFFFFFF"': "a character that no answer can have",
    'root ::= "\\ud800"': "a character that no answer can have",
    "root ::= [z-a]": "a range that goes downwards",
    "root ::= []": "[] is empty",
    "root ::= [^]": "[^] is empty",
    "root ::= [\\x00]": "allows no character",
    "root ::= [^\\x00-\\U0010FFFF]": "allows no character",
    "root ::= [\\ud800-\\udfff]": "allows no character",
    "root ::= <[5]>": "cannot read '<[5]>'",
    "root ::= !<|im_end|>": "cannot read '!<|im_end|>'",
    'root ::= "a\0"': "NUL character",
    'root ::= "\ud800"': "unpaired surrogate",
    'root ::= "a" root': "the rule 'root' never comes to an end",
    'root ::= "a" (x | x "b")\nx ::= "c" x': "never comes to an end",
    # would be taken for something else
    'root ::= "a"{0,2000}': "'{0,2000}' must go upwards, to 1999 at most",
    'root ::= "a"\nroot ::= "b"': "line 2: the rule 'root' is there twice",
    # would be refused, but only later
    "root ::= foo": "no rule 'foo', but uses it",
    'root ::= "abc': "cannot read '\"abc'",
    "root ::= [abc": "cannot read '[abc'",
    'root ::= ("a"': "a '(' is not closed",
    'root ::= "a" )': "a ')' closes nothing",
    'root ::= "\\q"': "unknown escape '\\\\q'",
    'root ::= "\\u12"': "unknown escape",
    'root ::= "\\': "cannot read",
    "root ::= *": "'*' repeats nothing",
    'root ::= ("a" | *)': "'*' repeats nothing",
    'root ::= ""*': "'*' repeats nothing",
    'root ::= "a"**': "or a repetition",
    'root ::= "a"{,3}': "cannot read the repetition",
    'root ::= "a"{99999999999}': "cannot read the repetition",
    'root ::= "a"{1,2': "cannot read",
    'root := "a"': "expected 'NAME ::='",
    'a_b ::= "a"\nroot ::= a_b': "line 1: expected 'NAME ::='",
    'root ::= "a"\n  "b"': "line 2: expected 'NAME ::='",
    'root ::= "a" x ::= "b"': "cannot read '::= \"b\"'",
    "x" * 64_001: "grammar has 64001 characters, the limit is 64000",
}


@pytest.mark.parametrize("text", FAULTY, ids=lambda text: text[:30])
def test_a_faulty_grammar_is_refused(text: str) -> None:
    """A grammar that llama.cpp would refuse, misread or crash on is refused with the fault."""
    with pytest.raises(InvalidRequestError) as caught:
        check_grammar(text)
    assert caught.value.message.startswith("grammar")
    assert FAULTY[text] in caught.value.message


def test_a_grammar_is_a_text() -> None:
    """Other things are refused by their type."""
    with pytest.raises(InvalidRequestError, match="grammar must be a str, got bytes"):
        check_grammar(b'root ::= "a"')


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from([*'()[]{}"|*+?.\\-^:= \n#', "root", "::=", '"a"', "{1,2}"])))
def test_any_text_gets_a_verdict(parts: list[str]) -> None:
    """Whatever stands in a grammar, the check ends, and its error is an InvalidRequestError."""
    complaint = verdict("root ::= " + " ".join(parts))
    assert complaint is None or complaint.startswith("grammar")


@pytest.mark.parametrize(
    "text",
    [
        "root ::= " + " ".join(f"r{n}" for n in range(4000)) + "\n"
        + "".join(f'r{n} ::= "a"\n' for n in range(2500)),
        "".join(f"r{n} ::= r{n + 1} | .\n" for n in range(3000)) + "root ::= .",
        'root ::= "a"\n' + "x ::= " + "(" * 60 + '"b"' + ")*" * 60,
        "root ::= [^" + "ab-c" * 15_000 + "]",
    ],
    ids=["long", "chain", "deep", "class"],
)  # fmt: skip
def test_no_grammar_takes_long_to_check(text: str) -> None:
    """The check of an input of the largest allowed size takes a bounded time."""
    assert len(text) <= gbnf.MAX_GRAMMAR_CHARS
    started = time.perf_counter()
    verdict(text)
    assert time.perf_counter() - started < 2
