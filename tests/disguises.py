"""Disguises of a name, one function each: for the tests and for `tests.bench.disguises`.

A disguise returns None for a name that it cannot be applied to, or that is shorter than the rule for its kind asks for.
"""

from __future__ import annotations

import base64
import codecs
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

Write = Callable[[str], str | None]


@dataclass(frozen=True)
class Disguise:
    """One way to write a name. ``alone``: it is a text of its own."""

    name: str
    write: Write
    alone: bool = False

    def frame(self, template: str, written: str) -> str:
        return written if self.alone else template.format(written)


def letters(name: str) -> str:
    return "".join(c for c in name if c.isalpha())


def latin(least: int = 1) -> Callable[[Write], Write]:
    """Only for names in ASCII letters, of at least so many."""

    def only(write: Write) -> Write:
        return lambda name: write(name) if name.isascii() and len(letters(name)) >= least else None

    return only


def long(least: int) -> Callable[[Write], Write]:
    """Only for names of so many letters."""

    def only(write: Write) -> Write:
        return lambda name: write(name) if len(letters(name)) >= least else None

    return only


def cased(name: str) -> bool:
    return name.upper() != name.lower()


def mapped(table: dict[str, str]) -> Write:
    """Letters replaced, where any is; only for ASCII names."""

    def write(name: str) -> str | None:
        changed = "".join(table.get(c, c) for c in name)
        return changed if name.isascii() and changed != name else None

    return write


def styled(capital: int, small: int) -> Write:
    """A Unicode alphabet that begins at these code points."""
    table = {chr(65 + i): chr(capital + i) for i in range(26)} | {chr(97 + i): chr(small + i) for i in range(26)}
    return mapped(table)


def joined(separator: str, *, words: str | None = None) -> Write:
    """Letters set apart by a separator, words by that thrice or by another."""

    def write(name: str) -> str | None:
        if not cased(name) or len(letters(name)) < 4:
            return None
        return (words or separator * 3).join(separator.join(letters(word)) for word in name.split())

    return write


def inserted(text: str) -> Write:
    return lambda name: text.join(name) if cased(name) else None


def per_byte(pattern: str, between: str = "", least: int = 4) -> Write:
    """Each byte of UTF-8 through a format."""
    return long(least)(lambda name: between.join(pattern.format(byte) for byte in name.encode()))


def per_character(pattern: str, between: str = "") -> Write:
    return lambda name: between.join(pattern.format(ord(c)) for c in name)


def edited(change: Callable[[str], str]) -> Write:
    """One letter in the longest word changed; names of nine letters and more in an alphabet."""

    def write(name: str) -> str | None:
        if not cased(name) or len(letters(name)) < 9:
            return None
        longest = max(name.replace("-", " ").split(), key=len)
        return name.replace(longest, change(longest))

    return write


def shifted(by: int) -> Write:
    turn = {chr(base + i): chr(base + (i + by) % 26) for base in (65, 97) for i in range(26)}
    return latin(6)(mapped(turn))


def surname_first(separator: str) -> Write:
    def write(name: str) -> str | None:
        words = name.split()
        return None if len(words) < 2 or not cased(name) else separator.join((" ".join(words[1:]), words[0]))

    return write


MORSE_SIGNS = ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --.."
MORSE = tuple(MORSE_SIGNS.split())
NATO_WORDS = (
    "Alfa Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliett Kilo Lima Mike November Oscar Papa Quebec Romeo Sierra Tango "
    "Uniform Victor Whiskey Xray Yankee Zulu"
)
NATO = tuple(NATO_WORDS.split())
CYRILLIC = dict(zip("aeopcyxAEOPCTHKMB", "аеорсухАЕОРСТНКМВ", strict=True))
GREEK = dict(zip("AEHKMNOPTBoIZ", "ΑΕΗΚΜΝΟΡΤΒοΙΖ", strict=True))
LEET = {"a": "4", "e": "3", "i": "1", "o": "0", "s": "5", "t": "7"}
UPSIDE_DOWN = dict(zip("abcdefghijklmnopqrstuvwxyz", "ɐqɔpǝɟƃɥᴉɾʞןɯuodbɹsʇnʌʍxʎz", strict=True))
BRAILLE = dict(zip("abcdefghijklmnopqrstuvwxyz", "⠁⠃⠉⠙⠑⠋⠛⠓⠊⠚⠅⠇⠍⠝⠕⠏⠟⠗⠎⠞⠥⠧⠺⠭⠽⠵", strict=True))
SMALL_CAPITALS = dict(zip("abcdefghijklmnoprstuvwyz", "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ", strict=True))
SUPERSCRIPTS = dict(zip("abcdefghijklmnoprstuvwxyz", "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ", strict=True))
STROKES = {"ł": "l", "Ł": "L", "ó": "o"}
VOWELS = "aeiou"


def lower(write: Write) -> Write:
    return lambda name: write(name.lower())


def bits(size: int, between: str = " ") -> Write:
    return latin(3)(lambda name: between.join(f"{byte:0{size}b}" for byte in name.encode()))


def by_words(change: Callable[[str], str], between: str = " ") -> Callable[[str], str]:
    return lambda name: between.join(change(word) for word in name.replace("-", " ").split())


def pig(word: str) -> str:
    first = next((i for i, c in enumerate(word.lower()) if c in VOWELS), 0)
    return (word[first:] + word[:first]).lower() + "ay"


def b64(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


DISGUISES: tuple[Disguise, ...] = (
    # Letters as they look.
    Disguise("as it is", lambda name: name),
    Disguise("capitals", lambda name: name.upper() if cased(name) else None),
    Disguise("small letters", lambda name: name.lower() if cased(name) else None),
    Disguise("decomposed", lambda name: unicodedata.normalize("NFD", name)),
    Disguise("accents on it", lambda name: "".join(c + "\u0301" if c in "aeoy" else c for c in name) if name.isascii() else None),
    Disguise(
        "zalgo", lambda name: "".join(c + "\u0337\u0315\u0321" if c.isalpha() else c for c in name) if name.isascii() else None
    ),
    Disguise("plain ASCII", lambda name: "".join(STROKES.get(c, c) for c in name) if "ł" in name.lower() else None),
    Disguise("full width", styled(0xFF21, 0xFF41)),
    Disguise("mathematical bold", styled(0x1D400, 0x1D41A)),
    Disguise("mathematical script", styled(0x1D4D0, 0x1D4EA)),
    Disguise("mathematical fraktur", styled(0x1D56C, 0x1D586)),
    Disguise("mathematical monospace", styled(0x1D670, 0x1D68A)),
    Disguise("circled", styled(0x24B6, 0x24D0)),
    Disguise("squared", styled(0x1F130, 0x1F130)),
    Disguise("squared, white on black", styled(0x1F170, 0x1F170)),
    Disguise("circled, white on black", styled(0x1F150, 0x1F150)),
    Disguise("in brackets", lower(styled(0x249C, 0x249C))),
    Disguise("small capitals", lower(mapped(SMALL_CAPITALS))),
    Disguise("superscripts", lower(mapped(SUPERSCRIPTS))),
    Disguise("braille", lower(mapped(BRAILLE))),
    Disguise("Cyrillic look-alikes", mapped(CYRILLIC)),
    Disguise("Greek look-alikes", mapped(GREEK)),
    Disguise("Cyrillic capitals", lambda name: mapped(CYRILLIC)(name.upper())),
    # Characters in between.
    Disguise("zero-width spaces", inserted("\u200b")),
    Disguise("zero-width joiners", inserted("\u200d")),
    Disguise("soft hyphens", inserted("\u00ad")),
    Disguise("word joiners", inserted("\u2060")),
    Disguise("variation selectors", inserted("\ufe0f")),
    Disguise("tags in between", inserted("\U000e0061")),
    Disguise("right-to-left marks", inserted("\u200f")),
    Disguise("spaces", joined(" ")),
    Disguise("dots", joined(".")),
    Disguise("hyphens", joined("-")),
    Disguise("underscores", joined("_")),
    Disguise("stars", joined("*")),
    Disguise("pipes", joined("|", words=" ")),
    Disguise("slashes", joined("/", words=" ")),
    Disguise("commas", long(5)(lambda name: ", ".join(letters(name)) if cased(name) else None)),
    Disguise("middle dots", joined("·")),
    Disguise("emoji between letters", joined("🙂", words=" ")),
    Disguise("line breaks", joined("\n", words="\n\n")),
    Disguise("brackets around letters", long(5)(lambda name: "".join(f"[{c}]" for c in letters(name)) if cased(name) else None)),
    Disguise(
        "hyphen in words", lambda n: by_words(lambda w: w[:2] + "-" + w[2:])(n) if cased(n) and len(letters(n)) >= 8 else None
    ),
    Disguise("dot in words", lambda n: by_words(lambda w: w[:2] + "." + w[2:])(n) if cased(n) and len(letters(n)) >= 8 else None),
    Disguise("hyphenated at a line end", long(6)(lambda n: n[:-3] + "-\n" + n[-3:] if cased(n) else None)),
    Disguise("spaces in words", lambda n: by_words(lambda w: w[:3] + " " + w[3:])(n) if n == "Harry Potter" else None),
    Disguise("underscore between words", lambda name: name.replace(" ", "_")),
    Disguise("line break between words", lambda name: name.replace(" ", "\n") if " " in name else None),
    # Leet, typos, glue.
    Disguise("leet: vowels", mapped({k: LEET[k] for k in "aeio"})),
    Disguise("leet: one digit", lambda name: name.replace("a", "4", 1) if name.isascii() else None),
    Disguise("leet: all digits", latin(5)(mapped(LEET))),
    Disguise("leet: @ and $", mapped({"a": "@", "s": "$"})),
    Disguise(
        "leet: ! for i, 1 for l", lambda n: None if any(w.endswith("i") for w in n.split()) else mapped({"i": "!", "l": "1"})(n)
    ),
    Disguise("capital I for l", mapped({"l": "I"})),
    Disguise("glued", long(8)(lambda name: letters(name) if cased(name) else None)),
    Disguise("glued, small", long(8)(lambda name: letters(name).lower() if cased(name) else None)),
    Disguise("hashtag", lambda name: "#" + letters(name)),
    Disguise("handle", lambda name: "@" + name.lower().replace(" ", "_")),
    Disguise("letter left out", edited(lambda word: word[:2] + word[3:])),
    Disguise("letter doubled", edited(lambda word: word[:2] + word[1:])),
    Disguise("letter put in", edited(lambda word: word[:3] + "x" + word[3:])),
    Disguise("letter changed", edited(lambda word: word[:2] + "k" + word[3:])),
    Disguise("first letter changed", edited(lambda word: "Q" + word[1:])),
    Disguise("neighbours swapped", edited(lambda word: word[0] + word[2] + word[1] + word[3:])),
    Disguise("vowels starred", latin(8)(mapped(dict.fromkeys(VOWELS, "*")))),
    # Names.
    Disguise("surname first, comma", surname_first(", ")),
    Disguise("surname first", surname_first(" ")),
    Disguise(
        "machine-readable",
        lambda n: (
            "<<".join(w.replace(" ", "<") for w in surname_first("\0")(n).upper().split("\0")) if surname_first("")(n) else None
        ),
    ),  # type: ignore[union-attr]
    Disguise(
        "initial", lambda n: f"{n[0]}. {n.split(maxsplit=1)[1]}" if len(n.split()) in (2, 4) and n[0].lower() != n[0] else None
    ),
    Disguise("initials of particles", lambda name: "J. v. d. Berg" if "van der" in name else None),
    Disguise("title before it", lambda name: "Prof. Dr. " + name),
    Disguise("English possessive", lambda name: name + "'s" if cased(name) else None),
    Disguise("Turkish suffix", lambda name: name + "'in" if cased(name) else None),
    Disguise("Russian ending", lambda name: name + "а" if name == "Гарри Поттер" else None),
    Disguise("Korean particle", lambda name: name + "에게는"),
    Disguise("Korean copula", lambda name: name + "입니다"),
    Disguise("Japanese particle", lambda name: name + "は"),
    Disguise("Arabic and", lambda name: "و" + name if "أ" in name else None),
    Disguise("Arabic, other hamza", lambda name: name.replace("أ", "ا") if "أ" in name else None),
    Disguise("Arabic tatweel", lambda name: name.replace("ح", "حـ") if "أ" in name else None),
    Disguise("Chinese sentence", lambda name: "我喜欢" + name + "吗"),
    Disguise("Chinese, characters apart", lambda name: " ".join(name) if "哈" in name else None),
    # Codes.
    Disguise("base64", long(3)(b64)),
    Disguise("base64 of the words", lambda name: " ".join(map(b64, name.split()))),
    Disguise("base64, no padding", lambda name: b64(name).rstrip("=") if len(b64(name).rstrip("=")) >= 8 else None),
    Disguise("base64, URL-safe", lambda name: base64.urlsafe_b64encode(name.encode()).decode()),
    Disguise(
        "base64, wrapped",
        lambda name: base64.encodebytes(b"So I said, and said again, that it may well be " + name.encode()).decode().strip(),
    ),
    Disguise("base64 of base64", lambda name: b64(b64(name))),
    Disguise("base64 of a sentence", lambda name: b64(f"Who is {name}, please?")),
    Disguise("base32", long(5)(lambda name: base64.b32encode(name.encode()).decode())),
    Disguise("base32, small", long(5)(lambda name: base64.b32encode(name.encode()).decode().lower())),
    Disguise("base85", latin(8)(lambda name: base64.b85encode(name.encode()).decode())),
    Disguise("ascii85", latin(8)(lambda name: base64.a85encode(name.encode()).decode())),
    Disguise("ascii85, marked", lambda name: base64.a85encode(name.encode(), adobe=True).decode()),
    Disguise("hexadecimal", per_byte("{:02x}")),
    Disguise("hexadecimal, capitals", per_byte("{:02X}")),
    Disguise("hexadecimal, spaces", per_byte("{:02x}", " ")),
    Disguise("hexadecimal, colons", per_byte("{:02x}", ":")),
    Disguise("hexadecimal, 0x", per_byte("0x{:02x}", " ")),
    Disguise("hexadecimal, 0x and commas", per_byte("0x{:02x}", ", ")),
    Disguise("\\x escapes", per_byte("\\x{:02x}")),
    Disguise("\\u escapes", per_character("\\u{:04x}")),
    Disguise("\\u{} escapes", per_character("\\u{{{:x}}}")),
    Disguise("\\U escapes", per_character("\\U{:08x}")),
    Disguise("\\N{} escapes", lambda name: "".join(f"\\N{{{unicodedata.name(c)}}}" for c in name)),
    Disguise("one \\u escape", lambda name: f"\\u{ord(name[0]):04x}{name[1:]}"),
    Disguise("octal escapes", latin(3)(per_byte("\\{:03o}", least=3))),
    Disguise("octal codes", latin(3)(per_byte("{:03o}", " ", least=3))),
    Disguise("decimal codes", latin(3)(per_byte("{}", " ", least=3))),
    Disguise("decimal codes, commas", latin(3)(per_byte("{}", ", ", least=3))),
    Disguise("U+ code points", per_character("U+{:04X}", " ")),
    Disguise("HTML, decimal", per_character("&#{};")),
    Disguise("HTML, hexadecimal", per_character("&#x{:x};")),
    Disguise("HTML, one letter", lambda name: f"&#{ord(name[0])};{name[1:]}"),
    Disguise("percent", per_byte("%{:02X}", least=1)),
    Disguise("quoted-printable", per_byte("={:02X}", least=2)),
    Disguise("punycode", lambda name: f"xn--{name.replace(' ', '').encode('punycode').decode()}" if "ł" in name.lower() else None),
    Disguise("binary", bits(8)),
    Disguise("binary, seven bits", bits(7)),
    Disguise("binary, glued", bits(8, "")),
    Disguise("places in the alphabet", latin(5)(by_words(lambda w: "-".join(str(ord(c) - 96) for c in w.lower())))),
    Disguise("places, all spaces", latin(8)(lambda name: " ".join(str(ord(c) - 96) for c in letters(name).lower()))),
    # Ciphers.
    *(Disguise(f"Caesar, {n}", shifted(n)) for n in (1, 3, 7, 13, 25)),
    Disguise("atbash", latin(6)(mapped({chr(b + i): chr(b + 25 - i) for b in (65, 97) for i in range(26)}))),
    Disguise("rot47", latin(5)(mapped({chr(33 + i): chr(33 + (i + 47) % 94) for i in range(94)}))),
    Disguise("backwards", long(6)(lambda name: name[::-1])),
    Disguise("words backwards", long(6)(by_words(lambda word: word[::-1]))),
    Disguise("base64 of rot13", latin(6)(lambda name: b64(codecs.encode(name, "rot13")))),
    Disguise("Morse", latin(5)(by_words(lambda w: " ".join(MORSE[ord(c) - 97] for c in w.lower()), " / "))),
    Disguise("NATO alphabet", latin(8)(lambda name: " ".join(NATO[ord(c) - 97] for c in letters(name).lower()))),
    Disguise("pig latin", latin(5)(lambda name: by_words(pig)(name) if " " in name else None)),
    Disguise("upside down, in order", lower(latin(5)(mapped(UPSIDE_DOWN)))),
    Disguise("upside down, turned", lower(latin(5)(lambda name: (mapped(UPSIDE_DOWN)(name) or "")[::-1]))),
    Disguise(
        "regional indicators",
        latin(5)(lambda name: " ".join("".join(chr(0x1F1E6 + ord(c) - 65) for c in letters(w)) for w in name.upper().split())),
    ),
    Disguise("tag characters", lambda name: "".join(chr(0xE0000 + ord(c)) for c in name) if name.isascii() else None),
    Disguise("first letters of words", latin(8)(lambda name: " ".join(c + "ome" for c in letters(name)))),
    Disguise("first letters of lines", latin(6)(lambda name: "\n".join(c + " is here" for c in letters(name))), alone=True),
    Disguise("half in base64", lambda name: f"{name.split()[0]} {b64(name.split(maxsplit=1)[1])}" if " " in name else None),
)

NOT_READ: tuple[Disguise, ...] = (
    Disguise("two letters changed", lambda name: "Hary Poter" if name == "Harry Potter" else None),
    Disguise("typo in a short name", lambda name: "Pual" if name == "Paul" else None),
    Disguise("transliteration", lambda name: "Garri Potter" if name == "Гарри Поттер" else None),
    Disguise("sounds alike", lambda name: "Hairy Podder" if name == "Harry Potter" else None),
    Disguise("letters of several characters", lambda name: "|-|arry |>otter" if name == "Harry Potter" else None),
    Disguise("every second letter", lambda name: "x".join(name) if name == "Harry Potter" else None),
    Disguise("Vigenère", lambda name: "Rijvs Uyvjn" if name == "Harry Potter" else None),
    Disguise("given name alone", lambda name: "Harry" if name == "Harry Potter" else None),
    Disguise("exclamation mark at the end", lambda name: name.replace("i", "!") if name.endswith("i") else None),
    Disguise("base64 of less than 8 characters", lambda name: " ".join(b64(c) for c in name) if name == "Harry Potter" else None),
    Disguise("spelled in words", lambda name: "aitch ay ar ar why" if name == "Harry Potter" else None),
    Disguise("Caesar, short name", lambda name: "Rcwn" if name == "Paul" else None),
    Disguise("Polish ending", lambda name: "Łukaszowi Wójcikowi" if "ł" in name.lower() else None),
)
