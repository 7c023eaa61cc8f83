"""Long matrix products that neither overflow nor lose their small directions.

A product P = A_T … A_1 is kept in graded factors, P = L · diag(e^ℓ) · V (see ``graded``). Multiplying by the next A
only changes L to A L. Its columns turn towards the leading direction, and rounding is amplified by their condition
number κ; they are factored again before ε·κ exceeds what the result's own dtype asks for. How many steps that takes is
predicted from the condition found last time, and checked: steps that turn out to have been too many are taken back, and
fewer tried.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rnnjax import graded, validation
from rnnjax.determinants import with_log_abs_dets
from rnnjax.graded import Factors
from rnnjax.meshes import check_not_spread
from rnnjax.operators import DenseJacobians, Jacobians, check_finite, first_non_finite_step
from rnnjax.sheared import ShearedJacobians, sheared
from rnnjax.typing import Array, DType

_ERROR_OF_A_BLOCK = {"float32": 2e-6, "float64": 1e-12}
"""Nats of error that the steps between two factorisations may add, by the dtype of the result."""
_FIRST_STEPS, _MOST_STEPS = 4, 64
"""Of a block: tried first, and at most."""
_MARGIN = 0.9
"""Share of the log of the limit that a block is made for: steps taken back cost more than a longer block saves."""
_SAFETY = {"float32": 16.0, "float64": 8.0}
"""What the root of the summed squares is multiplied by, by the dtype factorised in: it leaves out that later steps may
amplify errors of earlier ones, and is chosen so that 99 % of the errors of random chains lie below the estimate."""


@flax.struct.dataclass
class FactoredProduct:
    """A product P = A_T … A_1 of square matrices as P = left · diag(exp(log_scales)) · right.

    Attributes:
      left: Q, orthogonal, ``[..., S, S]``.
      log_scales: ℓ in nats, ``[..., S]``, nearly descending; −inf where rank is lost.
      log_scales_remainder: what the float sums of ``log_scales`` left out, nats, ``[..., S]``.
      right: V, well conditioned, ``[..., S, S]``.
      log_abs_det: Σ_t log|det A_t| in nats, ``[...]``, computed from each A_t on its own. It must equal the sum of
        all log singular values, and is the evidence that none of them is wrong.
      error_estimate: how far rounding may have moved each log singular value, nats, ``[..., S]``; 0 where rank is lost,
        infinite where it seems to be though no step is singular.
      num_factorizations: how many times columns were factored, int32 ``[...]``; at most T + 3 where no block was taken
        back.
      first_non_finite_step: the first step with a NaN or an infinity, int32 ``[...]``, −1 where there is none;
        ``log_scales`` are NaN then. Outside ``jax.jit`` such a step is an error instead.
    """

    left: Array
    log_scales: Array
    log_scales_remainder: Array
    right: Array
    log_abs_det: Array
    error_estimate: Array
    num_factorizations: Array
    first_non_finite_step: Array


@flax.struct.dataclass
class Steps:
    """How far a chain has been multiplied.

    Attributes:
      factors: of diag(c_{t+1}) · A_t … A_1, with c_{t+1} = ``scales`` the column scales of the next matrix.
      scales: ``[S]``.
      done: t, int32.
      block: how many steps to take next before columns are factored, int32.
      num_factorizations: int32.
      squared_error: square of the error so far of each log scale, in nats, ``[b]``.
    """

    factors: Factors
    scales: Array
    done: Array
    block: Array
    num_factorizations: Array
    squared_error: Array


@flax.struct.dataclass
class Chain:
    """Matrices A_1 … A_T to be multiplied, first to last: Jacobians, or their transposes from the last to the first.

    Attributes:
      jacobians: of one sequence, ``[T, S, S]``, in the dtype to work in; or sheared.
      transposed: whether A_i is the transpose of J_{T+1−i} rather than J_i.
      limit: condition number at which columns must be factored.
      scaled: whether column scales are taken from each matrix, which needs the matrix, and errors estimated; otherwise
        scales are ones and errors 0.
    """

    jacobians: Jacobians | ShearedJacobians
    transposed: bool = flax.struct.field(pytree_node=False)
    limit: float = flax.struct.field(pytree_node=False)
    scaled: bool = flax.struct.field(pytree_node=False, default=True)

    def start(self, mask: Array | None = None, first: Array | int = 0) -> Steps:
        """Returns the empty product before A_{first + 1}, of columns where ``mask`` ``[S]`` is true (all of them)."""
        done = jnp.asarray(first, jnp.int32)
        scales = self.scales(done)
        kept = scales if mask is None else jnp.where(mask, scales, 0)
        block, zero = jnp.asarray(_FIRST_STEPS, jnp.int32), jnp.zeros((), jnp.int32)
        return Steps(graded.diagonal_factors(kept), scales, done, block, zero, jnp.zeros_like(scales))

    def multiplied(self, frame: Array) -> Factors:
        """Returns the factors of A_T … A_1 · frame, for orthonormal columns ``[S, b]``."""
        width, dtype = frame.shape[1], frame.dtype
        nothing = jnp.zeros(width, dtype)
        start = dataclasses.replace(
            self.start(), factors=Factors(frame, nothing, nothing, jnp.eye(width, dtype=dtype)), squared_error=nothing
        )
        steps = self.advanced(start, self.jacobians.shape[0])
        factored = graded.orthogonalized(steps.factors.left, steps.factors.log_scales)
        return graded.regraded(factored, steps.factors)

    def times(self, index: Array, columns: Array, **options: bool) -> Array:
        """Returns A_{index + 1} V."""
        if self.transposed:
            return self.jacobians.at_step(self.jacobians.shape[0] - 1 - index).transpose_times(columns, **options)
        return self.jacobians.at_step(index).times(columns, **options)

    def starting_at(self, index: Array) -> "Chain":
        """Returns a chain whose products start with A_{index + 1}, if not transposed."""
        if not isinstance(self.jacobians, ShearedJacobians):
            return self
        return dataclasses.replace(self, jacobians=self.jacobians.starting_at(index))

    def scales(self, index: Array) -> Array:
        """Returns the column scales of A_{index + 1}, ``[S]``; ones past the end."""
        if not self.scaled:
            return jnp.ones(self.jacobians.shape[-1], self.jacobians.dtype)
        last = self.jacobians.shape[0] - 1
        inside = jnp.minimum(index, last).astype(jnp.int32)
        matrix = self.jacobians.at_step(last - inside if self.transposed else inside).dense()
        scales = graded.column_scales(matrix.T if self.transposed else matrix)
        return jnp.where(index > last, jnp.ones_like(scales), scales)

    def columns(self, steps: Steps, count: Array | int) -> Array:
        """Returns A_{t+count} … A_{t+1} · L of the product so far."""
        start = graded.unscaled_rows(steps.factors.left, steps.scales)
        return jax.lax.fori_loop(steps.done, steps.done + count, self.times, start)

    def last_columns(self, steps: Steps) -> Array:
        """Returns A_{t+1} … A_1 · frame of the product so far, for a product that ends there."""
        if not isinstance(self.jacobians, ShearedJacobians):
            return self.columns(steps, 1)
        return self.times(steps.done, graded.unscaled_rows(steps.factors.left, steps.scales), last=True)

    def advanced(self, steps: Steps, end: Array | int) -> Steps:
        """Returns the product multiplied as far as A_end."""
        return jax.lax.while_loop(lambda s: s.done < end, lambda s: self._block(s, end), steps)

    def _block(self, steps: Steps, end: Array | int) -> Steps:
        """Multiplies by a block of steps, or takes them back and makes the block shorter."""
        count = jnp.minimum(steps.block, end - steps.done).astype(jnp.int32)
        scales = self.scales(steps.done + count)
        columns = scales[:, None] * self.columns(steps, count)
        factored = graded.eliminated(columns, steps.factors.log_scales)
        condition = graded.condition(factored, columns, steps.factors.log_scales)
        accepted = (count == 1) | ((condition.whole <= self.limit) & ~condition.vanished)
        shorter = jnp.where(condition.vanished, count // 2, self._fitting(count, condition.whole))
        shorter = jnp.clip(shorter, 1, count - 1).astype(jnp.int32)
        taken_back = dataclasses.replace(steps, block=shorter, num_factorizations=steps.num_factorizations + 1)

        def accept() -> Steps:
            errors = self.epsilon() * condition.of_pivots() if self.scaled else jnp.zeros_like(condition.rows)
            return Steps(
                graded.regraded(factored, steps.factors),
                scales,
                steps.done + count,
                self._next_block(steps.block, count, condition.whole),
                steps.num_factorizations + 1,
                steps.squared_error[factored.order] + errors**2 * (count + 1).astype(scales.dtype),
            )

        return jax.lax.cond(accepted, accept, lambda: taken_back)

    def _next_block(self, planned: Array, count: Array, condition: Array) -> Array:
        """Returns a block as long as fits, at most twice as long as this one."""
        longer = jnp.minimum(jnp.minimum(self._fitting(count, condition), 2 * planned), _MOST_STEPS)
        return jnp.where(count == planned, jnp.maximum(planned, longer), planned)

    def _fitting(self, count: Array, condition: Array) -> Array:
        """Returns how many steps stay within the limit, with a margin, if the condition number grows as it did."""
        per_step = jnp.log(condition) / count.astype(condition.dtype)
        steps = jnp.floor(_MARGIN * np.log(self.limit) / jnp.maximum(per_step, 1e-3))
        return jnp.clip(jnp.nan_to_num(steps, nan=1.0), 0, 2 * _MOST_STEPS).astype(jnp.int32)

    def epsilon(self) -> float:
        """Returns the rounding unit of the dtype to work in."""
        return float(jnp.finfo(self.jacobians.dtype).eps)


def factor_product(matrices: Array | Jacobians, *, dtype: DType | None = None) -> FactoredProduct:
    """Multiplies a chain of matrices into graded factors of P = A_T … A_1.

    Args:
      matrices: A_1 … A_T along axis 0, ``[T, ..., S, S]``, float32 or float64 (narrower is widened to float32); or
        what ``jacobian_operator`` returns, of which at most one matrix at a time is formed, and which keeps the digits
        of an LSTM whose gates saturate (see ``sheared``).
      dtype: float32 or float64, what the factorisations are computed in. float64 by default, also for float32 matrices
        and whatever JAX's own setting: an error of float32 grows to ε·κ·√T nats for steps of condition κ, and far
        beyond where neighbouring directions nearly meet. On TPU, which has no float64, the default is the matrices'
        own dtype.

    Returns:
      The ``FactoredProduct``, with batch axes ``...``, in the dtype of the matrices.

    Raises:
      ValueError: not a stack of square matrices, T = 0, or non-finite entries, with their step.

    Example:
      >>> import jax.numpy as jnp
      >>> rotation = jnp.array([[0.0, -1.0], [1.0, 0.0]])
      >>> product = factor_product(jnp.stack([3.0 * rotation] * 1000))  # 3^1000 overflows
      >>> print(f"{product.log_abs_det:.2f} = 2000 ln 3")
      2197.22 = 2000 ln 3
    """
    check_not_spread("matrices", matrices)
    jacobians = checked_jacobians(matrices)
    with factorization_precision(jacobians.dtype, dtype) as wide:
        return _factor_product(jacobians, wide)


def check_product(name: str, product: Any) -> None:
    """Raises ValueError that names the argument unless ``product`` is a ``FactoredProduct``."""
    if not isinstance(product, FactoredProduct):
        raise ValueError(f"{name} must be a FactoredProduct, what factor_product returns; got {type(product).__name__}")


def checked_jacobians(matrices: Array | Jacobians) -> Jacobians:
    """Returns matrices ``[T, ..., S, S]`` as Jacobians in float32 or float64; raises ValueError if that cannot be."""
    if not isinstance(matrices, Jacobians):
        matrices = jnp.asarray(matrices)
        if matrices.ndim < 3 or matrices.shape[-1] != matrices.shape[-2] or 0 in matrices.shape:
            raise ValueError(f"matrices must be square and at least one, [T, ..., S, S], got shape {matrices.shape}")
        validation.floating_dtype("matrices", matrices.dtype)
        validation.finite_steps("matrices", matrices)
        return DenseJacobians(matrices if jnp.finfo(matrices.dtype).bits >= 32 else matrices.astype(jnp.float32))
    check_finite(matrices)
    return matrices


def factorization_dtype(asked: DType | None) -> DType | None:
    """Returns the dtype asked for, or the default: float64, or None on TPU; raises ValueError for any other."""
    if asked is None:
        return None if jax.default_backend() == "tpu" else np.dtype(np.float64)
    name = asked if isinstance(asked, str) else np.dtype(asked).name
    return np.dtype(validation.one_of("dtype", name, ("float32", "float64")))


@contextlib.contextmanager
def factorization_precision(own: DType, asked: DType | None) -> Iterator[DType]:
    """Gives the dtype to factorise in, and switches float64 on for as long as the context lasts where that needs it."""
    wide = np.promote_types(factorization_dtype(asked) or own, own)
    if wide == np.float64 and not validation.float64_enabled():
        with jax.enable_x64(True):
            yield wide
    else:
        yield wide


def condition_limit(own: DType, wide: DType) -> float:
    """Returns the condition number of columns that a result in dtype ``own``, factored in dtype ``wide``, can bear."""
    return _ERROR_OF_A_BLOCK[np.dtype(own).name] / float(jnp.finfo(wide).eps)


def error_estimate(steps: Steps, log_sigma: Array, own: DType) -> Array:
    """Returns how far rounding may have moved each log σ, ``[S]`` in descending order, in results of dtype ``own``.

    Errors grow towards the small singular values; where two are close, the larger error may be that of either.
    """
    by_size = steps.squared_error[jnp.argsort(-steps.factors.log_scales)]
    neighbours = jnp.maximum(by_size, jnp.concatenate([by_size[1:], by_size[-1:]]))
    wide = float(jnp.finfo(by_size.dtype).eps)
    amplified = _SAFETY[by_size.dtype.name] * jnp.sqrt(jax.lax.cummax(neighbours)) + 4 * wide * len(by_size) ** 0.5
    live = log_sigma > -jnp.inf
    rounded = float(jnp.finfo(own).eps) * (jnp.abs(jnp.where(live, log_sigma, 0)) + 1)
    return jnp.where(live, amplified + rounded, 0).astype(own)


def estimate_of_lost(estimate: Array, lost: Array, log_abs_det: Array) -> Array:
    """Returns error estimates ``[..., S]``, for lost directions 0 or, if no determinant is zero, infinite."""
    return jnp.where(lost, jnp.where(jnp.isneginf(log_abs_det), 0, jnp.inf)[..., None], estimate)


@functools.partial(jax.jit, static_argnames="wide")
def _factor_product(jacobians: Jacobians, wide: DType) -> FactoredProduct:
    own = jacobians.dtype

    def single(sequence: Jacobians) -> dict[str, Array]:
        chain = Chain(sheared(sequence, wide), False, condition_limit(own, wide))
        steps = chain.advanced(chain.start(), sequence.shape[0])
        left, scales = steps.factors.left, steps.factors.log_scales
        factors = graded.regraded(graded.orthogonalized(left, scales), steps.factors)
        factors = jax.lax.fori_loop(0, 2, lambda _, own: graded.transposed(own), factors)
        rounded = graded.narrowed(factors, own)
        return {
            "left": rounded.left,
            "log_scales": rounded.log_scales,
            "log_scales_remainder": rounded.remainder,
            "right": rounded.right,
            "error_estimate": error_estimate(steps, -jnp.sort(-factors.log_scales), own),
            "num_factorizations": steps.num_factorizations + 3,
        }

    product, log_abs_dets = with_log_abs_dets(single, jacobians, wide)
    first_bad = first_non_finite_step(jacobians)
    product["log_scales"] = jnp.where(first_bad[..., None] < 0, product["log_scales"], jnp.nan)
    log_abs_det = log_abs_dets[-1].astype(own)
    lost = jnp.isneginf(-jnp.sort(-product["log_scales"]))
    product["error_estimate"] = estimate_of_lost(product["error_estimate"], lost, log_abs_det)
    return FactoredProduct(**product, log_abs_det=log_abs_det, first_non_finite_step=first_bad)
