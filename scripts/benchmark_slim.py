"""What slimming saves in time, against what it saves in multiplications: one JSON line a case.

    ./scripts/run scripts/benchmark_slim.py [--ratio 0.5] [--batches 1 32] [--repeats 15] [--tiny]

A ResNet-18 on images of 224 x 224 and a Transformer encoder of six layers (width 512, 8 heads, 128 tokens) in float32, whole and
with that part of every group of channels cut. They take turns in one process, after a warm-up; a ratio is the median of those of a
turn. `slim_to_built` is against a ResNet-18 that was built with half the channels, which is what a user would otherwise run.
`coupling` lines say how long tracing and coupling take, from shapes alone.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxopt_lab import nets, surgery, tracing


class Classifier(nn.Module):
    """A Transformer encoder, and classes read from its pooled state."""

    encoder: nn.Module

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        return nn.Dense(2)(self.encoder(tokens, train=train)[1])


def networks(tiny: bool) -> dict[str, tuple[nets.Model, tuple[int, ...], Any]]:
    """Each with the shape and the dtype of one example."""
    tokens, side = (8, 32) if tiny else (128, 224)
    sizes = (16, 1, 2, 32) if tiny else (512, 6, 8, 2048)
    encoder = nets.BERT(1000, tokens, **dict(zip(("width", "depth", "heads", "mlp_width"), sizes, strict=True)))
    return {
        "ResNet-18": (resnet(tiny), (side, side, 3), jnp.float32),
        "Transformer, 6 layers": (nets.from_linen(Classifier(encoder)), (tokens,), jnp.int32),
    }


def resnet(tiny: bool, part: float = 1) -> nets.Model:
    """A ResNet-18 with a part of its channels; of two blocks where `tiny`."""
    widths, each, stem = ((8, 16), 1, 8) if tiny else ((64, 128, 256, 512), 2, 64)
    stages = [[[round(part * n)] * 2] * each for n in widths]
    return nets.from_linen(nets.ImageNetResNet(widths=stages, stem=round(part * stem)))


def in_turns(calls: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the cases taking turns, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-2, repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if turn >= 0:
                times[name].append(time.perf_counter() - begin)
    return times


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "jax": jax.__version__,
    }


def coupling(depth: int) -> dict[str, Any]:
    """How long tracing and coupling a residual network take."""
    model = nets.from_linen(nets.ImageNetResNet(depth=depth))
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(lambda key: model.init(key, jnp.zeros(x.shape)), jax.random.key(0))
    begin = time.perf_counter()
    found = surgery.coupled_channels(model.predict, variables, x)
    return {"case": f"coupling, ResNet-{depth}", "seconds": round(time.perf_counter() - begin, 3), "groups": len(found.groups)}


def slimmed(name: str, model: nets.Model, example: tuple[tuple[int, ...], Any], options: argparse.Namespace) -> None:
    """Prints a line for each batch size."""
    shape, dtype = example
    one = jnp.zeros((1, *shape), dtype)
    variables = jax.jit(model.init)(jax.random.key(0), one)
    small_model, small, _ = surgery.slim(model, variables, one, ratio=options.ratio)
    macs = tracing.count(small_model.predict, small, one).macs / tracing.count(model.predict, variables, one).macs
    whole, less = jax.jit(model.predict), jax.jit(small_model.predict)
    for batch in options.batches:
        x = jnp.zeros((batch, *shape), dtype)
        calls = {"whole": functools.partial(whole, variables, x), "slim": functools.partial(less, small, x)}
        if name == "ResNet-18":
            built = resnet(options.tiny, 1 - options.ratio)
            calls["built"] = functools.partial(jax.jit(built.predict), jax.jit(built.init)(jax.random.key(0), one), x)
        times = in_turns(calls, options.repeats)

        def ratio_to(base: str, times: dict[str, list[float]] = times) -> float:
            return statistics.median(b / a for a, b in zip(times[base], times["slim"], strict=True))

        ratio = ratio_to("whole")
        line = {
            "case": name,
            "batch": batch,
            "cut": options.ratio,
            "macs_ratio": round(macs, 4),
            "whole_ms": round(1e3 * statistics.median(times["whole"]), 3),
            "slim_ms": round(1e3 * statistics.median(times["slim"]), 3),
            "time_ratio": round(ratio, 4),
            "time_to_macs": round(ratio / macs, 3),
            "slim_to_built": round(ratio_to("built"), 3) if "built" in calls else None,
        }
        print(json.dumps({**line, **machine()}), flush=True)


def main() -> None:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="networks of a few channels, to see that it runs")
    options = parser.parse_args()

    for depth in (18,) if options.tiny else (18, 34, 50, 152):
        print(json.dumps({**coupling(depth), **machine()}), flush=True)
    for name, (model, *example) in networks(options.tiny).items():
        slimmed(name, model, tuple(example), options)


if __name__ == "__main__":
    main()
