# shellcheck shell=bash
# What the figures are made with: a private cluster, nginx, and the rows of the table. Sourced by run.sh.

dir=$(mktemp -d /tmp/nexus_hub_bench.XXXXXX)
# Processes to be ended, by their ids.
started=()

finish() {
    local pid
    # To its end, whoever is impatient.
    trap '' INT TERM HUP
    set +e
    [[ -s $dir/nginx.pid ]] && started+=("$(<"$dir/nginx.pid")")
    for pid in "${started[@]}"; do
        kill "$pid" 2>/dev/null
    done
    [[ -e $dir/data/postmaster.pid ]] && server -m immediate stop
    rm -rf "$dir"
}
trap finish EXIT
# What a signal ends goes through the trap above, too.
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# As many descriptors as the system lets us have: for thousands of requests, nginx needs as many as the worker.
ulimit -n "$(ulimit -Hn)"

# ── The cluster ──

pg_config=$(.ci/pg-config)
bin=$("$pg_config" --bindir)
as_server=()
chmod 755 "$dir"
if [[ $EUID == 0 ]]; then
    chown postgres "$dir"
    as_server=(runuser -u postgres --)
fi

server() { # pg_ctl argument...
    (cd /tmp && "${as_server[@]}" "$bin/pg_ctl" -D "$dir/data" -l "$dir/data/log" -w -s "$@")
}

sql() { "$bin/psql" -XAtq -v ON_ERROR_STOP=1 "$@"; }

# One session that stays, for what is asked while something is measured: a new psql each time would cost more than the
# question.
open_session() {
    coproc session { exec "$bin/psql" -XAtq -v ON_ERROR_STOP=1; }
    session_pid=$!
    started+=("$session_pid")
    # Copies, because subshells don't have the ones of 'coproc'.
    exec {to_session}>&"${session[1]}" {from_session}<&"${session[0]}"
}

ask() { # statement with an answer of one line
    local answer
    printf '%s;\n' "$1" >&"$to_session"
    IFS= read -r -t 300 answer <&"$from_session"
    echo "$answer"
}

start_cluster() {
    local port=$((30000 + RANDOM % 10000))
    "${as_server[@]}" sh -c "umask 077; openssl rand -hex 32 >$dir/vault.key"
    (cd /tmp && "${as_server[@]}" "$bin/initdb" -D "$dir/data" -A trust -U postgres -E UTF8 --locale=C >"$dir/initdb.log")
    # track_commit_timestamp: commits are what is timed.
    "${as_server[@]}" tee -a "$dir/data/postgresql.conf" >/dev/null <<CONF
shared_preload_libraries = 'nexus_hub'
listen_addresses = '127.0.0.1'
port = $port
unix_socket_directories = '$dir'
shared_buffers = '512MB'
max_wal_size = '4GB'
fsync = on
track_commit_timestamp = on
nexus_hub.vault_key_file = '$dir/vault.key'
nexus_hub.egress_allow = '127.0.0.1'
CONF
    export PGHOST=$dir PGPORT=$port PGUSER=postgres PGDATABASE=postgres
    server start
    sql -c 'CREATE EXTENSION nexus_hub' -c 'CREATE EXTENSION pgcrypto'
}

# Starts the cluster anew, and with it the worker.
restart_cluster() {
    local port=$((30000 + RANDOM % 10000))
    echo '\q' >&"$to_session"
    wait "$session_pid"
    exec {to_session}>&- {from_session}<&-
    server -m fast restart
    open_session
}

set_up() { # setting=value...: what the worker goes by, from now on
    local each
    for each in "$@"; do
        sql -c "ALTER SYSTEM SET ${each%%=*} = '${each#*=}'"
    done
    reload
}

set_back() {
    sql -c 'ALTER SYSTEM RESET ALL'
    reload
}

reload() {
    sql -c 'SELECT pg_reload_conf()' >/dev/null
    # The worker has done it when it has slept on it.
    sleep 0.5
}

# ── nginx: / answers at once, /50ms after that, /hold after 4 s ──

start_nginx() {
    local nginx echo_module port
    nginx=$(command -v nginx || echo /usr/sbin/nginx)
    # nginx alone can't wait.
    echo_module=$(dpkg -L libnginx-mod-http-echo 2>/dev/null | grep '\.so$') ||
        echo_module=/usr/lib/nginx/modules/ngx_http_echo_module.so
    port=$((20000 + RANDOM % 10000))
    cat >"$dir/nginx.conf" <<CONF
load_module $echo_module;
worker_processes 1;
pid $dir/nginx.pid;
error_log $dir/nginx.log;
events { worker_connections 10000; }
http {
    access_log off;
    keepalive_requests 10000000;
    default_type application/json;
    server {
        listen 127.0.0.1:$port backlog=4096;
        location / { return 200 '{"ok":true}'; }
        location /50ms { echo_sleep 0.05; echo -n '{"ok":true}'; }
        location /hold { echo_sleep 4; echo -n '{"ok":true}'; }
    }
}
CONF
    "$nginx" -c "$dir/nginx.conf" -p "$dir"
    # shellcheck disable=SC2034 # for the parts
    url=http://127.0.0.1:$port
}

# Requests a second that wrk makes, which stores nothing.
wrk_rate() { # url connections
    wrk -t1 -c"$2" -d3s "$1" | awk '/Requests\/sec/ { print int($2) }'
}

# ── The table ──

row() { printf '| %-66s | %9s | %-98s | %6s |\n' "$@"; }

ratio() { # figure figure
    awk -v a="$1" -v b="$2" 'BEGIN { if (b > 0) printf "%.2f", a / b; else print "–" }'
}

median() { # figure...
    printf '%s\n' "$@" | sort -n | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'
}

# ── Jobs ──

# An empty job table, and nothing left to do for PostgreSQL.
afresh() {
    sql -c 'TRUNCATE job_results, job_attempts' -c 'VACUUM job_results' -c CHECKPOINT
}

# Adds http_request jobs in one INSERT; its commit starts them. Sets $batch: the transaction, the time all of them
# share, and the last of them.
add_jobs() { # count url
    batch=$(ask "WITH added AS (
            INSERT INTO job_results (job_type, params)
            SELECT 'http_request', jsonb_build_object('url', '$2') FROM generate_series(1, $1)
            RETURNING id, created_at)
        SELECT concat_ws('|', pg_current_xact_id(), max(created_at), max(id::text)) FROM added")
}

# Waits until the jobs of $batch are completed, and says how many that was a second. Counted is the time between two
# commits, as the server has noted them: that of the INSERT, and the last one that completed a job. In it each job was
# claimed and committed as running, sent, answered, and committed as completed with its answer. What an INSERT takes until
# its commit is not in it.
rate_of_batch() { # count
    local transaction created last
    IFS='|' read -r transaction created last <<<"$batch"
    # One row, by its id: looking for unfinished ones would have PostgreSQL wade through dead rows beside the measured.
    await "status = 'completed' FROM job_results WHERE id = '$last'"
    await "count(*) = $1 FROM job_results WHERE user_id IS NULL AND created_at = '$created' AND status = 'completed'"
    ask "SELECT round($1 / extract(epoch FROM max(pg_xact_commit_timestamp(xmin)) - pg_xact_commit_timestamp('$transaction'::xid)))
           FROM job_results WHERE user_id IS NULL AND created_at = '$created'"
}

# Waits until something is true, at most five minutes.
await() { # condition, with its FROM
    local is_so _
    for _ in $(seq 6000); do
        is_so=$(ask "SELECT $1")
        [[ $is_so == t ]] && return
        sleep 0.05
    done
    echo "still not so after five minutes: $1" >&2
    sql -c "SELECT status, left(error, 200), count(*) FROM job_results GROUP BY 1, 2 LIMIT 20" >&2
    return 1
}

# The median rate of some rounds, each with an empty table.
median_rate() { # rounds count url
    local rates=() rate _
    for _ in $(seq "$1"); do
        afresh
        add_jobs "$2" "$3"
        rate=$(rate_of_batch "$2")
        rates+=("$rate")
    done
    median "${rates[@]}"
}

# The process of the worker.
worker_pid() { sql -c "SELECT pid FROM pg_stat_activity WHERE backend_type = 'nexus_hub worker'"; }
