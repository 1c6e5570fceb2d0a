"""The command `seer-jax`. A subcommand imports what it needs when it runs, so that help comes at once.

Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage, 130 interrupted.
"""

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seer_jax import tiny_lm

if TYPE_CHECKING:
    from pallas_kernels.bench import Measurement
    from seer_jax.models.decoder import Transformer
    from seer_jax.train import DistillConfig

PROGRAM = "seer-jax"
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
TRACEBACK = "--traceback"
TRAIN_DESCRIPTION = """Distils gates from a frozen model.

--config FILE (.yaml or .json) or --recipe prefill|decode (the settings of the papers) gives the settings to start from; the
options below change single ones. The gates are written to OUTPUT/prefill_gate and OUTPUT/decode_gate."""

# What a user can cause and mend; anything else is a defect of ours, and shows where.
EXPECTED = (ValueError, OSError, MemoryError, NotImplementedError, ImportError, FloatingPointError)


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
      summary: one line for the help.
      run: from its arguments to the exit code.
    """

    summary: str
    run: Callable[[list[str]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (that of the process if None) and returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = TRACEBACK in words
    words = [word for word in words if word != TRACEBACK]
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return OK if words else USAGE
    name, *rest = words
    if name == "--version":
        import seer_jax

        print(PROGRAM, seer_jax.__version__)
        return OK
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}."
        print(f"{PROGRAM}: there is no command {name!r}; {hint} See {PROGRAM} --help.", file=sys.stderr)
        return USAGE
    try:
        return COMMANDS[name].run(rest)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except EXPECTED as error:
        if show_traceback:
            raise
        print(f"{PROGRAM} {name}: {error}", file=sys.stderr)
        return FAILED


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return f"""usage: {PROGRAM} COMMAND [OPTIONS]

Learned block-sparse attention for long-context language models.

{commands}

{PROGRAM} COMMAND --help lists a command's options; {PROGRAM} --version tells the version.
{TRACEBACK} with any command shows where an error came from. {tiny_lm.NAME} stands for the bundled model."""


def _parse[C](kind: type[C], name: str, words: list[str], **settings: Any) -> C:
    """The configuration that the command line describes; prints help or what is wrong, and exits, where it doesn't."""
    import tyro

    style = (tyro.conf.EnumChoicesFromValues,)
    return tyro.cli(kind, prog=f"{PROGRAM} {name}", args=words, config=style, **settings)


def _demo(words: list[str]) -> int:
    from seer_jax.commands.demo import DemoConfig, demo

    demo(_parse(DemoConfig, "demo", words))
    return OK


def _convert(words: list[str]) -> int:
    from seer_jax.commands.convert import ConvertConfig, convert

    print(convert(_parse(ConvertConfig, "convert", words)))
    return OK


def _verify(words: list[str]) -> int:
    from seer_jax.commands.convert import VerifyConfig, verify

    report = verify(_parse(VerifyConfig, "verify", words))
    print(report)
    return OK if report.passed else FAILED


def _train(words: list[str]) -> int:
    from seer_jax.train import DistillConfig, distill

    default, rest = _train_defaults(words)
    config = _parse(DistillConfig, "train", rest, default=default, description=TRAIN_DESCRIPTION)
    if config.output is None:
        raise ValueError("Training writes its gates to --output FOLDER; got none, so they would be lost.")
    distill(config, save=lambda model, folder: _save_gates(config, model, folder))
    return OK


def _train_defaults(words: list[str]) -> "tuple[DistillConfig, list[str]]":
    """What a configuration file or a recipe sets, and the options that are left for its single settings."""
    from seer_jax.train import DistillConfig
    from seer_jax.train.config import load_config

    parser = argparse.ArgumentParser(f"{PROGRAM} train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--recipe", choices=["prefill", "decode"])
    given, rest = parser.parse_known_args(words)
    if given.config is not None and given.recipe is not None:
        parser.error("--config and --recipe both give the settings to start from; choose one")
    if given.config is not None:
        return load_config(DistillConfig, given.config), rest
    return (DistillConfig.decode_recipe() if given.recipe == "decode" else DistillConfig.prefill_recipe()), rest


def _save_gates(config: "DistillConfig", model: "Transformer", folder: Path) -> None:
    """Writes the gates in the release's layout, each into a folder of its own, and says how to use them."""
    from seer_jax.convert import save_gates
    from seer_jax.models.hub import read_config, resolve

    hf_config = read_config(resolve(config.model, ("config.json",)))
    gates = dict(prefill=model.prefill_gate, decode=model.decode_gate)
    places = []
    for kind, gate in gates.items():
        if gate is not None:
            place = folder / f"{kind}_gate"
            save_gates(gate, place, base_model=config.model, hf_config=hf_config)
            places.append(str(place))
    print(f"Gates: {', '.join(places)}")
    print(f"Use them: {PROGRAM} generate --model {config.model} --gates {' '.join(places)} --prompt ...")


def _generate(words: list[str]) -> int:
    from seer_jax.commands.generate import GenerateConfig, run_generate

    run_generate(_parse(GenerateConfig, "generate", words))
    return OK


def _eval(words: list[str]) -> int:
    from seer_jax.commands.eval import EvalConfig, evaluate

    evaluate(_parse(EvalConfig, "eval", words))
    return OK


def _bench(words: list[str]) -> int:
    parser = argparse.ArgumentParser(f"{PROGRAM} bench", description=COMMANDS["bench"].summary)
    parser.add_argument("what", choices=list(BENCHES), help="; ".join(f"{n}: {b.summary}" for n, b in BENCHES.items()))
    return BENCHES[parser.parse_args(words[:1]).what].run(words[1:])


def _bench_prefill(words: list[str]) -> int:
    from seer_jax.bench import PrefillBench, bench_prefill

    return _outcome(bench_prefill(_parse(PrefillBench, "bench prefill", words)))


def _bench_decode(words: list[str]) -> int:
    from seer_jax.bench import DecodeBench, bench_decode

    return _outcome(bench_decode(_parse(DecodeBench, "bench decode", words)))


def _bench_ground_truth(words: list[str]) -> int:
    from seer_jax.bench import GroundTruthBench, bench_ground_truth

    return _outcome(bench_ground_truth(_parse(GroundTruthBench, "bench ground-truth", words)))


def _bench_train(words: list[str]) -> int:
    from seer_jax.bench import TrainBench, bench_training

    return _outcome(bench_training(_parse(TrainBench, "bench train", words)))


def _outcome(measurements: "list[Measurement]") -> int:
    """The exit code, after saying which measurements are wrong."""
    wrong = [m for m in measurements if m.failure]
    for m in wrong:
        print(f"{PROGRAM} bench: {m.table}, {m.case}: {m.failure}", file=sys.stderr)
    return FAILED if wrong else OK


def _info(words: list[str]) -> int:
    argparse.ArgumentParser(f"{PROGRAM} info", description=COMMANDS["info"].summary).parse_args(words)
    from seer_jax.commands.info import describe

    print(describe())
    return OK


COMMANDS = {
    "demo": Command("distil gates for the bundled model and compare them with other ways to choose blocks", _demo),
    "convert": Command("write gates in another format, alone or with their base model", _convert),
    "verify": Command("compare the logits of a base model with a reference", _verify),
    "train": Command("distil gates: --config FILE or --recipe prefill|decode, then single settings", _train),
    "generate": Command("continue a prompt, densely or sparsely, while it is being made", _generate),
    "eval": Command("measure a model's quality at given densities", _eval),
    "bench": Command("time this machine: bench prefill|decode|ground-truth|train", _bench),
    "info": Command("tell versions, devices and implementations", _info),
}

BENCHES = {
    "prefill": Command("the attention kernel, the choice of blocks and a whole model, on prompts", _bench_prefill),
    "decode": Command("the attention kernel, a layer with its gate and a whole model, on new tokens", _bench_decode),
    "ground-truth": Command("dense attention with the scores that gates are trained on", _bench_ground_truth),
    "train": Command("a step of distillation beside a dense forward of the same tokens", _bench_train),
}

if __name__ == "__main__":
    sys.exit(main())
