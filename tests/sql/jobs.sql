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
SELECT results_eq('SELECT priority, run_at = now(), timeout_ms, max_attempts, attempt, crashes, idempotency_key FROM job_results JOIN made USING (id)',
                  'VALUES (5::smallint, true, NULL::integer, NULL::integer, 0, 0, NULL::text)', 'it is due at once, with the options that are usual');
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
    ($$'tool_invoke', 's', 't', '"x"'$$, 'p_params must be a JSON object'),
    ($$'tool_invoke', repeat('x', 201), 't'$$, 'p_server_id must have 200 characters at most, not 201'),
    ($$'tool_invoke', 's', repeat('x', 201)$$, 'p_tool_name must have 200 characters at most, not 201')) AS t (arguments, message);
SELECT is(left(pg_temp.error_of(format('SELECT create_job(NULL, %s)', arguments)), 7), '22023: ', format('create_job refuses %s, which could not run', arguments))
  FROM (VALUES ($$'resource_fetch', 's', NULL, '{"uri": 5}'$$), ($$'http_request', NULL, NULL, '{"url": {}}'$$)) AS t (arguments);

-- ── What the tables refuse ──

-- The triggers would mend some of these; the constraints must hold without them.
ALTER TABLE job_results DISABLE TRIGGER USER;
CREATE TEMP TABLE impossible (name text, fields text, value text);
INSERT INTO impossible VALUES
    ('job_results_params_object', 'job_type, server_id, tool_name, params', $$'tool_invoke', 's', 't', '[]'$$),
    ('job_results_params_object', 'job_type, server_id, tool_name, params', $$'tool_invoke', 's', 't', 'null'$$),
    ('job_results_params_size', 'job_type, server_id, tool_name, params', $$'tool_invoke', 's', 't', jsonb_build_object('x', repeat('x', 16777216))$$),
    ('job_results_state', 'job_type, server_id, tool_name, status', $$'tool_invoke', 's', 't', 'paused'$$),
    ('job_results_state', 'job_type, server_id, tool_name, status', $$'tool_invoke', 's', 't', 'completed'$$),
    ('job_results_state', 'job_type, server_id, tool_name, status', $$'tool_invoke', 's', 't', 'failed'$$),
    ('job_results_state', 'job_type, server_id, tool_name, status', $$'tool_invoke', 's', 't', 'cancelled'$$),
    ('job_results_state', 'job_type, server_id, tool_name, status, completed_at', $$'tool_invoke', 's', 't', 'pending', now()$$),
    ('job_results_state', 'job_type, server_id, tool_name, status, started_at', $$'tool_invoke', 's', 't', 'pending', now()$$),
    ('job_results_state', 'job_type, server_id, tool_name, status, started_at, completed_at', $$'tool_invoke', 's', 't', 'running', now(), now()$$),
    ('job_results_state', 'job_type, server_id, tool_name, status', $$'tool_invoke', 's', 't', 'running'$$),
    ('job_results_state', 'job_type, server_id, tool_name, lease', $$'tool_invoke', 's', 't', gen_random_uuid()$$),
    ('job_results_state', 'job_type, server_id, tool_name, status, completed_at, lease', $$'tool_invoke', 's', 't', 'completed', now(), gen_random_uuid()$$),
    ('job_results_state', 'job_type, server_id, tool_name, result', $$'tool_invoke', 's', 't', '{}'$$),
    ('job_results_state', 'job_type, server_id, tool_name, error', $$'tool_invoke', 's', 't', 'oops'$$),
    ('job_results_state', 'job_type, server_id, tool_name, status, started_at, result', $$'tool_invoke', 's', 't', 'running', now(), '{}'$$),
    ('job_results_state', 'job_type, server_id, tool_name, status, started_at, error', $$'tool_invoke', 's', 't', 'running', now(), 'oops'$$),
    ('job_results_counts', 'job_type, server_id, tool_name, attempt', $$'tool_invoke', 's', 't', -1$$),
    ('job_results_counts', 'job_type, server_id, tool_name, crashes', $$'tool_invoke', 's', 't', -1$$),
    ('job_results_counts', 'job_type, server_id, tool_name, failures', $$'tool_invoke', 's', 't', -1$$);
SELECT throws_ok(format('INSERT INTO job_results (%s) VALUES (%s)', fields, value), '23514',
                 format('new row for relation "job_results" violates check constraint "%s"', name),
                 format('%s refuses (%s) = (%s)', name, fields, value))
  FROM impossible;

-- Constraints that say more.
CREATE TEMP TABLE unfit (name text, fields text, value text, message text);
INSERT INTO unfit VALUES
    ('job_results_job', 'job_type, server_id', $$'dance', 's'$$, 'unknown job type "dance"'),
    ('job_results_job', 'job_type, server_id', $$'', 's'$$, 'unknown job type ""'),
    ('job_results_job', 'job_type, tool_name', $$'tool_invoke', 't'$$, 'server_id is required for this job type'),
    ('job_results_job', 'job_type, tool_name', $$'prompt_execute', 't'$$, 'server_id is required for this job type'),
    ('job_results_job', 'job_type, params', $$'resource_fetch', '{"uri": "x"}'$$, 'server_id is required for this job type'),
    ('job_results_job', 'job_type, server_id, tool_name', $$'tool_invoke', '', 't'$$, 'server_id is required for this job type'),
    ('job_results_job', 'job_type, server_id', $$'tool_invoke', 's'$$, 'tool_name is required for a tool_invoke job'),
    ('job_results_job', 'job_type, server_id', $$'prompt_execute', 's'$$, 'tool_name is required for a prompt_execute job'),
    ('job_results_job', 'job_type, server_id', $$'resource_fetch', 's'$$, 'params has no "uri" that is a string'),
    ('job_results_job', 'job_type, server_id, params', $$'resource_fetch', 's', '{"uri": null}'$$, 'params has no "uri" that is a string'),
    ('job_results_job', 'job_type', $$'http_request'$$, 'params has no "url" that is a string'),
    ('job_results_job', 'job_type, server_id, tool_name', $$'tool_invoke', repeat('ü', 201), 't'$$, 'server_id must have 200 characters at most, not 201'),
    ('job_results_job', 'job_type, server_id, tool_name', $$'tool_invoke', 's', repeat('ü', 201)$$, 'tool_name must have 200 characters at most, not 201');
INSERT INTO unfit
    SELECT 'job_results_options', 'job_type, server_id, tool_name, ' || field, $$'tool_invoke', 's', 't', $$ || value, message
      FROM (VALUES
        ('priority', '0', 'priority must be between 1 and 9, not 0'),
        ('priority', '10', 'priority must be between 1 and 9, not 10'),
        ('priority', '-1', 'priority must be between 1 and 9, not -1'),
        ('run_at', $$'infinity'$$, 'run_at must be a time, not infinity'),
        ('run_at', $$'-infinity'$$, 'run_at must be a time, not infinity'),
        ('timeout_ms', '0', 'timeout_ms must be between 1 and 3600000, not 0'),
        ('timeout_ms', '3600001', 'timeout_ms must be between 1 and 3600000, not 3600001'),
        ('max_attempts', '0', 'max_attempts must be between 1 and 100, not 0'),
        ('max_attempts', '101', 'max_attempts must be between 1 and 100, not 101'),
        ('idempotency_key', $$''$$, 'idempotency_key must have 1 to 255 characters, not 0'),
        ('idempotency_key', $$repeat('ü', 256)$$, 'idempotency_key must have 1 to 255 characters, not 256')) AS t (field, value, message);
SELECT is(pg_temp.error_of(format('INSERT INTO job_results (%s) VALUES (%s)', fields, value)), format('22023: %s (hint)', message),
          format('%s refuses (%s) = (%s)', name, fields, value))
  FROM unfit;
INSERT INTO job_results (job_type, server_id, tool_name) VALUES ('tool_invoke', 'to be changed', 't');
SELECT is(pg_temp.error_of(format('UPDATE job_results SET %s WHERE server_id = ''to be changed''', change)), format('22023: %s (hint)', message), format('an UPDATE cannot set %s either', change))
  FROM (VALUES ('job_type = ''dance''', 'unknown job type "dance"'), ('tool_name = NULL', 'tool_name is required for a tool_invoke job'),
               ('timeout_ms = 0', 'timeout_ms must be between 1 and 3600000, not 0')) AS t (change, message);
SELECT throws_ok(format('INSERT INTO circuit_breakers (host, worker, state, failures, probe_at, error) VALUES (''h:80'', 0, %L, 5, now(), ''e'')', state), '23514',
                 'new row for relation "circuit_breakers" violates check constraint "circuit_breakers_state_known"',
                 format('circuit_breakers_state_known refuses %s', state))
  FROM unnest(ARRAY['closed', '', 'Open', 'half_open']) AS state;
SELECT set_eq($$SELECT conname::text FROM pg_constraint
                 WHERE contype = 'c' AND conrelid IN ('job_results'::regclass, 'job_attempts'::regclass, 'circuit_breakers'::regclass)$$,
              $$SELECT name FROM impossible UNION ALL SELECT name FROM unfit UNION ALL VALUES ('circuit_breakers_state_known')$$, 'every CHECK of the job tables is tested');
SELECT lives_ok($$INSERT INTO job_results (job_type, server_id, tool_name) VALUES ('tool_invoke', repeat('ü', 200), repeat('ü', 200))$$,
                'names may have 200 characters');
SELECT lives_ok(format($$INSERT INTO job_results (job_type, server_id, tool_name, %I) VALUES ('tool_invoke', 's', 't', %s)$$, field, value),
                format('a job''s %s may be %s', field, left(value, 20)))
  FROM (VALUES ('priority', '1'), ('priority', '9'), ('run_at', $$'4713-01-01 BC'$$), ('run_at', $$'294276-12-31'$$),
               ('timeout_ms', '1'), ('timeout_ms', '3600000'), ('timeout_ms', 'NULL'),
               ('max_attempts', '1'), ('max_attempts', '100'), ('max_attempts', 'NULL'),
               ('idempotency_key', $$'x'$$), ('idempotency_key', $$repeat('ü', 255)$$), ('idempotency_key', 'NULL')) AS t (field, value);
SELECT throws_ok(format('INSERT INTO job_results (job_type, server_id, tool_name, %I) VALUES (''tool_invoke'', ''s'', ''t'', NULL)', needed), '23502', NULL,
                 format('job_results.%s is never NULL', needed))
  FROM unnest(ARRAY['id', 'params', 'status', 'created_at', 'priority', 'run_at', 'attempt', 'crashes', 'failures']) AS needed;
SELECT throws_ok('INSERT INTO job_results (server_id, tool_name) VALUES (''s'', ''t'')', '23502', NULL, 'job_results.job_type is never NULL');
SELECT throws_ok(format('INSERT INTO job_attempts SELECT (jsonb_populate_record((gen_random_uuid(), id, 1, now(), now(), 500, ''e'')::job_attempts, ''{"%s": null}'')).* FROM made', needed),
                 '23502', NULL, format('job_attempts.%s is never NULL', needed))
  FROM unnest(ARRAY['id', 'job_id', 'attempt', 'started_at', 'finished_at', 'error']) AS needed;
SELECT throws_ok(format('INSERT INTO circuit_breakers SELECT (jsonb_populate_record((''h:80'', 0, ''open'', 5, now(), now(), ''e'')::circuit_breakers, ''{"%s": null}'')).*', needed),
                 '23502', NULL, format('circuit_breakers.%s is never NULL', needed))
  FROM unnest(ARRAY['host', 'worker', 'state', 'failures', 'opened_at', 'probe_at', 'error']) AS needed;
ALTER TABLE job_results ENABLE TRIGGER USER;

-- ── Where a job goes ──

CREATE TEMP TABLE targets (url text, target text);
INSERT INTO targets VALUES
    ('http://host/', 'host:80'), ('https://host', 'host:443'), ('http://host:8080/x?y#z', 'host:8080'), ('https://host:80/', 'https://host:80'),
    ('https://host:443/', 'host:443'), ('HTTP://HOST/', 'host:80'), (' http://host/ ', 'host:80'), ('http://user:pw@host/', 'host:80'),
    ('http://host./', 'host.:80'), ('http:\\host\x', 'host:80'), ('http://ho%73t/', 'host:80'), (E'http://ho\tst/', 'host:80'),
    ('http://bücher.example/', 'xn--bcher-kva.example:80'),
    ('http://127.0.0.1/', '127.0.0.1:80'), ('http://2130706433/', '127.0.0.1:80'), ('http://0x7f000001/', '127.0.0.1:80'), ('http://0x7f.1/', '127.0.0.1:80'),
    ('http://017700000001/', '127.0.0.1:80'), ('http://①②⑦.0.0.1/', '127.0.0.1:80'), ('http://[::1]/', '[::1]:80'), ('https://[0:0::1]:8443/', 'https://[::1]:8443'),
    ('http://[::ffff:127.0.0.1]/', '[::ffff:7f00:1]:80'),
    ('', ''), ('nonsense', ''), ('/x', ''), ('http://', ''), ('ftp://host/', ''), ('file:///etc/passwd', ''), ('http://host:65536/', ''), ('http://256.1.1.1/', '');
INSERT INTO job_results (job_type, params) SELECT 'http_request', jsonb_build_object('url', url) FROM targets;
SELECT is(j.target, t.target, format('the target of %L is %L', t.url, t.target)) FROM targets t JOIN job_results j ON j.params ->> 'url' = t.url;
INSERT INTO job_results (job_type, server_id, tool_name, params) VALUES
    ('http_request', 'a server', 'no string', '{"url": 5}'), ('http_request', 'a server', 'with a server_id', '{"url": "http://host"}'),
    ('tool_invoke', 'a server', 'with a url', '{"url": "http://host"}'), ('prompt_execute', 'a server', 'prompt', '{}'),
    ('resource_fetch', 'a server', 'resource', '{"uri": "http://host"}');
SELECT set_eq($$SELECT tool_name, target FROM job_results WHERE server_id = 'a server'$$,
              $$VALUES ('no string', ''), ('with a server_id', 'host:80'), ('with a url', 'a server'), ('prompt', 'a server'), ('resource', 'a server')$$,
              'an http_request''s target is in its URL, an MCP job''s is its server_id');
UPDATE job_results SET params = '{"url": "https://other"}' WHERE tool_name = 'with a server_id';
UPDATE job_results SET server_id = 'another' WHERE tool_name = 'with a url';
SELECT set_eq($$SELECT target FROM job_results WHERE tool_name IN ('with a server_id', 'with a url')$$, $$VALUES ('other:443'), ('another')$$, 'the target follows what it is made of');
SELECT throws_ok($$INSERT INTO job_results (job_type, server_id, tool_name, target) VALUES ('tool_invoke', 's', 't', 's')$$, '428C9', NULL, 'the target cannot be inserted');
SELECT throws_ok($$UPDATE job_results SET target = 's'$$, '428C9', NULL, 'nor updated');

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

-- ── Attempts and crashes, when a status is set by hand ──

CREATE FUNCTION pg_temp.counts_after(assignments text, OUT attempt integer, OUT crashes integer) LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('UPDATE job_results SET %s WHERE id = (SELECT id FROM made) RETURNING attempt, crashes', assignments) INTO attempt, crashes;
END
$$;
CREATE FUNCTION pg_temp.ended(state text) RETURNS text LANGUAGE sql
AS $$ SELECT pg_temp.counts_after(format('status = %L, attempt = 3, crashes = 2', state))::text $$;
SELECT is(pg_temp.ended(state) || pg_temp.counts_after('status = ''pending''')::text, '(3,2)(0,0)', format('a %s job that is set to pending begins anew', state))
  FROM unnest(ARRAY['completed', 'failed', 'cancelled']) AS state;
SELECT is(pg_temp.ended(state) || pg_temp.counts_after('status = ''pending'', started_at = NULL, completed_at = NULL, result = NULL, error = NULL')::text,
          '(3,2)(0,0)', format('a %s job does so, too, when the rest is set along with the status', state))
  FROM unnest(ARRAY['completed', 'failed', 'cancelled']) AS state;
SELECT pg_temp.ended('pending');
SELECT is(pg_temp.counts_after('status = ''running''')::text, '(3,2)', 'a job that waits for another attempt keeps its count when it is started');
SELECT is(pg_temp.counts_after('status = ''pending''')::text, '(3,2)', 'and when it is given back');
SELECT is(pg_temp.counts_after('run_at = now() + ''1 hour''')::text, '(3,2)', 'and when it is put off');
SELECT is(pg_temp.counts_after('status = ''failed''')::text, '(3,2)', 'and when it fails');
INSERT INTO job_results (job_type, server_id, tool_name, attempt, crashes, error, started_at) VALUES ('tool_invoke', 's', 'imported', 3, 2, NULL, now());
SELECT results_eq($$SELECT attempt, crashes, started_at FROM job_results WHERE tool_name = 'imported'$$, 'VALUES (3, 2, NULL::timestamptz)',
                  'a row that is inserted keeps the count it has');

-- ── cancel_job, get_job_status ──

SELECT pg_temp.becomes('pending');
SELECT is(cancel_job(id), true, 'a pending job can be cancelled') FROM made;
SELECT pg_temp.becomes('running');
UPDATE job_results SET lease = gen_random_uuid(), attempt = 2 WHERE id = (SELECT id FROM made);
SELECT is(cancel_job(id), true, 'a running job can') FROM made;
SELECT results_eq('SELECT status, lease, started_at IS NOT NULL, completed_at >= now(), result, error, attempt FROM job_results JOIN made USING (id)',
                  $$VALUES ('cancelled', NULL::uuid, true, true, NULL::jsonb, NULL::text, 2)$$, 'and nobody''s lease is on it any more');
SELECT is((pg_temp.becomes(state)).status || ', ' || cancel_job(id), state || ', false', format('a %s job cannot', state))
  FROM made, unnest(ARRAY['completed', 'failed', 'cancelled']) AS state;
SELECT is(cancel_job(gen_random_uuid()), false, 'nor can one that is not there');
SELECT is(cancel_job(NULL), false, 'nor NULL');
SELECT results_eq('SELECT g.* FROM made, get_job_status(id) AS g',
                  'SELECT id, job_type, server_id, tool_name, status, result, error, created_at, started_at, completed_at, attempt, run_at FROM job_results JOIN made USING (id)',
                  'get_job_status is the job''s row');

SELECT * FROM finish();
ROLLBACK;
