"""What the commands that train share: processes, and the settings that a run starts from."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from seer_jax.commands import PROGRAM
from seer_jax.commands.errors.usage import UsageError, UsageParser, one_of
from seer_jax.sharding.hosts import join_processes
from seer_jax.sharding.processes import is_first
from seer_jax.train.config import TrainConfig, load_config


def join_run() -> None:
    """Makes this process one of those that train together, where there are several."""
    join_processes()
    if jax.distributed.is_initialized() and not is_first():
        warnings.simplefilter("ignore")  # the first process gives each, once


def check_named(options: TrainConfig, results: str) -> None:
    """Raises UsageError where a run has no output folder or no base model."""
    if options.output is None:
        raise UsageError(f"--output must be a folder for {results} and checkpoints; got none. Pass --output FOLDER.")
    if not options.model:
        raise UsageError("--model must be a base model; got none. Pass --model with a folder or hub id.")


def starting_config[C: TrainConfig](
    kind: type[C], command: str, words: list[str], recipes: Mapping[Any, Callable[..., C]]
) -> C:
    """The settings of the configuration file or the recipe that a command line names; without either, of the first recipe."""
    parser = UsageParser(f"{PROGRAM} {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--recipe")
    given, _ = parser.parse_known_args(words)
    if given.recipe is not None and given.recipe not in list(recipes):
        raise UsageError(one_of("--recipe", list(recipes), given.recipe))
    if given.config is not None and given.recipe is not None:
        parser.error("--config and --recipe both give the settings to start from; choose one")
    if given.config is None:
        return recipes[given.recipe or next(iter(recipes))]()
    try:
        return load_config(kind, given.config)
    except ValueError as error:
        raise UsageError(str(error)) from error


def settings_of(config: TrainConfig, kind: type[TrainConfig]) -> dict[str, Any]:
    """The settings of a run, without the options that say where they come from."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(kind)}
