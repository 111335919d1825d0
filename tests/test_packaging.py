"""What is installed is what the code needs: configs, templates, type markers and the console script travel."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from l3d_pl import configs_path
from l3d_pl.configs_path import shipped_configs
from l3d_pl.errors import L3DError

ROOT = Path(__file__).parents[1]


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_wheel_holds_the_packages_and_the_configs(installed: Path) -> None:
    configs = {f"configs/{name}" for name in files_below(ROOT / "configs")}
    scripts = {f"slurm_scripts/{name}" for name in files_below(ROOT / "slurm")}
    assert configs
    assert scripts
    assert files_below(installed / "l3d_pl") == files_below(ROOT / "l3d_pl") | configs | scripts
    assert files_below(installed / "datamodules") == files_below(ROOT / "datamodules")
    top = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert top == {"l3d_pl", "datamodules"}
    for package in ("l3d_pl", "datamodules"):
        assert (installed / package / "py.typed").is_file()


def test_installed_package_finds_its_own_configs(installed: Path) -> None:
    code = "from l3d_pl.configs_path import shipped_configs; print(shipped_configs())"
    run = subprocess.run([sys.executable, "-c", code], cwd=installed, check=True, capture_output=True, text=True)
    assert Path(run.stdout.strip()) == installed / "l3d_pl" / "configs"


def test_console_script_is_declared(installed: Path) -> None:
    (entry_points,) = installed.glob("l3d_pl-*.dist-info/entry_points.txt")
    assert "l3d = l3d_pl.cli:main" in entry_points.read_text().splitlines()


def test_checkout_finds_its_configs() -> None:
    assert shipped_configs() == ROOT / "configs"


def test_configs_of_somebody_else_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(configs_path, "__file__", str(tmp_path / "l3d_pl" / "configs_path.py"))
    with pytest.raises(L3DError, match="configs that come with l3d_pl are missing"):
        shipped_configs()
