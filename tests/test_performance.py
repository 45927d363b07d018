"""What makes the scripts fast changes no numbers, and the benchmark measures what it says."""

import csv
import importlib
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import klac_discrete
from benchmark import throughput
from tests.test_runs import SCRIPTS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def conversions(monkeypatch):
    """Counts the tensors that are handed to oneDNN."""
    calls, real = [], torch.Tensor.to_mkldnn
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda self: calls.append(self.shape) or real(self))
    for name in SCRIPTS:
        monkeypatch.setattr(importlib.import_module(name), "use_onednn", True)
    return calls


@pytest.mark.skipif(not shutil.which("lscpu"), reason="no lscpu to compare with")
def test_onednn_is_used_on_zen_5_alone():
    printed = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    cpu = {key: value.strip() for key, _, value in (line.partition(":") for line in printed.splitlines())}
    zen5 = cpu.get("Vendor ID") == "AuthenticAMD" and cpu.get("CPU family") == "26"
    assert klac_discrete.use_onednn == (zen5 and torch.backends.mkldnn.is_available())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("AuthenticAMD\ncpu family\t: 26", True),
        ("AuthenticAMD\ncpu family\t: 25", False),
        ("GenuineIntel\ncpu family\t: 26", False),
    ],
)
def test_zen_5_is_known_by_vendor_and_family(monkeypatch, line, expected):
    real = Path.read_text
    cpuinfo = f"processor\t: 0\nvendor_id\t: {line}\nmodel\t\t: 2\n"
    monkeypatch.setattr(Path, "read_text", lambda self, *a: cpuinfo if str(self) == "/proc/cpuinfo" else real(self, *a))
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/proc/cpuinfo")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert runpy.run_path(ROOT / "klac_discrete.py")["use_onednn"] is expected


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")
def test_linear_by_onednn_is_nn_linear(conversions):
    torch.manual_seed(0)
    fast, plain = klac_discrete.Linear(40, 30), torch.nn.Linear(40, 30)
    plain.load_state_dict(fast.state_dict())
    x, y = (torch.randn(64, 40).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    fast(x).square().sum().backward()
    assert conversions == [(64, 40)]
    plain(y).square().sum().backward()
    pairs = ((x, y), (fast.weight, plain.weight), (fast.bias, plain.bias))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(fast(x[:1]), plain(x[:1]))  # an action: too small to gain
    assert len(conversions) == 1


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")
@pytest.mark.parametrize("name", SCRIPTS)
def test_updates_go_through_onednn_and_acting_does_not(conversions, name):
    module = importlib.import_module(name)
    flags = {"env_id": SCRIPTS[name][0], "total_timesteps": 80, "learning_starts": 40, "batch_size": 16}
    module.train(module.Args(**flags, buffer_size=80, eval_episodes=1))
    samples = {128} if "adaent" in name else set()  # 8 actions a state
    assert set(Counter(shape[0] for shape in conversions)) == {16} | samples


def losses_of(module, compiled, **flags):
    """The critics' and the actor's losses of every update of a short run."""
    args = module.Args(compile=compiled, run_name=f"compiled-{compiled}", eval_episodes=1, log_interval=1, **flags)
    logged, real = [], module.check_finite
    module.check_finite = lambda name, loss, *rest: logged.append((name, loss.item()))
    try:
        module.train(args)
    finally:
        module.check_finite = real
    return [name for name, _ in logged], np.array([value for _, value in logged])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize(
    "name", ["klac_discrete", *(pytest.param(name, marks=pytest.mark.slow) for name in list(SCRIPTS)[1:])]
)
def test_compiled_losses_are_the_eager_ones_over_the_first_hundred_updates(name):
    import torch._inductor.config as inductor

    module = importlib.import_module(name)
    updates = 4 if "discrete" in name else 1
    flags = {"env_id": SCRIPTS[name][0], "learning_starts": 100, "total_timesteps": 101 + 100 * updates}
    names, eager = losses_of(module, False, **flags)
    with inductor.patch(fallback_random=True):  # compiled code has a random generator of its own
        same_names, compiled = losses_of(module, True, **flags)
    assert names == same_names
    assert names.count("qf_loss") == 100
    np.testing.assert_allclose(compiled, eager, rtol=2e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", SCRIPTS)
def test_cuda_graphs_learn_like_the_eager_loop(name):
    module = importlib.import_module(name)
    flags = {"env_id": SCRIPTS[name][0], "learning_starts": 100, "total_timesteps": 600}
    means = [losses_of(module, compiled, **flags)[1].mean() for compiled in (False, True)]
    assert means[0] == pytest.approx(means[1], rel=0.5)  # compiled code has a random generator of its own


def test_the_split_gives_each_section_its_time(monkeypatch):
    script = ["def train():", "    # Act: slowly", "    pass", "    # Critics: quickly", "    pass"]
    split = Counter()
    handle = throughput.sampler(script, split)

    def at(line):
        code = compile("def train():\n" + "\n" * (line - 2) + "    yield", "script", "exec")
        namespace = {}
        exec(code, namespace)
        generator = namespace["train"]()
        next(generator)
        return generator.gi_frame

    for line, pause in ((3, 0.02), (5, 0.01), (3, 0.02)):
        time.sleep(pause)
        handle(None, at(line))
    assert split.keys() == {"acting", "critics"}
    assert split["acting"] > 0.04 > 0.02 > split["critics"] > 0.01


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


def test_the_committed_tables_are_what_the_readme_says():
    with (ROOT / "results/throughput/rates.csv").open() as file:
        rates = {(r["task"], r["contestant"], r["setting"]): float(r["steps_per_second"]) for r in csv.DictReader(file)}
    names = {"stable_baselines3": "Stable-Baselines3 2.9 SAC", "sbx": "SBX 0.28 SAC (JAX)"}
    names["benchmark.plain_sac_discrete"] = "the loop as one first writes it"
    readme = (ROOT / "README.md").read_text()
    for task, contestant, _ in rates:
        if task != "floor":
            cells = " | ".join(f"{rates[task, contestant, setting]:.0f}" for setting in ("1x1", "1x2", "2x1"))
            assert f"| {names.get(contestant, f'`{contestant}.py`')} | {cells} |" in readme
