"""Tasks in the form of RULER (Hsieh et al., arXiv 2404.06654): synthetic, seeded, and of exactly as many tokens as asked.

What is asked, counted and scored is RULER's; sentences and word lists are our own, so that scores compare policies and models with each
other, and not with published ones.
"""

from seer_jax.evaluate.tasks.ruler.needles import NEEDLES, Needles
from seer_jax.evaluate.tasks.ruler.questions import QUESTIONS, QuestionAnswering
from seer_jax.evaluate.tasks.ruler.variables import VARIABLES, VariableTracking
from seer_jax.evaluate.tasks.ruler.word_counts import WORD_COUNTS, CommonWords, FrequentWords

RULER = (*NEEDLES, VARIABLES, *WORD_COUNTS, *QUESTIONS)

__all__ = [
    "NEEDLES",
    "QUESTIONS",
    "RULER",
    "VARIABLES",
    "WORD_COUNTS",
    "CommonWords",
    "FrequentWords",
    "Needles",
    "QuestionAnswering",
    "VariableTracking",
]
