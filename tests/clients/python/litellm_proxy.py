"""litellm as a proxy before the server, asked by openai's and Anthropic's wire format."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import openai
from report import BANNED_SCHEMA, CITY_SCHEMA, KEY, MODEL, QUESTION, REFUSAL, TURNS, URL, answered, check, equal, wait_until_idle

master_key = f"sk-{secrets.token_hex(32)}"
directory = Path(tempfile.mkdtemp(prefix="lethe-litellm-"))
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
entry = {"model_name": MODEL, "litellm_params": {"model": f"hosted_vllm/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY}}
(directory / "config.yaml").write_text(json.dumps({"model_list": [entry]}))  # JSON is YAML
command = [str(Path(sys.executable).parent / "litellm"), "--config", str(directory / "config.yaml"), "--port", str(port)]
environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "LITELLM_MASTER_KEY": master_key}
log = (directory / "log").open("w")
proxy = subprocess.Popen([*command, "--host", "127.0.0.1"], env=environment, stdout=log, stderr=log)
client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=master_key, timeout=120)
messages = [{"role": "user", "content": QUESTION}]
short = {"model": MODEL, "temperature": 0, "max_tokens": 24, "messages": messages}
longer = {**short, "max_tokens": 64}
tool = {"type": "function", "function": {"name": "weather", "parameters": CITY_SCHEMA, "strict": True}}
only = {"type": "json_schema", "json_schema": {"name": "only", "schema": BANNED_SCHEMA, "strict": True}}


def post(path: str, body: dict) -> dict:
    headers = {"content-type": "application/json", "authorization": f"Bearer {master_key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def wait_until_ready(within_s: float = 180) -> None:
    deadline = time.monotonic() + within_s
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=5)
            return
        except OSError:
            assert time.monotonic() < deadline and proxy.poll() is None, (directory / "log").read_text()[-1500:]
            time.sleep(1)


try:
    wait_until_ready()

    @check("chat")
    def chat() -> str:
        answer = client.chat.completions.create(**short).choices[0].message.content
        assert "Paris" in answer
        return answer

    @check("chat")
    def stream() -> None:
        whole = client.chat.completions.create(**short).choices[0].message.content
        chunks = client.chat.completions.create(stream=True, **short)
        equal("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), whole)

    @check("chat")
    def usage() -> None:
        whole = client.chat.completions.create(**short).usage
        streamed = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **short))[-1].usage
        equal((streamed.prompt_tokens, streamed.completion_tokens), (whole.prompt_tokens, whole.completion_tokens))

    @check("chat")
    def turns() -> None:
        first = client.chat.completions.create(**short).choices[0].message
        follow = [*messages, first, {"role": "user", "content": TURNS[2]}]
        assert "Rome" in client.chat.completions.create(**{**short, "messages": follow}).choices[0].message.content

    @check("chat")
    def tools_required() -> None:
        (call,) = client.chat.completions.create(tools=[tool], tool_choice="required", **longer).choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")

    @check("chat")
    def refusal() -> None:
        before = answered()
        choice = client.chat.completions.create(response_format=only, **longer).choices[0]
        fields = (choice.message.model_extra or {}).get("provider_specific_fields") or {}
        equal((choice.finish_reason, choice.message.refusal or fields.get("refusal")), ("content_filter", REFUSAL))
        equal(answered() - before, 1)

    @check("chat")
    def refusal_streamed() -> None:
        before = answered()
        chunks = list(client.chat.completions.create(response_format=only, stream=True, **longer))
        equal([c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason], ["content_filter"])
        equal(answered() - before, 1)

    @check("chat")
    def cancel() -> None:
        extra = {"ignore_eos": True, "min_tokens": 400}
        opened = client.chat.completions.create(stream=True, extra_body=extra, **{**short, "max_tokens": 400})
        next(iter(opened))
        opened.close()
        wait_until_idle()

    @check("chat")
    def models() -> None:
        assert MODEL in [model.id for model in client.models.list()]

    @check("messages")
    def chat() -> str:  # noqa: F811
        answer = post("/v1/messages", {**short, "messages": messages})
        assert "Paris" in answer["content"][0]["text"]
        return answer["content"][0]["text"]

    @check("responses")
    def chat() -> str:  # noqa: F811
        answer = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=24).output_text
        assert "Paris" in answer
        return answer

finally:
    proxy.terminate()
    proxy.wait(30)
