"""Where the YAML files and the batch scripts that come with the package lie."""

from pathlib import Path

from l3d_pl.errors import L3DError


def shipped_configs() -> Path:
    """The folder of the shipped configs: `l3d_pl/configs` in an installed package, `configs` in a checkout.

    Raises:
        L3DError: neither folder is there (a broken installation).
    """
    return _shipped("configs", "configs")


def slurm_scripts() -> Path:
    """The folder of the batch scripts: `l3d_pl/slurm_scripts` in an installed package, `slurm` in a checkout."""
    return _shipped("slurm_scripts", "slurm")


def _shipped(in_package: str, in_checkout: str) -> Path:
    package = Path(__file__).parent
    installed, checkout = package / in_package, package.parent / in_checkout
    # The second one counts only beside our own pyproject.toml: in site-packages, it would be somebody else's.
    if installed.is_dir():
        return installed
    if checkout.is_dir() and (package.parent / "pyproject.toml").is_file():
        return checkout
    raise L3DError(f"the {in_checkout} that come with l3d_pl are missing: neither {installed} nor {checkout} is there")
