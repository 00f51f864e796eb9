"""How large a grammar becomes that a client asks for, told before the engine compiles it.

Compiling stops the engine for everybody. What takes long is the number of literal texts (20,000 entries of an enum: 15 s on one
core, 100,000: 109 s; xgrammar 0.2) and counts that multiply one another. Both are bounded here, over all constraints of a request
together.

Not covered: how long a pattern takes to match, and grammars in EBNF beyond their counts and their size.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

CONSTRAINTS = ("structured_outputs", "response_format", "text", "output_config", "tools", "guided_json", "format")
"""Fields of requests that hold schemas, patterns, choices or grammars."""
MOST_LITERALS = 2_000
"""Entries of enums and choices."""
MOST_REPEATED = 100_000
"""What counts come to where they multiply one another."""
MOST_CHARACTERS = 262_144
"""Of a request's constraints as JSON."""
MOST_VISITED = 100_000
"""Parts of a schema that are looked at, those behind references as often as they are met."""
DEEPEST = 64
_ITEMS = ("minItems", "maxItems", "minContains", "maxContains")
_LENGTHS = ("minLength", "maxLength")
_PROPERTIES = ("minProperties", "maxProperties")
_COUNT = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")
_TEXTS = ("regex", "pattern", "grammar")
_JSON = ("json", "structural_tag")


class TooLarge(ValueError):
    """A grammar that would stop the engine. Says what is too large, the bound, and what to do."""


def check_size(fields: dict[str, Any]) -> None:
    """Bound everything in a body that becomes a grammar.

    Raises:
        TooLarge: names the field.
    """
    literals = 0
    for name in CONSTRAINTS:
        value = fields.get(name)
        if not isinstance(value, dict | list):
            continue
        if (characters := len(json.dumps(value))) > MOST_CHARACTERS:
            raise TooLarge(
                f"{name} has {characters:,} characters, this server's limit is {MOST_CHARACTERS:,}; ask for less at once"
            )
        size = _Size(value)
        size.measure(value, 1, 0)
        literals += size.literals
        if literals > MOST_LITERALS:
            raise TooLarge(f"{name} lists {literals:,} texts to choose from, this server's limit is {MOST_LITERALS:,}")
        if size.repeated > MOST_REPEATED:
            raise TooLarge(f"{name} asks for {size.repeated:,} repetitions, this server's limit is {MOST_REPEATED:,}")
        if size.deepest > DEEPEST:
            raise TooLarge(f"{name} is nested {size.deepest} deep, this server's limit is {DEEPEST}")


class _Size:
    """What was found in one field."""

    def __init__(self, value: Any) -> None:
        self.literals = 0
        self.repeated = 0
        self.deepest = 0
        self._whole = value
        self._definitions = _definitions(value)
        self._repeated_by: dict[str, int] = {}  # a reference -> the most often that it was met with
        self._following: set[str] = set()
        self._visited = 0

    def measure(self, value: Any, times: int, depth: int) -> None:
        """Walk through a value that stands where it is repeated so many times."""
        self.deepest = max(self.deepest, depth)
        self._visited += 1
        if self._visited > MOST_VISITED:
            raise TooLarge(f"the constraints expand to more than {MOST_VISITED:,} parts, this server's limit; ask for less at once")
        if depth > DEEPEST:
            return
        if isinstance(value, list):
            for item in value:
                self.measure(item, times, depth + 1)
        if not isinstance(value, dict):
            return
        for name in ("enum", "choice"):
            if isinstance(value.get(name), list):
                self.literals += len(value[name])
        self.literals += "const" in value
        if isinstance(value.get("properties"), dict):
            self.literals += len(value["properties"])
        inner = times * max(_most(value, _ITEMS), _most(value, _PROPERTIES))
        self.repeated = max(self.repeated, inner, times * _most(value, _LENGTHS))
        self._follow(value.get("$ref"), inner, depth)
        for key, item in value.items():
            if key in _TEXTS and isinstance(item, str):
                self.repeated = max(self.repeated, times * _repetitions(item))
                self.literals += item.count("|")
            elif key in _JSON and isinstance(item, str):
                parsed = _parsed(key, item)
                self._definitions |= _definitions(parsed)
                self.measure(parsed, inner, depth + 1)
            elif key not in ("enum", "choice"):
                self.measure(item, inner, depth + 1)

    def _follow(self, reference: Any, times: int, depth: int) -> None:
        """Measure what a reference stands for, unless it was measured with as many repetitions. A cycle is one recursive rule."""
        if not isinstance(reference, str) or self.repeated > MOST_REPEATED:
            return
        name = unquote(reference.rsplit("/", 1)[-1]).replace("~1", "/").replace("~0", "~")
        if name in self._following or times <= self._repeated_by.get(name, 1):  # once is what it is met with where it stands
            return
        if reference.rstrip("/") == "#":
            return  # the whole again, inside itself
        self._repeated_by[name] = times
        self._following.add(name)
        for definition in self._definitions.get(name, [self._whole]):  # what cannot be found is part of the whole
            self.measure(definition, times, depth + 1)
        self._following.discard(name)


def _definitions(value: Any) -> dict[str, list[Any]]:
    """Everything that references may name, by the last part of its name; two schemas may define the same."""
    found: dict[str, list[Any]] = {}
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            for name in ("$defs", "definitions", "properties"):
                for key, definition in each[name].items() if isinstance(each.get(name), dict) else ():
                    found.setdefault(key, []).append(definition)
        waiting += each.values() if isinstance(each, dict) else each if isinstance(each, list) else []
    return found


def _parsed(name: str, text: str) -> Any:
    """A schema that is given as a text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise TooLarge(f"structured_outputs.{name} cannot be read as JSON; send it as an object") from None


def _most(value: dict[str, Any], names: tuple[str, ...]) -> int:
    counts = [value.get(name) for name in names]
    return max([1, *(int(min(count, 2**31)) for count in counts if isinstance(count, int | float) and count == count)])


def _repetitions(pattern: str) -> int:
    """What the counts of a pattern come to: those inside one another multiply. Brackets are counted, not parsed."""
    largest, stack = 1, [1]  # for each open bracket, the most that is repeated inside it
    i = 0
    closed = 1
    while i < len(pattern):
        character = pattern[i]
        if character == "\\":
            closed, i = 1, i + 2
            continue
        if character == "[":  # brackets in it are characters
            end = pattern.find("]", i + 2)
            closed, i = 1, end + 1 if end >= 0 else i + 1
            continue
        if character == "(":
            stack.append(1)
            closed = 1
        elif character == ")" and len(stack) > 1:
            closed = stack.pop()
            stack[-1] = max(stack[-1], closed)
        elif character == "{" and (count := _COUNT.match(pattern, i)):
            times = max([1, *(int(digits[:10]) for digits in count.groups() if digits)])
            closed *= times
            stack[-1] = max(stack[-1], closed)
            largest = max(largest, closed)
            i = count.end()
            continue
        else:
            closed = 1
        i += 1
    return largest
