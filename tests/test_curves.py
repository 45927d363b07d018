"""plotting/curves.py on real, short runs."""

import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

import klac_discrete
import sac_adaent_continuous
import sac_continuous
from plotting import curves, figures

ROOT = Path(__file__).parent.parent


def finished_run(seed, **flags):
    args = klac_discrete.Args(env_id="Walk-v0", seed=seed, total_timesteps=600, learning_starts=100, **flags)
    args.log_interval, args.eval_episodes, args.batch_size, args.compile = 20, 1, 16, False
    return klac_discrete.train(args)


def test_tables_and_figure_follow_from_the_runs(scalars):
    runs = [finished_run(seed, beta=beta) for beta in (0.0, 0.001, 0.1) for seed in (1, 2)]
    curves.main(curves.Args(runs=runs, out=Path("out"), bin=200))
    table, summary = pd.read_csv("out/curves.csv"), pd.read_csv("out/summary.csv")
    assert len(summary) == len(runs)
    assert len(table) == 3 * len(runs)

    returns = scalars(runs[0])["charts/episodic_return"]
    names = ["KLAC-b", *(f"KLAC, beta {beta}" for beta in (0.001, 0.1))]
    assert {*zip(summary["algorithm"], summary["seed"], strict=True)} == {(a, s) for a in names for s in (1, 2)}
    row = summary[(summary["algorithm"] == "KLAC-b") & (summary["seed"] == 1)].iloc[0]
    assert row["random"] == pytest.approx(np.mean([v for step, v in returns if step < 100]), rel=1e-3)
    assert row["last 10%"] == pytest.approx(np.mean([v for step, v in returns if step >= 540]), rel=1e-3)
    assert row["best 10"] == pytest.approx(np.mean(sorted(v for _, v in returns)[-10:]), rel=1e-3)
    curve = table[(table["algorithm"] == "KLAC-b") & (table["seed"] == 1)].set_index("step")["return"]
    assert list(curve.index) == [200, 400, 600]
    assert curve[400] == pytest.approx(np.mean([v for step, v in returns if 200 <= step < 400]), rel=1e-3)

    curves.main(curves.Args(runs=runs[:1], out=Path("half"), bin=200, steps=400))
    row = pd.read_csv("half/summary.csv").iloc[0]
    assert row["steps"] == 400
    assert row["last 10%"] == pytest.approx(np.mean([v for step, v in returns if 360 <= step < 400]), rel=1e-3)
    assert row["best 10"] == pytest.approx(np.mean(sorted(v for step, v in returns if step < 400)[-10:]), rel=1e-3)

    drawn = Path("out/curves.png").read_bytes()
    shutil.rmtree("runs")
    curves.main(curves.Args(redraw=True, out=Path("out")))
    assert Path("out/curves.png").read_bytes() == drawn
    assert Path("out/curves.pdf").read_bytes().startswith(b"%PDF")


def test_seeds_without_a_quantity_are_said_and_not_counted(monkeypatch, capsys):
    rows = pd.DataFrame(
        {"task": "T", "algorithm": "KLAC", "seed": np.repeat([1, 2, 3], 4), "step": [10, 20, 30, 40] * 3}
    )
    rows = rows.assign(kl=[0.1, np.nan, 0.1, np.nan] * 3, target_kl=[0.2, np.nan, 0.2, np.nan] * 3)
    rows.loc[rows["seed"] > 1, ["kl", "target_kl"]] = np.nan
    drawn = []
    monkeypatch.setattr(curves, "save", lambda figure, stem, dpi: drawn.append(figure))
    curves.draw(rows, pd.DataFrame({"task": ["T"], "random": [0.0]}), ("kl",), Path("out"))
    assert capsys.readouterr().out == "T, KLAC: KL to the reference (nats): from 1 of 3 seeds\n"
    assert "KLAC (n=1)" in [text.get_text() for text in drawn[0].legends[0].get_texts()]
    other = rows.assign(algorithm="SAC", kl=np.nan, target_kl=np.nan)  # which has none of it
    curves.draw(pd.concat([rows, other]), pd.DataFrame({"task": ["T"], "random": [0.0]}), ("kl",), Path("out"))
    assert not any("SAC" in text.get_text() for text in drawn[1].legends[0].get_texts())
    (budget,) = [line for line in drawn[0].axes[0].lines if line.get_color() == curves.BUDGET]
    assert list(budget.get_ydata()[:3]) == [0.2] * 3  # an interpolated line, where bins are shorter than log intervals


def labels(*settings):
    runs = [(pd.DataFrame(index=[0]), {"task": "A", "algorithm": "SAC"}, each) for each in settings]
    curves.tell_apart(runs)
    assert all(table["algorithm"].tolist() == [summary["algorithm"]] for table, summary, _ in runs)
    return [summary["algorithm"] for _, summary, _ in runs]


def test_where_several_settings_differ_only_the_uncommon_values_are_named():
    base = {"tau": 0.005, "scale": 5.0}
    assert labels(base, base | {"tau": 0.05}) == ["SAC, tau 0.005", "SAC, tau 0.05"]
    assert labels(base, base | {"tau": 0.05}, base | {"tau": 1}, base | {"scale": 1}) == [
        "SAC",
        "SAC, tau 0.05",
        "SAC, tau 1",
        "SAC, scale 1",
    ]
    assert labels(base, {"tau": 1, "scale": 1}) == ["SAC, scale 5.0, tau 0.005", "SAC, scale 1, tau 1"]
    assert labels(base, base) == ["SAC", "SAC"]


def test_evaluations_are_points_of_the_bins_that_end_there(scalars):
    runs = [finished_run(seed, eval_interval=150) for seed in (1, 2)]
    curves.main(curves.Args(runs=[*runs, finished_run(3)], out=Path("out"), bin=150, show=("evaluation",)))
    table = pd.read_csv("out/curves.csv")
    for seed, run_dir in zip((1, 2), runs, strict=True):
        rows = table[table["seed"] == seed]
        for name, tag in (("evaluation", "eval/episodic_return"), ("stochastic", "eval/stochastic_return")):
            logged = scalars(run_dir)[tag]
            assert [step for step, _ in logged] == list(rows["step"]) == [150, 300, 450, 600]
            np.testing.assert_allclose(rows[name], [value for _, value in logged], rtol=1e-4)
    assert table[table["seed"] == 3]["evaluation"].isna().all()  # one at the end is no curve


def test_runs_with_a_reference_stand_beside_those_without(scalars):
    plain = [finished_run(seed) for seed in (1, 2)]
    referred = [finished_run(seed, reference=str(plain[seed - 1])) for seed in (1, 2)]
    fixed = finished_run(1, autotune=False, bias=False)
    curves.main(curves.Args(runs=[*plain, *referred, fixed], out=Path("out"), bin=200, show=("return", "kl")))
    summary = pd.read_csv("out/summary.csv").set_index(["algorithm", "seed"])
    assert set(summary.index) == {(a, s) for a in ("KLAC", "KLAC + reference") for s in (1, 2)} | {("KLAC-b", 1)}
    for key, run_dir in ((("KLAC", 2), plain[1]), (("KLAC + reference", 1), referred[0])):
        logged = scalars(run_dir)
        for column in ("kl", "target_kl"):
            expected = np.mean([value for step, value in logged[f"policy/{column}"] if step >= 540])
            assert summary.loc[key, column] == pytest.approx(expected, rel=1e-3)
    assert np.isnan(summary.loc[("KLAC-b", 1), "target_kl"])  # a fixed temperature has no budget
    other = finished_run(3, reference=str(plain[0]), gamma=0.9)
    curves.main(curves.Args(runs=[*plain, *referred, other], out=Path("gammas"), bin=200))
    names = {"KLAC": {1, 2}, "KLAC + reference, gamma 0.99": {1, 2}, "KLAC + reference, gamma 0.9": {3}}
    assert pd.read_csv("gammas/summary.csv").groupby("algorithm")["seed"].agg(set).to_dict() == names


def test_what_only_some_runs_log_is_in_their_rows_alone(scalars):
    flags = {"env_id": "Drift-v0", "total_timesteps": 300, "learning_starts": 100, "log_interval": 20}
    flags["batch_size"] = 16
    folders = []
    for module in (sac_continuous, sac_adaent_continuous):
        folders.append(module.train(module.Args(**flags, eval_episodes=1, buffer_size=1000, compile=False)))
    curves.main(curves.Args(runs=folders, out=Path("out"), bin=100))
    summary = pd.read_csv("out/summary.csv").set_index("algorithm")
    logged = scalars(folders[1])
    for column in ("similarity", "twin_similarity", "plain_share"):
        expected = np.mean([value for step, value in logged[f"adaent/{column}"] if step >= 270])
        assert summary.loc["SAC-AdaEnt", column] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert np.isnan(summary.loc["SAC", column])
    curves.main(curves.Args(runs=folders[:1], out=Path("plain"), bin=100))
    assert "similarity" not in pd.read_csv("plain/summary.csv")
    pd.read_csv("plain/curves.csv").drop(columns="kl").to_csv("plain/curves.csv", index=False)
    with pytest.raises(ValueError, match="--show kl"):
        curves.main(curves.Args(redraw=True, out=Path("plain"), show=("kl",)))


def test_settings_that_differ_on_a_task_are_part_of_the_name_and_those_that_differ_between_tasks_are_not():
    folders = [finished_run(1), finished_run(2), finished_run(1, p_start=0.7, p_end=0.9)]
    for folder, task in zip(folders, ("Breakout-v1", "Asterix-v1", "Breakout-v1"), strict=True):
        args = json.loads((folder / "args.json").read_text()) | {"env_id": task}
        args |= {"tau": 0.5} if task == "Asterix-v1" else {"total_timesteps": args["seed"] * 600}
        (folder / "args.json").write_text(json.dumps(args))
    longer = finished_run(2, p_start=0.7, p_end=0.9)
    args = json.loads((longer / "args.json").read_text()) | {"env_id": "Breakout-v1", "total_timesteps": 700}
    (longer / "args.json").write_text(json.dumps(args))
    rows = longer / "scalars.csv"
    rows.write_text(rows.read_text().replace("\n600,eval/", "\n700,eval/"))
    curves.main(curves.Args(runs=[*folders, longer], out=Path("out"), bin=200, steps=600))
    rows = pd.read_csv("out/summary.csv")
    expected = {
        ("Asterix-v1", "KLAC, p_end 0.8, p_start 0.5", 2),
        ("Breakout-v1", "KLAC, p_end 0.8, p_start 0.5", 1),
        ("Breakout-v1", "KLAC, p_end 0.9, p_start 0.7", 1),
        ("Breakout-v1", "KLAC, p_end 0.9, p_start 0.7", 2),  # cut by --steps
    }
    assert {*rows[["task", "algorithm", "seed"]].itertuples(index=False, name=None)} == expected
    assert set(pd.read_csv("out/curves.csv")["algorithm"]) == {name for _, name, _ in expected}
    curves.main(curves.Args(runs=[folders[2], longer], out=Path("lengths"), bin=200))
    names = {"KLAC, total_timesteps 600", "KLAC, total_timesteps 700"}
    assert set(pd.read_csv("lengths/summary.csv")["algorithm"]) == names
    curves.main(curves.Args(runs=[folders[2], longer], out=Path("half"), bin=200, steps=650))  # one is shorter
    assert set(pd.read_csv("half/summary.csv")["algorithm"]) == {
        "KLAC, total_timesteps 600", "KLAC, total_timesteps 650"
    }  # fmt: skip


def test_a_mean_is_of_all_seeds_in_every_bin():
    """Seed 2's episodes end in every second bin, and its returns are twice seed 1's."""
    steps = [500, 1000, 1500, 2000, 2500]
    table = pd.DataFrame(
        {"seed": [1] * 5 + [2] * 5, "step": steps * 2, "q": [1.0] * 5 + [2, np.nan, 2, np.nan, np.nan]}
    )
    seeds = curves.seeds_by_step(table, "q")
    np.testing.assert_array_equal(seeds.mean(axis=1, skipna=False), [1.5, 1.5, 1.5, np.nan, np.nan])


def test_the_tables_of_another_command_are_not_overwritten():
    Path("out").mkdir()
    Path("out/summary.csv").write_text("task,algorithm,seed,score\n")
    with pytest.raises(ValueError, match="--out out: must be another folder"):
        curves.main(curves.Args(redraw=True, out=Path("out")))
    Path("out/summary.csv").write_text("task,algorithm,seed,best 10\n")
    with pytest.raises(ValueError, match="--out out: must be another folder"):
        figures.main(figures.Args(redraw=True, out=Path("out")))


def test_forks_beside_a_sweep_have_colours_of_their_own():
    names = ["KLAC (x)", "KLAC, beta 0.01", "KLAC, beta 0.03", "KLAC, beta 0.1", "SAC (y)"]
    assert len({str(style) for style in curves.swept(names).values()}) == 5


def test_a_folder_without_its_args_stops_no_other(capsys):
    good, bad = finished_run(1), finished_run(2)
    (bad / "args.json").unlink()
    curves.main(curves.Args(runs=[bad, good], out=Path("out"), bin=200))
    assert f"left out: {bad}: [Errno 2] No such file" in capsys.readouterr().out


def test_wrong_calls_and_damaged_runs_are_refused(capsys):
    first = finished_run(1)
    with pytest.raises(ValueError, match="the same task, algorithm and seed as runs/"):
        curves.main(curves.Args(runs=[first, finished_run(1)], out=Path("out")))
    with pytest.raises(ValueError, match="finished"):
        curves.main(curves.Args(runs=[Path("runs")], out=Path("out")))
    with pytest.raises(ValueError, match="no run given"):
        curves.main(curves.Args(out=Path("out")))
    for flags, word in (
        ({"bin": 0}, "--bin 0: must"),
        ({"steps": 0}, "--steps 0: must"),
        ({"steps": 50}, "cut too short: it has no q"),
    ):
        with pytest.raises(ValueError, match=word):
            curves.main(curves.Args(runs=[first], out=Path("out"), **flags))
    args, rows = first / "args.json", first / "scalars.csv"
    for text in ("[1]", "{}", "{", json.dumps(json.loads(args.read_text()) | {"env_id": 3})):
        (copy := Path("copy")).mkdir(exist_ok=True)
        for file in (first / "actor.pt", rows):
            shutil.copy(file, copy)
        (copy / "args.json").write_text(text)
        with pytest.raises(ValueError, match=r"copy: args\.json is"):
            curves.main(curves.Args(runs=[copy], out=Path("out")))
        curves.main(curves.Args(runs=[copy, first], out=Path("others")))  # it stops no figure of the others
        assert len(pd.read_csv("others/summary.csv")) == 1
        assert "left out: copy: args.json is" in capsys.readouterr().out
    content = rows.read_bytes()
    for damage in (content[: len(content) // 2], content.replace(b"\n500,", b"\n5x0,", 1), b""):
        rows.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{first}: its scalars are damaged"):
            curves.main(curves.Args(runs=[first], out=Path("out")))
    assert not Path("out").exists()


def test_hours_are_those_up_to_the_last_step_that_is_read(scalars):
    run_dir = finished_run(1)
    path = run_dir / "scalars.csv"
    for steps in (600, 300):
        curves.main(curves.Args(runs=[run_dir], out=Path("out"), bin=200, steps=steps))
        expected = [value for step, value in scalars(run_dir)["charts/hours"] if step < steps][-1]
        assert pd.read_csv("out/summary.csv")["hours"].item() == pytest.approx(expected, rel=1e-3)
    path.write_text("".join(row for row in path.read_text().splitlines(True) if "charts/hours" not in row))
    curves.main(curves.Args(runs=[run_dir], out=Path("out"), bin=200))
    assert np.isnan(pd.read_csv("out/summary.csv")["hours"].item())


def test_a_swept_number_is_one_sequence_of_colours_and_no_variants_colour():
    styles = curves.swept(["KLAC, beta 0.03", "KLAC, beta 0.1", "KLAC, beta 0.001", "KLAC-b", "SAC"])
    assert styles["SAC"] == curves.STYLES["SAC"]
    assert styles["KLAC-b"] == curves.STYLES["KLAC-b"]
    shades = [sum(styles[f"KLAC, beta {beta}"][0][:3]) for beta in ("0.001", "0.03", "0.1")]
    assert shades == sorted(shades)  # from dark to light
    assert len(set(shades)) == 3
    targets = curves.swept([f"SAC, target_entropy -{i}.0" for i in range(1, 7)])
    assert len({tuple(colour) for colour, _ in targets.values()}) == 6


def test_no_bin_ends_beyond_the_run():
    table, _, _ = curves.read_run(finished_run(1), 250, None)
    total = json.loads((finished_run(1) / "args.json").read_text())["total_timesteps"]
    assert total % 250 != 0
    assert table["step"].iloc[-1] == total


def pictures(monkeypatch, folder, show):
    """The figure that is drawn from a folder of committed tables."""
    drawn = []
    monkeypatch.setattr(curves, "save", lambda figure, stem, dpi: drawn.append(figure))
    tables = (pd.read_csv(ROOT / "results" / folder / f"{name}.csv") for name in ("curves", "summary"))
    curves.draw(*tables, show, Path())
    drawn[0].canvas.draw()
    return drawn[0]


def test_a_figure_says_what_a_point_is_and_names_the_scales(monkeypatch):
    figure = pictures(monkeypatch, "prefix/sac_vs_klac", ("return", "q", "alpha"))
    (legend,) = figure.legends
    assert legend.get_title().get_text() == (
        "a point: the mean over 10,000 steps; thin: a seed; thick: the mean of the seeds"
    )
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels == [
        *2 * ["episodic return"], "mean Q of a batch (symlog)", "mean Q of a batch", *2 * ["temperature alpha (log)"]
    ]  # fmt: skip
    assert [axis.get_yscale() for axis in figure.axes] == ["linear", "linear", "symlog", "linear", "log", "log"]
    decades = pictures(monkeypatch, "breakout_3m", ("alpha", "q_minus_return"))  # of alpha nine, of Q eight
    for axis in (*figure.axes, *decades.axes):
        low, high = axis.get_ylim()
        assert sum(low <= tick <= high for tick in axis.get_yticks()) >= 3
        assert axis.get_xlim()[0] == 0
        assert axis.get_legend() is None
    mixed = pictures(monkeypatch, "beta", ("return",)).legends[0]  # two seeds on some tasks, one on others
    assert mixed.get_title().get_text().endswith("; thin: a seed; thick: the mean of the seeds")
    single = pictures(monkeypatch, "prefix/checks/breakout_v0", ("return",)).legends[0]
    assert single.get_title().get_text() == "a point: the mean over 5,000 steps"  # one seed has no thin line


@pytest.mark.parametrize(("steps", "points"), [([10_000, 15_000], 0), ([10_000], 1), ([200_000, 400_000, 500_000], 0)])
def test_a_point_is_said_to_be_what_a_whole_one_is_and_a_single_one_is_seen(monkeypatch, steps, points):
    drawn = []
    monkeypatch.setattr(curves, "save", lambda figure, stem, dpi: drawn.append(figure))
    table = pd.DataFrame({"task": "T", "algorithm": "SAC", "seed": 1, "step": steps, "return": 1.0})
    curves.draw(table, pd.DataFrame({"task": ["T"], "random": [np.nan]}), ("return",), Path())
    assert drawn[0].legends[0].get_title().get_text() == f"a point: the mean over {steps[0]:,} steps"
    (line,) = drawn[0].axes[0].get_lines()
    assert (line.get_marker() == ".") == bool(points)


@pytest.mark.parametrize("folder", ["reference/minatar", "reference/halfcheetah", "beta", "prefix/beta_sweep"])
def test_a_colour_means_one_thing(monkeypatch, folder):
    figure = pictures(monkeypatch, folder, ("return", "kl") if "reference" in folder else ("return",))
    (legend,) = figure.legends
    names = {text.get_text(): matplotlib.colors.to_hex(line.get_color()) for line, text in
             zip(legend.legend_handles, legend.get_texts(), strict=True)}  # fmt: skip
    assert len(set(names.values())) == len(names)
    colours = {matplotlib.colors.to_hex(line.get_color()) for axis in figure.axes for line in axis.get_lines()}
    assert colours == set(names.values())  # and nothing is drawn that the legend does not name


def test_algorithms_that_are_no_variants_have_colours_of_their_own():
    colours = [colour for colour, _ in (*figures.STYLES.values(), *figures.OTHERS)]
    colours += [matplotlib.colors.to_hex(colour) for colour in (curves.RANDOM, curves.BUDGET)]
    shades = np.array([matplotlib.colors.to_rgb(colour) for colour in colours])
    distances = np.abs(shades[:, None] - shades).sum(2) + 9 * np.eye(len(colours))
    assert distances.min() > 0.2
