"""Activations against JAX's own values and mpmath's derivatives, above all where units saturate."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from rnnjax import activations, testing
from rnnjax.activations import ACTIVATIONS, make_activation

MAGNITUDES = [0.001, 0.25, 1.0, 3.0, 9.0, 12.5, 17.5, 25.0, 40.0]
ARGUMENTS = np.array([-a for a in reversed(MAGNITUDES)] + MAGNITUDES)

VALUES = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda a: a,
}
DERIVATIVES = {
    "tanh": lambda a: mpmath.sech(a) ** 2,
    "relu": lambda a: int(a > 0),
    "leaky_relu": lambda a: 1 if a > 0 else float(np.float32(0.01)),
    "elu": lambda a: mpmath.exp(min(a, 0)),
    "softplus": lambda a: 1 / (1 + mpmath.exp(-a)),
    "sigmoid": lambda a: 1 / ((1 + mpmath.exp(-a)) * (1 + mpmath.exp(a))),
    "identity": lambda a: 1,
}
SECOND_DERIVATIVES = {
    "tanh": lambda a: -2 * mpmath.tanh(a) * mpmath.sech(a) ** 2,
    "sigmoid": lambda a: -mpmath.tanh(a / 2) / (4 * mpmath.cosh(a / 2) ** 2),
    "elu": lambda a: mpmath.exp(a) if a <= 0 else 0,
    "softplus": lambda a: 1 / (4 * mpmath.cosh(a / 2) ** 2),
}


def exactly(function, arguments):
    """Values of an mpmath function at floats, to 40 digits before they are rounded."""
    with mpmath.workdps(40):
        return np.array([float(function(mpmath.mpf(float(a)))) for a in np.asarray(arguments)])


def relative_error(actual, expected):
    return np.max(np.abs(np.asarray(actual, np.float64) - expected) / np.where(expected == 0, 1, np.abs(expected)))


def test_every_activation_is_covered():
    assert set(ACTIVATIONS) == set(VALUES) == set(DERIVATIVES)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_are_those_of_jax(name, dtype):
    arguments = jnp.asarray(np.append(ARGUMENTS, 0.0), dtype)
    actual = make_activation(name).function(arguments)
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, VALUES[name](arguments))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_derivatives_keep_their_relative_accuracy_where_units_saturate(name, mode, dtype):
    arguments = jnp.asarray(ARGUMENTS, dtype)
    function = make_activation(name).function
    if mode == "reverse":
        slopes = jax.jit(jax.vmap(jax.grad(function)))(arguments)
    else:
        slopes = jax.jit(lambda a: jax.jvp(function, (a,), (jnp.ones_like(a),)))(arguments)[1]
    assert slopes.dtype == dtype
    # The slope of leaky ReLU is 0.01 rounded to the dtype; the other slopes are exact functions of the argument.
    assert relative_error(slopes, exactly(DERIVATIVES[name], arguments)) < max(
        testing.rounding_tolerance(dtype, 16), 1e-7 if name == "leaky_relu" else 0
    )


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "elu", "softplus"])
def test_second_derivatives_are_finite_and_true(name, dtype):
    arguments = jnp.asarray([*ARGUMENTS, -1000.0, -100.0, 0.0, 100.0, 1000.0], dtype)
    function = make_activation(name).function
    curvature = jax.jit(jax.vmap(jax.grad(jax.grad(function))))(arguments)
    exact = exactly(SECOND_DERIVATIVES[name], arguments)
    np.testing.assert_allclose(curvature, exact, atol=testing.rounding_tolerance(dtype, 16))


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_derivatives_at_the_origin_hold_to_third_order(name):
    # Both slopes are functions of |a|, smooth at 0 only if the kink of |a| is crossed with care.
    exact = {"tanh": [1.0, 0.0, -2.0], "sigmoid": [0.25, 0.0, -0.125]}[name]
    function = make_activation(name).function
    for expected in exact:
        function = jax.grad(function)
        assert float(jax.jit(function)(0.0)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_max_slope_is_the_supremum_of_the_slope(name):
    slopes = exactly(DERIVATIVES[name], np.linspace(-30, 30, 601))
    assert slopes.max() == pytest.approx(ACTIVATIONS[name].max_slope, rel=1e-12)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "elu"])
def test_bfloat16_stays_bfloat16(name):
    function = make_activation(name).function
    value, slope = jax.value_and_grad(function)(jnp.asarray(-0.5, jnp.bfloat16))
    assert value.dtype == slope.dtype == jnp.bfloat16
    assert float(slope) == pytest.approx(float(exactly(DERIVATIVES[name], [-0.5])[0]), rel=0.02)


def test_infinite_arguments_have_zero_slope():
    infinities = jnp.array([-jnp.inf, jnp.inf])
    for function in (activations.tanh, activations.sigmoid):
        np.testing.assert_array_equal(jax.vmap(jax.grad(function))(infinities), [0.0, 0.0])


def test_a_function_is_taken_as_it_is():
    assert make_activation(jnp.sin).function is jnp.sin
    assert make_activation(jnp.sin).max_slope == 1.0


def test_unknown_names_are_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"activation must be one of .*, got 'tahn'; did you mean 'tanh'"):
        make_activation("tahn")
