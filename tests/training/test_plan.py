"""--plan and what a run says of its cost, which recipe is taken without a name, and what is refused beforehand."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pretrain
import pytest
import torch
from conftest import ROOT, TINY_RUN, run_pretraining
from safetensors.torch import load_file

from scott_sparse.data import cache
from scott_sparse.training import choice, plan, recipe, run
from scott_sparse.training.recipe import BY_SIZE, SMALL_DATA, SMALL_DATA_128, SMALL_DATA_224


@pytest.fixture
def labelled(photos):
    return photos({"train/a": 10, "train/b": 10, "test/a": 4, "test/b": 4})


def test_a_plan_prints_everything_and_leaves_no_run(labelled, tmp_path):
    out = tmp_path / "runs" / "one"
    flags = [*TINY_RUN, "--data", labelled, "--out", out, "--report-every", 1]
    code, printed = run_pretraining(*flags, "--plan")
    assert code is None and not out.parent.exists()
    rows = (
        r"images 20 to pretrain on, 32 x 32 px parameters 0.4 M encoder, .* M trained in all steps 4 of 8 images, .* s "
    )
    rows += r"each \(measured\) time 0:00:..: steps .*, 3 reports .*, k-NN and figure at the end .* memory .* of .* "
    rows += (
        rf"disk .* checkpoints and weights, .* free; .* decoded images writes to {out}; decoded images in {tmp_path}"
    )
    assert re.search(rows, printed), printed
    code, printed = run_pretraining(*flags)
    assert code is None and re.search(
        rf"plan: 4 steps of .* s and 3 reports of .* s take .* memory .* in {out}", printed
    )


MODEL = {"stem_width": 8, "views": dataclasses.replace(SMALL_DATA.views, crops=2, plain_share=0.0)}
TINY = dataclasses.replace(SMALL_DATA, image_size=32, batch_size=8, epochs=2.0, report_every=0.0, **MODEL)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Three small recipes, of which one is chosen as on a GPU."""
    large = dataclasses.replace(TINY, patch_size=16, size="tiny", image_size=64, precision="bf16")
    sizes = (large, dataclasses.replace(large, image_size=48), TINY)
    monkeypatch.setattr(recipe, "RECIPES", {name: ("small", one) for name, one in zip(BY_SIZE, sizes)})
    monkeypatch.setattr(choice, "process_state", lambda: SimpleNamespace(device=torch.device("cuda")))


@pytest.fixture
def costs(monkeypatch):
    """Steps that are not trained: 10 min each at 64 px and 5 below; 10 MiB an image and 100, of 1,000 MiB."""
    trained = []

    def step_seconds(of, train, count):
        trained.append(of.recipe.batch_size // of.recipe.accumulate)
        return 600.0 if of.recipe.image_size == 64 else 300.0

    monkeypatch.setattr(plan, "_step_seconds", step_seconds)
    monkeypatch.setattr(plan, "peak_memory_mib", lambda _: 100 + 10 * max(trained, default=0))
    monkeypatch.setattr(plan, "_memory_limit_mib", lambda _: 1000)
    return trained


def choose(data, *flags):
    """The run that is chosen for some flags."""
    return choice.choose_run([*flags, "--data", str(data), "--cache-dir", str(data.parent / "cache")], pretrain.train)


CHOICES = {  # flags: recipe, and the reason that is printed
    "": ("small-data-224", "recipe small-data-224: small-data-224 takes 0:4.:.., with --time-budget 60 "),
    "--time-budget 30": ("small-data-128", "recipe small-data-128: .* 30 .*; small-data-128 takes 0:2.:.., "),
    "--time-budget 10": ("small-data", "recipe small-data: small-data-224 takes .*; small-data-128 takes "),
    "--image-size 32": ("small-data", "^$"),
    "small-data-128": ("small-data-128", "^$"),
}


@pytest.mark.parametrize("flags", CHOICES)
def test_the_largest_recipe_in_time_is_taken(flags, on_a_gpu, costs, labelled, capsys):
    name, reason = CHOICES[flags]
    assert choose(labelled, *shlex.split(flags)).name == name
    printed = capsys.readouterr().out
    assert re.search(reason, printed)
    assert not printed or f"by name: train/pretrain.py {name} {flags}".strip() in printed


def test_a_recipe_that_does_not_fit_memory_is_not_taken(on_a_gpu, costs, labelled, capsys, monkeypatch):
    monkeypatch.setattr(plan, "_memory_limit_mib", lambda _: 150)
    assert choose(labelled).name == "small-data"
    assert "small-data-224: batch_size 8 needs about " in capsys.readouterr().out


def test_on_a_cpu_nothing_is_measured(costs, labelled, capsys):
    assert choose(labelled, "--batch-size", "8").name == "small-data" and not costs
    assert "recipe small-data: on a CPU the smallest of small-data-224, " in capsys.readouterr().out


def test_a_run_keeps_its_recipe(on_a_gpu, costs, labelled, tmp_path, monkeypatch, capsys):
    """Where it is resumed without a name, on another device; in its default folder only with the same images."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/small-data-128", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        content = {"recipe": "small-data-128", "source": {"data": str(labelled)}}
        (tmp_path / folder / "recipe.json").write_text(json.dumps(content))
    assert choose(labelled).name == "small-data-128" and not costs
    assert "recipe small-data-128: as the run in its folder" in capsys.readouterr().out
    assert choose(labelled, "--overwrite").name == "small-data-224"
    moved = shutil.copytree(labelled, tmp_path / "moved")
    assert choose(moved).name == "small-data-224"
    assert choose(moved, "--out", "elsewhere").name == "small-data-128"


def test_a_plan_does_not_change_the_run(on_a_gpu, labelled, tmp_path):
    """Chosen by its own first steps, and by name."""
    flags = ["--data", labelled, "--dropout", 0.1]
    code, printed = run_pretraining(*flags, "--out", tmp_path / "a")
    assert code is None and "recipe small-data-224: " in printed
    assert run_pretraining("small-data-224", *flags, "--out", tmp_path / "b")[0] is None
    a, b = (load_file(tmp_path / name / "encoder.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_batch_that_is_too_large_is_not_tried(costs, photos):
    data, flags = photos({"a": 128}), ["small-data", *map(str, TINY_RUN), "--plan", "--batch-size", "128"]
    with pytest.raises(ValueError) as error:
        choose(data, *flags)
    needed = "batch_size 128 needs about 1.4 GB of memory, 1.0 GB can be had; "
    assert str(error.value) == f"{needed}use --accumulate 2 (the same loss) or --batch-size 64."
    assert costs == [4, 8, 16, 32, 64]
    costs.clear()
    with pytest.raises(SystemExit) as end:
        choose(data, *flags, "--accumulate", "2")
    assert not end.value.code and max(costs) == 64


def test_a_gpu_that_runs_out_of_memory_names_what_fits(labelled, monkeypatch):
    def out_of_memory(of, train, count):
        if of.recipe.batch_size > 8:
            raise torch.OutOfMemoryError
        return 1.0

    monkeypatch.setattr(plan, "_step_seconds", out_of_memory)
    with pytest.raises(ValueError, match=r"batch_size 16 needs about .* use --accumulate 2 \(the same loss\) or"):
        choose(labelled, "small-data", *map(str, TINY_RUN), "--batch-size", "16", "--plan")


def nearly_full(_):
    return SimpleNamespace(free=20_000)


@pytest.mark.parametrize("where", ["run folder", "cache"])
def test_no_disk(where, labelled, tmp_path, monkeypatch):
    monkeypatch.setattr((plan if where == "run folder" else cache).shutil, "disk_usage", nearly_full)
    if where == "run folder":
        monkeypatch.setattr(cache, "_check_room", lambda **_: None)
    code, _ = run_pretraining(*TINY_RUN, "--data", labelled, "--out", tmp_path / "run", "--plan")
    expected = {
        "run folder": r"error: checkpoints and weights need .* MB, 20.0 kB are free for .*run; make room, or choose",
        "cache": r"error: decoded images cannot be kept in .*cache: about .* kB more are needed, 20.0 kB are free; ",
    }
    assert re.match(expected[where], code) and "\n" not in code and not (tmp_path / "run").exists()


def test_images_that_cannot_be_read(labelled, tmp_path):
    (labelled / "train" / "a" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    code, _ = run_pretraining(*TINY_RUN, "--data", labelled, "--out", tmp_path / "run", "--plan")
    assert code.startswith("error: 1 of 29 images cannot be read") and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("launched", "of_recipe", "here", "used"),
    [("no", "bf16", True, "bf16"), ("no", "bf16", False, "no"), ("bf16", "no", True, "bf16"), (None, "no", True, "no")],
)
def test_the_launchers_precision_comes_first(launched, of_recipe, here, used, monkeypatch, tmp_path):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(run, "has_bf16", lambda device: here)
    accelerator = run.accelerator_of(dataclasses.replace(SMALL_DATA, precision=of_recipe), tmp_path)
    assert accelerator.mixed_precision == used


def test_recipes_by_size():
    for one, side, encoder in ((SMALL_DATA_128, 128, (192, 12)), (SMALL_DATA_224, 224, (384, 12))):
        assert one.sides == (side, side) and (one.encoder.dim, one.encoder.depth) == encoder
        assert (one.patch_size, one.stem_width, one.precision, one.hide_ratio) == (16, 64, "bf16", 0.75)
        assert (one.views, one.objective) == (SMALL_DATA.views, SMALL_DATA.objective)
    assert SMALL_DATA_224.schedules(10).lr == pytest.approx(5e-4 / 2)  # published for a batch of 256; here 64


# CPU seconds in place of seconds: on a machine that others use, the clock says how busy they are.
BY_CPU_TIME = """
import sys, time
time.perf_counter = time.process_time
sys.path.insert(0, "train")
import pretrain
pretrain.main()
"""
RUNS = {
    "64 px": ["small-data", "--epochs", 12, "--batch-size", 32],
    "128 px": ["small-data-128", "--epochs", 2, "--batch-size", 16, "--report-every", 1],
    "224 px": ["small-data-224", "--epochs", 3, "--batch-size", 4, "--report-every", 0],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_what_its_plan_says(name, photos, tmp_path, clean_environment):
    """Time and peak memory within 20 %, in processes of their own."""
    data = photos({"a": 64, "b": 64}) if name != "224 px" else photos({".": 40})
    flags = [*RUNS[name], "--data", data, "--out", tmp_path / "run", "--cache-dir", tmp_path / "cache"]
    command = [sys.executable, "-c", BY_CPU_TIME, *map(str, flags)]
    printed = []
    for more in (["--plan"], []):
        done = subprocess.run([*command, *more], cwd=ROOT, env=clean_environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    hours, minutes, seconds = map(int, re.search(r"^time +(\d+):(\d+):(\d+):", printed[0], re.MULTILINE).groups())
    planned_seconds = 3600 * hours + 60 * minutes + seconds
    number, unit = re.search(r"^memory +([\d.]+) (MB|GB) of", printed[0], re.MULTILINE).groups()
    planned_mib = float(number) * {"MB": 1e6, "GB": 1e9}[unit] / 2**20
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    print(name, planned_seconds, summary["seconds"], planned_mib, summary["peak_memory_mib"])
    assert planned_seconds == pytest.approx(summary["seconds"], rel=0.2)
    assert planned_mib == pytest.approx(summary["peak_memory_mib"], rel=0.2)
    assert "plan: " in printed[1]
