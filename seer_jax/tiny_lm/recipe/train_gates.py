"""How the gates beside the bundled model were made: `python train_gates.py --to gates`, minutes on a GPU.

Distils both gates from the same passes over Python's standard library (less what evaluation is cut from) at the model's whole context,
saves them in bfloat16, and measures what was saved on held-out text: how much of the true block scores the kept blocks hold, layer by layer
and beside the best choice of as many blocks, perplexity, and pass keys; with the gates that training starts from, too. And how decoding by the
gate compares with dense decoding, by several policies.
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
from seer_jax.models.cache import Cache
from seer_jax.selection.notation import write_policy
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.models.config import DType
from seer_jax.convert import save_gates
from seer_jax.models.hub import read_config
from seer_jax.evaluate import EvalRows, SparsityLevel, all_methods, compare, level_name, make_rows, score_line, score_to_json
from seer_jax.models.decoder import Transformer
from seer_jax.plots import block_maps
from seer_jax.selection.policies import Dense, Policy
from seer_jax.selection.rules import CumulativeMass, TokenBudget, TopK
from seer_jax.selection.scorers import LearnedGate, Scorer
from seer_jax.tiny_lm.corpus import training_rows
from seer_jax.train import DistillConfig, TrainedGates, OptimizerConfig, distill

LENGTH = 8192
SEEDS, ROWS = 4, 224  # of each seed: the same files in another order, other pass keys
STEPS, BATCH = 896, 4
LEARNING_RATE = 2e-3
DENSITIES = (0.05, 0.1, 0.2)
BUDGETS, MASSES = (512, 1024, 2048, 4096), (0.9, 0.95, 0.99, 0.999)
TEXTS, NEW_TOKENS = 12, 64  # that are decoded
RECOMMENDED = {"prefill": CumulativeMass(0.95), "decode": CumulativeMass(0.9)}


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
        save_gates(gate, to / kind, base_model=tiny_lm.NAME, hf_config=hf_config, policy=RECOMMENDED[kind], dtype=jnp.bfloat16)
    return {"device": jax.devices()[0].device_kind, "seconds": seconds, "tokens": STEPS * BATCH * LENGTH, **{k: float(v) for k, v in reports[-1].metrics.items()}}


def measure(model: Transformer, methods: tuple[Scorer, ...]) -> dict:
    rows = evaluation_rows(model, windows=4)
    layers = {}
    for density in DENSITIES:
        policy = TopK(density, dense_last_rows=0)
        maps = [jax.device_get(block_maps(model, window, policy)) for window in rows.windows]
        kept, best = zip(*(_held(m.true, m.kept) for m in maps))
        layers[f"{density:g}"] = {name: [round(float(x), 4) for x in np.mean(shares, 0)] for name, shares in (("kept", kept), ("best", best))}
        print(density, layers[f"{density:g}"], flush=True)
    scores = []
    levels = [SparsityLevel(level_name(policy), policy) for policy in map(TopK, DENSITIES)]
    for score in compare(model, rows, levels, methods=methods, batch_size=13):
        print(score_line(score), flush=True)
        scores.append(score_to_json(score))
    return {"device": jax.devices()[0].device_kind, "share_of_block_scores_by_layer": layers, "scores": scores}


def greedy(model: Transformer) -> dict:
    """Decoding by the gate beside dense decoding, after dense prompts of about LENGTH tokens.

    Per policy: share of the blocks kept; pass keys found; greedy texts equal to dense ones, and their tokens before the first difference;
    and with the tokens of the text given, how often the likeliest next token is dense attention's and the text's, and the perplexity.
    """
    tokenizer, rows = seer_jax.load_tokenizer(tiny_lm.path()), evaluation_rows(model, windows=TEXTS)
    prompts = [*rows.windows[:, :-NEW_TOKENS], *(prompt.tokens[: -prompt.answer_length] for prompt in rows.prompts)]
    tokens, lengths = seer_jax.pad_prompts(prompts)
    prefill = jax.jit(lambda model, tokens, lengths: model.prefill(tokens, lengths, model.make_cache(1, LENGTH + NEW_TOKENS)))
    starts = [jax.block_until_ready(prefill(model, tokens[i : i + 1], lengths[i : i + 1])[:2]) for i in range(len(prompts))]
    targets = rows.windows[:, -NEW_TOKENS:]

    @jax.jit
    def decode(model: Transformer, start: tuple, given: jax.Array | None, policy: Policy) -> tuple:
        def step(carry: tuple, given: jax.Array | None) -> tuple:
            logits, cache = carry
            best = logits.argmax(-1).astype(jnp.int32)
            after, cache, kept = model.decode(best if given is None else given[None], cache, sparsity=policy)
            return (after, cache), (best[0], jax.nn.log_softmax(logits[0]), kept.mean())

        return jax.lax.scan(step, start, given, length=NEW_TOKENS)[1]

    def run(policy: Policy) -> dict:
        said, _, kept = (np.stack(x) for x in zip(*(decode(model, start, None, policy) for start in starts)))
        given = zip(starts[:TEXTS], targets, strict=True)
        best, logs, _ = (np.stack(x) for x in zip(*(decode(model, start, jnp.asarray(text), policy) for start, text in given)))
        answers = zip(said[TEXTS:], rows.prompts, strict=True)
        found = [tokenizer.decode(tokens[: len(p.answer)]).strip().startswith(p.answer) for tokens, p in answers]
        nll = -np.take_along_axis(logs, targets[..., None], axis=-1)[:, 1:]  # the prompt's own logits, dense, predict the first
        return {
            "said": said[:TEXTS],
            "best": best[:, 1:],
            "kept": float(kept[:TEXTS].mean()),
            "pass_keys": float(np.mean(found)),
            "accuracy": float((best == targets)[:, 1:].mean()),
            "perplexity": float(np.exp(nll.mean())),
        }

    dense, report = run(Dense()), {}
    for policy in (Dense(), *map(TokenBudget, BUDGETS), *map(CumulativeMass, MASSES)):
        one = run(policy)
        same = np.cumprod(one.pop("said") == dense["said"], axis=1)
        agreement = float((one.pop("best") == dense["best"]).mean())
        one |= {"agreement": agreement, "texts_equal": float(same[:, -1].mean()), "tokens_equal": float(same.mean())}
        report[write_policy(policy)] = one
        print(write_policy(policy), one, flush=True)
    return {"device": jax.devices()[0].device_kind, "texts": TEXTS, "new_tokens": NEW_TOKENS, "policies": report}


def evaluation_rows(model: Transformer, windows: int) -> EvalRows:
    tokenizer, vocab_size = seer_jax.load_tokenizer(tiny_lm.path()), model.config.vocab_size
    return make_rows(tokenizer, tiny_lm.eval_text(), vocab_size=vocab_size, length=LENGTH, windows=windows, passkeys=9)


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
    parser.add_argument("--only", choices=("train", "measure", "greedy"), help="one of the three stages")
    arguments = parser.parse_args()
    path = arguments.to / "gates.json"
    report = json.loads(path.read_text()) if path.exists() else {}

    def trained() -> Transformer:
        return seer_jax.from_pretrained(tiny_lm.path(), [arguments.to / "prefill", arguments.to / "decode"], dtype="float32")

    if arguments.only in (None, "train"):
        report["training"] = train(arguments.to, arguments.library)
        path.write_text(json.dumps(report, indent=1))
    if arguments.only in (None, "measure"):
        report["untrained"] = measure(untrained(), (LearnedGate(),))
        path.write_text(json.dumps(report, indent=1))
        report["trained"] = measure(trained(), all_methods())
        path.write_text(json.dumps(report, indent=1))
    if arguments.only in (None, "greedy"):
        report["greedy"] = greedy(trained())
        path.write_text(json.dumps(report, indent=1))
