"""Reads runs, from their folders or from W&B, into two tidy tables: a row a run, and a row a point of its curves."""

import hashlib
import io
import json
import math
import multiprocessing
import re
import shlex
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

POINTS = 200  # of a curve: each is the mean over as many equal stretches of the run
QUANTITIES = {
    "return": "charts/episodic_return",
    "length": "charts/episodic_length",
    "q": "losses/qf1_values",
    "q_minus_return": "charts/q_minus_return",
    "alpha": "losses/alpha",
    "entropy": "policy/entropy",
    "exploit_probability": "policy/exploit_probability",
}
# Runs of one task and algorithm may differ in these and still be seeds of one experiment
FREE = {"seed", "run_name", "exp_name", "track", "wandb_project_name", "wandb_entity", "capture_video", "cuda"}
FREE |= {"env_id", "algorithm", "compile", "resume", "checkpoint_interval", "evaluate", "eval_episodes"}
FREE |= {"log_interval", "eval_interval", "provenance"}
SCRIPTS = ("klac_discrete", "sac_discrete", "klac_continuous", "sac_continuous", "sac_adaent_continuous")
SCRIPTS += ("sac_v_continuous",)
KLACS_OWN = {"bias", "beta", "anneal", "p_start", "p_end", "anneal_timesteps", "exploit_radius", "reference"}
KINDS = {"env_id": str, "algorithm": str, "seed": int, "total_timesteps": int, "learning_starts": int}  # in args.json
VERSION = 9  # of what is cached
HEADER = b"step,tag,value\n"
ROWS = re.compile(rb'(?:\d{1,15},[^,"\x00-\x1f\x7f-\xff]+,-?(?:\d+(?:\.\d+)?(?:e[+-]\d+)?|inf|nan)\n)*+')


@dataclass
class Run:
    """A run, or why there is none: `summary` (a row) and `curves` (POINTS rows) are empty if `problem` is fatal."""

    name: str
    problem: str | None = None
    summary: dict | None = None
    curves: dict | None = None
    settings: dict | None = None


def read_args(run_dir: Path) -> dict:
    """The arguments of a run. Raises ValueError if they are not those of one."""
    try:
        args = json.loads((run_dir / "args.json").read_text())
        json.dumps(args, ensure_ascii=False).encode()  # not so half of a surrogate pair, which nothing prints
    except ValueError as error:
        raise ValueError("args.json is damaged") from error
    of_a_run = isinstance(args, dict) and all(type(args.get(name)) is kind for name, kind in KINDS.items())
    if of_a_run:
        names = args["env_id"], args["algorithm"], args.get("exp_name", SCRIPTS[0])
        of_a_run = all(isinstance(name, str) and name and "$" not in name for name in names)  # $ begins a formula
        of_a_run &= args["total_timesteps"] > 0 and all(abs(x) < 2**62 for x in args.values() if type(x) is int)
    if not of_a_run:
        raise ValueError("args.json is not that of a run")
    return args


def read_scalars(run_dir: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], bool]:
    """All scalars of a run, {tag: (steps, values)}, up to the first row that is damaged, and whether there is none: a
    row that cannot be read, a step before that of the row above, a last row without its end. Raises ValueError if the
    header is another."""
    content = (run_dir / "scalars.csv").read_bytes()
    if HEADER.startswith(content):  # its writer was stopped before the first row
        return {}, True
    if not content.startswith(HEADER):
        raise ValueError("scalars.csv has another header than step,tag,value")
    try:
        rows = parse(content)
        sound = content.endswith(b"\n") and not rows.isna().any(axis=None)
        sound &= not any(byte in content for byte in (b"\0", b"\r", b'"'))  # over which the parser joins rows
    except (ValueError, OverflowError):
        sound = False
    if not sound:  # or a value is nan; the expression is strict, but as slow as the parser
        end = ROWS.match(content, len(HEADER)).end()
        rows, sound = parse(content[:end]), end == len(content)
    backwards = np.diff(rows["step"], prepend=0) < 0
    if backwards.any():
        rows, sound = rows.iloc[: backwards.argmax()], False
    steps, values = rows["step"].to_numpy(), rows["value"].to_numpy(np.float32)
    codes, tags = pd.factorize(rows["tag"])
    return {tag: (steps[codes == code], values[codes == code]) for code, tag in enumerate(tags)}, sound


def parse(content: bytes) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(content), dtype={"step": np.int64, "tag": "category", "value": np.float64})


def summarise(name: str, args: dict, scalars: dict, problem: str | None) -> Run:
    """A run's row and its curves. `score` is the mean of the 10 best training episodes, `random` that of the warm-up's.

    Raises KeyError if a quantity was never logged.
    """
    total = args["total_timesteps"]
    series = {quantity: scalars[tag] for quantity, tag in QUANTITIES.items()}
    steps, returns = series["return"]
    last_tenth, warm_up = steps >= 0.9 * total, steps < args["learning_starts"]
    gap_steps, gaps = series["q_minus_return"]
    summary = {
        "task": args["env_id"].removeprefix("MinAtar/"),
        "algorithm": label(args),
        "seed": args["seed"],
        "steps": int(steps[-1]) + 1,
        "budget": total,
        "random": mean(returns[warm_up]),
        "score": mean(np.sort(returns)[-10:]),
        "last_return": mean(returns[last_tenth]),
        "q_minus_return": mean(gaps[gap_steps >= 0.9 * total]),
        "alpha": float(series["alpha"][1][-1]),
        "evaluation": float(scalars["eval/episodic_return"][1][-1]) if "eval/episodic_return" in scalars else math.nan,
        "hours": float(scalars["charts/hours"][1][-1]) if "charts/hours" in scalars else math.nan,
    }
    curves = {"step": (np.arange(1, POINTS + 1) * total / POINTS).tolist()}
    for quantity, (steps, values) in series.items():
        place = np.minimum(steps * POINTS // total, POINTS - 1)
        count = np.bincount(place, minlength=POINTS)
        with np.errstate(invalid="ignore"):
            curves[quantity] = (np.bincount(place, values, minlength=POINTS) / count).tolist()
    return Run(name, problem, summary, curves, settings_of(args))


def settings_of(args: dict) -> dict:
    """The arguments that make runs of one task and algorithm seeds of one experiment. Of a reference it is the name
    without its digits: each seed may have one of its own."""
    args, unused = {"env_kwargs": [], **args}, set()  # as of a run older than the flag
    if not (args.get("bias") and args.get("beta")):
        unused.add("beta")
        args |= {"bias": False} if "bias" in args else {}  # has two spellings
    if args.get("anneal") is False:
        unused |= {"p_start", "p_end", "anneal_timesteps"}
    elif args.get("anneal") and args.get("autotune"):
        unused |= {"target_entropy", "target_entropy_scale"}
    if args.get("reference"):
        args["reference"] = re.sub(r"\d", "", str(args["reference"]))
    return {k: v for k, v in args.items() if k not in FREE | unused}


def label(args: dict) -> str:
    """SAC, KLAC, KLAC-a, KLAC-b or KLAC-ab by the run's arguments: with beta 0 there is no bias, whatever the flag.
    With an earlier run as q, that and `+ reference`; of another script or --exp-name, that and its name: a fork."""
    without_bias = {"KLAC": "KLAC-b", "KLAC-a": "KLAC-ab"} if args.get("beta") == 0 else {}
    name = without_bias.get(args["algorithm"], args["algorithm"])
    name += " + reference" if args.get("reference") else ""
    return name if args.get("exp_name", SCRIPTS[0]) in SCRIPTS else f"{name} ({args['exp_name']})"


def mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else math.nan


def read_run(run_dir: Path) -> Run:
    """One run from its folder. What is wrong with it is said in `problem`; with no summary it cannot be used at all."""
    try:
        args = read_args(run_dir)
        scalars, sound = read_scalars(run_dir)
        finished, problem = (run_dir / "actor.pt").exists(), None
        evaluations, _ = scalars.get("eval/episodic_return", ([-1], []))
        sound &= not finished or evaluations[-1] == args["total_timesteps"]  # which a finished run logs last
        if missing := [tag for tag in QUANTITIES.values() if tag not in scalars]:
            return Run(run_dir.name, f"{'too short' if sound else 'damaged'}: it has not logged {missing[0]} yet")
        place = f"step {scalars['charts/episodic_return'][0][-1]} of {args['total_timesteps']}"
        if not sound:
            problem = f"damaged after {place}"
        elif not finished:
            problem = f"unfinished, at {place}"
        return summarise(run_dir.name, args, scalars, problem)
    except Exception as error:  # of the file system or pandas, which raise another one for each damage
        return Run(run_dir.name, f"cannot be read: {error}")


def read_cached(task: tuple[Path, Path]) -> Run:
    """`read_run`, or what it found the last time if no file of the run has changed since."""
    run_dir, cache = task
    files = [run_dir / name for name in ("actor.pt", "args.json", "scalars.csv")]
    try:
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    except OSError as error:
        return Run(run_dir.name, f"cannot be read: {error}")
    key = hashlib.sha256(repr((VERSION, POINTS, str(run_dir.resolve()), stats)).encode()).hexdigest()
    path = cache / f"{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:24]}.json"
    try:
        stored = json.loads(path.read_text())
        if stored.pop("key") == key:
            return Run(**stored)
    except (OSError, ValueError, KeyError):
        pass  # no cache, or not a whole one
    run = read_run(run_dir)
    if run.summary is None:  # the reason may pass, and no file says so
        return run
    partial = path.with_suffix(f".{multiprocessing.current_process().pid}")
    try:
        partial.write_text(json.dumps({"key": key, **vars(run)}))
        partial.replace(path)
    except OSError:  # a full disk, or a folder that is another's: it is read anew the next time
        with suppress(OSError):
            partial.unlink()
    return run


def read_folders(run_dirs: list[Path], cache: Path = Path(".cache/plotting")) -> list[Run]:
    """Reads the runs with a process a core and a progress bar; the second time from `cache`, where nothing changed."""
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    tasks = [(run_dir, cache) for run_dir in run_dirs]
    with multiprocessing.Pool() as pool:
        return list(tqdm(pool.imap(read_cached, tasks), total=len(tasks), unit="run", disable=None, desc="reading"))


def read_wandb(project: str) -> list[Run]:
    """The runs of a W&B project, `entity/project`. Raises ValueError if it cannot be read."""
    import wandb

    try:
        found = []
        for run in tqdm(wandb.Api().runs(project), unit="run", disable=None, desc="reading"):
            history, scalars = pd.DataFrame(run.scan_history()), {}
            for tag in (*QUANTITIES.values(), "eval/episodic_return", "charts/hours"):
                if tag in history:
                    rows = (
                        history[history[tag].notna()]
                        .drop_duplicates("global_step", keep="last")
                        .sort_values("global_step")
                    )
                    scalars[tag] = (rows["global_step"].to_numpy(np.int64), rows[tag].to_numpy(np.float32))
            problem = None if run.state == "finished" else f"{run.state} in W&B"
            try:
                ends, lengths = scalars["charts/episodic_length"]
                evaluations, _ = scalars.get("eval/episodic_return", ([-1], []))
                if ends[0] + 1 != lengths[0] or evaluations[-1] != run.config["total_timesteps"]:
                    problem = problem or "not whole in W&B"  # tracked from a resume on, or synced in part
                found.append(summarise(run.name, dict(run.config), scalars, problem))
            except KeyError as error:
                found.append(Run(run.name, f"has not logged {error.args[0]}"))
        return found
    except Exception as error:  # of the network, of the login or of the name: W&B raises many
        raise ValueError(f"--wandb {project}: {error}") from error


def tables(runs: list[Run], unfinished: bool, where=()) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The summary (a row a run) and the curves (POINTS rows a run) of the runs that belong together: each `where`,
    KEY=VALUE, is true of those that have the setting, and of runs that differ the largest set of each task is taken.
    Each run that is left out is said by name, with the reason. Raises ValueError if none is left."""
    known = set().union(*(run.settings or {} for run in runs))
    for condition in where:
        if condition.partition("=")[0] not in known:
            raise ValueError(f"--where {condition}: no run has such a setting; there are {', '.join(sorted(known))}")
    chosen = []
    for run in sorted(runs, key=lambda run: run.problem is not None):  # of two, the finished one is used
        if run.problem and (run.summary is None or not unfinished):
            print(f"left out: {run.name}: {run.problem}")
        elif other := [w for w in where if w.partition("=")[0] in run.settings and not holds(w, run.settings)]:
            print(f"left out: {run.name}: not --where {other[0]}")
        else:
            chosen.append(run)
            if run.problem:
                print(f"used as far as it goes: {run.name}: {run.problem}")
    used = {}
    for task in dict.fromkeys(run.summary["task"] for run in chosen):
        here = [run for run in chosen if run.summary["task"] == task]
        # Algorithms differ in flags of their own; what they share must be the same on a task
        names = [run.settings.keys() - KLACS_OWN for run in here]
        here = largest_set(here, set.intersection(*names))
        for name in sorted(set.union(*names) - set.intersection(*names)):  # not of SAC-V, say, but of the others
            having = [run for run in here if name in run.settings]
            if len({run.summary["algorithm"] for run in having}) > 1:
                alike = largest_set(having, {name})
                here = [run for run in here if name not in run.settings or run in alike]
        for algorithm in dict.fromkeys(run.summary["algorithm"] for run in here):
            of_it = [run for run in here if run.summary["algorithm"] == algorithm]
            for run in largest_set(of_it, set().union(*(run.settings for run in of_it))):
                first = used.setdefault((task, algorithm, run.summary["seed"]), run)
                if first is not run:
                    print(f"left out: {run.name}: the same task, algorithm and seed as {first.name}")
    if not used:
        raise ValueError("no run is left to draw")
    note_differences(used)
    ordered = [used[key] for key in sorted(used)]
    summary = pd.DataFrame([run.summary for run in ordered])
    labels = ["task", "algorithm", "seed"]
    curves = pd.concat([pd.DataFrame({**{k: r.summary[k] for k in labels}, **r.curves}) for r in ordered])
    return summary, curves.reset_index(drop=True)


def note_differences(used: dict) -> None:
    """Says which settings differ between the tasks and algorithms of the runs, {(task, algorithm, seed): run}, that are
    drawn side by side or pooled: those of discrete and of continuous actions by themselves."""
    for discrete in (True, False):
        runs = {key: run for key, run in used.items() if ("update_frequency" in run.settings) == discrete}
        settings = set().union(*(run.settings for run in runs.values()))
        for name in sorted(settings - {"bias", "anneal", "reference", "env_kwargs"}):
            places, values = defaultdict(set), {}
            for (task, algorithm, _), run in runs.items():
                if name in run.settings:
                    # What a task may need its own of is compared within it
                    of_a_task = name in ("exploit_radius", "p_start", "target_entropy")
                    value = task if of_a_task else "", comparable(run.settings[name])
                    values[value] = run.settings[name]
                    places[value].add(f"{algorithm} on {task}")
            for of in sorted({of for of, _ in places}):
                here = [value for value in places if value[0] == of]
                common, *others = sorted(here, key=lambda value: (-len(places[value]), value))
                for value in others:
                    where = ", ".join(sorted(places[value]))
                    print(f"note: {name} is {values[value]} for {where}, and {values[common]} elsewhere")


def holds(condition: str, settings: dict) -> bool:
    """Whether "KEY=VALUE" is true of the settings: beta=0.1 is of 0.1 and 1e-1, bias=False of false."""
    key, _, value = condition.partition("=")
    if key == "reference":  # without its digits
        value = settings_of({key: value})[key]
    try:
        return float(value) == float(settings[key])
    except (TypeError, ValueError):
        return value.lower() == str(settings[key]).lower()


def comparable(value) -> str:
    """The setting in words that are equal for 1 and 1.0, and not for 1 and true."""
    return repr(float(value) if type(value) is int else value)


def largest_set(runs: list[Run], keys: set[str]) -> list[Run]:
    """The most algorithms and seeds that agree in these settings (of sets as large, that of the longest runs)."""
    sets = {}
    for run in runs:
        sets.setdefault(str([comparable(run.settings.get(key)) for key in sorted(keys)]), []).append(run)

    def size(alike: list[Run]) -> tuple[int, int]:
        return len({(run.summary["algorithm"], run.summary["seed"]) for run in alike}), alike[0].summary["budget"]

    taken = max(sets.values(), key=size)
    for run in runs:
        if run not in taken:
            ours, theirs = run.settings, taken[0].settings
            differing = [key for key in sorted(keys) if comparable(ours.get(key)) != comparable(theirs.get(key))]
            words = ", ".join(f"{key} {ours.get(key)}, not {theirs.get(key)}" for key in differing)
            condition = shlex.quote(f"{differing[0]}={ours.get(differing[0])}")
            print(f"left out: {run.name}: {words} (--where {condition} draws such runs)")
    return taken


def check_own(out: Path, column: str) -> None:
    """Raises ValueError if the tables in `out` are another command's, by this column of its summary.csv."""
    path = out / "summary.csv"
    if path.exists() and column not in path.read_text().partition("\n")[0].split(","):
        raise ValueError(f"--out {out}: must be another folder: its tables are another command's")


def add_kept(summary: pd.DataFrame, curves: pd.DataFrame, out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The two tables and the rows of `out`'s own, but for runs that both have. Raises ValueError where the budgets of a
    task differ, which is the only setting that the tables hold, and OSError if there are none; says what is pooled."""
    labels, both = ["task", "algorithm", "seed"], []
    for name, new in (("summary.csv", summary), ("curves.csv", curves)):
        kept = pd.read_csv(out / name)
        kept = kept[~pd.MultiIndex.from_frame(kept[labels]).isin(pd.MultiIndex.from_frame(new[labels]))]
        both.append(pd.concat([kept, new]).sort_values(labels, kind="stable"))
    summaries = both[0].groupby(["task", "algorithm"])["seed"]
    for place, seeds in summary.groupby(["task", "algorithm"])["seed"]:
        if earlier := sorted(set(summaries.get_group(place)) - set(seeds)):
            words = f"seeds {', '.join(map(str, earlier))} of {out} with {', '.join(map(str, seeds))}"
            print(f"note: {place[1]} on {place[0]} pools {words}; of their settings only the budget was compared")
    budgets = both[0].groupby("task")["budget"].unique()
    for task, steps in budgets[budgets.map(len) > 1].items():
        raise ValueError(f"--keep: {out} has runs of {task} of {steps[0]} steps, and those given have {steps[1]}")
    return both[0], both[1]


def write_tables(out: Path, summary: pd.DataFrame, curves: pd.DataFrame, formats: tuple[str, str]) -> None:
    """Writes summary.csv and curves.csv, both or none: what --keep has kept may be nowhere else."""
    files = {out / "partial-summary.csv": (summary, formats[0]), out / "partial-curves.csv": (curves, formats[1])}
    try:
        for partial, (table, float_format) in files.items():
            table.to_csv(partial, index=False, float_format=float_format)
        for partial in files:
            partial.replace(out / partial.name.removeprefix("partial-"))
    finally:
        for partial in files:
            partial.unlink(missing_ok=True)


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown, numbers to three digits."""
    rows = [list(table.columns), ["-"] * len(table.columns)]
    rows += [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
