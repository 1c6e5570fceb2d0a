"""Generation against full forward passes, and its promises: rows, seeds, ends, streams, compilations, refusals."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seer_jax import Generated, Transformer, pad_prompts, stream
from seer_jax.gates.configs import DecodeGateConfig
from seer_jax.inference.generate import generate
from seer_jax.inference.sampling import Sample, row_keys
from seer_jax.selection.policies import Given, Policy
from seer_jax.selection.rules import CumulativeMass, Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import LearnedGate, Oracle, Random, Scorer, SinkWindow
from tests.seer_jax.conftest import LLAMA, QWEN2, QWEN3, tiny_model

# With blocks of 16: less than one, exactly one, exactly two, and the width of the batch.
LENGTHS = (7, 16, 32, 41)
NEW = 24
SPARSE: dict[str, Any] = dict(prefill=TokenBudget(32), decode=TokenBudget(32))
SAMPLE = Sample(temperature=0.9, top_p=0.95)
NEVER = 63  # an EOS token that no row below happens to draw; the same number of EOS tokens means the same program


pytestmark = pytest.mark.usefixtures("compile_quickly")


@functools.cache
def llama() -> Transformer:
    return tiny_model()


@functools.cache
def prompts() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return pad_prompts([rng.integers(0, NEVER, n).tolist() for n in LENGTHS])


def run(model: Transformer | None = None, **changes: Any) -> Generated:
    tokens, lengths = prompts()
    arguments: dict[str, Any] = dict(tokens=tokens, lengths=lengths, max_new_tokens=NEW, eos=NEVER) | changes
    return generate(model or llama(), **arguments)


def joined(pieces: list[list[list[int]]]) -> list[list[int]]:
    return [[token for piece in pieces for token in piece[row]] for row in range(len(pieces[0]))]


@pytest.mark.parametrize(
    "model", [QWEN2, pytest.param(QWEN3, marks=pytest.mark.slow)], ids=lambda c: c.family, indirect=True
)
def test_greedy_generation_is_the_argmax_of_full_forward_passes(model: Transformer):
    tokens, lengths = prompts()
    forward = jax.jit(lambda model, tokens, lengths: model(tokens, lengths))
    text = np.pad(tokens, ((0, 0), (0, NEW)))
    rows = np.arange(len(LENGTHS))
    for step in range(NEW):
        logits = forward(model, jnp.asarray(text), jnp.asarray(lengths) + step)
        text[rows, lengths + step] = np.asarray(logits)[rows, lengths + step - 1].argmax(-1)
    expected = [text[row, n : n + NEW].tolist() for row, n in enumerate(lengths)]
    generated = run(model, eos=())
    assert generated.rows() == expected
    np.testing.assert_array_equal(generated.lengths, NEW)
    np.testing.assert_array_equal(generated.prefill_kept, np.ones((2, len(LENGTHS))))
    np.testing.assert_array_equal(generated.decode_kept, np.ones((2, len(LENGTHS))))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Threshold(0.0), TokenBudget(80)], ids=str)
def test_policies_that_keep_everything_generate_what_dense_does(policy: Policy):
    generated = run(prefill=policy, decode=policy)
    assert generated.rows() == run().rows()
    np.testing.assert_allclose(generated.prefill_kept, 1)
    np.testing.assert_allclose(generated.decode_kept, 1, rtol=1e-6)


def test_the_report_is_the_mean_share_of_blocks():
    """A sliding window of two blocks with the first: its share follows from the positions alone."""
    generated = run(prefill=TokenBudget(48, SinkWindow()), decode=TokenBudget(48, SinkWindow()))
    for row, n in enumerate(LENGTHS):
        causal = np.arange(1, -(-n // 16) + 1)
        prefill = np.minimum(causal, 3).sum() / causal.sum()
        visible = np.arange(n, n + NEW - 1) // 16 + 1
        decode = np.minimum(visible, 3) / visible
        np.testing.assert_allclose(generated.prefill_kept[:, row], prefill, rtol=1e-6)
        np.testing.assert_allclose(generated.decode_kept[:, row], decode.mean(), rtol=1e-6)
        np.testing.assert_allclose(generated.decode_kept_steps[:, :, row], np.stack([decode] * 2, 1), rtol=1e-6)


def test_layers_and_steps_are_told_apart():
    """The kept share of each layer is that of the mask given for it, at the steps of each row alone."""
    masks = np.zeros((2, len(LENGTHS), 2, 4), bool)
    masks[0, ..., :1] = masks[1, ..., :2] = True
    everything = np.ones((2, len(LENGTHS), 1, 3, 3), bool)  # given too, as in another test, whose program this is
    generated = run(prefill=Given(jnp.asarray(everything), 16), decode=Given(jnp.asarray(masks), block_size=16))
    for row, n in enumerate(LENGTHS):
        visible = np.arange(n, n + NEW - 1) // 16 + 1
        kept = np.stack([1 / visible, np.minimum(visible, 2) / visible], 1)
        np.testing.assert_allclose(generated.decode_kept_steps[:, :, row], kept, rtol=1e-6)


@pytest.mark.slow
def test_dense_first_layers_in_both_phases():
    """As the masks that a window leaves, given for all layers but the first; a stream goes the same way."""
    window = TokenBudget(32, SinkWindow(), dense_layers=1)
    column = np.arange(5)
    row = column[:, None]
    near = (column == row) | (column == 0)
    prefill = np.broadcast_to(near[:3, :3], (2, len(LENGTHS), 1, 3, 3)).copy()
    prefill[0] = True
    generated = run(prefill=window, decode=window)
    given = run(prefill=Given(jnp.asarray(prefill), block_size=16))
    np.testing.assert_allclose(generated.prefill_kept, given.prefill_kept, rtol=1e-6)
    assert [row[0] for row in generated.rows()] == [row[0] for row in given.rows()]
    np.testing.assert_array_equal(generated.prefill_kept[0], 1)
    np.testing.assert_array_equal(generated.decode_kept_steps[:, 0], 1)
    for row, n in enumerate(LENGTHS):
        visible = np.arange(n, n + NEW - 1) // 16 + 1
        np.testing.assert_allclose(generated.decode_kept_steps[:, 1, row], np.minimum(visible, 2) / visible, rtol=1e-6)
    tokens, lengths = prompts()
    pieces = stream(llama(), tokens, lengths, max_new_tokens=NEW, eos=NEVER, prefill=window, decode=window)
    assert joined(list(pieces)) == generated.rows()
    assert generated.rows() != run(prefill=TokenBudget(32, SinkWindow()), decode=TokenBudget(32, SinkWindow())).rows()


@pytest.mark.slow
def test_the_gates_and_the_policys_dense_layers_are_one_choice():
    """The larger count holds while decoding; the prompt knows the policy's alone."""
    model = tiny_model(dataclasses.replace(LLAMA, num_layers=3))
    expected = run(model, prefill=TokenBudget(32), decode=TokenBudget(32, dense_layers=2), eos=())
    model.add_gate(DecodeGateConfig(block_size=16, gate_dim=16, start_layer=1), rngs=nnx.Rngs(2))
    both = run(model, prefill=TokenBudget(32), decode=TokenBudget(32, dense_layers=2), eos=())
    assert both.rows() == expected.rows()
    own = run(model, prefill=TokenBudget(32), decode=TokenBudget(32), eos=())
    dense = np.asarray((own.decode_kept_steps == 1).all((0, 2)))
    np.testing.assert_array_equal(dense, np.arange(3) < 1)
    assert (own.prefill_kept[:, 3] < 1).all()


@pytest.mark.slow
def test_a_budget_of_one_block_keeps_the_current_block():
    layers, batch, kv_heads = 2, len(LENGTHS), 2
    own: dict[str, Any] = dict(
        prefill=Given(jnp.zeros((layers, batch, 1, 3, 3), bool), block_size=16),
        decode=Given(jnp.zeros((layers, batch, kv_heads, 4), bool), block_size=16),
    )
    one = TokenBudget(16, SinkWindow())
    assert run(prefill=one, decode=one).rows() == run(**own).rows()


@pytest.mark.slow
def test_sparse_phases_are_independent():
    dense, both = run(), run(**SPARSE)
    prefill, decode = run(prefill=SPARSE["prefill"]), run(decode=SPARSE["decode"])
    assert (prefill.prefill_kept[:, -1] < 1).all() and (prefill.decode_kept == 1).all()
    assert (decode.prefill_kept == 1).all() and (decode.decode_kept[:, -1] < 1).all()
    # The row of less than a block has nothing to leave out until its 33rd token.
    assert dense.rows()[0][:20] == both.rows()[0][:20] == decode.rows()[0][:20]
    assert dense.rows()[3] != both.rows()[3]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_stream_gives_the_tokens_of_generate(chunk: int):
    tokens, lengths = prompts()
    arguments: dict[str, Any] = dict(SPARSE, max_new_tokens=NEW, sampling=SAMPLE, key=jax.random.key(3), eos=NEVER)
    expected = generate(llama(), tokens, lengths, **arguments)
    # An end in the middle: of a row alone, while others go on.
    arguments["eos"] = expected.rows()[1][9]
    expected = generate(llama(), tokens, lengths, **arguments)
    assert 1 < expected.lengths.min() < expected.lengths.max()
    pieces = list(stream(llama(), tokens, lengths, chunk=chunk, **arguments))
    assert joined(pieces) == expected.rows()
    assert [len(row) for row in pieces[0]] == [1] * len(LENGTHS)
    assert all(len(row) <= chunk for piece in pieces[1:] for row in piece)


@pytest.mark.slow
def test_the_value_of_a_finished_stream_is_what_generate_returns():
    tokens, lengths = prompts()
    pieces = stream(llama(), tokens, lengths, max_new_tokens=NEW, eos=NEVER, chunk=7, **SPARSE)
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            result = stop.value
            break
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(run(**SPARSE)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_stream_passes_its_cache_on(monkeypatch: pytest.MonkeyPatch):
    """Two caches at once would halve the context that fits a device."""
    module, states = sys.modules["seer_jax.inference.generate"], []
    step = module._continue
    monkeypatch.setattr(module, "_continue", lambda *args: states.append(args[2]) or step(*args))
    tokens, lengths = prompts()
    list(stream(llama(), tokens, lengths, max_new_tokens=NEW, eos=NEVER, **SPARSE))
    assert states and all(array.is_deleted() for state in states for array in jax.tree.leaves(state.cache))


def test_a_row_ends_at_its_eos_while_others_go_on():
    free = run(**SPARSE).rows()
    eos = free[2][4]
    generated = run(**SPARSE, eos=eos)
    for row, tokens in enumerate(free):
        n = tokens.index(eos) + 1 if eos in tokens else NEW
        assert generated.lengths[row] == n
        assert generated.tokens[row].tolist() == tokens[:n] + [eos] * (NEW - n)
        assert generated.rows()[row] == tokens[:n]
    assert generated.lengths.min() <= 5 and generated.lengths.max() > 5
    made = np.arange(NEW - 1)[:, None, None] < np.asarray(generated.lengths)[None, None] - 1
    whole = np.asarray(run(**SPARSE).decode_kept_steps)
    np.testing.assert_array_equal(generated.decode_kept_steps, np.where(made, whole, 0))
    assert (whole > 0)[np.broadcast_to(made, whole.shape)].all()
    for row, n in enumerate(generated.lengths):
        np.testing.assert_allclose(generated.decode_kept[:, row], whole[: n - 1, :, row].mean(0), rtol=1e-6)


def test_generation_stops_when_every_row_has_ended():
    model = tiny_model()
    assert model.lm_head is not None
    model.lm_head[...] = jnp.zeros_like(model.lm_head[...])  # every token is 0
    generated = run(model, **SPARSE, eos=0)
    np.testing.assert_array_equal(generated.lengths, 1)
    np.testing.assert_array_equal(generated.tokens, 0)
    np.testing.assert_array_equal(generated.decode_kept, 1)
    np.testing.assert_array_equal(generated.decode_kept_steps, np.zeros((NEW - 1, 2, len(LENGTHS))))
    assert len(list(stream(model, *prompts(), max_new_tokens=NEW, eos=0, chunk=1, **SPARSE))) == 1


def test_the_loop_ends_with_its_last_row(monkeypatch: pytest.MonkeyPatch):
    """Steps after the last row's end would cost as much as any."""
    module, states = sys.modules["seer_jax.inference.generate"], []
    program = module._run
    monkeypatch.setattr(module, "_run", lambda *args: states.append(program(*args)) or states[-1])
    free = run(**SPARSE).rows()
    assert int(states[0].step) == NEW
    ends = tuple(row[3 + i] for i, row in enumerate(free))
    generated = run(**SPARSE, eos=ends)
    assert int(states[1].step) == generated.lengths.max() < NEW


@pytest.mark.slow
def test_one_new_token_needs_no_step():
    generated = run(**SPARSE, max_new_tokens=1)
    assert generated.rows() == [row[:1] for row in run(**SPARSE).rows()]
    assert generated.decode_kept_steps.shape == (0, 2, len(LENGTHS))
    np.testing.assert_array_equal(generated.decode_kept, 1)
    pieces = list(stream(llama(), *prompts(), max_new_tokens=1, eos=NEVER, **SPARSE))
    assert joined(pieces) == generated.rows() and len(pieces) == 1


def test_eos_tokens_and_context_are_the_models_own_unless_given():
    free = run().rows()
    model = tiny_model(dataclasses.replace(LLAMA, eos_token_ids=(free[0][2],), max_position_embeddings=64))
    with pytest.raises(ValueError, match=r"64 tokens; got 41 \+ 24. Shorten"):
        run(model, eos=None)
    assert run(model, eos=None, beyond_context=True).lengths[0] <= 3
    assert run(model, beyond_context=True).rows() == free


@pytest.mark.slow
def test_a_rows_tokens_depend_on_its_own_prompt_and_key():
    tokens, lengths = prompts()
    keys = row_keys(jax.random.key(5), len(LENGTHS))
    together = run(**SPARSE, sampling=SAMPLE, key=jax.random.key(5)).rows()
    assert run(**SPARSE, sampling=SAMPLE, key=keys).rows() == together
    for row in range(len(LENGTHS)):
        one = slice(row, row + 1)
        alone = run(tokens=tokens[one], lengths=lengths[one], **SPARSE, sampling=SAMPLE, key=keys[one])
        assert alone.rows() == together[one]


@pytest.mark.slow
def test_both_gates_together_serve_a_row_as_if_it_were_alone():
    """Prompts of all lengths at once, both phases sparse by their own gates, one row ended early."""
    tokens, lengths = prompts()
    policies: dict[str, Any] = dict(prefill=Threshold(0.2, dense_last_rows=0), decode=CumulativeMass(0.6))
    free = run(**policies).rows()
    eos = next(token for token in free[0] if token not in free[2] + free[3])
    together = run(**policies, eos=eos)
    assert (
        together.lengths[0] < NEW and (together.prefill_kept[:, 3] < 1).all() and (together.decode_kept[:, 3] < 1).all()
    )
    alone = run(tokens=tokens[3:, : lengths[3]], lengths=None, **policies, eos=eos)
    assert alone.rows()[0] == together.rows()[3]
    np.testing.assert_allclose(alone.prefill_kept[:, 0], together.prefill_kept[:, 3], rtol=1e-6)
    np.testing.assert_allclose(alone.decode_kept_steps[..., 0], together.decode_kept_steps[..., 3], rtol=1e-6)


@pytest.mark.slow
def test_random_blocks_of_a_row_do_not_depend_on_its_neighbours():
    _, lengths = prompts()
    shorter = np.minimum(lengths, [9, 9, 9, 41])
    first, second = (run(lengths=n, decode=TokenBudget(32, Random())).rows() for n in (lengths, shorter))
    assert first[3] == second[3] and first[2] != second[2]


def test_seeds_reproduce_and_differ():
    first, again, other = (run(**SPARSE, sampling=SAMPLE, key=jax.random.key(seed)).rows() for seed in (1, 1, 2))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    # Each step draws anew: were its key used twice, nothing but the logits would tell two steps apart.
    flat = Sample(temperature=1e6, top_p=0.95)
    assert all(len(set(row)) > NEW // 3 for row in run(**SPARSE, sampling=flat, key=jax.random.key(0)).rows())


@pytest.mark.slow
def test_only_shapes_and_static_fields_compile_anew(monkeypatch: pytest.MonkeyPatch):
    traces = []
    decode = Transformer.decode
    monkeypatch.setattr(Transformer, "decode", lambda *args, **kwargs: traces.append(1) or decode(*args, **kwargs))

    def count(**changes) -> int:
        before = len(traces)
        arguments: dict[str, Any] = dict(
            max_new_tokens=5, sampling=Sample(0.5), key=jax.random.key(0), decode=Threshold(0.1)
        )
        run(**arguments | changes)
        return len(traces) - before

    tokens, lengths = prompts()
    assert count() == 1
    assert count(tokens=tokens[::-1], lengths=lengths[::-1]) == 0
    assert count(lengths=None) == 0
    # Programs are those of 64 tokens and 64 new ones, with room for 8 EOS tokens.
    assert count(tokens=np.pad(tokens, ((0, 0), (0, 23)))) == 0
    assert count(tokens=np.pad(tokens, ((0, 0), (0, 24)))) == 1
    assert count(max_new_tokens=64, eos=tuple(range(8)), beyond_context=True) == count(eos=()) == 0
    assert count(decode=Threshold(0.3), sampling=Sample(0.9), key=jax.random.key(1), eos=3) == 0
    assert count(model=tiny_model(seed=8)) == 0
    assert count(decode=Threshold(0.1, dense_last_rows=1)) == 1
    assert count(decode=Threshold(0.1, dense_layers=1)) == 1
    assert count(max_new_tokens=65) == 1


def test_masks_are_those_of_the_prompts_whatever_programs_are_made_for():
    """With blocks of 16, a prompt of 41 tokens has 3; its program has room for 4, and its cache for 8."""
    prefill, decode = np.ones((2, len(LENGTHS), 1, 3, 3), bool), np.ones((2, len(LENGTHS), 2, 4), bool)
    result = run(prefill=Given(jnp.asarray(prefill), 16), decode=Given(jnp.asarray(decode), 16), eos=())
    assert result.rows() == run(eos=()).rows()
    np.testing.assert_array_equal(result.prefill_kept, 1)
    np.testing.assert_array_equal(result.decode_kept_steps, 1)


def test_padding_and_capacity_change_nothing():
    tokens, lengths = prompts()
    garbage = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, -100)
    expected = run(**SPARSE).rows()
    assert run(tokens=garbage.astype(np.int64), **SPARSE).rows() == expected
    assert run(cache_capacity=100, **SPARSE).rows() == expected


def damaged(token: int, value: float = np.nan) -> Transformer:
    """A model of which one token's embedding is not finite."""
    model = tiny_model()
    model.embed_tokens[...] = model.embed_tokens[...].at[token].set(value)
    return model


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_whose_logits_are_not_finite_ends_alone(value: float):
    tokens, lengths = prompts()
    row, healthy = 2, run(**SPARSE)
    others = {*np.delete(tokens, row, 0).ravel().tolist(), *(t for i in (0, 1, 3) for t in healthy.rows()[i])}
    model = damaged(next(t for t in tokens[row] if t not in others), value)
    message = r"row 2 at new token 0 hold NaN or infinity \(rows affected: \[2\]\). These rows end there"
    with pytest.warns(RuntimeWarning, match=message):
        result = run(model, **SPARSE)
    with pytest.warns(RuntimeWarning, match=message):
        pieces = joined(list(stream(model, tokens, lengths, max_new_tokens=NEW, eos=NEVER, **SPARSE)))
    expected = [[] if i == row else new for i, new in enumerate(healthy.rows())]
    assert pieces == result.rows() == expected
    assert result.failed.tolist() == [-1, -1, 0, -1]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # indices have 64 bits then
@pytest.mark.parametrize("scorer", [LearnedGate(), Oracle(), Random()], ids=str)
def test_in_jax_64_bit_mode_and_in_chunks_of_rows(scorer: Scorer, monkeypatch: pytest.MonkeyPatch):
    policies: dict[str, Any] = dict(prefill=TopK(0.4, scorer), decode=TokenBudget(32, scorer))
    expected = run(**policies).rows()
    monkeypatch.setattr("seer_jax.models.attention.ROWS_AT_ONCE", 2)
    with jax.enable_x64(True):
        assert run(**policies).rows() == expected


def test_padding_that_is_not_finite_reaches_no_row():
    """Prompts are padded with token 0, whatever the program's width."""
    tokens = np.maximum(prompts()[0], 1)

    def rows(value: float, **policies: Any) -> list[list[int]]:
        model = damaged(0, value)
        assert model.lm_head is not None
        model.lm_head[...] = model.lm_head[...].at[0].set(0.0)  # never the largest logit
        return run(model, tokens=tokens, **policies, eos=()).rows()

    for policies in ({}, SPARSE):
        assert rows(np.nan, **policies) == rows(np.inf, **policies) == rows(0.1, **policies)


def test_where_no_row_has_finite_logits_there_is_an_error():
    model = damaged(0)
    model.embed_tokens[...] = jnp.full_like(model.embed_tokens[...], jnp.nan)
    for function in (generate, lambda *args, **settings: list(stream(*args, **settings))):
        with pytest.raises(ValueError, match=r"rows affected: \[0, 1, 2, 3\]\). The weights are damaged"):
            function(model, *prompts(), max_new_tokens=NEW, eos=NEVER)


def test_a_failure_while_decoding_is_told_by_step():
    free, (tokens, lengths) = run().rows(), prompts()
    token = free[3][6]
    if (tokens[np.arange(tokens.shape[1]) < lengths[:, None]] == token).any():
        pytest.fail("The prompts must not hold the damaged token; choose another seed.")
    made = [row.index(token) + 1 if token in row[:-1] else NEW for row in free]
    with pytest.warns(RuntimeWarning, match=f"at new token {made[np.argmax(np.array(made) < NEW)]} hold NaN"):
        result = run(damaged(token))
    assert result.rows() == [row[:n] for row, n in zip(free, made, strict=True)]
    assert result.failed.tolist() == [n if n < NEW else -1 for n in made]
    steps = np.asarray(result.decode_kept_steps)
    np.testing.assert_array_equal((steps > 0).sum(0), np.broadcast_to(np.array(made) - 1, steps.shape[1:]))
    np.testing.assert_array_equal(result.decode_kept, 1)


BAD = [
    (dict(max_new_tokens=0), "max_new_tokens must be an integer of at least 1; got 0"),
    (dict(tokens=[[1, 2], [3]], lengths=None), r"rows of different lengths.*pad_prompts\(rows\)"),
    (dict(tokens=np.zeros(3, np.int32)), r"integers \[B, T\].*got int32 \(3,\).*batch of one row"),
    (dict(tokens=np.zeros((1, 3), np.float32)), r"got float32 \(1, 3\)"),
    (dict(tokens=np.zeros((1, 0), np.int32)), r"B, T >= 1; got int32 \(1, 0\)"),
    (dict(tokens=np.full((2, 3), 64), lengths=None), r"\[0, 64\).*row 0 has 64 at position 0.*tokenizer"),
    (dict(tokens=np.array([[1, 2], [3, -1]]), lengths=None), "row 1 has -1 at position 1"),
    (dict(lengths=np.array([1, 2])), r"\[B\] with B = 4; got int64 \(2,\)"),
    (dict(lengths=np.ones(4)), r"got float64 \(4,\)"),
    (dict(lengths=[3, 0, 1, 1]), "1 to T = 41 tokens; row 1 has length 0"),
    (dict(lengths=[3, 1, 1, 42]), "row 3 has length 42"),
    (dict(max_new_tokens=8192), r"context of 8192 tokens; got 41 \+ 8192.*beyond_context=True"),
    (dict(cache_capacity=63), ", 64 tokens; got cache_capacity=63. Raise it"),
    (dict(prefill=TopK(0.1)), "the model has no prefill gate"),
    (dict(decode=Threshold(0.1)), "the model has no decode gate"),
    (dict(decode=TokenBudget(64, SinkWindow(), dense_layers=2)), "dense_layers must leave a sparse layer: below 2"),
    (dict(prefill=TokenBudget(8, SinkWindow())), "at least one block of 64 tokens; got 8"),
    (dict(eos=64), r"EOS tokens must lie in \[0, 64\).*got \[64\]"),
    (dict(eos=(1, -1)), r"got \[1, -1\]"),
    (dict(sampling=Sample()), "a key must be given; got None"),
    (dict(sampling=Sample(), key=row_keys(jax.random.key(0), 3)), r"each of the 4 rows; got shape \(3,\)"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
@pytest.mark.parametrize("function", [generate, stream])
def test_bad_requests_are_refused(function, change: dict, message: str):
    tokens, lengths = prompts()
    with pytest.raises(ValueError, match=message):
        pieces = function(
            tiny_model(gates=False), **(dict(tokens=tokens, lengths=lengths, max_new_tokens=NEW) | change)
        )
        next(pieces)  # what only compiling can tell, a stream tells at its first token


def test_a_stream_needs_a_chunk():
    with pytest.raises(ValueError, match="chunk must be an integer of at least 1; got 0"):
        stream(llama(), *prompts(), max_new_tokens=1, chunk=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["prefill", "decode", "sampling"])
def test_choices_are_objects(name: str):
    choice: dict[str, Any] = {name: "dense"}
    with pytest.raises(ValueError, match=f"{name} must be .*got 'dense'"):
        generate(llama(), *prompts(), max_new_tokens=1, **choice)


def test_prompts_are_padded():
    tokens, lengths = pad_prompts([[1, 2, 3], np.array([4])], multiple_of=4)
    np.testing.assert_array_equal(tokens, [[1, 2, 3, 0], [4, 0, 0, 0]])
    np.testing.assert_array_equal(lengths, [3, 1])
    assert tokens.dtype == lengths.dtype == np.int32


BAD_PROMPTS = [
    (dict(prompts=[]), "at least one prompt; got none"),
    (dict(prompts=[[1], []]), "at least one token; prompt 1 is empty. Start it with a BOS"),
    (dict(prompts=[np.array([0.5])]), r"list of integers; prompt 0 is float64 \(1,\)"),
    (dict(prompts=[np.array([[1]])]), r"prompt 0 is int64 \(1, 1\)"),
    (dict(prompts=[[1]], multiple_of=0), "multiple_of must be at least 1 token; got 0"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("arguments", "message"), BAD_PROMPTS, ids=[message for _, message in BAD_PROMPTS])
def test_bad_prompts_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        pad_prompts(**arguments)
