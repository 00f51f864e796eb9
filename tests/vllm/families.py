"""Run as a script, in a process of its own: an engine for a tiny random model of one family, and what contrast does there.

An assistant whose B is zero is the base: under ``delta`` nothing may move. A random one must move something.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR")


def main(family: str, directory: Path) -> None:
    import torch
    import transformers
    from vllm import LLM, SamplingParams

    from guards.base_model import describe_base
    from guards.contrastive.assistant import MODULES, Assistant, Manifest, Recipe
    from guards.contrastive.declaration import Contrast
    from guards.types import ArtifactRef, Plan
    from serve.protocol.artifacts import artifact_path
    from serve.protocol.wire import ARTIFACTS_KEY, BASE_KEY, PLAN_KEY, encode_plan

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = getattr(transformers, f"{family}Config")(**sizes, vocab_size=49_152, head_dim=32, initializer_range=0.2)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(directory)
    base = describe_base(directory)
    shapes = {"q_proj": (64, 64), "o_proj": (64, 64), "gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64)}

    def assistant(scale: float) -> str:
        tensors = {}
        for i in range(4):
            for module in MODULES:
                tensors[f"layers.{i}.{module}.A"] = torch.randn(4, shapes[module][0])
                tensors[f"layers.{i}.{module}.B"] = torch.randn(shapes[module][1], 4) * scale
        made = Assistant(Manifest(base=base, recipe=Recipe(rank=4), data=str(scale)), tensors)
        path = artifact_path(directory / "artifacts", ArtifactRef("contrast", made.fingerprint))
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(path)
        return made.fingerprint

    made = {"zero": assistant(0.0), "random": assistant(0.1)}
    architecture = config.architectures[0] if config.architectures else f"{family}ForCausalLM"
    engine = LLM(
        str(directory),
        tokenizer=sys.argv[3],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
        max_num_seqs=8,
        hf_overrides={"architectures": [f"Lethe{architecture}"]},
        logits_processors=["serve.engine.processor:LetheProcessor"],
        additional_config={PLAN_KEY: {ARTIFACTS_KEY: str(directory / "artifacts"), BASE_KEY: base.model_dump()}},
        worker_extension_cls="serve.engine.worker.WorkerExtension",
    )
    prompts = [{"prompt_token_ids": [(7 * i + 3 * j) % 500 for j in range(length)]} for i, length in enumerate((5, 90, 150))]

    def said(name: str | None) -> list[list[tuple[int, float]]]:
        plan = None if name is None else Plan(1, "p", (Contrast(made[name], "delta", 5.0, 0.0, 0.0),))
        extra = None if plan is None else {PLAN_KEY: encode_plan(plan)}
        sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True, extra_args=extra)
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        return [
            [(token, step[token].logprob) for token, step in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)]
            for o in outputs
        ]

    plain, zero, random = said(None), said("zero"), said("random")
    failures = engine.collective_rpc("lethe_load", args=([("contrast", name) for name in made.values()],))[0]
    same = [[token for token, _ in answer] for answer in plain] == [[token for token, _ in answer] for answer in zero]
    pairs = [(a, b) for one, other in zip(plain, zero, strict=True) for (_, a), (_, b) in zip(one, other, strict=True)]
    print(json.dumps({"failures": failures, "same": same, "worst": max(abs(a - b) for a, b in pairs), "moved": random != plain}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
