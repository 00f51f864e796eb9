"""Contrast and scoring on Model Runner V2."""

import pytest

from tests.vllm import test_contrast
from tests.vllm.test_contrast import (  # noqa: F401
    assistants,
    test_a_given_answer_is_scored_as_sampling_would_use_it_and_nobody_beside_it_is_made_to_say_it,
    test_logits_equal_a_plain_transformers_reference_in_a_mixed_batch,
    test_toggling_under_load_never_gives_an_error_or_a_third_answer,
)


@pytest.fixture(autouse=True)
def fewer_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Still more than the engine has room for; interpreted steps take their time."""
    monkeypatch.setattr(test_contrast, "PROMPTS", test_contrast.PROMPTS[1:3])
