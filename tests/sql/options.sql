-- What create_job takes beyond the job itself: priority, schedule, time-out, attempts, idempotency key.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

\ir error_with_hint.psql
\set a '''aaaaaaaa-0000-4000-8000-000000000001'''
\set b '''bbbbbbbb-0000-4000-8000-000000000002'''

-- ── What they do ──

SELECT create_job(:a, 'tool_invoke', 's', 'all', '{}', 1, '2031-02-03 04:05:06.789+00', 2000, 4, 'a key');
SELECT create_job(:a, 'tool_invoke', 's', 'by name', p_idempotency_key => 'another', p_max_attempts => 100, p_timeout_ms => 3600000, p_run_at => '1999-01-01Z', p_priority => 9);
SELECT create_job(:a, 'tool_invoke', 's', 'NULLs', '{}', NULL, NULL, NULL, NULL, NULL);
SELECT create_job(:a, 'tool_invoke', 's', 'none');
SELECT set_eq('SELECT tool_name, priority::integer, run_at, timeout_ms, max_attempts, idempotency_key, status FROM job_results',
              $$VALUES ('all', 1, '2031-02-03 04:05:06.789+00'::timestamptz, 2000, 4, 'a key', 'pending'), ('by name', 9, '1999-01-01Z', 3600000, 100, 'another', 'pending'),
                       ('NULLs', 5, now(), NULL, NULL, NULL, 'pending'), ('none', 5, now(), NULL, NULL, NULL, 'pending')$$,
              'the options are in the job''s row, and what is NULL is what is usual');

-- ── What is refused ──

CREATE TEMP TABLE refused (options text, error text);
INSERT INTO refused
    SELECT format('p_%s => %s', option, value), format('p_%s must be between %s, not %s | %s', option, range, value, hint)
      FROM (VALUES
        ('priority', '1 and 9', '1 is first, 5 is usual, 9 is last.', ARRAY['0', '-1', '10', '65541', '-2147483648']),
        ('timeout_ms', '1 and 3600000', 'It is the time an attempt may take in all, in milliseconds.', ARRAY['0', '-1', '3600001', '2147483647']),
        ('max_attempts', '1 and 100', '1 means that the job is not tried again.', ARRAY['0', '-1', '101'])) AS t (option, range, hint, bad), unnest(bad) AS value;
INSERT INTO refused VALUES
    ($$p_run_at => 'infinity'$$, 'p_run_at must be a time, not infinity | A job that shall not run for now is one that has not been made yet.'),
    ($$p_run_at => '-infinity'$$, 'p_run_at must be a time, not infinity | A job that shall not run for now is one that has not been made yet.'),
    ($$p_idempotency_key => ''$$, 'p_idempotency_key must have 1 to 255 characters, not 0 | Leave it NULL where the job may be made twice.'),
    ($$p_idempotency_key => repeat('ü', 256)$$, 'p_idempotency_key must have 1 to 255 characters, not 256 | Leave it NULL where the job may be made twice.');
SELECT is(pg_temp.error_of(format('SELECT create_job(NULL, ''tool_invoke'', ''s'', ''refused'', %s)', options)), '22023: ' || error, format('create_job refuses %s', options)) FROM refused;
SELECT is_empty($$SELECT FROM job_results WHERE tool_name = 'refused'$$, 'and makes no such job');
SELECT isnt(create_job(NULL, 'tool_invoke', 's', 'limits', p_priority => 1, p_timeout_ms => 1, p_max_attempts => 1, p_idempotency_key => 'x', p_run_at => '4713-01-01 BC'), NULL,
            'the least of each is taken');
SELECT isnt(create_job(NULL, 'tool_invoke', 's', 'limits', p_priority => 9, p_timeout_ms => 3600000, p_max_attempts => 100, p_idempotency_key => repeat('ü', 255),
                       p_run_at => '294276-12-31'), NULL, 'and the most');

CREATE FUNCTION pg_temp.as_user(id uuid) RETURNS void LANGUAGE sql
AS $$ SELECT set_config('request.jwt.claims', json_build_object('sub', id)::text, true), set_config('role', 'authenticated', true) $$;
SELECT pg_temp.as_user(:a);
SELECT is(pg_temp.error_of(format('SELECT create_job(NULL, ''tool_invoke'', ''s'', ''t'', p_priority => %s)', priority)),
          '42501: p_priority must be 5 or more for users | Smaller numbers go before all others; create such jobs as service_role.',
          format('a user cannot give priority %s', priority))
  FROM generate_series(1, 4) AS priority;
SELECT is(left(pg_temp.error_of('SELECT create_job(NULL, ''tool_invoke'', ''s'', ''t'', p_priority => 0)'), 6), '22023:', 'a priority that nobody may give is a bad argument, for users, too');
SELECT set_config('role', 'service_role', true);
SELECT isnt(create_job(:a, 'tool_invoke', 's', 't', p_priority => priority), NULL, format('service_role may give priority %s', priority)) FROM generate_series(1, 9) AS priority;
RESET ROLE;
SELECT isnt(create_job(NULL, 'tool_invoke', 's', 't', p_priority => 1), NULL, 'the owner may give priority 1, whatever the claims are');
SELECT set_config('request.jwt.claims', '', true);

-- ── Idempotency keys ──

CREATE TEMP TABLE made (name text PRIMARY KEY, id uuid);
CREATE FUNCTION pg_temp.made(what text) RETURNS uuid LANGUAGE sql STABLE AS $$ SELECT id FROM pg_temp.made WHERE name = what $$;
INSERT INTO made VALUES ('first', create_job(:a, 'tool_invoke', 's', 'first', '{"n": 1}', p_idempotency_key => 'k')),
                        ('of b', create_job(:b, 'tool_invoke', 's', 'of b', p_idempotency_key => 'k')),
                        ('of nobody', create_job(NULL, 'tool_invoke', 's', 'of nobody', p_idempotency_key => 'k'));
CREATE TEMP TABLE first AS SELECT * FROM job_results WHERE id = pg_temp.made('first');
SELECT is(create_job(:a, 'tool_invoke', 's', 'first', '{"n": 1}', p_idempotency_key => 'k'), pg_temp.made('first'), 'the same key gives back the first job''s id');
SELECT is(create_job(:a, 'tool_invoke', 's', 'first', '{"n": 2}', p_idempotency_key => 'k'), pg_temp.made('first'), 'with other params, too');
SELECT is(create_job(:a, 'http_request', NULL, NULL, '{"url": "http://host"}', 9, 'tomorrow', 5, 5, 'k'), pg_temp.made('first'), 'or as quite another job');
SELECT results_eq('SELECT * FROM job_results WHERE user_id = (SELECT user_id FROM first) AND idempotency_key = ''k''', 'SELECT * FROM first', 'there is one row, and it is as it was');
SELECT is((SELECT count(DISTINCT id) FROM made), 3::bigint, 'users have keys of their own, and so has nobody');
SELECT is(create_job(:b, 'tool_invoke', 's', 't', p_idempotency_key => 'k'), pg_temp.made('of b'), 'another user''s key gives back that user''s job');
SELECT is(create_job(NULL, 'tool_invoke', 's', 't', p_idempotency_key => 'k'), pg_temp.made('of nobody'), 'nobody''s key gives back nobody''s job');
SELECT set_config('request.jwt.claims', format('{"sub": "%s"}', :a), true);
SELECT is(create_job(NULL, 'tool_invoke', 's', 't', p_idempotency_key => 'k'), pg_temp.made('first'), 'where p_user_id is NULL, the key is the caller''s');
SELECT set_config('request.jwt.claims', '', true);
SELECT ok(pg_temp.made('first') <> create_job(:a, 'tool_invoke', 's', 't', p_idempotency_key => key), format('%L is another key', key))
  FROM unnest(ARRAY['K', 'k ', ' k', 'kk']) AS key;
SELECT isnt(create_job(:a, 'tool_invoke', 's', 't'), create_job(:a, 'tool_invoke', 's', 't'), 'without a key each call makes a job');
INSERT INTO made VALUES ('long', create_job(:a, 'tool_invoke', 's', 't', p_idempotency_key => repeat('ü', 255)));
SELECT is(create_job(:a, 'tool_invoke', 's', 't', p_idempotency_key => repeat('ü', 255)), pg_temp.made('long'), 'a key may have 255 characters');
SELECT results_eq($$SELECT count(DISTINCT create_job(NULL, 'tool_invoke', 's', 'at once', p_idempotency_key => 'at once')) FROM generate_series(1, 10)$$, 'VALUES (1::bigint)',
                  'ten calls of one statement make one job');
SELECT is(left(pg_temp.error_of(format('SELECT create_job(%L, ''dance'', ''s'', ''t'', p_idempotency_key => ''k'')', :a)), 6), '22023:', 'a key does not make a bad job good');
SELECT is(left(pg_temp.error_of(format('SELECT create_job(%L, ''tool_invoke'', ''s'', ''t'', p_priority => 0, p_idempotency_key => ''k'')', :a)), 6), '22023:', 'nor a bad option');
SELECT is(left(pg_temp.error_of(format('INSERT INTO job_results (user_id, job_type, server_id, tool_name, idempotency_key) VALUES (%L, ''tool_invoke'', ''s'', ''t'', ''k'')', owner)), 6),
          '23505:', format('a second row with the key of %s cannot be inserted', coalesce(owner, 'nobody')))
  FROM (VALUES (:a), (NULL)) AS t (owner);

SELECT is(cancel_job(id), true, 'the first job is cancelled') FROM first;
SELECT is(create_job(:a, 'tool_invoke', 's', 't', p_idempotency_key => 'k'), pg_temp.made('first'), 'its key still stands for it');
SELECT is((SELECT status FROM get_job_status(pg_temp.made('first'))), 'cancelled', 'and does not run it again');
DELETE FROM job_results WHERE id = pg_temp.made('first');
INSERT INTO made VALUES ('second', create_job(:a, 'tool_invoke', 's', 't', p_idempotency_key => 'k'));
SELECT ok(pg_temp.made('second') <> pg_temp.made('first') AND EXISTS (SELECT FROM job_results WHERE id = pg_temp.made('second')), 'once it is deleted, the key makes a new job');

SELECT * FROM finish();
ROLLBACK;
