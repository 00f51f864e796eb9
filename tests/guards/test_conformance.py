"""The five laws that every LogitsGuard obeys, whatever it does."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from guards.closing import RowCloser
from guards.contrastive.declaration import Contrast
from guards.contrastive.guard import ContrastGuard
from guards.contrastive.rules import RULES
from guards.steering.declaration import Steer
from guards.steering.guard import SteeringGuard
from guards.suppression.automaton import compile_phrases
from guards.suppression.vocabulary import Vocabulary
from guards.types import BOUNDARY, AssistantLines, LogitsGuard, Plan, Rows
from tests.guards.test_contrastive import an_assistant
from tests.plans import suppress, suppression_guard

VOCABULARY = Vocabulary([bytes([i]) for i in range(97, 117)] + [b"ab", b"bc", b"<end>"], special_ids=[22])
WINDOW = 64


def suppression() -> tuple[LogitsGuard, list[Plan]]:
    guard = suppression_guard(VOCABULARY)
    short, long = compile_phrases(["ab", "d"], VOCABULARY), compile_phrases(["bcab", "abcabc"], VOCABULARY)
    guard.load({each.fingerprint: each for each in (short, long)})
    both = (short.fingerprint, long.fingerprint)
    return guard, [
        Plan(1, "one", suppress(*both[:1])),
        Plan(1, "both", suppress(*both)),
        Plan(1, "nothing"),
        Plan(1, "closed", suppress("missing")),
    ]


def contrast() -> tuple[LogitsGuard, list[Plan]]:
    """One plan for every rule, and one that nobody can contrast."""
    guard = ContrastGuard(RowCloser(torch.from_numpy(VOCABULARY.lengths > 0)))
    guard.load({"whole": an_assistant("whole"), "difference": an_assistant("difference")})
    by_rule = [
        Plan(1, rule, (Contrast("difference", rule, 1.5, 0.5, 0.1), Contrast("whole", rule, 0.7, 1.0, 0.01))) for rule in RULES
    ]
    off = Plan(1, "off", (Contrast("whole", "uld", 0.0, 1.0, 0.5),))
    return guard, [by_rule[0], by_rule[1], off, Plan(1, "closed", (Contrast("missing", "uld", 1, 1, 0.1),)), *by_rule[2:]]


def steering() -> tuple[LogitsGuard, list[Plan]]:
    """Closes what should have been steered and was not; touches nothing else."""

    def unable(plan: Plan) -> str | None:
        return None if plan.of(Steer)[0].artifact == "loaded" else "steering"

    guard = SteeringGuard(RowCloser(torch.from_numpy(VOCABULARY.lengths > 0)), unable)
    loaded, missing = (Plan(1, name, (Steer(name, 1.0),)) for name in ("loaded", "missing"))
    return guard, [loaded, missing, Plan(1, "nothing"), loaded]


GUARDS = {"suppression": suppression(), "contrast": contrast(), "steering": steering()}


def choose(rows: Rows, order: list[int]) -> Rows:
    """The same step with only these rows, in this order."""
    lines = rows.lines
    if lines is not None:
        chosen = [(new, line) for new, old in enumerate(order) for line in (lines.row == old).nonzero().squeeze(1).tolist()]
        index = torch.tensor([line for _, line in chosen], dtype=torch.int64)
        new_rows = torch.tensor([new for new, _ in chosen], dtype=torch.int64)
        lines = AssistantLines(new_rows, tuple(lines.entries[line] for _, line in chosen), lines.logits[index])
    return Rows(rows.plan[order], rows.suffix[order], lines)


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
    pairs = [
        (row, nth) for row, number in enumerate(plan.tolist()) if number >= 0 for nth in range(len(plans[number].of(Contrast)))
    ]
    said = torch.randn(len(pairs), VOCABULARY.size, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 5
    row = torch.tensor([row for row, _ in pairs], dtype=torch.int64)
    entries = tuple(plans[plan[row]].of(Contrast)[nth] for row, nth in pairs)
    return guard, plans, logits, Rows(plan, suffix, AssistantLines(row, entries, said))


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
    permuted = guard.apply(logits[order].clone(), choose(rows, order), plans)
    torch.testing.assert_close(permuted, guard.apply(logits.clone(), rows, plans)[order], rtol=1e-5, atol=1e-4)


@settings(deadline=None)
@given(steps())
def test_a_batch_equals_its_rows_one_by_one(step: tuple) -> None:
    guard, plans, logits, rows = step
    whole = guard.apply(logits.clone(), rows, plans)
    for i in range(len(logits)):
        alone = guard.apply(logits[i : i + 1].clone(), choose(rows, [i]), plans)
        # Sums over one row may be taken in another order than over six: the last bit may differ.
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-5, atol=1e-4)
