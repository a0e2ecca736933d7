"""Lines of progress for long work, and silence for the libraries that it calls."""

from __future__ import annotations

import contextlib
import logging
import time

from lib.evaluation.process import resident_memory


@contextlib.contextmanager
def quiet(*names: str):
    """Only errors from the loggers `names`: lm-eval reports its plan in every call, which would fill a notebook with forty."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def no_progress_bars():
    """No bars from transformers, which draws one for every file it reads and would fill a notebook with ten models."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Progress:
    """Prints the progress of long work, with time and memory, at most once every `interval` seconds."""

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
