"""How the gates beside the bundled model were made: `python train_gates.py --to gates`, minutes on a GPU.

Distils both gates from the same passes over Python's standard library (less what evaluation is cut from) at the model's whole context,
saves them in bfloat16, and measures what was saved on held-out text: how much of the true block scores the kept blocks hold, layer by layer
and beside the best choice of as many blocks; with the gates that training starts from, too. The policies that they recommend come from
`seer-jax calibrate`, and perplexity and pass keys from `seer-jax eval`: README.md of the model has the commands.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import seer_jax
from seer_jax import tiny_lm
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.models.config import DType
from seer_jax.convert import save_gates
from seer_jax.models.hub import read_config
from seer_jax.evaluate import text_windows
from seer_jax.models.decoder import Transformer
from seer_jax.plots import block_maps
from seer_jax.selection.rules import TopK
from seer_jax.tiny_lm.corpus import training_rows
from seer_jax.train import DistillConfig, TrainedGates, OptimizerConfig, distill

LENGTH = 8192
SEEDS, ROWS = 4, 224  # of each seed: the same files in another order, other pass keys
STEPS, BATCH = 896, 4
LEARNING_RATE = 2e-3
DENSITIES = (0.05, 0.1, 0.2)


def train(to: Path, library: Path | None) -> dict:
    base = seer_jax.from_pretrained(tiny_lm.path(), dtype="float32")
    tokenizer = seer_jax.load_tokenizer(tiny_lm.path())
    settings = dict(length=LENGTH, count=ROWS, keys=4, questions=6, library=library)
    text = np.concatenate([training_rows(tokenizer, base.config.vocab_size, seed=i, **settings) for i in range(SEEDS)])
    prefill, decode = _configs(base)
    config = DistillConfig(
        kind=TrainedGates.BOTH,
        prefill=prefill,
        decode=decode,
        sequence_length=LENGTH,
        batch_size=BATCH,
        micro_batch_size=BATCH,
        steps=STEPS,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        dtype=DType.FLOAT32,
    )
    reports = []
    start = time.perf_counter()
    model = distill(config, model=base, dataset=text, progress=lambda r: (reports.append(r), print(r.summary, flush=True))).model
    seconds = time.perf_counter() - start
    for kind, gate in (("prefill", model.prefill_gate), ("decode", model.decode_gate)):
        hf_config = read_config(tiny_lm.path())
        save_gates(gate, to / kind, base_model=tiny_lm.NAME, hf_config=hf_config, dtype=jnp.bfloat16)
    return {"device": jax.devices()[0].device_kind, "seconds": seconds, "tokens": STEPS * BATCH * LENGTH, **{k: float(v) for k, v in reports[-1].metrics.items()}}


def measure(model: Transformer) -> dict:
    text = np.array(seer_jax.load_tokenizer(tiny_lm.path()).encode(tiny_lm.eval_text(), special_tokens=False), np.int32)
    windows, layers = text_windows(text, LENGTH, 4), {}
    for density in DENSITIES:
        policy = TopK(density, dense_last_rows=0)
        maps = [jax.device_get(block_maps(model, window, policy)) for window in windows]
        kept, best = zip(*(_held(m.true, m.kept) for m in maps))
        layers[f"{density:g}"] = {name: [round(float(x), 4) for x in np.mean(shares, 0)] for name, shares in (("kept", kept), ("best", best))}
        print(density, layers[f"{density:g}"], flush=True)
    return {"device": jax.devices()[0].device_kind, "share_of_block_scores_by_layer": layers}


def untrained() -> Transformer:
    """The model with the gates that training starts from."""
    model = seer_jax.from_pretrained(tiny_lm.path(), dtype="float32")
    rngs = nnx.Rngs(0)
    for config in _configs(model):
        model.add_gate(config, rngs=rngs)
    return model


def _configs(model: Transformer) -> tuple[PrefillGateConfig, DecodeGateConfig]:
    dim = model.config.head_dim
    return PrefillGateConfig(gate_dim=dim), DecodeGateConfig(gate_dim=dim)


def _held(true: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of each layer's normalised block scores on the kept blocks, and on the best choice of as many."""
    count = kept.sum(-1, keepdims=True)
    best = -np.sort(-true, axis=-1) * (np.arange(true.shape[-1]) < count)
    rows = slice(true.shape[-1] // 4, None)  # the first rows hold few blocks to choose from
    return (true * kept).sum(-1)[..., rows].mean((1, 2)), best.sum(-1)[..., rows].mean((1, 2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True, help="folder for the gates and gates.json")
    parser.add_argument("--library", type=Path, help="folder of a standard library's source; the running interpreter's if left out")
    parser.add_argument("--only", choices=("train", "measure"), help="one of the two stages")
    arguments = parser.parse_args()
    path = arguments.to / "gates.json"
    report = json.loads(path.read_text()) if path.exists() else {}

    def trained() -> Transformer:
        return seer_jax.from_pretrained(tiny_lm.path(), [arguments.to / "prefill", arguments.to / "decode"], dtype="float32")

    if arguments.only in (None, "train"):
        report["training"] = train(arguments.to, arguments.library)
        path.write_text(json.dumps(report, indent=1))
    if arguments.only in (None, "measure"):
        report["untrained"] = measure(untrained())
        path.write_text(json.dumps(report, indent=1))
        report["trained"] = measure(trained())
        path.write_text(json.dumps(report, indent=1))
