"""Distil gates: --config FILE or --recipe prefill|decode, then single settings."""

import argparse
from pathlib import Path

from seer_jax.commands.arguments import PROGRAM, ExitCode, parse
from seer_jax.convert import save_gates
from seer_jax.models.decoder import Transformer
from seer_jax.models.hub import read_config, resolve
from seer_jax.train import DistillConfig, distill
from seer_jax.train.config import load_config

DESCRIPTION = """Distils gates from a frozen model.

--config FILE (.yaml or .json) or --recipe prefill|decode (the settings of the papers) gives the settings to start from; the
options below change single ones. The gates are written to OUTPUT/prefill_gate and OUTPUT/decode_gate."""


def run(words: list[str]) -> int:
    start, rest = starting_settings(words)
    config = parse(DistillConfig, "train", rest, default=start, description=DESCRIPTION)
    if config.output is None:
        raise ValueError("output must be a folder for the gates and checkpoints; got None. Pass --output FOLDER.")
    distill(config, save=lambda model, folder: _save_gates(config, model, folder))
    return ExitCode.OK


def starting_settings(words: list[str]) -> tuple[DistillConfig, list[str]]:
    """The settings of a configuration file or a recipe, and the options that are left for single settings."""
    parser = argparse.ArgumentParser(f"{PROGRAM} train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--recipe", choices=["prefill", "decode"])
    given, rest = parser.parse_known_args(words)
    if given.config is not None and given.recipe is not None:
        parser.error("--config and --recipe both give the settings to start from; choose one")
    if given.config is not None:
        return load_config(DistillConfig, given.config), rest
    return (DistillConfig.decode_recipe() if given.recipe == "decode" else DistillConfig.prefill_recipe()), rest


def _save_gates(config: DistillConfig, model: Transformer, folder: Path) -> None:
    hf_config = read_config(resolve(config.model, ("config.json",)))
    gates = dict(prefill=model.prefill_gate, decode=model.decode_gate)
    for kind, gate in gates.items():
        if gate is not None:
            save_gates(gate, folder / f"{kind}_gate", base_model=config.model, hf_config=hf_config)
    print_usage(config, model, folder)


def print_usage(config: DistillConfig, model: Transformer, folder: Path) -> None:
    """Prints where the gates are, and a command that generates sparsely with them.

    A gate that recommends no policy is used at the density for which training reports its recall.
    """
    gates = dict(prefill=model.prefill_gate, decode=model.decode_gate)
    places = [str(folder / f"{kind}_gate") for kind, gate in gates.items() if gate is not None]
    policies = [
        f"--{kind} topk:{config.recall_density:g}"
        for kind, gate in gates.items()
        if gate is not None and gate.recommended is None
    ]
    command = [PROGRAM, "generate", "--model", config.model, "--gates", *places, *policies, "--prompt ..."]
    print(f"Gates: {', '.join(places)}")
    print(f"Use them: {' '.join(command)}")
