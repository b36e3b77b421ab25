# shellcheck shell=bash
# 20,000 jobs at once, as in throughput.sh, with much else in the table. Sourced by run.sh.
: "${url:?}" "${bin:?}"

million() { # priority run_at url
    sql -c "INSERT INTO job_results (job_type, params, priority, run_at)
            SELECT 'http_request', jsonb_build_object('url', '$3'), $1, $2 FROM generate_series(1, 1000000)"
    # Else autovacuum does it during the measurement.
    sql -c 'VACUUM ANALYZE job_results' -c CHECKPOINT
}

# The median rate of three rounds beside what is in the table. Says so if that was less than a million pending jobs.
rate_beside() {
    local rates=() rate _ pending
    for _ in 1 2 3; do
        sql -c CHECKPOINT
        add_jobs 20000 "$url/"
        rate=$(rate_of_batch 20000)
        rates+=("$rate")
    done
    pending=$(sql -c "SELECT count(*) FROM job_results WHERE status = 'pending'")
    # Those that were in flight when the breaker opened are on their way back.
    ((pending >= 990000)) || echo "only $pending jobs were pending" >&2
    median "${rates[@]}"
}

bench_backlog() {
    local alone rate last
    # What it is compared with is measured anew each time: a machine that others use, too, changes within minutes.
    alone=$(median_rate 3 20000 "$url/")
    # Due, but of a host that can't be reached: its breaker opens, and stays open.
    afresh
    set_up nexus_hub.breaker_cooldown=1h nexus_hub.retry_base_delay=1h
    million 9 'now()' 'http://127.0.0.1:1/'
    await "count(*) = 1 FROM circuit_breakers WHERE host = '127.0.0.1:1' AND state = 'open'"
    rate=$(rate_beside)
    row '20,000 beside 1,000,000 due ones of priority 9, their host down' "$rate" "20,000 alone: $alone" "$(ratio "$rate" "$alone")"
    afresh
    set_back

    alone=$(median_rate 3 20000 "$url/")
    afresh
    million 5 "now() + interval '1 day'" "$url/"
    rate=$(rate_beside)
    row '20,000 beside 1,000,000 that are due tomorrow' "$rate" "20,000 alone: $alone" "$(ratio "$rate" "$alone")"

    # A backlog of the same kind, from when the worker was off. Counted from the first claim to the commit that
    # completed the 100,000th.
    alone=$(median_rate 3 20000 "$url/")
    set_up nexus_hub.enabled=off
    afresh
    million 5 'now()' "$url/"
    last=$(sql -c "SELECT id FROM job_results ORDER BY id OFFSET 105000 LIMIT 1")
    set_up nexus_hub.enabled=on
    await "status = 'completed' FROM job_results WHERE id = '$last'"
    set_up nexus_hub.enabled=off
    await "NOT EXISTS (SELECT FROM job_results WHERE status = 'running')"
    rate=$(sql -c "SELECT round(100000 / extract(epoch FROM pg_xact_commit_timestamp(xmin) - (SELECT min(started_at) FROM job_results)))
                     FROM job_results WHERE status = 'completed' ORDER BY pg_xact_commit_timestamp(xmin) OFFSET 99999 LIMIT 1")
    row 'the first 100,000 of 1,000,000 due ones' "$rate" "20,000 alone: $alone" "$(ratio "$rate" "$alone")"
    afresh
    set_back
}

is_open="count(*) = 1 FROM pg_stat_activity
          WHERE application_name = 'old snapshot' AND state = 'idle in transaction' AND backend_xmin IS NOT NULL"

bench_old_snapshot() {
    local rates=() rate _ old_snapshot
    afresh
    exec {old_snapshot}> >(PGAPPNAME='old snapshot' exec "$bin/psql" -XAtq >/dev/null)
    started+=("$!")
    echo 'BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1;' >&"$old_snapshot"
    await "$is_open"
    for _ in 1 2 3 4 5; do
        sql -c CHECKPOINT
        add_jobs 20000 "$url/"
        rate=$(rate_of_batch 20000)
        rates+=("$rate")
    done
    await "$is_open"
    echo '\q' >&"$old_snapshot"
    exec {old_snapshot}>&-
    row 'five rounds of 20,000 with an old snapshot open: the fifth' "${rates[4]}" "all five: ${rates[*]}" "$(ratio "${rates[4]}" "${rates[0]}")"
}
