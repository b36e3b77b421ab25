-- The job table's state machine, and what the job functions refuse. Nothing here commits, so no worker interferes.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

-- "SQLSTATE: message", and whether there is a hint.
CREATE FUNCTION pg_temp.error_of(statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    state text; message text; hint text;
BEGIN
    EXECUTE statement;
    RETURN 'no error';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
    RETURN format('%s: %s (%s)', state, message, CASE hint WHEN '' THEN 'no hint' ELSE 'hint' END);
END
$$;
CREATE FUNCTION pg_temp.new_job() RETURNS uuid LANGUAGE sql
AS $$ SELECT create_job('aaaaaaaa-0000-4000-8000-000000000001', 'tool_invoke', 's', 't') $$;

-- ── New jobs ──

CREATE TEMP TABLE made AS SELECT pg_temp.new_job() AS id;
SELECT results_eq('SELECT j.params, status, result, error, created_at = now(), started_at, completed_at, lease FROM job_results j JOIN made USING (id)',
                  $$VALUES ('{}'::jsonb, 'pending', NULL::jsonb, NULL::text, true, NULL::timestamptz, NULL::timestamptz, NULL::uuid)$$,
                  'a new job is pending, and has nothing that only a worker gives it');
SELECT create_job(NULL, 'tool_invoke', 's', 'of nobody', NULL);
SELECT results_eq($$SELECT user_id, params FROM job_results WHERE tool_name = 'of nobody'$$, $$VALUES (NULL::uuid, '{}'::jsonb)$$,
                  'a job may be nobody''s, and NULL arguments are none');

INSERT INTO job_results (job_type, server_id, tool_name) SELECT 'tool_invoke', 'ids', 't' FROM generate_series(1, 1000);
SELECT ok(bool_and(id::text ~ '^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$'), 'ids are UUIDv7') FROM job_results;
SELECT ok(bool_and(id > before), 'each id is greater than the one before')
  FROM (SELECT id, lag(id) OVER (ORDER BY ctid) AS before FROM job_results WHERE server_id = 'ids') AS ids;
SELECT ok(abs(extract(epoch FROM clock_timestamp()) * 1000 - ('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint) < 60000,
          'an id begins with the time in milliseconds') FROM made;

-- ── What create_job refuses ──

SELECT is(pg_temp.error_of(format('SELECT create_job(NULL, %s)', arguments)), format('22023: %s (hint)', message), format('create_job refuses %s', arguments))
  FROM (VALUES
    ($$'dance', 's', 't'$$, 'unknown job type "dance"'),
    ($$'', 's', 't'$$, 'unknown job type ""'),
    ($$NULL, 's', 't'$$, 'unknown job type "NULL"'),
    ($$'Tool_Invoke', 's', 't'$$, 'unknown job type "Tool_Invoke"'),
    ($$'tool_invoke', NULL, 't'$$, 'p_server_id is required for this job type'),
    ($$'tool_invoke', '', 't'$$, 'p_server_id is required for this job type'),
    ($$'resource_fetch', NULL, NULL, '{"uri": "x"}'$$, 'p_server_id is required for this job type'),
    ($$'prompt_execute', NULL, 'p'$$, 'p_server_id is required for this job type'),
    ($$'tool_invoke', 's'$$, 'p_tool_name is required for a tool_invoke job'),
    ($$'tool_invoke', 's', ''$$, 'p_tool_name is required for a tool_invoke job'),
    ($$'prompt_execute', 's'$$, 'p_tool_name is required for a prompt_execute job'),
    ($$'resource_fetch', 's'$$, 'p_params has no "uri" that is a string'),
    ($$'resource_fetch', 's', NULL, '{"uri": null}'$$, 'p_params has no "uri" that is a string'),
    ($$'http_request', NULL$$, 'p_params has no "url" that is a string'),
    ($$'http_request', NULL, NULL, '{"url": null}'$$, 'p_params has no "url" that is a string'),
    ($$'tool_invoke', 's', 't', '[1]'$$, 'p_params must be a JSON object'),
    ($$'tool_invoke', 's', 't', 'null'$$, 'p_params must be a JSON object'),
    ($$'tool_invoke', 's', 't', '"x"'$$, 'p_params must be a JSON object')) AS t (arguments, message);
SELECT is(left(pg_temp.error_of(format('SELECT create_job(NULL, %s)', arguments)), 7), '22023: ', format('create_job refuses %s, which could not run', arguments))
  FROM (VALUES ($$'resource_fetch', 's', NULL, '{"uri": 5}'$$), ($$'http_request', NULL, NULL, '{"url": {}}'$$)) AS t (arguments);

-- ── What the table refuses ──

-- The trigger would mend most of these; the constraints must hold without it.
ALTER TABLE job_results DISABLE TRIGGER job_results_settle;
CREATE TEMP TABLE impossible (name text, fields text, value text);
INSERT INTO impossible VALUES
    ('job_results_job_type_known', 'job_type, server_id', $$'dance', 's'$$),
    ('job_results_job_type_known', 'job_type, server_id', $$'', 's'$$),
    ('job_results_params_object', 'job_type, server_id, tool_name, params', $$'tool_invoke', 's', 't', '[]'$$),
    ('job_results_params_object', 'job_type, server_id, tool_name, params', $$'tool_invoke', 's', 't', 'null'$$),
    ('job_results_status_known', 'job_type, server_id, tool_name, status', $$'tool_invoke', 's', 't', 'paused'$$),
    ('job_results_server_named', 'job_type, tool_name', $$'tool_invoke', 't'$$),
    ('job_results_server_named', 'job_type, tool_name', $$'prompt_execute', 't'$$),
    ('job_results_server_named', 'job_type, params', $$'resource_fetch', '{"uri": "x"}'$$),
    ('job_results_tool_named', 'job_type, server_id', $$'tool_invoke', 's'$$),
    ('job_results_tool_named', 'job_type, server_id', $$'prompt_execute', 's'$$),
    ('job_results_uri_given', 'job_type, server_id', $$'resource_fetch', 's'$$),
    ('job_results_uri_given', 'job_type, server_id, params', $$'resource_fetch', 's', '{"uri": null}'$$),
    ('job_results_url_given', 'job_type', $$'http_request'$$),
    ('job_results_finished_has_time', 'job_type, server_id, tool_name, status', $$'tool_invoke', 's', 't', 'completed'$$),
    ('job_results_finished_has_time', 'job_type, server_id, tool_name, status', $$'tool_invoke', 's', 't', 'failed'$$),
    ('job_results_finished_has_time', 'job_type, server_id, tool_name, status', $$'tool_invoke', 's', 't', 'cancelled'$$),
    ('job_results_finished_has_time', 'job_type, server_id, tool_name, status, completed_at', $$'tool_invoke', 's', 't', 'pending', now()$$),
    ('job_results_finished_has_time', 'job_type, server_id, tool_name, status, started_at, completed_at', $$'tool_invoke', 's', 't', 'running', now(), now()$$),
    ('job_results_running_has_time', 'job_type, server_id, tool_name, status', $$'tool_invoke', 's', 't', 'running'$$),
    ('job_results_lease_while_running', 'job_type, server_id, tool_name, lease', $$'tool_invoke', 's', 't', gen_random_uuid()$$),
    ('job_results_lease_while_running', 'job_type, server_id, tool_name, status, completed_at, lease', $$'tool_invoke', 's', 't', 'completed', now(), gen_random_uuid()$$),
    ('job_results_result_when_finished', 'job_type, server_id, tool_name, result', $$'tool_invoke', 's', 't', '{}'$$),
    ('job_results_result_when_finished', 'job_type, server_id, tool_name, error', $$'tool_invoke', 's', 't', 'oops'$$),
    ('job_results_result_when_finished', 'job_type, server_id, tool_name, status, started_at, result', $$'tool_invoke', 's', 't', 'running', now(), '{}'$$),
    ('job_results_result_when_finished', 'job_type, server_id, tool_name, status, started_at, error', $$'tool_invoke', 's', 't', 'running', now(), 'oops'$$);
SELECT throws_ok(format('INSERT INTO job_results (%s) VALUES (%s)', fields, value), '23514',
                 format('new row for relation "job_results" violates check constraint "%s"', name),
                 format('%s refuses (%s) = (%s)', name, fields, value))
  FROM impossible;
SELECT set_eq($$SELECT conname::text FROM pg_constraint WHERE contype = 'c' AND conrelid = 'job_results'::regclass$$, 'SELECT name FROM impossible',
              'every CHECK of job_results is tested');
SELECT throws_ok(format('INSERT INTO job_results (job_type, server_id, tool_name, %I) VALUES (''tool_invoke'', ''s'', ''t'', NULL)', needed), '23502', NULL,
                 format('job_results.%s is never NULL', needed))
  FROM unnest(ARRAY['id', 'params', 'status', 'created_at']) AS needed;
SELECT throws_ok('INSERT INTO job_results (server_id, tool_name) VALUES (''s'', ''t'')', '23502', NULL, 'job_results.job_type is never NULL');
ALTER TABLE job_results ENABLE TRIGGER job_results_settle;

-- ── A status set by hand ──

CREATE FUNCTION pg_temp.becomes(state text, OUT status text, OUT started boolean, OUT completed boolean, OUT leased boolean, OUT told boolean) LANGUAGE sql AS $$
    UPDATE job_results SET status = state WHERE id = (SELECT id FROM made);
    SELECT status, started_at IS NOT NULL, completed_at IS NOT NULL, lease IS NOT NULL, result IS NOT NULL OR error IS NOT NULL
      FROM job_results JOIN made USING (id);
$$;
SELECT is(pg_temp.becomes('cancelled')::text, '(cancelled,f,t,f,f)', 'cancelled by hand: completed_at is set');
SELECT is((SELECT completed_at FROM job_results JOIN made USING (id)), now(), 'to the time of it');
SELECT is(pg_temp.becomes('pending')::text, '(pending,f,f,f,f)', 'back to pending: completed_at is cleared');
SELECT is(pg_temp.becomes('running')::text, '(running,t,f,f,f)', 'running by hand: started_at is set');
UPDATE job_results SET lease = gen_random_uuid() WHERE id = (SELECT id FROM made);
SELECT is(pg_temp.becomes('failed')::text, '(failed,t,t,f,f)', 'failed by hand: completed_at is set, the lease given up');
UPDATE job_results SET error = 'oops', result = '{}' WHERE id = (SELECT id FROM made);
SELECT is(pg_temp.becomes('pending')::text, '(pending,f,f,f,f)', 'back to pending: times, result and error are cleared');
SELECT is(pg_temp.becomes('completed')::text, '(completed,f,t,f,f)', 'completed by hand: completed_at is set');
UPDATE job_results SET result = '{}' WHERE id = (SELECT id FROM made);
SELECT is(pg_temp.becomes('running')::text, '(running,t,f,f,f)', 'back to running: what the last run left is cleared');
UPDATE job_results SET status = 'failed', result = NULL, completed_at = '2000-01-01' WHERE id = (SELECT id FROM made);
SELECT is((SELECT completed_at FROM job_results JOIN made USING (id)), '2000-01-01', 'a time that was given stays');
SELECT is(pg_temp.becomes('cancelled')::text, '(cancelled,t,t,f,f)', 'from one end to another: started_at stays');
SELECT throws_ok($$SELECT pg_temp.becomes('paused')$$, '23514', NULL, 'an unknown status is refused');

-- ── cancel_job, get_job_status ──

SELECT pg_temp.becomes('pending');
SELECT is(cancel_job(id), true, 'a pending job can be cancelled') FROM made;
SELECT pg_temp.becomes('running');
SELECT is(cancel_job(id), false, 'a running job cannot') FROM made;
SELECT is(pg_temp.becomes('running')::text, '(running,t,f,f,f)', 'and runs on');
SELECT pg_temp.becomes('completed');
SELECT is(cancel_job(id), false, 'a completed job cannot') FROM made;
SELECT results_eq('SELECT g.* FROM made, get_job_status(id) AS g',
                  'SELECT id, job_type, server_id, tool_name, status, result, error, created_at, started_at, completed_at FROM job_results JOIN made USING (id)',
                  'get_job_status is the job''s row');

SELECT * FROM finish();
ROLLBACK;
