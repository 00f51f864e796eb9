"""Steering and corruption on Model Runner V2."""

from tests.vllm.test_steering import (  # noqa: F401
    made,
    test_a_span_that_a_chunk_boundary_cuts_is_corrupted_whole,
    test_an_unguarded_request_is_bit_identical_beside_steered_ones,
    test_everything_composes_with_an_assistant_and_several_choices,
    test_guarded_and_unguarded_requests_share_no_block_and_equal_ones_do,
    test_logits_equal_a_plain_transformers_reference_in_a_mixed_batch,
    tokenizer,
    twin,
)
