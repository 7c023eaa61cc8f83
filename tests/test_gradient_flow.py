"""The gradient split by lag: closed forms, a plain double loop in NumPy, autodiff, and what must not cross a window."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax

T, B, D, H = 7, 3, 2, 3
module = importlib.import_module("rnnjax.gradient_flow")  # the package has a function of that name


def step(params, carry, inputs):
    hidden = jnp.tanh(params["recurrent"] @ carry + params["input"] @ inputs)
    return hidden, {"state": hidden, "square": hidden**2 * params["scale"]}


CELLS = {
    "vanilla": rnnjax.VanillaCell(H),
    "gru": rnnjax.GRUCell(H),
    "lstm": rnnjax.LSTMCell(H),
    "skip": rnnjax.SkipCell(H, span=3),
    "step": rnnjax.StepCell(step, jnp.full(H, 0.1)),
}
LENGTHS = np.array([7, 4, 0])
RESETS = np.zeros((T, B), bool)
RESETS[3, 0] = RESETS[5, 2] = True
OPTIONS = {"plain": {}, "controlled": {"lengths": LENGTHS, "resets": RESETS, "truncation": 4}}
CASES = [(name, kind, "float64") for name in CELLS for kind in OPTIONS] + [("lstm", "controlled", "float32")]


def random_like(tree, seed, dtype):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.6, dtype), tree)


def arrays(name, dtype):
    cell = CELLS[name]
    params = {"recurrent": np.empty((H, H)), "input": np.empty((H, D)), "scale": np.empty(())}
    if name != "step":
        params = jax.eval_shape(lambda: cell.init(jax.random.key(0), D))
    elif dtype == jnp.float64:
        cell = rnnjax.StepCell(step, jnp.full(H, 0.1, dtype))
    return cell, random_like(params, 1, dtype), random_like(np.empty((T, B, D)), 2, dtype)


def loss_of(outputs):
    """A loss that every step of every leaf of the outputs enters, and none linearly."""
    leaves = jax.tree.leaves(outputs)
    weights = jnp.arange(1, T + 1)[:, None, None]
    return sum(jnp.sum(jnp.cos(leaf + 0.1) * weights.astype(leaf.dtype)) for leaf in leaves)


def test_linear_unit_has_the_closed_form():
    """h_t = w h_{t−1} + x_t and L = h_T: g_lag = w^lag h_{T−1−lag}."""
    weight, inputs = 0.8, np.array([0.5, -1.0, 2.0, 0.3, -0.7])
    with jax.enable_x64(True):
        cell = rnnjax.StepCell(lambda w, h, x: (w * h + x, w * h + x), jnp.zeros(1))
        flow = rnnjax.gradient_flow(cell, jnp.asarray(weight), jnp.asarray(inputs)[:, None], lambda out: out[-1, 0])
    states = [0.0]
    for x in inputs:
        states.append(weight * states[-1] + x)
    parts = np.array([weight**lag * states[len(inputs) - 1 - lag] for lag in range(len(inputs))])
    np.testing.assert_allclose(flow.gradient, parts.sum(), rtol=1e-12)
    np.testing.assert_allclose(flow.share_by_lag, parts / parts.sum(), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(flow.norm_by_lag, abs(parts), rtol=1e-12)


def test_every_part_is_that_of_a_double_loop():
    """Each loss step is carried back alone, in NumPy, by the Jacobian diag(1 − h²) Uᵀ written out."""
    with jax.enable_x64(True):
        cell, params, inputs = arrays("vanilla", jnp.float64)
        weights = np.random.default_rng(5).normal(size=(T, B, H))
        flow = rnnjax.gradient_flow(cell, params, inputs, lambda out: jnp.sum(out * weights, axis=(1, 2)))
    inputs, kernel, from_input, bias = (
        np.asarray(x) for x in (inputs, params.recurrent_kernel, params.input_kernel, params.bias)
    )
    kernel, from_input = kernel[:, 0], from_input[:, 0]
    states = np.zeros((T + 1, B, H))
    for t in range(T):
        states[t + 1] = np.tanh(inputs[t] @ from_input + states[t] @ kernel + bias)
    parts = {"recurrent_kernel": np.zeros((T, H, H)), "input_kernel": np.zeros((T, D, H)), "bias": np.zeros((T, H))}
    hidden = np.zeros((T, B, H))
    for loss_step in range(T):
        error = weights[loss_step]
        for lag in range(loss_step + 1):
            t = loss_step - lag
            hidden[t] += error
            at_pre = error * (1 - states[t + 1] ** 2)
            parts["recurrent_kernel"][lag] += states[t].T @ at_pre
            parts["input_kernel"][lag] += inputs[t].T @ at_pre
            parts["bias"][lag] += at_pre.sum(axis=0)
            error = at_pre @ kernel.T
    np.testing.assert_allclose(flow.hidden_gradients, hidden, rtol=1e-10, atol=1e-12)
    flat = np.concatenate([part.reshape(T, -1) for part in parts.values()], axis=1)
    whole = flat.sum(axis=0)
    np.testing.assert_allclose(flow.share_by_lag, flat @ whole / (whole @ whole), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(flow.norm_by_lag, np.linalg.norm(flat, axis=1), rtol=1e-10)
    for name, part in parts.items():
        total = part.sum(axis=0)
        share = (part * total).sum(axis=tuple(range(1, part.ndim))) / (total**2).sum()
        np.testing.assert_allclose(getattr(flow.parameter_share_by_lag, name), share, rtol=1e-9, atol=1e-12)
        norms = np.linalg.norm(part.reshape(T, -1), axis=1)
        np.testing.assert_allclose(getattr(flow.parameter_norm_by_lag, name), norms, rtol=1e-10)


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES, indirect=["dtype"])
def test_shares_sum_to_one_and_parts_to_the_gradient_of_autodiff(name, kind, dtype):
    cell, params, inputs = arrays(name, dtype)
    options = OPTIONS[kind]
    flow = rnnjax.gradient_flow(cell, params, inputs, loss_of, **options)
    gradient = jax.grad(lambda params: loss_of(rnnjax.unroll(cell, params, inputs, **options)[1]))(params)
    tolerance = 50 * float(jnp.finfo(dtype).eps)
    assert abs(float(flow.share_by_lag.sum()) - 1) < tolerance
    for share in jax.tree.leaves(flow.parameter_share_by_lag):
        assert abs(float(share.sum()) - 1) < 10 * tolerance
    for found, expected in zip(jax.tree.leaves(flow.gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(found, expected, atol=tolerance * float(np.abs(expected).max()) + 1e-30)
    assert flow.share_by_lag.dtype == dtype


def test_no_gradient_comes_from_beyond_a_window():
    cell, params, inputs = arrays("lstm", jnp.float32)
    cut = rnnjax.gradient_flow(cell, params, inputs, loss_of, truncation=3)
    assert not np.any(cut.norm_by_lag[3:]) and not np.any(cut.share_by_lag[3:])
    assert np.all(cut.norm_by_lag[:3] > 0)
    whole = rnnjax.gradient_flow(cell, params, inputs, loss_of)
    assert np.all(whole.norm_by_lag > 0)


def test_no_gradient_crosses_a_reset():
    """Resets before every step leave lag 0 alone; reset once, the last outputs reach back to there and no further."""
    cell, params, inputs = arrays("gru", jnp.float32)
    always = rnnjax.gradient_flow(cell, params, inputs, loss_of, resets=np.ones((T, B), bool))
    assert not np.any(always.norm_by_lag[1:])
    once = np.zeros((T, B), bool)
    once[4] = True
    last = rnnjax.gradient_flow(cell, params, inputs, lambda out: out[-1].sum(), resets=once)
    assert np.all(last.norm_by_lag[:3] > 0) and not np.any(last.norm_by_lag[3:])


def test_one_loss_step_costs_one_and_chunks_change_nothing(monkeypatch):
    cell, params, inputs = arrays("lstm", jnp.float32)
    whole = rnnjax.gradient_flow(cell, params, inputs, loss_of)
    monkeypatch.setattr(module, "_CHUNK", 2 * B * 2 * H)  # two loss steps at a time, the last chunk filled up
    jax.clear_caches()
    chunked = rnnjax.gradient_flow(cell, params, inputs, loss_of)
    np.testing.assert_allclose(chunked.share_by_lag, whole.share_by_lag, atol=1e-6)
    np.testing.assert_allclose(chunked.norm_by_lag, whole.norm_by_lag, rtol=1e-5)
    assert module._loss_steps(jnp.zeros((T, B)).at[2, 1].set(1.0).at[5, 0].set(-1.0)).tolist() == [2, 5]


def test_memory_does_not_grow_with_lags_times_loss_steps():
    """Twice the steps, all with a loss: twice the memory, not four times."""

    def temporary_bytes(num_steps):
        cell = rnnjax.LSTMCell(16)
        params = cell.init(jax.random.key(0), D)
        path = rnnjax.trajectory(cell, params, jnp.ones((num_steps, 4, D)))
        arguments = (cell, params, path, params, jnp.ones((num_steps, 4, 16)), jnp.arange(num_steps, dtype=jnp.int32))
        return module._by_lag.lower(*arguments, None).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(800) < 2.5 * temporary_bytes(400)


def test_under_jit_every_step_may_have_a_loss():
    cell, params, inputs = arrays("vanilla", jnp.float32)

    def last_output(outputs):
        return jnp.sum(outputs[-1] ** 2)

    jitted = jax.jit(lambda params: rnnjax.gradient_flow(cell, params, inputs, last_output))(params)
    np.testing.assert_allclose(
        jitted.share_by_lag, rnnjax.gradient_flow(cell, params, inputs, last_output).share_by_lag, rtol=1e-4, atol=1e-6
    )


def test_hidden_gradients_of_a_step_cell_come_by_way_of_later_steps():
    with jax.enable_x64(True):
        cell, params, inputs = arrays("step", jnp.float64)
        flow = rnnjax.gradient_flow(cell, params, inputs, loss_of)
        carries = rnnjax.trajectory(cell, params, inputs).carries

        def from_step(carry, t):
            rest = rnnjax.unroll(cell, params, inputs[t + 1 :], carry)[1]
            known = rnnjax.unroll(cell, params, inputs[: t + 1])[1]
            return loss_of(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), known, rest))

        for t in (0, T - 2):
            direction = jnp.asarray(np.random.default_rng(t).normal(size=(B, H)))
            expected = central_difference(lambda e, t=t, d=direction: from_step(carries[t + 1] + e * d, t))
            np.testing.assert_allclose(jnp.sum(flow.hidden_gradients[t] * direction), expected, rtol=1e-6)
    assert not np.any(flow.hidden_gradients[-1])


def central_difference(function, size=1e-5):
    return (function(size) - function(-size)) / (2 * size)


@pytest.mark.parametrize(
    ("shares", "share", "horizon"),
    [([1.0, 0.0], 0.9, 0), ([0.5, 0.5], 1.0, 1), ([0.95, -0.5, 0.55], 0.9, 2), ([np.nan], 0.5, -1)],
)
def test_memory_horizon_is_the_lag_from_which_on_the_share_is_gathered(shares, share, horizon):
    nothing = jnp.zeros(0)
    flow = rnnjax.GradientFlow(*[nothing] * 3, jnp.array(shares), *[nothing] * 3)
    assert flow.memory_horizon(share) == horizon


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_fn": 3}, "loss_fn must be a function of the outputs, got 3"),
        (
            {"loss_fn": lambda out: out[..., 0]},
            r"loss_fn must return a scalar or one loss a step \[7\], got shape \(7, 3\)",
        ),
        ({"loss_fn": lambda out: jnp.sum(out > 0)}, "loss_fn must return a floating-point loss, got dtype int32"),
        ({"loss_fn": lambda out: jnp.log(-jnp.sum(out**2))}, "loss must be finite"),
        ({"inputs": jnp.ones((T, B, D + 1))}, "inputs must be time-major"),
        ({"truncation": 0}, "truncation must be a positive integer, got 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    cell, params, inputs = arrays("vanilla", jnp.float32)
    arguments = {"inputs": inputs, "loss_fn": loss_of} | change
    with pytest.raises(ValueError, match=message):
        rnnjax.gradient_flow(cell, params, **arguments)


def test_a_carry_that_counts_has_no_gradient():
    cell = rnnjax.StepCell(lambda p, c, x: ((p * c[0] + x, c[1] + 1), c[0]), (jnp.zeros(2), jnp.zeros((), jnp.int32)))
    with pytest.raises(ValueError, match=r"carry\[1\] must be floating point to have a gradient, got int32"):
        rnnjax.gradient_flow(cell, jnp.ones(()), jnp.ones((4, 2)), jnp.sum)


def test_outputs_without_a_gradient_are_named():
    cell = rnnjax.StepCell(lambda params, h, x: (params * h + x, {"best": h.argmax()}), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"outputs\['best'\] must be floating point to have a gradient, got int32"):
        rnnjax.gradient_flow(cell, jnp.ones(()), jnp.ones((3, 2)), lambda outputs: outputs["best"].sum())
