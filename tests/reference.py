"""The slow, obvious twins of the fast paths. Nothing here shares code with what it checks."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor


def fold_character(character: str) -> str:
    for _ in range(2):
        for folded in (character.casefold(), character.lower()):
            if len(folded) == 1:
                character = folded
                break
    return character


def is_word(character: str) -> bool:
    return character == "_" or unicodedata.category(character)[0] in "LMN"


def decode(text: bytes) -> list[tuple[str, int]]:
    """Characters with the byte offset at which each ends; invalid bytes become lone surrogates of their own."""
    characters, offset = [], 0
    for character in text.decode("utf-8", errors="surrogateescape"):
        offset += len(character.encode("utf-8", errors="surrogateescape"))
        characters.append((character, offset))
    return characters


def spellings(phrase: str, fold_case: bool) -> set[str]:
    forms = {phrase}
    if fold_case:
        forms |= {phrase.upper(), phrase.lower(), phrase.title(), phrase.casefold()}
    return forms | {unicodedata.normalize(form, text) for text in forms for form in ("NFC", "NFD")}


def occurrences(text: bytes, phrases: Iterable[str], *, fold_case: bool, left_boundary: bool) -> set[tuple[int, int]]:
    """(start, end) in characters of every occurrence of every phrase."""
    characters = [character for character, _ in decode(text)]
    fold = fold_character if fold_case else (lambda character: character)
    haystack = [fold(character) for character in characters]
    found = set()
    for phrase in phrases:
        for form in spellings(phrase.strip(), fold_case):
            needle = [fold(character) for character in form]
            for start in range(len(haystack) - len(needle) + 1):
                if haystack[start : start + len(needle)] == needle and not (
                    left_boundary and start and is_word(characters[start - 1])
                ):
                    found.add((start, start + len(needle)))
    return found


def completes(history: bytes, token: bytes, phrases: Iterable[str], *, fold_case: bool, left_boundary: bool) -> bool:
    """Would ``token`` after ``history`` finish a phrase that was not finished before?"""
    ends = [end for _, end in decode(history + token)]
    return any(
        ends[end - 1] > len(history)
        for _, end in occurrences(history + token, phrases, fold_case=fold_case, left_boundary=left_boundary)
    )


def contrasted(target: Tensor, assistant: Tensor, lines: Sequence[tuple], rule: str, shift: float) -> Tensor:
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
        for v in possible:
            implausible = cut > 0 and own[v] < max(own) + math.log(cut)
            result[row, v] = own[v] - (shift if implausible else max(penalty[v] for penalty in penalties))
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
    return torch.where(cut, own - 1e4, own - torch.stack(penalties).amax(0))


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
