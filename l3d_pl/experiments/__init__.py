"""The questions that the paper leaves open, one command each: `l3d experiment NAME` (docs/experiments/)."""

EXPERIMENTS: dict[str, str] = {
    "steering": "l3d_pl.experiments.steering",
    "completeness": "l3d_pl.experiments.completeness",
}
"""{name on the command line: module}; `l3d_pl.experiments.common` says what such a module holds."""
