"""The table of how each weight of a model is split over a mesh of devices."""

from jax.sharding import PartitionSpec

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
# Names that stand for axes of the mesh in the table and in other specs:
ROWS = "rows"  # of a batch: data and fsdp
KV = "kv"  # key/value heads: tensor, or the part of it that has different ones
HEADS = "heads"  # query heads or key/value heads, whichever the axis of the array counts
COPIES = "copies"  # the part of tensor whose devices have the same key/value head

P = PartitionSpec
# Over fsdp it is the first axis, the rows of a tensor in a file, so that a host reads those of its devices alone.
_OUTPUTS = P(None, (TENSOR, FSDP))  # output channels over tensor: each device makes some of them
_INPUTS = P(None, FSDP, TENSOR)  # input channels over tensor: the products are summed over its devices
_WHOLE = P()

# Path of a weight -> which of its axes are split. Weights of layers have a leading axis L, which never is.
WEIGHTS: dict[str, PartitionSpec] = {
    "embed_tokens": P((TENSOR, FSDP)),
    "lm_head": P((TENSOR, FSDP)),
    "norm": _WHOLE,
    "layers.input_layernorm": _WHOLE,
    "layers.post_attention_layernorm": _WHOLE,
    "layers.self_attn.q_proj.weight": _OUTPUTS,
    "layers.self_attn.q_proj.bias": P(None, TENSOR),
    "layers.self_attn.k_proj.weight": P(None, (KV, FSDP)),
    "layers.self_attn.k_proj.bias": P(None, KV),
    "layers.self_attn.v_proj.weight": P(None, (KV, FSDP)),
    "layers.self_attn.v_proj.bias": P(None, KV),
    "layers.self_attn.o_proj.weight": _INPUTS,
    "layers.self_attn.o_proj.bias": _WHOLE,
    "layers.self_attn.q_norm": _WHOLE,
    "layers.self_attn.k_norm": _WHOLE,
    "layers.mlp.gate_proj.weight": _OUTPUTS,
    "layers.mlp.gate_proj.bias": P(None, TENSOR),
    "layers.mlp.up_proj.weight": _OUTPUTS,
    "layers.mlp.up_proj.bias": P(None, TENSOR),
    "layers.mlp.down_proj.weight": _INPUTS,
    "layers.mlp.down_proj.bias": _WHOLE,
    # Of gates, from their own root; small, and therefore whole over fsdp.
    "linear_q": P(None, HEADS),
    "linear_k": P(None, HEADS),
    "q_norm": _WHOLE,
    "k_norm": _WHOLE,
}
# Adapters are split as the weight [L, out, in] that they belong to: A [L, r, in] by its inputs, B [L, out, r] by its outputs.
WEIGHTS |= {
    path.removesuffix("weight") + name: split
    for path, spec in WEIGHTS.items()
    if path.endswith(".weight")
    for name, split in (("lora.a", P(None, None, *spec[2:])), ("lora.b", P(None, spec[1])))
}
GATES = ("prefill_gate.", "decode_gate.")
# Biases of sums over tensor: one device of it adds them.
ADDED_ONCE = ("layers.self_attn.o_proj.bias", "layers.mlp.down_proj.bias")
