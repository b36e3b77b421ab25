# shellcheck shell=bash
# Tool calls to an MCP server, and a shutdown while some are in flight. Sourced by run.sh.
: "${url:?}"

user=11111111-1111-1111-1111-111111111111
mcp_pid=

start_mcp_server() {
    local word rest mcp_url=
    [[ -n $mcp_pid ]] && return
    exec 3< <("${CARGO_TARGET_DIR:-target}/release/examples/mcp_server" --token bench & echo "pid $!"; wait)
    while [[ -z $mcp_pid || -z $mcp_url ]] && read -r word rest <&3; do
        case $word in
            pid)
                mcp_pid=$rest
                started+=("$mcp_pid")
                ;;
            listening) mcp_url=${rest#on } ;;
        esac
    done
    sql -c "SELECT add_server('bench', 'bench', jsonb_build_object('url', '$mcp_url', 'headers', jsonb_build_object('Authorization', 'Bearer bench')), '$user')" >/dev/null
    # One that is never reached: it is counted all the same.
    sql -c "UPDATE user_servers SET rate_limit_per_minute = 2147483647"
}

call_tools() { # count tool arguments
    sql -c "INSERT INTO job_results (user_id, job_type, server_id, tool_name, params)
            SELECT '$user', 'tool_invoke', 'bench', '$2', '$3' FROM generate_series(1, $1)"
}

# Seconds from when the INSERT began to the last completed call.
run_mcp() { # count tool arguments
    afresh
    call_tools "$@"
    await "count(*) = $1 FROM job_results WHERE status = 'completed'"
    sql -c "SELECT round(extract(epoch FROM max(completed_at) - min(created_at)), 2) FROM job_results"
}

bench_mcp() {
    local slow plain calls rate
    start_mcp_server
    run_mcp 10 add '{"a": 1, "b": 2}' >/dev/null
    slow=$(run_mcp 500 slow '{"ms": 1000}')
    row '500 MCP tool calls of 1 s each, seconds in all' "$slow" 'one of them: 1.00' "$(ratio "$slow" 1)"
    plain=$(median_rate 3 20000 "$url/")
    calls=$(run_mcp 5000 add '{"a": 1, "b": 2}')
    rate=$(awk -v s="$calls" 'BEGIN { printf "%d", 5000 / s }')
    row '5,000 MCP tool calls over one session, a second' "$rate" "20,000 http_request jobs: $plain" "$(ratio "$rate" "$plain")"
}

# The requests' time-out is 30 s, the promise is 3 s.
bench_shutdown() {
    local begin stop
    start_mcp_server
    afresh
    call_tools 200 slow '{"ms": 25000}'
    await "count(*) = 200 FROM job_results WHERE status = 'running'"
    begin=$(date +%s.%N)
    server -m fast stop
    stop=$(awk -v a="$begin" -v b="$(date +%s.%N)" 'BEGIN { printf "%.2f", b - a }')
    row 'fast shutdown with 200 requests in flight, seconds' "$stop" 'the promise: 3.00' "$(ratio "$stop" 3)"
}
