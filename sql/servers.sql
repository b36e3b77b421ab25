-- MCP servers: those of everybody (system_servers) and those of one user (user_servers).

CREATE TABLE @extschema@.system_servers (
    id text PRIMARY KEY
        CONSTRAINT system_servers_id_length CHECK (length(id) BETWEEN 1 AND 200),
    ref_id uuid NOT NULL UNIQUE DEFAULT gen_random_uuid(),
    name text NOT NULL,
    config jsonb NOT NULL
        CONSTRAINT system_servers_config_object CHECK (jsonb_typeof(config) = 'object'),
    enabled boolean NOT NULL DEFAULT true,
    rate_limit_per_minute integer NOT NULL DEFAULT 60
        CONSTRAINT system_servers_rate_limit_range CHECK (rate_limit_per_minute >= 0),
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE @extschema@.system_servers IS 'MCP servers that every user''s jobs may call. The config is stored in clear: put no credentials here, but {{secret:name}} where they go (see create_secret).';
COMMENT ON COLUMN @extschema@.system_servers.id IS 'The name that jobs use as server_id, 1 to 200 characters.';
COMMENT ON COLUMN @extschema@.system_servers.ref_id IS 'A stable uuid for references from other tables.';
COMMENT ON COLUMN @extschema@.system_servers.name IS 'The name shown to people.';
COMMENT ON COLUMN @extschema@.system_servers.config IS 'How to reach the server: {"url": "https://host/mcp", "headers": {"Name": "value"}, "timeout_ms": 30000}. Unknown keys are kept.';
COMMENT ON COLUMN @extschema@.system_servers.enabled IS 'Jobs of a disabled server fail; false keeps the row without using it.';
COMMENT ON COLUMN @extschema@.system_servers.rate_limit_per_minute IS 'Calls a user may make in a clock minute, 0 or more: jobs beyond wait for the next one, and check_rate_limit counts with them.';
COMMENT ON COLUMN @extschema@.system_servers.created_at IS 'When the row was made.';

CREATE TABLE @extschema@.user_servers (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL,
    server_id text NOT NULL
        CONSTRAINT user_servers_server_id_length CHECK (length(server_id) BETWEEN 1 AND 200),
    name text NOT NULL,
    transport text NOT NULL DEFAULT 'http'
        CONSTRAINT user_servers_transport_known CHECK (transport = 'http'),
    config_encrypted bytea
        CONSTRAINT user_servers_config_encrypted_length CHECK (octet_length(config_encrypted) BETWEEN 28 AND 100000),
    enabled boolean NOT NULL DEFAULT true,
    rate_limit_per_minute integer
        CONSTRAINT user_servers_rate_limit_range CHECK (rate_limit_per_minute >= 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT user_servers_user_id_server_id_key UNIQUE (user_id, server_id)
);
COMMENT ON TABLE @extschema@.user_servers IS 'MCP servers of one user each, with the credentials encrypted.';
COMMENT ON COLUMN @extschema@.user_servers.id IS 'The row''s id, what update_server and delete_server take.';
COMMENT ON COLUMN @extschema@.user_servers.user_id IS 'The user that owns the server; only that user''s jobs use it.';
COMMENT ON COLUMN @extschema@.user_servers.server_id IS 'The name that jobs use as server_id, 1 to 200 characters, unique for the user; it wins over a system server of that name.';
COMMENT ON COLUMN @extschema@.user_servers.name IS 'The name shown to people.';
COMMENT ON COLUMN @extschema@.user_servers.transport IS 'How the server is reached; http (streamable HTTP) is the only one.';
COMMENT ON COLUMN @extschema@.user_servers.config_encrypted IS 'The config as encrypt_config seals it (12-byte IV, ciphertext, 16-byte tag); the plaintext is {"url": …, "headers": {…}, "timeout_ms": …}.';
COMMENT ON COLUMN @extschema@.user_servers.enabled IS 'A disabled server is passed over; false keeps the row without using it.';
COMMENT ON COLUMN @extschema@.user_servers.rate_limit_per_minute IS 'Calls allowed in a clock minute, 0 or more; NULL: any number. Jobs beyond wait for the next minute, and check_rate_limit counts with them.';
COMMENT ON COLUMN @extschema@.user_servers.created_at IS 'When the row was made.';
COMMENT ON COLUMN @extschema@.user_servers.updated_at IS 'When update_server changed the row last.';

ALTER TABLE @extschema@.system_servers ENABLE ROW LEVEL SECURITY;
ALTER TABLE @extschema@.user_servers ENABLE ROW LEVEL SECURITY;

CREATE POLICY system_servers_enabled_select ON @extschema@.system_servers
    FOR SELECT USING (enabled);

-- (SELECT …) makes the planner evaluate these once a statement, not once a row.
CREATE POLICY user_servers_owner_all ON @extschema@.user_servers
    FOR ALL USING (user_id = (SELECT @extschema@.nexus_hub_uid()))
    WITH CHECK (user_id = (SELECT @extschema@.nexus_hub_uid()));

CREATE POLICY system_servers_service_all ON @extschema@.system_servers
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));
CREATE POLICY user_servers_service_all ON @extschema@.user_servers
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));

SELECT pg_catalog.pg_extension_config_dump('@extschema@.system_servers', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.user_servers', '');

CREATE FUNCTION _nexus_hub.owner(user_id uuid, caller uuid, bound boolean, required boolean) RETURNS uuid
LANGUAGE c IMMUTABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'owner_wrapper';
COMMENT ON FUNCTION _nexus_hub.owner(uuid, uuid, boolean, boolean) IS
    'The owner of a new row: user_id, else the caller''s id. Raises 42501 when the caller is bound to own rows and it is another''s, 22023 when there is none but one is required.';

CREATE FUNCTION _nexus_hub.server_exists(server_id text) RETURNS uuid
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'server_exists_wrapper';
COMMENT ON FUNCTION _nexus_hub.server_exists(text) IS 'Raises 23505: the user has a server of that name.';

CREATE FUNCTION _nexus_hub.server_id(server_id text) RETURNS text
LANGUAGE c IMMUTABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'server_id_wrapper';
COMMENT ON FUNCTION _nexus_hub.server_id(text) IS
    'Its argument; raises 22023 when it is not fit to be a server''s id.';

CREATE FUNCTION _nexus_hub.seal_server_config(config text) RETURNS bytea
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'seal_server_config_wrapper';
COMMENT ON FUNCTION _nexus_hub.seal_server_config(text) IS
    'Checks a server''s config (22023) and encrypts it.';

-- The functions below run with the caller's rights: row-level security decides. Their bodies are bound when they are
-- created, so the caller needs EXECUTE on the internal functions they call, but no way into the schema _nexus_hub.

CREATE FUNCTION @extschema@.add_server(p_server_id text, p_name text, p_config jsonb, p_user_id uuid DEFAULT NULL)
RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH added AS (
        INSERT INTO @extschema@.user_servers (user_id, server_id, name, config_encrypted)
        VALUES (
            _nexus_hub.owner(p_user_id, @extschema@.nexus_hub_uid(), row_security_active('@extschema@.user_servers'::regclass)
                             AND NOT _nexus_hub.is_service_role(), true),
            _nexus_hub.server_id(p_server_id),
            coalesce(p_name, p_server_id),
            _nexus_hub.seal_server_config(p_config::text))
        ON CONFLICT (user_id, server_id) DO NOTHING
        RETURNING id, _nexus_hub.note_vault_use('change', 'server ' || id::text))
    SELECT coalesce((SELECT id FROM added), _nexus_hub.server_exists(p_server_id));
END;
COMMENT ON FUNCTION @extschema@.add_server(text, text, jsonb, uuid) IS
    'Adds an MCP server for a user and returns the row''s id. p_server_id: the name jobs use, 1 to 200 characters. p_name: for people (NULL: p_server_id). p_config: {"url", "headers", "timeout_ms"}, encrypted before anything is written; {{secret:name}} in the URL or a header''s value stands for the user''s own secret of that name. p_user_id: the owner (NULL: the caller''s nexus_hub_uid()). Errors: 22023 bad argument, 23505 the user has that server, 42501 not the caller''s own, F0000 no vault key.';

CREATE FUNCTION @extschema@.update_server(p_id uuid, p_name text DEFAULT NULL, p_config jsonb DEFAULT NULL, p_enabled boolean DEFAULT NULL)
RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- Apart from the next statement, because reading the old ciphertext is a right that users don't have.
    UPDATE @extschema@.user_servers
       SET config_encrypted = _nexus_hub.seal_server_config(p_config::text)
     WHERE id = p_id AND p_config IS NOT NULL
    RETURNING _nexus_hub.note_vault_use('change', 'server ' || p_id::text);
    WITH updated AS (
        UPDATE @extschema@.user_servers
           SET name = coalesce(p_name, name), enabled = coalesce(p_enabled, enabled), updated_at = now()
         WHERE id = p_id
        RETURNING 1)
    SELECT count(*) > 0 FROM updated;
END;
COMMENT ON FUNCTION @extschema@.update_server(uuid, text, jsonb, boolean) IS
    'Changes a user''s server; what is NULL stays. p_config replaces the whole config. Returns false when the caller has no such server. Errors: 22023 bad config, F0000 no vault key.';

CREATE FUNCTION @extschema@.delete_server(p_id uuid) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH deleted AS (
        DELETE FROM @extschema@.user_servers WHERE id = p_id
        RETURNING _nexus_hub.note_vault_use('change', 'server ' || p_id::text))
    SELECT count(*) > 0 FROM deleted;
END;
COMMENT ON FUNCTION @extschema@.delete_server(uuid) IS
    'Deletes a user''s server with its credentials. Returns false when the caller has no such server. Jobs that wait for it will fail.';

CREATE FUNCTION @extschema@.list_servers()
RETURNS TABLE (id uuid, kind text, user_id uuid, server_id text, name text, transport text, enabled boolean,
               rate_limit_per_minute integer, created_at timestamptz, updated_at timestamptz)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT u.id, 'user'::text, u.user_id, u.server_id, u.name, u.transport, u.enabled, u.rate_limit_per_minute, u.created_at, u.updated_at
      FROM @extschema@.user_servers u
    UNION ALL
    SELECT s.ref_id, 'system'::text, NULL::uuid, s.id, s.name, 'http'::text, s.enabled, s.rate_limit_per_minute, s.created_at, NULL::timestamptz
      FROM @extschema@.system_servers s
    ORDER BY 2, 4, 3;
END;
COMMENT ON FUNCTION @extschema@.list_servers() IS
    'The servers the caller may use: kind is user (own) or system (everybody''s, id is its ref_id). Never shows a config.';
