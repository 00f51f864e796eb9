"""What benchmarks without a server share: vLLM's engine in this process, with or without lethe, and what guards may be asked to do.

Artifacts are random, of the usual sizes: what they cost does not depend on what they know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from guards.base_model import describe_base
from guards.contrastive.declaration import Contrast
from guards.steering.declaration import Steer
from guards.suppression.automaton import compile_phrases
from guards.suppression.declaration import Suppress
from guards.types import ArtifactRef, Entry, Plan
from serve.protocol.artifacts import artifact_path
from serve.protocol.vocabulary import vocabulary_of
from serve.protocol.wire import ARTIFACTS_KEY, BASE_KEY, GUARDED_PREFIX, PLAN_KEY, encode_plan
from tests.assistants import random_assistant
from tests.bench.steering import random_steering

ENGINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
"""The environment in which such a benchmark measures."""
PHRASES = 10_000
ASSISTANTS = 16
RANK = 32
Entries = Sequence[tuple[Entry, ...]]
"""What is asked of a batch: of one request after the other, in turns."""


def sizes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a model's projections."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * (config.get("head_dim") or hidden // config["num_attention_heads"])
    wide = {"gate_proj": (hidden, mlp), "up_proj": (hidden, mlp), "down_proj": (mlp, hidden)}
    return {"q_proj": (hidden, queries), "o_proj": (queries, hidden), **wide}


@dataclass(frozen=True)
class Bench:
    """An engine, and where its artifacts are.

    Args:
        model: a Llama. directory: for artifacts, and empty.
    """

    model: Path
    directory: Path
    engine: LLM

    @staticmethod
    def start(model: Path, directory: Path, *, guarded: bool, **options: Any) -> Bench:
        if guarded:
            there = {ARTIFACTS_KEY: str(directory), BASE_KEY: describe_base(model).model_dump()}
            options |= {
                "hf_overrides": {"architectures": [f"{GUARDED_PREFIX}LlamaForCausalLM"]},
                "logits_processors": ["serve.engine.processor:LetheProcessor"],
                "additional_config": {PLAN_KEY: there},
                "worker_extension_cls": "serve.engine.worker.WorkerExtension",
            }
        engine = LLM(str(model), **options)
        if guarded:
            engine.collective_rpc("lethe_describe")
        return Bench(model, directory, engine)

    def _saved(self, guard: str, artifact: Any) -> str:
        path = artifact_path(self.directory, ArtifactRef(guard, artifact.fingerprint))
        path.parent.mkdir(parents=True, exist_ok=True)
        artifact.save(path)
        return str(artifact.fingerprint)

    def suppression(self) -> Entries:
        vocabulary = vocabulary_of(self.engine.get_tokenizer(), self.engine.model_config.get_vocab_size())
        return [
            (Suppress(self._saved("suppression", compile_phrases([f"Person {i} Example" for i in range(PHRASES)], vocabulary))),)
        ]

    def contrast(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Entries]:
        assistants = [random_assistant(self.model, "whole", seed, RANK, sizes=sizes) for seed in range(ASSISTANTS)]
        contrasted = [(Contrast(self._saved("contrast", each), "uld", 1.0, 4.0, 0.01),) for each in assistants]
        return {
            "half contrasted": [contrasted[0], ()],
            "all contrasted": contrasted[:1],
            f"all contrasted, {ASSISTANTS} assistants": contrasted,
        }

    def steering(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Entries]:
        made = {"map": random_steering(self.model, "project"), "adapter": random_steering(self.model, "adapter", sizes=sizes)}
        return {name: [(Steer(self._saved("steering", each), 1.0),)] for name, each in made.items()}

    def run(self, batch: int, entries: Entries, *, prompt: int, tokens: int) -> None:
        """Let so many requests say so many tokens, after prompts of so many."""
        plans = [Plan(1, "p", mine) for mine in entries]
        prompts: list[Any] = [
            {"prompt_token_ids": [(7 * i + 3 * j) % 500 + 20 for j in range(prompt)]}
            | ({} if (salt := plans[i % len(plans)].cache_salt) is None else {"cache_salt": salt})
            for i in range(batch)
        ]
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                extra_args={PLAN_KEY: encode_plan(plan)} if (plan := plans[i % len(plans)]).entries else None,
            )
            for i in range(batch)
        ]
        self.engine.generate(prompts, sampling, use_tqdm=False)
