"""From vLLM's handlers to the engine and back: ``client`` is the choke point that every request passes.

``gate`` judges prompts, ``stream`` answers, ``watch`` the outputs of constrained requests; ``note`` notes what passes; ``score``
and ``side_by_side`` ask the engine for operators.
"""
