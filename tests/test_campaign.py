"""The campaign's list, and the driver that runs a list on one machine."""

import collections
import fcntl
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro

import klac_continuous
import klac_discrete
import sac_continuous
import sac_discrete

ROOT = Path(__file__).parent.parent
SCRIPTS = {f"{module.__name__}.py": module for module in (sac_discrete, klac_discrete, sac_continuous, klac_continuous)}


def campaign(*flags):
    return subprocess.run([ROOT / "benchmark/campaign.sh", *flags], capture_output=True, text=True, check=False)


def test_the_list_is_the_papers():
    lines = campaign().stdout.splitlines()
    assert len(lines) == len(set(lines)) == 5 * 20 * 13
    seeds, total, counts = collections.defaultdict(set), 0, collections.Counter()
    for line in lines:
        first, seed, name = re.fullmatch(r"python (.*) --seed (\d+) --run-name (\S+)__\2 --resume", line).groups()
        seeds[first, name].add(int(seed))
    assert all(found == set(range(1, 21)) for found in seeds.values())
    for first, name in seeds:
        script, *flags = first.split()
        args = tyro.cli(SCRIPTS[script].Args, args=flags)
        total += args.total_timesteps * 20
        label = ""
        if script.startswith("klac"):
            label = "-" * (not (args.anneal and args.bias)) + "a" * (not args.anneal) + "b" * (not args.bias)
        variant = script[:4].rstrip("_").upper() + label
        counts[variant] += 1
        assert name == f"{args.env_id}__{variant}"
        assert args.total_timesteps == (3_000_000 if "discrete" in script else 1_000_000)
    assert total == 2_300_000_000
    assert counts == dict.fromkeys(("SAC", "KLAC", "KLAC-a", "KLAC-b", "KLAC-ab"), 13)
    assert campaign("--dry-run").stdout.startswith("1300 runs, 2300000000 steps, ")


def test_another_beta_is_given_to_the_variants_that_have_one():
    edit = re.search(r"`(sed '/klac_/.*')`", (ROOT / "docs/campaign.md").read_text())[1]
    lines = campaign("minatar", "--seeds", "1").stdout
    edited = subprocess.run(edit, shell=True, input=lines, capture_output=True, text=True, check=True).stdout
    assert sorted(edited.splitlines()) == sorted(
        re.sub(r"--run-name (\S+)", r"--beta 0.1 --run-name \1-beta0.1", line) if "klac_" in line else line
        for line in lines.splitlines()
        if "--no-bias" not in line
    )


def test_parts_of_the_list():
    lines = campaign("minatar", "--seeds", "3 4", "--variants", "SAC KLAC-b", "--envs", "Seaquest-v1", "--track").stdout
    assert lines.splitlines()[1] == (
        "python klac_discrete.py --env-id Seaquest-v1 --no-bias --total-timesteps 3000000 --seed 3 --track "
        "--run-name Seaquest-v1__KLAC-b__3 --resume"
    )
    assert len(lines.splitlines()) == 4
    shorter = campaign("mujoco", "--seeds", "1", "--steps", "5000", "--variants", "SAC KLAC KLAC-a").stdout.splitlines()
    assert len(shorter) == 24
    for line in shorter:  # a prefix of the paper's run
        assert ("--anneal-timesteps 1000000" in line) == ("__KLAC__" in line)
        assert "--total-timesteps 5000 " in line
    compressed = campaign("mujoco", "--seeds", "1", "--steps", "5000", "--compress", "--variants", "SAC KLAC KLAC-a")
    expected = [
        line.replace(" --anneal-timesteps 1000000", "").replace("-5000 ", "-5000-compressed ") for line in shorter
    ]
    assert compressed.stdout.splitlines() == expected
    names = {line.split("--run-name ")[1] for line in shorter + expected + campaign("--seeds", "1").stdout.splitlines()}
    assert len(names) == 24 + 24 + 65  # no run is another's, finished
    assert campaign("--seeds", "1 1").stdout == campaign("--seeds", "1").stdout


@pytest.mark.parametrize("flags", [
    ["atari"], ["--seeds", "x"], ["--seeds"], ["--envs", "Pong-v5"], ["minatar", "--envs", "Ant-v5"],
    ["--variants", "PPO"], ["--steps", "-1"], ["--steps", "0"], ["--what"], ["--compress"],
    ["minatar", "mujoco"], ["--seeds", ""], ["--envs", " "], ["--seeds", "1 01"],
])  # fmt: skip
def test_what_the_list_does_not_know_is_refused(flags):
    result = campaign(*flags)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("campaign.sh: ")


def test_hours_without_a_rate_are_refused():
    for folder in ("benchmark", "results/throughput"):
        Path(folder).mkdir(parents=True)
    shutil.copy(ROOT / "benchmark/campaign.sh", "benchmark")
    Path("results/throughput/rates.csv").write_text("task,contestant,setting,steps_per_second\n")
    result = subprocess.run(["benchmark/campaign.sh", "--dry-run"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.endswith("rates.csv has no 2x1 rate of sac_discrete\n")


def has(command, *packages):
    """Whether the command is there, once it has been installed if KLAC_TESTS_INSTALL allows that and root asks."""
    may_install = os.environ.get("KLAC_TESTS_INSTALL") and os.getuid() == 0 and shutil.which("apt-get")
    if may_install and not shutil.which(command):
        apt = ["apt-get", "--yes", "-qq", "-o", "DPkg::Lock::Timeout=120", "install", "--no-install-recommends"]
        subprocess.run([*apt, *packages], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return shutil.which(command)


needs_parallel = pytest.mark.skipif(
    not has("parallel", "parallel"), reason="GNU parallel is not installed (root's KLAC_TESTS_INSTALL=1 installs it)"
)
# A run as the scripts are: a first SIGTERM lets it save itself at the end of its episode, a second ends it at once
FAKE = """
import os, signal, sys, time
from pathlib import Path

name, steps = sys.argv[sys.argv.index("--run-name") + 1], int(os.environ["steps"])
folder, stopped = Path("runs", name), []
folder.mkdir(parents=True, exist_ok=True)
log = (folder / "log").open("a", buffering=1)

def stop(number, _):
    stopped.append(number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

signal.signal(signal.SIGTERM, stop)
print("start", os.getpid(), file=log)
for i in range(steps):
    time.sleep(0.1)
    if stopped and i % 10 == 9:
        print("saved", file=log)
        sys.exit(143)
if os.environ["bad"]:
    sys.exit(3)
(folder / "actor.pt").touch()
print("done", file=log)
"""


def write_list(bad=(), steps=10, n=6):
    Path("fake.py").write_text(FAKE)
    lines = ["# a comment", ""]
    for i in range(n):
        flags = f"steps={steps} bad={'yes' if i in bad else ''}"
        lines.append(f"{'env ' * (i % 2)}{flags} python3 fake.py --run-name r{i}")
    Path("list.txt").write_text("\n".join(lines) + "\n")


def drive(*flags):
    return subprocess.run(
        [ROOT / "benchmark/run_local.sh", "list.txt", *flags], capture_output=True, text=True, check=False
    )


def logs():
    return {path.parent.name: path.read_text().split() for path in sorted(Path("runs").glob("*/log"))}


@needs_parallel
def test_a_list_is_run_and_failures_are_named_and_retried_on_request():
    write_list(bad=[2], steps=1)
    Path("runs/r0").mkdir(parents=True)
    Path("runs/r0/actor.pt").touch()
    result = drive("--workers", "3")
    assert result.returncode == 1
    assert result.stdout.startswith("5 runs to do, of 6\n")
    assert result.stderr.splitlines()[-1] == "r2"
    assert "r0" not in logs()  # it was finished
    assert all(log[-1] == "done" for name, log in logs().items() if name != "r2")
    assert len(Path("list.txt.joblog").read_text().splitlines()) == 5

    again = drive()
    assert (again.returncode, again.stdout) == (1, "0 runs to do, of 6\n")
    assert len(logs()["r2"]) == 2
    write_list(steps=1)
    fixed = drive("--retry-failed")
    assert (fixed.returncode, fixed.stderr) == (0, "")
    assert logs()["r2"][-1] == "done"
    assert drive().returncode == 0


@needs_parallel
def test_a_run_that_failed_counts_as_finished_only_once_it_is():
    write_list(bad=[1], steps=1, n=2)
    assert drive().returncode == 1
    write_list(bad=[1], steps=1, n=3)
    assert "r2: finished; 2/3 finished" in drive().stdout
    Path("list.txt").write_text(2 * Path("list.txt").read_text())
    assert drive("--retry-failed").returncode == 2  # two lines of one name
    assert Path("list.txt.failed").read_text() == "r1\n"
    write_list(bad=[1], steps=1, n=3)
    Path("runs/r1/actor.pt").touch()  # finished by hand
    done = drive()
    assert (done.returncode, done.stderr) == (0, "")
    write_list(bad=[3], steps=1, n=4)
    assert drive().returncode == 1
    write_list(steps=1, n=3)  # without the run that failed
    assert drive().returncode == 0


@needs_parallel
def test_a_list_of_another_editor_is_run():
    write_list(steps=1, n=2)
    lines = Path("list.txt").read_text().replace("--run-name r1", "--run-name  r1")
    Path("list.txt").write_text(lines.replace("\n", "\r\n"), newline="")
    result = drive()
    assert (result.returncode, result.stderr, sorted(logs())) == (0, "", ["r0", "r1"])
    assert "2/2 finished" in result.stdout


def test_another_program_of_that_name_is_not_taken_for_gnu_parallel(monkeypatch, tmp_path):
    write_list()
    (tmp_path / "parallel").write_text("#!/bin/sh\nexit 1\n")  # moreutils'
    (tmp_path / "parallel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    result = drive()
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "GNU parallel is not installed" in result.stderr


@needs_parallel
def test_how_to_stop_a_driver_is_said_of_its_own_session_alone():
    write_list(steps=1)
    assert drive().returncode == 0
    with open("list.txt.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        held = drive()
    assert (held.returncode, held.stderr) == (2, "run_local.sh: list.txt: already being run\n")
    Path("list.txt.lock").write_text("4242\n")  # a driver's of an earlier day
    Path("list.txt").write_text("true\n")  # refused before a run has begun
    assert drive().returncode == 2
    assert Path("list.txt.lock").read_text() == ""


@needs_parallel
def test_on_a_terminal_each_finished_run_says_how_far_the_list_is():
    """On a pseudo-terminal, where GNU parallel's own bar printed an error a second and an estimate of 0 s."""
    write_list(steps=3, n=4)
    child, terminal = pty.fork()
    if child == 0:
        os.execv(ROOT / "benchmark/run_local.sh", ["run_local.sh", "list.txt", "--workers", "2"])
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the child closed the terminal
            break
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert b"/dev/tty" not in shown
    assert b"4 runs to do, of 4" in shown
    assert b"; 4/4 finished, 0 h 0 min left" in shown
    write_list(steps=3, n=5)
    assert "; 5/5 finished" in drive("--workers", "2").stdout  # those of the first call count


@needs_parallel
@pytest.mark.parametrize("given", [None, "glibc.malloc.arena_max=1"])
def test_a_runs_memory_is_in_huge_pages_unless_the_user_says_otherwise(monkeypatch, given):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if given:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    write_list(n=0)
    Path("list.txt").write_text("""python3 -c 'import os; print(os.environ["GLIBC_TUNABLES"])' --run-name it\n""")
    drive()
    assert Path("list.txt.logs/it.log").read_text() == f"{given or 'glibc.malloc.hugetlb=1'}\n"


@needs_parallel
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has one worker")
def test_there_is_a_worker_a_core_whatever_the_threads_of_a_run_are(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which nproc obeys
    write_list(steps=15, n=2)
    assert drive().returncode == 0
    rows = [line.split("\t") for line in Path("list.txt.joblog").read_text().splitlines()]
    (first, took), (second, _) = sorted((float(row[2]), float(row[3])) for row in rows)
    assert second < first + took


@needs_parallel
def test_ctrl_c_lets_every_run_save_itself_and_the_same_command_goes_on():
    write_list(steps=600)

    # whatever ran in this process before may have left SIGINT ignored or blocked, and a child inherits both
    def listen():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    command = [ROOT / "benchmark/run_local.sh", "list.txt", "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    driver = subprocess.Popen(command, preexec_fn=listen, **pipes)
    while len(logs()) < 2:
        time.sleep(0.05)
    second = drive()
    assert second.returncode == 2
    assert "already being run" in second.stderr
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert "every run saves itself" in err
    running = {name for name, log in logs().items() if log[-1] != "done"}
    assert running
    for name in running:
        _, pid, last = logs()[name]
        assert last == "saved"
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    write_list(steps=1)
    result = drive("--workers", "6")
    assert result.returncode == 0, result.stderr
    assert all(log[-1] == "done" and log.count("done") == 1 for log in logs().values())
    assert len(logs()) == 6


@needs_parallel
@pytest.mark.parametrize(("flags", "word"), [
    (["--workers", "0"], "--workers 0"), (["--workers"], "--workers"), (["--what"], "--what"),
    (["other.txt"], "other.txt"),
])  # fmt: skip
def test_wrong_calls_of_the_driver_are_one_line(flags, word):
    write_list()
    result = drive(*flags)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert word in result.stderr
    Path("empty.txt").touch()
    for name in ("none", ".", "empty.txt"):
        missing = subprocess.run([ROOT / "benchmark/run_local.sh", name], capture_output=True, text=True, check=False)
        assert (missing.returncode, missing.stdout, missing.stderr.count("\n")) == (2, "", 1)
    Path("list.txt").write_text("true --run-name a\nfalse --run-name b\ntrue --run-name a\n")
    twice = drive()
    assert (twice.returncode, twice.stderr) == (2, "run_local.sh: list.txt: two lines of --run-name a\n")
    Path("list.txt").write_text('true --run-name "my run"\n')
    quoted = drive()
    assert (quoted.returncode, quoted.stderr.count("\n")) == (2, 1)
    assert "without quotes and spaces" in quoted.stderr
    assert not Path("runs").exists()


@pytest.mark.slow
@needs_parallel
def test_a_list_may_hold_more_names_than_an_environment_variable():
    Path("list.txt").write_text("".join(f"true --run-name {'x' * 240}{i}\n" for i in range(600)))
    result = drive("--workers", "1", "--", "--dry-run")
    assert result.returncode == 1
    assert result.stderr.startswith("killed (the same command goes on with them):\n"), result.stderr


def real_list(monkeypatch):
    """Writes a list of a short real run of each discrete script, and runs each undisturbed in another folder."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lines = []
    for module in (sac_discrete, klac_discrete):
        name = module.__name__
        shutil.copy(ROOT / f"{name}.py", ".")
        flags = {"env_id": "CartPole-v1", "total_timesteps": 3000, "learning_starts": 500, "eval_episodes": 2}
        flags |= {"checkpoint_interval": 300, "log_interval": 20, "run_name": name}
        words = " ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in flags.items())
        lines.append(f"python {name}.py {words} --no-compile --resume\n")
        Path("undisturbed").mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.chdir("undisturbed")
            module.train(module.Args(**flags, compile=False))
    Path("list.txt").write_text("".join(lines))


def same_as_undisturbed(scalars):
    runs = sorted(Path("undisturbed/runs").iterdir())
    assert [run.name for run in runs] == sorted(path.name for path in Path("runs").iterdir())
    for run in runs:
        expected, got = scalars(run), scalars(Path("runs", run.name))
        for tags in (expected, got):
            tags.pop("charts/SPS")
            tags.pop("charts/hours")
        assert got == expected, run.name
        expected, got = (torch.load(path / "actor.pt", weights_only=True) for path in (run, Path("runs", run.name)))
        for part in ("actor", "critics"):
            assert all(torch.equal(got[part][name], weights) for name, weights in expected[part].items())


@pytest.mark.slow
@needs_parallel
def test_real_runs_whose_driver_workers_and_machine_are_killed_end_as_if_they_were_not(scalars, monkeypatch):
    real_list(monkeypatch)
    rng = random.Random(0)
    for victim in ("driver", "machine", "worker"):
        started = time.time()
        driver = subprocess.Popen([ROOT / "benchmark/run_local.sh", "list.txt", "--workers", "2"],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
        # one of this driver's runs has written a checkpoint of its own
        while not any(path.stat().st_mtime > started for path in Path("runs").glob("*/checkpoint.pt")):
            assert driver.poll() is None
            time.sleep(0.01)
        time.sleep(rng.random() / 2)
        session = Path("list.txt.lock").read_text().strip()
        if victim == "worker":
            subprocess.run(["pkill", "-KILL", "-s", session, "--oldest", "python"], check=True)
            _, err = driver.communicate(timeout=120)
            assert driver.returncode == 1
            killed = err.split("killed (the same command goes on with them):\n")[1].split()
            assert [
                run for run in os.listdir("undisturbed/runs") if not Path("runs", run, "actor.pt").exists()
            ] == killed
            continue
        driver.kill()
        driver.wait()
        if victim == "driver":
            second = drive()
            assert (second.returncode, second.stderr.count("\n")) == (2, 1)
            advice = second.stderr.split("already being run (to stop it: ")[1].rstrip(")\n")
            subprocess.run(shlex.split(advice), check=True)
        else:
            subprocess.run(["pkill", "-KILL", "-s", session], check=True)
        while subprocess.run(["pgrep", "-s", session], capture_output=True, check=False).stdout:
            time.sleep(0.05)
    result = drive("--workers", "2")
    assert result.returncode == 0, result.stderr
    same_as_undisturbed(scalars)
    logs = "".join(path.read_text() for path in Path("list.txt.logs").iterdir())
    assert len(set(re.findall(r"\(cpu\), from step ([1-9]\d*)", logs))) >= 3  # a kill each, in the midst of a run


@pytest.mark.slow
@needs_parallel
def test_real_runs_on_a_full_disk_fail_and_end_as_if_it_had_not_been_once_there_is_room(scalars, monkeypatch):
    Path("runs").mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "runs"]
    if os.getuid() != 0 or subprocess.run(small, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        real_list(monkeypatch)
        result = drive("--workers", "2")
        assert result.returncode == 1
        assert result.stderr.startswith("failed")
        assert "No space left on device" in Path("list.txt.logs/klac_discrete.log").read_text()
        subprocess.run(["mount", "-o", "remount,size=100m", "runs"], check=True)
        result = drive("--workers", "2", "--retry-failed")
        assert result.returncode == 0, result.stderr
        same_as_undisturbed(scalars)
    finally:
        subprocess.run(["umount", "runs"], check=True)
