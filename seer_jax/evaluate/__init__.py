"""Quality of a model with fewer blocks: perplexity and pass keys."""

from seer_jax.evaluate.comparison import Measurement, all_methods, compare, plan_measurements
from seer_jax.evaluate.levels import Phase, SparsityLevel, level_name, parse_level, recommended_levels
from seer_jax.evaluate.passkey import PassKeyPrompt, load_words, passkey_prompts
from seer_jax.evaluate.record import Record, write_scores
from seer_jax.evaluate.rows import EvalRows, make_rows, text_windows
from seer_jax.evaluate.score import (
    PromptScore,
    Score,
    WindowScore,
    passkey_difference,
    perplexity_over,
    score_from_json,
    score_to_json,
)
from seer_jax.evaluate.scoring import TokenScores, perplexity, score_decoded, score_prompts, score_windows
from seer_jax.evaluate.statistics.blocks_needed import BlocksNeeded, all_blocks_needed, blocks_needed, loss_at
from seer_jax.evaluate.statistics.intervals import Estimate, Interval
from seer_jax.evaluate.table import legend, score_line, table_rows
from seer_jax.evaluate.window import DecodedWindow, decode_window

__all__ = [
    "BlocksNeeded",
    "DecodedWindow",
    "Estimate",
    "EvalRows",
    "Interval",
    "Measurement",
    "PassKeyPrompt",
    "Phase",
    "PromptScore",
    "Record",
    "Score",
    "SparsityLevel",
    "TokenScores",
    "WindowScore",
    "all_blocks_needed",
    "all_methods",
    "blocks_needed",
    "compare",
    "decode_window",
    "legend",
    "level_name",
    "load_words",
    "loss_at",
    "make_rows",
    "parse_level",
    "passkey_difference",
    "passkey_prompts",
    "perplexity",
    "perplexity_over",
    "plan_measurements",
    "recommended_levels",
    "score_decoded",
    "score_from_json",
    "score_line",
    "score_prompts",
    "score_to_json",
    "score_windows",
    "table_rows",
    "text_windows",
    "write_scores",
]
