"""A `BrownianPath` behind torchsde's `BaseBrownian`, so that its solvers see the same noise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sdeflow.errors import InvalidInput

if TYPE_CHECKING:
    from sdeflow.brownian import BrownianPath


@functools.cache
def path_class() -> Callable[[BrownianPath, bool], Any]:
    """The class; torchsde takes a second to import, and a path does not need it."""
    import torchsde

    class PathForTorchsde(torchsde.BaseBrownian):
        """A `BrownianPath` as torchsde sees Brownian motion: W, and U = h(W/2 + H) = ∫(w − w(ta)) du on demand."""

        def __init__(self, path: BrownianPath, flipped: bool):
            self.path, self.sign = path, -1.0 if flipped else 1.0

        def __call__(self, ta, tb=None, return_U=False, return_A=False):
            if return_A:
                raise InvalidInput(
                    "this path has no Lévy area between its elements; take a torchsde method that does not ask for it, "
                    'such as "euler", "milstein" or "srk"'
                )
            ta, tb = (0.0, ta) if tb is None else (ta, tb)
            W, H = self.path.increment(self.sign * ta, self.sign * tb)
            if not return_U:
                return W
            return W, (W * 0.5 + H) * abs(float(tb) - float(ta))

        def __repr__(self) -> str:
            return f"{self.path!r}.as_torchsde(flipped={self.sign < 0})"

        @property
        def dtype(self):
            return self.path.dtype

        @property
        def device(self):
            return self.path.device

        @property
        def shape(self):
            return (self.path.batch, *self.path.shape)

        @property
        def levy_area_approximation(self):
            return "space-time"

    return PathForTorchsde
