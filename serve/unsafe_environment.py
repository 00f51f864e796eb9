"""Environment variables of vLLM that would open a way around the guards: the server does not start with one of them."""

from __future__ import annotations

UNSAFE = {
    "VLLM_SERVER_DEV_MODE": "opens a way around the guards; unset it",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "opens a way around the guards; unset it",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "opens a way around the guards; unset it",
    "VLLM_SKIP_MODEL_NAME_VALIDATION": "opens a way around the guards; unset it",
    "VLLM_ENABLE_RESPONSES_API_STORE": "keeps answers that a later removal would not reach, for every key; unset it",
    "VLLM_API_KEY": "knows no scopes; unset it and make keys with `lethe key create`",
}
