# shellcheck shell=bash
# A million jobs that are old, deleted in three ways beside a writer. Sourced by run.sh.
: "${dir:?}" "${bin:?}"

old_million() {
    afresh
    sql -c "INSERT INTO job_results (job_type, params, status, result, created_at, started_at, completed_at)
            SELECT 'http_request', jsonb_build_object('url', 'https://host.example/' || n), 'completed',
                   jsonb_build_object('status', 200, 'body', repeat('x', 200)),
                   now() - interval '9 days', now() - interval '9 days', now() - interval '9 days' + n * interval '1 millisecond'
              FROM generate_series(1, 1000000) AS n" \
        -c 'VACUUM ANALYZE job_results' -c CHECKPOINT
}

# Runs something while one client adds a job and changes it, again and again. Sets $seconds, $wal in MB, and $longest: the
# client's longest transaction in ms.
beside_writer() { # command...
    local script=$dir/writer.sql writer from begin
    cat >"$script" <<'SQL'
INSERT INTO job_results (job_type, server_id, tool_name, run_at) VALUES ('tool_invoke', 's', 't', now() + interval '1 day') RETURNING id AS job \gset
UPDATE job_results SET priority = 6 WHERE id = ':job';
SQL
    "${as_server[@]}" mkdir -p "$dir/writer"
    chmod 777 "$dir/writer"
    (cd "$dir/writer" && exec "$bin/pgbench" -n -c1 -T 600 --log -f "$script" >/dev/null 2>&1) &
    writer=$!
    started+=("$writer")
    await "count(*) > 100 FROM job_results WHERE status = 'pending'"
    from=$(ask 'SELECT pg_current_wal_lsn()')
    begin=$(ask 'SELECT clock_timestamp()')
    "$@"
    seconds=$(ask "SELECT round(extract(epoch FROM clock_timestamp() - '$begin')::numeric, 2)")
    wal=$(ask "SELECT round((pg_current_wal_lsn() - '$from'::pg_lsn) / 1048576)")
    # Ended by a signal, pgbench would not write the end of its log.
    sql -c "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgbench'" >/dev/null
    wait "$writer" || true
    longest=$(cat "$dir"/writer/pgbench_log.* | awk '$3 > max { max = $3 } END { printf "%.0f", max / 1000 }')
    rm -rf "$dir/writer"
}

pause() { sleep 30; }
plain_delete() { sql -c "DELETE FROM job_results WHERE status IN ('completed', 'failed', 'cancelled') AND completed_at < now() - interval '7 days'"; }
by_function() { sql -c 'SELECT cleanup_old_job_results()' >/dev/null; }
by_worker() {
    set_up nexus_hub.auto_cleanup=on
    await "NOT EXISTS (SELECT FROM job_results WHERE status = 'completed')"
}

bench_cleanup() {
    local seconds wal longest alone plain plain_wal
    set_up nexus_hub.auto_cleanup=off
    afresh
    beside_writer pause
    alone=$longest
    old_million
    beside_writer plain_delete
    plain=$seconds plain_wal=$wal
    old_million
    beside_writer by_function
    row 'cleanup_old_job_results() of 1,000,000 expired jobs, seconds' "$seconds" "one DELETE: $plain" "$(ratio "$seconds" "$plain")"
    row 'its WAL, MB' "$wal" "one DELETE: $plain_wal" "$(ratio "$wal" "$plain_wal")"
    row 'longest transaction of a writer meanwhile, ms' "$longest" "without a cleanup: $alone" "$(ratio "$longest" "$alone")"
    old_million
    restart_cluster
    beside_writer by_worker
    row 'the worker by itself, a tenth of the time, seconds' "$seconds" "one DELETE: $plain" "$(ratio "$seconds" "$plain")"
    row 'its WAL, MB' "$wal" "one DELETE: $plain_wal" "$(ratio "$wal" "$plain_wal")"
    row 'longest transaction of a writer meanwhile, ms' "$longest" "without a cleanup: $alone" "$(ratio "$longest" "$alone")"
    afresh
    set_back
}
