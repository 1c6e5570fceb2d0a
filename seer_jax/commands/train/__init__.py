"""Distil gates: --config FILE or --recipe prefill|decode, then single settings."""

import dataclasses
import enum
import shlex
import warnings
from pathlib import Path

from seer_jax.commands import PROGRAM, ExitCode
from seer_jax.commands.arguments import parse
from seer_jax.commands.errors.usage import UsageError, UsageParser, one_of
from seer_jax.commands.train.starting import check_named, join_run, settings_of, starting_config
from seer_jax.gates.configs import TrainedGates
from seer_jax.sharding.processes import is_first
from seer_jax.train import DistillConfig, TrainResult, distill

DESCRIPTION = """Distils gates from a frozen model.

--config FILE (.yaml or .json) or --recipe prefill|decode (the settings of the papers) gives the settings to start from; the
other options change single ones. The gates are written to OUTPUT/prefill_gate and OUTPUT/decode_gate at every checkpoint. The same
command resumes a run that was stopped, also with more or fewer --steps.

--mesh data=2,tensor=2 trains on several devices. The same command started by srun or mpirun, or once for each process with
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, trains on those of many hosts."""


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
    join_run()
    options = parse(
        TrainOptions, "train", words, aliases=ALIASES, default=starting_options(words), description=DESCRIPTION
    )
    check_named(options, "the gates")
    config = DistillConfig(**settings_of(options, DistillConfig))
    _warn_of_idle(config)
    result = distill(config)
    if is_first():
        _print_usage(config, result)
    return ExitCode.OK


def starting_options(words: list[str]) -> TrainOptions:
    """The settings of the configuration file or the recipe that a command line names."""
    parser = UsageParser(f"{PROGRAM} train", add_help=False, allow_abbrev=False)
    parser.add_argument("--gates")
    given, _ = parser.parse_known_args(words)
    if given.gates is not None and given.gates not in list(TrainedGates):
        kinds = one_of("--gates, the same as --kind,", list(TrainedGates), given.gates)
        raise UsageError(f"{kinds} Gates to train further are given by --initial-gates.")
    recipes = {Recipe.PREFILL: DistillConfig.prefill_recipe, Recipe.DECODE: DistillConfig.decode_recipe}
    start = starting_config(DistillConfig, "train", words, recipes)
    return TrainOptions(**settings_of(start, DistillConfig))


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
    adapter = [] if config.adapter is None else ["--adapter", config.adapter]
    command = [
        PROGRAM,
        "generate",
        "--model",
        config.model,
        *adapter,
        "--gates",
        *folders,
        *policies,
        "--prompt",
        "...",
    ]
    print(f"Gates: {', '.join(folders)}")
    print(f"Use them: {shlex.join(command)}")
