"""What a prompt asks, told from what it asks about: its instruction and its payload.

By shape and by a few words alone: nothing is parsed, and what is unclear stays instruction. So do
a single paragraph without a label, and a list of points, which mostly says how the answer should
be. Every expression is linear: what repeats is bounded, or ends at what it can not hold.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import accumulate, groupby
from typing import Literal, NamedTuple, cast

from orion_oie.routing.excerpt import excerpt

PayloadKind = Literal["code", "table", "log", "quote", "document"]


class Segments(NamedTuple):
    """Together every character of the excerpt of a prompt but white space, each in its order."""

    instruction: str
    payload: str
    kinds: frozenset[PayloadKind]


class _Span(NamedTuple):
    """`text[start:end]`, payload of some kind, or open: instruction for all that is known."""

    start: int
    end: int
    kind: PayloadKind | None


class _Line(NamedTuple):
    start: int
    end: int
    bare: str


_Finder = Callable[[str, int, int], Iterable[_Span]]

# Below this a single line is not worth a look unless it holds one of the marks.
_PLAIN_CHARS = 160
_PLAIN_MARKS = ("\n", '"', "```", "~~~", "'''", "“", "„", "«", "「", "『")
_ASKING_CHARS = 300
# A greeting or a role may stand before the request.
_ASIDE_CHARS = 100
_QUOTE_CHARS = 60
_CELL_CHARS = 45
# A body that the instruction points at may be shorter than one that merely stands beside it.
_POINTED_BODY_CHARS = 120
_BODY_CHARS = 400
_REQUEST_LETTERS = 10
_CLOSING_LINES = 12

_FENCE = r"(?s:(```|~~~).*?\1)"
_QUOTED = (
    r"'''(?s:.*?)'''|\"\"\"(?s:.*?)\"\"\"|\"(?<![\w\"]\")(?=\S)[^\"]*\"(?!\w)"
    r"|“[^“”]*”|„[^„“”]*[“”]|«[^«»]*»|「[^「」]*」|『[^『』]*』"
)

# Each line becomes one character, named as the group that matched its start: L and C are log and
# code for sure, l and c only beside another, n is code only beside code, q is a mail quote.
_LINE = (
    r"(?P<q>>(?!>>))|(?P<n>#(?!include|define|!)|//|--|/\*|\*/|\.\.\. "
    r"|(?:end|then|do|done|fi|begin|pass|break|continue);?$|(?:let|val) \w{1,40}+ ?[:=][^;]*$)"
    r"|(?P<L>Traceback \(most recent call|File \"[^\"]{1,200}\", line \d|Caused by: "
    r"|at [\w.$<>/]{1,120}\(|Exception in thread |npm ERR! "
    r"|(?:fatal|panic|error|warning)(?:\[\w+\])?: )"
    r"|(?P<l>[\[(]?(?:\d{4}[-/.]\d\d[-/.]\d\d[T ]\d\d:\d\d|\d\d:\d\d:\d\d\b)"
    r"|[A-Z][a-z]{2} [ \d]?\d \d\d:\d\d:\d\d|\d{1,3}(?:\.\d{1,3}){3} - "
    r"|\[?(?:TRACE|DEBUG|INFO|NOTICE|WARN|WARNING|ERROR|CRITICAL|FATAL)\b[\]:| \t])"
    r"|(?P<C>(?:async )?def \w{1,80}\(|class [A-Z_]\w{0,80} ?(?:[:({<]|extends |implements |$)"
    r"|(?:export |default |public |private |protected |internal |static |final |abstract |async )"
    r"{1,4}[\w<>\[\], ?]{1,80}[({=;]|(?:function\*?|func|fn|fun) ?\w{0,80} ?[(<]"
    r"|(?:struct|enum|interface|trait|impl|namespace) [\w<>: ]{1,80}\{"
    r"|#include ?[<\"]|#define \w|#!/|from [\w.]{1,80} import |import [\w.]{1,80} as \w"
    r"|import (?:[\w.*/]{1,80};?$|[\w{}*, ]{1,120} from ['\"])|using [\w.:]{1,80};|package [\w.]+;"
    r"|(?:const|var) [\w{\[][\w, :<>\]}\[]{0,60} ?="
    r"|(?:int|char|float|double|bool|boolean|void|long|string|String|auto|unsigned|size_t)[*&]? "
    r"[*&]?\w{1,60}(?:\[\w*\])? ?[=;(,]|(?:if|for|while|switch|catch|else if|elseif) ?\(.{1,200}\{$"
    r"|(?:print|printf|println!?|console\.\w{1,9}|System\.out\.\w{1,9}|fmt\.\w{1,9})\("
    r"|(?:>>>|In \[\d{1,4}\]:) \S|\$ [a-z]|</?[a-zA-Z][\w-]{0,30}(?: [^<>]{0,200})?/?>"
    r"|<!DOCTYPE|<!--|<\?\w|\\(?:documentclass|usepackage|section|begin\{document)"
    r"|SELECT .{1,200}? FROM |(?:CREATE|ALTER|DROP) (?:TABLE|VIEW|INDEX)\b|INSERT INTO "
    r"|DELETE FROM |select [\w.*, ()]{1,120} from \w{1,60}(?: where | join | group | order |;))"
    r"|(?P<c>(?:if|elif|else|try|except|finally|for|while|with)\b.{0,200}:$"
    r"|return\b[^.?!]{0,120};?$|@[\w.]{1,60}(?:\(.{0,120}\))?$|[\[\](){},;]{1,6}$"
    r"|['\"][\w -]{1,60}['\"] ?: ?\S"
    r"|(?:SELECT|FROM|WHERE|GROUP BY|ORDER BY|HAVING|VALUES|UNION|LIMIT) ?(?:[\w\"`(*]|$)"
    r"|(?:INNER |LEFT |RIGHT |FULL |CROSS |OUTER ){0,2}JOIN \w"
    r"|(?:sudo|pip3? install|npm (?:install|run)|docker (?:run|build)|kubectl \w+|git clone) \S)"
    # The rest begin with any name: one look at what follows it spares most lines the tries.
    r"|(?=[\w./-]{1,80}+ ?[-+*/|&]?[:=(\[])(?:"
    r"(?P<L2>[\w.]{0,80}(?:Error|Exception): "
    r"|[\w./-]{1,80}+:\d{1,6}(?::\d{1,6})?: (?:error|warning))"
    r"|(?P<C2>\w{1,40}+ := \S)"
    r"|(?P<c2>(?:[^\W_]{1,40}+[._][\w.]{1,40}+|\w{1,40}+\[[^\]=]{1,40}\])(?:: ?\w{1,30})? ?"
    r"[-+*/|&]?=(?!=) ?\S|\w{1,60}+(?:: ?\w{1,30})? ?=(?!=) ?(?:[\w.]{0,80}+\(|['\"\[{])"
    r"|[\w.]{2,80}+\([^()]{0,120}\);?$|[\w-]{2,30}+: ?[^;]{1,80};$)"
    r"|(?P<n2>\w{1,40}+ ?[-+*/]?= ?\S))"
)
_PROSE = r"(?:[-*•] )?[A-ZÀ-Þ]?[a-zß-ÿ'’,]* [a-zß-ÿ'’,]+ [a-zß-ÿ'’,]+[ .?!:]|.*[.?!:。！？：]$"
_RUN = (
    r"(?P<table>t+)|(?P<quote>q(?:q|_(?=q))*)"
    r"|(?P<log>[Ll](?:[LlCcin]|_{1,2}(?=[Ll]))*)"
    r"|(?P<code>n{0,8}[Cc](?:[Ccin]|_{1,3}(?=n{0,8}[Cci])|,{1,2}(?=[Cc]))*)"
)
_ROWS_NEEDED = {"|": 2, "\t": 2}

# At the start of a line or a sentence. The look ahead for a colon spares most of them the tries.
_LABEL = (
    r"[\n.!?。！？](?=[^\n:：]{2,40}[:：])[ \t#*_\[(<]{0,6}"
    r"(?i:(?P<body>(?:the |input |source |original )?(?:input|text"
    r"|passage|context|content|e-?mail|article|document|paragraph|excerpt|abstract|transcript|conversation|dialogue|story|essay|letter|message|review|report|background|premise"
    r"|hypothesis|sentence|tweet|post|snippet|data|texte|contexte|texto|contexto|testo|contesto"
    r"|kontext|eingabe|artikel|artículo|artigo|articolo|correo|текст|контекст|статья|письмо|النص"
    r"|文章|文本|原文|正文|内容|背景|本文|テキスト|文脈|본문|지문|내용))"
    r"|(?P<ask>(?:the |your )?(?:question|instructions?|task|answer|output|response|query|request"
    r"|options|choices|tl;dr|summary|translation|frage|aufgabe|antwort|pregunta|respuesta"
    r"|pergunta|resposta|domanda|risposta|tâche|réponse|вопрос|задание|ответ"
    r"|问题|任务|指令|回答|答案|質問|질문|답변)))(?: ?\d{1,2})?[ \t*_\])>]{0,4}[:：]"
)
_OPTION = r"[(\[]?(?:[A-Ha-h]|\d{1,2}|[ivx]{1,4})[.):\]] ?\S"
_INLINE_LEAD = r"[^:：.?!。！？]{1,160}(?:([:：])|[.?!。！？])(?:(?<![:.?!])|\s)\s*(?=\S)"
_SENTENCE_END = r"[.!?…:]\s+|[。！？：\n]"
_POINT = (
    r"[-*•·–] ?\S|\(?\d{1,2}[.)] ?\S|You (?:are|will|have|can|must|should)\b|Your "
    r"|.{0,20}(?:应该|應該|必须|必須|不要|需要)"
)
_OWN_ACCOUNT = r"(?:I|I['’]\w{1,2}|My|We|Our|Ich|Mein|Je|Mon|Ma|Yo|Mi|Eu|Meu|Я|Мой)\b|我|私"
_EAST_ASIAN_TEXT_WORK = (
    r"总结|總結|概括|摘要|翻译|翻譯|改写|改寫|润色|潤色|修改"
    r"|要約|翻訳|添削|校正|書き換え|요약|번역|교정"
)
_EAST_ASIAN_REQUEST = (
    r"请|請|帮我|幫我|写一|寫一|ください|下さい|教えて|해\s?줘|주세요|하세요|하시오|하라"
    rf"|{_EAST_ASIAN_TEXT_WORK}"
)
_POINTER = (
    r"(?i)\b(?:this|these|following|below|above|attached|provided|(?:the|my|our|his|her|their) "
    r"(?:text|passage|article|paragraph|e-?mail|letter|story|essay|review|document|excerpt|report"
    r"|message|conversation|transcript)|cet?|cette|suivante?|ci-dessous|le texte|este|esta"
    r"|siguientes?|el texto|diese[rmns]?|folgenden?|unten|oben|den text|questo|seguente|il testo"
    r"|abaixo|seguinte|o texto|этот|следующ\w\w|текст|التالي|النص)\b"
    r"|以下|下面|下列|上面|上述|这段|这篇|這段|這篇|次の|下記|上記|この文|다음|위의|아래"
)
_COMMENTS = r"(?m)(?:^[ \t]{0,80}(?:#(?!include|define|!)|//|--|/\*).*\n?){1,20}"
_QUESTION = r"(?m)^.*[?？؟][ \t\r]*$"
_QUESTION_MARKS = ("?", "？", "؟")

# Requests to work on a text that is given.
_TEXT_VERBS = """
    summarize summarise summary tldr tl;dr translate rewrite rephrase reword paraphrase proofread
    correct edit revise polish shorten condense simplify classify categorize categorise extract
    improve critique annotate analyze analyse transcribe
    résume résumer traduis traduire traduisez reformule corrige corriger simplifie
    resume resumir resuma traduce traducir traduzca reescribe corrige corregir clasifica extrae
    zusammenfassen übersetze übersetzen korrigiere korrigieren umformulieren vereinfache kürze
    riassumi riassumere traduci tradurre riscrivi correggi semplifica
    traduza traduzir reescreva corrija simplifique classifique extraia
    переведи переведите перепиши перескажи сократи исправь обобщи ترجم لخص صحح
"""
_REQUEST_VERBS = """
    write explain give tell make create generate find list show describe answer identify compare
    discuss suggest provide draft compose read determine decide evaluate respond reply complete
    continue choose select pick name calculate compute solve prove fix debug implement convert turn
    use fill sort rank count highlight outline interpret infer predict detect check review act
    pretend imagine what why how
    écris explique donne dis trouve décris réponds escribe explica da dame di encuentra describe
    responde schreibe schreib erkläre erklär gib nenne finde beschreibe beantworte fasse liste
    scrivi spiega dammi trova descrivi rispondi escreva explique dê encontre descreva
    напиши напишите объясни найди опиши ответь اكتب اشرح أجب
"""
_COURTESIES = """
    please kindly can could would will you i i'd we want need like to help me us now then and also
    hi hello hey just so ok okay bitte kannst könntest können sie du mir por favor puedes podrías
    peux-tu pouvez-vous veuillez puoi per favore pode você пожалуйста можешь
"""
_ALL_VERBS = _TEXT_VERBS + _REQUEST_VERBS
_WISHES = """
    should must please ensure avoid include don't sollte sollten muss bitte doit devrait debe
    debería deve dovrebbe deveria должен должна нужно
"""


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Compiled when first needed: an import of the library should not pay for it."""
    return re.compile(pattern)


@cache
def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def split(text: str) -> Segments:
    """Tell the instruction of `text` from its payload; looks at an excerpt of a long text.

    Payload is code (fenced or not), tables, logs, long quotations, and the long body that a short
    request, question or label introduces or follows. Of nothing but code, a docstring, comment or
    question is the instruction; of nothing but a table or a log it may be empty.
    """
    text = excerpt(text).strip()
    if len(text) <= _PLAIN_CHARS and not any(mark in text for mark in _PLAIN_MARKS):
        return Segments(text, "", frozenset())
    spans = [_Span(0, len(text), None)]
    for find in (_fences, _runs, _quotes):
        spans = _refined(text, spans, find)
    bodies = _bodies(text, spans)
    spans = _refined(text, spans, lambda _, start, end: _clipped(bodies, start, end))
    instruction = _joined(text[span.start : span.end] for span in spans if span.kind is None)
    kinds = frozenset(span.kind for span in spans if span.kind is not None)
    if kinds and not any(map(str.isalpha, instruction)):
        return _of_payload_alone(text, kinds)
    payload = _joined(text[span.start : span.end] for span in spans if span.kind is not None)
    return Segments(instruction, payload, kinds)


def _refined(text: str, spans: list[_Span], find: _Finder) -> list[_Span]:
    """What `find` sees in the open spans becomes payload; the rest of them stays open."""
    refined = []
    for span in spans:
        if span.kind is not None:
            refined.append(span)
            continue
        at = span.start
        for found in find(text, span.start, span.end):
            if found.start > at:
                refined.append(_Span(at, found.start, None))
            refined.append(found)
            at = found.end
        if at < span.end:
            refined.append(_Span(at, span.end, None))
    return refined


def _clipped(spans: Iterable[_Span], start: int, end: int) -> Iterator[_Span]:
    for span in spans:
        if span.start < end and span.end > start:
            yield _Span(max(span.start, start), min(span.end, end), span.kind)


def _joined(pieces: Iterable[str]) -> str:
    """One text of all pieces, where no two words run into each other."""
    joined: list[str] = []
    for piece in pieces:
        if joined and not joined[-1][-1].isspace() and not piece[0].isspace():
            joined.append(" ")
        joined.append(piece)
    return "".join(joined).strip()


def _fences(text: str, start: int, end: int) -> Iterator[_Span]:
    for match in _compiled(_FENCE).finditer(text, start, end):
        yield _Span(*match.span(), "code")


def _quotes(text: str, start: int, end: int) -> Iterator[_Span]:
    # Short ones are matched as well, so that their ends do not open a quotation.
    for match in _compiled(_QUOTED).finditer(text, start, end):
        if match.end() - match.start() > _QUOTE_CHARS:
            yield _Span(*match.span(), "quote")


def _runs(text: str, start: int, end: int) -> Iterator[_Span]:
    """Runs of code, of log lines, of table rows and of mail quotes, as whole lines."""
    lines = text[start:end].splitlines(keepends=True)
    starts = list(accumulate(map(len, lines), initial=start))
    for run in _compiled(_RUN).finditer(_marks(lines)):
        first, last = starts[run.start()], starts[run.end()]
        if run.lastgroup == "quote":
            is_sure = last - first > _QUOTE_CHARS
        else:
            is_sure = sum((mark in "tCL") * 2 + (mark in "cl") for mark in run.group()) >= 2
        if is_sure:
            yield _Span(first, last, cast(PayloadKind, run.lastgroup))


def _marks(lines: list[str]) -> str:
    """A character for each line: those of `_LINE` and `_mark`, and t for a row of a table."""
    marks = [_mark(line) for line in lines]
    rows = [
        None if mark in "_CcL" else _row_kind(line.strip())
        for mark, line in zip(marks, lines, strict=True)
    ]
    for kind, group in groupby(range(len(lines)), key=rows.__getitem__):
        places = list(group)
        if kind is not None and len(places) >= _ROWS_NEEDED.get(kind, 3):
            marks[places[0] : places[-1] + 1] = "t" * len(places)
    return "".join(marks)


def _mark(line: str) -> str:
    """As in `_LINE`; else _ for blank, i for indented, a dot for prose, a comma for unclear."""
    bare = line.strip()
    if not bare:
        return "_"
    if bare.endswith(_QUESTION_MARKS):
        return "."
    found = _compiled(_LINE).match(bare)
    if found and found.lastgroup:
        return found.lastgroup[0]
    is_prose = _compiled(_PROSE).match(bare) is not None
    if not is_prose and bare[-1] in ";{" and any(sign in bare for sign in "=(){}[]<>"):
        return "c"
    if line[0] == "\t" or line[:2] == "  ":
        return "i"
    return "." if is_prose else ","


def _row_kind(line: str) -> str | None:
    """The same for rows that may be of one table; None for a line that is no row."""
    pipes = line.count("|")
    if pipes > 1:
        return "|"
    if "\t" in line:
        return "\t"
    for separator in ",;":
        count = line.count(separator)
        is_row = count > 1 or (count == 1 and f"{separator} " not in line)
        if is_row and line[-1] not in ".?!:,;" and len(line) <= _CELL_CHARS * (count + 1):
            return f"{separator}{count}"
    if pipes:
        return "one |"
    return "columns" if "   " in line else None


def _bodies(text: str, spans: list[_Span]) -> list[_Span]:
    """The long texts that something short in the open spans is about."""
    lines = [line for span in spans if span.kind is None for line in _lines(text, span)]
    if not lines:
        return []
    return _labelled(text, lines) or _led(text, lines, has_payload=len(spans) > 1)


def _lines(text: str, span: _Span) -> Iterator[_Line]:
    at = span.start
    for line in text[span.start : span.end].splitlines(keepends=True):
        bare = line.strip()
        if bare:
            yield _Line(at, at + len(line), bare)
        at += len(line)


def _labelled(text: str, lines: list[_Line]) -> list[_Span]:
    """From each label of a text to the next label of a request, or to a request at the end."""
    # The line feed gives the first label something to follow, and moves all by one.
    labels = list(_compiled(_LABEL).finditer(f"\n{text}"))
    if not labels:
        return []
    places = [label.start() for label in labels]
    bodies = [
        _Span(start, end, "document")
        for label, start, end in zip(labels, places, [*places[1:], len(text)], strict=True)
        if label.lastgroup == "body"
    ]
    if bodies and bodies[-1].end == len(text):
        start = bodies[-1].start
        closing = _closing(lines, start, is_led=any(line.end <= start for line in lines))
        bodies[-1] = _Span(start, len(text) if closing is None else closing, "document")
    return bodies


def _led(text: str, lines: list[_Line], has_payload: bool) -> list[_Span]:
    """All between a request in the first lines and one in the last, when that is long."""
    start = _lead_end(text, lines)
    closing = _closing(lines, start or 0, is_led=start is not None)
    if start is None and closing is None:
        return []
    start = start or 0
    end = len(text) if closing is None else closing
    body = [line for line in lines if line.end > start and line.start < end]
    size = sum(min(line.end, end) - max(line.start, start) for line in body)
    if size < _POINTED_BODY_CHARS:
        return []
    request = f"{text[:start]} {text[end:]}"
    works_on_text = _begins(request, _TEXT_VERBS, _EAST_ASIAN_TEXT_WORK)
    is_pointed = works_on_text or _points(request) or text[:start].rstrip().endswith((":", "："))
    if size < _BODY_CHARS and (has_payload or not is_pointed):
        return []
    if not works_on_text:
        wishes = sum(len(line.bare) for line in body if _is_wish(line.bare))
        is_account = not is_pointed and _compiled(_OWN_ACCOUNT).match(body[0].bare)
        if wishes * 2 >= size or is_account or sum(map(str.isalpha, request)) < _REQUEST_LETTERS:
            return []
    return [_Span(start, end, "document")]


def _lead_end(text: str, lines: list[_Line]) -> int | None:
    """Where the request in the first lines ends, or in the first sentence of a long line."""
    first = lines[0]
    if len(lines) == 1 or len(first.bare) > _ASKING_CHARS:
        inline = _compiled(_INLINE_LEAD).match(text, first.start, first.end)
        if inline and _begins(inline.group(), _TEXT_VERBS, _EAST_ASIAN_TEXT_WORK):
            has_colon = inline.group(1) is not None
            return inline.end() if has_colon or _points(inline.group()) else None
    end = None
    for line in lines[:3]:
        if _asks(line.bare):
            end = line.end
        elif end is not None or len(line.bare) > _ASIDE_CHARS:
            break
    return end


def _closing(lines: list[_Line], after: int, is_led: bool) -> int | None:
    """Where the requests in the last lines begin, with the options to choose from.

    After a request at the start, a blank line has to set them off: a letter may end in a question.
    """
    start = None
    lines = lines[-_CLOSING_LINES:]
    for above, line in zip(lines[-2::-1], lines[:0:-1], strict=True):
        if above.end <= after:
            break
        if _asks(line.bare):
            if not is_led or above.end < line.start:
                start = line.start
        elif not _compiled(_OPTION).match(line.bare):
            break
    return start


def _asks(line: str) -> bool:
    """A short line that is a question, ends in a colon, or has a sentence that is a request."""
    if len(line) > _ASKING_CHARS:
        return False
    if line.rstrip('*_"”») ').endswith((*_QUESTION_MARKS, ":", "：")):
        return True
    return _begins(line, _ALL_VERBS, _EAST_ASIAN_REQUEST)


def _begins(text: str, verbs: str, east_asian: str) -> bool:
    """Whether a sentence of `text` begins with one of the verbs, courtesies aside."""
    for sentence in _compiled(_SENTENCE_END).split(text):
        words = (word for word in _plain_words(sentence) if word not in _words(_COURTESIES))
        if next(words, "") in _words(verbs):
            return True
    return not text.isascii() and _compiled(east_asian).search(text) is not None


def _points(text: str) -> bool:
    return _compiled(_POINTER).search(text) is not None


def _plain_words(text: str) -> Iterator[str]:
    for word in text.lower().split():
        yield word.strip(".,:;!?*_#\"'()")


def _is_wish(line: str) -> bool:
    """A point of a list, or a line that begins to say how the answer should be."""
    if _compiled(_POINT).match(line):
        return True
    return not _words(_WISHES).isdisjoint(_plain_words(line[:100]))


def _of_payload_alone(text: str, kinds: frozenset[PayloadKind]) -> Segments:
    """The little in payload that may be an instruction. A quotation alone is the instruction."""
    if kinds <= {"quote", "document"}:
        return Segments(text, "", frozenset())
    for start, end in _hints(text, kinds):
        rest = _joined(part for part in (text[:start], text[end:]) if part)
        if rest and any(map(str.isalpha, text[start:end])):
            return Segments(text[start:end].strip(), rest, kinds)
    return Segments("", text, kinds)


def _hints(text: str, kinds: frozenset[PayloadKind]) -> Iterator[tuple[int, int]]:
    """Where a docstring stands, up to its examples; where comments and questions stand."""
    for quotes in ('"""', "'''") if "code" in kinds else ():
        before, mark, rest = text.partition(quotes)
        start = len(before) + len(mark)
        yield start, start + len(rest.partition(quotes)[0].partition(">>>")[0])
    for pattern in (_COMMENTS, _QUESTION) if "code" in kinds else (_QUESTION,):
        yield from (match.span() for match in _compiled(pattern).finditer(text))
