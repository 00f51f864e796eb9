"""Tiny models with random weights, one for each family that the tests run: their configurations."""

from __future__ import annotations

import os
from typing import Any

HEAD = int(os.environ.get("FAMILIES_HEAD", "32"))
"""Some backends of GPUs take no less than 64."""
HIDDEN, HEADS, MLP, LAYERS = 64, 4, 96, 6
WIDTH = HEADS * HEAD
SIZES = {
    "q_proj": (HIDDEN, WIDTH),
    "o_proj": (WIDTH, HIDDEN),
    "gate_proj": (HIDDEN, MLP),
    "up_proj": (HIDDEN, MLP),
    "down_proj": (MLP, HIDDEN),
}
MIXTURES = ("Qwen3Moe", "GptOss", "DeepseekV3")
"""Families of which only attention is adapted."""


LATENT, ROTARY, QUERY = 512, 64, 32
"""Of latent attention: the vector that stands for keys and values (vLLM's kernel on the CPU takes this size alone), the part of a
query that knows its position, and the vector from which queries are made, where they are made of one."""


def sizes_of(family: str) -> dict[str, tuple[int, int]]:
    """Of the projections that take low-rank terms."""
    sizes = {name: size for name, size in SIZES.items() if family not in MIXTURES or name in ("q_proj", "o_proj")}
    if family == "DeepseekV2":
        return sizes | {"q_proj": (HIDDEN, HEADS * (HEAD + ROTARY))}
    if family == "DeepseekV3":
        del sizes["q_proj"]
        return sizes | {"q_b_proj": (QUERY, HEADS * (HEAD + ROTARY))}
    return sizes


LATENT_ATTENTION = {
    "first_k_dense_replace": LAYERS,
    "kv_lora_rank": LATENT,
    "qk_nope_head_dim": HEAD,
    "qk_rope_head_dim": ROTARY,
    "v_head_dim": HEAD,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
}


INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "all": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        }
    },
}
"""Weights of eight bits with a scale for each output, in the form of the library that vLLM reads."""
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "Gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 3},
    ),
    "Qwen3Moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    ),
    "Llama, int8": ("LlamaConfig", "LlamaForCausalLM", {"quantization_config": INT8}),
    "GptOss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    ),
    "DeepseekV2": (  # keys and values in one latent vector (MLA)
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {"q_lora_rank": None, **LATENT_ATTENTION},
    ),
    "DeepseekV3": (  # and queries from another; experts
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **LATENT_ATTENTION,
            "q_lora_rank": QUERY,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "first_k_dense_replace": 0,
        },
    ),
    "Qwen3Next": (  # three layers of four have a state in the place of keys and values
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            "layer_types": [*["linear_attention"] * 3, "full_attention", *["linear_attention"] * 2],
            "mlp_only_layers": list(range(1, LAYERS)),
            **{f"linear_num_{each}_heads": 2 for each in ("key", "value")},
            **{f"linear_{each}_head_dim": 128 for each in ("key", "value")},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 96,
        },
    ),
    "PaddleOCRVL": (  # reads images, so that positions have several axes (M-RoPE)
        "PaddleOCRVLConfig",
        "PaddleOCRVLForConditionalGeneration",
        {
            "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
            "vision_config": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2},
            **{f"{name}_token_id": 10 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))},
        },
    ),
}
"""By family: transformers' classes of its configuration and of the model, and what is said beside its sizes."""
RUN: dict[str, tuple[bool, dict[str, Any]]] = {
    "PaddleOCRVL": (True, {"limit_mm_per_prompt": {"image": 0, "video": 0}}),
    "Qwen3Next": (False, {"dtype": "bfloat16"}),  # vLLM's kernel on the CPU takes no other
}
"""Those that are not run as others are: on Model Runner V2 or not, and with which options of vLLM's LLM."""
