"""A rig, not a product: what a CUDA graph does, on a CPU.

A graph holds the operations of one run with the tensors that they were given: replayed, it runs no Python of ours, reads and writes
the same addresses, and takes every number that Python had at hand for a constant. `Graph` does that to the operations that PyTorch
dispatches, in the place of ``torch.cuda.CUDAGraph``, so that vLLM's own code captures, chooses and replays. As on a GPU, an
operation that waits for the device raises while it is captured. lethe's own operators are looked into, vLLM's attention is not: its
metadata is another in each step here, so it is taken from the step that is under way.

vLLM loads this as a plugin in each of its processes (`register`), if ``GRAPHS_ON_CPU`` names a mode of its CUDA graphs.

What it cannot show: memory that a graph shares with others, streams, kernels of GPUs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive")


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, dict[int, Tensor]]] = []
        """Function, its arguments, and what it makes that was not there before, by place among its results."""

    def capture_begin(self, **_: Any) -> None:
        capturing[-1].graph = self

    def capture_end(self) -> None:
        capturing[-1].graph = None

    def replay(self) -> None:
        for function, args, kwargs, made in self.operations:
            result = function(*args, **kwargs)
            again = tensors(result)
            # On processors for which vLLM has no sum over processes of its own it takes PyTorch's, which only begins here.
            if function.namespace == "_c10d_functional":
                again = [torch.ops._c10d_functional.wait_tensor(each) for each in again]
            for work in tree_leaves(result):
                if isinstance(work, torch.ScriptObject):
                    work.wait()
            for place, old in made.items():
                old.copy_(again[place])


capturing: list[Capture] = []
"""What notes at the moment."""
replayed: Counter[int] = Counter()
"""How often graphs ran in this process, by case."""


def tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


class Capture(TorchDispatchMode):
    """Notes every operation in a graph, or in one after the other."""

    def __init__(self, graph: Graph | None = None) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from serve.engine.sites import OPERATORS

        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        by_mask = name.startswith("index") and any(each.dtype is torch.bool for each in tensors(args[1:]))
        if name in WAITS or by_mask:
            raise RuntimeError(f"{function} waits for the device, which a graph cannot")
        if function.namespace == "lethe":
            [operator] = [each for each in OPERATORS.values() if each.__name__ == name]
            with self:
                return operator(*args, **kwargs)
        graph = self.graph
        result = function(*args, **kwargs)
        if graph is None or graph is not self.graph:
            return result  # a break between two pieces
        given = {each.untyped_storage().data_ptr() for each in tensors((args, kwargs))}
        made = {i: each for i, each in enumerate(tensors(result)) if each.untyped_storage().data_ptr() not in given}
        # PyTorch's sum in place (c10d) does not say that it changes anything. Others that change nothing are views, and stay so.
        if made or function._schema.is_mutable or function.namespace == "c10d":
            graph.operations.append((function, args, kwargs, made))
        return result


def register() -> None:
    """Called by vLLM when a process begins, and maybe again."""
    if os.environ.get("GRAPHS_ON_CPU") and torch.cuda.CUDAGraph is not Graph:
        set_up(list(range(1, 65)), os.environ["GRAPHS_ON_CPU"])


def set_up(capture_sizes: list[int], mode: str) -> None:
    """Let vLLM's Model Runner V2 use graphs here."""
    from vllm.compilation import breakable_cudagraph, cuda_graph
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture, BreakableCUDAGraphWrapper
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.config.compilation import CompilationConfig, CompilationMode, CUDAGraphMode
    from vllm.forward_context import get_forward_context, is_forward_context_available, set_forward_context
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner
    from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    def resolve(self: Any, *_: Any, **__: Any) -> Any:
        self.cudagraph_mode, self.cudagraph_capture_sizes = CUDAGraphMode[mode], capture_sizes
        self.max_cudagraph_capture_size = max(capture_sizes)
        return self.cudagraph_mode

    @contextmanager
    def recording(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
        capturing.append(Capture(graph))
        try:
            with capturing[-1]:
                yield
        finally:
            capturing.pop()

    plain = DefaultModelState.prepare_attn
    step: dict[str, Any] = {}

    def prepare_attn(self: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = plain(self, *args, **kwargs)
        slots, cache = args[3], args[5]
        step.update(attn_metadata=metadata, slot_mapping=build_slot_mappings_by_layer(slots, cache))
        return metadata

    run = cudagraph_utils.ModelCudaGraphManager.run_fullgraph

    def run_fullgraph(self: Any, described: Any) -> Any:
        replayed[described.num_active_loras] += 1
        with set_forward_context(vllm_config=self.vllm_config, num_tokens=described.num_tokens, **step):
            return run(self, described)

    call = CUDAGraphWrapper.__call__

    def run_piece(self: Any, *args: Any, **kwargs: Any) -> Any:
        context: Any = get_forward_context() if is_forward_context_available() else None
        pieces = context is not None and context.cudagraph_runtime_mode is CUDAGraphMode.PIECEWISE
        if pieces and context.batch_descriptor in self.concrete_cudagraph_entries:
            replayed[context.batch_descriptor.num_active_loras] += 1
        return call(self, *args, **kwargs)

    update = CpuPlatform.check_and_update_config

    def split(vllm_config: Any) -> None:
        """A CPU's compiled model is whole; here vLLM splits it, as on a GPU, and compiles no kernels."""
        update(vllm_config)
        config = vllm_config.compilation_config
        if mode == "PIECEWISE" and config.mode is CompilationMode.DYNAMO_TRACE_ONCE:
            config.mode, config.backend, config.cudagraph_mode = CompilationMode.VLLM_COMPILE, "eager", CUDAGraphMode.PIECEWISE
            config.compile_sizes = []  # one piece for every size

    enter, leave = BreakableCUDAGraphCapture.__enter__, BreakableCUDAGraphCapture.__exit__

    def begin(self: Any) -> Any:
        capturing.append(Capture())
        capturing[-1].__enter__()
        return enter(self)

    def end(self: Any, *error: Any) -> None:
        leave(self, *error)
        capturing.pop().__exit__(*error)

    pieces = BreakableCUDAGraphWrapper._replay

    def replay_pieces(self: Any, entry: Any, *args: Any) -> Any:
        replayed[entry.batch_descriptor.num_active_loras] += 1
        return pieces(self, entry, *args)

    patched: Any = BreakableCUDAGraphCapture
    patched.__enter__, patched.__exit__ = begin, end
    patched = BreakableCUDAGraphWrapper
    patched._replay = replay_pieces
    patched = CUDAGraphWrapper
    patched.__call__ = run_piece
    patched = cuda_graph
    patched.weak_ref_tensors, patched.capture_pool = (lambda given: given), (lambda *_: nullcontext())
    patched.current_stream = lambda: None
    patched = breakable_cudagraph
    patched.weak_ref_tensor = patched.weak_ref_tensors = lambda given: given
    patched = CompilationConfig
    patched.resolve_cudagraph_mode_and_sizes = resolve
    patched = DefaultModelState
    patched.prepare_attn = prepare_attn
    patched = cudagraph_utils.ModelCudaGraphManager
    patched.run_fullgraph = run_fullgraph
    patched = CpuPlatform
    patched.check_and_update_config = staticmethod(split)
    patched.get_static_graph_wrapper_cls = staticmethod(lambda: f"{CUDAGraphWrapper.__module__}.{CUDAGraphWrapper.__name__}")
    patched.get_global_graph_pool = patched.graph_pool_handle = classmethod(lambda _: (0, 0))
    patched = cudagraph_utils
    patched.graph_capture = lambda **_: nullcontext()
    patched = model_runner
    patched.lock_workspace = lambda: None  # the CPU's worker has none
    patched = torch.cuda
    patched.CUDAGraph, patched.graph = Graph, recording
    patched.is_current_stream_capturing = lambda: any(each.graph is not None for each in capturing)
