"""llm, the command line and library, with an extra-openai-models.yaml: chat completions."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

user = Path(tempfile.mkdtemp(prefix="lethe-llm-"))
os.environ["LLM_USER_PATH"] = str(user)

import llm  # noqa: E402 (it reads the variable)
from report import (  # noqa: E402  # noqa: E402
    BANNED_SCHEMA,
    CITY_SCHEMA,
    KEY,
    MODEL,
    QUESTION,
    TURNS,
    URL,
    answered,
    check,
    equal,
    not_offered,
    wait_until_idle,
    wait_until_running,
)

(user / "extra-openai-models.yaml").write_text(
    f"- model_id: lethe\n  model_name: {MODEL}\n  api_base: {URL}/v1\n  api_key_name: lethe\n"
    "  supports_schema: true\n  supports_tools: true\n"
)
(user / "keys.json").write_text(f'{{"lethe": "{KEY}"}}')
model = llm.get_model("lethe")
short = {"temperature": 0, "max_tokens": 24}
longer = {"temperature": 0, "max_tokens": 64}


@check("chat")
def chat() -> str:
    answer = model.prompt(QUESTION, stream=False, **short).text()
    assert "Paris" in answer
    command = [sys.executable, "-m", "llm", "-m", "lethe", "-o", "temperature", "0", "-o", "max_tokens", "24", QUESTION]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120)
    equal(said.stdout.strip(), answer.strip())
    return answer


@check("chat")
def stream() -> None:
    equal("".join(model.prompt(QUESTION, **short)), model.prompt(QUESTION, stream=False, **short).text())


@check("chat")
def usage() -> None:
    whole, streamed = model.prompt(QUESTION, stream=False, **short), model.prompt(QUESTION, **short)
    equal((streamed.usage().input, streamed.usage().output), (whole.usage().input, whole.usage().output))
    assert whole.usage().output


@check("chat")
def turns() -> str:
    conversation = model.conversation()
    conversation.prompt(QUESTION, **short).text()
    again = conversation.prompt(TURNS[2], **short).text()
    assert "Rome" in again, again
    return again


@check("chat")
def tools_auto() -> None:
    def weather(city: str) -> str:
        """Weather."""
        return "sunny"

    assert model.prompt(QUESTION, tools=[weather], **short).text() is not None


@check("chat")
def structured() -> str:
    answer = model.prompt(QUESTION, schema=CITY_SCHEMA, **longer).text()
    assert "Paris" in answer or "Rome" in answer
    return answer


@check("chat")
def refusal() -> None:
    for streaming in (False, True):
        before = answered()
        response = model.prompt(QUESTION, schema=BANNED_SCHEMA, stream=streaming, **longer)
        assert "Harry Potter" not in response.text()
        body = response.response_json
        found = body["finish_reason"] if streaming else body["choices"][0]["finish_reason"]
        equal(found, "content_filter")
        equal(answered() - before, 1)


@check("chat")
def cancel() -> None:
    command = [
        sys.executable,
        "-m",
        "llm",
        "-m",
        "lethe",
        "-o",
        "max_tokens",
        "900",
        "-o",
        "temperature",
        "1.9",
        QUESTION + " Write a book.",
    ]
    said = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until_running()
    said.kill()
    said.wait()
    wait_until_idle()


for name in ("tools_required", "tools_named"):
    not_offered("chat", name, "llm has no tool_choice")
not_offered("chat", "models", "llm does not ask for the list of models")
