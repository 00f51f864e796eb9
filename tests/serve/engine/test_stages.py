"""Stages of a pipeline, without an engine."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from guards.contrastive.assistant import FORKED_LAYERS

pytest.importorskip("vllm", reason="vLLM is not installed: its models are what this is about")
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sequence import IntermediateTensors

from serve.engine.fork import LateFork, Unforkable
from serve.engine.guarded_model import GuardedModel
from serve.engine.slots import SlotTable
from serve.engine.stages import UNDONE, Undone, layers_here

LAYER = nn.Linear(2, 2)


@pytest.mark.parametrize(("elsewhere", "mine", "later"), [(0, 4, 0), (0, 4, 3), (3, 4, 2), (2, 0, 2)])
def test_a_stage_knows_its_own_layers(elsewhere: int, mine: int, later: int) -> None:
    layers: list[nn.Module] = [*[PPMissingLayer()] * elsewhere, *[LAYER] * mine, *[PPMissingLayer()] * later]
    assert list(layers_here(layers)) == list(range(elsewhere, elsewhere + mine))


def test_a_last_stage_without_all_the_layers_beside_which_assistants_run_says_how_to_give_it_more() -> None:
    layers = [*[PPMissingLayer()] * 8, *[LAYER] * (FORKED_LAYERS - 1)]
    model: Any = SimpleNamespace(model=SimpleNamespace(layers=layers, norm=LAYER))
    config: Any = SimpleNamespace(lora_config=None)
    with pytest.raises(Unforkable, match=f"has {FORKED_LAYERS - 1} layers.*VLLM_PP_LAYER_PARTITION"):
        LateFork(model, config)


def test_what_any_stage_left_undone_is_handed_on_for_its_own_tokens_and_passes_alone() -> None:
    first, second = Undone(torch.zeros(0), 8), Undone(torch.zeros(0), 8)
    slots = torch.tensor([0, 0, -1, 2, 1])

    def handed_on() -> list[float]:
        return second.hand_on(len(slots), first.hand_on(len(slots), None)).squeeze(1).tolist()

    assert handed_on() == [0, 0, 0, 0, 0]
    first.note(slots, [True, False, False])
    second.note(slots, [False, True, False])
    assert handed_on() == [1, 1, 0, 0, 1]
    first.note(slots, [False, False, False])
    assert handed_on() == [0, 0, 0, 0, 1]
    second.note(None, [False, True, False])
    assert handed_on() == [0, 0, 0, 0, 0]


class Stage:
    """A base model's forward pass in one stage: what is given instead of computed."""

    said: Any

    def forward(self, *_: Any) -> Any:
        return self.said


class Guarded(GuardedModel, Stage):
    def __init__(self, said: Any, slots: SlotTable, undone: Undone | None) -> None:
        steering = SimpleNamespace(undone=undone, acting=nullcontext)
        self.said, self.lethe = said, SimpleNamespace(steering=steering, slots=slots)  # type: ignore[assignment]


def test_the_last_stage_closes_the_rows_of_tokens_for_which_an_earlier_stage_left_something_undone() -> None:
    slots, hidden = SlotTable(3, 8, np.zeros(4, dtype=bool), torch.device("cpu")), torch.ones(4, 2)
    of_tokens = torch.tensor([0, 1, -1, 2])
    tags, ids = slots.tags(of_tokens, torch.zeros(4, dtype=torch.int64), hidden.dtype), torch.zeros(4)
    undone = Undone(torch.zeros(0), 8)
    undone.note(of_tokens, [False, True, False])
    first = Guarded(IntermediateTensors({"hidden_states": hidden}), slots, undone)
    handed_on: Any = first.forward(ids, ids, lethe_tags=tags)
    assert set(handed_on.tensors) == {"hidden_states", UNDONE}
    out: Any = Guarded(hidden, slots, None).forward(ids, ids, handed_on, lethe_tags=tags)
    assert slots.lost(out[:, 2:]).tolist() == [1]
    assert torch.equal(out[[0, 2, 3], 2:], tags[[0, 2, 3]]), "whose the other rows are was changed"
