"""Checkpoints of training runs: Orbax, with digests of everything it wrote.

    run/checkpoints/40/          a step, moved into place when it is whole
      params ema optimizer ...   Orbax arrays, one folder a part of the state
      extra/0.json               JSON: data iterator, pending metrics, config, versions
      manifest/<process>.json    digest, shape, type of each leaf, taken in memory before writing
      FILES.json                 digest of each file of the step, added when it is in place
    run/set_aside/40             a step that was found broken

Orbax does not check what it reads: most flipped bits load silently. Here a step is used only if its
files and then its arrays are what was saved; otherwise it is moved aside and the one before is
used. Digests are BLAKE2b over the little-endian bytes of each shard in row-major order.
"""

from zoo.checkpoints.runs.checkpointer import Checkpoints
from zoo.checkpoints.runs.disk import read_manifest, set_aside, steps_of, verify_files, versions
from zoo.checkpoints.runs.reading import is_run, load_run, load_variables, run_folder, saved_extra
from zoo.checkpoints.runs.storage import cause

__all__ = [
    "Checkpoints",
    "cause",
    "is_run",
    "load_run",
    "load_variables",
    "read_manifest",
    "run_folder",
    "saved_extra",
    "set_aside",
    "steps_of",
    "verify_files",
    "versions",
]
