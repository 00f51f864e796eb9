"""What people hand over, read as a forget set: the bytes of a file or of a request's body.

What it reads: JSON lines (the format of `guards.forget_set.write_jsonl`), a JSON array of such objects or of plain strings, JSON
objects printed over several lines, the object that HTTP takes (``{"phrases": [...], ...}``), rows of TOFU with the dataset's own
keys, one column of a CSV file, and plain lists with one entry a line. In UTF-8, UTF-16 or UTF-32, with any line ends, with byte
order marks at the start of any line.

What it does not read: other encodings, spreadsheets and documents, more than one column of a CSV file. Such a file is refused
with one line that says what it is.

Beyond the form, the entries are checked for what nobody means: damaged characters, HTML entities, an expiry in the past, phrases
that would take ordinary text from every answer. ``force`` lets these pass. Stored sets are not checked again, see
`guards.forget_set.ForgetSet`.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ValidationError

from guards.errors import InvalidForgetSet
from guards.forget_set import (
    HEADER_FIELDS,
    LINE_KINDS,
    MAX_TEXT_CHARACTERS,
    ForgetSet,
    check_phrases,
    describe_validation,
    parse_forget_set,
)
from guards.list_formats import (
    RIGHT_LINE,
    Unreadable,
    check_encoding,
    column_cells,
    decode,
    describe_other_file,
    json_entries,
    plain_lines,
    table_without_doubt,
)
from guards.ordinary import ordinary_counts, sample_words, why_never_meant
from guards.removal_words import (
    MAX_PROBLEMS,
    NEVER_MEANT,
    Problems,
    clean_ends,
    counted,
    limit,
    short_names,
    short_words,
    some_reasons,
    surname_first,
    times,
    undamaged,
)
from guards.strict_json import shorten

Kind = Literal["phrase", "alias"]

_FORCE = "--force, over HTTP ?force=true, adds it as it stands"
_SHOWN_COUNTS = 10
_CHECKED_CHARACTERS = 10_000
"""Characters of a text that are checked for a wrong encoding, which would have damaged its beginning too."""

_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_FIELDS = {field: kind for kind, field in LINE_KINDS.items()}
_BODY_KEYS = {*_FIELDS, "questions"}
_QUESTION_KEYS = {"question", "answer", "paraphrases", "paraphrased_question"}
_LEFT_OUT_KEYS = {
    "paraphrased_answer",
    "perturbed_answer",
    "perturbed_question",
    "paraphrased_perturbed_answer",
    "perturbed_paraphrased_answer",
    *(f"option{number}" for number in range(1, 5)),
}
"""Columns of TOFU (arXiv:2401.06121) that measuring needs and forgetting does not."""


@dataclass(frozen=True)
class RemovalList:
    """A set as it was read, and sentences on what was dropped and what may surprise."""

    forget_set: ForgetSet
    notes: list[str]


def read_removal_list(
    content: bytes, name: str, *, column: str | None = None, kind: Kind | None = None, force: bool = False
) -> RemovalList:
    """Read a forget set from a file.

    A JSON line is one object: ``{"phrase": …}``, ``{"alias": …}``, ``{"text": …}`` (of each also a list), ``{"question": …,
    "answer": …, "paraphrases": […]}`` or, once, ``{"set": {description, case_sensitive, word_boundary, match, requester,
    legal_basis, expires_at}}``. Empty lines are skipped.

    Args:
        column: the header of the column to read; for CSV files only.
        kind: what the cells, the lines of a plain list or the strings of an array are; for them ``phrase`` unless given. A plain
            list is only read if it is given.
        force: read also what nobody is likely to mean.

    Raises:
        InvalidForgetSet: one problem if the whole file is of another kind; otherwise every bad line with its number, the value
            and the rule, or with the number of lines where many break the same rule.
    """
    text = decode(content)
    if not text.strip():
        raise InvalidForgetSet([f"the file is empty; write one entry a line, for instance {RIGHT_LINE}"])
    reading = _Reading(force)
    entries = json_entries(text)
    if entries is None:
        check_encoding(text)
        if column is not None:
            cells = list(column_cells(text, column))
            for place, cell in cells:
                if cell:
                    reading.add(place, {kind or "phrase": cell} if isinstance(cell, str) else cell)
            if empty := sum(not cell for _, cell in cells):
                reading.note(f"{counted(empty, 'empty cell')} of column {column!r} skipped")
        elif kind is not None and table_without_doubt(text) is None:
            for place, line in plain_lines(text):
                reading.add(place, {kind: line})
        else:
            raise InvalidForgetSet([describe_other_file(text, taken_for_list=kind is not None)])
        return reading.finish(name)
    if column is not None:
        raise InvalidForgetSet([f"the file is JSON, and column {column!r} can only be read from a CSV file; leave column out"])
    if kind is not None and any(isinstance(entry, dict) for _, entry in entries):
        raise InvalidForgetSet([f"the file is JSON whose objects say what they are; leave out --as {kind}"])
    if len(entries) == 1 and isinstance(entries[0][1], dict) and _BODY_KEYS & entries[0][1].keys():
        body = dict(entries[0][1])
        if body.pop("name", name) != name:
            raise InvalidForgetSet([f"name {entries[0][1]['name']!r} in the file differs from {name!r}; drop it from the file"])
        return check_new_set({**body, "name": name}, force=force)
    for place, entry in entries:
        reading.add(place, {kind or "phrase": entry} if isinstance(entry, str) else entry)
    return reading.finish(name)


def check_new_set(fields: dict[str, Any], *, force: bool = False) -> RemovalList:
    """Build a set from the fields of the object that HTTP takes, with the checks of `read_removal_list`.

    Raises:
        InvalidForgetSet: lists every problem with its place, value and rule.
    """
    reading = _Reading(force)
    cleaned = dict(fields)
    for field, kind in _FIELDS.items():
        if isinstance(values := fields.get(field), list):
            cleaned[field] = [reading.take(f"{field}.{i}", kind, value) for i, value in enumerate(values)]
    if isinstance(questions := fields.get("questions"), list):
        cleaned["questions"] = [reading.take_question(f"questions.{i}", each) for i, each in enumerate(questions)]
    reading.problems.raise_if_any()
    try:
        forget_set = parse_forget_set(cleaned)
    except InvalidForgetSet as error:
        raise InvalidForgetSet(limit(error.problems, MAX_PROBLEMS, "problems")) from None
    reading.check_expiry("expires_at", forget_set.expires_at)
    return reading.checked(forget_set)


class _Reading:
    """Entries taken one by one: cleaned, checked, collected."""

    def __init__(self, force: bool) -> None:
        self.problems = Problems()
        self._force = force
        self._forced = Problems()
        self._notes: list[str] = []
        self._fields: dict[str, Any] = {"phrases": [], "aliases": [], "questions": [], "texts": []}
        self._header_place = ""
        self._cleaned_values = 0
        self._cleaned_characters = 0
        self._left_out: Counter[str] = Counter()

    def add(self, place: str, entry: Any) -> None:
        """Take one line's object, or why there is none."""
        if isinstance(entry, Unreadable):
            self.problems.add(place, entry.rule, entry.message)
            return
        kinds = [] if not isinstance(entry, dict) else [kind for kind in (*LINE_KINDS, "question", "set") if kind in entry]
        if len(kinds) != 1:
            rule = "must have exactly one of the keys phrase, alias, text, question, set"
            self.problems.add(place, "one kind", f"{shorten(entry)} {rule}, for instance {RIGHT_LINE}")
            return
        kind = kinds[0]
        allowed = _QUESTION_KEYS if kind == "question" else {kind}
        if unknown := sorted(entry.keys() - allowed - (_LEFT_OUT_KEYS if kind == "question" else set())):
            rule = f"unknown keys {', '.join(unknown)}; a {kind} line may have {', '.join(sorted(allowed))}"
            self.problems.add(place, f"unknown keys of {kind}", f"{shorten(entry)} has {rule}")
        elif kind == "set":
            self._take_header(place, entry["set"])
        elif kind == "question":
            self._fields["questions"].append(self.take_question(place, entry))
        else:
            values = entry[kind] if isinstance(entry[kind], list) else [entry[kind]]
            self._fields[LINE_KINDS[kind]] += [self.take(place, kind, value) for value in values]
            if not values:
                self.problems.add(place, "empty list", f"{shorten(entry)} is an empty list; name something or drop the line")

    def take(self, place: str, kind: str, value: Any) -> Any:
        """A value without what is invisible and never meant. What is wrong with it goes to the problems."""
        if not isinstance(value, str):
            self.problems.add(place, f"string {kind}", f"{kind} must be a string (got {shorten(value)})")
            return value
        self._check_characters(place, kind, value)  # before cleaning: half of a damaged letter may look like white space
        text = clean_ends(value)
        if not text:
            rule = "is empty: there is nothing to match; give at least one character that shows, or drop it"
            self.problems.add(place, f"empty {kind}", f"{kind} {shorten(ascii(value))} {rule}")
            return text
        if not text.isascii():
            before = len(text)
            text = NEVER_MEANT.sub("", text)
            self._cleaned_values += len(text) < before
            self._cleaned_characters += before - len(text)
        if kind == "phrase":
            try:
                check_phrases([text])
            except InvalidForgetSet as error:
                self.problems.add(place, "phrase", error.problems[0])
        elif len(text) > MAX_TEXT_CHARACTERS:
            rule = f"{kind} {shorten(text)} has {len(text):,} characters, at most {MAX_TEXT_CHARACTERS:,} are allowed; split it"
            self.problems.add(place, f"long {kind}", rule)
        if kind != "text" and "&" in text and _ENTITY.search(text) and (meant := html.unescape(text)) != text:
            rule = f"{kind} {shorten(text)} contains HTML entities; did you mean {shorten(meant)}?"
            self._add_doubt(place, "entities", rule)
        return text

    def take_question(self, place: str, entry: Any) -> Any:
        """A question's fields, with the keys of TOFU under the names that they have here."""
        if not isinstance(entry, dict):
            self.problems.add(place, "question object", f"{shorten(entry)} must be an object with the keys question and answer")
            return entry
        if missing := sorted({"question", "answer"} - entry.keys()):
            rule = f"{shorten(entry)} lacks {' and '.join(missing)}; a question needs its answer"
            self.problems.add(place, "question and answer", rule)
            return entry
        taken = {key: value for key, value in entry.items() if key not in _LEFT_OUT_KEYS and key != "paraphrased_question"}
        self._left_out.update(entry.keys() & _LEFT_OUT_KEYS)
        for key in ("question", "answer"):
            taken[key] = self.take(place, key, entry[key])
        paraphrases: list[Any] = []
        for key in ("paraphrases", "paraphrased_question"):
            given = entry.get(key)
            paraphrases += given if isinstance(given, list) else [] if given is None else [given]
        taken["paraphrases"] = [self.take(place, "paraphrase", each) for each in paraphrases]
        return taken

    def check_expiry(self, place: str, expires_at: datetime | None) -> None:
        if expires_at is not None and expires_at <= datetime.now(UTC):
            date = expires_at.isoformat()
            self._add_doubt(
                place, "expiry", f"expires_at {date} is past: the set would be over before it begins; give a later date"
            )

    def note(self, sentence: str) -> None:
        self._notes.append(sentence)

    def finish(self, name: str) -> RemovalList:
        """The set of all entries. Raises InvalidForgetSet."""
        if self.problems.sentences():
            self._check_ordinary(**self._named())
            self.problems.raise_if_any()
        try:
            forget_set = ForgetSet.model_validate({"name": name, **self._fields})
        except ValidationError as error:
            raise InvalidForgetSet(limit(describe_validation(error), MAX_PROBLEMS, "problems")) from None
        return self.checked(forget_set)

    def checked(self, forget_set: ForgetSet) -> RemovalList:
        """Raises InvalidForgetSet."""
        notes = self._check_ordinary(
            phrases=forget_set.phrases,
            aliases=forget_set.aliases,
            case_sensitive=forget_set.case_sensitive,
            word_boundary=forget_set.word_boundary,
        )
        self.problems.raise_if_any()
        if self._cleaned_values:
            dropped = counted(self._cleaned_characters, "invisible character")
            self.note(f"{dropped} (zero-width spaces, direction marks) dropped from {counted(self._cleaned_values, 'value')}")
        if self._left_out:
            keys = ", ".join(sorted(self._left_out))
            self.note(
                f"keys of {counted(max(self._left_out.values()), 'question')} that forgetting does not need, left out: {keys}"
            )
        forced = [f"forced: {sentence}" for sentence in self._forced.sentences()]
        return RemovalList(forget_set, [*self._notes, *limit(forced, MAX_PROBLEMS, "forced"), *notes])

    def _named(self) -> dict[str, Any]:
        """What is there of phrases and aliases while other entries are wrong."""
        return {
            "phrases": [phrase for phrase in self._fields["phrases"] if isinstance(phrase, str) and phrase],
            "aliases": [alias for alias in self._fields["aliases"] if isinstance(alias, str) and alias],
            "case_sensitive": self._fields.get("case_sensitive") is True,
            "word_boundary": self._fields.get("word_boundary") is True,
        }

    def _add_doubt(self, place: str, rule: str, message: str) -> None:
        """What nobody is likely to mean, and may be forced."""
        if self._force:
            self._forced.add(place, rule, message)
        else:
            self.problems.add(place, rule, f"{message} ({_FORCE})")

    def _check_characters(self, place: str, kind: str, text: str) -> None:
        if text.isascii():
            return
        if "\ufffd" in text:
            rule = (
                f"{kind} {shorten(text)} contains U+FFFD, which stands for a character that was lost; take it from the source again"
            )
            self.problems.add(place, "lost characters", rule)
        elif (meant := undamaged(text[:_CHECKED_CHARACTERS])) is not None:
            rule = f"{kind} {shorten(text)} was saved in one encoding and read in another; did you mean {shorten(meant)}?"
            self._add_doubt(place, "mojibake", rule)

    def _take_header(self, place: str, header: Any) -> None:
        if self._header_place:
            rule = f"a second 'set' line (the first is {self._header_place}); merge the two"
            self.problems.add(place, "second header", rule)
        self._header_place = self._header_place or place
        if not isinstance(header, dict) or header.keys() - set(HEADER_FIELDS):
            rule = f"'set' must be an object with keys from {', '.join(HEADER_FIELDS)} (got {shorten(header)})"
            self.problems.add(place, "header", rule)
            return
        try:
            # Checked alone, so that a bad date is reported with this line's number.
            checked = ForgetSet.model_validate({"name": "x", "phrases": ["x"], **header})
        except ValidationError as error:
            self.problems.add(place, "header", "; ".join(describe_validation(error)))
            return
        self._fields.update(header)
        self.check_expiry(place, checked.expires_at)

    def _check_ordinary(
        self, *, phrases: Sequence[str], aliases: Sequence[str], case_sensitive: bool, word_boundary: bool
    ) -> list[str]:
        """Refuse what would take ordinary text from every answer, unless forced. Returns notes on what comes near it."""
        counts = dict(zip(phrases, ordinary_counts(phrases, case_sensitive, word_boundary), strict=True))
        refused = {phrase: reason for phrase in counts if (reason := why_never_meant(phrase))}
        frequent = [phrase for phrase, count in counts.items() if count.too_common and phrase not in refused]
        refused |= {phrase: f"{times(counts[phrase])} in {sample_words():,} words of ordinary text" for phrase in frequent}
        if refused:
            advice = "give a longer phrase"
            if not word_boundary and any(not each.too_common for each in ordinary_counts(frequent, case_sensitive, True)):
                advice += ', or {"set": {"word_boundary": true}} if it is only meant where a word starts'
            rule = f"would take ordinary text from every answer: {some_reasons(refused)}; {advice}"
            self._add_doubt("", "common phrases", f"{counted(len(refused), 'phrase')} {rule}")
        if odd := {alias: reason for alias in aliases if (reason := why_never_meant(alias))}:
            self._add_doubt(
                "", "odd aliases", f"{counted(len(odd), 'alias')} cannot name a subject: {some_reasons(odd)}; drop them"
            )
        notes = surname_first(phrases)
        if not word_boundary and (short := short_words(phrases)):
            notes.append(
                f"{short_names(short, 'phrase')} and may occur inside ordinary words; with word_boundary only at their start"
            )
        if short := short_words(aliases):
            notes.append(f"{short_names(short, 'alias')} and may be ordinary words")
        occurring = sorted((phrase for phrase in counts if counts[phrase].total), key=lambda phrase: -counts[phrase].total)
        sample = f"in a sample of {sample_words():,} words of ordinary text"
        listed = [f"{shorten(phrase)} occurs {times(counts[phrase])} {sample}" for phrase in occurring]
        return notes + limit(listed, _SHOWN_COUNTS, "phrases occur in it")
