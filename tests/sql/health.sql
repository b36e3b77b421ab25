-- Health: what fires when, in a transaction that nobody else sees.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

CREATE FUNCTION pg_temp.fires() RETURNS text[] LANGUAGE sql AS
$$ SELECT coalesce(array_agg(name ORDER BY name), '{}') FROM nexus_hub_alerts WHERE firing AND name NOT IN ('worker_down', 'worker_stuck') $$;
CREATE FUNCTION pg_temp.value_of(alert text) RETURNS double precision LANGUAGE sql AS
$$ SELECT value FROM nexus_hub_alerts WHERE name = alert $$;
CREATE FUNCTION pg_temp.jobs() RETURNS jsonb LANGUAGE sql AS $$ SELECT nexus_hub_health() -> 'jobs' $$;
CREATE FUNCTION pg_temp.add_jobs(state text, age interval, number integer) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF state IN ('pending', 'running') THEN
        INSERT INTO job_results (job_type, server_id, tool_name, status, created_at)
        SELECT 'tool_invoke', 's', state, state, now() - age FROM generate_series(1, number);
    ELSE
        INSERT INTO job_results (job_type, server_id, tool_name, status, created_at, started_at, completed_at)
        SELECT 'tool_invoke', 's', state, state, now() - age, now() - age, now() - age FROM generate_series(1, number);
    END IF;
END
$$;

SELECT set_eq('SELECT name, severity, threshold FROM nexus_hub_alerts',
    $$VALUES ('worker_down', 'critical', 0::double precision), ('worker_stuck', 'critical', 0), ('tables_locked', 'critical', 0), ('vault_key_unusable', 'critical', 0),
             ('jobs_disabled', 'warning', 0), ('restoring', 'warning', 0), ('oldest_pending_age', 'warning', 300), ('stuck_jobs', 'warning', 0), ('job_failure_rate', 'warning', 0.1),
             ('circuit_breakers_open', 'warning', 0), ('rate_limit_violations', 'warning', 0), ('egress_denials', 'warning', 10), ('cache_expired', 'warning', 0.5),
             ('vault_key_worn', 'warning', 2147483647), ('upgrade_pending', 'warning', 0), ('job_table_size', 'info', 1000000)$$,
    'the alerts are these');
SELECT is(pg_temp.fires(), '{}', 'none fires at first');
SELECT is_empty('SELECT FROM nexus_hub_alerts WHERE value IS NULL OR firing IS NULL OR description IS NULL', 'each has a value and says what it means');
SELECT results_eq('SELECT pg_temp.jobs()', $$VALUES ('{"pending": 0, "scheduled": 0, "running": 0, "oldest_pending_seconds": null, "stuck": 0, "ended_last_hour": 0, "failed_last_hour": 0, "rows": 0}'::jsonb)$$,
                  'an empty queue is described');

-- ── Jobs ──

SELECT pg_temp.add_jobs('pending', '299 seconds', 2), pg_temp.add_jobs('running', '59 minutes', 3);
INSERT INTO job_results (job_type, server_id, tool_name, run_at, created_at) VALUES ('tool_invoke', 's', 'scheduled', now() + interval '1 hour', now() - interval '2 hours');
SELECT is(pg_temp.fires(), '{}', 'jobs that have waited for less than five minutes are no alert, nor are those that run');
SELECT is(pg_temp.jobs() - 'rows', '{"pending": 2, "scheduled": 1, "running": 3, "oldest_pending_seconds": 299.000, "stuck": 0, "ended_last_hour": 0, "failed_last_hour": 0}', 'they are counted');
SELECT pg_temp.add_jobs('pending', '301 seconds', 1);
SELECT is(pg_temp.fires(), '{oldest_pending_age}', 'one that has waited for longer is');
SELECT is(pg_temp.value_of('oldest_pending_age'), 301::double precision, 'with its age');
UPDATE job_results SET priority = 1 WHERE tool_name = 'pending';
SELECT is(pg_temp.value_of('oldest_pending_age'), 301::double precision, 'whatever its priority');
DELETE FROM job_results;
SELECT pg_temp.add_jobs('running', '61 minutes', 2);
SELECT is(pg_temp.fires(), '{stuck_jobs}', 'jobs that have been running for more than an hour are stuck');
SELECT pg_temp.add_jobs('pending', '61 minutes', 1);
SELECT is(pg_temp.fires(), '{oldest_pending_age,stuck_jobs}', 'and those that have been due for so long');
SELECT is(pg_temp.value_of('stuck_jobs'), 3::double precision, 'all of them');
DELETE FROM job_results;
SELECT pg_temp.add_jobs('failed', '10 minutes', 9);
SELECT is(pg_temp.fires(), '{}', 'nine failed jobs are no rate');
SELECT pg_temp.add_jobs('completed', '30 minutes', 81);
SELECT is(pg_temp.fires(), '{}', 'a tenth of the jobs may fail');
SELECT pg_temp.add_jobs('failed', '59 minutes', 1), pg_temp.add_jobs('failed', '61 minutes', 50), pg_temp.add_jobs('cancelled', '1 minute', 50);
SELECT is(pg_temp.fires(), '{job_failure_rate}', 'more may not');
SELECT is(round(pg_temp.value_of('job_failure_rate')::numeric, 4), 0.1099, 'of the last hour; who cancels has not failed');
SELECT is(pg_temp.jobs() ->> 'failed_last_hour', '10', 'and the failures are told');
SELECT results_eq('SELECT status, reasons, messages_last_hour, recent_function_errors FROM system_health_summary',
                  $$SELECT CASE WHEN h ->> 'status' = 'down' THEN 'down' ELSE 'degraded' END, ARRAY(SELECT r ->> 'name' FROM jsonb_array_elements(h -> 'reasons') r), 91::bigint, 10::bigint FROM nexus_hub_health() h$$,
                  'system_health_summary says the same in a row');
DELETE FROM job_results;
SELECT pg_temp.add_jobs('pending', '1 minute', 10050), pg_temp.add_jobs('completed', '1 minute', 10050);
SELECT results_eq($$SELECT j ->> 'pending', j ->> 'ended_last_hour' FROM pg_temp.jobs() j$$, $$VALUES ('10000', '10000')$$, 'counts end at 10000');
DELETE FROM job_results;
SELECT pg_temp.add_jobs('pending', '2 hours', 1);
UPDATE job_results SET priority = 9;
INSERT INTO job_results (job_type, server_id, tool_name, priority) SELECT 'tool_invoke', 's', 'before it', 1 FROM generate_series(1, 10001);
SELECT results_eq($$SELECT pg_temp.value_of('oldest_pending_age'), pg_temp.value_of('stuck_jobs')$$, 'VALUES (7200::double precision, 1::double precision)',
                  'a job of the last priority is seen behind any number of those of the first');
DELETE FROM job_results;

-- ── Everything else ──

INSERT INTO circuit_breakers (host, worker, state, failures, probe_at, error) VALUES ('h:80', 0, 'open', 5, now(), 'e'), ('h:80', 1, 'open', 5, now(), 'e'), ('i:80', 0, 'half-open', 5, now(), 'e');
SELECT is(pg_temp.fires(), '{circuit_breakers_open}', 'hosts that cannot be reached are an alert');
SELECT is(pg_temp.value_of('circuit_breakers_open'), 2::double precision, 'each host once');
DELETE FROM circuit_breakers;

INSERT INTO job_attempts (job_id, attempt, started_at, finished_at, error)
    SELECT gen_random_uuid(), 1, now(), now() - age * interval '1 minute', error
      FROM (VALUES (59, 10, 'the egress policy does not allow "h", which is a loopback address (nexus_hub.egress_allow)'),
                   (61, 5, 'the egress policy does not allow "h", which is a loopback address (nexus_hub.egress_allow)'), (1, 50, 'the server answered 500')) AS t (age, number, error),
           generate_series(1, number);
SELECT is(pg_temp.fires(), '{}', 'ten denials in an hour are mistakes');
INSERT INTO job_attempts (job_id, attempt, started_at, error) VALUES (gen_random_uuid(), 1, now(), 'the egress policy does not allow "h", which is private (nexus_hub.egress_allow)');
SELECT is(pg_temp.fires(), '{egress_denials}', 'eleven are somebody who tries');
SELECT is(nexus_hub_health() -> 'egress' ->> 'denied_last_hour', '11', 'and health tells how many');
DELETE FROM job_attempts;

INSERT INTO system_servers (id, name, config, rate_limit_per_minute) VALUES ('shared', 'S', '{"url": "https://host/"}', 10);
INSERT INTO user_servers (user_id, server_id, name, rate_limit_per_minute) VALUES ('aaaaaaaa-0000-4000-8000-000000000001', 'shared', 'own', 1000), ('aaaaaaaa-0000-4000-8000-000000000001', 'unlimited', 'own', NULL);
INSERT INTO _nexus_hub.rate_limit_windows (server_id, user_id, window_start, request_count)
    SELECT server, "user"::uuid, date_trunc('minute', now()) - minute * interval '1 minute', 11
      FROM (VALUES ('shared', NULL, 4), ('unlimited', 'aaaaaaaa-0000-4000-8000-000000000001', 10), ('shared', 'aaaaaaaa-0000-4000-8000-000000000001', 10)) AS t (server, "user", minutes), generate_series(1, minutes) AS minute;
SELECT is(pg_temp.fires(), '{}', 'who is over a limit in four minutes of ten is no alert, nor is who has no limit, or a higher one');
INSERT INTO _nexus_hub.rate_limit_windows (server_id, user_id, window_start, request_count) VALUES ('shared', NULL, date_trunc('minute', now()) - interval '7 minutes', 11);
SELECT is(pg_temp.fires(), '{rate_limit_violations}', 'in five of them is');
INSERT INTO rate_limit_overrides (server_id, request_limit) VALUES ('shared', 11);
SELECT is(pg_temp.fires(), '{}', 'but not where an override allows it');
UPDATE rate_limit_overrides SET request_limit = 10;
SELECT is(pg_temp.fires(), '{rate_limit_violations}', 'or one that does not');
DELETE FROM rate_limit_overrides;
DELETE FROM _nexus_hub.rate_limit_windows;

INSERT INTO tool_cache (server_ref_id, server_type, tool_name, namespaced_name, expires_at)
    SELECT ref_id, 'system', 't' || number, 's__t' || number, now() + (number - 10.5) * interval '1 minute' FROM system_servers, generate_series(1, 20) AS number WHERE id = 'shared';
INSERT INTO prompt_cache (server_ref_id, server_type, prompt_name, namespaced_name, expires_at) SELECT gen_random_uuid(), 'system', 'p', 's__p', now() - interval '1 day' FROM generate_series(1, 50);
SELECT is(pg_temp.fires(), '{}', 'half of the caches may be expired, and those of servers that are gone');
SELECT is(nexus_hub_health() -> 'cache', '{"entries": 20, "expired_share": 0.5000, "failing_syncs": 0}', 'health tells');
INSERT INTO resource_cache (server_ref_id, server_type, uri, expires_at) SELECT ref_id, 'system', 'u', now() - interval '1 minute' FROM system_servers WHERE id = 'shared';
SELECT is(pg_temp.fires(), '{cache_expired}', 'more may not');
UPDATE system_servers SET enabled = false;
SELECT is(pg_temp.fires(), '{}', 'but of servers that are disabled');
UPDATE system_servers SET enabled = true;
DELETE FROM tool_cache; DELETE FROM resource_cache; DELETE FROM prompt_cache;

SET LOCAL nexus_hub.enabled = off;
SELECT is(pg_temp.fires(), '{jobs_disabled}', 'a worker that takes no jobs is an alert');
SELECT is(nexus_hub_health() ->> 'enabled', 'false', 'and health tells');
RESET nexus_hub.enabled;

SELECT encrypt_token('t') IS NOT NULL;
UPDATE _nexus_hub.known_vault_keys SET encrypted_count = 2147483647;
SELECT is(pg_temp.fires(), '{}', 'a key below 2^31 values is good');
UPDATE _nexus_hub.known_vault_keys SET encrypted_count = 2147483648;
SELECT is(pg_temp.fires(), '{vault_key_worn}', 'then it is worn');
UPDATE _nexus_hub.known_vault_keys SET encrypted_count = NULL, fingerprint = 'ffffffffffffffff';
SELECT is(pg_temp.fires(), '{vault_key_unusable}', 'a key that this database does not know is an alert');
SELECT alike(nexus_hub_health() -> 'vault' ->> 'problem', 'the vault key % is not one that this database knows%', 'in the words of the log');
DELETE FROM _nexus_hub.known_vault_keys;

UPDATE pg_extension SET extversion = '0.0.9' WHERE extname = 'nexus_hub';
SELECT is(pg_temp.fires(), '{upgrade_pending}', 'another version of the library than of the extension is an alert');
UPDATE pg_extension SET extversion = nexus_hub_health() ->> 'library_version' WHERE extname = 'nexus_hub';
SELECT is(pg_temp.fires(), '{}', 'and the same is none');

-- What a test cannot bring about in a transaction.
CREATE FUNCTION pg_temp.judged(what text, value text) RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(j.name, ',') FROM _nexus_hub.judge(
        jsonb_build_object('is_preloaded', true, 'is_standby', false, 'is_enabled', true, 'missing_workers', 0, 'stuck_workers', 0, 'stuck_jobs', 0,
                           'failure_rate', 0, 'table_rows', 0, 'denied_last_hour', 0, 'open_hosts', 0, 'rate_violators', 0) || jsonb_build_object(what, value)) j WHERE j.firing
$$;
SELECT is(pg_temp.judged(what, value), alert, format('%s of %s: %s', what, value, coalesce(alert, 'no alert')))
  FROM (VALUES ('stuck_workers', '1', 'worker_stuck'), ('missing_workers', '1', 'worker_down'), ('table_rows', '1000000', NULL), ('table_rows', '1000001', 'job_table_size')) AS t (what, value, alert);

SET LOCAL transaction_read_only = on;
SELECT lives_ok('SELECT nexus_hub_health()', 'health is told in read-only transactions');
SELECT lives_ok('SELECT * FROM nexus_hub_alerts', 'alerts are, too');

SELECT * FROM finish();
ROLLBACK;
