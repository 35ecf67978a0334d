"""How the sparse stem is computed: engines with one interface, one weight layout (dense OIHW) and one result.

A new engine is one file with a class that has the methods of `Engine`, and one entry in `ENGINES`. An engine that does
not work everywhere also has `failure(device)`, which gives the reason or None.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch

from scott_sparse.model.engines.dense import Dense
from scott_sparse.model.engines.halo import Halo
from scott_sparse.model.engines.spconv import SpConv
from scott_sparse.model.sites import ActiveSites
from scott_sparse.shapes import Float, Tensor

__all__ = ["ENGINES", "ActiveSites", "Engine", "choose_engine"]


@runtime_checkable
class Engine(Protocol):
    """The layers of a stem (see `stages`) for the active sites of one batch, on a representation `x` of its own."""

    def __init__(self, active: ActiveSites): ...

    def enter(self, images: Float[Tensor, "B C H W"]) -> Any:
        """The visible pixels as `x`."""

    def conv(
        self, x: Any, kernel: Float[Tensor, "K C k k"], bias: Float[Tensor, " K"] | None, *, stride: int, padding: int
    ) -> Any:
        """At the active sites: `F.conv2d(zero-filled map, kernel, bias, stride, padding)`."""

    def pool(self, x: Any) -> Any:
        """At the active sites: `dense.max_blur_pool(zero-filled map)`."""

    def elementwise(self, x: Any, function: Callable[[Tensor], Tensor]) -> Any:
        """A function of each value by itself that keeps zeros."""

    def rows(self, x: Any, function: Callable[[Tensor], Tensor]) -> Any:
        """A function from (n, C) to (n, C), one row for each of the n active sites, in packed order."""

    def leave(self, x: Any) -> Float[Tensor, "S D"]:
        """The tokens, from one site per patch."""
        ...


ENGINES: dict[str, type[Engine]] = {"dense": Dense, "halo": Halo, "spconv": SpConv}

# On a CPU `halo` is faster than `dense` up to this share of visible patches (benchmarks/RESULTS.md). Where tokens are
# narrow, copying windows costs more of what is saved.
HALO_MAX_SHARE, HALO_MAX_SHARE_NARROW, NARROW_DIM = 0.5, 0.3, 192


def check_engine(name: str) -> None:
    """Raises ValueError unless `name` is "auto" or the name of an engine."""
    if name != "auto" and name not in ENGINES:
        renamed = "; tiles is called halo now" if name == "tiles" else ""
        raise ValueError(f"unknown engine {name!r}; expected one of {', '.join(('auto', *ENGINES))}{renamed}.")


def choose_engine(name: str, device: torch.device, *, visible_share: float, dim: int) -> str:
    """The engine that runs for tokens of width `dim` where a share `visible_share` of the patches is visible.

    "auto" on a CPU is `halo`, or `dense` where most patches are visible; on other devices `spconv`, or `dense` where
    spconv fails. Raises ValueError for an unknown name, and for an engine that cannot work here, with the reason.
    """
    check_engine(name)
    if name == "auto" and device.type == "cpu":
        return "halo" if visible_share <= (HALO_MAX_SHARE if dim >= NARROW_DIM else HALO_MAX_SHARE_NARROW) else "dense"
    failure = getattr(ENGINES["spconv" if name == "auto" else name], "failure", None)  # most work on every device
    reason = failure(device) if failure else None
    if name == "auto":
        return "dense" if reason else "spconv"
    if reason:
        raise ValueError(f"engine {name} cannot work here: {reason}; use --engine auto, halo or dense.")
    return name
