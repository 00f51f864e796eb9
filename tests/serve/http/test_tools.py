"""Which parser reads a model's tool calls: by its chat template, or its type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.http.tools import _BY_MARKER, _BY_MODEL_TYPE, chat_template_of, tool_parser_of, writes_dates


@pytest.mark.parametrize(
    ("model_type", "template", "parser"),
    [
        ("qwen3", "{% if tools %}<tool_call>{{ x }}</tool_call>{% endif %}", "hermes"),
        ("qwen3_moe", "{% if tools %}<tool_call><function=x>{% endif %}", "qwen3_coder"),
        ("llama", "{% if tools %}<|python_tag|>{% endif %}", "llama3_json"),
        ("mistral", "{% if tools %}[AVAILABLE_TOOLS]{% endif %}", "mistral"),
        ("gpt_oss", "{% if tools %}namespace functions{% endif %}", "openai"),
        ("unheard_of", "{% for call in message.tool_calls %}", "hermes"),
        ("llama", "{{ messages }}", None),
    ],
)
def test_a_model_s_parser_is_known_by_its_template(model_type: str, template: str, parser: str | None) -> None:
    assert tool_parser_of(model_type, template) == parser


def test_every_parser_of_the_tables_is_one_of_vllm_s() -> None:
    from vllm.tool_parsers import ToolParserManager

    ours = {*_BY_MODEL_TYPE.values(), *(parser for _, parser in _BY_MARKER)}
    assert ours <= set(ToolParserManager.list_registered())


def test_a_template_is_read_from_either_file(tmp_path: Path) -> None:
    assert chat_template_of(tmp_path) == ""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "tool_use", "template": "tools"}]}))
    assert "tools" in chat_template_of(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("own")
    assert chat_template_of(tmp_path) == "own"


def test_a_template_that_dates_prompts_is_known() -> None:
    assert writes_dates('{%- set date_string = strftime_now("%d %b %Y") %}') and not writes_dates("{{ messages }}")
