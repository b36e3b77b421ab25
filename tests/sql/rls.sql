-- Which rows a caller sees and changes: two users, somebody without an id, and service_role.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

-- The ways to be known: as_claims sets both settings by hand, the others set them as PostgREST does.
CREATE FUNCTION pg_temp.as_claims(claims text, sub text DEFAULT '') RETURNS void LANGUAGE sql
AS $$ SELECT set_config('request.jwt.claims', claims, true), set_config('request.jwt.claim.sub', sub, true), set_config('role', 'authenticated', true) $$;
CREATE FUNCTION pg_temp.as_user(id uuid) RETURNS void LANGUAGE sql
AS $$ SELECT pg_temp.as_claims(json_build_object('sub', id, 'role', 'authenticated')::text) $$;
CREATE FUNCTION pg_temp.as_service() RETURNS void LANGUAGE sql
AS $$ SELECT pg_temp.as_claims('{"role": "service_role"}'), set_config('role', 'service_role', true) $$;
\set a '''aaaaaaaa-0000-4000-8000-000000000001'''
\set b '''bbbbbbbb-0000-4000-8000-000000000002'''

-- What everybody below finds: a server and a job of each user, two system servers, a job of nobody.
CREATE TEMP TABLE made (name text PRIMARY KEY, id uuid);
GRANT ALL ON made TO PUBLIC;
SELECT pg_temp.as_service();
INSERT INTO made VALUES
    ('server a', add_server('one', 'One of A', '{"url": "https://a.example/mcp"}', :a)),
    ('server b', add_server('one', 'One of B', '{"url": "https://b.example/mcp"}', :b)),
    ('job a', create_job(:a, 'tool_invoke', 'one', 'echo')),
    ('job b', create_job(:b, 'tool_invoke', 'one', 'echo')),
    ('job of nobody', create_job(NULL, 'http_request', NULL, NULL, '{"url": "https://host.example/"}'));
INSERT INTO system_servers (id, name, config, enabled) VALUES
    ('open', 'Open', '{"url": "https://open.example/mcp"}', true),
    ('closed', 'Closed', '{"url": "https://closed.example/mcp"}', false);
INSERT INTO made VALUES
    ('key a', insert_user_api_key(:a, 'openai', 'key of A')),
    ('key b', insert_user_api_key(:b, 'openai', 'key of B')),
    ('key of the team', insert_user_api_key(NULL, 'openai', 'key of the team'));
SELECT upsert_user_gateway_config(:a, 'https://a.example'), upsert_user_gateway_config(:b, 'https://b.example'), upsert_user_gateway_config(NULL, 'https://team.example');
INSERT INTO user_settings (user_id, allow_gateway_fallback) VALUES (:b, true);
CREATE FUNCTION pg_temp.made(what text) RETURNS uuid LANGUAGE sql STABLE AS $$ SELECT id FROM pg_temp.made WHERE name = what $$;

-- ── Who is calling ──

SELECT pg_temp.as_user(:a);
SELECT is(nexus_hub_uid(), :a, 'the caller is the sub of request.jwt.claims');
SELECT pg_temp.as_claims('', :a);
SELECT is(nexus_hub_uid(), :a, 'empty claims leave it to request.jwt.claim.sub');
SELECT pg_temp.as_claims('{"role": "authenticated"}', :a);
SELECT is(nexus_hub_uid(), :a, 'claims without a sub leave it to request.jwt.claim.sub');
SELECT pg_temp.as_claims(format('{"sub": "%s"}', :a), :b);
SELECT is(nexus_hub_uid(), :a, 'request.jwt.claims wins over request.jwt.claim.sub');
SELECT pg_temp.as_claims(format('{"sub": "%s"}', upper(:a)));
SELECT is(nexus_hub_uid(), :a, 'the case of the sub does not matter');

CREATE FUNCTION pg_temp.sees_nothing(claims text, sub text, description text) RETURNS SETOF text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_temp.as_claims(claims, sub);
    RETURN NEXT is(nexus_hub_uid(), NULL, description || ': the caller is unknown');
    RETURN NEXT is_empty($q$SELECT id FROM user_servers UNION ALL SELECT id FROM job_results UNION ALL SELECT id FROM api_keys
                            UNION ALL SELECT id FROM api_gateway_configs UNION ALL SELECT user_id FROM user_settings$q$, description || ': no rows are seen');
    RETURN NEXT is_empty($q$UPDATE user_settings SET allow_gateway_fallback = false RETURNING user_id$q$, description || ': no settings are changed');
    RETURN NEXT throws_ok($q$INSERT INTO user_settings (user_id) VALUES ('cccccccc-0000-4000-8000-000000000003')$q$, '42501', NULL, description || ': no settings are made');
    RETURN NEXT is_empty($q$SELECT * FROM list_servers() WHERE kind = 'user'$q$, description || ': no own servers are listed');
    RETURN NEXT throws_ok($q$SELECT add_server('new', 'New', '{"url": "https://host/mcp"}')$q$, '22023', 'the owner is not known',
        description || ': no server can be added');
    RETURN NEXT throws_ok($q$SELECT create_job(NULL, 'tool_invoke', 'one', 'echo')$q$, '22023', 'the owner is not known', description || ': no job can be created');
END
$$;
RESET ROLE;
SELECT pg_temp.sees_nothing('', '', 'empty claims');
SELECT pg_temp.sees_nothing('{}', '', 'claims without a sub');
SELECT pg_temp.sees_nothing('null', '', 'claims that are null');
SELECT pg_temp.sees_nothing('{"sub": null}', '', 'a sub that is null');
SELECT pg_temp.sees_nothing('{"sub": "someone@example.com"}', '', 'a sub that is no uuid');
SELECT pg_temp.sees_nothing('{"sub": 42}', '', 'a sub that is a number');
SELECT pg_temp.sees_nothing('', 'someone@example.com', 'a claim.sub that is no uuid');
SELECT pg_temp.sees_nothing('{"sub": "aaaaaaaa-0000-4000-8000-000000000001x"}', '', 'a sub that only begins like a uuid');

-- ── Servers ──

SELECT pg_temp.as_user(:a);
SELECT results_eq($$SELECT id, name FROM user_servers$$, $$SELECT pg_temp.made('server a'), 'One of A'$$, 'a user sees the own servers only');
SELECT set_eq($$SELECT id, kind, user_id, server_id, name FROM list_servers() WHERE kind = 'user'$$,
              format($$VALUES (pg_temp.made('server a'), 'user', %L::uuid, 'one', 'One of A')$$, :a),
              'list_servers shows a user the own servers');
INSERT INTO made VALUES ('second', add_server('two', 'Two', '{"url": "https://a.example/mcp"}'));
SELECT is((SELECT user_id FROM user_servers WHERE id = pg_temp.made('second')), :a, 'add_server without p_user_id adds for the caller');
SELECT isnt(add_server('three', 'Three', '{"url": "https://a.example/mcp"}', :a), NULL, 'add_server takes the caller''s own id');
SELECT throws_ok(format($$SELECT add_server('two', 'Two', '{"url": "https://a.example/mcp"}', %L)$$, :b), '42501', NULL,
                 'a user cannot add a server for another');
SELECT throws_ok(format($$INSERT INTO user_servers (user_id, server_id, name) VALUES (%L, 'two', 'Two')$$, :b), '42501', NULL,
                 'a user cannot insert a server for another');
SELECT is(update_server(pg_temp.made('second'), p_name => 'Renamed', p_config => '{"url": "https://new.example/mcp"}', p_enabled => false), true,
          'a user changes an own server');
SELECT results_eq($$SELECT name, enabled FROM user_servers WHERE server_id = 'two'$$, $$VALUES ('Renamed', false)$$, 'and the change is there');
SELECT is(delete_server(pg_temp.made('second')), true, 'a user deletes an own server');
SELECT is_empty($$SELECT FROM user_servers WHERE server_id = 'two'$$, 'and it is gone');

RESET ROLE;
CREATE TEMP TABLE of_b AS SELECT * FROM user_servers WHERE user_id = :b;
SELECT pg_temp.as_user(:a);
SELECT is(update_server(pg_temp.made('server b'), 'Mine', '{"url": "https://evil.example/mcp"}', false), false,
          'update_server of another''s server returns false');
SELECT is(delete_server(pg_temp.made('server b')), false, 'delete_server of another''s server returns false');
SELECT is_empty($$UPDATE user_servers SET name = 'Mine' WHERE name = 'One of B' RETURNING id$$, 'another''s server cannot be reached by UPDATE');
DELETE FROM user_servers WHERE server_id <> 'one' OR name = 'One of B';
RESET ROLE;
SELECT results_eq(format('SELECT * FROM user_servers WHERE user_id = %L', :b), 'SELECT * FROM of_b', 'another''s server is as it was');
SELECT pg_temp.as_user(:b);
SELECT results_eq('SELECT name FROM user_servers', $$VALUES ('One of B')$$, 'the other user sees the own one');

SELECT pg_temp.as_service();
SELECT set_eq('SELECT name FROM user_servers', $$VALUES ('One of A'), ('One of B')$$, 'service_role sees every user''s servers');
SELECT is(update_server(pg_temp.made('server b'), 'Renamed by the service'), true, 'service_role changes any user''s server');
SELECT is(delete_server(pg_temp.made('server b')), true, 'service_role deletes any user''s server');
SELECT throws_ok($$SELECT add_server('x', 'X', '{"url": "https://host/mcp"}')$$, '22023', 'the owner is not known',
                 'service_role must say for whom it adds a server');

-- ── System servers ──

SELECT pg_temp.as_user(:a);
SELECT results_eq('SELECT id FROM system_servers', $$VALUES ('open')$$, 'a user sees the enabled system servers only');
SELECT results_eq($$SELECT s.id = l.id, l.server_id, l.name, l.user_id FROM list_servers() l JOIN (SELECT ref_id, id FROM system_servers) AS s (id, server) ON s.server = l.server_id WHERE l.kind = 'system'$$,
                  $$VALUES (true, 'open', 'Open', NULL::uuid)$$, 'list_servers shows them too, with their ref_id');
SELECT pg_temp.as_service();
SELECT set_eq('SELECT id, config ->> ''url'' FROM system_servers', $$VALUES ('open', 'https://open.example/mcp'), ('closed', 'https://closed.example/mcp')$$,
              'service_role sees all system servers with their configs');
SELECT set_eq($$SELECT server_id, enabled FROM list_servers() WHERE kind = 'system'$$, $$VALUES ('open', true), ('closed', false)$$,
              'list_servers shows service_role the disabled ones too');
SELECT results_eq($$UPDATE system_servers SET enabled = false WHERE id = 'open' RETURNING id$$, $$VALUES ('open')$$, 'service_role changes system servers');
SELECT results_eq($$DELETE FROM system_servers WHERE id = 'open' RETURNING id$$, $$VALUES ('open')$$, 'service_role deletes system servers');

-- ── Jobs ──

SELECT pg_temp.as_user(:a);
SELECT results_eq('SELECT id FROM job_results', $$SELECT pg_temp.made('job a')$$, 'a user sees the own jobs only');
INSERT INTO made VALUES ('new job', create_job(NULL, 'tool_invoke', 'one', 'echo', '{"a": 1}'));
SELECT results_eq($$SELECT user_id, status, params FROM job_results WHERE id = pg_temp.made('new job')$$,
                  format($$SELECT %L::uuid, 'pending', '{"a": 1}'::jsonb$$, :a), 'create_job without p_user_id makes the caller''s job');
SELECT isnt(create_job(:a, 'resource_fetch', 'one', p_params => '{"uri": "file:///x"}'), NULL, 'create_job takes the caller''s own id');
SELECT throws_ok(format($$SELECT create_job(%L, 'tool_invoke', 'one', 'echo')$$, :b), '42501', NULL, 'a user cannot create a job for another');
SELECT throws_ok(format($$SELECT create_job(%L, 'http_request', NULL, NULL, '{"url": "http://127.0.0.1/"}')$$, :a), '42501', NULL,
                 'a user cannot create an http_request job');

CREATE FUNCTION pg_temp.insert_job(owner uuid, type text, state text) RETURNS text LANGUAGE sql AS $$
    SELECT format('INSERT INTO job_results (user_id, job_type, server_id, tool_name, params, status)
                   VALUES (%L, %L, ''one'', ''echo'', ''{"url": "http://127.0.0.1/", "uri": "file:///x"}'', %L)', owner, type, state)
$$;
SELECT lives_ok(pg_temp.insert_job(:a, 'tool_invoke', 'pending'), 'a user inserts an own pending job');
SELECT throws_ok(pg_temp.insert_job(:b, 'tool_invoke', 'pending'), '42501', NULL, 'a user cannot insert a job for another');
SELECT throws_ok(pg_temp.insert_job(NULL, 'tool_invoke', 'pending'), '42501', NULL, 'a user cannot insert a job of nobody');
SELECT throws_ok(pg_temp.insert_job(:a, 'http_request', 'pending'), '42501', NULL, 'a user cannot insert an http_request job');
SELECT throws_ok(pg_temp.insert_job(:a, 'tool_invoke', state), '42501', NULL, format('a user cannot insert a %s job', state))
  FROM unnest(ARRAY['running', 'completed', 'failed', 'cancelled']) AS state;

-- Priorities 1 to 4 go before everybody else's jobs.
CREATE FUNCTION pg_temp.insert_urgent_job(owner uuid, priority integer) RETURNS text LANGUAGE sql AS $$
    SELECT format('INSERT INTO job_results (user_id, job_type, server_id, tool_name, priority) VALUES (%L, ''tool_invoke'', ''one'', ''urgent'', %s)', owner, priority)
$$;
SELECT throws_ok(pg_temp.insert_urgent_job(:a, priority), '42501', NULL, format('a user cannot insert a job of priority %s', priority)) FROM generate_series(1, 4) AS priority;
SELECT throws_ok(format($$SELECT create_job(NULL, 'tool_invoke', 'one', 'urgent', p_priority => %s)$$, priority), '42501', 'p_priority must be 5 or more for users',
                 format('a user cannot create a job of priority %s', priority)) FROM generate_series(1, 4) AS priority;
SELECT is_empty($$SELECT FROM job_results WHERE tool_name = 'urgent'$$, 'and none of them is there');
SELECT lives_ok(pg_temp.insert_urgent_job(:a, priority), format('a user inserts a job of priority %s', priority)) FROM generate_series(5, 9) AS priority;
SELECT isnt(create_job(NULL, 'tool_invoke', 'one', 'urgent', p_priority => priority), NULL, format('a user creates a job of priority %s', priority))
  FROM generate_series(5, 9) AS priority;
SELECT lives_ok(format($$INSERT INTO job_results (user_id, job_type, server_id, tool_name, priority, run_at, timeout_ms, max_attempts, idempotency_key)
                         VALUES (%L, 'tool_invoke', 'one', 'options', 7, now() + interval '1 day', 1000, 3, 'inserted')$$, :a), 'a user gives an own job all its options');
SELECT throws_ok(format($$INSERT INTO job_results (user_id, job_type, server_id, tool_name, idempotency_key) VALUES (%L, 'tool_invoke', 'one', 'again', 'inserted')$$, :a), '23505',
                 NULL, 'a user has an idempotency key once');

CREATE FUNCTION pg_temp.can_not_reach(what text) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    job uuid := coalesce(pg_temp.made(what), 'dddddddd-0000-4000-8000-000000000004');
BEGIN
    RETURN NEXT is_empty(format('SELECT * FROM get_job_status(%L)', job), format('get_job_status has no row for %s', what));
    RETURN NEXT is_empty(format('SELECT * FROM wait_for_job(%L, 0)', job), format('wait_for_job has no row for %s', what));
    RETURN NEXT is_empty(format('SELECT * FROM wait_for_job(%L)', job), format('wait_for_job does not wait for %s', what));
    RETURN NEXT is(cancel_job(job), false, format('cancel_job returns false for %s', what));
    RETURN NEXT is(retry_job(job), false, format('retry_job returns false for %s', what));
    RETURN NEXT is_empty(format('SELECT * FROM get_job_attempts(%L)', job), format('get_job_attempts has no row for %s', what));
    RETURN NEXT throws_ok(format('SELECT execute_job_via_pg_net(%L)', job), '22023', format('Job %s not found', job),
                          format('execute_job_via_pg_net does not find %s', what));
END
$$;
SELECT pg_temp.can_not_reach('job b');
SELECT pg_temp.can_not_reach('job of nobody');
SELECT pg_temp.can_not_reach('a job that is not there');
SELECT is_empty('SELECT * FROM get_job_status(NULL)', 'get_job_status has no row for NULL');
SELECT is_empty('SELECT * FROM wait_for_job(NULL)', 'wait_for_job has no row for NULL');
SELECT is(cancel_job(NULL), false, 'cancel_job returns false for NULL');
SELECT is(retry_job(NULL), false, 'retry_job returns false for NULL');
SELECT is_empty('SELECT * FROM get_job_attempts(NULL)', 'get_job_attempts has no row for NULL');
SELECT throws_ok('SELECT execute_job_via_pg_net(NULL)', '22023', 'Job NULL not found', 'execute_job_via_pg_net does not find NULL');

SELECT results_eq($$SELECT id, job_type, server_id, tool_name, status FROM get_job_status(pg_temp.made('new job'))$$,
                  $$SELECT pg_temp.made('new job'), 'tool_invoke', 'one', 'echo', 'pending'$$, 'get_job_status shows an own job');
SELECT lives_ok($$SELECT execute_job_via_pg_net(pg_temp.made('new job'))$$, 'execute_job_via_pg_net takes an own job');
SELECT is(cancel_job(pg_temp.made('new job')), true, 'a user cancels an own pending job');
SELECT results_eq($$SELECT status, completed_at IS NOT NULL, started_at IS NULL FROM get_job_status(pg_temp.made('new job'))$$,
                  $$VALUES ('cancelled', true, true)$$, 'and it is cancelled, with the time, without having started');
SELECT is(cancel_job(pg_temp.made('new job')), false, 'a cancelled job cannot be cancelled again');
SELECT is(retry_job(pg_temp.made('new job')), true, 'a user has an own cancelled job run again');
SELECT results_eq($$SELECT status, completed_at FROM get_job_status(pg_temp.made('new job'))$$, $$VALUES ('pending', NULL::timestamptz)$$, 'and it is pending');
RESET ROLE;
UPDATE job_results SET status = 'running', lease = gen_random_uuid() WHERE id = pg_temp.made('new job');
SELECT pg_temp.as_user(:a);
SELECT is(cancel_job(pg_temp.made('new job')), true, 'a user cancels an own running job');
SELECT results_eq($$SELECT status, lease FROM job_results WHERE id = pg_temp.made('new job')$$, $$VALUES ('cancelled', NULL::uuid)$$, 'and it is cancelled, and nobody''s');

SELECT pg_temp.as_user(:b);
SELECT results_eq('SELECT id, status FROM job_results', $$SELECT pg_temp.made('job b'), 'pending'$$, 'the other user''s job is as it was');

-- ── Attempts, and jobs that failed ──

RESET ROLE;
UPDATE job_results SET status = 'failed', attempt = 3, failures = 2 WHERE id IN (pg_temp.made('job a'), pg_temp.made('job b'), pg_temp.made('job of nobody'));
INSERT INTO job_attempts (job_id, attempt, started_at, error)
    SELECT id, attempt, now(), 'of ' || name FROM made, generate_series(1, 2) AS attempt WHERE name IN ('job a', 'job b', 'job of nobody');
SELECT pg_temp.as_user(:a);
SELECT results_eq('SELECT attempt, error FROM job_attempts ORDER BY attempt', $$VALUES (1, 'of job a'), (2, 'of job a')$$, 'a user sees the attempts of the own jobs only');
SELECT results_eq($$SELECT attempt, error FROM get_job_attempts(pg_temp.made('job a'))$$, $$VALUES (1, 'of job a'), (2, 'of job a')$$, 'get_job_attempts shows them');
SELECT pg_temp.can_not_reach('job b');
SELECT is(retry_failed_jobs(), 1, 'retry_failed_jobs counts the own failed jobs only');
SELECT results_eq('SELECT status, attempt FROM job_results WHERE id = pg_temp.made(''job a'')', $$VALUES ('pending', 0)$$, 'and has them run again');
SELECT is(retry_failed_jobs(), 0, 'once');
SELECT is((SELECT status FROM job_results WHERE id = pg_temp.made('new job')), 'cancelled', 'a cancelled one stays cancelled');
SELECT is(retry_job(pg_temp.made('job a')), false, 'a pending job cannot be retried');
SELECT pg_temp.as_claims('');
SELECT is_empty('SELECT FROM job_attempts', 'somebody without an id sees no attempts');
SELECT is(retry_failed_jobs(), 0, 'and has no failed jobs');

SELECT pg_temp.as_user(:b);
SELECT results_eq('SELECT id, status, attempt FROM job_results', $$SELECT pg_temp.made('job b'), 'failed', 3$$, 'the other user''s failed job is as it was');
SELECT results_eq('SELECT attempt, error FROM job_attempts ORDER BY attempt', $$VALUES (1, 'of job b'), (2, 'of job b')$$, 'and so are its attempts');

SELECT pg_temp.as_service();
SELECT is((SELECT count(*) FROM job_attempts), 6::bigint, 'service_role sees everybody''s attempts');
SELECT is((SELECT count(*) FROM get_job_attempts(pg_temp.made('job b'))), 2::bigint, 'get_job_attempts shows service_role anybody''s');
SELECT is(retry_job(pg_temp.made('job b')), true, 'service_role has anybody''s job run again');
SELECT is(retry_failed_jobs(), 1, 'service_role has all failed jobs run again');
SELECT is((SELECT status FROM job_results WHERE id = pg_temp.made('job of nobody')), 'pending', 'those of nobody, too');
SELECT is(retry_job(pg_temp.made('new job')), true, 'and a user''s cancelled one');
SELECT lives_ok(pg_temp.insert_urgent_job(:b, 1), 'service_role inserts a job of priority 1');
SELECT isnt(create_job(:b, 'tool_invoke', 'one', 'urgent', p_priority => 1), NULL, 'service_role creates a job of priority 1');
DELETE FROM job_results WHERE user_id = :b AND tool_name = 'urgent';
DELETE FROM job_results WHERE id = pg_temp.made('job of nobody');
SELECT is((SELECT count(*) FROM job_attempts), 4::bigint, 'a job''s attempts go with it');
INSERT INTO job_results (job_type, server_id, tool_name) VALUES ('tool_invoke', 'one', 'of nobody');

-- ── Idempotency keys ──

SELECT pg_temp.as_user(:a);
INSERT INTO made VALUES ('a''s key', create_job(NULL, 'tool_invoke', 'one', 'keyed', p_idempotency_key => 'key'));
SELECT is(create_job(:a, 'tool_invoke', 'one', 'keyed', p_idempotency_key => 'key'), pg_temp.made('a''s key'), 'a user''s key gives back the user''s job');
SELECT pg_temp.as_user(:b);
INSERT INTO made VALUES ('b''s key', create_job(NULL, 'tool_invoke', 'one', 'keyed', p_idempotency_key => 'key'));
SELECT isnt(pg_temp.made('b''s key'), pg_temp.made('a''s key'), 'another user''s same key is another key');
SELECT results_eq($$SELECT id FROM job_results WHERE idempotency_key = 'key'$$, $$SELECT pg_temp.made('b''s key')$$, 'and makes that user''s own job');
SELECT throws_ok(format($$SELECT create_job(%L, 'tool_invoke', 'one', 'keyed', p_idempotency_key => 'key')$$, :a), '42501', NULL,
                 'a user does not get another''s job by its key');
SELECT pg_temp.as_service();
SELECT is(create_job(:a, 'http_request', NULL, NULL, '{"url": "http://host"}', p_idempotency_key => 'key'), pg_temp.made('a''s key'),
          'service_role gives a user''s key for the user');
INSERT INTO made VALUES ('nobody''s key', create_job(NULL, 'tool_invoke', 'one', 'keyed', p_idempotency_key => 'key'));
SELECT ok(pg_temp.made('nobody''s key') NOT IN (pg_temp.made('a''s key'), pg_temp.made('b''s key')), 'nobody''s same key is another key');
SELECT is(create_job(NULL, 'tool_invoke', 'one', 'keyed', p_idempotency_key => 'key'), pg_temp.made('nobody''s key'), 'which gives back nobody''s job');
DELETE FROM job_results WHERE tool_name = 'keyed';

-- ── Circuit breakers ──

RESET ROLE;
INSERT INTO circuit_breakers (host, worker, state, failures, probe_at, error) VALUES ('host:80', 0, 'open', 5, now(), 'connection refused');
SELECT pg_temp.as_service();
SELECT results_eq('SELECT host, state, failures FROM circuit_breakers', $$VALUES ('host:80', 'open', 5)$$, 'service_role sees the circuit breakers');
RESET ROLE;
GRANT SELECT ON circuit_breakers TO authenticated;
SELECT pg_temp.as_user(:a);
SELECT is_empty('SELECT FROM circuit_breakers', 'a user would see none even with the right to read the table');

-- ── API keys, gateways and settings ──

SELECT pg_temp.as_user(:a);
SELECT results_eq('SELECT id, user_id, service, last_used_at FROM api_keys', format($$SELECT pg_temp.made('key a'), %L::uuid, 'openai', NULL::timestamptz$$, :a),
                  'a user sees the own keys only, and not the team''s');
SELECT is((SELECT count(*) FROM api_keys), 1::bigint, 'also when counting them');
SELECT results_eq('SELECT user_id, base_url FROM api_gateway_configs', format($$VALUES (%L::uuid, 'https://a.example')$$, :a), 'a user sees the own gateway only, and not the team''s');
SELECT is_empty('SELECT FROM user_settings', 'a user sees no settings but the own');
SELECT lives_ok(format('INSERT INTO user_settings (user_id, allow_gateway_fallback) VALUES (%L, false)', :a), 'a user makes the own settings');
SELECT lives_ok(format('INSERT INTO user_settings (user_id, allow_gateway_fallback) VALUES (%L, true)
                        ON CONFLICT (user_id) DO UPDATE SET user_id = excluded.user_id, allow_gateway_fallback = excluded.allow_gateway_fallback', :a),
                'and changes them with an upsert as PostgREST makes it');
SELECT results_eq('UPDATE user_settings SET allow_gateway_fallback = false RETURNING user_id, allow_gateway_fallback', format('VALUES (%L::uuid, false)', :a), 'and with an UPDATE, which changes nobody else''s');
SELECT throws_ok(statement, '42501', NULL, 'a user cannot: ' || statement)
  FROM unnest(ARRAY[
    format('INSERT INTO user_settings (user_id) VALUES (%L)', :b),
    format('INSERT INTO user_settings (user_id) VALUES (%L) ON CONFLICT DO NOTHING', :b),
    format('INSERT INTO user_settings (user_id) VALUES (%L) ON CONFLICT (user_id) DO UPDATE SET allow_gateway_fallback = false', :b),
    format('UPDATE user_settings SET user_id = %L', :b),
    'UPDATE user_settings SET user_id = ''cccccccc-0000-4000-8000-000000000003''']) AS statement;
SELECT pg_temp.as_user(:b);
SELECT results_eq('SELECT id FROM api_keys', $$SELECT pg_temp.made('key b')$$, 'the other user sees the own key');
SELECT results_eq('SELECT user_id, allow_gateway_fallback FROM user_settings', format('VALUES (%L::uuid, true)', :b), 'and the own settings, as they were');

-- Even with every right to the tables.
RESET ROLE;
GRANT ALL ON api_keys, api_gateway_configs, user_settings TO authenticated;
SELECT pg_temp.as_user(:a);
SELECT is_empty(statement, 'row-level security alone is enough against: ' || statement)
  FROM unnest(ARRAY[
    'UPDATE api_keys SET service = ''xai'' RETURNING id', 'DELETE FROM api_keys RETURNING id',
    'UPDATE api_gateway_configs SET base_url = ''https://evil.example'' RETURNING id', 'DELETE FROM api_gateway_configs RETURNING id',
    'DELETE FROM user_settings WHERE allow_gateway_fallback RETURNING user_id',
    'SELECT FROM api_keys WHERE user_id IS NULL', 'SELECT FROM api_gateway_configs WHERE user_id IS NULL']) AS statement;
SELECT throws_ok(format(statement, owner), '42501', NULL, 'or: ' || format(statement, owner))
  FROM unnest(ARRAY[:'a', 'NULL']) AS owner,
       unnest(ARRAY['INSERT INTO api_keys (user_id, service, api_key_encrypted) VALUES (%s, ''xai'', decode(repeat(''00'', 28), ''hex''))',
                    'INSERT INTO api_gateway_configs (user_id, base_url) VALUES (%s, ''https://evil.example'')']) AS statement;
SELECT pg_temp.as_claims('');
SELECT is_empty('SELECT id FROM api_keys UNION ALL SELECT id FROM api_gateway_configs UNION ALL SELECT user_id FROM user_settings', 'somebody without an id is not the team');
SELECT pg_temp.as_service();
SELECT set_eq('SELECT user_id, get_user_api_key(user_id, service) FROM api_keys', format($$VALUES (%L::uuid, 'key of A'), (%L, 'key of B'), (NULL, 'key of the team')$$, :a, :b),
              'service_role sees everybody''s keys, which are as they were');
SELECT set_eq('SELECT user_id, base_url FROM api_gateway_configs', format($$VALUES (%L::uuid, 'https://a.example'), (%L, 'https://b.example'), (NULL, 'https://team.example')$$, :a, :b),
              'and everybody''s gateways');
SELECT set_eq('SELECT user_id, allow_gateway_fallback FROM user_settings', format('VALUES (%L::uuid, false), (%L, true)', :a, :b), 'and everybody''s settings');

-- ── What service_role does with jobs ──

SELECT pg_temp.as_service();
SELECT ok(count(*) FILTER (WHERE user_id = :a) > 1 AND count(*) FILTER (WHERE user_id = :b) = 1 AND count(*) FILTER (WHERE user_id IS NULL) = 1,
          'service_role sees everybody''s jobs') FROM job_results;
SELECT is(cancel_job(pg_temp.made('job b')), true, 'service_role cancels anybody''s job');
SELECT lives_ok(pg_temp.insert_job(NULL, 'http_request', 'pending'), 'service_role inserts an http_request job of nobody');
SELECT results_eq(format($$UPDATE job_results SET status = 'failed', error = 'by hand' WHERE user_id = %L RETURNING status$$, :b),
                  $$VALUES ('failed')$$, 'service_role writes results');
SELECT isnt_empty($$DELETE FROM job_results RETURNING id$$, 'service_role deletes jobs');

RESET ROLE;
SELECT * FROM finish();
ROLLBACK;
