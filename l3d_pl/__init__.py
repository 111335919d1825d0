"""l3d_pl: take neural networks apart in parameter space (local loss landscape decomposition, arXiv 2504.00194)."""

from typing import TYPE_CHECKING, Any

from l3d_pl.decomposition import Decomposition
from l3d_pl.errors import L3DError
from l3d_pl.gradients import SampleGradient, per_sample_gradients
from l3d_pl.subnetworks import Subnetworks
from l3d_pl.version import __version__

if TYPE_CHECKING:
    from l3d_pl.lightning_module import L3D

__all__ = ["L3D", "Decomposition", "L3DError", "SampleGradient", "Subnetworks", "__version__", "per_sample_gradients"]


def __getattr__(name: str) -> Any:
    """`L3D` is imported when it is first asked for: the core works without Lightning, and faster."""
    if name == "L3D":
        from l3d_pl.lightning_module import L3D

        return L3D
    raise AttributeError(f"module 'l3d_pl' has no attribute {name!r}")
