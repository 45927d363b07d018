"""README.md and docs/: every block of code works, and every link leads somewhere."""

import importlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import tyro

import klac_discrete
from plotting.figures import MINATAR
from plotting.runs import label, read_args
from plotting.statistics import AGGREGATES, interval, normalise

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page, kind, block)
    for page in PAGES
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
]
# What CI runs from the README, what installs, and what needs a cluster or a second machine (test_slurm.py has both)
BEYOND = ("python3 -m venv", ". .venv/bin/activate", "pip install", "benchmark/run_", "wandb sweep")
LINES = [
    (page.name, line.split(" #")[0].strip())
    for page, kind, block in BLOCKS
    if kind != "python"
    for line in block.replace("\\\n", "").splitlines()
]
COMMANDS = [(page, line) for page, line in LINES if line and not line.startswith(BEYOND)]


def test_the_code_of_the_page_on_loading_runs(capsys):
    blocks = [block for page, kind, block in BLOCKS if page.name == "loading.md" and kind == "python"]
    assert len(blocks) == 2
    for script, env_id, name, block in (
        ("klac_discrete", "Breakout-v1", "breakout", blocks[0]),
        ("klac_continuous", "Pendulum-v1", "pendulum", blocks[1]),
    ):
        module = importlib.import_module(script)
        flags = {"total_timesteps": 450, "learning_starts": 100, "batch_size": 16, "eval_episodes": 1, "compile": False}
        module.train(module.Args(env_id=env_id, run_name=name, **flags))
        namespace = {}
        exec(block, namespace)
        env, action = namespace["env"], namespace.get("action", 0)
        assert env.action_space.contains(action)


def test_an_environment_of_ones_own_is_found_as_its_page_says(tmp_path):
    ((block, command),) = [
        (block, next(line for _, line in COMMANDS if "my_envs:" in line))
        for page, kind, block in BLOCKS
        if page.name == "environments.md" and kind == "python"
    ]
    (tmp_path / "my_envs.py").write_text(block)
    shutil.copy(ROOT / "klac_discrete.py", tmp_path)
    words = [sys.executable, *command.split()[1:], "--run-name", "it", "--no-compile", "--total-timesteps", "1200"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "KLAC-b on my_envs:Corridor-v0" in done.stdout


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}"[:80] for page, command in COMMANDS])
def test_every_command_has_flags_that_exist(page, command):
    """Runs what takes seconds, and parses the flags of what trains or draws."""
    words = shlex.split(command)
    if words[0].startswith("benchmark/"):
        target = words.index(">") if ">" in words else len(words)
        subprocess.run(words[:target], cwd=ROOT, check=True, capture_output=True)
        return
    assert words[0].endswith("python"), command
    module = words[2] if words[1] == "-m" else words[1].removesuffix(".py")
    flags = words[3:] if words[1] == "-m" else words[2:]
    flags = flags[: flags.index(">")] if ">" in flags else flags
    _, others = tyro.cli(importlib.import_module(module).Args, args=flags, return_unknown_args=True)
    if module == "benchmark.optuna_study":  # which hands them on
        tyro.cli(klac_discrete.Args, args=others)
    else:
        assert not others


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_index_lists_every_page():
    index = (ROOT / "docs/index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index


def test_a_fork_with_a_new_flag_of_its_networks_trains_resumes_and_is_evaluated(tmp_path):
    """As docs/forking.md says: the flag in Args, and make_networks hands it on."""
    source = (ROOT / "klac_discrete.py").read_text()
    for old, new in (
        (
            "    bias: bool = True\n",
            '    hidden: tuple[int, ...] = (128,)\n    """units"""\n    delay: int = 0\n    """steps"""\n'
            '    clip: float = math.inf\n    """bound"""\n    data: str | None = None\n    """file"""\n'
            "    bias: bool = True\n",
        ),
        (
            "(self, k: int, obs_shape: tuple[int, ...], n: int)",
            "(self, k: int, obs_shape: tuple[int, ...], n: int, hidden)",
        ),
        ("k, positions * units, 128)", "k, positions * units, hidden[0])"),
        ("k, 128, n)", "k, hidden[0], n)"),
        ("k, 1, 128)", "k, 1, hidden[0])"),
        ("Networks(1, shape, n), Networks(2, shape, n)", "(Networks(k, shape, n, args.hidden) for k in (1, 2))"),
    ):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (tmp_path / "klac_wide.py").write_text(source)
    begin = [sys.executable, "klac_wide.py"]
    short = ["--env-id", "CartPole-v1", "--total-timesteps", "400", "--learning-starts", "100", "--no-compile"]
    short += ["--run-name", "it", "--resume", "--hidden", "24", "--data", "a.csv", "--delay", "-1"]
    for flags in (short, short, ["--evaluate", "runs/it"]):  # the second time there is nothing left to do
        done = subprocess.run(begin + flags, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "runs/it/actor.pt", weights_only=True)["actor"]["w2"].shape[-1] == 24
    assert label(read_args(tmp_path / "runs/it")) == "KLAC (klac_wide)"


def test_what_r_means_is_the_action_boxes_own():
    page = (ROOT / "docs/algorithms.md").read_text()
    rows = re.findall(r"^\| ((?:\w+-v5(?:, )?)+) \| (\d+) \| ([\d.]+) \| (\d+)% \| ([\d.]+) \|$", page, re.M)
    assert len(rows) == 6
    for tasks, d, h, share, uniform in rows:
        for task in tasks.split(", "):
            box = gym.make(task).action_space
            assert (len(box.high), box.high[0]) == (int(d), pytest.approx(float(h)))
            assert (box.high == -box.low).all()
            assert (box.high == box.high[0]).all()
            assert 0.25 / float(h) * 100 == pytest.approx(int(share), abs=0.6)
            assert (0.25 / float(h)) ** int(d) == pytest.approx(float(uniform), rel=0.4)


def test_the_comparison_on_random_mdps_is_the_committed_one():
    gaps = pd.read_csv(ROOT / "results/tabular/bound.csv").pivot(index="seed", columns="algorithm", values="gap")
    more = gaps["KLAC"] - gaps["SAC"]
    words = f"larger than SAC's in {(more > 1e-6).sum()} and smaller in {(more < -1e-6).sum()}, by more than 1e-6"
    assert len(gaps) == 100
    assert words in (ROOT / "docs/theory.md").read_text()


def test_the_exercises_tables_are_the_committed_results():
    page = (ROOT / "docs/exercises.md").read_text()
    bandit = pd.read_csv(ROOT / "results/exercises/Bandit_alphas.csv").set_index(["algorithm", "alpha"])
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert len(rows) == 4
    for alpha, *cells in rows:
        for algorithm in ("SAC", "KLAC"):
            exact = bandit.loc[(algorithm, float(alpha)), ["pi_0", "pi_1", "return"]]
            assert [f"{x:.3f}" for x in exact] == cells
    taxi = pd.read_csv(ROOT / "results/exercises/Taxi-v3_alphas.csv").set_index(["algorithm", "alpha"])["return"]
    rows = re.findall(r"^\| ([\d.]+) \| (-?[\d.]+) \| (-?[\d.]+) \|$", page, re.M)
    assert len(rows) == 7
    for alpha, *cells in rows:
        assert [f"{taxi[algorithm, float(alpha)]:.2f}" for algorithm in ("SAC", "KLAC")] == cells


def a_number_a_seed(runs, columns):
    """The cells of {column: format} in a row of Markdown."""
    return " | ".join(", ".join(f"{x:{digits}}" for x in runs[column]) for column, digits in columns.items())


def test_the_pendulums_table_is_the_committed_runs():
    curves = pd.read_csv(ROOT / "results/exercises/pendulum/curves.csv").pivot(index="step", columns="seed")
    page = (ROOT / "docs/exercises.md").read_text()
    rows = re.findall(r"^\| (\d+,000) \| (-?[\d.]+, -?[\d.]+) \| ([\d.]+, [\d.]+) \|$", page, re.M)
    assert len(rows) == 7
    for step, entropy, alpha in rows:
        here = curves.loc[int(step.replace(",", ""))]
        assert entropy == ", ".join(f"{x:.2f}" for x in here["entropy"])
        assert alpha == ", ".join(f"{x:.3f}" for x in here["alpha"])
    settled = curves[curves.index > 20_000]["entropy"].to_numpy()
    assert f"{settled.mean():.2f} nats on average\n(standard deviation {settled.std():.1f})" in page


def test_the_table_of_fixed_temperatures_is_the_committed_runs():
    summary = pd.read_csv(ROOT / "results/exercises/halfcheetah/summary.csv").groupby("algorithm")
    page = (ROOT / "docs/exercises.md").read_text()
    assert len(summary) == 3
    for algorithm, runs in summary:
        cells = a_number_a_seed(runs, {"last 10%": ".0f", "argmax": ".0f", "entropy": ".1f", "Q - return": ".0f"})
        assert f"| {algorithm.removeprefix('SAC, alpha ')} | {cells} |" in page


def test_the_slides_studies_are_the_committed_runs():
    summary = pd.read_csv(ROOT / "results/slides/settings/summary.csv").groupby("algorithm")
    page = (ROOT / "docs/exercises.md").read_text()
    assert len(summary) == 6
    for algorithm, runs in summary:
        cells = a_number_a_seed(runs, {"last 10%": ".0f", "argmax": ".0f", "entropy": ".1f"})
        name = algorithm.removeprefix("SAC-V, ").replace("SAC-V", "reward_scale 5, tau 0.005, an update a step")
        assert f"| {name} | {cells} |" in page
    curves = pd.read_csv(ROOT / "results/slides/policies/curves.csv")
    gain = (curves["evaluation"] - curves["stochastic"])[curves["step"] >= 10_000]
    assert (gain > 0).all()
    assert f"by some {gain[curves['step'] > 40_000].mean():.0f} on\naverage" in page


WITH_P_0_8 = {"SAC with p = 0.8,": "SAC, target of p = 0.8", "KLAC with p = 0.8,": "KLAC, p = 0.8 throughout"}
ROWS = {"return": ("last_return", ".2f"), "ten best episodes": ("score", ".1f")}
ROWS |= {"argmax policy at the end": ("evaluation", ".1f"), "Q minus return": ("q_minus_return", ",.1f")}


def test_the_tables_of_the_five_games_are_the_committed_runs():
    summary = pd.read_csv(ROOT / "results/figures/summary.csv")
    runs, variants = summary.groupby(["task", "algorithm"]), ["SAC", "KLAC", "KLAC-a", "KLAC-b", "KLAC-ab"]
    low = pd.read_csv(ROOT / "results/low_target/summary.csv").groupby(["algorithm", "task"])["last_return"].mean()
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs/results.md").read_text()
    randoms = summary.groupby("task")["random"].mean()
    for task in MINATAR:
        groups = [runs.get_group((task, name)).sort_values("seed") for name in variants]
        means = " | ".join(f"{group['last_return'].mean():.1f}" for group in groups)
        fixed = " | ".join(f"{low[name, task]:.1f}" for name in WITH_P_0_8.values())
        row = rf"^\| {task} \| {randoms[task]:.1f} \| {re.escape(means)} \| [\d.]* ?\| {re.escape(fixed)} \|$"
        assert re.search(row, readme, re.M)
        table = page.partition(f"| {task} (random")[2].splitlines()
        for line, (name, (column, digits)) in zip(table[: len(ROWS)], ROWS.items(), strict=True):
            cells = [a_number_a_seed(group, {column: digits}) for group in groups]
            assert line.endswith(f"| {name} | {' | '.join(cells)} |")
    scores = [normalise(summary.assign(score=summary[column]))[0] for column in ("score", "last_return")]
    for variant in variants[1:]:
        lines = [f"| {variant} | ten best episodes |", "| | return |"]
        for i, of_variant in enumerate(of_task[variant].values() for of_task in scores):
            samples = list(of_variant)
            for statistic in AGGREGATES.values():
                low, high = interval(samples, statistic)
                known = f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else ""  # a task with one run has none
                lines[i] += f" {statistic(*samples):.2f}{known} |"
        assert "\n".join(lines) in page


def test_the_five_numbers_of_each_claim_are_the_means_of_the_committed_runs():
    page = (ROOT / "docs/claims.md").read_text()
    page = page.partition("## With the schedule completed: MinAtar")[2].partition("\n## ")[0]
    low = pd.read_csv(ROOT / "results/low_target/summary.csv")
    low = low[low["algorithm"].isin(WITH_P_0_8.values())]
    runs = pd.concat([pd.read_csv(ROOT / "results/figures/summary.csv"), low]).groupby(["algorithm", "task"])
    means = runs[["last_return", "score", "evaluation", "q_minus_return"]].mean()
    curves = pd.read_csv(ROOT / "results/figures/curves.csv").query("50_000 < step <= 100_000")
    seeds = curves.groupby(["algorithm", "task", "seed"])["return"].mean()
    means["early"] = seeds.groupby(["algorithm", "task"]).mean()
    measures = {"return": ("last_return", ".1f"), "score": ("score", ".1f"), "argmax": ("evaluation", ".1f")}
    measures |= {"q minus return": ("q_minus_return", ",.1f"), "steps": ("early", ".2f"), "same": ("early", ".2f")}
    five = r"(-?\d[\d,]*\.\d+(?:, -?\d[\d,]*\.\d+){4})"
    found = 0
    for line in page.splitlines():
        for match in re.finditer(rf"((?:S|KL)AC(?:-\w+| with p = 0.8,)?) {five}", line):
            measure = re.findall(r"(Q minus return|return|score|argmax|steps|same): ", line[: match.start()], re.I)[-1]
            column, digits = measures[measure.lower()]
            runs = means.loc[WITH_P_0_8.get(match[1], match[1])].loc[MINATAR, column]
            assert match[2] == ", ".join(f"{x:{digits}}" for x in runs), line
            found += 1
    assert found == len(re.findall(five, page)) > 15


def test_sac_with_klacs_target_is_the_committed_runs_beside_those_of_the_figures():
    summary = pd.read_csv(ROOT / "results/low_target/summary.csv")
    same = pd.read_csv(ROOT / "results/figures/summary.csv").query("algorithm in ('SAC', 'KLAC')")
    new = summary["algorithm"].isin(WITH_P_0_8.values())
    pd.testing.assert_frame_equal(summary[~new].reset_index(drop=True), same.reset_index(drop=True))
    rows, (sac, klac) = ROWS | {"alpha at the end": ("alpha", ".3g")}, WITH_P_0_8.values()
    columns = ["SAC", sac, "KLAC", klac]
    page, runs = (ROOT / "docs/results.md").read_text(), summary.groupby(["task", "algorithm"])
    page = page.partition("## SAC with KLAC's entropy target")[2]
    commands = (ROOT / "results/low_target/commands.txt").read_text()
    for task, n in zip(MINATAR, (5, 3, 3, 6, 4), strict=True):
        line = next(line for line in commands.splitlines() if f"--env-id {task}" in line)
        scale = klac_discrete.exploit_entropy(0.8, n) / math.log(n)
        assert f"--target-entropy-scale {scale:.4f} " in line
        table = page.partition(f"| {task} ")[2].splitlines()
        for line, (name, (column, digits)) in zip(table[: len(rows)], rows.items(), strict=True):
            groups = [runs.get_group((task, each)) for each in columns]
            cells = [a_number_a_seed(group.sort_values("seed"), {column: digits}) for group in groups]
            assert line.endswith(f"| {name} | {' | '.join(cells)} |")


def test_the_table_of_the_full_length_is_the_committed_runs():
    page = (ROOT / "docs/results.md").read_text().partition("## The paper's full length")[2].partition("\n## ")[0]
    games = ("Seaquest", "Breakout", "Asterix")
    runs = pd.concat([pd.read_csv(ROOT / f"results/{game.lower()}_3m/summary.csv") for game in games])
    runs = runs.set_index(["task", "algorithm"])
    runs = runs.loc[[(f"{game}-v1", name) for game in games for name in ("SAC", "KLAC")]]
    assert (runs["steps"] == 3_000_000).all()
    rows = {"random policy": ("random", ".1f"), "return": ("last 10%", ".1f"), "ten best episodes": ("best 10", ".1f")}
    rows |= {
        "argmax policy at the end": ("argmax", ".1f"),
        "Q minus return": ("Q - return", ".2g"),
        "alpha at the end": ("alpha", ".2g"),
    }
    for name, (column, digits) in rows.items():
        assert f"| {name} | {' | '.join(f'{x:{digits}}' for x in runs[column])} |" in page
    readme = (ROOT / "README.md").read_text()
    returns = runs["last 10%"]
    for game in games:
        assert f"{game} {returns[f'{game}-v1', 'KLAC']:.1f}, SAC {returns[f'{game}-v1', 'SAC']:.1f}" in readme


def test_mujocos_table_is_the_committed_runs():
    page = (ROOT / "docs/results.md").read_text().partition("## MuJoCo, with the schedule completed")[2]
    table = iter(page.partition("| 100,000 steps |")[2].partition("\n\n")[0].splitlines()[2:])
    rows = {"return": "last_return", "ten best episodes": "score"}
    rows |= {"argmax policy at the end": "evaluation", "Q minus return": "q_minus_return"}
    for task, runs in pd.read_csv(ROOT / "results/mujoco/summary.csv").groupby("task"):
        assert (runs["budget"] == 100_000).all()
        first = f"{task} (random {runs['random'].mean():.0f}) "
        for name, column in rows.items():
            of = [runs[runs["algorithm"] == each].sort_values("seed") for each in ("SAC", "KLAC", "KLAC-ab")]
            cells = " ".join(f"{a_number_a_seed(each, {column: '.0f'})} |" if len(each) else "|" for each in of)
            assert next(table) == f"| {first}| {name} | {cells}"
            first = ""
    assert next(table, None) is None


def test_ants_table_is_the_committed_runs():
    columns = ["seed", "algorithm", "last_return", "evaluation", "q_minus_return"]
    summary = pd.read_csv(ROOT / "results/prefix/figures/summary.csv").query("task == 'Ant-v5'")[columns]
    ours = pd.read_csv(ROOT / "results/prefix/ant/summary.csv")
    ours = ours.rename(columns={"last 10%": "last_return", "argmax": "evaluation", "Q - return": "q_minus_return"})
    runs = pd.concat([summary, ours[columns]]).sort_values("seed").groupby("algorithm")
    page = (ROOT / "docs/claims.md").read_text()
    names = {"return": "last_return", "argmax policy at the end": "evaluation", "Q minus return": "q_minus_return"}
    for name, column in names.items():
        cells = [a_number_a_seed(runs.get_group(each), {column: ".0f"}) for each in ("SAC", "KLAC-ab", "KLAC-a")]
        assert f"| {name} | {' | '.join(cells)} |" in page


LANES = ("tuned", "fixed")


def test_the_lanes_tables_are_the_committed_runs_with_their_intervals():
    page, found = (ROOT / "docs/exercises.md").read_text(), 0
    for setting in LANES:
        summary = pd.read_csv(ROOT / f"results/lane/{setting}/summary.csv").groupby("algorithm")
        for algorithm, runs in summary:
            cells = [", ".join(f"{x:.1f}" for x in runs["last 10%"])]
            for x in (runs["last 10%"], runs["argmax"]):
                low, high = scipy.stats.t.interval(0.95, len(x) - 1, x.mean(), scipy.stats.sem(x))
                cells.append(f"{x.mean():.1f} [{low:.1f}, {high:.1f}]")
            assert " | ".join([f"| {algorithm}", *cells]) in page
            found += 1
        for measure in ("last 10%", "argmax"):
            klac, sac = (summary.get_group(algorithm)[measure] for algorithm in ("KLAC-ab", "SAC"))
            low, high = scipy.stats.ttest_ind(klac, sac, equal_var=False).confidence_interval()
            assert re.search(rf"{abs(klac.mean() - sac.mean()):.1f} (more|less) \(.*\[{low:.1f}, {high:.1f}\]\)", page)
    assert found == len(re.findall(r"^\| (?:SAC|KLAC)[\w-]* \| [\d.]+, ", page, re.M))


def test_the_tables_of_the_completed_schedule_are_the_committed_runs():
    summary = pd.read_csv(ROOT / "results/beta/summary.csv")
    runs = summary.groupby(["task", "algorithm"])["last 10%"]
    names = ["SAC", "KLAC-b", "KLAC, beta 0.01", "KLAC, beta 0.03", "KLAC, beta 0.1"]
    readme = (ROOT / "README.md").read_text()
    for task in ("Asterix-v1", "Breakout-v1", "Seaquest-v1"):
        assert re.search(
            rf"^\| {task} \|.* \| {runs.get_group((task, names[-1])).mean():.1f}( \| [\d.]+){{2}} \|$", readme, re.M
        )
    page = (ROOT / "docs/results.md").read_text().partition("## Which beta?")[2]
    rows = re.findall(r"^\| (\w+-v1) \(random [\d.]+\) \| return \| (.*) \|$", page, re.M)
    assert len(rows) == 3
    for task, cells in rows:  # a number a seed
        assert cells.split(" | ") == [", ".join(f"{x:.2f}" for x in runs.get_group((task, name))) for name in names]
    means = runs.mean().unstack()[names[1:]]
    scores = means.div(means.max(axis=1), axis=0).mean()
    assert f"| mean score | {' | '.join(f'{score:.2f}' for score in scores)} |" in page
    assert scores.idxmax() == f"KLAC, beta {klac_discrete.Args.beta}"
    warm_up = pd.read_csv(ROOT / "results/beta/curves.csv").query("step <= 20_000 and algorithm == 'SAC'")
    a_step = (warm_up["return"] / warm_up["length"]).groupby([warm_up["task"], warm_up["seed"]]).mean().unstack()
    cells = [", ".join(f"{x:.4f}" for x in seeds) for seeds in a_step.to_numpy()]
    assert f"| seeds 1 and 2 | {' | '.join(cells)} |" in page
    means = a_step.mean(axis=1)
    assert f"gives Asterix {means['Asterix-v1'] / means['Seaquest-v1']:.1f} times Seaquest's" in page


def test_the_table_of_asked_and_realised_is_the_committed_runs():
    rows = {}
    for line in (ROOT / "docs/algorithms.md").read_text().splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name.startswith(("asked: p", "realised, ", "entropy minus its target")):
            rows[name] = [[float(x) for x in cell.split(", ") if x] for cell in cells]
    for task, d, total in (("Pendulum-v1", 1, 12_000), ("HalfCheetah-v5", 6, 30_000)):
        curves = pd.read_csv(ROOT / f"results/realised/{task.split('-')[0].lower()}/curves.csv")
        realised, entropy = [
            next(cells for name, cells in rows.items() if name.startswith(start) and task in name)
            for start in ("realised", "entropy")
        ]
        for fifth, (asked, shares, gaps) in enumerate(zip(rows["asked: p"], realised, entropy, strict=True), 1):
            p = 0.5 + 0.3 * np.linspace(fifth / 5, (fifth + 1) / 5, 1000)
            assert asked == [pytest.approx(p.mean(), abs=0.006)]
            sigma = 0.25 / scipy.stats.norm.ppf((1 + p ** (1 / d)) / 2)  # within 0.25 of the mean in each dimension
            target = d * scipy.stats.norm.entropy(0, sigma).mean()
            here = curves[curves["step"] == (fifth + 1) * total // 5].dropna(subset="entropy")
            assert shares == pytest.approx(here["exploit_probability"], abs=0.0051)
            assert gaps == pytest.approx(here["entropy"] - target, abs=0.06)


ACTORS = sorted(path.parent for path in (ROOT / "results/actors").glob("*/actor.pt"))


def test_the_table_of_published_actors_is_their_returns():
    rows = re.findall(
        r"^\| `results/actors/([\w.-]+)` \| ([\d.]+) \| ([\d.]+) \|", (ROOT / "docs/loading.md").read_text(), re.M
    )
    assert [folder for folder, *_ in rows] == [path.name for path in ACTORS]
    for folder, *cells in rows:
        returns = json.loads((ROOT / "results/actors" / folder / "returns.json").read_text())
        assert cells == [f"{np.mean(returns[f'{kind}_returns']):.1f}" for kind in ("deterministic", "stochastic")]


@pytest.mark.parametrize("folder", ACTORS, ids=lambda path: path.name)
def test_a_published_actor_plays_as_it_did(run_script, folder):
    shutil.copytree(folder, "actor")  # the evaluation is written beside it
    algorithm = torch.load("actor/actor.pt", weights_only=True)["args"]["algorithm"]
    name = "sac_discrete" if algorithm == "SAC" else "klac_discrete"
    code, _, err = run_script(name, "--evaluate", "actor", "--eval-episodes", 4, "--seed", 1)
    assert (code, err) == (0, "")
    now, then = [json.loads(Path("actor", file).read_text()) for file in ("evaluation.json", "returns.json")]
    same = [a == b for a, b in zip(now["deterministic_returns"], then["deterministic_returns"], strict=False)]
    assert sum(same) >= 2  # on another processor the last bit of a logit may choose another action
