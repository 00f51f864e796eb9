"""Texts inside texts: what a reader would decode, decoded, to a bounded depth and size.

Covered: base64 and base32, hexadecimal, percent and HTML and backslash escapes, rot13, the whole text backwards. Not covered:
ciphers with a key, compression, encodings of encodings beyond `DEPTH`, pictures.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import html
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import unquote

from guards.errors import GuardError
from guards.similarity.skeleton import is_invisible, plain_letters

DEPTH = 2
MAX_READINGS = 64
"""Of one text. One that has more is an attack on time, or on this bound, and is not read at all."""
MAX_CHARACTERS = 100_000
"""Runs longer than this are looked at up to here."""

_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{12,}(?:\r?\n[A-Za-z0-9+/_-]{4,})*={0,2}")
_BASE32 = re.compile(r"\b[A-Z2-7]{16,}={0,6}")
_HEX = re.compile(r"(?<![0-9A-Za-z])(?:\\x|0x)?(?:[0-9a-fA-F]{2}[ :,]?(?:\\x|0x)?){5,}[0-9a-fA-F]{2}")
_ESCAPE = re.compile(r"\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|%[0-9a-fA-F]{2}|&(?:#\w{1,8}|\w{1,32});")
_CHARACTER = re.compile(r"&(?:#\w{1,8}|\w{1,32});")
_WORD = re.compile(r"\w+")
_SPACED = re.compile(r"(?<![^\W_])(?:[^\W_][ .\-_*·]{1,3}){3,}[^\W_](?![^\W_])")  # letters are no separators: else exponential
_WHOLE = ("", "hex", "base32", "base64", "escapes")
"""Readings of which the whole is read again in other letters; of a text that was turned, nobody would."""
_COMMON = frozenset("etaoinsrh")


class TooMuchToRead(GuardError):
    """A text that would take too long to read. It is refused, since what is not read cannot be judged."""


@dataclass(frozen=True, slots=True)
class View:
    """One reading of a text."""

    text: str
    how: str  # "plain", or the decoding that was undone
    start: int  # the part of the original text that it stands for
    end: int


def visible(text: str) -> str:
    """The text without invisible characters, in compatibility form, white space as it is."""
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFKC", text) if not is_invisible(c))


def readings(text: str) -> list[View]:
    """The text itself and everything decoded from it, nearest first.

    Raises:
        TooMuchToRead: there are more than `MAX_READINGS`.
    """
    found, level = [View(text, "plain", 0, len(text))], [View(text, "", 0, len(text))]
    for depth in range(DEPTH):
        inner: list[View] = []
        for source in level:
            for run in _decode(source.text, whole=source.how in _WHOLE):
                # Inside something decoded, a place stands for all of it.
                start, end = (run.start, run.end) if depth == 0 else (source.start, source.end)
                inner.append(View(run.text, f"{source.how} {run.how}".strip(), start, end))
                if len(found) + len(inner) > MAX_READINGS:
                    raise TooMuchToRead(f"the text holds more than {MAX_READINGS} encoded passages; send fewer at once")
        found += inner
        level = inner
    return found


def reads_better(text: str, decoded: str) -> bool:
    """Whether ``decoded`` looks like words more than ``text`` does, by how common its letters are."""

    def commonness(candidate: str) -> float:
        letters = [c for c in candidate.lower() if "a" <= c <= "z"]
        return sum(c in _COMMON for c in letters) / len(letters) if len(letters) >= 8 else 0.0

    return commonness(decoded) > commonness(text) + 0.1


def _decode(text: str, *, whole: bool) -> Iterator[View]:
    """Every run that decodes to readable text, and with ``whole`` the text itself, turned and in plain letters."""
    for pattern, how, decode in _RUNS:
        for run in pattern.finditer(text):
            try:
                decoded = decode(run[0][:MAX_CHARACTERS]).decode("utf-8")
            except (ValueError, binascii.Error):
                continue
            if all(c.isprintable() or c.isspace() for c in decoded) and any(map(str.isalpha, decoded)):
                yield View(decoded, how, run.start(), run.end())
    if _ESCAPE.search(text):
        plain = re.sub(r"\\u([0-9a-fA-F]{4})|\\x([0-9a-fA-F]{2})", lambda m: chr(int(m[1] or m[2], 16)), text)
        plain = _CHARACTER.sub(lambda reference: html.unescape(reference[0]), unquote(plain))
        plain = plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON writes emoji in two halves
        if plain != text:
            yield View(plain, "escapes", 0, len(text))
    if whole:
        if (plain := _in_plain_letters(text)) != text:
            yield View(plain, "letters", 0, len(text))
        for how, other in (("rot13", codecs.encode(text, "rot13")), ("backwards", text[::-1])):
            yield View(other, how, 0, len(text))


def _in_plain_letters(text: str) -> str:
    """Look-alikes inside words of other letters, leet and spaced-out letters, as they are meant to be read."""
    text = _WORD.sub(lambda word: plain_letters(word[0]) if _mixed(word[0]) else word[0], visible(text))
    return _SPACED.sub(lambda run: " ".join(re.sub(r"\W|_", "", part) for part in re.split(r" {2,}", run[0])), text)


def _mixed(word: str) -> bool:
    ascii_letters = sum(c.isascii() and c.isalpha() for c in word)
    others = sum(not c.isascii() or c.isdigit() for c in word)
    return bool(ascii_letters and others) and any(c.isalpha() for c in word)


def _from_base64(run: str) -> bytes:
    run = re.sub(r"\s", "", run).rstrip("=").replace("-", "+").replace("_", "/")
    return base64.b64decode(run[: len(run) - (len(run) % 4 == 1)] + "=" * (-len(run) % 4), validate=True)


_RUNS: tuple[tuple[re.Pattern[str], str, Callable[[str], bytes]], ...] = (
    (_HEX, "hex", lambda run: bytes.fromhex(re.sub(r"\\x|0x|[ :,]", "", run))),
    (_BASE32, "base32", lambda run: base64.b32decode(run.rstrip("=") + "=" * (-len(run.rstrip("=")) % 8))),
    (_BASE64, "base64", _from_base64),
)
