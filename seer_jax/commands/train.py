"""Distil gates: --config FILE or --recipe prefill|decode, then single settings."""

from pathlib import Path

from seer_jax.commands.arguments import PROGRAM, ExitCode, parse
from seer_jax.commands.errors.usage import UsageParser
from seer_jax.train import DistillConfig, TrainResult, distill
from seer_jax.train.config import load_config

DESCRIPTION = """Distils gates from a frozen model.

--config FILE (.yaml or .json) or --recipe prefill|decode (the settings of the papers) gives the settings to start from; the
options below change single ones. The gates are written to OUTPUT/prefill_gate and OUTPUT/decode_gate."""


def run(words: list[str]) -> int:
    start, rest = starting_settings(words)
    config = parse(DistillConfig, "train", rest, default=start, description=DESCRIPTION)
    if config.output is None:
        raise ValueError("output must be a folder for the gates and checkpoints; got None. Pass --output FOLDER.")
    _print_usage(config, distill(config))
    return ExitCode.OK


def starting_settings(words: list[str]) -> tuple[DistillConfig, list[str]]:
    """The settings of a configuration file or a recipe, and the options that are left for single settings."""
    parser = UsageParser(f"{PROGRAM} train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--recipe", choices=["prefill", "decode"])
    given, rest = parser.parse_known_args(words)
    if given.config is not None and given.recipe is not None:
        parser.error("--config and --recipe both give the settings to start from; choose one")
    if given.config is not None:
        return load_config(DistillConfig, given.config), rest
    return (DistillConfig.decode_recipe() if given.recipe == "decode" else DistillConfig.prefill_recipe()), rest


def _print_usage(config: DistillConfig, result: TrainResult) -> None:
    """Prints where the gates are, and a command that generates sparsely with them.

    A gate that recommends no policy is used at the density for which training reports its recall.
    """
    gates = dict(prefill=result.model.prefill_gate, decode=result.model.decode_gate)
    folders = [str(folder) for folder in result.gates]
    policies = [
        f"--{kind} topk:{config.recall_density:g}"
        for kind, gate in gates.items()
        if gate is not None and gate.recommended is None
    ]
    command = [PROGRAM, "generate", "--model", config.model, "--gates", *folders, *policies, "--prompt ..."]
    print(f"Gates: {', '.join(folders)}")
    print(f"Use them: {' '.join(command)}")
