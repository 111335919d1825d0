# Sourced by train.sbatch and sweep.sbatch: `l3d fit` on all tasks of the job, and again until it has finished.
#
#   the run has finished (RUN_DIR/finished)       the job ends; started again, it ends at once
#   USR1 before the time limit                    the ranks end their batch and save; requeued
#   a lost rank (kill -9, out of memory)          srun ends the others; requeued, goes on from the last checkpoint
#   a lost node, preemption                       Slurm requeues the job by itself (--requeue)
#   bad input (exit code 2 of any task), scancel  the job ends
#   RETRIES starts in a row that saved nothing    the job ends: something is wrong that time does not mend

# In an array, SLURM_JOB_ID alone can stand for all tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
stopped= # whether the signal has come

say() { echo "== $(date '+%F %T') job $job: $*"; }

# The trap stands before anything else runs: Python takes seconds until it listens to signals, and dies of one before.
trap 'stopped=yes; say "the signal has come"' USR1

# Seconds from the signal until the ranks are given up: GRACE, but 10 before the time limit, which are for the requeue.
grace() {
	local end left
	end=$(squeue --noheader --jobs "$job" --format %e) && end=$(date -d "${end:-none}" +%s 2> /dev/null) \
		|| { echo "$GRACE"; return; }
	left=$((end - $(date +%s) - 10))
	echo $((left > GRACE ? GRACE : left < 5 ? 5 : left))
}

saved() { [ "$RUN_DIR/checkpoints/last.ckpt" -nt "$starts" ]; }

# fit ARGUMENTS...: `l3d fit` in RUN_DIR, from its last checkpoint where there is one. Does not return.
fit() {
	local step code=0 second seconds
	starts=$RUN_DIR/slurm/starts   # a line for each start since something was saved
	running=$RUN_DIR/slurm/running # there until a start is seen to end
	if [ -e "$RUN_DIR/finished" ]; then say "$RUN_DIR has finished before"; exit 0; fi
	mkdir -p "$RUN_DIR/slurm" || exit 1
	! saved || rm -f "$starts"
	[ ! -e "$running" ] || say "the start before this one ended without a word: its node was lost, or Slurm ended it"
	say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST" | tee -a "$starts"

	# A task that ends with exit code 2 leaves this file: srun returns the highest code, and it kills the other tasks.
	export L3D_BAD_INPUT=$RUN_DIR/slurm/bad_input
	rm -f "$L3D_BAD_INPUT"

	if [ -z "$stopped" ]; then
		# srun does not take over sbatch's --cpus-per-task by itself.
		touch "$running"
		export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
		srun --kill-on-bad-exit=1 "$L3D" fit "$@" --ckpt_path last \
			--trainer.default_root_dir "$RUN_DIR" \
			--trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "${SLURM_NTASKS_PER_NODE:-1}" \
			--trainer.accelerator "$([ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] && echo cpu || echo gpu)" &
		step=$!
		[ -n "$stopped" ] || wait "$step"
		code=$?
		if [ -n "$stopped" ]; then # it has ended `wait`, not srun
			seconds=$(grace)
			for ((second = 0; second < seconds; second++)); do
				# Now and again: an srun that is still starting its tasks passes nothing on.
				kill -s "$( ((second % 10)) && echo 0 || echo USR1)" "$step" 2> /dev/null || break
				sleep 1
			done
			! kill -KILL "$step" 2> /dev/null || say "nothing saved in $seconds s" # or the time limit would be the end
			wait "$step"
			code=$?
		fi
		rm -f "$running"
	fi

	if [ -e "$RUN_DIR/finished" ]; then say finished; exit 0; fi
	# Cancelled, or being requeued by Slurm.
	if [ "$(squeue --noheader --jobs "$job" --format %T)" = COMPLETING ]; then say "ended by Slurm"; exit "$code"; fi
	if [ -z "$stopped" ] && { [ "$code" = 2 ] || [ -e "$L3D_BAD_INPUT" ]; }; then say "bad input: not requeued"; exit 2; fi
	if ! saved && [ "$(wc -l < "$starts")" -ge "$RETRIES" ]; then
		say "$RETRIES starts in a row saved nothing: not requeued (exit code $code)"; exit 1
	fi
	say "requeued (exit code $code)"
	scontrol requeue "$job" || { say "cannot be requeued; by hand: l3d slurm resume"; exit 1; }
	exit 0
}
