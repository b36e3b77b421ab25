#!/usr/bin/env bash
# Prints the figures of docs/benchmarks.md, each beside a peer or a limit measured in the same run; what was measured
# elsewhere is marked so, and is not in the ratio. 'make bench' builds with optimisation, installs, and calls this.
# Everything stays on 127.0.0.1 and is bounded in count; the private cluster has fsync on and every job is durable.
#   benches/run.sh [PART]...   (no argument: all of them)
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."

# In this order; the last one stops the cluster.
parts=(throughput backlog old_snapshot latency memory idle mcp vault rates cleanup health shutdown)
wanted=("${@:-${parts[@]}}")
for part in "${wanted[@]}"; do
    if [[ " ${parts[*]} " != *" $part "* ]]; then
        echo "unknown part: $part; there are: ${parts[*]}" >&2
        exit 1
    fi
done

# shellcheck source=benches/setup.sh
. benches/setup.sh
start_cluster
start_nginx
open_session
for file in throughput backlog latency resources mcp vault rates cleanup health; do
    # shellcheck source=/dev/null # those beside this one
    . "benches/$file.sh"
done

# Connections, caches and plans, as in a server that has run for a while.
median_rate 1 5000 "$url/" >/dev/null

echo "PostgreSQL $(sql -c 'SHOW server_version'), $(nproc) cores, fsync $(sql -c 'SHOW fsync'), every job durable"
echo
row 'what' 'figure' 'beside it, in the same run' 'ratio'
row '---' '---:' '---' '---:'
for part in "${parts[@]}"; do
    if [[ " ${wanted[*]} " == *" $part "* ]]; then
        "bench_$part"
    fi
done
