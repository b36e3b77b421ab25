# shellcheck shell=bash
# What a watcher costs, with a million jobs in the table. Sourced by run.sh.
: "${dir:?}"

# The median time of a call, in ms, of 100.
call_time() { # expression
    sql -c "DO \$\$
            DECLARE begun timestamptz; BEGIN
                CREATE TEMP TABLE took (ms double precision);
                FOR i IN 1 .. 100 LOOP
                    begun := clock_timestamp();
                    PERFORM $1;
                    INSERT INTO took VALUES (extract(epoch FROM clock_timestamp() - begun) * 1000);
                END LOOP;
            END \$\$" \
        -c 'SELECT round(percentile_cont(0.5) WITHIN GROUP (ORDER BY ms)::numeric, 2) FROM took'
}

bench_health() {
    local time kind
    for kind in ended pending; do
        afresh
        if [[ $kind == ended ]]; then
            sql -c "INSERT INTO job_results (job_type, server_id, tool_name, status, started_at, completed_at)
                    SELECT 'tool_invoke', 's', 't', CASE WHEN n % 20 = 0 THEN 'failed' ELSE 'completed' END, now(), now() - n * interval '1 millisecond'
                      FROM generate_series(1, 1000000) AS n"
        else
            set_up nexus_hub.enabled=off
            sql -c "INSERT INTO job_results (job_type, server_id, tool_name, priority)
                    SELECT 'tool_invoke', 's', 't', 1 + n % 9 FROM generate_series(1, 1000000) AS n"
        fi
        sql -c 'VACUUM ANALYZE job_results'
        time=$(call_time 'nexus_hub_metrics()')
        row "nexus_hub_metrics() with 1,000,000 $kind jobs, ms" "$time" 'aim: below 5' "$(ratio "$time" 5)"
        time=$(call_time 'nexus_hub_health()')
        row "nexus_hub_health() with 1,000,000 $kind jobs, ms" "$time" "count(*) of them: $(call_time "count(*) FROM job_results")" '–'
    done
    afresh
    set_back
}
