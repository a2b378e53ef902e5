"""What a product with a compressed leaf costs, against the float32 weight: one JSON line a case.

    ./scripts/run scripts/benchmark_leaves.py [--side 4096] [--batches 1 64] [--repeats 15]

The cases of a batch size take turns in one process, after a warm-up, and each ratio is the median of those of a turn to the
float32 product of the same turn. `lift, nothing compressed` is the float32 tree through `lift`, which must be the same program.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxopt_lab import compress, tree


def leaves(side: int) -> dict[str, Callable[[Any], Any]]:
    """Every case: the tree that it makes of the float32 one."""
    return {
        "float32": lambda params: params,
        "lift, nothing compressed": lambda params: params,
        "int8": compress.quantize,
        "int4": lambda params: compress.quantize(params, bits=4),
        "int4, groups of 128": lambda params: compress.quantize(params, bits=4, group=min(128, side)),
        "int8, dynamic activations": compress.dynamic,
        "float8 e4m3": compress.quantize_float,
        "NF4": compress.quantize_normal,
        "rank n/8": lambda params: compress.low_rank(params, rank=side // 8),
        "clustered, 16": lambda params: compress.cluster(params, k=16),
        "2:4": lambda params: compress.store_n_of_m(two_of_four(params), 2, 4),
    }


def two_of_four(params: Any) -> Any:
    """The two largest of each four inputs."""
    from jaxopt_lab import prune

    return prune.one_shot(prune.magnitude(), params, None, pattern=prune.n_of_m(2, 4))[0]


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int, least_s: float) -> dict[str, list[float]]:
    """Seconds a call of each case, `repeats` of them, the cases taking turns; a short call is repeated within a turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    inner: dict[str, int] = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        begin = time.perf_counter()
        jax.block_until_ready(call())
        inner[name] = max(1, round(least_s / max(time.perf_counter() - begin, 1e-9)))
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(inner[name]):
                out = call()
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - begin) / inner[name])
    return times


def main() -> None:
    """Runs all cases for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()

    params = {"kernel": jax.random.normal(jax.random.key(0), (options.side, options.side)) / options.side**0.5}
    product = lambda params, x: x @ params["kernel"]  # noqa: E731
    plain, lifted = jax.jit(product), jax.jit(compress.lift(product))
    made = {name: make(params) for name, make in leaves(options.side).items()}
    for batch in options.batches:
        x = jax.random.normal(jax.random.key(1), (batch, options.side))
        calls = {name: functools.partial(plain if name == "float32" else lifted, stored, x) for name, stored in made.items()}
        times = in_turns(calls, options.repeats, least_s=0.02)
        for name, seconds in times.items():
            ratios = [own / base for own, base in zip(seconds, times["float32"], strict=True)]
            print(
                json.dumps(
                    {
                        "case": name,
                        "side": options.side,
                        "batch": batch,
                        "ms": round(statistics.median(seconds) * 1e3, 3),
                        "ratio_to_float32": round(statistics.median(ratios), 3),
                        "bytes_to_float32": round(tree.nbytes(made[name]) / tree.nbytes(params), 4),
                        "device": jax.devices()[0].device_kind,
                        "cores": os.cpu_count(),
                        "machine": platform.machine(),
                        "jax": jax.__version__,
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
