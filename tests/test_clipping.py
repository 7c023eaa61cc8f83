"""Clipping against closed forms and Optax; the traps of Optax's own chain are shown beside ours."""

import functools

import chex
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rnnjax.clipping import ClippedState, clipped, clipping_state

INF, NAN = float("inf"), float("nan")
PASS_THROUGH = optax.identity()


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam and MultiSteps need implicit promotion; `test_strict_dtype_promotion` covers our own code."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def apply_once(optimizer, gradient):
    return optimizer.update(gradient, optimizer.init(gradient), gradient)


def norm64(tree):
    flat = np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
    return np.sqrt(np.sum(flat**2))


def gradients(seed, scale=1.0):
    """Two leaves of norm about 4.5 · scale."""
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(scale * rng.normal(size=(3, 5)), jnp.float32),
        "bias": jnp.asarray(scale * rng.normal(size=5), jnp.float32),
    }


BAD_GRADIENTS_AND_NORMS = [
    ([1.0, INF, 2.0], INF),
    ([1.0, NAN, 2.0], NAN),
    ([INF, -INF, INF], INF),
    ([NAN, INF, 0.0], NAN),
    ([-INF, -INF, -INF], INF),
]


@pytest.mark.parametrize("bounds", [{}, {"max_norm": 1.0}, {"max_value": 1.0}, {"max_norm": 1.0, "max_value": 0.5}])
def test_non_finite_gradient_is_skipped_exactly(bounds):
    optimizer = clipped(optax.adam(0.1), **bounds)
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    update = jax.jit(optimizer.update)
    _, state = update({"a": jnp.array([0.1, -0.2, 0.3]), "b": jnp.ones(2)}, optimizer.init(params), params)
    for bad, norm_before in BAD_GRADIENTS_AND_NORMS:
        updates, after = update({"a": jnp.array(bad), "b": jnp.ones(2)}, state, params)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
        chex.assert_trees_all_equal(after.inner_state, state.inner_state)
        np.testing.assert_equal(float(after.norm_before), norm_before)
        assert float(after.norm_after) == 0.0
        assert bool(after.was_skipped) and not bool(after.was_clipped)
        assert (int(after.num_steps), int(after.num_nonfinite)) == (2, 1)
        assert int(after.num_clipped) == int(state.num_clipped)


def test_plain_optax_lets_non_finite_gradients_through():
    updates, _ = apply_once(optax.clip_by_global_norm(1.0), jnp.array([1.0, INF]))
    np.testing.assert_equal(np.asarray(updates), [0.0, NAN])
    updates, _ = apply_once(optax.clip(1.0), jnp.array([0.5, INF]))
    np.testing.assert_equal(np.asarray(updates), [0.5, 1.0])


def test_recovery_equals_never_having_seen_the_bad_gradient():
    optimizer = clipped(optax.adam(0.1), max_norm=1.0)
    update = jax.jit(optimizer.update)
    poison = jax.tree.map(lambda x: x.at[0].set(NAN), gradients(1))

    def train(sequence):
        params = jax.tree.map(jnp.zeros_like, gradients(0))
        state = optimizer.init(params)
        for gradient in sequence:
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = train([gradients(0), poison, poison, gradients(2)])
    expected_params, expected_state = train([gradients(0), gradients(2)])
    chex.assert_trees_all_equal(params, expected_params)
    chex.assert_trees_all_equal(state.inner_state, expected_state.inner_state)
    assert (int(state.num_steps), int(state.num_nonfinite), int(state.num_clipped)) == (4, 2, 2)


@pytest.mark.parametrize("transform", [jax.jit, lambda function: function], ids=["jit", "eager"])
@pytest.mark.parametrize("large", [1e20, 3e38, float(jnp.finfo(jnp.float32).max)])
def test_large_finite_gradient_keeps_its_direction(large, transform):
    gradient = {"a": jnp.array([large, -large], jnp.float32), "b": jnp.array([0.5 * large], jnp.float32)}
    optimizer = clipped(PASS_THROUGH, max_norm=2.0)
    updates, state = transform(optimizer.update)(gradient, optimizer.init(gradient))
    np.testing.assert_allclose(updates["a"], [4 / 3, -4 / 3], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [2 / 3], rtol=1e-6)
    np.testing.assert_allclose(state.norm_after, 2.0, rtol=1e-6)
    assert bool(state.was_clipped) and not bool(state.was_skipped)
    # The norm is 1.5 · large, which float32 cannot hold for the larger two.
    np.testing.assert_allclose(state.norm_before, 1.5 * large if large < 1e38 else INF, rtol=1e-6)
    plain, _ = apply_once(optax.clip_by_global_norm(2.0), gradient)
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(plain))


def test_tiny_gradient_has_its_norm_and_is_clipped():
    gradient = jnp.array([3e-30, -4e-30], jnp.float32)
    _, state = apply_once(clipped(PASS_THROUGH, max_norm=1.0), gradient)
    np.testing.assert_allclose(state.norm_before, 5e-30, rtol=1e-6)
    assert not bool(state.was_clipped)
    updates, state = apply_once(clipped(PASS_THROUGH, max_norm=1e-32), gradient)
    np.testing.assert_allclose(updates, [6e-33, -8e-33], rtol=1e-6)
    np.testing.assert_allclose(state.norm_after, 1e-32, rtol=1e-6)
    assert float(optax.tree.norm(gradient)) == 0.0


@pytest.mark.parametrize("component", [0.0, 1e-40])
def test_zero_and_subnormal_gradients_make_no_nan(component):
    with jax.debug_nans(True), jax.debug_infs(True):
        updates, state = apply_once(clipped(PASS_THROUGH, max_norm=1.0, max_value=1.0), jnp.full(3, component))
    np.testing.assert_allclose(updates, np.full(3, component), atol=1e-38)
    assert float(state.norm_before) < 1e-38 and not bool(state.was_clipped) and not bool(state.was_skipped)


@pytest.mark.parametrize("name", ["max_norm", "max_value"])
@pytest.mark.parametrize("value", [0, 0.0, -1.0, NAN, INF, "1", True, [1.0], jnp.ones(2)])
def test_bad_bound_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive finite number, got"):
        clipped(PASS_THROUGH, **{name: value})


def test_plain_optax_divides_by_a_zero_bound():
    updates, _ = apply_once(optax.clip_by_global_norm(0.0), jnp.zeros(2))
    assert np.all(np.isnan(updates))


def test_bad_optimizer_and_complex_parameters_are_named():
    with pytest.raises(ValueError, match=r"optimizer must be an Optax transformation .* got 0\.001"):
        clipped(1e-3, max_norm=1.0)
    with pytest.raises(ValueError, match="params must be real"):
        clipped(PASS_THROUGH).init(jnp.ones(2, jnp.complex64))


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_norm_clipping_equals_optax(scale):
    gradient = gradients(3, scale)
    updates, state = apply_once(clipped(PASS_THROUGH, max_norm=1.0), gradient)
    expected, _ = apply_once(optax.clip_by_global_norm(1.0), gradient)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    np.testing.assert_allclose(state.norm_before, norm64(gradient), rtol=1e-6)
    np.testing.assert_allclose(state.norm_after, min(1.0, norm64(gradient)), rtol=1e-6)
    assert bool(state.was_clipped) == (norm64(gradient) > 1.0)
    if not state.was_clipped:
        chex.assert_trees_all_equal(updates, gradient)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_value_clipping_equals_optax(scale):
    gradient = gradients(4, scale)
    updates, state = apply_once(clipped(PASS_THROUGH, max_value=0.5), gradient)
    expected, _ = apply_once(optax.clip(0.5), gradient)
    chex.assert_trees_all_equal(updates, expected)
    np.testing.assert_allclose(state.norm_before, norm64(gradient), rtol=1e-6)
    np.testing.assert_allclose(state.norm_after, norm64(expected), rtol=1e-6)
    assert bool(state.was_clipped) == any(np.abs(x).max() > 0.5 for x in jax.tree.leaves(gradient))


def test_value_comes_before_norm():
    updates, state = apply_once(clipped(PASS_THROUGH, max_norm=1.0, max_value=3.0), jnp.array([30.0, 4.0, 0.0]))
    np.testing.assert_allclose(updates, [0.5**0.5, 0.5**0.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose([state.norm_before, state.norm_after], [916**0.5, 1.0], rtol=1e-6)
    _, state = apply_once(clipped(PASS_THROUGH, max_norm=9.0, max_value=3.0), jnp.array([30.0, 4.0, 0.0]))
    np.testing.assert_allclose(state.norm_after, 18**0.5, rtol=1e-6)
    assert bool(state.was_clipped)


def test_without_bounds_the_gradient_passes_and_is_measured():
    gradient = gradients(5, 100.0)
    updates, state = apply_once(clipped(PASS_THROUGH), gradient)
    chex.assert_trees_all_equal(updates, gradient)
    np.testing.assert_allclose([state.norm_before, state.norm_after], [norm64(gradient)] * 2, rtol=1e-6)
    assert not bool(state.was_clipped) and int(state.num_steps) == 1


@pytest.mark.parametrize(
    ("dtype", "rtol"), [("float16", 1e-3), ("bfloat16", 8e-3), ("float32", 1e-6), ("float64", 1e-14)]
)
def test_precisions(dtype, rtol):
    with jax.enable_x64(True):
        gradient = jnp.array([3e4, -4e4, 0.0], dtype)
        updates, state = apply_once(clipped(PASS_THROUGH, max_norm=1.0, max_value=1e9), gradient)
        assert updates.dtype == gradient.dtype
        np.testing.assert_allclose(np.asarray(updates, np.float64), [0.6, -0.8, 0.0], rtol=rtol)
        assert state.norm_before.dtype == state.norm_after.dtype == jnp.float32
        np.testing.assert_allclose(state.norm_before, 5e4, rtol=max(rtol, 1e-6))


def test_float64_beyond_the_range_of_float32():
    with jax.enable_x64(True):
        updates, state = apply_once(clipped(PASS_THROUGH, max_norm=1.0), jnp.array([3e300, -4e300], jnp.float64))
        np.testing.assert_allclose(updates, [0.6, -0.8], rtol=1e-14)
        assert not bool(state.was_skipped)
        updates, _ = apply_once(clipped(PASS_THROUGH, max_norm=1e39), jnp.array([3e38], jnp.float32))
        np.testing.assert_allclose(updates, [3e38], rtol=1e-6)


def test_strict_dtype_promotion_mixed_integer_and_empty_leaves():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        gradient = {
            "low": jnp.array([2.0, 4.0], jnp.bfloat16),
            "single": jnp.array([4.0], jnp.float32),
            "double": jnp.array(8.0, jnp.float64),
            "count": jnp.array([100, 200]),
            "flag": jnp.array(True),
            "empty": jnp.zeros((0, 3)),
            "none": None,
        }
        updates, state = apply_once(clipped(PASS_THROUGH, max_norm=5.0, max_value=1e3), gradient)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, gradient)
        np.testing.assert_allclose([state.norm_before, state.norm_after], [10.0, 5.0], rtol=1e-6)
        assert [np.asarray(updates[k], np.float64).tolist() for k in ("low", "single", "double")] == [[1, 2], [2], 4]
        chex.assert_trees_all_equal(updates["count"], gradient["count"])
        updates, state = apply_once(clipped(PASS_THROUGH, max_norm=5.0), {**gradient, "single": jnp.array([NAN])})
        assert bool(state.was_skipped) and not np.any(updates["count"]) and not np.any(updates["flag"])


@pytest.mark.parametrize("tree", [{}, {"a": jnp.zeros((0, 4))}, {"n": jnp.array([3])}])
def test_tree_without_floating_numbers(tree):
    updates, state = apply_once(clipped(PASS_THROUGH, max_norm=1.0, max_value=1.0), tree)
    chex.assert_trees_all_equal(updates, tree)
    assert float(state.norm_before) == float(state.norm_after) == 0.0
    assert int(state.num_steps) == 1 and not bool(state.was_skipped) and not bool(state.was_clipped)


def python_scalars():
    """An optimiser whose init returns Python numbers and whose update returns arrays."""
    return optax.GradientTransformation(
        lambda params: (0, 0.5), lambda updates, state, params=None: (updates, (jnp.int32(1), jnp.float32(0.5)))
    )


OPTIMIZERS = {
    "python_scalars": python_scalars,
    "adam": lambda: optax.adam(1e-3),
    "scheduled": lambda: optax.sgd(optax.linear_schedule(1.0, 0.0, 10), momentum=0.9),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    "noisy": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(0)), optax.rmsprop(0.1)),
    "accumulating": lambda: optax.MultiSteps(optax.adam(1e-3), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_structure_is_fixed_from_init(name):
    optimizer = clipped(OPTIMIZERS[name](), max_norm=1.0, max_value=0.5)
    params = gradients(0)
    state = optimizer.init(params)
    assert isinstance(state, ClippedState)
    for gradient in (gradients(1), jax.tree.map(lambda x: x * NAN, params)):
        _, new_state = jax.jit(optimizer.update)(gradient, state, params)
        chex.assert_trees_all_equal_structs(new_state, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        state = new_state
    telemetry = state._replace(inner_state=None)[1:]
    assert [str(x.dtype) for x in telemetry] == ["float32"] * 2 + ["bool"] * 2 + ["int32"] * 3


def test_optax_monitor_changes_its_structure():
    monitor = optax.monitor({"norm": optax.tree.norm})
    state = monitor.init(gradients(0))
    _, new_state = monitor.update(gradients(0), state)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal_structs(new_state, state)


def test_in_a_scan_carry():
    optimizer = clipped(optax.adam(0.1), max_norm=1.0)
    sequence = jnp.array([[0.3, 0.4], [3.0, 4.0], [NAN, 1.0], [INF, 0.0], [0.0, 0.0]])

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), (state.norm_before, state.norm_after, state.num_clipped)

    (params, state), history = jax.lax.scan(step, (jnp.zeros(2), optimizer.init(jnp.zeros(2))), sequence)
    np.testing.assert_allclose(history[0], [0.5, 5.0, NAN, INF, 0.0], rtol=1e-6)
    np.testing.assert_allclose(history[1], [0.5, 1.0, 0.0, 0.0, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(history[2], [0, 1, 1, 1, 1])
    assert (int(state.num_steps), int(state.num_nonfinite)) == (5, 2)
    assert np.all(np.isfinite(params))


@pytest.mark.parametrize("name", ["python_scalars", "injected"])
def test_one_trace_for_good_clipped_and_bad_gradients(name):
    optimizer = clipped(OPTIMIZERS[name](), max_norm=1.0, max_value=2.0)
    state = optimizer.init(gradients(0))
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
    for factor in (1e-3, 1e3, NAN, INF, 1.0):
        _, state = update(jax.tree.map(lambda x, factor=factor: factor * x, gradients(0)), state, gradients(0))
    assert (int(state.num_steps), int(state.num_nonfinite), int(state.num_clipped)) == (5, 2, 2)


def test_vmap_skips_members_one_by_one():
    optimizer = clipped(optax.adam(0.1), max_norm=1.0)
    ensemble = jnp.array([[0.3, 0.4], [NAN, 1.0], [30.0, 40.0]])
    updates, state = jax.vmap(lambda gradient: apply_once(optimizer, gradient))(ensemble)
    np.testing.assert_array_equal(state.was_skipped, [False, True, False])
    np.testing.assert_array_equal(state.was_clipped, [False, False, True])
    np.testing.assert_array_equal(updates[1], [0.0, 0.0])
    np.testing.assert_allclose(updates[0], apply_once(optimizer, ensemble[0])[0], rtol=1e-6)


def test_multi_steps_clips_the_accumulated_gradient_once():
    params = jnp.zeros(2)
    optimizer = optax.MultiSteps(clipped(optax.sgd(1.0), max_norm=1.0), 2)
    state = optimizer.init(params)
    updates, state = optimizer.update(jnp.array([10.0, 0.0]), state, params)
    np.testing.assert_array_equal(updates, [0.0, 0.0])
    assert int(clipping_state(state).num_steps) == 0
    updates, state = optimizer.update(jnp.array([-9.4, 0.8]), state, params)
    # The mean of the two is [0.3, 0.4]: within the bound, although each micro-gradient is far outside it.
    np.testing.assert_allclose(updates, [-0.3, -0.4], rtol=1e-5)
    assert (int(clipping_state(state).num_steps), int(clipping_state(state).num_clipped)) == (1, 0)


@pytest.mark.parametrize("skip", [False, True])
def test_multi_steps_forgets_a_nan_only_when_told_to(skip):
    params = jnp.zeros(2)
    options = {"should_skip_update_fn": optax.skip_not_finite} if skip else {}
    optimizer = optax.MultiSteps(clipped(optax.sgd(1.0), max_norm=1.0), 2, **options)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in ([NAN, 0.0], [0.3, 0.4], [0.3, 0.4], [0.3, 0.4]):
        updates, state = update(jnp.array(gradient), state, params)
        params = optax.apply_updates(params, updates)
    assert int(clipping_state(state).num_nonfinite) == (0 if skip else 2)
    np.testing.assert_allclose(params, [-0.3, -0.4] if skip else [0.0, 0.0], rtol=1e-6)


def test_extra_arguments_reach_the_optimizer():
    optimizer = clipped(optax.contrib.reduce_on_plateau(factor=0.5, patience=1), max_norm=10.0)
    params = jnp.ones(2)
    state = optimizer.init(params)
    for _ in range(4):
        updates, state = jax.jit(optimizer.update)(params, state, params, value=1.0)
    assert float(state.inner_state.scale) < 1.0
    np.testing.assert_allclose(updates, float(state.inner_state.scale) * params)
    clipped(optax.sgd(1.0)).update(params, clipped(optax.sgd(1.0)).init(params), params, value=1.0)


def test_clipping_state_is_found_at_any_depth():
    inner = clipped(optax.adam(1e-3), max_norm=1.0)
    nested = optax.chain(optax.add_decayed_weights(0.1), optax.MultiSteps(optax.chain(inner, optax.scale(0.5)), 2))
    state = {"optimizer": nested.init(jnp.zeros(2)), "step": 3}
    assert isinstance(clipping_state(state), ClippedState)
    with pytest.raises(ValueError, match=r"opt_state must hold .* one clipped\(\.\.\.\), got tuple with 0"):
        clipping_state(optax.adam(1e-3).init(jnp.zeros(2)))
    with pytest.raises(ValueError, match="got tuple with 2"):
        clipping_state(optax.chain(inner, inner).init(jnp.zeros(2)))


components = hypothesis.extra.numpy.arrays(
    np.float32, 6, elements=st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False)
)


@functools.cache
def jitted_clip(max_norm):
    optimizer = clipped(PASS_THROUGH, max_norm=max_norm)
    return jax.jit(lambda gradient: optimizer.update(gradient, optimizer.init(gradient)))


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(components, st.sampled_from([1e-6, 0.7, 1.0, 30.0, 1e6]))
def test_norm_is_bounded_and_direction_kept(components, max_norm):
    updates, state = jitted_clip(max_norm)(jnp.asarray(components))
    before, after = norm64(components), norm64(updates)
    assert after <= max_norm * (1 + 1e-6)
    assert bool(state.was_clipped) == (before > max_norm) or abs(before / max_norm - 1) < 1e-6
    # One factor for all components, up to what float32 loses below its normal range.
    factor = min(1.0, max_norm / before) if before else 1.0
    np.testing.assert_allclose(
        np.asarray(updates, np.float64), factor * components, rtol=1e-6, atol=1e-37 * (1 + max_norm)
    )


def test_adaptive_clipping_bounds_each_unit_by_its_weights():
    """By hand: columns are units, of norms 5 and 1e-4 (counted as 1e-3); the norms of their gradients are 1."""
    params = {"kernel": jnp.array([[3.0, 1e-4], [4.0, 0.0]]), "count": jnp.array(3)}
    gradient = {"kernel": jnp.array([[0.6, 0.0], [0.8, 1.0]]), "count": jnp.array(0)}
    optimizer = clipped(optax.sgd(1.0), max_ratio=0.1)
    updates, state = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [[-0.3, 0.0], [-0.4, -1e-4]], rtol=1e-6)
    assert bool(state.was_clipped) and float(state.norm_before) == pytest.approx(2**0.5)
    small = jax.tree.map(lambda g: g * 1e-6 if g.dtype == jnp.float32 else g, gradient)
    assert not bool(optimizer.update(small, optimizer.init(params), params)[1].was_clipped)


def test_adaptive_clipping_comes_between_value_and_norm():
    params, gradient = jnp.array([[3.0], [4.0]]), jnp.array([[30.0], [0.0]])
    optimizer = clipped(optax.sgd(1.0), max_value=10.0, max_ratio=1.0, max_norm=2.0)
    updates, state = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(updates, [[-2.0], [0.0]], rtol=1e-6)
    only = clipped(optax.sgd(1.0), max_value=10.0, max_ratio=1.0)
    np.testing.assert_allclose(only.update(gradient, only.init(params), params)[0], [[-5.0], [0.0]], rtol=1e-6)
    assert float(state.norm_after) == pytest.approx(2.0)


def test_adaptive_clipping_needs_the_weights():
    optimizer = clipped(optax.sgd(1.0), max_ratio=0.1)
    with pytest.raises(ValueError, match="params must be given to update where max_ratio is set"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))
