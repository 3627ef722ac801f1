"""Time and peak memory of loading a large published checkpoint.

    python benchmarks/checkpoints.py [NAME]

Writes a file of the variant's official names and shapes with random numbers (Swin-L by default,
0.8 GB) in torch's two formats and as safetensors, loads each in a process of its own, and prints
the highest resident memory that the kernel saw there (VmHWM of /proc/self/status, so the
interpreter, JAX and all libraries count) as a multiple of the file's size. It exits with 1 if a
multiple is above 1.5. Linux only.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "checkpoints")]
LIMIT = 1.5


def peak_bytes() -> int:
    """The highest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def write_files(name: str, folder: Path) -> list[Path]:
    """The three files; their tensors are made one at a time."""
    import numpy as np
    import torch_writer as tw

    import zoo
    from zoo.checkpoints import files, rules, tensor
    from zoo.registry import system

    shapes = rules.manifest(system(name).layouts, zoo.create(name))

    def values(i: int, struct) -> np.ndarray:
        rng = np.random.default_rng(i)
        if struct.dtype == np.float32:
            return rng.random(struct.shape, np.float32)
        return rng.integers(0, 9, struct.shape).astype(struct.dtype)

    entries, numbered = {}, list(enumerate(shapes.items()))
    for i, (key, s) in numbered:
        entries[key] = tw.tensor(str(i), np.broadcast_to(np.zeros((), s.dtype), s.shape))
    pickle = tw.pickled(tw.mapping({"model": tw.mapping(entries)}))
    zipped, legacy, safe = (folder / n for n in ("zip.pth", "legacy.pth", "a.safetensors"))
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        for i, (_, s) in numbered:
            archive.writestr(f"archive/data/{i}", values(i, s).tobytes())
    with open(legacy, "wb") as file:
        file.write(tw.legacy_bytes(pickle, {}, [str(i) for i, _ in numbered]))
        for i, (_, s) in numbered:
            array = values(i, s)
            file.write(array.size.to_bytes(8, "little") + array.tobytes())
    files.save_safetensors(
        safe,
        {
            key: tensor.Tensor(s.shape, s.dtype, lambda i=i, s=s: values(i, s))
            for i, (key, s) in numbered
        },
    )
    return [zipped, legacy, safe]


def load(name: str, path: str) -> None:
    """Load a file in this process and print what it took, as JSON."""
    import jax

    import zoo

    model = zoo.create(name)
    jax.devices()
    before, start = peak_bytes(), time.perf_counter()
    _, variables = zoo.load(name, path)
    jax.block_until_ready(variables)
    seconds = time.perf_counter() - start
    leaves = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    del model
    print(json.dumps({"before": before, "peak": peak_bytes(), "s": seconds, "leaves": leaves}))


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "swin_large_patch4_window7_224_22k"
    cores = len(os.sched_getaffinity(0))
    print(f"{name} on {platform.machine()}, {cores} cores, Python {platform.python_version()}")
    print(f"{'file':<14}{'MB':>7}{'idle MB':>9}{'peak MB':>9}{'peak/file':>11}{'seconds':>9}")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for path in write_files(name, Path(folder)):
            size = path.stat().st_size
            out = subprocess.run(
                [sys.executable, __file__, "--load", name, str(path)],
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},  # libtpu alone would take 90 MB
            )
            got = json.loads(out.stdout.splitlines()[-1])
            ratio = got["peak"] / size
            worst = max(worst, ratio)
            print(
                f"{path.name:<14}{size / 1e6:>7.0f}{got['before'] / 1e6:>9.0f}"
                f"{got['peak'] / 1e6:>9.0f}{ratio:>11.2f}{got['s']:>9.2f}"
            )
    print(f"highest: {worst:.2f} times the file (limit {LIMIT})")
    return int(worst > LIMIT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load(*sys.argv[2:])
    else:
        sys.exit(main())
