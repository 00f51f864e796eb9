"""What clients send that vLLM takes otherwise: bodies are brought into the form that it reads as the client means it.

- A tool that is required or named is answered with arguments of its schema. vLLM holds the model to the schema only where the tool
  says ``strict``, and without it lets a bare string pass for an object.
- Assistants' earlier turns in ``/v1/responses`` come without an id from clients that keep the conversation themselves (AI SDK).

Nothing is changed that would be read as it is.
"""

from __future__ import annotations

from typing import Any


def normalise(path: str, fields: dict[str, Any]) -> None:
    """Change a body in place. Whatever has not the form that is meant is left for vLLM to refuse."""
    if path == "/v1/chat/completions" and _forces_a_tool(fields.get("tool_choice")):
        for tool in _dicts(fields.get("tools")):
            function = tool.get("function")
            if isinstance(function, dict) and _is_object(function.get("parameters")):
                function["strict"] = True
    if path == "/v1/responses":
        for item in _dicts(fields.get("input")):
            if item.get("role") == "assistant" and "id" not in item and item.get("type", "message") == "message":
                text = _text_of(item.get("content"))
                if text is not None:
                    item["content"] = text


def _forces_a_tool(choice: Any) -> bool:
    return choice == "required" or (isinstance(choice, dict) and choice.get("type") in ("function", "allowed_tools"))


def _is_object(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type", "object") == "object"


def _dicts(items: Any) -> list[dict[str, Any]]:
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _text_of(content: Any) -> str | None:
    """The text of parts of output; None if there is anything else among them."""
    if not isinstance(content, list):
        return None
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "output_text" else None for part in content]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else None  # type: ignore[arg-type]
