"""Fields and sizes: what a request may hold, and which grammars would stop the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.http.rules import GENERATING, REFUSED_FIELDS
from tests.serve.http.around import call, chat


@pytest.mark.parametrize("field", REFUSED_FIELDS)
@pytest.mark.parametrize("path", sorted(GENERATING))
def test_every_refused_field_is_refused_on_every_route(path: str, field: str) -> None:
    answer, app = call("POST", path, {"model": "m", field: "x"})
    assert answer.status_code == 400
    assert repr(field) in answer.json()["error"]["message"]
    assert not app.reached
    for harmless in (None, False, 0, "", {}, []):
        assert call("POST", path, {"model": "m", field: harmless})[0].status_code == 200


BAD_BODIES = {
    "unfinished": b"{",
    "a list": b"[]",
    "a string": b'"x"',
    "not UTF-8": b"\xff",
    "a key twice": b'{"model": "m", "model": "m:none"}',
    "deep": b"[" * 100_000,
    "half a surrogate": b'{"stop": "\\ud800"}',
    "more than 64 bits": b'{"stream_interval": 9223372036854775808}',
    "a long number": b'{"n": ' + b"1" * 5_000 + b"}",
    "not a number": b'{"temperature": NaN}',
    "infinity": b'{"temperature": -Infinity}',
    "too large a number": b'{"temperature": 1e999}',
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_bodies_that_are_not_one_json_object_are_refused(body: bytes) -> None:
    answer, app = call("POST", "/v1/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert not app.reached


@pytest.mark.parametrize(
    "body",
    [
        {"n": 17},
        {"input": [{}] * 3_000},
        {"prompt": ["x"] * 65},
        {"logit_bias": {str(i): 1 for i in range(2_000)}},
        {"messages": [{}] * 3_000},
    ],
    ids=lambda body: next(iter(body)),
)
def test_caps_are_checked_before_any_work(body: dict[str, Any]) -> None:
    answer, app = chat(body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(body))
    assert not app.reached
    assert call("POST", "/v1/completions", b"x" * 2_000, max_body_bytes=1_000)[0].status_code == 413
    conversations = {"model": "m", "messages": [[{}]] * 65}
    assert call("POST", "/v1/chat/completions/batch", conversations)[0].status_code == 400, "each is a request of its own"


def chain_of(length: int) -> dict[str, Any]:
    """Definitions each of which refers to the next."""
    return {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(length)} | {str(length): {}}


@pytest.mark.parametrize(
    "body",
    [
        {"structured_outputs": {"json": {"type": "array", "minItems": 100_000_000}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"maxLength": 10**9}}}},
        {"structured_outputs": {"regex": "a{999999}"}},
        {"structured_outputs": True},
        {"structured_outputs": {"choice": [str(i) for i in range(100_000)]}},
        {"response_format": {"json_schema": {"schema": {"properties": {"a": {"enum": list(range(100_000))}}}}}},
        {"structured_outputs": {"json": {"minItems": 9999, "items": {"minItems": 9999, "items": {"minLength": 9999}}}}},
        {"tools": [{"function": {"parameters": {"properties": {"a": {"maxItems": 400, "items": {"maxLength": 400}}}}}}]},
        {"structured_outputs": {"regex": "((a{100}){100}){100}"}},
        {"structured_outputs": {"regex": "(a{90000}[)]){90000}"}},
        {"structured_outputs": {"regex": "|".join(map(str, range(3_000)))}},
        {"structured_outputs": {"json": json.dumps({"enum": list(range(3_000))})}},
        {"structured_outputs": {"json": '{"enum": '}},
        {"structured_outputs": {"json": {"properties": {str(i): {} for i in range(9_000)}}}},
        {
            "structured_outputs": {
                "json": {
                    "$defs": {
                        "b": {"minItems": 999, "items": {"minLength": 999}},
                        "a": {"minItems": 999, "items": {"$ref": "#/$defs/b"}},
                    },
                    "items": {"$ref": "#/$defs/a"},
                }
            }
        },
        {"response_format": {"anyOf": [{"const": i} for i in range(3_000)]}},
        {
            "structured_outputs": {
                "json": {"properties": {"a": {"maxLength": 90_000}, "b": {"maxItems": 9, "items": {"$ref": "#/properties/a"}}}}
            }
        },
        {
            "structured_outputs": {
                "json": {
                    "$defs": {"big": {"properties": {str(i): {"anyOf": [{}] * 100} for i in range(1_000)}}},
                    "anyOf": [{"maxItems": k, "items": {"$ref": "#/$defs/big"}} for k in range(2, 500)],
                }
            }
        },
        {"allowed_token_ids": list(range(100_000))},
        {"structured_outputs": {"grammar": 'root ::= "' + "a" * 300_000 + '"'}},
    ],
    ids=lambda body: str(body)[:60],
)
def test_grammars_that_would_stop_the_engine_are_refused(body: dict[str, Any]) -> None:
    answer, app = chat(body)
    assert answer.status_code == 400
    assert not app.reached


@pytest.mark.parametrize(
    ("schema", "status"),
    [
        ({"maxItems": 20, "items": {"properties": {"kind": {"enum": ["a"] * 50}, "text": {"maxLength": 2_000}}}}, 200),
        # A tree calls itself: one rule, however often.
        ({"$defs": {"node": {"maxItems": 50, "items": {"$ref": "#/$defs/node"}}}, "$ref": "#/$defs/node"}, 200),
        ({"$defs": chain_of(25), "maxItems": 2, "items": {"$ref": "#/$defs/0"}}, 200),
        ({"$defs": chain_of(900), "maxItems": 2, "items": {"$ref": "#/$defs/0"}}, 400),
    ],
)
def test_grammars_of_everyday_size_pass(schema: dict[str, Any], status: int) -> None:
    assert chat({"structured_outputs": {"regex": "(a{1,20}b){20}", "json": schema}})[0].status_code == status


def test_echo_and_prompt_log_probabilities_pass_only_where_nothing_is_guarded() -> None:
    for field, value in (("echo", True), ("prompt_logprobs", 0)):
        assert chat({field: value})[0].status_code == 400
        assert chat({"model": "m:none", field: value})[0].status_code == 200
    assert chat({"echo": False})[0].status_code == 200


def test_switches_of_the_chat_template_pass_and_nothing_else_of_it() -> None:
    for harmless in ({"enable_thinking": False}, {"reasoning_effort": "low", "thinking": True}, {}, None):
        answer, app = chat({"chat_template_kwargs": harmless})
        assert answer.status_code == 200
        assert json.loads(app.reached[0]["body"])["chat_template_kwargs"] == harmless
    for wrong in ({"documents": [{"text": "x"}]}, {"enable_thinking": ["x"]}, {"reasoning_effort": "x" * 100}, "x", {"tools": "x"}):
        answer, app = chat({"chat_template_kwargs": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")
        assert not app.reached
    assert chat({"chat_template_kwargs": {"lang": "de"}}, template_switches=("lang",))[0].status_code == 200


@pytest.mark.parametrize("field", ["policy", "lethe_policy", "forget_sets", "guards"])
def test_a_field_that_only_looks_as_if_it_chose_a_guard_is_refused_and_says_how_to_choose_one(field: str) -> None:
    answer, app = chat({field: "strict"})
    assert answer.status_code == 400 and "m:strict" in answer.json()["error"]["message"]
    assert not app.reached


@pytest.mark.parametrize("field", [{"store": True}, {"previous_response_id": "resp_1"}, {"background": True}])
def test_what_needs_stored_responses_is_refused(field: dict[str, Any]) -> None:
    assert call("POST", "/v1/responses", {"model": "m", "input": "x", **field})[0].status_code == 400
    assert call("POST", "/v1/responses", {"model": "m", "input": "x", "store": False})[0].status_code == 200


def test_an_assistant_s_turn_without_a_type_is_a_message() -> None:
    turns = [
        {"role": "assistant", "content": [{"type": "output_text", "text": "hello"}]},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    ]
    _, app = call("POST", "/v1/responses", {"model": "m", "input": turns})
    assert json.loads(app.reached[0]["body"])["input"] == [{**turns[0], "type": "message"}, *turns[1:]]


def test_our_own_refusal_can_be_sent_back_as_a_turn() -> None:
    turn = {"role": "assistant", "id": None, "type": "message", "content": [{"type": "refusal", "refusal": "I cannot."}]}
    _, app = call("POST", "/v1/responses", {"model": "m", "input": [turn, {**turn, "content": []}]})
    first, second = json.loads(app.reached[0]["body"])["input"]
    assert first["content"][0]["text"] == "I cannot." and "id" not in first
    assert second["content"][0]["type"] == "output_text"


def test_references_to_stored_items_are_refused_with_a_way_out() -> None:
    answer, _ = call("POST", "/v1/responses", {"model": "m", "input": [{"type": "item_reference", "id": "msg_1"}]})
    assert answer.status_code == 400 and "store" in answer.json()["error"]["message"]
