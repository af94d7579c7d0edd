#!/usr/bin/env bash
# Pretraining on several nodes under SLURM, put back into the queue whenever its time is up.
#
#     sbatch examples/launch/slurm.sh --config RECIPE --data-dir DATA --out RUN
#
#SBATCH --job-name=timm_etf
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

out=""
for ((i = 1; i < $#; i++)); do
    if [[ ${!i} == --out ]]; then
        next=$((i + 1))
        out=${!next}
    fi
done
: "${out:?give --out RUN, on a disk that all nodes share}"
resume=()
if [[ -e $out/run.json ]]; then
    resume=(--resume)
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR MASTER_PORT=29500 OMP_NUM_THREADS=1

# Each process learns its place from SLURM. `exec`, so that it receives SLURM's signal itself.
# srun answers with the highest status of all. Those that are still ending when the first has ended with 75 are given a
# minute: killed at once, they would answer with more than 75. So are those that wait for one that has crashed.
status=0
# shellcheck disable=SC2016 # the variables are the tasks' own
srun --kill-on-bad-exit=0 --wait=60 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python -m timm_etf pretrain "$@"
' pretrain --amp bf16 --checkpoint-minutes 30 --workers 8 "$@" "${resume[@]}" || status=$?

if [[ $status -eq 75 ]]; then # a checkpoint is saved, and there is more to do
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
