"""Hugging Face diffusers, both ways: its pipelines as our (process, prediction), our solvers as its schedulers.

Needs the extra: pip install 'sdeflow[diffusers]'. Importing this package does not import diffusers; using it does.
"""

from typing import Any

from sdeflow.diffusers.models import prediction_of
from sdeflow.diffusers.pipelines import Loaded, from_pipeline, from_pretrained, require
from sdeflow.diffusers.schedules import process_of

__all__ = ["Loaded", "from_pipeline", "from_pretrained", "prediction_of", "process_of"]


def __getattr__(name: str) -> Any:
    # the class derives from diffusers' own, so it can only be made once diffusers is wanted
    if name == "SolverScheduler":
        from sdeflow.diffusers.scheduler import scheduler_class

        return scheduler_class()
    if (
        name == "SchedulerMixin"
    ):  # loading a pipeline, diffusers looks for the bases of a component beside the component
        return require().SchedulerMixin
    raise AttributeError(f"module 'sdeflow.diffusers' has no attribute {name!r}")
