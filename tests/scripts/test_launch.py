"""The files of examples/launch/ are what Accelerate, bash and SLURM read, and start runs: here on CPU processes."""

import json
import os
import re
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, TINY_RUN

LAUNCH = ROOT / "examples" / "launch"
PROCESSES = {"one_gpu": (1, 1), "eight_gpus": (1, 8), "two_nodes": (2, 16)}  # machines, processes in all
PORT = 29200 + os.getpid() % 200


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_reads_the_files(name):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == PROCESSES[name] and config.mixed_precision == "bf16"
    assert (config.distributed_type == "MULTI_GPU") == (config.num_processes > 1) and not config.use_cpu


def test_the_page_names_all_files_and_bash_reads_the_script():
    listed = set(re.findall(r"\]\(../examples/launch/(\w+\.\w+)\)", (ROOT / "docs" / "many-gpus.md").read_text()))
    assert listed == {path.name for path in LAUNCH.iterdir()}
    assert subprocess.run(["bash", "-n", LAUNCH / "slurm.sh"]).returncode == 0


@pytest.fixture
def flags(photos, tmp_path):
    data = ["--data", photos({"a": 8, "b": 8}), "--cache-dir", tmp_path / "cache", "--out", tmp_path / "run"]
    return list(map(str, [*TINY_RUN, *data]))


@pytest.fixture
def environment(clean_environment):
    return {**clean_environment, "PATH": os.pathsep.join([os.path.dirname(sys.executable), clean_environment["PATH"]])}


def summary(flags):
    with open(os.path.join(flags[-1], "summary.json")) as file:
        return json.load(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_starts_them(name, flags, environment):
    """In fp32, by two processes where the file asks for more than one; on this machine both nodes."""
    machines, processes = PROCESSES[name][0], min(PROCESSES[name][1], 2)
    command = ["accelerate", "launch", "--config_file", LAUNCH / f"{name}.yaml", "--num_processes", processes]
    command += ["--mixed_precision", "no"] + (["--main_process_port", PORT] if processes > 1 else [])
    if name == "eight_gpus":  # a plan by both processes
        arguments = list(map(str, [*command, "train/pretrain.py", *flags, "--plan"]))
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("\nsteps  ") == 1 and not os.path.exists(flags[-1]), done
    nodes = []
    for rank in range(machines):
        where = ["--machine_rank", rank, "--main_process_ip", "127.0.0.1"] if machines > 1 else []
        arguments = list(map(str, [*command, *where, "train/pretrain.py", *flags]))
        nodes.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [node.communicate(timeout=500)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * machines, errors
    assert (summary(flags)["processes"], summary(flags)["mixed_precision"]) == (processes, "no")


SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {folder}/requeued; fi
"""
SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit=0
worst=0
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=0 "$@" & tasks="${{tasks:-}} $!"; done
for task in $tasks; do wait $task || {{ code=$?; [ $code -gt $worst ] && worst=$code; }}; done
exit $worst
"""


@pytest.mark.slow
def test_slurm_requeues_a_run_until_it_has_ended(flags, environment, tmp_path):
    """srun and scontrol are stand-ins: two nodes of one task each, on this machine."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}
    job |= {"PATH": f"{tmp_path}{os.pathsep}{environment['PATH']}", "SLURM_CPUS_PER_TASK": "1"}
    codes = []
    for minutes in ("0.0001", "50"):
        job["MINUTES"] = minutes
        command = ["bash", LAUNCH / "slurm.sh", "small-data", *flags]
        done = subprocess.run(command, cwd=ROOT, env={**environment, **job}, capture_output=True, text=True)
        codes.append(done.returncode)
    assert codes == [75, 0], done.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 4242\n"
    assert "resuming after step 1 of 2" in done.stdout and summary(flags)["processes"] == 2


def test_slurm_asks_for_what_the_script_uses():
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", (LAUNCH / "slurm.sh").read_text()))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]  # one process per GPU
    minutes = int(re.search(r"MINUTES:-(\d+)", (LAUNCH / "slurm.sh").read_text())[1])
    hours, more, _ = map(int, asked["time"].split(":"))
    assert minutes < 60 * hours + more - int(asked["signal"].split("@")[1]) / 60
