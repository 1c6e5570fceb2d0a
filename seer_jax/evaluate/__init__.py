"""How good a model is with fewer blocks: perplexity, pass keys, and pictures of block maps."""

from seer_jax.evaluate.comparison import Method, Phase, Rows, Score, Setting, compare
from seer_jax.evaluate.passkey import PassKeyPrompt, passkey_prompts
from seer_jax.evaluate.plots import BlockMaps, block_maps, plot_block_maps
from seer_jax.evaluate.scoring import TokenScores, perplexity, score_decoded, score_prompts, text_windows

__all__ = [
    "BlockMaps",
    "Method",
    "PassKeyPrompt",
    "Phase",
    "Rows",
    "Score",
    "Setting",
    "TokenScores",
    "block_maps",
    "compare",
    "passkey_prompts",
    "perplexity",
    "plot_block_maps",
    "score_decoded",
    "score_prompts",
    "text_windows",
]
