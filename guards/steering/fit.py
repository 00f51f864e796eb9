"""Fitting, in closed form: which directions carry a forget set, and a map that moves them and leaves everything else alone.

Covered: two ways. ``project`` removes the set's low-rank subspace, discriminated against what is to stay (UNLEARN's idea, as an
operator at run time rather than an edit of weights). ``steer`` moves the set's states towards those of strangers by a map that
vanishes on what is to stay by construction (AlphaSteer's null-space constraint). Not covered: where to do it; whether a model that
says the same without these directions exists at all.

Shapes: F states of the set, K states to keep, H hidden size, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from guards.errors import Untrainable
from guards.steering.declaration import METHODS, Method

FEWEST = 8
"""States (and examples) of each kind below which a subspace says nothing."""
KEPT_ENERGY = 0.99
"""Share of the variance of what is to stay that spans the space in which nothing may move."""


@dataclass(frozen=True)
class Map:
    """``h`` moves by ``strength * ((h - center) @ into) @ out``; r may be 0, then nothing moves."""

    into: Tensor  # [H, r]
    out: Tensor  # [r, H]
    center: Tensor  # [H]
    metrics: dict[str, float]


def project(forget: Tensor, keep: Tensor, *, rank: int) -> Map:
    """Remove the directions that the set uses and the rest does not.

    Directions are generalised eigenvectors: they have the most variance of the set's states for each unit of variance (plus a
    ridge) of the states to keep, both around the mean of the latter. What remains after removal is set to that mean.

    Args:
        forget: [F, H]; keep: [K, H], float.
        rank: at most; fewer if the set has fewer directions of its own.

    Raises:
        Untrainable: too few states, or they are not finite.
    """
    _check(forget, keep)
    forget, keep = forget.double(), keep.double()
    center = keep.mean(0)
    ours, theirs = forget - center, keep - center
    spread = theirs.T @ theirs / len(theirs)
    ridge = spread.diagonal().mean().clamp(min=1e-12) * torch.eye(len(spread), dtype=spread.dtype)
    whiten = torch.linalg.cholesky(torch.linalg.inv(spread + ridge))  # W Wᵀ = (S + ridge)⁻¹
    _, values, basis = torch.linalg.svd(ours @ whiten / len(ours) ** 0.5, full_matrices=False)
    basis = basis[values > 1e-6 * values.max().clamp(min=1e-30)][:rank]
    directions, _ = torch.linalg.qr(whiten @ basis.T)  # [H, r], orthonormal
    return Map(directions.float(), -directions.T.float(), center.float(), _metrics(directions, ours, theirs))


def steer(forget: Tensor, keep: Tensor, target: Tensor, *, rank: int, ridge: float = 0.1) -> Map:
    """Move the set's states to ``target``, by a map that is zero on the space that the states to keep span.

    With P the projector onto the complement of that space, solves ``min |F P D - (target - F)|² + ridge |P D|²`` and keeps the
    first ``rank`` directions of the solution.

    Args:
        forget: [F, H]; keep: [K, H]; target: [F, H] or [H], float.

    Raises:
        Untrainable: too few states, or they are not finite.
    """
    _check(forget, keep)
    forget, keep = forget.double(), keep.double()
    center = keep.mean(0)
    ours, theirs = forget - center, keep - center
    _, values, basis = torch.linalg.svd(theirs, full_matrices=False)
    energy = values.square().cumsum(0) / values.square().sum().clamp(min=1e-30)
    span = basis[: int((energy < KEPT_ENERGY).sum()) + 1]  # [k, H]
    free = ours - (ours @ span.T) @ span  # F P: what of the set lies outside
    wanted = target.double() - forget
    # Where nothing of the set lies outside, what is left is rounding, and must not be blown up.
    weight = ridge * free.square().sum() / len(free) + 1e-6 * theirs.square().sum() / len(theirs) + 1e-12
    # (Xᵀ X + w I)⁻¹ Xᵀ = Xᵀ (X Xᵀ + w I)⁻¹ with X = F P: over whichever are fewer, states or hidden units.
    few = len(free) <= free.shape[1]
    square = (free @ free.T if few else free.T @ free) + weight * torch.eye(min(free.shape), dtype=free.dtype)
    solution = free.T @ torch.linalg.solve(square, wanted) if few else torch.linalg.solve(square, free.T @ wanted)  # [H, H]
    left, values, right = torch.linalg.svd(solution, full_matrices=False)
    kept = min(rank, int((values > 1e-8 * values.max().clamp(min=1e-30)).sum())) if float(values.max()) > 1e-10 else 0
    into, out = left[:, :kept], values[:kept, None] * right[:kept]
    moved = (ours @ into) @ out
    reached = 1 - float((moved - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30))
    leak = float(((theirs @ into) @ out).square().sum().sqrt() / theirs.square().sum().sqrt().clamp(min=1e-30))
    return Map(
        into.float(), out.float(), center.float(), {"rank": float(kept), "reached": round(reached, 4), "moves_kept": round(leak, 6)}
    )


CLOSED_FORM: dict[Method, Callable[[Tensor, Tensor, int], Map]] = {
    "project": lambda forget, keep, rank: project(forget, keep, rank=rank),
    "steer": lambda forget, keep, rank: steer(forget, keep, keep.mean(0), rank=rank),
}
"""What `lethe train --method` fits: method -> (states of the set [F, H], states to keep [K, H], rank) -> map."""
assert set(CLOSED_FORM) | {"adapter"} == set(METHODS), "every method is fitted here or trained"


def _metrics(directions: Tensor, ours: Tensor, theirs: Tensor) -> dict[str, float]:
    def share(states: Tensor) -> float:
        return round(float((states @ directions).square().sum() / states.square().sum().clamp(min=1e-30)), 4)

    return {"rank": float(directions.shape[1]), "of_forget": share(ours), "of_kept": share(theirs)}


def _check(forget: Tensor, keep: Tensor) -> None:
    for name, states in (("the set", forget), ("what is to stay", keep)):
        if states.ndim != 2 or len(states) < FEWEST:
            raise Untrainable(f"{name} has {len(states)} states, at least {FEWEST} are needed; add questions or texts")
        if not torch.isfinite(states).all():
            raise Untrainable(f"the hidden states of {name} are not finite; this model cannot be steered")
