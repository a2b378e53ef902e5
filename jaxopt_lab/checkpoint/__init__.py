"""Checkpoints on Orbax with a manifest of their structure and a digest of every file, so that a fresh process restores any tree."""

from jaxopt_lab.checkpoint.checkpoints import Checkpoints
from jaxopt_lab.checkpoint.digests import Damaged
from jaxopt_lab.checkpoint.folder import Quarantined
from jaxopt_lab.checkpoint.lock import Lock, Locked
from jaxopt_lab.checkpoint.packed import load_packed, save_packed
from jaxopt_lab.checkpoint.retention import Best
from jaxopt_lab.checkpoint.storage import load_tree, save_tree
from jaxopt_lab.checkpoint.writer import SaveFailed

__all__ = [
    "Best",
    "Checkpoints",
    "Damaged",
    "Lock",
    "Locked",
    "Quarantined",
    "SaveFailed",
    "load_packed",
    "load_tree",
    "save_packed",
    "save_tree",
]
