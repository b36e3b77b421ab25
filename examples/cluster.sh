#!/usr/bin/env bash
# A private PostgreSQL cluster with nexus_hub, and the example MCP server beside it:
#   examples/cluster.sh start | status | psql [ARGUMENT...] | stop | remove
# Everything is in target/demo; where PostgreSQL's user can't reach that (run as root), in /var/tmp. It listens on a Unix socket only and leaves the system's own
# clusters alone. Can also be sourced, for the functions.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
target=${CARGO_TARGET_DIR:-$repo/target}
demo=$target/demo
database=demo

die() {
    echo "${0##*/}: $*" >&2
    exit 1
}

# PostgreSQL refuses to run as root. Its own user may not even be able to see the current directory.
as_owner() { # command...
    if [[ $EUID == 0 ]]; then
        (cd / && exec runuser -u postgres -- "$@")
    else
        "$@"
    fi
}

# Sets $bin, the programs of the PostgreSQL that the extension was built for.
find_postgres() {
    local pg_config
    pg_config=$("$repo/.ci/pg-config") || exit 1
    bin=$("$pg_config" --bindir)
    library=$("$pg_config" --pkglibdir)/nexus_hub.so
    major=$("$repo/.ci/pg-config" --major)
}

# Sets $home, where the cluster lives, if there is one: target/demo/cluster, or what that links to.
find_home() {
    home=$(readlink -e "$demo/cluster") && [[ -d $home/data ]]
}

# A fresh $home. The user postgres can't get into a clone under, say, /root: then it is elsewhere.
make_home() {
    mkdir -p "$demo"
    rm -rf "$demo/cluster"
    if [[ $EUID == 0 ]]; then
        id postgres &>/dev/null || die "PostgreSQL can't run as root, and there is no user postgres"
        install -d -m 700 -o postgres "$demo/cluster"
        if ! as_owner test -w "$demo/cluster"; then
            rmdir "$demo/cluster"
            ln -s "$(as_owner mktemp -d /var/tmp/nexus_hub_demo.XXXXXX)" "$demo/cluster"
        fi
    else
        install -d -m 700 "$demo/cluster"
    fi
    home=$(readlink -e "$demo/cluster")
}

# The directory of the socket, whose path may not be longer than about 100 bytes.
socket_dir() {
    local dir
    if [[ ${#home} -lt 80 ]]; then
        echo "$home"
        return
    fi
    dir=$(readlink -e "$home/socket") || {
        dir=$(as_owner mktemp -d /tmp/nexus_hub.XXXXXX)
        as_owner ln -sfn "$dir" "$home/socket"
    }
    echo "$dir"
}

make_cluster() {
    local key
    make_home
    as_owner "$bin/initdb" --pgdata="$home/data" --username=postgres --auth=trust \
        --encoding=UTF8 --locale=C.UTF-8 --no-sync >"$demo/initdb.log" 2>&1 ||
        die "initdb failed, see $demo/initdb.log"
    key=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    # Not on a command line, where everybody could read it.
    # shellcheck disable=SC2016 # the inner shell expands it
    as_owner bash -c 'umask 077 && cat >"$1"' - "$home/vault.key" <<<"$key"
    as_owner tee -a "$home/data/postgresql.conf" >/dev/null <<END

listen_addresses = ''
unix_socket_permissions = 0700
shared_preload_libraries = 'nexus_hub'
nexus_hub.vault_key_file = '$home/vault.key'
nexus_hub.egress_allow = '127.0.0.1'
END
    as_owner touch "$home/complete"
}

running() {
    as_owner "$bin/pg_ctl" status --pgdata="$home/data" >/dev/null 2>&1
}

cluster_start() {
    find_postgres
    [[ -e $library ]] || die "nexus_hub isn't installed: run 'make install'"
    if find_home && [[ $(<"$home/data/PG_VERSION") != "$major" ]]; then
        echo "the cluster in $demo is of PostgreSQL $(<"$home/data/PG_VERSION"): starting afresh"
        cluster_remove
    fi
    # An initdb that was interrupted leaves no mark.
    if ! find_home || [[ ! -e $home/complete ]]; then
        make_cluster
    fi
    [[ -e $home/vault.key ]] || die "the vault's key is gone: $home/vault.key (put it back, or 'make clean')"
    if running; then
        [[ $library -nt $home/started ]] || return 0
        cluster_stop
    fi
    as_owner touch "$home/started"
    as_owner "$bin/pg_ctl" start --pgdata="$home/data" --log="$home/log" --wait \
        --options="-k '$(socket_dir)'" >/dev/null || {
        tail -n 20 "$home/log" >&2
        die "PostgreSQL doesn't start, see above and $home/log"
    }
}

cluster_stop() {
    if find_home && running; then
        as_owner "$bin/pg_ctl" stop --pgdata="$home/data" --mode=fast --wait >/dev/null ||
            die "PostgreSQL doesn't stop, see $home/log"
    fi
}

cluster_remove() {
    local socket
    cluster_stop
    if find_home; then
        socket=$(readlink -e "$home/socket") && rm -rf "$socket"
        rm -rf "$home"
    fi
    rm -rf "$demo/cluster"
}

# psql on the demo's database, with nothing of the caller's own settings.
cluster_psql() { # argument...
    env -u PGSERVICE -u PGOPTIONS -u PGHOSTADDR PGHOST="$(socket_dir)" PGPORT=5432 PGUSER=postgres \
        PGDATABASE="$database" "$bin/psql" "$@"
}

# The process id of our MCP server, if it runs. A number alone may be somebody else's by now.
mcp_pid() {
    local pid program
    pid=$(cat "$demo/mcp_server.pid" 2>/dev/null) && program=$(readlink "/proc/$pid/exe") &&
        [[ $program == */examples/mcp_server* ]] && echo "$pid"
}

# Sets $mcp_url. Token and port stay the same, so that what a database knows of them stays true.
mcp_start() {
    local program=$target/debug/examples/mcp_server log=$demo/mcp_server.log port=0 i
    [[ -x $program ]] || die "no $program: run 'make demo'"
    mkdir -p "$demo"
    mcp_stop
    if [[ ! -s $demo/mcp_server.token ]]; then
        (umask 077 && echo "demo-$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')" \
            >"$demo/mcp_server.token")
    fi
    if mcp_url=$(mcp_known_url); then
        port=${mcp_url##*:}
        port=${port%/mcp}
    fi
    for port in "$port" 0; do
        nohup setsid "$program" --port "$port" --token "$(<"$demo/mcp_server.token")" \
            >"$log" 2>&1 </dev/null &
        echo $! >"$demo/mcp_server.pid"
        for ((i = 0; i < 100; i++)); do
            mcp_url=$(mcp_known_url) && return
            kill -0 "$!" 2>/dev/null || break
            sleep 0.05
        done
    done
    cat "$log" >&2
    die "the MCP server doesn't start"
}

mcp_known_url() {
    sed -n '1s/^listening on //p' "$demo/mcp_server.log" 2>/dev/null | grep .
}

mcp_stop() {
    local pid i
    pid=$(mcp_pid) || return 0
    kill "$pid"
    for ((i = 0; i < 100; i++)); do
        mcp_pid >/dev/null || break
        sleep 0.05
    done
    rm -f "$demo/mcp_server.pid"
}

status() {
    if find_home && running; then
        echo "PostgreSQL $major runs: process $(head -n 1 "$home/data/postmaster.pid"), in $home"
    else
        echo "PostgreSQL doesn't run"
    fi
    if mcp_pid >/dev/null; then
        echo "the MCP server runs: process $(mcp_pid), $(mcp_known_url)"
    else
        echo "the MCP server doesn't run"
    fi
}

# Being sourced?
[[ ${BASH_SOURCE[0]} == "$0" ]] || return 0

command=${1:-}
shift || true
case $command in
    start)
        cluster_start
        ;;
    status)
        find_postgres
        status
        ;;
    psql)
        find_home || die "no cluster yet: run 'make demo'"
        cluster_start
        mcp_pid >/dev/null || mcp_start
        cluster_psql "$@"
        ;;
    stop | remove)
        # The cluster first: jobs that run shall run again, not fail. Without one this needs no PostgreSQL.
        if find_home; then
            find_postgres
            "cluster_$command"
        fi
        mcp_stop
        echo "stopped"
        ;;
    *)
        die "usage: cluster.sh start | status | psql [ARGUMENT...] | stop | remove"
        ;;
esac
