"""The mathematics of the two continuous scripts, against numerical integration, SciPy and loops written out by hand."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import klac_continuous as klac
import sac_continuous as sac
import tests.envs

BOTH = [sac, klac]
TASKS = ["Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Ant-v5", "Humanoid-v5", "Swimmer-v5", "InvertedPendulum-v5",
         "Reacher-v5", "Pendulum-v1"]  # fmt: skip
SHORT = {"learning_starts": 100, "log_interval": 1, "eval_episodes": 1, "buffer_size": 10_000}


def box(scale, d=1, centre=0.0):
    return gym.spaces.Box(np.float32(centre - scale), np.float32(centre + scale), (d,))


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


def test_losses_and_gradients_stay_finite_at_the_bounds():
    actor = klac.Actor(3, box(0.4, d=2))
    obs = torch.randn(5, 3)
    for shift in (5.0, 20.0, 200.0, -200.0):
        with torch.no_grad():
            actor.network[-1].bias[:2] = shift  # means far outside: |action| is at its bound to the last bit
        action, log_pi, _ = actor.sample(obs)
        assert (action.abs() <= np.float32(0.4)).all()
        critics = [lambda x: x[:, -2:].sum(1, keepdim=True)] * 2
        batch = SimpleNamespace(obs=obs)
        loss, _, _ = klac.actor_loss(batch, actor, critics, lambda obs, u: 0.0, 0.0, torch.tensor(1.0))
        actor.zero_grad()
        loss.backward()
        assert torch.isfinite(log_pi).all()
        assert all(torch.isfinite(parameter.grad).all() for parameter in actor.parameters())


def test_actor_keeps_to_an_asymmetric_box_and_to_the_bounds_of_log_std():
    space = gym.spaces.Box(np.float32([-1, 2]), np.float32([3, 2.5]))
    actor = klac.Actor(4, space)
    obs = 100 * torch.randn(500, 4)
    action, _, u = actor.sample(obs)
    assert all(space.contains(a) for a in action.detach().numpy())
    torch.testing.assert_close(action, torch.tanh(u) * torch.tensor([2.0, 0.25]) + torch.tensor([1.0, 2.25]))
    _, log_std = actor(obs)
    assert log_std.min() >= -5
    assert log_std.max() <= 2
    assert (log_std.min() < -4.5) or (log_std.max() > 1.5)


def by_hand(module, batch, actor, critics, gamma, extra):
    """Targets in plain floats, from the same draw of noise; `extra` is beta for KLAC and alpha for SAC."""
    torch.manual_seed(7)
    with torch.no_grad():
        mean, log_std = actor(batch.next_obs)
        noise = torch.randn_like(mean)
    targets = []
    for i in range(len(batch.rewards)):
        action, log_pi = [], 0.0
        for k in range(mean.shape[1]):
            std = math.exp(log_std[i, k])
            u = mean[i, k].item() + std * noise[i, k].item()
            scale, centre = actor.scale[k].item(), actor.centre[k].item()
            action.append(scale * math.tanh(u) + centre)
            log_pi += scipy.stats.norm.logpdf(u, mean[i, k].item(), std) - math.log(scale * (1 - math.tanh(u) ** 2))
        x = torch.cat([batch.next_obs[i], torch.tensor(action)])[None]
        q = min(critic(x).item() for critic in critics)
        value = q - extra * log_pi if module is sac else q
        y = batch.rewards[i].item() + (extra if module is klac else 0)
        targets.append(y + (0 if batch.terminations[i] else gamma * value))
    return targets


@pytest.mark.parametrize("module", BOTH)
def test_td_target_matches_a_loop(module):
    torch.manual_seed(0)
    actor = module.Actor(3, box(2.0, d=2, centre=1.0))
    critics = torch.nn.ModuleList([module.make_network(5, 1), module.make_network(5, 1)])
    ends = (torch.arange(12) % 3 == 0).float()
    batch = module.Batch(torch.randn(12, 3), torch.randn(12, 2), torch.randn(12), torch.randn(12, 3), ends)
    expected = by_hand(module, batch, actor, critics, 0.9, 0.3)
    torch.manual_seed(7)
    with torch.no_grad():
        y = module.td_target(batch, actor, critics, 0.9, 0.3 if module is klac else torch.tensor(0.3))
    assert y.shape == (12,)
    assert y.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_actor_losses_are_means_of_the_plain_formula():
    u, min_q = torch.tensor([[0.1], [0.2]]), torch.tensor([[3.0], [1.0]])
    actor = SimpleNamespace(sample=lambda obs: (torch.tanh(u), torch.tensor([1.0, 2.0]), u))
    batch, critics = SimpleNamespace(obs=torch.zeros(2, 3)), [lambda x: min_q, lambda x: min_q + 1]
    loss, log_pi, log_vq = klac.actor_loss(batch, actor, critics, lambda obs, u: 5 * u[:, 0], 0.5, torch.tensor(0.2))
    assert (log_pi.tolist(), log_vq.tolist()) == ([1, 2], pytest.approx([1.0, 1.5]))
    assert loss.item() == pytest.approx(((0.2 * (1 - 1) - 3) + (0.2 * (2 - 1.5) - 1)) / 2)
    loss, log_pi = sac.actor_loss(batch, actor, critics, torch.tensor(0.2))
    assert loss.item() == pytest.approx(((0.2 - 3) + (0.4 - 1)) / 2)


@pytest.mark.parametrize("module", BOTH)
def test_no_gradient_of_the_actor_step_enters_the_critics(monkeypatch, module):
    """Each critic parameter receives one gradient a critic update, and none in the actor's updates."""
    networks, counts, real = [], [], module.make_network

    def hooked(*a):
        networks.append(real(*a))
        for parameter in networks[-1].parameters() if len(networks) > 1 else ():  # the first one is the actor's
            parameter.register_hook(lambda gradient: counts.append(1))
        return networks[-1]

    monkeypatch.setattr(module, "make_network", hooked)
    module.train(module.Args(env_id="Drift-v0", total_timesteps=141, **SHORT))
    assert len(counts) == 40 * 2 * 6  # updates, critics, weights and biases of three layers


@pytest.mark.parametrize("module", BOTH)
def test_realised_exploit_probability_is_that_of_the_gaussian_before_tanh(scalars, monkeypatch, module):
    real = module.Actor.forward
    monkeypatch.setattr(
        module.Actor, "forward", lambda self, obs: (real(self, obs)[0], torch.full((len(obs), 2), -1.3))
    )
    monkeypatch.setattr(tests.envs.Point, "action_space", gym.spaces.Box(-3, 3, (2,), np.float32))
    args = module.Args(env_id="Point-v0", total_timesteps=160, exploit_radius=0.4, autotune=False, **SHORT)
    expected = (2 * scipy.stats.norm.cdf(0.4 / (3 * math.exp(-1.3))) - 1) ** 2
    realised = [value for _, value in scalars(module.train(args))["policy/exploit_probability"]]
    assert realised == pytest.approx([expected] * len(realised), rel=1e-4)


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


def test_evaluation_plays_the_mean_action():
    args = klac.Args(env_id="Point-v0", eval_episodes=3)
    space = klac.make_env("Point-v0").action_space
    actor = klac.Actor(2, space)
    for parameter in actor.parameters():
        parameter.data.zero_()
    actor.network[-1].bias.data = torch.tensor([0.0, 0.0, 5.0, 5.0])  # mean 0, the widest spread
    starts = np.random.default_rng([args.seed, 1])
    env = klac.make_env("Point-v0")
    distances = [np.linalg.norm(env.reset(seed=int(starts.integers(2**31)))[0]) for _ in range(3)]
    returns = klac.evaluate(actor, args, None)
    assert returns.tolist() == pytest.approx([-20 * distance for distance in distances])  # it stays where it was


@pytest.mark.parametrize("module", BOTH)
def test_q_minus_return_and_warm_up_actions(scalars, monkeypatch, module):
    """The critic's value of the first state and the action taken there, less the discounted rewards that followed."""
    stored, networks, real_add, real_network = [], [], module.ReplayBuffer.add, module.make_network
    monkeypatch.setattr(module.ReplayBuffer, "add", lambda self, *t: stored.append(t) or real_add(self, *t))
    monkeypatch.setattr(module, "make_network", lambda *a: networks.append(real_network(*a)) or networks[-1])
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
            value = min(critic(x).item() for critic in networks[1:])
            discounted = sum(0.8**t * r for t, (*_, r) in enumerate(episode))
            expected += [value - discounted] if first >= 100 else []
            episode = []
    assert len(expected) > 5
    assert [value for _, value in logged["charts/q_minus_return"]] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_target_networks_move_by_tau(monkeypatch):
    networks, seen, real_network, real_target = [], [], klac.make_network, klac.td_target

    def record(batch, actor, target_critics, *rest):
        online = [p.detach().clone() for network in networks[1:3] for p in network.parameters()]
        seen.append((online, [p.detach().clone() for p in target_critics.parameters()]))
        return real_target(batch, actor, target_critics, *rest)

    monkeypatch.setattr(klac, "make_network", lambda *a: networks.append(real_network(*a)) or networks[-1])
    monkeypatch.setattr(klac, "td_target", record)
    klac.train(klac.Args(env_id="Drift-v0", total_timesteps=130, **SHORT))
    assert all(torch.equal(a, b) for a, b in zip(*seen[0], strict=True))  # they start as copies
    for (_, before), (online, after) in itertools.pairwise(seen):
        for start, end, parameter in zip(before, after, online, strict=True):
            torch.testing.assert_close(end, 0.995 * start + 0.005 * parameter)
    assert not torch.equal(*(parameters[0] for parameters in seen[-1]))


@pytest.mark.parametrize("module", BOTH)
def test_actor_and_temperature_take_two_steps_every_two(monkeypatch, module):
    calls = {"critic": 0, "actor": 0, "temperature": 0}

    def counted(name, kind):
        real = getattr(module, name)

        def wrapper(*a):
            calls[kind] += 1
            return real(*a)

        monkeypatch.setattr(module, name, wrapper)

    counted("td_target", "critic")
    counted("actor_loss", "actor")
    counted("temperature_loss", "temperature")
    module.train(module.Args(env_id="Drift-v0", total_timesteps=141, **SHORT))
    assert calls == {"critic": 40, "actor": 40, "temperature": 40}


@pytest.mark.parametrize("task", TASKS)
def test_default_radius_is_reachable_on_every_task_with_a_target_above_sac_s(task):
    space = klac.make_env(task).action_space
    d = space.shape[0]
    defaults = klac.Args()
    for p in (defaults.p_start, defaults.p_end):
        assert -d < klac.exploit_entropy(p, defaults.exploit_radius, d) < klac.box_log_volume(space) - 0.0096 * d
    volume = np.prod(np.subtract(space.high, space.low, dtype=np.float64))
    assert klac.box_log_volume(space) == pytest.approx(math.log(volume))


def test_unreachable_targets_are_refused_with_values_that_are_valid():
    with pytest.raises(klac.UsageError) as refusal:
        klac.train(klac.Args(env_id="Swimmer-v5", exploit_radius=0.9))
    message = str(refusal.value)
    assert message.startswith("--exploit-radius 0.9 --p-start 0.5: ")
    r, p = (float(message.split(word)[1].split()[0]) for word in ("r below ", "p above "))
    log_volume = 2 * math.log(2) - 2 * 0.0096  # the most that a tanh-Gaussian reaches
    assert klac.exploit_entropy(0.5, r, 2) == pytest.approx(log_volume, abs=0.01)
    assert klac.exploit_entropy(p, 0.9, 2) == pytest.approx(log_volume, abs=0.01)
    env = klac.make_env("Swimmer-v5")
    klac.check_args(klac.Args(env_id="Swimmer-v5", exploit_radius=r - 0.001), env)
    klac.check_args(klac.Args(env_id="Swimmer-v5", exploit_radius=0.9, p_start=p + 0.001, p_end=0.95), env)
    klac.check_args(klac.Args(env_id="Swimmer-v5", exploit_radius=0.9, anneal=False), env)
    klac.check_args(klac.Args(env_id="Swimmer-v5", exploit_radius=0.9, autotune=False), env)
    with pytest.raises(klac.UsageError, match=r"--p-end 0\.3"):
        klac.check_args(klac.Args(env_id="Swimmer-v5", exploit_radius=0.6, p_start=0.95, p_end=0.3), env)


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
    args.eval_episodes = 1
    if module is klac:
        args.bias = False
    values = scalars(module.train(args))["losses/qf1_values"]
    assert np.mean([v for _, v in values[-20:]]) == pytest.approx(value, abs=0.1)


def test_reference_is_the_density_of_the_earlier_actor(scalars):
    """KL(pi || q) is near 0 for a policy that is q, and log vol - H for the uniform reference."""
    first = klac.train(klac.Args(env_id="Drift-v0", total_timesteps=200, **SHORT))
    args = klac.Args(env_id="Drift-v0", reference=str(first))
    env = klac.make_env("Drift-v0")
    actor = klac.Actor(3, env.action_space)
    actor.load_state_dict(torch.load(first / "actor.pt", weights_only=True)["actor"])
    log_q = klac.make_log_q(args, env, torch.device("cpu"))
    obs = torch.randn(50, 3)
    _, log_pi, u = actor.sample(obs)
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
    q = klac.Actor(3, klac.make_env("Drift-v0").action_space)
    q.network[-1].weight.data.zero_()
    q.network[-1].bias.data = torch.tensor([-0.5, math.atanh((5 - 0.7) / 3.5 - 1)])  # mean -0.5, log std -0.7
    torch.save({"actor": q.state_dict()}, "q.pt")
    args = klac.Args(env_id="Drift-v0", total_timesteps=1_500, reference="q.pt", p_end=0.5, batch_size=64, **SHORT)
    args.q_lr, args.policy_lr = 3e-3, 1e-3
    run_dir = klac.train(args)
    logged = {tag: np.array(values).T[1] for tag, values in scalars(run_dir).items()}
    budget = math.log(4) - klac.exploit_entropy(0.5, 0.25, 1)
    np.testing.assert_allclose(logged["policy/target_kl"], budget, rtol=1e-5)
    assert logged["policy/kl"][-300:].mean() == pytest.approx(budget, abs=0.1)
    actor = klac.Actor(3, klac.make_env("Drift-v0").action_space)
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
    args.policy_lr = 1e-3
    args.eval_episodes = 20
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
    assert (klac.train(args) / "actor.pt").is_file()
    assert capfd.readouterr().err == ""
    assert [path.name for path in Path().iterdir()] == ["runs"]
