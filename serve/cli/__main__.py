"""``python -m serve.cli``: the command line, where the `lethe` command is not on the path."""

from serve.cli import main

main()
