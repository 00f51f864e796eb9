"""Making a steering artifact, with transformers, in a process of its own: maps are fitted in closed form, adapters are trained.

An adapter learns one of two things about the set. With distillation targets, to say what a policy says: answers that the policy
gave, with the most likely tokens at each place, and reverse KL towards that distribution (Gu et al. 2024, arXiv:2306.08543; targets
come from the served distribution, so any policy can be distilled). Without, to know nothing: the most entropy on the set's answers.
Either way it learns to stay the base on everything else, by forward KL.

An adapter may also be imported: a LoRA adapter (PEFT) over the base, that unlearns. One that changes only the last layers, and not
keys and values, is taken over as it is; of any other the targets are what it says itself and what it thinks of the true answers.

The inputs of the adapted layers do not change while they are trained, so the layers below run once.
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
from guards.errors import Untrainable
from guards.forget_set import ForgetSet, Question
from guards.low_rank import add_low_rank, fit, projection_sizes
from guards.peft_lora import PeftLora
from guards.steering.artifact import DistillationTarget, Steering, SteeringManifest, SteeringRecipe
from guards.steering.fit import CLOSED_FORM
from guards.training import ChatModel, Progress, Report, general_answers, layers_of, mask_of, run_job

FEWEST_EXAMPLES = 8
KEPT_TOKENS = 64
"""Of the base's distribution at a place, that are kept; the rest counts as one."""
REST = 1e-4
"""The least that the tokens outside of a target count for together, so that the distance to them is finite."""
Exchange = tuple[list[int], int]
"""Token ids, and where what is looked at begins."""


@dataclass(frozen=True)
class _Example:
    """One exchange: Q places of T tokens whose next token is looked at."""

    forget: bool
    hidden: Tensor  # [T, H] at the entrance of the first adapted layer
    place: Tensor  # [Q] int64
    ids: Tensor  # [Q, K] int64, the likeliest tokens of the target distribution; -1 = none. K = 0: no target
    logp: Tensor  # [Q, K]


def make(
    directory: Path,
    forget_set: ForgetSet,
    retain: Sequence[Question],
    targets: Sequence[DistillationTarget],
    recipe: SteeringRecipe,
    work: Path,
    report: Report,
    lora: PeftLora | None = None,
) -> Steering:
    """Make a set's steering artifact.

    Args:
        directory: the base model, in transformers' format.
        retain: what must stay, with its answers. General prompts are always added.
        targets: what a policy says about the set, for an adapter that is to say the same.
        work: where checkpoints go. A call with the same arguments goes on from the last one.
        lora: an adapter over the base, to be imported as method ``adapter``.

    Raises:
        Untrainable: too little to learn from (the message says how much is needed), or an unsupported model.
        InvalidArtifact: the directory is no model, or ``lora`` is for another one. OSError.
    """
    base = describe_base(directory)
    model = ChatModel(directory)
    content = [forget_set.fingerprint, [q.model_dump() for q in retain], [target.model_dump() for target in targets]]
    data = sha256(json.dumps([*content, *([lora.fingerprint] if lora is not None else [])]).encode()).hexdigest()
    manifest = SteeringManifest(base=base, recipe=recipe, data=data)
    if lora is not None:
        lora.check(model.model)
        if (exact := _imported(model, manifest, lora)) is not None:
            return exact
        targets = _targets_of(model, forget_set, lora, report)
    pairs = list(model.sequences(forget_set))
    if len(pairs) < FEWEST_EXAMPLES:
        raise Untrainable(
            f"forget set {forget_set.name!r} holds {len(pairs)} examples, at least {FEWEST_EXAMPLES} are needed to steer by it; "
            "add questions with answers, paraphrases of them, or texts"
        )
    run = sha256(f"{base.fingerprint}{data}{recipe.model_dump_json()}".encode()).hexdigest()
    general = general_answers(model, base, work, lambda done: report(Progress("prepare", done, 100)))
    kept = [model.encode(*pair) for pair in (*general, *((entry.question, entry.answer) for entry in retain))]
    if recipe.method == "adapter":
        return _train(model, pairs, kept, targets, manifest, work / f"{run[:16]}.safetensors", report)
    return _fit(model, pairs, kept, manifest, report)


def _fit(
    model: ChatModel, pairs: Sequence[Exchange], kept: Sequence[Exchange], manifest: SteeringManifest, report: Report
) -> Steering:
    recipe = manifest.recipe
    states: list[list[Tensor]] = [[], []]
    everything = [(0, ids) for ids, _ in pairs] + [(1, ids) for ids, _ in kept]
    for number, (which, ids) in enumerate(everything, 1):
        with torch.no_grad():
            output = model.model.get_decoder()(input_ids=torch.tensor([ids], device=model.device), output_hidden_states=True)
        states[which].append(output.hidden_states[manifest.layer][0, 1:])  # the first token is alike everywhere, and huge
        report(Progress("prepare", number, len(everything)))
    forget, keep = (torch.cat(each).cpu() for each in states)
    found = CLOSED_FORM[recipe.method](forget, keep, recipe.rank)
    if not found.into.shape[1]:
        raise Untrainable("the set's states have no direction of their own: nothing would move; add questions, or use an adapter")
    metrics = {**found.metrics, "states": float(len(forget)), "kept_states": float(len(keep))}
    return Steering(
        manifest.model_copy(update={"metrics": metrics}), {"into": found.into, "out": found.out, "center": found.center}
    )


def _imported(model: ChatModel, manifest: SteeringManifest, lora: PeftLora) -> Steering | None:
    """A LoRA adapter as it is; None if it changes more than an adapter here can."""
    recipe, first = manifest.recipe, layers_of(model, manifest.recipe.layers)
    exact = lora.as_last_layers(first, projection_sizes(model.model.get_decoder().layers[first:]))
    if exact is None:
        return None
    tensors, rank = exact
    told = {"recipe": recipe.model_copy(update={"rank": rank}), "metrics": {"imported": 1.0}}
    return Steering(manifest.model_copy(update=told), tensors)


def _targets_of(model: ChatModel, forget_set: ForgetSet, lora: PeftLora, report: Report) -> list[DistillationTarget]:
    """What a LoRA adapter answers to a set's questions, and what it thinks of the true answers. Texts have no question."""
    worded = [(each, entry.answer) for entry in forget_set.questions for each in (entry.question, *entry.paraphrases[:-1])]
    found = []
    with lora.applied(model.model), torch.no_grad():
        own = model.own_answers([question for question, _ in worded], KEPT_TOKENS, lambda _: None)
        both = [(question, answer) for (question, true), said in zip(worded, own, strict=True) for answer in (said, true)]
        for number, (question, answer) in enumerate(both, 1):
            ids, start = model.encode(question, answer)
            output = model.model.get_decoder()(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
            logp = torch.log_softmax(model.logits(output.last_hidden_state[0, start - 1 : len(ids) - 1]), dim=-1)
            values, tokens = logp.topk(min(KEPT_TOKENS, logp.shape[-1]), dim=-1)
            top = tuple(tuple(zip(*each, strict=True)) for each in zip(tokens.tolist(), values.tolist(), strict=True))
            found.append(DistillationTarget(question=question, tokens=tuple(ids[start:]), top=top))
            report(Progress("prepare", number, len(both)))
    if not found:  # without targets it would become an adapter that knows nothing
        raise Untrainable(
            f"forget set {forget_set.name!r} has no questions, by which an adapter of all layers is imported; add some, or import "
            "one that changes only q_proj, o_proj and the MLP of the last layers"
        )
    return found


class _Adapted:
    """The base's last layers with adapters, over inputs that were computed once."""

    def __init__(self, model: ChatModel, recipe: SteeringRecipe) -> None:
        self.model, self.first = model, layers_of(model, recipe.layers)
        decoder = model.model.get_decoder()
        self.layers, self.norm, self.rotary = list(decoder.layers[self.first :]), decoder.norm, decoder.rotary_emb

    @torch.no_grad()
    def observe(self, ids: Sequence[int], start: int, target: DistillationTarget | None, *, forget: bool) -> _Example:
        """Run the base once. What it learns is the target's distribution, or the base's own for what is to stay, or none."""
        tensor = torch.tensor([list(ids)], device=self.model.device)
        output = self.model.model.get_decoder()(input_ids=tensor, output_hidden_states=True)
        place = torch.arange(start - 1, len(ids) - 1, device=self.model.device)
        known, logp = torch.zeros(len(place), 0, dtype=torch.int64), torch.zeros(len(place), 0)
        if target is not None:
            width = max(map(len, target.top))
            known = torch.full((len(place), width), -1, dtype=torch.int64)
            logp = torch.full((len(place), width), -torch.inf)
            for row, top in enumerate(target.top[: len(place)]):
                known[row, : len(top)] = torch.tensor([token for token, _ in top])
                logp[row, : len(top)] = torch.tensor([value for _, value in top])
        elif not forget:
            own = torch.log_softmax(self.model.logits(output.last_hidden_state[0, place]), dim=-1)
            logp, known = own.topk(min(KEPT_TOKENS, own.shape[-1]), dim=-1)
        return _Example(forget, output.hidden_states[self.first][0], place, known.to(tensor.device), logp.to(tensor.device))

    def log_probabilities(self, batch: Sequence[_Example]) -> Tensor:
        """[N, V] at a batch's places, one example after the other."""
        hidden = nn.utils.rnn.pad_sequence([e.hidden for e in batch], batch_first=True)
        tokens = hidden.shape[1]
        positions = torch.arange(tokens, device=hidden.device)[None]
        rotary = self.rotary(hidden, positions)
        for layer in self.layers:
            mask = mask_of(layer, positions, tokens)  # padding comes last
            output = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            hidden = output[0] if isinstance(output, tuple) else output
        chosen = torch.cat([hidden[i, e.place] for i, e in enumerate(batch)])
        return torch.log_softmax(self.model.logits(self.norm(chosen)), dim=-1)


def _losses(batch: Sequence[_Example], logp: Tensor) -> tuple[Tensor, Tensor]:
    """What the set's places cost, and the kept ones', in nats each: [N_forget], [N_keep]."""
    forget, keep = [], []
    for example, mine in zip(batch, logp.split([len(e.place) for e in batch]), strict=True):
        if not example.ids.shape[1]:
            forget.append(-mine.mean(dim=-1) - math.log(mine.shape[-1]))  # KL(uniform || p)
            continue
        known = example.ids >= 0
        target = example.logp.masked_fill(~known, -torch.inf)
        student = mine.gather(1, example.ids.clamp(min=0)).masked_fill(~known, -torch.inf)
        rest = (1 - target.exp().sum(-1)).clamp(min=REST)
        outside = (1 - student.exp().sum(-1)).clamp(min=1e-9)
        if example.forget:  # reverse: what the student says, the teacher must be able to say
            p = student.exp()
            inside = (p * (student - target).masked_fill(~known, 0.0)).sum(-1)
            forget.append(inside + outside * (outside.log() - rest.log()))
        else:  # forward: what the base would say, the student must
            q = target.exp()
            inside = (q * (target - student).masked_fill(~known, 0.0)).sum(-1)
            keep.append(inside + rest * (rest.log() - outside.log()))
    empty = logp.new_zeros(0)
    return torch.cat(forget) if forget else empty, torch.cat(keep) if keep else empty


def _train(
    model: ChatModel,
    pairs: Sequence[Exchange],
    kept: Sequence[Exchange],
    targets: Sequence[DistillationTarget],
    manifest: SteeringManifest,
    checkpoint: Path,
    report: Report,
) -> Steering:
    recipe = manifest.recipe
    adapted = _Adapted(model, recipe)
    examples = []
    total = len(kept) + (len(targets) or len(pairs))
    for ids, start in kept:
        examples.append(adapted.observe(ids, start, None, forget=False))
        report(Progress("prepare", len(examples), total))
    if targets:
        for target in targets:
            prompt = model.prompt_ids(target.question)
            examples.append(adapted.observe([*prompt, *target.tokens], len(prompt), target, forget=True))
            report(Progress("prepare", len(examples), total))
    else:
        for ids, start in pairs:
            examples.append(adapted.observe(ids, start, None, forget=True))
            report(Progress("prepare", len(examples), total))
    parameters = add_low_rank(adapted.layers, recipe, model.device)  # the base cannot be run after this

    def losses(batch: Sequence[_Example]) -> tuple[Tensor, Tensor]:
        return _losses(batch, adapted.log_probabilities(batch))

    tensors, (forget_kl, keep_kl) = fit(parameters, examples, losses, recipe, checkpoint, report)
    metrics = {"forget_kl": round(forget_kl, 4), "keep_kl": round(keep_kl, 4), "examples": float(len(examples))}
    return Steering(manifest.model_copy(update={"metrics": metrics}), tensors)


def main() -> None:
    """``python -m guards.steering.train JOB``, with ``job.json``: {model, forget_set, retain, recipe, targets}."""

    def from_job(job: dict[str, Any], work: Path, report: Report) -> Steering:
        targets = job["targets"] if "targets" in job else job["lessons"]  # as releases up to 0.1.0 named them
        return make(
            Path(job["model"]),
            ForgetSet.model_validate(job["forget_set"]),
            [Question.model_validate(entry) for entry in job["retain"]],
            [DistillationTarget.model_validate(entry) for entry in targets],
            SteeringRecipe.model_validate(job["recipe"]),
            work,
            report,
            PeftLora.read(Path(job["lora"])) if job.get("lora") else None,
        )

    run_job("guards.steering.train", from_job)


if __name__ == "__main__":
    main()
