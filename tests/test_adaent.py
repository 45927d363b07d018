"""SAC-AdaEnt: its targets and losses against its siblings' and by hand, and where it is one of them."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import klac_continuous
import sac_adaent_continuous as adaent
import sac_continuous
from tests.test_family import blocks, parts

FLAGS = {"env_id": "Drift-v0", "total_timesteps": 400, "learning_starts": 100, "log_interval": 20, "eval_episodes": 1}


def test_it_is_a_sibling():
    own, sibling = blocks(adaent), blocks(sac_continuous)
    different = {"Args", "check_args", "td_target", "td_targets", "similarity", "actor_loss", "train", None}
    assert own.keys() ^ sibling.keys() == {"td_target", "td_targets", "similarity"}
    for name in own.keys() - different:
        assert own[name] == sibling[name], name
    ours, theirs = vars(adaent.Args()), vars(sac_continuous.Args())
    assert ours.keys() - theirs.keys() == {
        "similarity_threshold", "similarity_samples", "similarity_centred", "actor_critic"
    }  # fmt: skip
    assert all(ours[name] == value for name, value in theirs.items() if name != "exp_name")


@pytest.fixture
def made():
    """(batch, actor, critics, plain critics) of fresh networks."""
    batch, actor, critics = parts(adaent, "Drift-v0")
    _, _, plain_critics = parts(adaent, "Drift-v0", seed=1)
    return batch, actor, critics, plain_critics


def test_the_targets_are_sacs_and_klac_abs(made):
    batch, actor, critics, plain_critics = made
    alpha = torch.tensor(0.3)
    with torch.no_grad():
        torch.manual_seed(2)
        y, plain_y = adaent.td_targets(batch, actor, critics, plain_critics, 0.9, alpha)
        torch.manual_seed(2)
        assert torch.equal(y, sac_continuous.td_target(batch, actor, critics, 0.9, alpha))
        torch.manual_seed(2)
        assert torch.equal(plain_y, klac_continuous.td_target(batch, actor, plain_critics, 0.9, 0.0))


@pytest.mark.parametrize("centred", [True, False])
def test_the_similarity_is_the_cosine_over_sampled_actions(made, centred):
    batch, actor, critics, plain_critics = made
    with torch.no_grad():
        torch.manual_seed(2)
        result, by_chance = adaent.similarity(batch, actor, critics, plain_critics, 5, centred)
        torch.manual_seed(2)
        actions = actor.sample(batch.obs.repeat_interleave(5, 0))[0].view(16, 5, 1)
        for i in range(16):
            q, p, twins = np.zeros(5), np.zeros(5), np.zeros((2, 5))
            for j in range(5):
                x = torch.cat([batch.obs[i], actions[i, j]])[None]
                q[j] = min(critic(x).item() for critic in critics)
                p[j] = min(critic(x).item() for critic in plain_critics)
                twins[:, j] = [critic(x).item() for critic in critics]
            for found, (x, y) in ((result, (q, p)), (by_chance, twins)):
                if centred:
                    assert found[i].item() == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-3)
                else:
                    assert found[i].item() == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-5)
        same, _ = adaent.similarity(batch, actor, critics, critics, 5, centred)
        torch.testing.assert_close(same, torch.ones(16), atol=1e-3, rtol=0)


def test_the_actor_climbs_the_plain_critic_where_it_is_told_to(made):
    batch, actor, critics, plain_critics = made
    alpha, nowhere = torch.tensor(0.3), torch.zeros(16, dtype=torch.bool)

    def loss(mask, first=False):
        torch.manual_seed(2)
        return adaent.actor_loss(batch, actor, critics, plain_critics, mask, first, alpha)

    torch.manual_seed(2)
    expected, log_pi = sac_continuous.actor_loss(batch, actor, critics, alpha)
    assert torch.equal(loss(nowhere)[0], expected)
    assert torch.equal(loss(nowhere)[1], log_pi)
    torch.manual_seed(2)
    plain, _ = sac_continuous.actor_loss(batch, actor, plain_critics, alpha)  # KLAC's loss is the same with uniform q
    assert torch.equal(loss(~nowhere)[0], plain)

    half = torch.arange(16) < 8
    with torch.no_grad():
        torch.manual_seed(2)
        action, log_pi, _ = actor.sample(batch.obs)
        for first in (False, True):
            total = 0.0
            for i in range(16):
                x = torch.cat([batch.obs[i], action[i]])[None]
                values = [critic(x).item() for critic in (plain_critics if i < 8 else critics)]
                total += 0.3 * log_pi[i].item() - (values[0] if first else min(values))
            assert loss(half, first)[0].item() == pytest.approx(total / 16, abs=1e-5)


@pytest.mark.parametrize(("threshold", "share"), [(-1.1, 0.0), (1.1, 1.0)])
def test_beyond_its_range_the_threshold_makes_it_one_of_its_siblings(scalars, monkeypatch, threshold, share):
    followed, real = [], adaent.actor_loss
    monkeypatch.setattr(adaent, "actor_loss", lambda *a: followed.append(a[4].float().mean().item()) or real(*a))
    logged = scalars(adaent.train(adaent.Args(similarity_threshold=threshold, **FLAGS)))
    assert set(followed) == {share}
    assert {value for _, value in logged["adaent/plain_share"]} == {share}
    assert all(-1.001 <= value <= 1.001 for _, value in logged["adaent/similarity"])


def test_it_logs_what_sac_logs_and_its_own_and_some_states_switch(scalars):
    sac = scalars(sac_continuous.train(sac_continuous.Args(**FLAGS)))
    logged = scalars(adaent.train(adaent.Args(similarity_threshold=0.9, **FLAGS)))
    own = {"losses/plain_qf1_loss", "losses/plain_qf1_values"}
    own |= {"adaent/similarity", "adaent/twin_similarity", "adaent/plain_share"}
    assert logged.keys() - sac.keys() == own
    assert sac.keys() <= logged.keys()
    assert len({value for _, value in logged["adaent/plain_share"]}) > 1


def test_the_plain_critic_learns_the_return_and_the_soft_one_the_entropy_beside_it(scalars, monkeypatch):
    """Without rewards the true value is 0, and the soft one, of an entropy that is worth much, is far from it."""
    real = adaent.make_env
    monkeypatch.setattr(adaent, "make_env", lambda *a: gym.wrappers.TransformReward(real(*a), lambda reward: 0.0))
    flags = FLAGS | {"total_timesteps": 900, "tau": 0.05, "gamma": 0.9}
    logged = scalars(adaent.train(adaent.Args(autotune=False, alpha=1.0, **flags)))
    assert abs(logged["losses/plain_qf1_values"][-1][1]) < 0.1
    assert logged["losses/qf1_values"][-1][1] > 1
    assert logged["losses/plain_qf1_loss"][-1][1] < logged["losses/plain_qf1_loss"][0][1]


def test_the_plain_targets_follow_the_plain_critics(monkeypatch):
    seen, real = [], adaent.td_targets

    def watch(batch, actor, target_critics, target_plain_critics, *rest):
        seen.append([parameter.clone() for parameter in target_plain_critics.parameters()])
        return real(batch, actor, target_critics, target_plain_critics, *rest)

    monkeypatch.setattr(adaent, "td_targets", watch)
    run_dir = adaent.train(adaent.Args(**FLAGS | {"tau": 1.0}))
    saved = torch.load(run_dir / "actor.pt", weights_only=True)["plain_critics"].values()
    assert not any(torch.equal(before, after) for before, after in zip(seen[1], seen[-1], strict=True))
    # with tau 1 they are copies: the last that was used is one update behind the last that was learnt
    assert max((a - b).abs().max() for a, b in zip(seen[-1], saved, strict=True)) < 0.01


def test_critics_that_do_not_vary_have_nothing_to_disagree_on(made):
    batch, actor, critics, plain_critics = made
    for critic in plain_critics:  # 0.3 has a mean over 8 of it that rounding moves
        torch.nn.init.zeros_(critic[-1].weight)
        torch.nn.init.constant_(critic[-1].bias, 0.3)
    for samples in (5, 8):
        result, by_chance = adaent.similarity(batch, actor, critics, plain_critics, samples, True)
        assert torch.equal(result, torch.ones(16))
        assert by_chance.min() < 0.999

    torch.nn.init.zeros_(actor.network[-1].weight)
    actor.network[-1].bias.data = torch.tensor([30.0, -30.0])  # at the bound of the box, whatever is drawn
    for results in adaent.similarity(batch, actor, critics, plain_critics, 8, True):
        assert torch.equal(results, torch.ones(16))


@pytest.mark.parametrize(("flags", "word"), [
    (["--similarity-samples", 1], "--similarity-samples 1: must be at least 2"),
    (["--similarity-threshold", "nan"], "--similarity-threshold nan: must be finite"),
])  # fmt: skip
def test_wrong_flags_are_refused(run_script, flags, word):
    code, _, err = run_script("sac_adaent_continuous", "--env-id", "Drift-v0", *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert word in err
