"""The questions that the paper leaves open, one command each: `l3d experiment NAME` (docs/experiments/)."""

EXPERIMENTS: dict[str, str] = {
    "references": "l3d_pl.experiments.references",
    "selectivity": "l3d_pl.experiments.selectivity",
    "compare-methods": "l3d_pl.experiments.compare_methods",
    "steering": "l3d_pl.experiments.steering",
    "dynamics": "l3d_pl.experiments.dynamics",
    "completeness": "l3d_pl.experiments.completeness",
    "transfer": "l3d_pl.experiments.transfer",
    "scaffolding": "l3d_pl.experiments.scaffolding",
    "dark_matter": "l3d_pl.experiments.dark_matter",
}
"""{name on the command line: module}; `l3d_pl.experiments.common` says what such a module holds."""
