"""The questions that the paper leaves open, one command each: `l3d experiment NAME` (docs/experiments/)."""

EXPERIMENTS: dict[str, str] = {
    "references": "l3d_pl.experiments.references",
    "selectivity": "l3d_pl.experiments.selectivity",
    "steering": "l3d_pl.experiments.steering",
    "completeness": "l3d_pl.experiments.completeness",
    "scaffolding": "l3d_pl.experiments.scaffolding",
}
"""{name on the command line: module}; `l3d_pl.experiments.common` says what such a module holds."""
