"""Batches made ready by a thread, and how many of them were given."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


class Prefetch:
    """Reads ahead of the training loop.

    `next()` gives a placed batch. What a checkpoint holds of it is `count`, which does not know of
    batches that were only read ahead.

    Attributes:
      count: batches that `next` gave.
      waited: seconds that `next` has waited in all.
    """

    def __init__(self, read: Callable[[], Any], place: Callable[[Any], Any], depth: int) -> None:
        """Start to read.

        Args:
          read: gives the next batch.
          place: what makes a batch ready, e.g. copies it to the devices.
          depth: how many batches wait at most.
        """
        self.count = 0
        self.waited = 0.0
        self._queue: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._read_one, self._place = read, place
        self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while not self._stop.is_set():
                self._put((self._place(self._read_one()), None))
        except BaseException as error:  # raised again where the batch is asked for
            self._put((None, error))

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
        batch, error = self._queue.get()
        self.waited += time.perf_counter() - start
        if error is not None:
            raise error
        self.count += 1
        return batch

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._thread.join(timeout=5)
