"""Batches made ready by a thread, each with the iterator's state after it."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


class Prefetch:
    """Reads ahead of the training loop.

    `next()` gives a placed batch; `state` is then the iterator's state as if nothing had been read
    ahead, which is what a checkpoint must hold.

    Attributes:
      state: of the iterator after the last batch that `next` gave.
      waited: seconds that `next` has waited in all.
    """

    def __init__(self, iterator: Any, place: Callable[[Any], Any], depth: int) -> None:
        """Start to read.

        Args:
          iterator: with `__next__` and `get_state`.
          place: what makes a batch ready, e.g. copies it to the devices.
          depth: how many batches wait at most.
        """
        self.state = iterator.get_state()
        self.waited = 0.0
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._iterator, self._place = iterator, place
        self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while not self._stop.is_set():
                item = (self._place(next(self._iterator)), self._iterator.get_state(), None)
                self._put(item)
        except BaseException as error:  # raised again where the batch is asked for
            self._put((None, None, error))

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch, state, error = self._queue.get()
        self.waited += time.perf_counter() - start
        if error is not None:
            raise error
        self.state = state
        return batch

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join(timeout=5)
