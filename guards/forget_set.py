"""Forget sets: what is to be forgotten, checked before anything is stored.

Which part serves which guard: ``phrases`` are suppressed; ``aliases`` name the subject and ``questions`` ask about it, for the
gate; ``questions`` and ``texts`` train assistants. A set may fill only some of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from guards.errors import InvalidForgetSet
from guards.strict_json import shorten

NAME_PATTERN = r"[a-z0-9][a-z0-9_-]{0,62}"
Name = Annotated[str, StringConstraints(pattern=f"^{NAME_PATTERN}$")]
"""Names of sets and policies: they appear in URLs and in ``model: "<served>:<policy>"``."""

MAX_PHRASE_CHARACTERS = 512
"""Longer texts are not phrases. The bound keeps the window that each decoding step looks at small."""
MAX_ENTRIES = 1_000_000
MAX_TEXT_CHARACTERS = 1_000_000
Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARACTERS, strip_whitespace=True)]


def check_phrases(phrases: Sequence[str]) -> None:
    """Raise InvalidForgetSet naming every phrase that cannot be one."""
    problems = []
    for phrase in phrases:
        shown = repr(phrase if len(phrase) <= 60 else phrase[:57] + "...")
        if not phrase.strip():
            problems.append(f"phrase {shown} is empty; a phrase needs at least one character that is not white space")
        elif len(phrase) > MAX_PHRASE_CHARACTERS:
            problems.append(
                f"phrase {shown} has {len(phrase):,} characters, at most {MAX_PHRASE_CHARACTERS} are allowed; "
                "split it into the shorter phrases that give the knowledge away, or put it under texts"
            )
        elif any("\ud800" <= character <= "\udfff" for character in phrase):
            problems.append(f"phrase {shown} contains half a surrogate pair; save it as valid UTF-8")
    if problems:
        raise InvalidForgetSet(problems)


class Frozen(BaseModel):
    """Immutable, and strict about unknown fields: a misspelt field must not silently mean nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Question(Frozen):
    """A question whose answer is to be forgotten, with other ways to ask it."""

    question: Text
    answer: Text
    paraphrases: tuple[Text, ...] = ()


class ForgetSet(Frozen):
    """One removal request.

    ``match``, ``case_sensitive`` and ``word_boundary`` say how ``phrases`` match. By default they match as running text is read: in
    every letter case, with any white space, apostrophes, quotes and hyphens, without invisible characters and vowel marks, numbers
    in any grouping, and anywhere, also inside longer words. With ``match`` "exact" only letter case is folded; with
    ``word_boundary`` a phrase matches only where it starts a word.
    """

    name: Name
    description: str = Field("", max_length=10_000)
    phrases: tuple[str, ...] = Field((), max_length=MAX_ENTRIES)
    aliases: tuple[Text, ...] = Field((), max_length=MAX_ENTRIES)
    questions: tuple[Question, ...] = Field((), max_length=MAX_ENTRIES)
    texts: tuple[Text, ...] = Field((), max_length=MAX_ENTRIES)
    case_sensitive: bool = False
    word_boundary: bool = False
    match: Literal["folded", "exact"] = "folded"
    requester: str = Field("", max_length=1_000)
    legal_basis: str = Field("", max_length=1_000)
    expires_at: AwareDatetime | None = None

    @model_validator(mode="after")
    def _check(self) -> ForgetSet:
        try:
            check_phrases(self.phrases)
        except InvalidForgetSet as error:
            raise ValueError("; ".join(error.problems)) from None
        if not (self.phrases or self.aliases or self.questions or self.texts):
            raise ValueError("the set is empty; give at least one of phrases, aliases, questions, texts")
        return self

    @property
    def fingerprint(self) -> str:
        """sha256 of the content, whatever the order of its entries; paperwork does not count."""
        content: dict[str, Any] = {
            "phrases": sorted(set(self.phrases)),
            "aliases": sorted(set(self.aliases)),
            "questions": sorted(question.model_dump_json() for question in self.questions),
            "texts": sorted(set(self.texts)),
            "case_sensitive": self.case_sensitive,
            "word_boundary": self.word_boundary,
        }
        if self.match != "folded":  # the default is left out: sets from before this option keep their fingerprints
            content["match"] = self.match
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parse_forget_set(fields: dict[str, Any]) -> ForgetSet:
    """Build a set from untyped fields.

    Raises:
        InvalidForgetSet: lists every problem with its place, value and rule.
    """
    try:
        return ForgetSet.model_validate(fields)
    except ValidationError as error:
        raise InvalidForgetSet(describe_validation(error)) from None


def describe_validation(error: ValidationError) -> list[str]:
    """Pydantic's findings as sentences with place, value (shortened) and rule."""
    sentences = []
    for finding in error.errors(include_url=False, include_context=False):
        place = ".".join(str(part) for part in finding["loc"])
        message = finding["msg"].removeprefix("Value error, ")
        shown = shorten(finding["input"])
        sentences.append(f"{place}: {message} (got {shown})" if place else message)
    return sentences


LINE_KINDS = {
    "phrase": "phrases",
    "alias": "aliases",
    "text": "texts",
}
"""The key of a JSON line, and the field of the set that it fills. Questions have lines of three keys."""
HEADER_FIELDS = ("description", "case_sensitive", "word_boundary", "match", "requester", "legal_basis", "expires_at")


def write_jsonl(forget_set: ForgetSet) -> str:
    """As JSON lines, which `guards.removal_list.read_removal_list` reads (without the name)."""
    fields = forget_set.model_dump(mode="json")
    header = {key: fields[key] for key in HEADER_FIELDS if fields[key] not in ("", None, False, "folded")}
    lines: list[dict[str, Any]] = [{"set": header}] if header else []
    for kind, field in LINE_KINDS.items():
        lines += [{kind: value} for value in fields[field]]
    lines += fields["questions"]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def is_name(text: str) -> bool:
    """Whether `text` may name a set or a policy."""
    return re.fullmatch(NAME_PATTERN, text) is not None
