"""What an environment, a disk, a second process or a person can do to a run, and what the run then does."""

import fcntl
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import klac_discrete
import sac_continuous
import sac_discrete
import tests.envs
from tests.test_resume import FLAGS, TINY, in_a_child, unfinished
from tests.test_runs import SCRIPTS, SHORT

ROOT = Path(__file__).parent.parent
SETTING = {"env": os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, "text": True}


def odd(name, kind):
    return f"{'Continuous' if 'continuous' in name else ''}Odd{kind}-v0"


def trained(name, env_id, **flags):
    module = importlib.import_module(name)
    return module.train(module.Args(env_id=env_id, run_name=env_id, **TINY | flags))


def networks_of(run_dir):
    saved = torch.load(run_dir / "actor.pt", weights_only=True)
    return {f"{part} {name}": value for part in ("actor", "critics") for name, value in saved[part].items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_how_an_environment_hands_over_its_observation_changes_nothing(name):
    """Its own array, overwritten at the next step; a list; a view with a negative stride."""
    plain = networks_of(trained(name, odd(name, "Plain")))
    for kind in ("Alias", "List"):
        other = networks_of(trained(name, odd(name, kind)))
        assert all(torch.equal(plain[key], other[key]) for key in plain), kind
    assert trained(name, odd(name, "View")).exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_observation_of_another_shape_is_refused_with_both(run_script, name):
    code, _, err = run_script(name, "--env-id", odd(name, "Row"), *SHORT)
    assert (code, err.count("\n")) == (2, 1)
    assert "(1, 2)" in err
    assert "(2,)" in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(("env_id", "words"), [
    ("GreyBytes-v0", ["float32 (12, 12, 3)", "uint8"]),
    ("GreyFirst-v0", ["(3, 24, 32)", "channels last", "gymnasium.wrappers.TransformObservation"]),
    ("GreyStack-v0", ["(4, 210, 160)", "gymnasium.wrappers.TransformObservation"]),
    ("OddTwoRewards-v0", ["one number", "array(["]),
])  # fmt: skip
def test_what_the_spaces_do_not_promise_is_refused(run_script, env_id, words):
    code, _, err = run_script("sac_discrete", "--env-id", env_id, *SHORT)
    assert (code, err.count("\n")) == (2, 1), err
    assert all(word in err for word in words), err
    assert not Path("runs").exists()


def test_an_observation_beyond_its_bounds_is_refused(run_script, monkeypatch):
    monkeypatch.setattr(tests.envs.Grey, "_observe", lambda self: np.full((12, 12, 3), 3.0, np.float32))
    code, _, err = run_script("sac_discrete", "--env-id", "GreyFloats-v0", *SHORT)
    assert code == 2
    assert "observes 3.0 to 3.0, its space is Box(0.0, 1.0" in err


def test_floats_under_a_float_space_are_learnt(scalars):
    args = sac_discrete.Args(env_id="GreyFloats-v0", total_timesteps=2_000, learning_starts=300, batch_size=32)
    args.compile, args.update_frequency, args.target_network_frequency = False, 1, 100
    assert scalars(sac_discrete.train(args))["eval/episodic_return"][0][1] == 5


def test_action_spaces_of_any_width_and_start_work(monkeypatch):
    assert trained("sac_discrete", "OddInt8-v0").exists()
    made, real = [], klac_discrete.make_gym
    monkeypatch.setattr(klac_discrete, "make_gym", lambda *a: made.append(real(*a)) or made[-1])
    stored, add = [], klac_discrete.ReplayBuffer.add
    monkeypatch.setattr(klac_discrete.ReplayBuffer, "add", lambda self, *t: stored.append(t[1]) or add(self, *t))
    trained("klac_discrete", "OddStart-v0")
    seen = made[0].unwrapped.seen[1:]  # the first is that of the check
    assert set(stored) == {0, 1, 2}
    assert [action + 2 for action in stored] == seen[: len(stored)]


@pytest.mark.parametrize(("kind", "words"), [("Nan", "observation is not finite"), ("InfiniteReward", "reward is inf")])
@pytest.mark.parametrize("name", ["klac_discrete", "sac_continuous"])
def test_a_number_that_is_not_finite_stops_the_run_at_its_step(run_script, name, kind, words):
    env_id = odd(name, kind)
    code, _, err = run_script(name, "--env-id", env_id, "--run-name", "it", *FLAGS)
    assert (code, err.count("\n")) == (1, 1), err
    assert words in err
    step = int(err.split("at step ")[1].split(";")[0])
    state = torch.load("runs/it/checkpoint.pt", weights_only=True)
    assert err.endswith(f"; the last checkpoint is of step {state['step']}\n")
    assert step - 60 < state["step"] <= step
    numbers = [*state["columns"], *state["actor"].values(), *state["critics"].values()]
    assert all(torch.isfinite(part).all() for part in numbers)
    code, out, err = run_script(name, "--env-id", env_id, "--run-name", "it", "--resume", *FLAGS)
    assert f"from step {state['step']}" in out
    assert f"at step {step};" in err  # it is the same episode again


def test_an_error_of_the_environment_keeps_its_traceback_and_gains_the_step():
    command = [sys.executable, str(ROOT / "sac_discrete.py"), "--env-id", "tests.envs:OddBrokenPipe-v0", *FLAGS]
    result = subprocess.run([*command, "--run-name", "it"], **SETTING, capture_output=True, check=False)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "envs.py" in result.stderr
    last = result.stderr.strip().splitlines()[-2:]
    assert last[0] == "ConnectionResetError: [Errno 104] Connection reset by peer"
    step = torch.load("runs/it/checkpoint.pt", weights_only=True)["step"]
    assert last[1].startswith("at step ")
    assert last[1].endswith(f"the last checkpoint is of step {step}")


@pytest.mark.parametrize("prefix", ["", "tests.envs:"])
def test_an_environment_that_cannot_be_made_says_where(run_script, prefix):
    code, _, err = run_script("sac_discrete", "--env-id", f"{prefix}Refuses-v0", *SHORT)
    assert (code, err.count("\n")) == (2, 1)
    assert "AssertionError in envs.py, line " in err
    assert "Nearest" not in err
    code, _, err = run_script("sac_discrete", "--env-id", f"{prefix}Refuse-v0", *SHORT)
    assert code == 2
    assert "Nearest ids: Refuses-v0" in err


def command_of(name, *flags, run_name):
    env_id = f"tests.envs:{SCRIPTS[name][0]}"
    return [sys.executable, str(ROOT / f"{name}.py"), "--env-id", env_id, *FLAGS, "--run-name", run_name, *flags]


def test_a_folder_has_one_owner_and_its_lock_dies_with_it():
    flags = ["--resume", "--total-timesteps", "1000000"]
    command = command_of("sac_discrete", *flags, run_name="shared")
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **SETTING)
    assert "from step 0" in first.stdout.readline()
    second = subprocess.run(command, **SETTING, capture_output=True, check=False)
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert f"--run-name shared: process {first.pid} on " in second.stderr
    assert first.poll() is None
    while not Path("runs/shared/checkpoint.pt").exists():
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
    _, err = third.communicate(timeout=60)
    assert third.returncode == 129, err
    assert torch.load("runs/shared/checkpoint.pt", weights_only=True)["step"] > int(line.split("from step ")[1])


def test_a_lock_held_by_another_process_is_refused_in_this_one():
    args = sac_discrete.Args(env_id="Walk-v0", run_name="held", resume=True, **TINY)
    Path("runs/held").mkdir(parents=True)
    with Path("runs/held/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(sac_discrete.UsageError, match="--run-name held: another process is running it"):
            sac_discrete.train(args)
    assert sac_discrete.train(args).exists()
    assert sac_discrete.train(args).exists()  # a finished run lets go of its lock


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
    expected = sac_discrete.load(path.parent)
    columns = [column.clone() for column in expected["columns"]]
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
            assert all(torch.equal(a, b) for a, b in zip(columns, state["columns"], strict=True))
            for part in ("actor", "critics", "target_critics"):
                assert all(torch.equal(expected[part][name], value) for name, value in state[part].items())
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


def test_a_checkpoint_of_another_algorithm_is_refused_whatever_its_name(run_script):
    unfinished(sac_discrete, exp_name="mine")
    flags = ["--env-id", "Walk-v0", "--run-name", "unfinished", "--resume", "--exp-name", "mine", *FLAGS]
    code, _, err = run_script("klac_discrete", *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert "runs/unfinished was started with --" in err


def test_a_clock_that_stands_still_gives_no_error_and_no_negative_speed(scalars, monkeypatch):
    backward = iter(range(10**9, 0, -1))
    for clock in (lambda: 5.0, lambda: float(next(backward))):
        monkeypatch.setattr(klac_discrete.time, "perf_counter", clock)
        run_dir = klac_discrete.train(klac_discrete.Args(env_id="Walk-v0", **TINY))
        assert all(speed >= 0 for _, speed in scalars(run_dir)["charts/SPS"])


def test_without_a_compiler_a_run_says_so_is_eager_and_stays_so(monkeypatch, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", no_compiler)
        args = unfinished(klac_discrete, compile=True)
    err = capsys.readouterr().err
    assert err == "not compiled, and slower: InvalidCxxCompiler: No working C++ compiler found\n"
    assert json.loads(Path("runs/unfinished/args.json").read_text())["compile"] is False
    monkeypatch.setattr(
        klac_discrete.Run, "compile", lambda self, *f: pytest.fail("compiled") if self.args.compile else f
    )
    assert klac_discrete.train(args).exists()


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
    run = sac_discrete.Run(args, "SAC", sac_discrete.make_env(args))
    with run:

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


def test_a_buffer_beyond_the_memory_says_what_fits(run_script):
    code, _, err = run_script("sac_continuous", "--env-id", "Humanoid-v5", "--buffer-size", "2000000000", *SHORT[:4])
    assert (code, err.count("\n")) == (2, 1)
    fits = int(err.split("at most ")[1].split()[0])
    args = sac_continuous.Args(env_id="Humanoid-v5", buffer_size=fits // 2)
    sac_continuous.check_memory(args, sac_continuous.make_env(args))
    assert fits * 2 * 348 * 4 < 10**12  # bytes: of this machine's order


@pytest.mark.skipif("DISPLAY" in os.environ, reason="there is a display")
def test_mujoco_is_filmed_without_a_display():
    if not importlib.util.find_spec("mujoco") or not sac_continuous.ctypes.util.find_library("EGL"):
        pytest.skip("no EGL here")
    environment = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "sac_continuous.py"), "--env-id", "Hopper-v5", "--capture-video", *SHORT]
    result = subprocess.run(
        [*command, "--run-name", "it"], env=environment, capture_output=True, text=True, check=False
    )
    if "EGL" in result.stderr:
        pytest.skip("EGL does not work here")
    assert result.returncode == 0, result.stderr
    assert list(Path("runs/it/videos/train").glob("*.mp4"))
