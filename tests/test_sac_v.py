"""SAC of 2018: its value network, targets and updates against the slides' equations by hand, and what it shares."""

import copy
import itertools
import math
import re
import subprocess

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch

import sac_continuous
import sac_v_continuous as sac_v
import tests.envs
from plotting import curves
from tests.test_continuous import by_hand, close_gradients, doubles, drawn_by_hand, q_by_hand, some_batch
from tests.test_family import ROOT, blocks
from tests.test_resume import TINY, same_run, unfinished

FLAGS = {"env_id": "Drift-v0", "total_timesteps": 141, "learning_starts": 100, "log_interval": 1, "eval_episodes": 1}
FLAGS |= {"batch_size": 16, "compile": False, "buffer_size": 1000}


def test_it_is_a_sibling():
    own, sibling = blocks(sac_v), blocks(sac_continuous)
    assert own.keys() - sibling.keys() == {"soft_value", "value_loss", "value_gradients"}
    assert sibling.keys() - own.keys() == {"entropy_range"}
    for name in (own.keys() & sibling.keys()) - {"Args", "td_target", "train", None}:
        assert own[name] == sibling[name], name
    ours, theirs = vars(sac_v.Args()), vars(sac_continuous.Args())
    assert ours.keys() - theirs.keys() == {"reward_scale"}
    assert theirs.keys() - ours.keys() == {"autotune", "target_entropy", "policy_frequency"}
    different = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert different == {"exp_name", "q_lr", "alpha"}


def test_the_diff_is_what_the_documentation_says():
    names = "sac_continuous.py", "sac_v_continuous.py"
    diff = subprocess.run(["diff", *names], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    changed = sum(line[0] in "<>" for line in diff.splitlines())
    (stated,) = re.findall(r"`diff sac_continuous.py sac_v_continuous.py`[^.]* (\d+) changed lines", algorithms())
    assert 50 < changed <= int(stated)


def algorithms():
    return (ROOT / "docs/algorithms.md").read_text()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_gradients_are_those_of_equation_7(seed):
    """J_V = E[(V(s) - E_{a ~ pi}[min_i Q_i(s, a) - alpha log pi(a|s)])^2 / 2], in float64; the script leaves out the
    half. The actions are the policy's own: those of the batch do not matter."""
    batch, noise, actor, critics = some_batch(sac_v, size=64, seed=seed)
    value, alpha, obs = sac_v.Networks(1, 3, 1), torch.tensor(0.7), batch.obs.double()
    with torch.no_grad():
        action, log_pi, _ = drawn_by_hand(doubles(actor), obs, noise.double())
        x = torch.cat([obs, action], 1)
        y = torch.minimum(q_by_hand(critics, 0, x), q_by_hand(critics, 1, x)) - 0.7 * log_pi
    parameters = doubles(value)
    v = by_hand(parameters, 0, obs)[:, 0]
    j_v = ((v - y) ** 2 / 2).mean()
    (2 * j_v).backward()
    batch = batch._replace(actions=torch.full_like(batch.actions, torch.nan))
    gradients, log = sac_v.value_gradients(batch, value, noise, actor, critics, alpha)
    close_gradients(gradients, parameters)
    assert log["losses/vf_loss"].item() == pytest.approx(2 * j_v.item(), rel=1e-5)
    assert log["losses/vf_values"].item() == pytest.approx(v.mean().item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_critic_gradients_are_those_of_equation_8(seed):
    """J_Q = E[(Q_i(s, a) - (reward_scale r + gamma V'(s')))^2 / 2] of each twin, and no V' where terminated."""
    batch, _, _, critics = some_batch(sac_v, size=64, seed=seed)
    target_value, scale = sac_v.Networks(1, 3, 1), 3.0
    y = []
    for reward, next_obs, terminated in zip(batch.rewards, batch.next_obs, batch.terminations, strict=True):
        v = by_hand(doubles(target_value), 0, next_obs.double()[None]).item()
        y.append(3 * reward.item() if terminated else 3 * reward.item() + 0.9 * v)
    parameters = doubles(critics)
    x = torch.cat([batch.obs, batch.actions], 1).double()
    j_q = [((by_hand(parameters, k, x)[:, 0] - torch.tensor(y, dtype=torch.float64)) ** 2 / 2).mean() for k in (0, 1)]
    (2 * sum(j_q)).backward()
    gradients, log = sac_v.critic_gradients(batch, critics, target_value, 0.9, scale)
    close_gradients(gradients, parameters)
    for k in (0, 1):
        assert log[f"losses/qf{k + 1}_loss"].item() == pytest.approx(2 * j_q[k].item(), rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_actor_gradients_are_those_of_equation_9(seed):
    """J_pi = E[KL(pi || exp(min_i Q_i / alpha) / Z)] by the policy's own sample, times alpha, up to log Z."""
    batch, noise, actor, critics = some_batch(sac_v, size=64, seed=seed)
    alpha, parameters, obs = torch.tensor(0.7), doubles(actor), batch.obs.double()
    action, log_pi, _ = drawn_by_hand(parameters, obs, noise.double())
    x = torch.cat([obs, action], 1)
    min_q = torch.minimum(q_by_hand(critics, 0, x), q_by_hand(critics, 1, x))
    (0.7 * (log_pi - min_q / 0.7).mean()).backward()
    gradients, _, log = sac_v.actor_gradients(batch, noise, actor, critics, math.log(3.2), alpha)
    close_gradients(gradients, parameters)
    soft = sac_v.soft_value(batch, noise, actor, critics, alpha)  # of the same action: what the actor maximises
    assert soft.shape == (64,)
    assert log["losses/actor_loss"].item() == pytest.approx(-soft.mean().item(), rel=1e-5)


def test_the_soft_value_is_the_integral_over_the_actions_less_alpha_times_the_kl():
    """Over the box, by quadrature: E[Q - alpha log pi] = alpha log Z - alpha KL(pi || exp(Q / alpha) / Z)."""
    torch.manual_seed(0)
    box, alpha, n = gym.spaces.Box(-2, 2, (1,), np.float32), 0.5, 5_000
    actor, critics = sac_v.Actor(3, box), sac_v.Networks(2, 4, 1)
    critics.w3 *= 5
    obs = torch.randn(1, 3)
    midpoints = (torch.arange(n) + 0.5) / n
    batch = sac_v.Batch(obs.expand(n, -1), None, None, None, None)
    soft = sac_v.soft_value(batch, torch.special.ndtri(midpoints)[:, None], actor, critics, alpha)

    actions = 4 * midpoints[:, None] - 2
    log_pi = actor.log_prob(*actor(obs), torch.atanh(actions / 2)).double().numpy()
    q = critics(obs.expand(n, -1), actions).amin(0)[:, 0].double().numpy()
    log_z = math.log(4 * np.exp(q / alpha).mean())
    kl = 4 * (np.exp(log_pi) * (log_pi - q / alpha + log_z)).mean()
    assert kl > 0.05
    assert soft.mean().item() == pytest.approx(alpha * log_z - alpha * kl, abs=2e-3)


@pytest.mark.parametrize(("ending", "q", "v"), [("Termination", 3.0, 3.342), ("Truncation", 6.342, 6.684)])
def test_one_state_is_worth_what_it_is_by_hand(scalars, monkeypatch, ending, q, v):
    """Reward 1, scaled by 3, alpha 1/2, gamma 1/2; no action is better, so that the entropy is the highest there is,
    H = log 2 - 0.0096. V = Q + H / 2, and Q = 3 where the step terminates, 3 + V / 2 where a clock cuts it."""
    real = tests.envs.OneStep.step
    monkeypatch.setattr(tests.envs.OneStep, "step", lambda self, a: (np.array([1.0, 0.0]), *real(self, a)[1:]))
    args = sac_v.Args(**FLAGS | {"env_id": f"ContinuousOneStep{ending}-v0", "total_timesteps": 500, "log_interval": 5})
    args.alpha, args.reward_scale, args.gamma, args.batch_size = 0.5, 3.0, 0.5, 32
    args.q_lr, args.policy_lr, args.tau = 3e-3, 1e-3, 0.1
    logged = {tag: np.array(values).T for tag, values in scalars(sac_v.train(args)).items()}
    for tag, expected in (("losses/qf1_values", q), ("losses/vf_values", v), ("policy/entropy", math.log(2) - 0.0096)):
        assert logged[tag][1][-20:].mean() == pytest.approx(expected, abs=0.06), tag
    assert set(logged["charts/episodic_return"][1]) == {1}


def test_each_network_takes_one_step_in_the_order_of_algorithm_2_and_the_target_moves_by_tau(monkeypatch):
    networks, started, order, seen, targets, noises = {}, {}, [], [], [], []
    real_descend, real_gradients = sac_v.descend, sac_v.value_gradients
    real_target, real_actor = sac_v.td_target, sac_v.actor_gradients

    def descend(optimizer, network, gradients):
        before = {name: [p.clone() for p in each.parameters()] for name, each in networks.items()}
        real_descend(optimizer, network, gradients)
        moved = [
            name
            for name, each in networks.items()
            if any(not torch.equal(a, b) for a, b in zip(before[name], each.parameters(), strict=True))
        ]
        assert [networks[name] for name in moved] == [network]
        order.append((*moved, optimizer.param_groups[0]["lr"]))

    def value_gradients(batch, value, noise, actor, critics, alpha):
        networks.update(value=value, actor=actor, critics=critics)
        started.update(started or {name: copy.deepcopy(each.state_dict()) for name, each in networks.items()})
        noises.append(noise)
        return real_gradients(batch, value, noise, actor, critics, alpha)

    def td_target(batch, target_value, *rest):
        targets.append([parameter.clone() for parameter in target_value.parameters()])
        seen.append([parameter.clone() for parameter in networks["value"].parameters()])
        return real_target(batch, target_value, *rest)

    def actor_gradients(batch, noise, *rest):
        assert noise is noises[-1]  # one action a state for both
        return real_actor(batch, noise, *rest)

    for name, function in (("descend", descend), ("value_gradients", value_gradients), ("td_target", td_target),
                           ("actor_gradients", actor_gradients)):  # fmt: skip
        monkeypatch.setattr(sac_v, name, function)
    sac_v.train(sac_v.Args(policy_lr=1e-4, **FLAGS))
    assert order == 40 * [("value", 3e-4), ("actor", 1e-4), ("critics", 3e-4)]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(noises))
    assert all(torch.equal(a, b) for a, b in zip(started["value"].values(), targets[0], strict=True))  # it is a copy
    torch.manual_seed(1)
    args = sac_continuous.Args(env_id="Drift-v0")
    siblings = sac_continuous.make_networks(args, sac_continuous.make_env(args))
    for name, network in zip(("actor", "critics"), siblings, strict=True):  # and these are the sibling's
        assert all(torch.equal(started[name][key], weights) for key, weights in network.state_dict().items())
    for (before, online), (after, _) in itertools.pairwise(zip(targets, seen, strict=True)):
        for start, end, parameter in zip(before, after, online, strict=True):
            torch.testing.assert_close(end, 0.995 * start + 0.005 * parameter)


def test_the_reward_scale_is_in_the_target_alone(scalars, monkeypatch):
    batch, _, _, _ = some_batch(sac_v)
    target_value = sac_v.Networks(1, 3, 1)
    y, plain = (sac_v.td_target(batch, target_value, 0.9, scale) for scale in (4.0, 1.0))
    torch.testing.assert_close(y - plain, 3 * batch.rewards)

    stored, networks, real_add, real_networks = [], [], sac_v.ReplayBuffer.add, sac_v.make_networks
    monkeypatch.setattr(sac_v.ReplayBuffer, "add", lambda self, *t: stored.append(t) or real_add(self, *t))
    monkeypatch.setattr(sac_v, "make_networks", lambda *a: networks.append(real_networks(*a)) or networks[-1])
    flags = FLAGS | {"total_timesteps": 160, "gamma": 0.8, "policy_lr": 1e-12, "q_lr": 1e-12, "reward_scale": 4.0}
    logged = scalars(sac_v.train(sac_v.Args(**flags)))
    episodes, episode, ends = [], [], dict(logged["charts/episodic_return"])
    for step, (obs, action, reward, *_) in enumerate(stored):
        assert reward == pytest.approx(obs[0] + action[0] - 1, abs=1e-5)  # the environment's own
        episode.append((step, obs, action, reward))
        if step in ends:
            episodes.append(episode)
            episode = []
    expected = []
    for episode in episodes:
        rewards = [reward for *_, reward in episode]
        assert ends[episode[-1][0]] == pytest.approx(sum(rewards), rel=1e-5)
        first, obs, action, _ = episode[0]
        if first >= 100:  # in units of the environment's reward, as the return is
            x = torch.tensor([*obs, *action], dtype=torch.float32)[None]
            q = min(q_by_hand(networks[0][1], k, x).item() for k in range(2))
            expected.append(q / 4 - sum(0.8**t * reward for t, reward in enumerate(rewards)))
    assert len(expected) > 5
    assert [value for _, value in logged["charts/q_minus_return"]] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_it_logs_what_sac_logs_without_a_temperature_and_its_own(scalars):
    sac = scalars(sac_continuous.train(sac_continuous.Args(autotune=False, **FLAGS)))
    logged = scalars(sac_v.train(sac_v.Args(alpha=0.3, **FLAGS)))
    assert logged.keys() ^ sac.keys() == {"losses/vf_loss", "losses/vf_values"}
    assert logged.keys() > sac.keys()
    assert [step for step, _ in logged["losses/vf_loss"]] == list(range(101, 141))
    assert [value for _, value in logged["losses/alpha"]] == pytest.approx([0.3] * 40)


def test_a_stopped_run_goes_on_with_all_its_networks_and_optimizers_to_the_bit(scalars):
    """Through warm-up, terminations and truncations, of which the run has some of each."""
    flags = {"env_id": "Drift-v0", "total_timesteps": 300}
    whole = sac_v.train(sac_v.Args(run_name="whole", **TINY | flags))
    args = unfinished(sac_v, **flags)
    saved = torch.load("runs/unfinished/checkpoint.pt", weights_only=True)
    trained = {"actor", "critics", "value", "actor_optimizer", "q_optimizer", "v_optimizer"}
    assert saved.keys() >= trained | {"target_value"}
    assert not all(torch.equal(saved["value"][name], saved["target_value"][name]) for name in saved["value"])
    assert saved["step"] > args.learning_starts
    ended = saved["columns"][-1].bool()
    lengths = [length for step, length in scalars("runs/unfinished")["charts/episodic_length"] if step < saved["step"]]
    assert 0 < ended.sum() < len(lengths)
    resumed = sac_v.train(args)
    same_run(scalars, whole, resumed)
    critics = [torch.load(folder / "actor.pt", weights_only=True)["critics"] for folder in (whole, resumed)]
    assert all(torch.equal(critics[0][name], critics[1][name]) for name in critics[0])


@pytest.mark.parametrize(("flags", "words"), [
    (["--reward-scale", 0.0], "--reward-scale 0.0: must be positive"),
    (["--reward-scale", -1.0], "--reward-scale -1.0: must be positive"),
    (["--reward-scale", "inf"], "--reward-scale inf: must be finite"),
    (["--alpha", -0.1], "--alpha -0.1: must be at least 0"),
])  # fmt: skip
def test_wrong_flags_are_refused(run_script, flags, words):
    code, _, err = run_script("sac_v_continuous", "--env-id", "Drift-v0", *flags)
    assert (code, err) == (2, f"sac_v_continuous.py: {words}\n")


def test_there_is_no_flag_to_tune_the_temperature(run_script):
    for flag in ("--autotune", "--no-autotune", "--target-entropy"):
        code, _, err = run_script("sac_v_continuous", flag)
        assert code == 2
        assert "Unrecognized" in err
    with pytest.raises(TypeError):
        sac_v.Args(autotune=True)


def test_alpha_0_leaves_the_entropy_out(monkeypatch):
    entropies, real = [], sac_v.soft_value

    def watch(batch, noise, actor, critics, alpha):
        mean, log_std = actor(batch.obs)
        q = critics(batch.obs, actor.squash(mean + log_std.exp() * noise)).amin(0).squeeze(1)
        y = real(batch, noise, actor, critics, alpha)
        entropies.append((y - q).abs().max().item())
        return y

    monkeypatch.setattr(sac_v, "soft_value", watch)
    sac_v.train(sac_v.Args(alpha=0.0, **FLAGS))
    assert set(entropies) == {0.0}
    sac_v.train(sac_v.Args(alpha=0.1, **FLAGS))
    assert entropies[-1] > 0


def test_curves_draw_it_under_its_label(tmp_path):
    folders = [module.train(module.Args(**FLAGS)) for module in (sac_continuous, sac_v)]
    curves.main(curves.Args(runs=folders, out=tmp_path / "out", bin=50))
    assert set(pd.read_csv(tmp_path / "out/summary.csv")["algorithm"]) == {"SAC", "SAC-V"}
    styles = curves.styles_of(["SAC", "SAC-V"])
    assert styles["SAC-V"] == curves.STYLES["SAC-V"]
    assert len({colour for colour, _ in curves.STYLES.values()}) == len(curves.STYLES)


@pytest.mark.slow
def test_it_learns(scalars):
    """A point that must be brought to the origin: a random policy earns about -85, a straight way some -9."""
    args = sac_v.Args(env_id="Point-v0", total_timesteps=3_000, learning_starts=300, batch_size=128, log_interval=100)
    args.policy_lr, args.q_lr, args.eval_episodes, args.compile = 1e-3, 1e-3, 20, False
    logged = scalars(sac_v.train(args))
    assert np.mean([v for step, v in logged["charts/episodic_return"] if step < 300]) < -50
    assert logged["eval/episodic_return"][0][1] > -15
