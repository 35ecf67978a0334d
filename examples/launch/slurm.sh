#!/usr/bin/env bash
# Pretraining on the nodes of a SLURM cluster, in pieces of an hour: each piece resumes where the one before ended.
#   sbatch examples/launch/slurm.sh --data PHOTOS --out /shared/runs/photos
#SBATCH --job-name=pretrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# One task is one process on one GPU. They are not started by accelerate launch, which turns exit code 75 into 1.
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
srun --kill-on-bad-exit=0 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python "$@"' task \
    train/pretrain.py "$@" --minutes "${MINUTES:-50}"
code=$?

# 75: the run has saved because its time was up, or because it got a signal. Any other code ends the job.
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
