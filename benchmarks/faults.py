"""Kill commands, fill their disks and change the files that they read, at random, and count what is left and what is wrong.

    python -m benchmarks.faults [--seed 0] [--kills 30] [--real 3] [--disks 16] [--cases 2000] [--damages 400]

What must hold: an output is absent or complete and, byte for byte, that of an undisturbed run; the same command, started again,
finishes, from disk behind the last finished block; nothing else is left beside the output; and whatever cannot work ends with one
sentence. Commands run in forks of one process that has imported everything, `--real` ones as processes of their own. Disks are
small tmpfs mounts, which need root. Changed files are the part `benchmarks.mutations`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from invoke import Exit

import tasks
from benchmarks import mutations
from lib.models.checkpoint import save
from lib.models.disk import STATE
from lib.models.load import load, locate
from lib.models.output import partial_of
from lib.primitives.finetune import LoRA, recover

ROOT = Path(__file__).resolve().parent.parent
MODEL = locate("wiki-a-llama")
STREAMED = {"wanda": 0.5, "sparsegpt": 0.5, "svd-llm": 0.3, "comp": 0.3}
IN_MEMORY = {"wanda": 0.5, "slicegpt": 0.25, "svd-llm": 0.3}
RUNS_OUT = 60.0  # seconds after which a command hangs


# --- the commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command that makes the output it is given. in_order: each block is written once, from disk, behind the one before."""

    name: str
    work: Callable[[Path], None]
    in_order: bool = False


def compress(out: Path, method: str, ratio: float, streamed: bool) -> None:
    tasks.compress.body(None, MODEL, str(out), method=method, ratio=ratio, samples=8, length=64, streamed=streamed)


def export(out: Path) -> None:
    tasks.export_gguf.body(None, MODEL, str(out))


def finetune(out: Path, folder: Path) -> None:
    """Fine-tuning has no command of its own and no state on disk; this is how a script would use it."""
    model, tokenizer = load(str(folder))
    ids = torch.randint(2000, (6, 32), generator=torch.Generator().manual_seed(0))
    recovered = recover(model, ids, LoRA(rank=4, steps=6, warmup=1, batch=2))
    tasks.checked(lambda: save(recovered.model, tokenizer, out))


def real(out: Path, streamed: bool) -> None:
    """The command as a user types it, in place of this process."""
    words = f"compress --model {MODEL} --method svd-llm --ratio 0.3 --samples 8 --length 64{' --streamed' * streamed} --out {out}"
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "invoke", *words.split()])


def commands(place: Path) -> list[Command]:
    compress(place / "small", "svd-llm", 0.3, False)
    return [
        *(Command(f"{name} in memory", partial(compress, method=name, ratio=r, streamed=False)) for name, r in IN_MEMORY.items()),
        *(
            Command(f"{name} from disk", partial(compress, method=name, ratio=r, streamed=True), name != "comp")
            for name, r in STREAMED.items()
        ),
        Command("export-gguf", export),
        Command("fine-tuning", partial(finetune, folder=place / "small")),
    ]


# --- processes ----------------------------------------------------------------------------------------------------------


def start(work: Callable[[], None], log: Path) -> int:
    """Fork a process group that does the work and ends with the status of its command; 99 for a traceback."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 0
    try:
        work()
    except Exit as error:
        print(f"\nsaid: {error.message}", file=sys.stderr)
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, seconds: float = RUNS_OUT) -> int | None:
    """The exit status of a child, or None after some seconds, when its whole group has been killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):  # in the first moment it has no group of its own
        os.killpg(child, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def contents(out: Path) -> dict[str, str]:
    """The digest of every file of an output."""
    files = [out] if out.is_file() else sorted(out.rglob("*"))
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def beside(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()} - {out.name}


def undisturbed(command: Command, place: Path) -> tuple[dict, float]:
    """The contents of the output of a run that nothing disturbs, and its seconds."""
    for _ in range(2):  # the first fills caches
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        begun = time.monotonic()
        if status := ended(start(partial(command.work, place / "out"), place / "log")):
            sys.exit(f"{command.name} fails undisturbed with {status}:\n{(place / 'log').read_text()[-1500:]}")
        seconds = time.monotonic() - begun
    return contents(place / "out"), seconds


# --- kills --------------------------------------------------------------------------------------------------------------


def kills(command: Command, count: int, seed: str) -> tuple[str, Counter, list[str]]:
    """Kill a command at random moments, sometimes again when it has been restarted, and let it finish."""
    chance, found, wrong = random.Random(seed), Counter(), []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "killed"
        wanted, seconds = undisturbed(command, Path(place) / "calm")
        for i in range(count):
            folder.mkdir(exist_ok=True)
            moment = chance.uniform(0, 1.1 * seconds)
            out, log = folder / "out", Path(place) / "log"
            status = ended(start(partial(command.work, out), log), moment)
            found["killed" if status is None else "ended before its kill"] += 1
            said = f"{command.name}, kill {i} after {moment:.3f} of {seconds:.3f} s: "
            if status:
                wrong.append(f"{said}the run had failed by itself with {status}: {log.read_text()[-300:]}")
            if out.exists():
                found["output complete"] += 1
                wrong += [f"{said}the output is there and not complete"] if contents(out) != wanted else []
            else:
                found["output absent"] += 1
                if chance.random() < 0.3 and i < count - 1:  # the next kill meets what this one left
                    continue
                wrong += [said + reason for reason in finish(command, out, log, wanted, found)]
            shutil.rmtree(folder)
    return command.name, found, wrong


def finish(command: Command, out: Path, log: Path, wanted: dict, found: Counter) -> list[str]:
    """Start a command again, undisturbed; returns what is wrong with its result and with what is left."""
    partial_out = partial_of(out)
    state = partial_out / STATE
    done = json.loads(state.read_text())["done"] if state.is_file() else 0
    before = {path.name: path.stat().st_mtime_ns for path in sorted(partial_out.glob("model-*.safetensors"))[:done]}
    status = ended(start(partial(command.work, out), log))
    found["started again"] += 1
    found["went on behind finished blocks"] += bool(done)
    if status != 0:
        return [f"started again, it ends with {status}: {log.read_text()[-300:]}"]
    wrong = [] if contents(out) == wanted else ["started again, it makes another output"]
    wrong += [f"left beside the output: {left}"] if (left := beside(out)) else []
    if command.in_order and any((out / name).stat().st_mtime_ns != written for name, written in before.items()):
        wrong.append("a finished block was written again")
    return wrong


# --- disks --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def change_disk(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as place:
        try:
            with disk(Path(place) / "disk", "size=64k"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def unchecked(work: Callable[[Path], None], out: Path) -> None:
    """Work as if there were room enough: the disk fills later, as when others fill it."""
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=2**40)
    work(out)


def disks(command: Command, count: int, seed: str) -> tuple[str, Counter, list[str]]:
    """Run a command on disks that are too small, fill up, hold few files, or are read-only; then make room and run it again."""
    chance, found, wrong = random.Random(seed), Counter(), []
    with tempfile.TemporaryDirectory() as place:
        wanted, _ = undisturbed(command, Path(place) / "calm")
        size = sum(path.stat().st_size for path in (Path(place) / "calm" / "out").rglob("*")) or 2 * 10**6
        for i in range(count):
            kind = ["too small", "fills up", "fills up", "too few files", "read-only"][i % 5]
            room, files = int(chance.uniform(0.005, 1.3) * size), chance.randint(2, 12)
            options = f"size={room},nr_inodes=0" if kind != "too few files" else f"size=200m,nr_inodes={files}"
            folder = Path(place) / "disk"
            with disk(folder, options):
                if kind == "read-only":
                    change_disk(folder, "ro")
                said = f"{command.name}, disk {i} ({kind}, {options}): "
                wrong += [
                    said + reason for reason in on_a_disk(command, kind, folder / "out", Path(place) / "log", wanted, found)
                ]
    return command.name, found, wrong


def on_a_disk(command: Command, kind: str, out: Path, log: Path, wanted: dict, found: Counter) -> list[str]:
    """One run on a bad disk and one with room; returns what is wrong."""
    work = partial(unchecked, command.work) if kind == "fills up" else command.work
    status = ended(start(partial(work, out), log))
    found[kind] += 1
    if status == 0:
        found["had room"] += 1
        return [] if contents(out) == wanted and not beside(out) else ["a run with room makes another output"]
    text = log.read_text()
    sentence = text.rpartition("\nsaid: ")[2].strip()
    if status not in (1, 2) or "Traceback" in text or "\n" in sentence or not sentence:
        return [f"ends with {status}: {text[-600:]}"]
    wrong, left = [], {path.name for path in out.parent.iterdir()}
    if left - {partial_of(out).name} or (left and not (partial_of(out) / STATE).is_file()):
        wrong.append(f"left {left}, saying {sentence}")
    found["refused or stopped with one sentence"] += 1
    found["finished blocks stayed"] += bool(left)
    change_disk(out.parent, "rw,size=200m,nr_inodes=0")
    return wrong + finish(command, out, log, wanted, found)


# --- the campaign -------------------------------------------------------------------------------------------------------


def run_all(title: str, work: Callable, chosen: list[Command], count: int, seed: int) -> list[str]:
    """Run a part for all commands, two at a time; prints the counts and returns what is wrong."""
    begun, total, wrong = time.time(), Counter(), []
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        jobs = [pool.submit(work, command, count, f"{seed} {title} {command.name}") for command in chosen]
        for name, found, reasons in (job.result() for job in jobs):
            print("\n".join([f"{title}, {name}: " + ", ".join(f"{n} {what}" for what, n in found.items()), *reasons]), flush=True)
            total += found
            wrong += reasons
    print(
        f"{title}, all: " + ", ".join(f"{n} {what}" for what, n in total.items()) + f"; {time.time() - begun:.0f} s", flush=True
    )
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=30, help="of each command")
    parser.add_argument("--real", type=int, default=3, help="kills of each command as a process of its own")
    parser.add_argument("--disks", type=int, default=16, help="of each command")
    parser.add_argument("--cases", type=int, default=2000, help="mutated folders")
    parser.add_argument("--damages", type=int, default=400, help="folders and GGUF files with cut or changed bytes")
    given, begun = parser.parse_args(), time.time()
    with tempfile.TemporaryDirectory() as place:
        known = commands(Path(place))
        typed = [Command(f"svd-llm {'from disk' if s else 'in memory'}", partial(real, streamed=s), s) for s in (False, True)]
        wrong = run_all("kills", kills, known, given.kills, given.seed)
        wrong += run_all("kills of the real command", kills, typed, given.real, given.seed)
        if may_mount():
            wrong += run_all("disks", disks, known, given.disks, given.seed)
        else:
            print("disks: left out, because mounting them needs root")
    wrong += mutations.campaign(given.cases, given.damages, given.seed, 2)
    print(f"{len(wrong)} wrong; {time.time() - begun:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
