"""What long work prints, and what it keeps libraries from printing."""

from __future__ import annotations

import contextlib
import logging
import time

from lib.evaluation.process import resident_memory


@contextlib.contextmanager
def quiet(*names: str):
    """lm-eval reports its plan and draws bars for every call; a notebook with forty calls has better uses for the space."""
    import tqdm

    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    original = tqdm.tqdm.__init__

    def without_a_bar(self, *args, **kwargs):
        original(self, *args, **kwargs | {"disable": True})

    tqdm.tqdm.__init__ = without_a_bar
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        tqdm.tqdm.__init__ = original
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
