"""Which tensor of a checkpoint is which parameter: plain tables, used for reading and for writing.

Parameters keep the layout of the checkpoint, so a rule is a pair of names. Where the name in the checkpoint has a `{layer}` or an
`{expert}`, the parameter has a leading axis over them, in this order.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

from seer_jax.models.config import ModelConfig
from seer_jax.models.families import family_of

AXES = ("layer", "expert")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One pair of names.

    Attributes:
      key: in the checkpoint.
      path: attributes that lead to the parameter in the module, joined by dots.
    """

    key: str
    path: str

    @property
    def axes(self) -> tuple[str, ...]:
        """Leading axes of the parameter that its tensors are stacked along."""
        return tuple(axis for axis in AXES if f"{{{axis}}}" in self.key)

    def key_of(self, indices: tuple[int, ...]) -> str:
        """Name of the tensor at indices along these axes."""
        return self.key.format(**dict(zip(self.axes, indices, strict=True)))


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one checkpoint tensor: a whole parameter, or one layer of it, or one expert of one layer.

    Attributes:
      path: of the parameter.
      indices: along its leading axes; () is the whole parameter.
      shape: of the tensor.
    """

    path: str
    indices: tuple[int, ...]
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

LORA_RULES = tuple(
    Rule(f"base_model.model.{_LAYER}{name}.{key}.weight", f"layers.{name}.lora.{path}")
    for name in _LINEARS
    for key, path in (("lora_A", "a"), ("lora_B", "b"))
)

# Buffers that older versions of transformers saved though they follow from the configuration.
ROTARY_BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")
# A tied head is the embedding; some checkpoints hold it all the same.
TIED_HEAD = r"lm_head\.weight"


def base_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The rules of a base model: those of its family, and the common ones for all other parameters."""
    own = tuple(Rule(*names) for names in family_of(config.family).rules)
    paths = {rule.path for rule in own}
    return (*own, *(rule for rule in BASE_RULES if rule.path not in paths))


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
    tensors = []
    for order, rule in enumerate(rules):
        shape, stacked = shapes[rule.path], len(rule.axes)
        for indices in itertools.product(*map(range, shape[:stacked])):
            tensors.append((indices[:1], order, rule.key_of(indices), Slot(rule.path, indices, shape[stacked:])))
    tensors.sort(key=lambda tensor: tensor[:2])  # what has no layer comes first; stable: experts stay in order
    return {key: slot for _, _, key, slot in tensors}
