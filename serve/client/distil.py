"""Distillation targets: what a policy says about a set, for an adapter that is to say the same (`lethe train --distil-from`).

They come from the served distribution, so that any policy can be distilled, however it works.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import httpx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from guards.forget_set import ForgetSet
from serve.cli.talk import err, fail, http_client, unwrap
from serve.client.report import config_fingerprint
from serve.settings import Settings

SAMPLES, LONGEST, TOP, AT_ONCE = 3, 80, 20, 8
NEVER = -100.0
"""Log-probabilities below this are tokens that a mask or a cut leaves out."""
KEPT_S = 7 * 24 * 3600.0
Targets = list[dict[str, Any]]


def ask_targets(client: httpx.Client, name: str, policy: str) -> tuple[Targets, Path]:
    """What a policy answers to a set's questions, once greedily and sampled, with the likeliest tokens at each place.

    Also the likeliest tokens at each place of the true answers: the base gives those at first, and must be led away from them.
    What was answered is kept, so that the same call goes on where it was, and training from its checkpoint.

    Args:
        client: of the admin API.

    Returns:
        The targets, and the file that keeps them: it holds what is to be forgotten, so delete it when they are no longer needed.
    """
    shown = unwrap(client.get(f"/forget_sets/{name}"))
    if "content" not in shown:
        fail(f"the texts of {name} were dropped, so nothing can be asked about it")
    content = ForgetSet.model_validate({"name": name, **shown["content"]})
    asked: dict[str, str] = {}
    for entry in content.questions:
        asked |= dict.fromkeys((entry.question, *entry.paraphrases[:-1]), entry.answer)  # the last one is held out
    settings = Settings()
    headers = {"authorization": f"Bearer {settings.key}"} if settings.key else {}
    listed = httpx.get(f"{settings.url}/v1/models", headers=headers, timeout=60)
    served = unwrap(listed)["data"][0]
    policies = [{**unwrap(client.get(f"/policies/{policy}")), "revision": 0}]
    config = config_fingerprint(shown, policies, f"{settings.url} {served['id']} {served.get('root')} {SAMPLES}")
    directory = settings.cache_dir / "targets"
    for old in directory.glob("*.json*"):  # of runs that were given up: they hold what is to be forgotten
        if time.time() - old.stat().st_mtime > KEPT_S:
            old.unlink(missing_ok=True)
    kept = _Kept(directory / f"{config}.jsonl")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with (
        http_client(base_url=settings.url, headers=headers) as chat,
        Progress(*columns, console=err) as progress,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        task = progress.add_task(f"Asking {policy}", total=len(asked))

        def ask(question: str) -> Targets:
            if question not in kept.known:
                kept.add(question, _ask(chat, client, f"{served['id']}:{policy}", policy, question, asked[question]))
            progress.advance(task)
            return kept.known.get(question, [])

        targets = list(pool.map(ask, asked))
    if silent := [question for question, each in zip(asked, targets, strict=True) if not each]:
        shown_one = f"{len(silent)} of {len(asked)} questions, such as {silent[0]!r}"
        fail(f"policy {policy} gave no answer to {shown_one}; distil one that answers")
    return [each for every in targets for each in every], kept.path


class _Kept:
    """Targets in a file of JSON lines; one that a crash left half written is asked for again."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()
        self.known: dict[str, Targets] = {}
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = path.read_text("utf-8") if path.exists() else ""
        if text and not text.endswith("\n"):
            path.write_text(text[: text.rfind("\n") + 1], "utf-8")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self.known[entry["question"]] = entry["targets"]
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, question: str, targets: Targets) -> None:
        """Keep them; silence is not kept, so that it is asked again."""
        if not targets:
            return
        with self._lock:
            self.known[question] = targets
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"question": question, "targets": targets}) + "\n")


def _ask(chat: httpx.Client, admin: httpx.Client, model: str, policy: str, question: str, answer: str) -> Targets:
    """The targets of one question; none if the policy says nothing."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": LONGEST,
        "logprobs": True,
        "top_logprobs": TOP,
        "return_tokens_as_token_ids": True,
    }
    ways = ({"temperature": 0}, {"temperature": 1, "n": SAMPLES, "seed": 1})
    choices = [each for way in ways for each in unwrap(chat.post("/v1/chat/completions", json=body | way))["choices"]]
    found = [_target(question, choice) for choice in choices if choice["logprobs"] and choice["logprobs"]["content"]]
    if not found:
        return []
    order = {"policy": policy, "question": question, "continuations": [answer], "top_logprobs": TOP}
    [forgotten] = unwrap(admin.post("/score", json=order))["scores"]
    top = [[pair for pair in place if pair[1] > NEVER] for place in forgotten["top"]]
    likeliest = [max(place, key=lambda pair: pair[1])[0] for place in top]
    if likeliest == forgotten["token_ids"]:
        return found  # it would say so itself, if nothing held it back afterwards: nothing to learn from
    return [*found, {"question": question, "tokens": forgotten["token_ids"], "top": top}]


def _target(question: str, choice: dict[str, Any]) -> dict[str, Any]:
    def token(named: dict[str, Any]) -> int:
        return int(named["token"].removeprefix("token_id:"))

    places = choice["logprobs"]["content"]
    top = [[[token(each), each["logprob"]] for each in place["top_logprobs"] if each["logprob"] > NEVER] for place in places]
    return {"question": question, "tokens": [token(place) for place in places], "top": top}
