"""Slots, trackers, artifacts: the engine's parts without an engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guards.closing import RowCloser
from guards.contrastive.declaration import Contrast
from guards.steering.declaration import Corrupt, Steer
from guards.suppression.artifact import CompiledPhrases
from guards.suppression.automaton import compile_phrases
from guards.suppression.declaration import Suppress
from guards.suppression.guard import SuppressionGuard
from guards.suppression.vocabulary import Vocabulary
from guards.types import BOUNDARY, UNKNOWN, ArtifactRef, Plan
from serve.engine.artifacts import KEPT_IDLE, ArtifactCache
from serve.engine.attention import PagedBatch
from serve.engine.contrast import ForkedContrast
from serve.engine.engine_guards import EngineGuards
from serve.engine.fork import Lines, Unforkable
from serve.engine.slots import TAG_DIGITS, SlotTable
from serve.engine.step import Step
from serve.protocol.artifacts import artifact_path, load_artifact
from serve.protocol.wire import PLAN_KEY, decode_plan, encode_plan
from tests.plans import suppress, suppression_guard

pytest.importorskip("vllm", reason="vLLM is not installed: its interfaces are what the trackers are tested against")

VOCABULARY = Vocabulary([bytes([i]) for i in range(256)] + [b"<special>"], special_ids=[256])
PLAN = Plan(3, "default", suppress("f"))


def table(requests: int = 8, tokens: int = 32) -> SlotTable:
    return SlotTable(requests, tokens, VOCABULARY.special, torch.device("cpu"))


@given(st.integers(0, 10**9), st.text(max_size=5), st.lists(st.text(max_size=5)), st.none() | st.integers(0, 9))
def test_plans_survive_the_wire(revision: int, policy: str, fingerprints: list[str], start: int | None) -> None:
    contrast = tuple(Contrast(fingerprint, "uld", 0.5, 1.0, 0.01) for fingerprint in fingerprints)
    steering = tuple(Steer(fingerprint, 0.5) for fingerprint in fingerprints)
    corrupt = (Corrupt("flip_sign_first_n", 1.0, 8, 0, ((3, 5), (9, 10))),) if fingerprints else ()
    plan = Plan(revision, policy, (*corrupt, *steering, *contrast, *suppress(*fingerprints)), start)
    import msgspec

    carried = msgspec.msgpack.decode(msgspec.msgpack.encode({PLAN_KEY: encode_plan(plan)}))
    assert decode_plan(carried) == plan
    assert decode_plan(None) is None
    assert decode_plan({"other": 1}) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(st.lists(st.tuples(st.integers(-1, 4095), st.integers(0, 2**20 - 1)), min_size=1, max_size=20))
def test_tags_are_exact_in_every_dtype(dtype: torch.dtype, rows: list[tuple[int, int]]) -> None:
    slots = table(1)
    slot, position = torch.tensor(rows).T
    digits = slots.tags(slot, position, dtype).to(torch.int64)
    assert digits.shape == (len(rows), TAG_DIGITS)
    assert (digits[:, 0] * 256 + digits[:, 1] - 1).tolist() == slot.tolist()
    expected = [p if s >= 0 else 0 for s, p in rows]
    assert ((digits[:, 2] * 256 + digits[:, 3]) * 256 + digits[:, 4]).tolist() == expected


def test_a_row_sees_its_own_tokens_up_to_its_position() -> None:
    slots = table()
    slot = slots.admit(PLAN, [1, 256, 2, 3], [])
    other = slots.admit(Plan(4, "strict", suppress("g")), [9, 9], [])
    slots.record(torch.tensor([slot, other, -1]), torch.tensor([4, 2, 0]), torch.tensor([5, 8, 7]))
    tags = slots.tags(torch.tensor([slot, slot, other, -1]), torch.tensor([2, 4, 2, 0]), torch.float32)
    rows, plans = slots.rows(tags, window=4)
    assert [plans[i].policy if i >= 0 else None for i in rows.plan.tolist()] == ["default", "default", "strict", None]
    assert rows.suffix[:3].tolist() == [[BOUNDARY, 1, BOUNDARY, 2], [BOUNDARY, 2, 3, 5], [BOUNDARY, 9, 9, 8]]
    slots.release(slot)
    slots.release(other)
    assert not slots.engaged


def test_a_special_token_ends_a_match_in_the_prompt_only_where_the_output_has_not_begun() -> None:
    slots = table()
    beam = slots.admit(Plan(1, "p", suppress("f"), output_start=0), [1, 256, 2], [])
    resumed = slots.admit(Plan(1, "p", suppress("f")), [1], [256, 2])
    tags = slots.tags(torch.tensor([beam, resumed]), torch.tensor([2, 2]), torch.float32)
    assert slots.rows(tags, 3)[0].suffix.tolist() == [[1, 256, 2], [1, 256, 2]]


def test_tokens_that_nobody_knows_yet_read_as_unknown() -> None:
    slots = table()
    slot = slots.admit(PLAN, [1, 2], [3, -1])
    rows, _ = slots.rows(slots.tags(torch.tensor([slot]), torch.tensor([3]), torch.float32), 4)
    assert rows.suffix.tolist() == [[1, 2, 3, UNKNOWN]]
    slots.record(torch.tensor([slot]), torch.tensor([3]), torch.tensor([4]))
    rows, _ = slots.rows(slots.tags(torch.tensor([slot]), torch.tensor([3]), torch.float32), 4)
    assert rows.suffix.tolist() == [[1, 2, 3, 4]]


def test_a_prompt_without_tokens_closes_its_rows() -> None:
    slots = table()
    slots.admit(PLAN, None, [])
    assert slots.live_plans[0].artifacts_of(Suppress) == ("text-that-cannot-be-read",)


class Guards(SimpleNamespace):
    """What a tracker needs of EngineGuards."""

    enter = EngineGuards.enter
    lose_track = EngineGuards.lose_track

    def load(self, plan: Plan) -> None:
        self.loaded.append(plan)


def guards() -> Guards:
    made = Guards(slots=table(), step=Step(), device=torch.device("cpu"), requests=None, tracked=False, loaded=[])
    made.steering = SimpleNamespace(spoil=lambda _: None, begin=lambda *_: None, clear=lambda: None)
    return made


def params(plan: Plan | None) -> Any:
    return SimpleNamespace(extra_args={PLAN_KEY: encode_plan(plan)} if plan else None)


def plan_of(request: int) -> Plan | None:
    """Even ones are guarded; every third is made to say its own number."""
    forced = (request,) if request % 3 == 0 else ()
    return Plan(request, "p", suppress("f") if request % 2 == 0 else (), forced=forced) if request % 2 == 0 or forced else None


class BatchModel:
    """vLLM's own builder of batch updates, driven at random, and a list that says what is in each row."""

    def __init__(self) -> None:
        from vllm.v1.sample.logits_processor.state import BatchUpdateBuilder

        self.builder = BatchUpdateBuilder()
        self.rows: list[int | None] = []  # request numbers

    def step(self, finished: set[int], arriving: list[int]) -> Any:
        from vllm.v1.sample.logits_processor.interface import MoveDirectionality

        for row, request in enumerate(self.rows):
            if request in finished:
                self.builder.removed_append(row)
                self.rows[row] = None
        for request in arriving:
            row = self.builder.pop_removed()
            if row is None:
                row = len(self.rows)
                self.rows.append(None)
            self.rows[row] = request
            plan = plan_of(request)
            self.builder.added.append((row, params(plan), [request], []))
        while self.builder.removed:  # condense, as InputBatch does
            last = len(self.rows) - 1
            while last >= 0 and self.rows[last] is None:
                last -= 1
            empty = self.builder.peek_removed()
            if empty is None or empty >= last:
                break
            self.builder.pop_removed()
            self.rows[empty], self.rows[last] = self.rows[last], None
            self.builder.moved.append((last, empty, MoveDirectionality.UNIDIRECTIONAL))
        while self.rows and self.rows[-1] is None:
            self.rows.pop()
        if len(self.rows) > 1:
            self.rows[0], self.rows[-1] = self.rows[-1], self.rows[0]
            self.builder.moved.append((0, len(self.rows) - 1, MoveDirectionality.SWAP))
        return self.builder.get_and_reset(len(self.rows))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(0, 30)), st.integers(0, 3)), max_size=12))
def test_tracker_v1_follows_every_row_of_the_batch(steps: list[tuple[set[int], int]]) -> None:
    from serve.engine.tracker_v1 import TrackerV1

    tracker = TrackerV1.__new__(TrackerV1)
    tracker.guards = guards()
    tracker._slot_of_row = [-1] * 9
    tracker._forced = {}
    batch, arrived = BatchModel(), 0
    for finished, arriving in steps:
        room = 8 - len([request for request in batch.rows if request is not None and request not in finished])
        new = list(range(arrived, arrived + min(arriving, room)))
        arrived += len(new)
        tracker.update_state(batch.step(finished, new))
        if tracker.guards.requests is None:
            continue
        seen = [None if slot < 0 else tracker.guards.slots.plans[slot].revision for slot in tracker.guards.requests]
        assert seen == [request if request is not None and request % 2 == 0 else None for request in batch.rows]
        assert len(tracker.guards.slots.live_plans) == sum(request is not None for request in seen)
        logits = torch.ones(len(batch.rows), 64)
        said = tracker.apply(logits.clone())
        for row, request in enumerate(batch.rows):
            if request is not None and request % 3 == 0:
                assert said[row].argmax() == request and torch.isinf(said[row]).sum() == 63
            else:
                assert torch.equal(said[row], logits[row]), "a row was made to say what nobody asked of it"


class BaseState:
    """Stands where vLLM's own ModelState stands."""

    def add_request(self, req_index: int, new_req_data: Any) -> None: ...

    def remove_request(self, req_id: str) -> None: ...

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        return {"positions": "kept"}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {}


def test_tracker_v2_tags_tokens_of_guarded_requests_and_no_others() -> None:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    from serve.engine.tracker_v2 import TAGS, tracked

    state = tracked(BaseState).__new__(tracked(BaseState))
    state._track(guards(), 16, torch.bfloat16, torch.device("cpu"))
    slots = state.guards.slots

    def arrive(req_id: str, plan: Plan | None, prompt: list[int], known: list[int]) -> None:
        fields: dict[str, Any] = dict.fromkeys(NewRequestData.__dataclass_fields__)
        fields |= {"req_id": req_id, "sampling_params": params(plan), "prompt_token_ids": prompt, "prefill_token_ids": known}
        data = NewRequestData.__new__(NewRequestData)
        for name, value in fields.items():
            object.__setattr__(data, name, value)
        state.add_request(0, data)

    arrive("guarded", PLAN, [1, 2], [1, 2])
    arrive("free", None, [3], [3])
    arrive("resumed", PLAN, [4], [4, 5])
    batch = InputBatch.make_dummy(3, 6, InputBuffers(8, 16, torch.device("cpu")))
    batch.query_start_loc = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    batch.input_ids[:6] = torch.tensor([1, 2, 3, 4, 5, 6])
    batch.positions[:6] = torch.tensor([0, 1, 0, 0, 1, 2])

    dummy = state.prepare_inputs(batch, None)
    assert dummy["positions"] == "kept"
    assert not dummy[TAGS].any(), "a dummy batch touched a slot"

    batch.req_ids = ["guarded", "free", "resumed"]
    first = state.prepare_inputs(batch, None)[TAGS]
    rows, plans = slots.rows(first[:6], 3)
    assert [plans[i] is not None if i >= 0 else None for i in rows.plan.tolist()] == [True, True, None, True, True, True]
    assert rows.suffix[[1, 5]].tolist() == [[BOUNDARY, 1, 2], [4, 5, 6]]
    assert state.prepare_inputs(batch, None)[TAGS].data_ptr() == first.data_ptr(), "a CUDA graph needs a fixed address"
    assert state.prepare_dummy_inputs(3, 6)[TAGS].shape == (6, TAG_DIGITS)

    state.remove_request("guarded")
    arrive("resumed", PLAN, [4], [4, 5, 6])  # preempted and back: its old slot must not leak
    assert len(slots.live_plans) == 1


def saved(directory: Path, *phrases: str) -> str:
    artifact = compile_phrases(phrases, VOCABULARY)
    path = artifact_path(directory, ArtifactRef("suppression", artifact.fingerprint))
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact.save(path)
    return artifact.fingerprint


def phrases_cache(directory: Path, guard: SuppressionGuard) -> ArtifactCache:
    def read(fingerprint: str) -> CompiledPhrases:
        phrases = load_artifact(directory, ArtifactRef("suppression", fingerprint))
        guard.check(phrases)
        return phrases

    return ArtifactCache(read, guard.load)


def test_artifacts_load_once_and_leave_by_recency_unless_in_use(tmp_path: Path) -> None:
    guard = suppression_guard(VOCABULARY)
    cache = phrases_cache(tmp_path, guard)
    names = [saved(tmp_path, f"phrase {i}") for i in range(KEPT_IDLE + 3)]
    for name in names:
        assert cache.ensure([name], in_use=[names[0]]) == {}
    assert names[0] in guard.loaded
    assert names[1] not in guard.loaded
    assert names[-1] in guard.loaded
    assert set(cache.loaded) == guard.loaded


def test_an_artifact_that_cannot_be_read_is_reported_and_the_others_stay(tmp_path: Path) -> None:
    guard = suppression_guard(VOCABULARY)
    cache = phrases_cache(tmp_path, guard)
    good, bad = saved(tmp_path, "good"), saved(tmp_path, "bad")
    path = artifact_path(tmp_path, ArtifactRef("suppression", bad))
    path.write_bytes(path.read_bytes()[:-9])
    foreign = compile_phrases(["x"], Vocabulary([b"x", b"y"], special_ids=[]))
    foreign.save(artifact_path(tmp_path, ArtifactRef("suppression", foreign.fingerprint)))
    failures = cache.ensure([good, bad, "absent", foreign.fingerprint])
    assert set(failures) == {bad, "absent", foreign.fingerprint}
    assert "LETHE_STATE_DIR" in failures[foreign.fingerprint]
    assert guard.loaded == {good}
    assert cache.loaded == [good]


class _BadFork:
    """A fork that cannot follow its base: it raises, or says something else than the base without assistants."""

    loaded = frozenset({"a"})

    def __init__(self, raises: bool) -> None:
        self._raises = raises

    def run(self, lines: Lines, assistants: Any, attention: Any) -> torch.Tensor:
        if self._raises:
            raise RuntimeError("another signature")
        return torch.full((len(lines.token), 4), 9.0)


@pytest.mark.parametrize("raises", [True, False])
def test_a_fork_that_cannot_follow_the_base_is_dropped_and_nobody_speaks(raises: bool) -> None:
    slots, step = table(), Step()
    closer = RowCloser(torch.ones(4, dtype=torch.bool))
    contrast = ForkedContrast(SimpleNamespace(slots=slots, step=step, closer=closer, stop_unless_alone=lambda: None))  # type: ignore[arg-type]
    contrast._fork = _BadFork(raises)  # type: ignore[assignment]
    slot = slots.admit(Plan(1, "p", (Contrast("a", "uld", 1.0, 1.0, 0.1),)), [1, 2, 3], [])
    tokens = step.begin([slot], torch.tensor([0, 3]), torch.arange(3))
    step.pages = PagedBatch((), (), torch.tensor([3], dtype=torch.int32))
    tags = slots.tags(tokens, torch.arange(3), torch.float32)[-1:]
    assert contrast.speak(tags, torch.ones(1, 4)) is None, "its rows must find nobody who spoke, which closes them"
    assert contrast._fork is None
    with pytest.raises(Unforkable, match="cannot be forked"):
        contrast._the_fork()
