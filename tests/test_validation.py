"""Every check lets good values through and refuses bad ones in one sentence that names argument, value and limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnjax import validation as v

NAN = float("nan")
BFLOAT16_NAN = np.array([1, NAN], jnp.bfloat16)


@pytest.mark.parametrize(
    ("check", "value", "returned"),
    [
        (v.positive_integer, 1, 1),
        (v.positive_integer, np.int64(7), 7),
        (v.non_negative_integer, 0, 0),
        (functools.partial(v.integer_at_least, minimum=2), 2, 2),
        (functools.partial(v.integer_between, low=-1, high=3), -1, -1),
        (functools.partial(v.integer_between, low=-1, high=3), np.int32(3), 3),
        (v.positive_number, 1e-300, 1e-300),
        (v.positive_number, 3, 3.0),
        (functools.partial(v.number_between, low=0, high=1), 0, 0.0),
        (functools.partial(v.number_between, low=0, high=1), np.float32(1), 1.0),
        (functools.partial(v.one_of, allowed=("a", "b")), "b", "b"),
    ],
)
def test_good_values_come_back_as_plain_python(check, value, returned):
    result = check("size", value)
    assert result == returned
    assert type(result) is type(returned)


@pytest.mark.parametrize(
    ("check", "values", "message"),
    [
        (v.positive_integer, [0, -3, 1.0, "1", None, True, NAN], "size must be a positive integer, got {!r}"),
        (v.non_negative_integer, [-1, 0.0, False], "size must be a non-negative integer, got {!r}"),
        (functools.partial(v.integer_at_least, minimum=2), [1, 2.0], "size must be an integer of at least 2, got {!r}"),
        (functools.partial(v.integer_between, low=0, high=3), [-1, 4, 1.5, True], "whole number in [0, 3], got {!r}"),
        (v.positive_number, [0, -1, NAN, np.inf, "1", None, True], "size must be a positive finite number, got {!r}"),
        (functools.partial(v.number_between, low=0, high=1), [-0.1, 1.1, NAN, "0"], "a number in [0, 1], got {!r}"),
        (functools.partial(v.number_between, low=0, high=1, open_low=True), [0, NAN], "in (0, 1], got {!r}"),
        (functools.partial(v.one_of, allowed=("lstm", "gru")), ["qqq", 3, None], "must be one of gru, lstm, got {!r}"),
    ],
)
def test_bad_values_are_refused(check, values, message):
    for value in values:
        with pytest.raises(ValueError, match=r"^size must be") as error:
            check("size", value)
        assert message.format(value) in str(error.value)


def test_a_near_name_is_suggested_and_a_far_one_is_not():
    with pytest.raises(ValueError, match="did you mean 'lstm'"):
        v.one_of("cell", "lstmm", ("lstm", "gru"))
    with pytest.raises(ValueError, match=r"got 'zebra'$"):
        v.one_of("cell", "zebra", ("lstm", "gru"))


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16, np.float16])
def test_floating_dtypes_pass(dtype):
    v.floating_dtype("dtype", dtype)


@pytest.mark.parametrize("dtype", [int, "int8", bool, complex, "float31", "nonsense"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype such as float32, got"):
        v.floating_dtype("dtype", dtype)


def test_float64_needs_to_be_switched_on():
    with pytest.raises(ValueError, match="dtype can be float64 only when JAX has it switched on"):
        v.floating_dtype("dtype", "float64")
    assert not v.float64_enabled()
    with jax.enable_x64(True):
        v.floating_dtype("dtype", "float64")
        assert v.float64_enabled()


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        ({"a": np.ones(3), "b": [np.ones(2), np.array([[0, 1], [-np.inf, NAN]])]}, "tree['b'][1][1, 0] = -inf (2 such"),
        (jnp.array(NAN), "tree[] = nan (1 such"),
        (BFLOAT16_NAN, "tree[1] = nan (1 such"),
        (jnp.asarray(BFLOAT16_NAN), "tree[1] = nan (1 such"),
        (NAN, "tree[] = nan"),
        (np.array([1j * NAN]), "tree[0] = "),
    ],
)
def test_the_first_value_that_is_not_finite_is_named(tree, where):
    with pytest.raises(ValueError, match=r"^tree must be finite, got tree") as error:
        v.finite("tree", tree)
    assert where in str(error.value)


def test_what_has_no_floating_values_is_finite():
    v.finite("tree", {"key": jax.random.key(0), "steps": np.arange(3), "mask": True, "none": None, "empty": np.ones(0)})
    v.finite_steps("tree", (np.arange(3), np.ones((2, 0)), np.ones((2, 2))))


def test_the_first_step_that_is_not_finite_is_named():
    late, early = np.ones((5, 2)), np.ones((5, 3, 1))
    late[4, 0], early[2, 2] = NAN, np.inf
    with pytest.raises(ValueError, match=r"state must be finite, got a NaN or an overflow at time step 2$"):
        v.finite_steps("state", (late, early))
    with pytest.raises(ValueError, match=r"time step 4$"):
        v.finite_steps("state", jnp.asarray(late, jnp.bfloat16))


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: v.shape("x", np.ones((2, 3)), (2, 4)), r"x must have shape \(2, 4\), got \(2, 3\)"),
        (lambda: v.shape("x", np.ones(2), (None, 3)), r"x must have shape \(any, 3\), got \(2,\)"),
        (lambda: v.same_shapes("c", (1, 2), (np.ones(1),)), r"c must be like \(float64\[1\],\), got \(int, int\)"),
        (lambda: v.same_shapes("c", [np.ones(2)], [np.ones(3)]), r"c\[0\] must have shape \(3\), got \(2,\)"),
        (lambda: v.time_major("x", np.ones((0, 3)), 3), "x must have at least one time step"),
        (lambda: v.time_major("x", np.ones(3), None), r"must be time-major with shape \[T, ..., D\], got shape \(3,\)"),
        (lambda: v.time_major("x", np.ones((4, 2)), 3), r"x must be time-major with shape \[T, ..., 3\]"),
        (lambda: v.time_major("x", np.ones((4, 3), int), 3), "x must be floating point, got dtype int"),
        (lambda: v.time_major("x", [[1.0]], 1), "x must be an array, got list"),
        (lambda: v.one_step("x", np.ones((2, 3)), 4), r"x must have shape \[..., D\] with D = 4, got shape \(2, 3\)"),
        (lambda: v.lengths("n", np.array([1, 5]), (2,), 4), r"n must lie in \[0, 4\], the number of time steps; got 5"),
        (lambda: v.lengths("n", np.array([1.0]), (1,), 4), "n must be whole numbers, got dtype float"),
        (lambda: v.lengths("n", np.array([1]), (2,), 4), r"n must have shape \(2\), got \(1,\)"),
    ],
)
def test_shapes_and_lengths_are_checked(check, message):
    with pytest.raises(ValueError, match=message):
        check()


def test_good_shapes_and_lengths_pass():
    v.shape("x", np.ones((2, 3)), (None, 3))
    v.same_shapes("c", {"h": np.ones(2)}, {"h": jax.ShapeDtypeStruct((2,), jnp.float32)})
    v.time_major("x", np.ones((1, 2, 3)), 3)
    v.time_major("tokens", np.ones((4, 1), int), None)
    v.lengths("n", np.array([0, 4]), (2,), 4)
    v.lengths("n", np.array(4), (), 4)


def test_checks_of_values_are_silent_under_jit_and_checks_of_shape_are_not():
    @jax.jit
    def checked(x, lengths):
        assert not v.is_concrete(x)
        v.finite("x", x)
        v.finite_steps("x", x)
        v.lengths("lengths", lengths, (2,), 3)
        return x

    assert np.isnan(checked(jnp.array([NAN, 1.0]), jnp.array([9, -1]))[0])
    with pytest.raises(ValueError, match="lengths must have shape"):
        checked(jnp.ones(2), jnp.array([1, 2, 3]))
