"""Probes: a chat key that asks, by constraining an answer, whether a text is forgotten, and how often it may.

An answer that may only be one text, or one of two, tells whether that text is suppressed. Such constraints are everyday use (a
classifier's labels, a tool's enum), so they are not refused. But a key without the scope ``compare`` may name only so many
different sets of phrases in force within an hour, or make a guard end so many different constrained answers. After that its
constrained requests, all of them, get a 429 until the hour is over: what is refused then tells nothing. The same question again
costs nothing, so that an application whose schema happens to hold a name works on.

Covered: literal texts of choices, enums, constants, property names, patterns, grammars, allowed and favoured tokens; answers that
a guard ended. Not covered: patterns that spell a phrase in another way, conversations without constraints, what a few questions
an hour add up to; several keys count for themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from cachetools import LRUCache, TTLCache
from prometheus_client import Counter

from guards.errors import GuardError
from guards.suppression.artifact import CompiledPhrases
from guards.suppression.declaration import Suppress
from guards.suppression.vocabulary import Vocabulary
from guards.types import Plan
from serve.http.grammars import CONSTRAINTS
from serve.registry.snapshot import Caller

WINDOW_S = 3_600.0
_MOST_KEYS = 10_000
_FAVOURED = 5.0
"""From this on, a ``logit_bias`` counts as a constraint: it makes a token likely whatever its logit is."""
_LITERALS = ("enum", "const", "choice")
_PATTERNS = ("pattern", "regex", "grammar")
_SYNTAX = re.compile(r"\\[bBdDsSwWAZ]|[\\()\[\]?*+^$\"']|\{[\d,]*\}")
_probes = Counter("lethe_probes_total", "Constrained requests that named what is forgotten, or were ended for it.", ["key"])


class TooManyProbes(Exception):
    """A key has asked too often what is forgotten."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.message, self.retry_after_s = message, retry_after_s


class Probes:
    """One per API process.

    Args:
        most: probes an hour, of one key.
        phrases: loads compiled phrases by fingerprint.
        vocabulary: the served model's.
        seconds: a clock that does not jump.
    """

    def __init__(
        self,
        most: int,
        phrases: Callable[[str], CompiledPhrases],
        vocabulary: Vocabulary,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._phrases = phrases
        self._vocabulary = vocabulary
        self._seconds = seconds
        self._seen: LRUCache[str, TTLCache[str, float]] = LRUCache(
            _MOST_KEYS
        )  # key -> what it asked for, as a digest -> when first

    def check(self, caller: Caller, fields: dict[str, Any], plan: Plan) -> str | None:
        """Look at a request before it is answered.

        Returns:
            What to tell `ended` if a guard ends the answer; None if that would tell nothing new.

        Raises:
            TooManyProbes: it is constrained, and its key has probed too often.
        """
        if not plan.artifacts_of(Suppress) or "compare" in caller.scopes or not _constrained(fields):
            return None
        seen = self._within_the_hour(caller.name)
        named = self._named(fields, plan)
        asked = _digest(sorted(named) if named else [fields.get(name) for name in _CONSTRAINING])
        if len(seen) >= self._most and asked not in seen:
            wait = max(1, int(WINDOW_S - (self._seconds() - min(seen.values(), default=0.0))))
            raise TooManyProbes(
                f"{caller.name} has asked for forgotten texts by {len(seen)} different constraints within an hour; its"
                f" constrained requests are answered again in {wait} s (keys of scope 'compare' have no such limit)",
                wait,
            )
        if named:
            self._note(caller.name, asked)
            return None
        return asked

    def ended(self, caller: Caller, asked: str) -> None:
        """A guard ended the answer to a constrained request that named nothing that could be read."""
        self._note(caller.name, asked)

    def _note(self, key: str, asked: str) -> None:
        seen = self._within_the_hour(key)
        if asked not in seen:
            seen[asked] = self._seconds()
            _probes.labels(key).inc()

    def _within_the_hour(self, key: str) -> TTLCache[str, float]:
        if key not in self._seen:
            self._seen[key] = TTLCache(math.inf, ttl=WINDOW_S, timer=self._seconds)
        return self._seen[key]

    def _named(self, fields: dict[str, Any], plan: Plan) -> set[str]:
        """The phrases in force that a request's constraints name, as written there, but casefolded."""
        text = "\n".join(text for text in self._texts(fields) if text)
        try:
            found = [span for fingerprint in plan.artifacts_of(Suppress) for span in self._phrases(fingerprint).find(text)]
        except GuardError:
            return set()  # the request will be refused for it
        return {text[start:end].casefold() for start, end in found}

    def _texts(self, fields: dict[str, Any]) -> Iterator[str]:
        for name in CONSTRAINTS:
            yield from _literals(fields.get(name))
        bias = fields.get("logit_bias")
        favoured = [key for key, value in bias.items() if _number(value) >= _FAVOURED] if isinstance(bias, dict) else []
        for tokens in (fields.get("allowed_token_ids"), favoured):
            listed = map(str, dict.fromkeys(map(str, tokens))) if isinstance(tokens, list) else ()
            known = [int(each) for each in listed if each.isdecimal() and len(each) < 10]
            spelled = [
                self._vocabulary.text_of([each]).decode("utf-8", "replace") for each in known if each < self._vocabulary.size
            ]
            yield from spelled
            yield "".join(spelled)


_FORMATS = ("response_format", "text", "output_config", "format")
"""Fields that may also say that text is wanted, which constrains nothing."""
_ALWAYS = ("allowed_token_ids", *(name for name in CONSTRAINTS if name not in _FORMATS))
_CONSTRAINING = (*CONSTRAINTS, "allowed_token_ids", "logit_bias", "tool_choice")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).hexdigest()


def _constrained(fields: dict[str, Any]) -> bool:
    """Whether more than the model decides what may be said."""
    if any(fields.get(name) for name in _ALWAYS) or any(_asks_for_a_form(fields.get(name)) for name in _FORMATS):
        return True
    bias = fields.get("logit_bias")
    return isinstance(bias, dict) and any(_number(value) >= _FAVOURED for value in bias.values())


def _asks_for_a_form(value: Any) -> bool:
    """Whether a field says more than that text is wanted."""
    if not isinstance(value, dict):
        return bool(value) and not isinstance(value, str)
    inner = value.get("format")
    kind = inner if isinstance(inner, dict) else value
    return bool(kind) and kind.get("type") != "text"


def _literals(value: Any) -> Iterator[str]:
    """Every text that a schema lets an answer consist of; patterns and grammars without their signs."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += each
        if not isinstance(each, dict):
            continue
        for key, item in each.items():
            if key in _LITERALS:
                yield from (str(text) for text in (item if isinstance(item, list) else [item]))
            elif key in _PATTERNS and isinstance(item, str):
                yield _SYNTAX.sub("", item)
            elif key == "properties" and isinstance(item, dict):
                yield from item
                waiting += item.values()
            elif key == "json" and isinstance(item, str):
                yield item
            else:
                waiting.append(item)


def _number(value: Any) -> float:
    """As vLLM reads it, which takes numbers as texts."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
