"""The questions that the paper leaves open, one command each: `l3d experiment NAME` (docs/experiments/)."""

EXPERIMENTS: dict[str, str] = {
    "completeness": "l3d_pl.experiments.completeness",
}
"""{name on the command line: module}; `l3d_pl.experiments.common` says what such a module holds."""
