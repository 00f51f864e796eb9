"""What is in force in this process: the snapshot, what its plans need in every worker, and how both follow the registry.

Changes made by other processes are picked up by polling the revision.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection

from prometheus_client import Gauge

from guards.catalogue import GUARDS
from guards.errors import GuardError
from guards.suppression.artifact import CompiledPhrases
from guards.types import ArtifactRef
from serve.control.build import Builder
from serve.control.similarity import Similarity
from serve.registry.records import NotReady, RegistryError
from serve.registry.snapshot import Snapshot
from serve.registry.store import Registry
from serve.sqlite import StorageFault

logger = logging.getLogger(__name__)

_revision = Gauge("lethe_revision", "The registry revision in force in this process.")
_enabled = Gauge("lethe_enabled_forget_sets", "Forget sets in force in this process.")
_fault = Gauge("lethe_registry_fault", "1 while the registry cannot be read, so that what was in force before stays in force.")
Loader = Callable[[Collection[ArtifactRef]], Awaitable[dict[str, str]]]
"""Loads artifacts in every worker and returns the failures: fingerprint -> reason."""


class InForce:
    """One per API process. Whoever changes what is in force holds `changing` from before the change to after `committed`."""

    def __init__(self, registry: Registry, builder: Builder, similarity: Similarity, load: Loader, refresh_ms: int) -> None:
        self._registry = registry
        self._builder = builder
        self._similarity = similarity
        self._load = load
        self._refresh_ms = refresh_ms
        self._poll: asyncio.Task[None] | None = None
        self.changing = asyncio.Lock()
        self.unavailable: dict[str, str] = {}
        """Trained artifacts that are in force and that a worker could not load, and why: their requests are refused."""
        self.fault: str | None = None
        """Why the registry cannot be read; None if it can. While it is set, what was in force stays in force."""
        self.snapshot: Snapshot = registry.snapshot()
        _revision.set_function(lambda: self.snapshot.revision)
        _enabled.set_function(lambda: len(self.snapshot.sets))
        _fault.set_function(lambda: self.fault is not None)

    async def start(self) -> None:
        """Load what is enabled. Raises NotReady where something that was built cannot be loaded."""
        snapshot = await asyncio.to_thread(self._registry.snapshot)
        trained = {artifact for artifact in snapshot.artifacts if GUARDS[artifact.guard].trained}
        await self.load_or_refuse(set(snapshot.artifacts) - trained)
        # A foreign assistant (another model is served now) must not keep the server from starting: it could not be replaced.
        await self._load_or_report(trained)
        await self._load_vectors(snapshot)
        for fingerprint in snapshot.phrases:
            await self._read_phrases(fingerprint, len(snapshot.phrases))
        self.snapshot = snapshot

    def follow(self, disable_expired: Callable[[], Awaitable[None]]) -> None:
        """Start polling. ``disable_expired`` is called after every look at the registry."""
        self._poll = asyncio.create_task(self._keep_fresh(disable_expired))

    async def stop(self) -> None:
        if self._poll is not None:
            self._poll.cancel()
            await asyncio.gather(self._poll, return_exceptions=True)

    async def load_or_refuse(self, artifacts: Collection[ArtifactRef]) -> None:
        """Load artifacts before a change that needs them. Raises NotReady."""
        if not artifacts:
            return
        for fingerprint, reason in (await self._load(artifacts)).items():
            raise NotReady(f"a worker could not load artifact {fingerprint[:12]}: {reason}")
        for artifact in artifacts:
            self.unavailable.pop(artifact.fingerprint, None)

    async def committed(self, revision: int, loaded: Collection[ArtifactRef] = ()) -> None:
        """Put a change in force that was committed. Raises StorageFault."""
        try:
            await self.refresh(loaded)
        except (StorageFault, RegistryError) as error:
            raise StorageFault(
                f"the change is written, as revision {revision}, and comes into force when the registry can be read again: {error}"
            ) from error

    async def refresh(self, loaded: Collection[ArtifactRef] = ()) -> None:
        """Take in what the registry holds. ``loaded``: what every worker has already."""
        snapshot = await asyncio.to_thread(self._registry.snapshot)
        before = self.snapshot
        # Also what another process enabled. Rows whose artifact fails to load are closed by the guard.
        await self._load_or_report(set(snapshot.artifacts) - set(before.artifacts) - set(loaded))
        await self._load_vectors(snapshot)
        for fingerprint in set(snapshot.phrases) - set(before.phrases):
            await self._read_phrases(fingerprint, len(snapshot.phrases))
        self.snapshot = snapshot

    def phrases(self, fingerprint: str) -> CompiledPhrases:
        """Compiled phrases by fingerprint; all that is in force stays in memory. Raises InvalidArtifact."""
        return self._builder.phrases(fingerprint, at_least=len(self.snapshot.phrases))

    async def _read_phrases(self, fingerprint: str, at_least: int) -> None:
        """Into memory, so that a file that is changed or deleted later takes nothing out of force."""
        with contextlib.suppress(GuardError):  # whoever needs it is told
            await asyncio.to_thread(self._builder.phrases, fingerprint, at_least)

    async def _load_or_report(self, artifacts: Collection[ArtifactRef]) -> None:
        failures = await self._load(artifacts) if artifacts else {}
        for artifact in artifacts:
            reason = failures.get(artifact.fingerprint)
            self.unavailable.pop(artifact.fingerprint, None)
            if reason is None:
                continue
            logger.error("lethe: a worker could not load artifact %s: %s", artifact.fingerprint, reason)
            if GUARDS[artifact.guard].trained:
                self.unavailable[artifact.fingerprint] = reason

    async def _load_vectors(self, snapshot: Snapshot) -> None:
        """Whoever needs what cannot be loaded is refused when it asks."""
        try:
            await self._similarity.load(snapshot.vectors)
        except GuardError as error:
            logger.error("lethe: similarity could not be loaded: %s", error)

    async def _keep_fresh(self, disable_expired: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(self._refresh_ms / 1_000)
            try:
                position = await asyncio.to_thread(self._registry.position)
                if (position.revision, position.head) != (self.snapshot.revision, self.snapshot.head):
                    async with self.changing:
                        await self.refresh()
                await disable_expired()
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
