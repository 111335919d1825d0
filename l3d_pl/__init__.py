"""l3d_pl: take neural networks apart in parameter space (local loss landscape decomposition, arXiv 2504.00194)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l3d_pl.decomposition import Decomposition
    from l3d_pl.errors import L3DError
    from l3d_pl.gradients import SampleGradient, per_sample_gradients
    from l3d_pl.lightning_module import L3D
    from l3d_pl.subnetworks import Subnetworks
    from l3d_pl.version import __version__

__all__ = ["L3D", "Decomposition", "L3DError", "SampleGradient", "Subnetworks", "__version__", "per_sample_gradients"]

_MODULES = {
    "L3D": "lightning_module",
    "Decomposition": "decomposition",
    "L3DError": "errors",
    "SampleGradient": "gradients",
    "per_sample_gradients": "gradients",
    "Subnetworks": "subnetworks",
    "__version__": "version",
}


def __getattr__(name: str) -> Any:
    """Each name is imported when it is first asked for: `l3d slurm status` needs no torch, the core no Lightning."""
    if name in _MODULES:
        return getattr(import_module(f"l3d_pl.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'l3d_pl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
