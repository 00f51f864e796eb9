"""What this process asks of the engine's workers, each of them, beside generating. The other side is `serve.engine.worker`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from prometheus_client import Counter
from vllm.engine.protocol import EngineClient

from guards.types import ArtifactRef

logger = logging.getLogger(__name__)

_closed_rows = Counter("lethe_closed_rows_total", "Rows of logits that a guard could not guard, and that were closed.", ["guard"])
ASK_EVERY_S = 5.0


class UnguardedWorker(RuntimeError):
    """A worker that does not run the guarded model. The server does not start."""


async def check_workers(client: EngineClient, vocabulary: str) -> dict[str, str]:
    """Make sure that every worker runs the guarded model, with a tracker, over the same vocabulary.

    Returns:
        Guards that cannot act on this model or engine, and why.

    Raises:
        UnguardedWorker: one does not.
    """
    unable: dict[str, str] = {}
    for worker in await client.collective_rpc("lethe_describe"):
        if not worker["guarded"] or not worker["tracked"]:
            raise UnguardedWorker(f"worker runs {worker['model']} without lethe's guards; start it with `lethe serve`")
        if worker["vocabulary"] != vocabulary:
            raise UnguardedWorker(
                f"worker has vocabulary {worker['vocabulary'][:12]}, this process {vocabulary[:12]}; use one tokenizer for both"
            )
        unable |= worker["unable"]
    return unable


async def load_artifacts(client: EngineClient, artifacts: Iterable[ArtifactRef]) -> dict[str, str]:
    """Load artifacts in every worker. Returns the failures: fingerprint -> reason."""
    failures: dict[str, str] = {}
    for worker in await client.collective_rpc("lethe_load", args=([tuple(artifact) for artifact in artifacts],)):
        failures.update(worker)
    return failures


async def count_closed_rows(client: EngineClient) -> None:
    """Keep the metric of closed rows, until cancelled. Workers count alike; the highest count is taken."""
    counted: dict[str, int] = {}
    while True:
        await asyncio.sleep(ASK_EVERY_S)
        try:
            found = await client.collective_rpc("lethe_closed_rows")
        except Exception:  # an engine that has died is reported by vLLM; one that is slow is asked again
            logger.debug("lethe: the workers did not say how many rows they closed", exc_info=True)
            continue
        for guard in sorted({guard for worker in found for guard in worker}):
            count = max(worker.get(guard, 0) for worker in found)
            if count > counted.get(guard, 0):
                _closed_rows.labels(guard).inc(count - counted.get(guard, 0))
                logger.warning(
                    "lethe: %s could not guard %d rows of logits; they were closed", guard, count - counted.get(guard, 0)
                )
                counted[guard] = count
