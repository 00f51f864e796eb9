"""Control: changes what is in force, in the one order that never leaves a gap.

Compile the artifact, load it in every worker, commit the change, swap the snapshot. A request admitted before the swap keeps its
plan; one admitted after it finds everything loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guards.base_model import BaseModel
from guards.catalogue import GUARDS, TRAINED, guard_of
from guards.errors import Untrainable
from guards.forget_set import ForgetSet, Question
from guards.kinds import GuardKind, SetArtifacts, TrainingOrder, resolve
from guards.policy import Policy
from guards.suppression.artifact import CompiledPhrases
from guards.suppression.vocabulary import Vocabulary
from guards.types import ArtifactRef
from guards.whole_file import write_whole
from serve.control.build import Builder, BuildFailed
from serve.control.check import check
from serve.control.gate_fitting import GateOrder, measure_gate
from serve.control.in_force import InForce, Loader
from serve.control.removals import Removals
from serve.control.similarity import Similarity
from serve.control.text_guards import TextGuards
from serve.control.training import Trainer
from serve.hits import Hit
from serve.protocol.artifacts import artifact_path, stored_files
from serve.registry.records import Artifact, NotReady, UnknownName, now
from serve.registry.snapshot import Snapshot
from serve.registry.store import Registry


class Control:
    """One per API process.

    Args:
        load: loads artifacts in every worker and returns the failures.
        model: the served model's directory, if assistants can be trained for it; base: what `describe_base` says of it.
        training_niceness: see `Trainer`.
        removals: those that this server carries out, if it does.
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
        training_niceness: int = 19,
        removals: Removals | None = None,
    ) -> None:
        self._registry = registry
        self._artifacts = artifacts
        self._similarity = similarity
        self.text_guards = TextGuards()
        self._builds: dict[str, asyncio.Task[None]] = {}
        self._builder = Builder(vocabulary, artifacts, similarity)
        self.in_force = InForce(registry, self._builder, similarity, load, refresh_ms)
        self._changing = self.in_force.changing
        self._trainer = None
        if model is not None and base is not None:
            self._trainer = Trainer(artifacts.with_name("training"), model, self._adopt, training_niceness)
        self._base = base
        self._removals = removals

    @property
    def snapshot(self) -> Snapshot:
        """What is in force now."""
        return self.in_force.snapshot

    async def start(self) -> None:
        """Rebuild what is missing (another model, an interrupted build), load what is enabled, start polling.

        Enabled sets are ready before this returns, so that no request can come before them.

        Raises:
            GuardError, NotReady: one cannot be built or loaded.
        """
        await asyncio.to_thread(self._sweep)  # before any build: its new file may not be named by a row yet
        await self._similarity.start()
        stored_sets = await asyncio.to_thread(self._registry.forget_sets)
        for stored in stored_sets:
            if stored.stripped:
                continue  # there is nothing to rebuild from; whoever needs what is missing is told
            if stored.enabled:
                content = await asyncio.to_thread(self._registry.content, stored.name)
                await self._build(content, keep_enabled=True)
            else:
                self._start_build(stored.name)
        await self.in_force.start()
        if self._trainer is not None:
            self._trainer.resume({stored.name for stored in stored_sets})
        if self._removals is not None:
            self._removals.resume({stored.name for stored in stored_sets})
        self.in_force.follow(self._disable_expired)

    async def stop(self) -> None:
        for task in self._builds.values():
            task.cancel()
        await asyncio.gather(*self._builds.values(), return_exceptions=True)
        await self.in_force.stop()
        for jobs in (self._removals, self._trainer):
            if jobs is not None:
                await jobs.stop()
        await self._similarity.stop()

    # Changes. Each returns the revision from which it holds.

    async def create(self, content: ForgetSet, *, actor: str) -> int:
        """Store a set and start building its artifacts. Raises NameTaken."""
        async with self._changing:
            revision = await asyncio.to_thread(self._registry.create_set, content, self._builder.to_build(content), actor=actor)
            await self.in_force.committed(revision)
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
            artifacts = await self._builder.make(content) if stored.enabled else self._builder.to_build(content)
            if stored.enabled:
                kept = {kind: name for kind, name in stored.made.artifacts.items() if kind in TRAINED}
                made = {each.kind: each.fingerprint for each in artifacts if each.status == "ready"}
                if not await asyncio.to_thread(self._registry.enforced, SetArtifacts(content.name, {**kept, **made})):
                    raise NotReady(
                        f"forget set {content.name!r} is enabled, and no policy would enforce the new content (it has no phrases, "
                        "perhaps); disable the set first"
                    )
            loaded = _loadable(artifacts) if stored.enabled else []
            await self.in_force.load_or_refuse(loaded)
            revision = await asyncio.to_thread(self._registry.replace_set, content, artifacts, actor=actor)
            await self.in_force.committed(revision, loaded)
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
            if self._removals is not None:
                await self._removals.strip(name)
            if self._trainer is not None:
                await self._trainer.cancel(name)  # a job holds a copy of the texts
            revision = await asyncio.to_thread(self._registry.strip_set, name, actor=actor)
            await asyncio.to_thread(self._registry.forget_deleted_pages)
            await self.in_force.committed(revision)
        return revision

    async def delete(self, name: str, *, actor: str) -> int:
        """Delete a set; if it was enabled, it is out of force with this revision. Raises UnknownName."""
        async with self._changing:
            revision = await asyncio.to_thread(self._registry.delete_set, name, actor=actor)
            for jobs in (self._removals, self._trainer):
                if jobs is not None:
                    await jobs.cancel(name)
            await self.in_force.committed(revision)
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
            loaded = _loadable(stored.artifacts)
            await self.in_force.load_or_refuse(loaded)
            revision = await asyncio.to_thread(self._registry.enable, name, actor=actor)
            await self.in_force.committed(revision, loaded)
        return revision

    async def train(self, kind: GuardKind, name: str, order: TrainingOrder) -> None:
        """Start training what a guard acts by. What was trained earlier stays in force until the new artifact is ready.

        Args:
            order: of the guard's own type; it names other sets, whose questions and answers are to stay as they are.

        Raises:
            UnknownName: there is no such set.
            Untrainable: the set holds nothing to learn from, or the served model takes no such artifacts.
            NotReady: something else is being trained for the set.
        """
        trainer, training = self._trainer, kind.training
        assert training is not None, f"guard {kind.name!r} is not trained"
        if trainer is None or self._base is None:
            raise Untrainable(
                "no assistant can be trained for the served model: its files must be safetensors with a config.json, and on this "
                "machine before the server starts (restart it if they were downloaded just now)"
            )
        resolve(training.check)(order, self._base)
        content = await asyncio.to_thread(self._registry.content, name)
        if not content.questions and not content.texts:
            raise Untrainable(f"forget set {name!r} has neither questions nor texts, so there is nothing to train on; add some")
        kept: list[Question] = []
        for other in order.retain:
            kept += (await asyncio.to_thread(self._registry.content, other)).questions
        if name in order.retain:
            raise Untrainable(f"forget set {name!r} cannot be retained and forgotten at once")
        method = getattr(order.recipe, "method", kind.name)
        busy = await asyncio.to_thread(trainer.busy_with, name)
        if busy is not None and busy != (training.program, method):
            raise NotReady(f"forget set {name!r} is being trained by method {busy[1]}; wait, or pause that first")
        await trainer.halt(name)  # an earlier order must not end up under this one's name
        async with self._changing:
            content = await asyncio.to_thread(self._registry.content, name)  # not deleted or replaced meanwhile
            await asyncio.to_thread(trainer.submit_files, training.program, method, content, kept, order)
            trainer.run(name)

    def training(self, name: str) -> dict[str, Any] | None:
        """Where the training of a set's assistant stands; None if none is under way or has failed."""
        return None if self._trainer is None else self._trainer.describe(name)

    async def pause_training(self, name: str) -> None:
        """Stop a set's training; the same order again goes on from its last checkpoint. Raises UnknownName."""
        await asyncio.to_thread(self._registry.forget_set, name)
        if self._trainer is not None:
            self._trainer.pause(name)

    async def _adopt(self, name: str, content_fingerprint: str, file: Path, program: str) -> None:
        """Give a set what was trained for it; if the set is enabled, load it and put it in force.

        Raises:
            GuardError, RegistryError, OSError.
        """
        kind = next(kind for kind in GUARDS.values() if kind.training is not None and kind.training.program == program)
        assert kind.files is not None, "what is trained is a file"
        made = await asyncio.to_thread(resolve(kind.files.reader).load, file)
        made.check(self._base)
        ref = ArtifactRef(kind.name, made.fingerprint)
        async with self._changing:
            await asyncio.to_thread(write_whole, artifact_path(self._artifacts, ref), made.save)
            stored = await asyncio.to_thread(self._registry.forget_set, name)
            await self.in_force.load_or_refuse([ref])  # also while disabled: one that cannot be loaded would prevent enabling
            artifact = Artifact(made.kind, made.fingerprint, "ready", made.summary, now())
            put = self._registry.put_trained
            revision = await asyncio.to_thread(put, name, content_fingerprint, artifact, actor="training")
            await self.in_force.committed(revision, [ref] if stored.enabled else [])

    async def disable(self, name: str, *, actor: str, only_if_expired: bool = False) -> int:
        """Take a set out of force for every request admitted from now on. Raises UnknownName."""
        async with self._changing:
            revision = await asyncio.to_thread(self._registry.disable, name, actor=actor, only_if_expired=only_if_expired)
            await self.in_force.committed(revision)
        return revision

    async def put_calibration(
        self,
        name: str,
        strength: float,
        evidence: dict[str, Any],
        *,
        actor: str,
        **of: Any,
    ) -> int:
        """Store the strength that suits a set: see `Registry.put_calibration`. Raises UnknownName, NotReady."""
        async with self._changing:
            revision = await asyncio.to_thread(self._registry.put_calibration, name, strength, evidence, actor=actor, **of)
            await self.in_force.committed(revision)
        return revision

    async def put_policy(self, policy: Policy, *, actor: str) -> int:
        """Create or replace a policy. Raises UnknownName if it names an unknown set."""
        async with self._changing:
            revision = await asyncio.to_thread(self._registry.put_policy, policy, actor=actor)
            await self.in_force.committed(revision)
        return revision

    async def delete_policy(self, name: str, *, actor: str) -> int:
        """Raises UnknownName."""
        async with self._changing:
            revision = await asyncio.to_thread(self._registry.delete_policy, name, actor=actor)
            await self.in_force.committed(revision)
        return revision

    async def fit_gate(self, name: str, order: GateOrder, *, actor: str) -> int:
        """Fit the thresholds of a set's gate and of its stream filter, and store them with what they promise.

        Raises:
            UnknownName, NotReady, TooFewExamples, EncoderUnavailable.
        """
        vectors, record = await measure_gate(self._registry, self._similarity, name, order)
        async with self._changing:
            revision = await asyncio.to_thread(self._registry.put_gate, name, vectors, record, actor=actor)
            await self.in_force.committed(revision)
        return revision

    async def check(self, text: str, policy: str) -> list[Hit]:
        """What the sets would do to this text if it were asked, and if the model were about to write it. Raises InvalidPolicy."""
        return await check(
            text,
            policy,
            snapshot=self.snapshot,
            registry=self._registry,
            phrases=self.phrases,
            similarity=self._similarity,
            text_guards=self.text_guards,
        )

    def phrases(self, fingerprint: str) -> CompiledPhrases:
        """See `InForce.phrases`."""
        return self.in_force.phrases(fingerprint)

    async def refresh(self) -> int:
        """Take in what was changed in the registry. Returns the revision that is in force."""
        async with self._changing:
            await self.in_force.refresh()
        return self.snapshot.revision

    # Inside

    async def _build(self, content: ForgetSet, *, keep_enabled: bool = False) -> None:
        """Build a stored set's artifacts and record how it went."""
        try:
            artifacts = await self._builder.make(content)
        except BuildFailed as error:
            if keep_enabled:
                raise
            artifacts = error.artifacts
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
        for path in stored_files(self._artifacts):
            if path.stem not in kept:
                path.unlink(missing_ok=True)

    async def _disable_expired(self) -> None:
        if not self.snapshot.sets:
            return
        for stored in await asyncio.to_thread(self._registry.forget_sets):
            if stored.enabled and stored.expired:
                await self.disable(stored.name, actor="server", only_if_expired=True)  # it may be renewed meanwhile


def _loadable(artifacts: Sequence[Artifact]) -> list[ArtifactRef]:
    """Those that the engine acts by and that are ready: a calibration needs no loading, vectors stay in this process."""
    found = ((guard_of(each.kind), each) for each in artifacts if each.status == "ready")
    return [ArtifactRef(guard.name, each.fingerprint) for guard, each in found if guard is not None and guard.entry is not None]
