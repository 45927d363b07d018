import csv
import os
import runpy
import signal
import sys
from pathlib import Path

os.environ["WANDB_MODE"] = "offline"  # no test may reach out; the login test overrides this

import pytest
import torch
import wandb

import tests.envs

ROOT = Path(__file__).parent.parent


def two_of(scripts):
    """The scripts, all but two of them `slow`: for what is word for word the same in all (test_family.py)."""
    kept = ("klac_discrete", "klac_continuous")
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in scripts]


def main(name, *flags, monkeypatch, capsys):
    """Runs the script as `python NAME.py *flags` in this process: (exit code, standard output, errors)."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
    try:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own, with the test environments registered and one thread."""
    monkeypatch.chdir(tmp_path)
    tests.envs.register()
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():  # a script that was run in this process has set its own
        signal.signal(number, handler)


@pytest.fixture
def scalars():
    """A function that reads the scalars.csv of a run's folder into {tag: [(step, value), ...]}."""

    def read(run_dir):
        found = {}
        with (Path(run_dir) / "scalars.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["tag"], []).append((int(row["step"]), float(row["value"])))
        return found

    return read


@pytest.fixture
def run_script(monkeypatch, capsys):
    return lambda name, *flags: main(name, *flags, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture
def wandb_here():
    """W&B's process keeps the folder in which it began: this test has one of its own."""
    wandb.teardown()
    yield
    wandb.teardown()
