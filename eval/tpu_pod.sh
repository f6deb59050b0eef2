#!/usr/bin/env bash
# Score on every host of a Cloud TPU pod slice, as one program over all of its chips: for models that need them all.
# Checkpoints that fit the chips of one host are scored faster by single-host TPUs, each with --part I/N.
#
#   eval/tpu_pod.sh TPU_NAME ZONE SERIES --pack PACK --out SCORES [options of fineline score]
#
# The checkout and its environment must be on each host, PACK and SCORES on a disk that all hosts share.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
command=$(printf '%q ' .venv/bin/python eval/score.py "$@" --distributed)
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "cd fineline_jax && $command"
