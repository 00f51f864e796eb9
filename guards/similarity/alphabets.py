"""Passages in other alphabets: each letter is a sign, a word or a number of dots.

Covered: Morse, the NATO alphabet, pig latin, upside-down letters, regional indicators, tag characters, rot47, "[at]" and "[dot]".
Braille, squared and circled letters and small capitals are letters to `shapes` already. In most of them only names of `LEAST`
letters count. Not covered: alphabets of one's own, emoji for words, signs drawn with several characters.
"""

# ruff: noqa: RUF001 - the letters of other scripts are meant.
from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

from guards.similarity.codes import Passage

LEAST = 5
_MORSE_SIGNS = (
    ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --.. "
    "----- .---- ..--- ...-- ....- ..... -.... --... ---.. ----."
)
_MORSE = dict(zip(_MORSE_SIGNS.split(), "abcdefghijklmnopqrstuvwxyz0123456789", strict=True))
_DOTS_AND_DASHES = str.maketrans("·•−–—_", "..----")
_MORSE_RUN = re.compile(r"(?<!\S)[.\-·•−–—_]{1,5}(?:(?:[ \t]{1,3}|[ \t]?[/|\n][ \t]?)[.\-·•−–—_]{1,5}){3,}(?![^\s/|])")
_SPELLING = (
    "alfa|alpha|bravo|charlie|delta|echo|foxtrot|golf|hotel|india|juliett?|kilo|lima|mike|november|oscar|papa|quebec|romeo|sierra|"
    "tango|uniform|victor|whiske?y|x-?ray|yankee|zulu"
)
_SPELLED = re.compile(rf"\b(?:{_SPELLING})\b(?:[^\w]{{1,3}}(?:{_SPELLING})\b){{2,}}", re.IGNORECASE)
_PIG_WORD = re.compile(r"\b[A-Za-z]{2,30}ay\b")
_PIG_RUN = re.compile(r"\b[A-Za-z]{2,30}ay(?:[ -][A-Za-z]{2,30}ay\b)+")
_PIG_WORDS = 3
"""Words that are read together: each may be read in up to four ways."""
_ONSETS = (
    "b c d f g h j k l m n p q r s t v w x y z bl br ch cl cr dr fl fr gh gl gr kn ph pl pr qu sc sch scr sh shr sk sl sm sn sp "
    "spl spr squ st str sw th thr tr tw wh wr"
)
_FIRST_SOUNDS = frozenset(_ONSETS.split())
"""What English words begin with before the first vowel."""
_TURNED = "ɐqɔpǝɟƃɓɥᴉıɾʞʃןɯuodbɹsʇnʌʍxʎz∀ᗺƆᗡƎℲ⅁פHIſʞ˥WNOԀΌᴚɹS┴⊥∩ΛMX⅄Z"
_UPSIDE_DOWN = dict(zip(_TURNED, "abcdefgghiijkllmnopqrstuvwxyzabcdefgghijklmnopqrrsttuvwxyz", strict=True))
_TURNED_ONLY = frozenset("ɐɔǝɟƃɓɥᴉɾʞʃןɯɹʇʌʍʎ∀ᗺᗡƎℲ⅁˥Ԁᴚ┴⊥∩⅄")
_TURNED_RUN = re.compile(f"[{''.join(map(re.escape, _UPSIDE_DOWN))}tlcevymwrafghijk' .,-]{{4,400}}")
_REGIONAL = re.compile("[\U0001f1e6-\U0001f1ff](?:[\\s\u200b-\u200d]{0,3}[\U0001f1e6-\U0001f1ff]){2,}")
_TAGS = re.compile("[\U000e0020-\U000e007e]{2,}")
_ROT47 = str.maketrans({33 + i: 33 + (i + 47) % 94 for i in range(94)})
_ODD_WORD = re.compile(r"(?<!\S)(?=\S{0,30}[^\s0-9])(?=\S{0,30}[^\sA-Za-z])[!-~]{3,40}(?!\S)")
_WRITTEN_OUT = re.compile(r"\s?[\[({<]\s?(at|dot|punkt|punto|point|arroba)\s?[\])}>]\s?", re.IGNORECASE)


def signs(text: str) -> Iterator[Passage]:
    """Every passage in another alphabet; they may overlap."""
    for run in _MORSE_RUN.finditer(text) if ".-" in text or "-." in text or not text.isascii() or "- " in text else ():
        words = re.split(r"[ \t]*[/|\n][ \t]*|[ \t]{2,}", run[0].translate(_DOTS_AND_DASHES))
        letters = [[_MORSE.get(sign, "") for sign in word.split()] for word in words]
        if all(all(word) for word in letters):
            yield Passage(run.start(), run.end(), " ".join(map("".join, letters)), "Morse", LEAST)
    for run in _SPELLED.finditer(text):
        letters_only = "".join(word[0] for word in re.findall(r"[\w-]+", run[0]))
        yield Passage(run.start(), run.end(), letters_only.lower(), "spelling alphabet", LEAST)
    if "ay" in text:
        yield from _pig_latin(text)
    if not text.isascii():
        yield from _other_characters(text)
    for word in _ODD_WORD.finditer(text):
        if (turned := word[0].translate(_ROT47)).replace("-", "").isalpha():
            yield Passage(word.start(), word.end(), turned, "rot47", LEAST)
    for run in _WRITTEN_OUT.finditer(text):
        yield Passage(run.start(), run.end(), "@" if run[1].lower() in ("at", "arroba") else ".", "written out", 1)


def _pig_latin(text: str) -> Iterator[Passage]:
    """Runs of words that end in "ay", in every way in which their first sounds may have been moved to the end."""
    for run in _PIG_RUN.finditer(text):
        words = list(_PIG_WORD.finditer(text, run.start(), run.end()))
        for first in range(0, len(words), _PIG_WORDS):
            some = words[first : first + _PIG_WORDS]
            readings = product(*(_without_ay(word[0][:-2].lower()) for word in some))
            yield Passage(some[0].start(), some[-1].end(), "\n".join(map(" ".join, readings)), "pig latin", LEAST)


def _without_ay(stem: str) -> list[str]:
    sizes = [n for n in (3, 2, 1) if len(stem) > n and stem[-n:] in _FIRST_SOUNDS]
    return [stem[len(stem) - n :] + stem[: len(stem) - n] for n in (*sizes, 0)]


def _other_characters(text: str) -> Iterator[Passage]:
    for run in _TURNED_RUN.finditer(text) if not _TURNED_ONLY.isdisjoint(text) else ():
        turned = [i for i, character in enumerate(run[0]) if character in _TURNED_ONLY]
        if len(turned) >= 2:
            # The words from the first to the last one that has a letter which is only ever seen upside down.
            start, end = run[0].rfind(" ", 0, turned[0]) + 1, run[0].find(" ", turned[-1])
            upright = "".join(_UPSIDE_DOWN.get(c, c) for c in run[0][start : end if end >= 0 else None])
            place = run.start() + start
            yield Passage(place, place + len(upright), f"{upright}\n{upright[::-1]}", "upside down", LEAST)
    for run in _REGIONAL.finditer(text):
        letters = re.sub(r"\n|\u200b|\u200c|\u200d", "", run[0])
        yield Passage(run.start(), run.end(), "".join(_flag_letter(c) for c in letters), "regional indicators", LEAST)
    for run in _TAGS.finditer(text):
        yield Passage(run.start(), run.end(), f" {''.join(chr(ord(c) - 0xE0000) for c in run[0])} ", "tag characters")


def _flag_letter(character: str) -> str:
    return chr(ord(character) - 0x1F1E6 + 97) if "\U0001f1e6" <= character <= "\U0001f1ff" else character
