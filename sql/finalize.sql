-- Runs last: who may do what.

CREATE FUNCTION _nexus_hub.join_realtime() RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_publication p WHERE p.pubname = 'supabase_realtime')
       -- By whatever way: of all tables, or of the schema.
       AND NOT EXISTS (SELECT FROM pg_publication_tables t
                        WHERE t.pubname = 'supabase_realtime'
                          AND format('%I.%I', t.schemaname, t.tablename)::regclass = '@extschema@.job_results'::regclass) THEN
        EXECUTE 'ALTER PUBLICATION supabase_realtime ADD TABLE @extschema@.job_results';
    END IF;
END
$$;
COMMENT ON FUNCTION _nexus_hub.join_realtime() IS
    'Adds job_results to the publication supabase_realtime, if there is one, for those who watch their jobs instead of asking. The primary key is its replica identity: new rows are complete but for large arguments that have not changed.';

CREATE FUNCTION _nexus_hub.grant_api() RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    grantee text;
BEGIN
    FOR grantee IN SELECT rolname FROM pg_roles WHERE rolname IN ('authenticated', 'service_role') LOOP
        -- No format(): a schema's name may hold a per cent sign.
        EXECUTE 'GRANT USAGE ON SCHEMA @extschema@ TO ' || grantee;
        EXECUTE 'GRANT EXECUTE ON FUNCTION
            @extschema@.add_server(text, text, jsonb, uuid),
            @extschema@.update_server(uuid, text, jsonb, boolean),
            @extschema@.delete_server(uuid),
            @extschema@.list_servers(),
            @extschema@.sync_server(uuid),
            _nexus_hub.begin_sync(uuid, integer),
            _nexus_hub.cannot_sync(text, boolean),
            @extschema@.create_secret(text, text, uuid),
            @extschema@.update_secret(text, text, uuid),
            @extschema@.delete_secret(text, uuid),
            @extschema@.list_secrets(),
            @extschema@.create_job(uuid, text, text, text, jsonb, integer, timestamptz, integer, integer, text),
            @extschema@.get_job_status(uuid),
            @extschema@.wait_for_job(uuid, integer),
            @extschema@.cancel_job(uuid),
            @extschema@.retry_job(uuid),
            @extschema@.retry_failed_jobs(text, text, timestamptz, timestamptz),
            @extschema@.get_job_attempts(uuid),
            @extschema@.execute_job_via_pg_net(uuid),
            _nexus_hub.owner(uuid, uuid, boolean, boolean),
            _nexus_hub.server_exists(text),
            _nexus_hub.server_id(text),
            _nexus_hub.seal_server_config(text),
            _nexus_hub.check_secret(text, text),
            _nexus_hub.seal_secret(text, text),
            _nexus_hub.secret_context(uuid, text),
            _nexus_hub.secret_exists(text),
            _nexus_hub.secret_owner(uuid),
            _nexus_hub.check_job(text, text, text, text, boolean),
            _nexus_hub.wake_worker(),
            _nexus_hub.job_not_found(uuid),
            _nexus_hub.await_job(uuid, integer),
            _nexus_hub.check_job_options(integer, timestamptz, integer, integer, text, boolean),
            _nexus_hub.job_of_key(uuid, text),
            _nexus_hub.job_of_key_gone(text),
            _nexus_hub.cancel_unfinished_job(uuid),
            _nexus_hub.retry_finished_jobs(uuid[])
            TO ' || grantee;
    END LOOP;

    -- A signed-in user: own rows by row-level security, and of those never a ciphertext, never a result to write.
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'authenticated') THEN
        GRANT SELECT (id, user_id, server_id, name, transport, enabled, rate_limit_per_minute, created_at, updated_at),
              INSERT (user_id, server_id, name, transport, config_encrypted, enabled),
              UPDATE (name, config_encrypted, enabled, updated_at),
              DELETE
           ON @extschema@.user_servers TO authenticated;
        GRANT SELECT (id, user_id, name, created_at, updated_at),
              INSERT (user_id, name, value_encrypted),
              UPDATE (value_encrypted, updated_at),
              DELETE
           ON _nexus_hub.secrets TO authenticated;
        GRANT SELECT (id, ref_id, name, enabled, rate_limit_per_minute, created_at) ON @extschema@.system_servers TO authenticated;
        GRANT SELECT,
              INSERT (user_id, job_type, server_id, tool_name, params, status, priority, run_at, timeout_ms, max_attempts, idempotency_key)
           ON @extschema@.job_results TO authenticated;
        GRANT SELECT ON @extschema@.job_attempts TO authenticated;
        GRANT SELECT ON @extschema@.tool_cache, @extschema@.resource_cache, @extschema@.prompt_cache, @extschema@.server_syncs TO authenticated;
        GRANT UPDATE (enabled) ON @extschema@.tool_cache TO authenticated;
        GRANT SELECT (id, user_id, service, created_at, updated_at, last_used_at) ON @extschema@.api_keys TO authenticated;
        GRANT SELECT ON @extschema@.api_gateway_configs TO authenticated;
        -- UPDATE of user_id, because an upsert of PostgREST writes all columns it is given; row-level security keeps it the user's.
        GRANT SELECT, INSERT (user_id, allow_gateway_fallback), UPDATE (user_id, allow_gateway_fallback)
           ON @extschema@.user_settings TO authenticated;
    END IF;

    -- The trusted back end: everything public.
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'service_role') THEN
        GRANT SELECT, INSERT, UPDATE, DELETE
           ON @extschema@.system_servers, @extschema@.user_servers, @extschema@.job_results,
              @extschema@.api_keys, @extschema@.api_gateway_configs, @extschema@.user_settings,
              @extschema@.tool_cache, @extschema@.resource_cache, @extschema@.prompt_cache, @extschema@.server_syncs,
              @extschema@.rate_limit_exemptions, @extschema@.rate_limit_overrides, _nexus_hub.secrets TO service_role;
        GRANT SELECT ON @extschema@.rate_limit_tracking, @extschema@.rate_limit_stats TO service_role;
        GRANT SELECT ON @extschema@.job_attempts, @extschema@.circuit_breakers TO service_role;
        GRANT EXECUTE ON FUNCTION
            @extschema@.http_request(text, text, text, jsonb, integer, integer, timestamptz, integer, text),
            @extschema@.http_get(text, jsonb, integer, integer, timestamptz, integer, text),
            @extschema@.http_post(text, jsonb, jsonb, integer, integer, timestamptz, integer, text),
            @extschema@.encrypt_token(text, text),
            @extschema@.decrypt_token(bytea, text),
            @extschema@.encrypt_config(jsonb, text),
            @extschema@.decrypt_config(bytea, text),
            _nexus_hub.decrypt_json(bytea, text),
            @extschema@.rotate_vault_key(),
            _nexus_hub.rotate_values(),
            _nexus_hub.vault_key_state(),
            @extschema@.start_vault_rotation(),
            @extschema@.pause_vault_rotation(),
            @extschema@.resume_vault_rotation(),
            _nexus_hub.launch_rotation(),
            _nexus_hub.set_rotation_paused(boolean),
            _nexus_hub.primary_vault_key(),
            _nexus_hub.vault_column_list(),
            _nexus_hub.open_secret(bytea, text, text),
            _nexus_hub.api_key_object(uuid, text),
            _nexus_hub.api_key_context(uuid, text),
            _nexus_hub.api_service(text),
            _nexus_hub.api_key(text),
            _nexus_hub.model_provider(text),
            _nexus_hub.model_name(text, text),
            _nexus_hub.no_api_key(text, uuid, boolean),
            @extschema@.check_rate_limit(text, uuid, integer),
            @extschema@.rate_limit(text, integer, integer, integer, integer),
            @extschema@.rate_limit_peek(text, integer, integer, integer, integer),
            @extschema@.rate_limit_all(text[], integer[], integer[], integer[], integer[]),
            @extschema@.reset_rate_limit(text),
            @extschema@.reset_server_rate_limit(text, uuid),
            @extschema@.enforce_rate_limits(text[], text[], integer[], integer[], integer[], integer[]),
            _nexus_hub.limit_request(text[], text[], integer[], integer[], integer[], integer[]),
            _nexus_hub.answer_request(boolean, text, text, bigint, text),
            @extschema@.nexus_hub_health(),
            @extschema@.nexus_hub_metrics(),
            _nexus_hub.metrics_page(),
            _nexus_hub.health(boolean),
            _nexus_hub.alerts(),
            _nexus_hub.health_summary(),
            @extschema@.refresh_expired_cache_entries(),
            _nexus_hub.refresh_expired(),
            @extschema@.cleanup_old_job_results(),
            @extschema@.cleanup_job_results_manual(integer, integer),
            _nexus_hub.cleanup_jobs(interval, interval),
            _nexus_hub.job_retention(text),
            _nexus_hub.days(integer, text),
            _nexus_hub.rate_limit_minutes(),
            _nexus_hub.rate_limit_statistics()
            TO service_role;
        GRANT USAGE ON SCHEMA nexus_hub_media_types TO service_role;
        GRANT SELECT ON @extschema@.nexus_hub_alerts, @extschema@.system_health_summary TO service_role;
        GRANT SELECT ON @extschema@.vault_keys, @extschema@.vault_columns, @extschema@.vault_rotation, @extschema@.vault_rotation_errors,
              @extschema@.vault_audit
           TO service_role;
    END IF;
    PERFORM _nexus_hub.join_realtime();
END
$$;
COMMENT ON FUNCTION _nexus_hub.grant_api() IS
    'Gives the roles authenticated and service_role, as far as they exist, their rights, and calls join_realtime. Runs at install; run it again as a superuser when roles or publication were made later, or after a restore, which forgets the publication''s tables.';

CREATE FUNCTION _nexus_hub.extension_created() RETURNS void
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'extension_created_wrapper';
COMMENT ON FUNCTION _nexus_hub.extension_created() IS
    'Called at the end of the install script: has the launcher start this database''s worker when CREATE EXTENSION commits.';

-- Default privileges (those of Supabase, say) may have opened what was just made: begin with the owner alone.
DO $$
DECLARE
    grantee record;
BEGIN
    FOR grantee IN
        SELECT DISTINCT
               CASE d.classid WHEN 'pg_proc'::regclass THEN format('FUNCTION %s', d.objid::regprocedure)
                              WHEN 'pg_namespace'::regclass THEN format('SCHEMA %s', d.objid::regnamespace)
                              ELSE format('TABLE %s', d.objid::regclass) END AS object,
               CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END AS role
          FROM pg_catalog.pg_depend d
          JOIN pg_catalog.pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND e.extname = 'nexus_hub'
          LEFT JOIN pg_catalog.pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
          LEFT JOIN pg_catalog.pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid AND c.relkind IN ('r', 'p', 'v')
          LEFT JOIN pg_catalog.pg_namespace n ON d.classid = 'pg_namespace'::regclass AND n.oid = d.objid
         CROSS JOIN LATERAL pg_catalog.aclexplode(CASE d.classid
                   WHEN 'pg_proc'::regclass THEN coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))
                   WHEN 'pg_namespace'::regclass THEN coalesce(n.nspacl, pg_catalog.acldefault('n', n.nspowner))
                   ELSE coalesce(c.relacl, pg_catalog.acldefault('r', c.relowner)) END) a
         WHERE d.deptype = 'e'
           AND coalesce(p.oid, c.oid, n.oid) IS NOT NULL
           AND a.grantee <> coalesce(p.proowner, c.relowner, n.nspowner)
    LOOP
        EXECUTE pg_catalog.format('REVOKE ALL ON %s FROM %s', grantee.object, grantee.role);
    END LOOP;
END
$$;

-- Meant for everybody: policies, defaults, generated columns and constraints run these as whoever touches the tables, and
-- they tell nothing.
GRANT EXECUTE ON FUNCTION @extschema@.nexus_hub_uid(), _nexus_hub.is_service_role(), _nexus_hub.uuid_v7(), _nexus_hub.url_authority(text),
        _nexus_hub.is_job(text, text, text, boolean, boolean),
        _nexus_hub.are_job_options(integer, timestamptz, integer, integer, text),
        _nexus_hub.is_job_state(text, boolean, boolean, boolean, boolean), _nexus_hub.gateway_base_url(text)
   TO PUBLIC;
-- Whoever uses the vault is noted.
GRANT EXECUTE ON FUNCTION _nexus_hub.note_vault_use(text, text) TO PUBLIC;

-- For the service role alone, but these say so themselves, in words that callers know.
GRANT EXECUTE ON FUNCTION
        @extschema@.insert_user_api_key(uuid, text, text), @extschema@.get_user_api_key(uuid, text),
        @extschema@.delete_user_api_key(uuid, text), @extschema@.touch_user_api_key(uuid, text),
        @extschema@.upsert_user_gateway_config(uuid, text), @extschema@.delete_user_gateway_config(uuid),
        @extschema@.get_user_gateway_base_url(uuid), @extschema@.get_user_allow_gateway_fallback(uuid),
        @extschema@.resolve_provider(uuid, text), _nexus_hub.require_service_role(boolean),
        _nexus_hub.require_service_role_for(boolean, text, uuid, text)
   TO PUBLIC;

-- PostgreSQL's own role for those who watch.
GRANT USAGE ON SCHEMA @extschema@, nexus_hub_media_types TO pg_monitor;
GRANT EXECUTE ON FUNCTION @extschema@.nexus_hub_health(), _nexus_hub.health(boolean), _nexus_hub.alerts(), _nexus_hub.health_summary(),
        @extschema@.nexus_hub_metrics(), _nexus_hub.metrics_page() TO pg_monitor;
GRANT SELECT ON @extschema@.nexus_hub_alerts, @extschema@.system_health_summary TO pg_monitor;

SELECT _nexus_hub.grant_api();

SELECT _nexus_hub.note_parts();

-- The worker of this database starts when this transaction commits.
SELECT _nexus_hub.extension_created();
