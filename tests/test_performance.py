"""What makes the scripts fast changes no numbers, and the benchmark measures what it says."""

import csv
import importlib
import json
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmark import throughput
from tests.test_runs import SCRIPTS

ROOT = Path(__file__).parent.parent


def updates_of(name, compiled):
    """The weights and the logged scalars of a short run."""
    module = importlib.import_module(name)
    updates = 4 if "discrete" in name else 1
    flags = {"env_id": SCRIPTS[name][0], "learning_starts": 100, "total_timesteps": 101 + 100 * updates}
    flags |= {"eval_episodes": 1, "log_interval": updates, "buffer_size": 1000, "compile": compiled}
    run_dir = module.train(module.Args(run_name=f"compiled-{compiled}", **flags))
    assert json.loads((run_dir / "args.json").read_text())["compile"] is compiled
    return pd.read_csv(run_dir / "scalars.csv").query("tag.str.startswith('losses')").reset_index(drop=True)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize(
    "name", ["klac_discrete", *(pytest.param(name, marks=pytest.mark.slow) for name in list(SCRIPTS)[1:])]
)
def test_a_compiled_run_is_the_eager_one_over_its_first_hundred_updates(name):
    eager, compiled = updates_of(name, False), updates_of(name, True)
    assert (eager[["step", "tag"]] == compiled[["step", "tag"]]).all(axis=None)
    assert (eager["tag"] == "losses/qf_loss").sum() >= 50
    np.testing.assert_allclose(compiled["value"], eager["value"], rtol=2e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", SCRIPTS)
def test_cuda_graphs_learn_like_the_eager_loop(name):
    eager, compiled = updates_of(name, False), updates_of(name, True)
    np.testing.assert_allclose(compiled["value"], eager["value"], rtol=5e-2, atol=5e-3)


def test_the_split_gives_each_line_of_train_its_time(tmp_path):
    (tmp_path / "script.py").write_text("def train():\n    yield  # slow\n    yield  # quick\n")
    generator = runpy.run_path(str(tmp_path / "script.py"))["train"]()
    split = Counter()
    handle = throughput.sampler(split)
    for line, pause in ((2, 0.02), (3, 0.01)):
        next(generator)
        assert generator.gi_frame.f_lineno == line
        time.sleep(pause)
        handle(None, generator.gi_frame)
    handle(None, None)
    assert split.keys() == {"yield  # slow", "yield  # quick", "elsewhere"}
    assert split["yield  # slow"] > 0.02 > split["yield  # quick"] > 0.01


def test_another_revision_s_scripts_run_beside_these(capsys):
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("not a git checkout")
    with throughput.old_scripts("HEAD") as folder:
        assert sorted(path.stem for path in Path(folder).iterdir()) == sorted(
            f"{a}_{k}_HEAD" for a in ("sac", "klac") for k in ("discrete", "continuous")
        )
    with throughput.old_scripts("HEAD~0") as folder:
        assert Path(folder, "sac_discrete_HEAD_0.py").exists()  # a name that Python can import
    with pytest.raises(SystemExit, match="2"):
        throughput.old_scripts("nonsense")
    assert capsys.readouterr().err.startswith("throughput.py: --against nonsense: ")


def test_a_measurement_that_is_stopped_keeps_what_it_has_found(tmp_path, monkeypatch):
    found = iter([[{"task": "Seaquest-v1", "steps_per_second": 1.0}]])
    monkeypatch.setattr(throughput, "measure", lambda *_: next(found))
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--only", "rates", "--out", str(tmp_path / "a/b")])
    with pytest.raises(StopIteration):
        throughput.main()
    assert (tmp_path / "a/b/rates.csv").read_text() == "task,steps_per_second\nSeaquest-v1,1.0\n"
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--out", str(tmp_path / "a/b/rates.csv")])
    with pytest.raises(SystemExit, match="2"):
        throughput.main()


@pytest.mark.slow
def test_throughput_writes_its_tables(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmark.throughput",
        "--windows",
        "2",
        "--window",
        "20",
        "--out",
        tmp_path / "out",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for table, columns in (("rates", "steps_per_second"), ("split", "ms"), ("memory", "last_gib")):
        with (tmp_path / "out" / f"{table}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert all(float(row[columns]) > 0 for row in rows)
        own = {row["contestant"] for row in rows} - set(throughput.PEERS)
        assert own >= {"sac_discrete", "klac_discrete", "sac_continuous", "klac_continuous"}


def test_the_committed_tables_are_what_the_documentation_says():
    with (ROOT / "results/throughput_one_core/rates.csv").open() as file:
        rates = {(r["task"], r["contestant"]): float(r["steps_per_second"]) for r in csv.DictReader(file)}
    names = {"stable_baselines3": "Stable-Baselines3 2.9 SAC", "sbx": "SBX 0.28 SAC (JAX)"}
    names["benchmark.plain_sac_discrete"] = "the loop as one first writes it"
    page = (ROOT / "docs/performance.md").read_text()
    for (task, contestant), rate in rates.items():
        if task != "floor" and "_37b34a3" not in contestant:
            assert f"| {names.get(contestant, f'`{contestant}.py`')} | {rate:.0f} |" in page
    zen3 = pd.read_csv(ROOT / "results/throughput_zen3/rates.csv").set_index("contestant")["steps_per_second"]
    for script in ("sac_continuous", "klac_continuous", "sac_discrete", "klac_discrete"):
        peers = ["stable_baselines3", "sbx", None] if "continuous" in script else [None, None, throughput.PEERS[2]]
        ratios = [f"{zen3[script] / zen3[peer]:.2f}" if peer else "" for peer in [f"{script}_37b34a3", *peers]]
        row = f"| `{script}.py` | {zen3[script]:.0f} | {' | '.join(ratios)} |"
        assert row.replace("  ", " ") in page
