"""Where the YAML files that come with the package lie."""

from pathlib import Path

from l3d_pl.errors import L3DError


def shipped_configs() -> Path:
    """The folder of the shipped configs: `l3d_pl/configs` in an installed package, `configs` in a checkout.

    Raises:
        L3DError: neither folder is there (a broken installation).
    """
    package = Path(__file__).parent
    installed, checkout = package / "configs", package.parent / "configs"
    # The second one counts only beside our own pyproject.toml: in site-packages, `configs` would be somebody else's.
    if installed.is_dir():
        return installed
    if checkout.is_dir() and (package.parent / "pyproject.toml").is_file():
        return checkout
    raise L3DError(f"the configs that come with l3d_pl are missing: neither {installed} nor {checkout} is there")
