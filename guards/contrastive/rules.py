"""The rules: how the assistant's logits are set against the target's. Pure tensor arithmetic, row by row.

All rules share two steps around their own penalty. It acts inside the *plausible set*, the tokens to which the target itself gives
at least a fraction of its top probability: what it takes from one of them goes to the others of the set, and all other tokens keep
the probability that they had, so that the far tail cannot win by not being penalised. And where several assistants apply to a row,
the largest penalty counts for each token, not the sum, so that sets that overlap do not punish twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from guards.contrastive.declaration import RuleName
from guards.errors import VocabularyMismatch


@dataclass(frozen=True, slots=True)
class Rule:
    """How a token is penalised.

    Args:
        recalls: by what the assistant was trained to recall, its own logits or how they differ from the target's; else by how its
            logits differ from the target's.
        norm: what does not count: ``chance``, so that a uniform assistant penalises nothing, or ``totals``, so that logits compare
            as log-probabilities do.
        positive: whether only what goes beyond norm and margin counts; else all of it, both ways.
    """

    recalls: bool
    norm: Literal["", "chance", "totals"]
    positive: bool


RULES: dict[RuleName, Rule] = {
    "uld": Rule(recalls=True, norm="chance", positive=True),
    "uld-raw": Rule(recalls=True, norm="", positive=False),
    "whp": Rule(recalls=False, norm="", positive=True),
    "ucd": Rule(recalls=False, norm="totals", positive=True),
    "delta": Rule(recalls=False, norm="", positive=False),
}
"""uld: Ji et al. 2024 (arXiv:2406.08607), centred and its positive part only; uld-raw: as published there; whp: Eldan and
Russinovich 2023 (arXiv:2310.02238); ucd: Suriyakumar et al. 2025 (arXiv:2506.12097); delta: Huang et al. 2024 (arXiv:2404.11045).
The last two name a second, clean auxiliary model; here the base stands in for it, which is what an untrained fork equals."""
assert RULES.keys() == set(get_args(RuleName))


def implausible_tokens(target: Tensor, plausibility: Tensor) -> Tensor:
    """[R, V] bool: tokens to which the target gives less than ``plausibility`` times its top probability.

    Args:
        target: [R, V] float logits.
        plausibility: [R] float in [0, 1]; 0 keeps every token.

    Source: the adaptive plausibility constraint, Li et al. 2023 (arXiv:2210.15097).
    """
    return target < target.amax(dim=-1, keepdim=True) + plausibility.log()[:, None]


def subtract_assistants_(
    target: Tensor,
    assistant: Tensor,
    *,
    row: Tensor,
    rule: RuleName,
    alpha: Tensor,
    margin: Tensor,
    plausibility: Tensor,
    difference: Tensor,
) -> Tensor:
    """Contrast rows of the target with one or more assistants each, in place.

    Args:
        target: [R, V] float, before temperature. ``-inf`` stays ``-inf``.
        assistant: [P, V] float, finite where alpha is not 0: one line per pair of a row and an assistant, same prefix and
            vocabulary as the row.
        row: [P] int64, the row of each line. Rows that are not named stay bit for bit.
        rule: a key of `RULES`, the same for all lines.
        alpha: [P] float >= 0, dimensionless. A row whose lines all have 0 stays bit for bit.
        margin: [P] float, in nats.
        plausibility: [P] float in [0, 1]; where lines of a row differ, the strictest counts.
        difference: [P] bool, whether the assistant recalls by how it differs from the target (see `train`).

    Returns:
        ``target``.

    Raises:
        VocabularyMismatch: the numbers of columns differ, most often because the tokenizers do.
        KeyError: there is no such rule.
    """
    if target.shape[-1] != assistant.shape[-1]:
        raise VocabularyMismatch(
            f"the target has {target.shape[-1]} tokens, the assistant {assistant.shape[-1]}; train the assistant on this model"
        )
    acting = (alpha > 0).nonzero().squeeze(1)
    if not len(acting):
        return target
    if len(acting) < len(alpha):
        row, assistant, difference = row[acting], assistant[acting], difference[acting]
        alpha, margin, plausibility = alpha[acting], margin[acting], plausibility[acting]
    named, named_row = row.unique(return_inverse=True)
    before = (target if len(named) == len(target) else target[named]).float()
    strictest = torch.zeros(len(named), device=target.device).scatter_reduce(0, named_row, plausibility.float(), "amax")
    plausible = ~implausible_tokens(before, strictest) & (before > -torch.inf)
    place, token = plausible.nonzero(as_tuple=True)  # N tokens, row by row: few, so what is done to them costs little
    # M pairs: every line with every plausible token of its row.
    count = torch.bincount(place, minlength=len(named))
    of_line = count[named_row]
    line = torch.arange(len(row), device=target.device).repeat_interleave(of_line)
    within = torch.arange(len(line), device=target.device) - (of_line.cumsum(0) - of_line)[line]
    pair = (count.cumsum(0) - count)[named_row[line]] + within
    penalty = _penalty(RULES[rule], before, assistant.float(), named_row, difference, margin.float(), line, token[pair])
    own = before[place, token]
    largest = torch.full_like(own, -torch.inf).scatter_reduce(0, pair, alpha[line].float() * penalty, "amax")
    kept, left = (_logsumexp(values, place, len(named)) for values in (own, own - largest))
    target[named[place], token] = (own - largest + (kept - left)[place]).to(target.dtype)
    return target


def _penalty(
    rule: Rule, target: Tensor, assistant: Tensor, row: Tensor, difference: Tensor, margin: Tensor, line: Tensor, token: Tensor
) -> Tensor:
    """[M] penalties at strength 1, of lines at tokens ([M] int64 each).

    Args:
        target: [R, V]; assistant: [P, V]; row, difference, margin: [P], as in `subtract_assistants_`; ``row`` into this target.
    """
    if rule.recalls and bool(difference.any()):
        assistant = assistant - torch.where(difference[:, None], target[row], 0.0)
    said = assistant[line, token]
    if not rule.recalls:
        said = said - target[row[line], token]
    if rule.norm:
        dead = target == -torch.inf  # an impossible token takes no part in any norm
        possible = assistant.masked_fill(dead[row], -torch.inf) if bool(dead.any()) else assistant
        total = possible.logsumexp(-1)
        norm = total - (target.logsumexp(-1)[row] if rule.norm == "totals" else math.log(target.shape[-1]))
        said = said - norm[line]
    return (said - margin[line]).clamp(min=0) if rule.positive else said


def _logsumexp(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """[G] of [N] values by their group; ``-inf`` for a group without any."""
    top = values.new_full((groups,), -torch.inf).scatter_reduce(0, group, values, "amax")
    return top + values.new_zeros(groups).index_add(0, group, (values - top[group]).exp()).log()
