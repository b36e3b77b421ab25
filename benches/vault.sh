# shellcheck shell=bash
# shellcheck disable=SC2154 # what setup.sh sets
# The vault's functions. Sourced by run.sh.

# Nanoseconds a call, net of the loop around it.
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

# Rows a second of a statement that goes through so many, its commit in it.
rows_per_second() { # rows statement
    sql -c '\timing on' -c "$2" | awk -v n="$1" '/^Time:/ { printf "%.0f", n / $2 * 1000 }'
}

# The better of two, each into or of an empty table.
best() { # rows statement before-each
    local one two
    sql -c "$3" -c CHECKPOINT
    one=$(rows_per_second "$1" "$2")
    sql -c "$3" -c CHECKPOINT
    two=$(rows_per_second "$1" "$2")
    echo $((one > two ? one : two))
}

bench_tables() {
    local n=200000 seal open rotate rate insert pgp read update _
    sql -c "CREATE TABLE texts AS SELECT n, repeat('x', 200) AS t FROM generate_series(1, $n) AS n" \
        -c 'CREATE TABLE sealed (n integer, c bytea)' -c 'VACUUM ANALYZE texts'
    insert=$(best $n 'INSERT INTO sealed SELECT n, t::bytea FROM texts' 'TRUNCATE sealed')
    pgp=$(best 5000 "INSERT INTO sealed SELECT n, pgp_sym_encrypt(t, 'a passphrase') FROM texts WHERE n <= 5000" 'TRUNCATE sealed')
    seal=$(best $n 'INSERT INTO sealed SELECT n, encrypt_token(t) FROM texts' 'TRUNCATE sealed')
    row '200,000 values of 200 bytes encrypted into a table, rows a second' "$seal" "pgp_sym_encrypt: $pgp; the bare INSERT: $insert" "$(ratio "$seal" "$pgp")"

    sql -c 'VACUUM ANALYZE sealed' -c 'SET max_parallel_workers_per_gather = 0' >/dev/null
    sql -c 'ALTER DATABASE postgres SET max_parallel_workers_per_gather = 0'
    read=$(best $n 'SELECT count(length(c)) FROM sealed' 'SELECT')
    open=$(best $n 'SELECT count(decrypt_token(c)) FROM sealed' 'SELECT')
    row 'the same decrypted in one process, rows a second' "$open" "the bare read: $read" "$(ratio "$open" "$read")"
    sql -c 'ALTER DATABASE postgres RESET max_parallel_workers_per_gather'

    sql -c "INSERT INTO user_servers (user_id, server_id, name, config_encrypted)
            SELECT gen_random_uuid(), 's', 'n', encrypt_config(jsonb_build_object('url', repeat('x', 190))) FROM texts" -c 'VACUUM FULL ANALYZE user_servers'
    update=$(best $n 'UPDATE user_servers SET config_encrypted = substr(config_encrypted, 1)' 'VACUUM FULL user_servers')
    rotate=0
    for _ in 1 2; do
        add_vault_key
        sql -c 'VACUUM FULL user_servers' -c CHECKPOINT
        rate=$(rows_per_second $n 'SELECT servers_updated FROM rotate_vault_key()' 2>/dev/null)
        rotate=$((rate > rotate ? rate : rotate))
    done
    row 'rotate_vault_key() of 200,000 servers, rows a second' "$rotate" "a plain UPDATE of them: $update" "$(ratio "$rotate" "$update")"
    sql -c 'TRUNCATE user_servers'
}

# A new vault key, above the ones there are.
add_vault_key() {
    "${as_server[@]}" sh -c "umask 077; { openssl rand -hex 32; cat $dir/vault.key; } >$dir/vault.new && mv $dir/vault.new $dir/vault.key"
    reload
}

# pgbench alone, beside a rotation that lasts longer than it, and alone again.
bench_rotation() {
    local n=400000 seconds=${ROTATION_SECONDS:-10} before beside after passed
    sql -c "INSERT INTO user_servers (user_id, server_id, name, config_encrypted)
            SELECT gen_random_uuid(), 's', 'n', encrypt_config(jsonb_build_object('url', repeat('x', 190))) FROM generate_series(1, $n)" \
        -c 'VACUUM ANALYZE user_servers'
    "$bin/pgbench" -qis 20 >/dev/null 2>&1
    tps() {
        sql -c CHECKPOINT
        "$bin/pgbench" -n -c 8 -j 2 -T "$seconds" 2>/dev/null | awk '/^tps/ { printf "%.0f", $3 }'
    }
    tps >/dev/null
    before=$(tps)
    add_vault_key
    sql -c 'SELECT start_vault_rotation()' >/dev/null 2>&1
    beside=$(tps)
    passed=$(sql -c 'SELECT done FROM vault_rotation')
    sql -c 'SELECT pause_vault_rotation()' >/dev/null
    after=$(tps)
    row 'pgbench, 8 clients, beside a rotation in the background, a second' "$beside" \
        "alone: $before before, $after after; encrypted anew meanwhile: $((passed / seconds)) values a second" "$(ratio "$beside" $(((before + after) / 2)))"
    sql -c 'TRUNCATE user_servers' -c 'DROP TABLE pgbench_accounts, pgbench_branches, pgbench_history, pgbench_tellers'
}

bench_vault() {
    bench_tables
    bench_rotation
    local seal open peer_seal peer_open
    seal=$(per_call "encrypt_token(CASE WHEN i > 0 THEN t END)" "CASE WHEN i > 0 THEN t END")
    open=$(per_call "decrypt_token(CASE WHEN i > 0 THEN sealed END)" "CASE WHEN i > 0 THEN sealed END")
    peer_seal=$(per_call "encrypt_iv(CASE WHEN i > 0 THEN b END, k, v, 'aes-cbc')" "CASE WHEN i > 0 THEN b END")
    peer_open=$(per_call "decrypt_iv(CASE WHEN i > 0 THEN cbc END, k, v, 'aes-cbc')" "CASE WHEN i > 0 THEN cbc END")
    row 'encrypt_token of 192 bytes, ns' "$seal" "pgcrypto AES-256-CBC, no tag, ns: $peer_seal" "$(ratio "$seal" "$peer_seal")"
    row 'decrypt_token of 192 bytes, ns' "$open" "pgcrypto AES-256-CBC, no tag, ns: $peer_open" "$(ratio "$open" "$peer_open")"
}
