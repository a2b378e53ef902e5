"""Checkpoints on Orbax with a manifest of their structure, so that a fresh process restores any tree without a target."""

from jaxopt_lab.checkpoint.checkpoints import Checkpoints
from jaxopt_lab.checkpoint.packed import load_packed, save_packed
from jaxopt_lab.checkpoint.storage import load_tree, save_tree

__all__ = ["Checkpoints", "load_packed", "load_tree", "save_packed", "save_tree"]
