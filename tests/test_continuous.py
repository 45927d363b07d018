"""The mathematics of the two continuous scripts, against numerical integration, SciPy and loops written out by hand."""

import itertools
import math
from collections import Counter
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import klac_continuous as klac
import sac_continuous as sac
import tests.envs

BOTH = [sac, klac]
TASKS = ["Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Ant-v5", "Humanoid-v5", "Swimmer-v5", "InvertedPendulum-v5",
         "Reacher-v5", "Pendulum-v1"]  # fmt: skip
SHORT = {"learning_starts": 100, "log_interval": 1, "eval_episodes": 1, "buffer_size": 10_000, "compile": False}


def box(scale, d=1, centre=0.0):
    return gym.spaces.Box(np.float32(centre - scale), np.float32(centre + scale), (d,))


def make_env(task):
    return klac.make_env(klac.Args(env_id=task))


def drawn(actor, obs, noise):
    """Actions, log pi and the points before tanh, of this noise."""
    mean, log_std = actor(obs)
    u = mean + log_std.exp() * noise
    return actor.squash(u), actor.log_prob(mean, log_std, u), u


def some_batch(module, obs_dim=3, d=2, size=12, seed=0):
    """A random batch, its noise, an actor and critics."""
    torch.manual_seed(seed)
    actor, critics = module.Actor(obs_dim, box(2.0, d=d, centre=1.0)), module.Networks(2, obs_dim + d, 1)
    ends = (torch.arange(size) % 3 == 0).float()
    obs, next_obs = torch.randn(2, size, obs_dim)
    batch = module.Batch(obs, torch.randn(size, d), torch.randn(size), next_obs, ends)
    return batch, torch.randn(size, d), actor, critics


@given(p=st.floats(0.01, 0.99), r=st.floats(0.01, 2), d=st.integers(1, 20))
def test_exploit_entropy_is_that_of_the_gaussian_with_p_in_the_region(p, r, d):
    sigma = r / (math.sqrt(2) * scipy.special.erfinv(p ** (1 / d)))
    gaussian = scipy.stats.multivariate_normal(cov=sigma**2 * np.eye(d))
    assert klac.exploit_entropy(p, r, d) == pytest.approx(gaussian.entropy(), rel=1e-6, abs=1e-6)
    assert (2 * scipy.stats.norm.cdf(r / sigma) - 1) ** d == pytest.approx(p, rel=1e-6)


def test_probability_of_the_region_by_integration():
    """sigma from the entropy; the Gaussian's density in the plane integrated over the square of half-width r."""
    p, r = 0.6, 0.25
    sigma = math.exp((klac.exploit_entropy(p, r, 2) - (1 + math.log(2 * math.pi))) / 2)

    def density(y, x):
        return math.exp(-(x * x + y * y) / (2 * sigma**2)) / (2 * math.pi * sigma**2)

    assert scipy.integrate.dblquad(density, -r, r, -r, r)[0] == pytest.approx(p, rel=1e-6)


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.7, -1.5), (-1.0, 0.5), (0.3, 0.8)])
def test_squashed_density_integrates_to_one_and_its_entropy_is_right(scale, mean, log_std):
    actor = klac.Actor(1, box(scale, centre=0.5)).double()
    m, s = torch.tensor([[mean]], dtype=torch.float64), torch.tensor([[log_std]], dtype=torch.float64)

    def log_density(action):
        u = np.arctanh(np.clip((action - 0.5) / scale, -1 + 1e-15, 1 - 1e-15))
        return actor.log_prob(m, s, torch.tensor([[u]])).item()

    def integrate(f):
        return scipy.integrate.quad(f, 0.5 - scale, 0.5 + scale, limit=500, points=[0.5 + scale * math.tanh(mean)])[0]

    assert integrate(lambda a: math.exp(log_density(a))) == pytest.approx(1, abs=2e-3)
    entropy = integrate(lambda a: -log_density(a) * math.exp(log_density(a)))
    torch.manual_seed(0)
    u = m + s.exp() * torch.randn(200_000, 1, dtype=torch.float64)
    assert -actor.log_prob(m, s, u).mean().item() == pytest.approx(entropy, abs=0.03)
    assert entropy < math.log(2 * scale)  # no policy on the box is as random as the uniform one


def test_log_prob_is_scipy_s_with_the_change_of_variables():
    actor, generator = klac.Actor(3, box(3.0, d=2)), torch.Generator().manual_seed(0)
    mean, log_std, u = (torch.randn(7, 2, generator=generator) for _ in range(3))
    expected = scipy.stats.norm.logpdf(u, mean, log_std.exp()) - np.log(3 * (1 - np.tanh(u.double().numpy()) ** 2))
    np.testing.assert_allclose(actor.log_prob(mean, log_std, u).numpy(), expected.sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", BOTH)
def test_losses_and_gradients_stay_finite_at_the_bounds(module):
    batch, noise, actor, critics = some_batch(module)
    for shift in (5.0, 20.0, 200.0, -200.0):
        actor.b3[0, 0, :2] = shift  # means far outside: |action| is at its bound to the last bit
        action, log_pi, _ = drawn(actor, batch.obs, noise)
        assert ((action >= -1) & (action <= 3)).all()
        arguments = (lambda obs, u: -math.log(16), math.log(16)) if module is klac else (math.log(16),)
        gradients, _, log = module.actor_gradients(batch, noise, actor, critics, *arguments, torch.tensor(1.0))
        assert torch.isfinite(log_pi).all()
        assert math.isfinite(log["losses/actor_loss"])
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_actor_keeps_to_an_asymmetric_box_and_to_the_bounds_of_log_std():
    space = gym.spaces.Box(np.float32([-1, 2]), np.float32([3, 2.5]))
    actor = klac.Actor(4, space)
    obs = 100 * torch.randn(500, 4)
    action, _, u = drawn(actor, obs, torch.randn(500, 2))
    assert all(space.contains(a) for a in action.numpy())
    torch.testing.assert_close(action, torch.tanh(u) * torch.tensor([2.0, 0.25]) + torch.tensor([1.0, 2.25]))
    _, log_std = actor(obs)
    assert log_std.min() >= -5
    assert log_std.max() <= 2
    assert (log_std.min() < -4.5) or (log_std.max() > 1.5)


def q_by_hand(critics, k, x):
    """The k-th critic's value, (B,), by float64 and torch's own linear layers."""
    w1, b1, w2, b2, w3, b3 = (getattr(critics, name)[k].double() for name in ("w1", "b1", "w2", "b2", "w3", "b3"))
    h = torch.relu(F.linear(x.double(), w1.T, b1[0]))
    h = torch.relu(F.linear(h, w2.T, b2[0]))
    return F.linear(h, w3.T, b3[0])[:, 0]


@pytest.mark.parametrize("module", BOTH)
def test_td_target_matches_a_loop(module):
    batch, noise, actor, critics = some_batch(module)
    extra = 0.3  # beta for KLAC and alpha for SAC
    mean, log_std = actor(batch.next_obs)
    expected = []
    for i in range(len(batch.rewards)):
        action, log_pi = [], 0.0
        for k in range(mean.shape[1]):
            std = math.exp(log_std[i, k])
            u = mean[i, k].item() + std * noise[i, k].item()
            action.append(2 * math.tanh(u) + 1)
            log_pi += scipy.stats.norm.logpdf(u, mean[i, k].item(), std) - math.log(2 * (1 - math.tanh(u) ** 2))
        x = torch.cat([batch.next_obs[i], torch.tensor(action)])[None]
        q = min(q_by_hand(critics, k, x).item() for k in range(2))
        value = q - extra * log_pi if module is sac else q
        y = batch.rewards[i].item() + (extra if module is klac else 0)
        expected.append(y + (0 if batch.terminations[i] else 0.9 * value))
    y = module.td_target(batch, noise, actor, critics, 0.9, extra)
    assert y.shape == (12,)
    assert y.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def gaussian_by_hand(parameters, obs, noise):
    """Actions in [-1, 3] and their log pi, in float64, of the actor's parameters."""
    w1, b1, w2, b2, w3, b3 = (parameters[name][0] for name in ("w1", "b1", "w2", "b2", "w3", "b3"))
    h = torch.relu(obs @ w1 + b1[0])
    out = torch.relu(h @ w2 + b2[0]) @ w3 + b3[0]
    d = noise.shape[1]
    mean, std = out[:, :d], torch.exp(-5 + 3.5 * (torch.tanh(out[:, d:]) + 1))
    u = mean + std * noise
    normal = torch.distributions.Normal(mean, std).log_prob(u)
    return 2 * torch.tanh(u) + 1, (normal - torch.log(2 * (1 - torch.tanh(u) ** 2))).sum(1), u


def close_gradients(gradients, parameters):
    for name, gradient in gradients.items():
        expected = parameters[name].grad
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("module", BOTH)
def test_gradients_are_those_of_a_float64_reference(module):
    batch, noise, actor, critics = some_batch(module, size=64)
    extra = torch.tensor(0.3)
    y = module.td_target(batch, noise, actor, critics, 0.9, extra).double()
    gradients, log = module.critic_gradients(batch, critics, noise, actor, critics, 0.9, extra)
    doubles = {name: value.double().requires_grad_() for name, value in critics.named_parameters()}
    x = torch.cat([batch.obs, batch.actions], 1).double()
    h = torch.relu(torch.einsum("bi,kio->kbo", x, doubles["w1"]) + doubles["b1"])
    h = torch.relu(torch.einsum("kbi,kio->kbo", h, doubles["w2"]) + doubles["b2"])
    q = (torch.einsum("kbi,kio->kbo", h, doubles["w3"]) + doubles["b3"])[..., 0]
    losses = ((q - y) ** 2).mean(1)
    losses.sum().backward()
    close_gradients(gradients, doubles)
    assert log["losses/qf1_loss"].item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert log["losses/qf_loss"].item() == pytest.approx(losses.mean().item(), rel=1e-5)
    assert log["losses/qf2_values"].item() == pytest.approx(q[1].mean().item(), rel=1e-4, abs=1e-5)

    alpha = torch.tensor(0.7)
    references = {"uniform": lambda obs, u: -math.log(16)}
    if module is klac:  # and one that depends on the action
        references["quadratic"] = lambda obs, u: -(u**2).sum(1) + obs[:, 0]
    for log_q in references.values():
        arguments = (log_q, math.log(16)) if module is klac else (math.log(16),)
        gradients, kl, log = module.actor_gradients(batch, noise, actor, critics, *arguments, alpha)
        doubles = {name: value.double().requires_grad_() for name, value in actor.named_parameters()}
        action, log_pi, u = gaussian_by_hand(doubles, batch.obs.double(), noise.double())
        x = torch.cat([batch.obs.double(), action], 1)
        min_q = torch.minimum(q_by_hand(critics, 0, x), q_by_hand(critics, 1, x))
        log_ratio = log_pi - log_q(batch.obs.double(), u)
        loss = (alpha.double() * (log_ratio - math.log(16)) - min_q).mean()
        loss.backward()
        close_gradients(gradients, doubles)
        assert kl.item() == pytest.approx(log_ratio.mean().item(), rel=1e-5)
        assert log["losses/actor_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
        assert log["policy/entropy"].item() == pytest.approx(-log_pi.mean().item(), rel=1e-4)


@pytest.mark.parametrize("module", BOTH)
def test_weights_start_as_those_of_torch_s_linear_layers(module):
    torch.manual_seed(0)
    critics, linear = module.Networks(2, 40, 1), torch.nn.Linear(256, 256)
    for name, fan_in in (("w1", 40), ("b1", 40), ("w2", 256), ("b2", 256), ("w3", 256), ("b3", 256)):
        values = getattr(critics, name).flatten()
        assert values.abs().max() <= 1 / math.sqrt(fan_in)
        if len(values) > 100:
            assert values.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.1)
    assert critics.w2.std().item() == pytest.approx(linear.weight.std().item(), rel=0.02)


@pytest.mark.parametrize("scale", [0.4, 2.0])
@pytest.mark.parametrize(("mean", "log_std"), [(0.0, -1.0), (1.0, -1.0), (3.0, 0.3), (-2.0, -0.5)])
def test_exploit_probability_is_the_density_integrated_over_the_region(scale, mean, log_std):
    r, space = 0.25, box(scale, centre=0.5)
    actor = klac.Actor(1, space)
    for weights in actor.parameters():
        weights.zero_()
    actor.b3[0, 0] = torch.tensor([mean, math.atanh((log_std + 5) / 3.5 - 1)])

    def density(action):
        u = math.atanh((action - 0.5) / scale)
        return scipy.stats.norm.pdf(u, mean, math.exp(log_std)) / (scale * (1 - math.tanh(u) ** 2))

    mode = scale * math.tanh(mean) + 0.5
    low, high = max(mode - r, 0.5 - scale + 1e-12), min(mode + r, 0.5 + scale - 1e-12)
    expected = scipy.integrate.quad(density, low, high, limit=1000, points=[mode])[0]
    obs = torch.zeros(3, 1)
    assert klac.exploit_probability(actor, obs, r).item() == pytest.approx(expected, abs=2e-3)
    generator = np.random.default_rng(0)
    actions = np.array([klac.act(actor, np.zeros(1), generator)[0] for _ in range(2_000)])
    assert np.mean(np.abs(actions - mode) <= r) == pytest.approx(expected, abs=0.04)


def test_the_gaussian_before_tanh_alone_would_be_wrong_away_from_the_centre():
    """Where it says 0.5, at a mean of 1 before tanh, 0.88 of the actions are within r of the mode."""
    r, sigma = 0.25, 0.25 / scipy.stats.norm.ppf(0.75)
    actor = klac.Actor(1, box(1.0, d=2))
    for weights in actor.parameters():
        weights.zero_()
    actor.b3[0, 0] = torch.tensor([1.0, 1.0] + 2 * [math.atanh((math.log(sigma) + 5) / 3.5 - 1)])
    low, high = (np.arctanh(np.tanh(1) + end) if abs(np.tanh(1) + end) < 1 else np.inf for end in (-r, r))
    one = scipy.stats.norm.cdf(high, 1, sigma) - scipy.stats.norm.cdf(low, 1, sigma)
    assert one == pytest.approx(0.88, abs=0.01)
    assert klac.exploit_probability(actor, torch.zeros(1, 1), r).item() == pytest.approx(one**2, rel=1e-5)


def test_most_random_squashed_gaussian_is_that_much_below_the_uniform_policy():
    """The 0.0096 nats a dimension by which a target must stay below log vol, by quadrature and a search over sigma."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)

    def entropy(sigma):  # of tanh(sigma z): that of the Gaussian plus the mean log slope of tanh
        slope = -2 * (np.logaddexp(sigma * nodes, -sigma * nodes) - math.log(2))  # of tanh: 1 / cosh^2
        return 0.5 * math.log(2 * math.pi * math.e) + math.log(sigma) + (weights @ slope) / weights.sum()

    best = scipy.optimize.minimize_scalar(lambda sigma: -entropy(sigma), bounds=(0.3, 2), method="bounded")
    assert math.log(2) + best.fun == pytest.approx(0.0096, abs=1e-4)


@pytest.mark.parametrize("module", BOTH)
def test_actions_never_leave_the_box_by_a_rounding(module, monkeypatch):
    """Drift asserts that its box contains each action; this box's ends are no float32, and the policy saturates."""
    monkeypatch.setattr(tests.envs.Drift, "action_space", gym.spaces.Box(np.float32([-1.4]), np.float32([0.8])))
    real = module.Actor.forward
    monkeypatch.setattr(module.Actor, "forward", lambda self, obs: (50 * real(self, obs)[0], real(self, obs)[1]))
    module.train(module.Args(env_id="Drift-v0", total_timesteps=400, **SHORT))


@pytest.mark.parametrize("module", BOTH)
def test_an_environment_that_overwrites_its_action_changes_nothing_that_is_stored(module, monkeypatch):
    stored, sent, real = [], [], module.ReplayBuffer.add
    monkeypatch.setattr(module.ReplayBuffer, "add", lambda self, *t: stored.append(t[1].copy()) or real(self, *t))
    real_step = tests.envs.Drift.step

    def step(self, action):
        sent.append(action.copy())
        result = real_step(self, action)
        action[:] = 7
        return result

    monkeypatch.setattr(tests.envs.Drift, "step", step)
    module.train(module.Args(env_id="Drift-v0", total_timesteps=150, **SHORT))
    assert np.array_equal(stored, sent[1:151])  # the first is that of the check
    assert np.max(stored) <= 3


def test_evaluation_plays_the_mean_action():
    args = klac.Args(env_id="Point-v0", eval_episodes=3)
    actor = klac.Actor(2, make_env("Point-v0").action_space)
    for parameter in actor.parameters():
        parameter.zero_()
    actor.b3[0, 0] = torch.tensor([0.0, 0.0, 5.0, 5.0])  # mean 0, the widest spread
    starts = np.random.default_rng([args.seed, 1])
    env = make_env("Point-v0")
    distances = [np.linalg.norm(env.reset(seed=int(starts.integers(2**31)))[0]) for _ in range(3)]
    returns = klac.evaluate(actor, args, None)
    assert returns.tolist() == pytest.approx([-20 * distance for distance in distances])  # it stays where it was


@pytest.mark.parametrize("module", BOTH)
def test_q_minus_return_and_warm_up_actions(scalars, monkeypatch, module):
    """The critic's value of the first state and the action taken there, less the discounted rewards that followed."""
    stored, networks, real_add, real_networks = [], [], module.ReplayBuffer.add, module.make_networks
    monkeypatch.setattr(module.ReplayBuffer, "add", lambda self, *t: stored.append(t) or real_add(self, *t))
    monkeypatch.setattr(module, "make_networks", lambda *a: networks.append(real_networks(*a)) or networks[-1])
    args = module.Args(env_id="Drift-v0", total_timesteps=160, gamma=0.8, policy_lr=1e-12, q_lr=1e-12, **SHORT)
    logged = scalars(module.train(args))
    warm_up = np.array([action[0] for _, action, *_ in stored[:100]])
    assert warm_up.min() < -0.8 < 2.8 < warm_up.max()  # uniform on the box, [-1, 3]
    expected, episode = [], []
    ends = {step for step, _ in logged["charts/episodic_return"]}
    for step, (obs, action, reward, _, _) in enumerate(stored):
        episode.append((step, obs, action, reward))
        if step in ends:
            first, obs, action, _ = episode[0]
            x = torch.tensor([*obs, *action], dtype=torch.float32)[None]
            value = min(q_by_hand(networks[0][1], k, x).item() for k in range(2))
            discounted = sum(0.8**t * r for t, (*_, r) in enumerate(episode))
            expected += [value - discounted] if first >= 100 else []
            episode = []
    assert len(expected) > 5
    assert [value for _, value in logged["charts/q_minus_return"]] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_target_networks_move_by_tau(monkeypatch):
    networks, seen, real_networks, real_target = [], [], klac.make_networks, klac.td_target

    def record(batch, noise, actor, target_critics, *rest):
        online = [p.clone() for p in networks[0][1].parameters()]
        seen.append((online, [p.clone() for p in target_critics.parameters()]))
        return real_target(batch, noise, actor, target_critics, *rest)

    monkeypatch.setattr(klac, "make_networks", lambda *a: networks.append(real_networks(*a)) or networks[-1])
    monkeypatch.setattr(klac, "td_target", record)
    klac.train(klac.Args(env_id="Drift-v0", total_timesteps=130, **SHORT))
    assert all(torch.equal(a, b) for a, b in zip(*seen[0], strict=True))  # they start as copies
    for (_, before), (online, after) in itertools.pairwise(seen):
        for start, end, parameter in zip(before, after, online, strict=True):
            torch.testing.assert_close(end, 0.995 * start + 0.005 * parameter)
    assert not torch.equal(*(parameters[0] for parameters in seen[-1]))


@pytest.mark.parametrize("module", BOTH)
def test_actor_and_temperature_take_two_steps_every_two(monkeypatch, module):
    calls = {"critic": 0, "actor": 0}

    def counted(name, kind):
        real = getattr(module, name)

        def wrapper(*a):
            calls[kind] += 1
            return real(*a)

        monkeypatch.setattr(module, name, wrapper)

    counted("td_target", "critic")
    counted("actor_loss", "actor")
    steps, real = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a: steps.append(self) or real(self, *a))
    module.train(module.Args(env_id="Drift-v0", total_timesteps=141, **SHORT))
    assert calls == {"critic": 40, "actor": 40}
    assert sorted(Counter(map(id, steps)).values()) == [40, 40, 40]  # critics, actor, temperature


@pytest.mark.parametrize("task", TASKS)
def test_default_radius_is_reachable_on_every_task_with_a_target_above_sac_s(task):
    space = make_env(task).action_space
    d = space.shape[0]
    defaults = klac.Args()
    for p in (defaults.p_start, defaults.p_end):
        assert -d < klac.exploit_entropy(p, defaults.exploit_radius, d) < klac.entropy_range(space)[1]
    volume = np.prod(np.subtract(space.high, space.low, dtype=np.float64))
    assert klac.log_volume(space) == pytest.approx(math.log(volume))


@pytest.mark.parametrize("half", [0.05, 1.0, 1000.0])
def test_the_range_of_entropies_is_that_of_quadrature(half):
    """Of tanh(sigma z): the entropy of the Gaussian and the mean log slope of tanh."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)

    def entropy(sigma):
        slope = -2 * (np.logaddexp(sigma * nodes, -sigma * nodes) - math.log(2))
        gaussian = 0.5 * math.log(2 * math.pi * math.e) + math.log(sigma)
        return gaussian + (weights @ slope) / weights.sum() + math.log(half)

    lowest, highest = klac.entropy_range(box(half, d=3))
    assert lowest == pytest.approx(3 * entropy(math.exp(-5)), abs=1e-3)
    most = max(entropy(sigma) for sigma in np.linspace(0.3, 2, 500))
    assert highest == pytest.approx(3 * most, abs=1e-3)


def accepted(module, **flags):
    """None if train got beyond its checks, else what it said."""

    class Accepted(Exception):
        pass

    def stop(*_):
        raise Accepted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Run", stop)
        try:
            module.train(module.Args(**flags))
        except Accepted:
            return None
        except module.UsageError as refusal:
            return str(refusal)


def register_push(half):
    space = gym.spaces.Box(-half, half, (1,), np.float32)

    class Push(tests.envs.Strange):
        def __init__(self):
            super().__init__(action=space)

        def step(self, action):
            return self.observation_space.sample(), 0.0, False, False, {}

    gym.register(f"Push{half:g}-v0", Push, max_episode_steps=20)
    return f"Push{half:g}-v0"


@pytest.mark.parametrize("module", BOTH)
def test_targets_beyond_either_end_are_refused_and_what_is_named_is_valid(module):
    flags = {"env_id": "Swimmer-v5"} | ({"anneal": False} if module is klac else {})
    lowest, highest = klac.entropy_range(make_env("Swimmer-v5").action_space)
    for target in (lowest + 1e-6, 0.0, highest - 1e-6):
        assert accepted(module, target_entropy=target, **flags) is None
    for target in (lowest - 1e-6, highest + 1e-6, 7.0):
        message = accepted(module, target_entropy=target, **flags)
        assert message.startswith(f"--target-entropy {target}: must be in (")
        ends = [float(end) for end in message.split("in (")[1].split(")")[0].split(", ")]
        assert ends == pytest.approx([lowest, highest], rel=1e-3)
    assert accepted(module, target_entropy=7.0, autotune=False, **flags) is None


def test_too_narrow_and_too_wide_boxes_are_refused_with_the_flag_that_helps():
    tiny, wide = register_push(0.05), register_push(1000.0)
    try:
        message = accepted(sac, env_id=tiny)
        assert message.startswith("--target-entropy -1.0: must be in (-6.5")
        assert accepted(sac, env_id=tiny, target_entropy=-3.0) is None
        for env_id in (tiny, wide, "Swimmer-v5"):
            message = accepted(klac, env_id=env_id, exploit_radius=0.9 if env_id != wide else 0.25)
            assert message.startswith("--exploit-radius "), env_id
            low, high = (float(end) for end in message.split("must be in (")[1].split(")")[0].split(", "))
            for r in (1.001 * low, (low + high) / 2, 0.999 * high):
                assert accepted(klac, env_id=env_id, exploit_radius=r) is None
            for r in (0.999 * low, 1.001 * high):
                assert accepted(klac, env_id=env_id, exploit_radius=r) is not None
        message = accepted(klac, env_id="Swimmer-v5", p_start=0.001, p_end=0.999999)
        assert message.endswith("(if that is empty, take p closer together)")
        low, high = (float(end) for end in message.split("must be in (")[1].split(")")[0].split(", "))
        assert low > high
        assert accepted(klac, env_id="Swimmer-v5", exploit_radius=0.9, autotune=False) is None
    finally:
        for env_id in (tiny, wide):
            del gym.registry[env_id]


@pytest.mark.parametrize("module", BOTH)
def test_bounds_whose_width_overflows_are_unbounded(module, monkeypatch):
    monkeypatch.setattr(tests.envs.Drift, "action_space", gym.spaces.Box(-3e38, 3e38, (1,), np.float32))
    assert "must be a bounded float Box" in accepted(module, env_id="Drift-v0")


def test_annealed_run_logs_its_schedule_and_what_was_realised(scalars):
    args = klac.Args(env_id="Drift-v0", total_timesteps=400, anneal_timesteps=200, policy_frequency=1, **SHORT)
    logged = {tag: dict(values) for tag, values in scalars(klac.train(args)).items()}
    p = logged["policy/target_exploit_probability"]
    assert p[150] == pytest.approx(0.5 + 0.3 * 150 / 200)
    assert p[300] == pytest.approx(0.8)
    assert logged["policy/target_entropy"][300] == pytest.approx(klac.exploit_entropy(0.8, 0.25, 1), rel=1e-5)
    for step, entropy in logged["policy/entropy"].items():
        assert logged["policy/kl"][step] == pytest.approx(math.log(4) - entropy, abs=1e-4)
        excess = entropy - logged["policy/target_entropy"][step]  # of the actor's own sample
        alpha = logged["losses/alpha"].get(step - 1, 1.0)
        assert logged["losses/alpha_loss"][step] == pytest.approx(alpha * excess, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("module", BOTH)
@pytest.mark.parametrize(("ending", "value"), [("Termination", 1.0), ("Truncation", 2.0)])
def test_a_termination_does_not_bootstrap_and_a_truncation_does(scalars, module, ending, value):
    """Reward 1 and gamma 1/2: a terminated step is worth 1; one cut by the clock goes on for 1 / (1 - gamma) = 2."""
    args = module.Args(env_id=f"ContinuousOneStep{ending}-v0", total_timesteps=1_200, gamma=0.5, autotune=False)
    args.alpha, args.batch_size, args.learning_starts, args.log_interval, args.tau = 0.0, 64, 100, 10, 0.05
    args.eval_episodes, args.compile = 1, False
    if module is klac:
        args.bias = False
    values = scalars(module.train(args))["losses/qf1_values"]
    assert np.mean([v for _, v in values[-20:]]) == pytest.approx(value, abs=0.1)


def test_reference_is_the_density_of_the_earlier_actor(scalars):
    """KL(pi || q) is near 0 for a policy that is q, and log vol - H for the uniform reference."""
    first = klac.train(klac.Args(env_id="Drift-v0", total_timesteps=200, **SHORT))
    args = klac.Args(env_id="Drift-v0", reference=str(first), compile=False)
    env = make_env("Drift-v0")
    actor = klac.Actor(3, env.action_space)
    actor.load_state_dict(torch.load(first / "actor.pt", weights_only=True)["actor"])
    log_q = klac.make_log_q(args, env, torch.device("cpu"))
    obs = torch.randn(50, 3)
    _, log_pi, u = drawn(actor, obs, torch.randn(50, 1))
    torch.testing.assert_close(log_q(obs, u), log_pi, rtol=1e-3, atol=1e-4)
    uniform = klac.make_log_q(klac.Args(env_id="Drift-v0"), env, torch.device("cpu"))
    assert uniform(obs, u) == pytest.approx(-math.log(4))

    args.total_timesteps, args.autotune, args.alpha, args.policy_lr = 900, False, 100.0, 1e-3
    args.learning_starts, args.log_interval, args.eval_episodes, args.seed = 100, 2, 1, 5
    kl = [value for _, value in scalars(klac.train(args))["policy/kl"]]
    assert kl[0] > 0.05
    assert np.mean(kl[-20:]) < 0.02


def test_kl_to_an_earlier_actor_is_held_at_its_budget(scalars):
    """q goes against the reward, so that the KL must be paid for."""
    q = klac.Actor(3, make_env("Drift-v0").action_space)
    q.w3.zero_()
    q.b3[0, 0] = torch.tensor([-0.5, math.atanh((5 - 0.7) / 3.5 - 1)])  # mean -0.5, log std -0.7
    torch.save({"args": {"env_id": "Drift-v0"}, "actor": q.state_dict()}, "q.pt")
    args = klac.Args(env_id="Drift-v0", total_timesteps=1_500, reference="q.pt", p_end=0.5, batch_size=64, **SHORT)
    args.q_lr, args.policy_lr = 3e-3, 1e-3
    run_dir = klac.train(args)
    logged = {tag: np.array(values).T[1] for tag, values in scalars(run_dir).items()}
    budget = math.log(4) - klac.exploit_entropy(0.5, 0.25, 1)
    np.testing.assert_allclose(logged["policy/target_kl"], budget, rtol=1e-5)
    assert logged["policy/kl"][-300:].mean() == pytest.approx(budget, abs=0.1)
    actor = klac.Actor(3, make_env("Drift-v0").action_space)
    actor.load_state_dict(torch.load(run_dir / "actor.pt", weights_only=True)["actor"])
    mean, log_std = (x.item() for x in actor(torch.tensor([[0.0, 1.0, 0.5]])))
    assert mean > 0  # towards the reward, against q's -0.5
    # tanh changes no KL: it is that of two Gaussians. At this one state it need not be the mean, but of its size
    kl = -0.7 - log_std + (math.exp(2 * log_std) + (mean + 0.5) ** 2) / (2 * math.exp(-1.4)) - 0.5
    assert budget / 3 < kl < 3 * budget


@pytest.mark.parametrize("module", BOTH)
def test_it_learns(scalars, module):
    """A point that must be brought to the origin: a random policy earns about -85, a straight way some -9."""
    args = module.Args(env_id="Point-v0", total_timesteps=3_000, learning_starts=300, batch_size=128, log_interval=100)
    args.policy_lr, args.eval_episodes, args.compile = 1e-3, 20, False
    logged = scalars(module.train(args))
    assert np.mean([v for step, v in logged["charts/episodic_return"] if step < 300]) < -50
    assert logged["eval/episodic_return"][0][1] > -15


@pytest.mark.slow
@pytest.mark.parametrize("module", BOTH)
def test_pendulum_is_solved(scalars, module):
    args = module.Args(env_id="Pendulum-v1", total_timesteps=15_000, learning_starts=1_000, eval_episodes=20)
    assert scalars(module.train(args))["eval/episodic_return"][0][1] > -250


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_and_writes_only_its_run(task, capfd):
    args = klac.Args(env_id=task, total_timesteps=220, learning_starts=200, buffer_size=1_000, eval_episodes=1)
    args.compile = False
    assert (klac.train(args) / "actor.pt").is_file()
    assert capfd.readouterr().err == ""
    assert [path.name for path in Path().iterdir()] == ["runs"]
