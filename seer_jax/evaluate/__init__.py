"""Quality of a model with fewer blocks: perplexity, pass keys, and plots of block maps."""

from seer_jax.evaluate.comparison import (
    Phase,
    Score,
    SparsityLevel,
    all_methods,
    compare,
    level_name,
    recommended_levels,
)
from seer_jax.evaluate.passkey import PassKeyPrompt, load_words, passkey_prompts
from seer_jax.evaluate.plots import BlockMaps, block_maps, plot_block_maps
from seer_jax.evaluate.rows import EvalRows, make_rows, text_windows
from seer_jax.evaluate.scoring import TokenScores, perplexity, score_decoded, score_prompts
from seer_jax.evaluate.table import legend, score_line, table_rows, write_scores

__all__ = [
    "BlockMaps",
    "EvalRows",
    "PassKeyPrompt",
    "Phase",
    "Score",
    "SparsityLevel",
    "TokenScores",
    "all_methods",
    "block_maps",
    "compare",
    "legend",
    "level_name",
    "load_words",
    "make_rows",
    "passkey_prompts",
    "perplexity",
    "plot_block_maps",
    "recommended_levels",
    "score_decoded",
    "score_line",
    "score_prompts",
    "table_rows",
    "text_windows",
    "write_scores",
]
