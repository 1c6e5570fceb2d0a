"""tiny_lm: a small Qwen3 model as Hugging Face transformers wrote it, to demonstrate and test on. README.md is its model card."""

from pathlib import Path

NAME = "tiny-lm"  # stands for the model and for its gates wherever a model is named, see `seer_jax.models.hub`


def path() -> Path:
    """The folder of the model: a Hugging Face checkpoint, held-out text, words for pass keys and reference figures."""
    return Path(__file__).parent


def gates() -> dict[str, Path]:
    """Folders of its trained gates, "prefill" and "decode", for `from_pretrained`; gates.json beside them says how good they are."""
    return {kind: path() / "gates" / kind for kind in ("prefill", "decode")}
