"""Mistakes that users make are refused in one plain sentence, before any work is done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rnnjax
from rnnjax import validation
from rnnjax.jacobians import jacobian_operator
from rnnjax.models import RecurrentLayer, RecurrentNetwork
from rnnjax.operators import LinearizedJacobians

D, H, T, B = 2, 3, 5, 2
GRU, LSTM = rnnjax.GRUCell(H), rnnjax.LSTMCell(H)
GRU_PARAMS, LSTM_PARAMS = GRU.init(jax.random.key(0), D), LSTM.init(jax.random.key(1), D)
INPUTS = jax.random.normal(jax.random.key(2), (T, B, D))


def decaying(params, carry, inputs):
    carry = params["decay"] * carry + inputs
    return carry, carry


def unit_inputs(params, carry, inputs):
    """A step that has no value and no derivative at inputs of zero."""
    carry = jnp.tanh(params["weight"] * carry + inputs / jnp.sqrt(jnp.sum(inputs**2)))
    return carry, carry


def root(params, carry, inputs):
    """A step whose slope is infinite at a state of 0, where its value is not."""
    carry = jnp.sqrt(jnp.maximum(carry, 0)) + params * inputs
    return carry, carry


STEP = rnnjax.StepCell(decaying, jnp.zeros(D))


@pytest.fixture
def no_trajectory(monkeypatch):
    """Fails a test in which a trajectory is computed."""

    def refuse(*arguments):
        raise AssertionError("a trajectory was computed")

    monkeypatch.setattr("rnnjax.profiles.trajectory", refuse)
    monkeypatch.setattr("rnnjax.lyapunov.trajectory", refuse)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: GRU.apply(GRU_PARAMS, jnp.zeros(H), jnp.ones(D + 1)),
            r"^inputs must have shape \[..., D\] with D = 2,",
        ),
        (lambda: GRU.apply(GRU_PARAMS, jnp.zeros((B, H)), jnp.ones(D)), r"^carry must have shape \(3\), got \(2, 3\)"),
        (lambda: GRU.apply(GRU_PARAMS, jnp.zeros(H), [1.0, 2.0]), "^inputs must be an array, got list"),
        (
            lambda: LSTM.apply(LSTM_PARAMS, jnp.zeros(H), jnp.ones(D)),
            r"^carry must be a tuple \(h, c\) of arrays \[..., H\], got one array float32\[3\]$",
        ),
        (
            lambda: rnnjax.unroll(LSTM, LSTM_PARAMS, INPUTS, jnp.zeros((B, H))),
            r"^carry must be a tuple \(h, c\) of arrays \[..., H\], got one array float32\[2, 3\]$",
        ),
        (
            lambda: rnnjax.unroll(GRU, GRU_PARAMS, INPUTS, (jnp.zeros(H), None)),
            r"^carry must be one array \[..., H\], got \(float32\[3\], None\)$",
        ),
        (lambda: rnnjax.unroll(GRU, {}, INPUTS), "^params must be CellParams as GRUCell.init makes them, got dict$"),
        (lambda: STEP.apply({"decay": 0.5}, {"h": jnp.zeros(D)}, jnp.ones(D)), r"^carry must be like one array"),
        (
            lambda: rnnjax.unroll(STEP, {"decay": 0.5}, INPUTS[..., :1], perturbations={"h": INPUTS}),
            "^perturbations must be like one array .*, got {'h': float32",
        ),
    ],
)
def test_what_a_step_is_given_must_fit_the_cell(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda p, c, x: (c[:1], c), r"like example_carry, one array float32\[2\], got one array float32\[1\]$"),
        (lambda p, c, x: (c.astype(jnp.bfloat16), c), r"got one array bfloat16\[2\]$"),
        (lambda p, c, x: ((c, c), c), r"got \(float32\[2\], float32\[2\]\)$"),
        (lambda p, c, x: c, r"^step_fn must return a pair \(carry, output\), got one array float32\[2\]$"),
    ],
)
def test_a_step_function_must_return_a_carry_like_the_one_it_got(step, message):
    cell = rnnjax.StepCell(step, jnp.zeros(D))
    for run in (rnnjax.unroll, rnnjax.trajectory):
        with pytest.raises(ValueError, match=r"^step_fn must return") as error:
            run(cell, {}, INPUTS)
        assert error.match(message)


def test_step_functions_are_checked_under_transformations_too():
    def loss(decay, inputs):
        return rnnjax.unroll(STEP, {"decay": decay}, inputs)[1].sum()

    batched = jax.vmap(jax.jit(jax.grad(loss)), in_axes=(None, 1))(0.5, jnp.ones((T, B, D)))
    # Output t is Σ d^j over j < t, for each of D features; d = ½.
    expected = D * sum(j * 0.5 ** (j - 1) for t in range(1, T + 1) for j in range(t))
    np.testing.assert_allclose(batched, expected, rtol=1e-6)


@pytest.mark.parametrize("inputs", [None, {}, ()])
def test_step_cells_need_inputs(inputs):
    with pytest.raises(ValueError, match=r"^inputs must hold an array \[T, ..., D\], got"):
        rnnjax.unroll(STEP, {"decay": 0.5}, inputs)


@pytest.mark.parametrize("example", [jnp.array([0.0, jnp.nan]), {}])
def test_step_cells_need_a_finite_example(example):
    with pytest.raises(ValueError, match=r"^example_carry must "):
        rnnjax.trajectory(rnnjax.StepCell(decaying, example), {"decay": 0.5}, INPUTS)


@pytest.mark.parametrize("lags", [9, "9", {1, 2}, np.array(9)])
def test_lags_are_a_sequence(lags, no_trajectory):
    with pytest.raises(ValueError, match=r"^lags must be a sequence of numbers of steps"):
        rnnjax.spectral_profile(GRU, GRU_PARAMS, INPUTS, lags=lags)


def test_options_are_checked_before_the_work(no_trajectory):
    with pytest.raises(ValueError, match=r"^lags must be distinct numbers of steps in \[1, 5\], got \[2, 6\]"):
        rnnjax.spectral_profile(GRU, GRU_PARAMS, INPUTS, lags=np.array([2, 6]))
    with pytest.raises(ValueError, match=r"^dtype must be one of float32, float64, got 'half'"):
        rnnjax.spectral_profile(GRU, GRU_PARAMS, INPUTS, dtype="half")
    with pytest.raises(ValueError, match=r"^num_exponents must be a whole number in \[1, 6\], got 7"):
        rnnjax.lyapunov_spectrum(LSTM, LSTM_PARAMS, INPUTS, num_exponents=7)
    with pytest.raises(ValueError, match=r"^num_transient must be a whole number in \[0, 4\], got 5"):
        rnnjax.lyapunov_spectrum(LSTM, LSTM_PARAMS, INPUTS, num_transient=5)


@pytest.mark.parametrize("function", [rnnjax.log_singular_values, rnnjax.log_spectral_norm])
def test_singular_values_are_those_of_a_factored_product(function):
    with pytest.raises(ValueError, match=r"^product must be a FactoredProduct, what factor_product returns; got Array"):
        function(jnp.eye(2)[None])


def test_jacobians_that_are_not_finite_are_named_by_their_step():
    # h is 16, 4, 2, 0 (sqrt 2 − 1.41421…), so that the slope at step 3 is infinite.
    path = rnnjax.Trajectory(jnp.array([[16.0], [4.0], [2.0], [0.0], [0.0]]), jnp.zeros((4, 1)))
    step_cell = rnnjax.StepCell(root, jnp.zeros(1))
    affine = rnnjax.VanillaCell(1, activation=jnp.sqrt)
    affine_params = affine.init(jax.random.key(0), 1).replace(recurrent_kernel=jnp.ones((1, 1, 1)))
    for cell, params in ((step_cell, 1.0), (affine, affine_params)):
        with pytest.raises(ValueError, match="step Jacobian must be finite, got a NaN or an overflow at time step 3"):
            jacobian_operator(cell, params, path)
        operator = jax.jit(jacobian_operator)(cell, params, path)
        with pytest.raises(ValueError, match="at time step 3"):
            rnnjax.spectral_norm_profile(operator)
    assert isinstance(jax.jit(jacobian_operator)(step_cell, 1.0, path), LinearizedJacobians)


def test_lyapunov_exponents_are_never_silently_nan():
    cell = rnnjax.StepCell(lambda p, c, x: (jnp.sqrt(c * x), c), jnp.ones(1))  # the state is 0 after step 2
    inputs = jnp.array([[1.0], [1.0], [0.0], [1.0]])
    with pytest.raises(ValueError, match=r"step Jacobian must be finite, .* at time step 2$"):
        rnnjax.lyapunov_spectrum(cell, (), inputs)


def test_plain_numbers_and_numpy_arrays_are_weights_too():
    path = rnnjax.trajectory(STEP, {"decay": 0.5}, INPUTS)
    for decay in (0.5, np.float32(0.5), np.full(1, 0.5, jnp.bfloat16), jnp.array(0.5)):
        jacobians = rnnjax.step_jacobians(STEP, {"decay": decay}, path)
        np.testing.assert_array_equal(jacobians, np.broadcast_to(0.5 * np.eye(D), (T, B, D, D)))


@pytest.mark.parametrize("make", [lambda c, **k: RecurrentLayer(c, D, **k), lambda c, **k: RecurrentNetwork(c, 4, **k)])
def test_networks_need_an_affine_cell(make):
    with pytest.raises(ValueError, match=r"^cell must be an affine cell, such as a GRUCell, got StepCell"):
        make(STEP, rngs=nnx.Rngs(0))


def test_an_embedding_needs_a_vocabulary():
    with pytest.raises(ValueError, match=r"^embedding_size must be left out unless vocabulary_size is given, got 8"):
        RecurrentNetwork(GRU, 4, input_size=D, embedding_size=8, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("lengths", [None, jnp.array([T, 3])])
def test_the_last_step_of_a_reversed_network_is_the_first_of_the_inputs(lengths):
    network = RecurrentNetwork(GRU, 4, input_size=D, rngs=nnx.Rngs(0))
    carry, _ = network.layers[0](INPUTS, lengths=lengths, reverse=True)
    expected = network.output(carry)
    np.testing.assert_allclose(network(INPUTS, lengths=lengths, reverse=True), expected, atol=1e-6)
    forward, _ = network.layers[0](INPUTS, lengths=lengths)
    np.testing.assert_allclose(network(INPUTS, lengths=lengths), network.output(forward), atol=1e-6)


def test_float64_comes_with_how_to_switch_it_on():
    with pytest.raises(ValueError, match=r"dtype can be float64 only .*with jax.enable_x64\(True\): ..., or jax"):
        GRU.init(jax.random.key(0), D, "float64")


def test_weights_have_one_dtype():
    narrow = GRU_PARAMS.bias.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"^params.bias must have the dtype of params.recurrent_kernel, float32, got"):
        rnnjax.unroll(GRU, GRU_PARAMS.replace(bias=narrow), INPUTS)
    with pytest.raises(ValueError, match=r"^params.recurrent_kernel must be floating point, got dtype int"):
        rnnjax.unroll(GRU, jax.tree.map(lambda leaf: leaf.astype(int), GRU_PARAMS), INPUTS)
    without = GRU_PARAMS.replace(recurrent_bias=None)  # The bias at initialisation is zero.
    np.testing.assert_array_equal(*(rnnjax.unroll(GRU, p, INPUTS)[1] for p in (without, GRU_PARAMS)))


def test_the_step_of_an_overflow_is_that_of_its_input():
    cell = rnnjax.VanillaCell(1, activation="identity")
    params = cell.init(jax.random.key(0), 1).replace(input_kernel=jnp.full((1, 1, 1), 3e38))
    inputs = jnp.zeros((5, 1)).at[3].set(2.0)
    with pytest.raises(ValueError, match="state must be finite, got a NaN or an overflow at time step 3"):
        rnnjax.trajectory(cell, params, inputs)


def test_constants_of_a_traced_function_are_checked():
    spoilt = GRU_PARAMS.replace(bias=GRU_PARAMS.bias.at[1, 2].set(jnp.nan))
    with pytest.raises(ValueError, match=r"params must be finite, got params.bias\[1, 2\] = nan \(1 such values\)"):
        jax.jit(lambda inputs: rnnjax.unroll(GRU, spoilt, inputs))(INPUTS)
    copied = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "isfinite", lambda *arguments: copied.append(arguments))
        validation.finite("inputs", INPUTS)
        validation.finite_steps("inputs", INPUTS)
    assert copied == []


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_never_reaches_a_step_that_is_undefined_at_zero(reverse):
    cell, lengths = rnnjax.StepCell(unit_inputs, jnp.full(D, 0.1)), jnp.array([2, T])
    params = {"weight": jnp.array(0.7)}

    def loss(params, inputs, lengths):
        carry, outputs = rnnjax.unroll(cell, params, inputs, lengths=lengths, reverse=reverse)
        return jnp.sum(jnp.sin(outputs)) + jnp.sum(carry**2)

    gradient = jax.grad(loss, argnums=(0, 1))
    for padding in (0.0, jnp.nan):
        weights, inputs = gradient(params, INPUTS.at[2:, 0].set(padding), lengths)
        short = gradient(params, INPUTS[:2, :1], jnp.array([2]))
        full = gradient(params, INPUTS[:, 1:], jnp.array([T]))
        np.testing.assert_array_equal(inputs[2:, 0], 0)
        np.testing.assert_allclose(inputs[:2, 0], short[1][:, 0], rtol=1e-5)
        np.testing.assert_allclose(weights["weight"], short[0]["weight"] + full[0]["weight"], rtol=1e-5)


def test_a_sequence_of_length_zero_has_no_gradient_though_its_padding_is_nan():
    def loss(inputs):
        return rnnjax.unroll(GRU, GRU_PARAMS, inputs, lengths=jnp.array([0, T]))[1].sum()

    gradient = jax.grad(loss)(INPUTS.at[:, 0].set(jnp.nan))
    np.testing.assert_array_equal(gradient[:, 0], 0)
    assert np.isfinite(gradient).all() and gradient[:, 1].all()
