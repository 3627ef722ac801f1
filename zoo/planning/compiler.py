"""XLA's compiler for TPUs in a process of its own, stopped as soon as the program is scheduled.

The process writes down the scheduled program and the buffers that it has assigned. Making machine
code of it would take nine tenths of the time and tells nothing more about memory or collectives.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from zoo.planning import hlo
from zoo.planning.chips import DoesNotDivide, NoPlan


def scheduled(
    command: Sequence[str], folder: Path, name: str
) -> tuple[hlo.Module, tuple[int, int]] | None:
    """Run a process until XLA has scheduled a function's program and assigned its buffers.

    Args:
      command: of the process, which compiles for TPU; its output goes to `log.txt`.
      folder: an empty one for the compiler's files.
      name: of the jitted function.

    Returns:
      The program, and the bytes it takes of the chip's and of the host's memory; None if the
      process ended before.
    """
    flags = f"--xla_dump_to={folder}/dump --xla_dump_hlo_as_text"
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
    }
    dump = f"dump/*.jit_{name}.*after_optimizations"
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            while process.poll() is None and not _finished(folder, dump):
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    if not (text := _finished(folder, dump)):
        return None
    report = next(folder.glob(f"{dump}-memory-usage-report.txt")).read_text()
    sizes = dict(re.findall(r"Memory Space: (\w+) .*\nTotal bytes: (\d+)", report))
    return hlo.Module(text), (int(sizes["default"]), int(sizes.get("host", 0)))


def train_step(folder: Path) -> tuple[hlo.Module, tuple[int, int]] | float:
    """Compile what `request.json` of a folder asks for (`zoo.planning.worker`).

    Returns:
      The program with its memory, as `scheduled` gives them, or the bytes that a chip would need.

    Raises:
      NoPlan: if nothing can be compiled.
    """
    code = f"from zoo.planning.worker import compile_in; compile_in({str(folder)!r})"
    if found := scheduled([sys.executable, "-c", code], folder, "train_step"):
        return found
    if (folder / "error.json").exists():
        error = json.loads((folder / "error.json").read_text())
        if error["kind"] == "memory":
            return float(error["bytes"])
        if error["kind"] == "foreseen":
            raise NoPlan(error["sentence"])
        if error["kind"] == "division":
            raise DoesNotDivide(error["sentence"])
        raise NoPlan(f"{error['sentence']}; {_kept(folder)}.")
    raise NoPlan(f"The compiler ended before it had scheduled the program; {_kept(folder)}.")


def _kept(folder: Path) -> str:
    """Where the process's log is kept, as the end of a sentence."""
    handle, path = tempfile.mkstemp(prefix="zoo-plan-", suffix=".log")
    with os.fdopen(handle, "w") as log:
        log.write((folder / "log.txt").read_text())
    return f"{path} has all that the compiler's process wrote"


def _finished(folder: Path, dump: str) -> str:
    """The scheduled module as text, once it is written with all that belongs to it."""
    for program in folder.glob(f"{dump}_after_buffer_assignment.txt"):
        text = program.read_text()
        return text if text.endswith("}\n\n") else ""
    return ""
