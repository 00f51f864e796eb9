"""A repair of vLLM 0.32 on CPUs: a request with a ``seed`` whose prompt is computed in chunks stops the whole engine.

After a chunk that does not end the prompt, vLLM takes the sampled token back by moving the request's random generator back by four,
which CUDA's generators can do and the CPU's cannot: "CPU Generator does not use offset", and every request dies with the engine.
Here the generator's state is kept before such a row is sampled and put back after.

Covered: V1's runner on CPUs. Elsewhere nothing is changed. To be dropped when vLLM does so itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def repair_seeds() -> None:
    """Make every CPU runner of this process safe. Calling it again does nothing."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if "_sample" in vars(CPUModelRunner):
        return

    def discarded(runner: Any) -> dict[int, Any]:
        """Row -> generator, of seeded rows whose token will be thrown away."""
        rows = np.nonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])[0]
        generators = runner.input_batch.generators
        return {int(row): generators[int(row)] for row in rows if int(row) in generators}

    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = [(generator, generator.get_state()) for generator in discarded(self).values()]
        output = GPUModelRunner._sample(self, *args, **kwargs)
        for generator, state in before:
            generator.set_state(state)
        return output

    def bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = discarded(self)
        for row in hidden:
            del self.input_batch.generators[row]
        try:
            return GPUModelRunner._bookkeeping_sync(self, *args, **kwargs)
        finally:
            self.input_batch.generators.update(hidden)

    CPUModelRunner._sample = sample
    CPUModelRunner._bookkeeping_sync = bookkeeping_sync
