"""SAC and KLAC side by side: the blocks they share, what differs, and the paper's exact control."""

import ast
import functools
import json
import math
import re
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import klac_continuous
import klac_discrete
import sac_adaent_continuous
import sac_continuous
import sac_discrete
import sac_v_continuous

ROOT = Path(__file__).parent.parent
PAIRS = [(sac_discrete, klac_discrete, "Walk-v0"), (sac_continuous, klac_continuous, "Drift-v0")]
IDS = ["discrete", "continuous"]
SCRIPTS = [module for pair in PAIRS for module in pair[:2]] + [sac_adaent_continuous, sac_v_continuous]
CPU = torch.device("cpu")
SHORT = {"learning_starts": 100, "target_network_frequency": 20, "log_interval": 1, "eval_episodes": 2}
SHORT |= {"batch_size": 16, "compile": False}


@functools.cache
def blocks(module):
    """The source of each top-level class, function and assignment of a script, by name."""
    source = Path(module.__file__).read_text()
    found = {}
    for node in ast.parse(source).body:
        name = getattr(node, "name", None) or (node.targets[0].id if isinstance(node, ast.Assign) else None)
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        found[name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    return found


def halves(module):
    """What is above the heading that ends the algorithm, and what is from it on."""
    source = Path(module.__file__).read_text()
    rule = f"# {'-' * 118}\n"
    assert source.count(f"{rule}# The algorithm ends here.") == 1
    head, heading, tail = source.partition(f"{rule}# The algorithm ends here.")
    return head, heading + tail


def test_what_follows_the_algorithm_is_the_same_word_for_word_in_every_script():
    tails = {halves(module)[1] for module in SCRIPTS}
    assert len(tails) == 1
    assert len(tails.pop().splitlines()) > 300


@pytest.mark.parametrize("module", [*SCRIPTS[:4], sac_v_continuous], ids=lambda module: module.__name__)
def test_the_algorithm_is_at_most_400_lines(module):
    """From the docstring, which the inline metadata precede, to the end of train."""
    lines = len(halves(module)[0].partition("\n# ///\n")[2].rstrip().splitlines())
    print(f"{module.__name__}.py: {lines} lines")
    assert 300 < lines <= 400


def test_shared_blocks_are_identical():
    everywhere = {"Batch", "descend"}
    of_a_kind = everywhere | {"make_env", "parameter", "Networks", "make_networks", "act", "ReplayBuffer"}
    of_a_kind |= {"critic_loss", "critic_gradients"}
    of_the_tail = {name for name, block in blocks(sac_discrete).items() if name and block in halves(sac_discrete)[1]}
    assert {"UsageError", "check_flags", "Checked", "Run", "save", "load", "evaluate", "main"} < of_the_tail
    for sac, klac, _ in PAIRS:
        own = {
            "discrete": {"MinAtarFixes", "preprocess"},
            "continuous": {"Actor", "gaussian", "log_volume", "entropy_range", "exploit_probability"},
        }
        shared = of_a_kind | of_the_tail | own[Path(klac.__file__).stem.removeprefix("klac_")]
        for name in shared:
            assert blocks(sac)[name] == blocks(klac)[name], name
        # and nothing else is in SAC's script but what differs by the algorithm, nor in KLAC's but its own
        by_algorithm = {"Args", "td_target", "actor_loss", "actor_gradients", "train"}
        assert blocks(sac).keys() - shared - {None} == by_algorithm
        assert blocks(klac).keys() - shared - {None} == by_algorithm | {"exploit_entropy", "make_log_q"}
    for name in everywhere | of_the_tail:
        assert len({blocks(module)[name] for module in SCRIPTS}) == 1, name


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_the_script_s_own_metadata_are_the_project_s(module):
    """The block of PEP 723, by which `uv run` or pipx installs what a script needs."""
    source = Path(module.__file__).read_text()
    (block,) = re.findall(r"(?m)^# /// script$\n((?:^#(?:| .*)$\n)+?)^# ///$", source)
    metadata = tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata.keys() == {"requires-python", "dependencies"}
    assert metadata["requires-python"] == project["requires-python"]
    assert set(metadata["dependencies"]) == set(project["dependencies"])
    assert len(metadata["dependencies"]) == len(project["dependencies"]) > 5


@pytest.mark.parametrize("kind", IDS)
def test_the_diff_between_siblings_is_small_and_the_readme_does_not_understate_it(kind):
    names = f"sac_{kind}.py", f"klac_{kind}.py"
    diff = subprocess.run(["diff", *names], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    changed = sum(line[0] in "<>" for line in diff.splitlines())
    print(f"diff {names[0]} {names[1]}: {changed} changed lines")
    assert 50 < changed < 125
    claim = rf"`diff {names[0]} {names[1]}`: (?:at most )?(\d+) changed lines"
    (stated,) = re.findall(claim, (ROOT / "README.md").read_text())
    assert int(stated) >= changed


@pytest.mark.parametrize(("sac", "klac", "env_id"), PAIRS, ids=IDS)
def test_names_and_defaults_are_the_same_in_both(sac, klac, env_id):
    ours, theirs = (vars(module.Args()) for module in (klac, sac))
    extra = {"bias", "beta", "anneal", "p_start", "p_end", "anneal_timesteps", "reference"}
    assert ours.keys() - theirs.keys() == extra
    assert {k: v for k, v in ours.items() if k in theirs and k != "exp_name"} == {
        k: v for k, v in theirs.items() if k != "exp_name"
    }


def parts(module, env_id, seed=0):
    """(batch, actor, critics) of freshly made networks, the same for both siblings."""
    torch.manual_seed(seed)
    args = module.Args(env_id=env_id)
    env = module.make_env(args)
    obs, next_obs = (torch.randn(16, *env.observation_space.shape) for _ in range(2))
    rewards, ends = torch.randn(16), (torch.rand(16) < 0.5).float()
    if hasattr(module, "Actor"):
        box = env.action_space
        low, high = torch.tensor(box.low), torch.tensor(box.high)
        actions = low + torch.rand(16, *box.shape) * (high - low)
    else:
        obs, next_obs = module.preprocess(obs), module.preprocess(next_obs)
        actions = torch.randint(int(env.action_space.n), (16,))
    return module.Batch(obs, actions, rewards, next_obs, ends), *module.make_networks(args, env)


@pytest.mark.parametrize(("sac", "klac", "env_id"), PAIRS, ids=IDS)
def test_targets_differ_by_the_entropy_term_and_nothing_else(sac, klac, env_id):
    batch, actor, critics = parts(klac, env_id)
    alpha = torch.tensor(0.3)
    if hasattr(klac, "Actor"):
        noise = torch.randn_like(batch.actions)
        mean, log_std = actor(batch.next_obs)
        entropy = -actor.log_prob(mean, log_std, mean + log_std.exp() * noise)
        networks = noise, actor, critics
    else:
        log_pi = torch.log_softmax(actor(batch.next_obs)[0], 1)
        entropy = -(log_pi.exp() * log_pi).sum(1)
        networks = actor, critics
    assert entropy.abs().min() > 0.01
    y_sac = sac.td_target(batch, *networks, 0.9, alpha)
    y_ab = klac.td_target(batch, *networks, 0.9, 0.0)
    torch.testing.assert_close(y_sac - y_ab, 0.9 * (1 - batch.terminations) * 0.3 * entropy)
    assert torch.equal(sac.td_target(batch, *networks, 0.9, torch.tensor(0.0)), y_ab)
    torch.testing.assert_close(klac.td_target(batch, *networks, 0.9, 0.25) - y_ab, torch.full((16,), 0.25))


def updates(module, batch, actor, critics, reference=None):
    """The functions of the module that its updates consist of, each with arguments as train() gives them."""
    env_id = "Drift-v0" if hasattr(module, "Actor") else "Catch-v0"
    args = module.Args(env_id=env_id)
    env = module.make_env(args)
    alpha, beta, targets = torch.tensor(0.3), 0.25, parts(module, env_id, seed=5)[2]
    bonus = beta if hasattr(module, "make_log_q") else alpha
    q = ()
    if hasattr(module, "make_log_q"):
        args.reference = reference
        q = (module.make_log_q(args, env, CPU),)
    if not hasattr(module, "Actor"):
        yield module.critic_gradients, (batch, critics, actor, targets, 0.9, bonus)
        yield module.actor_gradients, (batch, actor, critics, *q, alpha)
        return
    noise, log_vol = torch.randn_like(batch.actions), module.log_volume(env.action_space)
    of_target = noise, actor, targets, 0.9, bonus
    if module is sac_v_continuous:
        value, target_value = (module.Networks(1, *env.observation_space.shape, 1) for _ in range(2))
        yield module.value_gradients, (batch, value, noise, actor, critics, alpha)
        of_target = target_value, 0.9, 5.0
    yield module.critic_gradients, (batch, critics, *of_target)
    chosen = ()
    if module is sac_adaent_continuous:
        samples = torch.randn(16, 8, 1)
        yield module.similarity, (batch, samples, actor, targets, True)
        chosen = module.similarity(batch, samples, actor, targets, True)[0] <= 0.5, False
    yield module.actor_gradients, (batch, noise, actor, critics, *chosen, *(q or (log_vol,)), alpha)


slow = pytest.mark.slow


@pytest.mark.parametrize(("module", "with_reference"), [
    (klac_discrete, False),
    pytest.param(klac_discrete, True, marks=slow),
    pytest.param(klac_continuous, False, marks=slow),
    pytest.param(klac_continuous, True, marks=slow),
    *[pytest.param(module, False, marks=slow) for module in (sac_discrete, sac_continuous, sac_adaent_continuous)],
    pytest.param(sac_v_continuous, False, marks=slow),
])  # fmt: skip
def test_compiled_updates_are_the_eager_ones(module, with_reference):
    env_id, reference = "Drift-v0" if hasattr(module, "Actor") else "Catch-v0", None
    batch, actor, critics = parts(module, env_id)
    if with_reference:
        reference = "q.pt"
        torch.save({"args": {"env_id": env_id}, "actor": parts(module, env_id, seed=9)[1].state_dict()}, reference)
    eager = list(updates(module, batch, actor, critics, reference))
    run = SimpleNamespace(args=SimpleNamespace(compile=True), device=CPU)
    compiled = module.Run.compile(run, *[function for function, _ in eager])
    names = dict(actor.named_parameters()).keys()

    def compare():
        for (function, arguments), graph in zip(eager, compiled, strict=True):
            expected = function(*arguments)
            if function is not getattr(module, "similarity", None):
                assert expected[0].keys() == names
                assert all((gradient != 0).any() for gradient in expected[0].values())
            for ours, theirs in zip(leaves(graph(*arguments)), leaves(expected), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())

    counters.clear()
    compare()
    assert counters["stats"]["unique_graphs"] == len(eager)  # each is one graph
    with torch.compiler.set_stance("fail_on_recompile"):  # another batch and other weights run the same graph
        for parameter in (*actor.parameters(), *critics.parameters()):
            parameter += 0.05 * torch.randn_like(parameter)
        for column, other in zip(batch, parts(module, env_id, seed=3)[0], strict=True):
            column.copy_(other)
        compare()


def leaves(tree):
    """The tensors of nested dictionaries and tuples, in order; all must be tensors."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for branch in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(branch)]


@pytest.mark.parametrize("frequency", [None, 1])
@pytest.mark.parametrize(("sac", "klac", "env_id"), PAIRS, ids=IDS)
def test_with_alpha_at_zero_in_the_critic_sac_is_klac_ab_to_the_bit(scalars, monkeypatch, sac, klac, env_id, frequency):
    """Same seed, weights, draws, actor and temperature losses: without its entropy term SAC's run IS KLAC-ab's."""
    real, alphas, flags = sac.td_target, [], SHORT | {"env_id": env_id, "total_timesteps": 220}
    if frequency:  # the actor's first update is then the first update of the run
        flags |= {"policy_frequency" if sac is sac_continuous else "update_frequency": frequency}
    run_ab = klac.train(klac.Args(bias=False, anneal=False, **flags))
    run_sac = sac.train(sac.Args(**flags))
    monkeypatch.setattr(sac, "td_target", lambda *a: alphas.append(a[-1]) or real(*a[:-1], torch.tensor(0.0)))
    run_zero = sac.train(sac.Args(**flags))

    def logged(run_dir):
        clocks = "charts/SPS", "charts/hours"
        return {tag: values for tag, values in scalars(run_dir).items() if tag not in clocks}

    def weights(run_dir):
        saved = torch.load(run_dir / "actor.pt", weights_only=True)
        return {(part, name): p for part in ("actor", "critics") for name, p in saved[part].items()}

    of_zero, of_ab = logged(run_zero), logged(run_ab)
    if sac is sac_continuous:  # KLAC's loss has alpha log vol beside SAC's, a constant
        losses = [log.pop("losses/actor_loss")[0][1] for log in (of_ab, of_zero)]
        assert losses[0] - losses[1] == pytest.approx(math.log(4), rel=2e-3)  # alpha is 1, or has made a step
    assert of_zero == of_ab
    assert weights(run_zero).keys() == weights(run_ab).keys()
    assert all(torch.equal(weights(run_zero)[name], parameter) for name, parameter in weights(run_ab).items())
    # with it they part, but only where the critic first learns: the first temperature loss is still the same
    assert logged(run_sac) != logged(run_ab)
    if frequency or sac is sac_discrete:
        assert logged(run_sac)["losses/alpha_loss"][0] == logged(run_ab)["losses/alpha_loss"][0]
        assert float(alphas[-1]) == pytest.approx(logged(run_zero)["losses/alpha"][-2][1])
    assert float(alphas[0]) == 1.0  # the alpha that the temperature step of train() hands to the critic


@pytest.mark.parametrize(("sac", "klac", "env_id"), PAIRS, ids=IDS)
@pytest.mark.parametrize(("flags", "label"), [
    ({}, "KLAC"),
    ({"anneal": False}, "KLAC-a"),
    ({"bias": False}, "KLAC-b"),
    ({"anneal": False, "bias": False}, "KLAC-ab"),
])  # fmt: skip
def test_variants_and_their_labels(monkeypatch, sac, klac, env_id, flags, label):
    betas, real = [], klac.td_target
    monkeypatch.setattr(klac, "td_target", lambda *a: betas.append(a[-1]) or real(*a))
    run_dir = klac.train(klac.Args(env_id=env_id, total_timesteps=110, beta=0.7, **SHORT, **flags))
    assert json.loads((run_dir / "args.json").read_text())["algorithm"] == label
    assert set(betas) == {0.7 if flags.get("bias", True) else 0.0}


@pytest.mark.parametrize(("sac", "klac", "env_id"), PAIRS, ids=IDS)
def test_klac_a_and_ab_use_sac_s_heuristic_target(scalars, sac, klac, env_id):
    heuristic = 0.89 * math.log(3) if env_id == "Walk-v0" else -1.0
    runs = [sac.train(sac.Args(env_id=env_id, total_timesteps=130, **SHORT))]
    for bias in (True, False):
        args = klac.Args(env_id=env_id, total_timesteps=130, anneal=False, bias=bias, **SHORT)
        runs.append(klac.train(args))
    for run_dir in runs:
        np.testing.assert_allclose([v for _, v in scalars(run_dir)["policy/target_entropy"]], heuristic, rtol=1e-6)


@pytest.mark.slow
def test_sac_stays_for_ever_where_klac_exits(scalars):
    """Table 1 in miniature: ten actions, one of which exits with reward 1. At alpha 0.1 staying is worth
    alpha log 9 gamma / (1 - gamma), about 4.2, to SAC's critic; no policy can earn more than 1."""
    common = {"env_id": "StayOrExitOf10-v0", "total_timesteps": 8_000, "gamma": 0.95, "autotune": False, "alpha": 0.1}
    common |= {"learning_starts": 500, "target_network_frequency": 50, "policy_lr": 1e-3, "q_lr": 1e-3}
    common |= {"log_interval": 100, "eval_episodes": 1, "compile": False}
    logged = {}
    for module, extra in ((sac_discrete, {}), (klac_discrete, {"bias": False})):
        run_dir = module.train(module.Args(**common, **extra))
        logged[module] = {tag: np.array(values).T for tag, values in scalars(run_dir).items()}

    steps, lengths = logged[sac_discrete]["charts/episodic_length"]
    assert (lengths[steps > 4_000] == 200).mean() > 0.9  # only the clock ends an episode
    assert logged[sac_discrete]["losses/qf1_values"][1][-10:].mean() > 3
    steps, lengths = logged[klac_discrete]["charts/episodic_length"]
    assert lengths[steps > 4_000].mean() < 20
    assert logged[klac_discrete]["charts/episodic_return"][1][steps > 4_000].min() == 1
    assert logged[klac_discrete]["losses/qf1_values"][1][-10:].max() < 1.1
