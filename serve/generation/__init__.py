"""From vLLM's handlers to the engine and back: ``client`` is the choke point that every request passes.

``gate`` judges prompts, ``stream`` answers, ``text_guards`` asks guards of other packages; ``watch`` looks at the outputs of
constrained requests; ``note`` notes what passes; ``outputs`` ends an output and merges streams. ``ask`` is the road by which the
server asks itself; ``score`` and ``side_by_side`` use it.
"""
