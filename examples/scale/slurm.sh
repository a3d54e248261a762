#!/bin/bash
# Trains on several nodes, one task for each device, and is queued again at its time limit:
#   sbatch --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 examples/scale/slurm.sh job.yaml [options]
#SBATCH --time 24:00:00
#SBATCH --signal USR1@90
#SBATCH --requeue
set -e
# SLURM keeps the id of a job that is queued again: what is saved there is this job's alone
srun python -m lightning_vr fit --config "$1" --trainer.strategy sharded \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --trainer.default_root_dir "runs/slurm-$SLURM_JOB_ID" "${@:2}"
