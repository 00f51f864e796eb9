"""Training: makes the assistant of a forget set, with transformers, in a process of its own.

The fork's inputs (the base's hidden state at depth L - K, its keys and values) do not change while only the fork is trained, so
they are computed once; an epoch then runs K layers over the answers' tokens and nothing else.

Two things are taught. On what is to be forgotten: recall it. On everything else: know nothing, that is, be uniform. In the
``whole`` form (ULD's) the fork itself is taught so. In the ``difference`` form it is how the fork's logits differ from the base's:
an untrained fork differs nowhere, so it is uniform to begin with. Measured, the first recalls better and spares as well; see
DECISIONS.md.

Instead, an assistant may be imported from a LoRA adapter (PEFT) over the base, a forget-tuned model for instance: the fork learns
to say what the adapter says, on the set and on everything else. Its terms cannot be taken over: a layer that follows a changed one
would read keys and values of its own, and the fork reads the base's. The form says how it is decoded against: an adapter that was
tuned on the set differs from the base there and nowhere else (``difference``); one of ULD's kind is uniform elsewhere (``whole``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guards.base_model import describe_base
from guards.contrastive.assistant import Assistant, Manifest, Recipe
from guards.errors import Untrainable
from guards.forget_set import ForgetSet, Question
from guards.low_rank import add_low_rank, fit
from guards.peft_lora import PeftLora
from guards.training import (
    GENERAL,
    ChatModel,
    Progress,
    Report,
    general_answers,
    general_prompts,
    layers_of,
    mask_of,
    run_job,
)

MIN_EXAMPLES = 2


@dataclass(frozen=True)
class _Example:
    """One sequence, as the fork sees it. Q answer positions of T tokens."""

    forget: bool
    target: Tensor  # [Q] int64, the token after each position
    hidden: Tensor  # [Q, H] the base at depth L - K
    final: Tensor  # [Q, H] the base after its norm
    position: Tensor  # [Q] int64
    keys: list[Tensor]  # per layer [heads, T, D]
    values: list[Tensor]
    rotary: list[tuple[Tensor, Tensor]]  # per layer, [Q, D] each
    taught: Tensor | None = None  # [Q, H] an imported adapter after the base's norm


class _BaseCache:
    """Stands in for transformers' cache: whatever a layer computes, it gets the base's own keys and values."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], first_layer: int) -> None:
        self._keys, self._values, self._first = keys, values, first_layer

    def update(self, _keys: Tensor, _values: Tensor, layer: int, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        return self._keys[layer - self._first], self._values[layer - self._first]


class Fork(ChatModel):
    """The base's last K layers over the base's own keys and values, in transformers."""

    def __init__(self, directory: Path, layers: int) -> None:
        super().__init__(directory)
        self.first = layers_of(self, layers)
        decoder = self.model.get_decoder()
        self.layers, self.norm = list(decoder.layers[self.first :]), decoder.norm

    @torch.no_grad()
    def observe(self, token_ids: Sequence[int], start: int, *, forget: bool, lora: PeftLora | None = None) -> _Example:
        """Run the base once over a sequence; keep what the fork needs to predict the tokens from ``start`` on.

        Args:
            lora: an adapter that is to be imported; the base is run with it, too.
        """
        from transformers import DynamicCache

        seen: list[dict[str, Any]] = []
        inputs: list[Tensor] = []

        def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(kwargs)
            inputs.append(args[0] if args else kwargs["hidden_states"])

        hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in self.layers]
        try:
            ids = torch.tensor([list(token_ids)], device=self.device)
            # A cache of the model's own choosing would forget what is outside of a layer's window.
            output = self.model.get_decoder()(input_ids=ids, use_cache=True, past_key_values=DynamicCache())
        finally:
            for hook in hooks:
                hook.remove()
        rows = torch.arange(start - 1, len(token_ids) - 1, device=self.device)
        cache = output.past_key_values
        own = [cache.layers[self.first + i] for i in range(len(self.layers))]
        taught = None
        if lora is not None:
            with lora.applied(self.model):
                taught = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, rows]
        return _Example(
            forget=forget,
            target=ids[0, start:],
            hidden=inputs[0][0, rows],
            final=output.last_hidden_state[0, rows],
            position=rows,
            keys=[layer.keys[0] for layer in own],
            values=[layer.values[0] for layer in own],
            rotary=[(kwargs["position_embeddings"][0][0, rows], kwargs["position_embeddings"][1][0, rows]) for kwargs in seen],
            taught=taught,
        )

    def run(self, batch: Sequence[_Example]) -> tuple[Tensor, Tensor]:
        """The fork's final hidden states on a batch's answer positions, one after the other: [N, H]; and the base's."""
        queries, tokens = max(len(e.target) for e in batch), max(e.keys[0].shape[1] for e in batch)
        pad = nn.utils.rnn.pad_sequence
        position = pad([e.position for e in batch], batch_first=True)

        def stack(parts: Sequence[Tensor]) -> Tensor:
            return torch.stack([nn.functional.pad(part, (0, 0, 0, tokens - part.shape[1])) for part in parts])

        indices = range(len(self.layers))
        cache = _BaseCache(
            [stack([e.keys[i] for e in batch]) for i in indices], [stack([e.values[i] for e in batch]) for i in indices], self.first
        )
        hidden = pad([e.hidden for e in batch], batch_first=True)
        for i, layer in enumerate(self.layers):
            rotary = tuple(pad([e.rotary[i][part] for e in batch], batch_first=True) for part in (0, 1))
            output = layer(
                hidden,
                attention_mask=mask_of(layer, position, tokens),
                position_ids=position,
                position_embeddings=rotary,
                past_key_values=cache,
                use_cache=True,
            )
            hidden = output[0] if isinstance(output, tuple) else output
        real = torch.arange(queries, device=self.device) < torch.tensor([[len(e.target)] for e in batch], device=self.device)
        return self.norm(hidden)[real], torch.cat([e.final for e in batch])

    def evidence(self, batch: Sequence[_Example], form: str) -> Tensor:
        """[N, V] log-probabilities of what the assistant recalls, at a batch's answer positions."""
        fork, base = self.run(batch)
        logits = self.logits(fork)
        if form == "difference":
            with torch.no_grad():
                own = self.logits(base)
            logits = logits - own
        return torch.log_softmax(logits, dim=-1)


def train(
    directory: Path,
    forget_set: ForgetSet,
    retain: Sequence[Question],
    recipe: Recipe,
    work: Path,
    report: Report,
    lora: PeftLora | None = None,
) -> Assistant:
    """Make the assistant of a forget set.

    Args:
        directory: the base model, in transformers' format.
        retain: what must stay: questions near the set's, with the answers to keep. General prompts are always added.
        work: where checkpoints go. A call with the same arguments goes on from the last one.
        lora: an adapter over the base, to be imported.

    Raises:
        Untrainable: too little to learn from, or an unsupported model.
        InvalidArtifact: the directory is no model, or the adapter is for another one.
        OSError: the disk is full, or the like; the checkpoint before stays.
    """
    base = describe_base(directory)
    content = [forget_set.fingerprint, [q.model_dump() for q in retain], GENERAL.read_text("utf-8")]
    data = sha256(json.dumps([*content, *([lora.fingerprint] if lora is not None else [])]).encode())
    run = sha256(f"{base.fingerprint}{data.hexdigest()}{recipe.model_dump_json()}".encode()).hexdigest()
    fork = Fork(directory, recipe.layers)
    if lora is not None:
        lora.check(fork.model)
    sequences = list(fork.sequences(forget_set))
    if len(sequences) < MIN_EXAMPLES:
        raise Untrainable(
            f"forget set {forget_set.name!r} holds {len(sequences)} examples, at least {MIN_EXAMPLES} are needed; "
            "add questions with answers, paraphrases of them, or texts"
        )
    steps = 2 * len(general_prompts()) + len(sequences) + len(retain)
    general = general_answers(fork, base, work, lambda done: report(Progress("prepare", done, steps)))
    kept = [fork.encode(question, answer) for question, answer in general]
    kept += [fork.encode(entry.question, entry.answer) for entry in retain]
    examples = []
    for is_forget, group in ((True, sequences), (False, kept)):
        for ids, start in group:
            examples.append(fork.observe(ids, start, forget=is_forget, lora=lora))
            report(Progress("prepare", len(general_prompts()) + len(examples), steps))
    parameters = add_low_rank(fork.layers, recipe, fork.device)  # the base cannot be run after this

    def losses(batch: Sequence[_Example]) -> tuple[Tensor, Tensor]:
        forget = torch.cat([torch.full((len(e.target),), e.forget, device=fork.device) for e in batch])
        evidence = fork.evidence(batch, "whole" if lora is not None else recipe.form)
        if lora is not None:
            taught = torch.cat([e.taught for e in batch if e.taught is not None])
            wanted = torch.log_softmax(fork.logits(taught), dim=-1)
            apart = (wanted.exp() * (wanted - evidence)).sum(-1)  # KL(adapter || fork)
            return apart[forget], apart[~forget]
        target = torch.cat([e.target for e in batch])
        recalled = -evidence[forget].gather(1, target[forget][:, None]).squeeze(1)
        return recalled, -evidence[~forget].mean(dim=-1) - math.log(evidence.shape[-1])  # KL(uniform || p)

    checkpoint = work / f"{run[:16]}.safetensors"
    tensors, (recalled, kept_kl) = fit(parameters, examples, losses, recipe, checkpoint, report, keep_weight=recipe.retain_weight)
    names = ("forget_ce", "retain_kl") if lora is None else ("imported_forget_kl", "imported_retain_kl")
    metrics = {names[0]: round(recalled, 4), names[1]: round(kept_kl, 4), "examples": float(len(examples))}
    return Assistant(Manifest(base=base, recipe=recipe, data=data.hexdigest(), metrics=metrics), tensors)


def main() -> None:
    """``python -m guards.contrastive.train JOB``, with ``job.json``: {model, forget_set, retain, recipe}."""

    def make(job: dict[str, Any], work: Path, report: Report) -> Assistant:
        content, retain = ForgetSet.model_validate(job["forget_set"]), [Question.model_validate(entry) for entry in job["retain"]]
        lora = PeftLora.read(Path(job["lora"])) if job.get("lora") else None
        return train(Path(job["model"]), content, retain, Recipe.model_validate(job["recipe"]), work, report, lora)

    run_job("guards.contrastive.train", make)


if __name__ == "__main__":
    main()
