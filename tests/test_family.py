"""SAC and KLAC side by side: the blocks they share, what differs, and the paper's exact control."""

import ast
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import klac_continuous
import klac_discrete
import sac_continuous
import sac_discrete

ROOT = Path(__file__).parent.parent
PAIRS = [(sac_discrete, klac_discrete, "Walk-v0"), (sac_continuous, klac_continuous, "Drift-v0")]
IDS = ["discrete", "continuous"]
SHORT = {"learning_starts": 100, "target_network_frequency": 20, "log_interval": 1, "eval_episodes": 2}


def blocks(module):
    """The source of each top-level class, function and assignment of a script, by name."""
    source = Path(module.__file__).read_text()
    found = {}
    for node in ast.parse(source).body:
        name = getattr(node, "name", None) or (node.targets[0].id if isinstance(node, ast.Assign) else None)
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        found[name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    return found


def test_shared_blocks_are_identical():
    everywhere = {"UsageError", "Linear", "Batch", "ReplayBuffer", "temperature_loss", "start_logging"}
    everywhere |= {"cpu", "use_onednn", "check_finite", "save", "load", "find_run", "stop_signals", "stop"}
    of_a_kind = everywhere | {"make_env", "preprocess", "make_network", "critic_loss", "evaluate", "evaluate_run"}
    for sac, klac, _ in PAIRS:
        own = {"discrete": {"MinAtarFixes"}, "continuous": {"Actor", "q_values", "box_log_volume"}}
        shared = of_a_kind | own[Path(klac.__file__).stem.removeprefix("klac_")]
        for name in shared:
            assert blocks(sac)[name] == blocks(klac)[name], name
        # and nothing else is in SAC's script but what differs by the algorithm
        assert blocks(sac).keys() - shared - {None} == {"Args", "check_args", "td_target", "actor_loss", "train"}
    for name in everywhere:
        assert len({blocks(module)[name] for pair in PAIRS for module in pair[:2]}) == 1, name


@pytest.mark.parametrize("kind", IDS)
def test_the_diff_between_siblings_is_small_and_the_readme_tells_its_size(kind):
    names = f"sac_{kind}.py", f"klac_{kind}.py"
    diff = subprocess.run(["diff", *names], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    changed = sum(line[0] in "<>" for line in diff.splitlines())
    print(f"diff {names[0]} {names[1]}: {changed} changed lines")
    assert changed < 120
    assert f"`diff {names[0]} {names[1]}`: {changed} changed lines" in (ROOT / "README.md").read_text()


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
    obs = torch.randn(16, 3)
    ends = (torch.rand(16) < 0.5).float()
    if hasattr(module, "Actor"):
        box = module.make_env(env_id).action_space
        actor = module.Actor(3, box)
        critics = torch.nn.ModuleList([module.make_network(4, 1), module.make_network(4, 1)])
        actions = torch.rand(16, 1) * 4 - 1
    else:
        actor = module.make_network((3,), 3)
        critics = torch.nn.ModuleList([module.make_network((3,), 3), module.make_network((3,), 3)])
        actions = torch.randint(3, (16,))
    return module.Batch(obs, actions, torch.randn(16), torch.randn(16, 3), ends), actor, critics


@pytest.mark.parametrize(("sac", "klac", "env_id"), PAIRS, ids=IDS)
def test_targets_differ_by_the_entropy_term_and_nothing_else(sac, klac, env_id):
    batch, actor, critics = parts(klac, env_id)
    alpha = torch.tensor(0.3)
    with torch.no_grad():
        torch.manual_seed(1)
        y_sac = sac.td_target(batch, actor, critics, 0.9, alpha)
        torch.manual_seed(1)
        y_ab = klac.td_target(batch, actor, critics, 0.9, 0.0)
        torch.manual_seed(1)
        if hasattr(klac, "Actor"):
            entropy = -actor.sample(batch.next_obs)[1]
        else:
            log_pi = torch.log_softmax(actor(batch.next_obs), 1)
            entropy = -(log_pi.exp() * log_pi).sum(1)
        assert entropy.abs().min() > 0.01
        torch.testing.assert_close(y_sac - y_ab, 0.9 * (1 - batch.terminations) * 0.3 * entropy)
        torch.manual_seed(1)
        assert torch.equal(sac.td_target(batch, actor, critics, 0.9, torch.tensor(0.0)), y_ab)
        torch.manual_seed(1)
        y_klac = klac.td_target(batch, actor, critics, 0.9, 0.25)
    torch.testing.assert_close(y_klac - y_ab, torch.full((16,), 0.25))


@pytest.mark.parametrize("frequency", [None, 1])
@pytest.mark.parametrize(("sac", "klac", "env_id"), PAIRS, ids=IDS)
def test_with_alpha_at_zero_in_the_critic_sac_is_klac_ab_to_the_bit(scalars, monkeypatch, sac, klac, env_id, frequency):
    """Same seed, weights, draws, actor and temperature losses: without its entropy term SAC's run IS KLAC-ab's."""
    real, alphas, flags = sac.td_target, [], SHORT | {"env_id": env_id, "total_timesteps": 400}
    if frequency:  # the actor's first update is then the first update of the run
        flags |= {"policy_frequency" if sac is sac_continuous else "update_frequency": frequency}
    run_ab = klac.train(klac.Args(bias=False, anneal=False, **flags))
    run_sac = sac.train(sac.Args(**flags))
    monkeypatch.setattr(sac, "td_target", lambda *a: alphas.append(a[-1]) or real(*a[:-1], torch.tensor(0.0)))
    run_zero = sac.train(sac.Args(**flags))

    def logged(run_dir):
        return {tag: values for tag, values in scalars(run_dir).items() if tag != "charts/SPS"}

    def actor(run_dir):
        return torch.load(run_dir / "actor.pt", weights_only=True)["actor"]

    assert logged(run_zero) == logged(run_ab)
    assert all(torch.equal(actor(run_zero)[name], parameter) for name, parameter in actor(run_ab).items())
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
    runs = [sac.train(sac.Args(env_id=env_id, total_timesteps=200, **SHORT))]
    for bias in (True, False):
        args = klac.Args(env_id=env_id, total_timesteps=200, anneal=False, bias=bias, **SHORT)
        runs.append(klac.train(args))
    for run_dir in runs:
        np.testing.assert_allclose([v for _, v in scalars(run_dir)["policy/target_entropy"]], heuristic, rtol=1e-6)


def test_sac_stays_for_ever_where_klac_exits(scalars):
    """Table 1 in miniature: ten actions, one of which exits with reward 1. At alpha 0.1 staying is worth
    alpha log 9 gamma / (1 - gamma), about 4.2, to SAC's critic; no policy can earn more than 1."""
    common = {"env_id": "StayOrExitOf10-v0", "total_timesteps": 8_000, "gamma": 0.95, "autotune": False, "alpha": 0.1}
    common |= {"learning_starts": 500, "target_network_frequency": 50, "policy_lr": 1e-3, "q_lr": 1e-3}
    common |= {"log_interval": 100, "eval_episodes": 1}
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
