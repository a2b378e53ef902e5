"""MNIST-1D: ten short strokes, padded, scaled, shifted, sheared and buried in noise, made from a seed."""

import numpy as np

__all__ = ["mnist1d_arrays"]

# The published constants.
_STROKES = np.array(
    [
        [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
        [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
        [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
        [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
        [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
        [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
        [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
        [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
    ]
)
_PADDING = (36, 60)
_LENGTH = _STROKES.shape[1] + _PADDING[1]
_FINAL_LENGTH = 40
_SCALE = 0.4
_LARGEST_SHIFT = 48
_CORRELATED_NOISE = 0.25
_WHITE_NOISE = 0.02
_SHEAR = 0.75
_SMOOTHING = 2.0
_OFFSET = 1e-8
"""Added to a stroke so that its own zeros are told from the padding's, where alone correlated noise goes."""


def mnist1d_arrays(examples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws MNIST-1D in its published order, shuffled and standardised as one set.

    Each example is its class's stroke, padded by 36 to 60 zeros, stretched to 72 points, scaled by up to 20 % either way, rolled by
    up to 47 points, filled with smooth noise where it is zero, covered in white noise, sheared, and sampled at 40 points.

    Args:
      examples: how many, a multiple of 10: each class gets as many.
      seed: of `numpy.random.RandomState`, whose draws never change; 42 gives the set of the paper's own generator.

    Returns:
      Signals `[examples, 40]`, float64, of mean 0 and deviation 1 in all, and labels `[examples]`.

    >>> x, y = mnist1d_arrays(20, seed=0)
    >>> x.shape, np.bincount(y).tolist()
    ((20, 40), [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])

    Source: Greydanus, "Scaling down deep learning", 2020.
    """
    labels = np.repeat(np.arange(10), examples // 10)
    draw = np.random.RandomState(seed)
    strokes = _strokes()
    signals, smooth, white = (np.empty((len(labels), _LENGTH)) for _ in range(3))
    tilt = np.empty((len(labels), 1))
    # The draws are interleaved example by example in the published generator; the arithmetic on them is done for all at once.
    for k, label in enumerate(labels):
        padding = _PADDING[0] + int(draw.rand() * (_PADDING[1] - _PADDING[0] + 1))
        padded = np.concatenate([strokes[label] + _OFFSET, np.zeros(padding)])
        stretched = _resample(padded, _LENGTH) * (1 + _SCALE * (draw.rand() - 0.5))
        signals[k] = np.roll(stretched, draw.randint(_LARGEST_SHIFT))
        smooth[k] = draw.randn(_LENGTH)
        white[k] = draw.randn(_LENGTH)
        tilt[k] = draw.rand() - 0.5
    signals = np.where(signals != 0, signals, _smoothed(_CORRELATED_NOISE * smooth)) + _WHITE_NOISE * white
    signals -= _SHEAR * tilt * np.linspace(-0.5, 0.5, _LENGTH)
    order = draw.permutation(len(labels))
    x = np.stack([_resample(signals[k], _FINAL_LENGTH) for k in order])
    return (x - x.mean()) / x.std(), labels[order]


def _strokes() -> np.ndarray:
    """The ten strokes `[10, 12]`: each of deviation 1/6, beginning at 0."""
    x = _STROKES - _STROKES.mean(1, keepdims=True)
    x /= x.std(1, keepdims=True)
    return (x - x[:, :1]) / 6


def _resample(x: np.ndarray, length: int) -> np.ndarray:
    """Linear interpolation to `length` points, ends kept."""
    return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(x)), x)


def _smoothed(x: np.ndarray) -> np.ndarray:
    """A Gaussian filter cut at four deviations, along the last axis, the signal mirrored at its ends.

    The published generator smooths over its only axis; a row here is one of its signals.
    """
    radius = int(4 * _SMOOTHING + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / _SMOOTHING) ** 2)
    mirrored = np.pad(x, ((0, 0), (radius, radius)), mode="symmetric")
    return np.lib.stride_tricks.sliding_window_view(mirrored, 2 * radius + 1, axis=1) @ (kernel / kernel.sum())
