"""Calibrated policies: what the statistics say against the definition, targets, and the choice of levels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seer_jax
from seer_jax import tiny_lm
from seer_jax.calibrate import Quantity, Target, calibrate, calibration, collect, held_out_report
from seer_jax.calibrate.calibration import Choice, Statistics, _measured, losses
from seer_jax.calibrate.choose import cheapest_levels
from seer_jax.calibrate.collect import collect_curves, kept_mass
from seer_jax.calibrate.levels import GRIDS, Curves, rise
from seer_jax.calibrate.sensitivity import output_gradients
from seer_jax.evaluate import score_prompts
from seer_jax.evaluate.levels import Phase
from seer_jax.models.attention import prefill_attention
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense
from seer_jax.selection.scorers import LearnedGate, Quest, Scorer, XAttention
from tests.seer_jax.conftest import tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

TOKENS = np.random.default_rng(0).integers(0, 64, (1, 128)).astype(np.int32)
LEVELS = (0, 30, 55, 70)


@functools.cache
def measured() -> tuple[Transformer, jax.Array]:
    """A tiny random model and gradients of its heads' outputs."""
    model = tiny_model()
    return model, output_gradients(model, jnp.asarray(TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "rule", "scorer"),
    [
        (Phase.PREFILL, "threshold", XAttention()),
        (Phase.DECODE, "mass", LearnedGate()),
        (Phase.PREFILL, "mass", LearnedGate()),
        (Phase.DECODE, "threshold", Quest()),
    ],
)
def test_curves_say_what_policies_keep(phase: Phase, rule: str, scorer: Scorer, monkeypatch: pytest.MonkeyPatch):
    """In the first layer, whose inputs no policy changes, the curves are what the policy itself keeps there, also what its scorer always
    keeps, however few rows are computed at once."""
    if rule == "mass":
        monkeypatch.setattr(collect, "ELEMENTS", 2 * 4 * 16 * 128)  # two rows of blocks
    model, gradients = measured()
    curves = collect_curves(model, jnp.asarray(TOKENS), gradients, scorer, phase=phase, rules=(rule,))[rule]
    found = jax.tree.map(lambda x: x[0], curves)
    heads = 4 if phase is Phase.PREFILL else 2
    assert found.density.shape == (2, heads, len(GRIDS[rule].values))
    shares = jax.jit(lambda policy: model.hidden_states(jnp.asarray(TOKENS), sparsity=policy)[1])
    for level in LEVELS:
        policy = GRIDS[rule].rule(np.full((2, heads), GRIDS[rule].values[level], np.float32), scorer, dense_last_rows=0)
        kept = kept_mass(model, jnp.asarray(TOKENS), policy, phase=phase)
        np.testing.assert_allclose(1 - found.missed[..., level].mean(1), kept[0], atol=1e-5)
        if phase is Phase.PREFILL:
            np.testing.assert_allclose(found.density[0, :, level].mean(), shares(policy)[0, 0], atol=1e-6)
    assert (np.diff(found.density, axis=-1) <= 1e-6).all()
    assert found.loss[..., 0].max() == 0 and found.loss[..., -1].min() > 0


def test_gradients_are_those_of_the_loss():
    """Along a direction, against a difference of losses of the model whose value projection's bias moves one head's output."""
    model, gradients = measured()
    shift = np.random.default_rng(1).normal(size=gradients.shape[3:]).astype(np.float32)

    def loss(step: float) -> float:
        def attend(layer, state, q, k, v):
            context = model.prefill_context(layer, q, k, v, jnp.array([128]))
            out, _ = prefill_attention(Dense(), context)
            return out + (jnp.where(layer.index == 1, step, 0.0) * shift)[None, None], state, None

        hidden, _, _ = model.scan(jnp.asarray(TOKENS), attend)
        log_p = jax.nn.log_softmax(model.logits(hidden[0, :-1]))
        return -float(jnp.take_along_axis(log_p, jnp.asarray(TOKENS[0, 1:, None]), 1).sum())

    expected = (loss(1e-2) - loss(-1e-2)) / 2e-2
    np.testing.assert_allclose((gradients[0, 1] * shift[None]).sum(), expected, rtol=2e-2)


def test_rise_is_quadratic_then_linear():
    np.testing.assert_allclose(rise(jnp.array([0.0, -0.5, 1.0, -3.0])), [0, 0.125, 0.5, 2.5])


def test_levels_spend_blocks_where_they_count():
    """One head loses ten times as much as the other: it keeps more; the mean density is met, and no cheaper choice exists."""
    share = np.linspace(1, 0.1, 10)
    loss = (1 - share) ** 2 * np.array([[[1.0], [10.0]]])
    curves = Curves(np.broadcast_to(share, (1, 2, 10)), np.zeros((1, 2, 10)), loss, loss)
    levels = cheapest_levels(curves, 0.5)
    kept = share[levels[0]]
    assert kept.mean() <= 0.5 + 1e-9 and kept[1] > kept[0]
    pairs = [(i, j) for i in range(10) for j in range(10) if share[i] + share[j] <= 1 + 1e-9]
    assert (
        loss[0, 0, levels[0, 0]] + loss[0, 1, levels[0, 1]]
        <= min(loss[0, 0, i] + loss[0, 1, j] for i, j in pairs) * 1.3
    )
    fixed = cheapest_levels(Curves(*(np.concatenate([x, x]) for x in curves)), 0.75, dense_layers=1)
    np.testing.assert_array_equal(fixed[0], 0)
    with pytest.raises(
        ValueError, match=r"density must be at least 0\.1\d*, what the highest level keeps .*; got 0\.05\. Raise it"
    ):
        cheapest_levels(curves, 0.05)


def test_a_rule_that_cannot_be_so_sparse_is_left_out(monkeypatch: pytest.MonkeyPatch):
    """The least density of all rules is what the message names, rounded up so that it can be met."""

    def reaching(least: float) -> Curves:
        share = np.broadcast_to(np.linspace(1, least, 10), (2, 4, 10))
        return Curves(share, 1 - share, 1 - share, 1 - share)

    curves = {"threshold": reaching(0.12345), "mass": reaching(0.6)}
    found = Statistics(tiny_model(), TOKENS, Phase.PREFILL, LearnedGate(), curves, [curves, curves], 0)
    monkeypatch.setattr(calibration, "_measured", lambda found, choice, *others: float(choice.rule == "threshold"))
    assert calibration._for_density(found, 0.3, print)[0].rule == "threshold"
    assert calibration._for_density(found, 0.7, print)[0].rule == "mass"
    assert calibration._for_density(found, 0.124, print)[0].rule == "threshold"
    with pytest.raises(ValueError, match=r"density must be at least 0\.124 for prefill, .*; got 0\.12\. Raise it"):
        calibration._for_density(found, 0.12, print)


@functools.cache
def bundled() -> tuple[Transformer, np.ndarray]:
    """The bundled model with its gates, and windows of its held-out text."""
    model = seer_jax.from_pretrained("tiny-lm", gates="tiny-lm", dtype="float32")
    text = tiny_lm.eval_text()[:12_000]
    tokens = np.array(seer_jax.load_tokenizer("tiny-lm").encode(text, special_tokens=False), np.int32)
    return model, tokens[: len(tokens) // 1024 * 1024].reshape(-1, 1024)[:1]


@pytest.mark.slow
def test_calibrated_beats_one_threshold():
    """On the calibration text, at equal density."""
    model, windows = bundled()
    found = Statistics.of(model, windows, phase=Phase.PREFILL, scorer=LearnedGate(), rules=["threshold"])
    levels = found.levels(Choice("threshold", 1.0), 0.25)
    assert levels.shape == (8, 8)
    assert found.density("threshold", levels) == pytest.approx(0.25, abs=0.005)
    calibrated, one = found.policy("threshold", levels), found.rivals(0.25)["one threshold"]
    (ours, kept), (theirs, shares) = (losses(model, windows, policy, Phase.PREFILL) for policy in (calibrated, one))
    assert kept.mean() == pytest.approx(0.25, abs=0.02) and shares.mean() == pytest.approx(0.25, abs=0.02)
    assert ours.mean() < theirs.mean()


@pytest.mark.slow
def test_kept_mass_is_met_and_reported():
    model, _ = measured()
    windows = np.concatenate([TOKENS, TOKENS[:, ::-1]])
    found = calibrate(model, windows, Target(Quantity.KEPT_MASS, 0.9), phase=Phase.DECODE)
    assert 0.9 <= found.kept_mass < 0.93 and np.shape(getattr(found.policy, found.policy.value)) == (2, 2)
    report = held_out_report(model, windows, found)
    assert [row.title for row in report.rows] == ["calibrated", "one threshold", "one cumulative mass", "top-k"]
    assert report.rows[0].kept_mass == pytest.approx(found.kept_mass, abs=1e-4)
    assert all(row.interval[0] < row.over < row.interval[1] for row in report.rows)
    assert math.isclose(
        report.dense,
        float(np.exp(np.mean([score_prompts(model, jnp.asarray(w)[None]).nll.mean() for w in windows]))),
        rel_tol=1e-5,
    )


@pytest.mark.parametrize(
    ("quantity", "value", "message"),
    [
        (Quantity.DENSITY, 0.0, r"`density`, the share of the visible blocks .* \(0, 1\]; got 0\.0"),
        (Quantity.OVER, -0.1, r"`over`, the share by which .* above 0; got -0\.1"),
        (Quantity.KEPT_MASS, 1.0, r"`kept_mass`, .* \(0, 1\); got 1\.0"),
    ],
)
def test_targets_check_themselves(quantity: Quantity, value: float, message: str):
    with pytest.raises(ValueError, match=message):
        Target(quantity, value)


def test_losses_are_told_over_dense(monkeypatch: pytest.MonkeyPatch):
    """With their sign, gains too."""
    monkeypatch.setattr(Statistics, "over", lambda *_: -0.0018)
    lines: list[str] = []
    _measured(object.__new__(Statistics), Choice("mass", 1.0), 0.588, lines.append)
    assert [*lines, str(Target(Quantity.OVER, 0.01))] == [
        "mass, caution 1 at 58.8% of the blocks: -0.18% over dense",
        "+1.00% over dense",
    ]


def test_windows_are_whole_blocks():
    with pytest.raises(ValueError, match=r"`length`, .* multiple of the block size 16, from 32 to 8192; got 120"):
        calibrate(tiny_model(), TOKENS[:, :120], Target(Quantity.DENSITY, 0.5), phase=Phase.PREFILL)
