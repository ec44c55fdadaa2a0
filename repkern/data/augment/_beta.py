"""The inverse distribution function of Beta(a, a), for the weights of mixup."""

from __future__ import annotations

import math

__all__ = ["symmetric_beta"]

_TERMS, _STEPS = 2000, 200
_LN_HALF = math.log(0.5)


def symmetric_beta(alpha: float, uniform: float) -> float:
    """The x with P(X <= x) = uniform for X ~ Beta(alpha, alpha); uniform in (0, 1), alpha > 0.

    One draw gives one number, with no rejection: a function of the draw, and monotone in it. Newton's method on the
    logarithms, where the distribution function is almost a line for small alpha, kept inside a shrinking bracket.
    """
    if not 0 < uniform < 1 or not alpha > 0:
        raise ValueError(f"0 < uniform < 1 and alpha > 0 are needed, got uniform {uniform}, alpha {alpha}")
    if uniform > 0.5:
        return 1 - symmetric_beta(alpha, 1 - uniform)
    target, log_beta = math.log(uniform), 2 * math.lgamma(alpha) - math.lgamma(2 * alpha)
    low, high = -math.inf, _LN_HALF  # of log x
    at = min((target + math.log(alpha) + log_beta) / alpha, high)
    for _ in range(_STEPS):
        value, slope = _log_cdf(alpha, log_beta, at)
        low, high = (at, high) if value < target else (low, at)
        step = (target - value) / slope
        following = at + step
        if not low <= following <= high:
            following = (low + high) / 2 if low > -math.inf else high - 1
        if abs(following - at) <= 1e-14 * max(1.0, abs(at)):
            break
        at = following
    return math.exp(at)


def _log_cdf(alpha: float, log_beta: float, log_x: float) -> tuple[float, float]:
    """log P(X <= x), and its derivative by log x, for x <= 1/2.

    I_x(a, a) = x^a (1 - x)^a / (a B(a, a)) * sum_n (2a)_n / (a + 1)_n x^n: all terms are positive, and they shrink at
    least by half in the end.
    """
    x = math.exp(log_x)
    total = term = 1.0
    for n in range(_TERMS):
        term *= (2 * alpha + n) / (alpha + 1 + n) * x
        total += term
        if term < 1e-17 * total:
            break
    power = alpha * log_x + alpha * math.log1p(-x) - log_beta
    value = power - math.log(alpha) + math.log(total)
    return value, math.exp(power - math.log1p(-x) - value)
