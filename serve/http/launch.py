"""How the server is started: vLLM's options with our defaults. Options that would open a way around the guards are refused."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_config
from vllm.utils.argparse_utils import FlexibleArgumentParser

from guards.base_model import describe_base
from guards.errors import InvalidArtifact
from serve.http.rules import is_loopback
from serve.http.tools import DEFAULT_PARSER, chat_template_of, tool_parser_of
from serve.protocol.engine_rules import refuse_unguarded
from serve.protocol.wire import ARTIFACTS_KEY, BASE_KEY, GUARDED_PREFIX, PLAN_KEY
from serve.registry.store import Registry
from serve.settings import Settings
from serve.unsafe_environment import UNSAFE

DRAIN_S = 60
"""How long answers under way may take to end after a SIGTERM (vLLM's ``--shutdown-timeout``)."""


class UnsafeSetting(ValueError):
    """An option that would open a way around the guards. The server does not start."""


def parse_arguments(arguments: Sequence[str], default_model: Callable[[], str]) -> Namespace:
    """Parse ``vllm serve`` options, with lethe's defaults.

    Args:
        default_model: makes the default model ready and returns its path; called when the options name no model.

    Raises:
        UnsafeSetting: an option or environment variable that would open a way around the guards.
        SystemExit: an option that vLLM does not know (argparse has printed why).
    """
    for name, reason in UNSAFE.items():
        if os.environ.get(name, "0").lower() not in ("", "0", "false"):
            raise UnsafeSetting(f"{name} {reason}")
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="lethe serve"))
    # A tool that must be called gets arguments of its schema, also where it does not say "strict".
    parser.set_defaults(host="127.0.0.1", port=8000, tool_strict_level="parameter", shutdown_timeout=DRAIN_S)
    if current_platform.is_cpu():
        # On AVX2, float32 is five times faster than bfloat16 at batch 8, and compiling takes longer than most sessions last.
        parser.set_defaults(dtype="float32", enforce_eager=True)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    parser.set_defaults(model=None)
    args = parser.parse_args(list(arguments))
    if args.model and args.model_tag:
        raise UnsafeSetting(f"two models are named, {args.model_tag!r} and --model {args.model!r}; name one")
    args.model = args.model_tag or args.model or default_model()
    validate_parsed_serve_args(args)
    return args


def own_url(args: Namespace) -> str | None:
    """Where the server can be reached from its own machine; None on a Unix socket, and with TLS, whose name is another."""
    if args.uds or args.ssl_certfile:
        return None
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(args.host or "", args.host)  # noqa: S104 - not bound to
    return f"http://[{host}]:{args.port}" if ":" in host else f"http://{host}:{args.port}"


def show_options(word: str) -> None:
    """Print vLLM's options that have a word in them, or all of them."""
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="lethe serve"))
    parser.parse_args([f"--help={word}"])


def guard_arguments(args: Namespace, settings: Settings) -> None:
    """Change ``args`` so that vLLM builds the guarded engine.

    Raises:
        UnsafeSetting: see `parse_arguments`.
    """
    if args.api_key:
        raise UnsafeSetting("--api-key knows no scopes; make keys with `lethe key create` instead")
    for name in (
        "enable_dbo",
        "enable_sleep_mode",
        "enable_prompt_embeds",
        "trust_request_chat_template",
        "kv_transfer_config",
        "skip_tokenizer_init",
    ):
        if getattr(args, name, None):
            raise UnsafeSetting(f"--{name.replace('_', '-')} cannot be guarded; start without it")
    for name in (
        "data_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
        "api_server_count",
    ):
        if (getattr(args, name, None) or 1) > 1:
            raise UnsafeSetting(f"--{name.replace('_', '-')} above 1 has not been proved to keep the guards; leave it at 1")
    overrides = args.hf_overrides if isinstance(args.hf_overrides, dict) else {}
    if "architectures" not in overrides:
        config = get_config(args.model, args.trust_remote_code, args.revision)
        overrides["architectures"] = config.architectures
    args.hf_overrides = {**overrides, "architectures": [GUARDED_PREFIX + name for name in overrides["architectures"]]}
    args.logits_processors = [*(args.logits_processors or []), "serve.engine.processor:LetheProcessor"]
    args.scheduling_policy = "priority"  # clients' requests have one and the same; shadow answers come behind them
    args.worker_extension_cls = "serve.engine.worker.WorkerExtension"
    args.additional_config = {
        **(args.additional_config or {}),
        PLAN_KEY: {ARTIFACTS_KEY: str(settings.artifacts_dir), BASE_KEY: _describe_base(args)},
    }
    rules = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
    ruled = any(getattr(args, name, None) for name in rules) or (args.pipeline_parallel_size or 1) > 1
    if ruled or not current_platform.is_cpu():  # the engine would say the same, after a minute, in its log
        try:
            refuse_unguarded(AsyncEngineArgs.from_cli_args(args).create_engine_config())
        except ValueError as error:
            raise UnsafeSetting(str(error)) from error
    _choose_tool_parser(args)
    if not args.served_model_name:  # a directory's name, not its path, which tells about the machine
        args.served_model_name = [os.path.basename(os.path.abspath(args.model)) if os.path.isdir(args.model) else args.model]


def _choose_tool_parser(args: Namespace) -> None:
    """Tools on by default, with the parser that fits the model."""
    if args.enable_auto_tool_choice and args.tool_call_parser:
        return
    if not args.tool_call_parser:
        template = template_of(args)
        config = get_config(args.model, args.trust_remote_code, args.revision)
        parser = tool_parser_of(getattr(config, "model_type", ""), template)
        if parser is None:
            print(
                f"lethe: the chat template of {os.path.basename(args.model)} does not speak of tools: the model is not told of a "
                'request\'s tools, and only tool_choice "required" or a named tool makes it call one',
                flush=True,
            )
        args.tool_call_parser = parser or DEFAULT_PARSER
    args.enable_auto_tool_choice = True


def template_of(args: Namespace) -> str:
    """The chat template; empty if it is not known before the model is downloaded."""
    if args.chat_template:  # a file, or the template itself
        return Path(args.chat_template).read_text("utf-8") if os.path.isfile(args.chat_template) else str(args.chat_template)
    directory = model_directory(args)
    return chat_template_of(directory) if directory is not None else ""


def model_directory(args: Namespace) -> Path | None:
    """Where the served model's files are; None if they are not on this machine yet."""
    if os.path.isdir(args.model):
        return Path(args.model)
    try:
        return Path(snapshot_download(args.model, revision=args.revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _describe_base(args: Namespace) -> dict[str, Any] | None:
    """The base model as assistants know it; None if it takes none (no safetensors, or not downloaded before the start)."""
    directory = model_directory(args)
    try:
        return None if directory is None else describe_base(directory).model_dump()
    except (InvalidArtifact, OSError):
        return None


def check_binding(host: str | None, registry: Registry) -> None:
    """Refuse to listen beyond this machine without keys.

    Raises:
        UnsafeSetting: says how to make one.
    """
    if not registry.stored_keys() and not is_loopback(host or ""):
        raise UnsafeSetting(
            f"binding to {host or '0.0.0.0'} without keys would let anyone in; "  # noqa: S104
            "make one first with `lethe key create --scope admin`, or bind to 127.0.0.1"
        )
