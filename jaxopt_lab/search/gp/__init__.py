"""The array core of a Gaussian-process search: pure functions on padded arrays; it knows nothing of Optuna."""
