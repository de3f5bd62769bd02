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
