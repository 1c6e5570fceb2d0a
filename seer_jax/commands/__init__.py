"""The command line, one file per command. Library code imports none of it."""

import enum

PROGRAM = "seer-jax"


class ExitCode(enum.IntEnum):
    """What the process returns."""

    OK = 0
    FAILED = 1
    USAGE = 2
    INTERRUPTED = 130
    TERMINATED = 143
