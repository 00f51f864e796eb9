"""What clients send that vLLM takes otherwise: bodies are brought into the form that it reads as the client means it.

Assistants' earlier turns in ``/v1/responses`` come without an id and a type from clients that keep the conversation themselves, and
with our own refusals in them.

Nothing is changed that would be read as it is.
"""

from __future__ import annotations

from typing import Any


def normalise(path: str, fields: dict[str, Any]) -> None:
    """Change a body in place. Whatever has not the form that is meant is left for vLLM to refuse."""
    if path == "/v1/responses":
        for item in _dicts(fields.get("input")):
            if item.get("role") == "assistant" and isinstance(item.get("content"), list):
                item.setdefault("type", "message")
                if item.get("id", "") is None:
                    del item["id"]
                item["content"] = [_spoken(part) for part in item["content"]] or [_spoken({"refusal": ""})]


def _spoken(part: Any) -> Any:
    """A refusal as the text that it was: vLLM takes no refusals back."""
    if isinstance(part, dict) and isinstance(part.get("refusal"), str):
        return {"type": "output_text", "text": part["refusal"], "annotations": []}
    return part


def _dicts(items: Any) -> list[dict[str, Any]]:
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def wants_json(fields: dict[str, Any]) -> bool:
    """Whether a body of ``/v1/responses`` or ``/v1/messages`` asks for JSON, which its client will parse."""
    for name in ("text", "output_config"):
        asked = fields.get(name)
        asked = asked.get("format") if isinstance(asked, dict) else None
        if isinstance(asked, dict) and str(asked.get("type", "")).startswith("json"):
            return True
    return False
