-- A job's attempts: what the worker's functions write of them, and how jobs that failed are run again. The worker is
-- played by hand: nothing here commits, so the real one sees nothing of it.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

\set a '''aaaaaaaa-0000-4000-8000-000000000001'''
CREATE TEMP TABLE made (name text PRIMARY KEY, id uuid, lease uuid);
CREATE FUNCTION pg_temp.job(what text) RETURNS job_results LANGUAGE sql AS $$ SELECT j FROM job_results j JOIN pg_temp.made m USING (id) WHERE m.name = what $$;
CREATE FUNCTION pg_temp.new_job(what text) RETURNS void LANGUAGE sql
AS $$ INSERT INTO pg_temp.made VALUES (what, create_job('aaaaaaaa-0000-4000-8000-000000000001', 'resource_fetch', 's', what, '{"uri": "x"}', p_max_attempts => 3)) $$;
-- Takes a job under a new lease, and tells which attempt it is, crashes left out.
CREATE FUNCTION pg_temp.claim(what text) RETURNS integer LANGUAGE sql AS $$
    UPDATE pg_temp.made SET lease = gen_random_uuid() WHERE name = what;
    SELECT c.attempts FROM pg_temp.made m, _nexus_hub.claim_jobs(m.lease, ARRAY[m.id], false) AS c WHERE m.name = what;
$$;
CREATE FUNCTION pg_temp.complete(what text, status text, result text DEFAULT NULL, error text DEFAULT NULL, http_status integer DEFAULT NULL, delay_ms bigint DEFAULT NULL)
RETURNS bigint LANGUAGE sql AS $$
    SELECT count(c) FROM pg_temp.made m
      LEFT JOIN LATERAL _nexus_hub.complete_jobs(ARRAY[m.id], ARRAY[m.lease], ARRAY[status], ARRAY[result], ARRAY[error], ARRAY[http_status], ARRAY[delay_ms]) AS c ON true
     WHERE m.name = what
$$;
CREATE FUNCTION pg_temp.release(what text, max_crashes integer) RETURNS integer LANGUAGE sql
AS $$ SELECT _nexus_hub.release_jobs(ARRAY[lease], max_crashes) FROM pg_temp.made WHERE name = what $$;

-- ── An attempt that fails, and the next ──

SELECT pg_temp.new_job('flaky');
SELECT is(pg_temp.claim('flaky'), 1, 'a job''s first attempt is the first');
SELECT results_eq($$SELECT status, attempt, started_at IS NOT NULL, lease = (SELECT lease FROM made WHERE name = 'flaky') FROM pg_temp.job('flaky')$$,
                  $$VALUES ('running', 1, true, true)$$, 'a claimed job is running, under its lease');
SELECT is((SELECT count(*) FROM made m, _nexus_hub.claim_jobs(gen_random_uuid(), ARRAY[m.id], false)), 0::bigint, 'and cannot be claimed again');
CREATE TEMP TABLE first_attempt AS SELECT started_at FROM pg_temp.job('flaky');
SELECT is(pg_temp.complete('flaky', 'pending', NULL, 'the server answered 503', 503, 60000), 0::bigint, 'the attempt fails');
SELECT results_eq($$SELECT status, attempt, crashes, started_at, completed_at, lease, result, error FROM pg_temp.job('flaky')$$,
                  $$VALUES ('pending', 1, 0, NULL::timestamptz, NULL::timestamptz, NULL::uuid, NULL::jsonb, NULL::text)$$, 'the job waits again, its count kept');
SELECT ok((pg_temp.job('flaky')).run_at - interval '60 s' BETWEEN a.started_at AND a.finished_at, 'for as long as it was put off')
  FROM made, get_job_attempts(id) AS a WHERE name = 'flaky';
SELECT results_eq($$SELECT a.attempt, a.started_at, a.finished_at BETWEEN now() AND clock_timestamp(), a.http_status, a.error FROM made, get_job_attempts(id) AS a WHERE name = 'flaky'$$,
                  $$SELECT 1, started_at, true, 503, 'the server answered 503' FROM first_attempt$$, 'and the attempt is kept');
SELECT is((SELECT count(*) FROM made m, _nexus_hub.claim_jobs(gen_random_uuid(), ARRAY[m.id], false)), 0::bigint, 'it cannot be claimed before its time');
UPDATE job_results SET run_at = now() WHERE id = (SELECT id FROM made WHERE name = 'flaky');
SELECT is(pg_temp.claim('flaky'), 2, 'its next attempt is the second');
SELECT is((pg_temp.job('flaky')).attempt, 2, 'and is counted');
SELECT pg_temp.complete('flaky', 'failed', '{"status": 500}', 'gave up', NULL, NULL);
SELECT results_eq($$SELECT status, attempt, result, error, lease, completed_at > started_at FROM pg_temp.job('flaky')$$,
                  $$VALUES ('failed', 2, '{"status": 500}'::jsonb, 'gave up', NULL::uuid, true)$$, 'a job that has failed in the end says why');
SELECT results_eq($$SELECT a.attempt, a.http_status, a.error FROM made, get_job_attempts(id) AS a WHERE name = 'flaky'$$,
                  $$VALUES (1, 503, 'the server answered 503'), (2, NULL, 'gave up')$$, 'the attempts are listed in their order, the last included');

SELECT pg_temp.new_job('good');
SELECT pg_temp.claim('good');
SELECT pg_temp.complete('good', 'completed', '{"a": 1.10}');
SELECT results_eq($$SELECT status, attempt, result::text, error, lease FROM pg_temp.job('good')$$, $$VALUES ('completed', 1, '{"a": 1.10}', NULL::text, NULL::uuid)$$,
                  'a job that succeeds has its result');
SELECT pg_temp.new_job('handed over');
SELECT pg_temp.claim('handed over');
SELECT pg_temp.complete('handed over', 'running');
SELECT results_eq($$SELECT status, attempt, started_at IS NOT NULL, lease, completed_at FROM pg_temp.job('handed over')$$,
                  $$VALUES ('running', 1, true, NULL::uuid, NULL::timestamptz)$$, 'a job that is handed over runs on, under no lease');
SELECT pg_temp.new_job('bad answer');
SELECT pg_temp.claim('bad answer');
SELECT pg_temp.complete('bad answer', 'completed', '"\u0000"');
SELECT results_eq($$SELECT status, left(error, 38), result FROM pg_temp.job('bad answer')$$, $$VALUES ('failed', 'the answer cannot be stored as jsonb: ', NULL::jsonb)$$,
                  'an answer that jsonb cannot hold fails the job');
SELECT set_eq($$SELECT DISTINCT m.name FROM made m JOIN job_attempts a ON a.job_id = m.id$$, $$VALUES ('flaky'), ('bad answer')$$, 'only attempts that failed are kept');

-- ── A lease that was lost ──

SELECT pg_temp.new_job('cancelled');
SELECT pg_temp.claim('cancelled');
SELECT is_empty($$SELECT _nexus_hub.lost_jobs(ARRAY[id], ARRAY[lease]) FROM made WHERE name = 'cancelled'$$, 'a running job is not lost to its worker');
SELECT isnt_empty($$SELECT FROM made WHERE name = 'cancelled' AND lease IN (SELECT _nexus_hub.held_leases())$$, 'which holds it under its lease');
SELECT cancel_job(id) FROM made WHERE name = 'cancelled';
SELECT isnt_empty($$SELECT _nexus_hub.lost_jobs(ARRAY[id], ARRAY[lease]) FROM made WHERE name = 'cancelled'$$, 'once it is cancelled, it is lost');
SELECT is_empty($$SELECT FROM made WHERE name = 'cancelled' AND lease IN (SELECT _nexus_hub.held_leases())$$, 'and not held any more');
CREATE TEMP TABLE before AS SELECT (pg_temp.job('cancelled')).*;
SELECT pg_temp.complete('cancelled', status, '{}', 'too late', 500, 1000) FROM unnest(ARRAY['completed', 'failed', 'pending', 'running']) AS status;
SELECT pg_temp.release('cancelled', most) FROM (VALUES (NULL), (1)) AS t (most);
SELECT results_eq($$SELECT * FROM pg_temp.job('cancelled')$$, 'SELECT * FROM before', 'what its worker says then changes nothing');
SELECT is_empty($$SELECT FROM made JOIN job_attempts ON job_id = made.id WHERE name = 'cancelled'$$, 'and is no attempt');
SELECT is(retry_job(id), true, 'a cancelled job can be run again') FROM made WHERE name = 'cancelled';
SELECT results_eq($$SELECT status, attempt FROM pg_temp.job('cancelled')$$, $$VALUES ('pending', 0)$$, 'from its first attempt on');

-- ── A worker that ends, and one that is gone ──

SELECT pg_temp.new_job('poison');
SELECT pg_temp.claim('poison');
SELECT is(pg_temp.release('poison', NULL), 1, 'a worker that ends in order gives its jobs back');
SELECT results_eq($$SELECT status, attempt, crashes, started_at, lease FROM pg_temp.job('poison')$$, $$VALUES ('pending', 0, 0, NULL::timestamptz, NULL::uuid)$$, 'and the attempt counts for nothing');
SELECT is(pg_temp.claim('poison'), 1, 'so the next is the first again');
SELECT is(pg_temp.release('poison', 2), 1, 'the jobs of a worker that is gone are given back');
SELECT results_eq($$SELECT status, attempt, crashes, started_at, lease FROM pg_temp.job('poison')$$, $$VALUES ('pending', 1, 1, NULL::timestamptz, NULL::uuid)$$, 'and the crash is counted');
SELECT is(pg_temp.claim('poison'), 1, 'a crash is none of the attempts there may be');
SELECT is((pg_temp.job('poison')).attempt, 2, 'though the job was started twice');
SELECT is(pg_temp.release('poison', 2), 1, 'after as many crashes as there may be');
SELECT results_eq($$SELECT status, attempt, crashes, error, started_at IS NOT NULL, completed_at IS NOT NULL, lease FROM pg_temp.job('poison')$$,
                  $$VALUES ('failed', 2, 2, 'set aside: the worker crashed 2 times while this job was in flight (nexus_hub.max_crashes)', true, true, NULL::uuid)$$, 'the job is set aside');
SELECT results_eq($$SELECT a.attempt, a.http_status, a.error FROM made, get_job_attempts(id) AS a WHERE name = 'poison'$$,
                  $$VALUES (1, NULL::integer, 'the worker was gone before the answer was there'), (2, NULL, 'the worker was gone before the answer was there')$$, 'and the crashes are among its attempts');

SELECT pg_temp.new_job('reset by hand');
SELECT pg_temp.claim('reset by hand');
UPDATE job_results SET attempt = 0 WHERE id = (SELECT id FROM made WHERE name = 'reset by hand');
SELECT lives_ok($$SELECT pg_temp.release('reset by hand', NULL)$$, 'a count that was set to 0 meanwhile does not keep a job from being given back');
SELECT results_eq($$SELECT status, attempt FROM pg_temp.job('reset by hand')$$, $$VALUES ('pending', 0)$$, 'and stays 0');

-- ── retry_job ──

UPDATE job_results SET run_at = 'tomorrow' WHERE id = (SELECT id FROM made WHERE name = 'poison');
SELECT is(retry_job(id), true, 'a failed job can be run again') FROM made WHERE name = 'poison';
SELECT results_eq($$SELECT status, attempt, crashes, error, result, started_at, completed_at, run_at BETWEEN now() AND clock_timestamp(), max_attempts FROM pg_temp.job('poison')$$,
                  $$VALUES ('pending', 0, 0, NULL::text, NULL::jsonb, NULL::timestamptz, NULL::timestamptz, true, 3)$$, 'at once, and with all its attempts');
SELECT is((SELECT count(*) FROM made, get_job_attempts(id) WHERE name = 'poison'), 2::bigint, 'those it had are still listed');
SELECT is(pg_temp.claim('poison'), 1, 'and the next is the first again');
SELECT is((pg_temp.job(name)).status || ', ' || retry_job(id), state || ', false', format('a %s job cannot be retried', state))
  FROM (VALUES ('good', 'completed'), ('poison', 'running'), ('cancelled', 'pending')) AS t (what, state) JOIN made ON name = what;
SELECT is((pg_temp.job(what)).status, state, format('and is still %s', state)) FROM (VALUES ('good', 'completed'), ('poison', 'running'), ('cancelled', 'pending')) AS t (what, state);
SELECT is(retry_job(id), false, 'nor can what is no job''s id') FROM (VALUES (NULL), (gen_random_uuid())) AS t (id);
SELECT is_empty('SELECT * FROM get_job_attempts(NULL)', 'NULL has no attempts');

-- ── Deleted jobs ──

SELECT isnt_empty($$SELECT FROM job_attempts JOIN made ON made.id = job_id WHERE name = 'flaky'$$, 'a job has attempts');
DELETE FROM job_results WHERE id = (SELECT id FROM made WHERE name = 'flaky');
SELECT is_empty($$SELECT FROM job_attempts JOIN made ON made.id = job_id WHERE name = 'flaky'$$, 'which are deleted with it');
SELECT isnt_empty($$SELECT FROM job_attempts JOIN made ON made.id = job_id WHERE name = 'poison'$$, 'and no others are');

-- ── retry_failed_jobs ──

DELETE FROM job_results;
INSERT INTO job_results (user_id, job_type, server_id, tool_name, params, status, completed_at, error, attempt, crashes) VALUES
    (:a, 'tool_invoke', 'one', '1', '{}', 'failed', '2030-01-01 00:00Z', 'oops', 3, 1),
    (:a, 'tool_invoke', 'two', '2', '{}', 'failed', '2030-01-02 00:00Z', 'oops', 3, 1),
    (NULL, 'http_request', NULL, '3', '{"url": "http://host"}', 'failed', '2030-01-03 00:00Z', 'oops', 3, 1),
    (NULL, 'resource_fetch', 'one', '4', '{"uri": "x"}', 'failed', '2030-01-04 00:00Z', 'oops', 3, 1),
    (:a, 'tool_invoke', 'one', 'cancelled', '{}', 'cancelled', '2030-01-02 00:00Z', NULL, 3, 1),
    (:a, 'tool_invoke', 'one', 'completed', '{}', 'completed', '2030-01-02 00:00Z', NULL, 3, 1),
    (:a, 'tool_invoke', 'one', 'running', '{}', 'running', NULL, NULL, 3, 1);
CREATE TEMP TABLE as_they_were AS SELECT * FROM job_results;
-- How many and which ones it would take: all is undone.
CREATE FUNCTION pg_temp.taken(arguments text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    number integer;
BEGIN
    EXECUTE format('SELECT retry_failed_jobs(%s)', arguments) INTO number;
    RAISE EXCEPTION USING ERRCODE = 'TAKEN',
        MESSAGE = format('%s: %s', number, (SELECT string_agg(tool_name, ' ' ORDER BY tool_name) FROM job_results WHERE status = 'pending'));
EXCEPTION WHEN SQLSTATE 'TAKEN' THEN
    RETURN SQLERRM;
END
$$;
SELECT is(pg_temp.taken(arguments), taken, format('retry_failed_jobs(%s) takes %s', arguments, taken))
  FROM (VALUES
    ('', '4: 1 2 3 4'), ('NULL, NULL, NULL, NULL', '4: 1 2 3 4'),
    ($$'one'$$, '2: 1 4'), ($$'two'$$, '1: 2'), ($$'three'$$, '0: '), ($$''$$, '0: '), ($$'On_'$$, '0: '),
    ($$NULL, 'tool_invoke'$$, '2: 1 2'), ($$p_job_type => 'http_request'$$, '1: 3'), ($$p_job_type => 'prompt_execute'$$, '0: '), ($$p_job_type => 'dance'$$, '0: '),
    ($$'one', 'tool_invoke'$$, '1: 1'), ($$'two', 'resource_fetch'$$, '0: '),
    ($$p_since => '2030-01-02Z'$$, '3: 2 3 4'), ($$p_since => '2030-01-02 00:00:00.000001Z'$$, '2: 3 4'),
    ($$p_until => '2030-01-03Z'$$, '2: 1 2'), ($$p_until => '2030-01-03 00:00:00.000001Z'$$, '3: 1 2 3'),
    ($$p_since => '2030-01-02Z', p_until => '2030-01-03Z'$$, '1: 2'), ($$p_since => '2030-01-02Z', p_until => '2030-01-02Z'$$, '0: '),
    ($$p_since => '-infinity', p_until => 'infinity'$$, '4: 1 2 3 4'), ($$p_since => '2031-01-01Z'$$, '0: '), ($$p_until => '2029-01-01Z'$$, '0: '),
    ($$'one', 'resource_fetch', '2030-01-04Z', '2030-01-05Z'$$, '1: 4')) AS t (arguments, taken);
SELECT results_eq('SELECT * FROM job_results ORDER BY id', 'SELECT * FROM as_they_were ORDER BY id', 'the rows are as they were before the next test');
SELECT is(retry_failed_jobs(), 4, 'retry_failed_jobs returns how many it has taken');
SELECT results_eq($$SELECT tool_name, status, attempt, crashes, error, completed_at, run_at BETWEEN now() AND clock_timestamp() FROM job_results WHERE tool_name < 'a' ORDER BY 1$$,
                  $$SELECT n::text, 'pending', 0, 0, NULL::text, NULL::timestamptz, true FROM generate_series(1, 4) AS n$$, 'they run again at once, with all their attempts');
SELECT results_eq($$SELECT * FROM job_results WHERE tool_name > 'a' ORDER BY id$$, $$SELECT * FROM as_they_were WHERE tool_name > 'a' ORDER BY id$$, 'those that have not failed are left alone');
SELECT is(retry_failed_jobs(), 0, 'once is enough');

-- ── What is due ──

DELETE FROM job_results;
SELECT is((SELECT seconds FROM _nexus_hub.next_due()), NULL, 'nothing is due when there is nothing');
INSERT INTO job_results (user_id, job_type, server_id, tool_name, priority, run_at) VALUES
    (:a, 'tool_invoke', 'one', 'later', 9, now() + interval '90 s'), (:a, 'tool_invoke', 'one', 'latest', 1, now() + interval '1 h'),
    (:a, 'tool_invoke', 'one', 'due', 5, now()), (:a, 'tool_invoke', 'two', 'overdue', 5, now() - interval '1 h'), (:a, 'tool_invoke', 'one', 'urgent', 1, now());
SELECT is((SELECT seconds FROM _nexus_hub.next_due()), 90::double precision, 'the next job is due when the first is that is not due yet, whatever its priority');
CREATE FUNCTION pg_temp.due(priority integer, most integer, worker integer DEFAULT 0, workers integer DEFAULT 1) RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(j.tool_name, ' ' ORDER BY n)
      FROM _nexus_hub.read_pending(ARRAY[priority::smallint], ARRAY['-infinity'::timestamptz], ARRAY['00000000-0000-0000-0000-000000000000'::uuid], ARRAY[most], worker, workers)
           WITH ORDINALITY AS r (read, run_at, id, user_id, is_mcp, target, bytes, n)
      JOIN job_results j USING (id)
     WHERE r.target IS NOT NULL
$$;
SELECT is(pg_temp.due(priority, most), due, format('at most %s of priority %s: %s', most, priority, coalesce(due, 'none')))
  FROM (VALUES (5, 10, 'overdue due'), (5, 1, 'overdue'), (1, 10, 'urgent'), (9, 10, NULL), (4, 10, NULL)) AS t (priority, most, due);
SELECT is((SELECT string_agg(due, ' ' ORDER BY due) FROM generate_series(0, 2) AS worker, string_to_table(pg_temp.due(5, 10, worker, 3), ' ') AS due), 'due overdue',
          'each job is due for one of several workers');

-- ── Circuit breakers ──

SELECT clock_timestamp() AS began \gset
SELECT _nexus_hub.write_breakers(0, 2, ARRAY['a:80', 'b:80', 'c:80'], ARRAY['open', 'half-open', 'closed'], ARRAY[5, 6, 0], ARRAY[5000, 0, 0]::bigint[], ARRAY['refused', 'timed out', '']);
SELECT _nexus_hub.write_breakers(1, 2, ARRAY['a:80'], ARRAY['open'], ARRAY[7], ARRAY[0]::bigint[], ARRAY['refused']);
SELECT set_eq('SELECT host, worker::integer, state, failures, error FROM circuit_breakers',
              $$VALUES ('a:80', 0, 'open', 5, 'refused'), ('b:80', 0, 'half-open', 6, 'timed out'), ('a:80', 1, 'open', 7, 'refused')$$, 'circuit_breakers shows what is not closed, of each worker');
SELECT ok(probe_at - interval '5 s' BETWEEN :'began' AND clock_timestamp() AND opened_at BETWEEN :'began' AND clock_timestamp(), 'and when it will be tried again')
  FROM circuit_breakers WHERE failures = 5;
UPDATE circuit_breakers SET opened_at = '2000-01-01';
SELECT _nexus_hub.write_breakers(0, 2, ARRAY['a:80', 'b:80'], ARRAY['half-open', 'closed'], ARRAY[8, 0], ARRAY[0, 0]::bigint[], ARRAY['reset', '']);
SELECT set_eq('SELECT host, worker::integer, state, failures, error, opened_at FROM circuit_breakers',
              $$VALUES ('a:80', 0, 'half-open', 8, 'reset', '2000-01-01'::timestamptz), ('a:80', 1, 'open', 7, 'refused', '2000-01-01')$$,
              'a change keeps the time since when the host''s jobs wait, and a closed one is gone');
SELECT _nexus_hub.write_breakers(0, 2, NULL, ARRAY[]::text[], ARRAY[]::integer[], ARRAY[]::bigint[], ARRAY[]::text[]);
SELECT results_eq('SELECT worker::integer FROM circuit_breakers', 'VALUES (1)', 'a worker that starts closes its own');
SELECT _nexus_hub.write_breakers(0, 1, NULL, ARRAY[]::text[], ARRAY[]::integer[], ARRAY[]::bigint[], ARRAY[]::text[]);
SELECT is_empty('SELECT FROM circuit_breakers', 'and those of workers that there are no more');
SELECT lives_ok($$SELECT _nexus_hub.write_breakers(0, 1, ARRAY[repeat(md5(random()::text), 400)], ARRAY['open'], ARRAY[1], ARRAY[0]::bigint[], ARRAY['e'])$$,
                'what cannot be shown is no reason to fail');

SELECT * FROM finish();
ROLLBACK;
