"""The program `seer-jax`: finds the command, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. A command is the module of its name in this folder: the first line of its
docstring is its summary, and `run(words) -> exit code` takes the words after its name. It is imported when it runs.
"""

import ast
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from seer_jax import tiny_lm
from seer_jax.commands.arguments import PROGRAM, ExitCode, import_scorers
from seer_jax.commands.compilation_cache import use_compilation_cache

COMMANDS = ("demo", "convert", "verify", "train", "generate", "eval", "bench", "info")
TRACEBACK_OPTION, SCORERS_OPTION = "--traceback", "--scorers"

# Errors that a user can cause and fix, which get one line; any other one is a defect of the program and keeps its traceback.
EXPECTED = (ValueError, OSError, MemoryError, NotImplementedError, ImportError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (that of the process if None) and returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = TRACEBACK_OPTION in words
    words = [word for word in words if word != TRACEBACK_OPTION]
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return ExitCode.OK if words else ExitCode.USAGE
    name, *rest = words
    if name == "--version":
        import seer_jax

        print(PROGRAM, seer_jax.__version__)
        return ExitCode.OK
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}."
        print(f"{PROGRAM}: there is no command {name!r}; {hint} See {PROGRAM} --help.", file=sys.stderr)
        return ExitCode.USAGE
    try:
        return _run(name, rest)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # the reader of standard output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except EXPECTED as error:
        if show_traceback:
            raise
        print(f"{PROGRAM} {name}: {error}", file=sys.stderr)
        return ExitCode.FAILED


def _run(name: str, words: list[str]) -> int:
    """Imports the modules that --scorers names, which must be known when the other options are read, and runs the command."""
    while SCORERS_OPTION in words[:-1]:
        at = words.index(SCORERS_OPTION)
        import_scorers(words[at + 1])
        words = words[:at] + words[at + 2 :]
    use_compilation_cache()
    return importlib.import_module(f"seer_jax.commands.{name}").run(words)


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary(name)}" for name in COMMANDS)
    return f"""usage: {PROGRAM} COMMAND [OPTIONS]

Learned block-sparse attention for long-context language models.

{commands}

{PROGRAM} COMMAND --help lists a command's options; {PROGRAM} --version prints the version.
With any command: {TRACEBACK_OPTION} shows where an error came from; {SCORERS_OPTION} MODULE first imports a module (or FILE.py) that
registers scorers.
{tiny_lm.NAME} stands for the bundled model."""


def summary(name: str) -> str:
    """First line of a command's docstring, read from its source: to import every command would take seconds."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
