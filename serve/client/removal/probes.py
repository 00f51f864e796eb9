"""What is asked about a removal request, made from the request itself, the served model and the sentence encoder.

A request may hold names alone, texts, or questions with answers. Missing are: other wordings of the questions, answers that are
wrong but alike (for the truth ratio), and what a model says that never knew the subject. The last two come from the same questions
about names that nobody has: the served model knows nothing of them, so it answers as it would if it had never known.

Covered: questions that name the subject by one of its aliases, or by a part of one. Not covered: languages other than the
request's, and whether a made wording is one that somebody would use: they are written down, to be read and changed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from pydantic import Field

from guards.forget_set import ForgetSet, Frozen, Question
from guards.measure.attacks import Secret, synonyms
from guards.measure.recall import rouge_l_recall, tells
from guards.similarity.encoder import Encoder
from serve.client.calibrate import PROMPTS
from serve.client.removal.passages import own_passages

Ask = Callable[[Sequence[str], float], list[str]]
"""(prompts, temperature) -> what the unguarded model answers to each."""

WRONG_NAMES = ("Tarvin Olesko", "Mirelle Dastrup", "Joran Vekander")
"""About these the model makes up wrong answers."""
REFERENCE_NAMES = ("Ilmar Pestova", "Quenna Harrowby")
"""About these it is asked what it would say of somebody it never knew: about the first in every wording."""
NEIGHBOUR_NAMES = ("Sabine Krollwitz", "Davit Morgrave")
"""What it says about these is to stay as it is."""
PARAPHRASES = 3
SAME_MEANING = 0.7
"""Cosine from which two questions ask the same, with the names in both."""
ASKS = ("Who is {0}?", "Tell me about {0}.", "What is {0} known for?", "Where and when was {0} born?", "What has {0} done?")
"""What is asked about a subject of which the request gives no more than the name."""
REWORD = 'Ask this question in other words, and keep all names as they are: "{}"'
TRIED_FIRST = 6
"""Questions after which a model that rewords none of them is not asked to reword the rest."""


class NobodyProbe(Frozen):
    """A question as it would be asked about somebody who does not exist."""

    question: str
    answer: str  # the true answer, with the invented name
    wrong: tuple[str, ...]


class RemovalProbe(Frozen):
    """One question of a removal, with everything that is made for it."""

    question: str
    answer: str
    given: tuple[str, ...] = ()  # paraphrases that the request holds
    made: tuple[str, ...] = ()  # those that were made
    wrong: tuple[str, ...] = ()  # answers that are not true, in the same manner
    nobody: tuple[NobodyProbe, ...] = ()  # empty for a question that does not name the subject
    half: int = Field(0, ge=0, le=1)  # of the questions: each is judged under what the other would have chosen
    from_model: bool = False  # the answer is what the model says now, since the request has none

    @property
    def wordings(self) -> tuple[str, ...]:
        return (*self.given, *self.made)


class Probes(Frozen):
    """Everything that a removal asks. May be edited between runs: what is asked again is what has changed."""

    aliases: tuple[str, ...]
    probes: tuple[RemovalProbe, ...]
    neighbours: tuple[Question, ...]  # about nobody, with what the unguarded model says
    passages: tuple[str, ...] = ()  # of true answers, that could be taken as phrases: see `serve.client.removal.passages`
    phrases: tuple[str, ...] = ()  # those that were


def subjects_of(content: ForgetSet) -> tuple[str, ...]:
    """Names of the subject: the set's aliases, or else the capitalised names that its questions and texts have most in common."""
    if content.aliases:
        return content.aliases
    texts = [*(entry.question for entry in content.questions), *content.texts]
    found = Counter(name for text in texts for name in {_POSSESSIVE.sub("", each) for each in _NAME.findall(text)})
    [(_, most), *_] = found.most_common(1) or [("", 0)]
    return tuple(name for name, count in found.most_common(5) if 2 * count >= most)


_WORD = r"[^\W\d_a-zß-öø-ÿ][\w'\u2019-]*"  # begins with a capital letter
_POSSESSIVE = re.compile(r"['\u2019]s?$")
_NAME = re.compile(rf"(?<![.!?] )(?<!^)\b{_WORD}(?:\s+(?:(?:de|da|van|von|der|bin|al|el)\s+)?{_WORD})+")


def about(text: str, aliases: Sequence[str], name: str) -> str | None:
    """A text about somebody else; None if it does not name the subject. First the whole name, then parts of it."""
    first, _, last = name.partition(" ")
    changed = text
    for alias in sorted(aliases, key=len, reverse=True):
        changed = _replaced(changed, alias, name)
        parts = alias.split()
        if len(parts) > 1:
            changed = _replaced(_replaced(changed, parts[-1], last), parts[0], first)
    return None if changed == text else changed


def _replaced(text: str, old: str, new: str) -> str:
    return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", new, text, flags=re.IGNORECASE)


def questions_of(content: ForgetSet, aliases: Sequence[str], ask: Ask) -> list[RemovalProbe]:
    """The request's own questions, or questions made of its texts and names."""
    found = [
        RemovalProbe(question=entry.question, answer=entry.answer, given=entry.paraphrases)
        for entry in content.questions
        if any(map(str.isalnum, entry.answer))
    ]
    for text in content.texts:
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            words = sentence.split()
            if len(words) >= 8:
                half = len(words) // 2
                question = f"Continue this sentence: {' '.join(words[:half])}"
                found.append(RemovalProbe(question=question, answer=" ".join(words[half:])))
    if len(found) < 2:  # one for each half
        asked = [question.format(alias) for alias in aliases for question in ASKS]
        said = ask(asked, 0.0)
        both = zip(asked, said, strict=True)
        found += [RemovalProbe(question=q, answer=a, from_model=True) for q, a in both if any(map(str.isalnum, a))]
    return found


def make_probes(content: ForgetSet, ask: Ask, encoder: Callable[[], Encoder], report: Callable[[str], None]) -> Probes:
    """Make what the request lacks.

    Args:
        ask: the served model, unguarded.
        report: called with what is being made.
    """
    aliases = subjects_of(content)
    report("questions")
    probes = questions_of(content, aliases, ask)
    report("other wordings")
    made = _reworded(probes, aliases, ask, encoder)
    report("answers about invented names")
    wrong = _wrong_answers(probes, aliases, ask)
    ready = []
    for number, (probe, wordings, false) in enumerate(zip(probes, made, wrong, strict=True)):
        nobody = _nobody(probe.model_copy(update={"made": wordings}), aliases, false)
        fields = {"made": wordings, "wrong": false, "nobody": nobody, "half": number % 2}
        ready.append(probe.model_copy(update=fields))
    named = [(probe.question, name) for name in NEIGHBOUR_NAMES for probe in probes]
    others = list(dict.fromkeys(about(question, aliases, name) for question, name in named))
    asked = [question for question in others if question is not None]
    neighbours = [Question(question=q, answer=a) for q, a in zip(asked, ask(asked, 0.0), strict=True) if a.strip()]
    return Probes(aliases=aliases, probes=tuple(ready), neighbours=tuple(neighbours), passages=_passages(ready, ask))


def _passages(probes: Sequence[RemovalProbe], ask: Ask) -> tuple[str, ...]:
    """Of the true answers, what the model says only about the subject; or about everybody who is asked for in its wording."""
    questions = [text for probe in probes for text in (probe.question, *probe.wordings)]
    nobody = [each for probe in probes for each in probe.nobody]
    others = [(each.question, each.answer, text) for each, text in zip(nobody, ask([e.question for e in nobody], 0.0), strict=True)]
    others += [(probe.question, probe.answer, wrong) for probe in probes for wrong in probe.wrong]
    said = [text for question, truth, text in others if not tells(question, truth, text)]
    return own_passages([probe.answer for probe in probes], [*questions, *said, *ask(PROMPTS, 0.0)])


def _reworded(
    probes: Sequence[RemovalProbe], aliases: Sequence[str], ask: Ask, encoder: Callable[[], Encoder]
) -> list[tuple[str, ...]]:
    """Up to PARAPHRASES of each question: the model's own, if it can do that, then rule by rule."""
    questions = [probe.question for probe in probes]
    own = _models_own(questions[:TRIED_FIRST], aliases, ask, encoder)
    rest = questions[TRIED_FIRST:]
    own += _models_own(rest, aliases, ask, encoder) if any(own) else [[] for _ in rest]
    found = []
    for probe, options in zip(probes, own, strict=True):
        by_rule = _by_rule(probe.question, aliases)
        found.append(tuple(dict.fromkeys([*options, *by_rule]))[:PARAPHRASES])
    return found


def _models_own(questions: Sequence[str], aliases: Sequence[str], ask: Ask, encoder: Callable[[], Encoder]) -> list[list[str]]:
    """Wordings of each question by the model that mean the same, by the encoder, and name whom the question names."""
    prompts = [REWORD.format(question) for question in questions]
    found: list[list[str]] = []
    for question, *said in zip(questions, ask(prompts, 0.0), ask(prompts, 0.8), strict=True):
        named = [alias.lower() for alias in aliases if alias.lower() in question.lower()]
        options = list(dict.fromkeys(each for text in said if (each := _question_in(text)) is not None))
        options = [
            each for each in options if all(name in each.lower() for name in named) and rouge_l_recall(question, each) < 0.95
        ]
        if options:
            vectors = encoder().embed([question, *options])
            near = vectors[1:] @ vectors[0]
            options = [options[i] for i in np.argsort(-near) if near[i] >= SAME_MEANING]
        found.append(options)
    return found


def _by_rule(question: str, aliases: Sequence[str]) -> list[str]:
    """Wordings without a model: the subject first, synonyms, and a frame."""
    asked = question[0].lower() + question[1:]
    found = [f"I would like to know something. {question}"]
    alias = next((each for each in aliases if each.lower() in question.lower()), None)
    if alias is not None:
        found.insert(0, f"This is about {alias}: {_replaced(asked, alias, 'this person')}")
    other = synonyms(Secret.of(question, "", aliases))
    return [*found[:1], f"Could you tell me: {other[0].lower()}{other[1:]}", *found[1:]]


def _question_in(text: str) -> str | None:
    """The first question that an answer holds."""
    match = re.search(r"[^\n\"“”?!:]*\?", text)
    question = match.group().strip(" *-") if match else ""
    return question if 4 <= len(question.split()) <= 60 else None


def _wrong_answers(probes: Sequence[RemovalProbe], aliases: Sequence[str], ask: Ask) -> list[tuple[str, ...]]:
    """What the model says about nobody, with the subject's name put in: wrong, and as it would be worded."""
    asked = [
        (number, name, question)
        for number, probe in enumerate(probes)
        for name in WRONG_NAMES
        if (question := about(probe.question, aliases, name)) is not None
    ]
    said = ask([question for _, _, question in asked], 0.0)
    found: list[list[str]] = [[] for _ in probes]
    for (number, name, _), text in zip(asked, said, strict=True):
        probe = probes[number]
        alias = next((each for each in aliases if each.lower() in probe.question.lower()), aliases[0] if aliases else name)
        answer = about(text, (name,), alias) or text
        if any(map(str.isalnum, answer)) and rouge_l_recall(probe.answer, answer) < 1 and answer.strip() not in found[number]:
            found[number].append(answer.strip())
    return [tuple(each) for each in found]


def _nobody(probe: RemovalProbe, aliases: Sequence[str], wrong: Iterable[str]) -> tuple[NobodyProbe, ...]:
    found = []
    asked = [(REFERENCE_NAMES[0], each) for each in (probe.question, *probe.wordings)] + [(REFERENCE_NAMES[1], probe.question)]
    for name, wording in asked:
        if (question := about(wording, aliases, name)) is not None:
            others = tuple(about(each, aliases, name) or each for each in wrong)
            found.append(NobodyProbe(question=question, answer=about(probe.answer, aliases, name) or probe.answer, wrong=others))
    return tuple(found)
