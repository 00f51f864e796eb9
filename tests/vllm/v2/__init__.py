"""The same tests on vLLM's Model Runner V2, the real one, its kernels interpreted (see tests/rig).

Covered: every guard of the engine, alone and mixed, in chunks, preempted, from the prefix cache, toggled under load; scoring,
choices, log-probabilities, grammars and beams. Not covered: what needs a GPU.
"""
