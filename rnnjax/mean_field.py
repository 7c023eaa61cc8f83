"""What theory predicts for large random networks: critical gain, time scale and Lyapunov exponents.

The network is h ← (1 − a) h + a φ(W h + b) with leak a, W_ij ~ N(0, g²/N) drawn once and kept, b_i ~ N(0, σ_b²), no
input, N → ∞. Its pre-activations r = W h + b are Gaussian. At a fixed point, and always for a = 1, their variance is
q = g² E[φ(√q z)²] + σ_b² with z ~ N(0, 1), and all exponents follow from it. The fixed point is stable where
χ = g² E[φ'(√q z)²] < 1. Beyond, a leaky network is chaotic and remembers its past: its exponents follow from the
autocovariance C(τ) of r, which dynamic mean-field theory finds from itself. All is float64 on the host.

References: H. Sompolinsky, A. Crisanti & H. J. Sommers, Physical Review Letters 61, 1988. C. M. Newman, Communications
in Mathematical Physics 103, 1986. B. Poole et al., NeurIPS 2016. R. Engelken, F. Wolf & L. F. Abbott, Lyapunov spectra
of chaotic recurrent neural networks, Physical Review Research 5, 2023.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.polynomial import polynomial

from rnnjax import validation
from rnnjax.activations import make_activation
from rnnjax.quadrature import CUTOFF, UNBOUNDED, ZERO, gaussian_quadrature, log_slope, value_and_slope
from rnnjax.typing import Array, ArrayLike

_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class RandomNetwork:
    """A large random vanilla (leak 1) or leaky network, and what theory predicts for it; computed once, when asked for.

    Attributes:
      gain: g, √N times the standard deviation of a recurrent weight.
      activation: φ, a name of ``rnnjax.activations`` or an elementwise JAX function.
      leak: a in (0, 1], the share of the state that is replaced at each step.
      bias_variance: σ_b².

    Raises:
      ValueError: a number out of range, an unknown activation, a φ that is flat where the activity is.
      RuntimeError: no stationary state found, within a percent of the critical gain.

    Example:
      >>> network = RandomNetwork(1.5)
      >>> round(network.largest_exponent, 4), network.lyapunov_exponents(3).round(3).tolist()
      (0.0652, [-0.071, -0.466, -1.355])
    """

    gain: float
    activation: str | Callable[[Array], Array] = "tanh"
    leak: float = 1.0
    bias_variance: float = 0.0

    def __post_init__(self) -> None:
        validation.positive_number("gain", self.gain)
        validation.number_between("leak", self.leak, 0, 1, open_low=True)
        validation.number_between("bias_variance", self.bias_variance, 0, UNBOUNDED)
        make_activation(self.activation)

    @functools.cached_property
    def fixed_point_variance(self) -> float:
        """Variance q = g² E[φ(√q z)²] + σ_b² of the pre-activations that unit activity leads to.

        0 where it dies out, ``math.inf`` where it grows without bound (ReLU with g² > 2), smaller in leaky chaos.
        """

        def excess(variance: float) -> float:
            return self.gain**2 * _second_moments(self.activation, variance)[0] + self.bias_variance - variance

        return _root_from(self.gain**2 + self.bias_variance, excess)

    @property
    def perturbation_growth(self) -> float:
        """χ = g² E[φ'(√q z)²], by which a squared perturbation of a vanilla network grows in a step; critical at 1."""
        return self.gain**2 * _second_moments(self.activation, self.fixed_point_variance)[1]

    @functools.cached_property
    def largest_exponent(self) -> float:
        """Largest Lyapunov exponent λ₁ in nats per step: ½ ln χ for a = 1, ln(1 − a + a √χ) at a fixed point.

        In a chaotic leaky network it is the largest λ = ln z for which perturbations grow with correlations ψ(τ)::

            (z² + (1−a)²) ψ(τ) − (1−a) z (ψ(τ+1) + ψ(τ−1)) = a² g² E[φ'(r_0) φ'(r_τ)] ψ(τ)
        """
        fixed_point = math.log(1 - self.leak + self.leak * math.sqrt(self.perturbation_growth))
        return self._chaos.largest_exponent if self._chaos else fixed_point

    @property
    def time_scale(self) -> float:
        """Steps in which a squared perturbation changes by e, ξ = 1/|2 λ₁| (1/|ln χ| for a = 1); ∞ when critical."""
        return 1 / abs(2 * self.largest_exponent) if abs(self.largest_exponent) > _ROUNDING else math.inf

    def lyapunov_exponents(self, num_exponents: int) -> np.ndarray:
        """Lyapunov spectrum as the N exponents at the shares x(λ_i) = (i − ½)/N, to lay over N measured ones.

        Vanilla: E[g² φ'² / (g² φ'² x + e^(2λ))] = 1 (Newman 1986). At a fixed point: ln|eigenvalues|. Leaky, chaotic:
        Thouless' formula, 1 − x = d/dλ (NT)⁻¹ log|det(z S − (1−a) − a φ'(r_t) W)| over units and times, z = e^λ, S the
        shift in time, averaged over W by an operator-valued Dyson equation for sampled r_t. This takes seconds, more
        for a small leak; error about 2 % of the spread, more below a leak of 0.05 and in the last few shares.

        Args:
          num_exponents: N.

        Returns:
          ``[N]`` nats per step, float64, descending; −inf where φ' = 0 takes rank away. The φ' of tanh and sigmoid, by
          name, never counts as 0; that of others does where it underflows. Relative error 1e-3 up to a gain of 1000.
        """
        count = validation.positive_integer("num_exponents", num_exponents)
        return np.interp((np.arange(count) + 0.5) / count, *self._spectrum, right=-math.inf)

    def share_above(self, exponents: ArrayLike) -> np.ndarray:
        """Share x(λ) in [0, 1] of the Lyapunov exponents above λ (nats per step, any shape)."""
        shares, values = self._spectrum
        return np.interp(np.asarray(exponents, np.float64), values[::-1], shares[::-1])

    @functools.cached_property
    def _chaos(self) -> "_Chaos | None":
        # Activity that grows without bound keeps its direction, hence φ'(r), as at a fixed point.
        settles = self.perturbation_growth <= 1 + _ROUNDING or math.isinf(self.fixed_point_variance)
        return None if self.leak == 1 or settles else _Chaos(self)

    @functools.cached_property
    def _spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """Shares, ascending from 0, and exponents, descending from λ₁; the last share is below 1 where rank is lost."""
        shares, exponents = self._chaos.tabulated() if self._chaos else _fixed_point_spectrum(self)
        shares = np.maximum.accumulate(np.clip(np.append(0, shares), 0, 1))
        shares[-1] = 1.0 if shares[-1] > 1 - 1e-6 else shares[-1]
        return shares, np.minimum.accumulate(np.append(self.largest_exponent, exponents))


def critical_gain(activation: str | Callable[[Array], Array] = "tanh", bias_variance: float = 0.0) -> float:
    """Gain on the critical line, g² E[φ'(√q z)²] = 1 with q = g² E[φ(√q z)²] + σ_b² (Poole et al. 2016), at any leak.

    Args:
      activation: φ, a name of ``rnnjax.activations`` or an elementwise JAX function.
      bias_variance: σ_b².

    Returns:
      σ_w, the gain above which perturbations grow; for an unbounded φ it may be the gain at which q becomes infinite.

    Raises:
      ValueError: a negative variance, an unknown activation, a φ that is flat where the activity is.

    Example:
      >>> round(critical_gain("tanh", bias_variance=0.05) ** 2, 5)
      1.76095
    """
    validation.number_between("bias_variance", bias_variance, 0, UNBOUNDED)

    def excess(variance: float) -> float:
        value, slope = _second_moments(activation, variance)
        return value / slope + bias_variance - variance

    resting = bias_variance + value_and_slope(activation, np.zeros(1))[0].item() ** 2
    return 1 / math.sqrt(_second_moments(activation, _root_from(resting, excess) if resting else 0.0)[1])


def _second_moments(activation: str | Callable[[Array], Array], variance: float) -> tuple[float, float]:
    """Returns E[φ(√q z)²] and E[φ'(√q z)²]."""
    x, p = gaussian_quadrature(variance)
    value, slope = value_and_slope(activation, x)
    if not (p @ value**2 >= 0 and p @ slope**2 > 0):
        raise ValueError(f"activation must be a number, and not flat, on most of the real line, got {activation!r}")
    return float(p @ value**2), float(p @ slope**2)


def _root_from(start: float, excess: Callable[[float], float]) -> float:
    """Returns the first zero of ``excess`` on the side of ``start`` that its sign points to; 0 or ∞ without one."""
    first, here = excess(start), start
    factor = 2.0 if first > 0 else 0.5
    while first * excess(here) > 0 and abs(first) > _ROUNDING * start:
        here *= factor
        if not ZERO < here < UNBOUNDED:
            return math.inf if first > 0 else 0.0
    return _bisect(lambda variance: first * excess(variance) > 0, here / factor, here) if here != start else start


def _bisect(is_before: Callable[[float], bool], start: float, end: float) -> float:
    """Returns the point between ``start`` and ``end``, to rounding, up to which ``is_before`` holds."""
    for _ in range(60):
        middle = (start + end) / 2
        start, end = (middle, end) if is_before(middle) else (start, middle)
    return (start + end) / 2


def _fixed_point_spectrum(network: RandomNetwork) -> tuple[np.ndarray, np.ndarray]:
    """Spectrum ln|1 − a + a ζ| with ζ the eigenvalues of φ'(r) W, isotropic in the plane; of any vanilla network too.

    The share of the ζ above |ζ| is y = E[g² φ'² / (g² φ'² + ρ)] with ρ = |ζ|²/y. Jensen's formula moves their disk:
    1 − x(ln z) is the mean over ω of Re[z e^(iω) (1 − y(|A|)) / (a A)] with A = (z e^(iω) − (1 − a))/a.
    """
    x, p = gaussian_quadrature(network.fixed_point_variance)
    squares = 2 * (
        math.log(network.gain) + log_slope(network.activation, x)
    )  # Logs: many squares underflow at large gains.
    order = np.argsort(squares)[np.count_nonzero(squares == -math.inf) :]
    squares, p = squares[order], p[order]
    depth = squares[-1] - squares[np.searchsorted(np.cumsum(p), 1e-8)] + 40
    ratios = squares[-1] + 40 - np.geomspace(20, 20 + depth, 3000)  # ln ρ, densest around the largest square.
    shares = np.array([p @ np.exp(-np.logaddexp(0, ratio - squares)) for ratio in ratios])
    moduli = 0.5 * (ratios + np.log(shares))
    if network.leak == 1:
        return shares, moduli
    kept, rank, top = 1 - network.leak, shares[-1], network.largest_exponent
    inner = kept - network.leak * math.sqrt(network.perturbation_growth)
    bottom = math.log(inner) if inner > 0 else top - CUTOFF
    step = math.log(kept) + np.array([-1e-9, 1e-9])  # Where φ' = 0 the eigenvalue is 1 − a, a step in the share.
    exponents = np.union1d(np.linspace(bottom, top, 800), step[step > bottom])[::-1]
    turned = np.exp(exponents[:, None] + 1j * np.pi * (np.arange(512) + 0.5) / 512)
    above = np.interp(np.log(np.abs(turned - kept) / network.leak), moduli[::-1], shares[::-1], right=0.0)
    below = (1 - rank) * (exponents > math.log(kept)) + (turned / (turned - kept) * (rank - above)).real.mean(1)
    return 1 - below, exponents


class _Chaos:
    """A chaotic leaky network, by C(τ) on a periodic window: C = g² |a / (e^(iω) − (1−a))|² C_φ + σ_b² in frequency.

    Only every ``stride``-th lag is kept: memory grows as 1/a, and C has no frequencies far above a.
    """

    def __init__(self, network: RandomNetwork) -> None:
        self.network, self.kept = network, 1 - network.leak
        memory = 64 / (network.leak * min(1.0, math.sqrt(math.log(network.perturbation_growth))))
        octaves = math.ceil(math.log2(memory))
        length, self.stride = 2 ** min(octaves, 14), 2 ** max(octaves - 14, 0)
        delay = np.exp(2j * np.pi * np.fft.rfftfreq(length, self.stride)) - self.kept
        transfer = np.abs(network.gain * network.leak / delay) ** 2

        def update(covariance: np.ndarray) -> np.ndarray:
            products = _expected_products(network.activation, covariance)[0]
            return np.fft.irfft(transfer * np.fft.rfft(products), length) + network.bias_variance

        start = (2 / network.leak - 1) * np.fft.irfft(transfer, length) + network.bias_variance
        self.covariance = _fixed_point(update, start, 1e-8 * network.gain**2)
        products = _expected_products(network.activation, self.covariance)[1]
        self.slope_products = (network.gain * network.leak) ** 2 * products
        largest = _bisect(self._perturbation_grows, self.kept, self.kept + math.sqrt(self.slope_products[0]))
        self.largest_exponent = math.log(largest)

    def _perturbation_grows(self, z: float) -> bool:
        """Whether (z² + (1−a)²) I − (1−a) z (S + Sᵀ) − a² g² diag E[φ' φ'] has a pivot, so an eigenvalue, below 0.

        With E[φ' φ'] constant between lags, ψ(τ+1) + ψ(τ−1) = 2 cosh(κ) ψ(τ) makes 2 cosh(n κ) the diagonal for Sⁿ.
        """
        bend = ((z - self.kept) ** 2 - self.slope_products[: len(self.slope_products) // 2]) / (self.kept * z)
        rate, pivot = 2 * np.arcsinh(np.sqrt(bend + 0j) / 2), math.inf  # From 2 cosh(κ) − 2: it is of order a².
        for lag, entry in enumerate((2 * np.cosh(self.stride * rate).real).tolist()):
            pivot = entry - (2 if lag == 1 else 1) / pivot  # Lag 1 is both neighbours of lag 0: ψ is even.
            if pivot <= 0:
                return True
        return False

    def tabulated(self, num_points: int = 26) -> tuple[np.ndarray, np.ndarray]:
        """Shares x and exponents λ < λ₁, each next λ in the middle of the widest gap Δx Δλ."""
        slopes, top = self._sampled_slopes(), self.largest_exponent
        # Far below ln(1 − a) nothing is left; a dozen times as far, no midpoint falls on that singular value.
        table = [(0.0, -top), (1.0, 11 * top - 12 * math.log(self.kept))]
        while len(table) < num_points:
            steps = np.diff(table, axis=0)
            widest = int(np.argmax(steps[:, 0] * steps[:, 1]))
            negative = (table[widest][1] + table[widest + 1][1]) / 2
            table.insert(widest + 1, (self._share_above(-negative, slopes), negative))
        shares, negatives = np.transpose(table[1:])
        return shares, -negatives

    def _sampled_slopes(self) -> np.ndarray:
        """a g φ'(r_t) ``[n, T]`` of Gaussian trajectories r, periodic in T, scaled to their exact mean square."""
        length = min(max(2 * math.ceil(8 / self.network.leak), 32), 200)
        noise = np.fft.rfft(np.random.default_rng(0).normal(size=(4096 // length, length)))
        noise /= np.sqrt(np.mean(np.abs(noise) ** 2, axis=0) / length)  # Exact in each frequency, for smaller errors.
        lags = np.arange(length // 2 + 1)
        covariance = np.interp(lags / self.stride, np.arange(len(self.covariance)), self.covariance)
        power = np.fft.hfft(covariance, length)[: length // 2 + 1]
        trajectories = np.fft.irfft(noise * np.sqrt(np.maximum(power, 0)), length)
        slopes = value_and_slope(self.network.activation, trajectories)[1]
        return slopes * math.sqrt(self.slope_products[0] / np.mean(slopes**2))

    def _share_above(self, exponent: float, slopes: np.ndarray) -> float:
        """Solves the Dyson equation of A − D W at z = e^λ, with A = z S − (1−a), D = diag slopes, over the times T.

        P = (D R D + A Σ⁻¹ Aᵀ)⁻¹ for each unit; Σ = mean of D P D and R = y Σ⁻¹, y = 1 − A Σ⁻¹ Aᵀ mean P, are circulant,
        so known by their eigenvalues; 1 − x is the mean over frequencies of Re[z S A⁻¹ (1 − y)].
        """
        if not self._perturbation_grows(math.exp(exponent)):  # Outside the spectrum.
            return float(exponent < math.log(self.kept))
        length, times = slopes.shape[1], np.arange(slopes.shape[1])
        lag, pairs = times[:, None] - times, slopes[:, :, None] * slopes[:, None, :]
        shift = np.exp(exponent + 2j * np.pi * np.fft.rfftfreq(length))
        distance = np.abs(shift - self.kept) ** 2

        def eigenvalues(matrix: np.ndarray) -> np.ndarray:
            return np.fft.rfft(matrix[(times[:, None] + times) % length, times].mean(1)).real

        def update(state: np.ndarray) -> np.ndarray:
            variance, share = np.exp(np.clip(state, -14, 14)).reshape(2, -1)
            inner, outer = np.fft.irfft(np.stack([share, distance]) / variance, length)[:, lag]
            inverse = np.linalg.inv(pairs * inner + outer)
            share = 1 - distance / variance * eigenvalues(inverse.mean(0))
            variance = eigenvalues((pairs * inverse).mean(0))
            # Only ΣR matters, so Σ is scaled to mean 1; plain steps would alternate between Σ and R, so half steps.
            scaled = np.append(variance / variance.mean(), share)
            return 0.5 * (state + np.log(np.maximum(scaled, 1e-6)))  # Below is noise, without effect on x.

        share = np.exp(_fixed_point(update, np.repeat([0.0, -1.0], len(shift)), 5e-3)[len(shift) :])
        return float(1 - np.fft.irfft((shift / (shift - self.kept) * (1 - share)).real, length)[0])


def _expected_products(activation: str | Callable[[Array], Array], covariance: np.ndarray) -> np.ndarray:
    """E[f(r_0) f(r_τ)] for φ and φ' ``[2, L]`` by Mehler's formula, Σ_k (E[f He_k]²/k!) (C(τ)/C(0))^k."""
    variance = max(covariance[0], ZERO)
    x, p = gaussian_quadrature(variance)
    functions, z = np.stack(value_and_slope(activation, x)), x / math.sqrt(variance)
    remainder, powers = functions**2 @ p, np.zeros((0, 2))
    negligible, previous, hermite = 1e-12 * remainder, np.zeros_like(x), np.ones_like(x)
    while len(powers) < 400 and (remainder > negligible).any():
        k = len(powers)
        powers = np.append(powers, (functions @ (p * hermite))[None] ** 2, axis=0)
        remainder = remainder - powers[-1]
        previous, hermite = hermite, (z * hermite - math.sqrt(k) * previous) / math.sqrt(k + 1)
    # What the orders left out hold is there at lag 0 and gone at lag 1.
    powers = np.append(powers, np.maximum(remainder, 0)[None], axis=0)
    return polynomial.polyval(np.clip(covariance / variance, -1, 1), powers)


def _fixed_point(update: Callable[[np.ndarray], np.ndarray], start: np.ndarray, tolerance: float) -> np.ndarray:
    """Solves u = update(u) for a vector u by Anderson mixing (J. ACM 12, 1965) after ten plain steps."""
    point = functools.reduce(lambda point, _: update(point), range(10), start)
    points, residuals = [point], [update(point) - point]
    for _ in range(3000):
        if np.abs(residuals[-1]).max() <= tolerance:
            return points[-1]
        plain = point = points[-1] + residuals[-1]
        if len(points) > 1:
            change, moved = np.diff(residuals, axis=0).T, np.diff(points, axis=0).T
            point = plain - (moved + change) @ np.linalg.lstsq(change, residuals[-1], rcond=1e-6)[0]
        residual = update(point) - point
        if not np.abs(residual).max() < np.abs(residuals[-1]).max():  # Led astray: forget, and step plainly.
            points, residuals, point, residual = [], [], plain, update(plain) - plain
        points, residuals = [*points[-5:], point], [*residuals[-5:], residual]
    raise RuntimeError(f"mean-field iteration still changes by {np.abs(residuals[-1]).max():.1e} after 3000 steps")
