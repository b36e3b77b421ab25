# shellcheck shell=bash
# One job at a time. Sourced by run.sh.
: "${url:?}" "${bin:?}" "${dir:?}"

# Median and p95 of figures, one a line.
spread() { sort -n | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)], all[int(NR * 0.95 + 0.5)] }'; }

run_pgbench() { # script transactions [argument...]
    rm -f "$dir"/log.*
    "$bin/pgbench" -n -M prepared -c 1 -t "$2" -f "$dir/$1" -l --log-prefix="$dir/log" "${@:3}" >/dev/null
}

# One durable INSERT into another table, ms, as its client sees it.
inserts() { # script transactions [argument...]
    run_pgbench "$@"
    # What it began later than it was to, where it was, is not its time.
    awk '{ printf "%.3f\n", ($3 - $7) / 1000 }' "$dir"/log.* | spread
}

# From the commit of a job's INSERT to the commit that completed its row, ms, as the server has noted them. A commit is
# noted before it is flushed: of the three on the way, the flush of the first is counted, and that of the last is not.
job_times() { # script transactions
    afresh
    sql -c 'TRUNCATE sent'
    run_pgbench "$1" "$2"
    sql -c "SELECT round(1000 * extract(epoch FROM pg_xact_commit_timestamp(j.xmin) - pg_xact_commit_timestamp(s.transaction)), 3)
              FROM sent s JOIN job_results j USING (id) WHERE j.status = 'completed'" | spread
}

bench_latency() {
    local peer peer95 median p95
    sql -c 'CREATE TABLE plain (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), params jsonb)' \
        -c 'CREATE TABLE sent (id uuid PRIMARY KEY, transaction xid)'
    cat >"$dir/insert" <<SQL
INSERT INTO plain (params) VALUES ('{"url": "$url/"}');
SQL
    # The waiting session sleeps, and is woken when a job is finished.
    cat >"$dir/job" <<SQL
WITH job AS (INSERT INTO job_results (job_type, params) VALUES ('http_request', '{"url": "$url/"}') RETURNING id)
INSERT INTO sent SELECT id, pg_current_xact_id()::xid FROM job RETURNING id \gset
SELECT status FROM wait_for_job(:id::uuid);
SQL
    (echo '\sleep 100 ms' && cat "$dir/job") >"$dir/job_after_pause"

    job_times job 50 >/dev/null
    read -r peer peer95 < <(inserts insert 500)
    read -r median p95 < <(job_times job 500)
    row 'one job back to back, commit to completed row, median, ms' "$median" "one durable INSERT: $peer; pg_net elsewhere: 1001" "$(ratio "$median" "$peer")"
    row 'one job back to back, commit to completed row, p95, ms' "$p95" "one durable INSERT: $peer95" "$(ratio "$p95" "$peer95")"
    # A machine that was idle takes longer for everything.
    read -r peer peer95 < <(inserts insert 100 --rate=10)
    read -r median p95 < <(job_times job_after_pause 100)
    row 'one job after a pause of 100 ms, the same, median, ms' "$median" "one durable INSERT, 10 a second: $peer; pg_net elsewhere: 1.2" "$(ratio "$median" "$peer")"
    row 'one job after a pause of 100 ms, the same, p95, ms' "$p95" "one durable INSERT, 10 a second: $peer95" "$(ratio "$p95" "$peer95")"
}
