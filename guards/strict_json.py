"""JSON as everybody must read it alike: UTF-8, one object, no key twice. Used wherever bytes from outside become fields."""

from __future__ import annotations

import json
from typing import Any

from guards.errors import InvalidJson


def parse_object(content: bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Duplicate keys are refused at any depth: of two values one would be lost without a word.

    Raises:
        InvalidJson: says what is wrong, and where.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_int=_int64)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair cannot be written down again
    except UnicodeEncodeError:
        raise InvalidJson(f"{shorten(content)} contains half a surrogate pair (\\ud800 to \\udfff)") from None
    except UnicodeDecodeError as error:
        raise InvalidJson(f"byte {error.start + 1} ({content[error.start]:#04x}) is not UTF-8; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # also numbers of more digits than Python reads
        raise InvalidJson(f"{shorten(content)} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidJson(f"{shorten(content)} must be a JSON object, not {type(value).__name__}")
    return value


def shorten(value: Any) -> str:
    """A value as it may stand in a message: at most 80 characters, always encodable."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False, default=repr)
    text = text if len(text) <= 80 else text[:77] + "..."
    return text.encode("utf-8", "backslashreplace").decode()


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
