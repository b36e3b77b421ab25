-- Health: how things stand, what of it is worth waking somebody, and both as one document.

CREATE FUNCTION _nexus_hub.is_preloaded() RETURNS boolean
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'is_preloaded_wrapper';
COMMENT ON FUNCTION _nexus_hub.is_preloaded() IS 'Whether the library is in shared_preload_libraries, so that there are workers and shared memory.';

CREATE FUNCTION _nexus_hub.library_version() RETURNS text
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'library_version_wrapper';
COMMENT ON FUNCTION _nexus_hub.library_version() IS 'The version of the library that the server has loaded.';

CREATE FUNCTION _nexus_hub.workers_wanted() RETURNS integer
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'workers_wanted_wrapper';
COMMENT ON FUNCTION _nexus_hub.workers_wanted() IS 'The setting nexus_hub.workers_per_database.';

CREATE FUNCTION _nexus_hub.workers()
RETURNS TABLE (database oid, number integer, workers integer, state text, pid integer, last_loop timestamptz, in_flight integer)
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'workers_wrapper';
COMMENT ON FUNCTION _nexus_hub.workers() IS
    'The workers of all databases: which of how many of its database, whether it is starting, running, stuck (it fails again and again, or has done nothing for a minute and three poll intervals), draining (another one takes its place, and it finishes its requests) or has ended, its process, when it had done its work last, and its requests in flight.';

CREATE FUNCTION _nexus_hub.vault_problem() RETURNS text
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'vault_problem_wrapper';
COMMENT ON FUNCTION _nexus_hub.vault_problem() IS
    'Why values cannot be encrypted in this database, in words without a secret; NULL: they can, or nobody ever has, and no key is configured.';

CREATE FUNCTION _nexus_hub.job_rows() RETURNS bigint
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- After a crash the statistics are empty, and what the last vacuum or analyze has found is better than nothing.
    SELECT CASE
               WHEN pg_stat_get_tuples_inserted(c.oid) + pg_stat_get_tuples_deleted(c.oid) + pg_stat_get_live_tuples(c.oid) > 0
                   THEN pg_stat_get_live_tuples(c.oid)
               ELSE greatest(c.reltuples, 0)::bigint
           END
      FROM pg_class c
     WHERE c.oid = '@extschema@.job_results'::regclass;
END;
COMMENT ON FUNCTION _nexus_hub.job_rows() IS 'About how many rows job_results has, as PostgreSQL''s statistics know it.';

CREATE FUNCTION _nexus_hub.rate_violators() RETURNS bigint
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT count(*)
      FROM (SELECT
              FROM (SELECT w.server_id, w.user_id, w.request_count
                      FROM _nexus_hub.rate_limit_windows w
                     WHERE w.window_start >= now() - interval '11 minutes'
                     ORDER BY w.window_start DESC
                     LIMIT 100000) AS w
              LEFT JOIN @extschema@.rate_limit_overrides b ON b.server_id = w.server_id AND b.user_id = w.user_id
              LEFT JOIN @extschema@.rate_limit_overrides o ON o.user_id = w.user_id AND o.server_id IS NULL
              LEFT JOIN @extschema@.rate_limit_overrides a ON a.server_id = w.server_id AND a.user_id IS NULL
              LEFT JOIN @extschema@.user_servers u ON u.user_id = w.user_id AND u.server_id = w.server_id
              LEFT JOIN @extschema@.system_servers s ON s.id = w.server_id AND u.id IS NULL
             WHERE w.request_count > coalesce(b.request_limit, o.request_limit, a.request_limit, u.rate_limit_per_minute, s.rate_limit_per_minute)
             GROUP BY w.server_id, w.user_id
            HAVING count(*) >= 5) AS v;
END;
COMMENT ON FUNCTION _nexus_hub.rate_violators() IS
    'Servers'' users that were over the limit of the server''s row, or the override''s, in five of the last ten minutes. Limits that callers of check_rate_limit bring are not known.';

CREATE FUNCTION _nexus_hub.pending_jobs(p_most integer, OUT pending bigint, OUT oldest_pending_seconds double precision)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
-- In the order of an index, whatever the statistics say, which may be of an empty table.
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET jit = off
AS $$
BEGIN
    -- By priority, or those of a small number would hide the others.
    SELECT extract(epoch FROM now() - min(o.since)) INTO oldest_pending_seconds
      FROM generate_series(1, 9) AS p (priority)
     CROSS JOIN LATERAL (
               SELECT j.since FROM _nexus_hub.job_places j
                WHERE j.status = 'pending' AND j.priority = p.priority::smallint AND j.run_at <= now()
                ORDER BY j.run_at
                LIMIT 1) AS o
     WHERE o.since <= now();
    SELECT count(*) FILTER (WHERE d.since <= now()) INTO pending
      FROM (SELECT j.since
              FROM generate_series(1, 9) AS p (priority)
             CROSS JOIN LATERAL (
                       SELECT j.since FROM _nexus_hub.job_places j
                        WHERE j.status = 'pending' AND j.priority = p.priority::smallint AND j.run_at <= now()
                        ORDER BY j.run_at
                        LIMIT p_most) AS j
             LIMIT p_most) AS d;
END
$$;
COMMENT ON FUNCTION _nexus_hub.pending_jobs(integer) IS
    'How many jobs are due and wait, p_most at most, and for how many seconds the first of them has been due; NULL: none waits.';

CREATE FUNCTION _nexus_hub.job_situation(
    OUT pending bigint, OUT scheduled bigint, OUT running bigint, OUT oldest_pending_seconds double precision, OUT stuck_jobs bigint,
    OUT ended_last_hour bigint, OUT failed_last_hour bigint, OUT failure_rate double precision, OUT denied_last_hour bigint, OUT open_hosts bigint)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
-- In the order of an index, whatever the statistics say, which may be of an empty table.
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET jit = off
AS $$
DECLARE
    -- Whatever there is, the answer comes soon: nothing is counted beyond this.
    most constant integer := 10000;
    most_each constant integer := 1000;
    hour_ago constant timestamptz := now() - interval '1 hour';
BEGIN
    SELECT p.pending, p.oldest_pending_seconds INTO pending, oldest_pending_seconds FROM _nexus_hub.pending_jobs(most) p;
    SELECT count(*) INTO stuck_jobs
      FROM generate_series(1, 9) AS p (priority)
     CROSS JOIN LATERAL (
               SELECT j.since FROM _nexus_hub.job_places j
                WHERE j.status = 'pending' AND j.priority = p.priority::smallint AND j.run_at <= hour_ago
                ORDER BY j.run_at
                LIMIT most_each) AS d
     WHERE d.since <= hour_ago;
    SELECT count(*) INTO scheduled
      FROM (SELECT
              FROM generate_series(1, 9) AS p (priority)
             CROSS JOIN LATERAL (
                       SELECT FROM _nexus_hub.job_places j
                        WHERE j.status = 'pending' AND j.priority = p.priority::smallint AND j.run_at > now()
                        ORDER BY j.run_at
                        LIMIT most) AS j
             LIMIT most) AS s;
    SELECT count(*), stuck_jobs + count(*) FILTER (WHERE r.since <= hour_ago) INTO running, stuck_jobs
      FROM (SELECT j.since FROM _nexus_hub.job_places j WHERE j.status = 'running' LIMIT most) AS r;
    SELECT count(*), count(*) FILTER (WHERE e.status = 'failed') INTO ended_last_hour, failed_last_hour
      FROM (SELECT n.status
              FROM unnest(ARRAY['completed', 'failed']) AS s (status)
             CROSS JOIN LATERAL (
                       SELECT j.status, j.completed_at FROM _nexus_hub.job_places j
                        WHERE j.status = s.status AND j.status IN ('completed', 'failed', 'cancelled') AND j.completed_at > hour_ago
                        ORDER BY j.completed_at DESC
                        LIMIT most) AS n
             ORDER BY n.completed_at DESC
             LIMIT most) AS e;
    failure_rate := CASE WHEN ended_last_hour >= 10 THEN failed_last_hour::double precision / ended_last_hour ELSE 0 END;
    SELECT count(*) INTO denied_last_hour
      FROM (SELECT a.error FROM _nexus_hub.job_attempts a WHERE a.finished_at > hour_ago ORDER BY a.finished_at DESC LIMIT most) AS f
     WHERE f.error LIKE 'the egress policy does not allow %';
    SELECT count(DISTINCT b.host) INTO open_hosts FROM _nexus_hub.circuit_breakers b;
END
$$;
COMMENT ON FUNCTION _nexus_hub.job_situation() IS 'How the job tables stand. Counts end at 10000. Failures are those of the last hour, of the last 10000 jobs in it; the rate is 0 of fewer than ten jobs.';

CREATE FUNCTION _nexus_hub.situation(
    OUT is_preloaded boolean, OUT is_standby boolean, OUT is_enabled boolean, OUT missing_workers integer, OUT stuck_workers integer,
    OUT are_tables_locked boolean, OUT restoring_sessions bigint,
    OUT pending bigint, OUT scheduled bigint, OUT running bigint, OUT oldest_pending_seconds double precision, OUT stuck_jobs bigint,
    OUT ended_last_hour bigint, OUT failed_last_hour bigint, OUT failure_rate double precision, OUT denied_last_hour bigint, OUT open_hosts bigint,
    OUT table_rows bigint, OUT vault_problem text, OUT vault_uses bigint,
    OUT rate_keys integer, OUT rate_max_keys integer, OUT rate_allowed bigint, OUT rate_denied bigint, OUT rate_full bigint, OUT rate_violators bigint,
    OUT cache_entries bigint, OUT cache_expired_share double precision, OUT failing_syncs bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- Who watches must not wait for what is wrong.
SET lock_timeout = '100ms'
AS $$
BEGIN
    is_preloaded := _nexus_hub.is_preloaded();
    is_standby := pg_is_in_recovery();
    is_enabled := coalesce(current_setting('nexus_hub.enabled', true)::boolean, true);
    SELECT greatest(_nexus_hub.workers_wanted() - count(*) FILTER (WHERE w.state NOT IN ('ended', 'draining')), 0), count(*) FILTER (WHERE w.state = 'stuck')
      INTO missing_workers, stuck_workers
      FROM _nexus_hub.workers() w
     WHERE w.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());
    IF is_standby THEN
        -- It has none, and is to have none.
        missing_workers := 0;
    END IF;
    SELECT count(*) INTO restoring_sessions
      FROM pg_locks l
     WHERE l.locktype = 'advisory' AND l.classid = 'pg_extension'::regclass AND l.objid = 0 AND l.objsubid = 3 AND l.mode = 'ShareLock'
       AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());
    are_tables_locked := false;
    BEGIN
        SELECT j.pending, j.scheduled, j.running, j.oldest_pending_seconds, j.stuck_jobs, j.ended_last_hour, j.failed_last_hour,
               j.failure_rate, j.denied_last_hour, j.open_hosts
          INTO pending, scheduled, running, oldest_pending_seconds, stuck_jobs, ended_last_hour, failed_last_hour,
               failure_rate, denied_last_hour, open_hosts
          FROM _nexus_hub.job_situation() j;
        rate_violators := _nexus_hub.rate_violators();
        SELECT c.entries, c.expired_share, c.failing_syncs INTO cache_entries, cache_expired_share, failing_syncs
          FROM _nexus_hub.cache_situation(300) c;
        SELECT max(k.uses) INTO vault_uses
          FROM (SELECT sum(n.encrypted_count)::bigint AS uses FROM _nexus_hub.known_vault_keys n GROUP BY n.fingerprint) AS k;
        vault_problem := _nexus_hub.vault_problem();
    EXCEPTION WHEN lock_not_available THEN
        are_tables_locked := true;
    END;
    table_rows := _nexus_hub.job_rows();
    SELECT s.keys, s.max_keys, s.allowed, s.denied, s.full_table INTO rate_keys, rate_max_keys, rate_allowed, rate_denied, rate_full
      FROM _nexus_hub.rate_limit_statistics() s;
END
$$;
COMMENT ON FUNCTION _nexus_hub.situation() IS 'How things stand in this database. NULL: not known, because somebody has the tables locked.';

CREATE FUNCTION _nexus_hub.judge(p_situation jsonb)
RETURNS TABLE (name text, severity text, value double precision, threshold double precision, firing boolean, description text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT a.name, a.severity, a.value, a.threshold, a.value > a.threshold, a.description
      FROM jsonb_to_record(p_situation) AS s (
               is_preloaded boolean, is_standby boolean, is_enabled boolean, missing_workers integer, stuck_workers integer,
               are_tables_locked boolean, restoring_sessions bigint, pending bigint, oldest_pending_seconds double precision, stuck_jobs bigint, failure_rate double precision,
               table_rows bigint, denied_last_hour bigint, open_hosts bigint, vault_problem text, vault_uses bigint, rate_violators bigint,
               cache_expired_share double precision)
     CROSS JOIN LATERAL (VALUES
        ('worker_down', 'critical', s.missing_workers::double precision, 0::double precision,
            CASE WHEN s.is_preloaded THEN 'workers are missing: see the server''s log, and max_worker_processes'
                 ELSE 'nexus_hub is not preloaded: add it to shared_preload_libraries and restart the server' END),
        ('worker_stuck', 'critical', s.stuck_workers, 0,
            'workers fail again and again, or were not seen at work for long: look at the server''s log, and for locks on job_results in pg_locks'),
        ('tables_locked', 'critical', s.are_tables_locked::integer, 0,
            'a session keeps nexus_hub''s tables locked, and jobs wait for it: see pg_locks'),
        ('vault_key_unusable', 'critical', (s.vault_problem IS NOT NULL)::integer, 0,
            coalesce(s.vault_problem, 'the vault''s keys cannot be used')),
        ('jobs_disabled', 'warning', (NOT s.is_enabled AND NOT s.is_standby)::integer, 0,
            'nexus_hub.enabled is off: jobs stay pending'),
        ('restoring', 'warning', coalesce(s.restoring_sessions, 0), 0,
            'sessions that load a dump are there, and jobs wait until they end: SELECT pid FROM pg_locks WHERE locktype = ''advisory'' AND objsubid = 3 AND mode = ''ShareLock'''),
        ('oldest_pending_age', 'warning', coalesce(s.oldest_pending_seconds, 0), 300,
            'a job has been due for so many seconds: look at circuit_breakers, rate limits, and nexus_hub.max_in_flight'),
        ('stuck_jobs', 'warning', coalesce(s.stuck_jobs, 0), 0,
            'jobs have been running, or due, for more than an hour'),
        ('job_failure_rate', 'warning', coalesce(s.failure_rate, 0), 0.1,
            'of the jobs that ended in the last hour, so many have failed: look at job_attempts'),
        ('circuit_breakers_open', 'warning', coalesce(s.open_hosts, 0), 0,
            'hosts cannot be reached: see circuit_breakers'),
        ('rate_limit_violations', 'warning', coalesce(s.rate_violators, 0), 0,
            'servers'' callers were over their limit in five of the last ten minutes: see rate_limit_tracking'),
        ('cache_expired', 'warning', coalesce(s.cache_expired_share, 0), 0.5,
            'of what the caches hold, so much is expired: server_syncs says why servers cannot be synced; see nexus_hub.auto_refresh, too'),
        ('egress_denials', 'warning', coalesce(s.denied_last_hour, 0), 10,
            'attempts to reach what nexus_hub.egress_allow does not open, in the last hour: see job_attempts'),
        ('vault_key_worn', 'warning', coalesce(s.vault_uses, 0), 2147483647,
            'a vault key has encrypted half of the values for which it is safe: put a new key above it, and rotate'),
        ('upgrade_pending', 'warning', (_nexus_hub.library_version() IS DISTINCT FROM (
                SELECT e.extversion FROM pg_extension e WHERE e.extname = 'nexus_hub'))::integer, 0,
            'the library and the extension are of different versions: ALTER EXTENSION nexus_hub UPDATE, and restart the server'),
        ('job_table_size', 'info', s.table_rows, 1000000,
            'job_results has so many rows: shorten nexus_hub.completed_retention, or call cleanup_job_results_manual()'))
        AS a (name, severity, value, threshold, description);
END;
COMMENT ON FUNCTION _nexus_hub.judge(jsonb) IS 'What of a situation is worth an alert; see the view nexus_hub_alerts.';

CREATE FUNCTION _nexus_hub.alerts()
RETURNS TABLE (name text, severity text, value double precision, threshold double precision, firing boolean, description text)
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT j.name, j.severity, j.value, j.threshold, j.firing, j.description
      FROM _nexus_hub.situation() AS s
     CROSS JOIN LATERAL _nexus_hub.judge(to_jsonb(s)) AS j;
END;
COMMENT ON FUNCTION _nexus_hub.alerts() IS 'What the view nexus_hub_alerts shows.';

CREATE VIEW @extschema@.nexus_hub_alerts WITH (security_barrier) AS
    SELECT a.name, a.severity, a.value, a.threshold, a.firing, a.description FROM _nexus_hub.alerts() AS a;
COMMENT ON VIEW @extschema@.nexus_hub_alerts IS
    'The alerts worth having, judged now: a row each, whether it fires or not. Answers soon, whatever the size of the tables and whoever has them locked. For the owner, service_role and pg_monitor.';
COMMENT ON COLUMN @extschema@.nexus_hub_alerts.name IS 'The alert.';
COMMENT ON COLUMN @extschema@.nexus_hub_alerts.severity IS 'critical: wake somebody; warning: look at it today; info: know it.';
COMMENT ON COLUMN @extschema@.nexus_hub_alerts.value IS 'What was measured. Counts of jobs end at 10000.';
COMMENT ON COLUMN @extschema@.nexus_hub_alerts.threshold IS 'It fires above this.';
COMMENT ON COLUMN @extschema@.nexus_hub_alerts.firing IS 'Whether it fires.';
COMMENT ON COLUMN @extschema@.nexus_hub_alerts.description IS 'What it means, and where to look.';

CREATE FUNCTION _nexus_hub.health(p_answers boolean) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    s record;
    status text;
    reasons jsonb;
BEGIN
    SELECT * INTO s FROM _nexus_hub.situation();
    SELECT CASE WHEN bool_or(j.name IN ('worker_down', 'worker_stuck')) THEN 'down' WHEN count(*) > 0 THEN 'degraded' ELSE 'ok' END,
           coalesce(jsonb_agg(jsonb_build_object('name', j.name, 'severity', j.severity, 'value', j.value,
                                                 'threshold', j.threshold, 'reason', j.description)), '[]')
      INTO status, reasons
      FROM _nexus_hub.judge(to_jsonb(s)) AS j
     WHERE j.firing AND j.severity <> 'info';
    -- What PostgREST answers with. Elsewhere it is a setting of this transaction that nobody reads.
    IF p_answers AND status = 'down' THEN
        PERFORM set_config('response.status', '503', true);
    END IF;
    RETURN jsonb_build_object(
        'status', status,
        'reasons', reasons,
        'version', (SELECT e.extversion FROM pg_extension e WHERE e.extname = 'nexus_hub'),
        'library_version', _nexus_hub.library_version(),
        'preloaded', s.is_preloaded,
        'standby', s.is_standby,
        'enabled', s.is_enabled,
        'workers', (SELECT coalesce(jsonb_agg(jsonb_build_object(
                               'database', d.datname, 'number', w.number, 'of', w.workers, 'state', w.state, 'pid', w.pid,
                               'last_loop', w.last_loop,
                               'seconds_since_last_loop', round(extract(epoch FROM clock_timestamp() - w.last_loop), 3),
                               'in_flight', w.in_flight) ORDER BY d.datname, w.number), '[]')
                      FROM _nexus_hub.workers() w
                      JOIN pg_database d ON d.oid = w.database
                     WHERE w.state <> 'ended'),
        'jobs', jsonb_build_object(
            'pending', s.pending, 'scheduled', s.scheduled, 'running', s.running,
            'oldest_pending_seconds', round(s.oldest_pending_seconds::numeric, 3), 'stuck', s.stuck_jobs,
            'ended_last_hour', s.ended_last_hour, 'failed_last_hour', s.failed_last_hour, 'rows', s.table_rows),
        'vault', jsonb_build_object('usable', s.vault_problem IS NULL AND NOT s.are_tables_locked, 'problem', s.vault_problem, 'encrypted_count', s.vault_uses),
        'rate_limits', jsonb_build_object(
            'keys', s.rate_keys, 'max_keys', s.rate_max_keys, 'fill', round(s.rate_keys / s.rate_max_keys::numeric, 4),
            'allowed', s.rate_allowed, 'denied', s.rate_denied, 'no_room', s.rate_full),
        'cache', jsonb_build_object(
            'entries', s.cache_entries, 'expired_share', round(s.cache_expired_share::numeric, 4), 'failing_syncs', s.failing_syncs),
        'egress', jsonb_build_object('denied_last_hour', coalesce(s.denied_last_hour, 0), 'unreachable_hosts', s.open_hosts));
END
$$;
COMMENT ON FUNCTION _nexus_hub.health(boolean) IS 'What nexus_hub_health returns. p_answers: sets the HTTP status of the answer, too.';

CREATE FUNCTION @extschema@.nexus_hub_health() RETURNS jsonb
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.health(true);
END;
COMMENT ON FUNCTION @extschema@.nexus_hub_health() IS
    'How things stand in this database, as one document: status is ok; degraded: something needs a look; or down: no job runs. reasons says why it is not ok: the alerts of nexus_hub_alerts that fire, those of severity info left out. Through PostgREST the HTTP status is 503 when it is down, else 200. Counts of jobs end at 10000. Works on a standby and in read-only transactions. For the owner, service_role and pg_monitor.';

CREATE FUNCTION _nexus_hub.health_summary()
RETURNS TABLE (status text, reasons text[], pending bigint, running bigint, oldest_pending_seconds double precision,
               messages_last_hour bigint, recent_function_errors bigint, active_sessions bigint)
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT h.health ->> 'status', ARRAY(SELECT r ->> 'name' FROM jsonb_array_elements(h.health -> 'reasons') AS r),
           (h.health -> 'jobs' ->> 'pending')::bigint, (h.health -> 'jobs' ->> 'running')::bigint,
           (h.health -> 'jobs' ->> 'oldest_pending_seconds')::double precision,
           (h.health -> 'jobs' ->> 'ended_last_hour')::bigint, (h.health -> 'jobs' ->> 'failed_last_hour')::bigint,
           (SELECT coalesce(sum((w ->> 'in_flight')::bigint), 0)::bigint FROM jsonb_array_elements(h.health -> 'workers') AS w WHERE w ->> 'database' = current_database())
      FROM (SELECT _nexus_hub.health(false) AS health) AS h;
END;
COMMENT ON FUNCTION _nexus_hub.health_summary() IS 'What the view system_health_summary shows.';

CREATE VIEW @extschema@.system_health_summary WITH (security_barrier) AS
    SELECT h.status, h.reasons, h.pending, h.running, h.oldest_pending_seconds, h.messages_last_hour, h.recent_function_errors, h.active_sessions
      FROM _nexus_hub.health_summary() AS h;
COMMENT ON VIEW @extschema@.system_health_summary IS 'nexus_hub_health() in one row, under names that runbooks know. For the owner, service_role and pg_monitor.';
COMMENT ON COLUMN @extschema@.system_health_summary.status IS 'ok, degraded or down.';
COMMENT ON COLUMN @extschema@.system_health_summary.reasons IS 'The alerts that fire.';
COMMENT ON COLUMN @extschema@.system_health_summary.pending IS 'Jobs that are due and wait; 10000: or more.';
COMMENT ON COLUMN @extschema@.system_health_summary.running IS 'Jobs that run; 10000: or more.';
COMMENT ON COLUMN @extschema@.system_health_summary.oldest_pending_seconds IS 'How long the job that has waited longest has been due; NULL: none waits.';
COMMENT ON COLUMN @extschema@.system_health_summary.messages_last_hour IS 'Jobs that completed or failed in the last hour; 10000: or more.';
COMMENT ON COLUMN @extschema@.system_health_summary.recent_function_errors IS 'Of these, those that failed.';
COMMENT ON COLUMN @extschema@.system_health_summary.active_sessions IS 'Requests that the workers of this database have in flight.';
