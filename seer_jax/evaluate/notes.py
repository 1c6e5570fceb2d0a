"""What a reader of a comparison's table should know before it comes: levels left out, named twice, or alike."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from seer_jax.evaluate.comparison import Measurement
from seer_jax.evaluate.levels import Phase, SparsityLevel, gates_by_phase
from seer_jax.models.decoder import Transformer
from seer_jax.selection.notation import write_policy
from seer_jax.selection.rules import TokenBudget, TopK
from seer_jax.selection.scorers import Scorer


def recommendations(model: Transformer) -> list[str]:
    """One line for each policy that a gate recommends."""
    policies = {phase: None if gate is None else gate.recommended for phase, gate in gates_by_phase(model).items()}
    return [
        f"The {phase} gate recommends {write_policy(policy)}."
        for phase, policy in policies.items()
        if policy is not None
    ]


def left_out(
    planned: Sequence[Measurement],
    levels: Sequence[SparsityLevel],
    methods: Sequence[Scorer],
    phases: Sequence[Phase],
) -> list[str]:
    """One line for each level that is not measured in a phase, as all its methods are for the other phase or need a gate that the model
    lacks, and one for each method that is for the other phase.

    Args:
      planned: see `plan_measurements`.
      levels, methods, phases: of the comparison.

    Raises:
      ValueError: a level is not measured in any phase.
    """
    measured, lines, used = {one.key for one in planned}, [], {}
    for level in levels:
        of_level = methods if level.methods is None else level.methods
        used |= {method.name: method for method in of_level}
        wanted = [phase for phase in phases if phase in level.phases]
        missing = [phase for phase in wanted if not measured & {(phase, m.name, level.name) for m in of_level}]
        if missing and missing == wanted:
            raise ValueError(f"{level.name} is to be measured with {_obstacle(of_level, missing)}")
        for phase in missing:
            if any(phase in method.phases() for method in of_level):
                lines.append(f"{phase}: the model has no gate, so {level.name} is left out.")
    return lines + [
        f"{phase}: {name} has no scores for this phase, so it is left out."
        for phase in phases
        for name, method in used.items()
        if phase not in method.phases()
    ]


def _obstacle(methods: Sequence[Scorer], phases: Sequence[Phase]) -> str:
    """The methods of a level, why none of them is measured in the phases, and what helps."""
    names = " or ".join(phases)
    others = [method.name for method in methods if not set(phases) & set(method.phases())]
    if others:
        return f"{', '.join(others)}, which cannot rank blocks at {names}. Add the other phase, or another scorer."
    return f"the learned gate, but the model has no {names} gate. Load one (gates=...), or add another scorer."


def repeated(levels: Sequence[SparsityLevel]) -> list[str]:
    """One line for each level that comes several times."""
    counts = Counter((level.name, level.methods) for level in levels)
    return [f"{name} is named {n} times; it is measured once." for (name, _), n in counts.items() if n > 1]


class Row(NamedTuple):
    """Tokens of a row, and how many of them are read by other means before those whose blocks are chosen while decoding."""

    tokens: int
    read: int = 0


def equal_counts(
    model: Transformer, levels: Sequence[SparsityLevel], phases: Sequence[Phase], *, rows: Collection[Row]
) -> list[str]:
    """One line for each group of top-k levels, or of budgets, that keep equally many blocks in every row, and one for each that keeps all.

    Args:
      model: whose gates set the size of a block.
      levels: of the comparison.
      phases: of the comparison.
      rows: of the comparison, those of one size once.
    """
    lines, longest = [], max(row.tokens for row in rows)
    for phase in phases:
        groups: dict[Any, list[str]] = {}
        for level in levels:
            if phase not in level.phases or not isinstance(level.policy, TopK | TokenBudget):
                continue
            block = level.policy.tokens_per_block(gates_by_phase(model)[phase])
            counts = tuple(count for row in sorted(rows) for count in _counts(level.policy, phase, block, row))
            kind = type(level.policy), level.policy.dense_layers, level.dense_last_rows, level.methods
            kind = () if all(kept == seen for kept, seen in counts) else kind
            groups.setdefault((kind, counts), []).append(level.name)
        for (kind, counts), names in groups.items():
            names = list(dict.fromkeys(names))
            alike = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
            most, place = max(counts), f"at {longest} tokens"
            if not kind:
                verb = "keep" if len(names) > 1 else "keeps"
                lines.append(f"{phase}: {alike} {verb} every block {place}, all {most[1]}, as dense attention does.")
            elif len(names) > 1:
                shown = f"{most[0]} of {most[1]} per row"
                lines.append(
                    f"{phase}: {alike} choose equally many blocks {place}, {shown}, so their scores are equal."
                )
    return lines


def _counts(policy: TopK | TokenBudget, phase: Phase, block: int, row: Row) -> list[tuple[int, int]]:
    """Blocks that the rule keeps out of those that are there: in the longest row of a prompt, or for the tokens of each block that are decoded."""
    total = -(-row.tokens // block)
    if phase is Phase.PREFILL:
        most = policy.blocks_per_row(block if isinstance(policy, TokenBudget) else total)
        return [(min(most, total), total)]
    seen = range(row.read // block + 1, total + 1)
    if isinstance(policy, TokenBudget):
        return [(min(policy.blocks_per_row(block), n), n) for n in seen]
    return [(policy.blocks_per_token(n), n) for n in seen]
