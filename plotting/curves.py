"""Learning curves of finished runs: python -m plotting.curves --out results/NAME runs/A runs/B ...

Writes curves.csv (binned returns, Q values, alpha, entropy), summary.csv (a row a run), curves.pdf and .png into --out,
and prints the summary as Markdown. `--redraw` does so from the two tables in --out instead, without any run. Runs of
one algorithm whose settings differ are told apart by what differs: "KLAC, p_start 0.5" and "KLAC, p_start 0.8".
"""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import multimode
from typing import Annotated, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.lines import Line2D

from .console import run
from .figures import NAMES, STYLES, save, scale, seeds_of, styles_of, unit_of
from .runs import QUANTITIES, check_own, label, markdown, read_args, read_scalars, settings_of, write_tables

# What only some runs have: a target at a fixed temperature, another critic, evaluations while they train
OPTIONAL = {"kl": "policy/kl", "target_kl": "policy/target_kl", "similarity": "adaent/similarity"}
OPTIONAL |= {"twin_similarity": "adaent/twin_similarity", "plain_share": "adaent/plain_share"}
EVALUATIONS = {"evaluation": "eval/episodic_return", "stochastic": "eval/stochastic_return"}
OPTIONAL |= EVALUATIONS
RANDOM, BUDGET = "0.5", "#F0E442"  # colours that no algorithm has


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional] = field(default_factory=list)
    """folders of finished runs"""
    out: Path = Path("curves")
    """folder of tables and figure"""
    bin: int = 10_000
    """steps whose episodes are averaged into one point"""
    show: tuple[Literal[*NAMES], ...] = ("return",)
    """quantities to draw, a row each"""
    steps: int | None = None
    """read only so many steps of each run, to compare longer runs with shorter ones"""
    redraw: bool = False
    """draw again from the tables in --out"""


def read_run(run_dir: Path, bin_steps: int, max_steps: int | None) -> tuple[pd.DataFrame, dict, dict]:
    """One run as (binned curves, its row of the summary, its settings). Raises ValueError if it cannot be used."""
    try:
        finished = (run_dir / "actor.pt").is_file()
    except OSError as error:
        raise ValueError(f"{run_dir}: {error}") from error
    if not finished:
        raise ValueError(f"{run_dir}: not the folder of a finished run: it has no actor.pt")
    try:
        args = read_args(run_dir)
        scalars, sound = read_scalars(run_dir)
    except Exception as error:  # as in runs.read_run
        raise ValueError(f"{run_dir}: {error}") from error
    evaluations, _ = scalars.get("eval/episodic_return", ([-1], []))
    if not sound or evaluations[-1] != args["total_timesteps"]:  # which a finished run logs last
        raise ValueError(f"{run_dir}: its scalars are damaged")
    total, warm_up = min(args["total_timesteps"], max_steps or math.inf), args["learning_starts"]
    labels = {"task": args["env_id"].removeprefix("MinAtar/"), "algorithm": label(args), "seed": args["seed"]}
    settings = settings_of(args)
    series = {}
    for name, tag in (QUANTITIES | OPTIONAL).items():
        if tag in scalars and (name not in EVALUATIONS or EVALUATIONS["stochastic"] in scalars):
            steps, values = scalars[tag]
            if name in EVALUATIONS:
                steps = steps - 1  # an evaluation at step N, before it is taken, is of the bin that ends there
            series[name] = pd.Series(values, steps, dtype=float)[lambda s: s.index < total]
    if missing := [name for name in QUANTITIES if name not in series or series[name].empty]:
        raise ValueError(f"{run_dir}: too short, or cut too short: it has no {', '.join(missing)}")
    curves = pd.DataFrame({name: values.groupby(values.index // bin_steps).mean() for name, values in series.items()})
    curves = curves.assign(step=np.minimum((curves.index + 1) * bin_steps, total), **labels)[[*labels, "step", *series]]

    returns, (_, evaluation) = series["return"], scalars["eval/episodic_return"]
    hour_steps, hours = scalars.get("charts/hours", (np.empty(0), np.empty(0)))
    hours = hours[hour_steps < total]
    summary = labels | {
        "steps": total,
        "random": returns[returns.index < warm_up].mean(),
        "last 10%": returns[returns.index >= 0.9 * total].mean(),
        "best 10": returns.nlargest(10).mean(),
        "argmax": evaluation[-1] if total == args["total_timesteps"] else math.nan,
        "Q": series["q"].iloc[-10:].mean(),
        "Q - return": series["q_minus_return"][lambda s: s.index >= 0.9 * total].mean(),
        "alpha": series["alpha"].iloc[-1],
        "hours": hours[-1] if len(hours) else math.nan,
    }
    for name in ("entropy", *OPTIONAL):  # over the last 10% too
        summary[name] = series[name][lambda s: s.index >= 0.9 * total].mean() if name in series else math.nan
    return curves, summary, settings | {"total_timesteps": total}


def tell_apart(runs: list[tuple[pd.DataFrame, dict, dict]]) -> None:
    """Adds to the algorithms' names the settings in which their runs differ on some task; where these are several, only
    those that are not the most common one's: "SAC-V", "SAC-V, tau 0.05", "SAC-V, reward_scale 1"."""
    differing = defaultdict(set)
    for (_, first, ours), (_, second, theirs) in itertools.combinations(runs, 2):
        if (first["task"], first["algorithm"]) == (second["task"], second["algorithm"]):
            names = ours.keys() | theirs.keys()
            differing[first["algorithm"]] |= {name for name in names if ours.get(name) != theirs.get(name)}
    common = defaultdict(dict)
    for algorithm, names in differing.items():
        for name in names if len(names) > 1 else ():
            modes = multimode(str(settings.get(name)) for _, row, settings in runs if row["algorithm"] == algorithm)
            if len(modes) == 1:
                common[algorithm][name] = modes[0]
    for curves, summary, settings in runs:
        algorithm, values = summary["algorithm"], []
        for name in sorted(differing[algorithm]):
            if str(settings.get(name)) != common[algorithm].get(name):
                values.append(f"{name} {settings.get(name)}")
        summary["algorithm"] = curves["algorithm"] = ", ".join([algorithm, *values])


def swept(algorithms: list[str]) -> dict:
    """{algorithm: (colour, line)}: settings that differ in one number are one sequence of colours; other algorithms
    have their own (KLAC-b, which is beta 0, too)."""
    numbers = defaultdict(list)
    for name in algorithms:
        stem, _, value = name.rpartition(" ")
        if name not in STYLES and value.removeprefix("-").replace(".", "", 1).replace("e-", "", 1).isdecimal():
            numbers[stem].append((float(value), name))
    of_a_sweep = {name for sweep in numbers.values() for _, name in sweep}
    styles = styles_of(set(algorithms) - of_a_sweep)
    for place, sweep in enumerate(numbers.values()):
        shades = matplotlib.colormaps[("viridis", "autumn", "cool")[place % 3]](np.linspace(0, 0.85, len(sweep)))
        for (_, name), shade in zip(sorted(sweep), shades, strict=True):
            styles[name] = (shade, ("-", "--", "-.", ":")[place % 4])
    return styles


def seeds_by_step(curves: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """A column a seed that has the quantity, a row a step; a bin in which nothing was logged is interpolated."""
    table = curves.pivot(index="step", columns="seed", values=quantity)
    return table.dropna(axis="columns", how="all").interpolate("index", limit_area="inside")


def draw(curves: pd.DataFrame, summary: pd.DataFrame, show: tuple[str, ...], folder: Path) -> None:
    """A column a task, a row a quantity: each seed a thin line, their mean a thick one."""
    tasks = list(dict.fromkeys(curves["task"]))
    longest = 0.09 * max(len(name) for name in curves["algorithm"]) + 1.4  # of the legend's entries, in inches
    width = max(4.2 * len(tasks), longest)
    legend_columns = max(1, min(2 * len(tasks), int(width / longest)))
    legend_rows = (curves["algorithm"].nunique() + 1) / legend_columns
    size = (width, 2.6 * len(show) + 0.4 + 0.2 * max(0, legend_rows - 2))
    figure, axes = plt.subplots(len(show), len(tasks), figsize=size, squeeze=False, sharex="col", layout="constrained")
    styles, lines = swept(sorted(set(curves["algorithm"]))), {}
    unit, unit_name = unit_of(curves["step"].max())
    for (row, quantity), (column, task) in itertools.product(enumerate(show), enumerate(tasks)):
        axis = axes[row, column]
        for algorithm, (colour, line) in styles.items():
            chosen = (curves["task"] == task) & (curves["algorithm"] == algorithm)
            if not chosen.any():
                continue
            seeds, of = seeds_by_step(curves[chosen], quantity), curves[chosen]["seed"].nunique()
            if 0 < seeds.shape[1] < of:
                print(f"{task}, {algorithm}: {NAMES[quantity]}: from {seeds.shape[1]} of {of} seeds")
            if seeds.empty:
                continue
            style = {"color": colour, "linestyle": line, "marker": "." if len(seeds) == 1 else None}  # it is no line
            (lines[algorithm],) = axis.plot(seeds.index / unit, seeds.mean(axis=1, skipna=False), **style)
            if seeds.shape[1] > 1:
                axis.plot(seeds.index / unit, seeds, **style, linewidth=0.6, alpha=0.5)
            if quantity == "kl" and "target_kl" in curves:
                budget = seeds_by_step(curves[chosen], "target_kl").mean(axis=1)
                (wide,) = axis.plot(budget.index / unit, budget, color=BUDGET, linewidth=4, zorder=0)
                lines["budget of the KL"] = wide
            if quantity == "evaluation":
                stochastic = seeds_by_step(curves[chosen], "stochastic").mean(axis=1, skipna=False)
                axis.plot(stochastic.index / unit, stochastic, color=colour, linestyle=":")
                lines["the same, stochastic policy"] = Line2D([], [], color=RANDOM, linestyle=":")
        if quantity == "return":
            random = summary[summary["task"] == task]["random"].mean()
            if math.isfinite(random):
                lines["random policy"] = axis.axhline(random, color=RANDOM, linewidth=1)
        axis.set_ylabel(scale(axis, task, quantity))
        axis.set_xlim(0, None)
        axis.spines[["top", "right"]].set_visible(False)
        if row == 0:
            axis.set_title(task)
        if row == len(show) - 1:
            axis.set_xlabel(f"environment steps ({unit_name})")
    shown = curves.dropna(subset=list(show), how="all")
    rows = {name: shown[shown["algorithm"] == name] for name in styles}
    labels = {name: f"{name} ({seeds_of(rows[name])})" if name in rows else name for name in lines}
    order = [name for name in dict.fromkeys([*styles, *lines]) if name in lines]
    gaps = curves.groupby(["task", "algorithm", "seed"])["step"].diff().fillna(curves["step"])
    title = f"a point: the mean over {int(gaps.mode().max()):,} steps"  # the last one may have fewer
    if curves.groupby(["task", "algorithm"])["seed"].nunique().max() > 1:
        title += "\n" if len(tasks) == 1 else "; "
        title += "thin: a seed; thick: the mean of the seeds"
    figure.legend(
        [lines[name] for name in order],
        [labels[name] for name in order],
        loc="outside lower center",
        ncols=legend_columns,
        frameon=False,
        title=title,
    )
    save(figure, folder / "curves", dpi=160)


def main(args: Args) -> None:
    key = ["task", "algorithm", "seed"]
    for name in ("bin", "steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if args.redraw and (args.runs or args.steps is not None or args.bin != Args.bin):
        raise ValueError("--redraw: draws from the tables in --out alone, without runs, --bin and --steps")
    check_own(args.out, "best 10")
    if not args.redraw:
        if not args.runs:
            raise ValueError("no run given: name at least one run's folder, or --redraw")
        runs, used = [], []
        for run_dir in args.runs:
            try:
                runs.append(read_run(run_dir, args.bin, args.steps))
                used.append(run_dir)
            except ValueError as error:
                if run_dir is args.runs[-1] and not runs:
                    raise
                print(f"left out: {error}")
        tell_apart(runs)
        seen = {}
        for run_dir, (_, row, _) in zip(used, runs, strict=True):
            if (other := seen.setdefault(tuple(row[name] for name in key), run_dir)) is not run_dir:
                raise ValueError(f"{run_dir}: the same task, algorithm and seed as {other}")
        curves = pd.concat([table for table, _, _ in runs]).sort_values([*key, "step"])
        summary = pd.DataFrame([row for _, row, _ in runs]).sort_values(key)
        summary = summary.drop(columns=[name for name in OPTIONAL if summary[name].isna().all()])
    else:
        curves, summary = pd.read_csv(args.out / "curves.csv"), pd.read_csv(args.out / "summary.csv")
    if missing := [name for name in args.show if name not in curves]:
        raise ValueError(f"--show {missing[0]}: the runs have not logged it")
    if not args.redraw:
        args.out.mkdir(parents=True, exist_ok=True)
        write_tables(args.out, summary, curves, ("%.4g", "%.5g"))
        curves, summary = pd.read_csv(args.out / "curves.csv"), pd.read_csv(args.out / "summary.csv")
    draw(curves, summary, args.show, args.out)
    print(markdown(summary))


if __name__ == "__main__":
    run("plotting.curves", main, Args)
