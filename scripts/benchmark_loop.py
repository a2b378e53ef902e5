"""`train.fit` against a bare loop of a jitted step, in steps per second.

    ./scripts/run scripts/benchmark_loop.py [--cases mlp lenet] [--steps 4000] [--repeats 7]

Two cases: an MLP of one hidden layer of 32 on scikit-learn's digits at batch 16 (aim: at least 4 times the bare loop), and LeNet at
batch 64 (aim: at least 0.95 of the bare loop) on images of MNIST's shape, drawn at random, since only their shape costs time. Both
loops take the same batches from the same stream, donate the state, and use AdamW. Runs alternate, after a warm-up of each that
compiles; a ratio is the median of the pairs' ratios. One JSON line a case.
"""

import argparse
import json
import os
import platform
import statistics
import time

import flax
import jax
import numpy as np
import optax

from jaxopt_lab import data, nets, train


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def bare(step, state, batches, steps):
    """The loop that one writes by hand; `step` is jitted and donates."""
    for t in range(steps):
        state, _ = step(state, batches(t))
    return state


def random_images() -> dict[str, np.ndarray]:
    """4096 images of MNIST's shape and their labels."""
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((4096, 28, 28, 1), dtype=np.float32), "y": rng.integers(0, 10, 4096, dtype=np.int32)}


def case(name: str, net, arrays: dict[str, np.ndarray], batch: int, steps: int, repeats: int) -> dict:
    batches = data.batches(arrays, batch, seed=0)
    model, tx = nets.from_linen(net), optax.adamw(1e-3)
    step = train.make_step(model, cross_entropy, tx)
    start = train.init(model, tx, jax.random.key(0), arrays["x"][:1])
    jitted = jax.jit(step, donate_argnums=0)

    def seconds(work):
        state = jax.tree.map(lambda x: x.copy(), start)
        begin = time.perf_counter()
        out = work(state)
        jax.block_until_ready(out)
        return time.perf_counter() - begin

    def by_hand():
        return seconds(lambda state: bare(jitted, state, batches, steps))

    chunks = []

    def fitted():
        def work(state):
            result = train.fit(step, state, batches, steps=steps, progress=False)
            chunks.append(result.chunk)
            return result.state

        return seconds(work)

    begin = time.perf_counter()
    first_fit = fitted()
    by_hand()
    warm_up = time.perf_counter() - begin
    pairs = [(by_hand(), fitted()) for _ in range(repeats)]
    return {
        "name": name,
        "batch": batch,
        "steps": steps,
        "repeats": repeats,
        "bare_steps_per_s": round(steps / statistics.median(pair[0] for pair in pairs), 1),
        "fit_steps_per_s": round(steps / statistics.median(pair[1] for pair in pairs), 1),
        "fit_over_bare": round(statistics.median(hand / ours for hand, ours in pairs), 3),
        "spread": [round(f(hand / ours for hand, ours in pairs), 3) for f in (min, max)],
        "chunks": sorted(set(chunks)),
        "first_fit_s": round(first_fit, 2),
        "warm_up_s": round(warm_up, 2),
        "platform": jax.devices()[0].platform,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
    }


CASES = {
    "mlp": ("mlp_32_digits_batch_16", nets.MLP(features=(32,)), lambda: data.digits().train, 16, 4000),
    "lenet": ("lenet_28x28_batch_64", nets.LeNet(), random_images, 64, 200),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES), help="which to run (default: all)")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of runs a case (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=None, help="steps a run (default: 4000 for the MLP, 200 for LeNet)")
    options = parser.parse_args()
    for name in ("repeats", "steps"):
        if (count := getattr(options, name)) is not None and count < 1:
            parser.error(f"--{name} {count}: at least 1")
    for name in options.cases:
        title, net, arrays, batch, steps = CASES[name]
        print(json.dumps(case(title, net, arrays(), batch, options.steps or steps, options.repeats)), flush=True)


if __name__ == "__main__":
    main()
