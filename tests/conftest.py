"""Eight CPU devices, no silent rank promotion; warnings are errors (pyproject.toml)."""

import importlib.metadata
import os
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite, with the processes that it starts, compiles more than it computes: to optimise takes twice the time that it saves.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The newer emitters of fused loops take the half of what is left, and up to a sixth of the rest goes to cutting each program into
# as many as 32 that LLVM compiles apart. Later versions have no other emitters, and XLA stops at a flag that it does not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip()

# A shell has what it runs in the background ignore SIGINT, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Where in the source an operation stands is written into every program in full: a twelfth of the time.
jax.config.update("jax_include_full_tracebacks_in_locations", False)

# What XLA compiled once it reads from here, which takes a third of the time. Each process has a directory of its own, and those
# that tests start have none: JAX does not write these files as a whole, and what was half written when it is read is a warning.
_COMPILED = tempfile.TemporaryDirectory(prefix="jaxopt_lab-compiled-")
jax.config.update("jax_compilation_cache_dir", _COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure(config):
    _COMPILED.cleanup()


@pytest.fixture(scope="module", autouse=True)
def _nothing_compiled_is_kept():
    """What JAX lowered for one file of tests is forgotten before the next.

    Every lowering that is kept holds an MLIR context, and MLIR walks over all that there are for each new one: after a thousand
    tests that was two fifths of the time, and gigabytes.
    """
    yield
    jax.clear_caches()
