"""What the fuzz test damages and which command reads it; and command lines of random options."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml
from safetensors.numpy import save_file

from seer_jax import tiny_lm
from seer_jax.bench.configs import DecodeBench, GroundTruthBench, PrefillBench, TrainBench
from seer_jax.bench.scaling import ScalingBench
from seer_jax.bench.serving import ServingBench
from seer_jax.commands.calibrate import CalibrateConfig
from seer_jax.commands.chat import ChatConfig
from seer_jax.commands.convert import ConvertConfig
from seer_jax.commands.demo import DemoConfig
from seer_jax.commands.errors.options import Options
from seer_jax.commands.eval import EvalConfig
from seer_jax.commands.generate import GenerateConfig
from seer_jax.commands.plan import PlanConfig
from seer_jax.commands.plot.configs import DensityPlot, LossPlot, MapsPlot, SpeedPlot
from seer_jax.commands.verify import VerifyConfig
from seer_jax.convert import GateFormat, load_base, save_base, save_gates
from seer_jax.convert.rules import base_rules
from seer_jax.convert.stream import tensors_of
from seer_jax.models.families import config_to_hf
from seer_jax.models.layers import BaseParam
from seer_jax.selection.rules import TokenBudget, TopK
from seer_jax.train import DistillConfig, FinetuneConfig
from tests.convert.gguf.files import tokenizer_metadata, write_gguf
from tests.seer_jax.commands.fuzz.damage import Outcome, copy_tree, damage, run_case
from tests.seer_jax.conftest import LLAMA, tiny_model

TEXT = "def main(argv):\n    return [print(x) for x in argv]\n"
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

GENERATE = "generate --max-new-tokens 2 --no-stats --model base"
BOTH = f"{GENERATE} --prompt def --gates prefill decode"
CHATS = f"{GENERATE} --prompt def --chat"
EVAL = "eval --model base --gates prefill --length 64 --windows 1 --passkeys 0 --decoded 8 --phases prefill --policies topk:0.5 --methods gate"
TRAIN = "train --config run.yaml --output new"
FINETUNE = "--model base --data.paths data --sequence-length 64 --batch-size 1 --steps 2 --no-tensorboard --output new"
LOSS = "plot loss --scores scores.json --output new.svg"
SPEED = "plot speed --bench bench.json --scores scores.json --output new.svg"
MAPS = "--model base --gates prefill decode --text prompt.txt --length 64 --output new"

# File of the world -> command lines that read it, and how often it is chosen.
TARGETS: list[tuple[str, list[str], int]] = [
    (
        "base/config.json",
        [f"{GENERATE} --prompt def", BOTH, "convert --gates prefill --model base --include-base --output out"],
        6,
    ),
    ("base/generation_config.json", [f"{GENERATE} --prompt def"], 4),
    ("base/tokenizer.json", [f"{GENERATE} --prompt def"], 4),
    ("base/tokenizer_config.json", [CHATS, f"{GENERATE} --prompt def"], 4),
    ("base/special_tokens_map.json", [CHATS], 2),
    ("base/chat_template.jinja", [CHATS], 4),
    (
        "base/model.safetensors",
        [f"{GENERATE} --prompt def", "verify --model base --reference reference.safetensors"],
        6,
    ),
    ("sharded/model.safetensors.index.json", [f"{GENERATE.replace('base', 'sharded')} --prompt def"], 3),
    (
        "tiny.gguf",
        [f"{GENERATE.replace('base', 'tiny.gguf')} --prompt def", "convert --model tiny.gguf --output out"],
        6,
    ),
    ("prefill/config.json", [BOTH, "convert --gates prefill --output out"], 6),
    ("prefill/attn_gate_weights.safetensors", [BOTH, "convert --gates prefill --output out"], 4),
    ("decode/attn_gate_weights.pth", [BOTH, "convert --gates decode --output out"], 4),
    ("reference.safetensors", ["verify --model base --reference reference.safetensors"], 4),
    ("prompt.txt", [f"{GENERATE} --prompt-file prompt.txt", f"{EVAL} --text prompt.txt"], 3),
    ("run.yaml", [TRAIN], 5),
    ("run.json", [TRAIN.replace("yaml", "json")], 5),
    ("data/a.jsonl", [TRAIN], 4),
    ("data/b.txt", [TRAIN], 2),
    ("scores.json", [LOSS, SPEED], 4),
    ("bench.json", [SPEED], 4),
    ("run/*", [TRAIN.replace("new", "run"), "generate --gates run --prompt def --plan"], 6),
]


def make_world(root: Path) -> None:
    """A tiny model with its gates, as folders and as a GGUF file, a reference, texts, settings of a run and a finished run, below `root`."""
    model = tiny_model(
        dataclasses.replace(LLAMA, vocab_size=4096, num_layers=1, eos_token_ids=(0,), max_position_embeddings=512)
    )
    for name, shards in (("base", 2**30), ("sharded", 2**18)):
        save_base(model, root / name, shard_bytes=shards)
        shutil.copy(tiny_lm.path() / "tokenizer.json", root / name)
    base = {key: np.asarray(array) for key, array in tensors_of(model, BaseParam, base_rules(model.config))}
    metadata = tokenizer_metadata(tiny_lm.path(), "qwen2") | {"tokenizer.chat_template": CHAT}
    write_gguf(root / "tiny.gguf", config_to_hf(model.config), base, metadata=metadata)
    files: dict[str, Any] = {
        "base/generation_config.json": {"eos_token_id": [0, 1], "temperature": 0.7, "top_p": 0.9, "do_sample": True},
        "base/tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": CHAT},
        "base/special_tokens_map.json": {"pad_token": "<pad>", "eos_token": {"content": "</s>"}},
        "run.json": settings(),
        "scores.json": scores(),
        "bench.json": timings(),
    }
    for name, value in files.items():
        (root / name).write_text(json.dumps(value))
    (root / "base/chat_template.jinja").write_text(CHAT)
    (root / "run.yaml").write_text(yaml.safe_dump(settings()))
    (root / "prompt.txt").write_text(TEXT * 8)
    (root / "data").mkdir()
    (root / "data/a.jsonl").write_text("".join(json.dumps({"text": TEXT * 6, "n": i}) + "\n" for i in range(6)))
    (root / "data/b.txt").write_text(TEXT * 20)
    assert model.prefill_gate is not None and model.decode_gate is not None
    save_gates(model.prefill_gate, root / "prefill", base_model="base", policy=TopK(0.4))
    save_gates(model.decode_gate, root / "decode", base_model="base", policy=TokenBudget(32), format=GateFormat.TORCH)
    ids = np.arange(16, dtype=np.int32)[None]
    logits = np.asarray(load_base(root / "base", dtype=jnp.float32)(jnp.asarray(ids)))
    save_file({"input_ids": ids, "logits": logits, "positions": np.arange(16)}, root / "reference.safetensors")


def scores() -> dict[str, Any]:
    """Of an evaluation with three levels of a method."""
    rows: list[tuple] = [(None, "dense", {"rule": "dense"}, 2.0, 1.0)]
    for kept in (0.1, 0.2, 0.4):
        rows.append(("gate", f"topk:{kept}", {"rule": "topk", "density": kept}, 2.0 + 0.001 / kept, kept))
    names = ("method", "level", "policy")
    found = [
        dict(zip(names, row, strict=False)) | {"windows": [{"loss": row[3] + i, "kept": row[4]} for i in range(2)]}
        for row in rows
    ]
    more = {"phase": "prefill", "prompts": [], "tokens": 126, "seconds": 1.0}
    facts = {"config": {"length": 64}, "model": {"name": "base", "fingerprint": "f"}, "gates": [{"name": "prefill"}]}
    return {**facts, "text": {"path": "prompt.txt", "sha256": "0"}, "scores": [row | more for row in found]}


def timings() -> dict[str, Any]:
    """Of a benchmark of two densities."""
    lines = [
        {"settings": {"num_queries": 64, "density": x}, "results": {"density": x, "speedup": 1 / x}} for x in (0.1, 0.5)
    ]
    return {"device": "cpu", "measurements": [line | {"table": "attention", "failure": None} for line in lines]}


def settings() -> dict[str, Any]:
    """Of a training run that takes a moment."""
    gate = {"block_size": 16, "gate_dim": 16, "k_pooling": ["max", "avg"]}
    return {
        "model": "base",
        "data": {"paths": ["data"]},
        "sequence_length": 64,
        "batch_size": 1,
        "steps": 2,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "gates": "prefill",
        "prefill": gate,
        "decode": gate | {"use_rope": False},
        "checkpoint_interval": 1,
        "tensorboard": False,
    }


def run_file_case(world: Path, place: Path, number: int) -> Outcome:
    """Damages one file of a copy of the world, and runs a command that reads it. The working directory is `place`."""
    rng = random.Random(number)
    name, lines, _ = rng.choices(TARGETS, [weight for *_, weight in TARGETS])[0]
    line = rng.choice(lines)
    copy_tree(world, place)
    if name.endswith("*"):
        files = sorted(path for path in (place / name[:-2]).rglob("*") if path.is_file())
        path = rng.choice(files)
    else:
        path = place / name
    if name == "base/tokenizer_config.json":
        (place / "base/chat_template.jinja").unlink()
    change = damage(path, rng)
    return run_case(line.split(" "), f"{path.relative_to(place)} ({change})")


# -------------------------------------------------------------------------------------------------------------- options

COMMANDS: dict[str, tuple[type, str]] = {
    "generate": (GenerateConfig, "--prompt def --max-new-tokens 2 --model base --gates prefill decode"),
    "chat": (ChatConfig, "--model base --max-new-tokens 2"),
    "eval": (EvalConfig, EVAL.partition(" ")[2]),
    "calibrate": (
        CalibrateConfig,
        "--model base --gates prefill --length 64 --windows 1 --held-out-windows 0 --density 0.7",
    ),
    "convert": (ConvertConfig, "--gates prefill --output out"),
    "verify": (VerifyConfig, "--model base --reference reference.safetensors"),
    "train": (DistillConfig, TRAIN.partition(" ")[2]),
    "finetune": (FinetuneConfig, FINETUNE),
    "demo": (DemoConfig, "--steps 2 --length 128 --densities 0.8 --windows 1 --passkeys 1 --new-tokens 1"),
    "plot loss": (LossPlot, LOSS.partition("loss ")[2]),
    "plot speed": (SpeedPlot, SPEED.partition("speed ")[2]),
    "plot density": (DensityPlot, f"{MAPS}.png"),
    "plot maps": (MapsPlot, f"{MAPS}.html"),
    "bench prefill": (PrefillBench, "--shape tiny --lengths 128"),
    "bench decode": (DecodeBench, "--shape tiny --lengths 128 --batches 1"),
    "bench ground-truth": (GroundTruthBench, "--shape tiny --lengths 128"),
    "bench train": (TrainBench, "--shape tiny --lengths 128"),
    "bench scaling": (ScalingBench, "--shape tiny --lengths 128 --train-lengths 128 --mesh tensor=1 --only decode"),
    "bench serving": (ServingBench, "--shape tiny --lengths 128 --requests 2 --new-tokens 2 --slots 2"),
    "plan": (PlanConfig, "--model tiny-lm --length 64 --no-compiled"),
}
WORDS = (
    *(
        "",
        "0",
        "1",
        "-1",
        "2",
        "16",
        "1.5",
        "0.1",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1" * 30,
        "1" * 5000,
        "10%",
        "None",
        "True",
        "x",
        "é",
    ),
    *(
        "topk:0.1",
        "topk:0.1:oracle",
        "budget:64",
        "dense",
        "threshold:0",
        "mass:1",
        "topk:",
        ":",
        "topk:0.5:random,seed=-1",
        "gate",
    ),
    *(
        "float32",
        "bfloat16",
        "prefill",
        "decode",
        "both",
        "base",
        "prefill/config.json",
        "prompt.txt",
        "/",
        "/proc/self/mem",
        ".",
        "data",
    ),
    *(
        "a/b",
        "a/b@c",
        "@",
        "[a, b]",
        "[/bold]",
        "{}",
        "--help=1",
        "--",
        "-x",
        "\x1b",
        "a b",
        "\udcff",
        "budget:" + "9" * 40,
    ),
)


def run_options_case(world: Path, place: Path, number: int) -> Outcome:
    """Runs a command with some of its options at random values."""
    copy_tree(world, place)
    rng = random.Random(number)
    command, (kind, base) = rng.choice(list(COMMANDS.items()))
    flags = [option.flag for option in Options(kind).all]
    words = [*command.split(" "), *base.split(" ")]
    for _ in range(rng.choice((1, 1, 2, 3))):
        flag = rng.choice(
            (*flags, *flags, "--no-stats", "--scorers", "--recipe", "--traceback-", f"{rng.choice(flags)}x")
        )
        words += [flag, *rng.choices(WORDS, k=rng.choice((0, 1, 1, 1, 2)))]
    if rng.random() < 0.1:
        rng.shuffle(words)
    return run_case([word for word in words if word not in ("--help", "-h")], "options")
