"""What tests of singular values share: products by the library in one program, and how far they are from the truth."""

import functools

import jax
import numpy as np

import rnnjax
from rnnjax import testing

LIMIT = {"float32": 2e-3, "float64": 1e-9}  # nats


@functools.partial(jax.jit, static_argnames="dtype")
def spectrum(chain, dtype=None):
    """log σ_i, log of the spectral norm and log|det| of a product, in one program."""
    product = rnnjax.factor_product(chain, dtype=dtype)
    return rnnjax.log_singular_values(product), rnnjax.log_spectral_norm(product), product.log_abs_det


def worst(actual, exact):
    """Largest difference in nats; rank loss must agree exactly."""
    actual, exact = np.asarray(actual, np.float64), np.asarray(exact)
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(exact))
    live = np.isfinite(exact)
    return np.abs(actual[live] - exact[live]).max(initial=0.0)


def exact_of(jacobians):
    """All log σ of the Jacobians of a sequence, kept as factors, which are taken as exact numbers."""
    factors = (jacobians.carry_derivatives, jacobians.recurrent_derivatives, jacobians.recurrent_kernel)
    return testing.exact_log_singular_values(testing.chain_of_factors(*factors))[: jacobians.shape[-1]]


def orthogonal(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
