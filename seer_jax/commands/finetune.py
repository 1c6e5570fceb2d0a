"""Fine-tune a base model for long contexts: all weights or LoRA adapters, with YaRN."""

import dataclasses
import enum
import shlex
from pathlib import Path

from seer_jax.commands import PROGRAM, ExitCode
from seer_jax.commands.arguments import parse
from seer_jax.commands.train.starting import check_named, join_run, settings_of, starting_config
from seer_jax.sharding.processes import is_first
from seer_jax.train import FinetuneConfig, TrainResult, finetune

DESCRIPTION = """Fine-tunes a base model by the language-model loss: all weights, or LoRA adapters beside frozen ones.

From a context of 8k to 32k, as gates for long contexts need it:
  seer-jax finetune --model smollm2 --yarn-factor 4 --data.paths texts/ --output runs/32k
  seer-jax finetune --recipe lora --model smollm2 --yarn-factor 4 --data.paths texts/ --output runs/32k
  seer-jax train --model runs/32k/model --sequence-length 32768 --data.paths texts/ --output runs/gates

With a distilled prefill gate, which is trained along, and attention that is sparse on its lists:
  seer-jax finetune --model smollm2 --yarn-factor 4 --initial-gates runs/gates --data.paths texts/ --output runs/sparse

Afterwards an adapter can learn what the model misses under sparse attention, from the model itself with dense attention:
  seer-jax finetune --recipe lora --distil --model runs/32k/model --initial-gates runs/gates --steps 50 --data.paths texts/ --output runs/distilled

--config FILE (.yaml or .json) or --recipe full|lora gives the settings to start from; the other options change single ones. The
model is written to OUTPUT/model, with its tokenizer and RoPE, for --model of all commands and for transformers. With LoRA the adapter
is written to OUTPUT/adapter in PEFT's layout, and the model with the adapter merged at the end of the run. The same command resumes
a run that was stopped, also with more or fewer --steps.

--mesh fsdp=4,tensor=2 trains on several devices, the same command under srun or mpirun on those of many hosts."""

ALIASES = {"--precision": "--dtype"}


class Recipe(enum.StrEnum):
    """What trains."""

    FULL = "full"
    LORA = "lora"


RECIPES = {Recipe.FULL: FinetuneConfig.full_recipe, Recipe.LORA: FinetuneConfig.lora_recipe}


@dataclasses.dataclass(frozen=True)
class FinetuneOptions(FinetuneConfig):
    """Fine-tunes a base model.

    Attributes:
      config: file with settings, .yaml or .json, such as OUTPUT/config.json of another run; the other options change single ones.
      recipe: full trains all weights at a learning rate of 1e-5, lora adapters of rank 16 at 1e-4, each for 105 million tokens; in place
        of a file. Without either: full.
    """

    config: Path | None = None
    recipe: Recipe | None = None


def run(words: list[str]) -> int:
    join_run()
    start = starting_config(FinetuneConfig, "finetune", words, RECIPES)
    default = FinetuneOptions(**settings_of(start, FinetuneConfig))
    options = parse(FinetuneOptions, "finetune", words, aliases=ALIASES, default=default, description=DESCRIPTION)
    check_named(options, "the model")
    config = FinetuneConfig(**settings_of(options, FinetuneConfig))
    result = finetune(config)
    if is_first():
        _print_usage(config, result)
    return ExitCode.OK


def _print_usage(config: FinetuneConfig, result: TrainResult) -> None:
    """Prints where the model is, and a command that uses it, with the gate that was trained along at the density of its training."""
    if result.adapter is not None:
        print(f"Adapter: {result.adapter}")
    print(f"Model: {result.saved}")
    gates = [str(folder) for folder in result.gates]
    if gates:
        print(f"Gate: {', '.join(gates)}")
    sparse = ["--gates", *gates, "--prefill", f"topk:{config.density:g}"] if gates else []
    command = [PROGRAM, "generate", "--model", str(result.saved), *sparse, "--prompt", "..."]
    print(f"Use it: {shlex.join(command)}")
