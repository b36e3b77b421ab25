-- wait_for_job, in transactions of each kind. Needs a row that is committed and that no worker takes: one that runs
-- under no lease. It is deleted at the end; how a wait ends with its job is tested with a real worker elsewhere.
\set ON_ERROR_ROLLBACK off
SET search_path = :"schema", pgtap, public;
\set a '''aaaaaaaa-0000-4000-8000-000000000001'''
\set job '''01890000-0000-7000-8000-000000000001'''
SELECT no_plan();

CREATE FUNCTION pg_temp.error_of(statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    state text; message text; hint text;
BEGIN
    EXECUTE statement;
    RETURN 'no error';
EXCEPTION WHEN OTHERS OR query_canceled THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
    RETURN concat_ws(' | ', state || ': ' || message, nullif(hint, ''));
END
$$;
\set uncommitted '''55000: the job cannot finish before this transaction has committed | Commit first, then wait.'''
\set frozen '''55000: this transaction cannot see the job finish | Wait in a transaction of isolation level READ COMMITTED.'''

INSERT INTO job_results (id, user_id, job_type, server_id, tool_name, status) VALUES (:job, :a, 'tool_invoke', 's', 't', 'running');

-- ── A committed job that does not finish ──

SELECT results_eq(format('SELECT status FROM wait_for_job(%L, 0)', :job), $$VALUES ('running')$$, 'a time-out of 0 looks once');
SELECT clock_timestamp() AS began \gset
SELECT results_eq(format('SELECT * FROM wait_for_job(%L, 700)', :job), format('SELECT * FROM get_job_status(%L)', :job),
                  'when the time is over, the job is returned as it is');
SELECT ok(clock_timestamp() - :'began' BETWEEN '700 ms' AND '30 s', 'after that time, not before');
SELECT performs_ok(format('SELECT * FROM wait_for_job(%L)', gen_random_uuid()), 20000, 'there is no waiting for a job that is not there');
SELECT is(pg_temp.error_of(format('SELECT wait_for_job(%L, %s)', :job, coalesce(timeout, 'NULL'))),
          format('22023: p_timeout_ms must be between 0 and 3600000, not %s', coalesce(timeout, 'NULL')),
          format('a time-out of %s is refused', coalesce(timeout, 'NULL')))
  FROM (VALUES ('-1'), ('3600001'), ('-2147483648'), ('2147483647'), (NULL)) AS t (timeout);
SET statement_timeout = '2s';
SELECT is(pg_temp.error_of(format('SELECT wait_for_job(%L, 20000)', :job)), '57014: canceling statement due to statement timeout', 'statement_timeout ends a wait');
RESET statement_timeout;

BEGIN;
SELECT set_config('request.jwt.claims', format('{"sub": "%s"}', :a), true), set_config('role', 'authenticated', true);
SELECT results_eq(format('SELECT status FROM wait_for_job(%L, 0)', :job), $$VALUES ('running')$$, 'a user waits for an own job');
SELECT set_config('request.jwt.claims', '{"sub": "bbbbbbbb-0000-4000-8000-000000000002"}', true);
SELECT is_empty(format('SELECT * FROM wait_for_job(%L, 20000)', :job), 'and not at all for another''s');
ROLLBACK;

-- ── A job this transaction made or changed ──

BEGIN;
SELECT create_job(:a, 'tool_invoke', 's', 't') AS made \gset
SELECT is(pg_temp.error_of(format('SELECT wait_for_job(%L, 1000)', :'made')), :uncommitted, 'there is no waiting for a job that is not committed');
SELECT cancel_job(:'made');
SELECT results_eq(format('SELECT status FROM wait_for_job(%L, 1000)', :'made'), $$VALUES ('cancelled')$$, 'unless it is finished');
SAVEPOINT one;
SELECT create_job(:a, 'tool_invoke', 's', 't') AS made \gset
SELECT is(pg_temp.error_of(format('SELECT wait_for_job(%L, 1000)', :'made')), :uncommitted, 'nor for one made after a savepoint');
RELEASE one;
SELECT is(pg_temp.error_of(format('SELECT wait_for_job(%L, 1000)', :'made')), :uncommitted, 'whether or not that is released');
CREATE FUNCTION pg_temp.make() RETURNS uuid LANGUAGE plpgsql AS $$
BEGIN
    RETURN create_job(NULL, 'tool_invoke', 's', 't');
EXCEPTION WHEN unique_violation THEN
    RETURN NULL;
END
$$;
SELECT pg_temp.make() AS made \gset
SELECT is(pg_temp.error_of(format('SELECT wait_for_job(%L, 1000)', :'made')), :uncommitted, 'nor for one made by a block with an EXCEPTION clause');
UPDATE job_results SET server_id = 'other' WHERE id = :job;
SELECT is(pg_temp.error_of(format('SELECT wait_for_job(%L, 1000)', :job)), :uncommitted, 'nor for one this transaction has changed');
ROLLBACK;
SELECT is(pg_temp.error_of(format($$SELECT wait_for_job(create_job(%L, 'tool_invoke', 's', 't'), 1000)$$, :a)), :uncommitted,
          'nor for one made in the same statement');

-- ── A frozen snapshot ──

BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT is(pg_temp.error_of(format('SELECT wait_for_job(%L, 1000)', :job)), :frozen, 'REPEATABLE READ cannot wait');
COMMIT;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT is(pg_temp.error_of(format('SELECT wait_for_job(%L, 1000)', :job)), :frozen, 'nor can SERIALIZABLE');
COMMIT;
BEGIN READ ONLY;
SELECT results_eq(format('SELECT status FROM wait_for_job(%L, 0)', :job), $$VALUES ('running')$$, 'a read-only transaction can');
ROLLBACK;
UPDATE job_results SET status = 'completed', result = '{"a": 1}' WHERE id = :job;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT results_eq(format('SELECT status, result FROM wait_for_job(%L)', :job), $$VALUES ('completed', '{"a": 1}'::jsonb)$$,
                  'REPEATABLE READ is told of a job that is finished');
COMMIT;

DELETE FROM job_results WHERE id = :job;
SELECT * FROM finish();
