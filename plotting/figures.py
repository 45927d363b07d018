"""Draws the paper's figures 1 to 6 from finished runs, and a seventh of Q minus return, with their numbers.

    python -m plotting.figures runs/*                        all seven, into figures/
    python -m plotting.figures runs/* --only 1 3 --where beta=0.1
    python -m plotting.figures --wandb entity/klac
    python -m plotting.figures runs/new* --keep --out OLD    those runs, and the ones in the tables in OLD
    python -m plotting.figures --redraw --out OLD            again, from the tables in OLD, without runs

Runs that differ in their settings are not mixed: of each task the largest set that belongs together is drawn, and the
others are named; --where KEY=VALUE chooses. A fork, with its own file name or --exp-name, is an algorithm of its own.

Writes figureN.pdf, .png and .csv, and what all are drawn from: summary.csv (a row a run), curves.csv, and table.md and
table.csv (a row a task and algorithm). A run's score is the mean of its ten best training episodes; normalised, it is
(score - random) / (SAC - random) per task. Bands and bars are 95% bootstrap intervals over seeds, stratified by task
(in figure 5, as in the paper's, standard deviations): one seed has none, and those of two or three are too narrow.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
import tyro
from matplotlib.ticker import LogLocator, NullLocator, SymmetricalLogLocator

from .console import run
from .runs import add_kept, check_own, markdown, read_folders, read_wandb, tables, write_tables
from .statistics import AGGREGATES, interval, normalise, performance_profile, profile_interval

MUJOCO = ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5", "Swimmer-v5"]
MUJOCO += ["InvertedPendulum-v5", "Reacher-v5"]
MINATAR = ["Asterix-v1", "Breakout-v1", "Freeway-v1", "Seaquest-v1", "SpaceInvaders-v1"]
# Okabe and Ito's colours, and Tol's wine, told apart by the colour-blind; the lines' styles tell them apart in grey
STYLES = {
    "SAC": ("#D55E00", "--"),
    "KLAC": ("#0072B2", "-"),
    "KLAC-a": ("#009E73", "-."),
    "KLAC-b": ("#CC79A7", ":"),
    "KLAC-ab": ("#E69F00", (0, (5, 1))),
    "SAC-AdaEnt": ("#56B4E9", (0, (1, 1))),
    "SAC-V": ("#882255", (0, (3, 1, 1, 1))),
}
OTHERS = [("#000000", "-"), ("#8C564B", "--"), ("#808000", "-."), ("#6A3D9A", ":")]
NAMES = {
    "return": "episodic return",
    "length": "episode length (steps)",
    "q": "mean Q of a batch",
    "q_minus_return": "Q minus return",
    "alpha": "temperature alpha",
    "entropy": "entropy (nats)",
    "exploit_probability": "exploit probability",
    "kl": "KL to the reference (nats)",
    "evaluation": "return of an evaluation",
}
SMOOTHING = 9  # points of a curve (of 200) that are averaged into one


@dataclass
class Args:
    runs: Annotated[list[Path], tyro.conf.Positional] = field(default_factory=list)
    """folders of runs"""
    out: Path = Path("figures")
    """folder of figures and tables"""
    only: tuple[Literal[1, 2, 3, 4, 5, 6, 7], ...] = (1, 2, 3, 4, 5, 6, 7)
    """figures to draw"""
    wandb: str | None = None
    """read the runs of this W&B project, entity/project, as well"""
    where: tuple[str, ...] = ()
    """draw only the runs of which this is true, KEY=VALUE, a setting in their args.json (of those that have it)"""
    unfinished: bool = False
    """use unfinished and damaged runs too, as far as they go: a curve of several seeds ends with the shortest"""
    keep: bool = False
    """keep the runs in the tables in --out too; a run that is given again replaces its rows"""
    redraw: bool = False
    """draw from the tables in --out"""


def styles_of(names) -> dict:
    """{algorithm: (colour, line)}: the paper's variants have their own, forks and others take what follows."""
    styles = {k: v for k, v in STYLES.items() if k in set(names)}
    for i, name in enumerate(sorted(set(names) - STYLES.keys())):
        styles[name] = OTHERS[i % 4][0], OTHERS[(i + i // 4) % 4][1]
    return styles


def unit_of(steps: float) -> tuple[float, str]:
    return (1e6, "millions") if steps >= 1e6 else (1e3, "thousands")


def scale(axis, task: str, quantity: str) -> str:
    """Gives the axis the scale that what is drawn on it needs, and returns the quantity's name, with the scale's. Q is
    on a logarithmic scale on both sides of 0, linear between -1 and 1, where SAC's is many times KLAC's."""
    high = np.abs(axis.dataLim.intervaly).max()
    if quantity == "alpha" and math.isfinite(axis.dataLim.minposy):
        subs = (1, 3) if high < 1000 * axis.dataLim.minposy else (1,)  # between 1 and 10 no tick of many decades
        name, locator = "log", LogLocator(subs=subs)
        axis.set_yscale("log")
    elif quantity in ("q", "q_minus_return") and task in MINATAR and high > 10:
        name, locator = "symlog", SymmetricalLogLocator(linthresh=1, base=10, subs=(1, 3) if high < 200 else (1,))
        axis.set_yscale("symlog", linthresh=1)
    else:
        return NAMES[quantity]
    axis.autoscale_view(scalex=False)
    axis.yaxis.set_major_locator(locator)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    return f"{NAMES[quantity]} ({name})"


def save(figure, stem: Path, dpi: int) -> None:
    """Writes STEM.pdf and STEM.png, without a date: drawn again from the same runs, they are the same files."""
    figure.savefig(f"{stem}.pdf", metadata={"CreationDate": None})
    figure.savefig(f"{stem}.png", dpi=dpi)
    plt.close(figure)


def algorithms_of(table: pd.DataFrame) -> list[str]:
    return list(styles_of(table["algorithm"]))


def present(table: pd.DataFrame, tasks: list[str]) -> list[str]:
    return [task for task in tasks if task in set(table["task"])]


def seeds_of(table: pd.DataFrame) -> str:
    """n=3, or n=2-5 where the tasks have different numbers of seeds."""
    counts = table.groupby("task")["seed"].nunique()
    return f"n={counts.min()}" if counts.min() == counts.max() else f"n={counts.min()}-{counts.max()}"


def curve(curves: pd.DataFrame, task: str, algorithm: str, quantity: str) -> pd.DataFrame:
    """Mean over seeds of the smoothed curves, its interval and their standard deviation, a row a step."""
    rows = curves[(curves["task"] == task) & (curves["algorithm"] == algorithm)]
    seeds = rows.pivot(index="step", columns="seed", values=quantity).interpolate(limit_area="inside")
    seeds = seeds.rolling(SMOOTHING, center=True).mean().dropna(how="any")  # whole windows only
    low, high = interval([seeds.to_numpy()], np.mean) if len(seeds) else (np.nan, np.nan)
    table = pd.DataFrame({"mean": seeds.mean(axis=1), "low": low, "high": high, "sd": seeds.std(axis=1)})
    return table.assign(n=seeds.shape[1], task=task, algorithm=algorithm, quantity=quantity).reset_index()


def draw_curves(curves: pd.DataFrame, grid: list[list[tuple[str, str]]], band: str = "interval"):
    """A panel a (task, quantity); a line an algorithm, with its interval or its standard deviation."""
    unit, unit_name = unit_of(curves["step"].max())
    size = (max(2.2 * len(grid[0]), 3.4), 1.9 * len(grid) + 0.7)
    figure, axes = plt.subplots(len(grid), len(grid[0]), figsize=size, squeeze=False, layout="constrained")
    numbers, lines, styles = [], {}, styles_of(curves["algorithm"])
    for axis in axes.flat[sum(map(len, grid)) :]:
        axis.axis("off")
    for row, panels in enumerate(grid):
        for column, (task, quantity) in enumerate(panels):
            axis = axes[row, column]
            here = curves[(curves["task"] == task) & curves[quantity].notna()]
            for algorithm in algorithms_of(here):
                table = curve(curves, task, algorithm, quantity)
                if table.empty:
                    print(f"{task}, {algorithm}: not drawn: a run is too short for a curve of its {NAMES[quantity]}")
                    continue
                numbers.append(table)
                last = here[here["algorithm"] == algorithm].groupby("seed")["step"].max()
                if last.min() < 0.9 * last.max():
                    words = f"to step {last.min():.0f}, where the shortest run ends"
                    print(f"{task}, {algorithm}: {NAMES[quantity]}: {words}")
                colour, line = styles[algorithm]
                x = table["step"] / unit
                (lines[algorithm],) = axis.plot(x, table["mean"], color=colour, linestyle=line)
                ends = (table["low"], table["high"])
                if band == "sd":
                    ends = (table["mean"] - table["sd"], table["mean"] + table["sd"])
                axis.fill_between(x, *ends, color=colour, alpha=0.2, linewidth=0)
            label = scale(axis, task, quantity)
            axis.set(title=task, xlabel=f"environment steps ({unit_name})", xlim=(0, None))
            if column == 0 or label != axes[row, column - 1].get_label():
                axis.set_ylabel(label)
            axis.set_label(label)
    if not numbers:
        plt.close(figure)
        raise ValueError(f"runs too short for {SMOOTHING} points in a row")
    drawn = curves[curves["task"].isin([task for panels in grid for task, _ in panels])]
    names = [name for name in styles if name in lines]
    labels = [f"{name} ({seeds_of(drawn[drawn['algorithm'] == name])})" for name in names]
    spread = "standard deviation" if band == "sd" else "95% interval"
    title = f"mean and {spread}\nover seeds; {SMOOTHING} of 200\npoints averaged into one"
    legend = {"handles": [lines[name] for name in names], "labels": labels, "title": title, "frameon": False}
    empty = axes.flat[sum(map(len, grid)) :]
    if len(empty):
        empty[0].legend(**legend, loc="center", alignment="left")
    else:
        columns = min(len(names), len(grid[0]) + (len(grid[0]) < 3))
        legend["title"] = title.replace("\n", " ")
        figure.legend(**legend, loc="outside lower center", ncols=columns)
    return figure, pd.concat(numbers)


def figure_1(summary, curves):
    """Mean, IQM and median of the normalised scores over the MuJoCo tasks."""
    scores, left_out = normalise(summary[summary["task"].isin(MUJOCO)])
    styles = styles_of(scores)
    names = list(styles)
    size = (7.0, 0.45 * len(names) + 1.1)
    figure, axes = plt.subplots(1, 3, figsize=size, sharex=True, sharey=True, layout="constrained")
    numbers = []
    for axis, (statistic, function) in zip(axes, AGGREGATES.items(), strict=True):
        for place, name in enumerate(names):
            samples = list(scores[name].values())
            value, (low, high) = float(function(*samples)), interval(samples, function)
            colour = styles[name][0]
            axis.plot([low, high], [place, place], color=colour, linewidth=7, alpha=0.35, solid_capstyle="butt")
            axis.plot(value, place, marker="o", color=colour)
            runs = sorted(len(sample) for sample in samples)
            numbers.append({"algorithm": name, "statistic": statistic, "value": value, "low": low, "high": high})
            numbers[-1] |= {"tasks": len(samples), "fewest_runs": runs[0], "most_runs": runs[-1]}
        axis.set_title(statistic)
        axis.axvline(1, color="0.7", linewidth=0.8, zorder=0)
    shown = summary[summary["task"].isin(MUJOCO) & ~summary["task"].isin(left_out)]
    counts = {name: f"{len(scores[name])} of 8 tasks, {seeds_of(shown[shown['algorithm'] == name])}" for name in names}
    labels = [f"{name} ({counts[name]})" for name in names]
    axes[0].set_yticks(range(len(names)), labels)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("(score - random) / (SAC's score - random); bar: 95% interval over seeds", fontsize=8)
    return figure, pd.DataFrame(numbers)


def figure_2(summary, curves):
    """Asterix and Breakout: returns above, Q values below."""
    tasks = present(summary, MINATAR[:2])
    return draw_curves(curves, [[(task, quantity) for task in tasks] for quantity in ("return", "q")])


def figure_3(summary, curves):
    """Seaquest: returns left, Q values right."""
    return draw_curves(curves, [[("Seaquest-v1", "return"), ("Seaquest-v1", "q")]])


def figure_4(summary, curves):
    """Performance profiles of the MinAtar games, scores normalised by the random policy's and SAC's mean."""
    scores, _ = normalise(summary[summary["task"].isin(MINATAR)])
    highest = max(x.max() for tasks in scores.values() for x in tasks.values())
    thresholds = np.linspace(0, 1.05 * highest, 201)
    figure, axis = plt.subplots(figsize=(4.2, 2.9), layout="constrained")
    numbers = []
    for name, (colour, line) in styles_of(scores).items():
        samples = list(scores[name].values())
        share, (low, high) = performance_profile(samples, thresholds), profile_interval(samples, thresholds)
        n = seeds_of(summary[summary["task"].isin(scores[name]) & (summary["algorithm"] == name)])
        label = f"{name} ({len(samples)} of {len(MINATAR)} games, {n})"
        axis.plot(thresholds, share, color=colour, linestyle=line, drawstyle="steps-post", label=label)
        axis.fill_between(thresholds, low, high, step="post", color=colour, alpha=0.2, linewidth=0)
        numbers.append(pd.DataFrame({"threshold": thresholds, "share": share, "low": low, "high": high}))
        numbers[-1]["algorithm"] = name
    axis.set(xlabel=r"$\tau$: (score - random) / (SAC's mean score - random)")
    axis.set(ylabel=r"share of runs with a score above $\tau$")
    title = "bands: 95% interval over seeds"
    figure.legend(loc="outside upper center", ncols=2, fontsize=6.5, frameon=False, title=title, title_fontsize=6.5)
    return figure, pd.concat(numbers)


def figure_5(summary, curves):
    """Returns on the five MinAtar games, mean and standard deviation over seeds."""
    tasks = present(summary, MINATAR)
    return draw_curves(curves, [[(task, "return") for task in row] for row in (tasks[:3], tasks[3:]) if row], band="sd")


def figure_6(summary, curves):
    """The batch's mean entropy on the eight MuJoCo tasks."""
    tasks = present(summary, MUJOCO)
    rows = [tasks[:4], tasks[4:]] if len(tasks) > 4 else [tasks]
    return draw_curves(curves, [[(task, "entropy") for task in row] for row in rows])


def figure_7(summary, curves):
    """Q minus the discounted reward that was earned, on all tasks; entropy and beta are a part of Q."""
    tasks = present(summary, MINATAR + MUJOCO)
    return draw_curves(
        curves, [[(task, "q_minus_return") for task in tasks[i : i + 5]] for i in range(0, len(tasks), 5)]
    )


FIGURES = {1: figure_1, 2: figure_2, 3: figure_3, 4: figure_4, 5: figure_5, 6: figure_6, 7: figure_7}
NEEDS = {1: MUJOCO, 2: MINATAR[:2], 3: ["Seaquest-v1"], 4: MINATAR, 5: MINATAR, 6: MUJOCO, 7: MINATAR + MUJOCO}


def table(summary: pd.DataFrame) -> pd.DataFrame:
    """A row a task and algorithm: the scores' mean, IQM and median over seeds, the last 10% of steps' return, both with
    the interval of their mean, the deterministic policy's return, Q minus return and the temperature."""
    rows = []
    for (task, algorithm), group in summary.groupby(["task", "algorithm"], sort=False):
        scores = group["score"].to_numpy()
        low, high = interval([scores], np.mean)
        last_low, last_high = interval([group["last_return"].to_numpy()], np.mean)
        row = {"task": task, "algorithm": algorithm, "n": len(group), "steps": group["steps"].min()}
        row |= {"random": group["random"].mean(), "score": scores.mean(), "low": float(low), "high": float(high)}
        row |= {"IQM": scipy.stats.trim_mean(scores, 0.25), "median": np.median(scores)}
        row |= {"last_return": group["last_return"].mean(skipna=False)}  # NaN: a run without an episode's end there
        row |= {"last_low": float(last_low), "last_high": float(last_high)}
        rows.append(row | {name: group[name].mean(skipna=False) for name in ("evaluation", "q_minus_return", "alpha")})
    return pd.DataFrame(rows)


def main(args: Args) -> None:
    check_own(args.out, "score")
    ours = (args.out / "summary.csv").exists()
    if args.redraw and (args.runs or args.wandb or args.where or args.keep or args.unfinished):
        flags = "--wandb, --where, --unfinished and --keep"
        raise ValueError(f"--redraw: draws from the tables in --out alone, without runs, {flags}")
    if not args.redraw:
        if not args.runs and not args.wandb:
            raise ValueError("no run given: name folders of runs, --wandb or --redraw")
        if missing := [str(run) for run in args.runs if not run.exists()]:
            raise ValueError(f"{missing[0]}: not a folder")
        if wrong := [where for where in args.where if "=" not in where]:
            raise ValueError(f"--where {wrong[0]}: must be KEY=VALUE")
        runs = (read_folders(args.runs) if args.runs else []) + (read_wandb(args.wandb) if args.wandb else [])
        summary, curves = tables(runs, args.unfinished, args.where)
        if args.keep:
            summary, curves = add_kept(summary, curves, args.out)
        args.out.mkdir(parents=True, exist_ok=True)
        write_tables(args.out, summary, curves, ("%.5g", "%.4g"))
        for number in sorted(FIGURES.keys() - set(args.only)):
            if (args.out / f"figure{number}.csv").exists():
                print(f"figure {number}: not drawn again: that in {args.out} is of the tables before")
    summary, curves = (pd.read_csv(args.out / name) for name in ("summary.csv", "curves.csv"))
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42}
    for number in args.only:
        here = summary[summary["task"].isin(NEEDS[number])]
        absent = [task for task in NEEDS[number] if task not in set(here["task"])]
        if number in (1, 4):
            absent += [f"{task} (by SAC, better than random)" for task in normalise(here)[1]]
        stem, numbers = args.out / f"figure{number}", None
        if absent:
            print(f"figure {number}: no runs of {', '.join(absent)}")
        if len(absent) < len(NEEDS[number]):
            with plt.rc_context(style):
                try:
                    figure, found = FIGURES[number](summary, curves)
                    save(figure, stem, dpi=200)
                    numbers = found
                except ValueError as error:
                    print(f"figure {number}: {error}")
        if numbers is None:  # one of other runs is not left beside these tables
            for suffix in (".pdf", ".png", ".csv") if ours else ():
                stem.with_suffix(suffix).unlink(missing_ok=True)
        else:
            numbers.to_csv(f"{stem}.csv", index=False, float_format="%.5g")
    rows = table(summary)
    rows.to_csv(args.out / "table.csv", index=False, float_format="%.5g")
    (args.out / "table.md").write_text(markdown(rows) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    run("plotting.figures", main, Args)
