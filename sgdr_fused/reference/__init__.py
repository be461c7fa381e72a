"""The step in plain PyTorch: the definition that every native backend is tested against."""

from sgdr_fused.options import Clipping
from sgdr_fused.reference.step import reference_step
from sgdr_fused.reference.stepper import ReferenceStepper

__all__ = ["Clipping", "ReferenceStepper", "reference_step"]
