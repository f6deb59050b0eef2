#!/usr/bin/env bash
# Run a command again, 15 seconds after it failed, until it succeeds. Status 2, a mistake in the command, ends it too.
#
#   train/restart.sh COMMAND [its arguments]
set -uo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
until "$@"; do
  status=$?
  if [ "$status" -eq 2 ]; then
    exit 2
  fi
  echo "$(date -u +%FT%TZ) ended with status $status, again in 15 s: $*" >&2
  sleep 15
done
