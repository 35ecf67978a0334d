"""What can happen to a run, injected: `make faults` prints one table. Pytest's part is test_resume.py.

Every run is train/pretrain.py in a process of its own, forked from one that has imported it, so that hundreds fit into
minutes. "Bit-exact": weights of the encoders, model, target and optimizer, and metrics.jsonl but for its times, equal
those of a run that nothing happened to. "Lost": steps of metrics.jsonl that are missing or twice in the end.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(ROOT / "train"), str(ROOT / "tests")]

import pretrain  # noqa: E402 - a neighbour of the scripts in train/
import psutil  # noqa: E402
import torch  # noqa: E402
from conftest import TINY_RUN, write_photo  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from scott_sparse.training import checkpoint, saver  # noqa: E402
from scott_sparse.training.saver import EXIT_RESUME  # noqa: E402

FLAGS = [*map(str, TINY_RUN), "--epochs", "12", "--report-every", "3", "--save-every", "4", "--dropout", "0.1"]
FLAGS += ["--log-every", "3"]
STEPS = 48
fork = multiprocessing.get_context("fork")


@dataclasses.dataclass
class Row:
    fault: str
    injected: int = 0
    exact: int = 0
    lost: int = 0
    seconds: int = 0
    note: str = ""
    wrong: int = 0  # ends that are not as they should be


class Scene:
    """A folder with images, the run that nothing happens to, and ways to start others."""

    def __init__(self, folder: Path):
        self.folder, self.photos = folder, folder / "photos"
        for split, count in (("train", 16), ("test", 4)):
            for channel, name in enumerate("ab"):
                for i in range(count):
                    write_photo(
                        self.photos / split / name / f"{i}.png", 50, 60, seed=1000 * channel + i, channel=channel
                    )
        assert self.end(self.start("whole")) == 0
        self.whole = results(folder / "whole")

    def start(self, name: str, *more: str, say: str | None = None, before=None) -> fork.Process:
        """A run in a process of its own; `before` is called in it first; what it prints goes to NAME.txt."""
        arguments = [*FLAGS, "--data", self.photos, "--cache-dir", self.folder / "cache", "--out", self.folder / name]

        def main():
            os.setpgid(0, 0)
            with (self.folder / f"{say or name}.txt").open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.argv = ["pretrain.py", *map(str, arguments), *more]
            if before:
                before()
            pretrain.main()

        process = fork.Process(target=main)
        process.start()
        return process

    def end(self, process: fork.Process, within: float = 60) -> int | None:
        """Its exit code; None where it hangs, and is killed."""
        process.join(within)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return None
        return process.exitcode

    def output(self, name: str) -> str:
        return " ".join((self.folder / f"{name}.txt").read_text().split())

    def compare(self, name: str, row: Row) -> None:
        """Let a run go on to its end, and count what became of it."""
        ended = self.end(self.start(name)) == 0
        learned = results(self.folder / name) if ended else ([], {})
        row.injected += 1
        row.exact += ended and same(learned, self.whole)
        row.lost += abs(len(learned[0]) - STEPS)
        shutil.rmtree(self.folder / name)


def results(out: Path) -> tuple[list, dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["images_per_second"]
    newest = checkpoint.checkpoints(out / "checkpoints")[0]
    files = [out / "encoder.safetensors", out / "context.safetensors", *newest.glob("*.safetensors")]
    return lines, {path.name: path.read_bytes() for path in files}


def same(a: tuple[list, dict], b: tuple[list, dict]) -> bool:
    return a == b and len(a[1]) == 5


def kill_at_random_moments(scene: Scene, row: Row, number: int = signal.SIGKILL, times: int = 30) -> None:
    """From the first step on, saves included: with a save every fourth step of some milliseconds many fall into one."""
    random.seed(0)
    codes = collections.Counter()
    for i in range(times):
        process = scene.start(f"run{i}", say="cut")
        metrics = scene.folder / f"run{i}" / "metrics.jsonl"
        while not metrics.exists() and process.is_alive():
            time.sleep(0.005)
        time.sleep(random.uniform(0, 3.0))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        process.join()
        codes[process.exitcode] += 1
        # A run that came to its end before the signal, or between its last file and its exit, is asked to end again.
        (scene.folder / f"run{i}" / "summary.json").unlink(missing_ok=True)
        scene.compare(f"run{i}", row)
    # Before and after the loop a signal ends a run at once, as -15; in it the run saves, 75.
    row.note = "exit codes " + ", ".join(f"{code} {count}x" for code, count in codes.most_common())


def kill_in_every_part_of_a_save(scene: Scene, row: Row) -> None:
    """Right before each write, flush, rename and removal of the second save."""
    names = ("write_synced", "write_synced", "write_synced", "write_synced", "sync_folder", "sync_folder", "prune")
    for i, name in enumerate(names):
        nth = names[:i].count(name)

        def before(name=name, nth=nth):
            module = vars(saver if name == "prune" else checkpoint)
            real, calls = module[name], []

            def deadly(*arguments, **options):
                calls.append(1)
                per_save = names.count(name)
                if len(calls) == per_save + nth + 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            module[name] = deadly

        scene.end(scene.start(f"part{i}", before=before))
        scene.compare(f"part{i}", row)


def damage(scene: Scene, row: Row) -> None:
    """The newest checkpoint of a run that was told to stop: each file truncated, flipped, missing, or joined."""
    random.seed(1)
    for i, (file, kind) in enumerate(
        (file, kind)
        for file in ("model.safetensors", "target.safetensors", "optimizer.safetensors", "state.json")
        for kind in ("truncated", "flipped", "missing", "extra")
    ):
        name = f"damaged{i}"
        stop_at(scene, name, 10)
        path = checkpoint.checkpoints(scene.folder / name / "checkpoints")[0] / file
        data = bytearray(path.read_bytes())
        if kind == "truncated":
            path.write_bytes(data[: random.randrange(len(data))])
        elif kind == "flipped":
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            path.write_bytes(data)
        elif kind == "missing":
            path.unlink()
        else:
            path.with_suffix(".old").write_bytes(data)
        scene.compare(name, row)


def stop_at(scene: Scene, name: str, step: int) -> None:
    def before():
        real, calls = pretrain.update_target, []

        def update(*arguments, **options):
            real(*arguments, **options)
            calls.append(1)
            if len(calls) == step:
                signal.raise_signal(signal.SIGTERM)

        pretrain.update_target = update

    assert scene.end(scene.start(name, before=before)) == EXIT_RESUME, scene.output(name)


def signal_the_group(scene: Scene, row: Row) -> None:
    """As schedulers do: the run and its workers get SIGTERM or SIGUSR1 together. Each of them must end with code 75."""
    random.seed(2)
    codes = collections.Counter()
    flags = (("--workers", "2"), ("--cache", "none"), ("--cache", "none", "--workers", "2"))
    for i, (number, more) in enumerate(itertools.product((signal.SIGTERM, signal.SIGUSR1), flags)):
        process = scene.start(f"group{i}", *more)
        metrics = scene.folder / f"group{i}" / "metrics.jsonl"
        while (not metrics.exists() or not metrics.stat().st_size) and process.is_alive():
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.2))
        os.killpg(process.pid, number)
        code = scene.end(process)
        codes[code] += 1
        if code != EXIT_RESUME or "Traceback" in scene.output(f"group{i}"):
            row.wrong += 1
        scene.compare(f"group{i}", row)
    row.note = "exit codes " + ", ".join(f"{code} {count}x" for code, count in codes.most_common())


def full_disk(scene: Scene, row: Row) -> None:
    """A small disk of its own, filled to the last byte after the first save and emptied again later."""
    disk = scene.folder / "disk"
    disk.mkdir()
    size = 40 * 2**20
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        row.note = "no tmpfs may be mounted here: not tested"
        return
    try:
        for i, until in enumerate((20, 30, STEPS + 1)):
            name = f"disk/full{i}"
            filler = disk / "filler"

            def before(until=until, filler=filler):
                real, calls = pretrain.update_target, []

                def update(*arguments, **options):
                    real(*arguments, **options)
                    calls.append(1)
                    if len(calls) == 9:
                        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                            while True:
                                file.write(b"\0" * 4096)
                    if len(calls) == until:
                        filler.unlink()

                pretrain.update_target = update

            code = scene.end(scene.start(name, say=f"full{i}", before=before))
            filler.unlink(missing_ok=True)
            words = scene.output(f"full{i}")
            warned = "no checkpoint could be written" in words and "trying again later" in words
            ended = code == 0 if until < STEPS else code not in (0, None) and "make room" in words
            if not (warned and ended):
                row.note = f"exit code {code}: {words[-200:]}"
            if code == 0:
                (scene.folder / name / "summary.json").unlink()
            scene.compare(name, row)
    finally:
        subprocess.run(["umount", disk], check=True)


def killed_worker(scene: Scene, row: Row) -> None:
    for i in range(3):
        process = scene.start(f"worker{i}", "--workers", "2")
        metrics = scene.folder / f"worker{i}" / "metrics.jsonl"
        while not metrics.exists() or metrics.stat().st_size == 0:
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children()
        workers[0].kill()
        started = time.monotonic()
        code = scene.end(process)
        words = scene.output(f"worker{i}")
        if code in (0, None) or "killed" not in words:
            row.note = f"exit code {code}: {words[-200:]}"
        row.note = row.note or f"the run ended {time.monotonic() - started:.0f} s later, and said so"
        scene.compare(f"worker{i}", row)


def killed_process(scene: Scene, row: Row) -> None:
    """One of two processes is killed; the other must end by itself, without a launcher that ends it."""

    def join(rank: int, port: int):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    for victim in (0, 1):
        name, port = f"pair{victim}", 29600 + victim + os.getpid() % 300
        pair = [scene.start(name, say=f"{name}-{r}", before=functools.partial(join, r, port)) for r in (0, 1)]
        metrics = scene.folder / name / "metrics.jsonl"
        while (not metrics.exists() or metrics.stat().st_size == 0) and all(p.is_alive() for p in pair):
            time.sleep(0.01)
        os.kill(pair[victim].pid, signal.SIGKILL)
        started = time.monotonic()
        code = scene.end(pair[1 - victim], within=60)
        seconds, words = time.monotonic() - started, scene.output(f"{name}-{1 - victim}")
        pair[victim].join()
        if code in (0, None) or "onnection" not in words:
            row.note = f"exit code {code}: {words[-300:]}"
        row.note = row.note or f"the other ended within {seconds:.0f} s, and said why"
        # What two processes began one goes on with: to rounding, so that only its steps are counted here.
        ended = scene.end(scene.start(name)) == 0
        row.injected, row.lost = row.injected + 1, row.lost + abs(len(results(scene.folder / name)[0]) - STEPS)
        row.note += "" if ended else "; one alone did not go on"


def files_that_change(scene: Scene, row: Row) -> None:
    """Decoded in advance, a run does not see that a file is deleted or replaced; the next one does, and says so."""
    name, photo = "changed", scene.photos / "train" / "a" / "3.png"
    data = photo.read_bytes()
    process = scene.start(name)
    metrics = scene.folder / name / "metrics.jsonl"
    while not metrics.exists():
        time.sleep(0.01)
    photo.unlink()
    if scene.end(process) != 0:
        row.note = scene.output(name)[-200:]
    learned = results(scene.folder / name)
    row.injected, row.exact = 1, int(same(learned, scene.whole))
    photo.write_bytes(data)
    streamed = scene.start("streamed", "--cache", "none")
    metrics = scene.folder / "streamed" / "metrics.jsonl"
    while not metrics.exists():
        time.sleep(0.01)
    photo.write_bytes(b"no picture")
    code, words = scene.end(streamed), scene.output("streamed")
    photo.write_bytes(data)
    row.injected += 1
    if code in (0, None) or "train/a/3.png could be read when the run began" not in words:
        row.note = f"exit code {code}: {words[-200:]}"
    scene.end(scene.start("streamed", "--cache", "none"))
    learned = results(scene.folder / "streamed")
    row.exact += same(learned, scene.whole)
    row.lost += abs(len(learned[0]) - STEPS)


def two_runs_in_one_folder(scene: Scene, row: Row) -> None:
    first = scene.start("both")
    while not (scene.folder / "both" / "metrics.jsonl").exists():
        time.sleep(0.01)
    row.injected = 1
    os.kill(first.pid, signal.SIGSTOP)
    second = scene.start("both", say="second")
    code = scene.end(second)
    os.kill(first.pid, signal.SIGCONT)
    if code in (0, None) or "another run is writing to" not in scene.output("second"):
        row.note = f"exit code {code}: {scene.output('second')[-200:]}"
    row.note = row.note or "the second was refused"
    scene.end(first)
    learned = results(scene.folder / "both")
    row.exact, row.lost = int(same(learned, scene.whole)), len(learned[0]) - STEPS


def soak(scene: Scene, row: Row, steps: int = 2000) -> None:
    """A long run that is cut twice: memory, files and threads stay flat, and every step has one line."""
    epochs = str(steps // 4)
    more = ("--epochs", epochs, "--report-every", "50", "--save-every", "100")
    readings = []
    for cut in (200, 400, None):
        process = scene.start("soak", *more)
        about = psutil.Process(process.pid)
        metrics = scene.folder / "soak" / "metrics.jsonl"
        while process.is_alive():
            time.sleep(0.5)
            with contextlib.suppress(psutil.Error, FileNotFoundError):
                # Resident, shared or not: how much it shares with its parent is the parent's doing.
                used = (about.memory_info().rss >> 20, about.num_fds(), about.num_threads())
                step = metrics.read_bytes().count(b"\n")  # after the rest: else that may be of what follows training
                readings.append((step, *used))
                if cut and step > cut:
                    os.kill(process.pid, signal.SIGKILL)
                    break
        process.join()
        row.injected += cut is not None
    lines = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    row.lost = abs(len(lines) - steps) + (lines != list(range(steps)))
    training = [reading for reading in readings if 600 < reading[0] < steps - 10]  # not what follows it
    (_, memory, files, threads), end = training[0], training[-1]
    row.note = f"memory {memory} to {end[1]} MiB, files {files} to {end[2]}, threads {threads} to {end[3]}"
    if end[1] > memory + 16 or end[2] > files + 2 or end[3] > threads:
        row.note += ": NOT FLAT"


FAULTS = {
    "kill -9 at random moments": kill_at_random_moments,
    "kill -9 in each part of a save": kill_in_every_part_of_a_save,
    "SIGTERM at random moments": lambda scene, row: kill_at_random_moments(scene, row, signal.SIGTERM, 10),
    "SIGTERM, SIGUSR1 to the process group": signal_the_group,
    "damaged checkpoint files": damage,
    "disk full": full_disk,
    "a worker killed": killed_worker,
    "one of two processes killed": killed_process,
    "image files deleted, replaced": files_that_change,
    "two runs in one folder": two_runs_in_one_folder,
    "2,000 steps, killed twice": soak,
}


TOGETHER = (  # two processes at a time, of about the same length
    ("kill -9 at random moments", "kill -9 in each part of a save", "two runs in one folder"),
    tuple(name for name in FAULTS if not name.startswith("kill -9") and name != "two runs in one folder"),
)


def run(names: Sequence[str]) -> None:
    """Inject some faults, and print a JSON line for each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder))
        for name in names:
            row, began = Row(name), time.monotonic()
            FAULTS[name](scene, row)
            row.seconds = round(time.monotonic() - began)
            print(json.dumps(dataclasses.asdict(row)), flush=True)


def main() -> None:
    started = time.monotonic()
    table = Table(title="faults")
    for column in ("fault", "injected", "bit-exact", "steps lost", "seconds", ""):
        table.add_column(column, justify="left" if column in ("", "fault") else "right")
    running = [
        subprocess.Popen([sys.executable, __file__, *names], stdout=subprocess.PIPE, text=True) for names in TOGETHER
    ]
    rows = {}
    for process in running:
        for line in process.communicate()[0].splitlines():
            row = Row(**json.loads(line))
            rows[row.fault] = row
    for name in FAULTS:
        row = rows.get(name, Row(name, note="did not come to its end"))
        table.add_row(name, *map(str, (row.injected, row.exact, row.lost, row.seconds, row.note)))
    Console(width=140).print(table)
    print(f"{time.monotonic() - started:.0f} s")
    lost = [name for name in FAULTS if name not in rows or rows[name].lost]
    wrong = [name for name, row in rows.items() if row.wrong]
    sys.exit(f"steps were lost or ends wrong: {', '.join([*lost, *wrong])}" if lost or wrong else 0)


if __name__ == "__main__":
    run(sys.argv[1:]) if sys.argv[1:] else main()
