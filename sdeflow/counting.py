"""Counting network evaluations where they happen.

One evaluation is one sample through the network once. Predictions record at the network call, a generic `Equation`
records at its drift when nothing below it did; `solve` installs the counter and reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from sdeflow.errors import InvalidInput


class Counter:
    """Calls and evaluations of one solve.

    Whole-batch calls are kept as one Python integer, so that counting costs nothing on a device; only calls on part
    of a batch (`restrict`) touch a tensor.

    Attributes:
        batch: number of samples of the solve.
        calls: batched forward passes so far.
        limit: calls allowed, or None; `record` raises `CallLimitReached` beyond it.
        rows: indices (int64) of the samples now being evaluated, None for all of them.
    """

    def __init__(self, batch: int, device: torch.device | str = "cpu", limit: int | None = None):
        self.batch = batch
        self.calls = 0
        self.limit = limit
        self.rows: Tensor | None = None
        self._whole = self._pending = 0
        self._partial = torch.zeros(batch, dtype=torch.int64, device=device)

    def restrict(self, rows: Tensor | None) -> None:
        """Say which samples the following calls evaluate: indices into the original batch, or None for all."""
        self._flush()
        self.rows = rows

    def record(self, n: int) -> None:
        """Count one forward pass over a batch of n rows: k·(samples in the batch), k > 1 when guidance stacks
        copies."""
        if self.limit is not None and self.calls >= self.limit:
            raise CallLimitReached(self.limit)
        active = self.batch if self.rows is None else self.rows.shape[0]
        copies, rest = divmod(n, active) if active else (0, n)
        if rest or not copies:
            raise InvalidInput(
                f"the network was called with a batch of {n}, but the solve holds {active} samples; evaluations "
                "cannot be "
                "attributed. Call the network with the whole batch, or with a whole number of copies of it"
            )
        self.calls += 1
        if self.rows is None:
            self._whole += copies
        else:
            # written down later: inside torch.func transforms a tensor from outside must not be changed
            self._pending += copies

    @property
    def evaluations(self) -> Tensor:
        """Evaluations of every sample so far, int64, shape (batch,)."""
        self._flush()
        return self._partial + self._whole

    def _flush(self) -> None:
        if self.rows is not None and self._pending:
            self._partial.index_add_(0, self.rows, torch.full_like(self.rows, self._pending))
        self._pending = 0


class Part(Counter):
    """A counter as a solve of some of its samples sees it: `restrict` speaks of those. The whole one records."""

    def __init__(self, whole: Counter, among: Tensor):
        super().__init__(among.shape[0], among.device)
        self.whole, self.among = whole, among
        whole.restrict(among)

    def restrict(self, rows: Tensor | None) -> None:
        """See `Counter`; indices into the part."""
        self.whole.restrict(self.among if rows is None else self.among[rows])


class CallLimitReached(Exception):
    """Internal signal: the solve used up its call budget. Backends turn it into a status."""

    def __init__(self, limit: int):
        super().__init__(f"the solve reached its limit of {limit} network calls")
        self.limit = limit


_counter: ContextVar[Counter | None] = ContextVar("sdeflow_counter", default=None)


@contextmanager
def counting(counter: Counter) -> Iterator[Counter]:
    """Make `counter` the one that records, until the block ends; blocks nest, the innermost records."""
    token = _counter.set(counter)
    try:
        yield counter
    finally:
        _counter.reset(token)


def current() -> Counter | None:
    """The counter now recording, if any."""
    return _counter.get()


def before() -> int:
    """Calls so far, to be given to `after`; at the limit it raises."""
    counter = _counter.get()
    if counter is None:
        return 0
    if counter.limit is not None and counter.calls >= counter.limit:
        raise CallLimitReached(counter.limit)
    return counter.calls


def after(calls: int, n: int) -> None:
    """Count one forward pass over n rows, unless what was called since `before` has counted itself.

    A network made of predictions is counted where they call theirs: once, or as often as it calls them.
    """
    counter = _counter.get()
    if counter is not None and counter.calls == calls:
        counter.record(n)
