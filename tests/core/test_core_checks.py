"""One-line errors about numbers: of one, of several, of arrays, and none about what is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.core.checks import require


def ordered(low, high):
    require(lambda low, high: low <= high, "rise", low=low, high=high)


def test_what_does_not_hold_is_named_in_one_line():
    for value, shown in ((-1, "-1"), (np.float64(-0.5), "-0.5"), (float("nan"), "nan"), (jnp.float32(-2.0), "-2.0")):
        with pytest.raises(ValueError, match=r".") as error:
            require(lambda strength: strength >= 0, "be at least 0", strength=value)
        assert str(error.value) == f"strength must be at least 0; got {shown}"
    with pytest.raises(ValueError, match=r"^low and high must rise; got low=3, high=2.5$"):
        ordered(3, 2.5)


def test_every_element_must_hold():
    ordered(np.array([1, 2]), np.array([1, 3]))
    with pytest.raises(ValueError, match=r"^low and high must rise; got low=\[1 4\], high=\[1 3\]$"):
        ordered(np.array([1, 4]), np.array([1, 3]))


def test_traced_values_are_taken_on_trust():
    jax.make_jaxpr(lambda high: ordered(3, high))(2)
    jax.vmap(lambda low: ordered(low, 0))(jnp.arange(3))
