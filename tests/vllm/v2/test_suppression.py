"""Suppression on Model Runner V2."""

from tests.vllm.test_guarded_server import (  # noqa: F401
    test_a_forget_set_is_a_switch,
    test_a_seeded_request_with_a_prompt_of_several_chunks_neither_stops_the_engine_nor_loses_its_seed,
    test_beam_search_and_its_log_probabilities_are_guarded,
    test_every_endpoint_that_generates_is_guarded,
    test_log_probabilities_never_show_what_is_banned,
    test_returned_token_ids_spell_what_the_text_says,
)
