"""What the API process may ask of a worker, by vLLM's collective RPC. Mixed into vLLM's worker class at start-up."""

from __future__ import annotations

import weakref
from typing import Any

from guards.types import ArtifactRef
from serve.engine.guarded_model import GuardedModel


class WorkerExtension:
    """Methods called by name from `serve.generation.client`."""

    def lethe_describe(self) -> dict[str, Any]:
        """Prove that this worker is guarded: what the API process checks before it serves anyone."""
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        if not isinstance(model, GuardedModel):
            return {"guarded": False, "model": type(model).__name__}
        model.lethe.runner = weakref.proxy(self.model_runner)  # type: ignore[attr-defined]
        return {
            "guarded": True,
            "tracked": model.lethe.tracked,
            "model": type(model).__name__,
            "runner": "V2" if model.lethe.vllm_config.use_v2_model_runner else "V1",
            "vocabulary": model.lethe.vocabulary.fingerprint,
            "unable": model.lethe.unable(),
        }

    def lethe_closed_rows(self) -> dict[str, int]:
        """Rows that guards could not guard since the start, by guard."""
        return self.model_runner.get_model().lethe.closer.counts  # type: ignore[attr-defined]

    def lethe_load(self, artifacts: list[tuple[str, str]]) -> dict[str, str]:
        """Load artifacts (guard, fingerprint) before any request needs them. Returns the failures: fingerprint -> reason."""
        wanted = [ArtifactRef(guard, fingerprint) for guard, fingerprint in artifacts]
        return self.model_runner.get_model().lethe.ensure(wanted)  # type: ignore[attr-defined]
