"""Which tensor of a checkpoint is which parameter: plain tables, used for reading and for writing.

Parameters keep the layout of the checkpoint, so a rule is a pair of names. Where the name in the checkpoint has a `{layer}`,
the parameter has a leading axis over layers.
"""

import dataclasses
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class Rule:
    """One pair of names.

    Attributes:
      key: in the checkpoint.
      path: attributes that lead to the parameter in the module, joined by dots.
    """

    key: str
    path: str


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one checkpoint tensor: a whole parameter, or one layer of it."""

    path: str
    layer: int | None
    shape: tuple[int, ...]


_LAYER = "model.layers.{layer}."
_GATE = "model.layers.{layer}.self_attn.attn_gate."
_LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)

BASE_RULES = (
    Rule("model.embed_tokens.weight", "embed_tokens"),
    *(Rule(f"{_LAYER}{name}.{kind}", f"layers.{name}.{kind}") for name in _LINEARS for kind in ("weight", "bias")),
    *(Rule(f"{_LAYER}self_attn.{name}.weight", f"layers.self_attn.{name}") for name in ("q_norm", "k_norm")),
    *(Rule(f"{_LAYER}{name}.weight", f"layers.{name}") for name in ("input_layernorm", "post_attention_layernorm")),
    Rule("model.norm.weight", "norm"),
    Rule("lm_head.weight", "lm_head"),
)
PREFILL_GATE_RULES = (
    Rule(f"{_GATE}mask_linear_q.weight", "linear_q"),
    Rule(f"{_GATE}mask_linear_k.weight", "linear_k"),
)
DECODE_GATE_RULES = (
    Rule(f"{_GATE}attngate_linear_q.weight", "linear_q"),
    Rule(f"{_GATE}attngate_linear_k.weight", "linear_k"),
    Rule(f"{_GATE}attngate_qnorm.weight", "q_norm"),
    Rule(f"{_GATE}attngate_knorm.weight", "k_norm"),
)

# Buffers that older versions of transformers saved though they follow from the configuration.
ROTARY_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")
# A tied head is the embedding; some checkpoints hold it all the same.
TIED_HEAD = r"lm_head\.weight"


def expected_slots(rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """The tensors that a checkpoint of a model with such parameters has, in the order of the rules within each layer.

    Args:
      rules: those whose parameter is absent (a bias, a tied head) give nothing.
      shapes: of the parameters, by path.

    Raises:
      ValueError: a parameter is covered by no rule, so that it would stay empty.
    """
    rules = [rule for rule in rules if rule.path in shapes]
    uncovered = sorted(set(shapes) - {rule.path for rule in rules})
    if uncovered:
        raise ValueError(
            f"Each parameter needs a rule that names its tensor in the checkpoint; got none for {uncovered}."
        )
    slots = {}
    for rule in rules:
        if "{layer}" not in rule.key:
            slots[rule.key] = Slot(rule.path, None, shapes[rule.path])
    layered = [rule for rule in rules if "{layer}" in rule.key]
    for layer in range(max((shapes[rule.path][0] for rule in layered), default=0)):
        for rule in layered:
            slots[rule.key.format(layer=layer)] = Slot(rule.path, layer, shapes[rule.path][1:])
    return slots
