# shellcheck shell=bash
# What the extension takes: the worker's memory, and an idle server's time. Sourced by run.sh.
: "${url:?}" "${bin:?}" "${dir:?}"

# A process's own memory, MB: shared_buffers and the program's file do not count.
memory() { awk '/^RssAnon:/ { printf "%.1f", $2 / 1024 }' "/proc/$(worker_pid)/status"; }

# Sets $in_flight and $used: how many requests were in flight, and the worker's memory then.
hold() { # count
    local _
    afresh
    add_jobs "$1" "$url/hold"
    for _ in $(seq 30); do
        sleep 0.1
        in_flight=$(ask "SELECT count(*) FROM job_results WHERE status = 'running'")
        ((in_flight == $1)) && break
    done
    sleep 0.3
    used=$(memory)
    rate_of_batch "$1" >/dev/null
}

bench_memory() {
    local idle in_flight used
    # A worker that has done nothing yet.
    restart_cluster
    await "count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'nexus_hub worker'"
    sleep 1
    idle=$(memory)
    hold 512
    row "worker memory with $in_flight requests in flight, MB" "$used" "idle, after the start: $idle" "$(ratio "$used" "$idle")"
    # A host gets four fifths of max_in_flight: 4,000.
    set_up nexus_hub.max_in_flight=5000
    hold 4000
    set_back
    row "worker memory with $in_flight requests in flight, MB" "$used" "idle, after the start: $idle" "$(ratio "$used" "$idle")"
    sleep 15
    used=$(memory)
    row 'worker memory 15 s after that, MB' "$used" "idle, after the start: $idle" "$(ratio "$used" "$idle")"
}

# What processes have used so far of a core, in clock ticks.
ticks() { # pid...
    local pid
    for pid in "$@"; do
        sed 's/.*) //' "/proc/$pid/stat"
    done | awk '{ sum += $12 + $13 } END { print sum + 0 }'
}

# Asked in another database, so that asking is not counted.
transactions() { sql -d template1 -c "SELECT sum(xact_commit + xact_rollback) FROM pg_stat_database WHERE datname = 'postgres'"; }

bench_idle() {
    local own others own_before others_before own_after others_after before after hertz
    hertz=$(getconf CLK_TCK)
    # Its transactions are not ours.
    set_up autovacuum=off
    sql -c CHECKPOINT
    mapfile -t own < <(sql -c "SELECT pid FROM pg_stat_activity WHERE backend_type LIKE 'nexus_hub%'")
    mapfile -t others < <(sql -c "SELECT pid FROM pg_stat_activity WHERE backend_type NOT LIKE 'nexus_hub%' AND backend_type NOT IN ('client backend', 'autovacuum worker', 'autovacuum launcher')")
    # Until sessions have told the statistics what they did.
    sleep 11
    before=$(transactions) own_before=$(ticks "${own[@]}") others_before=$(ticks "${others[@]}")
    sleep 30
    after=$(transactions) own_after=$(ticks "${own[@]}") others_after=$(ticks "${others[@]}")
    set_back
    percent() { awk -v ticks="$1" -v hertz="$hertz" 'BEGIN { printf "%.2f", 100 * ticks / hertz / 30 }'; }
    row 'launcher and worker, idle for 30 s, % of a core' "$(percent $((own_after - own_before)))" \
        "PostgreSQL's own background processes: $(percent $((others_after - others_before)))" \
        "$(ratio $((own_after - own_before)) $((others_after - others_before)))"
    row 'transactions in these 30 s' "$((after - before))" 'one in 10 s: 3' "$(ratio $((after - before)) 3)"
}
