"""Registers a task of one's own: all that the pipeline asks of a task, in one call.

    deepspeed pipeline/train.py --task_module examples/grounding.py --tasks reasoning,caption,grounding

runs a file that calls `register`; a checkpoint remembers the file, so that evaluate_mmud.py needs no flag.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.data.tasks import Task, add_task
from pipeline.model.heads import HEADS, MakeHead
from pipeline.scoring.scores import Score
from pipeline.scoring.suite import Scorer, add_scorer


def register(
    task: Task, *, head: MakeHead | None = None, scores: Mapping[str, Score] | None = None, scorer: Scorer | None = None
) -> None:
    """Enters a task.

    Args:
        task: its prompt, answer and targets (see `pipeline.data.tasks`): text, masks of <OBJ-i>, a picture of <GEN>,
            and `values` for each <OBJ-i>, which only a decoder of its own can give.
        head: makes that decoder, which holds its loss.
        scores, scorer: what the report shows of it, and the function that computes it.

    Raises:
        ValueError: a name is taken, or values go without a decoder, or scores without a function.
    """
    if bool(task.values) != (head is not None):
        raise ValueError(f"task {task.name}: values ({task.values}) and a head go together")
    if bool(scores) != (scorer is not None):
        raise ValueError(f"task {task.name}: scores and a scorer go together")
    add_task(task)
    if head is not None:
        HEADS[task.name] = head
    if scorer is not None:
        add_scorer(task.name, scores or {}, scorer)
