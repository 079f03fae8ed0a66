#!/bin/bash
# Train on the first node of a Slurm job, and sample and score on the other ones, by workers of Ray.
#
#   sbatch examples/slurm_ray.sh real_scenes scenes.path=/data/recordings sft.micro_batch_scenes=4 \
#       rollout.scenes_per_step=128 rollout.scenes_per_chunk=4
#
# A worker samples a chunk at a time: there must be as many chunks in a step as workers, 16 here. The job writes a
# checkpoint before its time is up, goes back into the queue and goes on there, as slurm.sh does. Submit it from a folder
# on storage that all nodes share.
#
#SBATCH --job-name=rlhf-drive-ray
#SBATCH --nodes=3
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
: "${PROCESSES:=8}"        # that train, on the GPUs of the first node
: "${GPUS_PER_NODE:=8}"    # of the other nodes: a worker that samples on each
: "${REWARD_WORKERS:=32}"  # that score, on cores
: "${OUTPUT_DIR:=$PWD/runs}"
: "${STOP_WITHIN_S:=240}"
run="$OUTPUT_DIR/slurm-$SLURM_JOB_ID"
others=$((SLURM_JOB_NUM_NODES - 1))

if [ -f "$run/recipe.yaml" ]; then
    command=(train --resume "$run")
else
    command=(
        train "$@" "output_dir=$OUTPUT_DIR" "name=slurm-$SLURM_JOB_ID" ray.address=auto
        rollout.engine=ray "rollout.workers=$((others * GPUS_PER_NODE))" rollout.gpus_per_worker=1.0
        reward.engine=ray "reward.workers=$REWARD_WORKERS"
    )
fi

export OMP_WAIT_POLICY=PASSIVE RAY_USAGE_STATS_ENABLED=0
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
steps=()
end_steps() {
    for step in "${steps[@]}"; do
        kill "$step" 2>/dev/null || true # has ended already
    done
    wait
}
trap end_steps EXIT

# The first node's GPUs train: its Ray gets none of them, and as many cores as training leaves.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --block --include-dashboard=false \
    --node-ip-address="$head" --port="$port" --num-gpus=0 --num-cpus="$((SLURM_CPUS_PER_TASK - PROCESSES))" &
steps+=($!)
sleep 15 # the others would wait for it, but not for long
if [ "$others" -gt 0 ]; then
    srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head" ray start --block --address="$head:$port" &
    steps+=($!)
fi

# Workers are waited for by the run itself, up to rollout.timeout_s.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" torchrun --standalone --nproc-per-node "$PROCESSES" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout "$STOP_WITHIN_S" \
    -m rlhf_drive.cli "${command[@]}" &
training=$!

out_of_time=no
# Slurm signals this script alone (B:): Ray would end its workers at once. srun passes signals on to what it started.
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
