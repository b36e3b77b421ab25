-- What there is: the public functions and tables as the contract names them, and rules that every object keeps.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

CREATE TEMP VIEW extension_function AS
    SELECT p.oid, n.nspname, p.proname, p.proacl, p.proowner, p.prosecdef, p.proconfig, p.provolatile,
           l.lanname, p.oid::regprocedure::text AS signature
      FROM pg_extension e
      JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'
      JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
      JOIN pg_namespace n ON n.oid = p.pronamespace
      JOIN pg_language l ON l.oid = p.prolang
     WHERE e.extname = 'nexus_hub';
CREATE TEMP VIEW extension_table AS
    SELECT c.oid, n.nspname, c.relname, c.relrowsecurity, c.relkind
      FROM pg_extension e
      JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'
      JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE e.extname = 'nexus_hub';

-- ── The API ──

SELECT is((SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'nexus_hub'),
          :'schema'::name, 'the extension is in the schema it was installed into');

SELECT set_eq(
    format('SELECT proname::text, pg_get_function_arguments(oid), pg_get_function_result(oid)
              FROM extension_function WHERE nspname = %L', :'schema'),
    $$VALUES
    ('nexus_hub_uid', '', 'uuid'),
    ('encrypt_token', 'token text, context text DEFAULT NULL::text', 'bytea'),
    ('decrypt_token', 'encrypted bytea, context text DEFAULT NULL::text', 'text'),
    ('encrypt_config', 'config jsonb, context text DEFAULT NULL::text', 'bytea'),
    ('decrypt_config', 'encrypted bytea, context text DEFAULT NULL::text', 'jsonb'),
    ('adopt_vault_key', '', 'text'),
    ('cleanup_vault_audit', 'p_days integer DEFAULT 90', 'integer'),
    ('nexus_hub_health', '', 'jsonb'),
    ('backup_preflight', '', 'TABLE(item text, state text, advice text)'),
    ('nexus_hub_metrics', '', 'nexus_hub_media_types."text/plain"'),
    ('sync_server', 'p_server_ref_id uuid', 'uuid'),
    ('refresh_expired_cache_entries', '', 'TABLE(server_ref_id uuid, server_type text, user_id uuid)'),
    ('cleanup_old_job_results', '', 'integer'),
    ('cleanup_job_results_manual', 'p_days_completed integer DEFAULT 7, p_days_orphaned integer DEFAULT 1', 'TABLE(deleted_completed integer, deleted_orphaned integer, total_deleted integer)'),
    ('cleanup_rate_limit_tracking', 'p_days integer DEFAULT 1', 'integer'),
    ('rotate_vault_key', '', 'TABLE(servers_updated integer, errors text[])'),
    ('start_vault_rotation', '', 'text'),
    ('pause_vault_rotation', '', 'boolean'),
    ('resume_vault_rotation', '', 'boolean'),
    ('register_vault_column', 'p_table regclass, p_column text, p_context text DEFAULT NULL::text', 'void'),
    ('unregister_vault_column', 'p_table regclass, p_column text', 'boolean'),
    ('add_server', 'p_server_id text, p_name text, p_config jsonb, p_user_id uuid DEFAULT NULL::uuid', 'uuid'),
    ('update_server', 'p_id uuid, p_name text DEFAULT NULL::text, p_config jsonb DEFAULT NULL::jsonb, p_enabled boolean DEFAULT NULL::boolean', 'boolean'),
    ('delete_server', 'p_id uuid', 'boolean'),
    ('list_servers', '', 'TABLE(id uuid, kind text, user_id uuid, server_id text, name text, transport text, enabled boolean, rate_limit_per_minute integer, created_at timestamp with time zone, updated_at timestamp with time zone)'),
    ('create_secret', 'p_name text, p_value text, p_user_id uuid DEFAULT NULL::uuid', 'uuid'),
    ('update_secret', 'p_name text, p_value text, p_user_id uuid DEFAULT NULL::uuid', 'boolean'),
    ('delete_secret', 'p_name text, p_user_id uuid DEFAULT NULL::uuid', 'boolean'),
    ('list_secrets', '', 'TABLE(id uuid, user_id uuid, name text, created_at timestamp with time zone, updated_at timestamp with time zone)'),
    ('create_job', 'p_user_id uuid, p_job_type text, p_server_id text, p_tool_name text DEFAULT NULL::text, p_params jsonb DEFAULT ''{}''::jsonb, p_priority integer DEFAULT NULL::integer, p_run_at timestamp with time zone DEFAULT NULL::timestamp with time zone, p_timeout_ms integer DEFAULT NULL::integer, p_max_attempts integer DEFAULT NULL::integer, p_idempotency_key text DEFAULT NULL::text', 'uuid'),
    ('http_request', 'method text, url text, body text DEFAULT NULL::text, headers jsonb DEFAULT ''{}''::jsonb, timeout_ms integer DEFAULT NULL::integer, priority integer DEFAULT NULL::integer, run_at timestamp with time zone DEFAULT NULL::timestamp with time zone, max_attempts integer DEFAULT NULL::integer, idempotency_key text DEFAULT NULL::text', 'uuid'),
    ('http_get', 'url text, headers jsonb DEFAULT ''{}''::jsonb, timeout_ms integer DEFAULT NULL::integer, priority integer DEFAULT NULL::integer, run_at timestamp with time zone DEFAULT NULL::timestamp with time zone, max_attempts integer DEFAULT NULL::integer, idempotency_key text DEFAULT NULL::text', 'uuid'),
    ('http_post', 'url text, body jsonb DEFAULT ''{}''::jsonb, headers jsonb DEFAULT ''{}''::jsonb, timeout_ms integer DEFAULT NULL::integer, priority integer DEFAULT NULL::integer, run_at timestamp with time zone DEFAULT NULL::timestamp with time zone, max_attempts integer DEFAULT NULL::integer, idempotency_key text DEFAULT NULL::text', 'uuid'),
    ('get_job_status', 'p_job_id uuid', 'TABLE(id uuid, job_type text, server_id text, tool_name text, status text, result jsonb, error text, created_at timestamp with time zone, started_at timestamp with time zone, completed_at timestamp with time zone, attempt integer, run_at timestamp with time zone)'),
    ('wait_for_job', 'p_job_id uuid, p_timeout_ms integer DEFAULT 30000', 'TABLE(id uuid, job_type text, server_id text, tool_name text, status text, result jsonb, error text, created_at timestamp with time zone, started_at timestamp with time zone, completed_at timestamp with time zone, attempt integer, run_at timestamp with time zone)'),
    ('cancel_job', 'p_job_id uuid', 'boolean'),
    ('retry_job', 'p_job_id uuid', 'boolean'),
    ('retry_failed_jobs', 'p_server_id text DEFAULT NULL::text, p_job_type text DEFAULT NULL::text, p_since timestamp with time zone DEFAULT NULL::timestamp with time zone, p_until timestamp with time zone DEFAULT NULL::timestamp with time zone', 'integer'),
    ('get_job_attempts', 'p_job_id uuid', 'TABLE(attempt integer, started_at timestamp with time zone, finished_at timestamp with time zone, http_status integer, error text)'),
    ('execute_job_via_pg_net', 'job_id uuid', 'void'),
    ('insert_user_api_key', 'p_user_id uuid, p_service text, p_api_key text', 'uuid'),
    ('get_user_api_key', 'p_user_id uuid, p_service text', 'text'),
    ('delete_user_api_key', 'p_user_id uuid, p_service text', 'boolean'),
    ('touch_user_api_key', 'p_user_id uuid, p_service text', 'void'),
    ('upsert_user_gateway_config', 'p_user_id uuid, p_base_url text', 'void'),
    ('delete_user_gateway_config', 'p_user_id uuid', 'void'),
    ('get_user_gateway_base_url', 'p_user_id uuid', 'text'),
    ('get_user_allow_gateway_fallback', 'p_user_id uuid', 'boolean'),
    ('resolve_provider', 'p_user_id uuid, p_model text', 'TABLE(provider text, model text, source text, service text, base_url text)'),
    ('check_rate_limit', 'p_server_id text, p_user_id uuid, p_limit_per_minute integer', 'boolean'),
    ('rate_limit', 'p_key text, p_limit integer, p_window_seconds integer DEFAULT 60, p_cost integer DEFAULT 1, p_burst integer DEFAULT NULL::integer, OUT allowed boolean, OUT "limit" integer, OUT remaining integer, OUT retry_after_seconds double precision, OUT reset_seconds double precision', 'record'),
    ('rate_limit_peek', 'p_key text, p_limit integer, p_window_seconds integer DEFAULT 60, p_cost integer DEFAULT 1, p_burst integer DEFAULT NULL::integer, OUT allowed boolean, OUT "limit" integer, OUT remaining integer, OUT retry_after_seconds double precision, OUT reset_seconds double precision', 'record'),
    ('rate_limit_all', 'p_keys text[], p_limits integer[], p_windows_seconds integer[] DEFAULT NULL::integer[], p_costs integer[] DEFAULT NULL::integer[], p_bursts integer[] DEFAULT NULL::integer[]', 'TABLE(key text, allowed boolean, "limit" integer, remaining integer, retry_after_seconds double precision, reset_seconds double precision)'),
    ('enforce_rate_limits', 'p_policies text[], p_keys text[], p_limits integer[], p_windows_seconds integer[] DEFAULT NULL::integer[], p_costs integer[] DEFAULT NULL::integer[], p_bursts integer[] DEFAULT NULL::integer[]', 'void'),
    ('reset_rate_limit', 'p_key text', 'boolean'),
    ('reset_server_rate_limit', 'p_server_id text, p_user_id uuid', 'boolean')$$,
    'the public functions are those of the contract, with its argument names, defaults and results');

SELECT set_has(
    format('SELECT t.relname::text, a.attname::text, format_type(a.atttypid, a.atttypmod), pg_get_expr(d.adbin, d.adrelid)
              FROM extension_table t
              JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
              LEFT JOIN pg_attrdef d ON d.adrelid = t.oid AND d.adnum = a.attnum
             WHERE t.nspname = %L', :'schema'),
    $$VALUES
    ('system_servers', 'id', 'text', NULL),
    ('system_servers', 'ref_id', 'uuid', 'gen_random_uuid()'),
    ('system_servers', 'name', 'text', NULL),
    ('system_servers', 'config', 'jsonb', NULL),
    ('system_servers', 'enabled', 'boolean', 'true'),
    ('system_servers', 'rate_limit_per_minute', 'integer', '60'),
    ('system_servers', 'created_at', 'timestamp with time zone', 'now()'),
    ('user_servers', 'id', 'uuid', 'gen_random_uuid()'),
    ('user_servers', 'user_id', 'uuid', NULL),
    ('user_servers', 'server_id', 'text', NULL),
    ('user_servers', 'name', 'text', NULL),
    ('user_servers', 'transport', 'text', '''http''::text'),
    ('user_servers', 'config_encrypted', 'bytea', NULL),
    ('user_servers', 'enabled', 'boolean', 'true'),
    ('user_servers', 'rate_limit_per_minute', 'integer', NULL),
    ('user_servers', 'created_at', 'timestamp with time zone', 'now()'),
    ('user_servers', 'updated_at', 'timestamp with time zone', 'now()'),
    ('job_results', 'id', 'uuid', '_nexus_hub.uuid_v7()'),
    ('job_results', 'user_id', 'uuid', NULL),
    ('job_results', 'job_type', 'text', NULL),
    ('job_results', 'server_id', 'text', NULL),
    ('job_results', 'tool_name', 'text', NULL),
    ('job_results', 'params', 'jsonb', '''{}''::jsonb'),
    ('job_results', 'status', 'text', '''pending''::text'),
    ('job_results', 'result', 'jsonb', NULL),
    ('job_results', 'error', 'text', NULL),
    ('job_results', 'created_at', 'timestamp with time zone', 'now()'),
    ('job_results', 'started_at', 'timestamp with time zone', NULL),
    ('job_results', 'completed_at', 'timestamp with time zone', NULL),
    ('job_results', 'lease', 'uuid', NULL),
    ('job_results', 'priority', 'smallint', '5'),
    ('job_results', 'run_at', 'timestamp with time zone', 'now()'),
    ('job_results', 'timeout_ms', 'integer', NULL),
    ('job_results', 'max_attempts', 'integer', NULL),
    ('job_results', 'attempt', 'integer', '0'),
    ('job_results', 'crashes', 'integer', '0'),
    ('job_results', 'failures', 'integer', '0'),
    ('job_results', 'idempotency_key', 'text', NULL),
    ('job_attempts', 'id', 'uuid', '_nexus_hub.uuid_v7()'),
    ('job_attempts', 'job_id', 'uuid', NULL),
    ('job_attempts', 'attempt', 'integer', NULL),
    ('job_attempts', 'started_at', 'timestamp with time zone', NULL),
    ('job_attempts', 'finished_at', 'timestamp with time zone', 'clock_timestamp()'),
    ('job_attempts', 'http_status', 'integer', NULL),
    ('job_attempts', 'error', 'text', NULL),
    ('circuit_breakers', 'host', 'text', NULL),
    ('circuit_breakers', 'worker', 'smallint', NULL),
    ('circuit_breakers', 'state', 'text', NULL),
    ('circuit_breakers', 'failures', 'integer', NULL),
    ('circuit_breakers', 'opened_at', 'timestamp with time zone', 'clock_timestamp()'),
    ('circuit_breakers', 'probe_at', 'timestamp with time zone', NULL),
    ('circuit_breakers', 'error', 'text', NULL),
    ('api_keys', 'id', 'uuid', '_nexus_hub.uuid_v7()'),
    ('api_keys', 'user_id', 'uuid', NULL),
    ('api_keys', 'service', 'text', NULL),
    ('api_keys', 'api_key_encrypted', 'bytea', NULL),
    ('api_keys', 'created_at', 'timestamp with time zone', 'now()'),
    ('api_keys', 'updated_at', 'timestamp with time zone', 'now()'),
    ('api_keys', 'last_used_at', 'timestamp with time zone', NULL),
    ('api_gateway_configs', 'id', 'uuid', '_nexus_hub.uuid_v7()'),
    ('api_gateway_configs', 'user_id', 'uuid', NULL),
    ('api_gateway_configs', 'base_url', 'text', NULL),
    ('api_gateway_configs', 'created_at', 'timestamp with time zone', 'now()'),
    ('api_gateway_configs', 'updated_at', 'timestamp with time zone', 'now()'),
    ('user_settings', 'user_id', 'uuid', NULL),
    ('user_settings', 'allow_gateway_fallback', 'boolean', 'true'),
    ('user_settings', 'created_at', 'timestamp with time zone', 'now()'),
    ('user_settings', 'updated_at', 'timestamp with time zone', 'now()'),
    ('rate_limit_exemptions', 'identifier', 'text', NULL),
    ('rate_limit_exemptions', 'reason', 'text', NULL),
    ('rate_limit_exemptions', 'created_at', 'timestamp with time zone', 'now()'),
    ('rate_limit_overrides', 'id', 'uuid', '_nexus_hub.uuid_v7()'),
    ('rate_limit_overrides', 'key', 'text', NULL),
    ('rate_limit_overrides', 'server_id', 'text', NULL),
    ('rate_limit_overrides', 'user_id', 'uuid', NULL),
    ('rate_limit_overrides', 'request_limit', 'integer', NULL),
    ('rate_limit_overrides', 'created_at', 'timestamp with time zone', 'now()'),
    ('tool_cache', 'id', 'uuid', '_nexus_hub.uuid_v7()'),
    ('tool_cache', 'server_ref_id', 'uuid', NULL),
    ('tool_cache', 'server_type', 'text', NULL),
    ('tool_cache', 'user_id', 'uuid', NULL),
    ('tool_cache', 'tool_name', 'text', NULL),
    ('tool_cache', 'namespaced_name', 'text', NULL),
    ('tool_cache', 'title', 'text', NULL),
    ('tool_cache', 'description', 'text', NULL),
    ('tool_cache', 'input_schema', 'jsonb', '''{"type": "object"}''::jsonb'),
    ('tool_cache', 'enabled', 'boolean', 'true'),
    ('tool_cache', 'definition', 'jsonb', '''{}''::jsonb'),
    ('tool_cache', 'created_at', 'timestamp with time zone', 'now()'),
    ('tool_cache', 'changed_at', 'timestamp with time zone', 'now()'),
    ('tool_cache', 'updated_at', 'timestamp with time zone', 'now()'),
    ('tool_cache', 'expires_at', 'timestamp with time zone', '(now() + ''24:00:00''::interval)'),
    ('resource_cache', 'id', 'uuid', '_nexus_hub.uuid_v7()'),
    ('resource_cache', 'server_ref_id', 'uuid', NULL),
    ('resource_cache', 'server_type', 'text', NULL),
    ('resource_cache', 'user_id', 'uuid', NULL),
    ('resource_cache', 'uri', 'text', NULL),
    ('resource_cache', 'is_template', 'boolean', 'false'),
    ('resource_cache', 'name', 'text', NULL),
    ('resource_cache', 'title', 'text', NULL),
    ('resource_cache', 'description', 'text', NULL),
    ('resource_cache', 'mime_type', 'text', NULL),
    ('resource_cache', 'definition', 'jsonb', '''{}''::jsonb'),
    ('resource_cache', 'created_at', 'timestamp with time zone', 'now()'),
    ('resource_cache', 'changed_at', 'timestamp with time zone', 'now()'),
    ('resource_cache', 'updated_at', 'timestamp with time zone', 'now()'),
    ('resource_cache', 'expires_at', 'timestamp with time zone', '(now() + ''24:00:00''::interval)'),
    ('prompt_cache', 'id', 'uuid', '_nexus_hub.uuid_v7()'),
    ('prompt_cache', 'server_ref_id', 'uuid', NULL),
    ('prompt_cache', 'server_type', 'text', NULL),
    ('prompt_cache', 'user_id', 'uuid', NULL),
    ('prompt_cache', 'prompt_name', 'text', NULL),
    ('prompt_cache', 'namespaced_name', 'text', NULL),
    ('prompt_cache', 'title', 'text', NULL),
    ('prompt_cache', 'description', 'text', NULL),
    ('prompt_cache', 'arguments', 'jsonb', '''[]''::jsonb'),
    ('prompt_cache', 'definition', 'jsonb', '''{}''::jsonb'),
    ('prompt_cache', 'created_at', 'timestamp with time zone', 'now()'),
    ('prompt_cache', 'changed_at', 'timestamp with time zone', 'now()'),
    ('prompt_cache', 'updated_at', 'timestamp with time zone', 'now()'),
    ('prompt_cache', 'expires_at', 'timestamp with time zone', '(now() + ''24:00:00''::interval)'),
    ('server_syncs', 'server_ref_id', 'uuid', NULL),
    ('server_syncs', 'server_type', 'text', NULL),
    ('server_syncs', 'user_id', 'uuid', NULL),
    ('server_syncs', 'server_id', 'text', NULL),
    ('server_syncs', 'job_id', 'uuid', NULL),
    ('server_syncs', 'requested_at', 'timestamp with time zone', 'now()'),
    ('server_syncs', 'tries', 'integer', '0'),
    ('server_syncs', 'synced_at', 'timestamp with time zone', NULL),
    ('server_syncs', 'expires_at', 'timestamp with time zone', NULL),
    ('server_syncs', 'failed_at', 'timestamp with time zone', NULL),
    ('server_syncs', 'error', 'text', NULL),
    ('nexus_hub_alerts', 'name', 'text', NULL),
    ('nexus_hub_alerts', 'severity', 'text', NULL),
    ('nexus_hub_alerts', 'value', 'double precision', NULL),
    ('nexus_hub_alerts', 'threshold', 'double precision', NULL),
    ('nexus_hub_alerts', 'firing', 'boolean', NULL),
    ('rate_limit_tracking', 'server_id', 'text', NULL),
    ('rate_limit_tracking', 'user_id', 'uuid', NULL),
    ('rate_limit_tracking', 'window_start', 'timestamp with time zone', NULL),
    ('rate_limit_tracking', 'request_count', 'integer', NULL)$$,
    'the tables have the columns of the contract, with its types and defaults');

SELECT col_is_pk(:'schema', 'system_servers', 'id', 'system_servers is keyed by id');
SELECT col_is_unique(:'schema', 'system_servers', 'ref_id', 'system_servers.ref_id is unique');
SELECT col_is_pk(:'schema', 'user_servers', 'id', 'user_servers is keyed by id');
SELECT col_is_unique(:'schema', 'user_servers', ARRAY['user_id', 'server_id'], 'a user has a server_id once');
SELECT col_is_pk(:'schema', 'job_results', 'id', 'job_results is keyed by id');
SELECT col_is_pk(:'schema', 'job_attempts', 'id', 'job_attempts is keyed by id');
SELECT col_is_pk(:'schema', 'circuit_breakers', ARRAY['host', 'worker'], 'circuit_breakers is keyed by host and worker');
SELECT col_is_pk(:'schema', 'tool_cache', 'id', 'tool_cache is keyed by id');
SELECT col_is_pk(:'schema', 'resource_cache', 'id', 'resource_cache is keyed by id');
SELECT col_is_pk(:'schema', 'prompt_cache', 'id', 'prompt_cache is keyed by id');
SELECT col_is_pk(:'schema', 'server_syncs', 'server_ref_id', 'server_syncs is keyed by the server');
SELECT col_is_unique(:'schema', 'tool_cache', ARRAY['server_ref_id', 'tool_name'], 'a server has a tool once');
SELECT col_is_unique(:'schema', 'resource_cache', ARRAY['server_ref_id', 'uri', 'is_template'], 'and a resource, and a template');
SELECT col_is_unique(:'schema', 'prompt_cache', ARRAY['server_ref_id', 'prompt_name'], 'and a prompt');
SELECT has_index(:'schema', 'tool_cache', 'idx_tool_cache_expires', 'expires_at', 'expired tools are found by an index');
SELECT has_index(:'schema', 'resource_cache', 'idx_resource_cache_expires', 'expires_at', 'and expired resources');
SELECT has_index(:'schema', 'prompt_cache', 'idx_prompt_cache_expires', 'expires_at', 'and expired prompts');
SELECT col_is_pk(:'schema', 'api_keys', 'id', 'api_keys is keyed by id');
SELECT col_is_pk(:'schema', 'api_gateway_configs', 'id', 'api_gateway_configs is keyed by id');
SELECT col_is_pk(:'schema', 'user_settings', 'user_id', 'user_settings is keyed by user_id');
SELECT col_is_pk(:'schema', 'rate_limit_exemptions', 'identifier', 'rate_limit_exemptions is keyed by identifier');
SELECT col_is_pk(:'schema', 'rate_limit_overrides', 'id', 'rate_limit_overrides is keyed by id');
SELECT set_eq(format('SELECT a.attname FROM pg_attribute a WHERE a.attrelid = %L::regclass AND a.attgenerated = ''s''', format('%I.job_results', :'schema')),
              $$VALUES ('target'::name)$$, 'job_results.target is generated and stored, and nothing else is');

SELECT set_eq(
    format('SELECT proname::text, provolatile FROM extension_function WHERE nspname = %L', :'schema'),
    $$VALUES
    ('nexus_hub_uid', 's'::"char"), ('encrypt_token', 'v'), ('encrypt_config', 'v'), ('decrypt_token', 's'), ('decrypt_config', 's'), ('rotate_vault_key', 'v'), ('adopt_vault_key', 'v'), ('cleanup_vault_audit', 'v'), ('nexus_hub_health', 'v'), ('backup_preflight', 's'), ('nexus_hub_metrics', 'v'), ('sync_server', 'v'), ('refresh_expired_cache_entries', 'v'), ('cleanup_old_job_results', 'v'), ('cleanup_job_results_manual', 'v'), ('cleanup_rate_limit_tracking', 'v'),
    ('start_vault_rotation', 'v'), ('pause_vault_rotation', 'v'), ('resume_vault_rotation', 'v'), ('register_vault_column', 'v'), ('unregister_vault_column', 'v'),
    ('add_server', 'v'), ('update_server', 'v'), ('delete_server', 'v'), ('list_servers', 's'), ('create_job', 'v'),
    ('create_secret', 'v'), ('update_secret', 'v'), ('delete_secret', 'v'), ('list_secrets', 's'),
    ('get_job_status', 's'), ('wait_for_job', 'v'), ('cancel_job', 'v'), ('execute_job_via_pg_net', 'v'),
    ('http_request', 'v'), ('http_get', 'v'), ('http_post', 'v'), ('retry_job', 'v'), ('retry_failed_jobs', 'v'), ('get_job_attempts', 's'),
    ('insert_user_api_key', 'v'), ('get_user_api_key', 's'), ('delete_user_api_key', 'v'), ('touch_user_api_key', 'v'), ('upsert_user_gateway_config', 'v'),
    ('delete_user_gateway_config', 'v'), ('get_user_gateway_base_url', 's'), ('get_user_allow_gateway_fallback', 's'), ('resolve_provider', 's'),
    ('check_rate_limit', 'v'), ('rate_limit', 'v'), ('rate_limit_peek', 'v'), ('rate_limit_all', 'v'), ('enforce_rate_limits', 'v'), ('reset_rate_limit', 'v'), ('reset_server_rate_limit', 'v')$$,
    'functions that only read are STABLE; those that write, wait or draw a random IV are VOLATILE');

-- ── Rules for every object, future ones included ──

SELECT is(obj_description('_nexus_hub'::regnamespace, 'pg_namespace') IS NOT NULL, true, 'the schema _nexus_hub has a COMMENT');
SELECT is_empty($$SELECT signature FROM extension_function WHERE obj_description(oid, 'pg_proc') IS NULL$$,
    'every function has a COMMENT');
SELECT is_empty($$SELECT nspname, relname FROM extension_table WHERE obj_description(oid, 'pg_class') IS NULL$$,
    'every table and view has a COMMENT');
SELECT is_empty(
    $$SELECT t.relname, a.attname FROM extension_table t
        JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
       WHERE col_description(t.oid, a.attnum) IS NULL$$,
    'every column has a COMMENT');

SELECT is_empty(
    $$SELECT signature FROM extension_function
       WHERE prosecdef AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (proconfig), false)$$,
    'every SECURITY DEFINER function has the search_path pg_catalog, pg_temp');
SELECT is_empty(
    $$SELECT signature FROM extension_function, aclexplode(coalesce(proacl, acldefault('f', proowner))) AS a
       WHERE prosecdef AND a.grantee = 0$$,
    'no SECURITY DEFINER function can be executed by PUBLIC');
-- A SET keeps a function from being inlined into the worker's statements. What is bound when it is created looks no name up.
SELECT is_empty(
    $$SELECT signature FROM extension_function f JOIN pg_proc p USING (oid)
       WHERE lanname <> 'c' AND NOT EXISTS (SELECT FROM unnest(f.proconfig) AS setting WHERE setting LIKE 'search\_path=%')
         AND NOT (nspname = '_nexus_hub' AND lanname = 'sql' AND p.prosqlbody IS NOT NULL AND f.provolatile = 's' AND NOT f.prosecdef)$$,
    'every function that is not in C has its own search_path, except those of the worker whose bodies are bound');
SELECT is_empty(
    $$SELECT signature, a.grantee::regrole FROM extension_function f, aclexplode(coalesce(f.proacl, acldefault('f', f.proowner))) AS a
       WHERE lanname <> 'c' AND NOT EXISTS (SELECT FROM unnest(proconfig) AS setting WHERE setting LIKE 'search\_path=%')
         AND a.grantee <> f.proowner$$,
    'and nobody but the owner may execute those');

SELECT is_empty($$SELECT relname FROM extension_table WHERE relkind IN ('r', 'p') AND (nspname <> '_nexus_hub' OR relname = 'secrets') AND NOT relrowsecurity$$,
    'every public table has row-level security, and the one of named secrets');
-- A restored database knows nothing yet of the hosts it cannot reach.
SELECT set_eq(
    $$SELECT t.nspname, t.relname FROM pg_extension e JOIN extension_table t ON t.oid = ANY (e.extconfig) WHERE e.extname = 'nexus_hub'$$,
    $$SELECT nspname, relname FROM extension_table WHERE relkind = 'r' AND nspname <> '_nexus_hub' AND relname <> 'circuit_breakers'
      UNION ALL VALUES ('_nexus_hub', 'known_vault_keys'), ('_nexus_hub', 'registered_columns'), ('_nexus_hub', 'vault_audit_log'), ('_nexus_hub', 'secrets')$$,
    'the rows of every public table are dumped, except those of circuit_breakers, which keys and columns they are under, named secrets and the audit');
SELECT is_empty($$SELECT condition FROM pg_extension e, unnest(e.extcondition) AS condition WHERE e.extname = 'nexus_hub' AND condition NOT IN ('', 'WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = relation)')$$,
    'and all of them, but columns of tables that are gone');
SELECT is_empty(
    $$SELECT p.tablename, p.policyname FROM pg_policies p JOIN extension_table t ON (t.nspname, t.relname) = (p.schemaname, p.tablename),
             concat_ws(' ', p.qual, p.with_check) AS expression
       WHERE replace(expression, '( SELECT nexus_hub_uid() AS nexus_hub_uid)', '') LIKE '%nexus\_hub\_uid%'$$,
    'policies ask for the caller''s id once a statement: (SELECT nexus_hub_uid())');

SELECT * FROM finish();
ROLLBACK;
