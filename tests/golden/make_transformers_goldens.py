"""Writes transformers_models.safetensors: tiny random models of every family and their logits, computed by transformers.

Runs in an environment of its own, which the package does not need: pip install torch==2.13.0 transformers==5.23.0 numpy.
"""

import json
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
import transformers
from safetensors.torch import save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SIZES = dict(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=16)
YARN_TUNED = dict(
    **dict(rope_type="yarn", rope_theta=1e4, factor=8.0, original_max_position_embeddings=32, truncate=False),
    **dict(beta_fast=16.0, beta_slow=2.0, mscale=1.0, mscale_all_dim=0.8),
)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=2.0)

# name: family, batch, what differs from SIZES
CASES = {
    "llama_llama3": ("Llama", 1, dict(rope_parameters=LLAMA3, tie_word_embeddings=False)),
    "llama_linear_biases": ("Llama", 1, dict(rope_parameters=LINEAR, attention_bias=True, mlp_bias=True)),
    "llama_mha_yarn_tuned": ("Llama", 1, dict(rope_parameters=YARN_TUNED, num_key_value_heads=4)),
    "qwen2_tied_batch2": ("Qwen2", 2, dict(head_dim=None, tie_word_embeddings=True)),
    "qwen2_yarn": ("Qwen2", 1, dict(head_dim=None, rope_parameters=YARN)),
    "qwen3_tied": (
        "Qwen3",
        1,
        dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    ),
    "qwen3_biases_yarn": ("Qwen3", 1, dict(attention_bias=True, rope_parameters=YARN)),
    "mistral": (
        "Mistral",
        2,
        dict(head_dim=10, sliding_window=None, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    ),
}
# Frequencies at real sizes, head dim 128: name: max_position_embeddings, RoPE parameters
ROPES = {
    "llama3_8b": (131072, LLAMA3 | dict(original_max_position_embeddings=8192)),
    "qwen2_yarn": (131072, YARN | dict(original_max_position_embeddings=32768)),
    "yarn_tuned": (4096, YARN_TUNED | dict(original_max_position_embeddings=512)),
    "linear": (4096, LINEAR),
}
TOKENS = 40
POSITIONS = torch.arange(0, TOKENS, 3)


def case(family: str, batch: int, changes: dict, seed: int) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {k: v for k, v in (SIZES | changes).items() if v is not None or k not in SIZES}
    config = getattr(transformers, f"{family}Config")(**sizes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 2:
                value = noise * 1.5 * weight.shape[1] ** -0.5
            else:
                value = noise * 0.5 if name.endswith("bias") else 1 + 0.3 * noise
            weight.copy_(value.bfloat16())
        ids = torch.randint(config.vocab_size, (batch, TOKENS), generator=generator)
        logits = model(ids, use_cache=False).logits[:, POSITIONS]
    state = {k: v for k, v in model.state_dict().items() if not (config.tie_word_embeddings and k == "lm_head.weight")}
    arrays = {f"base.{k}": v.bfloat16().contiguous() for k, v in state.items()}
    arrays |= {"input_ids": ids, "positions": POSITIONS.clone(), "logits": logits.contiguous()}
    return arrays, json.loads(config.to_json_string())


def rope(max_position: int, parameters: dict) -> tuple[torch.Tensor, float]:
    config = transformers.LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=max_position, rope_parameters=dict(parameters)
    )
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")


def main() -> None:
    arrays, metadata = {}, {"torch": torch.__version__, "transformers": transformers.__version__}
    for seed, (name, (family, batch, changes)) in enumerate(CASES.items()):
        tensors, config = case(family, batch, changes, seed)
        arrays |= {f"{name}/{k}": v for k, v in tensors.items()}
        metadata[name] = json.dumps(config)
    for name, (max_position, parameters) in ROPES.items():
        frequencies, scale = rope(max_position, parameters)
        arrays |= {f"rope.{name}/inverse_frequencies": frequencies, f"rope.{name}/scale": torch.tensor(scale)}
        metadata[f"rope.{name}"] = json.dumps(dict(max_position_embeddings=max_position, rope_parameters=parameters))
    save_file(arrays, Path(__file__).with_name("transformers_models.safetensors"), metadata=metadata)


if __name__ == "__main__":
    main()
