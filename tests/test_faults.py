"""What an environment, a disk, a second process or a person can do to a run, and what the run then does."""

import fcntl
import importlib
import io
import itertools
import json
import os
import pty
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import wandb

import klac_discrete
import sac_continuous
import sac_discrete
import tests.envs
from tests.conftest import two_of
from tests.test_resume import FLAGS, TINY, in_a_child, same_run, unfinished
from tests.test_runs import SCRIPTS, SHORT

ROOT = Path(__file__).parent.parent
SETTING = {"env": os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, "text": True}
DISCRETE = [name for name in SCRIPTS if name.endswith("discrete")]
SIBLINGS = [pair for pair in itertools.permutations(SCRIPTS, 2) if len({name in DISCRETE for name in pair}) == 1]
TURNING = "gymnasium.wrappers.TransformObservation"


def odd(name, kind):
    return f"{'Continuous' if 'continuous' in name else ''}Odd{kind}-v0"


def trained(name, env_id, **flags):
    module = importlib.import_module(name)
    return module.train(module.Args(env_id=env_id, run_name=env_id, **TINY | flags))


def networks_of(run_dir):
    saved = torch.load(run_dir / "actor.pt", weights_only=True)
    return {f"{part} {name}": value for part in ("actor", "critics") for name, value in saved[part].items()}


@pytest.mark.parametrize("name", two_of(SCRIPTS))
def test_how_an_environment_hands_over_its_observation_changes_nothing(name):
    """Its own array, overwritten at the next step; a list; a view with a negative stride."""
    plain = networks_of(trained(name, odd(name, "Plain"), total_timesteps=400))
    for kind in ("Alias", "List", "View"):
        other = networks_of(trained(name, odd(name, kind), total_timesteps=400))
        assert all(torch.equal(plain[key], other[key]) for key in plain), kind


@pytest.mark.parametrize("name", DISCRETE)
def test_how_an_image_lies_in_memory_changes_nothing(name):
    """As the images do that are turned, which the refusal of channels first advises."""
    plain, turned = (networks_of(trained(name, env_id)) for env_id in ("Catch-v0", "CatchTurned-v0"))
    assert all(torch.equal(plain[key], turned[key]) for key in plain)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_observation_of_another_shape_is_refused_with_both(run_script, name):
    code, _, err = run_script(name, "--env-id", odd(name, "Row"), *SHORT)
    assert (code, err.count("\n")) == (2, 1)
    assert "(1, 2)" in err
    assert "(2,)" in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(("name", "env_id", "words"), [
    *[(name, "GreyBytes-v0", ["float32 (12, 12, 3)", "uint8"]) for name in DISCRETE],
    *[(name, "GreyFirst-v0", ["(3, 24, 32)", "channels last", TURNING]) for name in DISCRETE],
    *[(name, "GreyStack-v0", ["(4, 210, 160)", "channels last", TURNING]) for name in DISCRETE],
    *[(name, odd(name, "TwoRewards"), ["one number", "array(["]) for name in SCRIPTS],
    *[(name, odd(name, "Bytes"), ["observes float32 (2,)", "Box(0, 255, (2,), uint8)"]) for name in SCRIPTS],
    *[(name, odd(name, "Wide"), ["Box(0, 255, (2,), uint8)"]) for name in SCRIPTS],
])  # fmt: skip
def test_what_the_spaces_do_not_promise_is_refused(run_script, name, env_id, words):
    code, _, err = run_script(name, "--env-id", env_id, *SHORT)
    assert (code, err.count("\n")) == (2, 1), err
    assert f"{name}.py: --env-id {env_id}: " in err
    assert all(word in err for word in words), err
    assert not Path("runs").exists()


def test_the_least_integer_is_within_its_bounds():
    env = sac_discrete.make_env(sac_discrete.Args(env_id="OddLeast-v0"))
    assert env.reset(seed=0)[0].tolist() == [-128, 127]


def test_a_reward_may_be_a_tensor_of_one_number(monkeypatch):
    real = tests.envs.Odd.step

    def step(self, action):
        obs, reward, *ends = real(self, action)
        return torch.tensor(obs), torch.tensor(reward), *ends

    monkeypatch.setattr(tests.envs.Odd, "step", step)
    assert trained("sac_discrete", "OddPlain-v0", total_timesteps=200).exists()


def test_an_observation_beyond_its_bounds_is_refused(run_script, monkeypatch):
    monkeypatch.setattr(tests.envs.Grey, "_observe", lambda self: np.full((12, 12, 3), 3.0, np.float32))
    code, _, err = run_script("sac_discrete", "--env-id", "GreyFloats-v0", *SHORT)
    assert code == 2
    assert "observes 3.0 to 3.0, its space is Box(0.0, 1.0" in err


def test_floats_under_a_float_space_are_learnt(scalars):
    args = sac_discrete.Args(env_id="GreyFloats-v0", total_timesteps=1_000, learning_starts=300, batch_size=32)
    args.compile, args.update_frequency, args.target_network_frequency = False, 1, 100
    args.policy_lr = args.q_lr = 1e-3
    assert scalars(sac_discrete.train(args))["eval/episodic_return"][0][1] == 5


def test_action_spaces_of_any_width_and_start_work(monkeypatch):
    for width in ("Int8", "Int16", "Int32", "Uint8", "Uint64"):
        assert trained("sac_discrete", f"Odd{width}-v0", total_timesteps=150).exists()
    made, real = [], klac_discrete.make_gym
    monkeypatch.setattr(klac_discrete, "make_gym", lambda *a: made.append(real(*a)) or made[-1])
    stored, add = [], klac_discrete.ReplayBuffer.add
    monkeypatch.setattr(klac_discrete.ReplayBuffer, "add", lambda self, *t: stored.append(t[1]) or add(self, *t))
    trained("klac_discrete", "OddStart-v0")
    seen = made[0].unwrapped.seen[1:]  # the first is that of the check
    assert set(stored) == {0, 1, 2}
    assert [action + 2 for action in stored] == seen[: len(stored)]


def numbers_in(saved):
    """All that a checkpoint holds, by its place in it."""
    if isinstance(saved, dict | list | tuple):
        items = saved.items() if isinstance(saved, dict) else enumerate(saved)
        return {f"{key}/{place}": x for key, value in items for place, x in numbers_in(value).items()}
    return {"": saved}


@pytest.mark.parametrize(("kind", "words"), [
    ("Nan", "observation is not finite"), ("InfiniteReward", "reward is inf"),
    ("Huge", "observation is not finite"),
    ("HugeReward", "reward is "),
])  # fmt: skip
@pytest.mark.parametrize("name", two_of(SCRIPTS))
def test_a_number_that_is_not_finite_stops_the_run_at_its_step(run_script, name, kind, words):
    env_id = odd(name, kind)
    code, _, err = run_script(name, "--env-id", env_id, "--run-name", "it", *FLAGS)
    assert (code, err.count("\n")) == (1, 1), err
    assert words in err
    step = int(err.split("at step ")[1].split(";")[0])
    state = torch.load("runs/it/checkpoint.pt", weights_only=True)
    assert err.endswith(f"; the last checkpoint is of step {state['step']}\n")
    assert step - 60 < state["step"] <= step
    tensors = {place: part for place, part in numbers_in(state).items() if torch.is_tensor(part)}
    assert len(tensors) > 30
    assert all(torch.isfinite(part).all() for part in tensors.values())
    code, out, err = run_script(name, "--env-id", env_id, "--run-name", "it", "--resume", *FLAGS)
    assert f"from step {state['step']}" in out
    assert f"at step {step};" in err  # it is the same episode again


def test_a_floating_point_error_of_the_environment_keeps_its_traceback_too(run_script):
    with pytest.raises(FloatingPointError, match="underflow") as raised:
        run_script("sac_discrete", "--env-id", "OddOwnCheck-v0", "--run-name", "it", *FLAGS)
    assert raised.traceback[-1].path.name == "envs.py"


@pytest.mark.parametrize("name", two_of(SCRIPTS))
def test_an_error_of_the_environment_costs_what_follows_the_last_checkpoint_alone(run_script, name):
    with pytest.raises(ConnectionResetError) as raised:
        run_script(name, "--env-id", odd(name, "BrokenPipe"), "--run-name", "it", *FLAGS)
    assert raised.traceback[-1].path.name == "envs.py"
    saved = torch.load("runs/it/checkpoint.pt", weights_only=True)["step"]
    (note,) = raised.value.__notes__
    step = int(note.removeprefix("at step ").split(";")[0])
    assert note == f"at step {step}; the last checkpoint is of step {saved}"
    assert 0 <= step - saved < 60
    with pytest.raises(ConnectionResetError) as raised:
        run_script(name, "--env-id", odd(name, "BrokenPipe"), "--run-name", "it", "--resume", *FLAGS)
    assert raised.value.__notes__[0].startswith(f"at step {step}; ")  # it is the same episode again


@pytest.mark.parametrize("prefix", ["", "tests.envs:"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_environment_that_cannot_be_made_says_where(run_script, name, prefix):
    code, _, err = run_script(name, "--env-id", f"{prefix}Refuses-v0", *SHORT)
    assert (code, err.count("\n")) == (2, 1)
    assert "AssertionError in envs.py, line " in err
    assert "Nearest" not in err
    code, _, err = run_script(name, "--env-id", f"{prefix}Refuse-v0", *SHORT)
    assert code == 2
    assert f"Nearest ids: {prefix}Refuses-v0" in err  # as it can be typed
    code, _, err = run_script(name, "--env-id", f"{prefix}Needs-v0", *SHORT)
    assert (code, err.count("\n")) == (2, 1)
    assert "NameNotFound in " in err  # of what the environment itself asks for: its id is known
    assert "Nearest" not in err
    code, _, err = run_script(name, "--env-id", f"{prefix}No/Refuse-v0", *SHORT)
    assert code == 2
    assert "Nearest ids: " in err
    assert err.rstrip().rpartition("Nearest ids: ")[2]


def command_of(name, *flags, run_name):
    env_id = f"tests.envs:{SCRIPTS[name][0]}"
    return [sys.executable, str(ROOT / f"{name}.py"), "--env-id", env_id, *FLAGS, "--run-name", run_name, *flags]


BRIEF = ["--total-timesteps", "200"]


def test_a_folder_has_one_owner_and_its_lock_dies_with_it():
    flags = ["--resume", "--total-timesteps", "1000000"]
    command = command_of("sac_discrete", *flags, run_name="shared")
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **SETTING)
    assert "from step 0" in first.stdout.readline()
    while not Path("runs/shared/checkpoint.pt").exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.communicate()
    Path("runs/shared/partial-1").touch()  # of a process that was killed while it wrote
    third = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **SETTING)
    line = third.stdout.readline()
    assert "from step " in line
    assert "from step 0" not in line
    assert not Path("runs/shared/partial-1").exists()
    third.send_signal(signal.SIGHUP)  # a closed terminal
    time.sleep(0.02)
    third.send_signal(signal.SIGHUP)  # from the shell, and once more from the system
    _, err = third.communicate(timeout=60)
    assert third.returncode == 129, err
    assert torch.load("runs/shared/checkpoint.pt", weights_only=True)["step"] > int(line.split("from step ")[1])


def test_a_worker_of_the_environment_does_not_keep_the_folder():
    flags = ["--resume", "--total-timesteps", "1000000", "--env-id", "tests.envs:Forks-v0"]
    command = command_of("sac_discrete", *flags, run_name="shared")
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **SETTING)
    while not Path("worker").exists() or not Path("worker").read_text():
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    worker = int(Path("worker").read_text())
    try:
        os.kill(worker, 0)  # it lives
        second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **SETTING)
        line = second.stdout.readline()
        second.kill()
        assert "from step " in line, second.stderr.read()
        second.communicate()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.kill(int(Path("worker").read_text()), signal.SIGKILL)


def test_a_folder_begun_by_another_process_since_is_refused_and_left_alone():
    args = sac_discrete.Args(env_id="Walk-v0", run_name="it", resume=True, **TINY)
    with sac_discrete.Run(args, "SAC", sac_discrete.make_env(args)) as late:
        run_dir = sac_discrete.train(args)
        rows = (run_dir / "scalars.csv").read_bytes()
        with pytest.raises(sac_discrete.UsageError, match="--run-name it: begun by another process"):
            late.start({}, None, None, None)
    assert (run_dir / "scalars.csv").read_bytes() == rows


def test_rows_lost_since_the_checkpoint_are_refused_at_the_start(run_script):
    unfinished(sac_discrete)
    path, flags = Path("runs/unfinished/scalars.csv"), ["--run-name", "unfinished", "--resume", *FLAGS]
    for change in (lambda: path.write_bytes(path.read_bytes()[:-40]), path.unlink):
        change()
        code, _, err = run_script("sac_discrete", "--env-id", "Walk-v0", *flags)
        assert (code, err.count("\n")) == (2, 1), err
        assert "runs/unfinished/scalars.csv has lost rows since the checkpoint" in err


def test_a_checkpoint_without_its_step_is_refused_and_not_removed(run_script):
    unfinished(sac_discrete)
    path = Path("runs/unfinished/checkpoint.pt")
    state = torch.load(path, weights_only=True)
    del state["step"]
    torch.save(state, path)
    content = path.read_bytes()
    code, _, err = run_script("sac_discrete", "--env-id", "Walk-v0", "--run-name", "unfinished", "--resume", *FLAGS)
    assert (code, err.count("\n")) == (2, 1), err
    assert "checkpoint.pt: unreadable" in err
    assert "it has no step" in err
    assert path.read_bytes() == content


def test_the_file_that_a_checkpoint_is_written_to_is_the_process_s_own(monkeypatch):
    written, real = [], torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: written.append(file.name) or real(state, file))
    trained("sac_discrete", "Walk-v0")
    assert len(written) > 2
    assert {Path(name).name for name in written} == {f"partial-{os.getpid()}"}


@pytest.mark.parametrize("kind", ["Float16", "Float32", "Float64"])
@pytest.mark.parametrize("name", two_of([name for name in SCRIPTS if "continuous" in name]))
def test_an_action_has_its_space_s_dtype(name, kind):
    assert trained(name, f"ContinuousOddStrict{kind}-v0", total_timesteps=200).exists()


def test_an_action_box_as_wide_as_its_dtype_is_kept_whole(monkeypatch):
    box = gym.spaces.Box(np.float16([-6e4]), np.float16([6e4]), dtype=np.float16)
    actor = sac_continuous.Actor(2, box)
    assert (actor.scale.item(), actor.centre.item()) == (np.float16(6e4), 0)


@pytest.mark.parametrize("name", two_of(SCRIPTS))
@pytest.mark.parametrize(("kind", "words"), [
    ("Ragged", "the observation is no array of numbers: "),
    ("Gradient", "the observation is no array of numbers: "),
    ("RaggedReward", "the reward must be one number, not ["),
])  # fmt: skip
def test_what_is_no_array_is_refused_in_one_line(run_script, name, kind, words):
    code, _, err = run_script(name, "--env-id", odd(name, kind), *SHORT)
    assert (code, err.count("\n")) == (2, 1), err
    assert f"--env-id {odd(name, kind)}: {words}" in err


@pytest.mark.parametrize("name", two_of(SCRIPTS))
def test_a_wide_float_is_kept_as_float32(name):
    plain, wide = [networks_of(trained(name, odd(name, kind), total_timesteps=300)) for kind in ("Plain", "Long")]
    assert all(torch.equal(plain[key], wide[key]) for key in plain)


def test_bytes_under_a_float_space_are_not_scaled(monkeypatch):
    """A frame of bytes whose space is one of floats up to 255: acting and learning see the same numbers."""
    space = gym.spaces.Box(0, 255, (12, 12, 3), np.float32)
    monkeypatch.setattr(tests.envs.Grey, "_observe", lambda self: np.full((12, 12, 3), 100 * self.side, np.uint8))
    args = klac_discrete.Args(env_id="GreyFloats-v0")
    monkeypatch.setattr(tests.envs.Grey, "__init__", lambda self, **_: setattr(self, "observation_space", space))
    env = klac_discrete.make_env(args)
    buffer = klac_discrete.ReplayBuffer(4, env, torch.device("cpu"))
    obs, _ = env.reset(seed=0)
    assert obs.dtype == np.float32
    buffer.add(obs, 0, 0.0, obs, False)
    stored = buffer.sample(1, np.random.default_rng(0)).obs
    acted = klac_discrete.preprocess(torch.as_tensor(obs[None]))
    assert torch.equal(stored, acted)
    assert acted.max() in (0, 100)


def test_a_run_whose_folder_others_ask_for_ends_unharmed(scalars):
    """Others that come while it runs, and one that came at the same moment."""
    env_id = f"tests.envs:{SCRIPTS['sac_discrete'][0]}"
    whole = trained("sac_discrete", env_id, total_timesteps=800)
    command = command_of("sac_discrete", "--resume", run_name="shared")
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **SETTING) for _ in range(2)]
    while not Path("runs/shared/args.json").exists():
        assert None in [process.poll() for process in pair]
        time.sleep(0.01)
    holder = int(Path("runs/shared/lock").read_text().split()[1])
    os.kill(holder, signal.SIGSTOP)  # so that the third certainly comes while it runs
    third = subprocess.run(command, **SETTING, capture_output=True, check=False)
    os.kill(holder, signal.SIGCONT)
    assert (third.returncode, third.stderr.count("\n")) == (2, 1)
    assert f"--run-name shared: process {holder} on {socket.gethostname()} is running it" in third.stderr
    errors = {process.pid: process.communicate(timeout=60)[1] for process in pair}
    assert {process.pid == holder: process.returncode for process in pair} == {True: 0, False: 2}
    assert errors.pop(holder) == ""
    (error,) = errors.values()
    assert f"process {holder} on " in error
    same_run(scalars, whole, Path("runs/shared"))


def test_a_refused_run_leaves_its_folder_free_in_this_process_too(monkeypatch):
    args, kept = unfinished(sac_discrete), []  # as a notebook keeps the last exception
    path = Path("runs/unfinished/checkpoint.pt")
    sound = path.read_bytes()

    def refused(words, **flags):
        with pytest.raises(sac_discrete.UsageError, match=words) as error:
            sac_discrete.train(replace(args, **flags))
        kept.append(error)

    refused("--gamma", gamma=0.5)
    path.write_bytes(sound[:-100])
    refused("unreadable")
    state = torch.load(io.BytesIO(sound), weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "q_optimizer"}, path)
    refused("not of this script")
    path.write_bytes(sound)
    monkeypatch.setenv("WANDB_MODE", "bogus")
    refused("--track", track=True)
    assert len(kept) == 4
    assert sac_discrete.train(args).exists()


@pytest.mark.parametrize("name", ["x" * 300, "unlockable"])
def test_a_folder_that_cannot_be_had_is_refused_in_one_line(run_script, name):
    Path("runs/unlockable/lock").mkdir(parents=True)
    code, _, err = run_script("sac_discrete", "--env-id", "Walk-v0", "--run-name", name, *FLAGS, "--resume")
    assert (code, err.count("\n")) == (2, 1), err
    assert f"--run-name {name}: " in err


def test_a_file_system_without_locks_is_told_from_a_second_process(run_script, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    code, _, err = run_script("sac_discrete", "--env-id", "Walk-v0", "--run-name", "it", *FLAGS)
    assert (code, err.count("\n")) == (2, 1)
    assert "--run-name it: it cannot be locked: [Errno 38] Function not implemented" in err


def test_a_lock_held_by_another_process_is_refused_in_this_one():
    args = sac_discrete.Args(env_id="Walk-v0", run_name="held", resume=True, **TINY)
    Path("runs/held").mkdir(parents=True)
    with Path("runs/held/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(sac_discrete.UsageError, match="--run-name held: another process is running it"):
            sac_discrete.train(args)
    assert sac_discrete.train(args).exists()
    assert sac_discrete.train(args).exists()  # a finished run lets go of its lock


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_is_obeyed_too(number):
    def stopped_early():
        real = sac_discrete.film
        sac_discrete.film = lambda *a: (os.kill(os.getpid(), number), real(*a))[1]
        with pytest.raises(KeyboardInterrupt):
            sac_discrete.train(sac_discrete.Args(env_id="Walk-v0", run_name="it", **TINY))
        assert 0 < torch.load("runs/it/checkpoint.pt", weights_only=True)["step"] <= 8

    assert in_a_child(stopped_early) == 0


def test_a_run_under_nohup_goes_on_when_the_terminal_is_closed():
    command = command_of("sac_discrete", run_name="it")
    kept = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **SETTING, **kept)
    assert "from step 0" in process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert Path("runs/it/actor.pt").exists()


def test_a_run_whose_terminal_is_closed_saves_itself(monkeypatch):
    """With the bar on that terminal, and a run that has long to go."""
    command = command_of(
        "sac_discrete", "--total-timesteps", "1000000", "--checkpoint-interval", "100000", run_name="it"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
        os.execv(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    shown, deadline = b"", time.time() + 120
    while b"step/s, return" not in shown and time.time() < deadline:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP, shown
    assert torch.load("runs/it/checkpoint.pt", weights_only=True)["step"] > 0


@pytest.mark.parametrize("merged", [True, False])
def test_ctrl_c_saves_the_run_though_whatever_read_its_output_is_gone(merged):
    """As tee is, which the same Ctrl-C ends."""
    flags = ["--total-timesteps", "1000000", "--checkpoint-interval", "1000000"]
    command = command_of("sac_discrete", *flags, run_name="it")
    errors = subprocess.STDOUT if merged else subprocess.PIPE
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, **SETTING)
    while "steps/s" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    assert torch.load("runs/it/checkpoint.pt", weights_only=True)["step"] > 0


def test_ctrl_c_that_ends_the_compiler_too_stops_the_run_as_ever(monkeypatch, run_script):
    """As from a terminal, whose whole process group it reaches."""

    def compile_and_be_stopped(function, **_):
        def compiled(*_):
            os.kill(os.getpid(), signal.SIGINT)
            raise torch._inductor.exc.CppCompileError(["g++"], "")

        return function if function is torch.sin else compiled

    monkeypatch.setattr(torch, "compile", compile_and_be_stopped)
    flags = ["--env-id", "Walk-v0", "--run-name", "it", "--total-timesteps", "300", "--learning-starts", "100"]
    code, out, err = run_script("sac_discrete", *flags)
    assert code == 128 + signal.SIGINT
    assert out.endswith("runs/it: stopped; the same command with --resume goes on from step 0\n")
    assert err == "stopping at the end of this episode; once more to stop now\n"


def test_a_run_whose_log_is_on_a_full_disk_goes_on():
    with open("/dev/full", "w") as full:
        command = command_of("sac_discrete", *BRIEF, "--log-interval", "1", run_name="it")
        process = subprocess.Popen(command, stdout=full, stderr=subprocess.PIPE, **SETTING)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert Path("runs/it/actor.pt").exists()


def test_a_run_without_standard_error_trains():
    command = ["bash", "-c", 'exec "$@" 2>&-', "bash", *command_of("sac_discrete", *BRIEF, run_name="it")]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=False, **SETTING)
    assert result.returncode == 0
    assert "deterministic return" in result.stdout


def test_train_called_in_a_notebook_saves_on_ctrl_c_and_gives_the_handlers_back():
    def in_a_notebook():
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        module = klac_discrete
        real, calls = module.Run.log_episode, []

        def log_episode(self, *a):
            real(self, *a)
            calls.append(0)
            if len(calls) == 60:
                os.kill(os.getpid(), signal.SIGINT)

        module.Run.log_episode = log_episode
        with pytest.raises(KeyboardInterrupt):
            module.train(module.Args(env_id="Walk-v0", run_name="it", **TINY | {"checkpoint_interval": 10**6}))
        assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        assert torch.load("runs/it/checkpoint.pt", weights_only=True)["step"] > 0
        assert module.train(module.Args(env_id="Walk-v0", run_name="it", resume=True, **TINY)).exists()

    assert in_a_child(in_a_notebook) == 0


def test_a_flipped_bit_in_a_checkpoint_is_seen(run_script):
    unfinished(sac_discrete)
    path = Path("runs/unfinished/checkpoint.pt")
    whole, generator = path.read_bytes(), random.Random(0)
    expected = numbers_in(torch.load(path, weights_only=True))
    seen = 0
    for _ in range(60):
        place = generator.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            state = sac_discrete.load(path.parent)
        except sac_discrete.UsageError:
            seen += 1
        else:  # it was padding
            found = numbers_in(state)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value, name
    assert seen > 50
    path.write_bytes(whole)
    assert run_script("sac_discrete", "--env-id", "Walk-v0", "--run-name", "unfinished", "--resume", *FLAGS)[0] == 0


def lacking(state, name):
    del state[name]


@pytest.mark.parametrize("change", [
    lambda state: lacking(state, "q_optimizer"),
    lambda state: lacking(state, "hours"),
    lambda state: lacking(state, "rng"),
    lambda state: state.update(step=0),
    lambda state: state.update(step=-5),
    lambda state: state.update(step=10**9),
    lambda state: state.update(step="many"),
    lambda state: state.update(step=1.5),
    lambda state: state.update(step=True),
    lambda state: state["actor"].update(w3=torch.zeros(1, 128, 9)),
])  # fmt: skip
def test_a_checkpoint_that_is_not_this_run_s_is_refused(run_script, change):
    unfinished(sac_discrete)
    path = Path("runs/unfinished/checkpoint.pt")
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    code, _, err = run_script("sac_discrete", "--env-id", "Walk-v0", "--run-name", "unfinished", "--resume", *FLAGS)
    assert (code, err.count("\n")) == (2, 1), err
    assert "checkpoint.pt: not of this script and task" in err


def test_a_checkpoint_of_another_number_of_actions_is_refused(run_script, monkeypatch):
    unfinished(sac_discrete)
    monkeypatch.setattr(tests.envs.Walk, "action_space", gym.spaces.Discrete(4))
    code, _, err = run_script("sac_discrete", "--env-id", "Walk-v0", "--run-name", "unfinished", "--resume", *FLAGS)
    assert (code, err.count("\n")) == (2, 1), err
    assert "checkpoint.pt: not of this script and task" in err


@pytest.mark.parametrize(("name", "other"), SIBLINGS)
def test_a_checkpoint_of_another_script_is_refused_whatever_its_name(run_script, name, other):
    module, env_id = importlib.import_module(name), SCRIPTS[name][0]
    unfinished(module, exp_name="mine", env_id=env_id)
    before = {path: path.read_bytes() for path in Path("runs/unfinished").iterdir() if path.name != "lock"}
    flags = ["--env-id", env_id, "--run-name", "unfinished", "--resume", "--exp-name", "mine", *FLAGS]
    code, _, err = run_script(other, *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert "runs/unfinished was started with --" in err
    assert before == {path: path.read_bytes() for path in Path("runs/unfinished").iterdir() if path.name != "lock"}


def test_a_clock_that_stands_still_gives_no_error_and_no_negative_speed(scalars, monkeypatch):
    backward = iter(range(10**9, 0, -1))
    for clock in (lambda: 5.0, lambda: float(next(backward))):
        monkeypatch.setattr(klac_discrete.time, "perf_counter", clock)
        run_dir = klac_discrete.train(klac_discrete.Args(env_id="Walk-v0", **TINY))
        assert all(speed >= 0 for _, speed in scalars(run_dir)["charts/SPS"])


@pytest.mark.parametrize("reason", ["InvalidCxxCompiler: No working C++ compiler found", ""])
def test_without_a_compiler_a_run_says_so_is_eager_and_stays_so(monkeypatch, capsys, reason):
    def no_compiler(*_, **__):
        raise RuntimeError(reason)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", no_compiler)
        args = unfinished(klac_discrete, compile=True)
    err = capsys.readouterr().err
    assert err == f"not compiled, and slower: {reason}\n"
    assert json.loads(Path("runs/unfinished/args.json").read_text())["compile"] is False
    monkeypatch.setattr(
        klac_discrete.Run, "compile", lambda self, *f: pytest.fail("compiled") if self.args.compile else f
    )
    assert klac_discrete.train(args).exists()


def test_a_machine_without_a_compiler_runs_the_script_eagerly():
    """As the script's own process meets it, with nothing in torch's cache."""
    command = [part for part in command_of("klac_discrete", *BRIEF, run_name="it") if part != "--no-compile"]
    nothing = {"PATH": "/nonexistent", "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(Path("cache").resolve())}
    setting = SETTING | {"env": SETTING["env"] | nothing}
    result = subprocess.run(command, **setting, capture_output=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (0, 1), result.stderr
    assert result.stderr.startswith("not compiled, and slower: ")
    assert "compiling" not in result.stdout
    assert json.loads(Path("runs/it/args.json").read_text())["compile"] is False


def test_a_finished_run_needs_no_compiler_to_say_so(monkeypatch, capsys):
    run_dir = trained("sac_discrete", "Walk-v0")
    state = torch.load(run_dir / "actor.pt", weights_only=True)
    state["args"]["compile"] = True
    torch.save(state, run_dir / "actor.pt")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("tried"))
    flags = TINY | {"compile": True, "resume": True}
    assert sac_discrete.train(sac_discrete.Args(env_id="Walk-v0", run_name="Walk-v0", **flags)) == run_dir
    assert "finished already" in capsys.readouterr().out


def test_a_run_that_was_compiled_is_not_resumed_eagerly(run_script):
    args = unfinished(sac_discrete)
    state = torch.load("runs/unfinished/checkpoint.pt", weights_only=True)
    state["args"]["compile"] = True
    torch.save(state, "runs/unfinished/checkpoint.pt")
    assert args.compile is False
    code, _, err = run_script("sac_discrete", "--env-id", "Walk-v0", "--run-name", "unfinished", "--resume", *FLAGS)
    assert (code, err.count("\n")) == (2, 1)
    assert err.rstrip().endswith("was started with --compile True, not False")


def test_the_rows_that_a_full_disk_refuses_are_written_when_there_is_space():
    args = sac_discrete.Args(env_id="Walk-v0", run_name="it", **TINY)
    with sac_discrete.Run(args, "SAC", sac_discrete.make_env(args)) as run:
        run.start({}, None, None, None)

        class Full:
            def write(self, data):
                raise OSError(28, "No space left on device")

            def __getattr__(self, name):
                return getattr(real, name)

        real, run.csv = run.csv, Full()
        run.log(1, {"a": 0.5})
        run.next_flush = 0
        run.log(2, {"a": 0.25})
        run.csv = real
    assert Path("runs/it/scalars.csv").read_text() == "step,tag,value\n1,a,0.5\n2,a,0.25\n"


def test_wandb_has_no_row_that_scalars_csv_lacks():
    """A resumed run asks scalars.csv what W&B has: so a kill between the two may cost a row there, not double it."""
    args = sac_discrete.Args(env_id="Walk-v0", run_name="it", **TINY)
    sent, rows = [], Path("runs/it/scalars.csv")
    with sac_discrete.Run(args, "SAC", sac_discrete.make_env(args)) as run:
        run.start({}, None, None, None)
        run.tracked_step, run.next_flush = 1, float("inf")
        run.wandb = SimpleNamespace(
            log=lambda _, step: sent.append((step, rows.read_text().splitlines()[-1])), finish=lambda exit_code: None
        )
        for step in (1, 2, 3):
            run.log(step, {"a": 0.5})
    assert sent == [(2, "2,a,0.5"), (3, "3,a,0.5")]


@pytest.mark.usefixtures("wandb_here")
@pytest.mark.parametrize("dies", ["all", "clips"])
def test_wandb_s_process_or_its_disk_may_fail_without_the_run(monkeypatch, scalars, capsys, dies):
    sent = []

    def log(data, step):
        if step > 300 and (dies == "all" or any("videos" in key for key in data)):
            raise ConnectionResetError(104, "Connection reset by peer")
        sent.extend((step, tag) for tag in data)

    def finish(exit_code):
        raise ConnectionResetError(104, "Connection reset by peer")

    here = SimpleNamespace(define_metric=lambda *a, **k: None, log=log, finish=finish)
    monkeypatch.setattr(wandb, "init", lambda **settings: here)
    monkeypatch.setattr(wandb, "Video", lambda path, format: path)
    logged = scalars(trained("sac_discrete", "CartPole-v1", track=True, capture_video=True, total_timesteps=500))
    assert max(step for step, _ in logged["charts/episodic_return"]) > 300
    lines = [line for line in capsys.readouterr().err.splitlines() if "W&B" in line]
    rows = {(step, tag) for tag, values in logged.items() for step, _ in values}
    assert rows - set(sent) == {row for row in rows if dies == "all" and row[0] > 300}
    if dies == "all":
        (line,) = lines
        assert "W&B, to which no more is sent: " in line
    else:
        *clips, end = lines
        assert clips
        assert all("clips for W&B: " in line for line in clips)
        assert "/CartPole-v1: W&B: not written" in end


@pytest.mark.usefixtures("wandb_here")
def test_wandb_gets_no_step_twice_from_a_run_that_was_killed_twice(monkeypatch):
    args = sac_discrete.Args(env_id="Walk-v0", run_name="it", resume=True, track=True, **TINY)
    args.checkpoint_interval, sent, last = 150, [], []
    here = SimpleNamespace(define_metric=lambda *a, **k: None, finish=lambda exit_code: None)
    here.log = lambda data, step: sent.extend((step, tag) for tag in data if tag != "global_step")
    monkeypatch.setattr(wandb, "init", lambda **settings: here)
    real = sac_discrete.Run.log

    def log(run, step, values):
        real(run, step, values)
        if step >= last[-1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(sac_discrete.Run, "log", log)
    for step in (290, 160):  # the second one ends before the first one did
        last.append(step)
        with pytest.raises(KeyboardInterrupt):
            sac_discrete.train(args)
        assert 140 < torch.load("runs/it/checkpoint.pt", weights_only=True)["step"] < 160
    monkeypatch.setattr(sac_discrete.Run, "log", real)
    sac_discrete.train(args)
    assert len(sent) > 200
    assert len(set(sent)) == len(sent)


def test_a_run_that_is_not_finished_is_no_reference(run_script):
    """Resumed, the run would take another policy for q than it began with."""
    unfinished(klac_discrete)
    code, _, err = run_script("klac_discrete", "--env-id", "Walk-v0", "--reference", "runs/unfinished", *FLAGS)
    assert (code, err.count("\n")) == (2, 1), err
    assert "--reference runs/unfinished: must be an earlier run's" in err
    assert err.endswith("the run is not finished\n")


@pytest.mark.usefixtures("wandb_here")
@pytest.mark.parametrize(
    ("was_tracked", "since_its_checkpoint"), [(True, True), (False, False), (False, True), (True, False)]
)
def test_a_run_that_was_not_tracked_so_far_sends_wandb_all_since_its_checkpoint(
    monkeypatch, was_tracked, since_its_checkpoint
):
    """Of one that was, before its checkpoint or by the process that was killed after it, the rows in scalars.csv are
    there."""
    args = unfinished(sac_discrete)
    written = Path("runs/unfinished/args.json")
    written.write_text(json.dumps(json.loads(written.read_text()) | {"track": since_its_checkpoint}))
    saved, rows = torch.load("runs/unfinished/checkpoint.pt", weights_only=True), Path("runs/unfinished/scalars.csv")
    saved["args"]["track"] = was_tracked
    torch.save(saved, "runs/unfinished/checkpoint.pt")
    rows.write_text(rows.read_text() + f"{args.total_timesteps - 1},charts/episodic_return,1\n")
    sent = []
    here = SimpleNamespace(define_metric=lambda *a, **k: None, finish=lambda exit_code: None)
    here.log = lambda scalars, step: sent.append(step)
    monkeypatch.setattr(wandb, "init", lambda **settings: here)
    sac_discrete.train(replace(args, track=True))
    assert sent
    assert (min(sent) < args.total_timesteps - 1) == (not since_its_checkpoint)


def test_a_checkpoint_knows_its_rows_when_the_disk_was_full_before_it(monkeypatch):
    args, ready, sizes = unfinished(sac_discrete), [], []
    rows, checkpoint = Path("runs/unfinished/scalars.csv"), Path("runs/unfinished/checkpoint.pt")
    rows.write_text(rows.read_text() + "100000,lost,1\n" * 500)  # logged after the checkpoint

    def flush(self):
        if not ready:
            raise OSError(28, "No space left on device")
        real_flush(self)

    def save(self):
        ready.append(True)
        real_save(self)
        sizes.append((torch.load(checkpoint, weights_only=True)["csv_size"], rows.stat().st_size))

    real_flush, real_save = sac_discrete.Run.flush, sac_discrete.Run.save
    monkeypatch.setattr(sac_discrete.Run, "flush", flush)
    monkeypatch.setattr(sac_discrete.Run, "save", save)
    sac_discrete.train(args)
    assert sizes
    assert all(known == size for known, size in sizes)


def test_a_disk_that_is_full_for_a_while_costs_no_row(scalars):
    whole = trained("sac_discrete", "Walk-v0")

    def train_on_a_disk_that_is_full_for_a_while():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
        real, calls = sac_discrete.Run.save, []

        def save(self):
            calls.append(Path("runs/full/scalars.csv").stat().st_size)
            if len(calls) == 5:
                assert max(calls) <= 2_000
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            real(self)

        sac_discrete.Run.save = save
        sac_discrete.train(sac_discrete.Args(env_id="Walk-v0", run_name="full", **TINY))

    assert in_a_child(train_on_a_disk_that_is_full_for_a_while) == 0
    same_run(scalars, whole, Path("runs/full"))


def test_a_run_is_not_finished_before_its_rows_are_written(scalars, monkeypatch):
    args = unfinished(sac_discrete)

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    def finish(self, **networks):
        self.csv.close()
        self.csv = Full()
        real(self, **networks)

    real = sac_discrete.Run.finish
    with monkeypatch.context() as patch:
        patch.setattr(sac_discrete.Run, "finish", finish)
        with pytest.raises(OSError, match="No space left on device"):
            sac_discrete.train(args)
    assert not Path("runs/unfinished/actor.pt").exists()
    assert len(scalars(sac_discrete.train(args))["eval/episodic_return"]) == 1


def test_a_buffer_beyond_the_memory_says_what_fits(run_script):
    code, _, err = run_script("sac_continuous", "--env-id", "Humanoid-v5", "--buffer-size", "2000000000", *SHORT[:4])
    assert (code, err.count("\n")) == (2, 1)
    fits = int(err.split("at most ")[1].split()[0])
    args = sac_continuous.Args(env_id="Humanoid-v5", buffer_size=fits // 2)
    sac_continuous.check_memory(args, sac_continuous.make_env(args))
    assert fits * 2 * 348 * 4 < 10**12  # bytes: of this machine's order


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/job_7/step_0", {"job_7/step_0/memory.max": "max", "job_7/memory.max": "4000000"}, 4_000_000),  # SLURM
        ("0::/", {"memory.max": "5000000"}, 5_000_000),  # Docker
        ("4:memory:/docker/c0", {"memory/memory.limit_in_bytes": "6000000"}, 6_000_000),  # of version 1
        ("4:memory:/job:7", {"memory/job:7/memory.limit_in_bytes": "7000000"}, 7_000_000),
        ("0::/", {"memory.max": "9000000000"}, 8_192_000),
    ],
)
def test_the_memory_is_the_machines_or_the_containers_or_the_jobs(tmp_path, monkeypatch, own, limits, expected):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemFree: 1 kB\nMemAvailable:    8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(f"1:cpu:/elsewhere\n{own}\n")
    for name, limit in limits.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    monkeypatch.setattr(sac_continuous, "Path", lambda root, *parts: Path(f"{tmp_path}{root}", *parts))
    assert sac_continuous.memory_limit() == expected


def test_where_nothing_says_how_much_memory_there_is_any_buffer_is_begun(tmp_path, monkeypatch):
    args = sac_continuous.Args(env_id="Pendulum-v1")
    env = sac_continuous.make_env(args)
    monkeypatch.setattr(sac_continuous, "Path", lambda root, *parts: Path(f"{tmp_path}{root}", *parts))  # as on macOS
    assert sac_continuous.memory_limit() == float("inf")
    sac_continuous.check_memory(args, env)


@pytest.mark.slow
def test_mujoco_is_filmed_without_a_display():
    """Whether there is none, or one that is gone, as after ssh -X."""
    if not importlib.util.find_spec("mujoco") or not sac_continuous.ctypes.util.find_library("EGL"):
        pytest.skip("no EGL here")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MUJOCO_GL": "", "DISPLAY": ":77"}
    command = [sys.executable, str(ROOT / "sac_continuous.py"), "--env-id", "Hopper-v5", "--capture-video", *SHORT]
    command += ["--total-timesteps", "60", "--learning-starts", "50", "--eval-episodes", "1", "--run-name", "it"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "EGL" in result.stderr:
        pytest.skip("EGL does not work here")
    assert result.returncode == 0, result.stderr
    assert list(Path("runs/it/videos/train").glob("*.mp4"))


def test_a_policy_that_is_not_finite_is_not_taken_for_the_environment():
    """Its last update may break it while that update's loss is still finite."""
    env = sac_continuous.make_env(sac_continuous.Args(env_id="Drift-v0"))
    env.reset(seed=1)
    with pytest.raises(sac_continuous.NotFinite, match="the policy's action is not finite"):
        env.step(np.full(env.action_space.shape, np.nan, np.float32))
    actor, _ = sac_continuous.make_networks(sac_continuous.Args(), env)
    for weights in actor.parameters():
        weights.fill_(torch.nan)
    assert sac_continuous.exploit_probability(actor, torch.zeros(1, *env.observation_space.shape), 0.25).isnan()


def test_a_box_of_halves_is_measured_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        sac_continuous.make_env(sac_continuous.Args(env_id="ContinuousOddStrictFloat16-v0"))
