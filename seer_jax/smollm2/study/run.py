"""The study: variants one after the other, each kept in a folder of its own; one that fails ends alone."""

import dataclasses
import functools
import json
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from seer_jax.evaluate.levels import Phase
from seer_jax.folder_lock import locked
from seer_jax.models.decoder import Transformer
from seer_jax.outputs import check_output_folder, write_json, write_text
from seer_jax.selection.policies import Given
from seer_jax.selection.rules import Threshold
from seer_jax.smollm2.study.config import StudyConfig
from seer_jax.smollm2.study.measuring import Ground, Say, score_baselines, score_gates, score_own
from seer_jax.smollm2.study.selections import LocalHeads, decode_masks, local_mass, overlaps, shared_masks
from seer_jax.smollm2.study.table import ERROR, FACTS, write_tables
from seer_jax.smollm2.study.training import calibration_rows, train
from seer_jax.smollm2.study.variants import BASELINES, BLOCK_SIZE, VARIANTS, Selection, Untrained, Variant

CALIBRATION_ROWS = 2
LATEST = 4  # blocks that local heads read, beside the first one
LOCAL_MASS = 0.9  # share of the attention mass in those blocks from which on a head is local


def run_study(config: StudyConfig, say: Say) -> list[str]:
    """Measures the variants and writes the tables; returns the names of those that failed.

    Raises:
      FileNotFoundError: a text is not there.
      OSError: the output can't be written.
    """
    for path in (config.train, config.held_out):
        if not path.exists():
            raise FileNotFoundError(f"The study needs its texts; {path} is not there. Name files that are.")
    check_output_folder(config.output)
    ground, failed = Ground(config), []
    for name in config.names:
        folder, begun = config.output / name, time.monotonic()
        try:
            with locked(folder):
                (folder / ERROR).unlink(missing_ok=True)
                facts = _measure(ground, name, lambda line, name=name: say(f"[{name}] {line}"))
                write_json(folder / FACTS, facts)
        except Exception as error:  # of whatever kind: the other variants are worth measuring
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            say(f"[{name}] failed: {reason}")
            write_text(folder / ERROR, f"{type(error).__name__}: {reason}\n")
            failed.append(name)
        else:
            say(f"[{name}] done in {time.monotonic() - begun:.1f} s")
        write_tables(config.output)
    return failed


def _measure(ground: Ground, name: str, say: Say) -> dict[str, Any]:
    """Trains and scores one variant; returns what the table says of it, JSON."""
    if name == BASELINES:
        score_baselines(ground, name, say)
        return {"meaning": "oracles and methods without training"}
    variant = VARIANTS[name]
    own = VARIANTS[variant.of] if isinstance(variant, Untrained) else variant
    assert isinstance(own, Variant)
    begun = time.monotonic()
    model, costs = train(ground.config, ground.model, own, say)
    recall = ", ".join(f"{kind} recall {costs[f'{kind}_recall']:.3f}" for kind in ("prefill", "decode"))
    say(
        f"{costs['steps']} steps, {recall}, {costs['tokens_per_second']:,.0f} tokens/s ({time.monotonic() - begun:.1f} s)"
    )
    gates = {Phase.PREFILL: model.prefill_gate, Phase.DECODE: model.decode_gate}
    facts = {"meaning": variant.meaning, "settings": _settings(own), "costs": costs}
    write_json(ground.config.output / name / FACTS, facts)  # also for scores that are stopped
    if isinstance(variant, Variant):
        score_gates(ground, name, gates, top_k=variant.top_k, say=say)
        return facts
    models = {phase: ground.with_gate(gate) for phase, gate in gates.items()}
    use = {Selection.SHARED_LAYERS: _share_layers, Selection.LOCAL_HEADS: _use_local_heads}[variant.selection]
    measured = use(ground, name, models, say)
    say(json.dumps(measured))
    return facts | {"measured": measured}


def _settings(variant: Variant) -> dict[str, Any]:
    values = json.loads(json.dumps(dataclasses.asdict(variant)))
    return {name: values[name] for name in ("prefill", "decode", "target", "text", "times")}


def _share_layers(ground: Ground, name: str, models: dict[Phase, Transformer], say: Say) -> dict[str, float]:
    """Every second layer reads the lists of the layer before. Each head reads those of the head whose lists are likest, on training text.

    While decoding, the lists are compared alone.
    """
    config = ground.config
    rows = calibration_rows(config, ground.model, CALIBRATION_ROWS)
    policy = Threshold(config.thresholds[len(config.thresholds) // 2], dense_last_rows=0)
    layers, heads = ground.model.config.num_layers, ground.model.config.num_heads
    own, none = jnp.broadcast_to(jnp.arange(heads), (layers, heads)), jnp.zeros(layers, bool)
    measured: dict[str, float] = {}

    def compare(phase: Phase, masks: Any) -> np.ndarray:
        found = np.mean([np.asarray(overlaps(masks(row[None]))) for row in rows], axis=0)[::2]
        measured[f"{phase}_overlap_of_same_head"] = float(np.diagonal(found, axis1=1, axis2=2).mean())
        measured[f"{phase}_overlap_of_likest_head"] = float(found.max(-1).mean())
        return found.argmax(-1)

    if Phase.DECODE in config.phases:
        compare(Phase.DECODE, functools.partial(decode_masks, models[Phase.DECODE], policy=policy))
    if Phase.PREFILL in config.phases:
        model = models[Phase.PREFILL]
        likest = compare(Phase.PREFILL, lambda row: shared_masks(model, row, policy, own, none))
        second = np.arange(1, layers, 2)
        source, shares = own.at[second].set(likest), none.at[second].set(True)
        record = ground.record(name, Phase.PREFILL.value, selection=np.asarray(source).tolist())

        def policy_of(policy: Threshold, row: np.ndarray) -> Given:
            return Given(shared_masks(model, row, policy, source, shares), BLOCK_SIZE)

        score_own(ground, model, Phase.PREFILL, policy_of, record, say)
    return measured


def _use_local_heads(ground: Ground, name: str, models: dict[Phase, Transformer], say: Say) -> dict[str, float]:
    """Heads whose attention mass lies in the first and the latest blocks of training text read those, the others the gate's lists."""
    config, shape = ground.config, ground.model.config
    rows = calibration_rows(config, ground.model, CALIBRATION_ROWS)
    mass = np.mean([np.asarray(local_mass(ground.model, row[None], LATEST, BLOCK_SIZE)) for row in rows], axis=0)
    by_phase = {Phase.PREFILL: mass, Phase.DECODE: mass.reshape(len(mass), shape.num_kv_heads, -1).mean(-1)}
    measured: dict[str, float] = {}
    for phase in config.phases:
        local = (by_phase[phase] >= LOCAL_MASS).astype(np.float32)
        measured[f"{phase}_share_of_local_heads"] = float(local.mean())
        record = ground.record(name, phase.value, selection=local.tolist())
        policy_of = functools.partial(_with_local_heads, local)
        score_own(ground, models[phase], phase, policy_of, record, say)
    return measured


def _with_local_heads(local: np.ndarray, policy: Threshold, row: np.ndarray) -> LocalHeads:
    del row
    return LocalHeads(policy, local, LATEST)
