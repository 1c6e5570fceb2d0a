"""Conversations against generation from whole prompts: turns, branches, programs, refusals."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from seer_jax import Conversation, Transformer, generate
from seer_jax.inference import generate as generation
from seer_jax.inference import memory
from seer_jax.models.cache import Cache
from seer_jax.selection.policies import Given
from seer_jax.selection.rules import Threshold, TokenBudget, TopK
from seer_jax.selection.scorers import MInference
from seer_jax.sharding import make_mesh, place
from tests.seer_jax.conftest import tiny_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

TURNS = [np.random.default_rng(i).integers(0, 63, n).tolist() for i, n in enumerate((21, 16, 3))]
# Rules that do not ask for the length of a prompt: turns are what whole prompts are.
POLICIES: dict[str, Any] = dict(prefill=Threshold(0.1, dense_last_rows=0), decode=TokenBudget(32))
NEW: dict[str, Any] = dict(max_new_tokens=5, eos=())


@functools.cache
def llama() -> Transformer:
    return tiny_model()


def conversation(**changes: Any) -> Conversation:
    settings: dict[str, Any] = dict(model=llama(), capacity=100, prefill_chunk=32, **POLICIES) | changes
    return Conversation(**settings)


def answer_of(tokens: list[int]) -> list[int]:
    """With all tokens as the prompt."""
    return generate(llama(), [tokens], **POLICIES, **NEW).rows()[0]


def test_turns_are_whole_prompts_of_all_tokens_so_far(monkeypatch: pytest.MonkeyPatch):
    traces, extend = [], Transformer.extend
    monkeypatch.setattr(Transformer, "extend", lambda *args, **kwargs: traces.append(1) or extend(*args, **kwargs))
    talk, so_far, branch = conversation(), list[int](), None
    for number, turn in enumerate(TURNS):
        result = talk.generate(turn, **NEW)
        so_far += turn
        assert result.rows()[0] == answer_of(so_far)
        so_far += result.rows()[0]
        assert talk.tokens == so_far
        if number == 0:
            branch = talk.branch()
    assert len(traces) == 1, "each turn should take the program of the first"
    # A branch goes on from where it was made, whatever became of the conversation.
    assert branch is not None
    made = [token for piece in branch.stream(TURNS[2], chunk=2, **NEW) for token in piece]
    assert made == answer_of([*so_far[:26], *TURNS[2]])
    assert branch.tokens == [*so_far[:26], *TURNS[2], *made] and talk.tokens == so_far
    # So does a conversation that was taken back, in the middle of a block.
    assert talk.rewind(26) == 16 and talk.tokens == so_far[:26]
    assert talk.generate(TURNS[2], **NEW).rows()[0] == made


def test_a_turn_that_asks_for_fewer_new_tokens_takes_the_program_of_before(monkeypatch: pytest.MonkeyPatch):
    """As the last ones of a conversation that is nearly full."""
    traces, extend = [], Transformer.extend
    monkeypatch.setattr(Transformer, "extend", lambda *args, **kwargs: traces.append(1) or extend(*args, **kwargs))
    talk = conversation()
    for new in (5, 1):
        result = talk.generate(TURNS[2], max_new_tokens=new, eos=())
        assert result.tokens.shape == (1, new) and result.decode_kept_steps.shape[0] == new - 1
        assert talk.tokens[-new:] == result.rows()[0]
    assert len(traces) <= 1  # none where another test has made the program


def test_a_turn_that_is_closed_keeps_what_it_made():
    talk = conversation()
    turn = talk.stream(TURNS[0], chunk=1, **NEW)
    made = [*next(turn), *next(turn)]
    turn.close()
    assert talk.tokens == [*TURNS[0], *made]
    assert talk.generate(TURNS[1], **NEW).rows()[0] == answer_of([*TURNS[0], *made, *TURNS[1]])


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "not begun"])
@pytest.mark.parametrize("change", ["turn", "rewind"])
def test_a_turn_that_another_one_came_before_is_refused(change: str, begun: bool):
    talk = conversation()
    first = talk.stream(TURNS[0], chunk=1, **NEW)
    if begun:
        next(first)
    made = [] if change == "rewind" else talk.generate(TURNS[2], **NEW).rows()[0]
    if change == "rewind":
        talk.rewind(0)
    tokens = list(talk.tokens)
    with pytest.raises(ValueError, match=r"must be the newest of its conversation to go on; .* or take a branch"):
        next(first)
    assert talk.tokens == tokens and tokens[len(tokens) - len(made) :] == made


def test_goes_on_after_a_turn_that_was_interrupted_while_the_device_worked(monkeypatch: pytest.MonkeyPatch):
    talk = conversation()
    tokens = [*TURNS[0], *talk.generate(TURNS[0], **NEW).rows()[0]]
    with monkeypatch.context() as patch:
        patch.setattr(generation, "_resume", lambda model, job, cache, start: lose(cache))
        with pytest.raises(KeyboardInterrupt):
            talk.generate(TURNS[1], **NEW)
    assert talk.tokens == tokens and talk.branch().tokens == tokens
    assert talk.generate(TURNS[1], **NEW).rows()[0] == answer_of([*tokens, *TURNS[1]])


def lose(cache: Cache) -> None:
    """As a program that was given the cache, and whose results never came."""
    for x in jax.tree.leaves(cache):
        x.delete()
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("tokens", "message"), [(1, "got 1, of 0. Go back to fewer"), (-1, "must be an integer of at least 0")]
)
def test_goes_back_to_tokens_that_it_has(tokens: int, message: str):
    with pytest.raises(ValueError, match=message):
        conversation().rewind(tokens)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "turn", "message"),
    [
        (dict(model=jax.eval_shape(tiny_model)), None, "model must have weights to generate; got one of shapes alone"),
        (dict(capacity=0), None, "capacity must be an integer of at least 1; got 0"),
        (
            dict(prefill_chunk=-1),
            None,
            r"prefill_chunk must be an integer of at least 0 \(0: whole turns at once\); got -1",
        ),
        (dict(prefill_chunk=24), None, "prefill_chunk must be a multiple of 16 tokens, whole blocks; got 24"),
        (dict(prefill=TopK(0.1, MInference())), None, "got topk:0.1:minference, which looks at the whole prompt"),
        (dict(decode=Given(np.ones((2, 1, 2, 4), bool), 16)), None, "got Given masks. Use a rule"),
        ({}, dict(tokens=[]), "A turn must have at least one token; got none"),
        ({}, dict(tokens=7), r"A turn must be one list of integers; got int64 of shape \(\)"),
        (
            {},
            dict(tokens=[[1, 2]]),
            r"A turn must be one list of integers; got int64 of shape \(1, 2\). Give each list",
        ),
        ({}, dict(tokens=[64]), r"Tokens must lie in \[0, 64\)"),
        (
            {},
            dict(tokens=[1] * 97),
            r"97 \+ 5 - 1 tokens; got capacity 100. Lower max_new_tokens, go back by `rewind`, or save it",
        ),
        ({}, dict(tokens=[1], prefill=TopK(0.5)), "prefill must be set for a conversation as a whole"),
    ],
)
def test_refuses(settings: dict[str, Any], turn: dict[str, Any] | None, message: str):
    with pytest.raises(ValueError, match=message):
        talk = conversation(**settings)
        talk.stream(**NEW | (turn or {}))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("mesh", "needs"), [(None, "needs"), ("tensor=2", "each of 2 devices needs")])
def test_what_does_not_fit_the_device_is_refused(mesh: str | None, needs: str, monkeypatch: pytest.MonkeyPatch):
    model = llama() if mesh is None else place(llama(), make_mesh(mesh))
    weights = memory.tree_bytes(model)
    monkeypatch.setattr(memory, "device_memory", lambda device: memory.DeviceMemory(weights + 10_000_000, weights))
    message = (
        rf"The conversation must fit in device memory: {needs} .* \(weights .*, cache .*\), .* Lower `capacity`, or"
    )
    with pytest.raises(MemoryError, match=message):
        Conversation(model, 2**20, **POLICIES)
    with pytest.raises(MemoryError, match=message):
        Conversation.check(jax.eval_shape(lambda: model) if mesh is None else model, 2**20, **POLICIES)
    assert Conversation(model, 100, **POLICIES).capacity == 100
