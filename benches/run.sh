#!/usr/bin/env bash
# Prints the figures of docs/benchmarks.md, each beside a peer or a limit measured in the same run.
# 'make bench' builds with optimisation, installs, and calls this. Everything stays on 127.0.0.1 and
# is bounded in count; the private cluster has fsync on and every job is durable.
set -euo pipefail
cd "$(dirname "$0")/.."

pg_config=$(.ci/pg-config)
bin=$("$pg_config" --bindir)
dir=$(mktemp -d /tmp/nexus_hub_bench.XXXXXX)
chmod 755 "$dir"
as_server=()
if [[ $EUID == 0 ]]; then
    chown postgres "$dir"
    as_server=(runuser -u postgres --)
fi

finish() {
    [[ -s $dir/nginx.pid ]] && kill "$(<"$dir/nginx.pid")" 2>/dev/null
    (cd /tmp && "${as_server[@]}" "$bin/pg_ctl" -D "$dir/data" -m immediate -s stop) 2>/dev/null || true
    rm -rf "$dir"
}
trap finish EXIT

"${as_server[@]}" sh -c "umask 077; openssl rand -hex 32 >$dir/vault.key"
(cd /tmp && "${as_server[@]}" "$bin/initdb" -D "$dir/data" -A trust -U postgres -E UTF8 --locale=C >"$dir/initdb.log")
"${as_server[@]}" tee -a "$dir/data/postgresql.conf" >/dev/null <<CONF
shared_preload_libraries = 'nexus_hub'
listen_addresses = ''
port = 5432
unix_socket_directories = '$dir'
shared_buffers = '512MB'
max_wal_size = '4GB'
nexus_hub.vault_key_file = '$dir/vault.key'
nexus_hub.egress_allow = '127.0.0.1'
CONF
(cd /tmp && "${as_server[@]}" "$bin/pg_ctl" -D "$dir/data" -l "$dir/data/log" -w -s start)
export PGHOST=$dir PGPORT=5432 PGUSER=postgres PGDATABASE=postgres
sql() { "$bin/psql" -XAtq -v ON_ERROR_STOP=1 "$@"; }
sql -c 'CREATE EXTENSION nexus_hub' -c 'CREATE EXTENSION pgcrypto'

port=$((20000 + RANDOM % 10000))
cat >"$dir/nginx.conf" <<CONF
worker_processes 1;
pid $dir/nginx.pid;
error_log $dir/nginx.log;
events { worker_connections 4096; }
http {
    access_log off;
    keepalive_requests 10000000;
    server {
        listen 127.0.0.1:$port backlog=4096;
        location / { default_type application/json; return 200 '{"ok":true}'; }
    }
}
CONF
"$(command -v nginx || echo /usr/sbin/nginx)" -c "$dir/nginx.conf" -p "$dir"

row() { printf '| %-58s | %14s | %-44s | %8s |\n' "$@"; }
ratio() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", a / b }'; }

row 'what' 'figure' 'beside it, in the same run' 'ratio'
row '---' '---:' '---' '---:'

# Waits until so many jobs are finished. Looks at the few that are not, so as not to slow the others down.
finished() { # count
    for _ in $(seq 600); do
        [[ $(sql -c "SELECT count(*) FROM (SELECT FROM job_results WHERE status IN ('pending', 'running') LIMIT 1) AS unfinished") == 0 ]] && return
        sleep 0.1
    done
    echo "not all of $1 jobs finished in a minute" >&2
    return 1
}

# How many jobs a second get through, each an INSERT, a claim, a request and a completion.
run_jobs() { # count
    sql -c "TRUNCATE job_results" -c "CHECKPOINT"
    sql -c "INSERT INTO job_results (job_type, params)
            SELECT 'http_request', jsonb_build_object('url', 'http://127.0.0.1:$port/') FROM generate_series(1, $1)"
    finished "$1"
    sql -c "SELECT round(count(*) / extract(epoch FROM max(completed_at) - min(started_at)))
              FROM job_results WHERE status = 'completed'"
}
run_jobs 2000 >/dev/null
nginx_limit=$(wrk -t1 -c256 -d3s "http://127.0.0.1:$port/" | awk '/Requests\/sec/ { print int($2) }')
jobs=$(run_jobs 10000)
row '10,000 http_request jobs to nginx, a second' "$jobs" "wrk alone on that nginx: $nginx_limit" "$(ratio "$jobs" "$nginx_limit")"
jobs=$(run_jobs 50000)
row '50,000 http_request jobs to nginx, a second' "$jobs" "wrk alone on that nginx: $nginx_limit" "$(ratio "$jobs" "$nginx_limit")"

# One job at a time: from its INSERT until the waiting session has the result.
cat >"$dir/one_job.sql" <<SQL
INSERT INTO job_results (job_type, params) VALUES ('http_request', '{"url": "http://127.0.0.1:$port/"}') RETURNING id \gset
SELECT status FROM wait_for_job(:id::uuid);
SQL
cat >"$dir/one_commit.sql" <<SQL
INSERT INTO plain (params) VALUES ('{"url": "http://127.0.0.1:$port/"}');
SQL
sql -c 'CREATE TABLE plain (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), params jsonb)'
latency() { # script
    "$bin/pgbench" -n -M prepared -c 1 -t 500 -f "$1" | awk '/latency average/ { print $4 }'
}
one_commit=$(latency "$dir/one_commit.sql")
one_job=$(latency "$dir/one_job.sql")
row 'one job, INSERT to result in hand, ms' "$one_job" "one durable INSERT commit, ms: $one_commit" "$(ratio "$one_job" "$one_commit")"

# Slow servers: 500 jobs of one second each.
cargo_target=${CARGO_TARGET_DIR:-target}
exec 3< <("$cargo_target/release/examples/mcp_server" --token bench & echo "pid $!"; wait)
server_pid='' url=''
while [[ -z $server_pid || -z $url ]] && read -r word rest <&3; do
    case $word in
        pid) server_pid=$rest ;;
        listening) url=${rest#on } ;;
    esac
done
sql -c "SELECT add_server('bench', 'bench', jsonb_build_object('url', '$url', 'headers', jsonb_build_object('Authorization', 'Bearer bench')), '11111111-1111-1111-1111-111111111111')" >/dev/null
run_mcp() { # count tool arguments
    sql -c "TRUNCATE job_results"
    sql -c "INSERT INTO job_results (user_id, job_type, server_id, tool_name, params)
            SELECT '11111111-1111-1111-1111-111111111111', 'tool_invoke', 'bench', '$2', '$3' FROM generate_series(1, $1)"
    finished "$1"
    sql -c "SELECT error, count(*) FROM job_results WHERE status <> 'completed' GROUP BY 1" >&2
    sql -c "SELECT round(extract(epoch FROM max(completed_at) - min(created_at)), 2) FROM job_results WHERE status = 'completed'"
}
run_mcp 10 add '{"a": 1, "b": 2}' >/dev/null
slow=$(run_mcp 500 slow '{"ms": 1000}')
row '500 MCP tool calls of 1 s each, seconds in all' "$slow" 'one of them: 1.00' "$(ratio "$slow" 1)"
calls=$(run_mcp 5000 add '{"a": 1, "b": 2}')
row '5,000 MCP tool calls over one session, a second' "$(awk -v s="$calls" 'BEGIN { printf "%d", 5000 / s }')" "the http_request jobs above: $jobs" \
    "$(awk -v s="$calls" -v j="$jobs" 'BEGIN { printf "%.2f", 5000 / s / j }')"

# The vault: nanoseconds a call, net of the loop around it.
per_call() { # expression, the same without the call
    sql -c "SET jit = off" -c "DO \$\$
        DECLARE t0 timestamptz; t1 timestamptz; t2 timestamptz; n int := 500000;
                k bytea := decode(repeat('00112233445566778899aabbccddeeff', 2), 'hex'); v bytea := decode(repeat('01', 16), 'hex');
                t text := repeat('x', 192); b bytea := convert_to(t, 'UTF8');
                sealed bytea := encrypt_token(t); cbc bytea := encrypt_iv(b, k, v, 'aes-cbc');
        BEGIN
            t0 := clock_timestamp();
            PERFORM count($2) FROM generate_series(1, n) i;
            t1 := clock_timestamp();
            PERFORM count($1) FROM generate_series(1, n) i;
            t2 := clock_timestamp();
            RAISE NOTICE '%', round((extract(epoch FROM (t2 - t1) - (t1 - t0)) * 1e9 / n)::numeric);
        END \$\$" 2>&1 | sed -n 's/.*NOTICE: *//p'
}
seal=$(per_call "encrypt_token(CASE WHEN i > 0 THEN t END)" "CASE WHEN i > 0 THEN t END")
open=$(per_call "decrypt_token(CASE WHEN i > 0 THEN sealed END)" "CASE WHEN i > 0 THEN sealed END")
peer_seal=$(per_call "encrypt_iv(CASE WHEN i > 0 THEN b END, k, v, 'aes-cbc')" "CASE WHEN i > 0 THEN b END")
peer_open=$(per_call "decrypt_iv(CASE WHEN i > 0 THEN cbc END, k, v, 'aes-cbc')" "CASE WHEN i > 0 THEN cbc END")
row 'encrypt_token of 192 bytes, ns' "$seal" "pgcrypto AES-256-CBC, no tag, ns: $peer_seal" "$(ratio "$seal" "$peer_seal")"
row 'decrypt_token of 192 bytes, ns' "$open" "pgcrypto AES-256-CBC, no tag, ns: $peer_open" "$(ratio "$open" "$peer_open")"

# Stopping with requests in flight: their time-out is 30 s, the promise is 3 s.
sql -c "TRUNCATE job_results" -c "INSERT INTO job_results (user_id, job_type, server_id, tool_name, params)
        SELECT '11111111-1111-1111-1111-111111111111', 'tool_invoke', 'bench', 'slow', '{\"ms\": 25000}' FROM generate_series(1, 200)"
for _ in $(seq 100); do
    [[ $(sql -c "SELECT count(*) FROM job_results WHERE status = 'running'") == 200 ]] && break
    sleep 0.1
done
begin=$(date +%s.%N)
(cd /tmp && "${as_server[@]}" "$bin/pg_ctl" -D "$dir/data" -m fast -w -s stop)
stop=$(awk -v a="$begin" -v b="$(date +%s.%N)" 'BEGIN { printf "%.2f", b - a }')
row 'fast shutdown with 200 requests in flight, seconds' "$stop" 'the promise: 3.00' "$(ratio "$stop" 3)"
kill "$server_pid"
