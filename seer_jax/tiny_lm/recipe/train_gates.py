"""How the gates beside the bundled model are made: `python train_gates.py --kind fine --to gates/fine`, minutes on a GPU.

Distils both gates from the same passes over Python's standard library (less what evaluation is cut from) at the model's whole context,
saves them in bfloat16, and measures what was saved on held-out text: how much of the true block scores the kept blocks hold, layer by layer
and beside the best choice of as many blocks; with the gates that training starts from, too. Then `seer-jax calibrate` chooses the policies
that they recommend. Perplexity and pass keys come from `seer-jax eval`: README.md of the model has the commands.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import seer_jax
from seer_jax import tiny_lm
from seer_jax.models.config import DType
from seer_jax.convert import save_gates
from seer_jax.models.hub import read_config
from seer_jax.evaluate import text_windows
from seer_jax.models.decoder import Transformer
from seer_jax.plots import block_maps
from seer_jax.selection.rules import TopK
from seer_jax.tiny_lm.corpus import held_out_text, training_rows
from seer_jax.gates.kinds import GateKind, GateSettings, gates_of_kind
from seer_jax.train import DistillConfig, OptimizerConfig, TargetStatistic, TrainedGates, distill

LENGTH = 8192
SEEDS, ROWS = 4, 224  # of each seed: the same files in another order, other pass keys
STEPS, BATCH = 896, 4
LEARNING_RATE = 2e-3
DENSITIES = (0.05, 0.1, 0.2)
BLOCK_SIZE = 64
CALIBRATION = "--text heldout.txt --length 4096 --over 0.01 --windows 3 --held-out-windows 0 --output calibrated"


def train(gates: GateSettings, to: Path, library: Path | None, steps: int, length: int) -> dict:
    base = seer_jax.from_pretrained(tiny_lm.path(), dtype="float32")
    tokenizer = seer_jax.load_tokenizer(tiny_lm.path())
    count = min(ROWS, -(-steps * BATCH // SEEDS))
    settings = dict(length=length, count=count, keys=4, questions=6, library=library)
    text = np.concatenate([training_rows(tokenizer, base.config.vocab_size, seed=i, **settings) for i in range(SEEDS)])
    config = DistillConfig(
        kind=TrainedGates.BOTH,
        prefill=gates.prefill,
        decode=gates.decode,
        target=TargetStatistic(gates.target),
        decode_stride=gates.decode_stride,
        sequence_length=length,
        batch_size=BATCH,
        micro_batch_size=BATCH if jax.default_backend() == "gpu" else 1,
        steps=steps,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        dtype=DType.FLOAT32,
    )
    reports = []
    start = time.perf_counter()
    model = distill(config, model=base, dataset=text, progress=lambda r: (reports.append(r), print(r.summary, flush=True))).model
    seconds = time.perf_counter() - start
    training = {"step": steps, "steps": steps, "finished": True, "target": gates.target}
    for phase, gate in (("prefill", model.prefill_gate), ("decode", model.decode_gate)):
        hf_config = read_config(tiny_lm.path())
        save_gates(gate, to / phase, base_model=tiny_lm.NAME, hf_config=hf_config, dtype=jnp.bfloat16, training=training)
    return {"device": jax.devices()[0].device_kind, "seconds": seconds, "steps": steps, "tokens": steps * BATCH * length, **{k: float(v) for k, v in reports[-1].metrics.items()}}


def calibrate(kind: GateKind, to: Path, library: Path | None, length: int) -> None:
    """By the command, in the gates' folder, so that what they say of it can be typed again."""
    (to / "heldout.txt").write_text(held_out_text(library), encoding="utf-8")
    rule = "--rule threshold" if kind is GateKind.RELEASE else ""  # otherwise the better one of threshold and cumulative mass
    words = shlex.split(f"calibrate --gates prefill decode {CALIBRATION} {rule} --dtype float32")
    words[words.index("--length") + 1] = str(min(4096, length))
    subprocess.run([sys.executable, "-m", "seer_jax.commands.main", *words], cwd=to, check=True)
    for phase in ("prefill", "decode"):
        shutil.copytree(to / "calibrated" / f"{phase}_gate", to / phase, dirs_exist_ok=True)
    shutil.rmtree(to / "calibrated")
    (to / "heldout.txt").unlink()


def measure(model: Transformer, length: int) -> dict:
    text = np.array(seer_jax.load_tokenizer(tiny_lm.path()).encode(tiny_lm.eval_text(), special_tokens=False), np.int32)
    windows, layers = text_windows(text, length, 4), {}
    for density in DENSITIES:
        policy = TopK(density, dense_last_rows=0)
        maps = [jax.device_get(block_maps(model, window, policy)) for window in windows]
        kept, best = zip(*(_held(m.true, m.kept) for m in maps))
        layers[f"{density:g}"] = {name: [round(float(x), 4) for x in np.mean(shares, 0)] for name, shares in (("kept", kept), ("best", best))}
        print(density, layers[f"{density:g}"], flush=True)
    return {"device": jax.devices()[0].device_kind, "share_of_block_scores_by_layer": layers}


def untrained(gates: GateSettings) -> Transformer:
    """The model with the gates that training starts from."""
    model = seer_jax.from_pretrained(tiny_lm.path(), dtype="float32")
    rngs = nnx.Rngs(0)
    for config in (gates.prefill, gates.decode):
        model.add_gate(config, rngs=rngs)
    return model


def _held(true: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of each layer's normalised block scores on the kept blocks, and on the best choice of as many."""
    count = kept.sum(-1, keepdims=True)
    best = -np.sort(-true, axis=-1) * (np.arange(true.shape[-1]) < count)
    rows = slice(true.shape[-1] // 4, None)  # the first rows hold few blocks to choose from
    return (true * kept).sum(-1)[..., rows].mean((1, 2)), best.sum(-1)[..., rows].mean((1, 2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", type=GateKind, choices=list(GateKind), default=GateKind.FINE, help="which gates, see seer_jax/gates/kinds.py")
    parser.add_argument("--to", type=Path, required=True, help="folder for the gates and gates.json")
    parser.add_argument("--library", type=Path, help="folder of a standard library's source; the running interpreter's if left out")
    parser.add_argument("--only", choices=("train", "measure", "calibrate"), help="one of the three stages")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps; fewer for a rehearsal")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens per row; fewer for a rehearsal")
    arguments = parser.parse_args()
    gates = gates_of_kind(arguments.kind, block_size=BLOCK_SIZE, gate_dim=read_config(tiny_lm.path())["head_dim"])
    path = arguments.to / "gates.json"
    report = json.loads(path.read_text()) if path.exists() else {}

    def trained() -> Transformer:
        return seer_jax.from_pretrained(tiny_lm.path(), [arguments.to / "prefill", arguments.to / "decode"], dtype="float32")

    if arguments.only in (None, "train"):
        report["training"] = train(gates, arguments.to, arguments.library, arguments.steps, arguments.length)
        path.write_text(json.dumps(report, indent=1))
    if arguments.only in (None, "measure"):
        report["untrained"] = measure(untrained(gates), arguments.length)
        path.write_text(json.dumps(report, indent=1))
        report["trained"] = measure(trained(), arguments.length)
        path.write_text(json.dumps(report, indent=1))
    if arguments.only in (None, "calibrate"):
        calibrate(arguments.kind, arguments.to, arguments.library, arguments.length)
