"""An Optuna study of KLAC's bias and schedule; edit `main` for another script, other ranges or several seeds a trial.

    python -m benchmark.optuna_study --trials 20 --env-id Asterix-v1 --total-timesteps 500000

What is not a flag of this file is one of klac_discrete.py, which must be in the current folder. A trial is the run
runs/STUDY__NUMBER. The same command goes on with the study, which is in STUDY.db and keeps its flags; several at once
share it. A run that fails, as one whose loss is not finite does, is a pruned trial; flags that cannot work end
the study.
"""

import fcntl
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass

import optuna
import pandas as pd
import tyro
from optuna.trial import TrialState

ENDED = [TrialState.COMPLETE, TrialState.PRUNED]


@dataclass
class Args:
    trials: int = 20
    """trials of the study, those of earlier calls included (calls at once may exceed it: each finishes its trial)"""
    study: str = "study"
    """name of the study"""


def run(command: list[str]) -> int:
    """The exit status of a run. Ctrl-C reaches the run too, which is waited for while it saves itself."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def main(args: Args, flags: list[str]) -> None:
    chosen = {"--run-name", "--beta", "--p-end", "--bias", "--no-bias"}
    wrong = [f"{flag}: the study chooses it" for flag in flags if flag.partition("=")[0].replace("_", "-") in chosen]
    if args.trials < 1:
        wrong.append(f"--trials {args.trials}: must be at least 1")
    if not re.fullmatch(r"[\w-]+", args.study):
        wrong.append(f"--study {args.study}: must be letters, digits, - and _")
    if wrong:
        print(f"optuna_study.py: {wrong[0]}", file=sys.stderr)
        sys.exit(2)
    with open(f"{args.study}.db", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # of several at once, one makes the tables
        storage = f"sqlite:///{args.study}.db"
        try:
            study = optuna.create_study(
                study_name=args.study, storage=storage, direction="maximize", load_if_exists=True
            )
        except Exception as error:  # of SQLAlchemy, for each damage another
            print(f"optuna_study.py: {args.study}.db: cannot be used: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        if not study.get_trials(states=[*ENDED, TrialState.RUNNING]):  # of flags that were refused none is left
            study.set_user_attr("flags", flags)
    if (begun := study.user_attrs.get("flags", flags)) != flags:
        words = f"was begun with {shlex.join(begun) or 'no flags'}: another name begins another study"
        print(f"optuna_study.py: --study {args.study}: {words}", file=sys.stderr)
        sys.exit(2)
    while len(study.get_trials(states=ENDED)) < args.trials:
        trial = study.ask()
        name = f"{args.study}__{trial.number}"
        beta, p_end = trial.suggest_float("beta", 0.001, 0.3, log=True), trial.suggest_float("p_end", 0.65, 0.95)
        command = ["klac_discrete.py", "--run-name", name, "--beta", str(beta), "--p-end", str(p_end), *flags]
        try:
            code = run([sys.executable, *command])
        except KeyboardInterrupt:
            study.tell(trial, state=TrialState.FAIL)
            raise
        if code == 0:
            scalars = pd.read_csv(f"runs/{name}/scalars.csv", index_col="tag")["value"]
            outcome = scalars[["eval/episodic_return"]].iloc[-1]
            study.tell(trial, outcome)
        elif code == 1 or code < 0:
            outcome = "failed" if code == 1 else f"killed by signal {-code}"
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, state=TrialState.FAIL)
            sys.exit(code)
        print(f"{len(study.get_trials(states=ENDED))}/{args.trials} trials: {name}: {outcome}", flush=True)
    if not study.get_trials(states=[TrialState.COMPLETE]):
        sys.exit("no trial has finished")
    print(f"best: {args.study}__{study.best_trial.number}, {study.best_value:g} with {study.best_params}")


if __name__ == "__main__":
    try:
        main(*tyro.cli(Args, return_unknown_args=True))
    except KeyboardInterrupt:
        sys.exit(130)
