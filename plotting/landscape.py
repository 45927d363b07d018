"""Draws a saved run's critics over slices of the action space at one state, with the policy's density.

    python -m plotting.landscape runs/NAME --out figures                at the first state of an episode
    python -m plotting.landscape runs/NAME --out figures --steps 100    at the state 100 steps on, by the mean action

A panel an action dimension, the others at the policy's mode: the smaller of the twin critics, relative to its maximum
on the slice, and for SAC-AdaEnt the plain ones beside it. Where the two peak apart, entropy misleads the actor.
Writes landscape.pdf, .png and .csv. Continuous actions only.
"""

import ast
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro

from .console import run
from .figures import save

POINTS = 401
# A pair of the stack each, in colours that no variant of the paper has
CURVES = {"critics": ("Q", "#000000", "--"), "plain_critics": ("plain Q", "#8C564B", "-")}


@dataclass
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a finished run"""
    out: Path = Path("figures")
    """folder of the figure"""
    steps: int = 0
    """steps of the mean action from the start of the episode to the state"""
    seed: int = 0
    """seed of the episode"""
    dimensions: int = 6
    """the most action dimensions drawn"""


def forward(state: dict[str, np.ndarray], k: int, x: np.ndarray) -> np.ndarray:
    """The k-th network of a stack of three linear layers and ReLU: (B, inputs) to (B, outputs)."""
    for layer in (1, 2, 3):
        x = x @ state[f"w{layer}"][k] + state[f"b{layer}"][k]
        x = np.maximum(x, 0) if layer < 3 else x
    return x


def policy(state: dict, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the Gaussian before tanh, (d,) each, at an observation (obs_dim,)."""
    mean, x = np.split(forward(state, 0, obs[None])[0], 2)
    return mean, np.exp(-5 + 3.5 * (np.tanh(x) + 1))


def slices(saved: dict, env: gym.Env, obs: np.ndarray, dimensions: int) -> pd.DataFrame:
    """Rows of (dimension, action, density, and each critic's smaller twin's value): POINTS a dimension."""
    box, tables = env.action_space, []
    scale, centre = (box.high - box.low) / 2, (box.high + box.low) / 2
    mean, std = policy(saved["actor"], obs)
    for dimension in range(min(dimensions, len(mean))):
        unit = np.linspace(-1, 1, POINTS + 2)[1:-1]  # inside the box: the density is that of tanh's inverse
        actions = np.tile(np.tanh(mean) * scale + centre, (POINTS, 1))
        actions[:, dimension] = unit * scale[dimension] + centre[dimension]
        z = (np.arctanh(unit) - mean[dimension]) / std[dimension]
        slope = scale[dimension] * (1 - unit**2) * std[dimension]
        table = pd.DataFrame({"dimension": dimension, "action": actions[:, dimension]})
        table["density"] = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) / slope
        x = np.concatenate([np.tile(obs, (POINTS, 1)), actions], axis=1)
        pairs = len(saved["critics"]["w1"]) // 2
        for pair, name in enumerate(list(CURVES)[:pairs]):
            table[name] = np.minimum(*(forward(saved["critics"], 2 * pair + twin, x)[:, 0] for twin in (0, 1)))
        tables.append(table)
    return pd.concat(tables)


def draw(table: pd.DataFrame, title: str, out: Path) -> None:
    """A panel a dimension of what `slices` returns."""
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42})
    panels = table["dimension"].nunique()
    columns = min(panels, 3)
    rows = -(-panels // columns)
    size = (max(2.4 * columns + 0.6, 3.6), 1.9 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[panels:]:
        axis.axis("off")
    for (dimension, part), axis in zip(table.groupby("dimension"), axes.flat, strict=False):
        values = pd.concat([part[name] - part[name].max() for name in CURVES if name in part], axis=1)
        for name in values:
            label, colour, line = CURVES[name]
            axis.plot(part["action"], values[name], color=colour, linestyle=line, label=label)
        lowest = min(values.min().min(), -1e-9)
        top = lowest * (1 - part["density"] / part["density"].max())
        label = "policy's density (not to scale)"
        axis.fill_between(part["action"], lowest, top, color="0.8", linewidth=0, label=label, zorder=0)
        axis.set(xlabel=f"action, dimension {dimension + 1}")
    figure.supylabel("Q minus its maximum", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=8)
    save(figure, out / "landscape", dpi=200)


def keywords(pairs) -> dict:
    """The run's --env-kwargs as it read them: a value is a Python literal, else a string."""
    found = dict(pair.split("=", 1) for pair in pairs)
    for key, value in found.items():
        with suppress(ValueError, SyntaxError, TypeError):
            found[key] = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    return found


def main(args: Args) -> None:
    path = args.run / "actor.pt"
    if not path.exists():
        raise ValueError(f"{args.run}: must be the folder of a finished run, with its actor.pt")
    for name, least in (("steps", 0), ("seed", 0), ("dimensions", 1)):
        if (value := getattr(args, name)) < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch does not look at the checksums
                raise ValueError("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        trained = saved.pop("args")
        env_id = trained["env_id"]
    except Exception as error:  # torch raises a different error for each damage
        raise ValueError(f"{path}: damaged") from error
    layers = {f"{kind}{layer}" for kind in "wb" for layer in (1, 2, 3)}
    if not all(saved.get(part, {}).keys() == layers for part in ("actor", "critics")):
        raise ValueError(f"{path}: holds no actor and critics as these scripts save them")
    saved = {part: {k: x.double().numpy() for k, x in state.items()} for part, state in saved.items()}
    if saved["actor"]["w1"].ndim != 3:
        raise ValueError(f"{args.run}: must be a run with continuous actions")
    try:
        env = gym.make(env_id, disable_env_checker=True, **keywords(trained.get("env_kwargs", ())))
        if not isinstance(env.observation_space, gym.spaces.Box):
            env = gym.wrappers.FlattenObservation(env)
    except Exception as error:  # of a package that is not installed, or not for this task
        raise ValueError(f"{args.run}: its task, {env_id}, cannot be made: {str(error) or repr(error):.200}") from error
    box = env.action_space
    obs, _ = env.reset(seed=args.seed)
    for step in range(args.steps):
        mean, _ = policy(saved["actor"], np.asarray(obs, float))
        action = np.tanh(mean) * (box.high - box.low) / 2 + (box.high + box.low) / 2
        obs, _, terminated, truncated, _ = env.step(action.astype(box.dtype))
        if terminated or truncated:
            raise ValueError(f"--steps {args.steps}: the episode of seed {args.seed} ends at step {step + 1}")
    table = slices(saved, env, np.asarray(obs, float), args.dimensions)

    args.out.mkdir(parents=True, exist_ok=True)
    draw(table, f"{env_id}, step {args.steps} of the episode of seed {args.seed}", args.out)
    table.to_csv(args.out / "landscape.csv", index=False, float_format="%.6g")


if __name__ == "__main__":
    run("plotting.landscape", main, Args)
