-- Cleanup: which jobs go, and which do not.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

CREATE FUNCTION pg_temp.error_of(statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    hint text;
BEGIN
    EXECUTE statement;
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS hint = PG_EXCEPTION_HINT;
    RETURN SQLSTATE || ': ' || SQLERRM || CASE WHEN hint <> '' THEN ' (hint)' ELSE '' END;
END
$$;

-- A job that ended, or was made, so long ago. The worker does not see it, because this transaction never commits.
CREATE FUNCTION pg_temp.add_job(name text, status text, age interval, run_at timestamptz DEFAULT NULL) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF status IN ('completed', 'failed', 'cancelled') THEN
        INSERT INTO job_results (job_type, server_id, tool_name, status, created_at, started_at, completed_at)
        VALUES ('tool_invoke', 's', name, status, now() - age - interval '1 minute', now() - age - interval '1 minute', now() - age);
    ELSIF run_at IS NULL THEN
        INSERT INTO job_results (job_type, server_id, tool_name, status, created_at) VALUES ('tool_invoke', 's', name, status, now() - age);
    ELSE
        INSERT INTO job_results (job_type, server_id, tool_name, status, created_at, run_at) VALUES ('tool_invoke', 's', name, status, now() - age, run_at);
    END IF;
END
$$;
CREATE FUNCTION pg_temp.add_jobs() RETURNS void LANGUAGE sql AS $$
    DELETE FROM job_results;
    SELECT pg_temp.add_job(format('%s %s', status, age), status, age::interval)
      FROM unnest(ARRAY['completed', 'failed', 'cancelled']) AS status, unnest(ARRAY['8 days', '6 days', '7 days', '1 minute']) AS age;
    SELECT pg_temp.add_job(format('%s %s', status, age), status, age::interval)
      FROM unnest(ARRAY['pending', 'running']) AS status, unnest(ARRAY['25 hours', '23 hours', '24 hours', '1 minute']) AS age;
    SELECT pg_temp.add_job('scheduled for later', 'pending', '9 days', now() + interval '1 minute');
    SELECT pg_temp.add_job('scheduled long ago, due now', 'pending', '9 days', now() - interval '1 minute');
    SELECT pg_temp.add_job('scheduled long ago, due for two days', 'pending', '9 days', now() - interval '2 days');
$$;
CREATE FUNCTION pg_temp.left_of(pattern text) RETURNS text[] LANGUAGE sql AS
$$ SELECT array_agg(tool_name ORDER BY tool_name) FROM job_results WHERE tool_name ~ pattern $$;

-- ── As the guides know it ──

SELECT pg_temp.add_jobs();
SELECT is(cleanup_old_job_results(), 6, 'cleanup_old_job_results returns how many rows it has deleted in all');
SELECT is(pg_temp.left_of('^(completed|failed|cancelled)'),
          '{cancelled 1 minute,cancelled 6 days,cancelled 7 days,completed 1 minute,completed 6 days,completed 7 days,failed 1 minute,failed 6 days,failed 7 days}',
          'jobs that ended more than seven days ago are gone, whatever way they ended');
SELECT is(pg_temp.left_of('^(pending|running)'), '{pending 1 minute,pending 23 hours,pending 24 hours,running 1 minute,running 23 hours,running 24 hours}',
          'and so are those that nobody has run for more than a day');
SELECT is(pg_temp.left_of('^scheduled'), '{scheduled for later,"scheduled long ago, due now"}', 'a job is as old as it is due, not as it is');
SELECT is(cleanup_old_job_results(), 0, 'once');

SELECT pg_temp.add_jobs();
SELECT results_eq('SELECT * FROM cleanup_job_results_manual()', 'VALUES (3, 3, 6)', 'cleanup_job_results_manual does the same, and counts');
SELECT pg_temp.add_jobs();
SELECT results_eq('SELECT * FROM cleanup_job_results_manual(6, 3)', 'VALUES (6, 0, 6)', 'for other ages, too');
SELECT results_eq('SELECT * FROM cleanup_job_results_manual(p_days_orphaned => 1, p_days_completed => 14)', 'VALUES (0, 3, 3)', 'by the names of the arguments');
SELECT results_eq('SELECT * FROM cleanup_job_results_manual(0, NULL)', 'VALUES (6, 0, 6)', '0: whatever the age; NULL: none');
SELECT is((SELECT count(*) FROM job_results WHERE status IN ('completed', 'failed', 'cancelled')), 0::bigint, 'all that had ended are gone');
SELECT results_eq('SELECT * FROM cleanup_job_results_manual(NULL, 0)', 'VALUES (0, 7, 7)', 'all orphans');
SELECT is(pg_temp.left_of(''), '{scheduled for later}', 'but never what is scheduled for later');
SELECT pg_temp.add_jobs();
SELECT results_eq('SELECT * FROM cleanup_job_results_manual(NULL, NULL)', 'VALUES (0, 0, 0)', 'both NULL: nothing');
SELECT results_eq('SELECT * FROM cleanup_job_results_manual(2147483647, 2147483647)', 'VALUES (0, 0, 0)', 'older than anything: nothing');
SELECT is(pg_temp.error_of(format('SELECT cleanup_job_results_manual(%s)', arguments)), format('22023: %s must be 0 or more, not -1 (hint)', name), format('%s is refused', arguments))
  FROM (VALUES ('-1', 'p_days_completed'), ('7, -1', 'p_days_orphaned')) AS t (arguments, name);
SELECT is((SELECT count(*) FROM job_results), 23::bigint, 'and has deleted nothing');

-- ── Settings ──

SET LOCAL nexus_hub.completed_retention = '6d';
SET LOCAL nexus_hub.orphaned_retention = '1h';
SELECT pg_temp.add_jobs();
SELECT is(cleanup_old_job_results(), 13, 'cleanup_old_job_results goes by the settings');
SET LOCAL nexus_hub.completed_retention = 0;
SET LOCAL nexus_hub.orphaned_retention = 0;
SELECT pg_temp.add_jobs();
SELECT is(cleanup_old_job_results(), 0, 'which may say: never');
SELECT results_eq('SELECT * FROM cleanup_job_results_manual()', 'VALUES (3, 3, 6)', 'cleanup_job_results_manual does not go by them');
SET LOCAL nexus_hub.completed_retention = '30min';
SELECT is(cleanup_old_job_results(), 6, 'they need not be days');
RESET nexus_hub.completed_retention;
RESET nexus_hub.orphaned_retention;

-- ── Since when a job is due ──

DELETE FROM job_results;
SELECT pg_temp.add_job('brought in', 'pending', '2 days');
SELECT is((SELECT run_at FROM job_results), now() - interval '2 days', 'a job that is brought in from elsewhere is due since it was made');
SELECT pg_temp.add_job('running', 'running', '2 days');
SELECT is((SELECT started_at FROM job_results WHERE tool_name = 'running'), now() - interval '2 days', 'and has been running since then');
SELECT pg_temp.add_job('made tomorrow', 'running', '-1 day');
SELECT is((SELECT started_at FROM job_results WHERE tool_name = 'made tomorrow'), now(), 'but not since a time to come');
DELETE FROM job_results;
INSERT INTO job_results (job_type, server_id, tool_name, run_at) VALUES ('tool_invoke', 's', 'plain', DEFAULT), ('tool_invoke', 's', 'scheduled', now() + interval '1 hour');
UPDATE job_results SET created_at = now() - interval '2 days';
SELECT results_eq('SELECT tool_name, run_at FROM job_results ORDER BY 1', $$VALUES ('plain', now() - interval '2 days'), ('scheduled', now() + interval '1 hour')$$,
                  'a created_at that is set by hand takes along the run_at of a job that was not scheduled');
UPDATE job_results SET created_at = now() - interval '3 days', run_at = now() + interval '2 hours';
SELECT is((SELECT count(*) FROM job_results WHERE run_at = now() + interval '2 hours'), 2::bigint, 'and leaves one that is set together with it');
DELETE FROM job_results;
SELECT create_job(NULL, 'tool_invoke', 's', 't');
SELECT is((SELECT run_at FROM job_results), now(), 'a new job is due now');

-- ── Attempts ──

DELETE FROM job_results;
SELECT pg_temp.add_job('old', 'failed', '8 days'), pg_temp.add_job('young', 'failed', '1 day'), pg_temp.add_job('old', 'pending', '2 days');
INSERT INTO job_attempts (job_id, attempt, started_at, error) SELECT id, 1, now(), tool_name FROM job_results;
UPDATE job_results SET failures = 1;
SELECT is(cleanup_old_job_results(), 2, 'jobs with attempts are deleted');
SELECT results_eq('SELECT error FROM job_attempts', $$VALUES ('young')$$, 'and their attempts with them');
TRUNCATE job_results;
SELECT is_empty('SELECT FROM job_attempts', 'a TRUNCATE takes all');

-- ── Rate limits ──

INSERT INTO _nexus_hub.rate_limit_windows (server_id, window_start, request_count)
    SELECT 's', date_trunc('minute', now() - age), 1 FROM unnest(ARRAY['1 hour', '23 hours', '25 hours', '3 days']::interval[]) AS age;
SELECT is(cleanup_rate_limit_tracking(2), 1, 'cleanup_rate_limit_tracking deletes minutes that are older than so many days');
SELECT is(cleanup_rate_limit_tracking(), 1, 'one by default');
SELECT is(cleanup_rate_limit_tracking(NULL), 0, 'NULL: none');
SELECT is(cleanup_rate_limit_tracking(0), 2, '0: all');
SELECT is(pg_temp.error_of('SELECT cleanup_rate_limit_tracking(-1)'), '22023: p_days must be 0 or more, not -1 (hint)', '-1 is refused');

-- ── What they may not do ──

SELECT pg_temp.add_jobs();
SET LOCAL transaction_read_only = on;
SELECT is(pg_temp.error_of(call), format('25006: cannot execute %s in a read-only transaction', what), format('%s is refused in a read-only transaction', call))
  FROM (VALUES ('SELECT cleanup_old_job_results()', 'DELETE'), ('SELECT cleanup_job_results_manual(0, 0)', 'DELETE'), ('SELECT cleanup_rate_limit_tracking(0)', 'SELECT')) AS t (call, what);

SELECT * FROM finish();
ROLLBACK;
