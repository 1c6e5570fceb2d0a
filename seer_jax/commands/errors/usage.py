"""Wrong usage: what is wrong with a command line, reason first, and the nearest right word."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from seer_jax.commands.errors.options import Options


class UsageError(Exception):
    """A command line that describes no work.

    Args:
      text: what is wrong, in sentences.
      command: whose --help tells more, where that is not the first word alone.
    """

    def __init__(self, text: str, command: str = ""):
        super().__init__(text)
        self.command = command


class UsageParser(argparse.ArgumentParser):
    """A parser of a few words of a command line."""

    def error(self, message: str) -> NoReturn:
        for pattern, text in _ARGPARSE.items():
            message = re.sub(pattern, text, message)
        raise UsageError(f"{message.rstrip('.')}.")


# What Python says of wrong words, and what this program does.
_ARGPARSE = {
    r"^argument (\S+): invalid choice: ('.*') \(choose from (.*)\)$": r"\1 must be one of \3; got \2",
    r"^argument (\S+): expected one argument$": r"\1 must have a value; got none",
    r"^unrecognized arguments: (-\S*).*$": r"there is no option \1",
    r"^unrecognized arguments: (.*)$": r"there must be nothing behind the command; got '\1'",
    r"^the following arguments are required: (.*)$": r"\1 must be given; got none",
}
_VALUES = {
    r"^invalid literal for int\(\) with base 10: (.*)$": r"must be a whole number; got \1.",
    r"^could not convert string to float: (.*)$": r"must be a number; got \1.",
}

# Names that other commands, or earlier versions, have for an option.
_MEANT = {"--base": "--model", "--precision": "--dtype"}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean ...?", or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def reason(event: Any, options: Options) -> str:
    """Why tyro refuses a command line, in a sentence.

    Args:
      event: a `tyro._errors.ParseErrorEvent`.
      options: of the command.
    """
    kind, argument = type(event).__name__, getattr(event, "argument", None)
    flag = "" if argument is None else _flag(argument)
    match kind:
        case "MissingArgs":
            names = ", ".join(_flag(missing.arg) for missing in event.missing_arguments)
            wrong = _unknown(event.unrecognized_tokens, options) if event.unrecognized_tokens else ""
            return wrong or f"{names} must be given; got none."
        case "UnrecognizedArgs":
            return _unknown(event.tokens, options)
        case "InvalidChoice":
            return one_of(flag, event.choices, event.value)
        case "BadValue":
            return f"{flag} must have a value; got none."
        case "InstantiationFailure":
            return _of_value(flag, options.rewrite(str(event.message).strip()))
    return f"the options do not fit each other ({kind})."


def _of_value(flag: str, text: str) -> str:
    """What is wrong with the value of an option, or with the values of several where `flag` is empty."""
    if alternatives := re.match(r"no type matching .*<class '\w+'>: (.*)$", text, re.DOTALL):
        text = alternatives[1]  # of a value or None: why it is no value
    for pattern, rule in _VALUES.items():
        if flag and re.match(pattern, text):
            return f"{flag} {re.sub(pattern, rule, text)}"
    if flag and text.startswith("must "):
        return f"{flag} {text}"
    return text if text.startswith(flag) else f"{flag}: {text}"


def one_of(name: str, choices: Sequence[str], got: str) -> str:
    """The rule of a choice, and what came."""
    return f"{name} must be one of {', '.join(choices)}; got {got!r}.{did_you_mean(got, choices)}"


def _flag(argument: Any) -> str:
    """The first name of a `tyro` argument."""
    return str(argument.lowered.name_or_flags[-1])


def _unknown(words: Sequence[str], options: Options) -> str:
    """What is wrong with words that belong to no option: the first one is told, the rest often follows from it."""
    word = next((w for w in words if w.startswith("--")), words[0])
    if not word.startswith("-") or word[1:2].isdigit():
        return f"{word!r} must belong to an option; got it alone. Put values with spaces into quotes."
    name = word.partition("=")[0].replace("_", "-")
    flags = [option.flag for option in options.all]
    meant = _MEANT.get(name)
    hint = f" Did you mean {meant}?" if meant in flags else did_you_mean(name, flags)
    return f"there is no option {name}.{hint}"
