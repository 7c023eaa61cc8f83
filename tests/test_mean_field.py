"""Theory of random networks: against closed forms, adaptive quadrature in mpmath, and simulated networks."""

import functools
import math

import jax
import mpmath
import numpy as np
import pytest
from scipy import integrate, linalg, optimize

from rnnjax import mean_field
from rnnjax.activations import ACTIVATIONS
from rnnjax.mean_field import RandomNetwork, critical_gain


def sech_squared(x):
    decay = np.exp(-2 * np.abs(x))
    return 4 * decay / (1 + decay) ** 2


# Written out in NumPy, so that the simulations share no code with the library.
FUNCTIONS = {"tanh": (np.tanh, sech_squared), "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0)}


def random_network(size, gain, seed, bias_variance=0.0):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(size, size)) * gain / math.sqrt(size)
    return weights, math.sqrt(bias_variance) * rng.normal(size=size), rng.normal(size=size)


def simulated_exponents(size, gain, leak, seed, *, num_exponents, activation="tanh", bias_variance=0.0, steps=400):
    """QR sums of one simulated network after 400 steps on the way to its stationary state."""
    weights, bias, state = random_network(size, gain, seed, bias_variance)
    function, slope = FUNCTIONS[activation]
    frame, total = np.linalg.qr(np.random.default_rng(seed + 100).normal(size=(size, num_exponents)))[0], 0
    for step in range(400 + steps):
        if activation == "relu":  # Exponents of a positively homogeneous network know no scale.
            state = state / np.linalg.norm(state)
        drive = weights @ state + bias
        state = (1 - leak) * state + leak * function(drive)
        if step >= 380:
            frame = (1 - leak) * frame + leak * slope(drive)[:, None] * (weights @ frame)
            frame, triangle = np.linalg.qr(frame)
            if step >= 400:
                total = total + np.log(np.abs(np.diag(triangle)) + 1e-300)
    return np.sort(total / steps)[::-1]


def mean_square(function, deviation):
    """E[f(σ z)²] by adaptive quadrature, split where f is narrow."""
    sigma = mpmath.mpf(deviation)
    splits = [mpmath.mpf(s) / sigma for s in (-40, -10, -4, -1, 0, 1, 4, 10, 40)]
    inner = [s for s in splits if abs(s) < 12]
    density = lambda z: mpmath.exp(-z * z / 2) / mpmath.sqrt(2 * mpmath.pi)  # noqa: E731
    return mpmath.quad(lambda z: density(z) * function(sigma * z) ** 2, [-14, -8, *inner, 8, 14])


@functools.cache
def exact_tanh(gain):
    """q, E[sech⁴] of the vanilla tanh network, by mpmath alone."""
    q = mpmath.findroot(lambda q: gain**2 * mean_square(mpmath.tanh, mpmath.sqrt(q)) - q, (0.5 * gain**2, gain**2))
    return float(q), float(mean_square(lambda x: mpmath.sech(x) ** 2, mpmath.sqrt(q)))


@pytest.mark.parametrize("gain", [1.5, 3.0, 10.0, 100.0])
def test_variance_and_largest_exponent_equal_adaptive_quadrature(gain):
    q, slope = exact_tanh(gain)
    network = RandomNetwork(gain)
    assert network.fixed_point_variance == pytest.approx(q, rel=1e-10)
    assert network.largest_exponent == pytest.approx(0.5 * math.log(gain**2 * slope), abs=1e-10)


@pytest.mark.parametrize("gain", [1.5, 3.0, 10.0])
def test_share_of_growing_directions_solves_the_equation_in_mpmath(gain):
    deviation = mpmath.sqrt(exact_tanh(gain)[0])
    for exponent in (-1.0, 0.0):
        share = float(RandomNetwork(gain).share_above(exponent))

        def root_of_kernel(x, share=share, exponent=exponent):
            strength = gain**2 * mpmath.sech(x) ** 4
            return mpmath.sqrt(strength / (strength * share + mpmath.exp(2 * exponent)))

        assert float(mean_square(root_of_kernel, deviation)) == pytest.approx(1, abs=1e-4)


LOG_SLOPES = {
    "tanh": lambda x: 2 * (math.log(2) - x - np.log1p(np.exp(-2 * x))),
    "sigmoid": lambda x: -x - 2 * np.log1p(np.exp(-x)),
}


@pytest.mark.parametrize(
    ("activation", "gain", "rtol"),
    [("tanh", 20, 1e-4), ("tanh", 40, 1e-4), ("tanh", 300, 2e-4), ("tanh", 1000, 1e-3), ("sigmoid", 1000, 2e-4)],
)
def test_spectrum_of_saturated_units_solves_its_equation_in_logarithms(activation, gain, rtol):
    """E[1/(x + e^(2λ)/(g² φ'²))] = 1 by the trapezoidal rule, for φ'² far below the smallest float64."""
    function = {"tanh": mpmath.tanh, "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x))}[activation]
    excess = lambda q: gain**2 * mean_square(function, mpmath.sqrt(q)) - q  # noqa: E731
    q = float(mpmath.findroot(excess, (0.3 * gain**2, gain**2)))
    z = np.linspace(0, 12, 200_001)
    weights = np.exp(-z * z / 2)
    weights[0] /= 2
    weights /= weights.sum()
    log_squares = 2 * (math.log(gain) + LOG_SLOPES[activation](math.sqrt(q) * z))

    def exact_exponent(share):
        def excess(exponent):
            return weights @ (1 / (share + np.exp(np.minimum(2 * exponent - log_squares, 700)))) - 1

        return optimize.brentq(excess, log_squares[-1] / 2, log_squares[0] / 2 + 5)

    exponents = RandomNetwork(gain, activation).lyapunov_exponents(20)
    exact = [exact_exponent((i + 0.5) / 20) for i in (0, 3, 10, 15, 17, 19)]
    np.testing.assert_allclose(exponents[[0, 3, 10, 15, 17, 19]], exact, rtol=rtol)


def test_flat_ends_lose_exactly_their_share_of_the_rank():
    """φ = x clipped to ±1 has φ'² = 1 on the share p = P(|r| < 1): e^(2λ) = g² (p − x), as for ReLU."""
    q = mpmath.findroot(lambda q: 9 * mean_square(lambda x: max(-1, min(1, x)), mpmath.sqrt(q)) - q, (4, 9))
    share = float(mpmath.erf(1 / mpmath.sqrt(2 * q)))
    exponents = RandomNetwork(3.0, lambda x: jax.numpy.clip(x, -1, 1)).lyapunov_exponents(100)
    shares = (np.arange(100) + 0.5) / 100
    alive = shares < share
    np.testing.assert_allclose(exponents[alive], 0.5 * np.log(9 * (share - shares[alive])), atol=1e-3)
    assert (exponents[~alive] == -math.inf).all()


def test_published_values_of_the_tanh_network():
    assert RandomNetwork(1.5).largest_exponent == pytest.approx(0.06522, abs=5e-6)
    assert RandomNetwork(1.5).share_above(0.0) == pytest.approx(0.0842, abs=2e-4)
    assert RandomNetwork(3.0).largest_exponent == pytest.approx(0.3102, abs=2e-4)
    assert RandomNetwork(3.0).share_above(0.0) == pytest.approx(0.1528, abs=2e-4)


@pytest.mark.parametrize(
    ("bias_variance", "squared_gain"),
    [(0.0, 1.0), (0.001, 1.18919), (0.01, 1.42421), (0.05, 1.76095), (0.1, 1.98607), (0.3, 2.50513)],
)
def test_critical_line_of_tanh(bias_variance, squared_gain):
    gain = critical_gain("tanh", bias_variance)
    assert gain**2 == pytest.approx(squared_gain, abs=6e-6)
    assert RandomNetwork(0.99 * gain, bias_variance=bias_variance).largest_exponent < 0
    assert RandomNetwork(1.01 * gain, bias_variance=bias_variance).largest_exponent > 0


@pytest.mark.slow
@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"softplus"}))
def test_critical_gain_is_where_perturbations_neither_grow_nor_shrink(activation):
    gain = critical_gain(activation, 0.2)
    assert RandomNetwork(0.98 * gain, activation, bias_variance=0.2).perturbation_growth < 1
    assert RandomNetwork(1.02 * gain, activation, bias_variance=0.2).perturbation_growth > 1


@pytest.mark.parametrize(
    ("activation", "gain"), [("relu", math.sqrt(2)), ("leaky_relu", math.sqrt(2 / 1.0001)), ("identity", 1), ("elu", 1)]
)
def test_critical_gain_in_closed_form(activation, gain):
    assert critical_gain(activation) == pytest.approx(gain, rel=1e-9)


@pytest.mark.slow
def test_relu_in_closed_form():
    """E[φ²] = q/2 and E[φ'²] = ½: q = σ_b²/(1 − g²/2), e^(2λ) = g² (½ − x), and half of the rank is lost."""
    assert RandomNetwork(1.2, "relu", bias_variance=0.3).fixed_point_variance == pytest.approx(0.3 / 0.28, rel=1e-12)
    assert RandomNetwork(1.2, "relu").fixed_point_variance == 0
    assert RandomNetwork(1.5, "relu").fixed_point_variance == math.inf
    exponents = RandomNetwork(1.5, "relu").lyapunov_exponents(20)
    shares = (np.arange(10) + 0.5) / 20
    np.testing.assert_allclose(exponents[:10], 0.5 * np.log(1.5**2 * (0.5 - shares)), atol=1e-4)
    assert (exponents[10:] == -math.inf).all()


def test_own_activation_in_closed_form():
    """φ = erf(√π x / 2): E[φ²] = (2/π) arcsin(c/(1 + c)), E[φ'²] = (1 + 2c)^(−½) with c = π q / 2 (Williams 1998)."""
    network = RandomNetwork(2.0, lambda x: jax.lax.erf(x * (math.sqrt(math.pi) / 2)))
    c = math.pi * network.fixed_point_variance / 2
    assert network.fixed_point_variance == pytest.approx(4 * 2 / math.pi * math.asin(c / (1 + c)), rel=1e-11)
    assert network.largest_exponent == pytest.approx(0.5 * math.log(4 / math.sqrt(1 + 2 * c)), abs=1e-11)


def test_time_scale():
    assert RandomNetwork(0.9).time_scale == pytest.approx(1 / abs(math.log(0.81)), rel=1e-9)
    assert RandomNetwork(1.0).time_scale == math.inf
    slow = RandomNetwork(0.9, leak=0.1)
    assert slow.time_scale == pytest.approx(1 / abs(2 * math.log(0.99)), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("gain", "leak"), [(0.9, 1.0), (0.8, 0.3), (1.7, 0.4), (0.6, 0.7)])
def test_linear_network_has_eigenvalues_uniform_in_a_shifted_disk(gain, leak):
    """The share above e^λ is the part of the disk of radius a g around 1 − a outside the circle of radius e^λ."""
    rng = np.random.default_rng(0)
    points = np.sqrt(rng.uniform(size=400_000)) * np.exp(2j * np.pi * rng.uniform(size=400_000))
    moduli = np.log(np.abs(1 - leak + leak * gain * points))
    network = RandomNetwork(gain, "identity", leak=leak)
    levels = np.quantile(moduli, np.linspace(0.01, 0.99, 25))
    np.testing.assert_allclose(network.share_above(levels), np.linspace(0.99, 0.01, 25), atol=4e-3)
    assert network.largest_exponent == pytest.approx(math.log(1 - leak + leak * gain), abs=1e-12)


def test_autocovariance_is_that_of_a_filtered_activation():
    """C(τ) = g² E[h_0 h_τ] in a simulated network, whose own C_φ is measured over its units."""
    chaos = RandomNetwork(3.0, leak=0.5)._chaos
    samples = []
    for seed in range(2):
        weights, _, state = random_network(600, 3.0, seed)
        for step in range(700):
            drive = weights @ state
            state = 0.5 * state + 0.5 * np.tanh(drive)
            if step >= 200:
                samples.append(drive)
    drives = np.array(samples).reshape(2, 500, 600)
    for lag in (0, 1, 3, 8):
        measured = np.mean(drives[:, : 500 - lag] * drives[:, lag:], axis=(1, 2))
        assert measured.mean() == pytest.approx(chaos.covariance[lag], abs=0.05 * chaos.covariance[0])


def test_expected_products_equal_their_arcsine_law():
    """E[erf erf] of correlated Gaussians is (2/π) arcsin(2 C(τ)/(1 + 2 q)) (Williams 1998)."""
    covariance = 3.0 * np.cos(np.linspace(0, np.pi, 9))
    products = mean_field._expected_products(jax.lax.erf, covariance)[0]
    np.testing.assert_allclose(products, 2 / np.pi * np.arcsin(2 * covariance / 7), atol=1e-9)


def test_vanilla_spectrum_agrees_with_simulation():
    exponents = np.array([simulated_exponents(200, 3.0, 1.0, seed, num_exponents=200, steps=150) for seed in range(3)])
    theory = RandomNetwork(3.0).lyapunov_exponents(200)
    assert np.abs(exponents.mean(0) - theory)[:190].mean() < 0.03
    assert exponents[:, 0].mean() == pytest.approx(theory[0], abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gain", "leak", "bias_variance", "activation"),
    [
        (2.0, 0.5, 0.0, "tanh"),
        (5.0, 0.5, 0.0, "tanh"),
        (3.0, 0.2, 0.0, "tanh"),
        (3.0, 0.5, 0.3, "tanh"),
        (1.2, 0.5, 0.0, "relu"),
        (2.0, 0.5, 0.0, "relu"),
    ],
)
def test_leaky_spectrum_agrees_with_simulation(gain, leak, bias_variance, activation):
    options = {"num_exponents": 128, "bias_variance": bias_variance, "activation": activation}
    measured = np.mean([simulated_exponents(128, gain, leak, s, steps=200, **options) for s in range(2)], 0)[:115]
    network = RandomNetwork(gain, activation, leak=leak, bias_variance=bias_variance)
    theory = network.lyapunov_exponents(128)[:115]
    spread = measured[0] - measured[-1]
    assert np.abs(measured - theory).mean() < 0.02 * spread
    assert np.abs(measured - theory).max() < 0.08 * spread


@pytest.mark.slow
@pytest.mark.parametrize(("gain", "leak"), [(2.0, 0.5), (5.0, 0.5), (3.0, 0.2)])
def test_largest_leaky_exponent_agrees_with_simulation(gain, leak):
    runs = [simulated_exponents(400, gain, leak, seed, num_exponents=2, steps=1200)[0] for seed in range(3)]
    standard_error = np.std(runs, ddof=1) / math.sqrt(3)
    # Finite networks lie below the limit, the more the smaller they are.
    bias = 0.1 * RandomNetwork(gain, leak=leak).largest_exponent
    assert np.mean(runs) == pytest.approx(
        RandomNetwork(gain, leak=leak).largest_exponent, abs=3 * standard_error + bias
    )


@functools.cache
def exponent_in_continuous_time(gain):
    """λ₁ of dr/dt = −r + g W φ(r) for φ = erf(√π r / 2), where E[φ φ] = (2/π) arcsin(b C), b = (π/2)/(1 + π C(0)/2).

    C'' = C − g² E[φ φ] conserves C'² − C² + 2 g² ∫ E[φ φ] dC, so C(0) follows, and C by C' alone. Perturbations grow by
    λ₁ with 1 − (1 + λ₁)² the lowest level of −d²/dτ² + 1 − g² E[φ' φ'] (Sompolinsky, Crisanti & Sommers 1988).
    """
    scale = lambda start: math.pi / 2 / (1 + math.pi * start / 2)  # noqa: E731

    def squared_speed(c, b):
        return c**2 - 4 * gain**2 / (math.pi * b) * (b * c * np.arcsin(b * c) + np.sqrt(1 - (b * c) ** 2) - 1)

    start = optimize.brentq(lambda c: squared_speed(c, scale(c)), 0.05, gain**2, xtol=1e-14)
    b, step, early = scale(start), 0.002, 1e-3
    fall = gain**2 * 2 / math.pi * math.asin(b * start) - start
    times = (np.arange(12_000) + 0.5) * step
    speed = lambda _, c: -np.sqrt(np.maximum(squared_speed(c, b), 0))  # noqa: E731
    path = integrate.solve_ivp(
        speed, (early, times[-1]), [start - fall * early**2 / 2], t_eval=times, rtol=1e-9, atol=1e-12
    )
    slopes = gain**2 * 2 / math.pi * b / np.sqrt(1 - (b * path.y[0]) ** 2)
    diagonal = 2 / step**2 + 1 - slopes
    diagonal[0] -= 1 / step**2  # ψ is even.
    coupling = np.full(len(times) - 1, -1 / step**2)
    level = linalg.eigh_tridiagonal(diagonal, coupling, eigvals_only=True, select="i", select_range=(0, 0))[0]
    return math.sqrt(1 - level) - 1


@pytest.mark.slow
@pytest.mark.parametrize(("gain", "leak"), [(2.0, 1e-4), (2.0, 1e-6), (4.0, 1e-5)])
def test_small_leaks_reach_the_exponent_in_continuous_time(gain, leak):
    network = RandomNetwork(gain, lambda x: jax.lax.erf(x * (math.sqrt(math.pi) / 2)), leak=leak)
    assert network.largest_exponent / leak == pytest.approx(exponent_in_continuous_time(gain), rel=1e-4)


def test_leaky_chaos_joins_the_vanilla_network_and_the_critical_line():
    leaky, vanilla = RandomNetwork(3.0, leak=0.999), RandomNetwork(3.0)
    # What leaks stays above ln 0.001 = −6.9, so the smallest exponents differ.
    np.testing.assert_allclose(leaky.lyapunov_exponents(8)[:7], vanilla.lyapunov_exponents(8)[:7], atol=0.04)
    assert 0 < RandomNetwork(1.1, leak=0.5).largest_exponent < 0.01
    assert RandomNetwork(1.1, leak=0.5).largest_exponent < RandomNetwork(1.2, leak=0.5).largest_exponent


def test_works_whatever_the_settings_of_jax():
    with jax.enable_x64(True):
        assert RandomNetwork(1.5).largest_exponent == pytest.approx(0.06522, abs=5e-6)
    assert RandomNetwork(np.float32(1.5)).lyapunov_exponents(3).dtype == np.float64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomNetwork(-1.0), "gain must be a positive finite number, got -1.0"),
        (lambda: RandomNetwork(1.0, leak=0.0), "leak must be a number in .0, 1., got 0.0"),
        (lambda: RandomNetwork(1.0, bias_variance=-0.1), "bias_variance must be a number in .*got -0.1"),
        (lambda: RandomNetwork(1.0, "tan"), "activation must be one of .*'tanh'"),
        (lambda: RandomNetwork(1.0).lyapunov_exponents(0), "num_exponents must be a positive integer, got 0"),
        (lambda: RandomNetwork(1.0, lambda x: 0 * x).largest_exponent, "activation must be a number, and not flat"),
        (lambda: critical_gain("tanh", -1.0), "bias_variance must be a number in .*got -1.0"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
