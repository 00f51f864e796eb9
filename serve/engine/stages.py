"""A pipeline of several stages: which layers a stage has, and what it tells the next one.

Guards on logits, and assistants, act in the last stage, which has the rows. Steering acts in every stage, on that stage's layers.
If one of them could not steer a request, the last must close its rows: so each hands on, beside the hidden states, a number for
each token that says whether something was left undone. Stages cannot ask one another within a step, since the later one waits for
the earlier one's hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group
from vllm.model_executor.models.utils import PPMissingLayer

UNDONE = "lethe_undone"
"""The key beside the hidden states."""


def layers_here(layers: Sequence[nn.Module]) -> range:
    """The numbers of a model's layers that this process has: all of them, or those of its stage."""
    here = [i for i, layer in enumerate(layers) if not isinstance(layer, PPMissingLayer)]
    return range(here[0], here[-1] + 1) if here else range(0)


def of_all_stages(places: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """What any stage has found. All stages must call it, and outside of a step."""
    stages = get_pp_group()
    if stages.world_size == 1:
        return places
    found: list[set[tuple[str, int]]] = [set()] * stages.world_size
    torch.distributed.all_gather_object(found, places, group=stages.cpu_group)
    return set().union(*found)


class Undone:
    """What this stage left undone, at a fixed address, so that a CUDA graph can hand it on. Shape: T tokens.

    Args:
        like: of the hidden states' dtype and device. tokens: the most that a pass may have.
    """

    def __init__(self, like: Tensor, tokens: int) -> None:
        self._noted = like.new_zeros(tokens, 1)
        self._any = False

    def note(self, slots: Tensor | None, undone: Sequence[bool]) -> None:
        """Of the pass that comes, or has just been.

        Args:
            slots: [T] int64, -1 = unguarded; None if nobody is guarded. undone: by slot.
        """
        if slots is not None and any(undone):
            by_slot = torch.tensor([*undone, False], dtype=self._noted.dtype)
            self._noted[: len(slots), 0] = by_slot.to(self._noted.device)[slots]
            self._any = True
        elif self._any:
            self._noted.zero_()
            self._any = False

    def hand_on(self, tokens: int, before: Tensor | None) -> Tensor:
        """[T, 1], 0 = all was done. ``before``: what the stage before this one handed on; None in the first."""
        # A copy: the next pass may be noted while this one is still sent.
        return self._noted[:tokens].clone() if before is None else torch.maximum(self._noted[:tokens], before)
