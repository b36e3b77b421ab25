#!/usr/bin/env bash
# The guided tour behind 'make demo': every statement as one would type it, and what it returned.
# Each result is checked; the first one that isn't what the text claims ends the tour with an error.
set -euo pipefail
# shellcheck source=examples/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

user=11111111-1111-1111-1111-111111111111
step=0

step() { # title
    step=$((step + 1))
    printf '\n%s. %s\n\n' "$step" "$1"
}

say() { # paragraph
    fold -s -w 96 <<<"$1" | sed -E 's/^/   /; s/ +$//'
    echo
}

# Shows a statement and what it returns, which is then in $out.
sql() { # statement
    sed -E '1s/^/demo=# /; 1!s/^/demo-# /' <<<"$1"
    out=$(cluster_psql -X -q -v ON_ERROR_STOP=1 -P pager=off -P null=NULL \
        -P format=wrapped -P columns=98 -c "$1" 2>&1) || {
        echo "$out"
        die "step $step: this statement should not have failed"
    }
    [[ -z $out ]] || echo "$out"
    echo
}

# The last result must match.
expect() { # pattern...
    local pattern
    for pattern in "$@"; do
        [[ $out =~ $pattern ]] || die "step $step: the result above should match: $pattern"
    done
}

# Sets $job from the last result.
job_id() {
    expect '[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}'
    job=${BASH_REMATCH[0]}
}

echo "nexus_hub: a tour. Lines with demo=# are what you would type into psql."

step "A database with the extension"
cluster_start
cluster_psql -X -q -d postgres -v ON_ERROR_STOP=1 -c 'SET client_min_messages = warning' \
    -c "DROP DATABASE IF EXISTS $database WITH (FORCE)" -c "CREATE DATABASE $database"
say "A private PostgreSQL $major runs in $home; its postgresql.conf says
shared_preload_libraries = 'nexus_hub'. This is all that a database needs:"
sql "CREATE EXTENSION nexus_hub;"
sql "SELECT extname, extversion FROM pg_extension WHERE extname = 'nexus_hub';"
expect 'nexus_hub'

step "The vault's key"
say "The vault encrypts with AES-256-GCM. Its key comes from the file that the setting
nexus_hub.vault_key_file names (mode $(as_owner stat -c %a "$home/vault.key")), and can't be read from SQL:"
sql "SELECT decrypt_token(encrypt_token('a secret')) AS there_and_back;"
expect 'a secret'

step "An MCP server that wants a token, and its credentials in the vault"
mcp_start
token=$(<"$demo/mcp_server.token")
say "examples/mcp_server listens on $mcp_url. It lets nobody in without its bearer token."
sql "SELECT add_server('calculator', 'My calculator',
    '{\"url\": \"$mcp_url\",
      \"headers\": {\"Authorization\": \"Bearer $token\"}}',
    p_user_id => '$user');"
expect '[0-9a-f]{8}-'
say "What the table holds is ciphertext; the token is nowhere in it:"
sql "SELECT server_id, left(encode(config_encrypted, 'hex'), 40) || '...' AS config_encrypted,
    position('$token'::bytea IN config_encrypted) > 0 AS token_readable
FROM user_servers;"
expect 'calculator' '\| f'

step "A tool call, in the background"
say "A job is a row. The background worker wakes up when the row is committed, decrypts the
credentials, calls the tool and writes the result. create_job returns at once:"
sql "SELECT create_job('$user', 'tool_invoke', 'calculator',
    'add', '{\"a\": 2, \"b\": 40}');"
job_id
sql "SELECT status, error, jsonb_pretty(result) AS result
FROM wait_for_job('$job');"
expect 'completed' '"sum": 42'

step "A resource"
sql "SELECT create_job('$user', 'resource_fetch', 'calculator',
    p_params => '{\"uri\": \"note://welcome\"}');"
job_id
sql "SELECT status, result #>> '{contents,0,text}' AS text
FROM wait_for_job('$job');"
expect 'completed *\| Welcome to the hub\.'

step "A prompt"
sql "SELECT create_job('$user', 'prompt_execute', 'calculator',
    'greet', '{\"name\": \"Ada\"}');"
job_id
sql "SELECT status, result #>> '{messages,0,content,text}' AS text
FROM wait_for_job('$job');"
expect 'completed *\| Please say hello to Ada\.'

step "A plain INSERT does it, too"
sql "INSERT INTO job_results (user_id, job_type, server_id, tool_name, params)
VALUES ('$user', 'tool_invoke', 'calculator', 'slow',
    '{\"ms\": 300, \"steps\": 3}')
RETURNING id, status;"
expect 'pending'
job_id
sql "SELECT status, result #>> '{content,0,text}' AS text, completed_at - started_at AS took
FROM wait_for_job('$job');"
expect 'completed *\| slept 300 ms'

step "When it goes wrong"
say "A tool that reports an error: the job has failed, the server's answer is kept."
sql "SELECT create_job('$user', 'tool_invoke', 'calculator',
    'fail', '{\"message\": \"out of paper\"}');"
job_id
sql "SELECT status, error, result ->> 'isError' AS is_error
FROM wait_for_job('$job');"
expect 'failed' 'out of paper' '\| true'
say "A server that this user doesn't have:"
sql "SELECT create_job('$user', 'tool_invoke', 'abacus',
    'add', '{\"a\": 2, \"b\": 40}');"
job_id
sql "SELECT status, error
FROM wait_for_job('$job');"
expect 'failed' 'abacus'
say "A wrong token. A system server is one for all users, its config is not encrypted:"
sql "INSERT INTO system_servers (id, name, config)
VALUES ('locked', 'Wrong token', '{\"url\": \"$mcp_url\",
    \"headers\": {\"Authorization\": \"Bearer guessed\"}}');"
sql "SELECT create_job('$user', 'tool_invoke', 'locked',
    'add', '{\"a\": 2, \"b\": 40}');"
job_id
sql "SELECT status, error
FROM wait_for_job('$job');"
expect 'failed' '401'

step "All of it"
sql "SELECT job_type, server_id, tool_name, status,
    round(extract(epoch FROM completed_at - created_at) * 1000) AS ms
FROM job_results ORDER BY created_at;"
out=$(cluster_psql -X -A -t -F ' ' -c "SELECT count(*), count(*) FILTER (WHERE status = 'completed'),
    count(*) FILTER (WHERE status = 'failed') FROM job_results")
expect '^7 4 3$'

say "The cluster and the MCP server keep running: 'make psql' opens a shell, 'make stop' ends both."
echo "demo: done, 7 jobs ran in the background: 4 completed, 3 failed as they should."
