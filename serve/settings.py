"""Settings, read once. The only place that reads LETHE_* environment variables."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


def _data_directory() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "lethe"


class Settings(BaseSettings):
    """Everything an operator may set, as ``LETHE_<NAME>``."""

    model_config = SettingsConfigDict(env_prefix="LETHE_", frozen=True)

    state_dir: Path = Field(default_factory=_data_directory, description="registry, artifacts; all state")
    url: str = Field("http://127.0.0.1:8000", description="the server that the command line talks to")
    key: str | None = Field(None, description="the key that the command line sends")
    encoder: str | None = Field(
        None, description="directory of a sentence-transformers model, or an installed encoder's name; default: the bundled MiniLM"
    )
    allow_routes: tuple[str, ...] = Field((), description='more vLLM routes to allow, as JSON: ["POST /tokenize"]')
    max_body_bytes: int = Field(8 << 20, gt=0)
    max_admin_body_bytes: int = Field(256 << 20, gt=0)
    max_choices: int = Field(16, gt=0, description="n, and the beam width")
    max_logit_bias: int = Field(1024, gt=0)
    max_prompts: int = Field(64, gt=0, description="prompts in one call of /v1/completions")
    max_messages: int = Field(2048, gt=0)
    max_under_way: int = Field(512, gt=0, description="requests that are answered or wait; more get a 429")
    max_probes_per_hour: int = Field(20, ge=0, description="constrained requests of a chat key that name what is forgotten")
    comment_after_s: float = Field(15.0, gt=0, description="seconds without a sign on a stream after which a comment is sent")
    template_switches: tuple[str, ...] = Field(
        ("enable_thinking", "thinking", "reasoning_effort", "thinking_budget", "low_effort"),
        description="keys of chat_template_kwargs that clients may send, as JSON",
    )
    shadow_waiting: int = Field(64, gt=0, description="shadow answers that may wait; more are dropped")
    shadow_beside: int = Field(0, ge=0, description="clients' requests under way beside which shadow answers go on")
    shadow_quiet_s: float = Field(1.0, ge=0, description="how long there must have been no more of them before one begins")
    shadow_at_once: int = Field(1, gt=0, description="shadow answers at a time")
    shadow_tokens_per_minute: int = Field(20_000, gt=0, description="the most that shadow answers may generate")
    training_niceness: int = Field(19, ge=0, le=19, description="how far training stands behind answers where processors are busy")
    refresh_ms: int = Field(500, gt=0, description="how often a server looks for changes made by other processes")

    @property
    def cache_dir(self) -> Path:
        """Converted models, beside the state: can be deleted at any time."""
        return self.state_dir.with_name(self.state_dir.name + "-cache")

    @property
    def artifacts_dir(self) -> Path:
        return self.state_dir / "artifacts"
