"""SAC-AdaEnt: its targets and losses against its siblings' and by hand, and where it is one of them."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import klac_continuous
import sac_adaent_continuous as adaent
import sac_continuous
from tests.test_family import blocks, parts

FLAGS = {"env_id": "Drift-v0", "total_timesteps": 250, "learning_starts": 100, "log_interval": 20, "eval_episodes": 1}
FLAGS |= {"batch_size": 16, "compile": False}


def test_it_is_a_sibling():
    own, sibling = blocks(adaent), blocks(sac_continuous)
    different = {"Args", "make_networks", "td_target", "critic_loss", "critic_gradients", "cosine", "similarity"}
    different |= {"actor_loss", "actor_gradients", "train", None}
    assert own.keys() ^ sibling.keys() == {"cosine", "similarity"}
    for name in own.keys() - different:
        assert own[name] == sibling[name], name
    ours, theirs = vars(adaent.Args()), vars(sac_continuous.Args())
    assert ours.keys() - theirs.keys() == {
        "similarity_threshold", "similarity_samples", "similarity_centred", "actor_critic"
    }  # fmt: skip
    assert all(ours[name] == value for name, value in theirs.items() if name != "exp_name")


@pytest.fixture
def made():
    """(batch, noise, actor, critics) of fresh networks: the soft twins and the plain ones in one stack."""
    batch, actor, critics = parts(adaent, "Drift-v0")
    return batch, torch.randn(16, 1), actor, critics


def twins(critics, first):
    """Two of the four, as a sibling's stack."""
    pair = sac_continuous.Networks(2, 4, 1)
    pair.load_state_dict({name: value[first : first + 2] for name, value in critics.state_dict().items()})
    return pair


def test_the_targets_are_sacs_and_klac_abs(made):
    batch, noise, actor, critics = made
    alpha = torch.tensor(0.3)
    y, plain_y = adaent.td_target(batch, noise, actor, critics, 0.9, alpha)
    assert torch.equal(y, sac_continuous.td_target(batch, noise, actor, twins(critics, 0), 0.9, alpha))
    assert torch.equal(plain_y, klac_continuous.td_target(batch, noise, actor, twins(critics, 2), 0.9, 0.0))
    assert (y - plain_y).abs().max() > 0.01


def test_the_critics_gradients_are_those_of_two_siblings(made):
    batch, noise, actor, critics = made
    arguments = noise, actor, critics, 0.9, torch.tensor(0.3)
    gradients, log = adaent.critic_gradients(batch, critics, *arguments)
    y = adaent.td_target(batch, *arguments)
    for first, target in ((0, y[0]), (2, y[1])):
        pair = twins(critics, first)
        expected, _ = torch.func.grad(sac_continuous.critic_loss, has_aux=True)(
            dict(pair.named_parameters()), batch, pair, target
        )
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name][first : first + 2], gradient, rtol=1e-4, atol=1e-6)
    loss, (errors, _) = adaent.critic_loss(dict(critics.named_parameters()), batch, critics, y)
    assert loss.item() == pytest.approx(errors.sum().item())
    assert log["losses/qf_loss"].item() == pytest.approx(errors[:2].mean().item())
    assert log["losses/plain_qf_loss"].item() == pytest.approx(errors[2:].mean().item())


@pytest.mark.parametrize("centred", [True, False])
def test_the_similarity_is_the_cosine_over_sampled_actions(made, centred):
    batch, _, actor, critics = made
    noise = torch.randn(16, 5, 1)
    result, by_chance = adaent.similarity(batch, noise, actor, critics, centred)
    mean, log_std = actor(batch.obs)
    for i in range(16):
        values = np.zeros((4, 5))
        for j in range(5):
            action = actor.squash(mean[i] + log_std[i].exp() * noise[i, j])
            values[:, j] = critics(batch.obs[i][None], action[None]).flatten()
        pairs = ((result, values[:2].min(0), values[2:].min(0)), (by_chance, values[0], values[1]))
        for found, x, y in pairs:
            if centred:
                assert found[i].item() == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-3)
            else:
                assert found[i].item() == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-5)
    for weights in critics.parameters():
        weights[2:] = weights[:2]  # plain critics that are the soft ones
    same, _ = adaent.similarity(batch, noise, actor, critics, centred)
    torch.testing.assert_close(same, torch.ones(16), atol=1e-3, rtol=0)


def test_uncentred_it_is_the_printed_formula(made):
    """Q = 5 and P = -5 whatever the action: opposite by the formula, and nothing to disagree on when centred."""
    batch, _, actor, critics = made
    critics.w3.zero_()
    critics.b3.copy_(torch.tensor([5.0, 5.0, -5.0, -5.0])[:, None, None])
    noise = torch.randn(16, 5, 1)
    torch.testing.assert_close(adaent.similarity(batch, noise, actor, critics, False)[0], -torch.ones(16))
    assert torch.equal(adaent.similarity(batch, noise, actor, critics, True)[0], torch.ones(16))


def test_the_similarity_is_of_the_target_networks(monkeypatch):
    """The poster's hats. They lag behind with tau 0.005, so that online critics would give other numbers."""
    seen, real = [], adaent.similarity

    def watch(batch, noise, actor, critics, centred):
        seen.append(critics)
        return real(batch, noise, actor, critics, centred)

    targets, real_target = [], adaent.td_target
    online, real_loss = [], adaent.actor_loss
    monkeypatch.setattr(adaent, "similarity", watch)
    monkeypatch.setattr(adaent, "td_target", lambda *a: targets.append(a[3]) or real_target(*a))
    monkeypatch.setattr(adaent, "actor_loss", lambda *a: online.append(a[4]) or real_loss(*a))
    adaent.train(adaent.Args(**FLAGS | {"total_timesteps": 120}))
    assert {id(critics) for critics in seen} == {id(critics) for critics in targets}
    assert {id(critics) for critics in online}.isdisjoint({id(critics) for critics in seen})
    pairs = zip(online[0].parameters(), seen[0].parameters(), strict=True)
    assert not any(torch.equal(own, target) for own, target in pairs)


def test_the_actor_climbs_the_plain_critic_where_it_is_told_to(made):
    batch, noise, actor, critics = made
    alpha, nowhere, parameters = torch.tensor(0.3), torch.zeros(16, dtype=torch.bool), dict(actor.named_parameters())

    def loss(mask, first=False):
        return adaent.actor_loss(parameters, batch, noise, actor, critics, mask, first, 0.5, alpha)

    for mask, pair in ((nowhere, twins(critics, 0)), (~nowhere, twins(critics, 2))):
        expected, log_pis = sac_continuous.actor_loss(parameters, batch, noise, actor, pair, 0.5, alpha)
        assert torch.equal(loss(mask)[0], expected)
        assert all(torch.equal(*both) for both in zip(loss(mask)[1], log_pis, strict=True))

    half = torch.arange(16) < 8
    mean, log_std = actor(batch.obs)
    u = mean + log_std.exp() * noise
    action, log_pi = actor.squash(u), actor.log_prob(mean, log_std, u)
    for first in (False, True):
        total = 0.0
        for i in range(16):
            values = critics(batch.obs[i][None], action[i][None]).flatten().tolist()
            values = values[2:] if i < 8 else values[:2]
            total += 0.3 * log_pi[i].item() - (values[0] if first else min(values))
        assert loss(half, first)[0].item() == pytest.approx(total / 16, abs=1e-5)


@pytest.mark.parametrize(("threshold", "share"), [(-1.1, 0.0), (1.1, 1.0)])
def test_beyond_its_range_the_threshold_makes_it_one_of_its_siblings(scalars, monkeypatch, threshold, share):
    followed, real = [], adaent.actor_loss
    monkeypatch.setattr(adaent, "actor_loss", lambda *a: followed.append(a[5].float().mean().item()) or real(*a))
    logged = scalars(adaent.train(adaent.Args(similarity_threshold=threshold, **FLAGS)))
    assert set(followed) == {share}
    assert {value for _, value in logged["adaent/plain_share"]} == {share}
    assert all(-1.001 <= value <= 1.001 for _, value in logged["adaent/similarity"])


def test_it_logs_what_sac_logs_and_its_own_and_some_states_switch(scalars):
    flags = FLAGS | {"batch_size": 64}
    sac = scalars(sac_continuous.train(sac_continuous.Args(**flags)))
    logged = scalars(adaent.train(adaent.Args(similarity_threshold=0.9, **flags)))
    own = {"losses/plain_qf1_loss", "losses/plain_qf1_values", "losses/plain_qf_loss"}
    own |= {"adaent/similarity", "adaent/twin_similarity", "adaent/plain_share"}
    assert logged.keys() - sac.keys() == own
    assert sac.keys() <= logged.keys()
    assert len({value for _, value in logged["adaent/plain_share"]}) > 1


def test_the_plain_critic_learns_the_return_and_the_soft_one_the_entropy_beside_it(scalars, monkeypatch):
    """Without rewards the true value is 0, and the soft one, of an entropy that is worth much, is far from it."""
    real = adaent.make_env
    monkeypatch.setattr(adaent, "make_env", lambda *a: gym.wrappers.TransformReward(real(*a), lambda reward: 0.0))
    flags = FLAGS | {"total_timesteps": 500, "q_lr": 3e-3, "tau": 0.05, "gamma": 0.9}
    logged = scalars(adaent.train(adaent.Args(autotune=False, alpha=1.0, **flags)))
    assert abs(logged["losses/plain_qf1_values"][-1][1]) < 0.1
    assert logged["losses/qf1_values"][-1][1] > 1
    assert logged["losses/plain_qf1_loss"][-1][1] < logged["losses/plain_qf1_loss"][0][1]


def test_all_four_targets_follow_their_critics(monkeypatch):
    seen, real = [], adaent.td_target

    def watch(batch, noise, actor, target_critics, *rest):
        seen.append([parameter.clone() for parameter in target_critics.parameters()])
        return real(batch, noise, actor, target_critics, *rest)

    monkeypatch.setattr(adaent, "td_target", watch)
    run_dir = adaent.train(adaent.Args(**FLAGS | {"tau": 1.0}))
    saved = torch.load(run_dir / "actor.pt", weights_only=True)["critics"].values()
    for k in range(4):
        assert not any(torch.equal(a[k], b[k]) for a, b in zip(seen[1], seen[-1], strict=True))
        # with tau 1 they are copies: the last that was used is one update behind the last that was learnt
        assert max((a[k] - b[k]).abs().max() for a, b in zip(seen[-1], saved, strict=True)) < 0.01


def test_critics_that_do_not_vary_have_nothing_to_disagree_on(made):
    batch, _, actor, critics = made
    critics.w3[2:] = 0  # 0.3 has a mean over 8 of it that rounding moves
    critics.b3[2:] = 0.3
    for samples in (5, 8):
        result, by_chance = adaent.similarity(batch, torch.randn(16, samples, 1), actor, critics, True)
        assert torch.equal(result, torch.ones(16))
        assert by_chance.min() < 0.999

    actor.w3.zero_()
    actor.b3[0, 0] = torch.tensor([30.0, -30.0])  # at the bound of the box, whatever is drawn
    for results in adaent.similarity(batch, torch.randn(16, 8, 1), actor, critics, True):
        assert torch.equal(results, torch.ones(16))


@pytest.mark.parametrize(("flags", "word"), [
    (["--similarity-samples", 1], "--similarity-samples 1: must be at least 2"),
    (["--similarity-threshold", "nan"], "--similarity-threshold nan: must be finite"),
])  # fmt: skip
def test_wrong_flags_are_refused(run_script, flags, word):
    code, _, err = run_script("sac_adaent_continuous", "--env-id", "Drift-v0", *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert word in err
