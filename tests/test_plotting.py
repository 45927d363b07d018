"""plotting/: the reader against TensorBoard's, the statistics against rliable's, the figures on real, short runs."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import rliable.library
import rliable.metrics
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import klac_discrete
import sac_discrete
from plotting import console, curves, figures, runs, statistics

ROOT = Path(__file__).parent.parent


def agrees_with_tensorboard(run_dir):
    """What is read of a run is what TensorBoard's reader finds, to half a unit in the last place of a float."""
    scalars, sound = runs.read_scalars(run_dir)
    assert sound
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    assert scalars.keys() == set(events.Tags()["scalars"])
    for tag, (steps, values) in scalars.items():
        theirs = [(e.step, e.value) for e in events.Scalars(tag)]
        assert steps.tolist() == [step for step, _ in theirs]
        np.testing.assert_allclose(values, np.float32([value for _, value in theirs]), rtol=2e-7)


ROWS = "step,tag,value\n" + "".join(f"{step},{tag},{step}.5\n" for step in range(10) for tag in "abc")


@pytest.mark.parametrize(("old", "new", "kept"), [
    ("5,b,5.5", "5.7,b,5.5", 16),
    ("5,b,5.5", "5x,b,5.5", 16),
    ("5,b,5.5", "inf,b,5.5", 16),
    ("5,b,5.5", "9" * 20 + ",b,5.5", 16),
    ("0,a,0.5", "-5,a,0.5", 0),
    ("5,b,5.5", ",b,5.5", 16),
    ("5,b,5.5", "4,b,5.5", 16),  # a step that goes back
    ("5,b,5.5", "50,b,5.5", 17),  # the next one goes back
    ("5,b,5.5", "5,,5.5", 16),
    ("5,b,5.5", "5,\xff,5.5", 16),
    ("5,b,5.5", '5,"b,5.5', 16),
    ("b,5.5\n5,c,5.5\n6,a,6.5", '"b,5.5\n5,c,5.5\n6,a",6.5', 16),  # two quotes, and a row between them
    ("5,b,5.5", "5,b", 16),
    ("5,b,5.5", "5,b,", 16),
    ("5,b,5.5", "5,b,x", 16),
    ("5,b,5.5", "5,b,5.5.5", 16),
    ("5,b,5.5", "5,b,5.5,5", 16),
    ("5,b,5.5\n", "5,b,5.5", 16),  # two rows in one
    ("5,b,5.5\n", "5,b,5.5\r", 16),
    ("5,b,5.5", "5,b,5\0\0", 16),
    ("b,5.5\n5,c,5", "\0" * 11, 16),  # a block that a disk has lost
    ("0,a,0.5", "0,a,0.5,1", 0),
    ("9,c,9.5\n", "9,c,9.5", 29),  # a torn last row
    ("9,c,9.5\n", "9,c", 29),
    ("9,c,9.5\n", "9", 29),
])  # fmt: skip
def test_a_damaged_row_is_the_end_of_what_is_read_and_is_said(old, new, kept):
    assert ROWS.count(old) == 1
    damaged = ROWS.replace(old, new)
    Path("scalars.csv").write_bytes(damaged.encode("latin-1"))
    scalars, sound = runs.read_scalars(Path())
    assert not sound
    rows = [row.split(",") for row in damaged.split("\n")[1 : kept + 1]]
    for tag in {*"abc", *scalars}:
        steps, values = scalars.get(tag, ([], []))
        expected = [(int(step), float(value)) for step, its_tag, value in rows if its_tag == tag]
        assert [*zip(steps, values, strict=True)] == expected


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "-1.5", "1e-05", "-3.40282347e+38"])
def test_every_number_that_a_script_writes_is_sound(value):
    Path("scalars.csv").write_text(ROWS.replace("5,b,5.5", f"5,b,{value}"))
    scalars, sound = runs.read_scalars(Path())
    assert sound
    np.testing.assert_array_equal(scalars["b"][1][5], np.float32(value))
    assert [len(steps) for steps, _ in scalars.values()] == [10, 10, 10]


def test_an_args_json_that_is_no_run_s_stops_no_figure_of_the_others(capsys):
    good = short_run(sac_discrete, 1, "good")
    args = json.loads((good / "args.json").read_text())
    wrong = [[], 3, None, [args], args | {"total_timesteps": 0}, args | {"seed": 10**400}, args | {"tau": -(10**400)}]
    wrong += [args | {"exp_name": r"$\bad$"}, args | {"algorithm": ""}, args | {"env_id": r"$\bad$"}]
    for name, value in (
        ("total_timesteps", "abc"), ("env_id", 3), ("seed", "1"), ("algorithm", None), ("learning_starts", []),
    ):  # fmt: skip
        wrong += [args | {name: value}, {key: args[key] for key in args if key != name}]
    folders = [good]
    for number, content in enumerate(wrong):
        folders.append(shutil.copytree(good, Path("runs", f"bad{number}")))
        (folders[-1] / "args.json").write_text(json.dumps(content))
    folders.append(shutil.copytree(good, Path("runs", "surrogate")))
    (folders[-1] / "args.json").write_text(json.dumps(args | {"wandb_entity": "\ud800"}))
    for name, tau in (("whole", 1), ("odd", True)):
        folders.append(shutil.copytree(good, Path("runs", name)))
        (folders[-1] / "args.json").write_text(json.dumps(args | {"seed": 2, "tau": tau}))
    summary, _ = runs.tables(runs.read_folders(folders, Path("cache")), False)
    assert sorted(summary["seed"]) == [1, 2]  # tau 1 is tau 1.0
    figures.main(figures.Args(runs=folders, out=Path("out")))
    said = capsys.readouterr().out
    for number in range(len(wrong)):
        assert f"left out: bad{number}: cannot be read: args.json is not that of a run" in said
    assert "left out: surrogate: cannot be read: args.json is damaged" in said
    assert "left out: odd: tau True, not 1.0" in said


def test_another_header_is_said():
    run_dir = short_run(sac_discrete, 1, "run")
    (run_dir / "scalars.csv").write_text("step,value,tag\n1,2,a\n")
    assert runs.read_run(run_dir).problem == "cannot be read: scalars.csv has another header than step,tag,value"


def test_an_unfinished_run_without_rows_is_too_short():
    run_dir = short_run(sac_discrete, 1, "run")
    (run_dir / "actor.pt").unlink()
    for content in ("step,tag,value\n", "step,tag", ""):
        (run_dir / "scalars.csv").write_text(content)
        assert runs.read_run(run_dir).problem.startswith("too short")


def test_hours_that_nothing_tells_are_nan():
    run_dir = short_run(sac_discrete, 1, "run")
    path = run_dir / "scalars.csv"
    path.write_text("".join(row for row in path.read_text().splitlines(True) if "charts/hours" not in row))
    run = runs.read_run(run_dir)
    assert run.problem is None
    assert np.isnan(run.summary["hours"])


def short_run(module, seed, name, env_id="Walk-v0", **flags):
    flags = {
        "total_timesteps": 600,
        "learning_starts": 100,
        "log_interval": 20,
        "eval_episodes": 1,
        "batch_size": 16,
        "compile": False,
    } | flags
    return module.train(module.Args(env_id=env_id, seed=seed, run_name=name, **flags))


def test_a_row_and_a_curve_are_what_was_logged(scalars):
    run_dir = short_run(klac_discrete, 3, "run")
    agrees_with_tensorboard(run_dir)
    run = runs.read_run(run_dir)
    logged = scalars(run_dir)
    returns = logged["charts/episodic_return"]
    assert run.problem is None
    row = run.summary
    assert (row["task"], row["algorithm"], row["seed"], row["budget"]) == ("Walk-v0", "KLAC", 3, 600)
    assert row["random"] == pytest.approx(np.mean([v for step, v in returns if step < 100]))
    assert row["score"] == pytest.approx(np.mean(sorted(v for _, v in returns)[-10:]))
    assert row["last_return"] == pytest.approx(np.mean([v for step, v in returns if step >= 540]))
    gaps = logged["charts/q_minus_return"]
    assert row["q_minus_return"] == pytest.approx(np.mean([v for step, v in gaps if step >= 540]))
    assert run.curves["step"][-1] == 600
    for place in (50, 120):
        here = [v for step, v in returns if place * 3 <= step < place * 3 + 3]
        assert run.curves["return"][place] == (
            pytest.approx(np.mean(here)) if here else pytest.approx(np.nan, nan_ok=True)
        )
    assert not np.isnan(run.curves["return"]).all()


@pytest.mark.parametrize(("flags", "label"), [
    ({}, "KLAC"), ({"bias": False}, "KLAC-b"), ({"beta": 0.0}, "KLAC-b"), ({"beta": 0.0, "anneal": False}, "KLAC-ab"),
    ({"anneal": False}, "KLAC-a"), ({"anneal": False, "bias": False}, "KLAC-ab"),
    ({"reference": "q.pt", "beta": 0.0}, "KLAC-b + reference"),
])  # fmt: skip
def test_labels_come_from_the_arguments(flags, label):
    args = klac_discrete.Args(env_id="Walk-v0")
    actor, _ = klac_discrete.make_networks(args, klac_discrete.make_env(args))
    torch.save({"args": {"env_id": "Walk-v0"}, "actor": actor.state_dict()}, "q.pt")
    assert runs.read_run(short_run(klac_discrete, 1, "named-SAC", **flags)).summary["algorithm"] == label


def test_runs_that_cannot_be_used_are_named(capsys):
    good = short_run(sac_discrete, 1, "good")
    for name in ("cut", "unfinished", "garbage", "no-args", "bad-args", "empty"):
        shutil.copytree(good, Path("runs", name))
    rows = Path("runs/cut/scalars.csv")
    rows.write_bytes(rows.read_bytes()[:-2001])
    Path("runs/unfinished/actor.pt").unlink()
    rows = Path("runs/garbage/scalars.csv")
    content = bytearray(rows.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = os.urandom(500)
    rows.write_bytes(content)
    Path("runs/no-args/args.json").unlink()
    Path("runs/bad-args/args.json").write_text('{"env')
    Path("runs/empty/scalars.csv").write_bytes(b"")
    found = runs.read_folders(sorted(Path("runs").iterdir()), Path("cache"))
    summary, curves = runs.tables(found, unfinished=False)
    said = capsys.readouterr().out
    assert len(summary) == 1
    assert len(curves) == runs.POINTS
    for name, word in (
        ("cut", "damaged after step"), ("unfinished", "unfinished, at step"), ("garbage", "damaged after step"),
        ("no-args", "cannot be read"), ("bad-args", "cannot be read: args.json is damaged"), ("empty", "damaged"),
    ):  # fmt: skip
        assert f"left out: {name}: {word}" in said, said
    cut = next(run for run in found if run.name == "cut")
    assert 400 < cut.summary["steps"] < 600
    runs.tables([cut], unfinished=True)
    assert "used as far as it goes: cut: damaged after step" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no run is left"):
        runs.tables([cut], unfinished=False)


def test_runs_that_differ_are_not_mixed_and_the_largest_set_is_drawn(capsys):
    def read(script, seed, name, **flags):
        run = runs.read_run(short_run(script, seed, name, **flags))
        capsys.readouterr()  # what training printed
        return run

    def drawn(*given, **options):
        summary, _ = runs.tables([*given], False, **options)
        return sorted(summary[["algorithm", "seed"]].itertuples(index=False, name=None)), capsys.readouterr().out

    first, twin, second = read(sac_discrete, 1, "first"), read(sac_discrete, 1, "twin"), read(sac_discrete, 2, "second")
    assert drawn(first, twin) == ([("SAC", 1)], "left out: twin: the same task, algorithm and seed as first\n")
    trial, klac_trial = read(sac_discrete, 2, "trial", gamma=0.9), read(klac_discrete, 1, "klac-trial", gamma=0.9)
    words = "left out: trial: gamma 0.9, not 0.99 (--where gamma=0.9 draws such runs)\n"
    assert drawn(trial, first, second) == ([("SAC", 1), ("SAC", 2)], words)
    found, said = drawn(klac_trial, first, second)  # of other algorithms too
    assert found == [("SAC", 1), ("SAC", 2)]
    assert "left out: klac-trial: gamma 0.9, not 0.99" in said
    found, said = drawn(trial, klac_trial, first, second, where=["gamma=0.90"])
    assert found == [("KLAC", 1), ("SAC", 2)]
    assert said == "left out: first: not --where gamma=0.90\nleft out: second: not --where gamma=0.90\n"
    other = read(sac_discrete, 2, "other", env_kwargs=("max_episode_steps=8",), eval_interval=200)
    said = drawn(first, second, other)[1]
    assert said.startswith("left out: other: env_kwargs ['max_episode_steps=8'], not []")
    hint = shlex.split(said.partition("(")[2])  # as a shell reads it
    assert drawn(first, second, other, where=[hint[1]])[0] == [("SAC", 2)]
    args = json.loads(Path("runs/first/args.json").read_text())
    older = {key: value for key, value in args.items() if key != "env_kwargs"}  # than the flag
    assert runs.settings_of(older) == runs.settings_of(args)
    evaluated = read(sac_discrete, 2, "evaluated", eval_interval=200)
    assert drawn(first, evaluated) == ([("SAC", 1), ("SAC", 2)], "")
    longer = read(sac_discrete, 2, "longer", total_timesteps=700)
    assert "left out: first: total_timesteps 600, not 700" in drawn(first, longer)[1]  # one each: the longer
    pair = read(klac_discrete, 1, "flag", bias=False), read(klac_discrete, 2, "zero", beta=0.0)
    assert len(drawn(*pair, first)[0]) == 3  # the same experiment in two spellings
    beta = read(klac_discrete, 1, "beta", beta=0.5)
    found, _ = drawn(first, beta, read(klac_discrete, 1, "default"), where=["beta=0.5"])
    assert found == [("KLAC", 1), ("SAC", 1)]  # which has no beta
    shutil.copytree("runs/first", "runs/copy")
    Path("runs/copy/actor.pt").unlink()
    runs.tables([runs.read_run(Path("runs/copy")), first], True)
    assert "left out: copy: the same task, algorithm and seed as first" in capsys.readouterr().out


def test_a_condition_on_a_setting_that_no_run_has_is_refused():
    run = runs.Run("it", None, {"task": "a"}, {}, {"gamma": 0.9})
    for condition in ("gama=0.9", "seed=1"):
        with pytest.raises(ValueError, match=f"--where {condition}: no run has such a setting; there are gamma$"):
            runs.tables([run], False, where=[condition])


def test_settings_that_differ_between_what_is_drawn_together_are_said(capsys):
    def run(task, algorithm, seed, **settings):
        summary = {"task": task, "algorithm": algorithm, "seed": seed, "budget": 600}
        return runs.Run("x", None, summary, {"step": [1]}, {"target_entropy_scale": 0.9, "gamma": 0.9} | settings)

    sac = [run(task, "SAC", seed) for task in "AB" for seed in (1, 2)]
    alike = [run(task, "KLAC", seed, beta=0.01, anneal=True) for task in "AB" for seed in (1, 2)]
    runs.tables([*sac, *alike, run("A", "KLAC-b", 1, anneal=False)], False)
    assert capsys.readouterr().out == ""
    other = [run("B", "KLAC", seed, beta=0.1, anneal=True) for seed in (1, 2)]
    runs.tables([*sac, *alike[:2], *other, run("A", "KLAC-a", 1, beta=0.01)], False)
    assert capsys.readouterr().out == "note: beta is 0.1 for KLAC on B, and 0.01 elsewhere\n"
    longer = [run("B", "SAC", seed, gamma=0.99) for seed in (1, 2)]
    runs.tables([*sac[:2], *alike[:2], *longer], False)
    assert capsys.readouterr().out == "note: gamma is 0.99 for SAC on B, and 0.9 elsewhere\n"
    tasks = [run(task, "KLAC", 1, p_start=p, anneal=True) for task, p in (("A", 0.5), ("B", 0.6))]  # of two actions
    runs.tables([*sac, *tasks], False)
    assert capsys.readouterr().out == ""
    runs.tables([*sac, *tasks, *(run("A", "KLAC-b", seed, p_start=0.35) for seed in (1, 2))], False)
    assert capsys.readouterr().out == "note: p_start is 0.5 for KLAC on A, and 0.35 elsewhere\n"
    runs.tables([run(task, "SAC", 1, target_entropy=-d) for task, d in (("A", 1.0), ("B", 6.0))], False)
    assert capsys.readouterr().out == ""


def test_figures_are_drawn_where_no_cache_can_be_written(tmp_path):
    run_dir = short_run(sac_discrete, 1, "run")
    (tmp_path / "file").write_text("")
    (found,) = runs.read_folders([run_dir], tmp_path / "file" / "cache")
    assert found.problem is None


def test_copies_of_one_seed_are_no_larger_set():
    def run(name, seed, gamma):
        summary = {"task": "a", "algorithm": "SAC", "seed": seed, "budget": 600}
        return runs.Run(name, None, summary, {"step": [1]}, {"gamma": gamma})

    copies = [run(f"copy{i}", 1, 0.99) for i in range(4)]
    summary, _ = runs.tables([*copies, *(run(f"run{seed}", seed, 0.9) for seed in (1, 2, 3))], False)
    assert list(summary["seed"]) == [1, 2, 3]


def test_a_schedule_that_is_not_used_tells_no_runs_apart():
    plain = {"bias": True, "beta": 0.01, "anneal": False, "p_start": 0.5, "anneal_timesteps": 600}
    assert runs.settings_of(plain) == runs.settings_of(plain | {"p_start": 0.6, "anneal_timesteps": 3_000_000})
    annealed = plain | {"anneal": True}
    assert runs.settings_of(annealed) != runs.settings_of(annealed | {"anneal_timesteps": 3_000_000})


def a_run(algorithm, seed, **settings):
    summary = {"task": "a", "algorithm": algorithm, "seed": seed, "budget": 600}
    return runs.Run(f"{algorithm}{seed}", None, summary, {"step": [1]}, runs.settings_of(settings))


def test_an_algorithm_without_a_flag_does_not_mix_runs_of_others_that_differ_in_it(capsys):
    fixed = [a_run("SAC", seed, autotune=False) for seed in (1, 2, 3)]
    tuned = [a_run("KLAC", seed, autotune=True) for seed in (1, 2)]
    for others in ([], [a_run("SAC-V", 1)]):  # which has no autotune
        summary, _ = runs.tables([*fixed, *tuned, *others], False)
        assert set(summary["algorithm"]) == {"SAC", *(run.summary["algorithm"] for run in others)}
        assert "left out: KLAC1: autotune True, not False" in capsys.readouterr().out


def test_a_target_that_annealing_sets_aside_tells_no_runs_apart():
    klac = {"anneal": True, "autotune": True, "target_entropy_scale": 0.89}
    sac = [a_run("SAC", seed, autotune=True, target_entropy_scale=0.4) for seed in (1, 2)]
    assert set(runs.tables([*sac, a_run("KLAC", 1, **klac)], False)[0]["algorithm"]) == {"SAC", "KLAC"}
    for used in ({"anneal": False}, {"autotune": False}):
        assert set(runs.tables([*sac, a_run("KLAC", 1, **klac | used)], False)[0]["algorithm"]) == {"SAC"}


def test_runs_with_and_without_a_bias_are_chosen_by_its_flag():
    with_it, zero = a_run("KLAC", 1, bias=True, beta=0.01), a_run("KLAC-b", 1, bias=True, beta=0.0)
    without, sac = a_run("KLAC-b", 2, bias=False, beta=0.01), a_run("SAC", 1)
    for flag, drawn in (("True", {"KLAC", "SAC"}), ("False", {"KLAC-b", "SAC"})):
        summary, _ = runs.tables([with_it, zero, without, sac], False, where=[f"bias={flag}"])
        assert set(summary["algorithm"]) == drawn
    assert zero.settings == without.settings


def test_more_forks_than_colours_have_dashes_of_their_own():
    names = [f"KLAC ({i:02})" for i in range(16)]
    styles = figures.styles_of(names)
    assert [styles[name] for name in names[:4]] == figures.OTHERS
    assert len(set(styles.values())) == 16


def test_where_the_shortest_run_ends_a_curve_is_said(capsys):
    steps = np.arange(1, 201) * 10.0
    rows = [pd.DataFrame({"task": "T", "algorithm": "SAC", "seed": seed, "step": steps, "q": 1.0}) for seed in (1, 2)]
    figures.draw_curves(pd.concat(rows), [[("T", "q")]])
    assert capsys.readouterr().out == ""
    rows[1].loc[rows[1]["step"] > 600, "q"] = np.nan
    _, numbers = figures.draw_curves(pd.concat(rows), [[("T", "q")]])
    assert capsys.readouterr().out == "T, SAC: mean Q of a batch: to step 600, where the shortest run ends\n"
    assert numbers["step"].max() == 560


def test_runs_with_two_references_are_not_mixed_and_each_seed_may_have_its_own():
    early, late = (
        [a_run("KLAC + reference", i, reference=f"runs/{x}__{i}") for i in (1, 2)] for x in ("early", "late")
    )
    plain = [a_run("KLAC", seed, reference=None) for seed in (1, 2)]
    summary, _ = runs.tables([*plain, *early, *late[:1]], False)
    assert list(summary["algorithm"]) == ["KLAC"] * 2 + ["KLAC + reference"] * 2
    for name in ("runs/late__", "runs/late__1"):
        summary, _ = runs.tables([*plain, *early, *late[:1]], False, where=[f"reference={name}"])
    assert list(summary["algorithm"]) == ["KLAC + reference"]


def test_a_radius_that_sac_only_measures_leaves_it_beside_klac():
    pair = a_run("SAC", 1, exploit_radius=0.25), a_run("KLAC", 1, exploit_radius=0.1)
    assert set(runs.tables(pair, False)[0]["algorithm"]) == {"SAC", "KLAC"}
    wider = [a_run("KLAC", seed, exploit_radius=0.5) for seed in (2, 3)]
    summary, _ = runs.tables([*pair, *wider], False)  # two radii of one algorithm are two experiments
    assert list(zip(summary["algorithm"], summary["seed"], strict=True)) == [("KLAC", 2), ("KLAC", 3), ("SAC", 1)]


def test_a_reading_that_failed_is_tried_again(monkeypatch, tmp_path):
    run_dir = short_run(sac_discrete, 1, "it")

    def fail(_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "read_scalars", fail)
        assert runs.read_cached((run_dir, tmp_path)).problem.startswith("cannot be read: [Errno 5]")
    assert runs.read_cached((run_dir, tmp_path)).problem is None


def test_what_is_no_folder_or_another_user_s_stops_no_figure_of_the_others(monkeypatch, capsys):
    good, closed = short_run(sac_discrete, 1, "good"), Path("runs/closed")
    Path("runs/notes.txt").touch()
    exists, is_file = Path.exists, Path.is_file
    for name, real in (("exists", exists), ("is_file", is_file)):

        def refuse(path, real=real, **kwargs):
            if path.parent == closed:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, **kwargs)

        monkeypatch.setattr(Path, name, refuse)
    assert "Permission denied" in runs.read_cached((closed, Path("cache"))).problem
    curves.main(curves.Args(runs=[good, closed], out=Path("curves")))
    assert "left out: runs/closed: [Errno 13]" in capsys.readouterr().out
    figures.main(figures.Args(runs=[good, Path("runs/notes.txt")], out=Path("out"), only=(5,)))
    assert "left out: notes.txt: cannot be read" in capsys.readouterr().out
    assert len(pd.read_csv("out/summary.csv")) == 1


def test_a_redraw_takes_no_runs(tmp_path):
    for given in ({"runs": [tmp_path]}, {"where": ("beta=0",)}, {"keep": True}, {"wandb": "a/b"}, {"unfinished": True}):
        with pytest.raises(ValueError, match="--redraw: draws from the tables"):
            figures.main(figures.Args(redraw=True, **given))
    for given in ({"runs": [tmp_path]}, {"steps": 3}, {"bin": 3}):
        with pytest.raises(ValueError, match="--redraw: draws from the tables"):
            curves.main(curves.Args(redraw=True, **given))


def test_a_run_without_a_return_is_not_left_out_of_a_mean():
    rows = [{"task": "a", "algorithm": "SAC", "seed": seed, "steps": 600, "random": 0.0} for seed in (1, 2, 3)]
    summary = pd.DataFrame(rows).assign(score=[1.0, 2, 3], last_return=[np.nan, 5, 6], q_minus_return=[np.nan, 1, 1])
    row = figures.table(summary.assign(evaluation=0.0, alpha=1.0)).iloc[0]
    assert (row["n"], row["score"]) == (3, 2)
    assert row[["last_return", "last_low", "last_high", "q_minus_return"]].isna().all()


def test_a_finished_run_without_its_last_evaluation_is_damaged():
    run_dir = short_run(sac_discrete, 1, "run", eval_interval=200)
    run, rows = runs.read_run(run_dir), run_dir / "scalars.csv"
    assert run.problem is None
    assert rows.read_text().splitlines()[-2].startswith("600,eval/episodic_return,")
    assert run.summary["evaluation"] == pytest.approx(float(rows.read_text().splitlines()[-2].split(",")[2]))
    rows.write_text("\n".join(rows.read_text().splitlines()[:-2]) + "\n")
    assert runs.read_run(run_dir).problem.startswith("damaged")


def test_a_fork_is_an_algorithm_of_its_own():
    """By its file's name, which is exp_name's default, or by --exp-name: it is drawn beside the script it came from."""
    short_run(klac_discrete, 1, "baseline")
    short_run(klac_discrete, 1, "fork", exp_name="klac_noop")
    summary, curves = runs.tables([runs.read_run(path) for path in sorted(Path("runs").iterdir())], False)
    assert set(summary["algorithm"]) == {"KLAC", "KLAC (klac_noop)"}
    assert figures.algorithms_of(summary) == ["KLAC", "KLAC (klac_noop)"]
    figure, numbers = figures.draw_curves(curves, [[("Walk-v0", "return")]])
    assert set(numbers["algorithm"]) == {"KLAC", "KLAC (klac_noop)"}
    colours = {line.get_color() for line in figure.axes[0].lines}
    assert len(colours) == 2


def test_the_cache_notices_changes(monkeypatch):
    run_dir = short_run(sac_discrete, 1, "run")
    task, reads, real = (run_dir, Path("cache")), [], runs.read_run
    monkeypatch.setattr(runs, "read_run", lambda path: reads.append(path) or real(path))
    Path("cache").mkdir()
    first = runs.read_cached(task)
    assert repr(runs.read_cached(task)) == repr(first)  # NaN is not equal to itself
    assert len(reads) == 1
    for file, problem in (("actor.pt", "unfinished"), ("scalars.csv", None), ("args.json", "cannot be read")):
        content = (run_dir / file).read_bytes()
        if problem:
            (run_dir / file).unlink()
            assert runs.read_cached(task).problem.startswith(problem)
        else:
            (run_dir / file).write_bytes(content + b"600,eval/episodic_return,99\n")
            assert runs.read_cached(task).summary["evaluation"] == 99
        (run_dir / file).write_bytes(content)
    (cached,) = Path("cache").iterdir()
    cached.write_text(cached.read_text()[:100])  # a damaged cache is no harm
    assert repr(runs.read_cached(task)) == repr(first)
    assert len(reads) == 5


MATRICES = {"A": np.random.default_rng(1).gamma(2, 1, (12, 5)), "B": np.random.default_rng(2).normal(1, 2, (12, 5))}


@pytest.mark.parametrize("name", statistics.AGGREGATES)
def test_aggregates_and_their_intervals_are_rliables(name):
    theirs = getattr(rliable.metrics, f"aggregate_{name.lower()}")
    rng = np.random.RandomState(0)
    for matrix in MATRICES.values():  # runs x tasks
        samples = list(matrix.T)
        ours = statistics.AGGREGATES[name](*samples)
        assert ours == pytest.approx(theirs(matrix))
        bounds = np.array(statistics.interval(samples, statistics.AGGREGATES[name]))
        estimates = {"x": matrix}
        _, intervals = rliable.library.get_interval_estimates(
            estimates, lambda x: np.array([theirs(x)]), reps=4000, random_state=rng
        )
        np.testing.assert_allclose(bounds, intervals["x"][:, 0], atol=0.08 * np.ptp(bounds))
        assert np.array_equal(bounds, statistics.interval(samples, statistics.AGGREGATES[name]))  # seeded


def test_performance_profiles_are_rliables():
    thresholds = np.linspace(0, 4, 21)
    theirs, intervals = rliable.library.create_performance_profile(MATRICES, thresholds, reps=3000)
    for name, matrix in MATRICES.items():
        samples = list(matrix.T)
        np.testing.assert_allclose(statistics.performance_profile(samples, thresholds), theirs[name])
        low, high = statistics.profile_interval(samples, thresholds)
        np.testing.assert_allclose([low, high], intervals[name], atol=0.035)


def test_unequal_and_single_seeds():
    samples = [np.array([1.0, 2.0, 6.0]), np.array([4.0, 8.0])]
    assert statistics.aggregate_mean(*samples) == pytest.approx((3 + 6) / 2)
    assert statistics.aggregate_median(*samples) == pytest.approx(4.5)
    # The middle three fifths of 1, 2, 6 (a sixth each) and 4, 8 (a quarter each)
    assert statistics.aggregate_iqm(*samples) == pytest.approx((2 * 2 / 15 + 4 / 4 + 6 / 6 + 8 / 20) / (3 / 5))
    many = [np.full(20, 0.2), *np.ones((4, 2))]  # one task's many runs do not outweigh the other tasks
    assert statistics.aggregate_iqm(*many) == pytest.approx(1)
    assert np.isnan(statistics.interval([np.array([1.0, 2.0]), np.array([3.0])], statistics.aggregate_mean)).all()


def test_scores_are_normalised_by_random_and_sac():
    rows = [("T", "SAC", 1, 10.0), ("T", "SAC", 2, 14.0), ("T", "KLAC", 1, 22.0), ("U", "KLAC", 1, 5.0)]
    summary = pd.DataFrame(rows, columns=["task", "algorithm", "seed", "score"]).assign(random=2.0)
    scores, left_out = statistics.normalise(summary)
    assert left_out == ["U"]
    assert scores["SAC"]["T"].tolist() == pytest.approx([0.8, 1.2])
    assert scores["KLAC"]["T"].tolist() == [2.0]


@pytest.fixture
def campaign(tmp_path_factory):
    """Short runs that are said to be of the paper's tasks: the figures do not ask what was played. Trained once."""
    folders, kept = [], tmp_path_factory.getbasetemp() / "campaign"
    if kept.exists():
        shutil.copytree(kept, "runs")
    for task in ("Asterix-v1", "Breakout-v1", "Seaquest-v1", "HalfCheetah-v5", "Reacher-v5"):
        for module, seeds in ((sac_discrete, (1, 2)), (klac_discrete, (1, 2, 3) if task == "Seaquest-v1" else (1,))):
            for seed in seeds:
                folders.append(Path("runs", f"{task}-{module.__name__}-{seed}"))
                if not kept.exists():
                    run_dir = short_run(module, seed, folders[-1].name)
                    args = json.loads((run_dir / "args.json").read_text()) | {"env_id": task}
                    (run_dir / "args.json").write_text(json.dumps(args))
    if not kept.exists():
        shutil.copytree("runs", kept)
    return folders


@pytest.mark.xdist_group("campaign")
def test_all_figures_from_runs_and_again_from_tables(campaign, capsys):
    out = Path("out")
    figures.main(figures.Args(runs=campaign, out=out))
    printed = capsys.readouterr().out
    assert "figure 1: no runs of Hopper-v5" in printed
    names = {f"figure{n}.{suffix}" for n in range(1, 8) for suffix in ("pdf", "png", "csv")}
    assert {path.name for path in out.iterdir()} == names | {"summary.csv", "curves.csv", "table.csv", "table.md"}
    drawn = {path.name: path.read_bytes() for path in out.iterdir()}

    rows = pd.read_csv(out / "table.csv").set_index(["task", "algorithm"])
    summary = pd.read_csv(out / "summary.csv")
    seaquest = summary[(summary["task"] == "Seaquest-v1") & (summary["algorithm"] == "KLAC")]["score"]
    row = rows.loc["Seaquest-v1", "KLAC"]
    assert row["n"] == 3
    assert row["score"] == pytest.approx(seaquest.mean(), rel=1e-3)
    assert row["low"] <= row["score"] <= row["high"]
    assert np.isnan(rows.loc["Asterix-v1", "KLAC"]["low"])  # one seed has no interval
    last = summary[(summary["task"] == "Seaquest-v1") & (summary["algorithm"] == "SAC")]["last_return"]
    row = rows.loc["Seaquest-v1", "SAC"]
    assert row["last_return"] == pytest.approx(last.mean(), rel=1e-3)
    assert (row["last_low"], row["last_high"]) == pytest.approx((last.min(), last.max()), rel=1e-3)  # of two seeds
    figure1 = pd.read_csv(out / "figure1.csv")
    assert set(figure1["tasks"]) == {2}
    figure3 = pd.read_csv(out / "figure3.csv")
    assert set(figure3[figure3["algorithm"] == "KLAC"]["n"]) == {3}

    Path("paper").mkdir()
    Path("paper/figure3.pdf").write_text("another's")
    figures.main(figures.Args(runs=campaign[:1], out=Path("paper"), only=(3,)))  # without a run of Seaquest
    assert Path("paper/figure3.pdf").read_text() == "another's"

    shutil.rmtree("runs")
    capsys.readouterr()
    figures.main(figures.Args(redraw=True, out=out))
    assert capsys.readouterr().err == ""
    again = {path.name: path.read_bytes() for path in out.iterdir()}
    assert again == drawn

    figures.main(figures.Args(redraw=True, out=out, only=(3,)))

    # an algorithm that is not the paper's is drawn too
    for name in ("summary.csv", "curves.csv"):
        known = pd.read_csv(out / name)
        other = known[known["algorithm"] == "SAC"].assign(algorithm="KLAC + reference")
        if name == "summary.csv":
            other["score"] *= 10
        pd.concat([known, other]).to_csv(out / name, index=False)
    capsys.readouterr()
    figures.main(figures.Args(redraw=True, out=out))
    assert "KLAC + reference" in set(pd.read_csv(out / "figure4.csv")["algorithm"])
    rows = pd.read_csv(out / "table.csv").set_index(["task", "algorithm"])
    assert rows.loc["Seaquest-v1", "KLAC + reference"]["n"] == 2
    evaluations = summary[(summary["task"] == "Seaquest-v1") & (summary["algorithm"] == "SAC")]["evaluation"]
    assert rows.loc["Seaquest-v1", "SAC"]["evaluation"] == pytest.approx(evaluations.mean(), rel=1e-3)
    for name in ("summary.csv", "curves.csv"):
        table = pd.read_csv(out / name)
        table[table["algorithm"] == "KLAC + reference"].to_csv(out / name, index=False)
    figures.main(figures.Args(redraw=True, out=out))


def test_a_smoothed_curve_has_no_point_without_a_whole_window_of_data():
    steps = np.arange(1, 41) * 10
    rows = pd.DataFrame({"task": "T", "algorithm": "SAC", "seed": 1, "step": steps, "q": steps.astype(float)})
    rows.loc[rows["step"] < 100, "q"] = np.nan  # before the first update
    rows.loc[rows["step"] == 200, "q"] = np.nan
    curve = figures.curve(rows, "T", "SAC", "q").set_index("step")["mean"]
    assert (curve.index[0], curve.index[-1]) == (140, 360)
    assert curve.to_numpy() == pytest.approx(curve.index.to_numpy())  # the mean of nine points of a line is its middle


def test_runs_too_short_for_a_curve_are_in_the_table(capsys):
    shutil.copytree(ROOT / "results/prefix/figures", "out")
    curves = pd.read_csv("out/curves.csv")
    end = curves.groupby("task")["step"].transform("max")
    curves[curves["step"] > 0.98 * end].to_csv("out/curves.csv", index=False)
    assert len(list(Path("out").glob("figure3.*"))) == 3
    figures.main(figures.Args(redraw=True, out=Path("out"), only=(1, 3)))
    assert "figure 3: runs too short for 9 points in a row\n" in capsys.readouterr().out
    assert not list(Path("out").glob("figure3.*"))  # one of other runs is not left beside these tables
    assert (Path("out") / "table.md").read_text() == (ROOT / "results/prefix/figures/table.md").read_text()


@pytest.mark.xdist_group("campaign")
def test_runs_are_added_to_the_tables_of_earlier_ones(campaign, capsys):
    figures.main(figures.Args(runs=campaign, out=Path("at once"), only=(3,)))
    figures.main(figures.Args(runs=campaign[:6], out=Path("in parts"), only=(3,)))
    first = {name: (Path("in parts") / name).read_text() for name in ("summary.csv", "curves.csv")}
    again = campaign[4:]  # two of them are in the tables already
    capsys.readouterr()
    figures.main(figures.Args(runs=again, keep=True, out=Path("in parts"), only=(3,)))
    assert capsys.readouterr().out.count("note: SAC on Breakout-v1 pools seeds 1 of in parts with 2; ") == 1
    for name in (*first, "table.csv", "figure3.csv", "figure3.png"):
        assert (Path("in parts") / name).read_bytes() == (Path("at once") / name).read_bytes(), name
        assert (Path("in parts") / name).read_text(errors="replace") != first.get(name)

    args = json.loads((campaign[6] / "args.json").read_text())
    total, rows = args["total_timesteps"], campaign[6] / "scalars.csv"
    (campaign[6] / "args.json").write_text(json.dumps(args | {"total_timesteps": 2 * total}))
    rows.write_text(rows.read_text().replace(f"\n{total},eval/", f"\n{2 * total},eval/"))
    before = {path.name: path.read_bytes() for path in Path("at once").iterdir()}
    with pytest.raises(ValueError, match=f"--keep: at once has runs of {args['env_id']} of {total} "):
        figures.main(figures.Args(runs=[campaign[6]], keep=True, out=Path("at once")))
    assert {path.name: path.read_bytes() for path in Path("at once").iterdir()} == before
    with pytest.raises(OSError, match="nowhere"):
        figures.main(figures.Args(runs=[campaign[0]], keep=True, out=Path("nowhere")))

    figures.main(figures.Args(runs=campaign[:1], out=Path("one by one"), only=(5,)))
    figures.main(figures.Args(runs=campaign[1:2], keep=True, out=Path("one by one"), only=(2,)))
    out = capsys.readouterr().out
    assert "note: SAC on Asterix-v1 pools seeds 1 of one by one with 2; of their settings only the budget was" in out
    assert "figure 5: not drawn again: that in one by one is of the tables before" in out


def test_wrong_calls_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["klac-figures", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        console.figures()
    assert capsys.readouterr().err == "klac-figures: nowhere: not a folder\n"
    result = subprocess.run(
        [sys.executable, "-m", "plotting.figures"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "no run given" in result.stderr
    assert not list(Path().iterdir())


def test_a_disk_that_is_full_leaves_both_tables_as_they_were(monkeypatch):
    table, real, written = pd.DataFrame({"a": [1.5]}), pd.DataFrame.to_csv, []
    runs.write_tables(Path(), table, table, ("%.5g", "%.5g"))

    def to_csv(self, path, **kwargs):
        real(self, path, **kwargs)
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", to_csv)
    with pytest.raises(OSError, match="No space left"):
        runs.write_tables(Path(), table * 2, table * 2, ("%.5g", "%.5g"))
    assert {path.name: path.read_text() for path in Path().iterdir()} == dict.fromkeys(
        ("summary.csv", "curves.csv"), "a\n1.5\n"
    )


def test_runs_of_wandb_are_read_like_folders(monkeypatch):
    run_dir = short_run(sac_discrete, 1, "run")
    scalars, _ = runs.read_scalars(run_dir)
    history = [
        {"global_step": int(step), tag: float(value)}
        for tag, columns in scalars.items()
        for step, value in zip(*columns, strict=True)
    ]
    history += history[-30:]  # a resumed run has logged the steps after its checkpoint twice
    config = json.loads((run_dir / "args.json").read_text())
    stored = [SimpleNamespace(name="run", state="finished", config=config, scan_history=lambda: iter(history))]
    stored += [SimpleNamespace(name="gone", state="crashed", config=config, scan_history=lambda: iter(history[:3]))]
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda project: stored))
    first, second = runs.read_wandb("me/klac")
    assert second.summary is None
    expected = runs.read_run(run_dir)
    assert first.settings == expected.settings
    for name, value in expected.summary.items():
        assert first.summary[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), name
    np.testing.assert_allclose(first.curves["return"], expected.curves["return"], rtol=1e-5)

    beginning = min(row["global_step"] for row in history if "charts/episodic_return" in row)
    for part in (
        [row for row in history if row["global_step"] > beginning],  # tracked since a resume
        [row for row in history if "eval/episodic_return" not in row],  # of which the last part was not synced
    ):
        stored[:] = [SimpleNamespace(name="x", state="finished", config=config, scan_history=lambda of=part: iter(of))]
        assert runs.read_wandb("me/klac")[0].problem == "not whole in W&B"

    def refuse(project):
        raise OSError("no login")

    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=refuse))
    with pytest.raises(ValueError, match="--wandb me/klac: no login"):
        runs.read_wandb("me/klac")


@pytest.mark.slow
def test_five_hundred_runs_of_three_million_steps_are_read_in_time():
    """One run of Breakout's size, 60,000 episodes, in 500 folders (linked: the file is read 500 times, from memory). In
    time is in a minute, of two cores that do nothing else."""
    run_dir = short_run(klac_discrete, 1, "one")
    args = json.loads((run_dir / "args.json").read_text()) | {"total_timesteps": 3_000_000, "env_id": "Breakout-v1"}
    tags, rows = [*runs.QUANTITIES.values(), *(f"losses/{i}" for i in range(11))], ["step,tag,value"]
    for step in range(0, 3_000_000, 50):
        for tag in tags if step % 1000 == 0 else [*tags[:2], "charts/q_minus_return"]:
            rows.append(f"{step},{tag},{step / 1e6 + 1 / 3:.9g}")
    rows.append("3000000,eval/episodic_return,7")
    events = run_dir / "scalars.csv"
    events.write_text("\n".join([*rows, ""]))
    folders = []
    for seed in range(500):
        folder = Path(f"many/{seed}")
        folder.mkdir(parents=True)
        os.link(events, folder / events.name)
        os.link(run_dir / "actor.pt", folder / "actor.pt")
        (folder / "args.json").write_text(json.dumps(args | {"seed": seed}))
        folders.append(folder)
    for limit in (60, 10):
        before = os.times()
        summary, _ = runs.tables(runs.read_folders(folders, Path("cache")), False)
        *cpu, seconds = np.subtract(os.times(), before)
        print(f"{events.stat().st_size / 1e6:.1f} MB a run, 500 runs: {seconds:.1f} s, {sum(cpu):.1f} s of a core")
        assert len(summary) == 500
        assert sum(cpu) < 2 * limit


COMMITTED = [
    ("results/figures", figures.MINATAR, (2, 3, 4, 5, 7)),
    ("results/prefix/figures", figures.MUJOCO + figures.MINATAR, tuple(figures.FIGURES)),
]


@pytest.mark.parametrize(("folder", "tasks", "numbers"), COMMITTED)
def test_the_committed_figures_follow_from_the_committed_tables(folder, tasks, numbers):
    source = ROOT / folder
    Path("again").mkdir()
    for name in ("summary.csv", "curves.csv"):
        shutil.copy(source / name, "again")
    figures.main(figures.Args(out=Path("again"), redraw=True))
    for name in ["table.md", "table.csv", *(f"figure{number}.csv" for number in numbers)]:
        assert (Path("again") / name).read_text() == (source / name).read_text(), name
    assert {path.name for path in source.glob("*.png")} == {f"figure{number}.png" for number in numbers}
    assert all(path.stat().st_size > 5000 for path in (*source.glob("*.png"), *source.glob("*.pdf")))
    summary = pd.read_csv(source / "summary.csv")
    assert set(summary["task"]) == set(tasks)
    assert len((source / "commands.txt").read_text().splitlines()) == len(summary)


@pytest.mark.parametrize(("folder", "numbers"), [(folder, numbers) for folder, _, numbers in COMMITTED])
def test_the_committed_figures_name_their_bands_and_scales_and_have_their_legends_outside_the_axes(folder, numbers):
    tables = [pd.read_csv(ROOT / folder / name) for name in ("summary.csv", "curves.csv")]
    for number in numbers:
        figure, _ = figures.FIGURES[number](*tables)
        figure.canvas.draw()
        panels = [axis for axis in figure.axes if axis.axison]
        legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if not axis.axison)]
        assert not any(axis.get_legend() for axis in panels)
        said = [figure.get_supxlabel(), *(legend.get_title().get_text() for legend in legends if legend)]
        assert ("standard deviation" if number == 5 else "95% interval") in " ".join(said).replace("\n", " ")
        for axis in panels:
            if axis.get_yscale() == "symlog":
                assert axis.get_label().endswith("(symlog)")  # shown where it differs from the panel to the left
            assert axis.has_data()
        figures.plt.close(figure)


def test_a_pdf_lies_beside_every_png():
    pictures = list((ROOT / "results").rglob("*.png"))
    assert len(pictures) > 20
    assert all(path.with_suffix(".pdf").is_file() for path in pictures)
