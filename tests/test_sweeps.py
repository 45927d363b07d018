"""The examples of a W&B sweep and of an Optuna study, with tiny budgets."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import tyro
import wandb.sdk.launch.sweeps.utils as sweeps
from optuna.trial import TrialState
from wandb.wandb_agent import Agent

import klac_discrete
from benchmark import optuna_study
from tests.test_runs import history_of

ROOT = Path(__file__).parent.parent
SHORT = {"total_timesteps": 300, "learning_starts": 100, "target_network_frequency": 100, "eval_episodes": 1}
SHORT |= {"log_interval": 100, "buffer_size": 500}
FLAGS = ["--env-id", "CartPole-v1", "--no-compile"]
FLAGS += [word for name, value in SHORT.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def _script(monkeypatch):
    shutil.copy(ROOT / "klac_discrete.py", ".")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def study_of(name):
    return optuna.load_study(study_name=name, storage=f"sqlite:///{name}.db")


@pytest.mark.usefixtures("_script")
def test_an_optuna_study_tells_optuna_what_its_runs_returned(scalars, capsys):
    optuna_study.main(optuna_study.Args(trials=1), FLAGS)
    optuna_study.main(optuna_study.Args(trials=2), FLAGS)  # goes on with it
    trials = study_of("study").trials
    returns = [scalars(f"runs/study__{number}")["eval/episodic_return"][0][1] for number in (0, 1)]
    assert [trial.value for trial in trials] == returns
    for number, trial in enumerate(trials):
        args = json.loads(Path(f"runs/study__{number}/args.json").read_text())
        assert {name: args[name] for name in ("beta", "p_end")} == trial.params
    best = f"best: study__{returns.index(max(returns))}, {max(returns):g} with "
    assert capsys.readouterr().out.splitlines()[-1].startswith(best)


def test_a_study_prunes_what_fails_and_ends_at_what_is_refused(monkeypatch):
    codes = iter([1, 2, -9, 0])

    def run(command):
        folder = Path("runs", command[command.index("--run-name") + 1])
        folder.mkdir(parents=True)
        (folder / "scalars.csv").write_text("step,tag,value\n0,charts/episodic_return,9\n5,eval/episodic_return,7\n")
        return next(codes)

    monkeypatch.setattr(optuna_study, "run", run)
    with pytest.raises(SystemExit) as refused:
        optuna_study.main(optuna_study.Args(trials=2), [])
    assert refused.value.code == 2
    optuna_study.main(optuna_study.Args(trials=3), [])
    trials = [trial.state for trial in study_of("study").trials]
    assert trials == [TrialState.PRUNED, TrialState.FAIL, TrialState.PRUNED, TrialState.COMPLETE]
    assert study_of("study").best_value == 7
    codes = iter([1])
    with pytest.raises(SystemExit, match="no trial has finished"):
        optuna_study.main(optuna_study.Args(trials=1, study="other"), [])


def test_a_study_goes_on_with_its_own_flags_alone(monkeypatch, capsys):
    """The trials of two tasks are no study: the best of one would be said of the other."""
    monkeypatch.setattr(optuna_study, "run", lambda command: 2)
    with pytest.raises(SystemExit, match="2"):  # a typing error begins no study
        optuna_study.main(optuna_study.Args(trials=1), ["--env-id", "Astrix-v1"])
    monkeypatch.setattr(optuna_study, "run", lambda command: 1)
    for trials in (1, 2):
        with pytest.raises(SystemExit, match="no trial has finished"):
            optuna_study.main(optuna_study.Args(trials=trials), ["--env-id", "Asterix-v1"])
    assert capsys.readouterr().out == "1/1 trials: study__1: failed\n2/2 trials: study__2: failed\n"
    with pytest.raises(SystemExit, match="2"):
        optuna_study.main(optuna_study.Args(trials=3), ["--env-id", "Breakout-v1"])
    assert "--study study: was begun with --env-id Asterix-v1: " in capsys.readouterr().err
    assert len(study_of("study").trials) == 3


def test_a_file_that_is_no_study_is_refused_in_one_line(capsys):
    Path("study.db").write_text("no database")
    with pytest.raises(SystemExit, match="2"):
        optuna_study.main(optuna_study.Args(), [])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("optuna_study.py: study.db: cannot be used: ")
    assert Path("study.db").read_text() == "no database"


def test_ctrl_c_waits_for_the_trial_to_save_itself():
    """It reaches both, as from a terminal. The run here takes longer to save itself than subprocess.run would wait."""
    Path("klac_discrete.py").write_text("""
import pathlib, sys, time
try:
    pathlib.Path("begun").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit(130)
""")
    setting = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "start_new_session": True}
    study = subprocess.Popen([sys.executable, "-m", "benchmark.optuna_study"], **setting)
    while not Path("begun").exists():
        assert study.poll() is None
        time.sleep(0.1)
    os.killpg(study.pid, signal.SIGINT)
    assert study.wait(60) == 130
    assert Path("saved").exists()
    assert [trial.state for trial in study_of("study").trials] == [TrialState.FAIL]


@pytest.mark.parametrize(("flags", "words"), [
    (["--beta", "0.1"], "--beta: the study chooses it"), (["--p_end=0.7"], "--p_end=0.7: the study chooses it"),
    (["--no-bias"], "--no-bias: the study chooses it"),
    (["--run-name", "x"], "--run-name: "), (["--trials", "0"], "--trials 0: "), (["--study", "a/b"], "--study a/b: "),
])  # fmt: skip
def test_what_a_study_cannot_take_is_refused_in_one_line(capsys, flags, words):
    with pytest.raises(SystemExit, match="2"):
        optuna_study.main(*tyro.cli(optuna_study.Args, args=flags, return_unknown_args=True))
    err = capsys.readouterr().err
    assert err.startswith(f"optuna_study.py: {words}")
    assert err.count("\n") == 1
    assert not list(Path().iterdir())


def test_several_studies_that_begin_at_once_share_one():
    code = "from benchmark import optuna_study as s; s.run = lambda command: 1; s.main(s.Args(trials=3), [])"
    setting = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "stderr": subprocess.PIPE, "text": True}
    several = [subprocess.Popen([sys.executable, "-c", code], **setting) for _ in range(3)]
    errors = [process.communicate()[1] for process in several]
    assert [error.strip().splitlines()[-1] for error in errors] == ["no trial has finished"] * 3
    trials = study_of("study").trials
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert 3 <= len(trials) <= 5  # each may have begun one while the others ended theirs


def ends(parameter):
    """The values at the ends of a parameter's range in sweep.yaml."""
    if "value" in parameter:
        return [parameter["value"]]
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def test_every_point_of_the_wandb_sweep_is_flags_of_its_script():
    sweep = sweeps.load_sweep_config(str(ROOT / "benchmark/sweep.yaml"))
    assert sweep["program"] == "klac_discrete.py"
    names = sweep["parameters"]
    for values in itertools.product(*map(ends, names.values())):
        point = dict(zip(names, values, strict=True))
        words = sweeps.create_sweep_command_args({"args": {name: {"value": value} for name, value in point.items()}})
        flags = words["args_no_boolean_flags"]
        args = tyro.cli(klac_discrete.Args, args=flags)
        klac_discrete.check_flags(args)
        assert args.anneal is not point.pop("no_anneal")
        assert {name: getattr(args, name) for name in point} == point


@pytest.mark.usefixtures("_script")
def test_wandb_s_agent_runs_a_point_of_the_sweep(monkeypatch):
    """Its own code makes the command and starts it, offline; only the server that would choose the point is absent."""
    sweep = sweeps.load_sweep_config(str(ROOT / "benchmark/sweep.yaml"))
    for name, value in (("RUN_ID", "point1"), ("SWEEP_ID", "sweep1"), ("SWEEP_PARAM_PATH", ""), ("DIR", os.getcwd())):
        monkeypatch.setenv(f"WANDB_{name}", value)
    point = {"env_id": "CartPole-v1", "beta": 0.02, "no_anneal": True, "no_compile": True, **SHORT}
    agent = Agent(None, None)
    agent._sweep_command = sweep["command"]
    arguments = {name: {"value": value} for name, value in point.items()}
    agent._command_run({"run_id": "point1", "program": sweep["program"], "args": arguments})
    assert agent._run_processes["point1"].wait() == 0
    (run_dir,) = Path("runs").iterdir()
    args = json.loads((run_dir / "args.json").read_text())
    assert (args["beta"], args["anneal"], args["algorithm"]) == (0.02, False, "KLAC-a")
    (offline_run,) = Path("wandb").glob("offline-run-*-point1")
    counts, description = history_of(offline_run)
    assert (description.sweep_id, description.run_id) == ("sweep1", "point1")
    assert counts[sweep["metric"]["name"]] == 1
