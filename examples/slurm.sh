#!/bin/bash
# Train a recipe on several nodes of a Slurm cluster: torchrun on every node, a process on every GPU.
#
#   sbatch examples/slurm.sh real_scenes scenes.path=/data/recordings sft.micro_batch_scenes=4
#
# Five minutes before its time is up the job writes a checkpoint and goes back into the queue; there it goes on where it
# stopped, as it does after a node was lost. Submit it from a folder on storage that all nodes share.
#
#SBATCH --job-name=rlhf-drive
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch $0 RECIPE [KEY=VALUE]..." >&2
    exit 2
fi
: "${PROCESSES_PER_NODE:=8}" # as many as GPUs
: "${OUTPUT_DIR:=$PWD/runs}"
: "${STOP_WITHIN_S:=240}" # for the step in progress and its checkpoint; below the 300 s of --signal
run="$OUTPUT_DIR/slurm-$SLURM_JOB_ID" # a job keeps its number in the queue

if [ -f "$run/recipe.yaml" ]; then
    command=(train --resume "$run")
else
    command=(train "$@" "output_dir=$OUTPUT_DIR" "name=slurm-$SLURM_JOB_ID")
fi

export OMP_WAIT_POLICY=PASSIVE
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((SLURM_CPUS_PER_TASK + PROCESSES_PER_NODE - 1) / PROCESSES_PER_NODE))}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# torchrun passes USR1 on to the processes, which stop after their step, and gives them the time to.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$PROCESSES_PER_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout "$STOP_WITHIN_S" \
    -m rlhf_drive.cli "${command[@]}" &
training=$!

out_of_time=no
# Slurm signals this script alone (B:), so that it knows; srun passes signals on to what it started.
trap 'out_of_time=yes; kill -USR1 "$training"' USR1

status=0
wait "$training" || status=$?
while kill -0 "$training" 2>/dev/null; do # a signal has ended `wait`, not the training
    status=0
    wait "$training" || status=$?
done
if [ "$out_of_time" = yes ] && [ "$status" -ne 0 ]; then
    echo "Out of time: back into the queue, to go on with $run"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
