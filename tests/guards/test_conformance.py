"""The five laws that every LogitsGuard obeys, whatever it does."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from guards.suppression.automaton import compile_phrases
from guards.suppression.mask import SuppressionGuard
from guards.suppression.vocabulary import Vocabulary
from guards.types import BOUNDARY, LogitsGuard, Plan, Rows

VOCABULARY = Vocabulary([bytes([i]) for i in range(97, 117)] + [b"ab", b"bc", b"<end>"], special_ids=[22])
WINDOW = 64


def suppression() -> tuple[LogitsGuard, list[Plan]]:
    guard = SuppressionGuard(VOCABULARY, torch.device("cpu"))
    short, long = compile_phrases(["ab", "d"], VOCABULARY), compile_phrases(["bcab", "abcabc"], VOCABULARY)
    guard.load([short, long])
    both = (short.fingerprint, long.fingerprint)
    return guard, [Plan(1, "one", both[:1]), Plan(1, "both", both), Plan(1, "nothing"), Plan(1, "closed", ("missing",))]


GUARDS = {"suppression": suppression()}


@st.composite
def steps(draw: st.DrawFn) -> tuple[LogitsGuard, list[Plan], torch.Tensor, Rows]:
    """A guard, its plans, and one step of logits with ``-inf`` here and there."""
    guard, plans = GUARDS[draw(st.sampled_from(sorted(GUARDS)))]
    count = draw(st.integers(1, 6))
    values = st.one_of(st.floats(-50, 50, width=32), st.just(float("-inf")))
    logits = torch.from_numpy(draw(arrays("float32", (count, VOCABULARY.size), elements=values, fill=st.just(0.0))))
    logits[:, draw(st.integers(0, VOCABULARY.size - 1))] = 1.0  # no row is all -inf to begin with
    histories = draw(st.lists(st.lists(st.integers(0, 22), max_size=9), min_size=count, max_size=count))
    suffix = torch.tensor([([BOUNDARY] * WINDOW + history)[-WINDOW:] for history in histories])
    plan = torch.tensor(draw(st.lists(st.integers(-1, len(plans) - 1), min_size=count, max_size=count)))
    return guard, plans, logits, Rows(plan, suffix)


@settings(deadline=None)
@given(steps())
def test_unguarded_rows_stay_bit_identical(step: tuple) -> None:
    guard, plans, logits, rows = step
    result = guard.apply(logits.clone(), rows, plans)
    untouched = (rows.plan < 0) | (rows.plan == 2)
    assert torch.equal(result[untouched], logits[untouched])


@settings(deadline=None)
@given(steps())
def test_minus_infinity_stays_minus_infinity(step: tuple) -> None:
    guard, plans, logits, rows = step
    assert (guard.apply(logits.clone(), rows, plans)[logits == float("-inf")] == float("-inf")).all()


@settings(deadline=None)
@given(steps())
def test_no_row_becomes_minus_infinity_or_not_a_number(step: tuple) -> None:
    guard, plans, logits, rows = step
    result = guard.apply(logits.clone(), rows, plans)
    assert torch.isfinite(result).any(dim=1).all()
    assert not torch.isnan(result).any()
    assert not torch.isnan(torch.log_softmax(result, dim=-1)).any()


@settings(deadline=None)
@given(steps(), st.randoms())
def test_permuting_rows_permutes_the_result(step: tuple, random) -> None:
    guard, plans, logits, rows = step
    order = list(range(len(logits)))
    random.shuffle(order)
    permuted = guard.apply(logits[order].clone(), Rows(rows.plan[order], rows.suffix[order]), plans)
    assert torch.equal(permuted, guard.apply(logits.clone(), rows, plans)[order])


@settings(deadline=None)
@given(steps())
def test_a_batch_equals_its_rows_one_by_one(step: tuple) -> None:
    guard, plans, logits, rows = step
    whole = guard.apply(logits.clone(), rows, plans)
    for i in range(len(logits)):
        alone = guard.apply(logits[i : i + 1].clone(), Rows(rows.plan[i : i + 1], rows.suffix[i : i + 1]), plans)
        assert torch.equal(alone[0], whole[i])
