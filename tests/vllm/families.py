"""An engine for a tiny random model of one family, and what every guard does there, in a process of its own.

As a script it takes an order as JSON (`Order`) and prints what was found as JSON in its last line; `tests.vllm.waiting` takes many.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from tests.vllm.tiny_models import HEAD, HEADS, HIDDEN, LAYERS, MLP, MODELS, sizes_of

LENGTHS = (5, 90, 150)
"""Of the prompts, in tokens: a step takes 64."""


Said = list[tuple[int, float]]
"""An answer: its tokens, and the log-probability of each."""


class Order(TypedDict):
    """What to run."""

    config: str  # transformers' class of the configuration, such as LlamaConfig
    model: str  # and of the model
    options: dict[str, Any]  # of the configuration
    engine: dict[str, Any]  # of vLLM's LLM
    directory: str  # where the model is made
    tokenizer: str
    adapted: dict[str, tuple[int, int]]  # the projections that take low-rank terms, and their sizes
    plans: Sequence[str]  # which; () = all
    prompts: int  # how many, the shortest first
    draws: int  # how often to sample two tokens, to see how they are distributed
    graphs: bool  # whether to capture CUDA graphs, see `tests.rig.graphs_on_cpu`
    stages: str  # of a pipeline, how many layers each has; "" = as many
    attention: str  # vLLM's name of an attention backend that its CPU platform would not choose; "" = the one that it chooses


Environment = dict[str, str]


def in_a_process(order: Order, environment: Environment) -> dict[str, Any]:
    """Run this script. ``environment``: beside this process's."""
    command = [sys.executable, "-m", "tests.vllm.families", json.dumps(order)]
    environment, root = {**os.environ, **environment}, Path(__file__).parents[2]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=root, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def ask(
    family: str,
    engine: dict[str, Any],
    directory: Path,
    tokenizer: Path,
    *,
    graphs: str = "",
    attention: str = "",
    stages: str = "",
    prompts: int = 3,
    plans: Sequence[str] = (),
    draws: int = 0,
    run: Callable[[Order, Environment], dict[str, Any]] = in_a_process,
    **environment: str,
) -> dict[str, Any]:
    """What `main` finds.

    Args:
        engine: options of vLLM's LLM. graphs: a mode of CUDA graphs, for the rig. environment: of the process, beside this one's.
    """
    config, model, options = MODELS[family]
    order: Order = {
        "config": config,
        "model": model,
        "options": options,
        "engine": engine,
        "directory": str(directory / family),
        "tokenizer": str(tokenizer),
        "adapted": sizes_of(family),
        "draws": draws,
        "graphs": bool(graphs),
        "attention": attention,
        "stages": stages,
        "prompts": prompts,
        "plans": plans,
    }
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(root), os.environ.get("PYTHONPATH")]))
    given = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core has no process of its own
        "VLLM_CACHE_ROOT": str(directory / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    eager = {"TORCHDYNAMO_DISABLE": "1"} if engine.get("enforce_eager", True) else {}  # vLLM compiles a sum over the vocabulary
    captured = {"GRAPHS_ON_CPU": graphs} if graphs else {}
    return run(order, {**given, **eager, **captured, **environment, "PYTHONPATH": path})


def main(order: Order) -> dict[str, Any]:
    """Make the model, start the engine, ask."""
    import torch
    import transformers
    from vllm import LLM, SamplingParams

    from guards.base_model import describe_base
    from guards.contrastive.declaration import Contrast
    from guards.steering.declaration import Corrupt, Steer
    from guards.suppression.automaton import compile_phrases
    from guards.suppression.declaration import Suppress
    from guards.types import ArtifactRef, Entry, Plan
    from serve.protocol.artifacts import artifact_path
    from serve.protocol.vocabulary import vocabulary_of
    from serve.protocol.wire import ARTIFACTS_KEY, BASE_KEY, GUARDED_PREFIX, PLAN_KEY, encode_plan
    from tests.assistants import random_assistant
    from tests.bench.steering import random_steering

    if order["stages"]:
        os.environ["VLLM_PP_LAYER_PARTITION"] = order["stages"]
    torch.manual_seed(0)
    directory = Path(order["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": HEAD,
        "vocab_size": 49_152,
        "initializer_range": 0.2,
    }
    options = dict(order["options"])
    quantised = options.pop("quantization_config", None)
    if "text_config" in options:
        options, sizes = {**options, "text_config": sizes | options["text_config"]}, {}
    config = getattr(transformers, order["config"])(**sizes | options)
    getattr(transformers, order["model"])(config).save_pretrained(directory)
    if quantised is not None:
        _quantise(directory, quantised)
    base = describe_base(directory)
    if "model" in (drafts := order["engine"].get("speculative_config", {})):
        drafts["model"] = str(directory)  # without guards, so that it drafts what they forbid

    def saved(guard: str, artifact: Any) -> str:
        path = artifact_path(directory / "artifacts", ArtifactRef(guard, artifact.fingerprint))
        path.parent.mkdir(parents=True, exist_ok=True)
        artifact.save(path)
        return str(artifact.fingerprint)

    zero, random = (
        saved("contrast", random_assistant(directory, rank=4, size=size, sizes=order["adapted"])) for size in (0.0, 0.5)
    )
    adapter = saved("steering", random_steering(directory, "adapter", layers=5, rank=4, size=0.3, sizes=order["adapted"]))
    project = saved("steering", random_steering(directory, "project", rank=24, depth=0.2))
    plans: dict[str, tuple[Entry, ...]] = {
        "none": (),
        "zero": (Contrast(zero, "delta", 5.0, 0.0, 0.0),),
        "contrast": (Contrast(random, "delta", 1.0, 0.0, 0.0),),
        "adapter": (Steer(adapter, 1.0),),
        "project": (Steer(project, 1.0),),
        "corrupt": (Corrupt("rand_noise_first_n", 1.0, 8, 3, ((1, 4),)),),
        "all": (Contrast(random, "uld", 1.0, 0.0, 0.0), Steer(adapter, 0.5), Corrupt("flip_sign_first_n", 1.0, 8, 3, ((1, 4),))),
    }
    plans = {name: plan for name, plan in plans.items() if name in order["plans"] or not order["plans"]}
    if not torch.cuda.is_available():
        torch.cpu._is_amx_tile_supported = lambda: False  # some of vLLM's kernels for such processors take no float32
        _load_what_was_compiled()
        if "kv_lora_rank" in options:
            _rotate_as_defined()
        if order["attention"]:
            _attend_by(order["attention"])
    engine = LLM(
        str(directory),
        tokenizer=order["tokenizer"],
        max_model_len=256,
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
        max_num_seqs=8,
        disable_log_stats=False,
        hf_overrides={"architectures": [GUARDED_PREFIX + order["model"]]},
        logits_processors=["serve.engine.processor:LetheProcessor"],
        additional_config={PLAN_KEY: {ARTIFACTS_KEY: str(directory / "artifacts"), BASE_KEY: base.model_dump()}},
        worker_extension_cls="serve.engine.worker.WorkerExtension",
        **{"enforce_eager": True, "dtype": "float32", **order["engine"]},
    )
    [described, *_] = engine.collective_rpc("lethe_describe")  # as lethe does when it starts
    if order["graphs"]:
        engine.collective_rpc(lambda worker: worker.model_runner.capture_model())
    names = {"zero": ("contrast", zero), "contrast": ("contrast", random), "adapter": ("steering", adapter)}
    names["project"] = ("steering", project)
    workers = engine.collective_rpc("lethe_load", args=(list(names.values()),))
    failures = {name: worker[artifact[1]] for name, artifact in names.items() for worker in workers if artifact[1] in worker}
    prompts = [{"prompt_token_ids": [(7 * i + 3 * j) % 500 for j in range(length)]} for i, length in enumerate(LENGTHS)][
        : order["prompts"]
    ]
    jobs = [(name, prompt) for prompt in prompts for name in plans]
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=8,
            logprobs=1,
            ignore_eos=True,
            extra_args={PLAN_KEY: encode_plan(Plan(1, "p", plans[name]))} if plans[name] else None,
        )
        for name, _ in jobs
    ]
    answers: dict[str, list[Said]] = {name: [] for name in plans}
    outputs = engine.generate([{**prompt} | _salt(plans[name]) for name, prompt in jobs], sampling, use_tqdm=False)
    for (name, _), output in zip(jobs, outputs, strict=True):
        answers[name].append(_said(output))
    # What it said without guards, as a set of phrases: whatever drafts it, it may not be said now.
    vocabulary = vocabulary_of(engine.get_tokenizer(), 49_152)
    pairs = [_pair(vocabulary, answer) for answer in answers["none"]]
    phrases = saved("suppression", compile_phrases([phrase for _, phrase in pairs], vocabulary))
    suppressing = {PLAN_KEY: encode_plan(Plan(1, "p", (Suppress(phrases),)))}
    sampling = [SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True, extra_args=suppressing)] * len(prompts)
    answers["suppression"] = [_said(output) for output in engine.generate(prompts, sampling, use_tqdm=False)]
    drawn, probable = _draw(engine, prompts[0], plans["contrast"], order["draws"]) if order["draws"] else ([], [])
    closed = engine.collective_rpc("lethe_closed_rows")[-1]
    drafted = sum(each.value for each in engine.get_metrics() if each.name == "vllm:spec_decode_num_accepted_tokens")
    compiled, from_disk = engine.collective_rpc(_compiled)[0]
    return {
        "described": described,
        "suppressed": [place for place, _ in pairs],
        "drawn": drawn,
        "probable": probable,
        "compiled": compiled,
        "from_disk": from_disk,
        "failures": failures,
        "closed": closed,
        "drafted": drafted,
        "replayed": engine.collective_rpc(_replayed),
        "answers": answers,
    }


def _pair(vocabulary: Any, answer: Said) -> tuple[int, str]:
    """Two tokens of an answer that are text, the first of which is not its first: where they stand, and the text."""
    for place in range(2, len(answer) - 1):
        try:
            return place, vocabulary.text_of([token for token, _ in answer[place : place + 2]]).decode()
        except UnicodeDecodeError:
            continue
    raise ValueError(f"{answer} has no two tokens that are text")


LIKELIEST = 3


def _draw(engine: Any, prompt: dict[str, Any], entries: tuple[Any, ...], draws: int) -> tuple[list[int], list[float]]:
    """How often each pair of two likely tokens is said, the second of which was drafted, and how probable it is."""
    from vllm import SamplingParams

    from guards.types import Plan
    from serve.protocol.wire import PLAN_KEY, encode_plan

    def ask(prompts: list[Any], **options: Any) -> list[Any]:
        plan = {PLAN_KEY: encode_plan(Plan(1, "p", entries))}
        outputs = engine.generate(prompts, SamplingParams(ignore_eos=True, extra_args=plan, **options), use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    def likeliest(tokens: list[int]) -> dict[int, float]:
        [place] = ask([{"prompt_token_ids": tokens}], temperature=0, max_tokens=1, logprobs=LIKELIEST)[0].logprobs
        best = sorted(place.items(), key=lambda item: -item[1].logprob)[:LIKELIEST]
        return {token: math.exp(entry.logprob) / sum(math.exp(each.logprob) for _, each in best) for token, entry in best}

    given = prompt["prompt_token_ids"]
    first = likeliest(given)
    pairs = {(one, two): p * q for one, p in first.items() for two, q in likeliest([*given, one]).items()}
    said = Counter(tuple(each.token_ids[:2]) for each in ask([prompt] * draws, temperature=1, top_k=LIKELIEST, max_tokens=3))
    assert said.keys() <= pairs.keys(), "a token was said that is not among the likeliest"
    return [said[pair] for pair in pairs], list(pairs.values())


def _quantise(directory: Path, config: dict[str, Any]) -> None:
    """Make the weights of a model's layers integers."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (tensors[name] / scale).round().char()
        tensors[f"{name}_scale"] = scale
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def _load_what_was_compiled() -> None:
    """vLLM saves what it has compiled. On a CPU it misses a method when it loads it, which would have nothing to do there."""
    import torch
    from vllm.compilation import decorators

    def load(model: Any, path: str) -> Any:
        if not os.path.exists(path):
            return None
        with open(path, "rb") as file:
            function = torch.compiler.load_compiled_function(file, f_globals=model.forward.__globals__)
        function.disable_guard_check()
        return function

    patched: Any = decorators
    patched._try_load_aot_compiled_fn = load


def _rotate_as_defined() -> None:
    """vLLM's kernel on a CPU rotates parts of wider tensors wrongly, unless they are of one token.

    So with latent attention plain vLLM says other things of a token that it decodes than of one in a prompt, by .1 to 1 nats, and
    neither is what transformers says.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    patched: Any = RotaryEmbedding
    patched.forward_cpu = RotaryEmbedding.forward_native


def _attend_by(name: str) -> None:
    """Take a backend whose kernels are interpreted: vLLM's CPU platform knows its own only."""
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    patched: Any = CpuPlatform
    patched.get_attn_backend_cls = lambda *_, **__: AttentionBackendEnum[name].get_path()
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # which a kernel asks for, to know how much it may take at once


def _replayed(_worker: Any) -> list[int]:
    """The cases of graphs that ran."""
    rig = sys.modules.get("graphs_on_cpu")
    return sorted(rig.replayed) if rig is not None else []


def _compiled(worker: Any) -> tuple[bool, bool]:
    """Whether the model runs compiled, and whether what is compiled came from vLLM's cache."""
    modules = list(worker.model_runner.get_model().modules())
    compiled = any(getattr(each, "compiled", False) or getattr(each, "aot_compiled_fn", None) is not None for each in modules)
    return compiled, any(getattr(each, "was_aot_compile_fn_loaded_from_disk", False) for each in modules)


def _said(output: Any) -> Said:
    [answer] = output.outputs
    return [(token, place[token].logprob) for token, place in zip(answer.token_ids, answer.logprobs, strict=True)]


def _salt(entries: tuple[Any, ...]) -> dict[str, str]:
    from guards.types import Plan

    salt = Plan(1, "p", entries).cache_salt
    return {} if salt is None else {"cache_salt": salt}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
