"""The exact solutions, against closed forms, SciPy and other algorithms for the same problem."""

import csv
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import tabular
from tabular import MDP, boltzmann, kl_policy_iteration, policy_iteration, soft_policy_iteration

SOLVERS = {"SAC": soft_policy_iteration, "KLAC": kl_policy_iteration}


@st.composite
def mdps(draw):
    """A random MDP, whose transitions may end the episode, with a temperature."""
    seed, states, actions = draw(st.integers(0, 10**6)), draw(st.integers(1, 6)), draw(st.integers(2, 5))
    rng = np.random.default_rng(seed)
    P = rng.dirichlet(np.full(states + 1, draw(st.sampled_from([0.1, 1.0]))), (states, actions))[:, :, :-1]
    r = rng.normal(size=(states, actions)) * (rng.random((states, actions)) < draw(st.sampled_from([0.2, 1.0])))
    gamma = draw(st.sampled_from([0.0, 0.5, 0.9, 0.99]))
    mdp = MDP("test", P, r, np.full(states, 1 / states), np.zeros((states, actions)), gamma)
    return mdp, 10.0 ** draw(st.floats(-3, 2)), np.log(rng.dirichlet(np.ones(actions) * 3, states))


@given(mdps())
@settings(max_examples=100, deadline=None)
def test_the_bound_holds_for_both_and_every_fixed_point_is_one(case):
    mdp, alpha, log_q = case
    best = policy_iteration(mdp)
    for name, solver in SOLVERS.items():
        for log_w in (mdp.log_m, log_q):
            solution = solver(mdp, alpha, log_w)
            assert solution.residual <= 1e-9
            gap = best - solution.value
            assert gap.min() > -1e-7
            assert gap.max() <= tabular.bound(mdp, alpha, log_w) + 1e-9
            # what the policy is the Boltzmann policy of, written out
            pi, w = np.exp(solution.log_pi), np.exp(log_w)
            value = solution.soft_value if name == "SAC" else solution.value
            q = mdp.r + mdp.gamma * np.einsum("sat,t->sa", mdp.P, value)
            np.testing.assert_allclose(pi, scipy.special.softmax(q / alpha + np.log(w), axis=1), atol=2e-9)
            # and what the value is the value of
            entropy = -(pi * np.log(np.maximum(pi, 1e-300) / w)).sum(axis=1)
            bonus = alpha * entropy if name == "SAC" else 0.0
            expected = (pi * q).sum(axis=1) + bonus
            np.testing.assert_allclose(value, expected, rtol=1e-7, atol=1e-7)


@given(mdps())
@settings(max_examples=50, deadline=None)
def test_plain_policy_iteration_solves_the_linear_programme(case):
    mdp, _, _ = case
    states, actions = mdp.r.shape
    lhs = (mdp.gamma * mdp.P - np.eye(states)[:, None]).reshape(states * actions, states)
    result = scipy.optimize.linprog(np.ones(states), lhs, -mdp.r.ravel(), bounds=(None, None))
    np.testing.assert_allclose(policy_iteration(mdp), result.x, atol=1e-6)


@given(mdps())
@settings(max_examples=10, deadline=None)
def test_soft_policy_iteration_never_falls_and_ends_where_soft_value_iteration_does(case):
    mdp, alpha, log_q = case
    before = -np.inf
    for iterations in range(1, 6):
        soft_value = soft_policy_iteration(mdp, alpha, log_q, tolerance=0.0, max_iterations=iterations).soft_value
        assert np.all(soft_value >= before - 1e-9 * (1 + abs(soft_value)))
        before = soft_value
    value = np.zeros(len(mdp.r))
    for _ in range(5_000):
        value = alpha * scipy.special.logsumexp((mdp.r + mdp.gamma * mdp.P @ value) / alpha + log_q, axis=1)
    np.testing.assert_allclose(soft_policy_iteration(mdp, alpha, log_q).soft_value, value, rtol=1e-6, atol=1e-6)


@given(mdps())
@settings(max_examples=30, deadline=None)
def test_no_temperature_is_plain_policy_iteration_and_a_high_one_gives_the_reference(case):
    mdp, _, log_q = case
    for solver in SOLVERS.values():
        np.testing.assert_allclose(solver(mdp, 1e-6, log_q).value, policy_iteration(mdp), atol=1e-3)
        np.testing.assert_allclose(np.exp(solver(mdp, 1e8, log_q).log_pi), np.exp(log_q), atol=1e-5)


@given(mdps(), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_identical_actions_are_one_with_a_weight(case, copies):
    mdp, alpha, _ = case
    written_out = MDP("test", np.concatenate([mdp.P, *[mdp.P[:, :1]] * (copies - 1)], axis=1),
                      np.concatenate([mdp.r, *[mdp.r[:, :1]] * (copies - 1)], axis=1), mdp.start,
                      np.zeros((len(mdp.r), mdp.r.shape[1] + copies - 1)), mdp.gamma)  # fmt: skip
    mdp.log_m[:, 0] = np.log(copies)
    for solver in SOLVERS.values():
        short, long = solver(mdp, alpha, mdp.log_m), solver(written_out, alpha, written_out.log_m)
        np.testing.assert_allclose(short.value, long.value, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(short.soft_value, long.soft_value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.01, 0.05, 1.0])
@pytest.mark.parametrize("n", [1, 100, 1e6, 1e12])
def test_table_1_is_solved_exactly_for_any_number_of_actions_and_any_temperature(n, alpha):
    gamma, mdp = 0.99, tabular.stay_or_exit(n)

    def true_value(x):
        return x / (1 - gamma * (1 - x))

    # KLAC: log odds of the exit are (1 - gamma V) / alpha - log N
    def difference(log_odds):
        return log_odds - (1 - gamma * true_value(scipy.special.expit(log_odds))) / alpha + np.log(n)

    log_odds = scipy.optimize.brentq(difference, -2 / alpha - 50, 2 / alpha + 50, xtol=1e-12)
    klac = kl_policy_iteration(mdp, alpha, mdp.log_m)
    assert klac.residual <= 1e-9
    assert np.isfinite(klac.log_pi).all()
    assert klac.value[0] == pytest.approx(true_value(scipy.special.expit(log_odds)), abs=1e-6)

    # SAC: V = alpha log(exp(1 / alpha) + N exp(gamma V / alpha))
    def soft_difference(value):
        return value - alpha * np.logaddexp(1 / alpha, np.log(n) + gamma * value / alpha)

    value = scipy.optimize.brentq(soft_difference, 0, 1e5, xtol=1e-12)
    sac = soft_policy_iteration(mdp, alpha, mdp.log_m)
    assert sac.residual <= 1e-9
    assert sac.soft_value[0] == pytest.approx(value, rel=1e-9)
    assert sac.value[0] == pytest.approx(true_value(np.exp(min(0.0, (1 - value) / alpha))), abs=1e-6)


@pytest.mark.parametrize("gamma", [0.9, 0.99])
@pytest.mark.parametrize("rho", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("algorithm", ["SAC", "KLAC"])
def test_the_thresholds_in_closed_form_are_where_the_solver_finds_them(algorithm, rho, gamma):
    alpha, reward = 0.02, 2.0
    log_n = tabular.threshold(algorithm, rho, alpha, reward, gamma)
    mdp = tabular.stay_or_exit(2.0, reward, gamma)
    mdp.log_m[0, 1] = log_n
    assert SOLVERS[algorithm](mdp, alpha, mdp.log_m).value[0] == pytest.approx(rho * reward, rel=1e-5)


def test_where_sac_collapses_klac_holds_nearly_all_and_an_annealed_temperature_brings_it_back():
    alpha, gamma = 0.002, 0.99
    mdp = tabular.stay_or_exit(2 * np.exp((1 - gamma) / (alpha * gamma)))  # twice the paper's inequality
    assert soft_policy_iteration(mdp, alpha, mdp.log_m).value[0] < 0.02
    assert kl_policy_iteration(mdp, alpha, mdp.log_m).value[0] > 0.98
    # vacuous exactly where SAC fails: the bound is larger than all that can be lost
    assert tabular.bound(mdp, alpha, mdp.log_m) > 1
    huge = tabular.stay_or_exit(1e12)
    path = tabular.solve(huge, "KLAC", np.geomspace(10, 1e-6, 40), huge.log_m)
    assert all(solution.residual <= 1e-9 for solution in path)
    assert path[0].value[0] < 1e-9
    assert path[-1].value[0] == pytest.approx(1, abs=1e-9)


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=5), st.floats(0.01, 10))
@settings(max_examples=30, deadline=None)
def test_the_bandit_is_boltzmanns(rewards, alpha):
    mdp = tabular.bandit(tuple(rewards))
    for solver in SOLVERS.values():
        pi = np.exp(solver(mdp, alpha, mdp.log_m).log_pi[0])
        np.testing.assert_allclose(pi, scipy.special.softmax(np.array(rewards) / alpha), atol=1e-12)


@given(st.floats(0.01, 0.99), st.floats(0.03, 0.3), st.sampled_from([0.9, 0.99]))
@settings(max_examples=30, deadline=None)
def test_a_bifurcation_makes_the_soft_policy_follow_any_distribution_and_leaves_the_optimal_one(p, alpha, gamma):
    mdp = tabular.bifurcate([p, 1 - p], alpha, 1e12, rewards=(1.0, 0.7), cost=2.0, gamma=gamma)
    counts = np.exp(mdp.log_m)
    np.testing.assert_allclose(counts.sum(axis=1), 1e12)
    best = policy_iteration(mdp)
    np.testing.assert_allclose(best, [1, 0, 0])  # the first group, and no exit
    pi = np.exp(soft_policy_iteration(mdp, alpha, mdp.log_m).log_pi[0])
    # a whole number of actions: of one, a half is a lot
    few = counts[1:, 0].min() < 100
    np.testing.assert_allclose(pi, [p, 1 - p], atol=0.2 if few else 0.01)


def test_a_bifurcation_misleads_sac_and_not_klac_until_exits_are_too_many():
    mdp = tabular.bifurcation(100, (1, 100))
    sac, klac = (solver(mdp, 0.1, mdp.log_m) for solver in SOLVERS.values())
    # by hand: Q(a) = r + 0.99 * 0.1 * log(on + (100 - on) e^-10)
    q = np.array([1 + 0.099 * np.log(1 + 99 * np.exp(-10)), 0.7 + 0.099 * np.log(100)])
    np.testing.assert_allclose(np.exp(sac.log_pi[0]), scipy.special.softmax(q / 0.1), rtol=1e-6)
    assert np.exp(sac.log_pi[0, 0]) < 0.2
    assert np.exp(klac.log_pi[0, 0]) > 0.9
    with pytest.raises(ValueError, match="more than 10"):
        tabular.bifurcate([0.001, 0.999], 0.1, 10)


def test_taxi_is_solved_as_plain_policy_iteration_does():
    mdp = tabular.from_gymnasium("Taxi-v3")
    optimal = np.zeros(len(mdp.r))
    for _ in range(3000):
        optimal = (mdp.r + mdp.gamma * mdp.P @ optimal).max(axis=1)
    np.testing.assert_allclose(policy_iteration(mdp), optimal, atol=1e-9)
    solution = soft_policy_iteration(mdp, 0.05, mdp.log_m)
    assert mdp.start @ (optimal - solution.value) < 1e-6
    env = gym.make("Taxi-v4")  # played, not computed
    returns = []
    for seed in range(100):
        (s, _), done, rewards = env.reset(seed=seed), False, []
        start = s
        while not done:
            s, reward, terminated, truncated, _ = env.step(int(solution.log_pi[s].argmax()))
            rewards.append(reward)
            done = terminated or truncated
        returns.append(sum(rewards))
        assert terminated
        assert sum(0.99**t * r for t, r in enumerate(rewards)) == pytest.approx(optimal[start])
    assert np.mean(returns) > 7


def test_taxi_at_the_slides_temperature_wanders_for_ever_and_klac_does_not(run_script):
    """The slides' Algorithm 1, its two loops of backups, on the outcomes of Gymnasium's own table; played as well."""
    env, alpha, gamma = tabular.TaxiEnv(), 1.0, 0.99
    outcomes = np.array([[env.P[s][a][0] for a in range(6)] for s in range(500)])  # each action has one
    following, reward, goes_on = outcomes[..., 1].astype(int), outcomes[..., 2], 1 - outcomes[..., 3]
    q, klac_q = np.zeros((500, 6)), np.zeros((500, 6))
    for _ in range(20):
        log_pi = scipy.special.log_softmax(q / alpha, axis=1)
        for _ in range(1000):
            value = (np.exp(log_pi) * (q - alpha * log_pi)).sum(axis=1)
            q = reward + gamma * goes_on * value[following]
    for _ in range(4000):  # KLAC's fixed point: the same without the entropy, an eighth of a step at a time
        value = (scipy.special.softmax(klac_q / alpha, axis=1) * klac_q).sum(axis=1)
        klac_q += (reward + gamma * goes_on * value[following] - klac_q) / 8
    returns = {}
    for algorithm, critic in (("SAC", q), ("KLAC", klac_q)):
        pi, value = scipy.special.softmax(critic / alpha, axis=1), np.zeros(500)
        for _ in range(3000):
            value = (pi * (reward + gamma * goes_on * value[following])).sum(axis=1)
        returns[algorithm] = env.initial_state_distrib @ value
    code, out, _ = run_script("tabular", "--mdp", "Taxi-v3", "--alphas", 0.05, 0.4, 1, "--out", "figures")
    assert code == 0
    lines = [[cell.strip() for cell in line.split("|")] for line in out.splitlines()[2:]]
    printed = {(algorithm, alpha): float(j) for _, _, algorithm, alpha, _, j, *_ in lines}
    with open("figures/Taxi-v3_alphas.csv") as file:
        drawn = {(row["algorithm"], row["alpha"]): float(row["return"]) for row in csv.DictReader(file)}
    for algorithm, expected in returns.items():
        assert printed[algorithm, "1"] == pytest.approx(expected, rel=1e-3)
        assert drawn[algorithm, "1"] == pytest.approx(expected, rel=1e-5)
        assert drawn[algorithm, "0.05"] == pytest.approx(6.327464, abs=1e-5)  # the optimum
    assert returns["SAC"] < -99
    assert returns["KLAC"] > 0
    assert sorted(printed) == sorted(drawn)
    for suffix in ("png", "pdf"):
        assert Path(f"figures/Taxi-v3_alphas.{suffix}").stat().st_size > 5000

    # to wander is worth more than to deliver: alpha log(4 moves at -1 and 2 illegal actions at -10), for ever
    wandering = np.log(4 * np.exp(-1) + 2 * np.exp(-10)) / (1 - gamma)
    soft_value = scipy.special.logsumexp(q, axis=1)
    assert 20 < wandering < env.initial_state_distrib @ soft_value < wandering + 10
    (state, _), rng, played = env.reset(seed=0), np.random.default_rng(0), []
    for _ in range(200):
        state, paid, *_ = env.step(int(rng.choice(6, p=scipy.special.softmax(q[state]))))
        played.append(paid)
    assert max(played) == -1  # no passenger was delivered


def test_the_bandits_policy_is_printed_and_drawn_for_each_temperature(run_script):
    """By hand: the odds of an arm that pays 1 and one that pays 0.5 are exp(0.5 / alpha)."""
    code, out, _ = run_script("tabular", "--mdp", "Bandit", "--alphas", 0.1, 0.5, 1, 100, "--out", "figures")
    assert code == 0
    by_hand = {"0.1": (0.99331, 0.0066929), "0.5": (0.73106, 0.26894), "1": (0.62246, 0.37754), "100": (0.5012, 0.4988)}
    lines = [[cell.strip() for cell in line.split("|")] for line in out.splitlines()]
    assert lines[0][-2] == "policy at the start"
    with open("figures/Bandit_alphas.csv") as file:
        drawn = list(csv.DictReader(file))
    assert len(lines[2:]) == len(drawn) == 8
    for line in lines[2:]:
        np.testing.assert_allclose([float(p) for p in line[-2].split(",")], by_hand[line[3]], rtol=2e-4)
    for row in drawn:
        np.testing.assert_allclose([float(row["pi_0"]), float(row["pi_1"])], by_hand[row["alpha"]], rtol=2e-4)
        assert float(row["return"]) == pytest.approx(0.5 + 0.5 * by_hand[row["alpha"]][0], abs=1e-4)
    assert Path("figures/Bandit_alphas.png").stat().st_size > 5000
    assert not Path("figures/stay_or_exit.png").exists()
    # and without a list, of the one temperature: exp(10) to 1 at 0.05
    assert run_script("tabular", "--mdp", "Bandit")[1].splitlines()[2].split("|")[-2].strip() == "1, 4.54e-05"


@pytest.mark.parametrize("env_id", list(tabular.GYMNASIUM))
def test_the_tables_of_gymnasium_are_mdps_and_converge(env_id):
    mdp = tabular.from_gymnasium(env_id)
    assert mdp.start.sum() == pytest.approx(1)
    assert mdp.P.min() >= 0
    assert mdp.P.sum(axis=2).max() == pytest.approx(1)
    assert mdp.P.sum(axis=2).min() < 1  # something ends the episode
    for alpha in (0.01, 1.0):
        for solver in SOLVERS.values():
            assert solver(mdp, alpha, mdp.log_m).residual <= 1e-9


@pytest.mark.parametrize("env_id", ["StayOrExit-v0", "Bifurcation-v0"])
def test_the_environments_are_the_mdps(env_id):
    env = gym.make(f"tabular:{env_id}")
    check_env(env.unwrapped, skip_render_check=True)
    mdp, rng = env.unwrapped.mdp, np.random.default_rng(0)
    counts = np.exp(mdp.log_m)
    assert env.action_space.n == round(counts[0].sum())
    obs, _ = env.reset(seed=0)
    visits, rewards = np.zeros_like(mdp.P), np.zeros_like(mdp.r)
    chosen = np.zeros(mdp.r.shape)
    for _ in range(20_000):
        action, s = int(rng.integers(env.action_space.n)), int(obs.argmax())
        kind = int(np.searchsorted(np.cumsum(np.rint(counts[s])), action, side="right"))
        obs, reward, terminated, truncated, _ = env.step(action)
        chosen[s, kind] += 1
        rewards[s, kind] += reward
        if not terminated:
            visits[s, kind, obs.argmax()] += 1
        if terminated or truncated:
            obs, _ = env.reset()
    seen = chosen > 0
    np.testing.assert_allclose(chosen / chosen.sum(axis=1, keepdims=True), counts / counts.sum(axis=1, keepdims=True),
                               atol=0.03)  # fmt: skip
    np.testing.assert_allclose(rewards[seen] / chosen[seen], mdp.r[seen])
    np.testing.assert_allclose(visits[seen] / chosen[seen][:, None], mdp.P[seen])


def test_the_continuous_bifurcation_asks_for_precision_where_it_pays_most():
    env = gym.make("tabular:BifurcationBox-v0")
    check_env(env.unwrapped, skip_render_check=True)
    for first, second, rewards in [
        (-0.5, 0.04, (1, 0)),
        (-0.01, 0.06, (1, -1)),
        (-1, -1, (1, -1)),
        (0.5, 0.9, (0.7, 0)),
    ]:
        env.reset(seed=0)
        obs, reward, terminated, _, _ = env.step(np.array([first], np.float32))
        assert (reward, terminated, obs.argmax()) == (rewards[0], False, 1 if first < 0 else 2)
        _, reward, terminated, truncated, _ = env.step(np.array([second], np.float32))
        assert (reward, terminated, truncated) == (rewards[1], True, False)


def test_the_deep_scripts_train_on_them(run_script):
    for name in ("sac_discrete", "klac_discrete"):
        flags = ["--env-id", "tabular:Bifurcation-v0", "--total-timesteps", 300, "--learning-starts", 100]
        code, out, err = run_script(name, *flags, "--run-name", name, "--no-autotune", "--alpha", 0.1, "--no-compile")
        assert code == 0, err
        assert "deterministic return" in out
    flags = ["--env-id", "tabular:BifurcationBox-v0", "--total-timesteps", 150, "--learning-starts", 100]
    assert run_script("sac_adaent_continuous", *flags, "--no-compile")[0] == 0


def test_the_command_line_prints_a_table_and_draws(run_script):
    code, out, _ = run_script("tabular", "--mdp", "all", "--out", "figures")
    assert code == 0
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    rows = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["algorithm"] for row in rows] == ["SAC", "KLAC"] * 7
    assert {row["converged"] for row in rows} == {"yes"}
    assert all(float(row["J* - J"]) <= float(row["bound"]) for row in rows)
    for name in ("stay_or_exit", "bound", "annealed"):
        for suffix in ("png", "pdf", "csv"):
            assert Path(f"figures/{name}.{suffix}").stat().st_size > 1000
    for name in ("stay_or_exit", "bound", "annealed"):
        with open(f"figures/{name}.csv") as file:
            rows = list(csv.DictReader(file))
        assert max(float(row["residual"]) for row in rows) <= 1e-9
    code, out, _ = run_script("tabular", "--mdp", "random", "--alpha", 10, "--anneal-to", 0.01, "--seed", 3)
    assert code == 0
    assert "random, seed 3" in out
    assert "NO" in run_script("tabular", "--mdp", "StayOrExit", "--max-iterations", 1)[1]


def test_a_reference_given_as_a_file_is_where_a_high_temperature_leads(run_script):
    q = np.full((1, 2), [0.25, 0.75])
    np.save("q.npy", q)
    code, out, _ = run_script("tabular", "--mdp", "Bandit", "--alpha", 1e9, "--reference", "q.npy")
    assert code == 0
    # J = 0.25 * 1 + 0.75 * 0.5, and the bound's log|A| becomes log 4
    assert [line.split("|")[5].strip() for line in out.splitlines()[2:]] == ["0.625", "0.625"]
    assert float(out.splitlines()[2].split("|")[8]) == pytest.approx(1e9 * np.log(4) / 0.01, rel=1e-3)


def test_a_reference_gives_no_weight_to_an_action_that_there_is_not(run_script):
    np.save("half.npy", np.full((3, 2), 0.5))
    code, _, err = run_script("tabular", "--mdp", "Bifurcation", "--reference", "half.npy")
    assert (code, err.count("\n")) == (2, 1)
    np.save("q.npy", np.array([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]))
    code, out, _ = run_script("tabular", "--mdp", "Bifurcation", "--alpha", 1e9, "--reference", "q.npy")
    assert code == 0
    # the choice at random, and half of the exits that there are: 0.5 * (1 - 0.99 * 0.5) + 0.5 * 0.7
    assert float(out.splitlines()[2].split("|")[5]) == pytest.approx(0.6025, abs=1e-4)


@pytest.mark.parametrize(("flags", "word"), [
    (["--alpha", 0], "--alpha 0"), (["--alpha", "inf"], "--alpha inf"), (["--gamma", 1], "--gamma 1"),
    (["--n-actions", 1], "--n-actions 1"), (["--anneal-to", -1], "--anneal-to -1"),
    (["--alphas", 1, 0], "--alphas (1.0, 0.0)"), (["--alphas", 1, "--anneal-to", 0.1], "--anneal-to 0.1"),
    (["--anneal-steps", 1], "--anneal-steps 1"), (["--tolerance", 0], "--tolerance 0"),
    (["--tolerance", "inf"], "--tolerance inf"), (["--reference", "empty.npy"], "--reference empty.npy"),
    (["--reference", "words.npy"], "--reference words.npy"), (["--gamma", 0], "--gamma 0"),
    (["--seed", -1], "--seed -1"),
    (["--reference", "none.npy"], "--reference none.npy"), (["--reference", "wrong.npy"], "--reference wrong.npy"),
    (["--max-iterations", 0], "--max-iterations 0"),
])  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(run_script, flags, word):
    np.save("wrong.npy", np.ones((3, 3)) / 3)
    np.save("words.npy", np.full((1, 2), "half"))
    Path("empty.npy").touch()
    code, out, err = run_script("tabular", "--mdp", "Bandit", "--out", "figures", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"tabular.py: {word}")
    assert not Path("figures").exists()


def test_a_row_that_sums_to_a_little_more_than_one_is_sampled():
    env = tabular.TabularEnv(tabular.random_mdp(1))
    env.reset(seed=1)
    beyond = np.argwhere(env.mdp.P.sum(2) > 1)
    assert len(beyond)
    for state, kind in beyond:
        env.state = state
        assert not env.step(list(env.kinds[state]).index(kind))[2]


def test_the_projection_is_boltzmanns_for_huge_values():
    log_pi = boltzmann(np.array([[1e6, 0.0, -1e6]]), np.log([[0.2, 0.3, 0.5]]), 1e-6)
    assert np.exp(log_pi[0]).tolist() == [1.0, 0.0, 0.0]
    assert np.isfinite(log_pi).all()


def test_the_entropy_in_the_reward_is_concave_and_not_separable():
    def entropy(mu):  # of Eq. 4, (..., states, actions)
        return -scipy.special.rel_entr(mu, mu.sum(-1, keepdims=True)).sum((-1, -2))

    rng = np.random.default_rng(0)
    a, b = rng.dirichlet(np.full(12, 0.3), (2, 5000)).reshape(2, 5000, 3, 4)
    middle, ends = entropy((a + b) / 2), (entropy(a) + entropy(b)) / 2
    assert (middle >= ends - 1e-12).all()
    assert (middle > ends + 1e-3).any()
    mu, step = np.full((3, 4), 1 / 12), 1e-3
    one, other = step * np.eye(12)[:2].reshape(2, 3, 4)
    mixed = entropy(mu + one + other) - entropy(mu + one) - entropy(mu + other) + entropy(mu)
    assert mixed / step**2 == pytest.approx(1 / mu[0].sum(), rel=0.05)  # 1 / mu_s, which a separable one has not


def test_klacs_fixed_point_need_not_be_the_only_one():
    """A step to a state whose right action, one of 11, pays 1 and leads back: acting at random there is worth so
    little that there is no reason to go or to act otherwise; once it is worth much, there is none to stop."""
    P, r, log_m = np.zeros((2, 2, 2)), np.zeros((2, 2)), np.zeros((2, 2))
    P[0, 1, 1] = P[1, 0, 0] = r[1, 0] = 1
    log_m[1, 1] = np.log(10)
    mdp = MDP("two fixed points", P, r, np.array([1.0, 0.0]), log_m, 0.99)
    for begin, expected in ((None, 0.157), (np.log([[1e-9, 1 - 1e-9], [1 - 1e-9, 1e-9]]), 49.749)):
        solution = kl_policy_iteration(mdp, 1.0, log_m, begin)
        assert solution.residual <= 1e-9
        assert solution.value[0] == pytest.approx(expected, abs=1e-3)
        pi = np.exp(solution.log_pi)  # by hand: w exp(Q / alpha) / Z with Q of the value that it has
        np.testing.assert_allclose(pi[0, 1], scipy.special.expit(0.99 * solution.value[1]), atol=1e-8)
        np.testing.assert_allclose(pi[1, 0], scipy.special.expit(1 + 0.99 * solution.value[0] - np.log(10)), atol=1e-8)
    assert soft_policy_iteration(mdp, 1.0, log_m).value[0] > 49


@pytest.mark.slow
@pytest.mark.parametrize(("env_id", "alpha"), [("StayOrExit-v0", 0.05), ("Bifurcation-v0", 0.1)])
@pytest.mark.parametrize(("name", "flags"), [("sac_discrete", []), ("klac_discrete", ["--no-bias"])])
def test_what_the_deep_scripts_learn_is_the_exact_solution(name, flags, env_id, alpha, run_script, scalars):
    flags = [*flags, "--env-id", f"tabular:{env_id}", "--no-autotune", "--alpha", alpha, "--run-name", "run"]
    flags += ["--total-timesteps", 40_000, "--learning-starts", 1000, "--target-network-frequency", 100]
    assert run_script(name, *flags)[0] == 0
    logged = scalars(Path("runs/run"))
    episodes = zip(logged["charts/episodic_return"], logged["charts/episodic_length"], strict=True)
    learned = np.mean([0.99 ** ((n - 1) * (env_id[0] == "S")) * r for (step, r), (_, n) in episodes if step > 36_000])
    mdp = gym.make(f"tabular:{env_id}").unwrapped.mdp
    exact = SOLVERS[name.split("_")[0].upper()](mdp, alpha, mdp.log_m).value[0]
    assert learned == pytest.approx(exact, abs=0.06)
