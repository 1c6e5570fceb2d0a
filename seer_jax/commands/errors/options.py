"""Settings as options: how a message that names settings of a configuration reads on a command line.

Library code names settings as Python writes them (`max_new_tokens`, `OptimizerConfig.learning_rate`, `beyond_context=True`). The options
of a command are made of the same configuration, so each such name has one spelling there.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_QUOTED = re.compile(r"(?<!\w)'[^']*'(?!\w)|(?<!\w)\"[^\"]*\"(?!\w)")
_CALL = re.compile(r"\b[A-Za-z_][\w.]*\(")  # where a Python call begins
_NAME = re.compile(
    r"(?<![\w./@`-])(?P<tick>`?)(?P<owner>[A-Z]\w*\.)?(?P<path>[a-z_]\w*(?:\.[a-z_]\w*)*)"
    r"(?:=(?P<value>\.\.\.|[\w+/~-][\w+./~@-]*[\w/]|\w))?(?P<close>`?)(?![\w/(=`])"
)


class Option(NamedTuple):
    """One option of a command.

    Fields:
      path: the setting behind it, such as "optimizer.warmup_steps".
      owners: names of the configuration that has the setting, and of its bases.
      kind: type of its value.
    """

    path: str
    owners: tuple[str, ...]
    kind: Any

    @property
    def flag(self) -> str:
        return "--" + self.path.replace("_", "-")

    def written(self, value: str | None = None) -> str:
        """The option, with a value as Python wrote it."""
        match value:
            case None | "True":
                return self.flag
            case "False":
                *inner, name = self.flag.removeprefix("--").split(".")
                return "--" + ".".join([*inner, f"no-{name}"])
        return f"{self.flag} {value}"


class Options:
    """The options of one command.

    Args:
      kind: the configuration dataclass that they are made of.
    """

    def __init__(self, kind: type):
        self.all = tuple(_options(kind))
        paths: dict[str, Option | None] = {}
        for option in self.all:
            name = option.path.rpartition(".")[2]
            paths[name] = None if name in paths else option  # None: two options end in this name
        self._by_name: Mapping[str, Option | None] = paths | {option.path: option for option in self.all}

    def rewrite(self, text: str) -> str:
        """The text with settings as options. Quoted words and Python calls, which show what came, stay as they are.

        A name is taken for a setting where it can be nothing else: with its configuration (`TrainConfig.steps`), a dot or an underscore,
        in backticks, with a value (`seed=3`), or as the subject of the text (`steps must be ...`).
        """
        kept = [match.span() for match in _QUOTED.finditer(text)]
        kept += [(match.start(), _closing(text, match.end())) for match in _CALL.finditer(text)]

        def option(match: re.Match[str]) -> str:
            if any(start <= match.start() < end for start, end in kept):
                return match[0]
            found = self._find(match["owner"], match["path"])
            certain = match["owner"] or match["tick"] or match["value"] or "_" in match["path"] or "." in match["path"]
            subject = match.start() == 0 and text[match.end() :].startswith((" must ", " and "))
            return found.written(match["value"]) if found and (certain or subject) else match[0]

        return _NAME.sub(option, text)

    def _find(self, owner: str | None, path: str) -> Option | None:
        if owner is None:
            return self._by_name.get(path)
        mine = [o for o in self.all if owner[:-1] in o.owners and o.path.rpartition(".")[2] == path]
        return mine[0] if len(mine) == 1 else None


def _closing(text: str, at: int) -> int:
    """The end of brackets, which may hold others, that were opened before a position; the position itself where they stay open."""
    depth = 1
    for end in range(at, len(text)):
        depth += (text[end] == "(") - (text[end] == ")")
        if not depth:
            return end + 1
    return at


def _options(kind: type, prefix: str = "") -> Iterator[Option]:
    hints = typing.get_type_hints(kind)
    owners = tuple(base.__name__ for base in kind.__mro__ if dataclasses.is_dataclass(base))
    for field in dataclasses.fields(kind):
        inner = _plain(hints[field.name])
        if dataclasses.is_dataclass(inner):
            yield from _options(typing.cast(type, inner), f"{prefix}{field.name}.")
        else:
            yield Option(prefix + field.name, owners, inner)


def _plain(hint: Any) -> Any:
    """A type without None beside it."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint, *_) = (a for a in typing.get_args(hint) if a is not types.NoneType)
    return hint
