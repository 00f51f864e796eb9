"""What steering does to tensors, for the tokens of some requests and nobody else's. T tokens, N of them steered, H hidden size.

Every operator depends on a token alone (its state, its position, a seed), never on what stands beside it in the batch: chunked
prefill, a preemption and a batch of other requests change nothing.

Covered: redirection of hidden states by a low-rank map, low-rank terms on projections (adapters), corruption of embeddings. Not
covered: which tokens those are, and where in the network: see `serve.engine`.

Sources: embedding corruption, Liu et al. 2024 (ECO, arXiv:2406.07933); removal of a subspace, Lizzo and Heck 2024 (UNLEARN,
arXiv:2408.04140); null-space steering, Sheng et al. 2025 (AlphaSteer, arXiv:2506.07022); adapters, Hu et al. 2021
(arXiv:2106.09685).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from guards.steering.declaration import Corruption


def redirect(hidden: Tensor, *, into: Tensor, out: Tensor, center: Tensor, strength: float | Tensor) -> Tensor:
    """How far hidden states move: ``strength * ((hidden - center) @ into) @ out``.

    Args:
        hidden: [N, H] float, the residual stream of the steered tokens.
        into: [H, r]; out: [r, H]; center: [H]. r may be 0: nothing moves.
        strength: dimensionless, also [N, 1]; 0 moves nothing.

    Returns:
        [N, H] in float32: what to add.
    """
    return strength * (((hidden.float() - center) @ into) @ out)


def corrupt(embeddings: Tensor, positions: Tensor, *, kind: Corruption, strength: float, first_n: int, seed: int) -> Tensor:
    """Embeddings that no longer say what they said.

    Args:
        embeddings: [N, H] of the tokens to corrupt; positions: [N] int64, where they stand in their request.
        kind: ``rand_noise_first_n`` adds Gaussian noise of ``strength`` times each token's own standard deviation to the first n
            dimensions; ``zero_out_top_k`` zeroes the n that are largest in magnitude; ``flip_sign_first_n`` turns the first n
            round. The last two use ``strength`` as the share of the change that is made: 1 = all of it.
        first_n: n (k), cut to H.
        seed: with the position, decides the noise.

    Returns:
        New [N, H].
    """
    width = min(first_n, embeddings.shape[-1])
    if kind == "zero_out_top_k":
        top = embeddings.abs().topk(width, dim=-1).indices
        return embeddings.scatter(-1, top, embeddings.gather(-1, top) * (1 - strength))
    changed = embeddings.clone()
    if kind == "flip_sign_first_n":
        changed[:, :width] *= 1 - 2 * strength
    else:
        spread = embeddings.float().std(dim=-1, keepdim=True)
        noise = _gaussian(positions, width, seed).to(embeddings.device)
        changed[:, :width] += (strength * spread * noise).to(embeddings.dtype)
    return changed


def _gaussian(positions: Tensor, width: int, seed: int) -> Tensor:
    """[N, width] standard normal numbers that depend on seed, position and column alone: a counter-based generator.

    Two rounds of a 64-bit mixer (the finaliser of SplitMix64, Steele et al. 2014), Box and Muller's transform.
    """
    column = torch.arange(2 * width, dtype=torch.int64, device=positions.device)
    counter = (positions[:, None].to(torch.int64) << 20) + column + seed * 0x5851F42D4C957F2D % 2**62
    mixed = counter
    for multiplier in (-4658895280553007687, -7723592293110705685):
        mixed = (mixed ^ ((mixed >> 30) & (2**34 - 1))) * multiplier
    mixed = mixed ^ ((mixed >> 31) & (2**33 - 1))
    uniform = ((mixed >> 11) & (2**53 - 1)).double().add(0.5) / 2**53
    first, second = uniform.split(width, dim=-1)
    return ((-2 * first.log()).sqrt() * (2 * math.pi * second).cos()).float()
