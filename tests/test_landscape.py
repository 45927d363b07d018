"""The critics drawn over slices of the action space, against the scripts' own networks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import sac_adaent_continuous as adaent
import sac_continuous
import sac_discrete
import sac_v_continuous
from plotting import console, figures, landscape
from tests.test_family import ROOT

FLAGS = {"total_timesteps": 150, "learning_starts": 100, "eval_episodes": 1, "batch_size": 16, "buffer_size": 200}
FLAGS |= {"compile": False}


@pytest.fixture
def draw(monkeypatch, capsys):
    """As `klac-landscape FLAGS` in this process: (exit code, errors)."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["klac-landscape", *map(str, flags)])
        capsys.readouterr()
        try:
            console.load("landscape")
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("module", [adaent, sac_continuous, sac_v_continuous])
def test_slices_are_the_critics_and_the_policys_density(draw, module):
    run_dir = module.train(module.Args(env_id="Reacher-v5", **FLAGS))
    assert draw(run_dir, "--steps", 3, "--seed", 5, "--out", "figures") == (0, "")
    for suffix in ("png", "pdf"):
        assert Path(f"figures/landscape.{suffix}").stat().st_size > 5000
    table = pd.read_csv("figures/landscape.csv")
    assert sorted(table["dimension"].unique()) == [0, 1]

    saved = torch.load(run_dir / "actor.pt", weights_only=True)
    env = module.make_env(module.Args(env_id="Reacher-v5"))
    actor, critics = module.make_networks(module.Args(), env)
    actor.load_state_dict(saved["actor"])
    critics.load_state_dict(saved["critics"])
    obs, _ = env.reset(seed=5)
    with torch.no_grad():
        for _ in range(3):
            action = actor.squash(actor(torch.as_tensor(obs[None]).float())[0])[0].numpy()
            obs, *_ = env.step(action)
        x = torch.as_tensor(obs[None]).float()
        mean, log_std = actor(x)
        for dimension, part in table.groupby("dimension"):
            # the density of a marginal integrates to 1, and is the actor's with one dimension
            assert np.trapezoid(part["density"], part["action"]) == pytest.approx(1, abs=0.02)
            for _, row in part.iloc[::57].iterrows():
                point = actor.squash(mean)
                point[0, dimension] = row["action"]
                values = critics(x, point).view(-1, 2).amin(1)
                for name, value in zip(("critics", "plain_critics"), values, strict=False):
                    assert row[name] == pytest.approx(value.item(), abs=1e-4)
                u = torch.atanh(torch.tensor(row["action"]))
                normal = torch.distributions.Normal(mean[0, dimension], log_std[0, dimension].exp())
                density = normal.log_prob(u).exp() / (1 - row["action"] ** 2)
                assert row["density"] == pytest.approx(density.item(), rel=1e-2, abs=1e-6)
    assert ("plain_critics" in table) == (module is adaent)


def test_what_cannot_be_drawn_is_refused_in_one_line(draw):
    run_dir = sac_discrete.train(sac_discrete.Args(env_id="Walk-v0", **FLAGS))
    layers = {f"{kind}{layer}": torch.ones(1, 1, 1) for kind in "wb" for layer in (1, 2, 3)}
    foreign = {"args": {"env_id": "nowhere:No-v0"}, "critics": layers, "actor": layers}
    older = foreign | {"actor": {"network.0.weight": torch.ones(1)}}
    deeper = foreign | {"critics": layers | {"w4": torch.ones(1, 1, 1)}}
    saved = (("foreign", foreign), ("older", older), ("deeper", deeper))
    for name, content in (("empty", None), ("damaged", b"PK"), *saved):
        Path(name).mkdir()
        if isinstance(content, bytes):
            Path(name, "actor.pt").write_bytes(content)
        elif content:
            torch.save(content, Path(name, "actor.pt"))
    for flags, word in [
        ([run_dir], "continuous actions"), (["empty"], "finished run"), ([run_dir, "--steps", -1], "--steps -1: must"),
        (["damaged"], "actor.pt: damaged"), (["foreign"], "nowhere:No-v0, cannot be made: No module named"),
        (["older"], "holds no actor and critics"), (["deeper"], "holds no actor and critics"),
    ]:  # fmt: skip
        code, err = draw(*flags, "--out", "figures")
        assert (code, err.count("\n")) == (2, 1), err
        assert word in err
        assert not Path("figures").exists()


def test_the_task_is_made_as_the_run_made_it(draw):
    kwargs = ("g=1.0", "max_episode_steps=20", "render_mode=rgb_array")
    flags = FLAGS | {"env_kwargs": kwargs}
    run_dir = sac_continuous.train(sac_continuous.Args(env_id="Pendulum-v1", run_name="it", **flags))
    assert landscape.keywords(kwargs) == sac_continuous.env_kwargs(sac_continuous.Args(env_kwargs=kwargs))
    code, err = draw(run_dir, "--out", "figures", "--steps", 20)
    assert (code, err.count("\n")) == (2, 1)
    assert "ends at step 20" in err


def test_a_critic_has_no_variants_colour():
    variants = {colour for colour, _ in figures.STYLES.values()}
    assert variants.isdisjoint(colour for _, colour, _ in landscape.CURVES.values())


def test_a_flipped_bit_is_refused(draw):
    run_dir = sac_continuous.train(sac_continuous.Args(env_id="Pendulum-v1", run_name="it", **FLAGS))
    content = bytearray((run_dir / "actor.pt").read_bytes())
    content[len(content) // 2] ^= 1  # among the weights
    (run_dir / "actor.pt").write_bytes(content)
    code, err = draw(run_dir, "--out", "figures")
    assert (code, err.count("\n")) == (2, 1)
    assert "actor.pt: damaged" in err


def test_the_command_finds_a_task_in_the_current_folder_and_trusts_it_as_the_scripts_do(monkeypatch):
    """Its info is none, which Gymnasium's checker would not take."""
    Path("mine.py").write_text("""
import gymnasium as gym
import tests.envs

class Mine(tests.envs.Drift):
    def reset(self, **given):
        return super().reset(**given)[0], None

if "Mine-v0" not in gym.registry:
    gym.register("Mine-v0", Mine, max_episode_steps=8)
""")
    monkeypatch.syspath_prepend(".")
    run_dir = sac_continuous.train(sac_continuous.Args(env_id="mine:Mine-v0", **FLAGS))
    code = "from plotting.console import landscape; landscape()"
    command = [sys.executable, "-P", "-c", code, str(run_dir), "--steps", "1"]
    setting = {"env": {"PYTHONPATH": str(ROOT), "PATH": ""}, "capture_output": True, "text": True}
    result = subprocess.run(command, **setting, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert Path("figures/landscape.csv").exists()
