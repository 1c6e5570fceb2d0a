"""What all commands share: the program's name, its exit codes, and how a configuration dataclass becomes options."""

import enum
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from seer_jax.selection.notation import parse_policy, policy_syntax, write_policy
from seer_jax.selection.policies import Policy
from seer_jax.selection.scorers import SCORERS, Scorer

PROGRAM = "seer-jax"


class ExitCode(enum.IntEnum):
    """What the process returns."""

    OK = 0
    FAILED = 1
    USAGE = 2
    INTERRUPTED = 130


def parse[C](kind: type[C], command: str, words: list[str], **settings: Any) -> C:
    """The configuration that a command line describes; prints help or the usage error and exits where it describes none.

    Args:
      kind: dataclass whose fields are the options; its docstring is their help.
      command: as it is typed after the program's name.
      words: the words after it.
      **settings: further ones of `tyro.cli`.
    """
    import tyro

    style = (tyro.conf.EnumChoicesFromValues,)
    return tyro.cli(kind, prog=f"{PROGRAM} {command}", args=words, config=style, registry=_constructors(), **settings)


def _constructors() -> Any:
    """How policies and scorers are read from one word each; the scorers are those registered at this moment."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type in (Policy, Policy | None):
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar="POLICY",
                instance_from_str=lambda words: None if words == ["None"] else parse_policy(words[0]),
                is_instance=lambda value: value is None or isinstance(value, Policy),
                str_from_instance=lambda policy: [str(policy) if policy is None else write_policy(policy)],
            )
        if info.type is Scorer:
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar="{" + ",".join(SCORERS) + "}",
                instance_from_str=lambda words: SCORERS[words[0]](),
                is_instance=lambda value: isinstance(value, Scorer),
                str_from_instance=lambda scorer: [scorer.name],
                choices=tuple(SCORERS),
            )
        return None

    return registry


def policy_help() -> str:
    """How policies are written, for a command's help."""
    scorers = "\n".join(f"  {name}: {scorer.meaning}" for name, scorer in SCORERS.items())
    return f"""A POLICY is written
  {policy_syntax()}
for example threshold:5e-4, mass:0.9, topk:0.1, budget:4096:oracle or topk:0.1,dense_layers=2.

The word after the second colon says what ranks the blocks; without it the learned gate does:
{scorers}

With dense_layers=N the first N layers keep every block. With dense_last_rows=N (not for budget) the last N block rows of a prompt keep
every block; without it the last 2 do."""


def import_scorers(module: str) -> None:
    """Imports a module that registers scorers, by its name or from a file that ends in .py.

    Raises:
      ImportError: there is no such module or file.
    """
    if not module.endswith(".py"):
        importlib.import_module(module)
        return
    spec = importlib.util.spec_from_file_location(f"scorers_of_{Path(module).stem}", module)
    if spec is None or spec.loader is None or not Path(module).is_file():
        raise ImportError(f"--scorers must name a module or a Python file; got {module!r}, which is not there.")
    # Known by its name while it runs, as dataclasses look their modules up.
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
