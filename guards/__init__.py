"""Guards: inference-time unlearning as pure functions over tensors and text.

This package knows no engine. It may import torch, numpy, pydantic, safetensors and the standard library; it must never
import vllm, fastapi or ``serve`` (an import contract in pyproject.toml holds that line).
"""
