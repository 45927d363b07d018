"""The mathematics of the continuous scripts, against numerical integration, SciPy and loops written out by hand."""

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
import klac_discrete
import sac_adaent_continuous as adaent
import sac_continuous as sac
import tests.envs

BOTH = [sac, klac]
ALL = [*BOTH, adaent]
TASKS = ["Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Ant-v5", "Humanoid-v5", "Swimmer-v5", "InvertedPendulum-v5",
         "Reacher-v5", "Pendulum-v1"]  # fmt: skip
SHORT = {"learning_starts": 100, "log_interval": 1, "eval_episodes": 1, "buffer_size": 10_000, "compile": False}
SHORT |= {"batch_size": 16}
# One dimension off the centre, and one whose ends are no float32
SPACE = gym.spaces.Box(np.float32([-1, -0.4]), np.float32([3, 0.4]))
SCALE, CENTRE = np.float64(SPACE.high - SPACE.low) / 2, np.float64(SPACE.high + SPACE.low) / 2
LOG_VOLUME = math.log(4 * 0.8)


class Push(tests.envs.Strange):
    """Any action in [-half, half] does as well."""

    def __init__(self, half):
        super().__init__(action=gym.spaces.Box(-half, half, (1,), np.float32))

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


for name, half_width in (("PushTiny-v0", 0.05), ("PushWide-v0", 1000.0)):
    if name not in gym.registry:
        gym.register(name, Push, max_episode_steps=20, kwargs={"half": half_width})


def box(scale, d=1, centre=0.0):
    return gym.spaces.Box(np.float32(centre - scale), np.float32(centre + scale), (d,))


def make_env(task):
    return klac.make_env(klac.Args(env_id=task))


def drawn(actor, obs, noise):
    """Actions, log pi and the points before tanh, of this noise."""
    mean, log_std = actor(obs)
    u = mean + log_std.exp() * noise
    return actor.squash(u), actor.log_prob(mean, log_std, u), u


def some_batch(module, size=12, seed=0):
    """A random batch, its noise, an actor and critics, with SPACE's actions."""
    torch.manual_seed(seed)
    obs_dim, d = 3, 2
    actor, critics = module.Actor(obs_dim, SPACE), module.Networks(2, obs_dim + d, 1)
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
        assert ((action.numpy() >= SPACE.low) & (action.numpy() <= SPACE.high)).all()
        constraint = (lambda obs, u: -LOG_VOLUME) if module is klac else LOG_VOLUME
        gradients, _, log = module.actor_gradients(batch, noise, actor, critics, constraint, torch.tensor(1.0))
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


def doubles(network):
    """Its parameters in float64, as leaves that take a gradient."""
    return {name: value.detach().double().requires_grad_() for name, value in network.named_parameters()}


def by_hand(parameters, k, x):
    """The k-th network of a stack, (B, outputs), by torch's own linear layers."""
    w1, b1, w2, b2, w3, b3 = (parameters[name][k] for name in ("w1", "b1", "w2", "b2", "w3", "b3"))
    h = torch.relu(F.linear(x, w1.T, b1[0]))
    h = torch.relu(F.linear(h, w2.T, b2[0]))
    return F.linear(h, w3.T, b3[0])


def q_by_hand(critics, k, x):
    """The k-th critic's value, (B,), in float64."""
    return by_hand(doubles(critics), k, x.double())[:, 0]


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
            action.append(SCALE[k] * math.tanh(u) + CENTRE[k])
            log_pi += scipy.stats.norm.logpdf(u, mean[i, k].item(), std) - math.log(SCALE[k] * (1 - math.tanh(u) ** 2))
        x = torch.cat([batch.next_obs[i], torch.tensor(action)])[None]
        q = min(q_by_hand(critics, k, x).item() for k in range(2))
        value = q - extra * log_pi if module is sac else q
        y = batch.rewards[i].item() + (extra if module is klac else 0)
        expected.append(y + (0 if batch.terminations[i] else 0.9 * value))
    y = module.td_target(batch, noise, actor, critics, 0.9, extra)
    assert y.shape == (12,)
    assert y.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def log_prob_by_hand(mean, std, u):
    """log pi of the action of u in SPACE, (B,)."""
    log_normal = -(((u - mean) / std) ** 2) / 2 - torch.log(std) - math.log(2 * math.pi) / 2
    return (log_normal - torch.log(torch.tensor(SCALE) * (1 - torch.tanh(u) ** 2))).sum(1)


def gaussian_by_hand(parameters, obs):
    """Mean and standard deviation before tanh, (B, 2) each."""
    mean, x = by_hand(parameters, 0, obs).split(2, dim=1)
    return mean, torch.exp(-5 + 7 / 2 * (torch.tanh(x) + 1))


def drawn_by_hand(parameters, obs, noise):
    """Actions in SPACE, their log pi and the points before tanh."""
    mean, std = gaussian_by_hand(parameters, obs)
    u = mean + std * noise
    return torch.tensor(SCALE) * torch.tanh(u) + torch.tensor(CENTRE), log_prob_by_hand(mean, std, u), u


def close_gradients(gradients, parameters):
    assert gradients.keys() == parameters.keys()
    for name, gradient in gradients.items():
        expected = parameters[name].grad
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("module", BOTH)
def test_critic_gradients_are_those_of_a_float64_reference(module, seed):
    batch, noise, actor, critics = some_batch(module, size=64, seed=seed)
    extra = 0.3  # beta for KLAC and alpha for SAC
    for targets in (module.Networks(2, 5, 1), critics):  # the last: no gradient comes through the target
        with torch.no_grad():
            action, log_pi, _ = drawn_by_hand(doubles(actor), batch.next_obs.double(), noise.double())
            x = torch.cat([batch.next_obs.double(), action], 1)
            value = torch.minimum(q_by_hand(targets, 0, x), q_by_hand(targets, 1, x))
            value = value - extra * log_pi if module is sac else value
            y = batch.rewards.double() + (extra if module is klac else 0)
            y = torch.where(batch.terminations == 1, y, y + 0.9 * value)
        parameters = doubles(critics)
        x = torch.cat([batch.obs, batch.actions], 1).double()
        q = torch.stack([by_hand(parameters, k, x)[:, 0] for k in range(2)])
        losses = ((q - y) ** 2).mean(1)
        losses.sum().backward()
        gradients, log = module.critic_gradients(batch, critics, noise, actor, targets, 0.9, extra)
        close_gradients(gradients, parameters)
        for k in range(2):
            assert log[f"losses/qf{k + 1}_loss"].item() == pytest.approx(losses[k].item(), rel=1e-5)
            assert log[f"losses/qf{k + 1}_values"].item() == pytest.approx(q[k].mean().item(), rel=1e-4, abs=1e-5)
        assert log["losses/qf_loss"].item() == pytest.approx(losses.mean().item(), rel=1e-5)


REFERENCES = {"uniform": lambda obs, u: -LOG_VOLUME, "quadratic": lambda obs, u: -(u**2).sum(1) + obs[:, 0]}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("module", "reference"), [(sac, "uniform"), *[(klac, q) for q in (*REFERENCES, "an actor")]])
def test_actor_gradients_are_those_of_a_float64_reference(module, reference, seed):
    """KLAC's also where log q depends on the action, by a formula and by another actor."""
    batch, noise, actor, critics = some_batch(module, size=64, seed=seed)
    alpha, other = torch.tensor(0.7), module.Actor(3, SPACE)
    log_q = log_q_by_hand = REFERENCES.get(reference)
    if reference == "an actor":
        q_parameters = doubles(other)
        log_q = lambda obs, u: other.log_prob(*other(obs), u)  # noqa: E731
        log_q_by_hand = lambda obs, u: log_prob_by_hand(*gaussian_by_hand(q_parameters, obs), u)  # noqa: E731
    parameters, obs = doubles(actor), batch.obs.double()
    action, log_pi, u = drawn_by_hand(parameters, obs, noise.double())
    x = torch.cat([obs, action], 1)
    min_q = torch.minimum(q_by_hand(critics, 0, x), q_by_hand(critics, 1, x))
    log_ratio = log_pi - log_q_by_hand(obs, u)
    loss = (alpha.double() * (log_ratio if module is klac else log_pi) - min_q).mean()
    loss.backward()
    constraint = log_q if module is klac else LOG_VOLUME
    gradients, kl, log = module.actor_gradients(batch, noise, actor, critics, constraint, alpha)
    close_gradients(gradients, parameters)
    assert kl.item() == pytest.approx(log_ratio.mean().item(), rel=1e-5)
    assert log["policy/kl"].item() == kl.item()
    assert log["losses/actor_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert log["policy/entropy"].item() == pytest.approx(-log_pi.mean().item(), rel=1e-4)


def test_actor_losses_are_means_of_the_plain_formula():
    class Given(torch.nn.Module):
        def forward(self, obs):
            return torch.tensor([[0.1], [0.2]]), torch.zeros(2, 1)

        def squash(self, u):
            return torch.tanh(u)

        def log_prob(self, mean, log_std, u):
            return torch.tensor([1.0, 2.0])

    min_q, noise = torch.tensor([[3.0], [1.0]]), torch.zeros(2, 1)
    batch = klac.Batch(torch.zeros(2, 3), *[None] * 4)
    arguments = {}, batch, noise, Given(), lambda obs, action: torch.stack([min_q + 1, min_q])
    alpha = torch.tensor(0.2)
    loss, (log_pi, log_ratio) = klac.actor_loss(*arguments, lambda obs, u: 5 * u[:, 0], alpha)
    assert (log_pi.tolist(), log_ratio.tolist()) == ([1, 2], pytest.approx([1 - 0.5, 2 - 1.0]))
    assert loss.item() == pytest.approx(((0.2 * (1 - 0.5) - 3) + (0.2 * (2 - 1) - 1)) / 2)
    loss, (log_pi, log_ratio) = sac.actor_loss(*arguments, 0.5, alpha)
    assert (log_pi.tolist(), log_ratio.tolist()) == ([1, 2], [1.5, 2.5])
    assert loss.item() == pytest.approx(((0.2 - 3) + (0.4 - 1)) / 2)


@pytest.mark.parametrize("module", ALL)
def test_no_gradient_of_the_actor_step_enters_the_critics(monkeypatch, module):
    """Nor the other way round: a network changes in its own steps alone, and by the gradients made for it."""
    networks, steps, before, made = [], [], {}, {}
    real_networks, real_descend = module.make_networks, module.descend

    def values(network):
        return [parameter.clone() for parameter in network.parameters()]

    def watch(optimizer, network, gradients):
        index = [id(each) for each in networks[0]].index(id(network))
        own = {id(parameter) for parameter in network.parameters()}
        assert {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} == own
        assert gradients.keys() == dict(network.named_parameters()).keys()
        for k, each in enumerate(networks[0]):  # since the last step nothing moved them
            assert all(torch.equal(a, b) for a, b in zip(before.get(k, values(each)), values(each), strict=True))
        old = values(network)
        real_descend(optimizer, network, gradients)
        assert any(not torch.equal(a, b) for a, b in zip(old, network.parameters(), strict=True))
        steps.append(index)
        made[index] = gradients
        for k, each in enumerate(networks[0]):
            if k != index and k in before:
                assert all(torch.equal(a, b) for a, b in zip(before[k], values(each), strict=True))
            before[k] = values(each)
            for name, parameter in each.named_parameters():
                assert parameter.grad is made.get(k, {}).get(name)

    monkeypatch.setattr(module, "make_networks", lambda *a: networks.append(real_networks(*a)) or networks[-1])
    monkeypatch.setattr(module, "descend", watch)
    module.train(module.Args(env_id="Drift-v0", total_timesteps=141, **SHORT))
    assert Counter(steps) == {0: 40, 1: 40}  # the actor's and the critics'


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("module", ALL)
def test_weights_start_as_those_of_torch_s_linear_layers(module, seed):
    torch.manual_seed(seed)
    critics, linear = module.Networks(60, 40, 3), torch.nn.Linear(256, 256)
    for name, fan_in in (("w1", 40), ("b1", 40), ("w2", 256), ("b2", 256), ("w3", 256), ("b3", 256)):
        values, end = getattr(critics, name).double().flatten().numpy(), 1 / math.sqrt(fan_in)
        assert np.abs(values).max() <= end * (1 + 1e-6)
        assert values.std() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=4 / math.sqrt(len(values)))
        assert scipy.stats.kstest(values, scipy.stats.uniform(-end, 2 * end).cdf).pvalue > 1e-4, name
    assert critics.w2.std().item() == pytest.approx(linear.weight.std().item(), rel=0.02)
    assert len({float(network[0, 0]) for network in critics.w1}) == 60  # no two of a stack are the same
    actor = module.Actor(40, SPACE)
    for name, fan_in in (("w1", 40), ("w2", 256), ("w3", 256)):
        values, end = getattr(actor, name).double().flatten().numpy(), 1 / math.sqrt(fan_in)
        assert scipy.stats.kstest(values, scipy.stats.uniform(-end, 2 * end).cdf).pvalue > 1e-4, name


def mass(mean, std, scale, centre, r):
    """The squashed Gaussian's density, in action units, integrated over what the box holds of mode - r to mode + r."""

    def density(action):
        y = (action - centre) / scale
        return scipy.stats.norm.pdf(math.atanh(y), mean, std) / (scale * (1 - y * y))

    mode = math.tanh(mean)
    ends = [math.atanh(min(max(mode + side * r / scale, -1 + 1e-15), 1 - 1e-15)) for side in (-1, 1)]
    u = np.linspace(*np.clip(ends, mean - 9 * std, mean + 9 * std), 60)  # the density is steep near the bounds
    pieces = itertools.pairwise(centre + scale * np.tanh(u))
    return sum(scipy.integrate.quad(density, low, high)[0] for low, high in pieces)


@pytest.mark.parametrize("scale", [0.4, 2.0])
@pytest.mark.parametrize("log_std", [-1.0, 0.3])
@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0, -2.0])
def test_exploit_probability_is_the_density_integrated_over_the_region(mean, log_std, scale):
    r = 0.25
    actor = klac.Actor(1, box(scale, centre=0.5))
    for weights in actor.parameters():
        weights.zero_()
    actor.b3[0, 0] = torch.tensor([mean, math.atanh((log_std + 5) / 3.5 - 1)])
    expected, mode = mass(mean, math.exp(log_std), scale, 0.5, r), scale * math.tanh(mean) + 0.5
    assert klac.exploit_probability(actor, torch.zeros(3, 1), r).item() == pytest.approx(expected, abs=2e-6)
    assert klac.exploit_probability(actor, torch.zeros(3, 1), 2.1 * scale).item() == 1  # all of the box
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    action, _, _ = drawn(actor, torch.zeros(1, 1), noise)
    assert np.mean(np.abs(action.numpy() - mode) <= r) == pytest.approx(expected, abs=0.005)
    generator = np.random.default_rng(0)
    actions = np.array([klac.act(actor, np.zeros(1), generator)[0] for _ in range(2_000)])
    assert np.mean(np.abs(actions - mode) <= r) == pytest.approx(expected, abs=0.04)


def test_exploit_probability_is_a_product_over_the_dimensions_and_a_mean_over_the_states():
    """In each state and dimension another Gaussian, and in each dimension another scale."""
    r, scale, centre = 0.25, [0.4, 2.0], [0.5, -1.0]
    means = [[0.0, 1.0], [3.0, -2.0], [1.0, 0.5]]
    log_stds = [[-1.0, -1.0], [0.3, -0.5], [0.0, 0.3]]
    actor = klac.Actor(1, gym.spaces.Box(np.float32([0.1, -3]), np.float32([0.9, 1])))
    actor.forward = lambda obs: (torch.tensor(means), torch.tensor(log_stds))
    each = [
        [mass(m, math.exp(s), *of_box, r) for m, s, *of_box in zip(*state, scale, centre, strict=True)]
        for state in zip(means, log_stds, strict=True)
    ]
    expected = np.mean(np.prod(each, axis=1))
    assert klac.exploit_probability(actor, torch.zeros(3, 1), r).item() == pytest.approx(expected, abs=2e-6)
    noise = torch.randn(200_000, 3, 2, generator=torch.Generator().manual_seed(0))
    action = actor.squash(torch.tensor(means) + torch.tensor(log_stds).exp() * noise)
    inside = (action - actor.squash(torch.tensor(means))).abs() <= r
    assert inside.all(-1).double().mean().item() == pytest.approx(expected, abs=0.003)


def test_the_gaussian_before_tanh_alone_would_be_wrong_away_from_the_centre():
    """Where it says 0.5, at a mean of 1 before tanh, 0.88 of the actions are within r of the mode."""
    r, sigma = 0.25, 0.25 / scipy.stats.norm.ppf(0.75)
    assert 2 * scipy.stats.norm.cdf(r / sigma) - 1 == pytest.approx(0.5)
    integrated = mass(1.0, sigma, 1.0, 0.0, r)
    assert integrated == pytest.approx(0.8798, abs=1e-4)
    for d in (1, 2):
        actor = klac.Actor(1, box(1.0, d=d))
        actor.forward = lambda obs, d=d: (torch.ones(1, d), torch.full((1, d), math.log(sigma)))
        probability = klac.exploit_probability(actor, torch.zeros(1, 1), r).item()
        assert probability == pytest.approx(integrated**d, abs=2e-6)


@pytest.mark.parametrize("module", ALL)
def test_realised_exploit_probability_is_logged_with_the_run_s_radius(scalars, monkeypatch, module):
    mean = torch.tensor([0.7, -0.2])
    monkeypatch.setattr(
        module.Actor, "forward", lambda self, obs: (mean.repeat(len(obs), 1), torch.full((len(obs), 2), -1.3))
    )
    monkeypatch.setattr(tests.envs.Point, "action_space", gym.spaces.Box(-3, 3, (2,), np.float32))
    args = module.Args(env_id="Point-v0", total_timesteps=160, exploit_radius=0.4, autotune=False, **SHORT)
    expected = math.prod(mass(m, math.exp(-1.3), 3.0, 0.0, 0.4) for m in mean.tolist())
    realised = [value for _, value in scalars(module.train(args))["policy/exploit_probability"]]
    assert len(realised) > 20
    assert realised == pytest.approx([expected] * len(realised), rel=1e-4)


def test_most_random_squashed_gaussian_is_that_much_below_the_uniform_policy():
    """The 0.0096 nats a dimension by which a target must stay below log vol, by quadrature and a search over sigma."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)

    def entropy(sigma):  # of tanh(sigma z): that of the Gaussian plus the mean log slope of tanh
        slope = -2 * (np.logaddexp(sigma * nodes, -sigma * nodes) - math.log(2))  # of tanh: 1 / cosh^2
        return 0.5 * math.log(2 * math.pi * math.e) + math.log(sigma) + (weights @ slope) / weights.sum()

    best = scipy.optimize.minimize_scalar(lambda sigma: -entropy(sigma), bounds=(0.3, 2), method="bounded")
    assert math.log(2) + best.fun == pytest.approx(0.0096, abs=1e-4)


@pytest.mark.parametrize("module", [klac, *(pytest.param(other, marks=pytest.mark.slow) for other in (sac, adaent))])
def test_actions_never_leave_the_box_by_a_rounding(module, monkeypatch):
    """Drift asserts that its box contains each action; this box's ends are no float32, and the policy saturates."""
    monkeypatch.setattr(tests.envs.Drift, "action_space", gym.spaces.Box(np.float32([-1.4]), np.float32([0.8])))
    real = module.Actor.forward
    monkeypatch.setattr(module.Actor, "forward", lambda self, obs: (50 * real(self, obs)[0], real(self, obs)[1]))
    module.train(module.Args(env_id="Drift-v0", total_timesteps=300, **SHORT))


@pytest.mark.parametrize("module", ALL)
def test_an_environment_that_overwrites_its_action_changes_nothing_that_is_stored(module, monkeypatch):
    buffers, sent, real = [], [], module.ReplayBuffer.__init__
    monkeypatch.setattr(module.ReplayBuffer, "__init__", lambda self, *a: buffers.append(self) or real(self, *a))
    real_step = tests.envs.Drift.step

    def step(self, action):
        sent.append(action.copy())
        result = real_step(self, action)
        action[:] = 7
        return result

    monkeypatch.setattr(tests.envs.Drift, "step", step)
    module.train(module.Args(env_id="Drift-v0", total_timesteps=150, **SHORT))
    stored = buffers[0].columns.actions[:150]
    assert np.array_equal(stored, sent[1:151])  # the first is that of the check
    assert len({float(action) for action in stored[:, 0]}) > 100
    assert stored.max() <= 3


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


@pytest.mark.parametrize("module", ALL)
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


@pytest.mark.parametrize("module", ALL)
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


def printed_range(message):
    return [float(end) for end in message.split("must be in (")[1].split(")")[0].split(", ")]


@pytest.mark.parametrize("module", ALL)
def test_targets_beyond_either_end_are_refused_and_what_is_named_is_valid(module):
    flags = {"env_id": "Swimmer-v5"} | ({"anneal": False} if module is klac else {})
    lowest, highest = module.entropy_range(make_env("Swimmer-v5").action_space)
    for target in (lowest + 1e-6, 0.0, highest - 1e-6):
        assert accepted(module, target_entropy=target, **flags) is None
    for target in (lowest - 1e-6, highest + 1e-6, 7.0):
        message = accepted(module, target_entropy=target, **flags)
        assert message.startswith(f"--target-entropy {target}: must be in (")
        assert printed_range(message) == pytest.approx([lowest, highest], rel=1e-3)
    assert accepted(module, target_entropy=7.0, autotune=False, **flags) is None


@pytest.mark.parametrize("module", ALL)
def test_the_target_entropy_of_the_flag_is_what_the_temperature_holds(scalars, module):
    flags = SHORT | ({"anneal": False} if module is klac else {})
    for flag, target in ((None, -1.0), (-2.0, -2.0)):  # the default is -d
        args = module.Args(env_id="Drift-v0", total_timesteps=141, target_entropy=flag, policy_frequency=1, **flags)
        logged = {tag: dict(values) for tag, values in scalars(module.train(args)).items()}
        assert set(logged["policy/target_entropy"].values()) == {target}
        assert list(logged["policy/target_kl"].values()) == pytest.approx([math.log(4) - target] * 40)
        for step, entropy in logged["policy/entropy"].items():
            alpha = logged["losses/alpha"].get(step - 1, 1.0)
            assert logged["losses/alpha_loss"][step] == pytest.approx(alpha * (entropy - target), rel=1e-3, abs=1e-4)


def test_too_narrow_and_too_wide_boxes_are_refused_with_the_flag_that_helps():
    for module in (sac, adaent):
        message = accepted(module, env_id="PushTiny-v0")
        assert message.startswith("--target-entropy -1.0: must be in (")
        by_hand = [math.log(0.1) + 0.5 * math.log(2 * math.pi * math.e) - 5 - math.log(2), math.log(0.1) - 0.0096]
        assert printed_range(message) == pytest.approx(by_hand, abs=1e-3)
        assert accepted(module, env_id="PushTiny-v0", target_entropy=-3.0) is None
    for env_id, radius in (("PushTiny-v0", 0.9), ("PushTiny-v0", 0.25), ("PushWide-v0", 0.25), ("Swimmer-v5", 0.9)):
        message = accepted(klac, env_id=env_id, exploit_radius=radius)
        assert message.startswith(f"--exploit-radius {radius}"), env_id
        low, high = printed_range(message)
        for r in (1.001 * low, (low + high) / 2, 0.999 * high):
            assert accepted(klac, env_id=env_id, exploit_radius=r) is None
        for r in (0.999 * low, 1.001 * high):
            assert accepted(klac, env_id=env_id, exploit_radius=r) is not None


def test_the_radius_s_range_is_where_both_targets_of_p_are_in_the_range_of_entropies():
    space = make_env("Swimmer-v5").action_space
    for p_start, p_end in ((0.5, 0.8), (0.3, 0.95), (0.95, 0.3)):
        flags = {"env_id": "Swimmer-v5", "p_start": p_start, "p_end": p_end}
        for r in np.geomspace(0.003, 2, 60):
            targets = [klac.exploit_entropy(p, r, 2) for p in (p_start, p_end)]
            valid = klac.entropy_range(space)[0] < min(targets) <= max(targets) < klac.entropy_range(space)[1]
            assert (accepted(klac, exploit_radius=float(r), **flags) is None) == valid
        assert accepted(klac, exploit_radius=9.0, autotune=False, **flags) is None
        assert accepted(klac, exploit_radius=9.0, anneal=False, **flags) is None
    assert "--exploit-radius 0.6" in accepted(klac, env_id="Swimmer-v5", exploit_radius=0.6, p_start=0.95, p_end=0.3)


@pytest.mark.parametrize(("env_id", "radius"), [
    ("PushTiny-v0", 0.25),
    ("PushWide-v0", 0.25),
    ("Swimmer-v5", 0.9),
])  # fmt: skip
def test_every_radius_that_the_message_suggests_is_accepted(env_id, radius):
    low, high = printed_range(accepted(klac, env_id=env_id, exploit_radius=radius))
    for r in (low, (low + high) / 2, high):
        assert accepted(klac, env_id=env_id, exploit_radius=r) is None, r


def test_where_no_radius_works_p_must_come_closer_together():
    flags = {"env_id": "Swimmer-v5", "p_start": 0.001, "p_end": 0.999999}
    for r in np.geomspace(1e-6, 1e3, 200):
        message = accepted(klac, exploit_radius=float(r), **flags)
        assert message.startswith("--exploit-radius ")
        assert "with p closer together" in message


def test_a_probability_whose_root_is_one_is_refused():
    assert accepted(klac, env_id="Hopper-v5", p_end=1 - 2**-53).startswith("--p-end 0.9999999999999999: must be in (")


@pytest.mark.parametrize("unused", [{"anneal": False}, {"autotune": False, "alpha": 0.2}])
def test_a_p_that_is_not_used_is_not_refused(unused):
    assert accepted(klac, env_id="Drift-v0", p_start=2.0, **unused) is None
    assert accepted(klac_discrete, env_id="Walk-v0", p_start=2.0, **unused) is None


def test_where_no_radius_works_none_is_suggested():
    message = accepted(klac, env_id="Swimmer-v5", p_start=0.001, p_end=0.999999)
    assert "must be in (" not in message


@pytest.mark.parametrize("module", ALL)
def test_bounds_whose_width_overflows_are_unbounded(module, monkeypatch):
    monkeypatch.setattr(tests.envs.Drift, "action_space", gym.spaces.Box(-3e38, 3e38, (1,), np.float32))
    assert "must be a bounded, flat Box" in accepted(module, env_id="Drift-v0")
    monkeypatch.setattr(tests.envs.Drift, "action_space", gym.spaces.Box(-9e37, 9e37, (1,), np.float32))
    assert np.isfinite(module.make_env(module.Args(env_id="Drift-v0")).action_space.high).all()


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


@pytest.mark.parametrize("module", [klac, pytest.param(sac, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("ending", "value"), [("Termination", 1.0), ("Truncation", 2.0)])
def test_a_termination_does_not_bootstrap_and_a_truncation_does(scalars, module, ending, value):
    """Reward 1 and gamma 1/2: a terminated step is worth 1; one cut by the clock goes on for 1 / (1 - gamma) = 2."""
    args = module.Args(env_id=f"ContinuousOneStep{ending}-v0", total_timesteps=600, gamma=0.5, autotune=False)
    args.q_lr, args.alpha, args.batch_size, args.learning_starts, args.tau = 3e-3, 0.0, 32, 100, 0.05
    args.log_interval, args.eval_episodes, args.compile = 10, 1, False
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

    args.total_timesteps, args.autotune, args.alpha, args.policy_lr = 500, False, 100.0, 3e-3
    args.learning_starts, args.log_interval, args.eval_episodes, args.seed, args.batch_size = 100, 2, 1, 5, 64
    kl = [value for _, value in scalars(klac.train(args))["policy/kl"]]
    assert kl[0] > 0.05
    assert np.mean(kl[-20:]) < 0.02


def test_kl_to_an_earlier_actor_is_held_at_its_budget(scalars):
    """q goes against the reward, so that the KL must be paid for."""
    q = klac.Actor(3, make_env("Drift-v0").action_space)
    q.w3.zero_()
    q.b3[0, 0] = torch.tensor([-0.5, math.atanh((5 - 0.7) / 3.5 - 1)])  # mean -0.5, log std -0.7
    torch.save({"args": {"env_id": "Drift-v0"}, "actor": q.state_dict()}, "q.pt")
    args = klac.Args(env_id="Drift-v0", total_timesteps=1_500, reference="q.pt", p_end=0.5, **SHORT)
    args.q_lr, args.policy_lr, args.batch_size = 3e-3, 1e-3, 32
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


@pytest.mark.parametrize("module", [klac, pytest.param(sac, marks=pytest.mark.slow)])
def test_it_learns(scalars, module):
    """A point that must be brought to the origin: a random policy earns about -85, a straight way some -9."""
    args = module.Args(env_id="Point-v0", total_timesteps=1_800, learning_starts=300, batch_size=64, log_interval=100)
    args.policy_lr, args.q_lr, args.eval_episodes, args.compile = 1e-3, 3e-3, 20, False
    logged = scalars(module.train(args))
    assert np.mean([v for step, v in logged["charts/episodic_return"] if step < 300]) < -50
    assert logged["eval/episodic_return"][0][1] > -15


@pytest.mark.slow
@pytest.mark.parametrize("module", BOTH)
def test_pendulum_is_solved(scalars, module):
    args = module.Args(env_id="Pendulum-v1", total_timesteps=15_000, learning_starts=1_000, eval_episodes=20)
    args.compile = False
    assert scalars(module.train(args))["eval/episodic_return"][0][1] > -250


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_and_writes_only_its_run(task, capfd):
    args = klac.Args(env_id=task, total_timesteps=220, learning_starts=200, buffer_size=1_000, eval_episodes=1)
    args.compile = False
    assert (klac.train(args) / "actor.pt").is_file()
    assert capfd.readouterr().err == ""
    assert [path.name for path in Path().iterdir()] == ["runs"]
