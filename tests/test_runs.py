"""What a run does beside learning: reproducibility, files, logging and refusals, as its user meets them."""

import ast
import fcntl
import importlib
import io
import json
import os
import pty
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import gymnasium as gym
import imageio.v3
import numpy as np
import pytest
import torch
import wandb
import wandb.proto.wandb_internal_pb2 as wandb_records

import klac_continuous
import klac_discrete
from tests.conftest import main, two_of

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "klac_discrete.py"  # where the scripts share the code, one of them stands for all (see test_family.py)
# Each script with a task of the tests and one that a user would name
SCRIPTS = {
    "klac_discrete": ("Walk-v0", "Breakout-v1"),
    "sac_discrete": ("Walk-v0", "Breakout-v1"),
    "klac_continuous": ("Drift-v0", "Pendulum-v1"),
    "sac_continuous": ("Drift-v0", "Pendulum-v1"),
    "sac_adaent_continuous": ("Drift-v0", "Pendulum-v1"),
    "sac_v_continuous": ("Drift-v0", "Pendulum-v1"),
}
GAMES = ["Breakout-v1", "Asterix-v1", "Seaquest-v1", "Freeway-v1", "SpaceInvaders-v1"]
SHORT = ["--total-timesteps", "400", "--learning-starts", "100", "--target-network-frequency", "50"]
SHORT += ["--log-interval", "50", "--eval-episodes", "2", "--batch-size", "16", "--buffer-size", "1000", "--no-compile"]


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *flags: main("klac_discrete", *flags, monkeypatch=monkeypatch, capsys=capsys)


def actor_of(run_dir):
    return torch.load(run_dir / "actor.pt", weights_only=True)["actor"]


@pytest.mark.parametrize("name", two_of(SCRIPTS))
@pytest.mark.parametrize("task", [0, 1])
def test_same_seed_same_numbers_to_the_bit(scalars, name, task):
    module = importlib.import_module(name)

    def numbers(seed):
        args = module.Args(
            env_id=SCRIPTS[name][task], seed=seed, total_timesteps=450, learning_starts=200, buffer_size=300
        )
        args.log_interval, args.eval_episodes, args.target_network_frequency, args.batch_size = 4, 2, 50, 16
        args.compile = False
        run_dir = module.train(args)
        logged = scalars(run_dir)
        assert logged.pop("charts/SPS")
        assert logged.pop("charts/hours")
        assert len(logged["losses/qf1_loss"]) > 50  # crosses the warm-up, updates and copies of the targets
        return actor_of(run_dir), logged

    (actor, logged), (actor_again, logged_again), (other, _) = numbers(3), numbers(3), numbers(4)
    assert logged == logged_again
    assert all(torch.equal(actor[key], actor_again[key]) for key in actor)
    assert not any(torch.equal(actor[key], other[key]) for key in actor if key.startswith("w"))


@pytest.mark.parametrize("env_id", GAMES)
def test_minatar_episode_depends_on_its_seed_alone(env_id):
    def episode(env, seed, steps=300):
        obs, _ = env.reset(seed=seed)
        trace, actions = [obs.copy()], np.random.default_rng(seed)
        for _ in range(steps):
            obs, reward, terminated, truncated, _ = env.step(int(actions.integers(env.action_space.n)))
            trace += [obs.copy(), reward]
            if terminated or truncated:
                break
        return trace

    used = klac_discrete.make_env(klac_discrete.Args(env_id=env_id))
    for seed in range(20):
        episode(used, 1000 + seed)
        used.unwrapped.game.last_action = used.unwrapped.action_set[-1]
        fresh = klac_discrete.make_env(klac_discrete.Args(env_id=f"MinAtar/{env_id}"))
        assert all(np.array_equal(a, b) for a, b in zip(episode(used, seed), episode(fresh, seed), strict=True))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_scalar_of_a_run_is_logged(run_script, scalars, name):
    code, out, errors = run_script(name, "--env-id", SCRIPTS[name][0], *SHORT, "--run-name", "mine")
    assert (code, errors) == (0, "")
    assert "runs/mine" in out
    logged = scalars("runs/mine")
    losses = "qf1_values qf2_values qf1_loss qf2_loss qf_loss actor_loss alpha alpha_loss"
    policy = "entropy target_entropy kl target_kl exploit_probability"
    policy += " target_exploit_probability" * name.startswith("klac")
    expected = {f"losses/{x}" for x in losses.split()} | {f"policy/{x}" for x in policy.split()}
    expected |= {f"charts/{x}" for x in ("episodic_return", "episodic_length", "SPS", "hours", "q_minus_return")}
    if "adaent" in name:
        expected |= {"losses/plain_qf_loss", "losses/plain_qf1_loss", "losses/plain_qf1_values", "adaent/similarity"}
        expected |= {"adaent/plain_share"}
        expected |= {"adaent/twin_similarity"}
    if name == "sac_v_continuous":  # its temperature is fixed
        expected -= {"losses/alpha_loss", "policy/target_entropy", "policy/target_kl"}
        expected |= {"losses/vf_loss", "losses/vf_values"}
    assert set(logged) == expected | {"eval/episodic_return"}
    steps = [152, 200, 252, 300, 352] if name.endswith("discrete") else [150, 200, 250, 300, 350]
    assert [step for step, _ in logged["losses/alpha"]] == steps
    log_n = np.array(logged["policy/kl"])[:, 1] + np.array(logged["policy/entropy"])[:, 1]  # or log vol: q is uniform
    np.testing.assert_allclose(log_n, log_n[0], rtol=1e-4)
    if "policy/target_kl" in expected:
        both = np.array(logged["policy/target_kl"])[:, 1] + np.array(logged["policy/target_entropy"])[:, 1]
        np.testing.assert_allclose(both, log_n, rtol=1e-4)
    lengths = [length for _, length in logged["charts/episodic_length"]]
    assert np.cumsum(lengths).tolist() == [step + 1 for step, _ in logged["charts/episodic_length"]]
    config = json.loads(Path("runs/mine/args.json").read_text())
    labels = {"sac_adaent_continuous": "SAC-AdaEnt", "sac_v_continuous": "SAC-V"}
    assert config["algorithm"] == labels.get(name, name.split("_")[0].upper())
    assert config["env_id"] == SCRIPTS[name][0]
    saved = torch.load("runs/mine/actor.pt", weights_only=True)
    assert saved["args"].items() <= config.items()


def test_two_runs_started_in_the_same_second_do_not_collide():
    args = klac_discrete.Args(env_id="Walk-v0", compile=False)
    env, folders = klac_discrete.make_env(args), []
    for _ in range(5):
        with klac_discrete.Run(args, "KLAC", env) as run:
            run.start({}, None, None, None)
            folders.append(run.folder)
    assert sorted(folders) == sorted(Path("runs").iterdir())


@pytest.mark.parametrize("env_id", [*GAMES, "CartPole-v1", "Acrobot-v1"])
def test_every_task_that_the_readme_names_trains(run, env_id):
    code, out, errors = run("--env-id", env_id, *SHORT, "--learning-starts", "200", "--p-start", "0.6")
    assert code == 0
    assert errors == ""
    assert f"KLAC on {env_id}" in out
    assert "deterministic return" in out


BAD_FLAGS = [
    (["--log-interval", "500"], ["--log-interval 500", "at most --total-timesteps 400"]),
    (["--target-network-frequency", "401"], ["--target-network-frequency 401", "at most --total-timesteps 400"]),
    (["--env-id", "no_such_module:Env-v0"], ["--env-id no_such_module:Env-v0"]),
    (["--env-id", ""], ["--env-id"]),
    (["--env-id", "a:b:c"], ["--env-id a:b:c"]),
    (["--env-id", "MultiDiscrete-v0"], ["--env-id MultiDiscrete-v0", "gymnasium.wrappers.TransformAction"]),
    (["--env-kwargs", "oddity"], ["--env-kwargs oddity", "key=value"]),
    (["--env-kwargs", "a b=1"], ["--env-kwargs a b=1", "key=value"]),
    (["--env-kwargs", "a="], ["--env-kwargs a=", "key=value"]),
    (["--env-kwargs", "no_such=1"], ["--env-kwargs no_such=1: TypeError", "no_such"]),
    (["--eval-interval", "401"], ["--eval-interval 401", "at most --total-timesteps 400"]),
    (["--learning-starts", "400"], ["--learning-starts 400", "--total-timesteps 400"]),
    (["--learning-starts", "-1"], ["--learning-starts -1"]),
    (["--batch-size", "65", "--buffer-size", "64"], ["--batch-size 65", "--buffer-size 64"]),
    (["--buffer-size", "9999999999999"], ["--buffer-size 9999999999999", "memory"]),
    (["--buffer-size", "9999999999999", "--no-compile"], ["of memory; at most", "fit"]),
    (["--total-timesteps", "99999999999999999999"], ["--total-timesteps 99999999999999999999", "below 2**62"]),
    *[
        ([f"--{flag}", value], [f"--{flag} {value}", "positive"])
        for flag in ("total-timesteps", "buffer-size", "batch-size", "target-network-frequency", "log-interval",
                     "eval-episodes", "eval-interval")
        for value in ("0", "-3")
    ],
    *[([f"--{flag}", x], [f"--{flag} {x}"]) for flag in ("policy-lr", "q-lr") for x in ("0.0", "-0.1", "inf")],
    (["--gamma", "1.0"], ["--gamma 1.0", "[0, 1)"]),
    (["--gamma", "-0.1"], ["--gamma -0.1", "[0, 1)"]),
    (["--tau", "0.0"], ["--tau 0.0", "(0, 1]"]),
    (["--tau", "1.5"], ["--tau 1.5", "(0, 1]"]),
    (["--alpha", "-1.0"], ["--alpha -1.0", "at least 0"]),
    (["--alpha", "0.5"], ["--alpha 0.5", "with --no-autotune"]),
    (["--evaluate", ""], ["--evaluate"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--exp-name", "a/b"], ["--exp-name a/b", "folder name"]),
    (["--run-name", "../elsewhere"], ["--run-name ../elsewhere", "folder name"]),
    (["--run-name", ".."], ["--run-name ..", "folder name"]),
]  # fmt: skip
BAD_KLAC = [
    (["--p-end", "1.0"], ["--p-end 1.0: must be in ("]),
    (["--p-end", "nan"], ["--p-end nan"]),
    (["--p-start", "0.0"], ["--p-start 0.0: must be in ("]),
    (["--beta", "inf"], ["--beta inf", "finite"]),
    (["--anneal-timesteps", "0"], ["--anneal-timesteps 0", "positive"]),
    (["--reference", "missing.pt"], ["--reference missing.pt", "actor", "nothing is saved there"]),
]
BAD_DISCRETE = [
    (["--env-id", "Sequest-v1"], ["--env-id Sequest-v1", "Seaquest-v1"]),
    (["--env-id", "MinAtar/Pong-v1"], ["--env-id MinAtar/Pong-v1", "Nearest"]),
    (["--env-id", "MinAtar/Sequest-v1"], ["--env-id MinAtar/Sequest-v1", "Nearest ids: MinAtar/Seaquest-v1"]),
    (["--env-id", "MinAtar/Car-v1"], ["--env-id MinAtar/Car-v1", "Nearest ids: MinAtar/Freeway-v1"]),
    (["--env-id", "CartPole-v9"], ["--env-id CartPole-v9", "CartPole-v1"]),
    (["--env-id", "Pendulum-v1"], ["--env-id Pendulum-v1", "ac_continuous.py"]),
    (["--env-id", "Hopper-v4"], ["--env-id Hopper-v4"]),
    (["--env-id", "CartPole-v0", "--gamma", "2.0"], ["--gamma 2.0"]),
    (["--env-id", "OneAction-v0"], ["--env-id OneAction-v0", "n >= 2"]),
    (["--env-id", "TwoDimensional-v0"], ["--env-id TwoDimensional-v0", "flat"]),
    (["--env-id", "TinyImage-v0"], ["--env-id TinyImage-v0", "3 x 3"]),
    (["--env-id", "ChannelsFirst-v0"], ["--env-id ChannelsFirst-v0", "channels last", "TransformObservation"]),
    (["--env-id", "Empty-v0"], ["--env-id Empty-v0", "flat"]),
    (["--env-id", "SequenceObs-v0"], ["--env-id SequenceObs-v0", "flat"]),
    (["--update-frequency", "0"], ["--update-frequency 0", "positive"]),
]
BAD_CONTINUOUS = [
    (["--env-id", "HalfCheeta-v5"], ["--env-id HalfCheeta-v5", "HalfCheetah-v5"]),
    (["--env-id", "CartPole-v1"], ["--env-id CartPole-v1", "ac_discrete.py"]),
    (["--env-id", "UnboundedBox-v0"], ["--env-id UnboundedBox-v0", "bounded", "gymnasium.wrappers.TransformAction"]),
    (["--env-id", "HalfBoundedBox-v0"], ["--env-id HalfBoundedBox-v0", "bounded"]),
    (["--env-id", "FlatBox-v0"], ["--env-id FlatBox-v0", "bounded"]),
    (["--env-id", "ByteBox-v0"], ["--env-id ByteBox-v0", "float"]),
    (["--env-id", "MatrixBox-v0"], ["--env-id MatrixBox-v0", "flat"]),
    (["--env-id", "ContinuousImage-v0"], ["--env-id ContinuousImage-v0", "flat"]),
    (["--policy-frequency", "0"], ["--policy-frequency 0", "positive"]),
    (["--exploit-radius", "0.0"], ["--exploit-radius 0.0", "positive"]),
]
NOT_OF_SAC_V = ["--alpha", "0.5"], ["--policy-frequency", "0"]
BAD_INPUT = [
    pytest.param(name, flags, words, id=" ".join([name, *flags]))
    for name in SCRIPTS
    for flags, words in BAD_FLAGS
    + BAD_KLAC * name.startswith("klac")
    + (BAD_DISCRETE if name.endswith("discrete") else BAD_CONTINUOUS)
    if name != "sac_v_continuous" or flags not in NOT_OF_SAC_V
]
BAD_INPUT += [
    pytest.param("klac_discrete", ["--p-start", "0.2"], ["--p-start 0.2", "(0.3334, 1)"], id="p below 1/n"),
    pytest.param("klac_continuous", ["--exploit-radius", "2.0"], ["2.0: must be in (0.01728, 0.6465)"], id="radius"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "flags", "words"), BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(run_script, name, flags, words):
    code, _, errors = run_script(name, "--env-id", SCRIPTS[name][0], *SHORT, *flags)
    assert code == 2
    assert errors.count("\n") == 1, errors
    assert errors.startswith(f"{name}.py: ")
    assert all(word in errors for word in words), errors
    assert list(Path().iterdir()) == []


def test_what_a_flag_means_is_its_type_not_its_value_s():
    """From Python an int may stand for a float; a name that is a link here is a plain name in runs/."""
    klac_discrete.check_flags(klac_discrete.Args(beta=0, gamma=0, alpha=0, autotune=False))
    klac_continuous.check_flags(klac_continuous.Args(target_entropy=-1))
    with pytest.raises(klac_discrete.UsageError, match=r"--batch-size 0: must be positive"):
        klac_discrete.check_flags(klac_discrete.Args(batch_size=0))
    with pytest.raises(klac_discrete.UsageError, match=r"--eval-interval -1: must be positive"):
        klac_discrete.check_flags(klac_discrete.Args(eval_interval=-1))
    Path("it").symlink_to("elsewhere")
    klac_discrete.check_flags(klac_discrete.Args(run_name="it", exp_name="it"))
    assert klac_discrete.env_kwargs(klac_discrete.Args(env_kwargs=("a={{}}", "b={1: 2}"))) == {"a": "{{}}", "b": {1: 2}}


def test_annealing_flags_do_not_matter_without_annealing(run):
    assert run("--env-id", "Walk-v0", *SHORT, "--no-anneal", "--p-start", "0.1")[0] == 0


@pytest.mark.parametrize(("name", "other_task"), [("klac_discrete", "Bandit-v0"), ("klac_continuous", "Point-v0")])
def test_bad_reference_files_are_refused(run_script, tmp_path, name, other_task):
    def run(*flags):
        return run_script(name, *flags, "--total-timesteps", 150)

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    assert run("--env-id", other_task, *SHORT, "--run-name", "other")[0] == 0
    (tmp_path / "noise.pt").write_bytes(b"not a checkpoint")
    torch.save({"weights": 1}, tmp_path / "keys.pt")
    torch.save({"actor": Malicious()}, tmp_path / "malicious.pt")
    assert run("--env-id", SCRIPTS[name][0], *SHORT, "--run-name", "same")[0] == 0
    state = torch.load("runs/same/actor.pt")
    next(iter(state["actor"].values()))[0] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    for path in ("noise.pt", "keys.pt", "malicious.pt", "runs/other/actor.pt", "nan.pt", "runs"):
        code, _, errors = run("--env-id", SCRIPTS[name][0], *SHORT, "--run-name", "mine", "--reference", path)
        assert code == 2
        assert errors.count("\n") == 1, errors
        assert f"--reference {path}" in errors
        assert "earlier run" in errors
        assert not Path("runs/mine").exists()
    assert not (tmp_path / "owned").exists()
    for path in ("runs/other", "runs/other/actor.pt"):
        assert run("--env-id", other_task, *SHORT, "--reference", path)[0] == 0


def test_unwritable_or_taken_run_folders_are_refused(run):
    Path("runs").write_text("a file where the folder should be")
    code, _, errors = run("--env-id", "Walk-v0", *SHORT)
    assert code == 2
    assert errors.count("\n") == 1
    assert "--run-name" in errors
    assert "writable" in errors
    Path("runs").unlink()
    assert run("--env-id", "Walk-v0", *SHORT, "--run-name", "mine")[0] == 0
    before = sorted(Path("runs/mine").iterdir())
    code, _, errors = run("--env-id", "Walk-v0", *SHORT, "--run-name", "mine", "--track")
    assert code == 2
    assert "--run-name mine: must be a new, writable folder; with --resume the one that is there goes on" in errors
    assert sorted(Path("runs/mine").iterdir()) == before
    assert not Path("wandb").exists()


@pytest.mark.parametrize(
    ("name", "env_id"),
    [("klac_discrete", "Seaquest-v1"), ("sac_discrete", "CartPole-v1"), ("klac_continuous", "Pendulum-v1")],
)
def test_video_can_be_watched_and_changes_no_number(run_script, name, env_id):
    flags = ["--env-id", env_id, *SHORT, "--env-kwargs", "max_episode_steps=60"]
    assert run_script(name, *flags, "--capture-video", "--run-name", "filmed")[0] == 0
    assert run_script(name, *flags, "--run-name", "plain")[0] == 0
    for kind in ("train", "eval"):
        frames = imageio.v3.imread(next(Path(f"runs/filmed/videos/{kind}").glob("*-episode-0.mp4")))
        assert len(frames) > 5
        assert min(frames.shape[1:3]) >= 320
        assert frames.max() > 100
        assert any((frame != frames[0]).any() for frame in frames)
    filmed, plain = (actor_of(Path("runs", name)) for name in ("filmed", "plain"))
    assert all(torch.equal(filmed[name], plain[name]) for name in plain)


def test_a_clip_has_at_most_300_frames(monkeypatch):
    clips = []
    monkeypatch.setattr(klac_discrete.Filmed, "stop_recording", lambda self: clips.append(len(self.recorded_frames)))
    args = klac_discrete.Args(env_id="Catch-v0", capture_video=True)
    env = gym.make("CartPole-v1", render_mode="rgb_array")
    env.unwrapped.theta_threshold_radians = env.unwrapped.x_threshold = np.inf  # no episode ends
    env = klac_discrete.film(env, args, Path("clips"))
    env.reset(seed=1)
    while not clips:
        env.step(0)
    assert clips == [300]


def test_a_clip_that_a_full_disk_does_not_take_is_given_up(monkeypatch, capsys):
    real, clips = gym.wrappers.RecordVideo.stop_recording, []

    def stop_recording(self):
        clips.append(self._video_name)
        if len(clips) == 1:
            Path(self.video_folder, f"{self._video_name}.mp4").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(self)

    monkeypatch.setattr(gym.wrappers.RecordVideo, "stop_recording", stop_recording)
    flags = {"total_timesteps": 300, "learning_starts": 100, "log_interval": 50, "eval_episodes": 1, "compile": False}
    run_dir = klac_discrete.train(klac_discrete.Args(env_id="CartPole-v1", capture_video=True, **flags))
    written = {path.stem for path in run_dir.glob("videos/train/*.mp4")}
    assert clips[0] not in written
    assert clips[1] in written
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("videos/train: a clip is not written: [Errno 28] No space left on device")


def test_a_disk_without_room_for_the_folder_of_clips_costs_no_run(monkeypatch, capsys):
    def makedirs(path, *a, **k):
        if "videos" in str(path):
            raise OSError(28, "No space left on device")
        return real(path, *a, **k)

    real = os.makedirs
    monkeypatch.setattr(os, "makedirs", makedirs)
    flags = {"total_timesteps": 300, "learning_starts": 100, "log_interval": 50, "eval_episodes": 1, "compile": False}
    run_dir = klac_discrete.train(klac_discrete.Args(env_id="CartPole-v1", capture_video=True, **flags))
    assert (run_dir / "actor.pt").exists()
    first, last = capsys.readouterr().err.splitlines()
    assert first.endswith("videos/train: no clip is written: [Errno 28] No space left on device")
    assert "videos/eval" in last


def test_a_line_is_not_written_into_the_progress_bar(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    with klac_discrete.tqdm(total=10) as bar:
        bar.update()
        klac_discrete.say("a line")
    assert shown.getvalue().partition("a line")[0].endswith("\r")  # the bar is wiped from the line


def test_what_interrupts_a_line_that_waits_for_another_is_not_lost():
    """As a second Ctrl-C, or a test's time limit."""
    held, over = threading.Event(), threading.Event()

    def hold():
        with klac_discrete.tqdm.get_lock():
            held.set()
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGUSR1)
            over.wait(60)

    def interrupt(*_):
        over.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    with pytest.raises(KeyboardInterrupt):
        klac_discrete.say("a line")
    other.join()
    signal.signal(signal.SIGUSR1, before)


def test_frames_that_make_no_clip_cost_no_run(run):
    code, _, errors = run("--env-id", "Frames-v0", *SHORT, "--capture-video", "--env-kwargs", "kind=growing")
    assert code == 0
    assert "/videos/train: a clip is not written: " in errors


@pytest.mark.parametrize("kind", [None, "grey", "none", "rows", "modeless"])
def test_what_cannot_be_rendered_is_refused(run, kind):
    flags = "--env-id Walk-v0" if kind is None else f"--env-id Frames-v0 --env-kwargs kind={kind}"
    code, _, errors = run(*flags.split(), *SHORT, "--capture-video")
    assert code == 2
    assert errors.startswith(f"klac_discrete.py: {flags} --capture-video: ")
    assert errors.count("\n") == 1
    assert not Path("runs").exists()


def history_of(offline_run):
    """The keys of W&B's records of one offline run (LevelDB's log format), counted, and the run's own record."""
    data, position, record = next(offline_run.glob("*.wandb")).read_bytes(), 7, b""
    counts, description = {}, None
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            parsed = wandb_records.Record.FromString(record)
            record = b""
            description = parsed.run if parsed.WhichOneof("record_type") == "run" else description
            for item in parsed.history.item:
                key = item.key or "/".join(item.nested_key)
                counts[key] = counts.get(key, 0) + 1
    return counts, description


def script(*flags, folder, name="klac_discrete", **environment):
    """Runs a copy of the script alone in `folder`, as a user would, without this repository on the path."""
    shutil.copy(ROOT / f"{name}.py", folder)
    environment = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-P", f"{name}.py", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", two_of(SCRIPTS))
def test_the_script_alone_runs_in_an_empty_folder_and_writes_only_its_run(tmp_path, name):
    folder = tmp_path / "alone"
    home = tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    result = script("--env-id", SCRIPTS[name][1], *SHORT, folder=folder, name=name, HOME=str(home))
    assert result.returncode == 0, result.stderr
    assert {path.name for path in folder.iterdir()} == {f"{name}.py", "runs"}
    # nothing at home either, but for the font cache of Matplotlib, which MinAtar imports
    written = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert all("matplotlib" in path for path in written), written
    (run_dir,) = (folder / "runs").iterdir()
    kinds = {path.name.split(".")[0] for path in run_dir.iterdir()}
    assert kinds == {"actor", "args", "events", "lock", "scalars"}
    assert "\r" not in result.stderr  # no progress bar where there is no terminal


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_imports_nothing_of_this_repository(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imported = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    dependencies = {"gymnasium", "minatar", "numpy", "torch", "tqdm", "tyro", "wandb"}
    assert imported - set(sys.stdlib_module_names) <= dependencies


def test_tracked_run_reaches_wandb_whole_and_labelled(tmp_path, scalars):
    result = script("--env-id", "Breakout-v1", *SHORT, "--track", "--no-anneal", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    (offline_run,) = (tmp_path / "wandb").glob("offline-run-*")
    counts, description = history_of(offline_run)
    assert description.display_name == run_dir.name
    assert (description.run_group, description.job_type) == ("Breakout-v1", "KLAC-a")
    assert list(description.tags) == ["Breakout-v1", "KLAC-a"]
    config = {item.key: json.loads(item.value_json) for item in description.config.update}
    assert config["algorithm"] == "KLAC-a"
    assert config["learning_starts"] == 100
    for tag, values in scalars(run_dir).items():
        assert counts[tag] == len(values), tag


@pytest.mark.usefixtures("wandb_here")
def test_two_tracked_runs_of_one_process_stay_apart_and_a_third_is_not_tracked(scalars, capfd):
    flags = {"total_timesteps": 300, "learning_starts": 100, "log_interval": 50, "eval_episodes": 1, "compile": False}
    tracked = [klac_discrete.Args(env_id="Walk-v0", seed=seed, track=True, **flags) for seed in (1, 2)]
    run_dirs = [klac_discrete.train(args) for args in tracked]
    capfd.readouterr()
    klac_discrete.train(replace(tracked[0], track=False))
    assert "wandb" not in capfd.readouterr().err
    wandb.teardown()  # its process writes the rest of its files
    histories = [history_of(offline_run) for offline_run in Path("wandb").glob("offline-run-*")]
    counts = {description.display_name: counts for counts, description in histories}
    assert len(histories) == 2
    assert counts.keys() == {path.name for path in run_dirs}
    for run_dir in run_dirs:
        logged = {tag: len(values) for tag, values in scalars(run_dir).items()}
        assert {tag: counts[run_dir.name][tag] for tag in logged} == logged


@pytest.mark.usefixtures("wandb_here")
@pytest.mark.parametrize("name", two_of(SCRIPTS))
def test_wandb_shows_a_run_over_its_environment_steps_with_its_clips(scalars, monkeypatch, name):
    logged, metrics, module = [], [], importlib.import_module(name)
    real = wandb.init

    def init(**settings):
        run = real(**settings)
        log, define = run.log, run.define_metric
        monkeypatch.setattr(run, "log", lambda data, step: logged.append((step, data)) or log(data, step=step))
        monkeypatch.setattr(run, "define_metric", lambda *a, **k: metrics.append((a, k)) or define(*a, **k))
        return run

    monkeypatch.setattr(wandb, "init", init)
    flags = {"total_timesteps": 300, "learning_starts": 100, "log_interval": 50, "eval_episodes": 1, "compile": False}
    env_id = "Pendulum-v1" if "continuous" in name else "CartPole-v1"
    run_dir = module.train(module.Args(env_id=env_id, track=True, capture_video=True, **flags))
    assert metrics[-1] == (("*",), {"step_metric": "global_step"})
    assert all(data["global_step"] == step for step, data in logged)
    sent = {tag: [(step, data[tag]) for step, data in logged if tag in data] for tag in scalars(run_dir)}
    for tag, rows in scalars(run_dir).items():
        np.testing.assert_allclose(sent[tag], rows, rtol=1e-6)
    clips = [clip for _, data in logged for key in data if key.startswith("videos/") for clip in data[key]]
    assert {key for _, data in logged for key in data if "videos" in key} == {"videos/train", "videos/eval"}
    assert len(clips) == len(list(run_dir.glob("videos/*/*.mp4"))) > 1


@pytest.mark.parametrize(("environment", "word"), [
    ({"WANDB_MODE": "online", "WANDB_API_KEY": ""}, "wandb login"),
    ({"WANDB_MODE": "online", "WANDB_API_KEY": "abc"}, "--track"),
    ({"WANDB_MODE": "bogus"}, "--track"),
])  # fmt: skip
@pytest.mark.usefixtures("wandb_here")
def test_tracking_that_cannot_start_is_refused_in_one_line(run, monkeypatch, environment, word):
    for name, value in {"HOME": os.getcwd(), **environment}.items():
        monkeypatch.setenv(name, value)
    code, _, errors = run("--env-id", "Walk-v0", *SHORT, "--track")
    assert code == 2
    assert "--track" in errors
    assert word in errors
    assert errors.count("\n") == 1, errors
    assert not Path("runs").exists()


def test_terminal_shows_a_progress_bar(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, SCRIPT.name, "--env-id", "Breakout-v1", *SHORT])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    shown, deadline = b"", time.time() + 120
    while time.time() < deadline:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # the child closed the terminal
            break
        shown += chunk
    assert os.waitpid(child, 0)[1] == 0
    assert b"400/400" in shown
    assert b"step/s" in shown
    assert b"return " in shown


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_flag(run_script, name):
    code, out, _ = run_script(name, "--help")
    assert code == 0
    for flag in fields(importlib.import_module(name).Args):
        assert len(re.findall(rf"(?m)^\W*--{flag.name.replace('_', '-')}[ ,]", out)) == 1, flag.name
    _, *found = re.split(r"(?m)^\W*(\w+) options\b", out)
    boxes = dict(zip(found[::2], found[1::2], strict=True))
    assert list(boxes) == ["environment", "experiment", "computation", "evaluation", "algorithm", "logging"]
    assert re.match(r"\W*--env-id ", boxes["environment"])
    assert "--gamma" in boxes["algorithm"]
    assert "--track" in boxes["logging"]
    assert "(default: None)" not in out
    assert "(default: )" not in out
    source = (ROOT / f"{name}.py").read_text()
    args_class = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    kinds = [type(statement) for statement in args_class.body]
    assert kinds == [ast.AnnAssign, ast.Expr] * (len(kinds) // 2)  # each field is followed by its docstring


def test_a_fixed_temperature_logs_no_target(scalars):
    flags = {"env_id": "Walk-v0", "autotune": False, "total_timesteps": 300, "learning_starts": 100, "compile": False}
    tags = scalars(klac_discrete.train(klac_discrete.Args(**flags, log_interval=20, eval_episodes=1)))
    assert "losses/alpha" in tags
    assert not [tag for tag in tags if "target" in tag]


def test_freeway_s_clock_is_a_termination():
    """As docs/algorithms.md says: MinAtar reports it so."""
    env, steps, ended = klac_discrete.make_env(klac_discrete.Args(env_id="Freeway-v1")), 0, (False, False)
    env.reset(seed=1)
    while not any(ended):
        _, _, *ended, _ = env.step(0)
        steps += 1
    assert (steps, ended) == (2501, [True, False])


def test_make_env_accepts_both_names_of_a_minatar_game():
    ids = ("Seaquest-v1", "MinAtar/Seaquest-v1")
    first, second = (klac_discrete.make_env(klac_discrete.Args(env_id=env_id)).spec.id for env_id in ids)
    assert first == second == "MinAtar/Seaquest-v1"
    assert isinstance(klac_discrete.make_env(klac_discrete.Args(env_id="CartPole-v1")).unwrapped, gym.Env)


@pytest.mark.parametrize("env_id", GAMES)
def test_a_frame_shows_everything_in_the_game_and_nothing_else(env_id):
    env = klac_discrete.make_env(klac_discrete.Args(env_id=env_id), render=True)
    obs, _ = env.reset(seed=3)
    frame = env.render()
    assert frame.shape == (320, 320, 3)
    assert frame.dtype == np.uint8
    shown = frame[16::32, 16::32].max(axis=2) >= 250  # full brightness
    assert np.array_equal(shown, obs.any(axis=2))


def test_a_run_says_what_its_numbers_depend_on(tmp_path, scalars, monkeypatch):
    """In a repository of the user's own: its revision, and whether the script was edited since."""
    shutil.copy(ROOT / "sac_discrete.py", tmp_path)
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@here"]
    flags = ["--env-id", "CartPole-v1", *SHORT]

    def provenance(name):
        monkeypatch.setattr(sys, "argv", ["sac_discrete.py", *flags, "--run-name", name])
        runpy.run_path(str(tmp_path / "sac_discrete.py"), run_name="__main__")
        return json.loads((tmp_path / "runs" / name / "args.json").read_text())["provenance"]

    found = provenance("no-repository")
    assert (found["revision"], found["device"]) == (None, "cpu")
    for command in (["init", "-q"], ["add", "sac_discrete.py"], ["commit", "-qm", "Begin"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    revision = subprocess.run([*git, "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    clean = provenance("clean")
    assert clean["revision"] == revision
    assert (clean["torch"], clean["numpy"], clean["threads"]) == (torch.__version__, np.__version__, 1)
    assert clean["processor"]
    logged = [value for _, value in scalars(tmp_path / "runs/clean")["charts/hours"]]
    assert logged[-1] < clean["hours"] < logged[-1] + 0.02
    with (tmp_path / "sac_discrete.py").open("a") as file:
        file.write("# mine\n")
    assert provenance("edited")["revision"] == f"{revision}-dirty"
