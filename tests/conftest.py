"""What every test needs: one torch thread a worker, and no window system for figures."""

from __future__ import annotations

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start():
    """Nothing in sdeflow may depend on torch's global generator: every test gets another state of it on purpose."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_record():
    """A maker of made-up records: `make_record(name=..., steps=..., value=...)`; `solver=` adds settings, others replace fields."""
    from sdeflow.measure import Estimate, Record

    def make(
        name="rk4", steps=10, value=1e-2, error="rmse", equation="ProbabilityFlowODE", solver=None, **fields
    ) -> Record:
        floor = fields.pop("floor", 1e-9)
        estimate = Estimate(error, value, 0.9 * value, 1.1 * value, floor, value > floor)
        settings = {"name": name, "type": "RungeKutta", "steps": steps, **(solver or {})}
        given = {
            "key": f"{equation} {sorted(settings.items())}",
            "problem": {"name": "digits"},
            "process": {"type": "VP"},
            "equation": {"type": equation, "eta": float(equation == "ReverseSDE")},
            "solver": settings,
            "samples": 8,
            "seed": 0,
            "start": 1.0,
            "stop": 1e-3,
            "initial": "prior",
            "dtype": "float64",
            "device": "cpu",
            "calls": 4 * steps,
            "evaluations_mean": 4.0 * steps,
            "evaluations_max": 4 * steps,
            "accepted_mean": float(steps),
            "rejected_mean": 0.0,
            "status": {"SUCCESS": 8},
            "error": estimate,
            "others": (),
            "reference": "closed form",
            "wall_time": 0.5,
            "versions": {},
            "threads": 1,
        }
        return Record(**{**given, **fields})

    return make
