"""Which of vLLM's parsers reads the tool calls of a model, so that tools work without options, as clients expect.

A model's chat template says how it is told to write a call, and that is what a parser must read; for families whose templates look
alike, the model's type decides. ``--tool-call-parser`` overrides this.

Not covered: models whose template speaks of tools in a way that is not in the tables (`hermes` is tried), or not at all: what they
write in answer to ``tool_choice: "auto"`` is text. Forced and named tools need no parser; a grammar makes them.
"""

from __future__ import annotations

import json
from pathlib import Path

DEFAULT_PARSER = "hermes"
_BY_MODEL_TYPE = {
    "apertus": "apertus",
    "cohere2": "cohere_command3",
    "deepseek_v4": "deepseek_v4",
    "ernie4_5_moe": "ernie45",
    "gemma4": "gemma4",
    "glm4_moe": "glm45",
    "gpt_oss": "openai",
    "granitemoehybrid": "granite4",
    "hunyuan_v1_moe": "hunyuan_a13b",
    "internlm2": "internlm",
    "jamba": "jamba",
    "kimi_k2": "kimi_k2",
    "lfm2": "lfm2",
    "llama4": "llama4_pythonic",
    "minimax_m2": "minimax_m2",
    "ministral3": "mistral",
    "mistral": "mistral",
    "mistral3": "mistral",
    "olmo3": "olmo3",
    "seed_oss": "seed_oss",
    "step3": "step3",
}
_BY_MARKER = (
    ("<｜tool▁sep｜>function", "deepseek_v3"),  # noqa: RUF001
    ("<｜tool▁calls▁begin｜>", "deepseek_v31"),  # noqa: RUF001
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3_json"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
)
"""In a template -> the parser, the most particular first."""


def tool_parser_of(model_type: str, template: str) -> str | None:
    """The parser for a model; None if its template does not speak of tools."""
    if "tools" not in template and "tool_calls" not in template:
        return None
    marked = next((parser for marker, parser in _BY_MARKER if marker in template), None)
    return _BY_MODEL_TYPE.get(model_type) or marked or DEFAULT_PARSER


def chat_template_of(model: Path) -> str:
    """A model's chat template as its files have it; empty if they have none."""
    try:
        return (model / "chat_template.jinja").read_text("utf-8")
    except OSError:
        pass
    try:
        template = json.loads((model / "tokenizer_config.json").read_text("utf-8")).get("chat_template", "")
    except (OSError, ValueError):
        return ""
    # Some models have several, with names.
    return template if isinstance(template, str) else json.dumps(template, ensure_ascii=False)


def writes_dates(template: str) -> bool:
    """Whether a template writes the day's date into prompts (Llama 3, gpt-oss)."""
    return "strftime_now" in template
