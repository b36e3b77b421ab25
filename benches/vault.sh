# shellcheck shell=bash
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

bench_vault() {
    local seal open peer_seal peer_open
    seal=$(per_call "encrypt_token(CASE WHEN i > 0 THEN t END)" "CASE WHEN i > 0 THEN t END")
    open=$(per_call "decrypt_token(CASE WHEN i > 0 THEN sealed END)" "CASE WHEN i > 0 THEN sealed END")
    peer_seal=$(per_call "encrypt_iv(CASE WHEN i > 0 THEN b END, k, v, 'aes-cbc')" "CASE WHEN i > 0 THEN b END")
    peer_open=$(per_call "decrypt_iv(CASE WHEN i > 0 THEN cbc END, k, v, 'aes-cbc')" "CASE WHEN i > 0 THEN cbc END")
    row 'encrypt_token of 192 bytes, ns' "$seal" "pgcrypto AES-256-CBC, no tag, ns: $peer_seal" "$(ratio "$seal" "$peer_seal")"
    row 'decrypt_token of 192 bytes, ns' "$open" "pgcrypto AES-256-CBC, no tag, ns: $peer_open" "$(ratio "$open" "$peer_open")"
}
