"""When a sample was: a slow regression of sample index on host time.

In come pairs (sample_index, time) whose times jitter, mostly late, because a sender stamps what it pushes when it wakes up; out
comes a straight line that follows the device's clock. The state is an offset, a rate error and their uncertainty. Late residuals
weigh a thirtieth of early ones, so the line hugs the earliest stamps: a line through the middle would date spikes late and flatter
the latency.
"""

import math

_RATE_ERROR = 1e-4  # of a clock we have not met: 100 ppm
_FIRST_SD_S = 1e-3
_WANDER = 1e-11  # s^2 per s: the line follows within about 10 s
_RATE_WANDER = 1e-14  # 1 ppm in 100 s, as a warming crystal does
_LEAST_SD_S = 5e-5
_LATE_WEIGHT = 0.03
_MEMORY = 0.005  # of the residual's variance: 200 pairs


class ClockFit:
    """Follow the host-clock time of sample indices.

    Parameters
    ----------
    sampling_frequency : float
        Nominal; the rate is taken to be within some 100 ppm of it.

    Attributes
    ----------
    deviation_s : float
        Standard deviation of the residuals.

    Examples
    --------
    >>> fit = ClockFit(1000.0)
    >>> for sample_index in range(0, 5000, 10):
    ...     fit.update(sample_index, 7.0 + sample_index / 1000.0)
    >>> round(fit.t_origin(5000), 6)
    7.0
    """

    def __init__(self, sampling_frequency: float) -> None:
        self._period_s = 1.0 / sampling_frequency
        self.restart()

    def restart(self) -> None:
        """Forget the line, as after a reset of the sender's clock."""
        self.started = False
        self._at = 0
        self._origin_s = 0.0
        self._rate_error = 0.0
        self._var_origin, self._covar, self._var_rate = _FIRST_SD_S**2, 0.0, _RATE_ERROR**2
        self._var_residual = _FIRST_SD_S**2

    @property
    def deviation_s(self) -> float:
        return math.sqrt(self._var_residual)

    def t_origin(self, sample_index: int) -> float:
        """Return the time of sample 0 as seen from `sample_index`: the sample's time less index over nominal rate."""
        return self._origin_s + self._rate_error * (sample_index - self._at) * self._period_s

    def update(self, sample_index: int, time_s: float) -> None:
        """Take in that `sample_index` was stamped `time_s`."""
        observed = time_s - sample_index * self._period_s
        if not self.started:
            self.started, self._at, self._origin_s = True, sample_index, observed
            return
        self._advance(sample_index)
        residual = observed - self._origin_s
        self._var_residual += _MEMORY * (residual**2 - self._var_residual)
        noise = max(self._var_residual, _LEAST_SD_S**2) / (_LATE_WEIGHT if residual > 0 else 1.0)
        gain = self._var_origin / (self._var_origin + noise)
        gain_rate = self._covar / (self._var_origin + noise)
        self._origin_s += gain * residual
        self._rate_error += gain_rate * residual
        self._var_rate -= gain_rate * self._covar
        self._covar *= 1.0 - gain
        self._var_origin *= 1.0 - gain

    def _advance(self, sample_index: int) -> None:
        """Move the line's anchor to `sample_index`; uncertainty grows with the time passed."""
        step_s = (sample_index - self._at) * self._period_s
        self._origin_s += self._rate_error * step_s
        self._var_origin += 2 * step_s * self._covar + step_s**2 * self._var_rate + _WANDER * abs(step_s)
        self._covar += step_s * self._var_rate
        self._var_rate += _RATE_WANDER * abs(step_s)
        self._at = sample_index
