"""Environment steps a second of each training script and of its peers, on this machine, and where the time goes.

    python -m benchmark.throughput --out results/throughput
    python -m benchmark.throughput --against 37b34a3        the scripts of that revision in turn with these

Each contestant runs in a process of its own, as a user runs it: default flags, one environment. It pauses after each
window of steps until its next turn (A B C A B C ...): a machine whose speed drifts does so for all alike, and no two
are measured at once. A contestant is pinned to as many cores as it has threads; `2x1` is two processes of one thread
each on a core of its own. Figures are medians over windows of steps that learn.

Peers: Stable-Baselines3 and SBX (JAX), where installed (`pip install -e ".[benchmark]"`); for discrete actions,
where neither has SAC, plain_sac_discrete.py, the loop as one would first write it. The floor is an update's 17 matrix
products of 256 x 256 x 256 alone, with PyTorch's BLAS.
"""

import argparse
import csv
import importlib
import importlib.util
import json
import linecache
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("stable_baselines3", "sbx", f"{__package__}.plain_sac_discrete")
CONTESTANTS = {
    "HalfCheetah-v5": ("sac_continuous", "klac_continuous", "stable_baselines3", "sbx"),
    "Seaquest-v1": ("sac_discrete", "klac_discrete", PEERS[2]),
}
WARM_UP = 100  # steps at random, and then as many with updates, before the first window


def sampler(split: Counter):
    """A signal handler that adds the seconds since the last one to the line of `train` that they were spent in."""
    last = time.perf_counter()

    def handle(_, frame):
        nonlocal last
        while frame and frame.f_code.co_name != "train":
            frame = frame.f_back
        now = time.perf_counter()
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0).strip() if frame else "elsewhere"
        split[line] += now - last
        last = now

    return handle


def contest(contestant: str, env_id: str, window: int, full_buffer: bool) -> None:
    """Runs one contestant. Each line on stdin is a turn, answered by a line of JSON; ends where stdin does."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import gymnasium as gym

    split = Counter()

    class Turns(gym.Wrapper):
        steps, start = -2 * WARM_UP, None

        def step(self, action):
            if self.steps >= 0 and self.steps % window == 0:
                seconds = time.perf_counter() - (self.start or 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
                print(json.dumps({"seconds": seconds, "gib": peak, "split": split}), file=answers, flush=True)
                turn = sys.stdin.readline()
                if not turn:
                    os._exit(0)
                if turn == "split\n":
                    signal.signal(signal.SIGALRM, sampler(split))
                    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
                self.start = time.perf_counter()
            self.steps += 1
            return self.env.step(action)

    module = importlib.import_module(contestant)
    if contestant in PEERS[:2]:
        env = Turns(gym.make(env_id))
        module.SAC("MlpPolicy", env, learning_starts=WARM_UP, seed=1, device="auto").learn(10**9)
    if full_buffer:

        class FullBuffer(module.ReplayBuffer):
            def __init__(self, *args):
                super().__init__(*args)
                for column in self.columns:
                    column.fill(1)  # touches every page
                self.added = self.capacity

        module.ReplayBuffer = FullBuffer
    make_env = module.make_env
    module.make_env = lambda *args: Turns(make_env(*args))
    module.train(module.Args(env_id=env_id, total_timesteps=10**9, learning_starts=WARM_UP))


class Contestant:
    """A process that runs `contest`, on `cores` of the machine with a thread for each."""

    def __init__(self, name: str, env_id: str, cores: list[int], window: int, full_buffer: bool = False):
        self.name, self.window, self.rates, self.folder = name, window, [], tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", f"{__package__}.throughput", "--contest", name, env_id, str(window)]
        paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
        threads = {"OMP_NUM_THREADS": str(len(cores)), "PYTHONPATH": paths}
        self.process = subprocess.Popen(
            command + ["--full-buffer"] * full_buffer, cwd=self.folder.name, env=os.environ | threads, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: hasattr(os, "sched_setaffinity") and os.sched_setaffinity(0, cores),
        )  # fmt: skip
        self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"throughput.py: {self.name} failed: {self.process.communicate()[1]}")
        return json.loads(line)

    def go(self, turn: str = "go") -> None:
        print(turn, file=self.process.stdin, flush=True)

    def close(self) -> None:
        self.process.communicate()
        self.folder.cleanup()


def floor(threads: int) -> float:
    """Seconds of 17 products of 256 x 256 x 256 in PyTorch's BLAS: the median of 50."""
    import torch

    torch.set_num_threads(threads)
    x, w, seconds = torch.randn(256, 256), torch.randn(256, 256), []
    with torch.inference_mode():
        for _ in range(50):
            start = time.perf_counter()
            for _ in range(17):
                torch.nn.functional.linear(x, w)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def renamed(name: str, revision: str) -> str:
    """The module's name for a script of a revision."""
    return re.sub(r"\W", "_", f"{name}_{revision}")


def old_scripts(revision: str) -> tempfile.TemporaryDirectory:
    """A folder with the training scripts of a revision, under names of their own; exits if there is none."""
    folder = tempfile.TemporaryDirectory()
    for names in CONTESTANTS.values():
        for name in names:
            if name not in PEERS:
                shown = subprocess.run(
                    ["git", "show", f"{revision}:{name}.py"], cwd=ROOT, capture_output=True, check=False
                )
                if shown.returncode:
                    print(f"throughput.py: --against {revision}: {shown.stderr.decode().strip()}", file=sys.stderr)
                    sys.exit(2)
                Path(folder.name, f"{renamed(name, revision)}.py").write_bytes(shown.stdout)
    return folder


def write(out: Path | None, name: str, rows: list[dict]) -> None:
    """Writes what a table holds so far: a measurement that is stopped keeps what it has found."""
    if out is None:
        return
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def measure(env_id: str, cores: list[int], processes: int, args: argparse.Namespace) -> list[dict]:
    """One row for each contestant: its rates over the windows, summed over its processes."""
    names = [name for name in CONTESTANTS[env_id] if importlib.util.find_spec(name)]
    if args.against:
        names += [renamed(name, args.against) for name in names if name not in PEERS]
    places = [cores] if processes == 1 else [[core] for core in cores[:processes]]
    window = args.window if env_id == "HalfCheetah-v5" else 4 * args.window
    teams = [[Contestant(name, env_id, place, window) for place in places] for name in names]
    for _ in range(args.windows):
        for team in teams:
            for contestant in team:
                contestant.go()
            for contestant in team:
                contestant.rates.append(window / contestant.answer()["seconds"])
    rows, setting, totals = [], f"{processes}x{len(places[0])}", []
    for name, team in zip(names, teams, strict=True):
        rates = [sum(rates) for rates in zip(*(contestant.rates for contestant in team), strict=True)]
        totals.append(rates)
        ratio = statistics.median(a / b for a, b in zip(totals[0], rates, strict=True))
        row = {"task": env_id, "contestant": name, "setting": setting, "steps_per_second": statistics.median(rates)}
        row |= {"min": min(rates), "max": max(rates), "ratio": ratio, "windows": len(rates), "window_steps": window}
        print(f"{env_id:15} {name:28} {setting} {row['steps_per_second']:6.0f} steps/s; {names[0]} / it: {ratio:.2f}")
        rows.append(row)
    for team in teams:
        for contestant in team:
            contestant.close()
    return rows


def split(env_id: str, name: str, core: int, args: argparse.Namespace) -> list[dict]:
    """Milliseconds a step of each line of a script's `train`, sampled every millisecond (one thread)."""
    window = args.window * (1 if env_id == "HalfCheetah-v5" else 4)
    contestant = Contestant(name, env_id, [core], window)
    for _ in range(2):
        contestant.go("split")
        answer = contestant.answer()
    contestant.close()
    rows = [
        {"task": env_id, "contestant": name, "section": s, "ms": 1e3 * t / 2 / window}
        for s, t in answer["split"].items()
    ]
    for row in sorted(rows, key=lambda row: -row["ms"])[:12]:
        print(f"{env_id:15} {name:16} {row['ms']:7.3f} ms a step: {row['section']}", flush=True)
    return rows


def memory(env_id: str, name: str, core: int, args: argparse.Namespace) -> list[dict]:
    """Peak resident memory of a script with a full buffer, after the first window of steps and after the last."""
    contestant, peaks = Contestant(name, env_id, [core], args.window, full_buffer=True), []
    for _ in range(max(2, args.windows)):
        contestant.go()
        peaks.append(contestant.answer()["gib"])
    contestant.close()
    print(
        f"{env_id:15} {name:30} peak {peaks[0]:.2f} GiB, {peaks[-1]:.2f} GiB {len(peaks) - 1} windows later", flush=True
    )
    return [{"task": env_id, "contestant": name, "first_gib": peaks[0], "last_gib": peaks[-1], "windows": len(peaks)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the tables, as CSV")
    parser.add_argument("--windows", type=int, default=9, help="windows of each contestant (default: 9)")
    parser.add_argument(
        "--window", type=int, default=400, help="steps of a window, four times as many on MinAtar (default: 400)"
    )
    parser.add_argument("--tasks", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--only", nargs="+", choices=("rates", "split", "memory"), default=("rates", "split", "memory"))
    parser.add_argument("--against", metavar="REVISION", help="measure the scripts of this revision, too")
    parser.add_argument("--contest", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--full-buffer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contest:
        contestant, env_id, window = args.contest
        return contest(contestant, env_id, int(window), args.full_buffer)
    if args.windows < 1 or args.window < 1:
        parser.error(f"--windows {args.windows} --window {args.window}: must be positive")
    for task in args.tasks:
        for name in CONTESTANTS[task]:
            if name not in PEERS and not importlib.util.find_spec(name):
                parser.error(f"{name}.py: must be in the current folder")
    if args.out:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {args.out}: must be a writable folder: {error}")
    if args.against:
        folder = old_scripts(args.against)
        os.environ["PYTHONPATH"] = os.pathsep.join([folder.name, os.environ.get("PYTHONPATH", "")])  # of contestants
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))
    for peer in PEERS:
        if not importlib.util.find_spec(peer):
            print(f"{peer} is not installed and left out: pip install -e '.[benchmark]'")

    if "rates" in args.only:
        rates = []
        settings = [(cores[:1], 1), *([(cores[:2], 1), (cores[:2], 2)] if len(cores) > 1 else [])]
        for env_id in args.tasks:
            for used, processes in settings:
                rates += measure(env_id, used, processes, args)
                write(args.out, "rates", rates)
        for threads in range(1, min(2, len(cores)) + 1):
            rate = 1 / floor(threads)
            print(f"floor: 17 products, {threads} threads: {rate:.0f} a second")
            row = {"task": "floor", "contestant": "BLAS", "setting": f"1x{threads}", "steps_per_second": rate}
            rates.append(row)
            write(args.out, "rates", rates)
    own = [(env_id, name) for env_id in args.tasks for name in CONTESTANTS[env_id] if name not in PEERS]
    if "split" in args.only:
        splits = []
        for env_id, name in own:
            splits += split(env_id, name, cores[0], args)
            write(args.out, "split", splits)
    if "memory" in args.only:
        full, peaks = {"HalfCheetah-v5": "Humanoid-v5"}, []
        for env_id, name in own:
            peaks += memory(full.get(env_id, env_id), name, cores[0], args)
            write(args.out, "memory", peaks)


if __name__ == "__main__":
    main()
