"""SGD with momentum and cosine warm restarts as one fused optimizer step."""

from sgdr_fused.cli.plot import plot_schedule
from sgdr_fused.ema_schedule import EmaSchedule
from sgdr_fused.optimizer import FusedSGDR
from sgdr_fused.range_test import RangeTest, lr_range_test
from sgdr_fused.saving import load, save
from sgdr_fused.schedule import CosineWarmRestarts, Position, fit_T_0
from sgdr_fused.version import __version__

__all__ = [
    "CosineWarmRestarts",
    "EmaSchedule",
    "FusedSGDR",
    "Position",
    "RangeTest",
    "__version__",
    "fit_T_0",
    "load",
    "lr_range_test",
    "plot_schedule",
    "save",
]
