"""Runs that are killed, stopped or damaged go on as if nothing had happened, or say why they cannot."""

import contextlib
import importlib
import json
import math
import os
import pickle
import random
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import klac_continuous
import klac_discrete
import sac_discrete
from tests.conftest import two_of
from tests.test_runs import SCRIPTS, history_of

ROOT = Path(__file__).parent.parent
TINY = {"learning_starts": 100, "log_interval": 20, "eval_episodes": 2, "batch_size": 16, "buffer_size": 700}
TINY |= {"total_timesteps": 800, "checkpoint_interval": 40, "target_network_frequency": 50}
FLAGS = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]
FLAGS += ["--no-compile"]
TINY |= {"compile": False}


def in_a_child(function, kill_when=lambda: False):
    """Runs `function` in a forked process, killed when `kill_when()` is true: its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        # tqdm's own is shared with this process, which would wait for ever for what a killed child held
        tqdm.set_lock(threading.RLock())
        code = 70
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
            function()
            code = 0
        finally:
            os._exit(code)
    done = 0
    try:
        while not done:
            if kill_when():
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
            done, status = os.waitpid(child, os.WNOHANG)
    finally:
        if not done:  # one that is left keeps the worker's pipes open, for which xdist waits
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def test_a_fork_killed_while_it_writes_a_line_does_not_keep_this_process_from_writing():
    def die_with_the_lock():
        with tqdm.get_lock():
            os.kill(os.getpid(), signal.SIGKILL)

    shared, _ = tqdm.get_lock().locks
    assert in_a_child(die_with_the_lock) == -signal.SIGKILL
    assert shared.acquire(timeout=1)
    shared.release()


def same_run(scalars, one, other):
    """Two runs ended with the same weights and logged the same scalars, to the bit, but for the speed."""
    actors = [torch.load(run_dir / "actor.pt", weights_only=True)["actor"] for run_dir in (one, other)]
    assert all(torch.equal(actors[0][name], actors[1][name]) for name in actors[0])
    logged = [scalars(run_dir) for run_dir in (one, other)]
    assert logged[0].keys() == logged[1].keys()
    for tag in logged[0].keys() - {"charts/SPS", "charts/hours"}:
        np.testing.assert_array_equal(logged[0][tag], logged[1][tag], tag)
    assert [step for step, _ in logged[0]["charts/SPS"]] == [step for step, _ in logged[1]["charts/SPS"]]


@pytest.mark.parametrize("name", two_of(SCRIPTS))
def test_a_run_killed_at_random_moments_is_the_uninterrupted_one(scalars, name):
    module, env_id = importlib.import_module(name), SCRIPTS[name][0]
    whole = module.train(module.Args(env_id=env_id, run_name="whole", **TINY))
    args = module.Args(env_id=env_id, run_name="killed", resume=True, **TINY | {"checkpoint_interval": 90})
    rng, codes, first_steps, path = random.Random(name), [], [], Path("runs/killed/checkpoint.pt")

    def soon_after_a_checkpoint():
        """True at some moment within a fifth of a second of a new checkpoint: in an episode, or in the next one."""
        known, delay, moment = path.exists() and path.stat().st_mtime_ns, rng.uniform(0, 0.2), math.inf

        def kill_when():
            nonlocal moment
            if moment == math.inf and path.exists() and path.stat().st_mtime_ns != known:
                moment = time.monotonic() + delay
            return time.monotonic() > moment

        return kill_when

    while not codes or codes[-1] != 0:
        state = module.load(path.parent)
        first_steps.append(state.get("step", args.total_timesteps) if state else 0)
        codes.append(in_a_child(lambda: module.train(args), soon_after_a_checkpoint()))
        assert codes[-1] in (0, -signal.SIGKILL)
    print(f"{name}: resumed from {first_steps}")
    assert len(set(first_steps)) > 2  # killed often enough to mean something
    same_run(scalars, whole, path.parent)
    files = [sorted(x.name for x in run_dir.iterdir() if "tfevents" not in x.name) for run_dir in (whole, path.parent)]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_compiled_run_that_is_killed_is_the_uninterrupted_one_too(scalars, name):
    """As a process of its own: threads of the compiler do not live on in a fork."""
    flags = [flag for flag in FLAGS if flag != "--no-compile"]
    flags[flags.index("--total-timesteps") + 1] = "3000"
    command = [sys.executable, ROOT / f"{name}.py", "--env-id", f"tests.envs:{SCRIPTS[name][0]}", *flags, "--resume"]
    environment, rng = os.environ | {"PYTHONPATH": str(ROOT)}, random.Random(name)
    subprocess.run([*command, "--run-name", "whole"], env=environment, check=True, capture_output=True)
    path, steps = Path("runs/killed/checkpoint.pt"), []
    for _ in range(3):
        known = path.exists() and path.stat().st_mtime_ns
        process = subprocess.Popen([*command, "--run-name", "killed"], env=environment, stdout=subprocess.DEVNULL)
        while not path.exists() or path.stat().st_mtime_ns == known:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        steps.append(torch.load(path, weights_only=True)["step"])
    print(f"{name}: killed, with checkpoints of {steps}")
    assert max(steps) > 100  # beyond the warm-up
    subprocess.run([*command, "--run-name", "killed"], env=environment, check=True, capture_output=True)
    assert json.loads(Path("runs/killed/args.json").read_text())["compile"]
    same_run(scalars, Path("runs/whole"), Path("runs/killed"))


def test_a_run_killed_while_it_writes_a_checkpoint_keeps_the_one_before(scalars, monkeypatch):
    whole = sac_discrete.train(sac_discrete.Args(env_id="Walk-v0", run_name="whole", **TINY))
    args = sac_discrete.Args(env_id="Walk-v0", run_name="killed", resume=True, **TINY)

    def train_and_die_in_save(number):
        real, calls = torch.save, []

        def save(state, file):
            calls.append(0)
            if len(calls) == number:
                file.write(b"half of a checkpoint")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            real(state, file)

        monkeypatch.setattr(torch, "save", save)
        sac_discrete.train(args)

    for number, step in ((1, None), (3, 80), (2, 120)):
        assert in_a_child(lambda n=number: train_and_die_in_save(n)) == -signal.SIGKILL
        (partial,) = Path("runs/killed").glob("partial-*")
        assert partial.read_bytes() == b"half of a checkpoint"
        state = sac_discrete.load(Path("runs/killed"))
        assert (state is None) if step is None else state["step"] >= step
    assert in_a_child(lambda: sac_discrete.train(args)) == 0
    same_run(scalars, whole, Path("runs/killed"))


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(scalars):
    whole = sac_discrete.train(sac_discrete.Args(env_id="Walk-v0", run_name="whole", **TINY))
    args = sac_discrete.Args(env_id="Walk-v0", run_name="full", **TINY)
    errors = Path("errors")

    def train_on_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # a checkpoint is larger, all else is smaller
        with errors.open("w") as file, contextlib.redirect_stderr(file):
            sac_discrete.train(args)

    assert in_a_child(train_on_a_full_disk) == 0
    assert errors.read_text().count("runs/full: checkpoint.pt: not written: [Errno 27]") in range(10, 20)
    assert "File too large" in errors.read_text()  # the system's words, and not torch's
    assert not {"partial", "checkpoint.pt"} & {path.name.split("-")[0] for path in Path("runs/full").iterdir()}
    same_run(scalars, whole, Path("runs/full"))


def test_a_disk_that_is_full_at_the_end_is_one_line_and_the_run_goes_on_from_its_checkpoint(
    scalars, monkeypatch, capsys
):
    args = sac_discrete.Args(env_id="Walk-v0", run_name="full", resume=True, **TINY)
    whole, real = sac_discrete.train(sac_discrete.Args(env_id="Walk-v0", run_name="whole", **TINY)), sac_discrete.save

    def save(state, path):
        if path.name == "actor.pt":
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(sac_discrete, "save", save)
    monkeypatch.setattr(sac_discrete.tyro, "cli", lambda _: args)
    monkeypatch.setattr(sys, "argv", ["sac_discrete.py"])
    with pytest.raises(SystemExit, match="1"):
        sac_discrete.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sac_discrete.py: runs/full: actor.pt: not written: [Errno 28] No space left on device (")
    assert "(with --resume the same command goes on from the last checkpoint) at step 800; the last check" in line
    monkeypatch.setattr(sac_discrete, "save", real)
    sac_discrete.train(args)
    same_run(scalars, whole, Path("runs/full"))


def test_a_checkpoint_that_torch_does_not_load_is_named(run_script):
    """As of a fork, of which a part's state_dict holds a NumPy array."""
    unfinished(sac_discrete)
    path = Path("runs/unfinished/checkpoint.pt")
    torch.save(torch.load(path, weights_only=True) | {"normaliser": np.zeros(3)}, path)
    content = path.read_bytes()
    code, _, err = run_script("sac_discrete", "--env-id", "Walk-v0", "--run-name", "unfinished", "--resume", *FLAGS)
    assert (code, err.count("\n")) == (2, 1)
    assert "unfinished/checkpoint.pt: unreadable" in err
    assert path.read_bytes() == content


def test_a_stopped_script_saves_itself_and_says_how_to_go_on(scalars, capsys):
    flags = TINY | {"total_timesteps": 800, "checkpoint_interval": 10**6, "anneal": False}
    args = klac_continuous.Args(env_id="tests.envs:Drift-v0", run_name="whole", **flags)
    whole = klac_continuous.train(args)
    command = [sys.executable, str(ROOT / "klac_continuous.py"), "--env-id", "tests.envs:Drift-v0", *FLAGS]
    command += ["--checkpoint-interval", "1000000", "--no-anneal"]
    command += ["--run-name", "stopped", "--resume"]
    setting = {"env": os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, "text": True}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **setting)
    assert "from step 0" in process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "once more to stop now" in err
    step = klac_continuous.load(Path("runs/stopped"))["step"]
    assert 0 < step < 800
    assert f"the same command with --resume goes on from step {step}\n" in out
    capsys.readouterr()
    args = replace(args, run_name="stopped", resume=True)
    klac_continuous.train(args)
    assert f"from step {step}" in capsys.readouterr().out
    same_run(scalars, whole, Path("runs/stopped"))
    klac_continuous.train(args)
    assert capsys.readouterr().out == "runs/stopped: finished already, after 800 steps\n"


def test_a_second_ctrl_c_stops_at_once():
    flags = ["--env-id", "tests.envs:Endless-v0", "--run-name", "endless", "--no-compile"]
    setting = {"env": os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, "text": True}
    command = [sys.executable, str(ROOT / "sac_discrete.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **setting)
    assert "from step 0" in process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the episode has no end
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


@pytest.mark.parametrize("name", two_of(SCRIPTS))
def test_an_episode_of_a_task_without_a_limit_is_truncated_so_that_the_run_is_saved(scalars, monkeypatch, name):
    module = importlib.import_module(name)
    env_id = "Unlimited-v0" if "discrete" in name else "ContinuousUnlimited-v0"
    args = module.Args(env_id=env_id, total_timesteps=20_100, learning_starts=20_050, eval_episodes=1)
    args.checkpoint_interval, args.buffer_size, args.compile, saved, real = 5_000, 20_100, False, [], module.save
    monkeypatch.setattr(module, "save", lambda state, path: saved.append(state) or real(state, path))
    logged = scalars(module.train(args))
    assert logged["charts/episodic_length"] == [(9_999, 10_000), (19_999, 10_000)]
    assert [state["step"] for state in saved[:-1]] == [10_000, 20_000]
    terminations = saved[1]["columns"][-1]
    assert not terminations.any()  # a truncation: the target bootstraps
    assert logged["eval/episodic_return"] == [(20_100, 10_000)]


def unfinished(module, **flags):
    """A run that was killed at its fourth checkpoint, after its first updates, and its arguments."""
    args = module.Args(**(TINY | {"env_id": "Walk-v0", "run_name": "unfinished", "resume": True} | flags))
    real, saved = module.save, []

    def save(state, path):
        real(state, path)
        saved.append(path)
        if len(saved) == 4:
            raise KeyboardInterrupt

    module.save = save
    try:
        with pytest.raises(KeyboardInterrupt):
            module.train(args)
    finally:
        module.save = real
    return args


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(run_script):
    unfinished(sac_discrete)
    path = Path("runs/unfinished/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:5000])
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    code, _, err = run_script("sac_discrete", "--env-id", "Walk-v0", "--run-name", "unfinished", "--resume", *FLAGS)
    assert code == 2
    assert err.startswith("sac_discrete.py: runs/unfinished/checkpoint.pt: unreadable; without it")
    assert err.count("\n") == 1
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


class Malice:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate", "--reference"])
def test_a_file_from_a_stranger_runs_no_code(run_script, flag):
    folder = Path("runs/strange")
    folder.mkdir(parents=True)
    for write in (torch.save, lambda state, path: path.write_bytes(pickle.dumps(state))):
        write({"args": {}, "actor": Malice(), "step": 1}, folder / "actor.pt")
        flags = [flag] if flag == "--resume" else [flag, str(folder)]
        code, _, err = run_script("klac_discrete", "--env-id", "Walk-v0", "--run-name", "strange", *flags)
        assert (code, err.count("\n")) == (2, 1)
        assert "actor.pt" in err
        assert not Path("owned").exists()
    pickle.loads(pickle.dumps(Malice()))  # the file would have done it
    assert Path("owned").exists()


def test_flags_are_compared_before_the_first_checkpoint_too(run_script):
    args = sac_discrete.Args(env_id="Walk-v0", resume=True, run_name="begun", **TINY | {"checkpoint_interval": 10**6})
    code = in_a_child(lambda: sac_discrete.train(args), lambda: any(Path().glob("runs/begun/*tfevents*")))
    assert code == -signal.SIGKILL
    before = {file: file.read_bytes() for file in Path("runs/begun").iterdir() if file.name != "lock"}
    flags = ["--run-name", "begun", "--resume", *FLAGS, "--checkpoint-interval", "1000000"]
    for change, word in ((["--env-id", "Walk-v0", "--gamma", "0.9"], "--gamma 0.99, not 0.9"),
                         (["--env-id", "Catch-v0"], "--env-id Walk-v0, not Catch-v0")):  # fmt: skip
        code, _, err = run_script("sac_discrete", *flags, *change)
        assert (code, err.count("\n")) == (2, 1)
        assert word in err
    assert {file: file.read_bytes() for file in Path("runs/begun").iterdir() if file.name != "lock"} == before
    Path("runs/begun/args.json").write_text("{")  # killed while it wrote this
    assert run_script("sac_discrete", *flags, "--env-id", "Walk-v0")[0] == 0


def test_a_run_killed_between_its_last_two_steps_is_tidied(scalars):
    args = unfinished(sac_discrete)
    checkpoint = Path("runs/unfinished/checkpoint.pt").read_bytes()
    sac_discrete.train(args)
    Path("runs/unfinished/checkpoint.pt").write_bytes(checkpoint)  # as if killed before it was removed
    sac_discrete.train(args)
    assert not Path("runs/unfinished/checkpoint.pt").exists()


def test_another_file_is_no_run(run_script):
    Path("runs/odd").mkdir(parents=True)
    torch.save({"weights": torch.zeros(3)}, "runs/odd/actor.pt")
    for flags in (["--evaluate", "runs/odd"], ["--env-id", "Walk-v0", "--run-name", "odd", "--resume"]):
        code, _, err = run_script("sac_discrete", *flags)
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith("sac_discrete.py: runs/odd/actor.pt: unreadable")


def test_changed_flags_are_refused_by_name(run_script):
    unfinished(klac_discrete, anneal=True)
    flags = ["--env-id", "Walk-v0", "--run-name", "unfinished", "--resume", *FLAGS]
    for change, words in (
        (["--gamma", "0.9"], "--gamma 0.99, not 0.9"),
        (["--no-bias"], "--bias True, not False"),
        (["--total-timesteps", "700"], "--total-timesteps 800, not 700"),
        (["--total-timesteps", "3000"], "--anneal-timesteps 800, not 3000"),
    ):
        code, _, err = run_script("klac_discrete", *flags, *change)
        assert (code, err.count("\n")) == (2, 1), change
        assert err.startswith("klac_discrete.py: --resume: runs/unfinished was started with "), err
        assert err.rstrip().endswith(words)
    code, _, err = run_script("klac_discrete", *flags, "--eval-episodes", "1", "--checkpoint-interval", "700")
    assert (code, err) == (0, "")
    code, _, err = run_script("klac_discrete", *flags, "--total-timesteps", "3000", "--anneal-timesteps", "800")
    assert code == 2
    assert "finished" in err


def test_the_first_step_after_a_resume_has_a_speed(scalars):
    """It is over the steps since the first update after the resume, which would compile."""
    args = unfinished(sac_discrete, update_frequency=1, log_interval=1)
    step = sac_discrete.load(Path("runs/unfinished"))["step"]
    speeds = dict(scalars(sac_discrete.train(args))["charts/SPS"])
    assert speeds[step] == 0
    assert speeds[step + 1] > 10


@pytest.mark.parametrize(("module", "flags"), [(sac_discrete, {}), (klac_discrete, {"anneal_timesteps": 700}),
                                               (klac_discrete, {"anneal": False}),
                                               (klac_discrete, {"autotune": False, "alpha": 0.2})])  # fmt: skip
def test_a_run_may_be_lengthened_where_the_schedule_stays(scalars, module, flags):
    args = unfinished(module, **flags)
    args.total_timesteps = 1200
    lengthened = module.train(args)
    args.run_name, args.resume = "long", False
    same_run(scalars, module.train(args), lengthened)


def test_resume_without_a_name_finds_the_latest_run_and_starts_afresh_without_a_checkpoint(scalars, capsys):
    args = sac_discrete.Args(env_id="Walk-v0", resume=True, **TINY | {"checkpoint_interval": 10**6})
    assert in_a_child(lambda: sac_discrete.train(args), lambda: any(Path().glob("runs/*/args.json"))) == -signal.SIGKILL
    (killed,) = Path("runs").iterdir()
    args.checkpoint_interval = 40
    finished = sac_discrete.train(args)
    assert finished == killed
    assert "from step 0" in capsys.readouterr().out
    assert sac_discrete.train(args) == killed  # finished: nothing to do
    args.resume = False
    fresh = sac_discrete.train(args)
    assert fresh != killed
    same_run(scalars, fresh, finished)
    args.resume, args.seed = True, 2
    assert sac_discrete.train(args) not in (fresh, killed)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_a_resumed_run_lets_go_of_its_checkpoint(monkeypatch):
    args, mapped, real = unfinished(sac_discrete), [], sac_discrete.save

    def save(state, path):
        mapped.append("checkpoint" in Path("/proc/self/maps").read_text())
        real(state, path)

    monkeypatch.setattr(sac_discrete, "save", save)
    sac_discrete.train(args)
    assert len(mapped) > 2
    assert not any(mapped)


def test_logged_twice_is_read_once(scalars):
    """The events that a killed run wrote after its last checkpoint are purged by TensorBoard's own reader."""
    args = unfinished(sac_discrete)
    time.sleep(1)  # TensorBoard orders a run's files by the second that they were opened in
    step = sac_discrete.load(Path("runs/unfinished"))["step"]
    run_dir = sac_discrete.train(args)
    files = [EventAccumulator(str(file)).Reload() for file in sorted(run_dir.glob("*tfevents*"))]
    assert len(files) == 2
    assert min(event.step for event in files[1].Scalars("charts/episodic_return")) >= step
    steps = [s for s, _ in scalars(run_dir)["charts/episodic_return"]]
    assert steps == sorted(set(steps))


@pytest.mark.usefixtures("wandb_here")
def test_a_resumed_run_is_one_run_in_wandb_and_no_step_is_in_it_twice(scalars, monkeypatch):
    args = sac_discrete.Args(
        env_id="Walk-v0", run_name="it", resume=True, track=True, **TINY | {"checkpoint_interval": 200}
    )
    log = sac_discrete.Run.log

    def log_and_die(run, step, values):
        log(run, step, values)
        if step > 500:
            raise KeyboardInterrupt

    monkeypatch.setattr(sac_discrete.Run, "log", log_and_die)
    with pytest.raises(KeyboardInterrupt):
        sac_discrete.train(args)
    monkeypatch.setattr(sac_discrete.Run, "log", log)
    assert sac_discrete.load(Path("runs/it"))["step"] < 450  # so that some steps are trained again
    run_dir = sac_discrete.train(args)
    wandb.teardown()  # its process writes the rest of its files
    histories = [history_of(folder) for folder in Path("wandb").glob("offline-run-*")]
    assert [description.run_id for _, description in histories] == ["it"] * 2
    sent = {tag: sum(counts.get(tag, 0) for counts, _ in histories) for tag in scalars(run_dir)}
    assert sent == {tag: len(rows) for tag, rows in scalars(run_dir).items()}


def test_a_loss_that_is_not_finite_stops_the_run(run_script):
    flags = ["--env-id", "Walk-v0", "--run-name", "broken", *FLAGS, "--q-lr", "1e25"]
    code, _, err = run_script("sac_discrete", *flags)
    assert (code, err.count("\n")) == (1, 1)
    step = torch.load("runs/broken/checkpoint.pt", weights_only=True)["step"]
    assert err.startswith("sac_discrete.py: losses/")
    assert f" at step {int(err.split('at step ')[1].split(';')[0])}; the last checkpoint is of step {step}\n" in err
    assert not Path("runs/broken/actor.pt").exists()


def test_weights_that_the_last_update_broke_are_not_saved(run_script):
    """That update's loss, of the weights before it, is finite."""
    flags = ["--total-timesteps", "105", "--learning-starts", "100", "--policy-lr", "1e39", "--no-compile"]
    code, _, err = run_script("klac_discrete", "--env-id", "CartPole-v1", "--run-name", "broken", *flags)
    assert (code, err.count("\n")) == (1, 1), err
    assert "a weight of the actor is not finite at step 105" in err
    assert not Path("runs/broken/actor.pt").exists()


@pytest.mark.parametrize("name", two_of(SCRIPTS))
def test_a_saved_run_is_evaluated_from_its_folder_alone(run_script, capsys, name):
    module = importlib.import_module(name)
    run_dir = module.train(module.Args(env_id=SCRIPTS[name][1], run_name="it", **TINY | {"total_timesteps": 400}))
    before = {file: file.read_bytes() for file in run_dir.iterdir()}
    capsys.readouterr()
    outputs = [run_script(name, "--evaluate", "runs/it", "--eval-episodes", "3", "--seed", s) for s in (1, 1, 2)]
    for code, out, err in outputs:
        assert (code, err) == (0, "")
        assert [line.split()[:3] for line in out.splitlines()] == [
            ["runs/it:", "deterministic", "return"],
            ["runs/it:", "stochastic", "return"],
        ]
    assert outputs[0] == outputs[1] != outputs[2]
    written = run_dir / "evaluation.json"
    returns = json.loads(written.read_text())
    assert returns["seed"] == 2
    for line, kind in zip(outputs[2][1].splitlines(), ("deterministic", "stochastic"), strict=True):
        assert len(returns[f"{kind}_returns"]) == 3
        assert f"return {statistics.mean(returns[f'{kind}_returns']):.2f} +-" in line
    assert {file: file.read_bytes() for file in run_dir.iterdir() if file != written} == before
    saved = torch.load(run_dir / "actor.pt", weights_only=True)  # the run's own flags hold, not this call's
    saved["args"]["batch_size"] = 5
    torch.save(saved, run_dir / "actor.pt")
    assert run_script(name, "--evaluate", "runs/it", "--eval-episodes", "3", "--batch-size", "5") == outputs[0]
    code, out, err = run_script(name, "--evaluate", "runs/it", "--batch-size", "7")
    words = "--batch-size 7: not with --evaluate, which plays the run as it was trained, with 5"
    assert (code, out, err) == (2, "", f"{name}.py: {words}\n")
    code, _, err = run_script(name, "--evaluate", "runs/none")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("returns", "words"),
    [([1.0, 2.0, 6.0], "3.00 +- 2.99 over 3 episodes"), ([4.0], "4.00 in one episode")],  # 1.96 sqrt(7 / 3)
)
def test_the_interval_of_an_evaluation_is_the_normal_one(monkeypatch, returns, words):
    monkeypatch.setattr(klac_discrete, "evaluate", lambda *a: np.array(returns))
    Path("runs/it").mkdir(parents=True)
    args = klac_discrete.Args(env_id="Walk-v0")
    actor = klac_discrete.make_networks(args, klac_discrete.make_env(args))[0].state_dict()
    klac_discrete.save({"args": {"env_id": "Walk-v0"}, "actor": actor}, Path("runs/it/actor.pt"))
    printed = []
    monkeypatch.setattr("builtins.print", lambda *a, **k: printed.append(a[0]))
    klac_discrete.evaluate_run(klac_discrete.Args(evaluate="runs/it"))
    assert printed[0] == f"runs/it: deterministic return {words}"
