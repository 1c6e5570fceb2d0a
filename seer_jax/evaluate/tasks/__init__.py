"""Tasks with right answers: in RULER's form, of LongBench, and those that a user registers."""

from seer_jax.evaluate.tasks.base import TASKS, PromptEncoder, Sample, Task, TaskSettings, register
from seer_jax.evaluate.tasks.longbench import LongBench
from seer_jax.evaluate.tasks.names import find_tasks
from seer_jax.evaluate.tasks.ruler import RULER
from seer_jax.evaluate.tasks.run import TaskPolicy, plan_pairs, run_tasks, task_policies
from seer_jax.evaluate.tasks.score import Outcome, TaskRecord, TaskScore, difference, write_task_scores

__all__ = [
    "RULER",
    "TASKS",
    "LongBench",
    "Outcome",
    "PromptEncoder",
    "Sample",
    "Task",
    "TaskPolicy",
    "TaskRecord",
    "TaskScore",
    "TaskSettings",
    "difference",
    "find_tasks",
    "plan_pairs",
    "register",
    "run_tasks",
    "task_policies",
    "write_task_scores",
]
