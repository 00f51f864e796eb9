"""vLLM's entry point (group ``vllm.general_plugins``): lets every vLLM process find the guarded architectures.

Registering names changes nothing for an engine that does not ask for them.
"""

from __future__ import annotations

from serve.protocol.wire import GUARDED_PREFIX


def register() -> None:
    """Register ``Lethe<Architecture>`` for every architecture that vLLM knows. Called once or more per process."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry, _LazyRegisteredModel

    for architecture, registered in list(ModelRegistry.models.items()):
        name = GUARDED_PREFIX + architecture
        if isinstance(registered, _LazyRegisteredModel) and not architecture.startswith(GUARDED_PREFIX):
            ModelRegistry.models.setdefault(name, _LazyRegisteredModel("serve.engine.guarded_model", name))
            if architecture in MODELS_CONFIG_MAP:  # start-up adjustments that vLLM keys by architecture
                MODELS_CONFIG_MAP.setdefault(name, MODELS_CONFIG_MAP[architecture])
