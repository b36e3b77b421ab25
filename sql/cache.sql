-- Caches of what MCP servers offer: tools, resources and prompts. A sync is a job (server_sync) that lists all of it, and
-- whose end is written together with the entries (src/cache.rs).

CREATE TABLE @extschema@.tool_cache (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    server_ref_id uuid NOT NULL,
    server_type text NOT NULL
        CONSTRAINT tool_cache_server_type_known CHECK (server_type IN ('system', 'user')),
    user_id uuid,
    tool_name text NOT NULL
        CONSTRAINT tool_cache_tool_name_length CHECK (length(tool_name) BETWEEN 1 AND 200),
    namespaced_name text NOT NULL,
    title text,
    description text,
    input_schema jsonb NOT NULL DEFAULT '{"type": "object"}',
    definition jsonb NOT NULL DEFAULT '{}',
    enabled boolean NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT now(),
    changed_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL DEFAULT now() + interval '24 hours',
    CONSTRAINT tool_cache_owner CHECK ((server_type = 'system') = (user_id IS NULL)),
    CONSTRAINT tool_cache_server_ref_id_tool_name_key UNIQUE (server_ref_id, tool_name)
);
COMMENT ON TABLE @extschema@.tool_cache IS 'The tools that MCP servers have listed. Written by syncs (see sync_server); of an unreachable server the last ones stay, expired.';
COMMENT ON COLUMN @extschema@.tool_cache.id IS 'The entry''s id (UUIDv7). It stays as long as the server lists the tool.';
COMMENT ON COLUMN @extschema@.tool_cache.server_ref_id IS 'The server: user_servers.id or system_servers.ref_id.';
COMMENT ON COLUMN @extschema@.tool_cache.server_type IS 'user or system: in which of the two tables.';
COMMENT ON COLUMN @extschema@.tool_cache.user_id IS 'The server''s owner; NULL: a system server, whose entries all signed-in users see.';
COMMENT ON COLUMN @extschema@.tool_cache.tool_name IS 'The tool''s name, what create_job takes as p_tool_name. Tools with longer names than 200 characters are left out.';
COMMENT ON COLUMN @extschema@.tool_cache.namespaced_name IS 'The server''s id, two underscores, and the tool''s name: tells the tools of several servers apart.';
COMMENT ON COLUMN @extschema@.tool_cache.title IS 'A name for people, if the server gives one.';
COMMENT ON COLUMN @extschema@.tool_cache.description IS 'What the tool does, in the server''s words, which are not to be trusted.';
COMMENT ON COLUMN @extschema@.tool_cache.input_schema IS 'JSON Schema of the arguments.';
COMMENT ON COLUMN @extschema@.tool_cache.definition IS 'All that the server says of the tool.';
COMMENT ON COLUMN @extschema@.tool_cache.enabled IS 'Whether it is to be offered: the owner''s choice, which a sync leaves alone. It bars nobody from calling the tool.';
COMMENT ON COLUMN @extschema@.tool_cache.created_at IS 'When a sync found it first.';
COMMENT ON COLUMN @extschema@.tool_cache.changed_at IS 'When a sync found another definition than before: a tool that was trusted may have become another.';
COMMENT ON COLUMN @extschema@.tool_cache.updated_at IS 'When a sync found it last.';
COMMENT ON COLUMN @extschema@.tool_cache.expires_at IS 'Until when it counts as fresh (nexus_hub.cache_ttl after the sync).';

CREATE TABLE @extschema@.resource_cache (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    server_ref_id uuid NOT NULL,
    server_type text NOT NULL
        CONSTRAINT resource_cache_server_type_known CHECK (server_type IN ('system', 'user')),
    user_id uuid,
    uri text NOT NULL
        CONSTRAINT resource_cache_uri_length CHECK (octet_length(uri) BETWEEN 1 AND 2000),
    is_template boolean NOT NULL DEFAULT false,
    name text,
    title text,
    description text,
    mime_type text,
    definition jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    changed_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL DEFAULT now() + interval '24 hours',
    CONSTRAINT resource_cache_owner CHECK ((server_type = 'system') = (user_id IS NULL)),
    CONSTRAINT resource_cache_server_ref_id_uri_is_template_key UNIQUE (server_ref_id, uri, is_template)
);
COMMENT ON TABLE @extschema@.resource_cache IS 'The resources, and templates of resources, that MCP servers have listed. As tool_cache.';
COMMENT ON COLUMN @extschema@.resource_cache.id IS 'The entry''s id (UUIDv7). It stays as long as the server lists the resource.';
COMMENT ON COLUMN @extschema@.resource_cache.server_ref_id IS 'The server: user_servers.id or system_servers.ref_id.';
COMMENT ON COLUMN @extschema@.resource_cache.server_type IS 'user or system: in which of the two tables.';
COMMENT ON COLUMN @extschema@.resource_cache.user_id IS 'The server''s owner; NULL: a system server, whose entries all signed-in users see.';
COMMENT ON COLUMN @extschema@.resource_cache.uri IS 'What a resource_fetch job takes as uri; of a template, with its variables in braces (RFC 6570). Those of more than 2000 bytes are left out.';
COMMENT ON COLUMN @extschema@.resource_cache.is_template IS 'Whether it is a template.';
COMMENT ON COLUMN @extschema@.resource_cache.name IS 'The server''s name for it.';
COMMENT ON COLUMN @extschema@.resource_cache.title IS 'A name for people, if the server gives one.';
COMMENT ON COLUMN @extschema@.resource_cache.description IS 'What it is, in the server''s words, which are not to be trusted.';
COMMENT ON COLUMN @extschema@.resource_cache.mime_type IS 'Its media type, if the server says.';
COMMENT ON COLUMN @extschema@.resource_cache.definition IS 'All that the server says of it.';
COMMENT ON COLUMN @extschema@.resource_cache.created_at IS 'When a sync found it first.';
COMMENT ON COLUMN @extschema@.resource_cache.changed_at IS 'When a sync found another definition than before.';
COMMENT ON COLUMN @extschema@.resource_cache.updated_at IS 'When a sync found it last.';
COMMENT ON COLUMN @extschema@.resource_cache.expires_at IS 'Until when it counts as fresh (nexus_hub.cache_ttl after the sync).';

CREATE TABLE @extschema@.prompt_cache (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    server_ref_id uuid NOT NULL,
    server_type text NOT NULL
        CONSTRAINT prompt_cache_server_type_known CHECK (server_type IN ('system', 'user')),
    user_id uuid,
    prompt_name text NOT NULL
        CONSTRAINT prompt_cache_prompt_name_length CHECK (length(prompt_name) BETWEEN 1 AND 200),
    namespaced_name text NOT NULL,
    title text,
    description text,
    arguments jsonb NOT NULL DEFAULT '[]',
    definition jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    changed_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL DEFAULT now() + interval '24 hours',
    CONSTRAINT prompt_cache_owner CHECK ((server_type = 'system') = (user_id IS NULL)),
    CONSTRAINT prompt_cache_server_ref_id_prompt_name_key UNIQUE (server_ref_id, prompt_name)
);
COMMENT ON TABLE @extschema@.prompt_cache IS 'The prompts that MCP servers have listed. As tool_cache.';
COMMENT ON COLUMN @extschema@.prompt_cache.id IS 'The entry''s id (UUIDv7). It stays as long as the server lists the prompt.';
COMMENT ON COLUMN @extschema@.prompt_cache.server_ref_id IS 'The server: user_servers.id or system_servers.ref_id.';
COMMENT ON COLUMN @extschema@.prompt_cache.server_type IS 'user or system: in which of the two tables.';
COMMENT ON COLUMN @extschema@.prompt_cache.user_id IS 'The server''s owner; NULL: a system server, whose entries all signed-in users see.';
COMMENT ON COLUMN @extschema@.prompt_cache.prompt_name IS 'The prompt''s name, what create_job takes as p_tool_name. Prompts with longer names than 200 characters are left out.';
COMMENT ON COLUMN @extschema@.prompt_cache.namespaced_name IS 'The server''s id, two underscores, and the prompt''s name.';
COMMENT ON COLUMN @extschema@.prompt_cache.title IS 'A name for people, if the server gives one.';
COMMENT ON COLUMN @extschema@.prompt_cache.description IS 'What it is for, in the server''s words, which are not to be trusted.';
COMMENT ON COLUMN @extschema@.prompt_cache.arguments IS 'Its arguments, an array of {"name", "description", "required"}.';
COMMENT ON COLUMN @extschema@.prompt_cache.definition IS 'All that the server says of the prompt.';
COMMENT ON COLUMN @extschema@.prompt_cache.created_at IS 'When a sync found it first.';
COMMENT ON COLUMN @extschema@.prompt_cache.changed_at IS 'When a sync found another definition than before.';
COMMENT ON COLUMN @extschema@.prompt_cache.updated_at IS 'When a sync found it last.';
COMMENT ON COLUMN @extschema@.prompt_cache.expires_at IS 'Until when it counts as fresh (nexus_hub.cache_ttl after the sync).';

CREATE TABLE @extschema@.server_syncs (
    server_ref_id uuid PRIMARY KEY,
    server_type text NOT NULL
        CONSTRAINT server_syncs_server_type_known CHECK (server_type IN ('system', 'user')),
    user_id uuid,
    server_id text NOT NULL,
    job_id uuid,
    requested_at timestamptz NOT NULL DEFAULT now(),
    tries integer NOT NULL DEFAULT 0,
    synced_at timestamptz,
    expires_at timestamptz,
    failed_at timestamptz,
    error text,
    CONSTRAINT server_syncs_owner CHECK ((server_type = 'system') = (user_id IS NULL))
);
COMMENT ON TABLE @extschema@.server_syncs IS 'How the caches of each server stand that was ever to be synced: when that went well last, and why it does not now.';
COMMENT ON COLUMN @extschema@.server_syncs.server_ref_id IS 'The server: user_servers.id or system_servers.ref_id.';
COMMENT ON COLUMN @extschema@.server_syncs.server_type IS 'user or system: in which of the two tables.';
COMMENT ON COLUMN @extschema@.server_syncs.user_id IS 'The server''s owner; NULL: a system server, of which users do not see this row.';
COMMENT ON COLUMN @extschema@.server_syncs.server_id IS 'The name that jobs use as server_id.';
COMMENT ON COLUMN @extschema@.server_syncs.job_id IS 'The last sync''s job.';
COMMENT ON COLUMN @extschema@.server_syncs.requested_at IS 'When that job was made.';
COMMENT ON COLUMN @extschema@.server_syncs.tries IS 'Syncs that were begun since the last one that went well.';
COMMENT ON COLUMN @extschema@.server_syncs.synced_at IS 'When a sync went well last; NULL: never.';
COMMENT ON COLUMN @extschema@.server_syncs.expires_at IS 'Until when what it found counts as fresh.';
COMMENT ON COLUMN @extschema@.server_syncs.failed_at IS 'When an attempt of the last sync failed last; NULL: it did not.';
COMMENT ON COLUMN @extschema@.server_syncs.error IS 'Why. The entries of the caches are then those of synced_at.';

CREATE INDEX idx_tool_cache_expires ON @extschema@.tool_cache (expires_at) WHERE enabled;
CREATE INDEX idx_resource_cache_expires ON @extschema@.resource_cache (expires_at);
CREATE INDEX idx_prompt_cache_expires ON @extschema@.prompt_cache (expires_at);
CREATE INDEX server_syncs_expires ON @extschema@.server_syncs (expires_at);
CREATE INDEX server_syncs_failed ON @extschema@.server_syncs (failed_at) WHERE error IS NOT NULL;
-- For row-level security, and for those who ask for theirs and everybody's.
CREATE INDEX tool_cache_user ON @extschema@.tool_cache (user_id);
CREATE INDEX resource_cache_user ON @extschema@.resource_cache (user_id);
CREATE INDEX prompt_cache_user ON @extschema@.prompt_cache (user_id);
CREATE INDEX server_syncs_user ON @extschema@.server_syncs (user_id);

-- Or a sync could write what the dump brings, too.
CREATE TRIGGER tool_cache_note_restore BEFORE INSERT ON @extschema@.tool_cache
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.note_restore();
CREATE TRIGGER resource_cache_note_restore BEFORE INSERT ON @extschema@.resource_cache
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.note_restore();
CREATE TRIGGER prompt_cache_note_restore BEFORE INSERT ON @extschema@.prompt_cache
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.note_restore();
CREATE TRIGGER server_syncs_note_restore BEFORE INSERT ON @extschema@.server_syncs
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.note_restore();

SELECT pg_catalog.pg_extension_config_dump('@extschema@.tool_cache', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.resource_cache', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.prompt_cache', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.server_syncs', '');

ALTER TABLE @extschema@.tool_cache ENABLE ROW LEVEL SECURITY;
ALTER TABLE @extschema@.resource_cache ENABLE ROW LEVEL SECURITY;
ALTER TABLE @extschema@.prompt_cache ENABLE ROW LEVEL SECURITY;
ALTER TABLE @extschema@.server_syncs ENABLE ROW LEVEL SECURITY;

-- Of servers that the user sees: these tables have policies of their own.
CREATE POLICY tool_cache_select ON @extschema@.tool_cache
    FOR SELECT USING ((user_id = (SELECT @extschema@.nexus_hub_uid()) AND server_ref_id IN (SELECT u.id FROM @extschema@.user_servers u))
                      OR (user_id IS NULL AND server_ref_id IN (SELECT s.ref_id FROM @extschema@.system_servers s)));
CREATE POLICY resource_cache_select ON @extschema@.resource_cache
    FOR SELECT USING ((user_id = (SELECT @extschema@.nexus_hub_uid()) AND server_ref_id IN (SELECT u.id FROM @extschema@.user_servers u))
                      OR (user_id IS NULL AND server_ref_id IN (SELECT s.ref_id FROM @extschema@.system_servers s)));
CREATE POLICY prompt_cache_select ON @extschema@.prompt_cache
    FOR SELECT USING ((user_id = (SELECT @extschema@.nexus_hub_uid()) AND server_ref_id IN (SELECT u.id FROM @extschema@.user_servers u))
                      OR (user_id IS NULL AND server_ref_id IN (SELECT s.ref_id FROM @extschema@.system_servers s)));
CREATE POLICY tool_cache_owner_update ON @extschema@.tool_cache
    FOR UPDATE USING (user_id = (SELECT @extschema@.nexus_hub_uid()))
    WITH CHECK (user_id = (SELECT @extschema@.nexus_hub_uid()));
CREATE POLICY server_syncs_owner_select ON @extschema@.server_syncs
    FOR SELECT USING (user_id = (SELECT @extschema@.nexus_hub_uid()));
CREATE POLICY tool_cache_service_all ON @extschema@.tool_cache
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));
CREATE POLICY resource_cache_service_all ON @extschema@.resource_cache
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));
CREATE POLICY prompt_cache_service_all ON @extschema@.prompt_cache
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));
CREATE POLICY server_syncs_service_all ON @extschema@.server_syncs
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));

-- ── A server that goes takes its caches with it ──

CREATE FUNCTION _nexus_hub.forget_server(p_server_ref_id uuid) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    DELETE FROM @extschema@.tool_cache c WHERE c.server_ref_id = p_server_ref_id;
    DELETE FROM @extschema@.resource_cache c WHERE c.server_ref_id = p_server_ref_id;
    DELETE FROM @extschema@.prompt_cache c WHERE c.server_ref_id = p_server_ref_id;
    DELETE FROM @extschema@.server_syncs y WHERE y.server_ref_id = p_server_ref_id;
END;
COMMENT ON FUNCTION _nexus_hub.forget_server(uuid) IS 'Deletes what is cached of a server.';

CREATE FUNCTION _nexus_hub.forget_servers_cache() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF TG_ARGV[0] = 'system' THEN
        PERFORM _nexus_hub.forget_server(OLD.ref_id);
    ELSE
        PERFORM _nexus_hub.forget_server(OLD.id);
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION _nexus_hub.forget_servers_cache() IS 'Trigger: what is cached of a server goes with it, and where it gets another owner or name, which the caches hold.';
CREATE TRIGGER user_servers_forget_cache AFTER DELETE ON @extschema@.user_servers
    FOR EACH ROW EXECUTE FUNCTION _nexus_hub.forget_servers_cache('user');
CREATE TRIGGER user_servers_forget_cache_of_another AFTER UPDATE OF id, user_id, server_id ON @extschema@.user_servers
    FOR EACH ROW WHEN (OLD.id <> NEW.id OR OLD.user_id <> NEW.user_id OR OLD.server_id <> NEW.server_id)
    EXECUTE FUNCTION _nexus_hub.forget_servers_cache('user');
CREATE TRIGGER system_servers_forget_cache AFTER DELETE ON @extschema@.system_servers
    FOR EACH ROW EXECUTE FUNCTION _nexus_hub.forget_servers_cache('system');
CREATE TRIGGER system_servers_forget_cache_of_another AFTER UPDATE OF id, ref_id ON @extschema@.system_servers
    FOR EACH ROW WHEN (OLD.id <> NEW.id OR OLD.ref_id <> NEW.ref_id)
    EXECUTE FUNCTION _nexus_hub.forget_servers_cache('system');

-- ── Syncs begin ──

CREATE FUNCTION _nexus_hub.server(p_server_ref_id uuid)
RETURNS TABLE (server_ref_id uuid, server_type text, user_id uuid, server_id text, enabled boolean)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT u.id, 'user'::text, u.user_id, u.server_id, u.enabled FROM @extschema@.user_servers u WHERE u.id = p_server_ref_id
    UNION ALL
    SELECT s.ref_id, 'system'::text, NULL::uuid, s.id, s.enabled FROM @extschema@.system_servers s WHERE s.ref_id = p_server_ref_id;
END;
COMMENT ON FUNCTION _nexus_hub.server(uuid) IS 'The server of a user''s or of everybody''s with this id.';

CREATE FUNCTION _nexus_hub.cannot_sync(server_id text, is_theirs boolean) RETURNS uuid
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'cannot_sync_wrapper';
COMMENT ON FUNCTION _nexus_hub.cannot_sync(text, boolean) IS
    'Raises 42501 when the server is not theirs, the caller being a user and it everybody''s; else 22023: it is disabled.';

CREATE FUNCTION _nexus_hub.begin_sync(p_server_ref_id uuid, p_priority integer) RETURNS uuid
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- Whoever comes at the same time waits here, and then finds the job.
    INSERT INTO @extschema@.server_syncs AS y (server_ref_id, server_type, user_id, server_id)
    SELECT v.server_ref_id, v.server_type, v.user_id, v.server_id FROM _nexus_hub.server(p_server_ref_id) v
        ON CONFLICT (server_ref_id) DO UPDATE SET server_id = excluded.server_id;
    WITH added AS (
        INSERT INTO @extschema@.job_results (user_id, job_type, server_id, priority)
        SELECT y.user_id, 'server_sync', y.server_id, p_priority::smallint
          FROM @extschema@.server_syncs y
         WHERE y.server_ref_id = p_server_ref_id
           AND NOT EXISTS (SELECT FROM @extschema@.job_results j
                            WHERE j.id = y.job_id
                              -- One that runs asks as the server's config was when it was taken.
                              AND (j.status = 'pending'
                                   OR (j.status = 'running'
                                       AND NOT EXISTS (SELECT FROM @extschema@.user_servers u
                                                        WHERE u.id = p_server_ref_id AND u.updated_at > j.started_at))))
        RETURNING id)
    UPDATE @extschema@.server_syncs y
       SET job_id = a.id, requested_at = now(), tries = y.tries + 1
      FROM added a
     WHERE y.server_ref_id = p_server_ref_id;
    SELECT y.job_id FROM @extschema@.server_syncs y WHERE y.server_ref_id = p_server_ref_id;
END;
COMMENT ON FUNCTION _nexus_hub.begin_sync(uuid, integer) IS
    'The job that syncs a server: the one that is pending or running already, else a new one. The caller has been found entitled to it.';

CREATE FUNCTION @extschema@.sync_server(p_server_ref_id uuid) RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT CASE
               WHEN NOT v.enabled OR v.is_foreign THEN _nexus_hub.cannot_sync(v.server_id, NOT v.is_foreign)
               ELSE _nexus_hub.begin_sync(v.id, 5)
           END
      FROM (SELECT u.id, u.server_id, u.enabled, false AS is_foreign FROM @extschema@.user_servers u WHERE u.id = p_server_ref_id
            UNION ALL
            SELECT s.ref_id, s.id, s.enabled,
                   row_security_active('@extschema@.system_servers'::regclass) AND NOT _nexus_hub.is_service_role()
              FROM @extschema@.system_servers s
             WHERE s.ref_id = p_server_ref_id) AS v;
END;
COMMENT ON FUNCTION @extschema@.sync_server(uuid) IS
    'Has a server''s tools, resources (templates, too) and prompts listed anew, and the caches filled with them, in a background job whose id it returns; when that is pending or running already, that job''s. Its result is {"tools": 3, "resources": …, "resource_templates": …, "prompts": …, "left_out": …}. p_server_ref_id: user_servers.id, or, not for users, system_servers.ref_id. NULL: the caller has no such server. Errors: 22023 the server is disabled, 42501 a system server.';

CREATE FUNCTION _nexus_hub.expired_servers(p_at timestamptz)
RETURNS TABLE (server_ref_id uuid, server_type text, user_id uuid)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT c.server_ref_id, c.server_type, c.user_id FROM @extschema@.tool_cache c WHERE c.expires_at < p_at AND c.enabled
    UNION
    SELECT c.server_ref_id, c.server_type, c.user_id FROM @extschema@.resource_cache c WHERE c.expires_at < p_at
    UNION
    SELECT c.server_ref_id, c.server_type, c.user_id FROM @extschema@.prompt_cache c WHERE c.expires_at < p_at
    UNION
    -- One that has listed nothing.
    SELECT y.server_ref_id, y.server_type, y.user_id FROM @extschema@.server_syncs y WHERE y.expires_at < p_at;
END;
COMMENT ON FUNCTION _nexus_hub.expired_servers(timestamptz) IS 'The servers of which something in the caches is expired at a time.';

CREATE FUNCTION _nexus_hub.refresh_expired()
RETURNS TABLE (server_ref_id uuid, server_type text, user_id uuid)
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH expired AS MATERIALIZED (
        SELECT x.server_ref_id, x.server_type, x.user_id,
               (SELECT _nexus_hub.begin_sync(v.server_ref_id, 7) FROM _nexus_hub.server(x.server_ref_id) v WHERE v.enabled) AS job_id
          FROM (SELECT o.server_ref_id, o.server_type, o.user_id
                  FROM _nexus_hub.expired_servers(now()) o
                 -- In one order, or two at a time would wait for each other.
                 ORDER BY o.server_ref_id) AS x)
    SELECT e.server_ref_id, e.server_type, e.user_id FROM expired e;
END;
COMMENT ON FUNCTION _nexus_hub.refresh_expired() IS 'What refresh_expired_cache_entries does.';

CREATE FUNCTION @extschema@.refresh_expired_cache_entries()
RETURNS TABLE (server_ref_id uuid, server_type text, user_id uuid)
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT e.server_ref_id, e.server_type, e.user_id FROM _nexus_hub.refresh_expired() e;
END;
COMMENT ON FUNCTION @extschema@.refresh_expired_cache_entries() IS
    'The servers of which entries in the caches are expired; those that are enabled are synced, each in a background job, where that is not under way already. The worker does so by itself, before entries expire (nexus_hub.auto_refresh). For service_role.';

CREATE FUNCTION _nexus_hub.refresh_due(p_limit integer, p_lead interval) RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '20ms'
BEGIN ATOMIC
    -- Servers that went without a word: their table was emptied, and not for a moment.
    SELECT _nexus_hub.forget_server(y.server_ref_id)
      FROM (SELECT o.server_ref_id
              FROM @extschema@.server_syncs o
             WHERE greatest(o.requested_at, o.synced_at) < now() - interval '1 day' AND NOT EXISTS (SELECT FROM _nexus_hub.server(o.server_ref_id))
             LIMIT p_limit
               FOR UPDATE SKIP LOCKED) AS y;
    WITH expired AS MATERIALIZED (
        SELECT e.server_ref_id FROM _nexus_hub.expired_servers(now() + p_lead) e),
    due AS MATERIALIZED (
        SELECT y.server_ref_id
          FROM @extschema@.server_syncs y
         WHERE y.server_ref_id IN (SELECT e.server_ref_id FROM expired e)
           -- What does not go well is tried less and less often.
           AND (y.tries = 0 OR y.requested_at < now() - least(interval '5 minutes' * (2 ^ least(y.tries - 1, 10)), interval '6 hours'))
           AND EXISTS (SELECT FROM _nexus_hub.server(y.server_ref_id) v WHERE v.enabled)
           AND NOT EXISTS (SELECT FROM @extschema@.job_results j WHERE j.id = y.job_id AND j.status IN ('pending', 'running'))
         ORDER BY y.requested_at
         LIMIT p_limit
           FOR UPDATE OF y SKIP LOCKED)
    SELECT count(_nexus_hub.begin_sync(d.server_ref_id, 7))::integer FROM due d;
END;
COMMENT ON FUNCTION _nexus_hub.refresh_due(integer, interval) IS
    'Called by the worker: begins syncs of servers that were synced once, and of which something expires within p_lead, p_limit at most, those first that have waited longest, and tells how many. One that fails is tried again after 5 minutes, and then after twice as long each time, up to 6 hours.';

-- ── Syncs end ──

CREATE VIEW _nexus_hub.server_syncs AS
    SELECT y.server_ref_id, y.job_id FROM @extschema@.server_syncs y;
COMMENT ON VIEW _nexus_hub.server_syncs IS 'The table of that name, for the worker.';
COMMENT ON COLUMN _nexus_hub.server_syncs.server_ref_id IS 'The server.';
COMMENT ON COLUMN _nexus_hub.server_syncs.job_id IS 'The last sync''s job.';

CREATE FUNCTION _nexus_hub.synced_server(p_job_id uuid, p_lease uuid)
RETURNS TABLE (server_ref_id uuid, server_type text, user_id uuid, server_id text, is_changed boolean)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Locked, so that it does not go while its entries are written. By its id: another one of the name may be there by now.
    RETURN QUERY
    SELECT u.id, 'user'::text, u.user_id, u.server_id, u.updated_at > j.started_at
      FROM _nexus_hub.job_results j
      JOIN _nexus_hub.server_syncs y ON y.job_id = j.id
      JOIN _nexus_hub.user_servers u ON u.id = y.server_ref_id
     WHERE j.id = p_job_id AND j.lease = p_lease AND u.user_id = j.user_id AND u.server_id = j.server_id
       FOR KEY SHARE OF u;
    IF NOT FOUND THEN
        RETURN QUERY
        SELECT s.ref_id, 'system'::text, NULL::uuid, s.id, false
          FROM _nexus_hub.job_results j
          JOIN _nexus_hub.server_syncs y ON y.job_id = j.id
          JOIN _nexus_hub.system_servers s ON s.ref_id = y.server_ref_id
         WHERE j.id = p_job_id AND j.lease = p_lease AND j.user_id IS NULL AND s.id = j.server_id
           FOR KEY SHARE OF s;
    END IF;
END
$$;
COMMENT ON FUNCTION _nexus_hub.synced_server(uuid, uuid) IS 'The server that a sync''s job is about, if it runs under that lease, is the server''s last one, and the server is there; and whether it was changed since the job was taken.';

CREATE FUNCTION _nexus_hub.listed(p_list jsonb, p_key text) RETURNS TABLE (name text, definition jsonb)
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT DISTINCT ON (1) l.definition ->> p_key, l.definition
      FROM jsonb_array_elements(p_list) WITH ORDINALITY AS l (definition, place)
     WHERE jsonb_typeof(l.definition -> p_key) = 'string'
     ORDER BY 1, l.place;
END;
COMMENT ON FUNCTION _nexus_hub.listed(jsonb, text) IS 'What a server has listed, by name, the first where there are two of one name; what has no name is left out.';

CREATE FUNCTION _nexus_hub.write_tools(p_server_ref_id uuid, p_server_type text, p_user_id uuid, p_server_id text, p_list jsonb, p_at timestamptz, p_expires_at timestamptz)
RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO @extschema@.tool_cache AS c (server_ref_id, server_type, user_id, tool_name, namespaced_name, title, description,
                                             input_schema, definition, created_at, changed_at, updated_at, expires_at)
    SELECT p_server_ref_id, p_server_type, p_user_id, l.name, p_server_id || '__' || l.name, l.definition ->> 'title', l.definition ->> 'description',
           coalesce(l.definition -> 'inputSchema', '{"type": "object"}'), l.definition, p_at, p_at, p_at, p_expires_at
      FROM _nexus_hub.listed(p_list, 'name') l
     WHERE length(l.name) BETWEEN 1 AND 200
        ON CONFLICT (server_ref_id, tool_name) DO UPDATE
           SET server_type = excluded.server_type, user_id = excluded.user_id, namespaced_name = excluded.namespaced_name,
               title = excluded.title, description = excluded.description, input_schema = excluded.input_schema,
               changed_at = CASE WHEN c.definition IS DISTINCT FROM excluded.definition THEN p_at ELSE c.changed_at END,
               definition = excluded.definition, updated_at = p_at, expires_at = p_expires_at;
    DELETE FROM @extschema@.tool_cache c WHERE c.server_ref_id = p_server_ref_id AND c.updated_at <> p_at;
    SELECT count(*)::integer FROM @extschema@.tool_cache c WHERE c.server_ref_id = p_server_ref_id;
END;
COMMENT ON FUNCTION _nexus_hub.write_tools(uuid, text, uuid, text, jsonb, timestamptz, timestamptz) IS 'Makes a server''s entries in tool_cache those of p_list, and tells how many these are.';

CREATE FUNCTION _nexus_hub.write_resources(p_server_ref_id uuid, p_server_type text, p_user_id uuid, p_are_templates boolean, p_list jsonb, p_at timestamptz, p_expires_at timestamptz)
RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO @extschema@.resource_cache AS c (server_ref_id, server_type, user_id, uri, is_template, name, title, description, mime_type,
                                                 definition, created_at, changed_at, updated_at, expires_at)
    SELECT p_server_ref_id, p_server_type, p_user_id, l.name, p_are_templates, l.definition ->> 'name', l.definition ->> 'title',
           l.definition ->> 'description', l.definition ->> 'mimeType', l.definition, p_at, p_at, p_at, p_expires_at
      FROM _nexus_hub.listed(p_list, CASE WHEN p_are_templates THEN 'uriTemplate' ELSE 'uri' END) l
     WHERE octet_length(l.name) BETWEEN 1 AND 2000
        ON CONFLICT (server_ref_id, uri, is_template) DO UPDATE
           SET server_type = excluded.server_type, user_id = excluded.user_id, name = excluded.name,
               title = excluded.title, description = excluded.description, mime_type = excluded.mime_type,
               changed_at = CASE WHEN c.definition IS DISTINCT FROM excluded.definition THEN p_at ELSE c.changed_at END,
               definition = excluded.definition, updated_at = p_at, expires_at = p_expires_at;
    DELETE FROM @extschema@.resource_cache c
     WHERE c.server_ref_id = p_server_ref_id AND c.is_template = p_are_templates AND c.updated_at <> p_at;
    SELECT count(*)::integer FROM @extschema@.resource_cache c WHERE c.server_ref_id = p_server_ref_id AND c.is_template = p_are_templates;
END;
COMMENT ON FUNCTION _nexus_hub.write_resources(uuid, text, uuid, boolean, jsonb, timestamptz, timestamptz) IS 'Makes a server''s entries in resource_cache those of p_list, and tells how many these are.';

CREATE FUNCTION _nexus_hub.write_prompts(p_server_ref_id uuid, p_server_type text, p_user_id uuid, p_server_id text, p_list jsonb, p_at timestamptz, p_expires_at timestamptz)
RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO @extschema@.prompt_cache AS c (server_ref_id, server_type, user_id, prompt_name, namespaced_name, title, description,
                                               arguments, definition, created_at, changed_at, updated_at, expires_at)
    SELECT p_server_ref_id, p_server_type, p_user_id, l.name, p_server_id || '__' || l.name, l.definition ->> 'title', l.definition ->> 'description',
           coalesce(l.definition -> 'arguments', '[]'), l.definition, p_at, p_at, p_at, p_expires_at
      FROM _nexus_hub.listed(p_list, 'name') l
     WHERE length(l.name) BETWEEN 1 AND 200
        ON CONFLICT (server_ref_id, prompt_name) DO UPDATE
           SET server_type = excluded.server_type, user_id = excluded.user_id, namespaced_name = excluded.namespaced_name,
               title = excluded.title, description = excluded.description, arguments = excluded.arguments,
               changed_at = CASE WHEN c.definition IS DISTINCT FROM excluded.definition THEN p_at ELSE c.changed_at END,
               definition = excluded.definition, updated_at = p_at, expires_at = p_expires_at;
    DELETE FROM @extschema@.prompt_cache c WHERE c.server_ref_id = p_server_ref_id AND c.updated_at <> p_at;
    SELECT count(*)::integer FROM @extschema@.prompt_cache c WHERE c.server_ref_id = p_server_ref_id;
END;
COMMENT ON FUNCTION _nexus_hub.write_prompts(uuid, text, uuid, text, jsonb, timestamptz, timestamptz) IS 'Makes a server''s entries in prompt_cache those of p_list, and tells how many these are.';

CREATE FUNCTION _nexus_hub.note_sync(p_server_ref_id uuid, p_at timestamptz, p_expires_at timestamptz, p_error text)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE @extschema@.server_syncs y
       SET tries = CASE WHEN p_error IS NULL THEN 0 ELSE y.tries END,
           synced_at = CASE WHEN p_error IS NULL THEN p_at ELSE y.synced_at END,
           expires_at = coalesce(p_expires_at, y.expires_at),
           failed_at = CASE WHEN p_error IS NOT NULL THEN p_at END,
           error = p_error
     WHERE y.server_ref_id = p_server_ref_id;
END;
COMMENT ON FUNCTION _nexus_hub.note_sync(uuid, timestamptz, timestamptz, text) IS 'Writes down how a sync went.';

CREATE FUNCTION _nexus_hub.settle_sync(p_job_id uuid, p_lease uuid, p_catalogue text, p_error text, p_ttl_minutes integer,
                                       OUT outcome text, OUT answer text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '20ms'
AS $$
DECLARE
    v record;
    catalogue jsonb;
    listed integer;
    tools integer;
    resources integer;
    templates integer;
    prompts integer;
    at constant timestamptz := clock_timestamp();
    expires_at timestamptz := at + make_interval(mins => p_ttl_minutes);
BEGIN
    BEGIN
        SELECT * INTO v FROM _nexus_hub.synced_server(p_job_id, p_lease);
        IF NOT FOUND THEN
            outcome := 'gone';
            RETURN;
        END IF;
    EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
        outcome := 'locked';
        RETURN;
    END;
    -- What the server lists now may be something else.
    IF v.is_changed THEN
        expires_at := at;
    END IF;
    outcome := 'written';
    BEGIN
        IF p_error IS NULL THEN
            catalogue := p_catalogue::jsonb;
            tools := _nexus_hub.write_tools(v.server_ref_id, v.server_type, v.user_id, v.server_id, catalogue -> 'tools', at, expires_at);
            resources := _nexus_hub.write_resources(v.server_ref_id, v.server_type, v.user_id, false, catalogue -> 'resources', at, expires_at);
            templates := _nexus_hub.write_resources(v.server_ref_id, v.server_type, v.user_id, true, catalogue -> 'resourceTemplates', at, expires_at);
            prompts := _nexus_hub.write_prompts(v.server_ref_id, v.server_type, v.user_id, v.server_id, catalogue -> 'prompts', at, expires_at);
            SELECT sum(jsonb_array_length(l.value)) INTO listed FROM jsonb_each(catalogue) l;
            answer := jsonb_build_object('tools', tools, 'resources', resources, 'resource_templates', templates, 'prompts', prompts,
                                         'left_out', listed - tools - resources - templates - prompts);
        END IF;
        PERFORM _nexus_hub.note_sync(v.server_ref_id, at, CASE WHEN p_error IS NULL THEN expires_at END, p_error);
        RETURN;
    EXCEPTION
        WHEN lock_not_available OR deadlock_detected THEN
            outcome := 'locked';
            RETURN;
        WHEN serialization_failure OR operator_intervention THEN
            RAISE;
        WHEN OTHERS OR assert_failure THEN
            -- What cannot be stored, or a trigger of the user's does not want.
            outcome := 'failed';
            answer := 'what the server lists cannot be stored: ' || SQLERRM;
    END;
    BEGIN
        PERFORM _nexus_hub.note_sync(v.server_ref_id, at, NULL, answer);
    EXCEPTION
        WHEN serialization_failure OR operator_intervention THEN
            RAISE;
        WHEN OTHERS OR assert_failure THEN
            NULL;
    END;
END
$$;
COMMENT ON FUNCTION _nexus_hub.settle_sync(uuid, uuid, text, text, integer) IS
    'Writes what a sync''s job has found (p_catalogue: a JSON object with the arrays tools, resources, resourceTemplates and prompts), or why it found nothing (p_error), before the job''s end is written. outcome written: answer is the job''s result, if it has one; failed: answer is the job''s error; locked: a session keeps rows locked, and it is to be tried again; gone: the job, or its server, is not there any more, or another sync was begun.';

-- ── How the caches stand ──

CREATE FUNCTION _nexus_hub.pages_percent(p_table regclass, p_pages integer) RETURNS real
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT least(100, 100.0 * p_pages / greatest(pg_relation_size(p_table) / current_setting('block_size')::integer, 1))::real;
END;
COMMENT ON FUNCTION _nexus_hub.pages_percent(regclass, integer) IS 'The share of a table, in percent, that is so many pages; 100: it has no more.';

CREATE FUNCTION _nexus_hub.cache_situation(p_pages integer, OUT entries bigint, OUT expired_share double precision, OUT failing_syncs bigint)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
SET jit = off
BEGIN ATOMIC
    WITH percent (tools, resources, prompts) AS MATERIALIZED (
        SELECT _nexus_hub.pages_percent('@extschema@.tool_cache'::regclass, p_pages),
               _nexus_hub.pages_percent('@extschema@.resource_cache'::regclass, p_pages),
               _nexus_hub.pages_percent('@extschema@.prompt_cache'::regclass, p_pages)),
    seen AS (
        SELECT c.server_ref_id, (SELECT p.tools FROM percent p) AS percent, count(*) AS entries, count(*) FILTER (WHERE c.expires_at < now()) AS expired
          FROM @extschema@.tool_cache c TABLESAMPLE system ((SELECT p.tools FROM percent p))
         WHERE c.enabled
         GROUP BY c.server_ref_id
        UNION ALL
        SELECT c.server_ref_id, (SELECT p.resources FROM percent p), count(*), count(*) FILTER (WHERE c.expires_at < now())
          FROM @extschema@.resource_cache c TABLESAMPLE system ((SELECT p.resources FROM percent p))
         GROUP BY c.server_ref_id
        UNION ALL
        SELECT c.server_ref_id, (SELECT p.prompts FROM percent p), count(*), count(*) FILTER (WHERE c.expires_at < now())
          FROM @extschema@.prompt_cache c TABLESAMPLE system ((SELECT p.prompts FROM percent p))
         GROUP BY c.server_ref_id),
    total AS (
        SELECT coalesce(sum(s.entries * 100 / s.percent), 0) AS entries, coalesce(sum(s.expired * 100 / s.percent), 0) AS expired
          FROM seen s
         -- What nobody keeps fresh, and nobody can call, is no news.
         WHERE EXISTS (SELECT FROM _nexus_hub.server(s.server_ref_id) v WHERE v.enabled))
    SELECT t.entries::bigint, coalesce(t.expired / nullif(t.entries, 0), 0),
           (SELECT count(*)
              FROM (SELECT FROM @extschema@.server_syncs y
                     WHERE y.error IS NOT NULL AND EXISTS (SELECT FROM _nexus_hub.server(y.server_ref_id) v WHERE v.enabled)
                     LIMIT 1000) AS f)
      FROM total t;
END;
COMMENT ON FUNCTION _nexus_hub.cache_situation(integer) IS
    'Entries in the caches of servers that are enabled, which share of them is expired (0 to 1), and how many of these servers could not be synced last (1000: or more). Of each table so many pages are looked at, in larger ones at random, and the rest estimated.';
