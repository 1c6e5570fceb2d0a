"""Means of few independent draws: standard errors and 95% confidence intervals."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean of a sample and its standard error; NaN where the sample is too small for one."""

    value: float
    stderr: float


class Interval(NamedTuple):
    """An estimate and the ends of its 95% confidence interval; NaN where the sample is too small for them."""

    value: float
    low: float
    high: float

    @property
    def has_ends(self) -> bool:
        """Whether the sample was large enough for an interval."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def half_width(self) -> float:
        """Half of the interval's width: what stands behind ± in tables."""
        return (self.high - self.low) / 2


def estimate_mean(sample: Sequence[float]) -> Estimate:
    """Mean and sample deviation / sqrt(n) of n independent draws.

    >>> estimate_mean([1.0, 0.0, 1.0, 1.0])
    Estimate(value=0.75, stderr=0.25)
    """
    values = np.asarray(sample, np.float64)
    mean = float(values.mean()) if len(values) else math.nan
    with np.errstate(invalid="ignore"):  # losses may be infinite, and their deviation then is NaN
        return Estimate(mean, float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan)


def interval_of_mean(sample: Sequence[float]) -> Interval:
    """Mean and Student's 95% interval of n independent draws: mean ± t(n - 1) * sample deviation / sqrt(n).

    >>> mean, low, high = interval_of_mean([1.0, 2.0, 3.0])
    >>> round(low, 3), mean, round(high, 3)
    (-0.484, 2.0, 4.484)
    """
    mean, stderr = estimate_mean(sample)
    reach = stderr * _quantile(len(sample) - 1) if len(sample) > 1 else math.nan
    return Interval(mean, mean - reach, mean + reach)


@functools.cache
def _quantile(freedom: int) -> float:
    """Of Student's t distribution, for both ends together."""
    from scipy.special import stdtrit  # takes a tenth of a second

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
