"""What a GPU decides, in a few minutes: parity, speed and learning, in order of worth, as one JSON and a table.

    bash benchmarks/gpu.sh [FILE]        # default gpu.json; or python benchmarks/gpu.py [FILE]

Every stage is a process with a time limit of its own. Its result is in FILE before the next one begins, and while it
runs; a stage that fails or is cut off is named there and stops no other. From the environment:
    PYTHON          the interpreter (gpu.sh)
    GPU_MINUTES     for all stages together, 8 by default
    PHOTOS          the folder to learn from, with train and val; default ~/grocery160, or petals where that is missing
    GPU_REHEARSAL   if set: all stages in tiny, on a CPU
The package need not be installed. spconv-triton is left out but for its own stage: it tunes its kernels for a while.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REHEARSAL = "GPU_REHEARSAL" in os.environ
EXIT_RESUME = 75  # of a run that --minutes ended
GRACE_S = 10  # between the request to end and the kill
ENDING_S = 45  # what a run needs after its --minutes
PUBLISHED_EPOCHS, PUBLISHED_WARMUP = 300, 40
MACHINE = """
import json, platform, sys, torch
cuda = torch.cuda.is_available()
machine = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
about = {"machine": machine, "python": platform.python_version(), "torch": torch.__version__}
open(sys.argv[1], "w").write(json.dumps(about))
sys.exit(0 if cuda or sys.argv[2] == "cpu" else "error: no GPU is found; GPU_REHEARSAL=1 runs all stages on a CPU.")
"""


@dataclass
class Stage:
    name: str
    seconds: float
    """At most; less where less is left."""
    command: list
    result: Path
    environment: dict[str, str] = field(default_factory=dict)
    triton: bool = False
    """Whether it may import spconv-triton."""


def main() -> int:
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu.json").resolve()
    deadline = time.monotonic() + 60 * float(os.environ.get("GPU_MINUTES", 8))
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "without" / "spconv_triton").mkdir(parents=True)
        (work / "without" / "spconv_triton" / "__init__.py").write_text('raise ImportError("left out of this stage")\n')
        for stage in stages(work):
            found[stage.name] = run(
                stage, work, deadline, lambda now, name=stage.name: write(file, {**found, name: now})
            )
            if stage.name == "machine" and found["machine"]["status"] != "done":
                return 1
        found["learning"] = run(
            learning(work, found, deadline), work, deadline, lambda now: write(file, {**found, "learning": now})
        )
    print(table(found))
    print(file)
    return int(any(stage["status"] != "done" for stage in found.values()))


def stages(work: Path) -> list[Stage]:
    """All but the last, whose length follows from what these find."""
    device = "cpu" if REHEARSAL else "cuda"
    tests = [f"tests/model/test_{name}.py" for name in ("golden", "tokenizer")] + ["tests/data/test_views.py"]
    which = "test_golden and dense or grey" if REHEARSAL else "cuda or test_views"
    stem = ["--only", "demo, 48 px", "--batch", "2"] if REHEARSAL else ["--only", "paper, 224 px", "--batch", "256"]
    shares = ["--shares", "0.4"] if REHEARSAL else ["--shares", "0.4", "0.25", "1.0"]
    repeats = ["--repeats", "1"] if REHEARSAL else ["--repeats", "5"]
    tiny = ["--only", "demo 48, 64", "--batch", "2", "--rounds", "1", "--steps", "1"]
    paper = ["--only", "paper 224, 256", "paper 224, 256, context visible", "--rounds", "3", "--steps", "3"]
    step = [sys.executable, "benchmarks/step.py", *(tiny if REHEARSAL else paper), "--engine", "halo"]
    stem_table = [sys.executable, "benchmarks/tokenizer.py", *stem, *repeats]
    names = ("machine", "parity", "tokenizer", "step", "compiled step", "spconv-triton")
    paths = {name: work / f"{name}.{'xml' if name == 'parity' else 'json'}" for name in names}

    def stage(name: str, seconds: float, *command, **options) -> Stage:
        return Stage(name, 600 if REHEARSAL else seconds, [*command], paths[name], **options)

    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", which]
    inductor = {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "TORCH_COMPILE_DISABLE": str(int(REHEARSAL))}
    return [
        stage("machine", 30, sys.executable, "-c", MACHINE, paths["machine"], device),
        stage("parity", 60, *pytest, "--junitxml", paths["parity"]),
        stage("tokenizer", 25, *stem_table, *shares, "--json", paths["tokenizer"]),
        stage("step", 40, *step, "--forms", "bf16", "fp32", "--json", paths["step"]),
        stage(
            "compiled step",
            60,
            *(*step, "--forms", "bf16 compile", "--json", paths["compiled step"]),
            environment=inductor,
        ),
        stage(
            "spconv-triton",
            25,
            *(*stem_table, "--shares", "0.4", "--forms", "dense", "spconv_triton", "--tile-sizes", "6"),
            *("--json", paths["spconv-triton"]),
            triton=True,
        ),
    ]


def learning(work: Path, found: dict[str, dict], deadline: float) -> Stage:
    """The published objective and recipe, as long as time is left, with as many epochs as fit by the measured step."""
    home = Path.home() / "grocery160"
    photos = os.environ.get("PHOTOS") or (str(home) if home.is_dir() else "petals")
    seconds = max(deadline - time.monotonic(), 60)
    minutes = 0.05 if REHEARSAL else (seconds - ENDING_S) / 60
    images = sum(path.is_file() for part in ("train", "val") for path in (Path(photos) / part).rglob("*")) or 20_000
    try:
        rate = found["step"]["result"]["cases"][0]["forms"]["bf16"]["images_per_second"]
    except (KeyError, IndexError, TypeError):
        rate = 1500.0
    epochs = min(max(round(0.6 * 60 * minutes * rate / images), 2), PUBLISHED_EPOCHS)  # 0.6: start, input and reports
    warmup = epochs * PUBLISHED_WARMUP / PUBLISHED_EPOCHS
    flags = ["--data", photos, "--out", work / "learning", "--minutes", f"{minutes:.3f}", "--save-every", "60min"]
    flags += ["--epochs", epochs, "--warmup-epochs", f"{warmup:.3f}", "--lr-batch-size", 64, "--engine", "dense"]
    flags += ["--cache-dir", work / "cache"]
    tiny = ["--size", "demo", "--image-size", 32, "--stem-width", 8, "--batch-size", 4]
    flags += tiny if REHEARSAL else ["--image-size", 224, "--batch-size", 128]
    command = [sys.executable, "train/pretrain.py", "flowers102", *flags]
    environment = {} if REHEARSAL else {"ACCELERATE_MIXED_PRECISION": "bf16"}
    return Stage("learning", seconds, command, work / "learning" / "reports.jsonl", environment)


def run(stage: Stage, work: Path, deadline: float, write_now) -> dict:
    """Run a stage; `write_now` is called with what it has given so far every few seconds, and in the end."""
    limit = min(stage.seconds, deadline - time.monotonic())
    command = [str(part) for part in stage.command]
    now = {"status": "no time was left", "seconds": 0.0, "command": " ".join(command[1:]), "result": None}
    if limit > 0:
        print(f"== {stage.name}, at most {limit:.0f} s", flush=True)
        without = [] if stage.triton else [str(work / "without")]
        paths = [*without, str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, **stage.environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
        while (code := wait(process, min(5, limit - (time.monotonic() - started)))) is None:
            seconds = round(time.monotonic() - started, 1)
            write_now({**now, "status": "running", "seconds": seconds, "result": read(stage.result)})
            if seconds >= limit:
                end(process)
                break
        now["seconds"] = round(time.monotonic() - started, 1)
        done = code == 0 or (stage.name == "learning" and code == EXIT_RESUME)
        now["status"] = "done" if done else "cut off" if code is None else f"failed with exit code {code}"
        now["result"] = read(stage.result)
    write_now(now)
    return now


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Its exit code, or None if it is still running after some seconds."""
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None


def end(process: subprocess.Popen) -> None:
    """End a process and those that it started."""
    os.killpg(process.pid, signal.SIGTERM)
    if wait(process, GRACE_S) is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(path: Path):
    """What a stage has written: JSON, JSON lines, or the counts of a test report; None if there is nothing yet."""
    if not path.exists():
        return None
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    if path.suffix == ".xml":
        suite = ElementTree.fromstring(text).find("testsuite")
        return (
            None
            if suite is None
            else {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        )
    return json.loads(text)


def write(file: Path, found: dict[str, dict]) -> None:
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(found, indent=1) + "\n")
    beside.replace(file)


def table(found: dict[str, dict]) -> str:
    lines = []
    for name, stage in found.items():
        lines.append(f"{name:14} {stage['status']}, {stage['seconds']:.0f} s")
        result = stage["result"]
        if name in ("machine", "parity") and result:
            lines.append("    " + ", ".join(f"{key} {value}" for key, value in result.items()))
        elif name.endswith("step") and result:
            for case in result["cases"]:
                for form, its in case["forms"].items():
                    speed = f"{its['images_per_second']:.0f} images/s, {its['utilisation']:.0%} of the matmul rate"
                    memory = f"{its['peak_memory_mib']} MiB, first step {its['first_step_seconds']:.0f} s"
                    lines.append(f"    {case['case']}, {form}: {speed}, {memory}")
        elif name in ("tokenizer", "spconv-triton") and result:
            for row in result["rows"]:
                forms = [key.removesuffix(" kept") for key in row if key.endswith(" kept")]
                times = ", ".join(f"{form} {row[form]:.2f} / {row[f'{form} + backward']:.2f}" for form in forms)
                lines.append(
                    f"    {row['share']:.0%} visible of {row['images']} images, ms forward / with backward: {times}"
                )
        elif result:
            lines += [f"    epoch {row['epoch']:g}: k-NN on val {row['knn']}, loss {row['loss']}" for row in result]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
