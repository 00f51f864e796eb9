"""The slow, obvious twins of the fast paths. Nothing here shares code with what it checks."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

APOSTROPHES = "'\u2018\u2019\u201a\u201b\u02b9\u02bb\u02bc\u02bd\u02be\u02bf\u02c8\u00b4\u0060\u2032\u2035\u05f3\u055a\ua78c\uff07"
APOSTROPHES += "\u1fbd\u1fbf\u1ffd\u1ffe\u0384\u07f4\u275b\u275c"
QUOTES = '"\u201c\u201d\u201e\u201f\u00ab\u00bb\u2039\u203a\u2033\u2036\u05f4\u300c\u300d\u300e\u300f\u301d\u301e\u301f\uff02'
QUOTES += "\u275d\u275e\u2e42\U0001f676\U0001f677\U0001f678"
GREEK_MARKS = "\u0300\u0301\u0304\u0306\u0308\u0313\u0314\u0342\u0343"
SEPARATORS = " -./()',:+_;|[]\u00b7\u066b\u066c\u3001" + "".join(
    chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == "Sc"
)


def is_invisible(character: str) -> bool:
    code, category = ord(character), unicodedata.category(character)
    drawn = {0x0600, 0x0601, 0x0602, 0x0603, 0x0604, 0x0605, 0x06DD, 0x070F, 0x0890, 0x0891, 0x08E2, 0x110BD, 0x110CD}
    fillers = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x3164, 0xFFA0}
    return (
        (category == "Cf" and code not in drawn)
        or (category == "Cc" and not character.isspace())
        or code in fillers
        or unicodedata.name(character, "").startswith("VARIATION SELECTOR")
        or 0xE0000 <= code <= 0xE0FFF
    )


def is_vowel_mark(character: str) -> bool:
    """Marks that Arabic, Hebrew and Syriac are usually written without; a hamza or madda is part of its letter."""
    name = unicodedata.name(character, "")
    return (
        unicodedata.category(character) == "Mn" and name.startswith(("ARABIC ", "HEBREW ", "SYRIAC ")) and "HAMZA" not in name
    ) and name != "ARABIC MADDAH ABOVE"


def is_unspaced(character: str) -> bool:
    scripts = "CJK HIRAGANA KATAKANA HALFWIDTH KATAKANA-HIRAGANA HENTAIGANA BOPOMOFO IDEOGRAPHIC KANGXI THAI LAO KHMER MYANMAR"
    scripts += " TIBETAN TAI NEW AHOM JAVANESE BALINESE YI NUSHU TANGUT KHITAN"
    first = unicodedata.name(character, "").split(" ")[0]
    return character >= "\u0e00" and first in scripts.split() and unicodedata.category(character)[0] in "LMN"


def is_word(character: str) -> bool:
    return character == "_" or (unicodedata.category(character)[0] in "LMN" and not is_unspaced(character))


def is_mark(symbol: str) -> bool:
    return unicodedata.combining(symbol) != 0


def decode(text: bytes) -> list[tuple[str, int]]:
    """Characters with the byte offset at which each ends; invalid bytes become lone surrogates of their own."""
    characters, offset = [], 0
    for character in text.decode("utf-8", errors="surrogateescape"):
        offset += len(character.encode("utf-8", errors="surrogateescape"))
        characters.append((character, offset))
    return characters


def symbols_of(character: str, *, fold_case: bool, match: str) -> str:
    """What one character is compared as, by Unicode's caseless and compatibility matching (D145, D146) and our own table of
    punctuation. At most four symbols: what would be longer stays itself."""
    if 0xD800 <= ord(character) < 0xE000:
        return character
    if match != "exact":
        if is_invisible(character) or is_vowel_mark(character) or character == "\u0640":
            return ""
        if character.isspace() or character == "\u2800":
            return " "
    text, compatible = character, match != "exact"
    for _ in range(2):
        text = unicodedata.normalize("NFD", text)
        text = text.casefold() if fold_case else text
        text = unicodedata.normalize("NFKD" if compatible else "NFD", text)
    if fold_case:
        text = text.replace("\u0131", "i")
    if character in APOSTROPHES and compatible:
        text = "'"
    elif character in QUOTES and compatible:
        text = '"'
    if compatible:
        text = "".join("" if _left_out(c) else _plain(c) for c in text)
    if fold_case:
        text = "".join(reduced(list(text), fold_case=True))
    if len(text) > 4 or (len(text) > 1 and (" " in text or "/" in text)):
        return character
    return text


def _left_out(symbol: str) -> bool:
    return is_vowel_mark(symbol) or is_invisible(symbol) or symbol == "\u0640" or unicodedata.category(symbol) == "Me"


def _plain(symbol: str) -> str:
    if symbol in APOSTROPHES:
        return "'"
    if symbol in QUOTES:
        return '"'
    if unicodedata.category(symbol) == "Pd" or symbol in "\u2212\u2043\u02d7":
        return "-"
    if symbol in "\u2044\u2215":
        return "/"
    same = {"\u2022": "\u00b7", "\u2027": "\u00b7", "\u22c5": "\u00b7", "\u30fb": "\u00b7"}
    same |= {"\u06cc": "\u064a", "\u06a9": "\u0643", "\u0671": "\u0627"}
    if symbol in same:
        return same[symbol]
    digit = unicodedata.decimal(symbol, None)
    return symbol if digit is None else str(digit)


def reduced(symbols: list[str], *, fold_case: bool) -> list[str]:
    """Without the marks that capitals are written without: tonos and the like on Greek, the dot on i and j."""
    kept: list[str] = []
    for symbol in symbols:
        base = next((each for each in reversed(kept) if not is_mark(each)), "")
        greek = base and unicodedata.name(base, "").startswith("GREEK ")
        if fold_case and ((symbol == "\u0307" and base and base in "ij") or (greek and symbol in GREEK_MARKS)):
            continue
        kept.append(symbol)
    return kept


def folded(characters: Iterable[str], *, fold_case: bool, match: str) -> list[tuple[str, int]]:
    """(symbol, index of its character) of a text, one symbol after the other."""
    kept: list[tuple[str, int]] = []
    for index, character in enumerate(characters):
        symbols = symbols_of(character, fold_case=fold_case, match="folded" if match == "number" else match)
        for symbol in symbols:
            before = [each for each, _ in kept]
            if match == "number" and symbol in SEPARATORS:
                continue
            if match == "folded" and before and before[-1] == " " and symbol in " /":
                continue
            if reduced([*before, symbol], fold_case=fold_case) == reduced(before, fold_case=fold_case) and is_mark(symbol):
                continue
            kept.append((symbol, index))
    return kept


def is_number(phrase: str) -> bool:
    text = "".join(symbols_of(c, fold_case=True, match="folded") for c in phrase)
    rest = [c for c in text if c not in SEPARATORS]
    digits = sum(c in "0123456789" for c in rest)
    return digits >= 6 and all(c in "0123456789abcdefghijklmnopqrstuvwxyz" for c in rest) and len(rest) - digits <= digits


def forms(phrase: str, *, fold_case: bool, match: str) -> set[tuple[str, ...]]:
    """Every order of the marks of a phrase that is canonically the same, and what a leading slash turns into after a space."""
    symbols = "".join(symbol for symbol, _ in folded(phrase.strip(), fold_case=fold_case, match=match))
    while symbols and (is_mark(symbols[0]) or symbols[0] == " "):  # an accent on nothing
        symbols = symbols[1:]
    symbols = symbols.rstrip(" ")
    if match == "folded" and not symbols.strip("/ "):  # which drop out after white space
        return set()
    runs: list[list[str]] = [[""]]
    for is_run, group in itertools.groupby(symbols, key=is_mark):
        text = "".join(group)
        orders = {text}
        if is_run:
            same = unicodedata.normalize("NFD", text)
            orders = {o for o in map("".join, itertools.permutations(text)) if unicodedata.normalize("NFD", o) == same}
        runs.append(sorted(orders))
    found = {"".join(parts) for parts in itertools.product(*runs)}
    if fold_case:  # the Armenian ligature ech yiwn is written ech vew in capitals
        found |= {form.replace("\u0565\u0582", "\u0565\u057e") for form in found}
        found |= {form.replace("\u0565\u057e", "\u0565\u0582") for form in found}
    if match == "folded":
        found |= {f" {rest}" for form in found if form.startswith("/") and (rest := form.lstrip("/ "))}
    return {tuple(form) for form in found if form}


def occurrences(
    text: bytes, phrases: Iterable[str], *, fold_case: bool, left_boundary: bool, match: str = "folded"
) -> set[tuple[int, int]]:
    """(start, end) in characters of every occurrence of every phrase: it starts and ends with a character."""
    characters = [character for character, _ in decode(text)]
    found = set()
    for phrase in phrases:
        kind = "number" if match == "folded" and is_number(phrase) else match
        haystack = folded(characters, fold_case=fold_case, match=kind)
        for needle in forms(phrase, fold_case=fold_case, match=kind):
            for start in range(len(haystack) - len(needle) + 1):
                end = start + len(needle)
                if tuple(symbol for symbol, _ in haystack[start:end]) != needle:
                    continue
                first, last = haystack[start][1], haystack[end - 1][1]
                whole = (start == 0 or haystack[start - 1][1] != first) and (end == len(haystack) or haystack[end][1] != last)
                base = next((symbol for symbol, _ in reversed(haystack[:start]) if not is_mark(symbol)), "")
                bound = left_boundary and kind != "number" and not is_unspaced(needle[0]) and needle[0] != " "
                bound = bound and base and is_word(base)
                if whole and not bound:
                    found.add((first, last + 1))
    return found


def completes(
    history: bytes, token: bytes, phrases: Iterable[str], *, fold_case: bool, left_boundary: bool, match: str = "folded"
) -> bool:
    """Would ``token`` after ``history`` finish a phrase that was not finished before?"""
    ends = [end for _, end in decode(history + token)]
    return any(
        ends[end - 1] > len(history)
        for _, end in occurrences(history + token, phrases, fold_case=fold_case, left_boundary=left_boundary, match=match)
    )


def contrasted(target: Tensor, assistant: Tensor, lines: Sequence[tuple], rule: str) -> Tensor:
    """Rules of contrast, token by token in Python's floats. A line: row, alpha, margin, plausibility, difference."""
    result = target.clone()
    for row in range(len(target)):
        mine = [(number, line) for number, line in enumerate(lines) if line[0] == row and line[1] > 0]
        if not mine:
            continue
        own = [float(value) for value in target[row]]
        possible = [v for v, value in enumerate(own) if value > -math.inf]
        cut = max(line[3] for _, line in mine)
        penalties = []
        for number, (_, alpha, margin, _, difference) in mine:
            said = [float(value) if v in possible else -math.inf for v, value in enumerate(assistant[number])]
            penalties.append([alpha * penalty for penalty in _penalty(rule, own, said, margin, difference)])
        inside = [v for v in possible if not (cut > 0 and own[v] < max(own) + math.log(cut))]
        changed = {v: own[v] - max(penalty[v] for penalty in penalties) for v in inside}
        # All of them together stay as likely as they were.
        most = max(*own, *changed.values())
        kept, left = (sum(math.exp(value - most) for value in values) for values in ([own[v] for v in inside], changed.values()))
        for v in inside:
            result[row, v] = changed[v] + math.log(kept / left)
    return result


def _penalty(rule: str, own: list[float], said: list[float], margin: float, difference: bool) -> list[float]:
    """Per token. An impossible one is -inf in both; its own penalty is 0, and nobody asks for it."""
    offset = [s - o if o > -math.inf else 0.0 for s, o in zip(said, own, strict=True)]
    evidence = offset if difference else said
    if rule == "uld":
        return [max(0.0, value - _log_sum(evidence) + math.log(len(own)) - margin) for value in evidence]
    if rule == "uld-raw":
        return evidence
    if rule == "whp":
        return [max(0.0, value - margin) for value in offset]
    if rule == "ucd":
        return [max(0.0, value - _log_sum(said) + _log_sum(own) - margin) for value in offset]
    return offset


def _log_sum(values: Sequence[float]) -> float:
    top = max(values)
    return top if math.isinf(top) else top + math.log(sum(math.exp(value - top) for value in values))


def contrasted_quickly(own: Tensor, said: Tensor, lines: Sequence[tuple], rule: str) -> Tensor:
    """`contrasted` for one row of a real vocabulary: the same arithmetic on float64 tensors, which that one checks in small."""
    penalties = []
    for spoken, (_, alpha, margin, _, difference) in zip(said, lines, strict=True):
        evidence = spoken - own if difference else spoken
        penalties.append(
            alpha
            * {
                "uld": (evidence.log_softmax(0) + math.log(len(own)) - margin).clamp(min=0),
                "uld-raw": evidence,
                "whp": (spoken - own - margin).clamp(min=0),
                "ucd": (spoken.log_softmax(0) - own.log_softmax(0) - margin).clamp(min=0),
                "delta": spoken - own,
            }[rule]
        )
    cut = own < own.max() + math.log(max(line[3] for line in lines))
    inside = (own - torch.stack(penalties).amax(0))[~cut]
    result = own.clone()
    result[~cut] = inside + own[~cut].logsumexp(0) - inside.logsumexp(0)
    return result


class ForkTwin:
    """A Llama and its forks in plain torch, over whole sequences and without any cache."""

    def __init__(self, directory: Path, layers: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.fork = list(range(self.model.config.num_hidden_layers - layers, self.model.config.num_hidden_layers))

    @torch.no_grad()
    def logits(self, ids: Sequence[int], *assistants: dict[str, Tensor]) -> list[Tensor]:
        """[T, V] of the base, then of each assistant."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        inner, config = self.model.model, self.model.config
        seen = inner(torch.tensor([list(ids)]), output_hidden_states=True)
        results = [self.model.lm_head(seen.last_hidden_state)[0]]
        positions = torch.arange(len(ids))[None]
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        size = config.hidden_size // heads
        cos, sin = inner.rotary_emb(seen.hidden_states[0], positions)
        for tensors in assistants:
            hidden = seen.hidden_states[self.fork[0]]
            for i, number in enumerate(self.fork):
                layer = inner.layers[number]

                def adapted(module: str, linear: torch.nn.Linear, x: Tensor, i: int = i, tensors: dict = tensors) -> Tensor:
                    weight = linear.weight + tensors[f"layers.{i}.{module}.B"] @ tensors[f"layers.{i}.{module}.A"]
                    return x @ weight.T

                own = layer.input_layernorm(seen.hidden_states[number])
                normed = layer.input_layernorm(hidden)
                query = adapted("q_proj", layer.self_attn.q_proj, normed).view(1, -1, heads, size).transpose(1, 2)
                key, value = (
                    linear(own).view(1, -1, kv_heads, size).transpose(1, 2)
                    for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj)
                )
                query, key = apply_rotary_pos_emb(query, key, cos, sin)
                key, value = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (key, value))
                attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
                hidden = hidden + adapted("o_proj", layer.self_attn.o_proj, attended.transpose(1, 2).reshape(1, len(ids), -1))
                normed = layer.post_attention_layernorm(hidden)
                gate, up = adapted("gate_proj", layer.mlp.gate_proj, normed), adapted("up_proj", layer.mlp.up_proj, normed)
                hidden = hidden + adapted("down_proj", layer.mlp.down_proj, torch.nn.functional.silu(gate) * up)
            results.append(self.model.lm_head(inner.norm(hidden))[0])
        return results
