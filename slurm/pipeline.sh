#!/bin/bash
# Three jobs, each after the one before has succeeded: the target, a sweep over it, the sweep's table.
#
#   RUN_DIR=runs/sweep CONFIG=mine.yaml GRID=grid.txt slurm/pipeline.sh --partition=a100
#
# Arguments are options of sbatch for all three; with $(cat slurm/gpu.options) among them, for GPUs.
set -euo pipefail

export CONFIG=${CONFIG:-tms}                                          # see sweep.sbatch
export GRID=${GRID:-grid.txt}
export RUN_DIR=${RUN_DIR:-runs/sweep}
export L3D=${L3D:-l3d}
SETUP=$(realpath "${SETUP:-/dev/null}")
export SETUP
export SCRIPTS=${SCRIPTS:-slurm}
AT_ONCE=${AT_ONCE:-4}                                                 # runs of the sweep side by side
TARGET_CONFIG=${TARGET_CONFIG:-targets/tms}                           # of `l3d target`
TARGET=${TARGET:-runs/targets/tms_seed42.safetensors}                 # the file that CONFIG has as target_weights

mkdir -p "$RUN_DIR"
lines=$(grep -c -v -e '^[[:space:]]*#' -e '^[[:space:]]*$' "$GRID")
# One task, whatever the sweep's runs have.
one=("$@" --parsable --nodes=1 --ntasks-per-node=1 --kill-on-invalid-dep=yes)

target=$(sbatch "${one[@]}" --job-name=l3d-target --output="$RUN_DIR/target-%j.log" --wrap \
	". '$SETUP' && { [ -e '$TARGET' ] || srun '$L3D' target --config '$TARGET_CONFIG' --output '$TARGET'; }")
sweep=$(sbatch "$@" --parsable --kill-on-invalid-dep=yes --dependency="afterok:$target" \
	--array="1-$lines%$AT_ONCE" --output="$RUN_DIR/%a-%A.log" "$SCRIPTS/sweep.sbatch")
table=$(sbatch "${one[@]}" --dependency="afterok:$sweep" --job-name=l3d-collect --output="$RUN_DIR/collect-%j.log" \
	--wrap ". '$SETUP' && '$L3D' slurm collect '$RUN_DIR'")

echo "target: job $target; sweep of $lines runs: job $sweep; table $RUN_DIR/sweep.csv: job $table"
