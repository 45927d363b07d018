"""The mathematics of klac_discrete.py, against loops written out by hand and SciPy."""

import copy
import itertools
import json
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import klac_discrete as klac
import sac_discrete
import tests.envs
from klac_discrete import Args, Batch

CPU = torch.device("cpu")
FAST = {"compile": False, "eval_episodes": 1}
TINY = FAST | {"learning_starts": 100, "target_network_frequency": 50, "log_interval": 1}


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
        klac.preprocess(torch.randn(size, *obs_shape, generator=generator)),
        torch.randint(n, (size,), generator=generator),
        torch.randn(size, generator=generator),
        klac.preprocess(torch.randn(size, *obs_shape, generator=generator)),
        (torch.rand(size, generator=generator) < 0.5).float(),
    )


def softmax_by_hand(logits):
    exponentials = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(exponentials) for x in exponentials]


def values_by_hand(actor, critics, x):
    """(pi, min over the critics of Q) of one preprocessed observation, as lists of floats."""
    with torch.no_grad():
        pi = softmax_by_hand(actor(x[None])[0, 0].tolist())
        twins = critics(x[None])[:, 0].tolist()
    assert len(twins) == 2
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


@pytest.mark.parametrize("obs_shape", [(4,), (5, 6, 2)])
def test_td_target_matches_a_loop(obs_shape):
    torch.manual_seed(0)
    n = 3
    actor, critics = klac.Networks(1, obs_shape, n), klac.Networks(2, obs_shape, n)
    batch = random_batch(16, obs_shape, n)
    assert 0 < batch.terminations.sum() < 16
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

    class Actor(torch.nn.Module):
        """One whose logits are its parameter."""

        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(logits.clone(), requires_grad=False)

        def forward(self, x):
            return self.logits[None]

    batch = SimpleNamespace(obs=torch.zeros(5, 1, 3))
    alpha = torch.tensor(0.3, dtype=torch.float64)
    loss, log_pi = klac.actor_loss({"logits": logits}, batch, Actor(), min_q, log_q, alpha)
    torch.testing.assert_close(log_pi, torch.log_softmax(logits, 1))
    assert loss.item() == pytest.approx(by_hand(logits.tolist()))
    # the gradient that training takes, with the smaller of two critics and q as log q(a|s) and not relative to uniform
    gradients, kl, log = klac.actor_gradients(
        batch, Actor(), lambda obs: torch.stack([min_q + 1, min_q]), lambda obs: log_q - math.log(4), alpha
    )
    assert log["losses/actor_loss"].item() == pytest.approx(by_hand(logits.tolist()))
    pi = torch.softmax(logits, 1).numpy()
    assert kl.item() == pytest.approx((pi * (np.log(pi) - log_q.numpy())).sum(1).mean() + math.log(4))

    def flat(x):
        return by_hand(x.reshape(5, 4).tolist())

    numeric = scipy.optimize.approx_fprime(logits.numpy().ravel(), flat, 1e-6)
    np.testing.assert_allclose(gradients["logits"].numpy().ravel(), numeric, atol=1e-6)


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
    assert len(seen) == 1
    batch, actor, critics = seen[0]  # before the first update the target critics still equal the critics
    n, step = 3, 104
    saved = torch.load(run_dir / "actor.pt", weights_only=True)

    def one_step_of_adam(networks, loss, lr):  # Adam's first: m / sqrt(v) is g / |g|, with eps beside |g|
        gradients = torch.autograd.grad(loss, list(networks.parameters()))
        with torch.no_grad():
            for parameter, g in zip(networks.parameters(), gradients, strict=True):
                parameter -= lr * g / (g.abs() + 1e-4)

    y = target_by_hand(batch, actor, critics, 0.99, 0.5)
    critics.requires_grad_(True)
    losses = []
    for k in range(2):
        q = [critics(batch.obs[i : i + 1])[k, 0, batch.actions[i]] for i in range(8)]
        losses.append(sum((q[i] - y[i]) ** 2 for i in range(8)) / 8)
        assert logged[f"losses/qf{k + 1}_loss"][step] == pytest.approx(losses[k].item(), rel=1e-4)
        assert logged[f"losses/qf{k + 1}_values"][step] == pytest.approx(sum(q).item() / 8, rel=1e-4)
    assert logged["losses/qf_loss"][step] == pytest.approx(sum(losses).item() / 2, rel=1e-4)
    one_step_of_adam(critics, sum(losses), 2e-3)
    for name, parameter in critics.named_parameters():  # the only update of the run
        torch.testing.assert_close(saved["critics"][name], parameter.detach(), rtol=1e-3, atol=1e-4)

    q_network = klac.Networks(1, (3,), n)
    if reference == "earlier":
        q_network.load_state_dict(torch.load(f"{earlier}/actor.pt", weights_only=True)["actor"])
    actor_loss = entropy = kl = best = 0.0
    for i in range(8):
        pi, min_q = values_by_hand(actor, critics, batch.obs[i])
        q = softmax_by_hand(q_network(batch.obs[i : i + 1])[0, 0].tolist())
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

    # the saved actor is the initial one after one step of Adam on that loss
    q = torch.softmax(q_network(batch.obs)[0], 1) if reference == "earlier" else torch.full((8, n), 1 / n)
    min_q = torch.minimum(*critics(batch.obs).detach())
    actor.requires_grad_(True)
    pi = torch.softmax(actor(batch.obs)[0], 1)
    one_step_of_adam(actor, (pi * (alpha * torch.log(pi / q) - min_q)).sum() / 8, 1e-2)
    for name, parameter in actor.named_parameters():
        torch.testing.assert_close(saved["actor"][name], parameter.detach(), rtol=1e-3, atol=1e-4)

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
def test_temperature_finds_the_target_from_both_sides_and_the_best_action_gets_p(monkeypatch, start):
    """train() in a bandit with one good arm and an actor at its optimum, from far too cold and far too hot (5.4)."""
    n, p = 4, 0.7
    q = torch.tensor([1.0, 0.0, 0.0, 0.0])
    policies, alphas, real_start = [], [], klac.Run.start

    def optimal_actor(batch, actor, critics, log_q, alpha):
        pi = torch.softmax(q / alpha, 0)
        policies.append(pi)
        alphas.append(alpha.item())
        return {}, math.log(n) + torch.special.xlogy(pi, pi).sum(), {"losses/actor_loss": torch.zeros(())}

    def start_hot_or_cold(self, parts, buffer, log_alpha, rng):
        real_start(self, parts, buffer, log_alpha, rng)
        log_alpha.fill_(start)

    monkeypatch.setattr(klac, "actor_gradients", optimal_actor)
    monkeypatch.setattr(klac, "critic_gradients", lambda *a: ({}, {}))
    monkeypatch.setattr(klac, "descend", lambda *a: None)
    monkeypatch.setattr(klac.Run, "start", start_hot_or_cold)
    args = Args(env_id="Bandit-v0", total_timesteps=5_001, learning_starts=0, q_lr=1e-2, p_start=p, p_end=p, **FAST)
    args.update_frequency = 1
    klac.train(args)
    assert len(alphas) == 5_000
    assert math.log(alphas[0]) == pytest.approx(start)
    # towards the target at once: warmer where the policy is too greedy, colder where too random
    assert (math.log(alphas[1]) - start) * start < 0
    assert policies[-1][0].item() == pytest.approx(p, abs=0.001)
    # pi = exp(q / alpha) / Z there, so alpha = 1 / log(pi_0 / pi_1)
    assert alphas[-1] == pytest.approx(1 / math.log(p / ((1 - p) / (n - 1))), rel=0.01)


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


@pytest.mark.parametrize(("env_id", "p"), [("CartPole-v1", 0.6), ("Walk-v0", 0.5)])
def test_p_starts_above_chance(scalars, env_id, p):
    """0.5, but with two actions, where that is chance, 0.6."""
    run_dir = klac.train(Args(env_id=env_id, total_timesteps=105, **TINY))
    assert json.loads((run_dir / "args.json").read_text())["p_start"] == p
    ((step, asked),) = scalars(run_dir)["policy/target_exploit_probability"]
    assert asked == pytest.approx(p + (0.8 - p) * step / 105)


@pytest.mark.parametrize("flag", ["p_start", "p_end"])
def test_p_must_be_between_chance_and_certainty(flag):
    for p in (1 / 3, 0.2, 1.0):
        with pytest.raises(klac.UsageError, match=f"--{flag.replace('_', '-')} {p}: must be in"):
            klac.train(Args(env_id="Walk-v0", total_timesteps=105, **TINY, **{flag: p}))
    assert not klac.Path("runs").exists()
    klac.train(Args(env_id="Walk-v0", total_timesteps=105, **TINY, **{flag: 0.34}))


@pytest.mark.parametrize(("module", "flags"), [(klac, {"anneal": False}), (sac_discrete, {})], ids=["klac", "sac"])
def test_the_heuristic_target_is_the_given_share_of_log_n(scalars, module, flags):
    flags = {"env_id": "Walk-v0", "total_timesteps": 105, **TINY, **flags}
    logged = scalars(module.train(module.Args(**flags, target_entropy_scale=0.4)))
    assert logged["policy/target_entropy"] == [(104, pytest.approx(0.4 * math.log(3)))]
    for scale in (0.0, 1.0):
        with pytest.raises(module.UsageError, match="--target-entropy-scale"):
            module.train(module.Args(**flags, target_entropy_scale=scale))


@pytest.mark.parametrize(("env_id", "value"), [("OneStepTermination-v0", 1.0), ("OneStepTruncation-v0", 2.0)])
def test_a_termination_does_not_bootstrap_and_a_truncation_does(scalars, monkeypatch, env_id, value):
    """Reward 1 and gamma 1/2: a terminated step is worth 1; one cut by the clock goes on for 1 / (1 - gamma) = 2. An
    episode ends where it began: in a state that no episode begins in, the critics would be anything but 2."""
    real = tests.envs.OneStep.step
    monkeypatch.setattr(
        tests.envs.OneStep, "step", lambda self, action: (np.array([1.0, 0.0]), *real(self, action)[1:])
    )
    args = Args(env_id=env_id, total_timesteps=1_200, gamma=0.5, bias=False, update_frequency=2, q_lr=3e-3, **TINY)
    values = scalars(klac.train(args))["losses/qf1_values"]
    assert np.mean([v for _, v in values[-100:]]) == pytest.approx(value, abs=0.1)


def test_a_truncated_episode_goes_on_from_its_own_last_observation(scalars):
    args = Args(env_id="OneStepTruncation-v0", total_timesteps=1_200, gamma=0.5, bias=False, q_lr=3e-3, **TINY)
    args.update_frequency = 2
    run_dir = klac.train(args)
    saved = torch.load(run_dir / "actor.pt", weights_only=True)
    actor, critics = klac.Networks(1, (2,), 3), klac.Networks(2, (2,), 3)
    actor.load_state_dict(saved["actor"])
    critics.load_state_dict(saved["critics"])
    first, last = (
        sum(p * q for p, q in zip(*values_by_hand(actor, critics, torch.tensor([obs])), strict=True))
        for obs in ([1.0, 0.0], [1.0, 0.5])
    )
    assert abs(last - first) > 0.3  # so that the two can be told apart
    value = np.mean([v for _, v in scalars(run_dir)["losses/qf1_values"][-20:]])
    assert value == pytest.approx(1 + 0.5 * last, abs=0.02)


def test_beta_is_in_the_values_and_not_in_the_returns(scalars):
    args = Args(env_id="OneStepTermination-v0", total_timesteps=1_200, beta=3.0, q_lr=3e-3, update_frequency=2, **TINY)
    logged = scalars(klac.train(args))
    assert {v for _, v in logged["charts/episodic_return"]} == {1.0}
    assert np.mean([v for _, v in logged["losses/qf1_values"][-100:]]) == pytest.approx(4.0, abs=0.2)  # r + beta
    # the critic's value at the start, 4, less the discounted true return, 1
    assert np.mean([v for _, v in logged["charts/q_minus_return"][-100:]]) == pytest.approx(3.0, abs=0.2)


def test_q_minus_return_is_the_first_state_s_value_less_the_discounted_rewards(scalars, monkeypatch):
    """Recomputed from the transitions stored and, with learning rates of almost nothing, the initial networks."""
    stored, made, real_add, real_networks = [], [], klac.ReplayBuffer.add, klac.make_networks
    monkeypatch.setattr(klac.ReplayBuffer, "add", lambda self, *t: stored.append(t) or real_add(self, *t))
    monkeypatch.setattr(klac, "make_networks", lambda *a: made.append(real_networks(*a)) or made[-1])
    args = Args(env_id="Walk-v0", total_timesteps=300, gamma=0.8, policy_lr=1e-12, q_lr=1e-12, **FAST)
    args.learning_starts = 20
    logged = scalars(klac.train(args))["charts/q_minus_return"]
    ((actor, critics),) = made
    expected, episode = {}, []
    ends = {step for step, _ in scalars(next(klac.Path("runs").iterdir()))["charts/episodic_return"]}
    for step, (obs, _, reward, _, _) in enumerate(stored):
        episode.append((step, obs, reward))
        if step in ends:
            first, start, _ = episode[0]
            pi, min_q = values_by_hand(actor, critics, torch.tensor(start, dtype=torch.float32)[None])
            discounted = sum(0.8**t * r for t, (_, _, r) in enumerate(episode))
            if first >= 20:  # an episode begun in the warm-up has no policy that valued it
                expected[step] = sum(pi[a] * min_q[a] for a in range(3)) - discounted
            episode = []
    assert len(expected) > 20
    assert [step for step, _ in logged] == list(expected)
    assert [value for _, value in logged] == pytest.approx(list(expected.values()), rel=1e-4, abs=1e-4)


def test_target_networks_move_by_tau(monkeypatch):
    made, seen, real_networks, real_target = [], [], klac.make_networks, klac.td_target

    def record(batch, actor, target_critics, *rest):
        online = [p.detach().clone() for p in made[0][1].parameters()]
        seen.append((online, [p.detach().clone() for p in target_critics.parameters()]))
        return real_target(batch, actor, target_critics, *rest)

    monkeypatch.setattr(klac, "make_networks", lambda *a: made.append(real_networks(*a)) or made[-1])
    monkeypatch.setattr(klac, "td_target", record)
    args = Args(env_id="Walk-v0", total_timesteps=200, learning_starts=100, tau=0.25, q_lr=1e-2, **FAST)
    args.update_frequency = args.target_network_frequency = 4
    klac.train(args)
    assert all(torch.equal(a, b) for a, b in zip(*seen[0], strict=True))  # they start as copies
    for (_, before), (online, after) in itertools.pairwise(seen):
        for start, end, parameter in zip(before, after, online, strict=True):
            torch.testing.assert_close(end, 0.75 * start + 0.25 * parameter)
    assert not torch.equal(*(parameters[0] for parameters in seen[-1]))


class Linear(torch.nn.Module):
    """An actor with logits obs @ w1 + b, in place of the networks'."""

    def __init__(self, w1, b=0.0):
        super().__init__()
        self.w1 = torch.nn.Parameter(w1, requires_grad=False)
        self.b = torch.nn.Parameter(torch.as_tensor(b), requires_grad=False)

    def forward(self, x):
        return (x.squeeze(1) @ self.w1 + self.b)[None]


def test_evaluation_plays_the_most_probable_action():
    args = Args(env_id="Bandit-v0", eval_episodes=200)
    actor = Linear(0.01 * torch.eye(4))  # the right arm is barely preferred
    assert (klac.evaluate(actor, args, None) == 1).all()
    assert klac.evaluate(actor, args, None, deterministic=False).mean() < 0.5
    actor.w1.neg_()
    assert (klac.evaluate(actor, args, None) == 0).all()


@pytest.mark.parametrize("module", [klac, sac_discrete], ids=["klac", "sac"])
def test_actions_are_drawn_from_the_policy(monkeypatch, module):
    pi, actions = np.array([0.6, 0.3, 0.1, 0.0]), []
    actor = Linear(torch.zeros(4, 4), torch.tensor(pi, dtype=torch.float32).clamp(min=1e-30).log())

    class Record(gym.Wrapper):
        def step(self, action):
            actions.append(action)
            return self.env.step(action)

    make_env = module.make_env
    monkeypatch.setattr(module, "make_networks", lambda *a: (actor, module.Networks(2, (4,), 4)))
    monkeypatch.setattr(module, "make_env", lambda *args: Record(make_env(*args)))
    args = module.Args(env_id="Bandit-v0", total_timesteps=5_000, learning_starts=0, **FAST)
    args.update_frequency = 5_000  # no update
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
    args = Args(env_id="Bandit-v0", total_timesteps=1_500, update_frequency=2, policy_lr=1e-2, **FAST)
    args.learning_starts, args.log_interval, args.autotune, args.alpha = 100, 1, False, 100.0
    logged = {tag: np.array(values).T[1] for tag, values in scalars(klac.train(args)).items()}
    assert logged["policy/kl"][0] > 0.1
    assert logged["policy/kl"][-1] == pytest.approx(0, abs=0.005)
    assert logged["policy/exploit_probability"][-1] == pytest.approx(0.7, abs=0.03)
    assert logged["policy/entropy"][-1] == pytest.approx(scipy.stats.entropy([0.7, 0.1, 0.1, 0.1]), abs=0.03)


@pytest.mark.slow
def test_kl_to_an_earlier_actor_is_held_at_its_budget(scalars):
    """q prefers the wrong arms; the budget is that of p = 0.55: log 4 less the entropy of (0.55, 0.15, 0.15, 0.15)."""
    budget = math.log(4) - scipy.stats.entropy([0.55, 0.15, 0.15, 0.15])
    torch.manual_seed(1)
    q_network = klac.Networks(1, (4,), 4)
    q_network.b3 += torch.tensor([0.0, 2.0, 2.0, 4.0])
    torch.save({"args": {"env_id": "Bandit-v0"}, "actor": q_network.state_dict()}, "q.pt")
    args = Args(env_id="Bandit-v0", total_timesteps=6_000, update_frequency=2, policy_lr=3e-3, q_lr=3e-3, **FAST)
    args.learning_starts, args.log_interval, args.bias, args.reference = 500, 100, False, "q.pt"
    args.p_start = args.p_end = 0.55
    run_dir = klac.train(args)
    logged = {tag: np.array(values).T[1] for tag, values in scalars(run_dir).items()}
    np.testing.assert_allclose(logged["policy/target_kl"], budget, rtol=1e-5)
    assert logged["policy/kl"][-20:].mean() == pytest.approx(budget, abs=0.05)

    actor = klac.Networks(1, (4,), 4)
    actor.load_state_dict(torch.load(run_dir / "actor.pt", weights_only=True)["actor"])
    x = torch.eye(4)[:, None]
    pi, q = (torch.softmax(network(x)[0], 1).numpy() for network in (actor, q_network))
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

    spaces = {"observation_space": gym.spaces.Box(-100, 100, (1,), np.float64), "action_space": gym.spaces.Discrete(3)}
    buffer = klac.ReplayBuffer(5, SimpleNamespace(**spaces), CPU)
    for t in range(13):
        buffer.add(np.array([t]), t % 3, t, np.array([t + 1]), False)
    batch = buffer.sample(200, np.random.default_rng(0))
    assert batch.obs.shape == batch.next_obs.shape == (200, 1, 1)
    assert set(batch.obs.flatten().tolist()) == {8, 9, 10, 11, 12}
    assert torch.equal(batch.next_obs, batch.obs + 1)
    assert torch.equal(batch.actions, batch.obs.flatten().long() % 3)
    assert torch.equal(batch.rewards, batch.obs.flatten())
    assert [column.dtype for column in batch] == [torch.float32, torch.int64] + [torch.float32] * 3


def test_seaquest_buffer_takes_at_most_210_mb():
    env = klac.make_env(Args(env_id="Seaquest-v1"))
    buffer = klac.ReplayBuffer(100_000, env, CPU)
    assert buffer.columns.obs.dtype == bool
    assert sum(column.nbytes for column in buffer.columns) <= 210e6


def test_images_become_float_patches_and_bytes_are_scaled():
    image = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    x = klac.preprocess(torch.as_tensor(image))
    assert x.shape == (2, 2 * 3, 3 * 3 * 3)
    assert x.dtype == torch.float32
    for b, i, j in itertools.product(range(2), range(2), range(3)):
        patch = image[b, i : i + 3, j : j + 3].ravel() / 255
        np.testing.assert_allclose(x[b, 3 * i + j], patch, rtol=1e-6)
    assert klac.preprocess(torch.ones(1, 4, 5, 3, dtype=torch.bool)).max() == 1
    flat = torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(klac.preprocess(flat), flat.float()[:, None])


def test_networks_are_the_paper_s():
    for k in (1, 2):
        networks = klac.Networks(k, (10, 10, 4), 6)
        assert networks.w1.shape == (3 * 3 * 4, k * 16)
        assert networks.w2.shape == (k, 16 * 8 * 8, 128)
        assert networks.w3.shape == (k, 128, 6)
        assert all((p == 0).all() for name, p in networks.named_parameters() if name.startswith("b"))
    torch.manual_seed(0)
    many = klac.Networks(50, (10, 10, 4), 6)
    for weights, inputs in ((many.w1, 3 * 3 * 4), (many.w2, 16 * 8 * 8), (many.w3, 128)):
        # Kaiming: normal, with standard deviation sqrt(2 / fan_in)
        some = weights.flatten()[::7][:30_000] / math.sqrt(2 / inputs)
        assert some.std().item() == pytest.approx(1, rel=0.025)
        assert scipy.stats.kstest(some.numpy(), "norm").pvalue > 1e-3


def random_networks(k, obs_shape, n, seed):
    """Networks with biases that are not zero."""
    torch.manual_seed(seed)
    networks = klac.Networks(k, obs_shape, n)
    for bias in (networks.b1, networks.b2, networks.b3):
        bias.normal_(0, 0.3)
    return networks


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("obs_shape", [(7, 5, 3), (6,)], ids=["image", "flat"])
def test_networks_are_torch_s_own_layers(obs_shape, k):
    n, obs = 4, torch.randn(9, *obs_shape, generator=torch.Generator().manual_seed(0))
    networks = random_networks(k, obs_shape, n, seed=1)
    result = networks(klac.preprocess(obs))
    assert result.shape == (k, 9, n)
    for i in range(k):
        if len(obs_shape) == 3:
            own = slice(16 * i, 16 * (i + 1))
            kernel = networks.w1[:, own].reshape(3, 3, 3, 16).permute(3, 2, 0, 1)  # (rows, columns, C, 16) to torch's
            h = F.conv2d(obs.permute(0, 3, 1, 2), kernel, networks.b1[own]).relu().flatten(1)
            w2 = networks.w2[i].reshape(5, 3, 16, 128).permute(3, 2, 0, 1).flatten(1)  # torch flattens channels first
        else:
            own = slice(128 * i, 128 * (i + 1))
            h = F.linear(obs, networks.w1[:, own].T, networks.b1[own]).relu()
            w2 = networks.w2[i].T
        h = F.linear(h, w2, networks.b2[i, 0]).relu()
        torch.testing.assert_close(result[i], F.linear(h, networks.w3[i].T, networks.b3[i, 0]), rtol=1e-5, atol=1e-5)


class NumpyNetwork:
    """The i-th network of a stack in float64, forward and backward by the chain rule."""

    def __init__(self, networks, i):
        w1, w2, w3, b1, b2, b3 = (
            getattr(networks, name).double().numpy() for name in ("w1", "w2", "w3", "b1", "b2", "b3")
        )
        own = slice(i * w1.shape[1] // networks.k, (i + 1) * w1.shape[1] // networks.k)
        self.w1, self.w2, self.w3, self.b1, self.b2, self.b3 = w1[:, own], w2[i], w3[i], b1[own], b2[i, 0], b3[i, 0]

    def forward(self, obs):
        if obs.ndim == 4:
            b, rows, columns, _ = obs.shape
            patches = [
                [obs[:, r : r + 3, c : c + 3].reshape(b, -1) for c in range(columns - 2)] for r in range(rows - 2)
            ]
            self.x = np.stack([patch for row in patches for patch in row], 1)
        else:
            self.x = obs[:, None]
        self.z1 = self.x @ self.w1 + self.b1
        self.h1 = np.maximum(self.z1, 0).reshape(len(obs), -1)
        self.z2 = self.h1 @ self.w2 + self.b2
        self.h2 = np.maximum(self.z2, 0)
        return self.h2 @ self.w3 + self.b3

    def backward(self, d_out):
        """The gradients by parameter, where d_out is the loss's with respect to what forward returned."""
        d_z2 = (d_out @ self.w3.T) * (self.z2 > 0)
        d_z1 = (d_z2 @ self.w2.T).reshape(self.z1.shape) * (self.z1 > 0)
        gradients = {"w3": self.h2.T @ d_out, "w2": self.h1.T @ d_z2, "w1": np.einsum("bpi,bpu->iu", self.x, d_z1)}
        return gradients | {"b3": d_out.sum(0), "b2": d_z2.sum(0), "b1": d_z1.sum((0, 1))}


def assert_gradients(gradients, by_hand):
    """Each entry agrees to 1e-5 of the parameter's largest; by_hand holds one dictionary a network of the stack."""
    assert gradients.keys() == by_hand[0].keys()
    for name, gradient in gradients.items():
        expected = [single[name] for single in by_hand]
        expected = np.concatenate(expected, -1) if name in ("w1", "b1") else np.stack(expected)
        np.testing.assert_allclose(
            gradient.numpy().reshape(expected.shape), expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name
        )


@pytest.mark.parametrize("obs_shape", [(7, 5, 3), (6,)], ids=["image", "flat"])
@pytest.mark.parametrize("module", [klac, sac_discrete], ids=["klac", "sac"])
def test_gradients_are_the_chain_rule_s_in_float64(module, obs_shape):
    n, size, gamma, beta, alpha = 4, 64, 0.9, 0.25, 0.37
    rng = np.random.default_rng(0)
    image = len(obs_shape) == 3
    obs, next_obs = (
        rng.integers(0, 256, (size, *obs_shape), np.uint8) if image else rng.normal(size=(size, *obs_shape))
        for _ in range(2)
    )
    actions, rewards, ends = rng.integers(n, size=size), rng.normal(size=size), rng.random(size) < 0.5
    x, next_x = (module.preprocess(torch.as_tensor(each)) for each in (obs, next_obs))
    columns = actions, rewards.astype(np.float32), ends.astype(np.float32)
    actions_, rewards_, ends_ = (torch.as_tensor(column) for column in columns)
    batch = module.Batch(x, actions_, rewards_, next_x, ends_)
    actor, critics, targets = (random_networks(k, obs_shape, n, seed) for k, seed in ((1, 1), (2, 2), (2, 3)))
    reference = torch.softmax(torch.tensor([0.0, 1.0, -1.0, 2.0]), 0).log()

    if image:
        obs, next_obs = obs / 255, next_obs / 255
    pi_network, q_networks = NumpyNetwork(actor, 0), [NumpyNetwork(critics, i) for i in range(2)]
    log_pi = scipy.special.log_softmax(pi_network.forward(next_obs), 1)
    min_q = np.minimum(*(NumpyNetwork(targets, i).forward(next_obs) for i in range(2)))
    inner, extra = (min_q, beta) if module is klac else (min_q - alpha * log_pi, 0.0)
    y = rewards + extra + gamma * ~ends * (np.exp(log_pi) * inner).sum(1)
    expected, errors = [], []
    for network in q_networks:
        error = network.forward(obs)[np.arange(size), actions] - y
        d_q = np.zeros((size, n))
        d_q[np.arange(size), actions] = 2 * error / size
        expected.append(network.backward(d_q))
        errors.append(np.square(error).mean())
    bonus = beta if module is klac else torch.tensor(alpha)
    gradients, log = module.critic_gradients(batch, critics, actor, targets, gamma, bonus)
    assert_gradients(gradients, expected)
    assert [log["losses/qf1_loss"].item(), log["losses/qf2_loss"].item()] == pytest.approx(errors, rel=1e-5)

    log_pi = scipy.special.log_softmax(pi_network.forward(obs), 1)
    pi = np.exp(log_pi)
    min_q = np.minimum(*(network.forward(obs) for network in q_networks))
    # d/dlogits of sum_a pi_a f_a, f = alpha (log pi - log nq) - min Q, is pi (f - sum pi f): alpha d log pi sums to 0
    log_nq = reference.double().numpy() + math.log(n) if module is klac else 0.0
    f = alpha * (log_pi - log_nq) - min_q
    loss = (pi * f).sum(1)
    arguments = (batch, actor, critics, lambda x: reference) if module is klac else (batch, actor, critics)
    gradients, kl, log = module.actor_gradients(*arguments, torch.tensor(alpha))
    assert_gradients(gradients, [pi_network.backward(pi * (f - loss[:, None]) / size)])
    assert log["losses/actor_loss"].item() == pytest.approx(loss.mean(), rel=1e-5)
    divergence = (pi * (log_pi - log_nq)).sum(1).mean() + math.log(n)
    assert kl.item() == pytest.approx(divergence, rel=1e-5)
    assert log["policy/kl"] is kl


def test_both_logs_hold_the_same_values(scalars):
    run_dir = klac.train(Args(env_id="Walk-v0", total_timesteps=300, **TINY))
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    rows = scalars(run_dir)
    assert rows.keys() == set(events.Tags()["scalars"])
    assert {"charts/episodic_return", "losses/actor_loss", "policy/kl", "eval/episodic_return"} < rows.keys()
    for tag, values in rows.items():
        steps, values = zip(*values, strict=True)
        assert list(steps) == [event.step for event in events.Scalars(tag)], tag
        # a float64 that is rounded to nine digits before float32 may come out one float32 further on
        in_events = np.array([event.value for event in events.Scalars(tag)], np.float32)
        np.testing.assert_array_max_ulp(np.array(values, np.float32), in_events, maxulp=1)


def test_it_learns(scalars):
    """Catch: a random policy catches about one ball in four, a trained one nearly all."""
    args = Args(
        env_id="Catch-v0",
        total_timesteps=5_000,
        learning_starts=1_000,
        target_network_frequency=100,
        update_frequency=2,
        policy_lr=3e-3,
        q_lr=3e-3,
        eval_episodes=100,
        compile=False,
    )
    logged = scalars(klac.train(args))
    random_returns = [v for step, v in logged["charts/episodic_return"] if step < 1_000]
    assert np.mean(random_returns) < 0.4
    assert logged["eval/episodic_return"][0][1] > 0.95


@pytest.mark.slow
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
        compile=False,
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
