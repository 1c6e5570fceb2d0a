"""The policy that a gate recommends: every one can be saved beside it, comes back exactly, and stays with the model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seer_jax import from_pretrained
from seer_jax.convert import GateFormat, load_gates, recommended_policy, save_base, save_gates
from seer_jax.convert.gate_config import policy_from_hf, policy_to_hf
from seer_jax.gates.configs import DecodeGateConfig, PrefillGateConfig
from seer_jax.inference.request import Request
from seer_jax.models.decoder import Transformer
from seer_jax.models.hub import GATES, named_gates, read_config
from seer_jax.selection.notation import policy_to_json
from seer_jax.selection.policies import Dense, Given, Policy
from seer_jax.selection.rules import CumulativeMass, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import SCORERS, LearnedGate, Oracle, Random, SinkWindow, register
from seer_jax.train.step import ModelParts
from tests.convert.test_gates import DECODE_CONFIGS, MODEL, PREFILL_CONFIGS, make_gate
from tests.golden.data import RELEASE, write_gates

PREFILL, DECODE = RELEASE
PREFILL_GATE, DECODE_GATE = PREFILL_CONFIGS[0], DECODE_CONFIGS[0]


def thresholds(*shape: int) -> np.ndarray:
    """Float32 values of which most have no short decimal form."""
    return np.random.default_rng(0).uniform(0, 0.1, shape).astype(np.float32)


# The release's keys say all of these, and nothing else is written.
OF_THE_RELEASE = [
    Threshold(0.02),
    Threshold(5e-4, dense_last_rows=0),
    TopK(0.1),
    TopK(0.5, dense_last_rows=0),
    TokenBudget(4096),
]
OUR_OWN = [
    Dense(),
    CumulativeMass(0.9),
    CumulativeMass(thresholds(3, 1) + 0.5, dense_last_rows=1),
    Threshold(thresholds(3, 4)),
    Threshold(thresholds(3), dense_layers=1),
    Threshold(jnp.asarray(thresholds(1, 4)), Oracle()),
    Threshold(0.0),
    TopK(1.0),
    TopK(0.1, dense_last_rows=1),
    TopK(0.25, Random(seed=7), dense_layers=2),
    TokenBudget(512, SinkWindow()),
    TokenBudget(512, dense_layers=2),
    Given(np.random.default_rng(0).random((3, 1, 4, 5, 5)) < 0.5, block_size=32),
]


def assert_policies_agree(ours: Policy | None, theirs: Policy) -> None:
    """Same class, same static fields, same values of arrays."""
    assert type(ours) is type(theirs)
    for field in dataclasses.fields(theirs):  # pyright: ignore[reportArgumentType]
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if np.ndim(b):
            assert a.dtype == b.dtype and a.shape == b.shape
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("format", list(GateFormat))
@pytest.mark.parametrize("policy", [*OF_THE_RELEASE, *OUR_OWN], ids=lambda p: type(p).__name__)
def test_every_policy_comes_back_with_its_gate(policy: Policy, format: GateFormat, tmp_path: Path):
    by_query_head = np.shape(getattr(policy, "threshold", 0.0))[-1:] == (MODEL.num_heads,)
    for config in (PREFILL_GATE,) if by_query_head else (PREFILL_GATE, DECODE_GATE):
        gate, folder = make_gate(config), tmp_path / type(config).__name__
        gate.recommended = policy
        save_gates(gate, folder, base_model="x", format=format)
        assert_policies_agree(load_gates(folder).recommended, policy)
        assert_policies_agree(load_gates(folder, MODEL).recommended, policy)
        assert_policies_agree(recommended_policy(folder), policy)


@pytest.mark.parametrize("policy", OF_THE_RELEASE, ids=str)
def test_what_the_release_can_say_is_said_in_its_keys(policy: Policy):
    for config in (PREFILL_GATE, DecodeGateConfig()):
        if getattr(policy, "dense_last_rows", 2) == 2 or isinstance(config, PrefillGateConfig):
            assert all(key.startswith("seerattn_") for key in policy_to_hf(policy, config))


@pytest.mark.parametrize("policy", OUR_OWN, ids=str)
def test_what_it_cannot_say_has_a_key_of_its_own(policy: Policy):
    keys = json.loads(json.dumps(policy_to_hf(policy, PREFILL_GATE)))
    assert keys["seer_jax_policy"] == policy_to_json(policy)
    assert policy_from_hf({k: v for k, v in keys.items() if k != "seer_jax_policy"}) is None  # nothing half true


def test_our_own_key_comes_before_those_of_the_release():
    keys = policy_to_hf(Threshold(0.5), PREFILL_GATE) | {"seer_jax_policy": {"rule": "mass", "mass": 0.75}}
    assert policy_from_hf(keys) == CumulativeMass(0.75)
    assert policy_from_hf(keys | {"seer_jax_policy": None}) == Threshold(0.5)


def test_the_release_reads_decode_policies_whatever_their_last_rows():
    """Those are of prompts: the keys of the release mean the same, and ours gives the policy back as it was."""
    keys = policy_to_hf(Threshold(jnp.float32(0.5), dense_last_rows=1), DecodeGateConfig())
    assert {k: v for k, v in keys.items() if k != "seer_jax_policy"} == {
        "seerattn_sparsity_method": "threshold",
        "seerattn_threshold": 0.5,
    }
    assert policy_from_hf(keys) == Threshold(0.5, dense_last_rows=1)


def test_a_named_policy_comes_before_that_of_the_gate(tmp_path: Path):
    gate = make_gate(PREFILL_GATE)
    gate.recommended = CumulativeMass(0.9)
    save_gates(gate, tmp_path, base_model="x", policy=TopK(0.2))
    assert load_gates(tmp_path).recommended == TopK(0.2) and gate.recommended == CumulativeMass(0.9)
    gate.recommended = None
    save_gates(gate, tmp_path, base_model="x")
    assert load_gates(tmp_path).recommended is None
    assert jax.tree.structure(gate) == jax.tree.structure(make_gate(PREFILL_GATE))


def test_scorers_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("seer_jax.selection.scorers.base.SCORERS", SCORERS)
    monkeypatch.delitem(SCORERS, "skewed", raising=False)

    @dataclasses.dataclass(frozen=True)
    class Skewed(LearnedGate):
        name = "skewed"
        slope: float = 0.5

    gate = make_gate(PREFILL_GATE)
    with pytest.raises(ValueError, match="only with a registered scorer"):
        save_gates(gate, tmp_path, base_model="x", policy=TopK(0.5, Skewed(0.25)))
    assert not list(tmp_path.iterdir())
    register(Skewed)
    save_gates(gate, tmp_path, base_model="x", policy=TopK(0.5, Skewed(0.25)))
    assert load_gates(tmp_path).recommended == TopK(0.5, Skewed(0.25))
    del SCORERS["skewed"]
    message = r"seer_jax_policy of config\.json must describe a policy; .*'skewed'.* Import the module that registers it first"
    with pytest.raises(ValueError, match=message):
        load_gates(tmp_path)


# ------------------------------------------------------------------------------------------------------- with the model


@pytest.fixture
def model() -> Transformer:
    model = Transformer(MODEL, dtype=jnp.float32, rngs=nnx.Rngs(0)).attach(*map(make_gate, (PREFILL_GATE, DECODE_GATE)))
    assert model.prefill_gate is not None and model.decode_gate is not None
    model.prefill_gate.recommended, model.decode_gate.recommended = Threshold(thresholds(3, 4)), CumulativeMass(0.9)
    return model


def assert_recommends(model: Transformer) -> None:
    assert model.prefill_gate is not None and model.decode_gate is not None
    assert_policies_agree(model.prefill_gate.recommended, Threshold(thresholds(3, 4)))
    assert model.decode_gate.recommended == CumulativeMass(0.9)


def test_it_stays_with_a_model_that_is_copied_traced_or_trained(model: Transformer):
    assert_recommends(nnx.clone(model))
    assert_recommends(nnx.merge(*nnx.split(model)))
    assert_recommends(jax.jit(lambda model: model)(model))
    parts, trained, frozen = ModelParts.split(model, lambda path, _: path[0] == "decode_gate")
    assert_recommends(parts.merge(trained, frozen))


def test_it_is_used_where_no_policy_is_named(model: Transformer, tmp_path: Path):
    assert model.prefill_gate is not None and model.decode_gate is not None
    save_base(model, tmp_path / "base")
    places = [tmp_path / "prefill", tmp_path / "decode"]
    for place, gate in zip(places, (model.prefill_gate, model.decode_gate), strict=True):
        save_gates(gate, place, base_model="base")
    for abstract in (False, True):
        loaded = from_pretrained(tmp_path / "base", places, dtype=jnp.float32, abstract=abstract)
        assert_recommends(loaded)
        request = Request.of(loaded, max_new_tokens=1, decode=TopK(0.5))
        assert_policies_agree(request.prefill, Threshold(thresholds(3, 4)))
        assert request.decode == TopK(0.5)


# ---------------------------------------------------------------------------------------------------- the release's keys


@pytest.mark.parametrize("name", GATES)
def test_gates_with_a_name_recommend_what_calibration_chose(name: str):
    """A value per layer and head; the model card says which share of the blocks they keep."""
    model = GATES[name][0]
    for kind, folder in named_gates(name).items():
        hf = read_config(folder)
        heads = hf["num_attention_heads" if kind == "prefill" else "num_key_value_heads"]
        policy, made = load_gates(folder).recommended, hf["seer_jax_calibration"]
        assert isinstance(policy, Threshold | CumulativeMass)
        assert (
            np.shape(getattr(policy, policy.value)) == (hf["num_hidden_layers"], heads) and policy.dense_last_rows == 2
        )
        assert made["target"] == {"over": 0.01}
        assert not any(word.startswith("/") for word in made["command"].split())
        card = (model.GATES.parent / "README.md").read_text(encoding="utf-8")
        assert f"at {made['length']} tokens" in card and f"{made['density']:.1%}" in card


def test_policies_of_the_release(tmp_path: Path):
    assert recommended_policy(write_gates(tmp_path / "a", PREFILL)) == Threshold(0.05)
    assert recommended_policy(write_gates(tmp_path / "b", DECODE)) == TokenBudget(256)
    changed = dict(seerattn_sparsity_method="nz_ratio", seerattn_nz_ratio=0.3, seerattn_last_block_dense=False)
    assert recommended_policy(write_gates(tmp_path / "c", PREFILL, **changed)) == TopK(0.3, dense_last_rows=0)
    assert load_gates(tmp_path / "c").recommended == TopK(0.3, dense_last_rows=0)


@pytest.mark.parametrize(
    "keys", [{}, {"sparsity_method": "threshold", "threshold": 0.0}, {"sparsity_method": "nz_ratio", "nz_ratio": 1.0}]
)
def test_defaults_of_the_release_recommend_nothing(keys: dict[str, Any]):
    assert policy_from_hf({f"seerattn_{k}": v for k, v in keys.items()}) is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(sparsity_method="best"), "must be one of threshold, nz_ratio, token_budget; got 'best'"),
        (dict(sparsity_method="threshold"), "'threshold' needs a number as seerattn_threshold; got None"),
        (dict(sparsity_method="nz_ratio", nz_ratio="0.5"), "'nz_ratio' needs a number as seerattn_nz_ratio; got '0.5'"),
        (dict(sparsity_method="token_budget", token_budget=True), "needs a number as seerattn_token_budget; got True"),
        (dict(sparsity_method="threshold", threshold=1.5), r"Threshold.threshold must lie in \[0, 1\); got 1.5"),
    ],
)
def test_wrong_policies_of_the_release_are_refused(keys: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        policy_from_hf({f"seerattn_{k}": v for k, v in keys.items()})


@pytest.mark.parametrize(
    "value",
    [
        {},
        [1],
        {"rule": "best"},
        {"rule": "mass"},
        {"rule": "mass", "mass": 2.0},
        {"rule": "mass", "mass": "much"},
        {"rule": "topk", "density": 0.1, "scorer": {"name": "gate", "seed": 1}},
        {"rule": "topk", "density": 0.1, "layers": 3},
    ],
    ids=str,
)
def test_wrong_policies_of_our_own_are_refused(value: Any, unchecked: None):
    with pytest.raises(
        ValueError, match=r"seer_jax_policy of config\.json must describe a policy; got .*Otherwise remove the key"
    ):
        policy_from_hf({"seer_jax_policy": value})
