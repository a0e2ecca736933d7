"""Parts of a work on a thread each."""

import threading

import pytest
import torch

from lib.primitives.threads import one_thread_each


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_parts_at_a_time_with_one_thread_each_in_order():
    both = threading.Barrier(2)

    def work(part):
        both.wait(timeout=30)  # passes only when two parts are at work
        return part, torch.get_num_threads()

    assert one_thread_each(work, range(6)) == [(i, 1) for i in range(6)]
    assert torch.get_num_threads() == 2


def test_an_error_comes_out_and_threads_are_as_before():
    def work(part):
        raise ValueError("no such part")

    with pytest.raises(ValueError, match="no such part"):
        one_thread_each(work, [1])
    assert torch.get_num_threads() == 2
