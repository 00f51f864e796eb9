"""Passages of a text that a decoder of a few lines decodes: bytes written as letters, digits or escapes.

Covered: base64 (also URL-safe, without padding, wrapped) of eight characters and more, base32 in either letter case, base85 and
ascii85, hexadecimal, binary in groups of seven or eight, octal and decimal codes, places in the alphabet, backslash escapes of
all kinds, ``U+0048``, ``%48``, ``=48``, HTML references, punycode. A passage counts only if what it decodes to is readable:
printable, most of it letters. So hashes, UUIDs, pictures and code are no passages. Not covered: compression, encryption, passages
with foreign characters in between.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import html
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

MAX_CHARACTERS = 100_000
"""Passages longer than this are looked at up to here."""
_MAX_BASE85 = 2_000
_READABLE = 0.75
"""Of the characters of what is decoded: letters, spaces, and the punctuation of prose."""


_CODE_AGAIN = re.compile(r"[A-Za-z0-9+/_-]{8,}\n?(?:[A-Za-z0-9+/_-]+\n?)*={0,2}|[A-Za-z0-9+/_-]{6,7}={1,2}")
"""What is decoded may be base64 or hexadecimal itself."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a text, [start, end), and what it stands for."""

    start: int
    end: int
    text: str
    how: str
    least: int = 3  # letters that a name in it must have


def is_readable(decoded: str) -> bool:
    """Whether this may be words: all of it printable, most of it letters, of one or two scripts."""
    if not decoded or not all(c.isprintable() or c.isspace() for c in decoded):
        return False
    letters = sum(c.isalpha() for c in decoded)
    plain = letters + sum(c in " .,'?!-\n" for c in decoded)
    if _CODE_AGAIN.fullmatch(decoded):
        return True
    return letters >= 2 and plain >= _READABLE * len(decoded) and (decoded.isascii() or _is_one_script(decoded))


def _is_one_script(text: str) -> bool:
    scripts = {unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()}
    return len(scripts) <= 3 and "?" not in scripts


_BASE64 = re.compile(
    r"(?<![A-Za-z0-9+/_-])(?:[A-Za-z0-9+/_-]{8,}(?:\r?\n[A-Za-z0-9+/_-]{4,})*(?:\r?\n[A-Za-z0-9+/_-]{2,3}=)?={0,2}|[A-Za-z0-9+/_-]{6,7}={1,2})"
)
_WORDLIKE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_BASE32 = re.compile(r"(?<![A-Za-z0-9])(?:[A-Z2-7]{8,}|[a-z2-7]{8,})={0,6}(?![A-Za-z0-9])")
_BASE85 = re.compile(r"<~([!-uz\s]{5,2000})~>|(?<!\S)(?=\S{0,60}[!#$%&()*+;<=>?@^`{|}~])[!-~]{10,2000}(?!\S)")
_HEX = re.compile(r"(?<![0-9A-Za-z])(?:(?:\\x|0x)?[0-9a-fA-F]{2}(?:[ :,_.-]{1,2}(?=(?:0x)?[0-9a-fA-F]{2}))?){4,}(?![0-9A-Za-z])")
_BINARY = re.compile(r"(?<!\w)[01]{7,8}(?:[ ,_-]?[01]{7,8}){2,}(?!\w)")
_NUMBERS = re.compile(r"(?<![\w.])\d{1,4}(?:[ ,;.:/|\\_-]{1,3}\d{1,4}){2,}(?!\w)")
_NUMBER = re.compile(r"\d+")
_FEWEST_NUMBERS = 3
_LAST_LATIN = 0x24F
_ESCAPES = re.compile(
    r"(?P<bytes>(?:%[0-9a-fA-F]{2}|\\x[0-9a-fA-F]{2}|\\[0-3][0-7]{2})+|(?:=[0-9A-F]{2}){2,})"
    r"|(?P<unicode>(?:\\u\{[0-9a-fA-F]{1,6}\}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\N\{[A-Z0-9 -]{3,60}\}){1,})"
    r"|(?P<points>[uU]\+[0-9a-fA-F]{4,6}(?:[ ,]{0,2}[uU]\+[0-9a-fA-F]{4,6})*)"
    r"|(?P<html>(?:&(?:#\w{1,8}|[A-Za-z]\w{1,31});)+)"
    r"|(?P<puny>(?<!\w)xn--[A-Za-z0-9-]{2,60})"
)
_BYTE = re.compile(r"[%=]([0-9a-fA-F]{2})|\\x([0-9a-fA-F]{2})|\\([0-7]{2,3})")
_UNICODE = re.compile(r"\\u\{([0-9a-fA-F]{1,6})\}|\\[uU]([0-9a-fA-F]{4,8})|\\N\{([^}]*)\}|[uU]\+([0-9a-fA-F]{4,6})[ ,]*")


def passages(text: str) -> Iterator[Passage]:
    """Every passage, those that are surest first; they may overlap."""
    if "%" in text or "\\" in text or "&" in text or "=" in text or "+" in text or "xn--" in text:
        yield from _escaped(text)
    digits = any(character in text for character in "0123456789")
    if digits:
        yield from _runs(text, _HEX, "hex", _from_hex)
        yield from _runs(text, _BINARY, "binary", _from_binary)
        yield from _numbered(text)
    yield from _runs(text, _BASE32, "base32", _from_base32)
    for run in _BASE64.finditer(text):
        yield from _base64(text, run.start(), run.end())
    if not text.isalnum():
        yield from _runs(text, _BASE85, "base85", _from_base85)


def _runs(text: str, pattern: re.Pattern[str], how: str, decode: Callable[[str], str]) -> Iterator[Passage]:
    for run in pattern.finditer(text):
        try:
            decoded = decode(run[0][:MAX_CHARACTERS])
        except (ValueError, binascii.Error):
            continue
        if is_readable(decoded):
            yield Passage(run.start(), run.end(), decoded, how)


def _base64(text: str, start: int, end: int) -> Iterator[Passage]:
    """A run, or the parts of one that is joined to other words by a hyphen or the like."""
    run = text[start:end]
    if _WORDLIKE.fullmatch(run.rstrip("=")):
        return
    try:
        decoded = _from_base64(run[:MAX_CHARACTERS])
    except (ValueError, binascii.Error):
        decoded = ""
    if is_readable(decoded):
        yield Passage(start, end, decoded, "base64")
    elif any(joint in run for joint in "-_/+") and len(run) < _MAX_BASE85:
        for part in re.finditer(r"[A-Za-z0-9]{8,}={0,2}|[A-Za-z0-9]{6,7}={1,2}", run):
            if part.end() - part.start() < len(run):
                yield from _base64(text, start + part.start(), start + part.end())


def _from_base64(run: str) -> str:
    run = re.sub(r"\s", "", run).rstrip("=").replace("-", "+").replace("_", "/")
    return base64.b64decode(run[: len(run) - (len(run) % 4 == 1)] + "=" * (-len(run) % 4), validate=True).decode()


def _from_base32(run: str) -> str:
    run = run.rstrip("=").upper()
    if not any(map(str.isdigit, run)) and len(run) < 16:
        raise ValueError("a word")
    return base64.b32decode(run + "=" * (-len(run) % 8)).decode()


def _from_base85(run: str) -> str:
    if run.startswith("<~"):
        return base64.a85decode(run, adobe=True).decode()
    for decode in (base64.b85decode, base64.a85decode):
        try:
            if is_readable(decoded := decode(run).decode()):
                return decoded
        except (ValueError, binascii.Error):
            continue
    return ""


def _from_hex(run: str) -> str:
    return bytes.fromhex(re.sub(r"\\x|0x|[ :,_.-]", "", run)).decode()


def _from_binary(run: str) -> str:
    groups = re.split(r"[ ,_-]", run)
    bits = "".join(groups)
    sizes = {len(group) for group in groups}
    size = sizes.pop() if len(sizes) == 1 and len(groups) > 1 else 8 if len(bits) % 8 == 0 else 7
    if len(bits) % size:
        return ""
    return bytes(int(bits[i : i + size], 2) for i in range(0, len(bits), size)).decode()


def _numbered(text: str) -> Iterator[Passage]:
    """Numbers that are codes of letters: decimal, octal, or places in the alphabet."""
    for run in _NUMBERS.finditer(text):
        numbers = [(number[0], run.start() + number.start()) for number in _NUMBER.finditer(run[0][:MAX_CHARACTERS])]
        between = [text[place + len(number) : after] for (number, place), (_, after) in pairwise(numbers)]
        if (passage := _from_numbers(numbers, between)) is not None:
            yield passage
            continue
        # Other numbers beside them: each part with the same separators, also without its first or last number.
        usual = max(between, key=between.count)
        bounds = [0, *(i + 1 for i, separator in enumerate(between) if separator != usual), len(numbers)]
        for low, high in pairwise(bounds):
            for first, last in ((low, high), (low + 1, high), (low, high - 1), (low + 1, high - 1)):
                if last - first >= _FEWEST_NUMBERS:
                    passage = _from_numbers(numbers[first:last], between[first : last - 1])
                    if passage is not None:
                        yield passage
                        break


def _from_numbers(numbers: Sequence[tuple[str, int]], between: Sequence[str]) -> Passage | None:
    """What numbers, each with its place, stand for; None if nothing that is readable."""
    values = [int(number) for number, _ in numbers]
    start, end = numbers[0][1], numbers[-1][1] + len(numbers[-1][0])
    if all(1 <= value <= 26 for value in values):
        wide = min(set(between), key=between.count) if len(set(between)) > 1 else None  # what stands between words
        words = "".join(chr(96 + value) + (" " if gap == wide else "") for value, gap in zip(values, [*between, ""], strict=True))
        return Passage(start, end, words, "places in the alphabet", 5)
    mixed = max(values) > _LAST_LATIN and any(65 <= value <= _LAST_LATIN for value in values)  # a year beside codes
    readings = ["".join(map(chr, values))] if min(values) >= 32 and not mixed else []
    if all(set(number) <= set("01234567") and 0o40 <= int(number, 8) <= 0o176 for number, _ in numbers):
        readings.append("".join(chr(int(number, 8)) for number, _ in numbers))
    decoded = "\n".join(filter(is_readable, readings))
    return Passage(start, end, decoded, "character codes") if decoded else None


def _escaped(text: str) -> Iterator[Passage]:
    for run in _ESCAPES.finditer(text):
        written = run[0]
        if run["bytes"]:
            raw = bytes(int(b or x, 16) if b or x else int(o, 8) & 255 for b, x, o in _BYTE.findall(written))
            decoded = raw.decode("utf-8", "ignore")
        elif run["html"]:
            decoded = html.unescape(written)
        elif run["puny"]:
            try:
                decoded = codecs.decode(written[4:].encode(), "punycode")
            except (UnicodeError, ValueError):
                continue
        else:
            decoded = "".join(_character(*groups) for groups in _UNICODE.findall(written))
            decoded = decoded.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")  # JSON writes emoji in two halves
        if decoded and decoded != written:
            yield Passage(run.start(), run.end(), decoded, "escapes", 1)


def _character(braced: str, fixed: str, name: str, point: str) -> str:
    if name:
        try:
            return unicodedata.lookup(name)
        except KeyError:
            return ""
    code = int(braced or fixed or point, 16)
    return chr(code) if code <= 0x10FFFF else ""
