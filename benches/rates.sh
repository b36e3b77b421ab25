# shellcheck shell=bash
# shellcheck disable=SC2154 # what setup.sh sets
# Rate limits. Sourced by run.sh. RATES_SECONDS: how long each rate is measured at a time (1 s), RATES_ROUNDS: how often
# (9, and the median counts), in turns with what it is compared with: many short turns, because a shared machine has slow
# moments.

# Calls that are on the way at a time, where they are pipelined.
rates_pipelined=16

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
    # With a parameter, as the call has it that it stands beside.
    echo 'SELECT :n;' >"$dir/one_of_many.sql"
    sed -i '1i \\\set n random(1, 10000)' "$dir/one_of_many.sql"
    for name in '' _logged _unlogged; do
        echo "SELECT check_rate_limit$name('github', $user, 1000000000);" >"$dir/hot$name.sql"
        printf '%s\n' '\set n random(1, 10000)' "SELECT check_rate_limit$name(:n, $user, 1000000000);" >"$dir/many$name.sql"
    done
    {
        echo '\startpipeline'
        for _ in $(seq "$rates_pipelined"); do cat "$dir/hot.sql"; done
        echo '\endpipeline'
    } >"$dir/hot_pipelined.sql"
}

# Calls a second of a script; NAME_tcp: the script NAME over TCP; redis_…: not PostgreSQL at all.
rates_measure() { # name clients
    local host=$PGHOST script=$1 calls=1
    case $1 in
        redis_*) rates_redis "$1" "$2" && return ;;
        *_tcp) host=127.0.0.1 script=${1%_tcp} ;;
        *_pipelined) calls=$rates_pipelined ;;
    esac
    PGHOST=$host "$bin/pgbench" -n -M prepared -f "$dir/$script.sql" -c "$2" -j "$(($2 < 2 ? 1 : 2))" -T "${RATES_SECONDS:-1}" 2>/dev/null |
        awk -v n="$calls" '/^tps/ { printf "%.0f\n", $3 * n }'
}

# Medians of several, measured in turns so that a busy moment hits them alike. Prints them in order.
rates_in_turns() { # clients name...
    local clients=$1 name _
    shift
    for _ in $(seq "${RATES_ROUNDS:-9}"); do
        for name in "$@"; do
            echo "$name $(rates_measure "$name" "$clients")"
        done
    done >"$dir/turns"
    for name in "$@"; do
        # shellcheck disable=SC2046 # words
        median $(awk -v s="$name" '$1 == s { print $2 }' "$dir/turns")
    done
}

# Redis with the usual script.
rates_redis_start() {
    command -v redis-server >/dev/null && command -v redis-benchmark >/dev/null || return 1
    redis_port=$((10000 + RANDOM % 10000))
    redis-server --unixsocket "$dir/redis.sock" --bind 127.0.0.1 --port "$redis_port" --save '' --appendonly no --dir "$dir" >"$dir/redis.log" 2>&1 &
    started+=("$!")
    local _
    for _ in $(seq 100); do
        [[ -S $dir/redis.sock ]] && return
        sleep 0.1
    done
    return 1
}

rates_redis() { # redis_hot, redis_many, redis_hot_tcp or redis_hot_pipelined; clients
    local key=hot where=(-s "$dir/redis.sock") number=$(($2 == 1 ? 20000 : 80000))
    local script="local n = redis.call('INCR', KEYS[1]) if n == 1 then redis.call('EXPIRE', KEYS[1], 60) end return n <= tonumber(ARGV[1])"
    case $1 in
        *_many) key=key:__rand_int__ ;;
        *_tcp) where=(-p "$redis_port") ;;
        *_pipelined) where+=(-P "$rates_pipelined") number=$((number * 5)) ;;
    esac
    redis-benchmark "${where[@]}" -c "$2" -n "$number" -r 10000 -q --csv EVAL "$script" 1 "$key" 1000000000 |
        tail -1 | awk -F'","' '{ printf "%.0f\n", $(NF > 2 ? 2 : NF) }'
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

# A row: a rate beside others, the first of which it is measured against.
rates_row() { # what clients name text name...: a %s in the text for each name after it
    local what=$1 clients=$2 name=$3 text=$4 rates
    shift 4
    mapfile -t rates < <(rates_in_turns "$clients" "$name" "$@")
    # shellcheck disable=SC2059 # the text is the format
    row "$what, $clients clients" "${rates[0]}" "$(printf "$text" "${rates[@]:1}")" "$(ratio "${rates[0]}" "${rates[1]}")"
}

bench_rates() {
    local clients ns user="'11111111-1111-1111-1111-111111111111'" redis=
    rates_peer_tables
    rates_scripts
    rates_redis_start && redis=yes
    for clients in 1 8 32; do
        rates_row 'check_rate_limit a second, one key' "$clients" hot 'SELECT 1: %s' one
        rates_row 'check_rate_limit a second, 10,000 keys' "$clients" many 'SELECT of a parameter: %s' one_of_many
        RATES_ROUNDS=3 rates_row 'the same on one key' "$clients" hot "the seeds' plpgsql on a table: %s; unlogged: %s" hot_logged hot_unlogged
        RATES_ROUNDS=3 rates_row 'the same on 10,000 keys' "$clients" many "the seeds' plpgsql on a table: %s; unlogged: %s" many_logged many_unlogged
        [[ -n $redis ]] || continue
        RATES_ROUNDS=${RATES_ROUNDS:-5} rates_row 'the same on one key' "$clients" hot 'Redis, Lua INCR and EXPIRE, redis-benchmark, both on sockets: %s' redis_hot
        RATES_ROUNDS=${RATES_ROUNDS:-5} rates_row 'the same on 10,000 keys' "$clients" many 'Redis, the same: %s' redis_many
        RATES_ROUNDS=${RATES_ROUNDS:-5} rates_row 'the same on one key over TCP' "$clients" hot_tcp 'Redis, both over TCP on 127.0.0.1: %s' redis_hot_tcp
        RATES_ROUNDS=${RATES_ROUNDS:-5} rates_row "the same, $rates_pipelined on the way at a time" "$clients" hot_pipelined "Redis, both on sockets, as many on the way: %s" redis_hot_pipelined
    done
    [[ -n $redis ]] || row 'beside Redis' '–' 'no redis-server here: .ci/setup bench installs it' '–'
    ns=$(rates_per_call "check_rate_limit('github', $user, i)" 'i % 2 = 0')
    row 'check_rate_limit, a million calls in a statement, one key, ns a call' "$ns" 'aim: below 300' "$(ratio "$ns" 300)"
    ns=$(rates_per_call "check_rate_limit('server ' || i % 10000, $user, i)" "'server ' || i % 10000 <> ''")
    row 'the same, 10,000 keys, ns a call' "$ns" 'aim: below 300' "$(ratio "$ns" 300)"
    sql -c 'DROP FUNCTION check_rate_limit_logged, check_rate_limit_unlogged' -c 'DROP TABLE tracking_logged, tracking_unlogged'
}
