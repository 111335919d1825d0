"""The figures that `l3d figures` has made of a run, for its atlas."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image

from l3d_pl.errors import L3DError

DRAWN_ALREADY = ("networks", "directions")  # of the atlas's own pictures


def figures_of(run_dir: Path, decomposition: str, pictures: Path) -> list[dict[str, str]]:
    """Copy `run_dir/figures/*.png` into `pictures`; returns file, alt text and caption of each.

    Args:
        decomposition: its fingerprint; figures of an earlier fit are left out.

    Raises:
        L3DError: `figures.json` or a PNG that it names is damaged.
    """
    folder, shown = run_dir / "figures", []
    if not (folder / "figures.json").is_file():
        return []
    try:
        kept = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
        if kept["decomposition"] != decomposition:
            return []
        for figure in kept["figures"]:
            path = folder / Path(figure["file"]).name  # nothing from elsewhere
            if path.suffix != ".png" or path.stem in DRAWN_ALREADY:
                continue
            with Image.open(path, formats=["PNG"]) as image:
                image.verify()
            shutil.copyfile(path, pictures / path.name)
            words = {key: str(figure[key]) for key in ("alt", "caption")}
            shown.append({"file": f"pictures/{path.name}"} | words)
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:  # (SyntaxError: Pillow, of a broken PNG)
        raise L3DError(f"figures: {folder} cannot be read ({error}); `l3d figures {run_dir}` makes it again") from error
    return shown
