"""The model of lm-evaluation-harness: likelihoods and continuations are the model's own, and the class answers the harness's requests."""

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seer_jax import generate
from seer_jax.evaluate.harness import __main__ as program
from seer_jax.evaluate.harness import adapter
from seer_jax.evaluate.harness import tasks as harness_tasks
from seer_jax.evaluate.harness.model import HarnessModel
from seer_jax.evaluate.tasks import Outcome
from seer_jax.evaluate.tasks.run import TaskPolicy
from seer_jax.inference.text import Tokenizer
from seer_jax.models.decoder import Transformer
from seer_jax.selection.policies import Dense
from seer_jax.selection.rules import TokenBudget, TopK
from seer_jax.selection.scorers import SinkWindow
from tests.seer_jax.conftest import tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly", "unchecked")
BOS = 3
SPARSE = TopK(0.1, SinkWindow(), dense_last_rows=1)  # the row of the last token, not of the padding


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Letters are tokens, so that likelihoods can be worked out; "<b>" is BOS."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    letters = [chr(i) for i in range(97, 123)] + list(" .\n?")
    vocab = {"<e>": 0, "?": 1, "<pad>": 2, "<b>": BOS} | {c: i + 4 for i, c in enumerate(letters) if c != "?"}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<e>", "<b>"])
    backend.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", BOS)])
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}.{% endfor %}"
    return Tokenizer(
        backend, special={"bos_token": "<b>"}, chat_templates={"default": template}, place="folder/letters"
    )


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model()


@pytest.fixture(scope="module")
def wrapped(model: Transformer, tokenizer: Tokenizer) -> HarnessModel:
    return HarnessModel(model, tokenizer, Dense(), Dense(), batch_size=2, max_length=48)


def reference(model: Transformer, tokens: list[int], scored: int) -> tuple[float, bool]:
    """Log-probability of the last tokens by the logits of all positions."""
    logp = np.asarray(jax.nn.log_softmax(model(jnp.array([tokens]))[0].astype(jnp.float32)))[:-1]
    targets = np.array(tokens[1:])
    chosen = logp[np.arange(len(targets)), targets]
    return float(chosen[-scored:].sum()), bool((logp.argmax(-1) == targets)[-scored:].all())


def test_loglikelihood(wrapped: HarnessModel, tokenizer: Tokenizer, model: Transformer):
    best = tokenizer.encode("abc")
    best = [*best, int(model(jnp.array([best]))[0, -1].argmax())]
    pairs = [("ab", "cd"), ("", "hello"), ("good day ", "to"), ("a" * 30, "z"), ("abc", tokenizer.decode(best[-1:]))]
    found = wrapped.loglikelihood(pairs)
    expected = [
        reference(model, tokenizer.encode("abcd"), 2),
        reference(model, [BOS, *tokenizer.encode("hello", special_tokens=False)], 5),
        reference(model, tokenizer.encode("good day to"), 3),  # the space belongs to the continuation
        reference(model, tokenizer.encode("a" * 30 + "z"), 1),
        reference(model, best, 1),
    ]
    np.testing.assert_allclose([f.logprob for f in found], [logprob for logprob, _ in expected], rtol=1e-4)
    assert [f.is_greedy for f in found] == [greedy for _, greedy in expected]
    assert found[-1].is_greedy and not found[0].is_greedy
    assert wrapped.loglikelihood([]) == []


@pytest.mark.slow
def test_prompts_that_are_too_long_lose_their_beginning(
    wrapped: HarnessModel, tokenizer: Tokenizer, model: Transformer
):
    text = "abcdefghij" * 8
    with pytest.warns(
        UserWarning,
        match="1 of 2 prompts exceed the context and lose their beginning: up to 83 tokens, at least 48 are kept",
    ):
        found, _ = wrapped.loglikelihood([(text, "xy"), ("a", "b")])
    assert found.logprob == pytest.approx(reference(model, tokenizer.encode(text + "xy")[-48:], 2)[0], rel=1e-4)
    with pytest.warns(UserWarning, match="1 of 1 prompts .* up to 81 tokens, at least 40 are kept"):
        (text,) = wrapped.generate_until([(text, {"max_gen_toks": 8})])
    assert len(text) <= 8
    with pytest.raises(ValueError, match="1 to 47 tokens, as the context has 48; got 0 of ''"):
        wrapped.loglikelihood([("a", "")])
    with pytest.raises(ValueError, match="got 60 of 'bbb"):
        wrapped.loglikelihood([("a", "b" * 60)])
    with pytest.raises(
        ValueError, match=r"leave room for the prompt in the context of 48 tokens; got 48\. Lower max_gen_toks"
    ):
        wrapped.generate_until([("a", {"max_gen_toks": 48})])


def test_rolling_predicts_each_token_once(wrapped: HarnessModel, tokenizer: Tokenizer, model: Transformer):
    short, long = "hello there", "the quick brown fox jumps over the lazy dog " * 3
    tokens = [[BOS, *tokenizer.encode(text, special_tokens=False)] for text in (short, long)]
    assert len(tokens[1]) == 133
    # Windows of 48 tokens predict 47, 47, and of the last 38 tokens each sees what came before in a window of 48.
    windows = [(tokens[1][:48], 47), (tokens[1][47:95], 47), (tokens[1][-48:], 38)]
    expected = [reference(model, tokens[0], len(short))[0], sum(reference(model, *window)[0] for window in windows)]
    np.testing.assert_allclose(wrapped.loglikelihood_rolling([short, long]), expected, rtol=1e-4)
    assert wrapped.loglikelihood_rolling([""]) == [0.0]


@pytest.mark.slow
def test_policies(model: Transformer, tokenizer: Tokenizer):
    """Likelihoods are those of the prefill policy; the decode policy plays no part in them."""
    text = "the quick brown fox jumps over the lazy dog and then sleeps all day long under a tree at noon"
    budget = TokenBudget(16, SinkWindow())
    by = {
        name: HarnessModel(model, tokenizer, *policies, batch_size=1, max_length=128)
        for name, policies in dict(
            dense=(Dense(), Dense()), decode=(Dense(), budget), prefill=(SPARSE, Dense())
        ).items()
    }
    found = {name: one.loglikelihood([(text, " well")])[0].logprob for name, one in by.items()}
    assert found["dense"] == found["decode"]
    tokens = jnp.array([tokenizer.encode(text + " well")])
    logp = jax.nn.log_softmax(model(tokens, sparsity=SPARSE)[0].astype(jnp.float32))
    expected = float(sum(logp[i - 1, tokens[0, i]] for i in range(tokens.shape[1] - 5, tokens.shape[1])))
    assert found["prefill"] == pytest.approx(expected, rel=1e-4) and found["prefill"] != pytest.approx(
        found["dense"], rel=1e-4
    )
    by["decode"].generate_until([(text, {"max_gen_toks": 20})])
    assert by["decode"].kept["prefill"] == [1, 1] and by["decode"].kept["decode"][0] < 1
    assert by["prefill"].kept["prefill"][0] < 1
    # Without policies those that the gates recommend, otherwise dense attention.
    gated = tiny_model()
    assert gated.decode_gate is not None
    gated.decode_gate.recommended = TokenBudget(32)
    default = HarnessModel(gated, tokenizer)
    assert (default.prefill, default.decode, default.context) == (Dense(), TokenBudget(32), gated.config.context)


def test_continuations_are_those_of_generate(wrapped: HarnessModel, tokenizer: Tokenizer, model: Transformer):
    prompts = ["hello", "a much longer prompt", "x"]
    whole = [
        tokenizer.decode_known(generate(model, [tokenizer.encode(p)], max_new_tokens=12).rows()[0]) for p in prompts
    ]
    assert wrapped.generate_until([(p, {"max_gen_toks": 12}) for p in prompts]) == whole
    stops = [text[3:5] for text in whole]
    asked = [
        (p, {"max_gen_toks": 12, "until": ["@", stop], "do_sample": False})
        for p, stop in zip(prompts, stops, strict=True)
    ]
    assert wrapped.generate_until(asked) == [text[: text.index(stop)] for text, stop in zip(whole, stops, strict=True)]
    assert wrapped.generate_until([(prompts[0], {"max_gen_toks": 2, "until": whole[0][0]})]) == [""]


@pytest.mark.slow
def test_random_continuations_depend_on_seed_and_number_alone(model: Transformer, tokenizer: Tokenizer):
    draw = {"max_gen_toks": 8, "temperature": 2.0, "top_k": 20}
    of = lambda seed, size: HarnessModel(model, tokenizer, Dense(), Dense(), size, 48, seed=seed).generate_until(  # noqa: E731
        [("abc", draw)] * 3
    )
    first = of(1, 3)
    assert len(set(first)) > 1 and first == of(1, 2) != of(2, 3)


def test_settings_are_checked(wrapped: HarnessModel):
    with pytest.raises(ValueError, match=r"some of until, do_sample, .*; got num_beams"):
        wrapped.generate_until([("a", {"num_beams": 4})])
    for name, value in (("batch_size", 0), ("max_length", 1), ("seed", -1), ("new_tokens", 0)):
        with pytest.raises(ValueError, match=f"{name} must be an integer"):
            dataclasses.replace(wrapped, **{name: value})
    with pytest.raises(ValueError, match="max_length must be at most 8192, the model's context; got 9000"):
        dataclasses.replace(wrapped, max_length=9000)
    assert dataclasses.replace(wrapped, max_length=9000, beyond_context=True).context == 9000


# The package itself is large. Its interface to models is four names, which stand here.


class LM:
    def __init__(self) -> None:
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *arguments: None)


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A stand-in of lm-evaluation-harness; yields the models that it knows."""
    known: dict[str, Any] = {}

    def register_model(name: str) -> Callable[[type], type]:
        def keep(kind: type) -> type:
            assert issubclass(kind, LM)
            return known.setdefault(name, kind)

        return keep

    contents = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": dict(LM=LM),
        "lm_eval.api.registry": dict(register_model=register_model),
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    adapter.harness_class.cache_clear()
    yield known
    adapter.harness_class.cache_clear()


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [types.SimpleNamespace(args=one) for one in arguments]


def test_the_class_answers_requests(lm_eval: dict[str, Any], wrapped: HarnessModel):
    adapter.harness_class()
    lm = lm_eval["seer-jax"](wrapped)
    answers: list[Any] = []
    lm.cache_hook = types.SimpleNamespace(add_partial=lambda kind, args, answer: answers.append((kind, args, answer)))
    found = lm.loglikelihood(requests(("ab", "cd"), ("x", "y")))
    assert found == [tuple(one) for one in wrapped.loglikelihood([("ab", "cd"), ("x", "y")])]
    assert lm.loglikelihood_rolling(requests(("hello",))) == wrapped.loglikelihood_rolling(["hello"])
    asked = ("hello", {"max_gen_toks": 4, "until": []})
    assert lm.generate_until(requests(asked)) == wrapped.generate_until([asked])
    assert [kind for kind, *_ in answers] == ["loglikelihood"] * 2 + ["loglikelihood_rolling", "generate_until"]
    history = [dict(role="user", content="hi"), dict(role="assistant", content="it is")]
    assert lm.apply_chat_template(history) == "user: hi.assistant: it is."
    assert lm.apply_chat_template(history, add_generation_prompt=False) == "user: hi.assistant: it is"
    assert lm.tokenizer_name == "folder__letters"
    assert lm.chat_template(True) == wrapped.tokenizer.chat_templates["default"] and lm.chat_template(False) == ""


def test_the_class_takes_arguments_of_a_command_line(
    lm_eval: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
):
    loaded: list[Any] = []

    def load(*arguments: Any, **settings: Any) -> Transformer:
        loaded.append((arguments, settings))
        return tiny_model()

    monkeypatch.setattr(adapter, "from_pretrained", load)
    monkeypatch.setattr(adapter, "load_tokenizer", lambda *arguments, **settings: tokenizer)
    lm = adapter.harness_class()(
        pretrained="base",
        gates="one;two",
        prefill="topk:0.5;dense_last_rows=0",
        batch_size="4",
        max_length="99",
        device=None,
    )
    ((name, gates), settings) = loaded[0]
    assert (name, gates, settings["revision"]) == ("base", ["one", "two"], None)
    assert lm.wrapped.prefill == TopK(0.5, dense_last_rows=0) and lm.wrapped.decode == Dense()
    assert (lm.wrapped.batch_size, lm.wrapped.context) == (4, 99)
    with pytest.raises(ValueError, match="batch_size must be an integer; got 'auto'"):
        adapter.harness_class()(batch_size="auto")
    with pytest.raises(ValueError, match="Arguments of the model seer-jax must be known; got tensor_parallel_size"):
        adapter.harness_class()(tensor_parallel_size=2)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    adapter.harness_class.cache_clear()
    assert program.main() == 1
    assert capsys.readouterr().err.endswith("Install it: pip install 'seer-jax[eval]'.\n")


def test_scores_of_the_harness(
    lm_eval: dict[str, Any], monkeypatch: pytest.MonkeyPatch, model: Transformer, tokenizer: Tokenizer
):
    """Means over documents are kept document by document, other metrics as their one value."""
    asked: list[Any] = []

    def simple_evaluate(lm: Any, **settings: Any) -> dict[str, Any]:
        asked.append(settings)
        lm.loglikelihood(requests(("ab", "cd")))
        rows = [
            {
                "doc_id": i,
                "filter": "none",
                "metrics": ["acc", "perplexity"],
                "acc": float(i > 0),
                "perplexity": (-1.0, 2),
            }
            for i in (1, 0, 2)
        ]
        return {"samples": {"arc_part": rows}, "results": {"arc_part": {"acc,none": 2 / 3, "perplexity,none": 7.5}}}

    module = types.ModuleType("lm_eval.evaluator")
    module.simple_evaluate = simple_evaluate  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", module)
    policies = [TaskPolicy(None, None, "dense", Dense(), Dense())]
    settings: dict[str, Any] = dict(samples=3, length=48, batch_size=2)
    ((accuracy, perplexity),) = harness_tasks.run_harness(model, tokenizer, ["arc"], policies, **settings)
    assert accuracy.task == "arc_part,acc" and accuracy.unit == perplexity.unit == ("arc", None, None, "dense")
    assert [o.score for o in accuracy.outcomes] == [0, 1, 1] and accuracy.is_share
    assert perplexity.outcomes == (Outcome(7.5, 1.0),) and not perplexity.is_share
    assert asked[0]["tasks"] == ["arc"] and asked[0]["limit"] == 3
    assert not list(harness_tasks.run_harness(model, tokenizer, ["arc"], policies, done={accuracy.unit}, **settings))
