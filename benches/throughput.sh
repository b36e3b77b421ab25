# shellcheck shell=bash
# Jobs a second, of 20,000 that come in at once. Sourced by run.sh.
: "${url:?}"

bench_throughput() {
    local limit rate
    limit=$(wrk_rate "$url/" 256)
    rate=$(median_rate 5 20000 "$url/")
    row '20,000 http_request jobs at once, to nginx, a second' "$rate" \
        "wrk alone: $limit; elsewhere: pgsql-http 19655, graphile-worker 17268, pg-boss 12182, pg_net 4217" "$(ratio "$rate" "$limit")"

    # A host gets four fifths of max_in_flight: 3,200.
    set_up nexus_hub.max_in_flight=4000
    limit=$(wrk_rate "$url/50ms" 3200)
    median_rate 1 20000 "$url/50ms" >/dev/null
    rate=$(median_rate 5 20000 "$url/50ms")
    set_back
    row 'the same to a server that takes 50 ms, max_in_flight = 4000' "$rate" \
        "wrk alone, 3200 connections: $limit; elsewhere: graphile-worker 8760, pg_net 1848" "$(ratio "$rate" "$limit")"
}
