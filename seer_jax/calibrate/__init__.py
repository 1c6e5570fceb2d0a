"""Calibration: thresholds or masses per layer and head that meet a target density, loss or attention mass."""

from seer_jax.calibrate.calibration import Calibration, calibrate
from seer_jax.calibrate.report import HeldOut, Report, held_out_report, print_report
from seer_jax.calibrate.target import Quantity, Target

__all__ = [
    "Calibration",
    "HeldOut",
    "Quantity",
    "Report",
    "Target",
    "calibrate",
    "held_out_report",
    "print_report",
]
