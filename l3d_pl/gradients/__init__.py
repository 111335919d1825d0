"""Per-sample gradients of a frozen model, never larger than they must be."""

from l3d_pl.gradients.extraction import Extraction, GradientExtractor, per_sample_gradients
from l3d_pl.gradients.sample_gradient import DenseGradient, OuterGradient, SampleGradient, concatenate

__all__ = [
    "DenseGradient",
    "Extraction",
    "GradientExtractor",
    "OuterGradient",
    "SampleGradient",
    "concatenate",
    "per_sample_gradients",
]
