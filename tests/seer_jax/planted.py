"""A retrieval model whose weights are written by formula, as a Hugging Face folder.

Two layers, no MLP. A head of layer 0 looks one token back and copies that token's code beside the own one; a head of layer 1
looks for the place whose *previous* token is the current one, and copies what stands there. So the model answers "which value
followed this key" exactly, and a wrong RoPE, mask, layout or block index shows as a wrong answer.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VOCAB, CODE, HEAD_DIM, HEADS, KV_HEADS, LAYERS, THETA = 512, 48, 128, 4, 2, 2, 1e7
CONSTANT = 16  # channels that hold the same value for every token
WIDTH = 3 * CODE + CONSTANT
OWN, PREVIOUS, ANSWER = (slice(i * CODE, (i + 1) * CODE) for i in range(3))
BIAS = slice(3 * CODE, WIDTH)
FREQUENCIES = THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def write(folder: Path) -> None:
    """Writes config.json and model.safetensors."""
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((VOCAB, CODE))
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    embedding = np.zeros((VOCAB, WIDTH))
    embedding[:, OWN], embedding[:, BIAS] = codes, 0.5
    head = np.zeros((VOCAB, WIDTH))
    head[:, ANSWER] = codes * 20
    layers = [_empty_layer() for _ in range(LAYERS)]
    first, second = np.sqrt(WIDTH / 5), np.sqrt(WIDTH / 6)  # gain of the RMSNorm before each layer: |x|^2 is 5, then 6
    _look_back(layers[0], head=0, distance=1, gain=first, copy_to=PREVIOUS)
    _look_back(layers[0], head=1, distance=3, gain=first)
    _match(layers[1], gain=second)
    _look_back(layers[1], head=2, distance=1, gain=second)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": np.ones(WIDTH)}
    for i, layer in enumerate(layers):
        tensors |= {f"model.layers.{i}.{name}.weight": w for name, w in layer.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, folder / "model.safetensors")
    config = dict(
        model_type="llama", vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, rope_theta=THETA, rms_norm_eps=1e-6,
        max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def _empty_layer() -> dict[str, np.ndarray]:
    return {
        "input_layernorm": np.ones(WIDTH),
        "post_attention_layernorm": np.ones(WIDTH),
        "self_attn.q_proj": np.zeros((HEADS * HEAD_DIM, WIDTH)),
        "self_attn.k_proj": np.zeros((KV_HEADS * HEAD_DIM, WIDTH)),
        "self_attn.v_proj": np.zeros((KV_HEADS * HEAD_DIM, WIDTH)),
        "self_attn.o_proj": np.zeros((WIDTH, HEADS * HEAD_DIM)),
        "mlp.gate_proj": np.zeros((8, WIDTH)),
        "mlp.up_proj": np.zeros((8, WIDTH)),
        "mlp.down_proj": np.zeros((WIDTH, 8)),
    }


def _rows(head: int, count: int = HEAD_DIM) -> slice:
    return slice(head * HEAD_DIM, head * HEAD_DIM + count)


def _look_back(
    layer: dict[str, np.ndarray], *, head: int, distance: int, gain: float, copy_to: slice | None = None
) -> None:
    """A constant query, turned by `distance` tokens in every RoPE pair: it meets the constant key of that distance."""
    kv, scale = head // (HEADS // KV_HEADS), np.sqrt(160.0)
    query = scale * np.exp(-1j * FREQUENCIES * distance)
    key = scale * np.ones(HEAD_DIM // 2)
    norm = CONSTANT * 0.5 * gain
    layer["self_attn.q_proj"][_rows(head), BIAS] = np.concatenate([query.real, query.imag])[:, None] / norm
    layer["self_attn.k_proj"][_rows(kv), BIAS] = np.concatenate([key, 0 * key])[:, None] / norm
    if copy_to is not None:
        layer["self_attn.v_proj"][_rows(kv, CODE), OWN] = np.eye(CODE) / gain
        layer["self_attn.o_proj"][copy_to, _rows(head, CODE)] = np.eye(CODE)


def _match(layer: dict[str, np.ndarray], *, gain: float) -> None:
    """Head 0: own code against copied previous codes, on the slowest RoPE pairs; what it finds goes to ANSWER."""
    half = CODE // 2
    slow = np.concatenate([np.arange(HEAD_DIM // 2 - half, HEAD_DIM // 2), np.arange(HEAD_DIM - half, HEAD_DIM)])
    layer["self_attn.q_proj"][slow, OWN] = np.eye(CODE) * 20 / gain
    layer["self_attn.k_proj"][slow, PREVIOUS] = np.eye(CODE) * 20 / gain
    layer["self_attn.v_proj"][_rows(0, CODE), OWN] = np.eye(CODE) / gain
    layer["self_attn.o_proj"][ANSWER, _rows(0, CODE)] = np.eye(CODE)


def prompts(rows: int, length: int, pairs: int, spacing: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Filler with key-value pairs in its first half, each key asked for again near the end.

    The filler has eight words only: what follows one of them is spread over the whole text, so that no block stands out for it.

    Returns:
      (tokens [rows, length], positions [pairs] of the repeated keys, each followed by its value).
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 8, (rows, length))
    asked = length - spacing * np.arange(pairs, 0, -1)
    for row in tokens:
        keys, values = 256 + rng.permutation(128)[:pairs], rng.integers(384, 512, pairs)
        stated = 2 * rng.permutation(length // 4)[:pairs]
        order = rng.permutation(pairs)
        row[stated], row[stated + 1] = keys, values
        row[asked], row[asked + 1] = keys[order], values[order]
    return tokens.astype(np.int32), asked
