"""What long work prints, and what it keeps libraries from printing."""

from __future__ import annotations

import contextlib
import io
import logging
import time

from lib.evaluation.process import resident_memory


@contextlib.contextmanager
def quiet(*names: str):
    """No line below an error from the loggers `names`, and no progress bars, which go to the error stream.

    lm-eval reports its plan and draws bars for every call; a notebook with forty calls has better uses for the space.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def no_progress_bars():
    """transformers draws a bar for every file it reads; a notebook with ten models has better uses for the space."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Progress:
    """Says where long work is, with time and memory, but not more often than every `interval` seconds."""

    def __init__(self, interval: float = 10.0):
        self.interval = interval
        self.start = self.last = time.time()

    def __call__(self, text: str) -> None:
        now = time.time()
        if now - self.last < self.interval:
            return
        self.last, resident = now, resident_memory()
        memory = "" if resident is None else f", {resident / 2**30:.1f} GiB resident"
        print(f"  {text}; {now - self.start:.0f} s since the start{memory}", flush=True)
