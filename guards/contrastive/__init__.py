"""Contrast: decode against an assistant model that knows what is to be forgotten.

Rooms: ``rules`` (the arithmetic on logits), ``guard``, ``assistant`` (the artifact: adapter and manifest), ``train`` (makes one),
``declaration``.

The assistant is a *stateless late fork*: the base's own last K layers run once more from the base's hidden state, with low-rank
adapters on the query, output and MLP projections, over the base's own keys and values. It starts from all that the base knows and
keeps nothing of its own.

Covered: knowledge that the assistant was trained to recall, however the question is put, as far as the assistant generalises.
Not covered: facts that no trained question touches, and facts of which the base is so certain that no other token is plausible:
those are suppression's and the gate's work.
"""
