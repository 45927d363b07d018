"""Reads runs, from their folders or from W&B, into two tidy tables: a row a run, and a row a point of its curves.

TensorBoard's own reader took ten times as long on a run of 73,000 events, and a 3M-step run has more: this one finds
the records of a file first and then decodes all records of one layout at once. Its tests compare it with TensorBoard's.
"""

import hashlib
import json
import math
import multiprocessing
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
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
FREE |= {"log_interval", "torch_deterministic", "reference"}  # the label says whether there is a reference
KLACS_OWN = {"bias", "beta", "anneal", "p_start", "p_end", "anneal_timesteps"}
VERSION = 2  # of what is cached


CRC_TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    CRC_TABLE = np.where(CRC_TABLE & 1, (CRC_TABLE >> 1) ^ np.uint32(0x82F63B78), CRC_TABLE >> 1)


@dataclass
class Run:
    """A run, or why there is none: `summary` (a row) and `curves` (POINTS rows) are empty if `problem` is fatal."""

    name: str
    problem: str | None = None
    summary: dict | None = None
    curves: dict | None = None
    settings: dict | None = None


def checksums(rows: np.ndarray) -> np.ndarray:
    """The masked CRC-32C, as TensorFlow's record files have it, of each row of bytes: (n, length) to (n,)."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in np.ascontiguousarray(rows.T):
        crc = CRC_TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
    crc = ~crc
    return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)


def read_events(path: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], int | None, bool]:
    """The scalars of one event file, {tag: (steps, values, wall times)}, in the order written; the step from which the
    file takes back what earlier files of the run hold (None if from none); and whether the file is sound to its end."""
    data = np.frombuffer(path.read_bytes(), np.uint8)
    view, position, end, starts = data.tobytes(), 0, len(data), []
    while position + 16 <= end:  # a record: its length, 8 bytes, their checksum, 4, itself, its checksum, 4
        following = position + 16 + int.from_bytes(view[position : position + 8], "little")
        if following > end:
            break
        starts.append(position)
        position = following
    sound = position == end
    starts = np.array(starts, np.int64)
    lengths = np.diff(starts, append=position) - 16
    scalars, purge_step = defaultdict(list), None
    for length in np.unique(lengths):
        where = starts[lengths == length] + 12
        records = data[where[:, None] + np.arange(length)]  # (n, length)
        stored = np.ascontiguousarray(data[(where + length)[:, None] + np.arange(4)]).view("<u4").ravel()
        if (damaged := checksums(records) != stored).any():
            end, sound = min(end, where[damaged][0]), False
        decoded = np.zeros(len(records), bool)
        for digits in range(1, 10):  # bytes of the step, seven bits each, the lowest first
            tag_length = length - (9 + 1 + digits + 6 + 5)
            if tag_length < 1 or tag_length > 100:
                continue
            layout = {0: 0x09, 9: 0x10, 10 + digits: 0x2A, 11 + digits: length - 12 - digits, 12 + digits: 0x0A}
            layout |= {13 + digits: length - 14 - digits, 14 + digits: 0x0A, 15 + digits: tag_length, -5: 0x15}
            fits = np.all([records[:, column] == value for column, value in layout.items()], axis=0)
            step_bytes = records[:, 10 : 10 + digits]
            fits &= (step_bytes[:, :-1] >= 128).all(axis=1) & (step_bytes[:, -1] < 128) & ~decoded
            if not fits.any():
                continue
            decoded |= fits
            chosen = records[fits]
            steps = ((chosen[:, 10 : 10 + digits] & 127).astype(np.int64) << (7 * np.arange(digits))).sum(axis=1)
            times = np.ascontiguousarray(chosen[:, 1:9]).view("<f8").ravel()
            values = np.ascontiguousarray(chosen[:, -4:]).view("<f4").ravel()
            tags = np.ascontiguousarray(chosen[:, 16 + digits : -5]).view(f"S{tag_length}").ravel()
            for tag in np.unique(tags):
                mine = tags == tag
                order = where[fits][mine]
                scalars[tag.decode(errors="replace")].append((order, steps[mine], values[mine], times[mine]))
        for start in where[~decoded]:
            try:
                event = Event.FromString(view[start : start + length])
            except Exception:  # protobuf raises its own DecodeError: the record, and all after it, is not to be trusted
                end, sound = min(end, start), False
                break
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                purge_step = event.step
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    row = (np.array([x]) for x in (start, event.step, np.float32(value.simple_value), event.wall_time))
                    scalars[value.tag].append(tuple(row))
    return truncated(scalars, end), purge_step, sound


def truncated(scalars: dict, end: int) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Joins the parts of each tag in the order of their places in the file, those before byte `end`."""
    joined = {}
    for tag, parts in scalars.items():
        places, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(places)
        joined[tag] = tuple(column[order[places[order] < end]] for column in columns)
    return joined


def read_scalars(run_dir: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], bool]:
    """All scalars of a run, {tag: (steps, values, wall times)}, without what a resumed run took back; and soundness.
    A file that a kill cut short is sound: the run went on from a checkpoint in the next one."""
    scalars, files = {}, sorted(run_dir.glob("events.out.tfevents.*"))
    sound = True
    for file in files:
        new, purge_step, sound = read_events(file)
        if purge_step is not None:
            scalars = {tag: tuple(x[part[0] < purge_step] for x in part) for tag, part in scalars.items()}
        for tag, part in new.items():
            earlier = scalars.get(tag)
            scalars[tag] = tuple(map(np.concatenate, zip(earlier, part, strict=True))) if earlier else part
    return {tag: part for tag, part in scalars.items() if len(part[0])}, sound


def summarise(name: str, args: dict, scalars: dict, problem: str | None) -> Run:
    """A run's row and its curves. `score` is the mean of the 10 best training episodes, `random` that of the warm-up's.

    Raises KeyError if a quantity was never logged.
    """
    total = args["total_timesteps"]
    series = {quantity: scalars[tag] for quantity, tag in QUANTITIES.items()}
    steps, returns, times = series["return"]
    last_tenth, warm_up = steps >= 0.9 * total, steps < args["learning_starts"]
    gap_steps, gaps, _ = series["q_minus_return"]
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
        "hours": float(times[-1] - times[0]) / 3600,
    }
    curves = {"step": (np.arange(1, POINTS + 1) * total / POINTS).tolist()}
    for quantity, (steps, values, _) in series.items():
        place = np.minimum(steps * POINTS // total, POINTS - 1)
        count = np.bincount(place, minlength=POINTS)
        with np.errstate(invalid="ignore"):
            curves[quantity] = (np.bincount(place, values, minlength=POINTS) / count).tolist()
    return Run(name, problem, summary, curves, settings_of(args))


def settings_of(args: dict) -> dict:
    """The arguments that make runs of one task and algorithm seeds of one experiment."""
    without_bias = not (args.get("bias") and args["beta"])  # has two spellings
    return {k: v for k, v in args.items() if k not in FREE and not (without_bias and k in ("bias", "beta"))}


def label(args: dict) -> str:
    """SAC, KLAC, KLAC-a, KLAC-b or KLAC-ab by the run's arguments: with beta 0 there is no bias, whatever the flag.
    With an earlier run as q, that and `+ reference`."""
    without_bias = {"KLAC": "KLAC-b", "KLAC-a": "KLAC-ab"} if args.get("beta") == 0 else {}
    name = without_bias.get(args["algorithm"], args["algorithm"])
    return f"{name} + reference" if args.get("reference") else name


def mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else math.nan


def read_run(run_dir: Path) -> Run:
    """One run from its folder. What is wrong with it is said in `problem`; with no summary it cannot be used at all."""
    try:
        args = json.loads((run_dir / "args.json").read_text())
        scalars, sound = read_scalars(run_dir)
        steps = scalars["charts/episodic_return"][0]
        problem = None
        if not sound and (run_dir / "actor.pt").exists():
            problem = f"damaged after step {steps[-1]} of {args['total_timesteps']}"
        elif not (run_dir / "actor.pt").exists():
            problem = f"unfinished, at step {steps[-1]} of {args['total_timesteps']}"
        return summarise(run_dir.name, args, scalars, problem)
    except OSError as error:
        return Run(run_dir.name, f"cannot be read: {error.strerror}: {error.filename}")
    except ValueError:
        return Run(run_dir.name, "args.json is damaged")
    except KeyError as error:
        return Run(run_dir.name, f"too short: it has not logged {error.args[0]} yet")


def read_cached(task: tuple[Path, Path]) -> Run:
    """`read_run`, or what it found the last time if no file of the run has changed since."""
    run_dir, cache = task
    files = [*run_dir.glob("events.out.tfevents.*"), run_dir / "args.json", run_dir / "actor.pt"]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files) if file.exists()]
    key = hashlib.sha256(repr((VERSION, POINTS, str(run_dir.resolve()), stats)).encode()).hexdigest()
    path = cache / f"{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:24]}.json"
    try:
        stored = json.loads(path.read_text())
        if stored.pop("key") == key:
            return Run(**stored)
    except (OSError, ValueError, KeyError):
        pass  # no cache, or not a whole one
    run = read_run(run_dir)
    partial = path.with_suffix(f".{multiprocessing.current_process().pid}")
    partial.write_text(json.dumps({"key": key, **vars(run)}))
    partial.replace(path)
    return run


def read_folders(run_dirs: list[Path], cache: Path = Path(".cache/plotting")) -> list[Run]:
    """Reads the runs with a process a core and a progress bar; the second time from `cache`, where nothing changed."""
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
            history = pd.DataFrame(run.scan_history())
            scalars = {}
            for tag in (*QUANTITIES.values(), "eval/episodic_return"):
                if tag in history:
                    rows = (
                        history[history[tag].notna()]
                        .drop_duplicates("global_step", keep="last")
                        .sort_values("global_step")
                    )
                    columns = (rows["global_step"].to_numpy(np.int64), rows[tag].to_numpy(np.float32))
                    scalars[tag] = (*columns, rows["_timestamp"].to_numpy(float))
            problem = None if run.state == "finished" else f"{run.state} in W&B"
            try:
                found.append(summarise(run.name, dict(run.config), scalars, problem))
            except KeyError as error:
                found.append(Run(run.name, f"has not logged {error.args[0]}"))
        return found
    except Exception as error:  # of the network, of the login or of the name: W&B raises many
        raise ValueError(f"--wandb {project}: {error}") from error


def tables(runs: list[Run], unfinished: bool, say=print) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The summary (a row a run) and the curves (POINTS rows a run) of the runs that can be used. Each other one is said
    by name. Raises ValueError if none is left, or if runs are not to be compared."""
    used, settings, tasks = {}, {}, {}
    for run in sorted(runs, key=lambda run: run.problem is not None):  # of two, the finished one is used
        if run.problem and (run.summary is None or not unfinished):
            say(f"left out: {run.name}: {run.problem}")
            continue
        if run.problem:
            say(f"used as far as it goes: {run.name}: {run.problem}")
        task, algorithm, seed = (run.summary[column] for column in ("task", "algorithm", "seed"))
        if (task, algorithm, seed) in used:
            say(f"left out: {run.name}: the same task, algorithm and seed as {used[task, algorithm, seed].name}")
            continue
        first = settings.setdefault((task, algorithm), run)
        if different := [key for key, value in first.settings.items() if run.settings.get(key) != value]:
            raise ValueError(f"{run.name} is another experiment than {first.name}: {', '.join(different)} differ")
        # Algorithms differ in flags of their own; what they share must be the same on a task
        other = tasks.setdefault(task, run)
        common = (run.settings.keys() & other.settings.keys()) - KLACS_OWN
        if different := sorted(key for key in common if run.settings[key] != other.settings[key]):
            raise ValueError(f"{run.name} is not to be compared with {other.name}: {', '.join(different)} differ")
        used[task, algorithm, seed] = run
    if not used:
        raise ValueError("no run is left to draw")
    ordered = [used[key] for key in sorted(used)]
    summary = pd.DataFrame([run.summary for run in ordered])
    labels = ["task", "algorithm", "seed"]
    curves = pd.concat([pd.DataFrame({**{k: r.summary[k] for k in labels}, **r.curves}) for r in ordered])
    return summary, curves.reset_index(drop=True)


def add_kept(summary: pd.DataFrame, curves: pd.DataFrame, out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The two tables and the rows of `out`'s own, but for runs that both have. Raises ValueError where the budgets of a
    task differ, which is the only setting that the tables hold, and OSError if there are none."""
    labels, both = ["task", "algorithm", "seed"], []
    for name, new in (("summary.csv", summary), ("curves.csv", curves)):
        kept = pd.read_csv(out / name)
        kept = kept[~pd.MultiIndex.from_frame(kept[labels]).isin(pd.MultiIndex.from_frame(new[labels]))]
        both.append(pd.concat([kept, new]).sort_values(labels, kind="stable"))
    budgets = both[0].groupby("task")["budget"].unique()
    for task, steps in budgets[budgets.map(len) > 1].items():
        raise ValueError(f"--keep: {out} has runs of {task} of {steps[0]} steps, and those given have {steps[1]}")
    return both[0], both[1]


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown, numbers to three digits."""
    rows = [list(table.columns), ["-"] * len(table.columns)]
    rows += [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
