"""JSON as everybody must read it alike: UTF-8, one object, no key twice, no NaN. Used wherever bytes from outside become fields."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from guards.errors import InvalidJson

_WHITE = re.compile(r"[ \t\n\r]*")
_LINE_END = re.compile(r"\r\n|\n|\r")


def parse_object(content: bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Duplicate keys are refused at any depth: of two values one would be lost without a word.

    Raises:
        InvalidJson: says what is wrong, and where.
    """
    try:
        value = _DECODER.decode(content.decode("utf-8"))
        _check_surrogates(value)
    except UnicodeEncodeError:
        raise InvalidJson(f"{shorten(content)} contains half a surrogate pair (\\ud800 to \\udfff)") from None
    except UnicodeDecodeError as error:
        raise InvalidJson(f"byte {error.start + 1} ({content[error.start]:#04x}) is not UTF-8; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # also numbers of more digits than Python reads
        raise InvalidJson(f"{shorten(content)} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidJson(f"{shorten(content)} must be a JSON object, not {type(value).__name__}")
    return value


def parse_documents(text: str) -> list[tuple[int, Any]]:
    """Parse JSON documents that follow one another, each with the index in ``text`` at which it starts.

    Raises:
        InvalidJson: says what is wrong, and in which line and column.
    """
    documents: list[tuple[int, Any]] = []
    start = _WHITE.match(text, 0).end()  # type: ignore[union-attr]
    while start < len(text):
        try:
            value, end = _DECODER.raw_decode(text, start)
            _check_surrogates(value)
        except UnicodeEncodeError:
            raise InvalidJson(f"{_place(text, start)}: half a surrogate pair (\\ud800 to \\udfff)") from None
        except json.JSONDecodeError as error:
            raise InvalidJson(f"{_place(text, error.pos)}: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise InvalidJson(f"{_place(text, start)}: {error}") from None
        documents.append((start, value))
        start = _WHITE.match(text, end).end()  # type: ignore[union-attr]
        if start < len(text) and not _LINE_END.search(text, end, start):
            raise InvalidJson(f"{_place(text, end)}: a JSON value ends here and the line goes on; put a line break between the two")
    return documents


def shorten(value: Any) -> str:
    """A value as it may stand in a message: at most 80 characters, always encodable."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False, default=repr)
    text = text if len(text) <= 80 else text[:77] + "..."
    return text.encode("utf-8", "backslashreplace").decode()


def _place(text: str, index: int) -> str:
    line_start = max(text.rfind("\n", 0, index), text.rfind("\r", 0, index)) + 1
    return f"line {len(_LINE_END.findall(text, 0, index)) + 1}, column {index - line_start + 1}"


def _check_surrogates(value: Any) -> None:
    """Half a surrogate pair cannot be written down again: raises UnicodeEncodeError."""
    json.dumps(value, ensure_ascii=False).encode("utf-8")


def _int64(digits: str) -> int:
    value = int(digits)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{digits[:24]} does not fit 64 bits")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {shorten(twice)} stands twice in one object; give it once")
    return fields


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:24]} is no finite number; JSON has no others")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_int64, parse_float=_finite, parse_constant=_finite)
