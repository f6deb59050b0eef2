#!/usr/bin/env bash
# Start a recipe on every host of a Cloud TPU pod slice. The checkout and its environment must be on each host.
#
#   train/tpu_pod.sh TPU_NAME ZONE RECIPE [options of fineline pretrain]
#
# Kill it with SIGTERM (or let the slice be preempted): all hosts save at the same step; run it again to go on.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
command=$(printf '%q ' .venv/bin/python train/pretrain.py "$@" --distributed)
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "cd fineline_jax && $command"
