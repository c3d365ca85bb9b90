"""`ferry`, the operator's command line.

It speaks to the controller through `controller.client` only. Results go to stdout in the form that `-o` asks for,
messages and progress to stderr, and the exit code says what kind of end it was (docs/reference/cli.md). Each command
group lives in its own module and is imported when it is used, so that `ferry --help` answers at once.
"""

from controller.cli.root import cli, main

__all__ = ["cli", "main"]
