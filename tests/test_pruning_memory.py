"""Pruning in a process of its own: sizes counted by hand, gradients that are really there, errors that say what went wrong."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.suite.pruning_memory import ALL_GRADIENTS, measure

SHAPE = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip


def weights_by_hand() -> int:
    d, n, v, blocks = 256, 1024, 64, 4
    block = 4 * d * d + 3 * d * n + 2 * d
    return 4 * (blocks * block + 2 * v * d + d)


def test_all_gradients_need_at_least_as_much_as_the_weights():
    found = measure(ALL_GRADIENTS, 0.2, SHAPE, 2, 16)
    assert found["weights"] == weights_by_hand()
    if found["peak"] is None:
        pytest.skip("this system has no counter of peak memory")
    assert weights_by_hand() < found["peak"] < 4 * weights_by_hand()


def test_whole_blocks_need_less_than_gradients():
    found = [measure(method, 0.25, SHAPE, 2, 16)["peak"] for method in ("shortgpt", ALL_GRADIENTS)]
    if None in found:
        pytest.skip("this system has no counter of peak memory")
    assert found[0] < found[1] / 2


def test_a_second_measurement_finds_the_same_peak():
    """A fresh process and warm kernels: what is left is the method's own, and not noise as large as itself."""
    peaks = [measure("wanda-sp", 0.25, SHAPE, 8, 64)["peak"] for _ in range(2)]
    if None in peaks:
        pytest.skip("this system has no counter of peak memory")
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_the_process_ends_with_the_one_that_asked():
    """Killed in mid-measurement, it must leave nothing behind that waits for ever."""
    code = f"from lib.suite.pruning_memory import measure\nif __name__ == '__main__':\n    measure('afr', 0.2, {SHAPE}, 32, 64)"
    asking = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.time() + 300  # seconds: on a busy machine the imports alone take one minute
    while len(in_session(asking.pid)) < 4 and time.time() < deadline:  # itself, resource tracker, server, worker
        time.sleep(0.1)
    assert len(in_session(asking.pid)) >= 4
    asking.kill()
    asking.wait()
    while in_session(asking.pid) and time.time() < deadline:
        time.sleep(0.1)
    assert not in_session(asking.pid)


def in_session(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # gone in the meantime
            continue
        if int(number) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_an_unknown_method_fails_before_a_process_starts():
    with pytest.raises(ValueError, match="shortgpt"):
        measure("short-gpt", 0.2, SHAPE, 2, 16)
    with pytest.raises(ValueError, match="unknown setting of llm-pruner 'sample'"):
        measure("llm-pruner", 0.2, SHAPE, 2, 16, {"sample": None})
    with pytest.raises(ValueError, match="takes no settings, such as samples"):
        measure(ALL_GRADIENTS, 0.2, SHAPE, 2, 16, {"samples": None})


def test_settings_reach_the_method():
    """LLM-Pruner holds the activations of one sequence: 512 tokens need more than the 64 of its default."""
    shape = SHAPE | {"max_position_embeddings": 512}
    short = measure("llm-pruner", 0.2, shape, 2, 512)["peak"]
    if short is None:
        pytest.skip("this system has no counter of peak memory")
    assert measure("llm-pruner", 0.2, shape, 2, 512, {"length": None})["peak"] > 1.5 * short


def test_llm_pruner_reads_more_sequences_in_the_memory_of_one():
    few, many = (measure("llm-pruner", 0.2, SHAPE, samples, 64, {"samples": None})["peak"] for samples in (2, 160))
    if few is None:
        pytest.skip("this system has no counter of peak memory")
    assert many < 2 * few  # 80 times the text; an allocator wastes more or less


def test_an_error_of_the_process_is_passed_on():
    with pytest.raises(RuntimeError, match="comp failed in its own process: ValueError"):
        measure("comp", 0.99, SHAPE, 2, 16)
