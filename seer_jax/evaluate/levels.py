"""Levels of sparsity: how many blocks a comparison keeps, for which phases and methods."""

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seer_jax.models.decoder import Transformer
from seer_jax.selection.notation import POLICY_FILE, parse_policy, write_policy
from seer_jax.selection.policies import Policy
from seer_jax.selection.rules import RULES, RankingPolicy, TopK, settings_of
from seer_jax.selection.scorers import LearnedGate, Scorer

ROWS = "dense_last_rows"
JOIN = "+"  # between the halves of what works in both phases at once


class Phase(enum.StrEnum):
    """Where a policy works: on all tokens of a prompt at once, or on tokens that are appended one at a time."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclasses.dataclass(frozen=True)
class SparsityLevel:
    """How many blocks are kept.

    Attributes:
      name: in tables, for example "topk:0.1"; see `level_name`.
      policy: of any scorer; each method of a comparison takes its place.
      phases: phases that are measured at this level.
      methods: scorers that are measured at this level; None: all methods of the comparison.
      dense_last_rows: block rows at the end of a prompt that read everything. They hold the question, which then finds any pass
        key: 0 unless they are what is to be measured.
    """

    name: str
    policy: RankingPolicy
    phases: tuple[Phase, ...] = tuple(Phase)
    methods: tuple[Scorer, ...] | None = None
    dense_last_rows: int = 0

    def policy_of(self, scorer: Scorer) -> RankingPolicy:
        """The policy with another scorer, and with the level's `dense_last_rows` where the rule has such."""
        policy: Any = self.policy  # every rule is a dataclass
        rows = {ROWS: self.dense_last_rows} if hasattr(policy, ROWS) else {}
        return dataclasses.replace(policy, scorer=scorer, **rows)


def parse_level(text: str) -> SparsityLevel:
    """The level that a policy describes, as written on a command line.

    A policy that names a scorer is measured with it alone, one that names none with each method of the comparison.
    `dense_last_rows` is 0 unless it is written.

    >>> parse_level("topk:0.5:oracle").methods
    (Oracle(),)
    >>> parse_level("topk:0.5") == SparsityLevel("topk:0.5", parse_policy("topk:0.5"))
    True

    Raises:
      ValueError: it is no policy, or one that does not rank blocks.
    """
    policy: Any = parse_policy(text)
    if not isinstance(policy, RankingPolicy):
        raise ValueError(
            f"policies must rank blocks (topk, budget, threshold or mass); got {text}. Dense attention is measured anyway"
            + (f"; with skip it is written threshold:0:window,skip={policy.skip}." if policy.skip is not None else ".")
        )
    if text.endswith(POLICY_FILE):
        return SparsityLevel(Path(text).name, policy, methods=(policy.scorer,))
    rule, *settings = text.split(",")
    named = rule.count(":") > 1 and not rule.endswith(":")
    written = any(setting.startswith(f"{ROWS}=") for setting in settings)
    rows = getattr(policy, ROWS) if written else 0
    # The scorer is told by the method, but not its settings.
    told = [f"{name}={getattr(policy.scorer, name)}" for name in settings_of(type(policy.scorer)) if f"{name}=" in text]
    return SparsityLevel(
        ",".join([level_name(policy), *told, *([f"{ROWS}={rows}"] if rows else [])]),
        policy,
        methods=(policy.scorer,) if named else None,
        dense_last_rows=rows,
    )


@dataclasses.dataclass(frozen=True)
class LevelPair:
    """Levels that work together, one in each phase, as a generation uses its policies."""

    prefill: SparsityLevel
    decode: SparsityLevel

    @property
    def name(self) -> str:
        """In tables, and as a command line writes it where neither half is a file."""
        return f"{self.prefill.name}{JOIN}{self.decode.name}"

    @property
    def levels(self) -> dict[Phase, SparsityLevel]:
        """Its halves by their phase."""
        return {Phase.PREFILL: self.prefill, Phase.DECODE: self.decode}


def parse_levels(text: str) -> SparsityLevel | LevelPair:
    """One level, or two for prompts and new tokens at once, joined by "+".

    >>> parse_levels("topk:0.2+budget:1024:quest").name
    'topk:0.2+budget:1024'

    Raises:
      ValueError: see `parse_level`; or a half does not work in its phase.
    """
    first, join, second = text.partition(JOIN)
    is_rule = second.partition(":")[0] in RULES or second.endswith(POLICY_FILE)
    if not join or not is_rule or Path(text).is_file():
        return parse_level(text)
    pair = LevelPair(parse_level(first), parse_level(second))
    for phase, level in pair.levels.items():
        level.policy.check_phase(phase.value)
    return pair


def level_name(policy: Policy) -> str:
    """Name of a policy's level: the policy as on a command line, without its scorer and `dense_last_rows`."""
    if isinstance(policy, RankingPolicy):
        rule: Any = policy
        defaults = {field.name: field.default for field in dataclasses.fields(rule) if field.name == ROWS}
        return write_policy(dataclasses.replace(rule, scorer=LearnedGate(), **defaults))
    return write_policy(policy)


def recommended_levels(model: Transformer) -> list[SparsityLevel]:
    """The policies that the model's gates recommend, each for the phase of its gate; dense ones are left out."""
    policies = {phase: None if gate is None else gate.recommended for phase, gate in gates_by_phase(model).items()}
    return [
        SparsityLevel(level_name(policy), policy, (phase,))
        for phase, policy in policies.items()
        if isinstance(policy, RankingPolicy)
    ]


def recommended_pair(model: Transformer) -> LevelPair | None:
    """The policies that a prefill gate and a decode gate recommend, together; None where one of them recommends none."""
    levels = {level.phases[0]: level for level in recommended_levels(model)}
    return LevelPair(levels[Phase.PREFILL], levels[Phase.DECODE]) if len(levels) == len(Phase) else None


def gates_by_phase(model: Transformer) -> dict[Phase, Any]:
    """The model's gates; None for a phase without one."""
    return {Phase.PREFILL: model.prefill_gate, Phase.DECODE: model.decode_gate}


def block_sizes(model: Transformer) -> Mapping[Phase, int]:
    """Tokens per block in each phase."""
    return {phase: TopK(1.0).tokens_per_block(gate) for phase, gate in gates_by_phase(model).items()}
