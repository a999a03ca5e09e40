#!/bin/bash
# Correctness, then times, on one GPU; each part on its own if named:
# tests verify layer gated_delta_net gated_delta_rule kernels decode sharding bench. Results go to $OUT where it is set.
# flash_qla only if named: its packages exclude those of flash-attn 4, so it has an environment of its own.
# Only if named too: context_parallel, for several GPUs.
# All together take some 15 minutes, most of which kernels compile. SETUP names a file to source first.
# A part is interrupted after LIMIT seconds (300), and then still reports what it has found.
set -u
cd "$(dirname "$0")/.."
[ -n "${SETUP:-}" ] && . "$SETUP"
export PYTHONPATH=src:${PYTHONPATH:-} PYTHONUNBUFFERED=1
out=${OUT:-.}
within="timeout -s INT -k 20 ${LIMIT:-300}"
for part in "${@:-tests verify layer gated_delta_net gated_delta_rule kernels decode sharding bench}"; do
  for name in $part; do
    case $name in
      # One worker has all tests of ranks, and there are few: eight have filled the GPU's memory.
      tests) PYTHONPATH=src:tests:$PYTHONPATH $within python3 -m pytest -m 'gpu or triton' -q -n 4 \
        --dist loadgroup --tb=short -rf -p no:benchmark -p no:cacheprovider tests 2>&1 | tee "$out/tests.log" ;;
      verify) $within python3 -m olmo_core verify --device cuda --jobs 8 --json "$out/verify_h100.json" ;;
      bench) $within python3 -m olmo_core bench --device cuda --json "$out/bench.json" --plot "$out/bench.png" ;;
      sharding)
        $within python3 -m benchmarks.virtual_ranks delta
        $within python3 -m benchmarks.virtual_ranks | tee "$out/virtual_ranks.txt" ;;
      context_parallel) $within python3 -m benchmarks.context_parallel | tee "$out/context_parallel.txt" ;;
      *) $within python3 -m "benchmarks.${name}_gpu" ;;
    esac
  done
done
