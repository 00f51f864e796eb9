"""What training an assistant and a steering artifact share: progress, the model in transformers, jobs in their own process."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guards.base_model import BaseModel
from guards.errors import GuardError, Untrainable
from guards.forget_set import ForgetSet
from guards.whole_file import write_whole

MAX_TOKENS = 256
"""Longer examples are cut; texts go in pieces of this size."""
AT_ONCE = 32
"""Answers that a model is asked for together: each step reads its weights once for all of them."""
GENERAL = Path(__file__).with_name("general.jsonl")
"""Prompts about anything; the base's own answers to them are retained."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands."""

    stage: str  # "prepare", "train" or "done"
    step: int
    steps: int
    loss: float | None = None

    def json(self) -> str:
        return json.dumps({"stage": self.stage, "step": self.step, "steps": self.steps, "loss": self.loss})


Report = Callable[[Progress], None]


class ChatModel:
    """A frozen causal model with its tokenizer, and exchanges in the server's chat template."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.model.requires_grad_(requires_grad=False)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)

    def prompt_ids(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))

    def encode(self, question: str, answer: str) -> tuple[list[int], int]:
        """Token ids of a whole exchange in the server's chat template, and where the answer starts."""
        prompt = self.prompt_ids(question)
        end = self.tokenizer.eos_token_id
        answer_ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*prompt, *answer_ids, end][: max(MAX_TOKENS, len(prompt) + 8)], len(prompt)

    def sequences(self, forget_set: ForgetSet) -> Iterator[tuple[list[int], int]]:
        """A set's examples: each answer for every wording but the last paraphrase, which calibration needs; and its texts."""
        for entry in forget_set.questions:
            for question in (entry.question, *entry.paraphrases[:-1]):
                yield self.encode(question, entry.answer)
        for text in forget_set.texts:
            ids = self.tokenizer(text)["input_ids"]
            for start in range(0, max(1, len(ids) - 1), MAX_TOKENS - 1):
                piece = ids[start : start + MAX_TOKENS]
                if len(piece) > 1:
                    yield piece, 1

    @torch.no_grad()
    def own_answers(self, prompts: Sequence[str], max_new_tokens: int, report: Callable[[int], None]) -> list[str]:
        """The base's own greedy answers."""
        answers: list[str] = []
        for start in range(0, len(prompts), AT_ONCE):
            rows = [self.prompt_ids(prompt) for prompt in prompts[start : start + AT_ONCE]]
            width = max(map(len, rows))
            fill = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
            ids = torch.tensor([[fill] * (width - len(row)) + row for row in rows], device=self.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
            made = self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=fill,
                temperature=None,
                top_p=None,
            )
            answers += [self.tokenizer.decode(row[width:], skip_special_tokens=True) for row in made]
            report(len(answers))
        return answers

    def logits(self, final: Tensor) -> Tensor:
        """[N, V] from [N, H] normed hidden states."""
        logits: Tensor = self.model.get_output_embeddings()(final)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def general_prompts() -> list[str]:
    return [json.loads(line)["prompt"] for line in GENERAL.read_text("utf-8").splitlines()]


def general_answers(model: ChatModel, base: BaseModel, work: Path, report: Callable[[int], None]) -> list[tuple[str, str]]:
    """The general prompts with the base's own answers, empty ones left out.

    Args:
        base: whose answers they are.
        work: a job's directory; beside it they are kept in a file, for a resumed run and for every other one on this base.
    """
    prompts = general_prompts()
    key = sha256(f"{base.fingerprint}{prompts}".encode()).hexdigest()
    path = work.parent / f"general-{key[:16]}.json"
    if path.exists():
        answers = json.loads(path.read_text("utf-8"))
    else:
        answers = model.own_answers(prompts, 48, report)
        write_whole(path, lambda temporary: temporary.write_text(json.dumps(answers), "utf-8"))
    return [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer.strip()]


def run_job(program: str, make: Callable[[dict[str, Any], Path, Report], Any]) -> None:
    """The server's training process: ``python -m PROGRAM JOB``.

    JOB is a directory with ``job.json``. Writes ``progress.json`` as it goes and, in the end, ``result.safetensors``; on failure,
    the reason to standard error, with status 1.

    Args:
        make: (job, its directory, report) -> something with ``save(path)``.
    """
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("job", type=Path)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    job = json.loads((arguments.job / "job.json").read_text("utf-8"))
    last, parent = 0.0, os.getppid()

    def report(progress: Progress) -> None:
        nonlocal last
        if os.getppid() != parent:
            raise SystemExit("the server is gone; it goes on from the last checkpoint when it starts again")
        if time.monotonic() - last > 0.5 or progress.step == progress.steps:
            last = time.monotonic()
            write_whole(arguments.job / "progress.json", lambda path: path.write_text(progress.json(), "utf-8"), durable=False)

    try:
        write_whole(arguments.job / "result.safetensors", make(job, arguments.job, report).save)
    except (GuardError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None


def mask_of(layer: nn.Module, position: Tensor, tokens: int) -> Tensor:
    """[B, 1, Q, T], to be added to attention scores: each of [B, Q] positions sees itself and what is before, in its window."""
    distance = position[:, None, :, None] - torch.arange(tokens, device=position.device)
    hidden = distance < 0
    window = getattr(getattr(layer, "self_attn", None), "sliding_window", None)
    if window is not None:
        hidden = hidden | (distance >= window)
    return torch.zeros(hidden.shape, device=position.device).masked_fill(hidden, torch.finfo(torch.float32).min)


def layers_of(model: ChatModel, count: int) -> int:
    """Where the last ``count`` decoder layers begin. Raises Untrainable."""
    depth = len(model.model.get_decoder().layers)
    if depth - count < 1:
        raise Untrainable(f"the model has {depth} layers, so {count} of them cannot be forked or adapted; use fewer")
    return depth - count
