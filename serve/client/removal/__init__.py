"""A removal: from a request to a proof, through a running server (`lethe unlearn`).

`probes` makes what is asked from what the request holds; `judge` measures a policy on it, beside what a model would say that never
knew; `search` tries guards until one meets the goals; `removal` is the whole order; `certificate` writes and verifies the proof.

Everything that is asked, answered and tried lies in one directory, so that an interrupted removal goes on where it was. The
directory holds what is to be forgotten.
"""
