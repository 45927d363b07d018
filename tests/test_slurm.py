"""The driver that submits a list to SLURM, on a real single-node cluster that these tests start and stop."""

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from tests.test_campaign import ROOT, has, logs, write_list

pytestmark = pytest.mark.xdist_group("slurm")  # one cluster
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={next_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
MaxArraySize=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def ask(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    if os.getuid() != 0:
        pytest.skip("only root can start a cluster of its own")
    if not has("slurmctld", "slurm-wlm", "munge"):
        pytest.skip("SLURM is not installed (root's KLAC_TESTS_INSTALL=1 installs Debian's slurm-wlm and munge)")
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("state", "spool"):
            (folder / part).mkdir()
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        host = socket.gethostname().split(".")[0]
        configuration = CONFIGURATION.format(host=host, folder=folder, port=port, next_port=port + 1)
        (folder / "slurm.conf").write_text(configuration)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        munged = ["munged", "--force", "--key-file", folder / "key", "--socket", folder / "munge.socket"]
        munged += ["--pid-file", folder / "munged.pid", "--log-file", folder / "munged.log"]
        try:
            for daemon in ([*munged, "--seed-file", folder / "seed"], ["slurmctld"], ["slurmd"]):
                subprocess.run(daemon, check=True)
            wait_for(lambda: ask("sinfo", "--noheader", "--format", "%T").strip() == "idle")
            yield
        finally:
            subprocess.run(["scancel", "--full", "--signal", "KILL", "--user", "root"], check=False, timeout=60)
            for pid in ("slurmd", "slurmctld", "munged"):
                subprocess.run(["pkill", "--pidfile", folder / f"{pid}.pid"], check=False)
            wait_for(lambda: not list(folder.glob("*.pid")))


def submit(*flags):
    command = [ROOT / "benchmark/run_slurm.sh", "list.txt", "--mem", "100M", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def queue():
    return ask("squeue", "--noheader", "--array", "--format", "%K %T").splitlines()


def wait_until_empty(seconds=90, done=lambda: True):
    """Waits for an empty queue and for `done`; a requeued job, which SLURM holds for two minutes, starts soon. Not at
    once: within the second in which it ended SLURM cannot start it ("Job credential revoked"), and fails it."""
    hurried = set()

    def empty():
        for job in ask("squeue", "--noheader", "--array", "--states", "PENDING", "--format", "%i %r").splitlines():
            if job.endswith("BeginTime") and job not in hurried:
                hurried.add(job)
                subprocess.run(["scontrol", "update", f"JobId={job.split()[0]}", "StartTime=now+4"], check=False)
        return done() and not queue()

    wait_for(empty, seconds)


def test_a_list_is_run_in_arrays_and_failures_are_named_and_retried_on_request():
    write_list(bad=[2], steps=10)
    Path("runs/r0").mkdir(parents=True)
    Path("runs/r0/actor.pt").touch()
    result = submit("--throttle", "2")
    assert result.returncode == 0, result.stderr
    first, *jobs = result.stdout.splitlines()
    assert first == "5 runs to do, of 6"
    assert [line.split(": ")[1].split(",")[0] for line in jobs] == ["4 runs", "1 runs"]
    again = submit()
    assert again.returncode == 2
    assert "list.txt: already submitted, 5 runs" in again.stderr
    most = 0

    def empty():
        nonlocal most
        states = queue()
        most = max(most, sum("RUNNING" in state for state in states))
        return not states

    wait_for(empty)
    assert most == 2  # the throttle
    assert "r0" not in logs()  # it was finished
    assert all(log[-1] == "done" for name, log in logs().items() if name != "r2")
    assert len(logs()) == 5
    assert Path("list.txt.slurm").read_text().count("exit code 3") == 1

    failed = submit()
    assert (failed.returncode, failed.stdout) == (1, "0 runs to do, of 6\n")
    assert failed.stderr.splitlines()[-1] == "r2"
    write_list(steps=1)
    assert submit("--retry-failed").returncode == 0
    wait_until_empty()
    assert logs()["r2"][-1] == "done"
    assert submit().stdout == "0 runs to do, of 6\n"


@pytest.mark.slow
def test_a_run_near_its_time_limit_saves_itself_and_is_requeued_alone():
    write_list(bad=[1], steps=1, n=3)
    lines = Path("list.txt").read_text().splitlines()
    Path("list.txt").write_text("\n".join([*lines[:-1], lines[-1].replace("steps=1", "steps=1000")]) + "\n")
    fake = Path("fake.py").read_text()
    # so near the limit that the signal comes soon, and a run that would be too long but for what it saved
    fake = fake.replace("for i in", 'steps = 10 if "saved" in (folder / "log").read_text() else steps\nfor i in')
    Path("fake.py").write_text(fake)
    assert submit("--time", "00:02:00").returncode == 0
    # between its end and its place in the queue a requeued job is nowhere to be seen
    wait_until_empty(120, lambda: "done" in logs().get("r2", []))
    words = {name: [word for word in log if not word.isdigit()] for name, log in logs().items()}
    # of the last task of an array the job's number is the array's, and the others are not to be run again with it
    assert words == {"r0": ["start", "done"], "r1": ["start"], "r2": ["start", "saved", "start", "done"]}
    assert "r2: exit code 143, requeued at the time limit" in Path("list.txt.slurm").read_text()


@pytest.mark.slow
def test_real_runs_that_are_requeued_and_cancelled_end_as_if_they_were_not(scalars, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    shutil.copy(ROOT / "klac_discrete.py", ".")
    line = "python klac_discrete.py --env-id CartPole-v1 --total-timesteps 6000 --learning-starts 500 --eval-episodes 1"
    line += " --no-compile --checkpoint-interval 500 --seed 1 --resume --run-name"
    whole = f"{line} whole\n"
    subprocess.run(whole.split(), check=True, capture_output=True)
    Path("list.txt").write_text(f"{line} requeued\n{line} cancelled\n")
    result = submit("--mem", "1G")
    assert result.returncode == 0, result.stderr
    job = result.stdout.split("submitted job ")[1].split(":")[0]

    def checkpoint(name):
        return Path(f"runs/{name}/checkpoint.pt").exists()

    wait_for(lambda: checkpoint("requeued") and checkpoint("cancelled"), 120)
    subprocess.run(["scontrol", "requeue", f"{job}_0"], check=True)
    subprocess.run(["scancel", f"{job}_1"], check=True)
    wait_until_empty(180, Path("runs/requeued/actor.pt").exists)
    assert not Path("runs/cancelled/actor.pt").exists()
    assert "exit code 143" in Path("list.txt.slurm").read_text()
    result = submit("--mem", "1G")
    assert result.stdout.startswith("1 runs to do, of 2\n")
    wait_until_empty(180)
    for name in ("requeued", "cancelled"):
        assert Path(f"list.txt.logs/{name}.log").read_text().count("(cpu), from step") == 2
        expected, got = scalars(Path("runs/whole")), scalars(Path(f"runs/{name}"))
        for tags in (expected, got):
            tags.pop("charts/SPS")
            tags.pop("charts/hours")
        assert got == expected
        actor, whole = (torch.load(f"runs/{run}/actor.pt", weights_only=True)["actor"] for run in (name, "whole"))
        assert all(torch.equal(actor[part], weights) for part, weights in whole.items())


@pytest.mark.parametrize(("flags", "word"), [
    (["--throttle", "0"], "--throttle 0"), (["--cpus", "x"], "--cpus x"), (["--time"], "--time"),
    (["--what"], "--what"), (["other.txt"], "other.txt"),
])  # fmt: skip
def test_wrong_calls_are_one_line(flags, word):
    write_list()
    result = submit(*flags)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert word in result.stderr
    with open("list.txt.lock", "w") as lock:  # as run_local.sh holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = submit()
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "already being run" in refused.stderr
    refused = submit("--", "--partition", "none")
    assert refused.returncode == 2
    assert "none" in refused.stderr or "partition" in refused.stderr
    assert queue() == []
