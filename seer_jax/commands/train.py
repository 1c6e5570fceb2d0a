"""Distil gates: --config FILE or --recipe prefill|decode, then single settings."""

import dataclasses
import enum
import shlex
import warnings
from pathlib import Path
from typing import Any

from seer_jax.commands import PROGRAM, ExitCode
from seer_jax.commands.arguments import parse
from seer_jax.commands.errors.usage import UsageError, UsageParser, one_of
from seer_jax.gates.configs import TrainedGates
from seer_jax.train import DistillConfig, TrainResult, distill
from seer_jax.train.config import load_config

DESCRIPTION = """Distils gates from a frozen model.

--config FILE (.yaml or .json) or --recipe prefill|decode (the settings of the papers) gives the settings to start from; the
other options change single ones. The gates are written to OUTPUT/prefill_gate and OUTPUT/decode_gate at every checkpoint. The same
command resumes a run that was stopped, also with more or fewer --steps."""


ALIASES = {"--precision": "--dtype", "--gates": "--kind"}


class Recipe(enum.StrEnum):
    """Settings of the papers."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclasses.dataclass(frozen=True)
class TrainOptions(DistillConfig):
    """Distils gates from a frozen model.

    Attributes:
      config: file with settings, .yaml or .json, such as OUTPUT/config.json of another run; the other options change single ones.
      recipe: the settings of the papers, in place of a file; without either, those for prefill gates.
    """

    config: Path | None = None
    recipe: Recipe | None = None


def run(words: list[str]) -> int:
    options = parse(
        TrainOptions, "train", words, aliases=ALIASES, default=starting_options(words), description=DESCRIPTION
    )
    if options.output is None:
        raise UsageError("--output must be a folder for the gates and checkpoints; got none. Pass --output FOLDER.")
    if not options.model:
        raise UsageError("--model must be a base model; got none. Pass --model with a folder or hub id.")
    config = DistillConfig(**_settings(options))
    _warn_of_idle(config)
    _print_usage(config, distill(config))
    return ExitCode.OK


def starting_options(words: list[str]) -> TrainOptions:
    """The settings of the configuration file or the recipe that a command line names."""
    parser = UsageParser(f"{PROGRAM} train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument(
        "--recipe",
    )
    parser.add_argument("--gates")
    given, _ = parser.parse_known_args(words)
    if given.recipe is not None and given.recipe not in list(Recipe):
        raise UsageError(one_of("--recipe", list(Recipe), given.recipe))
    if given.gates is not None and given.gates not in list(TrainedGates):
        kinds = one_of("--gates, the same as --kind,", list(TrainedGates), given.gates)
        raise UsageError(f"{kinds} Gates to train further are given by --initial-gates.")
    if given.config is not None and given.recipe is not None:
        parser.error("--config and --recipe both give the settings to start from; choose one")
    if given.config is not None:
        try:
            start = load_config(DistillConfig, given.config)
        except ValueError as error:
            raise UsageError(str(error)) from error
    else:
        start = DistillConfig.decode_recipe() if given.recipe == Recipe.DECODE else DistillConfig.prefill_recipe()
    return TrainOptions(**_settings(start))


def _settings(config: DistillConfig) -> dict[str, Any]:
    """The settings of a run, without the options that say where they come from."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(DistillConfig)}


def _warn_of_idle(config: DistillConfig) -> None:
    """Warns of settings of a gate that is not trained."""
    default = DistillConfig()
    for kind in ("prefill", "decode"):
        names = (kind, f"{kind}_skip")
        if f"{kind}_gate" not in config.kind.attributes and any(
            getattr(config, n) != getattr(default, n) for n in names
        ):
            warnings.warn(
                f"the settings --{kind}.* and --{kind}-skip change nothing, as --kind {config.kind} trains no {kind} gate.",
                stacklevel=2,
            )


def _print_usage(config: DistillConfig, result: TrainResult) -> None:
    """Prints where the gates are, and a command that generates sparsely with them.

    A gate that recommends no policy is used at the density for which training reports its recall.
    """
    gates = dict(prefill=result.model.prefill_gate, decode=result.model.decode_gate)
    folders = [str(folder) for folder in result.gates]
    idle = [kind for kind, gate in gates.items() if gate is not None and gate.recommended is None]
    policies = [word for kind in idle for word in (f"--{kind}", f"topk:{config.recall_density:g}")]
    command = [PROGRAM, "generate", "--model", config.model, "--gates", *folders, *policies, "--prompt", "..."]
    print(f"Gates: {', '.join(folders)}")
    print(f"Use them: {shlex.join(command)}")
