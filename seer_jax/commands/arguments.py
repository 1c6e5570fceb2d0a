"""What all commands share: how a configuration dataclass becomes options."""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from jax.sharding import Mesh

from seer_jax import smollm2, tiny_lm
from seer_jax.commands import PROGRAM
from seer_jax.commands.errors.options import Options
from seer_jax.commands.errors.usage import UsageError, one_of, reason
from seer_jax.models.hub import HubSettings, is_name
from seer_jax.selection.notation import parse_policy, policy_syntax, write_policy
from seer_jax.selection.policies import Policy
from seer_jax.selection.scorers import SCORERS, Scorer
from seer_jax.settings import parse_number
from seer_jax.sharding.mesh import check_mesh, make_mesh

MOST_COLUMNS = 100  # of prose; longer lines are hard to read


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How hub ids are downloaded.

    Attributes:
      revision: branch, tag or commit of the model on the hub; also written NAME@REVISION, for gates too. None: main.
      cache_dir: folder for downloads; None: that of huggingface_hub (HF_HOME).
    """

    revision: str | None = None
    cache_dir: Path | None = None

    @property
    def hub(self) -> HubSettings:
        """For the functions that take names of models. A token comes from HF_TOKEN or `hf auth login`."""
        return HubSettings(revision=self.revision, cache_dir=self.cache_dir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """Over which devices a model is spread.

    Attributes:
      mesh: devices to spread the model over, such as data=2,tensor=4: sizes of the axes data (rows), fsdp (rows, and weights, which are
        gathered a layer at a time) and tensor (heads); -1 takes all that are left. None: one device.
    """

    mesh: str | None = None

    def __post_init__(self) -> None:
        if self.mesh is not None:
            check_mesh(self.mesh)

    @property
    def devices(self) -> Mesh | None:
        """The mesh.

        Raises:
          ValueError: JAX has too few devices for it.
        """
        return None if self.mesh is None else make_mesh(self.mesh)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What is added to the weights of a model.

    Attributes:
      adapter: folder or hub id of a LoRA adapter in PEFT's layout, or the output folder of a run that trained one, for the base model; it
        stays beside the weights. None: none.
    """

    adapter: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(HubOptions, MeshOptions, AdapterOptions):
    """How a model is downloaded, its adapter, and over which devices it is spread."""

    @property
    def loading(self) -> dict[str, Any]:
        """For `from_pretrained`, beside the names of model and gates and the dtype."""
        return {"mesh": self.devices, "adapter": self.adapter, **self.hub}

    def describe_adapter(self) -> dict[str, dict[str, Any]]:
        """Name and fingerprint of the adapter, under "adapter", for records; {} without one."""
        if self.adapter is None:
            return {}
        from seer_jax.convert.adapters import ADAPTER_PATTERNS, resolve_adapter
        from seer_jax.evaluate.record import describe_folder

        folder = resolve_adapter(self.adapter, cache_dir=self.cache_dir)
        return {"adapter": describe_folder(self.adapter, folder, ADAPTER_PATTERNS)}


# By the command: the options that this process has read.
OPTIONS: dict[str, Options] = {}


def parse[C](
    kind: type[C],
    command: str,
    words: list[str],
    *,
    description: str | None = None,
    aliases: Mapping[str, str] | None = None,
    **settings: Any,
) -> C:
    """The configuration that a command line describes; prints help and exits where it asks for help.

    Args:
      kind: dataclass whose fields are the options; its docstring is their help.
      command: as it is typed after the program's name.
      words: the words after it.
      description: of the command, for its help, see `lay_out`; None: the docstring without its attributes.
      aliases: further names of options, such as {"--base": "--model"}.
      **settings: further ones of `tyro.cli`.

    Raises:
      UsageError: the words describe none.
    """
    import tyro
    from tyro import (
        _errors,
    )  # private, and so bound to the version in pyproject.toml: tyro itself draws boxes of ten lines

    options = OPTIONS[command.partition(" ")[0]] = Options(kind)

    def refuse(event: Any) -> None:
        raise UsageError(reason(event, options), command)

    words = [_without_alias(word, aliases or {}) for word in words]
    text = description or inspect.cleandoc(kind.__doc__ or "").partition("\n\nAttributes:")[0]
    laid = _Laid(lay_out(text, min(shutil.get_terminal_size().columns, MOST_COLUMNS)))
    style = (tyro.conf.EnumChoicesFromValues,)
    with _errors.on_parse_error(refuse):
        return tyro.cli(
            kind,
            prog=f"{PROGRAM} {command}",
            description=laid,
            args=words,
            config=style,
            registry=_constructors(),
            **settings,
        )


class _Laid(str):
    """Text whose line breaks are final: tyro splits a description into lines and joins them."""

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        del sep, maxsplit
        return [str(self)]


def lay_out(text: str, width: int) -> str:
    """A command's description: paragraphs are wrapped at words, lines that are indented stay lines of their own.

    >>> print(lay_out("One two\\nthree:\\n  an example\\nFour.", 10))
    One two
    three:
      an
        example
    Four.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        goes_on = lines and lines[-1] and line and not lines[-1].startswith(" ") and not line.startswith(" ")
        lines[-1:] = [f"{lines[-1]} {line}"] if goes_on else [*lines[-1:], line]
    return "\n".join(map(functools.partial(_wrap, width=width), lines))


def _wrap(line: str, width: int) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    after = f"{indent}  " if indent else ""
    return textwrap.fill(line, width, subsequent_indent=after, break_long_words=False, break_on_hyphens=False)


def _without_alias(word: str, aliases: Mapping[str, str]) -> str:
    name, equals, value = word.partition("=")
    return f"{aliases.get(name, name)}{equals}{value}"


def model_of(model: str | None, gates: Sequence[str], hub: HubSettings, adapter: str | None = None) -> str:
    """The base model of a command: the one that is named, otherwise the one that its adapter names, otherwise the one that its gates
    name, otherwise the bundled one.

    What was chosen for the user, or does not fit the word of the adapter, or of the gates where there is none, is told on standard
    error.

    Raises:
      FileNotFoundError: adapter or gates name a model that is not there.
    """
    from seer_jax.convert import adapted_model, base_model

    of_others: HubSettings = {**hub, "revision": None}
    if adapter is not None:
        named, by, verb = adapted_model(adapter, **of_others), "adapter", "names"
    else:
        named, by, verb = (base_model(gates, **of_others) if gates else None), "gates", "name"
    if model is None:
        if named is not None and named != tiny_lm.NAME:
            if not is_name(named):
                raise FileNotFoundError(
                    f"The {by} {verb} the base model {named!r}, which is not there. Give model=... too."
                )
            print(f"model: {named} (base model of the {by})", file=sys.stderr)
        return named or tiny_lm.NAME
    if named is not None and _last(named) != _last(model):
        its = "its" if adapter is not None else "their"
        print(f"model: {model}, but the {by} {verb} {named} as {its} base model", file=sys.stderr)
    return model


def _last(name: str) -> str:
    """What the name of a folder and that of the same model on the hub have in common."""
    path = tiny_lm.path() if name == tiny_lm.NAME else Path(name).expanduser()
    last = path.resolve().name.partition("@")[0].lower()
    return smollm2.NAME if last.startswith(smollm2.FILE) else last


def _constructors() -> Any:
    """How policies, scorers and numbers are read from one word each; the scorers are those registered at this moment."""
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
        if info.type is float:
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar="FLOAT",
                instance_from_str=lambda words: parse_number(words[0]),
                is_instance=lambda value: isinstance(value, float | int) and not isinstance(value, bool),
                str_from_instance=lambda value: [str(value)],
            )
        if info.type == Scorer | None:  # a scorer in place of the gates
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar="{" + ",".join(_baselines()) + "}",
                instance_from_str=lambda words: None if words == ["None"] else _baseline(words[0]),
                is_instance=lambda value: value is None or isinstance(value, Scorer),
                str_from_instance=lambda scorer: [str(scorer) if scorer is None else scorer.name],
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


def _baselines() -> list[str]:
    """Names of the scorers that need no gate."""
    return [name for name, kind in SCORERS.items() if not kind.needs_gate]


def _baseline(name: str) -> Scorer:
    if name not in SCORERS:
        raise ValueError(one_of("", _baselines(), name).strip())
    return SCORERS[name]()


def policy_help() -> str:
    """How policies are written, for a command's help."""
    scorers = "\n".join(f"  {name}: {scorer.meaning}" for name, scorer in SCORERS.items())
    syntax = policy_syntax("SCORER").replace("[,", "\n    [,", 1)
    return f"""A POLICY is written
  {syntax}
for example threshold:5e-4, mass:0.9, topk:0.1, budget:4096:oracle or topk:0.1,dense_layers=2. FILE.json is a policy that
seer-jax calibrate wrote.

The SCORER ranks the blocks; without one the learned gate does:
{scorers}

With dense_layers=N the first N layers keep every block. With dense_last_rows=N (not for budget) the last N block rows of a prompt keep
every block; without it the last 2 do. With skip=X (dense too: dense,skip=1e-3) attention of prompts leaves out the blocks whose largest
weight is below X times the largest weight in the blocks before. Densities, masses and thresholds may be percentages: topk:10%."""


def import_scorers(module: str) -> None:
    """Imports a module that registers scorers, by its name or from a file that ends in .py.

    Raises:
      ImportError: there is no such module or file, or it fails.
    """
    is_file = module.endswith(".py")
    if is_file and not Path(module).is_file():
        raise ImportError(
            f"--scorers must name a module or a Python file; got {module!r}, which is not there. Check the path."
        )
    try:
        if is_file:
            _import_file(module)
        else:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise ImportError(
                f"--scorers must name a module or a Python file; got {module!r}, which Python does not find. Check the name, or give "
                "FILE.py."
            ) from error
        raise _not_imported(module, error) from error
    except Exception as error:  # the module's own code may raise anything
        raise _not_imported(module, error) from error


def _not_imported(module: str, error: Exception) -> ImportError:
    return ImportError(
        f"--scorers {module} must be a module that can be imported; got {type(error).__name__}: {error}. Mend it first; --traceback "
        "shows where."
    )


def _import_file(path: str) -> None:
    spec = importlib.util.spec_from_file_location(f"scorers_of_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None  # as the name ends in .py
    # Known by its name while it runs, as dataclasses look their modules up.
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
