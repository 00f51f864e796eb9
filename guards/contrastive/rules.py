"""The rules: how the assistant's logits are set against the target's. Pure tensor arithmetic, row by row.

All rules share two steps around their own penalty. It acts inside the *plausible set*, the tokens to which the target itself gives
at least a fraction of its top probability: what it takes from one of them goes to the others of the set, and all other tokens keep
the probability that they had, so that the far tail cannot win by not being penalised. And where several assistants apply to a row,
the largest penalty counts for each token, not the sum, so that sets that overlap do not punish twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from guards.contrastive.declaration import RuleName
from guards.errors import VocabularyMismatch

Penalty = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _uld(target: Tensor, assistant: Tensor, difference: Tensor, margin: Tensor) -> Tensor:
    """What the assistant recalls beyond chance: ``relu(log p + log V - margin)``; a uniform assistant penalises nothing."""
    recalled = torch.log_softmax(_evidence(target, assistant, difference), dim=-1) + math.log(assistant.shape[-1])
    return (recalled - margin[:, None]).clamp(min=0)


def _uld_raw(target: Tensor, assistant: Tensor, difference: Tensor, margin: Tensor) -> Tensor:
    """The plain difference of logits, as published: also rewards whatever the assistant finds unlikely."""
    del margin
    return _evidence(target, assistant, difference)


def _whp(target: Tensor, assistant: Tensor, difference: Tensor, margin: Tensor) -> Tensor:
    """Where the assistant wants a token more than the target does: ``relu(l_assistant - l_target - margin)``."""
    del difference
    return (assistant - target - margin[:, None]).clamp(min=0)


def _ucd(target: Tensor, assistant: Tensor, difference: Tensor, margin: Tensor) -> Tensor:
    """The same in log-probabilities: ``relu(log p_assistant - log p_target - margin)``."""
    del difference
    return (torch.log_softmax(assistant, dim=-1) - torch.log_softmax(target, dim=-1) - margin[:, None]).clamp(min=0)


def _delta(target: Tensor, assistant: Tensor, difference: Tensor, margin: Tensor) -> Tensor:
    """The whole offset that training gave the assistant, both ways: ``l_assistant - l_target``."""
    del difference, margin
    return assistant - target


def _evidence(target: Tensor, assistant: Tensor, difference: Tensor) -> Tensor:
    """The logits that were trained to recall: the assistant's own, or how they differ from the target's."""
    return assistant - torch.where(difference[:, None], target, 0.0)


RULES: dict[RuleName, Penalty] = {"uld": _uld, "uld-raw": _uld_raw, "whp": _whp, "ucd": _ucd, "delta": _delta}
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


def subtract_assistants(
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
    """Contrast rows of the target with one or more assistants each.

    Args:
        target: [R, V] float, before temperature. ``-inf`` stays ``-inf``.
        assistant: [P, V] float, finite: one line per pair of a row and an assistant, same prefix and vocabulary as the row.
        row: [P] int64, the row of each line. Rows that are not named come back bit for bit.
        rule: a key of `RULES`, the same for all lines.
        alpha: [P] float >= 0, dimensionless. A row whose lines all have 0 comes back bit for bit.
        margin: [P] float, in nats.
        plausibility: [P] float in [0, 1]; where lines of a row differ, the strictest counts.
        difference: [P] bool, whether the assistant recalls by how it differs from the target (see `train`).

    Returns:
        New [R, V] tensor, dtype of ``target``. Inputs are not modified.

    Raises:
        VocabularyMismatch: the numbers of columns differ, most often because the tokenizers do.
        KeyError: there is no such rule.
    """
    if target.shape[-1] != assistant.shape[-1]:
        raise VocabularyMismatch(
            f"the target has {target.shape[-1]} tokens, the assistant {assistant.shape[-1]}; train the assistant on this model"
        )
    penalty = RULES[rule]
    acting = (alpha > 0).nonzero().squeeze(1)
    if not len(acting):
        return target.clone()
    row, assistant = row[acting], assistant[acting].float()
    own = target[row].float()
    dead = own == -torch.inf
    # An impossible token takes no part in any normaliser; a number keeps inf - inf from becoming NaN until it is put back.
    lowest = torch.finfo(own.dtype).min / 4
    own, assistant = own.masked_fill(dead, lowest), assistant.masked_fill(dead, lowest)
    weighted = alpha[acting, None].float() * penalty(own, assistant, difference[acting], margin[acting].float())
    named, index = row.unique(return_inverse=True)
    before = target[named].float()
    largest = torch.full_like(before, -torch.inf).scatter_reduce(0, index[:, None].expand_as(weighted), weighted, "amax")
    strictest = torch.zeros(len(named), device=target.device).scatter_reduce(0, index, plausibility[acting].float(), "amax")
    left_out = implausible_tokens(before, strictest)
    inside = (before - largest).masked_fill(left_out, -torch.inf)
    kept = torch.logsumexp(before.masked_fill(left_out, -torch.inf), dim=-1, keepdim=True)
    contrasted = torch.where(left_out, before, inside + (kept - torch.logsumexp(inside, dim=-1, keepdim=True)))
    result = target.clone()
    result[named] = torch.where(before == -torch.inf, before, contrasted).to(target.dtype)
    return result
