# shellcheck shell=bash
# shellcheck disable=SC2154 # what setup.sh sets
# Rate limits. Sourced by run.sh. RATES_SECONDS: how long each rate is measured (3 s), RATES_ROUNDS: how often (3, and
# the median counts), in turns with what it is compared with.

# The seeds' table version (001_nexus_hub_architecture_v2.md), and the same with an unlogged table.
rates_peer_tables() {
    local name
    for name in logged unlogged; do
        sql -c "CREATE ${name/#logged/} TABLE tracking_$name (server_id text NOT NULL, user_id uuid NOT NULL, window_start timestamptz NOT NULL,
                    request_count integer DEFAULT 1, PRIMARY KEY (server_id, user_id, window_start))" \
            -c "CREATE FUNCTION check_rate_limit_$name(p_server_id text, p_user_id uuid, p_limit_per_minute integer) RETURNS boolean AS \$\$
                DECLARE v_window_start timestamptz; v_request_count integer;
                BEGIN
                    v_window_start := date_trunc('minute', now());
                    INSERT INTO tracking_$name AS t (server_id, user_id, window_start, request_count)
                    VALUES (p_server_id, p_user_id, v_window_start, 1)
                    ON CONFLICT (server_id, user_id, window_start) DO UPDATE SET request_count = t.request_count + 1
                    RETURNING request_count INTO v_request_count;
                    RETURN v_request_count <= p_limit_per_minute;
                END \$\$ LANGUAGE plpgsql"
    done
}

rates_scripts() {
    local name user="'11111111-1111-1111-1111-111111111111'"
    echo 'SELECT 1;' >"$dir/one.sql"
    echo 'SELECT 1, :n;' >"$dir/one_of_many.sql"
    sed -i '1i \\\set n random(1, 10000)' "$dir/one_of_many.sql"
    for name in '' _logged _unlogged; do
        echo "SELECT check_rate_limit$name('github', $user, 1000000000);" >"$dir/hot$name.sql"
        printf '%s\n' '\set n random(1, 10000)' "SELECT check_rate_limit$name('server ' || :n, $user, 1000000000);" >"$dir/many$name.sql"
    done
}

rates_tps() { # script clients
    "$bin/pgbench" -n -M prepared -f "$dir/$1.sql" -c "$2" -j "$(($2 < 2 ? 1 : 2))" -T "${RATES_SECONDS:-3}" 2>/dev/null |
        awk '/^tps/ { printf "%.0f", $3 }'
}

# Medians of several scripts, measured in turns so that a busy moment hits them alike. Prints them in order.
rates_in_turns() { # clients script...
    local clients=$1 script _
    shift
    for _ in $(seq "${RATES_ROUNDS:-3}"); do
        for script in "$@"; do
            echo "$script $(rates_tps "$script" "$clients")"
        done
    done >"$dir/turns"
    for script in "$@"; do
        # shellcheck disable=SC2046 # words
        median $(awk -v s="$script" '$1 == s { print $2 }' "$dir/turns")
    done
}

# Redis with the usual script, as many clients, no pipelining. Prints nothing where there is no Redis.
rates_redis_start() {
    command -v redis-server >/dev/null && command -v redis-benchmark >/dev/null || return 1
    redis-server --unixsocket "$dir/redis.sock" --port 0 --save '' --appendonly no --dir "$dir" >"$dir/redis.log" 2>&1 &
    started+=("$!")
    local _
    for _ in $(seq 100); do
        [[ -S $dir/redis.sock ]] && return
        sleep 0.1
    done
    return 1
}

rates_redis() { # clients key
    local script="local n = redis.call('INCR', KEYS[1]) if n == 1 then redis.call('EXPIRE', KEYS[1], 60) end return n <= tonumber(ARGV[1])"
    redis-benchmark -s "$dir/redis.sock" -c "$1" -n $(($1 == 1 ? 60000 : 200000)) -r 10000 -q --csv EVAL "$script" 1 "$2" 1000000000 |
        tail -1 | awk -F'","' '{ printf "%.0f", $(NF > 2 ? 2 : NF) }'
}

# Nanoseconds a call, net of the loop around it, of a million calls in one statement; the better of three.
rates_per_call() { # call with i, the same without the call
    sql -c 'SET jit = off' -c "DO \$\$
        DECLARE t0 timestamptz; t1 timestamptz; t2 timestamptz; best numeric := 1e9; n int := 1000000;
        BEGIN
            FOR round IN 1..3 LOOP
                t0 := clock_timestamp();
                PERFORM count($2) FROM generate_series(1, n) i;
                t1 := clock_timestamp();
                PERFORM count($1) FROM generate_series(1, n) i;
                t2 := clock_timestamp();
                best := least(best, extract(epoch FROM (t2 - t1) - (t1 - t0)) * 1e9 / n);
            END LOOP;
            RAISE NOTICE '%', round(best);
        END \$\$" 2>&1 | sed -n 's/.*NOTICE: *//p'
}

bench_rates() {
    local clients hot many one logged unlogged ns user="'11111111-1111-1111-1111-111111111111'" redis=
    rates_peer_tables
    rates_scripts
    rates_redis_start && redis=yes
    for clients in 1 8 32; do
        { read -r hot; read -r one; } < <(rates_in_turns "$clients" hot one)
        row "check_rate_limit, one key, $clients clients, calls a second" "$hot" "SELECT 1: $one" "$(ratio "$hot" "$one")"
        { read -r many; read -r one; } < <(rates_in_turns "$clients" many one_of_many)
        row "check_rate_limit, 10,000 keys, $clients clients, calls a second" "$many" "SELECT 1 with a random number: $one" "$(ratio "$many" "$one")"
        { read -r hot; read -r logged; read -r unlogged; } < <(rates_in_turns "$clients" hot hot_logged hot_unlogged)
        row "the same on one key, $clients clients" "$hot" "the seeds' plpgsql on a table: $logged; unlogged: $unlogged" "$(ratio "$hot" "$logged")"
        { read -r many; read -r logged; read -r unlogged; } < <(rates_in_turns "$clients" many many_logged many_unlogged)
        row "the same on 10,000 keys, $clients clients" "$many" "the seeds' plpgsql on a table: $logged; unlogged: $unlogged" "$(ratio "$many" "$logged")"
        if [[ -n $redis ]]; then
            one=$(rates_redis "$clients" hot)
            row "the same on one key, $clients clients" "$hot" "Redis, Lua INCR and EXPIRE, redis-benchmark on a socket: $one" "$(ratio "$hot" "$one")"
            one=$(rates_redis "$clients" key:__rand_int__)
            row "the same on 10,000 keys, $clients clients" "$many" "Redis, Lua INCR and EXPIRE, redis-benchmark on a socket: $one" "$(ratio "$many" "$one")"
        fi
    done
    [[ -n $redis ]] || row 'beside Redis' '–' 'no redis-server here: .ci/setup bench installs it' '–'
    ns=$(rates_per_call "check_rate_limit('github', $user, i)" 'i % 2 = 0')
    row 'check_rate_limit, a million calls in a statement, one key, ns a call' "$ns" 'aim: below 300' "$(ratio "$ns" 300)"
    ns=$(rates_per_call "check_rate_limit('server ' || i % 10000, $user, i)" "'server ' || i % 10000 <> ''")
    row 'the same, 10,000 keys, ns a call' "$ns" 'aim: below 300' "$(ratio "$ns" 300)"
    sql -c 'DROP FUNCTION check_rate_limit_logged, check_rate_limit_unlogged' -c 'DROP TABLE tracking_logged, tracking_unlogged'
}
