"""Control: changes what is in force, in the one order that never leaves a gap.

Compile the artifact, load it in every worker, commit the change, swap the snapshot. A request admitted before the swap keeps its
plan; one admitted after it finds everything loaded. Changes made by other processes are picked up by polling the revision.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import Gauge

from guards.base_model import BaseModel
from guards.contrastive.assistant import FORKED_LAYERS, Assistant, Recipe
from guards.errors import GuardError, Untrainable
from guards.forget_set import ForgetSet, Frozen, Question
from guards.policy import Policy
from guards.similarity.index import similarity_path
from guards.steering.artifact import Steering, SteeringRecipe
from guards.steering.train import Lesson
from guards.suppression.automaton import CompiledPhrases
from guards.suppression.vocabulary import Vocabulary
from guards.whole_file import write_whole
from serve.control.build import Builder
from serve.control.check import check
from serve.control.gate_fitting import GateOrder, measure_gate
from serve.control.similarity import Similarity
from serve.control.training import Program, Trainer
from serve.hits import Hit
from serve.protocol.wire import assistant_path, phrases_path, steering_path
from serve.registry.models import TRAINED, Artifact, ArtifactKind, NotReady, RegistryError, UnknownName, now
from serve.registry.snapshot import Snapshot
from serve.registry.store import Registry
from serve.sqlite import StorageFault

logger = logging.getLogger(__name__)

_revision = Gauge("lethe_revision", "The registry revision in force in this process.")
_enabled = Gauge("lethe_enabled_forget_sets", "Forget sets in force in this process.")
_fault = Gauge("lethe_registry_fault", "1 while the registry cannot be read, so that what was in force before stays in force.")
Loader = Callable[[Sequence[str], Sequence[str]], Awaitable[dict[str, str]]]


class Control:
    """One per API process.

    Args:
        load: loads compiled phrases and assistants in every worker and returns the failures.
        model: the served model's directory, if assistants can be trained for it; base: what `describe_base` says of it.
    """

    def __init__(
        self,
        registry: Registry,
        vocabulary: Vocabulary,
        artifacts: Path,
        load: Loader,
        similarity: Similarity,
        refresh_ms: int,
        model: Path | None = None,
        base: BaseModel | None = None,
    ) -> None:
        self._registry = registry
        self._artifacts = artifacts
        self._load = load
        self._similarity = similarity
        self._refresh_ms = refresh_ms
        self._changing = asyncio.Lock()
        self._builds: dict[str, asyncio.Task[None]] = {}
        self._builder = Builder(vocabulary, artifacts, similarity)
        self._poll: asyncio.Task[None] | None = None
        self._trainer = None
        if model is not None and base is not None:
            self._trainer = Trainer(artifacts.with_name("training"), model, self._adopt)
        self._base = base
        self.unavailable: dict[str, str] = {}
        """Assistants that are in force and that a worker could not load, and why: their requests are refused."""
        self.fault: str | None = None
        """Why the registry cannot be read, while it cannot: what is in force is what was in force then."""
        self.snapshot: Snapshot = registry.snapshot()
        _revision.set_function(lambda: self.snapshot.revision)
        _enabled.set_function(lambda: len(self.snapshot.enabled))
        _fault.set_function(lambda: self.fault is not None)

    async def start(self) -> None:
        """Rebuild what is missing (another model, an interrupted build), load what is enabled, start polling.

        Enabled sets are ready before this returns, so that no request can come before them.

        Raises:
            GuardError, NotReady: one cannot be built or loaded.
        """
        await asyncio.to_thread(self._sweep)  # before any build, whose file no row may name yet
        await self._similarity.start()
        for stored in await asyncio.to_thread(self._registry.forget_sets):
            if stored.stripped:
                continue  # there is nothing to rebuild from; whoever needs what is missing is told
            if stored.enabled:
                content = await asyncio.to_thread(self._registry.content, stored.name)
                await self._build(content, keep_enabled=True)
            else:
                self._start_build(stored.name)
        self.snapshot = await asyncio.to_thread(self._registry.snapshot)
        await self._load_or_refuse(self.snapshot.fingerprints)
        # A foreign assistant (another model is served now) must not keep the server from starting: it could not be replaced.
        await self._load_or_report([], self.snapshot.trained_fingerprints)
        await self._load_vectors(self.snapshot)
        if self._trainer is not None:
            self._trainer.resume({stored.name for stored in await asyncio.to_thread(self._registry.forget_sets)})
        self._poll = asyncio.create_task(self._keep_fresh())

    async def stop(self) -> None:
        tasks = [*self._builds.values(), *([self._poll] if self._poll else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._trainer is not None:
            await self._trainer.stop()
        await self._similarity.stop()

    # Changes. Each returns the revision from which it holds.

    async def create(self, content: ForgetSet, *, actor: str) -> int:
        """Store a set and start building its artifacts. Raises NameTaken."""
        async with self._changing:
            revision = await asyncio.to_thread(self._registry.create_set, content, self._builder.to_build(content), actor=actor)
            await self._in_force(revision)
        self._start_build(content.name)
        return revision

    async def replace(self, content: ForgetSet, *, actor: str) -> int:
        """Replace a set. An enabled one stays enforced: the old content until the new is compiled and loaded.

        Raises:
            UnknownName, NotReady.
        """
        stored = await asyncio.to_thread(self._registry.forget_set, content.name)
        if stored.enabled:
            await self._builder.make(content)  # before the lock, so that nobody waits for it; what follows finds it done
        async with self._changing:
            stored = await asyncio.to_thread(self._registry.forget_set, content.name)
            enforced = stored.artifact("assistant") is not None or await asyncio.to_thread(self._registry.judged, stored)
            if stored.enabled and not content.phrases and not enforced:
                raise NotReady(f"forget set {content.name!r} is enabled and the new content has no phrases; disable it first")
            artifacts = await self._builder.make(content) if stored.enabled else self._builder.to_build(content)
            loaded = [artifact.fingerprint for artifact in artifacts if artifact.kind == "phrases" and stored.enabled]
            await self._load_or_refuse(loaded)
            revision = await asyncio.to_thread(self._registry.replace_set, content, artifacts, actor=actor)
            await self._in_force(revision, loaded)
        if not stored.enabled:
            self._start_build(content.name)
        return revision

    async def strip(self, name: str, *, actor: str) -> int:
        """Drop a set's texts for good; it stays in force by what was made from them. Raises UnknownName, NotReady."""
        await asyncio.to_thread(self._registry.forget_set, name)  # before anything is thrown away
        training = self.training(name)
        if training is not None and training["status"] != "failed":
            raise NotReady(f"the assistant of forget set {name!r} is being trained; wait until it is ready")
        async with self._changing:
            if self._trainer is not None:
                await self._trainer.cancel(name)  # a job holds a copy of the texts
            revision = await asyncio.to_thread(self._registry.strip_set, name, actor=actor)
            await asyncio.to_thread(self._registry.forget_deleted_pages)
            await self._in_force(revision)
        return revision

    async def delete(self, name: str, *, actor: str) -> int:
        """Delete a set; if it was enabled, it is out of force with this revision. Raises UnknownName."""
        async with self._changing:
            revision = await asyncio.to_thread(self._registry.delete_set, name, actor=actor)
            if self._trainer is not None:
                await self._trainer.cancel(name)
            await self._in_force(revision)
        return revision

    async def enable(self, name: str, *, actor: str) -> int:
        """Put a set in force for every request admitted from now on. Waits for a build that is under way.

        Raises:
            UnknownName, NotReady.
        """
        if build := self._builds.get(name):
            await asyncio.wait([build])
        async with self._changing:
            stored = await asyncio.to_thread(self._registry.forget_set, name)
            ready = [artifact for artifact in stored.artifacts if artifact.status == "ready"]  # a calibration needs no loading
            phrases, trained = (
                [artifact.fingerprint for artifact in ready if artifact.kind in kinds] for kinds in (("phrases",), TRAINED)
            )
            await self._load_or_refuse(phrases, trained)
            revision = await asyncio.to_thread(self._registry.enable, name, actor=actor)
            await self._in_force(revision, [*phrases, *trained])
        return revision

    async def train(self, name: str, retain: Sequence[str], recipe: Recipe) -> None:
        """Start training a set's assistant. An earlier one stays in force until the new one is ready.

        Args:
            retain: other sets, whose questions and answers are to stay as they are.

        Raises:
            UnknownName: there is no such set.
            Untrainable: the set holds nothing to learn from, or the served model takes no assistants.
        """
        self._require_trainable()
        if recipe.layers != FORKED_LAYERS:
            raise Untrainable(f"recipe.layers is {recipe.layers}, this server forks the last {FORKED_LAYERS} layers; leave it out")
        await self._order("guards.contrastive.train", name, retain, recipe)

    async def train_steering(
        self, name: str, retain: Sequence[str], recipe: SteeringRecipe, lessons: Sequence[Lesson], *, distil: bool
    ) -> None:
        """Start fitting or training a set's steering artifact, as `train` does.

        Args:
            lessons: what a policy says, for an adapter that is to say the same.
            distil: that is what is wanted; without lessons it would become its opposite, an adapter that knows nothing.

        Raises:
            UnknownName, Untrainable, NotReady.
        """
        base = self._require_trainable()
        if recipe.method == "adapter" and recipe.layers >= base.layers:
            raise Untrainable(f"recipe.layers is {recipe.layers}, the served model has {base.layers}; adapt fewer of them")
        if distil and not lessons:
            raise Untrainable("there is nothing to distil: no lesson came; the policy must answer the set's questions")
        if lessons and recipe.method != "adapter":
            raise Untrainable(f"a policy can be distilled into an adapter, not by method {recipe.method!r}")
        broken = next((each for each in lessons if len(each.top) != len(each.tokens)), None)
        if broken is not None:
            raise Untrainable(f"a lesson has {len(broken.tokens)} tokens and {len(broken.top)} distributions; one for each")
        dumped = [lesson.model_dump(mode="json") for lesson in lessons]
        await self._order("guards.steering.train", name, retain, recipe, lessons=dumped)

    def _require_trainable(self) -> BaseModel:
        if self._trainer is None or self._base is None:
            raise Untrainable(
                "no assistant can be trained for the served model: its files must be safetensors with a config.json, and on this "
                "machine before the server starts (restart it if they were downloaded just now)"
            )
        return self._base

    async def _order(self, program: Program, name: str, retain: Sequence[str], recipe: Frozen, **more: Any) -> None:
        trainer = self._trainer
        assert trainer is not None, "required before"
        content = await asyncio.to_thread(self._registry.content, name)
        if not content.questions and not content.texts:
            raise Untrainable(f"forget set {name!r} has neither questions nor texts, so there is nothing to train on; add some")
        kept: list[Question] = []
        for other in retain:
            kept += (await asyncio.to_thread(self._registry.content, other)).questions
        if name in retain:
            raise Untrainable(f"forget set {name!r} cannot be retained and forgotten at once")
        ordered = (program, getattr(recipe, "method", "contrast"))
        if (busy := await asyncio.to_thread(trainer.busy_with, name)) is not None and busy != ordered:
            raise NotReady(f"forget set {name!r} is being trained by method {busy[1]}; wait, or pause that first")
        await trainer.halt(name)  # an earlier order must not end up under this one's name
        async with self._changing:
            content = await asyncio.to_thread(self._registry.content, name)  # not deleted or replaced meanwhile
            await asyncio.to_thread(lambda: trainer.submit_files(program, content, kept, recipe, **more))
            trainer.run(name)

    def training(self, name: str) -> dict[str, Any] | None:
        """Where the training of a set's assistant stands; None if none is under way or has failed."""
        return None if self._trainer is None else self._trainer.describe(name)

    async def pause_training(self, name: str) -> None:
        """Stop a set's training; the same order again goes on from its last checkpoint. Raises UnknownName."""
        await asyncio.to_thread(self._registry.forget_set, name)
        if self._trainer is not None:
            self._trainer.pause(name)

    async def _adopt(self, name: str, content_fingerprint: str, file: Path, program: Program) -> None:
        """Give a set what was trained for it; if the set is enabled, load it and put it in force.

        Raises:
            GuardError, RegistryError, OSError.
        """
        made: Assistant | Steering
        kind: ArtifactKind
        if program == "guards.steering.train":
            made = await asyncio.to_thread(Steering.load, file)
            kind, place = made.manifest.recipe.method, steering_path
        else:
            made = await asyncio.to_thread(Assistant.load, file)
            kind, place = "assistant", assistant_path
        assert self._base is not None, "without a base model nothing is trained"
        made.check(self._base)
        fingerprint = made.fingerprint
        async with self._changing:
            await asyncio.to_thread(write_whole, place(self._artifacts, fingerprint), made.save)
            stored = await asyncio.to_thread(self._registry.forget_set, name)
            await self._load_or_refuse([], [fingerprint])  # also while disabled: what cannot be loaded must not block the set
            metrics = ", ".join(f"{key} {value:g}" for key, value in made.manifest.metrics.items())
            artifact = Artifact(kind, fingerprint, "ready", f"{made.size_bytes / 2**20:.1f} MiB, {metrics}", now())
            put = self._registry.put_trained
            revision = await asyncio.to_thread(put, name, content_fingerprint, artifact, actor="training")
            await self._in_force(revision, [fingerprint] if stored.enabled else [])

    async def disable(self, name: str, *, actor: str, only_if_expired: bool = False) -> int:
        """Take a set out of force for every request admitted from now on. Raises UnknownName."""
        async with self._changing:
            revision = await asyncio.to_thread(self._registry.disable, name, actor=actor, only_if_expired=only_if_expired)
            await self._in_force(revision)
        return revision

    async def put_calibration(
        self,
        name: str,
        strength: float,
        evidence: dict[str, Any],
        *,
        actor: str,
        corrupt: str | None = None,
        measured: str | None = None,
    ) -> int:
        """Store the strength that suits a set, of contrast or of a kind of corruption. Raises UnknownName, NotReady."""
        async with self._changing:
            put = self._registry.put_calibration
            revision = await asyncio.to_thread(put, name, strength, evidence, actor=actor, corrupt=corrupt, measured=measured)
            await self._in_force(revision)
        return revision

    async def put_policy(self, policy: Policy, *, actor: str) -> int:
        """Create or replace a policy. Raises UnknownName if it names an unknown set."""
        async with self._changing:
            revision = await asyncio.to_thread(self._registry.put_policy, policy, actor=actor)
            await self._in_force(revision)
        return revision

    async def delete_policy(self, name: str, *, actor: str) -> int:
        """Raises UnknownName."""
        async with self._changing:
            revision = await asyncio.to_thread(self._registry.delete_policy, name, actor=actor)
            await self._in_force(revision)
        return revision

    async def fit_gate(self, name: str, order: GateOrder, *, actor: str) -> int:
        """Fit the thresholds of a set's gate and of its stream filter, and store them with what they promise.

        Raises:
            UnknownName, NotReady, TooFewExamples, EncoderUnavailable.
        """
        vectors, record = await measure_gate(self._registry, self._similarity, name, order)
        async with self._changing:
            revision = await asyncio.to_thread(self._registry.put_gate, name, vectors, record, actor=actor)
            await self._in_force(revision)
        return revision

    async def check(self, text: str, policy: str) -> list[Hit]:
        """What the sets would do to this text if it were asked, and if the model were about to write it. Raises InvalidPolicy."""
        return await check(
            text, policy, snapshot=self.snapshot, registry=self._registry, phrases=self.phrases, similarity=self._similarity
        )

    def phrases(self, fingerprint: str) -> CompiledPhrases:
        """Compiled phrases by fingerprint; all that is in force stays in memory. Raises InvalidArtifact."""
        return self._builder.phrases(fingerprint, at_least=len(self.snapshot.fingerprints))

    async def refresh(self) -> int:
        """Take in what was changed in the registry. Returns the revision that is in force."""
        async with self._changing:
            await self._refresh()
        return self.snapshot.revision

    # Inside

    async def _build(self, content: ForgetSet, *, keep_enabled: bool = False) -> None:
        """Build a stored set's artifacts and record how it went."""
        try:
            artifacts = await self._builder.make(content)
        except (GuardError, OSError) as error:
            logger.error("lethe: the phrases of forget set %r could not be built: %s", content.name, error)
            if keep_enabled:
                raise
            artifacts = [Artifact("phrases", self._builder.phrases_fingerprint(content), "failed", str(error), now())]
        for artifact in artifacts:
            await asyncio.to_thread(self._registry.record_artifact, content.name, content.fingerprint, artifact)

    def _start_build(self, name: str) -> None:
        async def build() -> None:
            with contextlib.suppress(UnknownName):  # deleted meanwhile
                await self._build(await asyncio.to_thread(self._registry.content, name))

        if earlier := self._builds.pop(name, None):
            earlier.cancel()
        task = self._builds[name] = asyncio.create_task(build())
        task.add_done_callback(lambda done: self._builds.pop(name, None) if self._builds.get(name) is done else None)

    def _sweep(self) -> None:
        """Delete artifact files that no set refers to any more. One server owns a state directory, so nobody else does."""
        kept = {artifact.fingerprint for stored in self._registry.forget_sets() for artifact in stored.artifacts}
        for place in (phrases_path, assistant_path, steering_path, similarity_path):
            for path in place(self._artifacts, "any").parent.glob("*.safetensors"):
                if path.stem not in kept:
                    path.unlink(missing_ok=True)

    async def _load_or_refuse(self, phrases: Sequence[str], assistants: Sequence[str] = ()) -> None:
        if not phrases and not assistants:
            return
        for fingerprint, reason in (await self._load(phrases, assistants)).items():
            raise NotReady(f"a worker could not load artifact {fingerprint[:12]}: {reason}")
        for fingerprint in assistants:
            self.unavailable.pop(fingerprint, None)

    async def _load_or_report(self, phrases: Sequence[str], assistants: Sequence[str]) -> None:
        failures = await self._load(phrases, assistants) if phrases or assistants else {}
        for fingerprint in assistants:
            self.unavailable.pop(fingerprint, None)
        for fingerprint, reason in failures.items():
            logger.error("lethe: a worker could not load artifact %s: %s", fingerprint, reason)
            if fingerprint in assistants:
                self.unavailable[fingerprint] = reason

    async def _in_force(self, revision: int, loaded: Sequence[str] = ()) -> None:
        """Put a change in force that was committed. Raises StorageFault."""
        try:
            await self._refresh(loaded)
        except (StorageFault, RegistryError) as error:
            raise StorageFault(
                f"the change is written, as revision {revision}, and comes into force when the registry can be read again: {error}"
            ) from error

    async def _refresh(self, loaded: Sequence[str] = ()) -> None:
        snapshot = await asyncio.to_thread(self._registry.snapshot)
        before = self.snapshot
        phrases = sorted(set(snapshot.fingerprints) - set(before.fingerprints) - set(loaded))
        assistants = sorted(set(snapshot.trained_fingerprints) - set(before.trained_fingerprints) - set(loaded))
        if phrases or assistants:
            # Also what another process enabled. Rows whose artifact fails to load are closed by the guard.
            await self._load_or_report(phrases, assistants)
        await self._load_vectors(snapshot)
        for fingerprint in set(snapshot.fingerprints) - set(before.fingerprints):
            with contextlib.suppress(GuardError):  # whoever needs it is told
                # Into memory, so that a file that is changed or deleted later takes nothing out of force.
                await asyncio.to_thread(self._builder.phrases, fingerprint, len(snapshot.fingerprints))
        self.snapshot = snapshot

    async def _load_vectors(self, snapshot: Snapshot) -> None:
        """Whoever needs what cannot be loaded is refused when it asks."""
        try:
            await self._similarity.load(snapshot.vectors)
        except GuardError as error:
            logger.error("lethe: similarity could not be loaded: %s", error)

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_ms / 1_000)
            try:
                position = await asyncio.to_thread(self._registry.position)
                if (position.revision, position.head) != (self.snapshot.revision, self.snapshot.head):
                    async with self._changing:
                        await self._refresh()
                await self._disable_expired()
            except (StorageFault, RegistryError) as error:
                if self.fault != str(error):  # once, not twice a second
                    logger.error("lethe: what is in force stays as it is at revision %d: %s", self.snapshot.revision, error)
                self.fault = str(error)
            except Exception:  # a poll that dies would freeze the snapshot; say so and try again
                logger.exception("lethe: could not refresh from the registry")
            else:
                if self.fault is not None:
                    logger.warning("lethe: the registry can be read again, revision %d is in force", self.snapshot.revision)
                self.fault = None

    async def _disable_expired(self) -> None:
        if not self.snapshot.enabled:
            return
        for stored in await asyncio.to_thread(self._registry.forget_sets):
            if stored.enabled and stored.expired:
                await self.disable(stored.name, actor="server", only_if_expired=True)  # it may be renewed meanwhile
