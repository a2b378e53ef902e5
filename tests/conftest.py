"""Eight CPU devices, no silent rank promotion; warnings are errors (pyproject.toml)."""

import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite, with the processes that it starts, compiles more than it computes: to optimise takes twice the time that it saves.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The newer emitters of fused loops take the half of what is left. Later versions have no others, and stop at an unknown flag.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _nothing_compiled_is_kept():
    """What JAX lowered for one file of tests is forgotten before the next.

    Every lowering that is kept holds an MLIR context, and MLIR walks over all that there are for each new one: after a thousand
    tests that was two fifths of the time, and gigabytes.
    """
    yield
    jax.clear_caches()
