"""A backend that never compiles."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget


class Interpreted(BaseBackend):
    """Says yes to the target ``cpu`` and has nothing to compile for it."""

    binary_ext = "interpreted"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return options

    def add_stages(self, stages: dict[str, Any], options: object, language: Any = None) -> None:
        raise RuntimeError("a kernel was to be compiled; start with TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        """There are none."""

    def get_module_map(self) -> dict[str, ModuleType]:
        return {}
