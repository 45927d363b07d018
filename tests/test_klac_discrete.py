"""The mathematics of klac_discrete.py, against loops written out by hand and SciPy."""

import copy
import itertools
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

import klac_discrete as klac
import sac_discrete
from klac_discrete import Args, Batch

CPU = torch.device("cpu")
TINY = {"learning_starts": 100, "target_network_frequency": 50, "log_interval": 1, "eval_episodes": 1}


@given(n=st.integers(2, 50), fraction=st.floats(0, 0.999))
def test_exploit_entropy_is_that_of_the_explicit_distribution(n, fraction):
    p = 1 / n + (1 - 1 / n) * fraction
    explicit = [p] + [(1 - p) / (n - 1)] * (n - 1)
    assert klac.exploit_entropy(p, n) == pytest.approx(scipy.stats.entropy(explicit), abs=1e-12)


def test_exploit_entropy_at_a_hand_worked_case():
    # p = 1/2 and four other actions with 1/8 each: 1/2 log 2 + 4 * 1/8 log 8 = 2 log 2
    assert klac.exploit_entropy(0.5, 5) == pytest.approx(2 * math.log(2))


def random_batch(size, obs_shape, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(size, *obs_shape, generator=generator),
        torch.randint(n, (size,), generator=generator),
        torch.randn(size, generator=generator),
        torch.randn(size, *obs_shape, generator=generator),
        (torch.rand(size, generator=generator) < 0.5).float(),
    )


def softmax_by_hand(logits):
    exponentials = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(exponentials) for x in exponentials]


def values_by_hand(actor, critics, obs):
    """(pi, min over the critics of Q) of one observation, as lists of floats."""
    with torch.no_grad():
        pi = softmax_by_hand(actor(obs[None])[0].tolist())
        twins = [critic(obs[None])[0].tolist() for critic in critics]
    return pi, [min(pair) for pair in zip(*twins, strict=True)]


def target_by_hand(batch, actor, target_critics, gamma, beta):
    targets = []
    for i in range(len(batch.rewards)):
        pi, q = values_by_hand(actor, target_critics, batch.next_obs[i])
        next_v = sum(pi[a] * q[a] for a in range(len(pi)))
        y = batch.rewards[i].item() + beta
        if not batch.terminations[i]:
            y += gamma * next_v
        targets.append(y)
    return targets


@pytest.mark.parametrize("obs_shape", [(4,), (2, 5, 5)])
def test_td_target_matches_a_loop(obs_shape):
    torch.manual_seed(0)
    n = 3
    network_shape = obs_shape if len(obs_shape) == 1 else (*obs_shape[1:], obs_shape[0])
    actor, *critics = (klac.make_network(network_shape, n) for _ in range(3))
    batch = random_batch(16, obs_shape, n)
    assert 0 < batch.terminations.sum() < 16
    with torch.no_grad():
        y = klac.td_target(batch, actor, critics, gamma=0.9, beta=0.25)
    assert y.shape == (16,)
    assert y.tolist() == pytest.approx(target_by_hand(batch, actor, critics, 0.9, 0.25), rel=1e-4, abs=1e-5)


def test_actor_loss_matches_a_loop_and_its_gradient_a_finite_difference():
    generator = torch.Generator().manual_seed(1)
    logits, min_q, log_q = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(3))

    def by_hand(logits):
        total = 0.0
        for i in range(5):
            pi = softmax_by_hand(logits[i])
            total += sum(pi[a] * (0.3 * (math.log(pi[a]) - log_q[i, a].item()) - min_q[i, a].item()) for a in range(4))
        return total / 5

    parameter = logits.clone().requires_grad_()
    critics = [lambda obs: torch.maximum(min_q, min_q + 1), lambda obs: min_q]
    parts = SimpleNamespace(obs=torch.zeros(5, 3)), lambda obs: parameter, critics, lambda obs: log_q - math.log(4)
    loss, log_pi, log_nq = klac.actor_loss(*parts, torch.tensor(0.3, dtype=torch.float64))
    loss.backward()
    assert not log_pi.requires_grad
    torch.testing.assert_close((log_pi, log_nq), (torch.log_softmax(logits, 1), log_q))
    assert loss.item() == pytest.approx(by_hand(logits.tolist()))

    def flat(x):
        return by_hand(x.reshape(5, 4).tolist())

    numeric = scipy.optimize.approx_fprime(logits.numpy().ravel(), flat, 1e-6)
    np.testing.assert_allclose(parameter.grad.numpy().ravel(), numeric, atol=1e-6)


@pytest.mark.parametrize(("reference", "alpha"), [("uniform", 1.0), ("earlier", 1.0), ("earlier", 0.37)])
def test_the_first_update_is_the_one_worked_out_by_hand(scalars, monkeypatch, reference, alpha):
    """Critic losses, actor loss, temperature loss and KL of the first update inside train(), from the batch it drew."""
    earlier = str(klac.train(Args(env_id="Walk-v0", total_timesteps=300, seed=9, run_name="q", **TINY)))
    seen, real = [], klac.td_target

    def record(batch, actor, target_critics, *rest):
        seen.append(copy.deepcopy((batch, actor, target_critics)))
        return real(batch, actor, target_critics, *rest)

    monkeypatch.setattr(klac, "td_target", record)
    args = Args(env_id="Walk-v0", total_timesteps=105, beta=0.5, batch_size=8, policy_lr=1e-2, q_lr=2e-3, **TINY)
    if alpha != 1.0:  # the value at which a learned one starts
        args.autotune, args.alpha = False, alpha
    args.reference = earlier if reference == "earlier" else None
    run_dir = klac.train(args)
    logged = {tag: dict(values) for tag, values in scalars(run_dir).items()}
    batch, actor, critics = seen[0]  # before the first update the target critics still equal the critics
    critics.requires_grad_(True)
    n, step = 3, 104

    y = target_by_hand(batch, actor, critics, 0.99, 0.5)
    for k, critic in enumerate(critics):
        q = [critic(batch.obs[i : i + 1])[0, batch.actions[i]] for i in range(8)]
        loss = sum((q[i] - y[i]) ** 2 for i in range(8)) / 8
        assert logged[f"losses/qf{k + 1}_loss"][step] == pytest.approx(loss.item(), rel=1e-4)
        assert logged[f"losses/qf{k + 1}_values"][step] == pytest.approx(sum(q).item() / 8, rel=1e-4)
        gradients = torch.autograd.grad(loss, list(critic.parameters()))
        with torch.no_grad():  # Adam's first step: m / sqrt(v) is g / |g|, with eps beside |g|
            for parameter, g in zip(critic.parameters(), gradients, strict=True):
                parameter -= 2e-3 * g / (g.abs() + 1e-4)

    q_network = klac.make_network((3,), n)
    if reference == "earlier":
        q_network.load_state_dict(torch.load(f"{earlier}/actor.pt", weights_only=True)["actor"])
    actor_loss = entropy = kl = best = 0.0
    for i in range(8):
        pi, min_q = values_by_hand(actor, critics, batch.obs[i])
        with torch.no_grad():
            q = softmax_by_hand(q_network(batch.obs[i : i + 1])[0].tolist())
        q = q if reference == "earlier" else [1 / n] * n
        divergence = sum(pi[a] * math.log(pi[a] / q[a]) for a in range(n))
        # the loss is stated up to the constant alpha log n
        actor_loss += (alpha * (divergence - math.log(n)) - sum(pi[a] * min_q[a] for a in range(n))) / 8
        entropy -= sum(pi[a] * math.log(pi[a]) for a in range(n)) / 8
        kl += divergence / 8
        best += max(pi) / 8
    assert logged["losses/actor_loss"][step] == pytest.approx(actor_loss, rel=1e-4)
    assert logged["policy/entropy"][step] == pytest.approx(entropy, rel=1e-4)
    assert logged["policy/kl"][step] == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert logged["policy/exploit_probability"][step] == pytest.approx(best, rel=1e-4)

    # the only update of the run: the saved actor is the initial one after one step of Adam on that loss
    with torch.no_grad():
        q = torch.softmax(q_network(batch.obs), 1) if reference == "earlier" else torch.full((8, n), 1 / n)
        min_q = torch.minimum(*(critic(batch.obs) for critic in critics))
    pi = torch.softmax(actor(batch.obs), 1)
    loss = (pi * (alpha * torch.log(pi / q) - min_q)).sum() / 8
    gradients = torch.autograd.grad(loss, list(actor.parameters()))
    saved = torch.load(run_dir / "actor.pt", weights_only=True)["actor"].values()
    for parameter, g, after in zip(actor.parameters(), gradients, saved, strict=True):
        torch.testing.assert_close(after, parameter - 1e-2 * g / (g.abs() + 1e-4), rtol=1e-3, atol=1e-4)

    if alpha != 1.0:
        assert logged["losses/alpha"][step] == pytest.approx(alpha)
        return
    p = 0.5 + 0.3 * step / 105
    target_entropy = scipy.stats.entropy([p, (1 - p) / 2, (1 - p) / 2])
    assert logged["policy/target_exploit_probability"][step] == pytest.approx(p)
    assert logged["policy/target_entropy"][step] == pytest.approx(target_entropy)
    excess = math.log(n) - target_entropy - kl  # of the budget over the KL: of H over H*
    assert logged["losses/alpha_loss"][step] == pytest.approx(excess, rel=1e-4, abs=1e-5)
    assert logged["losses/alpha"][step] == pytest.approx(math.exp(-2e-3 * excess / (abs(excess) + 1e-4)), rel=1e-5)


@pytest.mark.parametrize("start", [-3.0, 2.0])
def test_temperature_finds_the_target_from_both_sides_and_the_best_action_gets_p(start):
    """A bandit with one good arm and an actor at its optimum, from far too cold and far too hot (section 5.4)."""
    n, p = 4, 0.7
    q = torch.tensor([1.0, 0.0, 0.0, 0.0])
    log_alpha = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.Adam([log_alpha], lr=1e-2, eps=1e-4)
    for step in range(5000):
        pi = torch.softmax(q / log_alpha.detach().exp(), 0)
        entropy = -torch.special.xlogy(pi, pi).sum()
        loss = klac.temperature_loss(log_alpha, entropy, klac.exploit_entropy(p, n))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:  # towards the target at once: warmer where the policy is too greedy, colder where too random
            assert (log_alpha.item() - start) * start < 0
    assert pi[0].item() == pytest.approx(p, abs=0.001)
    # pi = exp(q / alpha) / Z there, so alpha = 1 / log(pi_0 / pi_1)
    assert math.exp(log_alpha.item()) == pytest.approx(1 / math.log(p / ((1 - p) / (n - 1))), rel=0.01)


def test_annealed_run_follows_its_schedule_and_fixed_ones_do_not(scalars):
    def run(**flags):
        run_dir = klac.train(Args(env_id="Walk-v0", total_timesteps=1000, **TINY, **flags))
        return {tag: dict(values) for tag, values in scalars(run_dir).items()}

    annealed = run(p_start=0.4, p_end=0.9, anneal_timesteps=500)
    p = annealed["policy/target_exploit_probability"]
    assert p[252] == pytest.approx(0.4 + 0.5 * 252 / 500)  # linear in p
    assert p[752] == pytest.approx(0.9)  # then constant
    heuristic = run(anneal=False)
    np.testing.assert_allclose(list(heuristic["policy/target_entropy"].values()), 0.89 * math.log(3), rtol=1e-6)
    assert "policy/target_exploit_probability" not in heuristic
    fixed = run(autotune=False, alpha=0.37)
    np.testing.assert_allclose(list(fixed["losses/alpha"].values()), 0.37, rtol=1e-6)
    assert "losses/alpha_loss" not in fixed


@pytest.mark.parametrize(("env_id", "value"), [("OneStepTermination-v0", 1.0), ("OneStepTruncation-v0", 2.0)])
def test_a_termination_does_not_bootstrap_and_a_truncation_does(scalars, env_id, value):
    """Reward 1 and gamma 1/2: a terminated step is worth 1; one cut by the clock goes on for 1 / (1 - gamma) = 2."""
    args = Args(env_id=env_id, total_timesteps=3_000, gamma=0.5, bias=False, update_frequency=2, q_lr=1e-3, **TINY)
    values = scalars(klac.train(args))["losses/qf1_values"]
    assert np.mean([v for _, v in values[-100:]]) == pytest.approx(value, abs=0.1)


def test_beta_is_in_the_values_and_not_in_the_returns(scalars):
    args = Args(env_id="OneStepTermination-v0", total_timesteps=3_000, beta=3.0, q_lr=1e-3, update_frequency=2, **TINY)
    logged = scalars(klac.train(args))
    assert {v for _, v in logged["charts/episodic_return"]} == {1.0}
    assert np.mean([v for _, v in logged["losses/qf1_values"][-100:]]) == pytest.approx(4.0, abs=0.2)  # r + beta
    # the critic's value at the start, 4, less the discounted true return, 1
    assert np.mean([v for _, v in logged["charts/q_minus_return"][-100:]]) == pytest.approx(3.0, abs=0.2)


def test_q_minus_return_is_the_first_state_s_value_less_the_discounted_rewards(scalars, monkeypatch):
    """Recomputed from the transitions stored and, with learning rates of almost nothing, the initial networks."""
    stored, networks, real_add, real_network = [], [], klac.ReplayBuffer.add, klac.make_network
    monkeypatch.setattr(klac.ReplayBuffer, "add", lambda self, *t: stored.append(t) or real_add(self, *t))
    monkeypatch.setattr(klac, "make_network", lambda *a: networks.append(real_network(*a)) or networks[-1])
    args = Args(env_id="Walk-v0", total_timesteps=300, gamma=0.8, policy_lr=1e-12, q_lr=1e-12, eval_episodes=1)
    args.learning_starts = 20
    logged = scalars(klac.train(args))["charts/q_minus_return"]
    actor, *critics = networks
    expected, episode = {}, []
    ends = {step for step, _ in scalars(next(klac.Path("runs").iterdir()))["charts/episodic_return"]}
    for step, (obs, _, reward, _, _) in enumerate(stored):
        episode.append((step, obs, reward))
        if step in ends:
            first, start, _ = episode[0]
            pi, min_q = values_by_hand(actor, critics, torch.tensor(start, dtype=torch.float32))
            discounted = sum(0.8**t * r for t, (_, _, r) in enumerate(episode))
            if first >= 20:  # an episode begun in the warm-up has no policy that valued it
                expected[step] = sum(pi[a] * min_q[a] for a in range(3)) - discounted
            episode = []
    assert len(expected) > 20
    assert [step for step, _ in logged] == list(expected)
    assert [value for _, value in logged] == pytest.approx(list(expected.values()), rel=1e-4, abs=1e-4)


def test_target_networks_move_by_tau(monkeypatch):
    networks, seen, real_network, real_target = [], [], klac.make_network, klac.td_target

    def record(batch, actor, target_critics, *rest):
        online = [p.detach().clone() for network in networks[1:3] for p in network.parameters()]
        seen.append((online, [p.detach().clone() for p in target_critics.parameters()]))
        return real_target(batch, actor, target_critics, *rest)

    monkeypatch.setattr(klac, "make_network", lambda *a: networks.append(real_network(*a)) or networks[-1])
    monkeypatch.setattr(klac, "td_target", record)
    args = Args(env_id="Walk-v0", total_timesteps=200, learning_starts=100, tau=0.25, q_lr=1e-2, eval_episodes=1)
    args.update_frequency = args.target_network_frequency = 4
    klac.train(args)
    assert all(torch.equal(a, b) for a, b in zip(*seen[0], strict=True))  # they start as copies
    for (_, before), (online, after) in itertools.pairwise(seen):
        for start, end, parameter in zip(before, after, online, strict=True):
            torch.testing.assert_close(end, 0.75 * start + 0.25 * parameter)
    assert not torch.equal(*(parameters[0] for parameters in seen[-1]))


def test_evaluation_plays_the_most_probable_action():
    args = Args(env_id="Bandit-v0", eval_episodes=200)
    actor = torch.nn.Linear(4, 4, bias=False)
    actor.weight.data = 0.01 * torch.eye(4)  # the right arm is barely preferred
    assert (klac.evaluate(actor, args, None) == 1).all()
    actor.weight.data = -0.01 * torch.eye(4)
    assert (klac.evaluate(actor, args, None) == 0).all()


@pytest.mark.parametrize("module", [klac, sac_discrete], ids=["klac", "sac"])
def test_actions_are_drawn_from_the_policy(monkeypatch, module):
    pi, actions = np.array([0.6, 0.3, 0.1, 0.0]), []

    def make_network(obs_shape, n):
        network = torch.nn.Linear(*obs_shape, n)
        network.weight.data.zero_()
        network.bias.data.copy_(torch.tensor(pi).clamp(min=1e-30).log())
        return network

    class Record(gym.Wrapper):
        def step(self, action):
            actions.append(action)
            return self.env.step(action)

    make_env = module.make_env
    monkeypatch.setattr(module, "make_network", make_network)
    monkeypatch.setattr(module, "make_env", lambda *args: Record(make_env(*args)))
    args = module.Args(env_id="Bandit-v0", total_timesteps=5_000, learning_starts=0, eval_episodes=1)
    args.update_frequency = 10_000  # no update
    module.train(args)
    counts = np.bincount(actions[:5_000], minlength=4)
    assert counts[3] == 0
    assert scipy.stats.chisquare(counts[:3], 5_000 * pi[:3]).pvalue > 1e-3


def test_reference_can_be_forked_as_the_documentation_says(scalars, monkeypatch):
    """The reference of README.md: at a high temperature the policy becomes q, and KL(pi || q) falls to 0."""
    text = (klac.Path(__file__).parent.parent / "README.md").read_text()
    fork = text.split("```python\n")[1].split("```")[0]
    namespace = {"torch": torch}
    exec(fork, namespace)
    monkeypatch.setattr(klac, "make_log_q", namespace["make_log_q"])
    args = Args(env_id="Bandit-v0", total_timesteps=4_000, update_frequency=2, policy_lr=3e-3, eval_episodes=1)
    args.learning_starts, args.log_interval, args.autotune, args.alpha = 100, 1, False, 100.0
    logged = {tag: np.array(values).T[1] for tag, values in scalars(klac.train(args)).items()}
    assert logged["policy/kl"][0] > 0.1
    assert logged["policy/kl"][-1] == pytest.approx(0, abs=0.005)
    assert logged["policy/exploit_probability"][-1] == pytest.approx(0.7, abs=0.03)
    assert logged["policy/entropy"][-1] == pytest.approx(scipy.stats.entropy([0.7, 0.1, 0.1, 0.1]), abs=0.03)


def test_kl_to_an_earlier_actor_is_held_at_its_budget(scalars):
    """q prefers the wrong arms; the budget is that of p = 0.55: log 4 less the entropy of (0.55, 0.15, 0.15, 0.15)."""
    budget = math.log(4) - scipy.stats.entropy([0.55, 0.15, 0.15, 0.15])
    torch.manual_seed(1)
    q_network = klac.make_network((4,), 4)
    q_network[-1].bias.data += torch.tensor([0.0, 2.0, 2.0, 4.0])
    torch.save({"actor": q_network.state_dict()}, "q.pt")
    args = Args(env_id="Bandit-v0", total_timesteps=6_000, update_frequency=2, policy_lr=3e-3, q_lr=3e-3)
    args.learning_starts, args.log_interval, args.bias, args.reference = 500, 100, False, "q.pt"
    args.p_start = args.p_end = 0.55
    run_dir = klac.train(args)
    logged = {tag: np.array(values).T[1] for tag, values in scalars(run_dir).items()}
    np.testing.assert_allclose(logged["policy/target_kl"], budget, rtol=1e-5)
    assert logged["policy/kl"][-20:].mean() == pytest.approx(budget, abs=0.05)

    actor = klac.make_network((4,), 4)
    actor.load_state_dict(torch.load(run_dir / "actor.pt", weights_only=True)["actor"])
    obs = torch.eye(4)
    pi, q = (torch.softmax(network(obs), 1).detach().numpy() for network in (actor, q_network))
    assert scipy.stats.entropy(pi, q, axis=1).mean() == pytest.approx(budget, abs=0.1)
    assert (np.diag(pi) > np.diag(q)).all()  # the budget goes to the arms that pay
    entropy = scipy.stats.entropy(pi, axis=1).mean()
    assert entropy < math.log(4) - budget - 0.1  # and it is not the entropy that is held


def test_buffer_keeps_the_last_transitions_and_each_episode_s_own_last_observation(monkeypatch):
    stored, real = [], klac.ReplayBuffer.add
    monkeypatch.setattr(klac.ReplayBuffer, "add", lambda self, *t: stored.append(copy.deepcopy(t)) or real(self, *t))
    klac.train(Args(env_id="Walk-v0", total_timesteps=400, **TINY))
    ended_by_termination = ended_by_time = 0
    for (_, _, _, next_obs, terminated), (obs, *_) in itertools.pairwise(stored):
        if np.array_equal(next_obs, obs):
            assert not terminated
        elif terminated:
            assert next_obs[0] in (0, 4)
            ended_by_termination += 1
        else:
            assert next_obs[0] not in (0, 4)
            ended_by_time += 1
    assert ended_by_termination > 3
    assert ended_by_time > 3

    buffer = klac.ReplayBuffer(5, gym.spaces.Box(-100, 100, (1,), np.float64), gym.spaces.Discrete(3), CPU)
    for t in range(13):
        buffer.add(np.array([t]), t % 3, t, np.array([t + 1]), False)
    batch = buffer.sample(200, np.random.default_rng(0))
    assert set(batch.obs[:, 0].tolist()) == {8, 9, 10, 11, 12}
    assert torch.equal(batch.next_obs, batch.obs + 1)
    assert torch.equal(batch.actions, batch.obs[:, 0].long() % 3)
    assert [column.dtype for column in batch] == [torch.float32, torch.int64] + [torch.float32] * 3


def test_seaquest_buffer_takes_at_most_210_mb():
    env = klac.make_env("Seaquest-v1")
    buffer = klac.ReplayBuffer(100_000, env.observation_space, env.action_space, CPU)
    assert buffer.columns.obs.dtype == bool
    assert sum(column.nbytes for column in buffer.columns) <= 210e6


def test_images_become_channels_first_floats_and_bytes_are_scaled():
    image = np.zeros((2, 4, 5, 3), np.uint8)
    image[1, 2, 3, 1] = 255
    x = klac.preprocess(torch.as_tensor(image))
    assert x.shape == (2, 3, 4, 5)
    assert x.dtype == torch.float32
    assert x[1, 1, 2, 3] == 1
    assert x.sum() == 1
    assert klac.preprocess(torch.ones(1, 4, 5, 3, dtype=torch.bool)).max() == 1


def test_network_is_the_paper_s():
    network = klac.make_network((10, 10, 4), 6)
    kinds = [type(layer).__name__ for layer in network]
    assert kinds == ["Conv2d", "ReLU", "Flatten", "Linear", "ReLU", "Linear"]
    assert network[0].weight.shape == (16, 4, 3, 3)
    assert network[3].weight.shape == (128, 16 * 8 * 8)
    assert all((parameter == 0).all() for name, parameter in network.named_parameters() if "bias" in name)
    # Kaiming: standard deviation sqrt(2 / fan_in)
    assert network[3].weight.std().item() == pytest.approx(math.sqrt(2 / 1024), rel=0.02)


def test_it_learns(scalars):
    """Catch: a random policy catches about one ball in four, a trained one nearly all."""
    args = Args(
        env_id="Catch-v0",
        total_timesteps=8_000,
        learning_starts=1_000,
        target_network_frequency=100,
        update_frequency=2,
        policy_lr=1e-3,
        q_lr=1e-3,
        eval_episodes=100,
    )
    logged = scalars(klac.train(args))
    random_returns = [v for step, v in logged["charts/episodic_return"] if step < 1_000]
    assert np.mean(random_returns) < 0.4
    assert logged["eval/episodic_return"][0][1] > 0.95


def test_the_best_action_gets_the_probability_that_the_schedule_asks_for(scalars):
    args = Args(
        env_id="Bandit-v0",
        total_timesteps=12_000,
        learning_starts=500,
        update_frequency=2,
        policy_lr=3e-3,
        q_lr=3e-3,
        p_start=0.4,
        p_end=0.8,
        anneal_timesteps=6_000,
        bias=False,
        log_interval=100,
    )
    logged = {tag: np.array(values).T for tag, values in scalars(klac.train(args)).items()}
    step, asked = logged["policy/target_exploit_probability"]
    realised = logged["policy/exploit_probability"][1]
    for low, high in ((5_000, 6_000), (11_000, 12_000)):  # while it is annealed, and after
        window = (low < step) & (step < high)
        assert realised[window].mean() == pytest.approx(asked[window].mean(), abs=0.05)
    np.testing.assert_allclose(
        logged["policy/kl"][1][step > 11_000].mean(), math.log(4) - klac.exploit_entropy(0.8, 4), atol=0.1
    )
    # and the share of episodes that the training policy wins is that probability too
    steps, returns = logged["charts/episodic_return"]
    assert returns[steps > 11_000].mean() == pytest.approx(0.8, abs=0.05)
