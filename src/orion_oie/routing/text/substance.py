"""How much there is to read in a prompt: signs, numbers, a word alone or a mash of keys say little.

Words are counted, not understood: runs of letters that people could have meant as a word. The more
of them are missing, the less a router should trust what it makes of the rest.
"""

import unicodedata
from collections.abc import Iterator
from itertools import pairwise

from orion_oie.routing.text.compiled import compiled
from orion_oie.routing.text.letter_pairs import EDGE, surprises
from orion_oie.routing.text.stopwords import any_stop_words

_KNOWN = 0.5  # of a word that is known, or in letters that name a language
_BY_OTHERS = (0.0, 0.2, 0.4, 1.0)  # of so many other words
# Scripts without spaces between words, or with marks between letters.
_UNSPACED = (
    "\u0900-\u0dff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff"
)
_IS_UNSPACED = f"[{_UNSPACED}]"
_RUN = rf"[{_UNSPACED}]+|[^\W\d_{_UNSPACED}]{{2,}}"
_REPEATED = r"^(.{1,4}?)\1{2,}.{0,3}$"
# A greeting or thanks in one of these says all that it means to say.
_GREETING_WORDS = """
    hola buenas gracias bonjour bonsoir salut merci hallo servus danke ciao salve buongiorno
    buonasera grazie olá obrigado obrigada hej hei tak kiitos hoi dag bedankt cześć dzień dziękuję
    ahoj dobrý díky merhaba selam teşekkürler привет здравствуйте спасибо привіт вітаю дякую
    здравей γεια ευχαριστώ שלום תודה مرحبا السلام شكرا سلام नमस्ते धन्यवाद szia köszönöm salam
    こんにちは こんばんは ありがとう おはよう
    你好 您好 谢谢 早上好 안녕 안녕하세요 감사합니다 สวัสดี namaste
"""
_GREETINGS = frozenset(_GREETING_WORDS.split())
_LONGEST_GREETING = 20
_AROUND = " \t\n!.,?¡¿！。"
_QUICK_TOKENS = 12
_MOST_SURPRISE = 4.95  # bits for each letter of words that are none: the worst hundredth of words
_SHORT_SURPRISE = 6.5  # the same for words of up to three letters
_MOST_NEIGHBOURS = 0.7  # share of pairs that are neighbours on a keyboard
_LEAST_MASH = 4
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm", "йцукенгшщзхъ", "фывапролджэ", "ячсмитьбю")
_NEIGHBOURS = frozenset(
    pair
    for row in _KEYS
    for first, second in pairwise(row)
    for pair in (first + second, second + first)
)


def substance(text: str) -> float:
    """A number in [0, 1]: 0 for a text without a single word, 1 for one of several words."""
    if len(text) <= _LONGEST_GREETING and text.strip(_AROUND).casefold() in _GREETINGS:
        return 1.0
    known, others = set[str](), set[str]()
    stop_words = any_stop_words()
    for token in text.split(None, _QUICK_TOKENS)[:_QUICK_TOKENS]:
        if len(token) > 1 and token.casefold() in stop_words:
            known.add(token.casefold())
    if len(known) * _KNOWN >= 1:
        return 1.0
    for word in _words(text):
        is_known = not word.isascii() or word in stop_words
        (known if is_known else others).add(word)
        total = _KNOWN * len(known) + _BY_OTHERS[min(len(others), len(_BY_OTHERS) - 1)]
        if total >= 1:
            return 1.0
    return _KNOWN * len(known) + _BY_OTHERS[len(others)]


def _words(text: str) -> Iterator[str]:
    for token in text.split():
        for run in compiled(_RUN).findall(token):
            if compiled(_IS_UNSPACED).match(run):
                characters = sorted(set(run))  # about two of them make a word
                yield from map("".join, zip(characters[::2], characters[1::2], strict=False))
            elif is_word(run):
                yield run.casefold()
                if token.isascii():
                    break  # a path, a name of code or a compound is one word


def is_word(run: str) -> bool:
    """False for letters that nobody would have meant as a word: repeated, in the order of a
    keyboard, or in an order that hardly any word has."""
    lowered = run.casefold()
    if len(set(lowered)) < 2 or (len(lowered) > 5 and compiled(_REPEATED).match(lowered)):
        return False
    pairs = [lowered[at : at + 2] for at in range(len(lowered) - 1)]
    if len(lowered) >= _LEAST_MASH:
        near = sum(pair in _NEIGHBOURS for pair in pairs)
        if near / len(pairs) >= _MOST_NEIGHBOURS:
            return False
    if not lowered.isascii():
        lowered = unicodedata.normalize("NFD", lowered)
        lowered = "".join(one for one in lowered if not unicodedata.combining(one))
    if not lowered.isascii() or not lowered.isalpha() or run.isupper():
        return True  # letters of other alphabets are not judged, nor are abbreviations
    codes = [EDGE, *(ord(letter) - ord("a") for letter in lowered), EDGE]
    table = surprises()
    surprise = sum(table[first][second] for first, second in pairwise(codes))
    limit = _MOST_SURPRISE if len(lowered) > 3 else _SHORT_SURPRISE
    return surprise / (len(codes) - 1) <= limit
