"""Repairs of Triton's interpreter, without which vLLM's kernels stop it, and what makes it fast enough to test with.

Written for Triton 3.9 and vLLM 0.32: names of theirs are private, and are looked up so that another version fails loudly.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

WIDE = {"_topk_log_softmax_kernel": "BLOCK_SIZE", "_ranks_kernel": "BLOCK_SIZE"}
"""Kernels that walk through the vocabulary in blocks, and the parameter that says how wide one is; numpy takes it in one."""
WIDEST = 65536


def register() -> None:
    """Called by vLLM in each of its processes, before it loads a model."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    if getattr(interpreter, "lethe_rig", False):
        return
    interpreter.lethe_rig = True  # type: ignore[attr-defined]
    _repair(interpreter)
    _hasten(interpreter)


def _repair(interpreter: Any) -> None:
    """What the interpreter gets wrong."""
    import triton.language as tl
    from vllm.v1.sample.ops import topk_topp_sampler

    builder = interpreter.InterpreterBuilder
    plain_load, plain_store = builder.create_masked_load, builder.create_masked_store

    def boolean(mask: Any) -> Any:
        """Masks that come out of arithmetic are integers; on a GPU they do as booleans."""
        return interpreter.TensorHandle(mask.data.astype(bool), tl.int1)

    builder.create_masked_load = lambda self, pointers, mask, *rest: plain_load(self, pointers, boolean(mask), *rest)
    builder.create_masked_store = lambda self, pointers, value, mask, *rest: plain_store(
        self, pointers, value, boolean(mask), *rest
    )
    # Its kernel calls a method of a loop's variable, which is an int here; vLLM has the same in PyTorch.
    topk_topp_sampler.HAS_TRITON = False
    # Overflow is what the random generator lives by, and checking for it calls into numpy twice for each operation.
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


def _hasten(interpreter: Any) -> None:
    """A step of a tiny model takes 600 ms without this, 70 with it."""
    import triton
    import triton.language as tl

    patch, run = interpreter._patch_lang, interpreter.InterpretedFunction.run
    patched: set[frozenset[int]] = set()

    class Stays:
        """Kernels are only ever interpreted in this process, so that what was patched for one may stay for the next."""

        def restore(self) -> None:
            pass

    def patch_once(function: Callable[..., Any]) -> Stays:
        languages = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if languages not in patched:
            patch(function)
            patched.add(languages)
        return Stays()

    def run_wide(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        name = self.fn.__name__
        if name in WIDE:
            kwargs[WIDE[name]] = WIDEST
        elif name == "_gumbel_sample_kernel":  # one block for each piece of the vocabulary: run the first, over all of it
            given = dict(zip(self.arg_names, args, strict=False)) | kwargs
            given["local_max_ptr"].fill_(float("-inf"))
            kwargs["BLOCK_SIZE"] = triton.next_power_of_2(given["vocab_size"])
            grid = (grid[0], 1)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    def in_place(_: Any, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        """Tensors are where numpy can write into them: copying whole storages there and back would cost a K/V cache each."""
        return list(args), dict(kwargs)

    interpreter._patch_lang = patch_once
    interpreter.InterpretedFunction.run = run_wide
    interpreter.GridExecutor._init_args_hst = in_place
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
