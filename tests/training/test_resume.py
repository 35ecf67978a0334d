"""A run that is cut resumes as if it had not been: the same weights and metrics bit for bit, and refusals that say why.

The slow faults (kill -9, full disks, dead workers and processes) are in faults.py: `make faults`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pretrain
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY_RUN, run_pretraining, write_photo
from filelock import FileLock
from safetensors.torch import load_file, save_file

from scott_sparse.training import checkpoint, monitor, resume, saver

FLAGS = [*TINY_RUN, "--epochs", 4, "--report-every", 1, "--dropout", 0.1, "--drop-path", 0.1, "--log-every", 3]
STEPS = 16


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    for split, count in (("train", 16), ("test", 4)):
        for channel, name in enumerate("ab"):
            for i in range(count):
                write_photo(folder / split / name / f"{i}.png", 50, 60, seed=100 * channel + i, channel=channel)
    return folder


def train_into(out, data, *more, cut=None):
    """train/pretrain.py, which sends itself a signal where `cut=(step, signal)`: its end, and what it printed."""
    update, calls = pretrain.update_target, []

    def update_and_cut(*arguments, **options):
        update(*arguments, **options)
        calls.append(1)
        if cut and len(calls) == cut[0]:
            signal.raise_signal(cut[1])

    before = [signal.getsignal(number) for number in saver.STOP_SIGNALS]
    with mock.patch.multiple(pretrain, update_target=update_and_cut, draw_learned=lambda *_, **__: None):
        end = run_pretraining(*FLAGS, "--data", data, "--out", out, *more)
    assert [signal.getsignal(number) for number in saver.STOP_SIGNALS] == before
    return end


@pytest.fixture
def train(labelled, tmp_path):
    """A function that trains into a folder by name."""
    return lambda name, *more, data=labelled, cut=None: train_into(tmp_path / name, data, *more, cut=cut)


@pytest.fixture(scope="module")
def finished(labelled, tmp_path_factory):
    """A run to its end, all of its checkpoints kept."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train_into(out, labelled, "--save-every", 4, "--keep-last", 9)[0] is None
    return out


@pytest.fixture(scope="module")
def cut_folder(labelled, tmp_path_factory):
    """A run that was told to stop in step 10."""
    out = tmp_path_factory.mktemp("cut") / "run"
    assert train_into(out, labelled, "--save-every", 4, "--keep-last", 9, cut=(10, signal.SIGINT))[0] == 75
    return out


@pytest.fixture
def cut(cut_folder, tmp_path):
    """A copy of it in tmp_path/run; returns its checkpoint."""
    shutil.copytree(cut_folder, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step-00000010"


def steps_kept(out):
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(out / "checkpoints")]


def what_it_learnt(out):
    """All that must not depend on where a run was cut: files of weights and checkpoints, metrics but for the times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_second")
    tensors = {}
    newest = checkpoint.checkpoints(out / "checkpoints")[0]
    for path in (out / "encoder.safetensors", out / "context.safetensors", *newest.glob("*.safetensors")):
        tensors |= {f"{path.name}/{name}": tensor for name, tensor in load_file(path).items()}
    return lines, (out / "reports.jsonl").read_text(), tensors


def assert_same(a, b):
    a, b = what_it_learnt(a), what_it_learnt(b)
    assert a[0] == b[0]
    assert a[1] == b[1]
    assert a[2].keys() == b[2].keys() and len(a[2]) > 100
    for name, tensor in a[2].items():
        assert torch.equal(tensor, b[2][name]), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("engine", ["dense", "halo", pytest.param("spconv", marks=pytest.mark.slow)])
def test_cut_twice_is_the_same_run(engine, precision, train, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    AcceleratorState._reset_state(True)
    more = ("--engine", engine, "--save-every", 4)
    assert train("whole", *more)[0] is None
    code, printed = train("cut", *more, cut=(6, signal.SIGTERM))
    assert code == saver.EXIT_RESUME == 75 and "SIGTERM: saved after step 6 of 16" in printed
    assert not (tmp_path / "cut" / "encoder.safetensors").exists()
    code, printed = train("cut", *more, cut=(5, signal.SIGUSR1))
    assert code == 75 and "resuming after step 6 of 16" in printed and "saved after step 11" in printed
    assert train("cut", *more)[0] is None
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert [line["step"] for line in what_it_learnt(tmp_path / "whole")[0]] == list(range(STEPS))
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["mixed_precision"] == precision
    AcceleratorState._reset_state(True)


def test_raw_pixels_are_not_measured_again(cut, finished, train, tmp_path):
    """Nor the untrained encoder: a resumed run has them from its checkpoint."""
    with mock.patch.object(monitor, "Pixels", side_effect=AssertionError):
        assert train("run")[0] is None
    reports = (tmp_path / "run" / "reports.jsonl").read_text()
    assert reports == (finished / "reports.jsonl").read_text() and reports.count('"knn_pixels": null') == 0


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(tmp_path, labelled, clean_environment):
    """A real process: the first SIGINT is held up by a step that never ends."""
    code = (
        "import signal, sys, time; sys.path.insert(0, 'train'); import pretrain\n"
        "def stuck(*_, **__): print('in a step', flush=True); time.sleep(60); time.sleep(60)\n"
        "pretrain.update_target = stuck; pretrain.main()"
    )
    arguments = [*FLAGS, "--data", labelled, "--cache-dir", tmp_path / "cache", "--out", tmp_path / "run"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, env=clean_environment, stdout=subprocess.PIPE, text=True) as process:
        while "in a step" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        time.sleep(saver.SECOND_SIGINT_S / 3)
        process.send_signal(signal.SIGINT)  # as a launcher's: too soon to mean it
        time.sleep(saver.SECOND_SIGINT_S)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_process_group_reaches_no_worker(number, tmp_path, labelled, clean_environment):
    """What schedulers such as SLURM do: workers and the run get the signal at the same time."""
    out = tmp_path / "run"
    flags = [*FLAGS, "--data", labelled, "--cache", "none", "--workers", 2, "--epochs", 4000, "--out", out]
    command = [sys.executable, "train/pretrain.py", *map(str, flags), "--cache-dir", str(tmp_path / "cache")]
    process = subprocess.Popen(command, cwd=ROOT, env=clean_environment, start_new_session=True, stderr=subprocess.PIPE)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and b"Traceback" not in message, message
    assert steps_kept(out)


def test_an_exception_ends_a_run_whose_workers_ignore_signals(tmp_path, labelled, clean_environment):
    """They end with the iterator that they belong to; else the interpreter would wait for them at its exit."""
    code = (
        "import sys; sys.path.insert(0, 'train'); import pretrain\n"
        "def fail(*_, **__): raise KeyError('a bug')\n"
        "pretrain.update_target = fail; pretrain.main()"
    )
    arguments = [*FLAGS, "--data", labelled, "--cache-dir", tmp_path / "cache", "--out", tmp_path / "run"]
    command = [sys.executable, "-c", code, *map(str, arguments), "--workers", "2", "--epochs", "4000"]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and done.stderr.endswith("KeyError: 'a bug'\n"), done.stderr


SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
LAUNCHED = {  # processes, script, environment
    "one": (1, "train/pretrain.py", {}),
    "two": (2, "train/pretrain.py", {}),
    "two, sharded": (2, "tests/sharded_on_cpu.py", SHARDED),
}


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [("two", "one"), ("one", "two, sharded"), ("two, sharded", "one")])
def test_on_another_number_of_processes(first, then, train, labelled, tmp_path, clean_environment):
    """Told to stop through torchrun, gone on by others, sharded or not: the same run, to rounding."""
    quiet = ("--dropout", "0", "--drop-path", "0", "--epochs", "12", "--save-every", "1000", "--lr", "3e-4")
    assert train("whole", *quiet)[0] is None

    def launch(how, wait):
        processes, script, more = LAUNCHED[how]
        command = ["torchrun", "--standalone", "--nproc_per_node", processes, script, *FLAGS, *quiet]
        command += ["--data", labelled, "--cache-dir", tmp_path / "cache", "--out", tmp_path / "cut"]
        path = os.pathsep.join([os.path.dirname(sys.executable), clean_environment["PATH"]])
        environment = {**clean_environment, **more, "PATH": path}
        with subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        ) as it:
            metrics = tmp_path / "cut" / "metrics.jsonl"
            while wait and not (metrics.exists() and metrics.stat().st_size):
                time.sleep(0.02)
                assert it.poll() is None, it.stderr.read()
            if wait:
                it.send_signal(signal.SIGTERM)
            said = it.stderr.read()
            return it.wait(60), said

    code, said = launch(first, wait=True)
    (path,) = checkpoint.checkpoints(tmp_path / "cut" / "checkpoints")
    assert code != 0 and 0 < checkpoint.step_of(path) < 48, said
    code, said = launch(then, wait=False)
    assert code == 0, said
    whole, cut = (what_it_learnt(tmp_path / name)[0] for name in ("whole", "cut"))
    assert len(cut) == len(whole) == 48
    for one, other in zip(whole, cut):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4), one["step"]


def test_what_was_done_after_the_last_save_is_done_again(finished, train, tmp_path):
    """As after kill -9: the files hold more steps than the checkpoint."""
    shutil.copytree(finished, tmp_path / "run")
    for step in (12, 16):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-000000{step}")
    (tmp_path / "run" / "summary.json").unlink()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')  # torn
    code, printed = train("run", "--save-every", 4, "--keep-last", 9)
    assert code is None and "resuming after step 8" in printed
    assert_same(finished, tmp_path / "run")


def test_cut_in_the_last_step(finished, train, tmp_path):
    """Nothing is left to train, but the encoder is still to be written."""
    code, printed = train("run", cut=(STEPS, signal.SIGTERM))
    assert code == 75 and "saved after step 16 of 16" in printed, (code, printed)
    assert train("run")[0] is None
    assert_same(finished, tmp_path / "run")


def test_which_checkpoints_are_kept(train, tmp_path):
    train("run", "--save-every", 2, "--keep-last", 2, "--keep-every", 6)
    assert steps_kept(tmp_path / "run") == [16, 14, 12, 6]


@pytest.mark.parametrize("before", ["kept", "killed"])
def test_resuming_an_older_checkpoint_drops_the_newer_ones(before, finished, train, tmp_path):
    """Also where the run is killed before it saves again: else it would then resume from one of another past."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "summary.json").unlink()
    older = ("--resume", out / "checkpoints" / "step-00000004", "--keep-last", 1)
    if before == "killed":
        with (
            mock.patch.object(pretrain, "set_schedules", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            train("run", *older)
        assert steps_kept(out) == [4]
    assert train("run", *older, cut=(3, signal.SIGTERM))[0] == 75
    assert steps_kept(out) == [7]
    code, printed = train("run")
    assert code is None and "resuming after step 7" in printed
    assert_same(finished, out)


def test_pieces_of_some_minutes(finished, train, tmp_path):
    codes = []
    while not codes or (codes[-1] == 75 and len(codes) < 20):
        codes.append(train("run", "--minutes", "0.003")[0])
    assert len(codes) > 1 and codes[-1] is None
    assert_same(finished, tmp_path / "run")


def test_saving_by_the_clock(train, tmp_path):
    train("run", "--save-every", "0.00001min", "--keep-last", 99)
    assert len(steps_kept(tmp_path / "run")) == STEPS


def forge(path, **changed):
    """A state that a stranger made, with a checksum that fits."""
    content = {**json.loads((path / "state.json").read_text())["content"], **changed}
    (path / "state.json").write_text(json.dumps({"digest": checkpoint._digest(content), "content": content}))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: os.truncate(path / "model.safetensors", 1000),
    "bit flipped": lambda path: flip(path / "optimizer.safetensors"),
    "bit flipped in the state": lambda path: flip(path / "state.json"),
    "missing": lambda path: (path / "target.safetensors").unlink(),
    "renamed": lambda path: path.rename(path.with_name("step-00000011")),
    "of another version": lambda path: forge(path, format=2),
    "no steps": lambda path: forge(path, step="many"),
    "no files": lambda path: forge(path, files=[]),
    "no state": lambda path: forge(path, run=None),
    "empty": lambda path: (path / "state.json").write_bytes(b""),
    "swapped": lambda path: shutil.copy(path / "model.safetensors", path / "target.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_found(damage, cut):
    DAMAGE[damage](cut)
    path, damaged = checkpoint.newest_valid(cut.parent)
    assert path.name == "step-00000008"
    assert [one.name for one in damaged] == ["step-00000011" if damage == "renamed" else cut.name]


def test_a_damaged_checkpoint_is_named_and_skipped(cut, finished, train, tmp_path):
    """It is removed once the run has resumed from an older one: else it would be the newest that is kept."""
    flip(cut / "optimizer.safetensors")
    (cut.parent / "step-00000008" / "notes.txt").write_text("an extra file does no harm")
    code, printed = train("run", "--keep-last", 1, cut=(1, signal.SIGTERM))
    assert code == 75 and "step-00000010 is damaged and skipped" in printed and "resuming after step 8" in printed
    assert steps_kept(tmp_path / "run") == [9]
    assert train("run")[0] is None
    assert_same(finished, tmp_path / "run")


def test_no_undamaged_checkpoint_stops_with_the_list(cut, train, tmp_path):
    for path in checkpoint.checkpoints(cut.parent):
        flip(path / "model.safetensors")
    code, _ = train("run")
    assert code.startswith("error: ") and "(step-00000010, step-00000008, step-00000004)" in code
    assert "--overwrite" in code
    assert train("run", "--overwrite")[0] is None


@pytest.mark.parametrize("name", ["log", "report", "recipe", "precision"])
def test_a_forged_state_is_refused(name, cut, train):
    state = json.loads((cut / "state.json").read_text())["content"]["run"]
    forge(cut, run={**state, name: [1]})
    code, _ = train("run")
    assert code.startswith("error: ") and name in code and "no state of a run" in code
    if name == "report":
        forge(cut, run={**state, "report": {"reports": [{"evil": 1}], "losses": []}})
        assert "reports are not those of a run" in train("run")[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--lr", "1e-3"), "lr was 0.003, now 0.001"),
        (("--hide-ratio", "0.25", "--crops", "3"), "hide_ratio was 0.75, now 0.25; views.crops was 2, now 3"),
    ],
)
def test_other_settings_are_refused(more, said, cut, train, tmp_path):
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    code, _ = train("run", *more)
    assert code.startswith("error: the run of ") and f"({said})" in code and "--overwrite" in code
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_other_images_are_refused_and_moved_ones_are_not(cut, train, labelled, tmp_path):
    moved = shutil.copytree(labelled, tmp_path / "moved")
    code, printed = train("run", data=moved, cut=(3, signal.SIGTERM))
    assert code == 75 and "saved after step 13" in printed
    shutil.copy(moved / "train" / "a" / "0.png", moved / "train" / "a" / "1.png")
    code, _ = train("run", data=moved)
    assert "started with other images" in code


def test_more_epochs_extend_a_finished_run(finished, train, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    assert "holds a finished run" in train("run")[0]
    code, printed = train("run", "--epochs", 5)
    assert code is None and "resuming after step 16 of 20" in printed
    assert len(what_it_learnt(tmp_path / "run")[0]) == 20


def test_a_branch_from_a_checkpoint_of_another_run(finished, cut, train, tmp_path):
    branch = finished / "checkpoints" / "step-00000008"
    assert train("branch", "--resume", branch)[0] is None
    assert_same(finished, tmp_path / "branch")
    code, _ = train("other", "--resume", tmp_path / "nowhere")
    assert code.startswith("error: ") and "nowhere" in code
    assert "has checkpoints of its own" in train("run", "--resume", branch)[0]


def test_a_second_run_in_a_folder_is_refused(train, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "LOCK_TIMEOUT_S", 0.1)
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        code, _ = train("run")
        assert code.startswith("error: another run is writing to ")
    assert train("run")[0] is None


def test_a_start_that_waits_for_a_run_about_to_end_keeps_its_results(finished, train, tmp_path):
    """When the second start began, the first had not yet written its summary."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "summary.json").rename(out / "later")
    lock, looked = FileLock(out / ".lock", thread_local=False), threading.Event()
    lock.acquire()
    acquire = FileLock.acquire

    def acquire_and_tell(self, *arguments, **options):
        looked.set()
        return acquire(self, *arguments, **options)

    def end():
        looked.wait(60)
        (out / "later").rename(out / "summary.json")
        lock.release()

    first = threading.Thread(target=end)
    with mock.patch.object(FileLock, "acquire", acquire_and_tell):
        first.start()
        code, _ = train("run")
        first.join()
    assert "holds a finished run" in code
    assert_same(finished, out)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonfinite_steps_can_be_left_out(where, train, tmp_path, monkeypatch):
    """The fourth step's targets are infinite, which leaves the gradient finite, or its gradient alone is."""
    owner, name = (pretrain, "target_features") if where == "loss" else (Accelerator, "clip_grad_norm_")
    real, calls = getattr(owner, name), []

    def poisoned(*arguments, **options):
        calls.append(1)
        return real(*arguments, **options) * (float("inf") if len(calls) == 4 else 1)

    update, moved = pretrain.update_target, []

    def watched(target, *arguments, **options):
        before = [p.clone() for p in target.parameters()]
        update(target, *arguments, **options)
        moved.append(any(not torch.equal(p, q) for p, q in zip(before, target.parameters())))

    monkeypatch.setattr(owner, name, poisoned)
    monkeypatch.setattr(pretrain, "update_target", watched)
    assert train("run", "--on-nonfinite", "skip")[0] is None
    assert [step for step, changed in enumerate(moved) if not changed] == [3]  # the target does not move either
    lines = what_it_learnt(tmp_path / "run")[0]
    assert [line["step"] for line in lines if None in (line["loss"], line["gradient_norm"])] == [3]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped"] == 1
    calls.clear()
    code, _ = train("stopped")
    said = "loss is nan" if where == "loss" else "gradient norm inf"
    assert code.startswith("error: loss is ") and f"{said}" in code and "at step 3" in code
    assert "nothing was updated" in code
    assert f"last finite loss {what_it_learnt(tmp_path / 'run')[0][2]['loss']}" in code
    lines = (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    names = (tmp_path / "stopped" / "nonfinite.txt").read_text().splitlines()
    assert len(names) == 8 and all(name.startswith("train/") for name in names)


def full(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_while_saving_keeps_the_run_and_the_old_checkpoint(train, tmp_path, monkeypatch):
    write, calls = checkpoint.write_synced, []

    def sometimes_full(path, data):
        calls.append(path)
        (full if 5 <= len(calls) <= 6 else write)(path, data)  # the second save, and its next try

    monkeypatch.setattr(checkpoint, "write_synced", sometimes_full)
    code, printed = train("run", "--save-every", 4, "--keep-last", 9)
    assert code is None and "step 8: no checkpoint could be written (No space left on device)" in printed
    assert printed.count("trying again later") == 2
    assert steps_kept(tmp_path / "run") == [16, 4]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("where", ["checkpoint", "metrics"])
def test_a_last_save_that_fails_is_no_success_but_costs_no_weights(where, finished, train, tmp_path, monkeypatch):
    monkeypatch.setattr(*((checkpoint, "write_synced") if where == "checkpoint" else (pretrain.Log, "write")), full)
    code, _ = train("run")
    assert code.startswith("error: step 16: no checkpoint could be written") and "Make room" in code
    assert not (tmp_path / "run" / "summary.json").exists()
    for name, tensor in load_file(finished / "encoder.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "run" / "encoder.safetensors")[name])


def test_tensors_of_another_form_are_refused(cut):
    tensors = load_file(cut / "model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].half()}, cut / "model.safetensors")
    with pytest.raises(ValueError, match="checksum differs"):
        checkpoint.check(cut)
