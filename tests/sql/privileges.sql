-- Who may do what at all. Which rows, is in rls.sql.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

-- Roles that look around must reach pgTAP, and anon the install schema: it is the grants inside that are tested.
GRANT USAGE ON SCHEMA :"schema" TO anon;

CREATE FUNCTION pg_temp.as_role(role text) RETURNS void LANGUAGE sql
AS $$ SELECT set_config('request.jwt.claims', '{"sub": "aaaaaaaa-0000-4000-8000-000000000001"}', true), set_config('role', role, true) $$;

CREATE TEMP VIEW extension_function AS
    SELECT p.oid, n.nspname, p.proname, p.prorettype = 'trigger'::regtype AS is_trigger,
           format('SELECT %I.%I(%s)', n.nspname, p.proname,
                  (SELECT string_agg(format('NULL::%s', format_type(t, NULL)), ', ') FROM unnest(p.proargtypes) AS t)) AS call
      FROM pg_extension e
      JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'
      JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
      JOIN pg_namespace n ON n.oid = p.pronamespace
     WHERE e.extname = 'nexus_hub';
CREATE TEMP VIEW extension_table AS
    SELECT c.oid, n.nspname, c.relname, c.relkind, format('%I.%I', n.nspname, c.relname) AS name,
           (SELECT a.attname FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum = 1) AS first_column
      FROM pg_extension e
      JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'
      JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE e.extname = 'nexus_hub';
-- Every right that somebody other than the owner has.
CREATE TEMP VIEW granted AS
    SELECT object, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END AS grantee, a.privilege_type, a.is_grantable
      FROM (SELECT p.oid::regprocedure::text, coalesce(p.proacl, acldefault('f', p.proowner)), p.proowner
              FROM pg_proc p JOIN extension_function f ON f.oid = p.oid
            UNION ALL
            SELECT t.name, coalesce(c.relacl, acldefault('r', c.relowner)), c.relowner
              FROM pg_class c JOIN extension_table t ON t.oid = c.oid
            UNION ALL
            SELECT t.name || '.' || att.attname, att.attacl, c.relowner
              FROM pg_class c JOIN extension_table t ON t.oid = c.oid JOIN pg_attribute att ON att.attrelid = c.oid
            UNION ALL
            SELECT 'schema ' || n.nspname, coalesce(n.nspacl, acldefault('n', n.nspowner)), n.nspowner
              FROM pg_namespace n WHERE n.nspname = '_nexus_hub') AS o (object, acl, owner)
     CROSS JOIN LATERAL aclexplode(o.acl) AS a
     WHERE a.grantee <> o.owner;
GRANT SELECT ON extension_function, extension_table TO PUBLIC;

-- ── _nexus_hub and PUBLIC ──

SELECT is_empty(
    $$SELECT rolname, privilege
        FROM (SELECT rolname::text FROM pg_roles WHERE NOT rolsuper AND rolname NOT LIKE 'pg\_%' UNION ALL SELECT 'public') AS r,
             unnest(ARRAY['USAGE', 'CREATE']) AS privilege
       WHERE has_schema_privilege(rolname, '_nexus_hub', privilege)$$,
    'nobody but the owner has USAGE or CREATE on _nexus_hub');
-- Trigger functions need no exception: EXECUTE is asked for when a trigger is made, not when it fires.
SELECT set_eq(
    $$SELECT object, privilege_type FROM granted WHERE grantee = 'PUBLIC'$$,
    $$VALUES ('nexus_hub_uid()', 'EXECUTE'), ('_nexus_hub.is_service_role()', 'EXECUTE'), ('_nexus_hub.uuid_v7()', 'EXECUTE'), ('_nexus_hub.url_authority(text)', 'EXECUTE'),
              ('_nexus_hub.is_job(text,text,text,boolean,boolean)', 'EXECUTE'), ('_nexus_hub.is_job_state(text,boolean,boolean,boolean,boolean)', 'EXECUTE'),
              ('_nexus_hub.are_job_options(integer,timestamp with time zone,integer,integer,text)', 'EXECUTE'), ('_nexus_hub.gateway_base_url(text)', 'EXECUTE'),
              ('insert_user_api_key(uuid,text,text)', 'EXECUTE'), ('get_user_api_key(uuid,text)', 'EXECUTE'), ('delete_user_api_key(uuid,text)', 'EXECUTE'),
              ('touch_user_api_key(uuid,text)', 'EXECUTE'), ('upsert_user_gateway_config(uuid,text)', 'EXECUTE'), ('delete_user_gateway_config(uuid)', 'EXECUTE'),
              ('get_user_gateway_base_url(uuid)', 'EXECUTE'), ('get_user_allow_gateway_fallback(uuid)', 'EXECUTE'), ('resolve_provider(uuid,text)', 'EXECUTE'),
              ('_nexus_hub.require_service_role(boolean)', 'EXECUTE'), ('_nexus_hub.note_vault_use(text,text)', 'EXECUTE'), ('_nexus_hub.require_service_role_for(boolean,text,uuid,text)', 'EXECUTE')$$,
    'PUBLIC may execute what policies, defaults, generated columns and constraints call, what says by itself that it is for the service role, what notes a use of the vault, and nothing else');
SELECT is_empty($$SELECT * FROM granted WHERE is_grantable$$, 'nobody may pass a right on');
SELECT is_empty($$SELECT g.* FROM granted g JOIN extension_table t ON starts_with(g.object, t.name) WHERE t.nspname = '_nexus_hub' AND t.relname <> 'secrets'$$,
                'the views and tables in _nexus_hub are granted to nobody, but for named secrets');
SELECT set_eq(
    $$SELECT CASE WHEN object = '_nexus_hub.secrets' THEN '' ELSE split_part(object, '.', 3) END, privilege_type, grantee FROM granted WHERE object ~ '^_nexus_hub\.secrets(\.|$)'$$,
    $$SELECT column_name, 'SELECT' AS privilege, 'authenticated' AS grantee FROM unnest(ARRAY['id', 'user_id', 'name', 'created_at', 'updated_at']) AS column_name
      UNION ALL SELECT column_name, 'INSERT', 'authenticated' FROM unnest(ARRAY['user_id', 'name', 'value_encrypted']) AS column_name
      UNION ALL SELECT column_name, 'UPDATE', 'authenticated' FROM unnest(ARRAY['value_encrypted', 'updated_at']) AS column_name
      UNION ALL VALUES ('', 'DELETE', 'authenticated')
      UNION ALL SELECT '', privilege, 'service_role' FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege$$,
    'of those, authenticated never reads a ciphertext; only functions reach them');
-- What the public functions call with the caller's rights. All else in _nexus_hub is for the worker.
SELECT set_eq(
    $$SELECT f.proname::text, g.grantee FROM granted g JOIN extension_function f ON g.object = f.oid::regprocedure::text
       WHERE f.nspname = '_nexus_hub' AND g.grantee <> 'PUBLIC' AND f.proname <> 'url_authority'$$,
    $$SELECT name, grantee FROM unnest(ARRAY['owner', 'server_exists', 'server_id', 'seal_server_config', 'check_secret', 'seal_secret', 'secret_context', 'secret_exists', 'secret_owner', 'check_job', 'check_job_options', 'job_of_key', 'job_of_key_gone',
                                             'begin_sync', 'cannot_sync', 'wake_worker', 'job_not_found', 'await_job', 'cancel_unfinished_job', 'retry_finished_jobs']) AS name,
                                unnest(ARRAY['authenticated', 'service_role']) AS grantee
      UNION ALL VALUES ('decrypt_json', 'service_role'), ('rotate_values', 'service_role'), ('vault_key_state', 'service_role'), ('vault_column_list', 'service_role'), ('launch_rotation', 'service_role'), ('set_rotation_paused', 'service_role'), ('primary_vault_key', 'service_role'), ('api_key_context', 'service_role'), ('api_service', 'service_role'), ('api_key', 'service_role'),
                       ('model_provider', 'service_role'), ('model_name', 'service_role'), ('no_api_key', 'service_role'),
                       ('open_secret', 'service_role'), ('api_key_object', 'service_role'),
                       ('health', 'service_role'), ('alerts', 'service_role'), ('health_summary', 'service_role'),
                       ('metrics_page', 'service_role'), ('metrics_page', 'pg_monitor'), ('health', 'pg_monitor'), ('alerts', 'pg_monitor'), ('health_summary', 'pg_monitor'),
                       ('refresh_expired', 'service_role'), ('cleanup_jobs', 'service_role'), ('job_retention', 'service_role'), ('days', 'service_role'),
                       ('limit_request', 'service_role'), ('answer_request', 'service_role'), ('rate_limit_minutes', 'service_role'), ('rate_limit_statistics', 'service_role')$$,
    'of the internal functions, only those that public ones call are granted');

-- ── anon ──

SELECT is_empty($$SELECT * FROM granted WHERE grantee = 'anon'$$, 'anon has been granted nothing');
SELECT pg_temp.as_role('anon');
SELECT throws_ok(call, '42501', NULL, format('anon cannot call %s.%s', CASE nspname WHEN '_nexus_hub' THEN nspname ELSE 'public' END, proname))
  FROM extension_function WHERE proname <> 'nexus_hub_uid' ORDER BY nspname, proname;
SELECT throws_ok(format(statement, name, first_column), '42501', NULL, format('anon cannot %s %s', split_part(statement, ' ', 1), relname))
  FROM extension_table,
       unnest(ARRAY['SELECT FROM %s', 'INSERT INTO %s DEFAULT VALUES', 'UPDATE %1$s SET %2$I = %2$I', 'DELETE FROM %s', 'TRUNCATE %s']) AS statement
 -- What nobody could do to a view says so first.
 WHERE relkind <> 'v' OR statement ~ '^SELECT'
 ORDER BY relname, statement;
SELECT lives_ok(format('SELECT %I.nexus_hub_uid()', :'schema'), 'anon can call nexus_hub_uid');
RESET ROLE;

-- ── authenticated ──

SELECT set_eq(
    format($$SELECT t.relname::text, privilege, string_agg(a.attname, ' ' ORDER BY a.attname::text COLLATE "C")
        FROM extension_table t JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped,
             unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) AS privilege
       WHERE t.nspname = %L          AND has_column_privilege('authenticated', t.oid, a.attnum, privilege)
         AND (t.relname, privilege) NOT IN (('job_results', 'SELECT'), ('job_attempts', 'SELECT'), ('tool_cache', 'SELECT'), ('resource_cache', 'SELECT'), ('prompt_cache', 'SELECT'), ('server_syncs', 'SELECT'))
       GROUP BY 1, 2$$, :'schema'),
    $$VALUES
    ('user_servers', 'SELECT', 'created_at enabled id name rate_limit_per_minute server_id transport updated_at user_id'),
    ('user_servers', 'INSERT', 'config_encrypted enabled name server_id transport user_id'),
    ('user_servers', 'UPDATE', 'config_encrypted enabled name updated_at'),
    ('system_servers', 'SELECT', 'created_at enabled id name rate_limit_per_minute ref_id'),
    ('job_results', 'INSERT', 'idempotency_key job_type max_attempts params priority run_at server_id status timeout_ms tool_name user_id'),
    ('tool_cache', 'UPDATE', 'enabled'),
    ('api_keys', 'SELECT', 'created_at id last_used_at service updated_at user_id'),
    ('api_gateway_configs', 'SELECT', 'base_url created_at id updated_at user_id'),
    ('user_settings', 'SELECT', 'allow_gateway_fallback created_at updated_at user_id'),
    ('user_settings', 'INSERT', 'allow_gateway_fallback user_id'),
    ('user_settings', 'UPDATE', 'allow_gateway_fallback user_id')$$,
    'authenticated reads no config, and writes no column that is not a user''s to write');
SELECT is_empty(
    $$SELECT name, privilege FROM extension_table, unnest(ARRAY['TRUNCATE', 'REFERENCES', 'TRIGGER', 'DELETE']) AS privilege
       WHERE has_table_privilege('authenticated', oid, privilege) AND (relname, privilege) NOT IN (('user_servers', 'DELETE'), ('secrets', 'DELETE'))$$,
    'authenticated deletes servers and named secrets alone, and truncates nothing');

SELECT pg_temp.as_role('authenticated');
SELECT throws_ok(call, '42501', NULL, format('authenticated cannot call %s', proname))
  FROM extension_function WHERE proname ~ '^(en|de)crypt_|^http_|^rotate_|_vault_|_user_|rate_limit|^resolve_provider$|^refresh_expired|^backup_' AND nspname <> '_nexus_hub' ORDER BY proname;
SELECT throws_ok(call, '42501', NULL, format('authenticated cannot call _nexus_hub.%s', proname))
  FROM extension_function WHERE nspname = '_nexus_hub' ORDER BY proname;
SELECT throws_ok(statement, '42501', NULL, format('authenticated cannot: %s', statement))
  FROM unnest(ARRAY[
    'SELECT config_encrypted FROM user_servers',
    'SELECT * FROM user_servers',
    'SELECT id FROM user_servers WHERE config_encrypted IS NOT NULL',
    'UPDATE user_servers SET name = name RETURNING config_encrypted',
    'UPDATE user_servers SET user_id = user_id',
    'SELECT config FROM system_servers',
    'SELECT * FROM system_servers',
    'INSERT INTO system_servers (id, name, config) VALUES (''s'', ''s'', ''{}'')',
    'UPDATE system_servers SET enabled = true',
    'DELETE FROM system_servers',
    'UPDATE job_results SET status = ''completed''',
    'UPDATE job_results SET result = ''{}''',
    'DELETE FROM job_results',
    'TRUNCATE job_results',
    'UPDATE job_results SET priority = 9',
    'UPDATE job_results SET run_at = now()',
    'UPDATE job_results SET attempt = 0',
    'INSERT INTO job_attempts (job_id, attempt, started_at, error) VALUES (gen_random_uuid(), 1, now(), ''e'')',
    'UPDATE job_attempts SET error = ''e''',
    'DELETE FROM job_attempts',
    'TRUNCATE job_attempts',
    'SELECT FROM circuit_breakers',
    'INSERT INTO circuit_breakers (host, worker, state, failures, probe_at, error) VALUES (''h:80'', 0, ''open'', 5, now(), ''e'')',
    'UPDATE circuit_breakers SET state = ''open''',
    'DELETE FROM circuit_breakers',
    'INSERT INTO tool_cache (server_ref_id, server_type, user_id, tool_name, namespaced_name) VALUES (gen_random_uuid(), ''user'', nexus_hub_uid(), ''t'', ''s__t'')',
    'UPDATE tool_cache SET description = ''d''',
    'UPDATE tool_cache SET user_id = user_id',
    'DELETE FROM tool_cache',
    'INSERT INTO resource_cache (server_ref_id, server_type, user_id, uri) VALUES (gen_random_uuid(), ''user'', nexus_hub_uid(), ''u'')',
    'UPDATE resource_cache SET name = ''n''',
    'DELETE FROM resource_cache',
    'INSERT INTO prompt_cache (server_ref_id, server_type, user_id, prompt_name, namespaced_name) VALUES (gen_random_uuid(), ''user'', nexus_hub_uid(), ''p'', ''s__p'')',
    'UPDATE prompt_cache SET title = ''t''',
    'DELETE FROM prompt_cache',
    'INSERT INTO server_syncs (server_ref_id, server_type, user_id, server_id) VALUES (gen_random_uuid(), ''user'', nexus_hub_uid(), ''s'')',
    'UPDATE server_syncs SET tries = 0',
    'DELETE FROM server_syncs',
    'INSERT INTO job_results (user_id, job_type, server_id) VALUES (nexus_hub_uid(), ''server_sync'', ''s'')',
    'SELECT api_key_encrypted FROM api_keys',
    'SELECT * FROM api_keys',
    'SELECT id FROM api_keys WHERE api_key_encrypted IS NOT NULL',
    'SELECT k FROM api_keys k',
    'INSERT INTO api_keys (user_id, service, api_key_encrypted) VALUES (nexus_hub_uid(), ''openai'', decode(repeat(''00'', 28), ''hex''))',
    'UPDATE api_keys SET user_id = user_id',
    'DELETE FROM api_keys',
    'INSERT INTO api_gateway_configs (user_id, base_url) VALUES (nexus_hub_uid(), ''https://host'')',
    'UPDATE api_gateway_configs SET base_url = ''https://host''',
    'DELETE FROM api_gateway_configs',
    'UPDATE user_settings SET updated_at = now()',
    'DELETE FROM user_settings',
    'SELECT FROM vault_audit',
    'SELECT FROM rate_limit_tracking',
    'SELECT FROM rate_limit_stats',
    'SELECT FROM rate_limit_exemptions',
    'INSERT INTO rate_limit_exemptions (identifier) VALUES (nexus_hub_uid())',
    'SELECT FROM rate_limit_overrides',
    'INSERT INTO rate_limit_overrides (user_id, request_limit) VALUES (nexus_hub_uid(), 1000)',
    'SHOW nexus_hub.vault_key_file']) AS statement;
SELECT throws_ok(format('INSERT INTO job_results (user_id, job_type, server_id, tool_name, %I)
                         VALUES (nexus_hub_uid(), ''tool_invoke'', ''s'', ''t'', NULL)', forbidden),
                 '42501', NULL, format('authenticated cannot insert a job''s %s', forbidden))
  FROM unnest(ARRAY['id', 'result', 'error', 'created_at', 'started_at', 'completed_at', 'lease', 'attempt', 'crashes', 'failures']) AS forbidden;
RESET ROLE;

-- ── service_role ──

SELECT is_empty(
    $$SELECT call FROM extension_function
       WHERE nspname <> '_nexus_hub' AND proname NOT IN ('adopt_vault_key', 'register_vault_column', 'unregister_vault_column', 'cleanup_vault_audit', 'cleanup_rate_limit_tracking', 'backup_preflight') AND NOT has_function_privilege('service_role', oid, 'EXECUTE')$$,
    'service_role may execute every public function but adopt_vault_key, cleanup_vault_audit, cleanup_rate_limit_tracking, backup_preflight, and those for tables'' owners');
SELECT is(has_function_privilege('service_role', format('%I.adopt_vault_key()', :'schema'), 'EXECUTE'), false, 'which is the owner''s alone');
SELECT is(has_function_privilege('service_role', format('%I.cleanup_vault_audit(integer)', :'schema'), 'EXECUTE'), false, 'and so is that: who is audited cannot erase');
SELECT is(has_function_privilege('service_role', format('%I.cleanup_rate_limit_tracking(integer)', :'schema'), 'EXECUTE'), false, 'and that');
SELECT is(has_function_privilege('service_role', format('%I.backup_preflight()', :'schema'), 'EXECUTE'), false, 'and that');
SELECT set_eq(
    $$SELECT relname::text, privilege
        FROM extension_table, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS privilege
       WHERE nspname <> '_nexus_hub' AND has_table_privilege('service_role', oid, privilege)$$,
    $$SELECT relname, privilege FROM unnest(ARRAY['system_servers', 'user_servers', 'job_results', 'api_keys', 'api_gateway_configs', 'user_settings', 'tool_cache', 'resource_cache', 'prompt_cache', 'server_syncs', 'rate_limit_exemptions', 'rate_limit_overrides']) AS relname,
                                     unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
      UNION ALL VALUES ('job_attempts', 'SELECT'), ('circuit_breakers', 'SELECT'), ('vault_keys', 'SELECT'),
                       ('vault_columns', 'SELECT'), ('vault_rotation', 'SELECT'), ('vault_rotation_errors', 'SELECT'),
                       ('vault_audit', 'SELECT'), ('nexus_hub_alerts', 'SELECT'), ('system_health_summary', 'SELECT'), ('rate_limit_tracking', 'SELECT'), ('rate_limit_stats', 'SELECT')$$,
    'service_role may read every public table, and write all but those that the worker alone writes');

SELECT pg_temp.as_role('service_role');
SELECT is(decrypt_token(encrypt_token('t', 'c'), 'c'), 't', 'service_role seals and opens tokens');
SELECT is(decrypt_config(encrypt_config('{"a": 1}')), '{"a": 1}', 'service_role seals and opens configs');
SELECT isnt(add_server('s', 'S', '{"url": "https://host/mcp"}', 'aaaaaaaa-0000-4000-8000-000000000001'), NULL,
            'service_role adds a server for a user');
SELECT is((SELECT decrypt_config(config_encrypted) ->> 'url' FROM user_servers WHERE server_id = 's'), 'https://host/mcp',
          'service_role reads a user''s config');
SELECT isnt(create_job(NULL, 'http_request', NULL, NULL, '{"url": "https://host/"}'), NULL, 'service_role creates an http_request job');
SELECT lives_ok($$INSERT INTO system_servers (id, name, config) VALUES ('s', 'S', '{"url": "https://host/mcp"}')$$,
                'service_role adds a system server');
SELECT isnt(http_get('https://host/'), NULL, 'service_role calls http_get');
SELECT isnt(http_post('https://host/'), NULL, 'service_role calls http_post');
SELECT isnt(http_request('PUT', 'https://host/'), NULL, 'service_role calls http_request');
SELECT is_empty('SELECT * FROM circuit_breakers', 'service_role reads circuit_breakers');
SELECT lives_ok('SELECT * FROM vault_audit', 'service_role reads vault_audit');
SELECT isnt(insert_user_api_key('aaaaaaaa-0000-4000-8000-000000000001', 'openai', 'k'), NULL, 'service_role stores a user''s API key');
SELECT is(get_user_api_key('aaaaaaaa-0000-4000-8000-000000000001', 'openai'), 'k', 'service_role reads a user''s API key');
SELECT is(cleanup_old_job_results(), 0, 'service_role cleans up');
SELECT is((cleanup_job_results_manual()).total_deleted, 0, 'by hand, too');
SELECT is(check_rate_limit('s', NULL, 10), true, 'service_role calls check_rate_limit');
SELECT is((rate_limit('k', 10)).remaining, 9, 'service_role calls rate_limit');
SELECT is((SELECT count(*) FROM rate_limit_all('{a,b}', '{1,1}')), 2::bigint, 'service_role calls rate_limit_all');
SELECT is(reset_rate_limit('k'), true, 'service_role resets a limit');
SELECT is((SELECT request_count FROM rate_limit_tracking WHERE server_id = 's' ORDER BY window_start DESC LIMIT 1), 1, 'service_role reads rate_limit_tracking');
SELECT is((SELECT count(*) FROM rate_limit_stats), 1::bigint, 'service_role reads rate_limit_stats');
SELECT lives_ok($$INSERT INTO rate_limit_exemptions (identifier) VALUES ('i')$$, 'service_role makes exemptions');
SELECT lives_ok($$INSERT INTO rate_limit_overrides (key, request_limit) VALUES ('k', 5)$$, 'service_role makes overrides');
SELECT throws_ok(statement, '42501', NULL, format('service_role cannot: %s', statement))
  FROM unnest(ARRAY[
    'INSERT INTO job_attempts (job_id, attempt, started_at, error) VALUES (gen_random_uuid(), 1, now(), ''e'')',
    'UPDATE job_attempts SET error = ''e''',
    'DELETE FROM job_attempts',
    'INSERT INTO circuit_breakers (host, worker, state, failures, probe_at, error) VALUES (''h:80'', 0, ''open'', 5, now(), ''e'')',
    'UPDATE circuit_breakers SET state = ''open''',
    'DELETE FROM circuit_breakers',
    'INSERT INTO vault_audit (at, kind, outcome, count) VALUES (now(), ''get'', ''allowed'', 1)',
    'UPDATE vault_audit SET count = 1',
    'DELETE FROM vault_audit',
    'TRUNCATE job_results CASCADE']) AS statement;
SELECT throws_ok('SHOW nexus_hub.vault_key_file', '42501', NULL, 'service_role cannot see where the vault key is');
SELECT throws_ok(call, '42501', NULL, format('service_role cannot call _nexus_hub.%s', proname))
  FROM extension_function WHERE nspname = '_nexus_hub' ORDER BY proname;
RESET ROLE;

-- ── A role of somebody else's ──

CREATE ROLE nexus_hub_test_4;
GRANT USAGE ON SCHEMA :"schema" TO nexus_hub_test_4;
GRANT SELECT, INSERT ON job_results, job_attempts, user_servers, api_keys, api_gateway_configs, user_settings TO nexus_hub_test_4;
SELECT pg_temp.as_role('nexus_hub_test_4');
SELECT lives_ok($$INSERT INTO job_results (user_id, job_type, server_id, tool_name) VALUES (nexus_hub_uid(), 'tool_invoke', 's', 't')$$,
                'a role that was granted job_results needs no other right to insert an own job');
SELECT lives_ok($$INSERT INTO user_servers (user_id, server_id, name) VALUES (nexus_hub_uid(), 'another', 'Another')$$, 'nor one that was granted user_servers, for an own server');
SELECT lives_ok('SELECT * FROM job_attempts', 'nor one that was granted job_attempts');
SELECT lives_ok('INSERT INTO user_settings (user_id) VALUES (nexus_hub_uid())', 'nor one that was granted user_settings');
SELECT throws_ok($$INSERT INTO api_gateway_configs (user_id, base_url) VALUES (nexus_hub_uid(), 'https://host')$$, '42501', NULL,
                 'but one that was granted api_gateway_configs still writes none');
SELECT throws_ok($$INSERT INTO api_keys (user_id, service, api_key_encrypted) VALUES (nexus_hub_uid(), 'openai', decode(repeat('00', 28), 'hex'))$$, '42501', NULL, 'nor does one that was granted api_keys');
RESET ROLE;
DROP OWNED BY nexus_hub_test_4;
DROP ROLE nexus_hub_test_4;

-- ── Default privileges, as Supabase sets them ──

CREATE TEMP TABLE granted_before AS SELECT * FROM granted WHERE object NOT LIKE 'schema %';
-- In both scopes, because an install schema's and the database's own defaults add up.
ALTER DEFAULT PRIVILEGES IN SCHEMA :"schema" GRANT ALL ON TABLES TO anon, authenticated, service_role;
ALTER DEFAULT PRIVILEGES IN SCHEMA :"schema" GRANT ALL ON FUNCTIONS TO anon, authenticated, service_role;
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC, anon, authenticated, service_role;
ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO anon, authenticated, service_role;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO PUBLIC, anon, authenticated, service_role;
DROP EXTENSION nexus_hub;
CREATE EXTENSION nexus_hub SCHEMA :"schema";
SELECT set_eq($$SELECT * FROM granted WHERE object NOT LIKE 'schema %'$$, 'SELECT * FROM granted_before',
              'default privileges for tables and functions open nothing');
SELECT is_empty($$SELECT * FROM granted WHERE object LIKE 'schema %'$$,
                'default privileges for schemas do not open _nexus_hub');

SELECT * FROM finish();
ROLLBACK;
