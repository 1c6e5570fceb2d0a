# pyright: reportArgumentType=false
"""Arguments in Python that are none: one line each, with the argument's own name, before anything is compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
import seer_jax
import seer_jax.convert
from pallas_kernels import BlockIndices, block_sparse_attention, sparse_decode_attention, stacked_linear
from seer_jax import (
    CumulativeMass,
    Dense,
    Given,
    LearnedGate,
    Random,
    Sample,
    SinkWindow,
    Threshold,
    TokenBudget,
    TopK,
)
from seer_jax.plots import block_maps
from seer_jax.train import DistillConfig, FinetuneConfig, distill, finetune
from tests.seer_jax.conftest import tiny_model

pytestmark = pytest.mark.usefixtures("unchecked", "compile_quickly")

ROWS, WIDTH = 2, 20
TOKENS = np.ones((ROWS, WIDTH), np.int32)
TOKENIZER = seer_jax.load_tokenizer("tiny-lm")
X, ONES = jnp.ones((1, 2, 64)), jnp.ones(1, jnp.int32)
Q, K = X[None], X[None]
# The arrays of each operation, and its other arguments.
KERNELS: dict[str, dict[str, Any]] = {
    "attention_with_block_scores": dict(q=Q, k=K, v=K, lengths=ONES),
    "pool_blocks": dict(x=Q, valid=None),
    "score_blocks": dict(queries=Q, keys=K),
    "score_sub_blocks": dict(queries=Q, keys=K, seen=ONES),
    "select_blocks": dict(logits=Q, keep=None, visible=None),
    "sparse_decode_attention": dict(q=X, k=K, v=K, lengths=ONES, cache_rows=0 * ONES),
    "stacked_linear": dict(x=X[0]),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "pool_blocks": dict(kinds=("avg",), block_size=64),
    "score_sub_blocks": dict(queries_per_row=1, keys_per_block=1),
    "select_blocks": dict(block_size=64, top_k=1),
    "sparse_decode_attention": dict(blocks=None),
    "stacked_linear": dict(weights=[X], layer=0),
}
WHOLE = "must be an integer of at least 1; got "

GENERATE: list[tuple[Callable[[], dict[str, Any]], str | None]] = [
    # The settings of a request.
    (lambda: dict(key=0), r"key must be a PRNG key, or one for each row; got 0. Pass key=jax.random.key\(0\)"),
    (lambda: dict(key=jnp.zeros(3)), "key must be a PRNG key"),
    (lambda: dict(key=np.zeros((), np.uint32)), "key must be a PRNG key"),
    (lambda: dict(eos="</s>"), "eos must be one token id, several, or .* as integers; got '</s>'"),
    (lambda: dict(eos=2.0), "eos must be one token id.*got 2.0"),
    (lambda: dict(eos=True), "eos must be one token id.*got True"),
    (lambda: dict(eos=[[1, 2]]), "eos must be one token id"),
    (lambda: dict(eos=np.array([1.0, 2.0])), "eos must be one token id"),
    (lambda: dict(eos=np.array([1, 64])), r"EOS tokens must lie in \[0, 64\).*got \[1, 64\]"),
    (lambda: dict(max_new_tokens=2.0), f"max_new_tokens {WHOLE}2.0"),
    (lambda: dict(max_new_tokens=True), f"max_new_tokens {WHOLE}True"),
    (lambda: dict(max_new_tokens="8"), f"max_new_tokens {WHOLE}'8'"),
    (lambda: dict(max_new_tokens=np.int64(0)), f"max_new_tokens {WHOLE}.*0"),
    (lambda: dict(max_new_tokens=None), f"max_new_tokens {WHOLE}None"),
    (lambda: dict(max_new_tokens=10**12, beyond_context=True), "max_new_tokens must be at most 2147483647; got 1000000000000"),
    (lambda: dict(cache_capacity=2**31), "cache_capacity must be at most 2147483647; got 2147483648"),
    (lambda: dict(prefill=TopK(0.1)), "topk:0.1 ranks .* the model has no prefill gate; load one"),
    (lambda: dict(decode=TokenBudget(63, SinkWindow())), "A token budget must hold at least one block of 64 tokens; got 63"),
    (lambda: dict(max_tokens=8), "settings must be some of max_new_tokens, .*; got max_tokens. Did you mean max_new_tokens?"),
    (lambda: dict(cache_capacity=64.0), f"cache_capacity {WHOLE}64.0"),
    (lambda: dict(beyond_context="no"), "beyond_context must be True or False; got 'no'"),
    (lambda: dict(prefill="topk:0.1"), r"prefill must be a sparsity policy .*; got 'topk:0.1'. .*seer_jax.parse_policy\(text\)"),
    (lambda: dict(decode=TopK), "decode must be a sparsity policy"),
    (lambda: dict(decode=0.1), "decode must be a sparsity policy .*; got 0.1"),
    (lambda: dict(sampling=0.7), r"sampling must be Greedy\(\) or Sample\(temperature, ...\); got 0.7"),
    (lambda: dict(sampling=Sample), "sampling must be"),
    # The prompts.
    (lambda: dict(tokens="import"), r"tokens must be integers \[B, T\]"),
    (lambda: dict(tokens=[[1.0, 2.0]]), r"tokens must be integers \[B, T\] .*; got float64 \(1, 2\)"),
    (lambda: dict(tokens=[1, 2]), r"tokens must be integers \[B, T\] .*; got int64 \(2,\). A single prompt is a batch of one row"),
    (lambda: dict(tokens=np.ones((1, 2, 3), int)), r"tokens must be integers \[B, T\] .*; got int64 \(1, 2, 3\)"),
    (lambda: dict(tokens=np.ones((1, 2), bool)), r"tokens must be integers \[B, T\] .*; got bool"),
    (lambda: dict(tokens=seer_jax.pad_prompts([[1, 2, 3]])), r"rows of different lengths. .*pad_prompts\(rows\)"),
    (lambda: dict(lengths=[20.0, 20.0]), r"lengths must be integers \[B\] with B = 2; got float64"),
    (lambda: dict(lengths=[[20, 20]]), r"lengths must be integers \[B\] with B = 2; got int64 \(1, 2\)"),
    # Policies and the model.
    (lambda: dict(decode=Threshold(np.full(9, 0.1), SinkWindow())), r"Threshold.threshold must be a number, \[L\] = \[2\], .*; got shape \(9,\)"),
    (lambda: dict(prefill=CumulativeMass(np.full((2, 9), 0.5), SinkWindow())), r"CumulativeMass.mass must be a number.*got shape \(2, 9\)"),
    (lambda: dict(prefill=Given(np.ones((2, ROWS, 1, 1, 1), bool))), None),
    (lambda: dict(prefill=Given(np.ones((1, ROWS, 1, 1, 1), bool))), r"Given.mask must be bool .* with L = 2; got bool \(1,"),
    (lambda: dict(prefill=Given(np.ones((60, ROWS, 1, 1, 1), bool))), r"Given.mask must be bool .* with L = 2; got bool \(60,"),
    (lambda: dict(prefill=Given(np.ones((ROWS, 1, 1, 1), bool))), r"Given.mask must be \[L, B, Hs, Tb, Sb\] for prefill.*got shape \(2, 1, 1, 1\)"),
    (lambda: dict(prefill=Given(np.ones((2, ROWS, 1, 1, 1)))), "Given.mask must be bool .*; got float64"),
    (lambda: dict(prefill=Given(np.ones((2, 3, 1, 1, 1), bool))), "Given.mask .* for prefill, with 2 rows, .*; got shape"),
    (lambda: dict(prefill=Given(np.ones((2, ROWS, 3, 1, 1), bool))), "Given.mask .*, 1 or 2 or 4 lists and 1 blocks of 64 tokens; got"),
    (lambda: dict(prefill=Given(np.ones((2, ROWS, 1, 1, 1), bool), 16)), "Given.mask .* and 2 blocks of 16 tokens; got"),
    (lambda: dict(decode=Given(np.ones((2, ROWS, 4, 1), bool))), "Given.mask .* for decode, with 2 rows, 2 lists and 1 blocks"),
    (lambda: dict(decode=Given(np.ones((2, ROWS, 2, 2), bool))), "Given.mask .* for decode, .* and 1 blocks of 64 tokens; got"),
    (lambda: dict(model="tiny-lm"), r"model must be a Transformer; got 'tiny-lm'. Load one: seer_jax.from_pretrained"),
    (lambda: dict(model=seer_jax.from_pretrained("tiny-lm", dtype="float32", abstract=True)), "model must have weights"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"), GENERATE, ids=[f"{i}: {message}" for i, (_, message) in enumerate(GENERATE)]
)
def test_generate(change: Callable[[], dict[str, Any]], message: str | None):
    arguments: dict[str, Any] = dict(model=tiny_model(gates=False), tokens=TOKENS, max_new_tokens=8) | change()
    if message is None:
        seer_jax.stream(**arguments)
        return
    with pytest.raises(ValueError, match=message):
        seer_jax.stream(**arguments)  # as `generate`, but it would not run what it takes


MAKE: list[tuple[Callable[[], Any], str]] = [
    *(
        (lambda value=value: Threshold(value), rf"Threshold.threshold must {must}")
        for value, must in [
            ("x", "be a number or an array; got 'x'"),
            ([0.1], r"be a number or an array; got \[0.1\]. Wrap it in jnp.asarray"),
            (True, "be a number or an array; got True"),
            (0.1 + 0j, "be a number or an array; got"),
            (np.array([0.1 + 0j]), r"hold real numbers; got complex128 \(1,\)"),
            (np.array([True]), "hold real numbers; got bool"),
            (np.array([0.1, "x"], object), "hold real numbers; got object"),
            (np.array(["x"]), "hold real numbers; got <U1"),
            (float("nan"), r"lie in \[0, 1\); got nan"),
            (jnp.asarray([0.1, jnp.nan]), r"lie in \[0, 1\)"),
            (np.array([0.1, 1.0]), r"lie in \[0, 1\); got 1.0\.$"),
            (np.full((30, 9), 1.5), r"lie in \[0, 1\); got 1.5\.$"),
            ([0.1] * 30, r"be a number or an array; got \[0.1, 0.1, 0.1, \.\.\.\]. Wrap it in jnp.asarray"),
        ]
    ),
    (lambda: CumulativeMass(0), r"CumulativeMass.mass must lie in \(0, 1\]; got 0"),
    (lambda: TopK(float("nan")), r"TopK.density, .*, must lie in \(0, 1\]; got nan"),
    (lambda: TopK("0.1"), r"TopK.density, .* must lie in \(0, 1\]; got '0.1'"),
    (lambda: TopK(True), r"TopK.density, .* must lie in \(0, 1\]; got True"),
    (lambda: TopK(np.array([0.1])), "TopK.density, .* must lie in"),
    (lambda: TopK(0.1j), "TopK.density, .* must lie in"),
    (lambda: TopK(0.1, "oracle"), r"TopK.scorer must be a scorer such as LearnedGate\(\) or Oracle\(\); got 'oracle'"),
    (lambda: TopK(0.1, LearnedGate), "TopK.scorer must be a scorer"),
    (lambda: TopK(0.1, dense_layers=1.0), "TopK.dense_layers must be an integer of at least 0; got 1.0"),
    (lambda: Threshold(0.1, dense_last_rows=-1), "Threshold.dense_last_rows must be an integer of at least 0; got -1"),
    (lambda: TokenBudget(0.5), f"TokenBudget.tokens {WHOLE}0.5"),
    (lambda: TokenBudget("4096"), f"TokenBudget.tokens {WHOLE}'4096'"),
    (lambda: TokenBudget(True), f"TokenBudget.tokens {WHOLE}True"),
    (lambda: TokenBudget(64, skip="0.1"), "TokenBudget.skip must be a number or None; got '0.1'"),
    (lambda: Dense(skip=True), "Dense.skip must be a number or None; got True"),
    (lambda: TokenBudget(64, dense_layers="2"), "TokenBudget.dense_layers must be an integer of at least 0; got '2'"),
    (lambda: TokenBudget(10**20), "TokenBudget.tokens must be at most 2147483647; got 100000000000000000000"),
    (lambda: TopK(0.1, dense_last_rows=2**31), "TopK.dense_last_rows must be at most 2147483647; got 2147483648"),
    (lambda: Random(2**32), "Random.seed must be at most 4294967295; got 4294967296"),
    (lambda: DistillConfig(seed=2**32), "DistillConfig.seed must be at most 4294967295; got 4294967296"),
    (lambda: distill("tiny-lm"), r"config must be a DistillConfig; got 'tiny-lm'. Make one: DistillConfig\(model=\.\.\.\)"),
    (lambda: distill(FinetuneConfig(model="x")), "config must be a DistillConfig; got FinetuneConfig"),
    (lambda: finetune(DistillConfig(model="x")), "config must be a FinetuneConfig; got DistillConfig"),
    (lambda: distill(DistillConfig(), model="tiny-lm"), "model must be a Transformer; got 'tiny-lm'. Load one"),
    (lambda: seer_jax.convert.save_base(None, "/proc/x"), "model must be a Transformer; got None"),
    (lambda: seer_jax.convert.save_base(tiny_model().decode_gate, "/proc/x"), "model must be a Transformer; got DecodeGate"),
    (lambda: seer_jax.plan_memory(tiny_model(), 2**31, 8, max_new_tokens=1), "batch must be at most 2147483647"),
    (lambda: Random("x"), "Random.seed must be an integer of at least 0; got 'x'"),
    (lambda: Given([[True]]), r"Given.mask must be a bool array; got \[\[True\]\]. Wrap it in jnp.asarray"),
    (lambda: Given(np.ones((2, 1, 1, 1, 1), bool), 48), "block_size must be one of .*; got 48"),
    (lambda: Given(np.ones((9, 9), bool).tolist()), r"Given.mask must be a bool array; got .{9,150}\. Wrap"),
    (lambda: tiny_model()(TOKENS, sparsity=Given(None)), "Given.mask must be a bool array; got None"),
    (lambda: seer_jax.parse_policy(5), "A policy must be written as text, such as 'topk:0.1'; got 5"),
    (lambda: seer_jax.from_pretrained(None), "A model must be named by a folder or a hub id, as text or Path; got None"),
    (lambda: seer_jax.from_pretrained("tiny-lm", gates=5, abstract=True), "gates must be named by folders or hub ids, .*; got 5"),
    (lambda: seer_jax.from_pretrained("tiny-lm", gates=[None], abstract=True), r"gates must be named .*; got \[None\]"),
    (lambda: seer_jax.from_pretrained("tiny-lm", revision="v2"), "revision must be that of a hub id; got 'v2' for 'tiny-lm'"),
    (lambda: seer_jax.load_generation_settings(5), "A model must be named .*; got 5"),
    (lambda: save(gate=None), "gate must be a PrefillGate or a DecodeGate; got None"),
    (lambda: save(folder=None), "folder must be text or a path; got None"),
    (lambda: save(base_model=None), "base_model must be text or a path; got None"),
    (lambda: save(format="torch"), "format must be one of pth, safetensors; got 'torch'"),
    (lambda: save(dtype="int8"), "dtype must be bfloat16 or float32; got 'int8'"),
    (lambda: save(policy="topk:0.1"), r"policy must be a sparsity policy .*; got 'topk:0.1'\. Text becomes one by seer_jax.parse_policy"),
    (lambda: TOKENIZER.encode(5), "A text must be of type str; got 5"),
    (lambda: TOKENIZER.decode("x"), r"Tokens of a text must be integers \[T\]; got 'x'"),
    (lambda: TOKENIZER.decode([0.5]), r"Tokens of a text must be integers \[T\]; got \[0.5\]"),
    (lambda: TOKENIZER.decode([10**7]), r"Tokens must lie in \[0, \d+\), .*; got 10000000"),
    (lambda: TOKENIZER.decode([-1]), r"Tokens must lie in \[0, \d+\), .*; got -1"),
    *(
        (lambda name=name, change=change: call_kernel(name, change), rf"{name}: {change} must be an array; got list\. Convert it")
        for name, arguments in KERNELS.items()
        for change in arguments
    ),
    (lambda: block_sparse_attention(X[None], X[None], X[None], X), "blocks must be BlockIndices; got .*Array.* BlockIndices.from_mask"),
    (lambda: sparse_decode_attention(X, X[None], X[None], X, lengths=ONES), "blocks must be BlockIndices; got Array"),
    *(
        (lambda n=n: sparse_decode_attention(X, K, K, None, lengths=ONES * n), rf"lengths must lie in \[0, 1\], .*; got {n}\.")
        for n in (3, -1)
    ),
    (lambda: sparse_decode_attention(X, X[None], X[None], None, lengths=1000), "lengths must be an array; got int"),
    (lambda: stacked_linear(X[0], [[1.0]], 0), r"stacked_linear: weights\[0\] must be an array; got list"),
    (lambda: BlockIndices([1], [[1]], 64), "BlockIndices: counts must be an array; got list"),
    (lambda: BlockIndices.from_mask([[True]], block_size=64), "from_mask: mask must be an array; got list"),
    (lambda: Sample("hot"), "temperature must be one number; got 'hot'"),
    (lambda: Sample(True), "temperature must be one number; got True"),
    (lambda: Sample(np.ones(2)), "temperature must be one number"),
    (lambda: Sample(float("nan")), "temperature must be positive and finite; got nan"),
    (lambda: Sample(top_k=2.0), "top_k must be an integer of at least 1, or None for all tokens; got 2.0"),
    (lambda: Sample(top_p="0.9"), "top_p must be one number; got '0.9'"),
    (lambda: seer_jax.from_pretrained("tiny-lm", dtype="bf16"), "dtype must be bfloat16 or float32; got 'bf16'"),
    (lambda: seer_jax.from_pretrained("tiny-lm", dtype=jnp.float16), "dtype must be bfloat16 or float32; got .*float16"),
    (lambda: seer_jax.stream(tiny_model(), TOKENS, max_new_tokens=1, chunk=2.0), f"chunk {WHOLE}2.0"),
    (lambda: seer_jax.plan_memory(tiny_model(), 2.0, 8, max_new_tokens=1), f"batch {WHOLE}2.0"),
    (lambda: seer_jax.generate(tiny_model(), TOKENS), f"max_new_tokens {WHOLE}none"),
    (lambda: tiny_model()([[1.0]]), r"tokens must be integers \[B, T\]"),
    (lambda: tiny_model()([[1, 2], [3]]), r"rows of different lengths. .*pad_prompts\(rows\)"),
    (lambda: tiny_model()(TOKENS, sparsity="dense"), "sparsity must be a sparsity policy such as .*; got 'dense'"),
    (lambda: tiny_model().attach("gate"), "A gate must be a PrefillGate or a DecodeGate; got 'gate'"),
    (lambda: tiny_model().make_cache(1, 2.0), "A cache's capacity must be an integer of at least 1; got 2.0"),
    (lambda: block_maps(tiny_model(), [[1, 2]], TopK(0.1)), r"tokens must be integers \[T\], one prompt; got shape \(1, 2\)"),
    (lambda: block_maps(tiny_model(), [0.5], TopK(0.1)), r"tokens must be integers"),
    (lambda: block_maps(tiny_model(), [1, 99], TopK(0.1)), r"Tokens must lie in \[0, 64\)"),
    (lambda: block_maps(tiny_model(), [1, 2], "topk:0.1"), r"policy must rank blocks, as TopK\(0.1\) does; got 'topk:0.1'"),
    (lambda: recommend("topk:0.1"), "recommended must be a sparsity policy such as .*; got 'topk:0.1'"),
    (lambda: recommend(Threshold(np.full(9, 0.1))), r"Threshold.threshold must be .*; got shape \(9,\)"),
    (lambda: recommend(TopK(0.1, dense_layers=2)), "dense_layers must leave a sparse layer: below 2"),
]  # fmt: skip


def save(**changes: Any) -> None:
    given: dict[str, Any] = dict(gate=tiny_model().prefill_gate, folder="/proc/x", base_model="x") | changes
    seer_jax.convert.save_gates(given.pop("gate"), given.pop("folder"), **given)


def call_kernel(name: str, change: str) -> None:
    """Calls an operation with a list in place of one of its arrays."""
    arguments = KERNELS[name]
    getattr(pallas_kernels, name)(**(arguments | {change: [1.0]}), **SETTINGS.get(name, {}))


def recommend(policy: Any) -> None:
    gate = tiny_model().prefill_gate
    assert gate is not None
    gate.recommended = policy


@pytest.mark.parametrize(("make", "message"), MAKE, ids=[f"{i}: {message}" for i, (_, message) in enumerate(MAKE)])
def test_wrong_values(make: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_is_meant_is_taken():
    """NumPy's integers, arrays and lists where numbers are asked for: the same request as with Python's own; texts of numbers in settings."""
    assert DistillConfig(recall_density="0.7%") == DistillConfig(recall_density=0.007)
    model = tiny_model()
    plain = list(seer_jax.stream(model, TOKENS, max_new_tokens=4, eos=2, decode=TokenBudget(32)))
    numpy: dict[str, Any] = dict(max_new_tokens=np.int64(4), eos=np.array([2]), decode=TokenBudget(np.int32(32)))
    assert list(seer_jax.stream(model, TOKENS.tolist(), np.full(ROWS, WIDTH, np.uint8), **numpy)) == plain
    assert list(seer_jax.stream(model, jnp.asarray(TOKENS), **numpy, key=jax.random.PRNGKey(0))) == plain
