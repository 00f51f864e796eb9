"""What an engine must not be, or rows would pass the guards. Its workers check it, and the server before it starts one."""

from __future__ import annotations

from typing import Any


def refuse_unguarded(config: Any) -> None:
    """Raise ValueError, with the way out, for an engine in which something bypasses the guards or has not been proved not to.

    Args:
        config: the engine's whole configuration, a VllmConfig.
    """
    drafts, model = config.speculative_config, config.model_config
    if model.enable_sleep_mode:
        raise ValueError("sleep mode throws away what guards keep beside the weights; start without --enable-sleep-mode")
    if config.parallel_config.pipeline_parallel_size > 1 and not config.use_v2_model_runner:
        raise ValueError("a pipeline of several stages is guarded on Model Runner V2 only; leave --pipeline-parallel-size at 1")
    if drafts is not None and not config.use_v2_model_runner:
        raise ValueError("speculative decoding is guarded on Model Runner V2 only; start without --speculative-config")
    if drafts is not None and not (drafts.use_ngram() or drafts.uses_draft_model()):
        raise ValueError(
            f"speculative decoding by {drafts.method!r} has not been proved to keep the guards; "
            'use "ngram" or "draft_model", or start without --speculative-config'
        )
    if drafts is not None and drafts.rejection_sample_method != "standard":
        raise ValueError(
            f"rejection_sample_method {drafts.rejection_sample_method!r} takes drafted tokens without asking the guarded model, "
            'or has not been proved to ask it; leave it at "standard"'
        )
    if not (config.use_v2_model_runner or model.enforce_eager or config.device_config.device_type == "cpu"):
        raise ValueError(
            "Model Runner V1 replays CUDA graphs past lethe's tracker; unset VLLM_USE_V2_MODEL_RUNNER, or add --enforce-eager"
        )
    if model.uses_mrope and not config.use_v2_model_runner:
        raise ValueError(
            f"{model.model} has positions on several axes (M-RoPE), of which Model Runner V1 tells lethe too little; unset "
            "VLLM_USE_V2_MODEL_RUNNER, or serve another model"
        )
