#!/usr/bin/env bash
# Train a recipe on every host of a Cloud TPU pod slice. The first form puts checkout and environment on each host.
#
#   train/tpu_pod.sh TPU_NAME ZONE --setup REPOSITORY
#   train/tpu_pod.sh TPU_NAME ZONE RECIPE [options of fineline pretrain]
#
# Training goes on without this terminal and is started again if it fails; each host writes pretrain.log in its checkout.
# SIGTERM to one process ends all after a save at the same step; after a preemption give both commands again.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
if [ "$1" = --setup ]; then
  # The hosts' own Python is older than 3.11.
  command="{ test -d fineline_jax || git clone $(printf '%q' "${2:?give the repository}") fineline_jax; }"
  command+=" && cd fineline_jax && python3 -m pip install -q --user uv && python3 -m uv venv -q --clear --python 3.11 .venv"
  command+=" && python3 -m uv pip install -q --python .venv -c requirements.lock -e '.[tpu,gs]'"
else
  command="cd fineline_jax && nohup train/restart.sh $(printf '%q ' .venv/bin/python train/pretrain.py "$@" --distributed)"
  command+="> pretrain.log 2>&1 < /dev/null &"
fi
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "$command"
