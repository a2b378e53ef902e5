"""What `sparsify` costs: a step of Adam with and without it, between mask updates and at one.

Prints one JSON line a case. Ratios are those of medians in one run, in which the cases take turns; the state is donated. A mask
update is also given in training steps of a multi-layer perceptron of the same size at batch 64. `mask_bytes` is what the masks
of the state take: a byte a kernel weight, or a bit where they are packed.

    ./scripts/run scripts/benchmark_sparsify.py [--sizes 300000 10000000] [--repeats 9]
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxopt_lab as lab

Case = tuple[Callable[..., Any], list[Any]]

_LAYERS = 4
_NEVER = 1_000_000_000


def parameters(size: int) -> dict[str, Any]:
    """A perceptron of four square layers with about `size` weights, drawn as He et al. would."""
    width = round((size / _LAYERS) ** 0.5)
    keys = jax.random.split(jax.random.key(0), _LAYERS)
    return {
        f"layer_{i}": {"kernel": jax.random.normal(key, (width, width)) * (2 / width) ** 0.5, "bias": jnp.zeros(width)}
        for i, key in enumerate(keys)
    }


def sparse(distribution: lab.prune.Distribution, *, updates: int, packed: bool = False) -> optax.GradientTransformation:
    """Adam inside `sparsify`: masks change at each of the first `updates` steps, or not before a step that never comes."""
    begin, end = (0, updates) if updates else (_NEVER, _NEVER)
    sparsity = lab.schedules.cubic(0.0, 0.9, begin, end) if updates else 0.9
    return lab.prune.sparsify(optax.adam(1e-3), sparsity, begin=begin, end=end, distribution=distribution, packed=packed)


def optimiser_case(tx: optax.GradientTransformation, params: Any) -> Case:
    """A donated step of the optimiser alone, on gradients that are there already."""

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any, Any]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, gradients

    params = jax.tree.map(jnp.copy, params)
    gradients = jax.tree.map(lambda w: 0.1 * w, params)
    return jax.jit(step, donate_argnums=(0, 1)), [params, jax.jit(tx.init)(params), gradients]


def training_case(params: Any, batch: int) -> Case:
    """A donated training step, forward and backward, with plain Adam."""
    tx = optax.adam(1e-3)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for layer in params.values():
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
        return jnp.mean(x**2)

    def step(params: Any, state: Any, x: jax.Array) -> tuple[Any, Any, Any]:
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state, x

    params = jax.tree.map(jnp.copy, params)
    x = jnp.ones((batch, params["layer_0"]["kernel"].shape[0]))
    return jax.jit(step, donate_argnums=(0, 1)), [params, jax.jit(tx.init)(params), x]


def configurations_case(params: Any, *, updates: int, configurations: int = 8) -> Case:
    """The optimiser step under vmap over configurations of the sparsity."""
    fractions = jnp.linspace(0.5, 0.95, configurations)
    params = jax.tree.map(lambda w: jnp.stack([w] * configurations), params)
    begin, end = (0, updates) if updates else (_NEVER, _NEVER)
    ramp = lab.schedules.cubic(0.0, 1.0, 0, max(updates, 1))

    def tx(fraction: jax.Array) -> optax.GradientTransformation:
        return lab.prune.sparsify(optax.adam(1e-3), lambda count: fraction * ramp(count), begin=begin, end=end)

    def one(fraction: jax.Array, params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = tx(fraction).update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any, Any]:
        params, state = jax.vmap(one)(fractions, params, state, gradients)
        return params, state, gradients

    state = jax.jit(jax.vmap(lambda fraction, params: tx(fraction).init(params)))(fractions, params)
    return jax.jit(step, donate_argnums=(0, 1)), [params, state, jax.tree.map(lambda w: 0.1 * w, params)]


def mask_bytes(state: Any) -> int:
    """Bytes of the masks in the state of a case; 0 where it has none."""
    return lab.tree.nbytes(state.masks) if isinstance(state, lab.prune.SparsifyState) else 0


def in_turns(cases: dict[str, Case], repeats: int, calls: int) -> dict[str, float]:
    """Median seconds a call of each case, the cases taking turns."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, (step, arguments) in cases.items():
            start = time.perf_counter()
            for _ in range(calls):
                arguments[:] = step(*arguments)
            jax.block_until_ready(arguments)
            # The first round compiles and warms up.
            if repeat:
                times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    """Runs all cases of each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[300_000, 10_000_000])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    global_, uniform = lab.prune.global_(), lab.prune.uniform()
    for size in options.sizes:
        params = parameters(size)
        calls = 20 if size <= 1_000_000 else 3
        # One mask update a call, each deeper than the one before: a threshold that is found once is not found again for nothing.
        updates = (options.repeats + 1) * calls
        cases = {
            "adam": optimiser_case(optax.adam(1e-3), params),
            "between, bool masks": optimiser_case(sparse(global_, updates=0), params),
            "between, packed masks": optimiser_case(sparse(global_, updates=0, packed=True), params),
            "training step, batch 64": training_case(params, 64),
            "mask update, global": optimiser_case(sparse(global_, updates=updates), params),
            "mask update, uniform": optimiser_case(sparse(uniform, updates=updates), params),
        }
        if size <= 1_000_000:
            cases["between, vmap over 8"] = configurations_case(params, updates=0)
            cases["mask update, vmap over 8"] = configurations_case(params, updates=updates)
        seconds = in_turns(cases, options.repeats, calls)
        for name, value in seconds.items():
            print(
                json.dumps(
                    {
                        "case": name,
                        "parameters": lab.tree.size(params),
                        "mask_bytes": mask_bytes(cases[name][1][1]),
                        "ms": round(value * 1e3, 3),
                        "ratio_to_adam": round(value / seconds["adam"], 3),
                        "training_steps": round(value / seconds["training step, batch 64"], 3),
                        "device": jax.devices()[0].device_kind,
                        "cores": os.cpu_count(),
                        "machine": platform.machine(),
                        "jax": jax.__version__,
                        "optax": optax.__version__,
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
