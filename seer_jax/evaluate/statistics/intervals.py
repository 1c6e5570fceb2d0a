"""Means of few independent draws: standard errors and 95% confidence intervals."""

import functools
import math
from collections.abc import Callable, Sequence
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

    def written(self, form: Callable[[float], str] | None = None) -> str:
        """As text: the value, and its ends where it has them.

        Args:
          form: writes each of them; None: `signed_percent`.

        >>> Interval(0.0091, 0.0038, 0.0144).written()
        '+0.91% (+0.38% to +1.44%)'
        """
        write = signed_percent if form is None else form
        ends = f" ({write(self.low)} to {write(self.high)})" if self.has_ends else ""
        return f"{write(self.value)}{ends}"


def signed_percent(share: float) -> str:
    """A difference as a percentage, with a second decimal below 10%.

    >>> signed_percent(0.287), signed_percent(-0.0038), signed_percent(-1e-9)
    ('+28.7%', '-0.38%', '+0.00%')
    """
    if not abs(share) < 0.09995:
        return f"{share:+.1%}"
    return f"{round(share, 4) + 0.0:+.2%}"  # no -0.00%


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
    return interval_of_means([sample])


def interval_of_means(samples: Sequence[Sequence[float]]) -> Interval:
    """Mean of the means of independent samples, and its 95% interval by Student's t, with the degrees of freedom of Welch and Satterthwaite:
    (sum of squared errors)^2 / sum of (squared error^2 / (n - 1)), an error being the standard error of one mean.

    >>> interval_of_means([[1.0, 2.0, 3.0]]) == interval_of_mean([1.0, 2.0, 3.0])
    True
    """
    estimates = [estimate_mean(sample) for sample in samples]
    mean = sum(estimate.value for estimate in estimates) / len(estimates)
    squares = [estimate.stderr**2 for estimate in estimates]
    if not all(map(math.isfinite, squares)):
        return Interval(mean, math.nan, math.nan)
    total = sum(squares)
    if not total:
        return Interval(mean, mean, mean)
    freedom = total**2 / sum(x**2 / (len(sample) - 1) for x, sample in zip(squares, samples, strict=True))
    reach = math.sqrt(total) / len(samples) * _quantile(freedom)
    return Interval(mean, mean - reach, mean + reach)


@functools.cache
def _quantile(freedom: float) -> float:
    """Of Student's t distribution, for both ends together."""
    from scipy.special import stdtrit  # takes a tenth of a second

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
