"""What Orbax and tensorstore say when they fail, made short and said once."""

import contextlib
import errno
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any


def cause(error: BaseException) -> str:
    """The reason inside an error of a storage library, in a few words."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno:
            return os.strerror(seen.errno).lower()
        seen = seen.__cause__ or seen.__context__
    text = " ".join(str(error).split())
    if found := re.search(r"OS error (\d+)|\berrno (\d+)", text, re.IGNORECASE):
        return os.strerror(int(found[1] or found[2])).lower()
    for number in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EIO):
        if os.strerror(number) in text:
            return os.strerror(number).lower()
    return text[:200] or type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what Orbax and tensorstore print besides raising.

    After an error it stays quiet: callbacks of writes that were still under way go on failing.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def unraisable(what: Any) -> None:
        if "Event loop is closed" not in str(what.exc_value):
            hook(what)

    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = unraisable
    yield
    logger.setLevel(level)
    sys.unraisablehook = hook
