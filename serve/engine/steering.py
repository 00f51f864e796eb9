"""Steering and corruption in the engine: hooks on the model's layers, made when something first needs them.

Covered: what happens inside the forward pass, and closing the rows of requests for which it did not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available

from guards.errors import InvalidArtifact
from guards.steering.artifact import Steering
from guards.steering.declaration import Corrupt, Steer
from guards.steering.guard import SteeringGuard
from guards.types import Plan, Rows
from serve.engine.context import NO_BASE, Context
from serve.engine.fork import Unforkable
from serve.engine.stages import Undone, of_all_stages
from serve.engine.steer_hooks import Steerer, Unsteerable

logger = logging.getLogger(__name__)


class SteeringInNetwork:
    """One per engine."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._slots = context.slots
        self._steerer: Steerer | None = None
        self._spoilt: set[str] = set()
        """Salts (`Plan.cache_salt`) under which blocks may be cached that were not steered. Requests that have them are closed."""
        self.undone: Undone | None = None
        """What a stage of a pipeline tells the next; None if one process has all the layers. Set by the model."""
        self._guard = SteeringGuard(context.closer, self._unable)

    def unable(self) -> str | None:
        """Why this model cannot be steered; None if it can."""
        if self._context.base is None:
            return NO_BASE
        try:
            self._made()
        except Unsteerable as error:
            return str(error)
        return None

    def prepare(self) -> None:
        """Register hooks in a model that is about to be compiled: hooks added later are not in the compiled code."""
        if self._context.base is not None:
            try:
                self._the_steerer()
            except Unsteerable as error:
                logger.warning("lethe: %s", error)

    def check(self, steering: Steering) -> None:
        """Raise InvalidArtifact or Unsteerable if this model cannot be steered by an artifact."""
        if self._context.base is None:
            raise InvalidArtifact(f"the served model cannot be steered, so {steering.fingerprint[:12]} cannot be loaded")
        steering.check(self._context.base)
        self._the_steerer().check(steering)

    def load(self, artifacts: Mapping[str, Steering]) -> None:
        """Make exactly these artifacts, by fingerprint, the ones that plans may name."""
        self._the_steerer().load(artifacts)

    def admit(self, plan: Plan, failed: Iterable[str]) -> None:
        """A request enters the batch. ``failed``: artifacts of its plan that could not be loaded."""
        if set(failed) & set(plan.artifacts_of(Steer)):
            self.spoil([plan])  # also should the artifact come later
        if plan.of(Corrupt) and self._steerer is None and self._context.base is not None:
            try:
                self._the_steerer()
            except InvalidArtifact as error:
                logger.error("lethe: %s", error)  # its rows are closed

    def spoil(self, plans: Iterable[Plan]) -> None:
        """Requests of these plans were, or may have been, computed without steering: close them from now on."""
        self._spoilt |= {plan.cache_salt for plan in plans if plan.cache_salt is not None}

    def begin(self, input_ids: Tensor | None, positions: Tensor) -> None:
        """Before a forward pass, [T] each: note what is to be done to its tokens."""
        if self._steerer is not None:
            self._begin(self._steerer, input_ids, positions)
        self._note_undone()

    def _begin(self, steerer: Steerer, input_ids: Tensor | None, positions: Tensor) -> None:
        slots = self._context.step.slots
        if slots is None or not self._engaged:
            steerer.clear()
            return
        try:
            steerer.begin(slots, self._slots.plans, input_ids, positions)
        except Exception:
            logger.exception("lethe: a step could not be steered; its steered requests are closed")
            self._context.stop_unless_alone()
            steerer.clear()
            self.spoil(self._slots.live_plans)

    def _note_undone(self) -> None:
        if self.undone is not None:
            undone = [plan is not None and plan.changes_cache and self._unable(plan) is not None for plan in self._slots.plans]
            self.undone.note(self._context.step.slots, undone)

    def clear(self) -> None:
        """Before a pass that computes nothing for anybody."""
        if self._steerer is not None:
            self._steerer.clear()

    @property
    def _engaged(self) -> bool:
        return any(plan.changes_cache for plan in self._slots.live_plans)

    @contextmanager
    def acting(self, embeddings: Tensor | None) -> Iterator[Tensor | None]:
        """Around the base's forward pass. Yields [T, H] embeddings to start from, if the runner made them (of images, say)."""
        if self._steerer is None:
            yield embeddings
            return
        self._steerer.arm()
        try:
            yield self._steerer.corrupted(embeddings)
        finally:
            if not self._steerer.end(replayed=_replays()):
                self.spoil(self._slots.live_plans)
            self._note_undone()  # also what failed just now

    def graphs(self) -> int | None:
        """Which CUDA graphs do what the coming pass needs: 0 = those without steering, 1 = those with it, None = none."""
        if not self._engaged:
            return 0
        try:
            return 1 if self._steerer is not None and self._steerer.fill_buffers(self._slots.plans) else None
        except Exception:
            logger.exception("lethe: artifacts cannot be brought into the graphs; a step runs without them")
            self._context.stop_unless_alone()
            return None

    def capture(self, steered: bool) -> None:
        """Which graphs are captured from now on."""
        if self._steerer is not None and self._steerer.buffers is not None:
            self._steerer.buffers.capturing = steered

    def captured(self) -> None:
        """All graphs are captured. Stages of a pipeline must choose alike, so each learns what the others reached."""
        buffers = None if self._steerer is None else self._steerer.buffers
        reached = of_all_stages(set() if buffers is None else buffers.reached)
        if buffers is not None:
            buffers.reached = reached

    @property
    def has_graphs(self) -> bool:
        """Whether there is anything that a graph could do."""
        return self._steerer is not None and self._steerer.buffers is not None

    def apply(self, logits: Tensor, rows: Rows, plans: Sequence[Plan]) -> Tensor:
        """Close the rows of requests that should have been steered and were not, see `SteeringGuard.apply`."""
        return self._guard.apply(logits, rows, plans)

    def _unable(self, plan: Plan) -> str | None:
        """The guard that cannot do what a plan says; None if all is done."""
        if self._steerer is not None and self._steerer.able(plan) and not (self._spoilt and plan.cache_salt in self._spoilt):
            return None
        return Steer.guard if plan.of(Steer) else Corrupt.guard

    def _the_steerer(self) -> Steerer:
        """Made when the first artifact, or the first plan that corrupts, comes. Raises Unsteerable."""
        if self._steerer is None:
            steerer = self._made()
            try:
                steerer.listen()
            except Exception as error:
                raise Unsteerable(f"this model cannot be steered: {error}") from error
            self._steerer = steerer
        return self._steerer

    def _made(self) -> Steerer:
        """Raises Unsteerable."""
        try:
            return Steerer(self._context.model(), self._context.vllm_config)
        except Unforkable as error:
            raise Unsteerable(str(error)) from error
        except Exception as error:
            raise Unsteerable(f"this model is built in another way than those that can be steered: {error}") from error


def _replays() -> bool:
    """Whether the pass is one of pieces that CUDA graphs replay, or is captured for them."""
    return is_forward_context_available() and get_forward_context().cudagraph_runtime_mode is not CUDAGraphMode.NONE
