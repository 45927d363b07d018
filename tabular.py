"""The theory of SAC and KLAC on finite MDPs, exact, in one file.

Both algorithms project their critic onto a Boltzmann policy; they differ in what the critic evaluates (w is the
counting measure for a uniform reference, so that -KL(pi || w) is the entropy, and the reference q otherwise):

    policy       pi = w exp(Q / alpha) / Z                                                          Eq. 8
    SAC          Q = r + gamma P (E_pi[Q] - alpha KL(pi || w))    soft policy iteration, a contraction
    KLAC         Q = r + gamma P  E_pi[Q]                         the TRUE value of pi: a fixed point, found by damping

Identical actions are one action with a weight, in logarithms, so that 10^12 of them cost nothing and are exact.

Thresholds of the paper's Table 1 (an exit that pays R, and N actions that stay and pay nothing), in closed form. With
x the probability of the exit, the true return is J = x R / (1 - gamma (1 - x)), so that J = rho R takes the exit
probability x = rho (1 - gamma) / (1 - gamma rho), whose odds are rho (1 - gamma) / (1 - rho). Staying is worth gamma V
and the exit R, hence odds = exp((R - gamma V) / alpha) / N, and with V = J for KLAC and V = R - alpha log x for SAC

    KLAC   log N = (1 - gamma rho) R / alpha               - log(rho (1 - gamma) / (1 - rho))
    SAC    log N = (1 - gamma) R / alpha + gamma log x     - log(rho (1 - gamma) / (1 - rho))

At rho = 1/2 SAC's is within 0.04 of (1 - gamma) R / alpha for gamma = 0.99, and KLAC's some fifty times that.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.envs.toy_text.cliffwalking import CliffWalkingEnv
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv
from gymnasium.envs.toy_text.taxi import TaxiEnv  # Taxi-v3 where Gymnasium has v4: dry, they are the same

TOYS = ("StayOrExit", "Bandit", "Bifurcation", "random")
STYLES = {"SAC": ("#D55E00", "--"), "KLAC": ("#0072B2", "-")}  # colour and line of the figures
GYMNASIUM = {"Taxi-v3": TaxiEnv, "FrozenLake-v1": FrozenLakeEnv, "CliffWalking-v1": CliffWalkingEnv}


@dataclass
class Args:
    mdp: Literal["all", "StayOrExit", "Bandit", "Bifurcation", "random", "Taxi-v3", "FrozenLake-v1", "CliffWalking-v1"]
    """the finite MDP to solve"""
    alpha: float = 0.05
    """temperature, in units of the reward"""
    anneal_to: float | None = None
    """last temperature of an annealed path that starts at --alpha (default: it is fixed)"""
    anneal_steps: int = 50
    """temperatures on that path, each a constant factor below the one before"""
    alphas: tuple[float, ...] = ()
    """several temperatures, each solved on its own, in place of --alpha: a row each, and with --out their curve"""
    gamma: float = 0.99
    """discount factor"""
    n_actions: float = 1e6
    """identical actions: N of StayOrExit, K of Bifurcation"""
    reference: Path | None = None
    """reference policy: an .npy file, probabilities of shape (states, actions), above 0 (default: uniform)"""
    tolerance: float = 1e-9
    """largest residual of a solution that counts as converged"""
    max_iterations: int = 20_000
    """policy evaluations before giving up"""
    seed: int = 1
    """seed of the random MDP"""
    out: Path | None = None
    """draw the figures of the theory, or with --alphas the curves over them, into this folder, with their CSV"""


class UsageError(Exception):
    """A flag that cannot work; its text says which, its value and what would be valid."""


@dataclass
class MDP:
    """P: (S, A, S), to the states that do not end the episode, so that its rows may sum to less than 1; r: (S, A), the
    expected reward; start: (S,); log_m: (S, A), the log of how many identical actions each stands for (-inf: none)."""

    name: str
    P: np.ndarray
    r: np.ndarray
    start: np.ndarray
    log_m: np.ndarray
    gamma: float


@dataclass
class Solution:
    """log_pi: (S, A); value: (S,), the true one; soft_value: (S,), with the regulariser; residual: how far the policy
    is from its own Boltzmann policy, the largest difference of two probabilities."""

    log_pi: np.ndarray
    value: np.ndarray
    soft_value: np.ndarray
    iterations: int
    residual: float


def logsumexp(x: np.ndarray) -> np.ndarray:
    """log sum exp over the last axis, of which at least one entry must be finite: (..., A) to (...)."""
    highest = x.max(axis=-1, keepdims=True)
    return np.log(np.exp(x - highest).sum(axis=-1)) + highest[..., 0]


def boltzmann(q: np.ndarray, log_w: np.ndarray, alpha: float) -> np.ndarray:
    """log pi for pi = w exp(Q / alpha) / Z (Eq. 8): (S, A)."""
    logits = (q - q.max(axis=1, keepdims=True)) / alpha + log_w
    return logits - logsumexp(logits)[:, None]


def kl(log_pi: np.ndarray, log_w: np.ndarray) -> np.ndarray:
    """KL(pi || w) in nats, minus the entropy if w counts actions: (S,)."""
    with np.errstate(invalid="ignore"):
        terms = np.exp(log_pi) * (log_pi - log_w)
    return np.where(np.isneginf(log_pi), 0.0, terms).sum(axis=1)


def evaluate(mdp: MDP, log_pi: np.ndarray, penalty: np.ndarray | float = 0.0) -> np.ndarray:
    """V = sum_a pi r - penalty + gamma P_pi V, solved as a linear system: (S,)."""
    pi = np.exp(log_pi)
    transitions = np.einsum("sa,sat->st", pi, mdp.P)
    return np.linalg.solve(np.eye(len(mdp.r)) - mdp.gamma * transitions, (pi * mdp.r).sum(axis=1) - penalty)


def q_of(mdp: MDP, value: np.ndarray) -> np.ndarray:
    return mdp.r + mdp.gamma * mdp.P @ value


def policy_iteration(mdp: MDP) -> np.ndarray:
    """The values of the optimal policy, by Howard's policy iteration: (S,)."""
    legal = np.isfinite(mdp.log_m)
    best = np.where(legal, mdp.r, -np.inf).argmax(axis=1)
    while True:
        with np.errstate(divide="ignore"):
            value = evaluate(mdp, np.log(np.eye(mdp.r.shape[1])[best]))
        q = np.where(legal, q_of(mdp, value), -np.inf)
        better = q.max(axis=1) > q[np.arange(len(q)), best] + 1e-12 * (1 + abs(value))
        if not better.any():
            return value
        best = np.where(better, q.argmax(axis=1), best)


def soft_policy_iteration(mdp: MDP, alpha: float, log_w: np.ndarray, tolerance=1e-9, max_iterations=20_000) -> Solution:
    """SAC's exact form: evaluate with the regulariser in the reward, project, repeat. Its values never fall."""
    log_pi = boltzmann(np.zeros_like(mdp.r), log_w, alpha)
    iteration, residual = 0, np.inf
    while residual > tolerance and iteration < max_iterations:
        soft_value = evaluate(mdp, log_pi, alpha * kl(log_pi, log_w))
        projected = boltzmann(q_of(mdp, soft_value), log_w, alpha)
        residual = abs(np.exp(projected) - np.exp(log_pi)).max()
        log_pi, iteration = projected, iteration + 1
    soft_value = evaluate(mdp, log_pi, alpha * kl(log_pi, log_w))
    return Solution(log_pi, evaluate(mdp, log_pi), soft_value, iteration, residual)


def kl_policy_iteration(
    mdp: MDP, alpha: float, log_w: np.ndarray, log_pi=None, tolerance=1e-9, max_iterations=20_000
) -> Solution:
    """KLAC's fixed point, by damped steps in log pi towards the Boltzmann policy of the true value.

    The map is not a contraction: near the threshold of Table 1 its slope is -gamma R / (4 alpha). If a step overshoots,
    so that the next one would lead back, half of it is tried, unless it brought log pi much nearer to its
    projection; after any other the next may be twice as long, up to a limit that every overshoot lowers. `log_pi` is
    where to begin: the fixed point need not be the only one.
    """
    log_pi = boltzmann(np.zeros_like(mdp.r), log_w, alpha) if log_pi is None else log_pi

    def project(log_pi):
        projected = boltzmann(q_of(mdp, evaluate(mdp, log_pi)), log_w, alpha)
        with np.errstate(invalid="ignore"):  # an action that there is not: -inf - -inf
            step = np.where(np.isfinite(log_w), projected - log_pi, 0.0)
        # what is all but impossible in both may differ by any number of nats
        return projected, step, step * np.sqrt(np.exp(log_pi) + np.exp(projected))

    projected, step, weighted = project(log_pi)
    damping, largest, iteration = 1.0, 1.0, 1
    while (residual := abs(np.exp(projected) - np.exp(log_pi)).max()) > tolerance and iteration < max_iterations:
        moved = boltzmann(log_pi + damping * step, 0.0, 1.0)
        attempt = project(moved)
        iteration += 1
        if (attempt[2] * weighted).sum() >= 0 or abs(attempt[2]).max() < 0.7 * abs(weighted).max() or damping < 1e-9:
            log_pi, (projected, step, weighted), damping = moved, attempt, min(largest, 2 * damping)
        else:
            damping, largest = damping / 2, 0.95 * largest
    value = evaluate(mdp, log_pi)
    return Solution(log_pi, value, evaluate(mdp, log_pi, alpha * kl(log_pi, log_w)), iteration, residual)


def stay_or_exit(n: float, reward: float = 1.0, gamma: float = 0.99) -> MDP:
    """Table 1: N identical actions that stay and pay nothing, one that exits and pays `reward`, undiscounted, at once.
    (The table has N actions that stay, its caption N - 1, and the inequality below it log N: N here.)"""
    P, r = np.array([[[0.0], [1.0]]]), np.array([[reward, 0.0]])
    return MDP(f"StayOrExit, N = {n:g}", P, r, np.ones(1), np.array([[0.0, np.log(n)]]), gamma)


def bandit(rewards=(1.0, 0.5), gamma: float = 0.99) -> MDP:
    """One pull of an arm that always pays the same. Its soft-optimal policy is Boltzmann's, exp(r / alpha) / Z."""
    r = np.array([rewards])
    return MDP(f"Bandit, {len(rewards)} arms", np.zeros((*r.shape, 1)), r, np.ones(1), np.zeros_like(r), gamma)


def bifurcation(k: float, on: tuple[float, ...], rewards=(1.0, 0.7), cost: float = 1.0, gamma: float = 0.99) -> MDP:
    """The entropic bifurcation extension of a choice between groups of actions that pay `rewards` and end.

    Group a now leads to a state of its own with k actions: on[a] of them end the episode as before, with nothing more,
    and the others exit at a cost. No optimal policy exits, so that the optimal policy of the choice is what it was. All
    states have k actions, the choice k / groups of each."""
    n = len(rewards)
    P, r, log_m = np.zeros((1 + n, n, 1 + n)), np.zeros((1 + n, n)), np.full((1 + n, n), -np.inf)
    r[0], log_m[0] = rewards, np.log(k / n)
    P[0, np.arange(n), 1 + np.arange(n)] = 1
    r[1:, 1] = -cost
    with np.errstate(divide="ignore"):
        log_m[1:, 0], log_m[1:, 1] = np.log(on), np.log(k - np.array(on))
    return MDP(f"Bifurcation, K = {k:g}", P, r, np.eye(1 + n)[0], log_m, gamma)


def bifurcate(pi, alpha: float, k: float, rewards=(1.0, 0.7), cost: float = 1.0, gamma: float = 0.99) -> MDP:
    """The bifurcation whose soft-optimal policy chooses group a with probability pi[a], but for rounding to whole
    actions: its state's soft value, alpha log(on + (k - on) exp(-cost / alpha)), is (alpha log pi - r) / gamma + C.
    Raises ValueError if that takes more than k actions."""
    log_weight = (np.log(pi) - np.array(rewards) / alpha) / gamma
    floor = np.exp(-cost / alpha)
    lowest = np.log(1 + (k - 1) * floor)  # of one action that goes on
    on = (np.exp(log_weight - log_weight.min() + lowest) - k * floor) / (1 - floor)
    if on.max() > k:
        raise ValueError(f"this policy takes {on.max():.3g} actions a state, more than {k:g}")
    return bifurcation(k, tuple(np.round(on)), rewards, cost, gamma)


def random_mdp(seed: int, states: int = 8, actions: int = 4, gamma: float = 0.99) -> MDP:
    """Transitions from a flat Dirichlet distribution, standard normal rewards."""
    rng = np.random.default_rng(seed)
    P, r = rng.dirichlet(np.ones(states), (states, actions)), rng.normal(size=(states, actions))
    return MDP(f"random, seed {seed}", P, r, np.full(states, 1 / states), np.zeros_like(r), gamma)


def from_gymnasium(env_id: str, gamma: float = 0.99) -> MDP:
    """The transition table of a toy-text environment, without its time limit."""
    env = GYMNASIUM[env_id]()
    n, actions = env.observation_space.n, env.action_space.n
    P, r = np.zeros((n, actions, n)), np.zeros((n, actions))
    for s, table in env.P.items():
        for a, outcomes in table.items():
            for probability, following, reward, terminated in outcomes:
                r[s, a] += probability * reward
                P[s, a, following] += probability * (not terminated)
    return MDP(env_id, P, r, np.asarray(env.initial_state_distrib), np.zeros((n, actions)), gamma)


class TabularEnv(gym.Env):
    """A finite MDP whose states all have the same number of actions, as an environment; observations are one-hot."""

    def __init__(self, mdp: MDP, render_mode: str | None = None):
        counts = np.rint(np.exp(mdp.log_m)).astype(int)  # (S, A)
        self.mdp, self.render_mode = mdp, render_mode
        self.kinds = [np.repeat(np.arange(counts.shape[1]), row) for row in counts]  # of every action
        self.observation_space = gym.spaces.Box(0.0, 1.0, (len(counts),), np.float32)
        self.action_space = gym.spaces.Discrete(len(self.kinds[0]))

    def observe(self) -> np.ndarray:
        return np.eye(len(self.mdp.r), dtype=np.float32)[self.state]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.choice(len(self.mdp.r), p=self.mdp.start))
        return self.observe(), {}

    def step(self, action):
        kind = self.kinds[self.state][action]
        reward, row = self.mdp.r[self.state, kind], self.mdp.P[self.state, kind]
        following = int(self.np_random.choice(len(row) + 1, p=[*row, max(0.0, 1 - row.sum())]))
        terminated = following == len(row)
        self.state = self.state if terminated else following
        return self.observe(), float(reward), terminated, False, {}


class BifurcationBox(gym.Env):
    """The bifurcation with one continuous action in [-1, 1]: its left half pays 1 and leads to a state where all but
    those within 0.05 of 0 exit at a cost of 1, its right half pays 0.7 and leads to one where none does."""

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0.0, 1.0, (3,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return np.eye(3, dtype=np.float32)[0], {}

    def step(self, action):
        if self.state:
            exits = self.state == 1 and abs(action[0]) > 0.05
            return np.eye(3, dtype=np.float32)[self.state], -1.0 * exits, True, False, {}
        self.state = 1 if action[0] < 0 else 2
        return np.eye(3, dtype=np.float32)[self.state], 1.0 if self.state == 1 else 0.7, False, False, {}


STAY_OR_EXIT, BIFURCATION = stay_or_exit(100), bifurcation(100, (1, 100))  # what the environments are
gym.register("StayOrExit-v0", lambda **kwargs: TabularEnv(STAY_OR_EXIT, **kwargs), max_episode_steps=1000)
gym.register("Bifurcation-v0", lambda **kwargs: TabularEnv(BIFURCATION, **kwargs), max_episode_steps=1000)
gym.register("BifurcationBox-v0", BifurcationBox)


def threshold(algorithm: str, rho: float, alpha: float, reward: float = 1.0, gamma: float = 0.99) -> float:
    """The log N at which Table 1's true return is rho R, as derived at the top of this file."""
    x = rho * (1 - gamma) / (1 - gamma * rho)
    log_odds = np.log(rho * (1 - gamma) / (1 - rho))
    if algorithm == "SAC":
        return (1 - gamma) * reward / alpha + gamma * np.log(x) - log_odds
    return (1 - gamma * rho) * reward / alpha - log_odds


def solve(mdp: MDP, algorithm: str, alphas, log_w: np.ndarray, tolerance=1e-9, max_iterations=20_000) -> list[Solution]:
    """The solution at each temperature; KLAC's begins where the one before ended."""
    solutions = []
    for alpha in alphas:
        if algorithm == "SAC":
            solutions.append(soft_policy_iteration(mdp, alpha, log_w, tolerance, max_iterations))
        else:
            begin = solutions[-1].log_pi if solutions else None
            solutions.append(kl_policy_iteration(mdp, alpha, log_w, begin, tolerance, max_iterations))
    return solutions


def bound(mdp: MDP, alpha: float, log_w: np.ndarray) -> float:
    """The paper's bound on J* - J, alpha log|A| / (1 - gamma); with another reference, log|A| becomes max -log q."""
    log_q = log_w - logsumexp(log_w)[:, None]
    with np.errstate(invalid="ignore"):
        surprise = np.where(np.isfinite(mdp.log_m), mdp.log_m - log_q, 0.0)  # -log q of one action
    return alpha * surprise.max() / (1 - mdp.gamma)


def first_policy(mdp: MDP, solution: Solution) -> np.ndarray:
    """The probability of each kind of action in the state where every episode starts; empty if there are several."""
    return np.exp(solution.log_pi[mdp.start == 1].ravel())


def row(mdp: MDP, algorithm: str, alphas, path: list[Solution], log_w: np.ndarray, tolerance: float) -> dict:
    """What the last solution of the path is worth, and what the whole path took: all of it must have converged."""
    best, true = float(mdp.start @ policy_iteration(mdp)), float(mdp.start @ path[-1].value)
    residual = float(max(solution.residual for solution in path))
    policy = [f"{p:.4g}" for p in first_policy(mdp, path[-1])]
    return {
        "MDP": mdp.name,
        "algorithm": algorithm,
        "alpha": float(alphas[-1]),
        "J*": best,
        "J": true,
        "regularised J": float(mdp.start @ path[-1].soft_value),
        "J* - J": best - true,
        "bound": bound(mdp, float(alphas[-1]), log_w),
        "iterations": sum(solution.iterations for solution in path),
        "residual": residual,
        "converged": "yes" if residual <= tolerance else "NO",
        "policy at the start": ", ".join(policy),
    }


def text(rows: list[dict]) -> str:
    """The rows as a Markdown table, numbers to four digits."""
    cells = [list(rows[0]), ["-"] * len(rows[0])]
    cells += [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def pyplot():
    """Matplotlib, which only the figures need."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42})
    return plt


def finish(figure, path: Path, header: str, rows: list[tuple]) -> None:
    """Saves a figure as PNG and PDF, and its numbers as CSV, at the path with each suffix."""
    for suffix in ("png", "pdf"):
        metadata = {"CreationDate": None} if suffix == "pdf" else None
        figure.savefig(f"{path}.{suffix}", dpi=200, metadata=metadata)
    pyplot().close(figure)
    lines = [",".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in row) for row in rows]
    Path(f"{path}.csv").write_text("\n".join([header, *lines]) + "\n")


def draw_alphas(path: Path, mdp: MDP, alphas, solutions: dict[str, list[Solution]]) -> None:
    """True return over alpha and, where every episode starts in one state, the policy there: a line an action."""
    policies = {name: np.array([first_policy(mdp, x) for x in found]) for name, found in solutions.items()}
    actions = policies["SAC"].shape[1]
    columns = 2 if actions else 1
    figure, axes = pyplot().subplots(1, columns, figsize=(3.5 * columns, 2.6), squeeze=False, layout="constrained")
    best, rows = float(mdp.start @ policy_iteration(mdp)), []
    axes[0, 0].axhline(best, color="0.6", linewidth=0.8, linestyle=":", label="optimum")
    for algorithm in ("KLAC", "SAC"):  # dashed on top, where the two are one
        colour, line = STYLES[algorithm]
        returns = [float(mdp.start @ solution.value) for solution in solutions[algorithm]]
        axes[0, 0].semilogx(alphas, returns, color=colour, linestyle=line, label=algorithm)
        for action in range(actions):
            axes[0, 1].semilogx(alphas, policies[algorithm][:, action], color=colour, linestyle=line)
            axes[0, 1].text(alphas[0], policies[algorithm][0, action] + 0.02, f"action {action}", fontsize=6)
        rows += [
            (algorithm, float(alpha), value, solution.residual, *map(float, policy))
            for alpha, value, solution, policy in zip(
                alphas, returns, solutions[algorithm], policies[algorithm], strict=True
            )
        ]
    axes[0, 0].set(xlabel="alpha", ylabel="true return", title=mdp.name)
    axes[0, 0].legend(frameon=False)
    if actions:
        axes[0, 1].set(xlabel="alpha", ylabel="policy at the start", ylim=(-0.03, 1.1))
    header = ["algorithm", "alpha", "return", "residual", *[f"pi_{action}" for action in range(actions)]]
    finish(figure, path, ",".join(header), rows)


def draw(out: Path, gamma: float) -> None:
    """Return against N and alpha, the gap against the bound, and the annealed path: each as PNG, PDF and CSV."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True, layout="constrained")
    alpha, n, rows = 0.05, 1e6, []
    for algorithm, (colour, line) in STYLES.items():
        for axis, points in ((left, np.logspace(0, 12, 97)), (right, np.logspace(-6, 1, 113))):
            returns = []
            for x in points:
                mdp = stay_or_exit(x if axis is left else n, gamma=gamma)
                (solution,) = solve(mdp, algorithm, [alpha if axis is left else x], mdp.log_m)
                returns.append(solution.value[0])
                setting = (x, alpha) if axis is left else (n, x)
                rows.append((algorithm, *map(float, setting), float(solution.value[0]), solution.residual))
            axis.semilogx(points, returns, color=colour, linestyle=line, label=algorithm)
        x = np.exp(threshold(algorithm, 0.5, alpha, gamma=gamma))
        left.plot(x, 0.5, "o", color=colour)
        at = np.logspace(-6, 1, 20_001)
        at = at[abs(threshold(algorithm, 0.5, at, gamma=gamma) - np.log(n)).argmin()]
        right.plot(at, 0.5, "o", color=colour, label=f"{algorithm}, closed form")
    bounds = {r"$(1-\gamma)R/\alpha\gamma$": ((1 - gamma) / gamma, ":"), r"$R/\alpha$": (1.0, "-.")}
    for label, (log_n, line) in bounds.items():
        left.axvline(np.exp(log_n / alpha), color="0.6", linewidth=0.8, linestyle=line)
        right.axvline(log_n / np.log(n), color="0.6", linewidth=0.8, linestyle=line, label=f"log N = {label}")
    left.set(xlabel=f"N, actions that stay (alpha = {alpha:g} R)", ylabel="true return / R")
    right.set(xlabel=f"alpha / R (N = {n:g})")
    legend = {"loc": "outside lower center", "frameon": False}
    figure.legend(*right.get_legend_handles_labels(), **legend, ncols=3)
    finish(figure, out / "stay_or_exit", "algorithm,N,alpha,return,residual", rows)

    figure, axis = plt.subplots(figsize=(3.4, 2.8), layout="constrained")
    rows = []
    for algorithm, (colour, _) in STYLES.items():
        for seed in range(100):
            mdp = random_mdp(seed, gamma=gamma)
            alpha = float(10 ** np.random.default_rng(seed).uniform(-3, 2))
            (solution,) = solve(mdp, algorithm, [alpha], mdp.log_m)
            gap = mdp.start @ (policy_iteration(mdp) - solution.value)
            rows.append((algorithm, seed, alpha, float(gap), bound(mdp, alpha, mdp.log_m), solution.residual))
        mine = np.array([row[3:5] for row in rows if row[0] == algorithm])
        axis.loglog(mine[:, 1], np.maximum(mine[:, 0], 1e-6), "o+"[algorithm == "SAC"], color=colour, markersize=4,
                    label=algorithm, fillstyle="none")  # fmt: skip
    ends = np.array([min(row[4] for row in rows), max(row[4] for row in rows)])
    axis.plot(ends, ends, color="0.4", linewidth=0.8, label="the bound")
    axis.set(xlabel="alpha log|A| / (1 - gamma)", ylabel="J* - J (below 1e-6: at 1e-6)")
    figure.legend(**legend, ncols=3)
    finish(figure, out / "bound", "algorithm,seed,alpha,gap,bound,residual", rows)

    figure, axis = plt.subplots(figsize=(3.4, 2.6), layout="constrained")
    mdp, alphas, rows = stay_or_exit(1e12, gamma=gamma), np.logspace(1, -6, 71), []
    for algorithm, (colour, line) in STYLES.items():
        solutions = solve(mdp, algorithm, alphas, mdp.log_m)
        axis.semilogx(alphas, [s.value[0] for s in solutions], color=colour, linestyle=line, label=algorithm)
        rows += [(algorithm, float(a), float(s.value[0]), s.residual) for a, s in zip(alphas, solutions, strict=True)]
    axis.invert_xaxis()
    axis.set(xlabel="alpha / R, annealed from left to right (N = 1e12)", ylabel="true return / R")
    figure.legend(**legend, ncols=2)
    finish(figure, out / "annealed", "algorithm,alpha,return,residual", rows)


def make_mdp(name: str, args: Args) -> MDP:
    if name in GYMNASIUM:
        return from_gymnasium(name, args.gamma)
    if name == "StayOrExit":
        return stay_or_exit(args.n_actions, gamma=args.gamma)
    if name == "Bandit":
        return bandit(gamma=args.gamma)
    if name == "Bifurcation":
        return bifurcation(args.n_actions, (1, args.n_actions), gamma=args.gamma)
    return random_mdp(args.seed, gamma=args.gamma)


def main(args: Args) -> None:
    rules = {
        "alpha": (0 < args.alpha < np.inf, "positive and finite"),
        "anneal_to": (args.anneal_to is None or 0 < args.anneal_to < np.inf, "positive and finite"),
        "anneal_steps": (args.anneal_steps > 1, "at least 2"),
        "alphas": (all(0 < alpha < np.inf for alpha in args.alphas), "positive and finite"),
        "gamma": (0 <= args.gamma < 1, "in [0, 1)"),
        "n_actions": (2 <= args.n_actions < np.inf, "at least 2 and finite"),
        "tolerance": (0 < args.tolerance <= 1e-3, "in (0, 0.001]"),
        "max_iterations": (args.max_iterations > 0, "positive"),
        "seed": (args.seed >= 0, "at least 0"),
    }
    for name, (valid, expected) in rules.items():
        if not valid:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {expected}")
    if args.alphas and args.anneal_to is not None:
        raise UsageError(f"--anneal-to {args.anneal_to}: not with --alphas, which are solved one by one")
    if args.out is not None and args.gamma == 0:
        raise UsageError("--gamma 0: must be above 0 with --out, whose figures divide by it")
    paths = [[alpha] for alpha in args.alphas or (args.alpha,)]
    if args.anneal_to is not None:
        paths = [np.geomspace(args.alpha, args.anneal_to, args.anneal_steps)]
    rows, curves = [], []
    for name in (*TOYS, *GYMNASIUM) if args.mdp == "all" else (args.mdp,):
        mdp = make_mdp(name, args)
        log_w = mdp.log_m
        if args.reference is not None:
            try:
                q = np.load(args.reference).astype(float)
            except (OSError, ValueError, EOFError, AttributeError) as error:
                raise UsageError(f"--reference {args.reference}: must be an .npy file of numbers: {error}") from error
            exists = np.isfinite(mdp.log_m)
            if q.shape != exists.shape or not np.array_equal(q > 0, exists) or not np.allclose(q.sum(axis=1), 1):
                expected = (
                    f"probabilities of shape {exists.shape}, above 0 where there is an action, in rows that sum to 1"
                )
                raise UsageError(f"--reference {args.reference}: must hold {expected}, for {name}")
            with np.errstate(divide="ignore"):
                log_w = np.log(q)
        solutions = {}
        for algorithm in STYLES:
            for path in paths:
                found = solve(mdp, algorithm, path, log_w, args.tolerance, args.max_iterations)
                rows.append(row(mdp, algorithm, path, found, log_w, args.tolerance))
                solutions.setdefault(algorithm, []).append(found[-1])
        curves.append((name, mdp, solutions))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)  # fails now rather than after the table
    print(text(rows))
    if args.out is not None and args.alphas:
        for name, mdp, solutions in curves:
            draw_alphas(args.out / f"{name}_alphas", mdp, args.alphas, solutions)
    elif args.out is not None:
        draw(args.out, args.gamma)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (UsageError, OSError, ImportError) as error:  # ImportError: --out without Matplotlib
        print(f"tabular.py: {error}", file=sys.stderr)
        sys.exit(2)
