#!/bin/bash
# Correctness, then times, on one GPU; each part on its own if named: tests layer decode kernels.
# Results go to $OUT as JSON where it is set. All together take under 10 minutes.
set -u
cd "$(dirname "$0")/.."
[ -f /tmp/site/env.sh ] && . /tmp/site/env.sh
export PYTHONPATH=src:${PYTHONPATH:-} PYTHONUNBUFFERED=1
for part in "${@:-tests layer decode kernels}"; do
  for name in $part; do
    if [ "$name" = tests ]; then
      python3 -m pytest -m 'gpu or triton' -q -p no:cacheprovider tests
    else
      python3 -m "benchmarks.${name}_gpu"
    fi
  done
done
