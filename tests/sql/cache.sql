-- Caches of what servers offer: who begins a sync, what its end writes, who sees it. The syncs themselves are in tests/blackbox.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

\set a '''aaaaaaaa-0000-4000-8000-000000000001'''
\set b '''bbbbbbbb-0000-4000-8000-000000000002'''
CREATE FUNCTION pg_temp.as_user(id uuid) RETURNS void LANGUAGE sql
AS $$ SELECT set_config('request.jwt.claims', json_build_object('sub', id)::text, true), set_config('role', 'authenticated', true) $$;
CREATE TEMP TABLE made (name text PRIMARY KEY, id uuid);
GRANT ALL ON made TO PUBLIC;
CREATE FUNCTION pg_temp.made(what text) RETURNS uuid LANGUAGE sql STABLE AS $$ SELECT id FROM pg_temp.made WHERE name = what $$;
INSERT INTO made VALUES ('a', add_server('one', 'One of A', '{"url": "https://a.example/mcp"}', :a)),
                        ('b', add_server('one', 'One of B', '{"url": "https://b.example/mcp"}', :b));
INSERT INTO system_servers (id, name, config, enabled) VALUES ('open', 'Open', '{"url": "https://open.example/mcp"}', true),
                                                              ('closed', 'Closed', '{"url": "https://closed.example/mcp"}', false);
INSERT INTO made SELECT id, ref_id FROM system_servers;

-- ── Who begins a sync ──

SELECT pg_temp.as_user(:a);
INSERT INTO made VALUES ('job a', sync_server(pg_temp.made('a')));
SELECT results_eq('SELECT user_id, job_type, server_id, tool_name, params, status, priority FROM job_results',
                  format($$SELECT %L::uuid, 'server_sync', 'one', NULL::text, '{}'::jsonb, 'pending', 5::smallint$$, :a), 'a user syncs an own server, in a job');
SELECT is(sync_server(pg_temp.made('a')), pg_temp.made('job a'), 'which is the same one as long as it is not finished');
SELECT is(sync_server(pg_temp.made('b')), NULL, 'a server of somebody else''s is not found');
SELECT is(sync_server(gen_random_uuid()), NULL, 'nor one that is nobody''s');
SELECT is(sync_server(NULL), NULL, 'nor none');
SELECT throws_ok($$SELECT sync_server(pg_temp.made('open'))$$, '42501', 'the server "open" is everybody''s, and not synced by users', 'a system server is not for users');
SELECT is(sync_server(pg_temp.made('closed')), NULL, 'and one that they do not see is not found');
SELECT update_server(pg_temp.made('a'), p_enabled => false);
SELECT throws_ok($$SELECT sync_server(pg_temp.made('a'))$$, '22023', 'the server "one" is disabled', 'a disabled one is not synced');
SELECT update_server(pg_temp.made('a'), p_enabled => true);
SELECT throws_ok($$SELECT create_job(NULL, 'server_sync', 'one')$$, '22023', 'server_sync jobs are not made by hand', 'create_job makes no such jobs');
SET LOCAL ROLE service_role;
SELECT isnt(sync_server(pg_temp.made('b')), NULL, 'service_role syncs a user''s server');
SELECT isnt(sync_server(pg_temp.made('open')), NULL, 'and everybody''s');
SELECT throws_ok($$SELECT sync_server(pg_temp.made('closed'))$$, '22023', 'the server "closed" is disabled', 'but no disabled one');
RESET ROLE;
SELECT results_eq($$SELECT server_type, user_id, server_id, job_id = pg_temp.made('job a'), requested_at = now(), tries, synced_at, expires_at, failed_at, error FROM server_syncs WHERE server_ref_id = pg_temp.made('a')$$,
                  format($$SELECT 'user', %L::uuid, 'one', true, true, 1, NULL::timestamptz, NULL::timestamptz, NULL::timestamptz, NULL::text$$, :a), 'server_syncs tells of it');
SELECT results_eq($$SELECT j.user_id, j.server_id FROM job_results j JOIN server_syncs y ON y.job_id = j.id WHERE y.server_ref_id = pg_temp.made('open')$$,
                  $$VALUES (NULL::uuid, 'open')$$, 'the job of a system server is nobody''s');
UPDATE job_results SET status = 'cancelled' WHERE id = pg_temp.made('job a');
SELECT isnt(sync_server(pg_temp.made('a')), pg_temp.made('job a'), 'after a job that is finished there is another one');

-- ── What its end writes ──

CREATE FUNCTION pg_temp.settle(server text, catalogue text, problem text DEFAULT NULL, ttl integer DEFAULT 60) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    job uuid;
BEGIN
    SELECT y.job_id INTO job FROM server_syncs y WHERE y.server_ref_id = pg_temp.made(server);
    UPDATE job_results SET status = 'running', lease = job WHERE id = job;
    RETURN (SELECT concat_ws(': ', s.outcome, s.answer) FROM _nexus_hub.settle_sync(job, job, catalogue, problem, ttl) s);
END
$$;
CREATE FUNCTION pg_temp.tools(server text) RETURNS text LANGUAGE sql AS
$$ SELECT string_agg(tool_name, ',' ORDER BY tool_name) FROM tool_cache WHERE server_ref_id = pg_temp.made(server) $$;
\set catalogue '{"tools": [{"name": "add", "title": "Add", "description": "Adds", "inputSchema": {"type": "object", "x": 1.10}, "more": [null]}, {"name": "bare"}], "resources": [{"uri": "note://x", "name": "x", "title": "X", "description": "A note", "mimeType": "text/plain"}], "resourceTemplates": [{"uriTemplate": "note://{id}", "name": "any"}], "prompts": [{"name": "ask", "title": "Ask", "description": "Asks", "arguments": [{"name": "what", "required": true}]}]}'

SELECT is(pg_temp.settle('a', :'catalogue'), 'written: {"tools": 2, "prompts": 1, "left_out": 0, "resources": 1, "resource_templates": 1}', 'the result tells how much there is');
SELECT results_eq($$SELECT server_type, user_id, tool_name, namespaced_name, title, description, input_schema::text, definition - 'inputSchema', enabled, changed_at = created_at, updated_at = created_at, expires_at - updated_at
                      FROM tool_cache ORDER BY tool_name$$,
    format($$VALUES ('user', %1$L::uuid, 'add', 'one__add', 'Add', 'Adds', '{"x": 1.10, "type": "object"}', '{"name": "add", "title": "Add", "description": "Adds", "more": [null]}'::jsonb, true, true, true, interval '1 hour'),
                    ('user', %1$L, 'bare', 'one__bare', NULL, NULL, '{"type": "object"}', '{"name": "bare"}', true, true, true, '1 hour')$$, :a), 'tools are written whole');
SELECT results_eq('SELECT server_type, user_id, uri, is_template, name, title, description, mime_type FROM resource_cache ORDER BY is_template',
    format($$VALUES ('user', %1$L::uuid, 'note://x', false, 'x', 'X', 'A note', 'text/plain'), ('user', %1$L, 'note://{id}', true, 'any', NULL, NULL, NULL)$$, :a), 'and resources, and templates');
SELECT results_eq('SELECT server_type, user_id, prompt_name, namespaced_name, title, description, arguments FROM prompt_cache',
    format($$VALUES ('user', %1$L::uuid, 'ask', 'one__ask', 'Ask', 'Asks', '[{"name": "what", "required": true}]'::jsonb)$$, :a), 'and prompts');
SELECT results_eq($$SELECT tries, synced_at IS NOT NULL, expires_at - synced_at, failed_at, error FROM server_syncs WHERE server_ref_id = pg_temp.made('a')$$,
                  $$VALUES (0, true, interval '1 hour', NULL::timestamptz, NULL::text)$$, 'server_syncs tells that it went well');

CREATE TEMP TABLE before AS SELECT id, tool_name, created_at, changed_at, updated_at FROM tool_cache;
UPDATE tool_cache SET enabled = false WHERE tool_name = 'add';
SELECT is(pg_temp.settle('a', '{"tools": [{"name": "add", "description": "Does something else now"}, {"name": "new"}], "resources": [], "resourceTemplates": [], "prompts": []}'),
          'written: {"tools": 2, "prompts": 0, "left_out": 0, "resources": 0, "resource_templates": 0}', 'the next sync finds others');
SELECT is(pg_temp.tools('a'), 'add,new', 'what the server has no more is gone');
SELECT is_empty('SELECT FROM resource_cache UNION ALL SELECT FROM prompt_cache', 'of all kinds');
SELECT results_eq($$SELECT t.id = b.id, t.created_at = b.created_at, t.changed_at > b.changed_at, t.updated_at = t.changed_at, t.enabled, t.input_schema FROM tool_cache t JOIN before b USING (tool_name)$$,
                  $$VALUES (true, true, true, true, false, '{"type": "object"}'::jsonb)$$, 'what has changed is the same entry, with the time; whether it is enabled is the user''s');
SELECT pg_temp.settle('a', '{"tools": [{"description": "Does something else now", "name": "add"}]}');
SELECT results_eq($$SELECT updated_at > changed_at FROM tool_cache WHERE tool_name = 'add'$$, $$VALUES (true)$$, 'what has not changed keeps that time');

SELECT is(pg_temp.settle('a', NULL, 'could not connect'), 'written', 'a sync that has failed');
SELECT is(pg_temp.tools('a'), 'add', 'leaves what is there');
SELECT results_eq($$SELECT error, failed_at > synced_at, expires_at > now() FROM server_syncs WHERE server_ref_id = pg_temp.made('a')$$, $$VALUES ('could not connect', true, true)$$, 'and server_syncs says why');
SELECT is(pg_temp.settle('a', '{"tools": [{"name": "add", "description": "\ud800"}]}') LIKE 'failed: what the server lists cannot be stored: %', true, 'as it does of what cannot be stored');
SELECT is(pg_temp.tools('a'), 'add', 'of which nothing is');
SELECT is((SELECT error LIKE 'what the server lists cannot be stored: %' FROM server_syncs WHERE server_ref_id = pg_temp.made('a')), true, 'with its error');
SELECT is(pg_temp.settle('a', '{"tools": [{"name": "a"}]}'), 'written: {"tools": 1, "prompts": 0, "left_out": 0, "resources": 0, "resource_templates": 0}', 'until one goes well again');
SELECT is((SELECT error FROM server_syncs WHERE server_ref_id = pg_temp.made('a')), NULL, 'which ends it');

SELECT is(pg_temp.settle('a', format('{"tools": [{"name": "twice", "title": "1"}, {"name": "twice", "title": "2"}, {"name": ""}, {"name": 7}, {}, null, "x", [], {"name": %s}], "resources": [{"uri": %s}, {"uri": "ok"}]}',
                                     to_json(repeat('x', 201)), to_json(repeat('x', 2001)))),
          'written: {"tools": 1, "prompts": 0, "left_out": 9, "resources": 1, "resource_templates": 0}', 'what has no name, or too long a one, is left out, and counted');
SELECT is((SELECT title FROM tool_cache), '1', 'and of two of one name the first is taken');
SELECT is((SELECT outcome FROM _nexus_hub.settle_sync(pg_temp.made('job a'), pg_temp.made('job a'), '{}', NULL, 60)), 'gone', 'a job that does not run any more writes nothing');
SELECT is(pg_temp.tools('a'), 'twice', 'nothing at all');
SELECT is(pg_temp.settle('open', :'catalogue') LIKE 'written: %', true, 'a system server is synced');
SELECT is(pg_temp.settle('b', :'catalogue') LIKE 'written: %', true, 'and another user''s');

-- ── Who sees it ──

SELECT pg_temp.as_user(:a);
SELECT set_eq('SELECT namespaced_name FROM tool_cache', '{one__twice,open__add,open__bare}'::text[], 'a user sees the tools of own servers and of everybody''s');
SELECT set_eq('SELECT uri, user_id IS NULL FROM resource_cache', $$VALUES ('ok', false), ('note://x', true), ('note://{id}', true)$$, 'and the resources');
SELECT set_eq('SELECT namespaced_name FROM prompt_cache', '{open__ask}'::text[], 'and the prompts');
SELECT set_eq('SELECT server_ref_id FROM server_syncs', $$SELECT pg_temp.made('a')$$, 'but not how everybody''s are synced');
UPDATE tool_cache SET enabled = false;
SELECT set_eq('SELECT namespaced_name FROM tool_cache WHERE NOT enabled', '{one__twice}'::text[], 'and disables own tools alone');
SELECT set_config('request.jwt.claims', '', true);
SELECT set_eq('SELECT namespaced_name FROM tool_cache', '{open__add,open__bare}'::text[], 'who has no id sees those of everybody''s servers');
RESET ROLE;
UPDATE system_servers SET enabled = false WHERE id = 'open';
SELECT pg_temp.as_user(:b);
SELECT set_eq('SELECT namespaced_name FROM tool_cache', '{one__add,one__bare}'::text[], 'of a system server that is disabled users see nothing');
RESET ROLE;
SET LOCAL ROLE service_role;
SELECT is((SELECT count(*) FROM tool_cache), 5::bigint, 'service_role sees all');
RESET ROLE;

-- ── What expires ──

SELECT is_empty('SELECT * FROM refresh_expired_cache_entries()', 'nothing is expired');
UPDATE job_results SET status = 'cancelled';
UPDATE tool_cache SET expires_at = now() - interval '1 second';
UPDATE prompt_cache SET expires_at = now() - interval '1 second';
SET LOCAL ROLE service_role;
SELECT set_eq('SELECT * FROM refresh_expired_cache_entries()', format($$VALUES (pg_temp.made('open'), 'system', NULL::uuid), (pg_temp.made('b'), 'user', %L)$$, :b), 'expired entries are told by server, but not of disabled tools');
SELECT is((SELECT count(*) FROM refresh_expired_cache_entries()), 2::bigint, 'as long as they are');
RESET ROLE;
SELECT set_eq($$SELECT user_id, server_id, priority FROM job_results WHERE status = 'pending'$$, format($$VALUES (%L::uuid, 'one', 7)$$, :b), 'and a sync is begun, once, behind what users ask for, of servers that are enabled');
UPDATE server_syncs SET expires_at = now() - interval '1 second' WHERE server_ref_id = pg_temp.made('a');
SELECT set_has('SELECT server_ref_id FROM refresh_expired_cache_entries()', $$SELECT pg_temp.made('a')$$, 'a server that has listed nothing expires, too');

-- ── What goes with its server ──

SELECT delete_server(pg_temp.made('b'));
SELECT is_empty($$SELECT server_ref_id FROM tool_cache WHERE server_ref_id = pg_temp.made('b') UNION ALL SELECT server_ref_id FROM resource_cache WHERE server_ref_id = pg_temp.made('b')
                  UNION ALL SELECT server_ref_id FROM prompt_cache WHERE server_ref_id = pg_temp.made('b') UNION ALL SELECT server_ref_id FROM server_syncs WHERE server_ref_id = pg_temp.made('b')$$,
                'nothing is left of a server that is deleted');
SELECT is(pg_temp.tools('open'), 'add,bare', 'and everything of others');
DELETE FROM system_servers WHERE id = 'open';
SELECT is(pg_temp.tools('open'), NULL, 'nor of a system server');
UPDATE user_servers SET user_id = :b WHERE id = pg_temp.made('a');
SELECT is(pg_temp.tools('a'), NULL, 'nor of one that gets another owner');

-- ── What the tables refuse ──

SELECT throws_ok($$INSERT INTO tool_cache (server_ref_id, server_type, tool_name, namespaced_name) VALUES (gen_random_uuid(), 'user', 't', 's__t')$$, '23514', NULL, 'an entry of a user''s server has an owner');
SELECT throws_ok($$INSERT INTO resource_cache (server_ref_id, server_type, user_id, uri) VALUES (gen_random_uuid(), 'system', gen_random_uuid(), 'u')$$, '23514', NULL, 'one of everybody''s has none');
SELECT throws_ok($$INSERT INTO prompt_cache (server_ref_id, server_type, prompt_name, namespaced_name) VALUES (gen_random_uuid(), 'group', 'p', 's__p')$$, '23514', NULL, 'and there are no others');

SELECT * FROM finish();
ROLLBACK;
