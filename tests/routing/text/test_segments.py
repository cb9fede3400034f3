"""Instruction and payload: told apart by shape, nothing lost, and any text has an answer."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_oie.routing.text.excerpt import (
    HEAD_CHARS,
    TAIL_CHARS,
    excerpt,
)
from orion_oie.routing.text.segments import (
    Segments,
    split,
)

HARBOUR = (
    "The harbour of the town lies behind a long wall of granite. Fishermen built it two hundred "
    "years ago, after a storm took eleven boats in one night."
)
MUSEUM = (
    "Its oldest house is a museum now. On the first floor hang the nets, on the second the letters "
    "of those who left for the whaling grounds and of those who stayed."
)
ARTICLE = f"{HARBOUR}\n\n{MUSEUM}"
LONG_ARTICLE = f"{ARTICLE}\n\n{HARBOUR}\n\n{MUSEUM}"

FUNCTION = "def area(radius):\n    square = radius ** 2\n\n    return 3.14 * square"
JAVA = (
    "public class Boat {\n    private int seats;\n\n    int free() {\n        return 4;\n    }\n}"
)
QUERY = "SELECT name, seats\nFROM boats\nWHERE harbour = 'north'\nORDER BY seats"
PAGE = '<ul class="boats">\n  <li>Anna</li>\n  <li>Bruno</li>\n</ul>'
RECORD = '{\n  "name": "Anna",\n  "seats": 4\n}'
SESSION = ">>> total = 3\n>>> total / 0"
SHELL = "$ git push origin main\n$ make test"

PIPES = "| boat | seats |\n|------|-------|\n| Anna | 4 |\n| Bruno | 6 |"
TABS = "boat\tseats\nAnna\t4\nBruno\t6"
COMMAS = "boat,seats,harbour\nAnna,4,north\nBruno,6,south"
PAIRS = "Anna,4\nBruno,6\nCarla,9"
COLUMNS = "boat     seats\nAnna     4\nBruno    6"

SERVER_LOG = (
    "2031-05-02 08:14:01 INFO  pump started\n2031-05-02 08:14:09 WARN  pressure at 91 %\n"
    "2031-05-02 08:14:10 ERROR pump stopped"
)
SYSLOG = "May  2 08:14:01 harbour pump[12]: started\nMay  2 08:14:09 harbour pump[12]: stopped"
LEVELS = "[INFO] reading boats.csv\n[ERROR] line 4 has no seats"
TRACE = (
    "Traceback (most recent call last):\n"
    '  File "boats.py", line 7, in <module>\n    seats = int(row[1])\n'
    "ValueError: invalid literal for int() with base 10: 'four'"
)
JAVA_TRACE = (
    'Exception in thread "main" java.lang.NullPointerException: seats\n'
    "    at harbour.Boat.free(Boat.java:12)\n    at harbour.Main.main(Main.java:5)"
)

QUOTED = "The committee regrets that it can not take part in the regatta of the ninth of May"

ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=()), max_size=400)
PIECES = st.sampled_from(
    (
        *(FUNCTION, JAVA, QUERY, PAGE, RECORD, PIPES, COMMAS, SERVER_LOG, TRACE, HARBOUR, MUSEUM),
        *(
            "```",
            "~~~",
            '"',
            "“",
            "”",
            "«",
            "'''",
            '"""',
            "\n",
            "\n\n",
            " ",
            "\t",
            "> ",
            "| ",
            ", ",
        ),
        *("Summarize this:", "What is it?", "Text:", "Question:", "Answer:", "Please translate."),
        *(
            "# a comment",
            "A) one",
            "- two",
            "请总结以下文章：",
            "لخص النص",
            "\ud800",
            "\u2028",
            "\r\n",
        ),
    )
)
MIXED_TEXT = st.lists(st.one_of(PIECES, PIECES, ANY_TEXT), max_size=30).map("".join)


def _solid(text: str) -> str:
    return "".join(text.split())


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _assert_split(text: str, instruction: str, payload: str, *kinds: str) -> None:
    """`text` is told apart like this, whatever the white space between its pieces."""
    found = split(text)
    assert _spaced(found.instruction) == _spaced(instruction)
    assert _spaced(found.payload) == _spaced(payload)
    assert found.kinds == set(kinds)


def _is_subsequence(part: str, whole: str) -> bool:
    rest = iter(whole)
    return all(char in rest for char in part)


def _assert_whole(segments: Segments, text: str) -> None:
    """Every character that is no white space is in exactly one of the two, in its order."""
    whole = _solid(excerpt(text))
    instruction, payload = _solid(segments.instruction), _solid(segments.payload)
    assert Counter(instruction) + Counter(payload) == Counter(whole)
    assert _is_subsequence(instruction, whole)
    assert _is_subsequence(payload, whole)


@pytest.mark.parametrize(
    "text",
    [
        "How do crabs breathe out of water?",
        "hello",
        "2 + 2 = ?",
        'What does "to weigh anchor" mean?',
        "Explain the difference between a sloop and a ketch to a child of eight years.",
        "Write a poem about the sea.\nIt should rhyme.\nUse no more than eight lines.",
        "Warum ist das Meer salzig, und war es das schon immer?",
        "为什么海水是咸的？",
        "Roses are red,\nviolets are blue,\nwhat rhymes with harbour\nand with granite too?",
        "Is (a + b) * c the same as a * c + b * c; and if so, why?",
    ],
)
def test_a_question_is_all_instruction(text: str) -> None:
    """A short plain request has no payload, on one line or on a few."""
    assert split(text) == Segments(text, "", frozenset())


@pytest.mark.parametrize(
    "text",
    [
        "Anna rows from the harbour to the island at 4 km/h and back at 6 km/h. She rests for half "
        "an hour on the island, where she eats two of her five apples. If she is away for three "
        "hours in all, how far is the island, and how many apples does she bring home?",
        "Five boats lie side by side at the quay: one is red, one is blue, one is green, one is "
        "white, one is black. The red boat lies left of the blue one. The green boat is at an end. "
        "The white boat touches neither the green nor the red one. Which boat is in the middle?",
        "Calculate the following: a tank holds 900 litres, a pump fills 35 litres a minute, and a "
        "leak loses 5 litres a minute. After how many minutes is the empty tank full, and how much "
        "water was lost until then?",
    ],
)
def test_a_puzzle_of_one_paragraph_is_not_cut(text: str) -> None:
    """The facts of a word problem are part of what is asked."""
    assert split(text) == Segments(text, "", frozenset())


@pytest.mark.parametrize(
    "text",
    [
        "Write a story about a keeper of a lighthouse.\n\nIt should be sad and have a storm in it, "
        "but please avoid deaths.\n\nThe keeper must have a dog, and the dog should be the one who "
        "tells the story, from the day when it came to the island.",
        "Plan a regatta for our club with the following points in mind:\n"
        "- eleven boats of three classes, none of them faster than the others\n"
        "- a course that can be seen from the granite wall by those who stay on land\n"
        "- a dinner at the museum, with speeches that are short",
        "My neighbour keeps crabs in his bath.\n\n"
        + "I hear them at night and can not sleep. " * 12
        + "\n\nWhat should I do?",
    ],
)
def test_requirements_and_accounts_stay(text: str) -> None:
    """Descriptions of the answer, lists of points and the writer's own story are no document."""
    assert split(text) == Segments(text, "", frozenset())


@pytest.mark.parametrize("fence", ["```", "~~~"])
def test_fenced_blocks_are_code(fence: str) -> None:
    """A fenced block is code whatever it holds, on lines of its own or inside of one."""
    block = f"{fence}\nsome words that are no code\n{fence}"
    _assert_split(f"Explain:\n{block}\nWhy so slow?", "Explain:\nWhy so slow?", block, "code")
    assert split(f"Why is {fence}a+b{fence} slow?").payload == f"{fence}a+b{fence}"


def test_an_open_fence_does_not_swallow_the_question() -> None:
    """Without its end a fence is worth no more than its lines."""
    text = f"```python\n{FUNCTION}\n\nWhy does it fail for a word?"
    assert "Why does it fail" in split(text).instruction
    assert "return 3.14" in split(text).payload


@pytest.mark.parametrize("code", [FUNCTION, JAVA, QUERY, PAGE, RECORD, SESSION, SHELL])
def test_runs_of_code_are_code(code: str) -> None:
    """Lines of code are payload without a fence, with the blank and indented ones among them."""
    _assert_split(
        f"Why does this fail?\n\n{code}\n\nI expected a number.",
        "Why does this fail?\n\nI expected a number.",
        code,
        "code",
    )


@pytest.mark.parametrize(
    "text",
    [
        "Find x and y:\nspeed = 60\ntime = 2\nx + y = 9\nWhat is the distance?",
        "let x = 5 and y = 7.\nlet z = x + y.\nWhat is z?",
    ],
)
def test_formulas_are_not_code(text: str) -> None:
    """A few equations belong to the problem."""
    assert split(text).instruction == text


@pytest.mark.parametrize("table", [PIPES, TABS, COMMAS, PAIRS, COLUMNS, COMMAS.replace(",", ";")])
def test_rows_are_tables(table: str) -> None:
    """Rows with the same separators are a table, before or after the question."""
    question = "Which boat has the most seats?"
    _assert_split(f"{question}\n{table}", question, table, "table")
    _assert_split(f"{table}\n\n{question}", question, table, "table")


def test_two_rows_of_commas_are_none() -> None:
    """Commas are common in sentences: it takes three rows."""
    text = "Sort these names:\nAnna,Bruno,Carla\nDora,Emil,Fritz"
    assert split(text).instruction == text


@pytest.mark.parametrize("log", [SERVER_LOG, SYSLOG, LEVELS, TRACE, JAVA_TRACE])
def test_logs_are_logs(log: str) -> None:
    """Time stamps, levels and stack traces, with the lines of code that a trace shows."""
    _assert_split(
        f"The pump stands still.\n{log}\nWhat now?", "The pump stands still.\nWhat now?", log, "log"
    )


@pytest.mark.parametrize(
    ("opening", "closing"),
    [('"', '"'), ("“", "”"), ("„", "“"), ("«", "»"), ("「", "」"), ("'''", "'''"), ('"""', '"""')],
)
def test_long_quotations_are_quotes(opening: str, closing: str) -> None:
    """A long quotation is payload, a short one belongs to the sentence."""
    quote = f"{opening}{QUOTED}{closing}"
    found = split(f"Say {opening}no{closing} like {quote} in plain words.")
    assert found.payload == quote
    assert _spaced(found.instruction) == f"Say {opening}no{closing} like in plain words."
    assert found.kinds == {"quote"}


def test_what_stands_between_quotations_is_none() -> None:
    """The end of a short quotation does not open a long one."""
    text = f'He said "no" and then {QUOTED.lower()} before she said "yes", was he right?'
    assert split(text).payload == ""


def test_mail_quotes_are_quotes() -> None:
    """Lines that a mail program marked as somebody else's."""
    mail = "> I waited for two hours in the rain and nobody came.\n>\n> I will not sail again."
    _assert_split(f"Answer him kindly:\n{mail}", "Answer him kindly:", mail, "quote")


def test_a_quotation_alone_is_the_instruction() -> None:
    """A question entirely in quotes is still the instruction."""
    text = '"What would become of the tides if the moon were twice as far from us as it is now?"'
    assert split(text) == Segments(text, "", frozenset())


@pytest.mark.parametrize(
    "request_text",
    [
        "Summarize the following article:",
        "Please give me a title for this text.",
        "Could you translate the text below into Greek?",
        "You are an editor.\nShorten this article to fifty words.",
        "Traduis le texte suivant en anglais :",
        "Fasse den folgenden Text zusammen.",
        "请总结以下文章：",
        "다음 글을 요약해 주세요.",
        "لخص النص التالي:",
    ],
)
def test_a_request_leads_a_document(request_text: str) -> None:
    """The text after a request that refers to it is the document, in any number of paragraphs."""
    _assert_split(f"{request_text}\n\n{ARTICLE}", request_text, ARTICLE, "document")


@pytest.mark.parametrize(
    "request_text",
    [
        "Summarize the text above.",
        "TL;DR:",
        "Write a reply to the letter above.",
        "翻译上面的文章。",
    ],
)
def test_a_request_follows_a_document(request_text: str) -> None:
    """The text before such a request is the document as well."""
    _assert_split(f"{ARTICLE}\n\n{request_text}", request_text, ARTICLE, "document")


def test_a_plain_question_needs_a_long_document() -> None:
    """A question that points at nothing may just come after its own short preface."""
    question = "What hangs on the first floor?"
    assert split(f"{LONG_ARTICLE}\n\n{question}").instruction == question
    assert split(f"{question}\n\n{LONG_ARTICLE}").instruction == question
    assert split(f"{HARBOUR}\n\n{question}").payload == ""


def test_options_stay_with_their_question() -> None:
    """The answers to choose from are not the end of the document."""
    question = "What hangs on the first floor?\nA) letters\nB) nets\nC) sails\nD) nothing"
    assert split(f"{LONG_ARTICLE}\n\n{question}").instruction == question


def test_a_request_at_both_ends() -> None:
    """The document is what is between them."""
    _assert_split(
        f"Read this article.\n\n{ARTICLE}\n\nWho built the wall?",
        "Read this article.\n\nWho built the wall?",
        ARTICLE,
        "document",
    )


def test_a_letter_may_end_in_a_question() -> None:
    """After a request, a question in the last lines of a document is its own."""
    letter = f"Dear Anna,\n{HARBOUR}\nWill you come and see it?"
    assert split(f"Proofread this letter:\n\n{letter}").payload == letter


def test_a_document_on_the_line_of_the_request() -> None:
    """The sentence that asks for work on a text ends where the text begins."""
    _assert_split(f"Translate to Greek: {HARBOUR}", "Translate to Greek:", HARBOUR, "document")
    assert split(f"Summarize this text. {HARBOUR}").instruction == "Summarize this text."


def test_quotations_of_a_document_belong_to_it() -> None:
    """A long quotation inside of an article does not end the article."""
    body = f'{HARBOUR}\n\nThe keeper says: "{QUOTED}." {LONG_ARTICLE}'
    found = split(f"Summarize this article:\n\n{body}")
    assert found.instruction == "Summarize this article:"
    assert found.kinds == {"document", "quote"}


@pytest.mark.parametrize(
    "label",
    [
        "Text:",
        "Input:",
        "### Context:",
        "**Passage:**",
        "Email:",
        "Article 1:",
        "Texte :",
        "原文：",
    ],
)
def test_a_label_names_a_document(label: str) -> None:
    """A label makes a document of what follows, up to the label of a question."""
    found = split(f"Answer in a word.\n\n{label} {HARBOUR}\n\nQuestion: Who built it?\nAnswer:")
    assert _solid(found.payload).endswith(_solid(HARBOUR))
    assert "Answer in a word." in found.instruction
    assert "Question: Who built it?\nAnswer:" in found.instruction
    assert found.kinds == {"document"}


def test_labels_on_one_line() -> None:
    """A label may follow a sentence instead of a line."""
    found = split(f"Answer in one word, please. Passage: {HARBOUR} Question: Who built the wall?")
    assert found.instruction == "Answer in one word, please. Question: Who built the wall?"
    assert found.payload == f"Passage: {HARBOUR}"


def test_a_question_after_a_label() -> None:
    """The question after a labelled text needs no label of its own."""
    _assert_split(
        f"Context: {ARTICLE}\n\nWho built the wall?",
        "Who built the wall?",
        f"Context: {ARTICLE}",
        "document",
    )


def test_a_label_alone_is_the_instruction() -> None:
    """A text with a label and nothing else is all that can be answered."""
    text = f"Text: {HARBOUR}"
    assert split(text) == Segments(text, "", frozenset())


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        (
            f'{FUNCTION[:17]}\n    """ The area of a disc.\n    >>> area(1)\n    """',
            "The area of a disc.",
        ),
        (f"# the area of a disc,\n# in metres\n{FUNCTION}", "# the area of a disc,\n# in metres"),
        (f"// the boats of a harbour\n{JAVA}", "// the boats of a harbour"),
        (f"```\n{FUNCTION}\nWhy does it fail?\n```", "Why does it fail?"),
        (FUNCTION, ""),
        (PIPES, ""),
        (SERVER_LOG, ""),
    ],
)
def test_of_payload_alone(text: str, instruction: str) -> None:
    """A docstring, a comment or a question speaks for code; a table and a log say nothing."""
    found = split(text)
    assert found.instruction == instruction
    assert found.kinds
    _assert_whole(found, text)


def test_several_kinds() -> None:
    """Kinds are counted together, and their pieces stay in order."""
    found = split(f"Read the log,\n{SERVER_LOG}\nthe boats,\n{COMMAS}\nand fix:\n{FUNCTION}")
    assert found.instruction == "Read the log,\nthe boats,\nand fix:"
    assert found.payload == f"{SERVER_LOG}\n{COMMAS}\n{FUNCTION}"
    assert found.kinds == {"log", "table", "code"}


@settings(deadline=None)
@given(st.one_of(ANY_TEXT, MIXED_TEXT))
def test_nothing_is_lost(text: str) -> None:
    """Whatever the text, each character is in one of the two, always the same one."""
    found = split(text)
    _assert_whole(found, text)
    assert bool(found.kinds) == bool(found.payload)
    assert split(text) == found


@settings(deadline=None, max_examples=30)
@given(MIXED_TEXT, st.integers(1, 40))
def test_the_result_has_a_bound(text: str, times: int) -> None:
    """However long a text, the two parts are hardly longer than its excerpt."""
    found = split(text * times)
    most = HEAD_CHARS + TAIL_CHARS + 1
    # A blank is put where two words would meet, at most one for each two characters.
    assert len(found.instruction) + len(found.payload) <= most * 3 // 2


@settings(deadline=None, max_examples=20)
@given(ANY_TEXT, ANY_TEXT)
def test_only_the_ends_of_a_long_text_are_read(one: str, other: str) -> None:
    """The middle of a long text changes nothing, so the work is bounded."""
    head, tail, fill = f"{HARBOUR}\n" * 20, f"{MUSEUM}\n" * 20, 1_000
    assert split(head + one.ljust(fill) + tail) == split(head + other.ljust(fill) + tail)


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "a",
            " ",
            "\n",
            "\t",
            "|",
            ",",
            ";",
            ":",
            "?",
            "1",
            "-",
            "#",
            "`",
            "'",
            '"',
            "“",
            "„",
            "«",
        ),
        *(
            "a\n",
            "a.",
            "a,",
            "a,b\n",
            "x = ",
            "x = f(\n",
            "(",
            "[",
            "<a ",
            "Text:",
            "\nText:",
            ". a:",
        ),
        *(
            "n\n",
            "> \n",
            "  a\n",
            "if a\n",
            "A) a\n",
            "a?\n",
            "Please ",
            "SELECT ",
            "import a",
            "@a",
        ),
        *(
            "12:",
            "2031-",
            "/",
            "a/b",
            "_",
            "Error",
            "a   b\n",
            "請",
            "：",
            "。",
            "é",
            "\ud800",
            "\u2028",
        ),
    ],
)
def test_a_million_characters(piece: str) -> None:
    """No repeated piece, however hostile to regular expressions, keeps it busy or loses a thing."""
    text = piece * (1_000_000 // len(piece))
    _assert_whole(split(text), text)
