"""Guards: inference-time unlearning as pure functions over tensors and text.

This package knows no engine and no server: torch, numpy, pydantic, safetensors and the standard library are all that it needs, and
an import contract in pyproject.toml keeps vLLM, FastAPI and ``serve`` out of it.

``catalogue`` lists the guards; each declares itself in the ``declaration`` of its room, as a ``kinds.GuardKind``.
"""
