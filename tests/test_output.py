"""An output is checked before the work, belongs to one process while it is written, and is whole or absent."""

import multiprocessing
import os
import stat

import pytest
import torch
from invoke import Exit

import tasks
from lib.compress import compress
from lib.evaluation.text import Calibration
from lib.models import disk
from lib.models.checkpoint import save
from lib.models.load import load, locate
from lib.models.output import check_output, partial_of, reserved, written_whole
from lib.papers.svd_llm import compress_model
from tests.conftest import tiny, token_ids

FEW = Calibration("wiki-a", 4, 32)


def test_paths_that_cannot_be_made(tmp_path, small_disk):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="file exists: choose another"):
        check_output(tmp_path / "file")
    with pytest.raises(FileExistsError, match="link exists"):
        check_output(tmp_path / "link")
    with pytest.raises(ValueError, match="file is a file and not a folder"):
        check_output(tmp_path / "file" / "a" / "b")
    with pytest.raises(PermissionError, match="nothing can be written in /proc"):
        check_output("/proc/self/out")
    with pytest.raises(OSError, match=r"needs 1\.0 MB, but 0\.1 MB are free in .*disk"):
        check_output(small_disk / "a" / "b", 10**6)
    assert check_output(small_disk / "a" / "b", 1000) == small_disk / "a" / "b"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "file", "link"]


@pytest.mark.parametrize("streamed", [False, True])
def test_impossible_outputs_end_the_command_before_the_model_is_read(tmp_path, monkeypatch, streamed):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("lib.compress._open", lambda *_: pytest.fail("the model was read"))
    for out in (tmp_path / "file" / "out", "/proc/self/out"):
        with pytest.raises(Exit, match="cannot be made"):
            tasks.compress.body(None, "wiki-a-llama", str(out), method="wanda", streamed=streamed)


def test_too_little_space_for_the_counted_bytes(small_disk, monkeypatch):
    monkeypatch.setattr("lib.compress.sample_blocks", lambda *_: pytest.fail("the work had begun"))
    for streamed, model in ((False, "wiki-a-llama"), (True, locate("wiki-a-llama"))):
        with pytest.raises(OSError, match=r"needs 4\.0 MB, but 0\.1 MB are free"):
            compress(model, small_disk / "out", "wanda", 0.5, FEW, streamed=streamed)
    assert list(small_disk.iterdir()) == []


def hold(path, ready, go):
    with reserved(path):
        ready.set()
        go.wait()


def test_one_process_writes_an_output(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "out", ready, go))
    other.start()
    ready.wait()
    try:
        with pytest.raises(FileExistsError, match="another run is writing .*out: wait for it"), reserved(tmp_path / "out"):
            pytest.fail("two at once")
        with pytest.raises(FileExistsError, match="another run"):
            compress("wiki-a-llama", tmp_path / "out", "wanda", 0.5, FEW)
        with reserved(tmp_path / "elsewhere"):  # others are not in the way
            pass
    finally:
        go.set()
        other.join()
    with reserved(tmp_path / "out"), reserved(tmp_path / "out"):  # the same process may enter again
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_leaves_nothing_in_the_way(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "out", ready, go))
    other.start()
    ready.wait()
    other.kill()
    other.join()
    partial_of(tmp_path / "out").mkdir()
    (partial_of(tmp_path / "out") / "half").write_text("half")
    with written_whole(tmp_path / "out") as partial:
        assert not partial.exists()
        partial.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_outputs_are_readable_as_the_umask_says(tmp_path, mask):
    """safetensors makes files that only their owner can read, whatever the umask."""
    before = os.umask(mask)
    try:
        save(compress_model(tiny("llama"), token_ids(), 0.3), None, tmp_path / "memory")
        compress(locate("wiki-a-llama"), tmp_path / "disk", "svd-llm", 0.3, FEW, streamed=True)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for folder in ("memory", "disk") for path in (tmp_path / folder).iterdir()}
    assert modes == {0o666 & ~mask}


def full(monkeypatch, at):
    """Let the disk be full at the `at`-th block of a streamed run, once the finished ones are saved."""
    write, calls = disk.write_tensors, []

    def writes(file, *arguments):
        if file.name == "block.tmp":
            calls.append(file)
            if len(calls) == at:
                file.write_bytes(b"half")
                raise OSError(28, "No space left on device")
        write(file, *arguments)

    monkeypatch.setattr(disk, "write_tensors", writes)


def test_a_full_disk_while_streaming_says_what_stays(tmp_path, monkeypatch):
    """At the first block nothing is left; later the same command goes on, and its result is that of an undisturbed run."""
    arguments = (locate("wiki-a-llama"), tmp_path / "out", "wanda", 0.5, FEW)
    with monkeypatch.context() as patch:
        full(patch, 1)
        with pytest.raises(OSError, match="No space is left for .*out, and nothing is left of it"):
            compress(*arguments, streamed=True)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        full(patch, 3)
        with pytest.raises(OSError, match=r"finished blocks stay in .*\.out\.partial, from where the same command goes on"):
            compress(*arguments, streamed=True)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    compress(*arguments, streamed=True)
    compress(arguments[0], tmp_path / "calm", *arguments[2:], streamed=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm", "out"]
    found, wanted = (load(str(tmp_path / name))[0].state_dict() for name in ("out", "calm"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_job_that_was_cut_short_is_in_nobodys_way(tmp_path):
    """A kill or a full disk before the first block is finished: there is nothing to go on from."""
    partial_of(tmp_path / "out").mkdir()
    (partial_of(tmp_path / "out") / "job.json").write_text('{"model": "/')
    compress(locate("wiki-a-llama"), tmp_path / "out", "wanda", 0.5, FEW, streamed=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_full_from_the_beginning(tmp_path, monkeypatch):
    def write(file, text, **_):
        file.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", write)
    with pytest.raises(OSError, match="No space is left for .*out, and nothing is left of it"):
        compress(locate("wiki-a-llama"), tmp_path / "out", "wanda", 0.5, FEW, streamed=True)
    assert list(tmp_path.iterdir()) == []


def test_a_really_full_disk_is_named(small_disk):
    """The writer's own error has the number by which it is recognised (numpy's had not)."""
    shapes = {"a": torch.ones(10**5)}
    with pytest.raises(OSError, match="No space is left for"), written_whole(small_disk / "t") as partial:
        disk.write_tensors(partial, shapes, shapes.values())
    assert list(small_disk.iterdir()) == []
