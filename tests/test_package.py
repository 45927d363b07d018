"""The wheel: what is in it, and its commands in an environment of their own, far from the repository."""

import json
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import klac_discrete
import sac_discrete

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("package")  # its fixtures are made once
COMMANDS = ("klac-figures", "klac-curves", "klac-landscape")


def call(*command):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, for setuptools writes beside what it builds and takes up what an earlier build left there."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    for name in ("plotting", "benchmark"):
        shutil.copytree(ROOT / name, folder / name)
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder / "dist"]
    built = call(sys.executable, "-m", "pip", "wheel", *flags, folder)
    assert built.returncode == 0, built.stderr
    (path,) = (folder / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment in which the wheel is all that is installed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    flags = ["--python", folder / "bin/python", "install", "--no-deps", "--no-index"]
    installed = call(sys.executable, "-m", "pip", *flags, wheel)
    assert installed.returncode == 0, installed.stderr
    return folder


@pytest.fixture
def packages(environment):
    """Its folder of packages, with this environment's dependencies in reach, but not what is installed editable."""
    (folder,) = environment.glob("lib/python*/site-packages")
    (folder / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    yield folder
    (folder / "dependencies.pth").unlink()


def test_the_wheel_holds_plotting_and_benchmark_in_one_package_and_no_script(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = [path for name in ("plotting", "benchmark") for path in (ROOT / name).iterdir() if path.is_file()]
    assert names == {f"klac_tools/{path.relative_to(ROOT)}" for path in sources}
    assert {"klac_tools/plotting/figures.py", "klac_tools/benchmark/campaign.sh"} < names


@pytest.mark.parametrize("command", COMMANDS)
def test_without_its_dependencies_a_command_says_what_to_install(environment, command):
    result = call(environment / "bin" / command)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"{command}: ")
    assert result.stderr.endswith(" is not installed: pip install 'klac[plot]'\n")


def test_the_installed_commands_draw_runs_made_elsewhere(environment, packages):
    where = "import klac_tools.plotting.runs as runs; print(runs.__file__)"
    assert call(environment / "bin/python", "-c", where).stdout == f"{packages}/klac_tools/plotting/runs.py\n"
    names = ["klac_tools", "plotting", "benchmark", "tabular", "klac_discrete"]
    found = f"from importlib.util import find_spec; print([name for name in {names} if find_spec(name)])"
    assert call(environment / "bin/python", "-c", found).stdout == "['klac_tools']\n"

    flags = {"env_id": "Walk-v0", "total_timesteps": 600, "learning_starts": 100, "log_interval": 20}
    folders = []
    for module in (sac_discrete, klac_discrete):
        folders.append(module.train(module.Args(**flags, eval_episodes=1, buffer_size=1000, compile=False)))
        args = folders[-1] / "args.json"
        args.write_text(json.dumps(json.loads(args.read_text()) | {"env_id": "Breakout-v1"}))
    drawn = call(environment / "bin/klac-figures", *folders, "--only", 5)
    assert drawn.returncode == 0, drawn.stderr
    drawn = call(environment / "bin/klac-curves", *folders, "--bin", 100)
    assert drawn.returncode == 0, drawn.stderr
    for name in ("figures/figure5", "curves/curves"):
        assert Path(f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert Path(f"{name}.png").read_bytes().startswith(b"\x89PNG")
    refused = call(environment / "bin/klac-landscape", folders[0])
    assert (refused.returncode, refused.stderr) == (
        2,
        f"klac-landscape: {folders[0]}: must be a run with continuous actions\n",
    )


def test_the_installed_campaign_is_the_repository_s(environment, packages):
    campaign = packages / "klac_tools/benchmark/campaign.sh"
    flags = ["minatar", "--seeds", "1 2"]
    assert call(campaign, *flags).stdout == call(ROOT / "benchmark/campaign.sh", *flags).stdout != ""
    counted = call(campaign, "--dry-run")
    assert (counted.returncode, counted.stdout, counted.stderr.count("\n")) == (2, "", 1)
    absent = call(environment / "bin/python", "-m", "klac_tools.benchmark.throughput")
    assert (absent.returncode, absent.stderr.splitlines()[-1]) == (
        2,
        "throughput.py: error: sac_continuous.py: must be in the current folder",
    )
