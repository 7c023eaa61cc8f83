"""Products of factored products: exact in any grouping, over any range, with lost rank, on one device or several."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnnjax
from rnnjax import testing
from rnnjax.composition import factor_product_over_mesh, multiply_products
from rnnjax.products import factor_product

SIZE = 4
NATS = {"float32": 1e-3, "float64": 1e-11}


def gaussian_chain(num_steps, dtype, seed=0, batch_shape=(), row_spread=0.0):
    """Asymmetric matrices that do not commute, with rows of different size if asked for."""
    rng = np.random.default_rng(seed)
    rows = np.exp(row_spread * rng.normal(size=(num_steps, *batch_shape, SIZE, 1)))
    return (rows * rng.normal(size=(num_steps, *batch_shape, SIZE, SIZE)) / np.sqrt(SIZE)).astype(dtype)


def steps_of(chain):
    """Each matrix of a chain as a product of its own."""
    return [factor_product(matrix[None]) for matrix in jnp.asarray(chain)]


def chunks_of(chain):
    """A chain of 8 n matrices as n products."""
    return [factor_product(chunk) for chunk in jnp.asarray(chain.reshape(-1, 8, SIZE, SIZE))]


def stacked(parts):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def combined(parts, split=lambda count: count // 2):
    """The product of parts, first to last, grouped as ``split`` says."""
    if len(parts) == 1:
        return parts[0]
    middle = split(len(parts))
    return multiply_products(combined(parts[middle:], split), combined(parts[:middle], split))


def log_sigma(product):
    return np.asarray(rnnjax.log_singular_values(product), np.float64)


def multiplied_back(product, divided_by_log=0.0):
    left, right = (np.asarray(x, np.float64) for x in (product.left, product.right))
    scales = np.asarray(product.log_scales, np.float64) + np.asarray(product.log_scales_remainder, np.float64)
    return (left * np.exp(scales - divided_by_log)[..., None, :]) @ right


def diagonal(log_entries, dtype):
    """The factored product of diag(e^log_entries), whose entries may be beyond the range of floats."""
    identity, log_entries = jnp.eye(SIZE, dtype=dtype), jnp.asarray(log_entries, dtype)
    return factor_product(identity[None]).replace(left=identity, log_scales=log_entries, right=identity)


@pytest.mark.parametrize("row_spread", [0, 2])
def test_a_full_binary_tree_over_single_steps_is_exact(row_spread, dtype):
    chain = gaussian_chain(320, dtype, row_spread=row_spread)
    product = combined(steps_of(chain))
    exact = testing.exact_log_singular_values(chain)
    assert np.ptp(exact) > 300
    np.testing.assert_allclose(log_sigma(product), exact, rtol=0, atol=NATS[dtype.name])
    left = np.asarray(product.left, np.float64)
    np.testing.assert_allclose(left.T @ left, np.eye(SIZE), atol=testing.rounding_tolerance(dtype, 50))
    assert np.linalg.cond(np.asarray(product.right, np.float64)) < 100
    assert (np.diff(product.log_scales) < 1).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(product)} == {dtype, jnp.dtype("int32")}


@pytest.mark.parametrize("seed", range(3))
def test_any_grouping_gives_the_same_singular_values(seed, dtype):
    chain = gaussian_chain(40, dtype, seed, row_spread=1)
    rng = np.random.default_rng(seed)
    product = combined(steps_of(chain), lambda count: int(rng.integers(1, count)))
    np.testing.assert_allclose(
        log_sigma(product), testing.exact_log_singular_values(chain), rtol=0, atol=NATS[dtype.name]
    )


def test_multiplication_is_associative_and_keeps_its_order(dtype):
    c, b, a = chunks_of(gaussian_chain(24, dtype))
    left_first, right_first = (
        multiply_products(multiply_products(a, b), c),
        multiply_products(a, multiply_products(b, c)),
    )
    np.testing.assert_allclose(
        log_sigma(left_first), log_sigma(right_first), atol=testing.rounding_tolerance(dtype, 200)
    )
    expected = multiplied_back(a) @ multiplied_back(b) @ multiplied_back(c)
    scale = np.abs(expected).max()
    for product in (left_first, right_first):
        np.testing.assert_allclose(
            multiplied_back(product), expected, atol=scale * testing.rounding_tolerance(dtype, 100)
        )
    swapped = multiply_products(c, multiply_products(b, a))
    assert np.abs(multiplied_back(swapped) - expected).max() > 0.1 * scale
    assert np.abs(log_sigma(swapped) - log_sigma(left_first)).max() > 0.1


def test_the_identity_matrix_is_the_identity(dtype):
    identity = diagonal(np.zeros(SIZE), dtype)
    for product in (*chunks_of(gaussian_chain(8, dtype)), diagonal(np.array([900.0, 3.0, -5.0, -6000.0]), dtype)):
        for same in (multiply_products(identity, product), multiply_products(product, identity)):
            np.testing.assert_allclose(log_sigma(same), log_sigma(product), rtol=testing.rounding_tolerance(dtype, 50))
            unit = product.log_scales.max()
            np.testing.assert_allclose(
                multiplied_back(same, unit), multiplied_back(product, unit), atol=testing.rounding_tolerance(dtype, 50)
            )


def test_both_sides_of_the_middle_may_span_thousands_of_nats(dtype):
    entries = np.array([9000.0, 2500.0, -1000.0, -8000.0])
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(SIZE, SIZE)))[0].astype(dtype)
    scaled = diagonal(entries, dtype)
    product = combined([scaled, factor_product(jnp.asarray(rotation)[None]), scaled])
    # With such gaps σ_1 … σ_i of D R D is the product of D's entries and the leading minor of R, each i.
    minors = [np.linalg.slogdet(rotation[:i, :i].astype(np.float64))[1] for i in range(SIZE + 1)]
    expected = 2 * entries + np.diff(minors)
    np.testing.assert_allclose(log_sigma(product), expected, rtol=testing.rounding_tolerance(dtype, 100))
    # The smallest entries meet the largest: everything cancels but the rotation.
    inverse = diagonal(-entries[::-1], dtype)
    reversal = factor_product(jnp.asarray(np.eye(SIZE)[::-1], dtype)[None])
    back = combined([scaled, reversal, inverse, factor_product(jnp.asarray(rotation)[None])])
    np.testing.assert_allclose(log_sigma(back), 0, atol=testing.rounding_tolerance(dtype, 2 * 9000))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dead_side", ["rows", "columns", "both"])
def test_lost_rank_stays_lost_and_harms_no_other_direction(dead_side, seed, dtype):
    chain = gaussian_chain(16, dtype, seed)
    if dead_side != "columns":
        chain[2, 1], chain[7, [0, 3]] = 0, 0
    if dead_side != "rows":
        chain[8, :, 2], chain[12, :, 0] = 0, 0
    exact = testing.exact_log_singular_values(chain)
    assert np.isneginf(exact).any() and np.isfinite(exact).any()
    for product in (combined(chunks_of(chain)), combined(steps_of(chain))):
        np.testing.assert_allclose(log_sigma(product), exact, atol=NATS[dtype.name])
        np.testing.assert_array_equal(np.asarray(product.error_estimate)[np.isneginf(product.log_scales)], 0)
        assert np.isneginf(product.log_abs_det)


def test_nilpotent_and_zero_products_are_lost_exactly(dtype):
    shift, zero, full = steps_of(
        np.stack([np.eye(SIZE, k=1), np.zeros((SIZE, SIZE)), np.ones((SIZE, SIZE))]).astype(dtype)
    )
    square = multiply_products(shift, shift)
    cube = multiply_products(shift, square)
    np.testing.assert_allclose(log_sigma(cube), [0, -np.inf, -np.inf, -np.inf], atol=1e-6)
    np.testing.assert_allclose(multiplied_back(cube), np.eye(SIZE, k=3), atol=1e-6)
    for later, earlier in ((square, square), (shift, cube), (zero, full), (full, zero), (zero, zero)):
        product = multiply_products(later, earlier)
        np.testing.assert_array_equal(log_sigma(product), -np.inf)
        assert np.isfinite(product.left).all() and np.linalg.cond(np.asarray(product.right, np.float64)) < 100


def test_one_dimension_adds_logs():
    tiny, large = (factor_product(jnp.full((1, 1, 1), value)) for value in (-1e-30, 1e25))
    product = multiply_products(multiply_products(tiny, tiny), large)
    np.testing.assert_allclose(product.log_scales, [-35 * np.log(10)], rtol=1e-6)
    np.testing.assert_array_equal(np.sign(multiplied_back(product, -80.0)), 1)
    np.testing.assert_array_equal(np.sign(multiplied_back(multiply_products(product, tiny), -160.0)), -1)


def test_an_associative_scan_gives_every_prefix_under_jit():
    """float32 outside, float64 inside, and a leading axis that the scan cuts to any length."""
    chain = gaussian_chain(5, "float32")

    @jax.jit
    def prefixes(steps):
        return jax.lax.associative_scan(lambda earlier, later: multiply_products(later, earlier), steps), jnp.arange(
            3.0
        )

    scanned, after = prefixes(stacked(steps_of(chain)))
    assert after.dtype == jnp.float32 and not jax.config.jax_enable_x64
    expected = np.eye(SIZE)
    for index, matrix in enumerate(chain.astype(np.float64)):
        expected = matrix @ expected
        part = jax.tree.map(lambda leaf, i=index: leaf[i], scanned)
        np.testing.assert_allclose(multiplied_back(part), expected, atol=2e-6 * np.abs(expected).max())
        assert part.log_abs_det == pytest.approx(np.linalg.slogdet(expected)[1], abs=1e-4)


def test_batches_and_vmap_are_independent_products():
    later, earlier = chunks_of(gaussian_chain(24, "float32", 1)), chunks_of(gaussian_chain(24, "float32", 2))
    together = multiply_products(stacked(later), stacked(earlier))
    mapped = jax.jit(jax.vmap(multiply_products))(stacked(later), stacked(earlier))
    for index in range(3):
        expected = multiplied_back(later[index]) @ multiplied_back(earlier[index])
        for product in (together, mapped):
            part = jax.tree.map(lambda leaf, i=index: leaf[i], product)
            np.testing.assert_allclose(multiplied_back(part), expected, atol=1e-5 * np.abs(expected).max())


def test_the_evidence_is_composed_too(dtype):
    chain = gaussian_chain(16, dtype, 1)
    parts = chunks_of(chain)
    product = combined(parts)
    expected = np.linalg.slogdet(chain.astype(np.float64))[1].sum()
    assert product.log_abs_det == pytest.approx(expected, rel=testing.rounding_tolerance(dtype, 20))
    np.testing.assert_allclose(log_sigma(product).sum(), expected, atol=NATS[dtype.name])
    assert product.num_factorizations == sum(int(part.num_factorizations) for part in parts) + 1
    assert (product.error_estimate >= max(part.error_estimate.min() for part in parts)).all()


def test_error_estimates_are_honest(dtype):
    chains = [gaussian_chain(16, dtype, seed, row_spread=1) for seed in range(30)]
    composed = [combined(parts) for chain in chains for parts in (steps_of(chain), chunks_of(chain))]
    exact = np.repeat([testing.exact_log_singular_values(chain) for chain in chains], 2, axis=0)
    error = np.abs([log_sigma(product) for product in composed] - exact)
    estimate = np.array([product.error_estimate for product in composed], np.float64)
    assert (error <= estimate).mean() >= 0.99
    assert np.median(estimate[::2] / np.maximum(error[::2], 1e-16)) < 200


def test_ill_conditioned_middles_are_reported(dtype):
    """Two graded products whose leading directions miss each other by 1e-4: the middle amplifies rounding by 1e4."""
    graded = diagonal(np.array([300.0, 100.0, -100.0, -300.0]), dtype)

    def estimate(angle):
        rotation = np.eye(SIZE)
        rotation[:2, :2] = [[np.sin(angle), np.cos(angle)], [-np.cos(angle), np.sin(angle)]]
        return combined([graded, factor_product(jnp.asarray(rotation, dtype)[None]), graded]).error_estimate

    amplified = testing.rounding_tolerance(dtype, 1e4)
    assert estimate(1.0)[0] < amplified < estimate(1e-4)[0]


@pytest.mark.parametrize(("steps", "expected"), [((3, -1), 3), ((-1, 2), 2), ((3, 2), 3), ((-1, -1), -1)])
def test_the_first_step_that_is_not_finite_is_kept(steps, expected):
    identity = diagonal(np.zeros(SIZE), "float32")
    parts = [identity.replace(first_non_finite_step=jnp.asarray(step, jnp.int32)) for step in steps]
    assert combined(parts).first_non_finite_step == expected


_SEVERAL_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, rnnjax
from rnnjax import testing
from rnnjax.composition import factor_product_over_mesh
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
assert jax.device_count() == 4
chain = np.random.default_rng(0).normal(size=(30, 4, 4)).astype("float32")  # 30 is no multiple of 4
chain[17, 2] = 0
product = factor_product_over_mesh(jnp.asarray(chain), jax.make_mesh((4,), ("time",)), "time")
assert product.left.sharding.is_fully_replicated and product.left.dtype == jnp.float32
one_device = rnnjax.factor_product(jnp.asarray(chain))
exact = testing.exact_log_singular_values(chain)
for result in (product, one_device):
    values = np.asarray(rnnjax.log_singular_values(jax.tree.map(np.asarray, result)))
    np.testing.assert_allclose(values, exact, atol=1e-5)
    assert result.log_abs_det == -np.inf
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("copy", "time"))
spoilt = jnp.asarray(chain[:3, None]).at[2, 0, 1, 1].set(jnp.nan)
flagged = jax.jit(lambda matrices: factor_product_over_mesh(matrices, mesh, "time", dtype="float32"))(spoilt)
np.testing.assert_array_equal(flagged.first_non_finite_step, [2])
"""


@pytest.mark.slow
def test_time_split_over_several_devices_equals_one_device():
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        OPENBLAS_NUM_THREADS="1",
        PYTHONPATH=str(Path(rnnjax.__file__).parents[1]),
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _SEVERAL_DEVICES],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


CHAIN = jnp.asarray(gaussian_chain(3, "float32"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: multiply_products(p, CHAIN), "^earlier must be a FactoredProduct, what factor_product returns; got"),
        (lambda p: multiply_products(None, p), "^later must be a FactoredProduct, .* got NoneType$"),
        (
            lambda p: multiply_products(p, p.replace(left=p.left[:2])),
            r"^earlier.left must have shape \(4, 4\), got \(2, 4\)",
        ),
        (lambda p: multiply_products(stacked([p]), p), r"^earlier.left must have shape \(1, 4, 4\)"),
        (lambda p: multiply_products(p, p, dtype="half"), "^dtype must be one of float32, float64, got 'half'"),
        (
            lambda p: multiply_products(p, p.replace(left=p.left.astype(jnp.bfloat16))),
            "^earlier must have the dtype of later, float32, got bfloat16",
        ),
        (lambda p: factor_product_over_mesh(CHAIN, 4, "time"), "^mesh must be a jax.sharding.Mesh, .* got int$"),
        (
            lambda p: factor_product_over_mesh(CHAIN, jax.make_mesh((1,), ("time",)), "tine"),
            "^axis_name must be one of time, got 'tine'; did you mean 'time'",
        ),
        (
            lambda p: factor_product_over_mesh(CHAIN.at[1].set(jnp.inf), jax.make_mesh((1,), ("time",)), "time"),
            "^matrices must be finite, .* at time step 1",
        ),
        (
            lambda p: factor_product_over_mesh(CHAIN[0], jax.make_mesh((1,), ("time",)), "time"),
            r"^matrices must be square .* got shape \(4, 4\)",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(factor_product(CHAIN[:1]))
