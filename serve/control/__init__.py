"""What is in force, and how it changes: compile, load in every worker, commit, swap the snapshot.

``control`` is the order of changes, ``in_force`` holds the snapshot and follows the registry, ``build`` and ``training`` make
artifacts, ``similarity`` holds the encoder and the vectors, ``gate_fitting`` calibrates, ``check`` tries a text.
"""
