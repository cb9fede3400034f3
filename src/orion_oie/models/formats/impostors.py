"""Files that are no GGUF file but are taken for one, told by their first bytes. Opens nothing."""

import json
import re
from typing import NamedTuple

SNIFFED_BYTES = 256
"""How many of the first bytes are enough to tell."""

_SHOWN_CHARS = 100
_LARGEST_JSON_HEADER = 100_000_000  # of a safetensors file, as in its original reader
_CONVERT = "convert the original model to GGUF, or fetch a repository that has GGUF files"
_UNPACK = "unpack it first"


class Impostor(NamedTuple):
    """What a file is instead, and what to do about it."""

    what: str
    advice: str


_SIGNS: tuple[tuple[bytes, Impostor], ...] = (
    (
        b"version https://git-lfs",
        Impostor("a Git LFS pointer, not a model", "run 'git lfs pull' in its folder"),
    ),
    *(
        (magic, Impostor("an old GGML file, older than GGUF", _CONVERT))
        for magic in (b"lmgg", b"fmgg", b"tjgg", b"algg", b"nsgg")
    ),
    (b"PK", Impostor("a zip archive or a PyTorch checkpoint", _CONVERT)),
    (b"\x80\x02", Impostor("a PyTorch checkpoint (a pickle)", _CONVERT)),
    (b"\x89HDF", Impostor("an HDF5 file", _CONVERT)),
    (b"\x1f\x8b", Impostor("a gzip archive", f"{_UNPACK} (gunzip, or tar -xzf)")),
    (b"\xfd7zXZ\0", Impostor("an xz archive", f"{_UNPACK} (unxz, or tar -xJf)")),
    (b"\x28\xb5\x2f\xfd", Impostor("a zstd archive", f"{_UNPACK} (unzstd)")),
    (b"BZh", Impostor("a bzip2 archive", f"{_UNPACK} (bunzip2)")),
    (b"7z\xbc\xaf\x27\x1c", Impostor("a 7z archive", _UNPACK)),
    (b"Rar!", Impostor("a rar archive", _UNPACK)),
)

_WEB_PAGE = Impostor(
    "a web page, not a model",
    "use the download link of the file (on Hugging Face: '/resolve/', not '/blob/'), and check the "
    "access rights",
)


def impostor(start: bytes) -> Impostor | None:
    """What a file with these first bytes is; None for a GGUF file and for the unknown.

    `start` is the first `SNIFFED_BYTES` of the file, or all of it.
    """
    for sign, found in _SIGNS:
        if start.startswith(sign):
            return found
    if _is_safetensors(start):
        return Impostor("a safetensors file", _CONVERT)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith((b"<?xml", b"<Error")):
        return Impostor(
            "an answer in XML, not a model",
            "a server refused the download: check the address, its signature and the access rights",
        )
    if text.startswith(b"<"):
        return _WEB_PAGE
    if text.startswith((b"{", b"[")):
        said = _error_in(text)
        return Impostor(
            f"JSON, not a model{said}",
            "a server answered with an error instead of the file: download it again"
            if said
            else "give the path of the .gguf file",
        )
    if start and not start.strip(b"\0"):
        return Impostor("nothing but zeros", "its download has not finished: fetch it again")
    return None


def _is_safetensors(start: bytes) -> bool:
    length = int.from_bytes(start[:8], "little")
    return start[8:9] == b"{" and 2 <= length <= _LARGEST_JSON_HEADER


def _error_in(text: bytes) -> str:
    """The error that a JSON answer reports, as " (it says: ...)", or nothing."""
    found = re.search(rb'"(?:error|message|detail)"\s*:\s*("(?:[^"\\]|\\.)*")', text)
    if found is None:
        return ' (it reports an "error")' if b'"error"' in text else ""
    try:
        said = json.loads(found[1])
    except ValueError:
        return ""
    shown = "".join(c if c.isprintable() else " " for c in said)[:_SHOWN_CHARS]
    return f" (it says: {shown!r})"
