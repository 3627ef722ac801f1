"""Train what a config file describes.

    python train.py                                    configs/default.py into runs/default-<time>
    python train.py configs/vision/swin_fashion_mnist.py --workdir runs/fashion
    python train.py --optimizer.learning-rate 1e-3 --model.overrides.drop-path 0.1 partition.fsdp=2
    python train.py --help                             every field, with its default

A run directory that has checkpoints is continued. Several processes: the same command for each,
with --workdir on a file system that all see; SLURM, GKE and the variables JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID are recognised, --distributed leaves it to JAX.

Exit codes: 0 done; 75 asked to stop (SIGTERM, at one process of several too) and saved, the same
command continues; 76 another process is gone (134, SIGABRT, where JAX itself ended this one), the
same command continues from the last checkpoint; 2 the command line or config is wrong; 1 all else.
"""

import os
import sys
import time
import traceback
from pathlib import Path


def main(args: list[str]) -> int:
    """Run a command line; gives the exit code."""
    from zoo.errors import ConfigError, StorageError, TrainingError
    from zoo.training import command_line, distributed
    from zoo.training.config import readable
    from zoo.training.loop import EXIT_STOPPED, Stopped, train

    try:
        name, command = command_line.parse(args)
        distributed.initialize(detect=command.distributed)
        workdir = command.workdir or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        if distributed.is_first():
            print(f"{readable(command.config)}\nRun directory: {workdir}", flush=True)
        if command.workdir is None and distributed.several():
            raise ConfigError("A run of several processes needs --workdir, which all of them see.")
        train(command.config, workdir, profile=command.profile, origin=command.origin)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return EXIT_STOPPED
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, ConfigError) else 1
        distributed.leave(distributed.EXIT_LOST if isinstance(error, distributed.Lost) else code)
        if isinstance(error, StorageError):
            sys.stdout.flush()
            os._exit(1)  # writers that would try, and fail, once more on the way out are left
        return code
    except KeyboardInterrupt:
        print("Interrupted; nothing was saved since the last checkpoint.", file=sys.stderr)
        distributed.leave(130)
        return 130
    except BaseException:
        if distributed.several():
            traceback.print_exc()
            distributed.leave(1)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
