"""A trace of ten steps, for xprof and Perfetto."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

SKIP, STEPS = 10, 10


class Profile:
    """Traces steps 10 to 20 of this process, when everything has been compiled.

    Each step is marked as such (`train`, with its number), which is how xprof tells their times.
    """

    def __init__(self, folder: Path, first: int, say: Callable[[str], None]) -> None:
        """Of a run that goes on after step `first`; `say` gets one sentence when it is written."""
        self.folder, self.first, self.say = folder, first + SKIP, say
        self.running = self.done = False

    @contextmanager
    def step(self, number: int, state: Any) -> Iterator[None]:
        """Around each step; `state` is what the step before gave."""
        if number == self.first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        elif number == self.first + STEPS:
            jax.block_until_ready(state)
            self.stop(number)
        if not self.running:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def stop(self, number: int) -> None:
        """Write what there is, at the end of the run at the latest."""
        if self.running:
            jax.profiler.stop_trace()
            self.running, self.done = False, True
            self.say(f"Trace of steps {self.first} to {number} in {self.folder}.")
        elif not self.done:
            self.say(f"No trace: it would begin after step {self.first}.")
