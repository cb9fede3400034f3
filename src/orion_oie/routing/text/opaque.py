"""Opaque pieces of a prompt: web and mail addresses, digests, and signs that no screen shows.

Their letters say nothing about what is asked: an address may contain the name of any topic. Routers
read a placeholder instead. Nothing is opened, and a piece that may be a name of code (`java.net.X`,
`logger.info(`, `main.py`) stays as it is.
"""

import re
from typing import NamedTuple

from orion_oie.routing.text.compiled import compiled

PLACE, MAIL, BLOB = "weblink", "mailaddress", "datablob"
PLACEHOLDERS = frozenset({PLACE, MAIL, BLOB})

# Endings of names of hosts that stand without a path; endings of files and names of code that never
# are one.
_COMMON = (
    "com|org|net|edu|gov|int|io|info|biz|app|dev|news|blog|shop|site|online|xyz|tv|co|uk|us|eu|ca|au|de"
    "|fr|es|it|pt|nl|be|ch|at|pl|cz|dk|no|se|fi|ru|ua|cn|jp|kr|br|mx|ar|cl|za"
    "|example|museum|travel|tech|store|cloud|ai|club|media|press|world|wiki|ie|nz|sg|hk|tw|th|vn|gr"
    "|hu|ro|tr|il|ng|ke|ae|sa"
)
_FILES = (
    "js|ts|jsx|tsx|py|rb|rs|go|java|kt|swift|cpp|cc|hpp|cs|php|sh|bash|css|scss|html?|xml|json|ya?ml"
    "|toml|ini|cfg|conf|md|txt|csv|tsv|sql|log|lock|so|exe|dll|jar|zip|tar|gz|png|jpe?g|gif|svg|pdf"
)
_ADDRESS = (
    r"(?:(?:https?|ftp|file|wss?)://|www\.)[^\s<>\"'`|]+"
    r"|(?P<mail>(?:mailto:)?[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,24}){1,4})"
    rf"|(?<![\w./@\\-])(?:[a-zA-Z0-9][\w-]{{0,62}}\.){{1,5}}"
    rf"(?:(?!(?:{_FILES})\b)[a-z]{{2,24}}(?::\d{{2,5}})?/(?!/)[^\s<>\"'`|]*"
    rf"|(?:{_COMMON})(?![\w(/-]|\.\w|\(\)))"
)
_LEAST_BLOB = 16
_HINT = r"\.[A-Za-z]{2}|://"  # a text without one has no address
_TRAILING = ".,;:!?)]}*"
_BLOB = (
    r"\b(?:[0-9a-fA-F]{8}-[0-9a-fA-F-]{20,40}|(?=[a-fA-F]{0,40}\d)(?=\d{0,60}[a-fA-F])[0-9a-fA-F]{16,})\b"
    r"|(?<![\w/+=])(?=[A-Za-z/+]{0,80}\d)(?=[^A-Z\s]{0,80}[A-Z])(?=[^a-z\s]{0,80}[a-z])"
    r"[A-Za-z0-9+/_-]{24,}={0,2}(?![\w/+=])"
)
_UNSEEN = (
    r"\x1b\[[0-9;]{0,16}[A-Za-z]|\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\^[@-_]|&(?:nbsp|zwnj|zwj|shy);"
    "|[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]"
)
_UNSEEN_SIGNS = "\x1b\\^&"


class Clear(NamedTuple):
    """A text with a placeholder for each opaque piece, and the addresses that it had."""

    text: str
    addresses: tuple[str, ...] = ()


def without_opaque(text: str) -> Clear:
    """The text with a placeholder for each opaque piece, and without signs that are not shown."""
    addresses: list[str] = []

    def placeholder(found: re.Match[str]) -> str:
        address = found[0].rstrip(_TRAILING)
        addresses.append(address)
        return (PLACE if found["mail"] is None else MAIL) + found[0][len(address) :]

    if compiled(_HINT).search(text):
        text = compiled(_ADDRESS).sub(placeholder, text)
    if not text.isascii() or any(sign in text for sign in _UNSEEN_SIGNS):
        text = compiled(_UNSEEN).sub("", text)
    if len(text) >= _LEAST_BLOB and max(map(len, text.split()), default=0) >= _LEAST_BLOB:
        text = compiled(_BLOB).sub(BLOB, text)
    return Clear(text, tuple(addresses))
