"""The rules for requests: which routes are served, what a key may do, which fields pass, which policy answers.

Deny by default: a route that is not named here is not found, a body field that could reach past a guard is a 400. Nothing here
waits for anything; the middleware applies it.
"""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from guards.errors import InvalidPolicy
from guards.policy import DEFAULT
from guards.strict_json import shorten
from serve.experiment import ARM_HEADER, InvalidExperiment
from serve.experiments.live import LiveExperiments
from serve.http.dialects import normalise
from serve.http.grammars import TooLarge, check_size
from serve.http.probes import Probes, TooManyProbes
from serve.registry.snapshot import Caller, KeyScope, Snapshot
from serve.request import RequestContext
from serve.settings import Settings

ADMIN_PREFIX = "/lethe/v1"
GENERATING = {
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
}
ANNOUNCED = {"/v1/chat/completions", "/v1/messages"}
"""Streams in which vLLM sends a first chunk without text: the role."""
OPEN = {"GET /health", "GET /ping", "POST /ping"}
"""Need no key: what a load balancer asks."""
ALLOWED = {
    *(f"POST {path}" for path in GENERATING),
    "POST /v1/messages/count_tokens",
    "GET /v1/models",
    "GET /v1/models/{id}",
    "GET /version",
    "GET /load",
    "GET /metrics",
}
COMPARE = f"POST {ADMIN_PREFIX}/compare"
OWN_SCOPES: dict[str, KeyScope] = {COMPARE: "compare", f"POST {ADMIN_PREFIX}/feedback": "chat"}
"""Of our own routes, those that need less than an operator's key."""
REFUSED_FIELDS = (
    "vllm_xargs",
    "extra_args",
    "cache_salt",
    "priority",
    "prompt_embeds",
    "chat_template",
    "lora_request",
    "kv_transfer_params",
    "ec_transfer_params",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "mm_payload",
    "return_mm_kwargs",
    "request_id",
    "session_id",
    "data_parallel_rank",
    "prompt_logprob_token_ids",
    "trace_decode_token_ids",
    "previous_input_messages",
)
"""Fields that choose K/V, adapters, templates, scheduling or ids: the server's business. None and defaults of no effect pass."""
CHOOSES_NOTHING = ("policy", "lethe_policy", "forget_set", "forget_sets", "guards")
"""Fields that look as if they chose a guard. Passed over in silence, they would leave their sender in the belief that they do."""
STORING = ("store", "background", "previous_response_id", "conversation")
"""Fields of ``/v1/responses`` that need responses to be kept. What is kept would outlive the removal of what it says."""
PROBABILITIES = ("logprobs", "prompt_logprobs", "logprob_token_ids")
"""Fields that ask for log-probabilities. 0 asks for those of what is said."""
MOST_TOKENS_ALLOWED = 16_384
"""Of ``allowed_token_ids``."""
MOST_TEMPLATE_CHARACTERS = 64
"""Of a value of ``chat_template_kwargs``."""
PROXY_HEADERS = (b"forwarded", b"via", b"x-real-ip")
"""Headers that proxies add, besides ``x-forwarded-*``: a proxy on this machine may pass on requests from anywhere."""
_NO_EFFECT: tuple[Any, ...] = (None, False, 0, "", {}, [])


class Refused(Exception):
    """A request that goes no further. Becomes an error in its protocol's envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        kind: str = "invalid_request_error",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.kind, self.retry_after_s = status, message, param, kind, retry_after_s


class Rules:
    """The rules for bodies.

    Args:
        served_names: names of the base model.
        experiments: those that requests may take part in.
        probes: how often each key may ask what is forgotten.
    """

    def __init__(self, settings: Settings, served_names: list[str], experiments: LiveExperiments, probes: Probes) -> None:
        self._settings = settings
        self._served_names = served_names
        self._experiments = experiments
        self._probes = probes

    def check(
        self, fields: dict[str, Any], caller: Caller, snapshot: Snapshot, path: str, headers: dict[bytes, bytes]
    ) -> RequestContext:
        """Apply the rules for bodies; ``fields["model"]`` becomes the base model's name."""
        policy_name = self._select_policy(fields, caller)
        entry = None
        if ARM_HEADER in headers:
            require(caller, "compare")
        measures = "admin" not in caller.scopes and asks_for_probabilities(fields)
        if measures and (policy_name not in (None, DEFAULT) or ARM_HEADER in headers):
            raise Refused(
                403,
                "log-probabilities under another policy than the default need a key of scope 'admin': beside those of the default "
                "they would tell what is removed; leave them out",
                param="logprobs",
                kind="permission_error",
            )
        if policy_name is None and path in GENERATING and not measures:  # arms, too, are several policies for one caller
            try:
                entry = self._experiments.enter(snapshot, fields, headers, caller)
            except InvalidExperiment as error:  # an arm was forced that does not exist, by somebody who may know
                raise Refused(404, str(error), kind="not_found_error") from None
        policy_name = entry.arm.policy if entry is not None else policy_name or DEFAULT
        try:
            plan = snapshot.plan(policy_name)
        except InvalidPolicy as error:
            raise Refused(404, str(error), param="model", kind="not_found_error") from None
        self._check_template(fields.get("chat_template_kwargs"))
        for name in CHOOSES_NOTHING:
            if name in fields:
                raise Refused(
                    400,
                    f"field {name!r} chooses no guard; the model's name chooses a policy, as in {self._served_names[0]}:strict",
                    param=name,
                )
        for name in STORING:
            if path == "/v1/responses" and fields.get(name) not in _NO_EFFECT:
                raise Refused(
                    400,
                    f"field {name!r} needs stored responses, which are not kept here; send the whole conversation as input",
                    param=name,
                )
        items = fields.get("input")
        if isinstance(items, list) and any(isinstance(item, dict) and item.get("type") == "item_reference" for item in items):
            raise Refused(
                400,
                "an item_reference needs stored responses, which are not kept here; send the items themselves "
                '(AI SDK: "store": false, or its chat models)',
                param="input",
            )
        for name in REFUSED_FIELDS:
            if fields.get(name) not in _NO_EFFECT:
                raise Refused(400, f"field {name!r} is set by the server and not accepted from clients; remove it", param=name)
        # In an experiment, what one arm would refuse all of them refuse: who fails must not depend on the arm.
        plans = [plan] if entry is None else [snapshot.plan(arm.policy) for arm in entry.experiment.order.arms]
        if any(each.engages for each in plans):
            for name in ("prompt_logprobs", "echo"):
                if fields.get(name) is not None and fields[name] is not False:
                    raise Refused(400, f"field {name!r} is not available under policy {policy_name!r}; remove it", param=name)
        if not isinstance(fields.get("structured_outputs", {}), dict | None):
            raise Refused(400, 'structured_outputs must be an object such as {"choice": [...]}', param="structured_outputs")
        try:
            check_size(fields)
        except TooLarge as error:
            raise Refused(400, str(error), param=str(error).split(" ", 1)[0]) from None
        self._check_caps(fields, path)
        normalise(path, fields)
        try:
            probe = self._probes.check(caller, fields, plan) if path in GENERATING else None
        except TooManyProbes as probes:
            raise Refused(429, probes.message, kind="rate_limit_error", retry_after_s=probes.retry_after_s) from None
        text, has_tools = snapshot.text_plans[policy_name], bool(fields.get("tools"))
        policy = snapshot.policies[policy_name]
        announced = path in ANNOUNCED
        return RequestContext(caller, policy, plan, text, has_tools, entry=entry, announced=announced, probe=probe)

    def _check_template(self, chosen: Any) -> None:
        """Let only those switches of the chat template pass that the operator lists, with short values."""
        if chosen in _NO_EFFECT:
            return
        name, allowed = "chat_template_kwargs", self._settings.template_switches
        if not isinstance(chosen, dict):
            raise Refused(400, f'{name} must be an object such as {{"enable_thinking": false}}', param=name)
        for key, value in chosen.items():
            if key not in allowed:
                raise Refused(
                    400,
                    f"{name} may hold {', '.join(allowed)} here, not {shorten(key)}; remove it, or ask the operator to add it to "
                    "LETHE_TEMPLATE_SWITCHES",
                    param=name,
                )
            if not isinstance(value, bool | int | float | str | None) or len(str(value)) > MOST_TEMPLATE_CHARACTERS:
                raise Refused(400, f"{name}.{key} must be a switch, a number or a word, not {shorten(value)}", param=name)

    def _select_policy(self, fields: dict[str, Any], caller: Caller) -> str | None:
        """The policy that a request names; None if it names none."""
        model = fields.get("model")
        if not isinstance(model, str) or model in self._served_names:
            return None
        base, _, policy = model.rpartition(":")
        if base not in self._served_names:
            return None  # vLLM answers 404 with the names that it serves
        if policy != DEFAULT:
            require(caller, "compare")
        fields["model"] = base
        return policy

    def _check_caps(self, fields: dict[str, Any], path: str) -> None:
        limits = self._settings
        for name, limit in (("n", limits.max_choices), ("best_of", limits.max_choices)):
            value = fields.get(name)
            if isinstance(value, int) and value > limit:
                raise Refused(400, f"{name}={value} exceeds this server's limit of {limit}", param=name)
        for name, limit in (
            ("logit_bias", limits.max_logit_bias),
            ("bad_words", limits.max_logit_bias),
            ("allowed_token_ids", MOST_TOKENS_ALLOWED),
            ("messages", limits.max_prompts if path.endswith("/batch") else limits.max_messages),
            ("input", limits.max_messages),
            ("prompt", limits.max_prompts),
        ):
            value = fields.get(name)
            if name == "prompt" and isinstance(value, list) and value and isinstance(value[0], int):
                continue  # one prompt, as token ids
            if isinstance(value, list | dict) and len(value) > limit:
                raise Refused(400, f"{name} has {len(value)} entries, this server's limit is {limit}", param=name)


def require(caller: Caller, scope: KeyScope) -> None:
    if scope not in caller.scopes:
        raise Refused(
            403, f"this needs a key of scope {scope!r}; {caller.name} has {sorted(caller.scopes)}", kind="permission_error"
        )


def asks_for_probabilities(fields: dict[str, Any]) -> bool:
    """Whether an answer would hold log-probabilities, in any dialect."""
    included = fields.get("include")
    return any(fields.get(name) is not None and fields[name] is not False for name in PROBABILITIES) or (
        isinstance(included, list) and "message.output_text.logprobs" in included
    )


def same_machine(headers: dict[bytes, bytes]) -> bool:
    """Was this sent by a program on this machine, not by a web page that a browser on it has open, and not through a proxy on it?

    While no key exists, being here is what lets a caller in. A page from elsewhere can make a browser send requests here, and can
    make its own name resolve to this address; the headers that browsers add tell.
    """
    if headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
        return False
    if any(name in PROXY_HEADERS or name.startswith(b"x-forwarded-") for name in headers):
        return False
    try:
        origin = urlsplit(headers.get(b"origin", b"").decode("latin-1")).hostname
        host = urlsplit("//" + headers.get(b"host", b"localhost").decode("latin-1")).hostname
    except ValueError:  # no address at all
        return False
    return all(is_loopback(name) for name in (origin, host) if name is not None) and headers.get(b"origin") != b"null"


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine and nothing else."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
