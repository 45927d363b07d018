"""Evaluations during training, and the environments that --env-kwargs and flattened observations make possible."""

import importlib
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import klac_discrete
import sac_discrete
import sac_v_continuous
from tests.conftest import two_of
from tests.test_resume import FLAGS, TINY
from tests.test_runs import SCRIPTS

TAGS = ("eval/episodic_return", "eval/stochastic_return")
EVERY = TINY | {"eval_interval": 150}


def best_of(run_dir):
    best = torch.load(run_dir / "best_actor.pt", weights_only=True)
    return best["step"], best["episodic_return"], best["actor"]


@pytest.mark.parametrize("name", two_of(SCRIPTS))
def test_evaluations_change_nothing_in_a_run(scalars, name):
    module = importlib.import_module(name)
    with_it, without = [
        module.train(module.Args(env_id=SCRIPTS[name][0], run_name=str(interval), **TINY | {"eval_interval": interval}))
        for interval in (70, None)
    ]
    actors = [torch.load(run_dir / "actor.pt", weights_only=True)["actor"] for run_dir in (with_it, without)]
    assert all(torch.equal(actors[0][key], actors[1][key]) for key in actors[0])
    logged, plain = scalars(with_it), scalars(without)
    assert logged.keys() - plain.keys() == {TAGS[1]}
    for tag in plain.keys() - {"charts/SPS", "charts/hours", TAGS[0]}:
        np.testing.assert_array_equal(logged[tag], plain[tag], tag)
    assert logged[TAGS[0]][-1] == plain[TAGS[0]][-1]
    assert not (without / "best_actor.pt").exists()


def test_the_best_actor_is_that_of_the_best_evaluation(scalars):
    args = klac_discrete.Args(env_id="CartPole-v1", run_name="it", beta=0.1, **EVERY | {"eval_episodes": 3})
    run_dir = klac_discrete.train(args)
    curves = {tag: dict(rows) for tag, rows in scalars(run_dir).items()}
    assert [list(curves[tag]) for tag in TAGS] == [[150, 300, 450, 600, 750, 800]] * 2
    assert curves[TAGS[0]] != curves[TAGS[1]]
    step, best, weights = best_of(run_dir)
    returns = curves[TAGS[0]]
    assert len(set(returns.values())) > 1
    assert best == pytest.approx(max(returns.values()))
    assert returns[step] == max(returns.values())
    # its weights, played by hand on CartPole itself from the same seeds, are paid that
    env, rng, paid = gym.make("CartPole-v1"), np.random.default_rng([args.seed, 1]), 0
    actor, _ = klac_discrete.make_networks(args, klac_discrete.make_env(args))
    actor.load_state_dict(weights)
    for _ in range(3):
        (obs, _), ended = env.reset(seed=int(rng.integers(2**31))), False
        while not ended:
            logits = actor(torch.as_tensor(obs)[None, None])
            obs, reward, terminated, truncated, _ = env.step(int(logits.argmax()))
            paid, ended = paid + reward, terminated or truncated
    assert paid / 3 == pytest.approx(best)


def test_a_resumed_run_keeps_the_best_actor_so_far(scalars, monkeypatch):
    flags = EVERY | {"checkpoint_interval": 200}
    monkeypatch.setattr(sac_discrete, "evaluate", lambda actor, args, video, deterministic=True: played(deterministic))
    outcome = []

    def played(deterministic):
        return np.array([1.0 * outcome.pop(0) if deterministic else 0.0])

    outcome[:] = [5, 9, 2, 3, 4, 6]
    whole = sac_discrete.train(sac_discrete.Args(env_id="Walk-v0", run_name="whole", **flags))
    assert best_of(whole)[:2] == (300, 9)
    args = sac_discrete.Args(env_id="Walk-v0", run_name="stopped", resume=True, **flags)
    outcome[:] = [5, 9, 2]
    with pytest.raises(IndexError):  # at step 600, after a checkpoint between 400 and 450
        sac_discrete.train(args)
    outcome[:] = [2, 3, 4, 6]
    resumed = sac_discrete.train(args)
    assert scalars(resumed)[TAGS[0]] == scalars(whole)[TAGS[0]]
    (step, best, weights), (_, _, expected) = best_of(resumed), best_of(whole)
    assert (step, best) == (300, 9)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_the_best_actor_is_played_from_its_file(run_script, capsys):
    klac_discrete.train(klac_discrete.Args(env_id="CartPole-v1", run_name="it", **EVERY))
    capsys.readouterr()
    step, best, _ = best_of(Path("runs/it"))
    code, out, err = run_script("klac_discrete", "--evaluate", "runs/it/best_actor.pt", "--eval-episodes", 2)
    assert (code, err) == (0, "")
    assert out.startswith(f"runs/it/best_actor.pt: deterministic return {best:.2f} +-")
    written = json.loads(Path("runs/it/evaluation.json").read_text())
    assert (written["actor"], written["step"]) == ("best_actor.pt", step)
    assert np.mean(written["deterministic_returns"]) == pytest.approx(best)


@pytest.mark.parametrize("deterministic", [True, False])
def test_evaluations_of_two_policies_begin_with_the_same_seeds(monkeypatch, deterministic):
    played, args = [], sac_discrete.Args(env_id="CartPole-v1", eval_episodes=5)
    real = sac_discrete.Checked.reset

    def reset(self, **given):
        played[-1].append(given["seed"])
        return real(self, **given)

    monkeypatch.setattr(sac_discrete.Checked, "reset", reset)
    for weights in (1, 2):
        played.append([])
        torch.manual_seed(weights)
        actor, _ = sac_discrete.make_networks(args, sac_discrete.make_env(args))
        played[-1].append(list(sac_discrete.evaluate(actor, args, Path(), deterministic)))
    (*seeds, returns), (*others, other_returns) = played
    assert seeds == others
    assert len(set(seeds)) == 1 + 5  # 0 is that of the checks
    assert returns != other_returns


def test_a_best_actor_that_a_full_disk_refused_is_written_at_the_next_good_evaluation(monkeypatch):
    outcome, real = [9.0, 5.0, 3.0, 2.0, 2.0, 2.0], sac_discrete.save

    def save(state, path):
        if path.name == "best_actor.pt" and state["episodic_return"] == 9:
            raise OSError(28, "No space left on device")
        real(state, path)

    def evaluate(actor, args, video, deterministic=True):
        return np.array([outcome.pop(0) if deterministic else 0.0])

    monkeypatch.setattr(sac_discrete, "evaluate", evaluate)
    monkeypatch.setattr(sac_discrete, "save", save)
    run_dir = sac_discrete.train(sac_discrete.Args(env_id="Walk-v0", run_name="it", **EVERY))
    assert best_of(run_dir)[:2] == (300, 5)


def test_a_policy_is_evaluated_by_a_sibling_of_the_same_actor(run_script, capsys):
    """SAC of 2018 has no --autotune, whose default would ask for an --alpha that was learned."""
    sac_v_continuous.train(sac_v_continuous.Args(env_id="Drift-v0", run_name="it", **TINY))
    capsys.readouterr()
    code, out, err = run_script("sac_continuous", "--evaluate", "runs/it", "--eval-episodes", 2)
    assert (code, err) == (0, "")
    assert out.startswith("runs/it: deterministic return ")


def test_keyword_arguments_of_the_environment_are_kept(run_script, scalars):
    flags = ["--env-kwargs", "oddity=plain", "dtype=int32", "max_episode_steps=7"]
    command = ["--env-id", "OddPlain-v0", "--run-name", "it", *FLAGS]
    code, _, err = run_script("klac_discrete", *command, *flags)
    assert (code, err) == (0, "")
    run_dir = Path("runs/it")
    assert json.loads((run_dir / "args.json").read_text())["env_kwargs"] == flags[1:]
    lengths = {value for _, value in scalars(run_dir)["charts/episodic_length"]}
    assert lengths == {7}
    code, _, err = run_script("klac_discrete", *command, "--resume", "--env-kwargs", "max_episode_steps=8")
    assert (code, err.count("\n")) == (2, 1)
    assert f"was started with --env-kwargs {flags[1:]}, not ['max_episode_steps=8']" in err
    assert run_script("klac_discrete", *command, *flags, "--resume")[0] == 0
    code, _, err = run_script("klac_discrete", "--evaluate", "runs/it")
    assert (code, err) == (0, "")
    returns = json.loads((run_dir / "evaluation.json").read_text())["deterministic_returns"]
    assert min(returns) >= -2 * 7  # OddPlain pays at least -2 a step: twenty would be more


def test_values_of_keyword_arguments_are_python_s():
    pairs = ["a=1", "b=1e-3", "c=True", "d=false", "e=None", "f=(1, 2)", "g=text", "h='3'", "i=a=b"]
    expected = {"a": 1, "b": 1e-3, "c": True, "d": False, "e": None, "f": (1, 2), "g": "text", "h": "3", "i": "a=b"}
    found = klac_discrete.env_kwargs(klac_discrete.Args(env_kwargs=tuple(pairs)))
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]


def test_flattening_is_said_where_it_is_done(capsys):
    def turned():
        to_box, box = lambda place: np.eye(3, dtype=np.float32)[place + 1], gym.spaces.Box(0, 1, (3,))
        return gym.wrappers.TransformObservation(gym.make("PlaceObs-v0"), to_box, box)

    def timed():
        return gym.wrappers.TimeAwareObservation(gym.make("Walk-v0"), flatten=False)

    for entry, words in ((turned, ""), (timed, "observations flattened, from Dict(")):
        env_id = f"{entry.__name__.title()}-v0"
        if env_id not in gym.registry:
            gym.register(env_id, entry)
        sac_discrete.train(sac_discrete.Args(env_id=env_id, **TINY | {"total_timesteps": 200}))
        out = capsys.readouterr().out
        assert words in out
        assert ("flattened" in out) == bool(words)


@pytest.mark.parametrize("kind", ["Dict", "Tuple", "Place"])
@pytest.mark.parametrize("name", two_of(SCRIPTS))
def test_observations_that_are_no_box_are_flattened(monkeypatch, capsys, name, kind):
    module = importlib.import_module(name)
    stored, add = [], module.ReplayBuffer.add
    monkeypatch.setattr(module.ReplayBuffer, "add", lambda self, *t: stored.append(t[0]) or add(self, *t))
    env_id = f"{'Continuous' if 'continuous' in name else ''}{kind}Obs-v0"
    module.train(module.Args(env_id=env_id, **TINY | {"total_timesteps": 200}))
    size = 3 if kind == "Place" else 5  # a place of three, one-hot, and a speed of two
    assert f"to ({size},)" in capsys.readouterr().out
    places = np.array([obs[:3] for obs in stored])
    assert places.shape == (200, 3)
    assert set(places.ravel()) == {0, 1}
    assert (places.sum(1) == 1).all()
    assert (places.sum(0) > 20).all()  # the space starts at -1
    if size == 5:
        speeds = np.array([obs[3:] for obs in stored])
        assert 1.5 < np.abs(speeds).max() <= 2
