#!/bin/bash
# Four jobs, each after the one before has succeeded: the target, a sweep over it, the analysis and atlas of each run (of
# toys the score against the ground truth too), the sweep's table.
#
#   RUN_DIR=runs/sweep CONFIG=mine.yaml GRID=grid.txt TARGET_CONFIG=my_target.yaml TARGET=my_target.safetensors \
#       slurm/pipeline.sh --partition=a100
#
# Arguments are options of sbatch for all of them; with $(cat slurm/gpu.options) among them, for GPUs.
set -euo pipefail

export CONFIG=${CONFIG:-tms}                                          # see sweep.sbatch
GRID=${GRID:-grid.txt}
export RUN_DIR=${RUN_DIR:-runs/sweep}
export L3D=${L3D:-l3d}
SETUP=$(realpath "${SETUP:-/dev/null}")
export SETUP
export SCRIPTS=${SCRIPTS:-slurm}
AT_ONCE=${AT_ONCE:-4}                                                 # runs of the sweep side by side
TARGET_CONFIG=${TARGET_CONFIG:-targets/tms}                           # of `l3d target`
TARGET=${TARGET:-runs/targets/tms_seed42.safetensors}                 # the file that CONFIG has as target_weights

mkdir -p "$RUN_DIR/slurm"
cp "$GRID" "$RUN_DIR/slurm/grid.txt" # the sweep may start long after this, when the file is another
export GRID=$RUN_DIR/slurm/grid.txt
lines=$(grep -c -v -e '^[[:space:]]*#' -e '^[[:space:]]*$' "$GRID")
# One task, whatever the sweep's runs have.
one=("$@" --parsable --nodes=1 --ntasks-per-node=1 --kill-on-invalid-dep=yes)

target=$(sbatch "${one[@]}" --job-name=l3d-target --output="$RUN_DIR/target-%j.log" --wrap \
	". '$SETUP' && { [ -e '$TARGET' ] || srun '$L3D' target --config '$TARGET_CONFIG' --output '$TARGET'; }")
sweep=$(sbatch "$@" --parsable --kill-on-invalid-dep=yes --dependency="afterok:$target" \
	--array="1-$lines%$AT_ONCE" --output="$RUN_DIR/%a-%A.log" "$SCRIPTS/sweep.sbatch")
run="'$RUN_DIR'/\$SLURM_ARRAY_TASK_ID"
analysis=$(sbatch "${one[@]}" --dependency="afterok:$sweep" --job-name=l3d-analysis --array="1-$lines%$AT_ONCE" \
	--output="$RUN_DIR/%a-analysis-%A.log" --wrap \
	". '$SETUP' && srun '$L3D' atlas $run && { [ ! -e $run/score.json ] || srun '$L3D' score $run; }")
table=$(sbatch "${one[@]}" --dependency="afterok:$analysis" --job-name=l3d-collect --output="$RUN_DIR/collect-%j.log" \
	--wrap ". '$SETUP' && '$L3D' slurm collect '$RUN_DIR'")

echo "target: job $target; sweep of $lines runs: job $sweep; analysis of each: job $analysis;" \
	"table $RUN_DIR/sweep.csv: job $table"
