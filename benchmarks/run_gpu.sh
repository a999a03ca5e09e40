#!/bin/bash
# Correctness, then times, on one GPU; each part on its own if named:
# tests verify layer gated_delta_net gated_delta_rule kernels decode bench. Results go to $OUT as JSON where it is set.
# All together take some 15 minutes, most of which kernels compile. SETUP names a file to source first.
set -u
cd "$(dirname "$0")/.."
[ -n "${SETUP:-}" ] && . "$SETUP"
export PYTHONPATH=src:${PYTHONPATH:-} PYTHONUNBUFFERED=1
out=${OUT:-.}
for part in "${@:-tests verify layer gated_delta_net gated_delta_rule kernels decode bench}"; do
  for name in $part; do
    case $name in
      tests) python3 -m pytest -m 'gpu or triton' -q -n 8 -p no:benchmark -p no:cacheprovider tests ;;
      verify) python3 -m olmo_core verify --device cuda --jobs 8 --json "$out/verify_h100.json" ;;
      bench) python3 -m olmo_core bench --device cuda --json "$out/bench.json" --plot "$out/bench.png" ;;
      *) python3 -m "benchmarks.${name}_gpu" ;;
    esac
  done
done
