"""train.py with one thing going wrong: `driver.py EVENT ... train.py's arguments`.

kill:N    SIGKILL itself in the middle of writing checkpoint N
die:N     SIGKILL itself at step N of this process, when there is a checkpoint
term:N    SIGTERM itself after step N
limit:N   no file may grow beyond N bytes
slow:S    every step takes S seconds longer
reads:F   every training example that is read is noted in the file F, by its index
none      nothing
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import jax
from training import tiny

import train
from zoo.checkpoints.runs import disk
from zoo.training.program import Program


def main(event, args):
    kind, _, number = event.partition(":")
    kept = Path(args[args.index("--workdir") + 1]) / "checkpoints" if "--workdir" in args else None
    if kind == "kill":
        write = disk.Json.save

        async def save(self, directory):
            background = await write(self, directory)
            if f'"step": {number},' in self.text and '"leaves"' in self.text:

                async def dies():
                    await background
                    os.kill(os.getpid(), signal.SIGKILL)

                return dies()
            return background

        disk.Json.save = save
    if kind in ("die", "term", "slow"):
        step, count = Program.step, [0]

        def disturbed(self, state, batch):
            count[0] += 1
            if kind == "slow":
                time.sleep(float(number))
            elif count[0] == int(number):
                while kind == "die" and not any(p.name.isdigit() for p in kept.iterdir()):
                    time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGKILL if kind == "die" else signal.SIGTERM)
            if kind == "term" and count[0] >= int(number) and jax.process_count() > 1:
                time.sleep(1.5)  # JAX looks for the signal once a second
            return step(self, state, batch)

        Program.step = disturbed
    if kind == "limit":
        jax.config.update("jax_enable_compilation_cache", False)  # its files are files too
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), int(number)))
    if kind == "reads":
        read = tiny.Blobs.__getitem__

        def noted(self, index):
            if self.split == "train":
                with open(number, "a") as file:
                    file.write(f"{index}\n")
            return read(self, index)

        tiny.Blobs.__getitem__ = noted
    return train.main(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
