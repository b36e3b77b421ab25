-- What CREATE EXTENSION made in version 0.1.0: the tests update from it.

-- Runs first: what must hold before anything is created, and the schema of the internals.

-- Nothing below may be found in the schema that is installed into: others may have put functions and operators there,
-- and this script runs as a superuser. Every name of ours is written with its schema.
SELECT pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);

DO $$
BEGIN
    IF pg_catalog.getdatabaseencoding() <> 'UTF8' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = 'nexus_hub needs a database with encoding UTF8',
            DETAIL = pg_catalog.format('This database has encoding %s.', pg_catalog.getdatabaseencoding()),
            HINT = 'Create a database with ENCODING ''UTF8'' and install the extension there.';
    END IF;
END
$$;

-- A plain CREATE: an existing schema of that name could belong to somebody else.
CREATE SCHEMA _nexus_hub;
COMMENT ON SCHEMA _nexus_hub IS
    'Internals of the extension nexus_hub. Granted to nobody; the public functions reach in through bodies bound at install time.';

CREATE FUNCTION @extschema@.nexus_hub_uid() RETURNS uuid
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- The pattern keeps a foreign subject (an e-mail address, say) from raising an error in every policy.
    SELECT CASE
        WHEN claim.sub ~* '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$' THEN claim.sub::uuid
    END
    FROM (SELECT coalesce(
        nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub',
        nullif(current_setting('request.jwt.claim.sub', true), ''))) AS claim (sub);
END;
COMMENT ON FUNCTION @extschema@.nexus_hub_uid() IS
    'The calling user''s id: "sub" of the setting request.jwt.claims, else the setting request.jwt.claim.sub; NULL when neither holds a uuid.';

CREATE FUNCTION _nexus_hub.is_service_role() RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- The role need not exist, now or ever.
    SELECT EXISTS (SELECT FROM pg_roles r WHERE r.rolname = 'service_role' AND pg_has_role(r.oid, 'USAGE'));
END;
COMMENT ON FUNCTION _nexus_hub.is_service_role() IS 'Whether the current user has the rights of the role service_role: the trusted back end, which sees all rows.';

-- The audit of the vault: who has used it. Entries are gathered in Rust (src/audit.rs), and written by the worker.

CREATE TABLE _nexus_hub.vault_audit_log (
    at timestamptz NOT NULL,
    kind text NOT NULL
        CONSTRAINT vault_audit_log_kind_known CHECK (kind IN ('decrypt', 'get', 'rotate', 'change', 'lost')),
    object text
        CONSTRAINT vault_audit_log_object_length CHECK (octet_length(object) <= 100),
    outcome text
        CONSTRAINT vault_audit_log_outcome_known CHECK (outcome IN ('allowed', 'refused', 'failed', 'rolled_back', 'prepared')),
    count bigint NOT NULL
        CONSTRAINT vault_audit_log_count_positive CHECK (count > 0),
    role text,
    sub uuid,
    CONSTRAINT vault_audit_log_outcome_there CHECK ((outcome IS NULL) = (kind = 'lost'))
);
COMMENT ON TABLE _nexus_hub.vault_audit_log IS 'Who has used the vault, when, what for and with what outcome; never a value. One row for all equal uses of a transaction. It goes with the database''s dump.';
COMMENT ON COLUMN _nexus_hub.vault_audit_log.at IS 'When it was done, or done first; written when the transaction ends.';
COMMENT ON COLUMN _nexus_hub.vault_audit_log.kind IS 'decrypt: decrypt_token, decrypt_config. get: a stored secret was read. rotate: rotate_vault_key, adopt_vault_key. change: a stored secret was written or deleted. lost: entries for which there was no room in shared memory.';
COMMENT ON COLUMN _nexus_hub.vault_audit_log.object IS 'What it was done to: of decrypt the context, else the row or the key''s fingerprint; its first 100 bytes. NULL: not named, or one of more than 16 that the transaction has used.';
COMMENT ON COLUMN _nexus_hub.vault_audit_log.outcome IS 'allowed; refused: the caller may not; failed: it could not be decrypted or done; rolled_back: changed, and taken back with its transaction; prepared: changed in a transaction that was prepared, and may have been taken back later. NULL: lost.';
COMMENT ON COLUMN _nexus_hub.vault_audit_log.count IS 'How many times.';
COMMENT ON COLUMN _nexus_hub.vault_audit_log.role IS 'The role that called, outside of SECURITY DEFINER functions. NULL: several.';
COMMENT ON COLUMN _nexus_hub.vault_audit_log.sub IS 'nexus_hub_uid() of the caller. NULL: none, or several.';
-- For pruning, and for looking at a day.
CREATE INDEX vault_audit_log_at ON _nexus_hub.vault_audit_log (at);
-- It has no key, and is pruned: without this, not where a publication is for all tables.
ALTER TABLE _nexus_hub.vault_audit_log REPLICA IDENTITY FULL;
SELECT pg_catalog.pg_extension_config_dump('_nexus_hub.vault_audit_log', '');

CREATE VIEW @extschema@.vault_audit WITH (security_barrier) AS
    SELECT l.at, l.kind, l.object, l.outcome, l.count, l.role, l.sub FROM _nexus_hub.vault_audit_log AS l;
COMMENT ON VIEW @extschema@.vault_audit IS
    'Who has used the vault, when, what for and with what outcome; never a value. One row for all equal uses of a transaction, about a second after its end, also after a rollback. For the owner and service_role to read.';
COMMENT ON COLUMN @extschema@.vault_audit.at IS 'When it was done, or done first.';
COMMENT ON COLUMN @extschema@.vault_audit.kind IS 'decrypt: decrypt_token, decrypt_config. get: a stored secret was read. rotate: rotate_vault_key, adopt_vault_key. change: a stored secret was written or deleted. lost: entries for which there was no room in shared memory.';
COMMENT ON COLUMN @extschema@.vault_audit.object IS 'What it was done to: of decrypt the context, else the row or the key''s fingerprint; its first 100 bytes. NULL: not named, or one of more than 16 that the transaction has used.';
COMMENT ON COLUMN @extschema@.vault_audit.outcome IS 'allowed; refused: the caller may not; failed: it could not be decrypted or done; rolled_back: changed, and taken back with its transaction; prepared: changed in a transaction that was prepared, and may have been taken back later. NULL: lost.';
COMMENT ON COLUMN @extschema@.vault_audit.count IS 'How many times.';
COMMENT ON COLUMN @extschema@.vault_audit.role IS 'The role that called, outside of SECURITY DEFINER functions. NULL: several.';
COMMENT ON COLUMN @extschema@.vault_audit.sub IS 'nexus_hub_uid() of the caller. NULL: none, or several.';

CREATE FUNCTION _nexus_hub.note_vault_use(kind text, object text) RETURNS void
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'note_vault_use_wrapper';
COMMENT ON FUNCTION _nexus_hub.note_vault_use(text, text) IS
    'Notes a use of the vault as the caller''s. kind: decrypt, get, rotate or change. object: what it was done to, no secret. Errors: 22023 unknown kind.';

-- The worker has jobs to do: it does not wait for whoever has the table locked, but tries again in a while.
CREATE FUNCTION _nexus_hub.write_vault_audit(
    p_at timestamptz[], p_kind text[], p_object text[], p_outcome text[], p_count bigint[], p_role oid[], p_sub uuid[]) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '100ms'
BEGIN ATOMIC
    INSERT INTO _nexus_hub.vault_audit_log (at, kind, object, outcome, count, role, sub)
    SELECT e.at, e.kind, e.object, e.outcome, e.count, pg_get_userbyid(e.role), e.sub
      FROM unnest(p_at, p_kind, p_object, p_outcome, p_count, p_role, p_sub) AS e (at, kind, object, outcome, count, role, sub);
END;
COMMENT ON FUNCTION _nexus_hub.write_vault_audit(timestamptz[], text[], text[], text[], bigint[], oid[], uuid[]) IS
    'Called by the worker: writes entries, with the roles by their names.';

CREATE FUNCTION _nexus_hub.is_vault_audit_older(p_than interval) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '100ms'
BEGIN ATOMIC
    SELECT EXISTS (SELECT FROM _nexus_hub.vault_audit_log l WHERE l.at < now() - p_than);
END;
COMMENT ON FUNCTION _nexus_hub.is_vault_audit_older(interval) IS 'Called by the worker: whether there are entries older than that.';

CREATE FUNCTION _nexus_hub.prune_vault_audit(p_older_than interval, p_limit integer) RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '100ms'
BEGIN ATOMIC
    WITH deleted AS (
        DELETE FROM _nexus_hub.vault_audit_log l
         WHERE l.ctid = ANY (ARRAY(
                   SELECT o.ctid FROM _nexus_hub.vault_audit_log o WHERE o.at < now() - p_older_than ORDER BY o.at LIMIT p_limit))
        RETURNING 1)
    SELECT count(*)::integer FROM deleted;
END;
COMMENT ON FUNCTION _nexus_hub.prune_vault_audit(interval, integer) IS 'Deletes entries older than that, the oldest first and so many at most, and returns how many.';

CREATE FUNCTION @extschema@.cleanup_vault_audit(p_days integer DEFAULT 90) RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH deleted AS (
        DELETE FROM _nexus_hub.vault_audit_log l WHERE l.at < now() - make_interval(days => greatest(p_days, 0)) RETURNING 1)
    SELECT count(*)::integer FROM deleted;
END;
COMMENT ON FUNCTION @extschema@.cleanup_vault_audit(integer) IS
    'Deletes entries of vault_audit, and returns how many. p_days: those older than so many days (0 or less: all). For the owner alone: those who are audited cannot erase. The worker does the same after nexus_hub.audit_retention.';

-- The vault. Tokens are sealed and opened in Rust (src/vault.rs); configs are tokens that hold JSON.

CREATE FUNCTION @extschema@.encrypt_token(token text, context text DEFAULT NULL) RETURNS bytea
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'encrypt_token_wrapper';
COMMENT ON FUNCTION @extschema@.encrypt_token(text, text) IS
    'Encrypts a text with AES-256-GCM under the first vault key: 12-byte random IV, ciphertext, 16-byte tag, as WebCrypto lays it out. context, where given, is authenticated but not stored: the same must be given to decrypt. NULL in, NULL out. Errors: F0000 no vault key.';
CREATE FUNCTION @extschema@.decrypt_token(encrypted bytea, context text DEFAULT NULL) RETURNS text
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'decrypt_token_wrapper';
COMMENT ON FUNCTION @extschema@.decrypt_token(bytea, text) IS
    'Decrypts what encrypt_token or a WebCrypto program made, with any of the vault keys. NULL in, NULL out. Errors: 22023 too short to be a ciphertext or not text inside, 22000 no key opens it, F0000 no vault key.';
CREATE FUNCTION _nexus_hub.decrypt_json(encrypted bytea, context text) RETURNS text
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'decrypt_json_wrapper';
COMMENT ON FUNCTION _nexus_hub.decrypt_json(bytea, text) IS
    'decrypt_token for a text that must be JSON. The check comes before the cast, whose error would quote the secret.';

CREATE FUNCTION @extschema@.encrypt_config(config jsonb, context text DEFAULT NULL) RETURNS bytea
LANGUAGE sql VOLATILE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT @extschema@.encrypt_token(config::text, context);
END;
COMMENT ON FUNCTION @extschema@.encrypt_config(jsonb, text) IS
    'Encrypts a JSON value as encrypt_token does its text. NULL in, NULL out. Errors: F0000 no vault key.';

CREATE FUNCTION @extschema@.decrypt_config(encrypted bytea, context text DEFAULT NULL) RETURNS jsonb
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.decrypt_json(encrypted, context)::jsonb;
END;
COMMENT ON FUNCTION @extschema@.decrypt_config(bytea, text) IS
    'Decrypts what encrypt_config or a WebCrypto program made. NULL in, NULL out. Errors: 22023 too short or not JSON inside, 22000 no key opens it, F0000 no vault key.';

-- ── Which keys the database's values are under ──

-- No unique index: of two transactions that note the same key neither must wait for the other.
CREATE TABLE _nexus_hub.known_vault_keys (
    fingerprint text NOT NULL
        CONSTRAINT known_vault_keys_fingerprint_form CHECK (fingerprint ~ '^[0-9a-f]{16}$'),
    first_seen timestamptz NOT NULL DEFAULT now(),
    encrypted_count bigint
);
-- It has no key, and the worker counts in it: without this, not where a publication is for all tables.
ALTER TABLE _nexus_hub.known_vault_keys REPLICA IDENTITY FULL;
COMMENT ON TABLE _nexus_hub.known_vault_keys IS
    'The keys that this database has encrypted under, by their fingerprints. It goes with the database''s dump, so that a server with another key knows better than to encrypt.';
COMMENT ON COLUMN _nexus_hub.known_vault_keys.fingerprint IS 'The key''s fingerprint, perhaps in several rows: the first 8 bytes, in hex, of a GMAC of a constant text under it. It tells nothing of the key.';
COMMENT ON COLUMN _nexus_hub.known_vault_keys.first_seen IS 'When the key was used here first.';
COMMENT ON COLUMN _nexus_hub.known_vault_keys.encrypted_count IS 'How many values were encrypted under the key, in the oldest of its rows; written by the worker at its poll. NULL: none were counted.';
SELECT pg_catalog.pg_extension_config_dump('_nexus_hub.known_vault_keys', '');

CREATE FUNCTION _nexus_hub.make_vault_key_known(p_fingerprint text) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO _nexus_hub.known_vault_keys (fingerprint)
    SELECT p_fingerprint
     WHERE NOT EXISTS (SELECT FROM _nexus_hub.known_vault_keys k WHERE k.fingerprint = p_fingerprint);
END;
COMMENT ON FUNCTION _nexus_hub.make_vault_key_known(text) IS 'Notes a key that may encrypt in this database.';

CREATE FUNCTION _nexus_hub.admit_vault_key(p_fingerprints text[], p_may_write boolean, OUT is_known boolean, OUT known text[])
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    known := ARRAY(SELECT k.fingerprint FROM _nexus_hub.known_vault_keys k GROUP BY k.fingerprint ORDER BY min(k.first_seen), k.fingerprint);
    is_known := p_fingerprints[1] = ANY (known);
    IF p_may_write AND NOT is_known AND (known = '{}' OR known && p_fingerprints) THEN
        PERFORM _nexus_hub.make_vault_key_known(p_fingerprints[1]);
    END IF;
END
$$;
COMMENT ON FUNCTION _nexus_hub.admit_vault_key(text[], boolean) IS
    'Whether the first key of a ring is known, and all that are, as of before the call. Notes the first one when no key is known, or one of the ring''s is.';

CREATE FUNCTION _nexus_hub.count_sealed_values(p_fingerprint text, p_count bigint) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '100ms'
BEGIN ATOMIC
    WITH counted AS (
        UPDATE _nexus_hub.known_vault_keys k
           SET encrypted_count = coalesce(k.encrypted_count, 0) + p_count
         WHERE k.ctid = (SELECT o.ctid FROM _nexus_hub.known_vault_keys o WHERE o.fingerprint = p_fingerprint ORDER BY o.first_seen, o.ctid LIMIT 1)
        RETURNING 1)
    SELECT count(*) > 0 FROM counted;
END;
COMMENT ON FUNCTION _nexus_hub.count_sealed_values(text, bigint) IS
    'Called by the worker: counts values that were encrypted under a key; false when the key is not known.';

CREATE FUNCTION _nexus_hub.is_vault_key_worn(p_fingerprint text) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '100ms'
BEGIN ATOMIC
    SELECT coalesce(sum(k.encrypted_count) >= 2147483648, false) FROM _nexus_hub.known_vault_keys k WHERE k.fingerprint = p_fingerprint;
END;
COMMENT ON FUNCTION _nexus_hub.is_vault_key_worn(text) IS
    'Whether a key has encrypted so much that there should be another: half of the 2^32 values for which AES-GCM with random IVs is safe (NIST SP 800-38D).';

CREATE FUNCTION _nexus_hub.open_secret(encrypted bytea, context text, object text) RETURNS text
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'open_secret_wrapper';
COMMENT ON FUNCTION _nexus_hub.open_secret(bytea, text, text) IS
    'decrypt_token for a stored secret: the audit has it as a get of the object, not as a decrypt.';

CREATE FUNCTION _nexus_hub.vault_key_fingerprint() RETURNS text
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'vault_key_fingerprint_wrapper';
COMMENT ON FUNCTION _nexus_hub.vault_key_fingerprint() IS 'The fingerprint of the key that encrypts. Errors: F0000 no vault key.';

CREATE FUNCTION _nexus_hub.vault_key_ring() RETURNS TABLE (fingerprint text, place integer, source text)
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'vault_key_ring_wrapper';
COMMENT ON FUNCTION _nexus_hub.vault_key_ring() IS
    'The keys that the server has, by their fingerprints: the one in place 1 encrypts. None where no source is configured. Errors: F0000 the source cannot be used.';

CREATE FUNCTION @extschema@.adopt_vault_key() RETURNS text
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.make_vault_key_known(_nexus_hub.vault_key_fingerprint());
    SELECT _nexus_hub.note_vault_use('rotate', _nexus_hub.vault_key_fingerprint());
    SELECT _nexus_hub.vault_key_fingerprint();
END;
COMMENT ON FUNCTION @extschema@.adopt_vault_key() IS
    'Lets the server''s first vault key encrypt in this database although its values are under another one that the server does not have. Returns the key''s fingerprint. For the owner alone. Errors: F0000 no vault key.';

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

-- Named secrets: values that the worker fills in where {{secret:name}} stands, and that nobody can read back.

CREATE FUNCTION _nexus_hub.secret_context(user_id uuid, name text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT 'secret:' || coalesce(user_id::text, 'shared') || ':' || name;
END;
COMMENT ON FUNCTION _nexus_hub.secret_context(uuid, text) IS 'The context that a secret is encrypted with, so that it opens in its own row alone.';

-- Among the internals, because "secrets" in a schema of users' own would be in their way, and only functions touch it.
CREATE TABLE _nexus_hub.secrets (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid,
    name text NOT NULL
        CONSTRAINT secrets_name_form CHECK (name ~ '^[A-Za-z0-9_.-]{1,100}$'),
    value_encrypted bytea NOT NULL
        CONSTRAINT secrets_value_encrypted_length CHECK (octet_length(value_encrypted) BETWEEN 29 AND 40028),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE _nexus_hub.secrets IS 'Named secrets of users, and shared ones, encrypted. The worker fills them in where {{secret:name}} stands in a URL or a header.';
COMMENT ON COLUMN _nexus_hub.secrets.id IS 'The row''s id; stays when the value is changed.';
COMMENT ON COLUMN _nexus_hub.secrets.user_id IS 'The user whose secret it is, and whose jobs alone use it. NULL: shared, for system servers and http_request jobs.';
COMMENT ON COLUMN _nexus_hub.secrets.name IS 'What placeholders call it: 1 to 100 letters, digits, "_", "." and "-", unique for the user.';
COMMENT ON COLUMN _nexus_hub.secrets.value_encrypted IS 'The value as encrypt_token seals it with the context secret:<user_id, or shared>:<name>: it opens in no other row. 29 to 40028 bytes.';
COMMENT ON COLUMN _nexus_hub.secrets.created_at IS 'When the secret was made.';
COMMENT ON COLUMN _nexus_hub.secrets.updated_at IS 'When update_secret changed the value last.';

-- Two, because NULLs are distinct in a unique index.
CREATE UNIQUE INDEX secrets_user_name ON _nexus_hub.secrets (user_id, name) WHERE user_id IS NOT NULL;
CREATE UNIQUE INDEX secrets_shared_name ON _nexus_hub.secrets (name) WHERE user_id IS NULL;

ALTER TABLE _nexus_hub.secrets ENABLE ROW LEVEL SECURITY;
-- "=" and nothing that takes NULL for a value: somebody without an id does not own what is shared.
CREATE POLICY secrets_owner_all ON _nexus_hub.secrets
    FOR ALL USING (user_id = (SELECT @extschema@.nexus_hub_uid()))
    WITH CHECK (user_id = (SELECT @extschema@.nexus_hub_uid()));
CREATE POLICY secrets_service_all ON _nexus_hub.secrets
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));

SELECT pg_catalog.pg_extension_config_dump('_nexus_hub.secrets', '');

CREATE FUNCTION _nexus_hub.check_secret(name text, value text) RETURNS void
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'check_secret_wrapper';
COMMENT ON FUNCTION _nexus_hub.check_secret(text, text) IS
    'Raises 22023 when the name or the value of a secret is not fit to be one, 54000 when the value is too long.';

CREATE FUNCTION _nexus_hub.seal_secret(value text, context text) RETURNS bytea
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'seal_secret_wrapper';
COMMENT ON FUNCTION _nexus_hub.seal_secret(text, text) IS 'Encrypts a secret''s value, which check_secret has let pass. Errors: F0000 no vault key.';

CREATE FUNCTION _nexus_hub.secret_exists(name text) RETURNS uuid
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'secret_exists_wrapper';
COMMENT ON FUNCTION _nexus_hub.secret_exists(text) IS 'Raises 23505: the owner has a secret of that name.';

-- The functions below run with the caller's rights: row-level security decides (see servers.sql).

CREATE FUNCTION _nexus_hub.secret_owner(p_user_id uuid) RETURNS uuid
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.owner(p_user_id, CASE WHEN b.bound THEN @extschema@.nexus_hub_uid() END, b.bound, false)
      FROM (SELECT row_security_active('_nexus_hub.secrets'::regclass) AND NOT _nexus_hub.is_service_role()) AS b (bound);
END;
COMMENT ON FUNCTION _nexus_hub.secret_owner(uuid) IS
    'Whose secret is meant: p_user_id''s, else the caller''s own, or for callers who see all rows a shared one (NULL). Errors: 42501 another''s, 22023 a caller bound to own rows without an id.';

CREATE FUNCTION @extschema@.create_secret(p_name text, p_value text, p_user_id uuid DEFAULT NULL) RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.check_secret(p_name, p_value);
    WITH owner AS MATERIALIZED (SELECT _nexus_hub.secret_owner(p_user_id) AS user_id),
    added AS (
        INSERT INTO _nexus_hub.secrets (user_id, name, value_encrypted)
        SELECT o.user_id, p_name, _nexus_hub.seal_secret(p_value, _nexus_hub.secret_context(o.user_id, p_name)) FROM owner o
        ON CONFLICT DO NOTHING
        RETURNING id, _nexus_hub.note_vault_use('change', _nexus_hub.secret_context(user_id, name)))
    SELECT coalesce((SELECT id FROM added), _nexus_hub.secret_exists(p_name));
END;
COMMENT ON FUNCTION @extschema@.create_secret(text, text, uuid) IS
    'Stores a secret that {{secret:name}} stands for in the URL and the header values of server configs and http_request jobs, and returns its row''s id. Nobody can read it back; the worker fills it in when it sends a request. p_name: 1 to 100 letters, digits, "_", "." and "-". p_value: 1 to 10000 characters without control characters, encrypted before anything is written. p_user_id: the owner, whose jobs alone use it (NULL: the caller; for service_role and the extension''s owner a shared secret, for system servers and http_request jobs). Errors: 22023 bad argument, 54000 value too long, 23505 there is one of that name, 42501 not the caller''s own, F0000 no vault key.';

CREATE FUNCTION @extschema@.update_secret(p_name text, p_value text, p_user_id uuid DEFAULT NULL) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.check_secret(p_name, p_value), _nexus_hub.secret_owner(p_user_id);
    WITH owner AS MATERIALIZED (SELECT _nexus_hub.secret_owner(p_user_id) AS user_id),
    updated AS (
        UPDATE _nexus_hub.secrets s
           SET value_encrypted = _nexus_hub.seal_secret(p_value, _nexus_hub.secret_context(o.user_id, p_name)), updated_at = now()
          FROM owner o
         WHERE s.name = p_name AND (s.user_id = o.user_id OR (s.user_id IS NULL AND o.user_id IS NULL))
        RETURNING _nexus_hub.note_vault_use('change', _nexus_hub.secret_context(s.user_id, s.name)))
    SELECT count(*) > 0 FROM updated;
END;
COMMENT ON FUNCTION @extschema@.update_secret(text, text, uuid) IS
    'Gives a secret a new value, for requests that are sent from then on; false when there is none of that name. Arguments as in create_secret. Errors: 22023 bad argument, 54000 value too long, 42501 not the caller''s own, F0000 no vault key.';

CREATE FUNCTION @extschema@.delete_secret(p_name text, p_user_id uuid DEFAULT NULL) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.secret_owner(p_user_id);
    WITH owner AS MATERIALIZED (SELECT _nexus_hub.secret_owner(p_user_id) AS user_id),
    deleted AS (
        DELETE FROM _nexus_hub.secrets s
         USING owner o
         WHERE s.name = p_name AND (s.user_id = o.user_id OR (s.user_id IS NULL AND o.user_id IS NULL))
        RETURNING _nexus_hub.note_vault_use('change', _nexus_hub.secret_context(s.user_id, s.name)))
    SELECT count(*) > 0 FROM deleted;
END;
COMMENT ON FUNCTION @extschema@.delete_secret(text, uuid) IS
    'Deletes a secret; false when there is none of that name. Jobs that need it will fail. p_name, p_user_id: as in create_secret. Errors: 42501 not the caller''s own, 22023 the caller has no id.';

CREATE FUNCTION @extschema@.list_secrets()
RETURNS TABLE (id uuid, user_id uuid, name text, created_at timestamptz, updated_at timestamptz)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT s.id, s.user_id, s.name, s.created_at, s.updated_at
      FROM _nexus_hub.secrets s
     ORDER BY s.user_id NULLS FIRST, s.name;
END;
COMMENT ON FUNCTION @extschema@.list_secrets() IS
    'The names of the caller''s own secrets; for service_role and the extension''s owner everybody''s, the shared ones (user_id NULL) first. Never a value.';

-- ── What only the worker calls ──

CREATE FUNCTION _nexus_hub.read_secrets(p_user_ids uuid[], p_may_be_shared boolean[], p_names text[])
RETURNS TABLE (place integer, value_encrypted bytea, context text)
-- Inlined into the worker's statement, like read_pending.
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT w.place::integer,
           CASE WHEN own.id IS NOT NULL THEN own.value_encrypted ELSE shared.value_encrypted END,
           _nexus_hub.secret_context(own.user_id, w.name)
      FROM unnest(p_user_ids, p_may_be_shared, p_names) WITH ORDINALITY AS w (user_id, may_be_shared, name, place)
      LEFT JOIN _nexus_hub.secrets own ON own.user_id = w.user_id AND own.name = w.name
      LEFT JOIN _nexus_hub.secrets shared ON shared.user_id IS NULL AND shared.name = w.name AND w.may_be_shared
     WHERE own.id IS NOT NULL OR shared.id IS NOT NULL;
END;
COMMENT ON FUNCTION _nexus_hub.read_secrets(uuid[], boolean[], text[]) IS
    'The secrets that are there, of those that jobs name: the user''s own before the shared one, and that only where it may be. place is the place in the arrays.';

-- Jobs: the table, its state machine, what users call, and what the worker calls.

CREATE FUNCTION _nexus_hub.uuid_v7() RETURNS uuid
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'uuid_v7_wrapper';
COMMENT ON FUNCTION _nexus_hub.uuid_v7() IS
    'A new UUIDv7 (RFC 9562): ids that sort by the time they were made.';

CREATE FUNCTION _nexus_hub.url_authority(url text) RETURNS text
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE
AS 'MODULE_PATHNAME', 'url_authority_wrapper';
COMMENT ON FUNCTION _nexus_hub.url_authority(text) IS
    'The host and port a URL leads to, as the worker reads it; the empty string for what is no http or https URL. NULL in, NULL out.';

-- A CHECK's expression is parsed anew for each statement that writes a row, which for twenty of them takes longer than
-- writing it. So there are few, and what they have in common is in functions, whose errors say more, too.

CREATE FUNCTION _nexus_hub.is_job(job_type text, server_id text, tool_name text, has_uri boolean, has_url boolean) RETURNS boolean
LANGUAGE c IMMUTABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'is_job_wrapper';
COMMENT ON FUNCTION _nexus_hub.is_job(text, text, text, boolean, boolean) IS
    'For CHECK: true, or raises 22023 with a helpful text when a job''s columns do not fit its type.';

CREATE FUNCTION _nexus_hub.are_job_options(priority integer, run_at timestamptz, timeout_ms integer, max_attempts integer, idempotency_key text) RETURNS boolean
LANGUAGE c IMMUTABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'are_job_options_wrapper';
COMMENT ON FUNCTION _nexus_hub.are_job_options(integer, timestamptz, integer, integer, text) IS
    'For CHECK: true, or raises 22023 with a helpful text when an option is out of its range.';

CREATE FUNCTION _nexus_hub.is_job_state(status text, started boolean, ended boolean, leased boolean, has_outcome boolean) RETURNS boolean
LANGUAGE c IMMUTABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'is_job_state_wrapper';
COMMENT ON FUNCTION _nexus_hub.is_job_state(text, boolean, boolean, boolean, boolean) IS
    'For CHECK: whether there is such a status, and a job''s times, lease, result and error fit it. completed, failed and cancelled jobs, and no others, have a completed_at, and may have a result and an error; running ones have a started_at, and may have a lease.';

CREATE TABLE @extschema@.job_results (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    user_id uuid,
    job_type text NOT NULL,
    server_id text,
    tool_name text,
    params jsonb NOT NULL DEFAULT '{}'
        CONSTRAINT job_results_params_object CHECK (jsonb_typeof(params) = 'object')
        CONSTRAINT job_results_params_size CHECK (pg_column_size(params) <= 16777216),
    status text NOT NULL DEFAULT 'pending',
    result jsonb,
    error text,
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    completed_at timestamptz,
    lease uuid,
    priority smallint NOT NULL DEFAULT 5,
    run_at timestamptz NOT NULL DEFAULT now(),
    timeout_ms integer,
    max_attempts integer,
    attempt integer NOT NULL DEFAULT 0,
    crashes integer NOT NULL DEFAULT 0,
    idempotency_key text,
    target text GENERATED ALWAYS AS (
        CASE WHEN job_type = 'http_request' THEN _nexus_hub.url_authority(params ->> 'url') ELSE server_id END) STORED,
    CONSTRAINT job_results_job
        CHECK (_nexus_hub.is_job(job_type, server_id, tool_name, (params ->> 'uri') IS NOT NULL, (params ->> 'url') IS NOT NULL)),
    CONSTRAINT job_results_options
        CHECK (_nexus_hub.are_job_options(priority, run_at, timeout_ms, max_attempts, idempotency_key)),
    CONSTRAINT job_results_state
        CHECK (_nexus_hub.is_job_state(status, started_at IS NOT NULL, completed_at IS NOT NULL, lease IS NOT NULL,
                                       result IS NOT NULL OR error IS NOT NULL)),
    CONSTRAINT job_results_counts CHECK (least(attempt, crashes) >= 0)
) WITH (
    -- Each job is three row versions in quick succession: leave room on the page, and let autovacuum keep up.
    fillfactor = 70,
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_cost_delay = 0
);
-- The worker bounds what it claims at a time by the size of the arguments, which is not to be had of compressed ones.
ALTER TABLE @extschema@.job_results ALTER COLUMN params SET STORAGE EXTERNAL;
COMMENT ON TABLE @extschema@.job_results IS 'Background jobs and their results. Any committed row with status pending is run by the worker.';
COMMENT ON COLUMN @extschema@.job_results.id IS 'The job''s id (UUIDv7), also sent as Idempotency-Key with its requests.';
COMMENT ON COLUMN @extschema@.job_results.user_id IS 'The user whose job it is: who may see it, and whose servers it uses. NULL: nobody''s, system servers only.';
COMMENT ON COLUMN @extschema@.job_results.job_type IS 'tool_invoke, resource_fetch, prompt_execute (MCP, by server_id) or http_request (plain HTTP, not for users).';
COMMENT ON COLUMN @extschema@.job_results.server_id IS 'The MCP server: looked up among the user''s enabled user_servers, then among enabled system_servers.';
COMMENT ON COLUMN @extschema@.job_results.tool_name IS 'tool_invoke: the tool; prompt_execute: the prompt. Up to 200 characters.';
COMMENT ON COLUMN @extschema@.job_results.params IS 'A JSON object of up to 16 MB. tool_invoke, prompt_execute: the arguments; resource_fetch: {"uri": …}; http_request: {"url": …, "method": …, "headers": {…}, "body": …, "timeout_ms": …}, with {{secret:name}} for a named secret in the URL or a header''s value.';
COMMENT ON COLUMN @extschema@.job_results.status IS 'pending (waits), running, completed, failed or cancelled.';
COMMENT ON COLUMN @extschema@.job_results.result IS 'MCP: the result object as the server sent it; http_request: {"status", "headers", "body" or "body_base64"}.';
COMMENT ON COLUMN @extschema@.job_results.error IS 'Why the job failed, for people.';
COMMENT ON COLUMN @extschema@.job_results.created_at IS 'When the job was made.';
COMMENT ON COLUMN @extschema@.job_results.started_at IS 'When a worker took the job (the last time).';
COMMENT ON COLUMN @extschema@.job_results.completed_at IS 'When the job was completed, failed or cancelled; set in these states and in no other.';
COMMENT ON COLUMN @extschema@.job_results.lease IS 'The fencing token of the claim that runs the job: only an outcome of that very claim is written.';
COMMENT ON COLUMN @extschema@.job_results.priority IS '1 (first) to 9 (last). A job waits for those of a smaller number that can run; users get 5 or more.';
COMMENT ON COLUMN @extschema@.job_results.run_at IS 'Not before this time: a schedule, or when a failed attempt is made again. Jobs of one priority and one target start in this order.';
COMMENT ON COLUMN @extschema@.job_results.timeout_ms IS 'Milliseconds an attempt may take in all, 1 to 3600000. NULL: what params or the server''s config say, else nexus_hub.request_timeout.';
COMMENT ON COLUMN @extschema@.job_results.max_attempts IS 'Attempts that are made at most, 1 to 100. NULL: 5 for http_request, 3 for resource_fetch and prompt_execute, 1 for tool_invoke.';
COMMENT ON COLUMN @extschema@.job_results.attempt IS 'How often the job was started, in crashes of the worker, too.';
COMMENT ON COLUMN @extschema@.job_results.crashes IS 'How often a worker was gone while it ran the job; these do not count towards max_attempts. At nexus_hub.max_crashes the job is set aside as failed.';
COMMENT ON COLUMN @extschema@.job_results.idempotency_key IS '1 to 255 characters, unique for the user: create_job with the same key gives this job''s id instead of a second job. Not what is sent: that is the job''s id.';
COMMENT ON COLUMN @extschema@.job_results.target IS 'Where the job goes: the server_id, or the host and port of an http_request''s URL (with the scheme before them where it is not the usual one of the port). Jobs of one target and user wait in one lane.';

CREATE INDEX job_results_pending ON @extschema@.job_results (priority, run_at, id) WHERE status = 'pending';
CREATE INDEX job_results_running ON @extschema@.job_results (lease) WHERE status = 'running';
CREATE INDEX job_results_failed ON @extschema@.job_results (completed_at) WHERE status = 'failed';
-- Partial, because jobs of nobody need not pay for it.
CREATE INDEX job_results_user ON @extschema@.job_results (user_id, created_at) WHERE user_id IS NOT NULL;
-- Two, because NULLs are distinct in a unique index.
CREATE UNIQUE INDEX job_results_user_idempotency_key ON @extschema@.job_results (user_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL AND user_id IS NOT NULL;
CREATE UNIQUE INDEX job_results_nobodys_idempotency_key ON @extschema@.job_results (idempotency_key)
    WHERE idempotency_key IS NOT NULL AND user_id IS NULL;

SELECT pg_catalog.pg_extension_config_dump('@extschema@.job_results', '');

ALTER TABLE @extschema@.job_results ENABLE ROW LEVEL SECURITY;

CREATE POLICY job_results_owner_select ON @extschema@.job_results
    FOR SELECT USING (user_id = (SELECT @extschema@.nexus_hub_uid()));
CREATE POLICY job_results_owner_insert ON @extschema@.job_results
    FOR INSERT WITH CHECK (
        user_id = (SELECT @extschema@.nexus_hub_uid())
        AND status = 'pending' AND job_type <> 'http_request' AND priority >= 5);
CREATE POLICY job_results_service_all ON @extschema@.job_results
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));

-- Hand-written updates (cancel all that is stuck, run that one again) set the status alone; the rest follows from it.
CREATE FUNCTION _nexus_hub.settle_job() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NEW.status IN ('completed', 'failed', 'cancelled') THEN
        NEW.completed_at := coalesce(NEW.completed_at, now());
    ELSE
        NEW.completed_at := NULL;
    END IF;
    IF NEW.status = 'running' THEN
        NEW.started_at := coalesce(NEW.started_at, now());
    ELSE
        NEW.lease := NULL;
    END IF;
    -- A new row with a result that does not fit its status is a mistake, for the CHECK to refuse: clearing would lose it.
    IF TG_OP = 'UPDATE' AND NEW.status IN ('pending', 'running') THEN
        NEW.result := NULL;
        NEW.error := NULL;
    END IF;
    IF NEW.status = 'pending' THEN
        NEW.started_at := NULL;
        -- Run again by hand: with all its attempts.
        IF TG_OP = 'UPDATE' AND OLD.status IN ('completed', 'failed', 'cancelled') THEN
            NEW.attempt := 0;
            NEW.crashes := 0;
        END IF;
    END IF;
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION _nexus_hub.settle_job() IS 'Trigger: makes times, lease, attempts and result follow a status that was set by hand.';

-- The conditions spare the worker's own updates, which are settled already, the call.
CREATE TRIGGER job_results_settle_again BEFORE UPDATE OF status ON @extschema@.job_results
    FOR EACH ROW
    WHEN (OLD.completed_at IS NOT NULL AND NEW.status = 'pending')
    EXECUTE FUNCTION _nexus_hub.settle_job();
CREATE TRIGGER job_results_settle BEFORE INSERT OR UPDATE ON @extschema@.job_results
    FOR EACH ROW
    -- Not pending with a started_at: that of an attempt that has failed.
    WHEN (NOT _nexus_hub.is_job_state(NEW.status, NEW.started_at IS NOT NULL, NEW.completed_at IS NOT NULL, NEW.lease IS NOT NULL,
                                      NEW.result IS NOT NULL OR NEW.error IS NOT NULL))
    EXECUTE FUNCTION _nexus_hub.settle_job();

CREATE FUNCTION _nexus_hub.wake_on_change() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'wake_on_change_wrapper';
COMMENT ON FUNCTION _nexus_hub.wake_on_change() IS 'Trigger: wakes the worker of this database when the transaction commits.';

CREATE TRIGGER job_results_wake_insert AFTER INSERT ON @extschema@.job_results
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.wake_on_change();
CREATE TRIGGER job_results_wake_update AFTER UPDATE OF status, run_at, priority ON @extschema@.job_results
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.wake_on_change();
CREATE TRIGGER job_results_wake_delete AFTER DELETE ON @extschema@.job_results
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.wake_on_change();

-- ── Attempts that failed ──

CREATE TABLE @extschema@.job_attempts (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    job_id uuid NOT NULL REFERENCES @extschema@.job_results (id) ON DELETE CASCADE,
    attempt integer NOT NULL,
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    http_status integer,
    error text NOT NULL
);
COMMENT ON TABLE @extschema@.job_attempts IS 'The attempts that failed, of jobs that were made again and of those that failed in the end. A job that succeeds at once has none.';
COMMENT ON COLUMN @extschema@.job_attempts.id IS 'The row''s id (UUIDv7).';
COMMENT ON COLUMN @extschema@.job_attempts.job_id IS 'The job; its attempts are deleted with it.';
COMMENT ON COLUMN @extschema@.job_attempts.attempt IS 'The how-manyth attempt it was; begins at 1 again after retry_job.';
COMMENT ON COLUMN @extschema@.job_attempts.started_at IS 'When the worker took the job.';
COMMENT ON COLUMN @extschema@.job_attempts.finished_at IS 'When the failure was written.';
COMMENT ON COLUMN @extschema@.job_attempts.http_status IS 'The HTTP status that the attempt failed with, if there was an answer.';
COMMENT ON COLUMN @extschema@.job_attempts.error IS 'Why it failed, for people.';

CREATE INDEX job_attempts_job ON @extschema@.job_attempts (job_id, attempt);
SELECT pg_catalog.pg_extension_config_dump('@extschema@.job_attempts', '');
ALTER TABLE @extschema@.job_attempts ENABLE ROW LEVEL SECURITY;
-- Who sees a job sees its attempts: the subquery is subject to the policies of job_results.
CREATE POLICY job_attempts_of_visible_jobs ON @extschema@.job_attempts
    FOR SELECT USING (EXISTS (SELECT FROM @extschema@.job_results j WHERE j.id = job_id));

-- ── Hosts that cannot be reached ──

CREATE TABLE @extschema@.circuit_breakers (
    host text NOT NULL,
    worker smallint NOT NULL,
    state text NOT NULL
        CONSTRAINT circuit_breakers_state_known CHECK (state IN ('open', 'half-open')),
    failures integer NOT NULL,
    opened_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    probe_at timestamptz NOT NULL,
    error text NOT NULL,
    PRIMARY KEY (host, worker)
);
COMMENT ON TABLE @extschema@.circuit_breakers IS 'Hosts whose jobs wait because connections to them failed again and again. No row: all is well. Written by the worker alone; deleting a row changes nothing.';
COMMENT ON COLUMN @extschema@.circuit_breakers.host IS 'Host and port.';
COMMENT ON COLUMN @extschema@.circuit_breakers.worker IS 'Which of the database''s workers says so, 0 for the first.';
COMMENT ON COLUMN @extschema@.circuit_breakers.state IS 'open: no job is sent; half-open: one is sent as a probe.';
COMMENT ON COLUMN @extschema@.circuit_breakers.failures IS 'Connections that failed in a row.';
COMMENT ON COLUMN @extschema@.circuit_breakers.opened_at IS 'When the host''s jobs began to wait.';
COMMENT ON COLUMN @extschema@.circuit_breakers.probe_at IS 'When one job is sent to see whether the host is back.';
COMMENT ON COLUMN @extschema@.circuit_breakers.error IS 'The last failure.';
ALTER TABLE @extschema@.circuit_breakers ENABLE ROW LEVEL SECURITY;
CREATE POLICY circuit_breakers_service_select ON @extschema@.circuit_breakers
    FOR SELECT USING ((SELECT _nexus_hub.is_service_role()));

-- ── What the public functions need ──

CREATE FUNCTION _nexus_hub.check_job(job_type text, server_id text, tool_name text, params text, bound boolean) RETURNS void
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'check_job_wrapper';
COMMENT ON FUNCTION _nexus_hub.check_job(text, text, text, text, boolean) IS
    'Raises 22023 with a helpful text when a job''s fields do not fit its type, and 42501 for a type that is not for callers bound to own rows and for a URL that the egress policy denies.';

CREATE FUNCTION _nexus_hub.check_job_options(priority integer, run_at timestamptz, timeout_ms integer, max_attempts integer, idempotency_key text, bound boolean) RETURNS void
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'check_job_options_wrapper';
COMMENT ON FUNCTION _nexus_hub.check_job_options(integer, timestamptz, integer, integer, text, boolean) IS
    'Raises 22023 with a helpful text when an option is out of its range, and 42501 for a priority that is not for callers bound to own rows.';

CREATE FUNCTION _nexus_hub.job_of_key(p_user_id uuid, p_idempotency_key text) RETURNS uuid
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT j.id FROM @extschema@.job_results j
     WHERE j.idempotency_key = p_idempotency_key AND j.user_id = p_user_id AND p_user_id IS NOT NULL
    UNION ALL
    SELECT j.id FROM @extschema@.job_results j
     WHERE j.idempotency_key = p_idempotency_key AND j.user_id IS NULL AND p_user_id IS NULL;
END;
COMMENT ON FUNCTION _nexus_hub.job_of_key(uuid, text) IS
    'The id of the job that a user has made with an idempotency key. Volatile, to see what was committed during the statement. The caller has been found to be the user, or trusted.';

CREATE FUNCTION _nexus_hub.wake_worker() RETURNS void
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'wake_worker_wrapper';
COMMENT ON FUNCTION _nexus_hub.wake_worker() IS
    'Wakes the worker of this database when the transaction commits. Errors: 55000 not preloaded.';

CREATE FUNCTION _nexus_hub.job_not_found(job_id uuid) RETURNS void
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'job_not_found_wrapper';
COMMENT ON FUNCTION _nexus_hub.job_not_found(uuid) IS
    'Raises 22023 Job <id> not found.';

CREATE FUNCTION _nexus_hub.await_job(job_id uuid, timeout_ms integer) RETURNS void
LANGUAGE c VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS 'MODULE_PATHNAME', 'await_job_wrapper';
COMMENT ON FUNCTION _nexus_hub.await_job(uuid, integer) IS
    'Blocks until a job is finished or the milliseconds have passed. The caller has been found entitled to it.';

CREATE FUNCTION _nexus_hub.job_of_key_gone(idempotency_key text) RETURNS uuid
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'job_of_key_gone_wrapper';
COMMENT ON FUNCTION _nexus_hub.job_of_key_gone(text) IS
    'Raises 40001: the job that had the key was deleted while a new one was to be made; the same call will succeed.';

CREATE FUNCTION _nexus_hub.cancel_unfinished_job(p_job_id uuid) RETURNS boolean
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH cancelled AS (
        UPDATE @extschema@.job_results
           SET status = 'cancelled', completed_at = clock_timestamp(), lease = NULL
         WHERE id = p_job_id AND status IN ('pending', 'running')
        RETURNING 1)
    SELECT count(*) > 0 FROM cancelled;
END;
COMMENT ON FUNCTION _nexus_hub.cancel_unfinished_job(uuid) IS 'Cancels a job that is pending or running. The caller has been found entitled to it.';

CREATE FUNCTION _nexus_hub.retry_finished_jobs(p_job_ids uuid[]) RETURNS integer
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH retried AS (
        UPDATE @extschema@.job_results
           SET status = 'pending', run_at = clock_timestamp()
         WHERE id = ANY (p_job_ids) AND status IN ('failed', 'cancelled')
        RETURNING 1)
    SELECT count(*)::integer FROM retried;
END;
COMMENT ON FUNCTION _nexus_hub.retry_finished_jobs(uuid[]) IS 'Has failed or cancelled jobs run again, with all their attempts. The caller has been found entitled to them.';

CREATE FUNCTION _nexus_hub.job_progress(p_job_id uuid, OUT finished boolean, OUT writer bigint)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT j.status IN ('completed', 'failed', 'cancelled'), j.xmin::text::bigint
      FROM @extschema@.job_results j
     WHERE j.id = p_job_id;
END;
COMMENT ON FUNCTION _nexus_hub.job_progress(uuid) IS 'Whether a job is finished, and which transaction wrote its row: the running one itself waits in vain.';

-- ── What users call: caller's rights, row-level security decides, bodies bound at creation (see servers.sql) ──

CREATE FUNCTION @extschema@.create_job(
    p_user_id uuid, p_job_type text, p_server_id text, p_tool_name text DEFAULT NULL, p_params jsonb DEFAULT '{}',
    p_priority integer DEFAULT NULL, p_run_at timestamptz DEFAULT NULL, p_timeout_ms integer DEFAULT NULL,
    p_max_attempts integer DEFAULT NULL, p_idempotency_key text DEFAULT NULL)
RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.check_job(p_job_type, p_server_id, p_tool_name, p_params::text,
                                row_security_active('@extschema@.job_results'::regclass) AND NOT _nexus_hub.is_service_role()),
           _nexus_hub.check_job_options(p_priority, p_run_at, p_timeout_ms, p_max_attempts, p_idempotency_key,
                                row_security_active('@extschema@.job_results'::regclass) AND NOT _nexus_hub.is_service_role());
    WITH added AS (
        INSERT INTO @extschema@.job_results
               (user_id, job_type, server_id, tool_name, params, priority, run_at, timeout_ms, max_attempts, idempotency_key)
        VALUES (_nexus_hub.owner(p_user_id, @extschema@.nexus_hub_uid(), row_security_active('@extschema@.job_results'::regclass)
                                 AND NOT _nexus_hub.is_service_role(), false),
                p_job_type, p_server_id, p_tool_name, coalesce(p_params, '{}'), coalesce(p_priority, 5)::smallint,
                coalesce(p_run_at, now()), p_timeout_ms, p_max_attempts, p_idempotency_key)
        ON CONFLICT DO NOTHING
        RETURNING id)
    SELECT coalesce((SELECT id FROM added),
                    _nexus_hub.job_of_key(coalesce(p_user_id, @extschema@.nexus_hub_uid()), p_idempotency_key),
                    _nexus_hub.job_of_key_gone(p_idempotency_key));
END;
COMMENT ON FUNCTION @extschema@.create_job(uuid, text, text, text, jsonb, integer, timestamptz, integer, integer, text) IS
    'Adds a job, to be run when this transaction commits, and returns its id. p_user_id: whose job (NULL: the caller''s nexus_hub_uid()). p_job_type: tool_invoke, resource_fetch, prompt_execute or http_request. p_server_id: the MCP server. p_tool_name: the tool or prompt. p_params: the arguments; resource_fetch: {"uri"}; http_request: {"url", …}. p_priority: 1 (first) to 9 (last), users 5 or more (NULL: 5). p_run_at: not before this time. p_timeout_ms: what an attempt may take, 1 to 3600000. p_max_attempts: 1 to 100 (NULL: 5 for http_request, 3 for resource_fetch and prompt_execute, 1 for tool_invoke). p_idempotency_key: 1 to 255 characters; the same key of the same user gives back the first job''s id. Errors: 22023 bad argument, 42501 not the caller''s own, not for users, or denied by the egress policy.';

CREATE FUNCTION @extschema@.http_request(
    method text, url text, body text DEFAULT NULL, headers jsonb DEFAULT '{}', timeout_ms integer DEFAULT NULL,
    priority integer DEFAULT NULL, run_at timestamptz DEFAULT NULL, max_attempts integer DEFAULT NULL, idempotency_key text DEFAULT NULL)
RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT @extschema@.create_job(NULL, 'http_request', NULL, NULL,
        jsonb_strip_nulls(jsonb_build_object('method', http_request.method, 'url', http_request.url, 'body', http_request.body))
            || jsonb_build_object('headers', coalesce(http_request.headers, '{}')),
        http_request.priority, http_request.run_at, http_request.timeout_ms, http_request.max_attempts, http_request.idempotency_key);
END;
COMMENT ON FUNCTION @extschema@.http_request(text, text, text, jsonb, integer, integer, timestamptz, integer, text) IS
    'Adds an HTTP request as a job and returns its id; it is sent when this transaction commits. method: GET, POST, … url: http or https. body: sent as it is. headers: an object of strings. timeout_ms: what an attempt may take, 1 to 3600000. priority, run_at, max_attempts, idempotency_key: as in create_job. Errors: 22023 bad argument, 42501 denied by the egress policy.';

CREATE FUNCTION @extschema@.http_get(
    url text, headers jsonb DEFAULT '{}', timeout_ms integer DEFAULT NULL,
    priority integer DEFAULT NULL, run_at timestamptz DEFAULT NULL, max_attempts integer DEFAULT NULL, idempotency_key text DEFAULT NULL)
RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT @extschema@.http_request('GET', http_get.url, NULL, http_get.headers, http_get.timeout_ms,
        http_get.priority, http_get.run_at, http_get.max_attempts, http_get.idempotency_key);
END;
COMMENT ON FUNCTION @extschema@.http_get(text, jsonb, integer, integer, timestamptz, integer, text) IS
    'Adds a GET request as a job and returns its id; see http_request.';

CREATE FUNCTION @extschema@.http_post(
    url text, body jsonb DEFAULT '{}', headers jsonb DEFAULT '{}', timeout_ms integer DEFAULT NULL,
    priority integer DEFAULT NULL, run_at timestamptz DEFAULT NULL, max_attempts integer DEFAULT NULL, idempotency_key text DEFAULT NULL)
RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- As text, or a JSON string would be sent without its quotes.
    SELECT @extschema@.http_request('POST', http_post.url, http_post.body::text,
        CASE
            WHEN jsonb_path_exists(http_post.headers, '$.keyvalue() ? (@.key like_regex "^content-type$" flag "i")', silent => true)
              OR jsonb_typeof(http_post.headers) NOT IN ('object', 'null') OR http_post.body IS NULL THEN http_post.headers
            ELSE jsonb_build_object('Content-Type', 'application/json') || coalesce(nullif(http_post.headers, 'null'), '{}')
        END,
        http_post.timeout_ms,
        http_post.priority, http_post.run_at, http_post.max_attempts, http_post.idempotency_key);
END;
COMMENT ON FUNCTION @extschema@.http_post(text, jsonb, jsonb, integer, integer, timestamptz, integer, text) IS
    'Adds a POST request with a JSON body as a job and returns its id; see http_request.';

CREATE FUNCTION @extschema@.get_job_status(p_job_id uuid)
RETURNS TABLE (id uuid, job_type text, server_id text, tool_name text, status text, result jsonb, error text,
               created_at timestamptz, started_at timestamptz, completed_at timestamptz, attempt integer, run_at timestamptz)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT j.id, j.job_type, j.server_id, j.tool_name, j.status, j.result, j.error, j.created_at, j.started_at, j.completed_at,
           j.attempt, j.run_at
      FROM @extschema@.job_results j
     WHERE j.id = p_job_id;
END;
COMMENT ON FUNCTION @extschema@.get_job_status(uuid) IS
    'A job''s state and result: one row, or none when the caller has no such job. A pending job with attempt above 0 has failed so often and is tried again at run_at.';

CREATE FUNCTION @extschema@.wait_for_job(p_job_id uuid, p_timeout_ms integer DEFAULT 30000)
RETURNS TABLE (id uuid, job_type text, server_id text, tool_name text, status text, result jsonb, error text,
               created_at timestamptz, started_at timestamptz, completed_at timestamptz, attempt integer, run_at timestamptz)
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.await_job(j.id, p_timeout_ms) FROM @extschema@.job_results j WHERE j.id = p_job_id;
    SELECT s.id, s.job_type, s.server_id, s.tool_name, s.status, s.result, s.error, s.created_at, s.started_at, s.completed_at,
           s.attempt, s.run_at
      FROM @extschema@.get_job_status(p_job_id) s;
END;
COMMENT ON FUNCTION @extschema@.wait_for_job(uuid, integer) IS
    'Waits until a job is finished, at most p_timeout_ms (0 to 3600000) milliseconds, and returns what get_job_status returns; the status tells whether it is finished. Call it in a transaction of its own, after the one that made the job. Errors: 22023 bad time-out, 55000 the job is not committed yet, the isolation level hides its end, or the worker is not there.';

CREATE FUNCTION @extschema@.cancel_job(p_job_id uuid) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce((SELECT _nexus_hub.cancel_unfinished_job(j.id) FROM @extschema@.job_results j WHERE j.id = p_job_id), false);
END;
COMMENT ON FUNCTION @extschema@.cancel_job(uuid) IS
    'Cancels a job that is pending or running; the request of a running one is broken off, but its server may have done the work. Returns false when it is finished already, or the caller has no such job.';

CREATE FUNCTION @extschema@.retry_job(p_job_id uuid) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.retry_finished_jobs(ARRAY(SELECT j.id FROM @extschema@.job_results j WHERE j.id = p_job_id)) > 0;
END;
COMMENT ON FUNCTION @extschema@.retry_job(uuid) IS
    'Has a failed or cancelled job run again, with all its attempts and the same Idempotency-Key. Returns false when it is neither, or the caller has no such job.';

CREATE FUNCTION @extschema@.retry_failed_jobs(
    p_server_id text DEFAULT NULL, p_job_type text DEFAULT NULL, p_since timestamptz DEFAULT NULL, p_until timestamptz DEFAULT NULL)
RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.retry_finished_jobs(ARRAY(
        SELECT j.id FROM @extschema@.job_results j
         WHERE j.status = 'failed'
           AND (p_server_id IS NULL OR j.server_id = p_server_id)
           AND (p_job_type IS NULL OR j.job_type = p_job_type)
           AND j.completed_at >= coalesce(p_since, '-infinity')
           AND j.completed_at < coalesce(p_until, 'infinity')));
END;
COMMENT ON FUNCTION @extschema@.retry_failed_jobs(text, text, timestamptz, timestamptz) IS
    'Has the caller''s failed jobs run again (the redrive of dead letters), and returns how many. p_server_id, p_job_type: only of these. p_since, p_until: only those that failed at or after p_since and before p_until. NULL: no such condition.';

CREATE FUNCTION @extschema@.get_job_attempts(p_job_id uuid)
RETURNS TABLE (attempt integer, started_at timestamptz, finished_at timestamptz, http_status integer, error text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT a.attempt, a.started_at, a.finished_at, a.http_status, a.error
      FROM @extschema@.job_attempts a
     WHERE a.job_id = p_job_id
     ORDER BY a.started_at, a.id;
END;
COMMENT ON FUNCTION @extschema@.get_job_attempts(uuid) IS
    'The attempts of a job that failed, in their order; none when the caller has no such job.';

CREATE FUNCTION @extschema@.execute_job_via_pg_net(job_id uuid) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT CASE
        WHEN EXISTS (SELECT FROM @extschema@.job_results j WHERE j.id = job_id) THEN _nexus_hub.wake_worker()
        ELSE _nexus_hub.job_not_found(job_id)
    END;
END;
COMMENT ON FUNCTION @extschema@.execute_job_via_pg_net(uuid) IS
    'Wakes the worker for a job. Kept for code that was written for pg_net: a pending job needs no such call. Errors: 22023 no such job, 55000 the worker is not there.';

-- ── What only the worker calls ──

-- The worker is a superuser, so it must reach these tables and no others, whoever renames schemas: a view is bound to
-- its table for good, while a name in plpgsql is looked up anew.
CREATE VIEW _nexus_hub.job_results AS SELECT * FROM @extschema@.job_results;
CREATE VIEW _nexus_hub.user_servers AS SELECT * FROM @extschema@.user_servers;
CREATE VIEW _nexus_hub.system_servers AS SELECT * FROM @extschema@.system_servers;
CREATE VIEW _nexus_hub.job_attempts AS SELECT * FROM @extschema@.job_attempts;
CREATE VIEW _nexus_hub.circuit_breakers AS SELECT * FROM @extschema@.circuit_breakers;
COMMENT ON VIEW _nexus_hub.job_results IS 'The table of that name, for the worker.';
COMMENT ON VIEW _nexus_hub.user_servers IS 'The table of that name, for the worker.';
COMMENT ON VIEW _nexus_hub.system_servers IS 'The table of that name, for the worker.';
COMMENT ON VIEW _nexus_hub.job_attempts IS 'The table of that name, for the worker.';
COMMENT ON VIEW _nexus_hub.circuit_breakers IS 'The table of that name, for the worker.';

DO $$
DECLARE
    mirrored record;
BEGIN
    FOR mirrored IN
        SELECT v.oid::regclass AS view, a.attname, col_description(d.refobjid, a.attnum) AS comment
          FROM pg_class v
          JOIN pg_rewrite r ON r.ev_class = v.oid
          JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass
          JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
         WHERE v.relnamespace = '_nexus_hub'::regnamespace AND v.relkind = 'v' AND d.refobjsubid > 0
    LOOP
        EXECUTE format('COMMENT ON COLUMN %s.%I IS %L', mirrored.view, mirrored.attname, mirrored.comment);
    END LOOP;
END
$$;

-- Plans are made once and kept, perhaps while the table is empty: without enable_seqscan = off they would go on reading
-- all of it when it has millions of rows. A join can go wrong in more ways, so that of complete_jobs is planned anew.

CREATE FUNCTION _nexus_hub.read_pending(p_priorities smallint[], p_run_ats timestamptz[], p_ids uuid[], p_limits integer[], p_worker integer, p_workers integer)
RETURNS TABLE (read integer, run_at timestamptz, id uuid, user_id uuid, is_mcp boolean, target text, bytes integer)
-- STABLE, with neither SET nor SECURITY DEFINER: inlined into the worker's statement.
LANGUAGE sql STABLE
BEGIN ATOMIC
    -- The share is looked at after the limit, or a worker would read all jobs of the others in search of its own.
    SELECT r.read::integer, p.run_at, p.id, p.user_id, p.is_mcp,
           CASE WHEN p_workers = 1 OR (hashtext(p.target)::bigint + 2147483648) % p_workers = p_worker THEN p.target END, p.bytes
      FROM unnest(p_priorities, p_run_ats, p_ids, p_limits) WITH ORDINALITY AS r (priority, run_at, id, rows, read)
     CROSS JOIN LATERAL (
               SELECT j.run_at, j.id, j.user_id, j.job_type <> 'http_request' AS is_mcp, j.target, pg_column_size(j.params) AS bytes
                 FROM @extschema@.job_results j
                WHERE j.status = 'pending' AND j.priority = r.priority
                  AND (j.run_at, j.id) >= (r.run_at, r.id) AND j.run_at <= now()
                ORDER BY j.run_at, j.id
                LIMIT r.rows) p;
END;
COMMENT ON FUNCTION _nexus_hub.read_pending(smallint[], timestamptz[], uuid[], integer[], integer, integer) IS
    'Due pending jobs: for each of several reads (numbered from 1) of one priority, those at or after a position, in their order, at most so many. Of the database''s p_workers workers each sees the targets that are its own; others are NULL.';

CREATE FUNCTION _nexus_hub.next_due() RETURNS TABLE (seconds double precision)
-- Inlined, like read_pending: a function that gives one value would be planned at every call.
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT extract(epoch FROM min(n.run_at) - now())::double precision
      FROM generate_series(1, 9) AS p (priority)
     CROSS JOIN LATERAL (
               SELECT j.run_at
                 FROM @extschema@.job_results j
                WHERE j.status = 'pending' AND j.priority = p.priority::smallint AND j.run_at > now()
                ORDER BY j.run_at
                LIMIT 1) n;
END;
COMMENT ON FUNCTION _nexus_hub.next_due() IS 'Seconds until the next pending job is due that is not due yet; NULL when there is none.';

CREATE FUNCTION _nexus_hub.read_servers(p_user_ids uuid[], p_server_ids text[])
RETURNS TABLE (lane integer, user_config bytea, user_enabled boolean, user_rate_limit integer,
               system_config text, system_enabled boolean, system_rate_limit integer)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT l.lane::integer, u.config_encrypted, u.enabled, u.rate_limit_per_minute, s.config::text, s.enabled, s.rate_limit_per_minute
      FROM unnest(p_user_ids, p_server_ids) WITH ORDINALITY AS l (user_id, server_id, lane)
      LEFT JOIN @extschema@.user_servers u ON u.user_id = l.user_id AND u.server_id = l.server_id
      LEFT JOIN @extschema@.system_servers s ON s.id = l.server_id;
END;
COMMENT ON FUNCTION _nexus_hub.read_servers(uuid[], text[]) IS 'The servers that jobs of these users with these server ids go to; lane is the place in the arrays.';

CREATE FUNCTION _nexus_hub.claim_jobs(p_lease uuid, p_ids uuid[], p_careful boolean)
RETURNS TABLE (id uuid, user_id uuid, job_type text, server_id text, tool_name text, params text, timeout_ms integer,
               attempts integer, max_attempts integer)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '20ms'
AS $$
#variable_conflict use_column
BEGIN
    -- Locking each row first costs as much as claiming it: done only when somebody was in the way.
    IF p_careful THEN
        p_ids := ARRAY(SELECT p.id FROM _nexus_hub.job_results p WHERE p.id = ANY (p_ids) FOR UPDATE SKIP LOCKED);
    END IF;
    RETURN QUERY
    UPDATE _nexus_hub.job_results j
       SET status = 'running', started_at = clock_timestamp(), lease = p_lease, attempt = j.attempt + 1
     -- Not status = 'pending': that would let a plan that was made when few jobs were pending read all of them.
     WHERE j.id = ANY (p_ids) AND j.status || '' = 'pending' AND j.run_at <= clock_timestamp()
    RETURNING j.id, j.user_id, j.job_type, j.server_id, j.tool_name, j.params::text, j.timeout_ms, j.attempt - j.crashes, j.max_attempts;
END
$$;
COMMENT ON FUNCTION _nexus_hub.claim_jobs(uuid, uuid[], boolean) IS
    'Takes those of the jobs p_ids that are still pending and due, under the lease p_lease. p_careful: passes over rows that a session keeps locked, instead of failing with 55P03. attempts counts this one, and those that ended in a crash of the worker not.';

CREATE FUNCTION _nexus_hub.unclaim_jobs(p_lease uuid, p_ids uuid[]) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE _nexus_hub.job_results AS j
       SET status = 'pending', started_at = NULL, lease = NULL, attempt = j.attempt - 1
     WHERE j.id = ANY (p_ids) AND j.lease = p_lease;
END;
COMMENT ON FUNCTION _nexus_hub.unclaim_jobs(uuid, uuid[]) IS
    'Gives jobs back that the running transaction has claimed under the lease, as if it had not: they are over their server''s rate limit.';

CREATE FUNCTION _nexus_hub.lost_jobs(p_ids uuid[], p_leases uuid[]) RETURNS TABLE (id uuid, lease uuid)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT o.id, o.lease
      FROM unnest(p_ids, p_leases) AS o (id, lease)
     WHERE NOT EXISTS (SELECT FROM @extschema@.job_results j WHERE j.id = o.id AND j.lease = o.lease);
END;
COMMENT ON FUNCTION _nexus_hub.lost_jobs(uuid[], uuid[]) IS 'Those of the jobs that are no longer held under the leases: cancelled, deleted or changed by hand.';

CREATE FUNCTION _nexus_hub.write_outcomes(p_ids uuid[], p_leases uuid[], p_statuses text[], p_results text[], p_errors text[],
                                          p_http_statuses integer[], p_delays_ms bigint[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    -- Only a running job has a lease. Said again with its status, the index of running jobs would look better to the
    -- planner than it is for a join.
    IF 'completed' = ALL (p_statuses) THEN
        UPDATE _nexus_hub.job_results j
           SET status = 'completed', result = o.result::jsonb, completed_at = clock_timestamp(), lease = NULL
          FROM unnest(p_ids, p_leases, p_results) AS o (id, lease, result)
         WHERE j.id = o.id AND j.lease = o.lease;
        RETURN;
    END IF;
    WITH written AS (
        UPDATE _nexus_hub.job_results j
           SET status = o.status, lease = NULL,
               result = CASE WHEN o.status <> 'pending' THEN o.result::jsonb END,
               error = CASE WHEN o.status = 'failed' THEN o.error END,
               completed_at = CASE WHEN o.status IN ('completed', 'failed') THEN clock_timestamp() END,
               started_at = CASE WHEN o.status <> 'pending' THEN j.started_at END,
               run_at = CASE WHEN o.status = 'pending' THEN clock_timestamp() + o.delay_ms * interval '1 millisecond' ELSE j.run_at END
          FROM unnest(p_ids, p_leases, p_statuses, p_results, p_errors, p_http_statuses, p_delays_ms)
                 AS o (id, lease, status, result, error, http_status, delay_ms)
          -- The row as it was, for the time the attempt was started.
          JOIN _nexus_hub.job_results b ON b.id = o.id
         WHERE j.id = o.id AND j.lease = o.lease
        RETURNING j.id, j.attempt, b.started_at, o.status, o.http_status, o.error)
    INSERT INTO _nexus_hub.job_attempts (job_id, attempt, started_at, http_status, error)
    SELECT w.id, w.attempt, w.started_at, w.http_status, w.error
      FROM written w
     WHERE w.status IN ('failed', 'pending');
END
$$;
COMMENT ON FUNCTION _nexus_hub.write_outcomes(uuid[], uuid[], text[], text[], text[], integer[], bigint[]) IS
    'complete_jobs for rows that nobody keeps locked, with answers that jsonb takes.';

CREATE FUNCTION _nexus_hub.complete_jobs(p_ids uuid[], p_leases uuid[], p_statuses text[], p_results text[], p_errors text[],
                                         p_http_statuses integer[], p_delays_ms bigint[])
RETURNS TABLE (id uuid, lease uuid)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '20ms'
AS $$
#variable_conflict use_column
BEGIN
    BEGIN
        IF cardinality(p_ids) = 1 AND p_statuses[1] = 'completed' THEN
            -- The usual case of a quiet server, without a join that has to be planned.
            UPDATE _nexus_hub.job_results j
               SET status = 'completed', result = p_results[1]::jsonb, completed_at = clock_timestamp(), lease = NULL
             WHERE j.id = p_ids[1] AND j.lease = p_leases[1];
        ELSE
            PERFORM _nexus_hub.write_outcomes(p_ids, p_leases, p_statuses, p_results, p_errors, p_http_statuses, p_delays_ms);
        END IF;
        RETURN;
    EXCEPTION WHEN data_exception OR program_limit_exceeded OR lock_not_available THEN
        -- One answer that jsonb can't hold, or one row that a session keeps locked, must not hold up the others: one by
        -- one, passing over what is locked.
        NULL;
    END;
    FOR i IN 1 .. cardinality(p_ids) LOOP
        PERFORM FROM _nexus_hub.job_results j
          WHERE j.id = p_ids[i] AND j.status = 'running' AND j.lease = p_leases[i]
            FOR NO KEY UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            RETURN QUERY SELECT j.id, j.lease FROM _nexus_hub.job_results j
              WHERE j.id = p_ids[i] AND j.status = 'running' AND j.lease = p_leases[i];
            CONTINUE;
        END IF;
        BEGIN
            PERFORM _nexus_hub.write_outcomes(p_ids[i:i], p_leases[i:i], p_statuses[i:i], p_results[i:i], p_errors[i:i],
                                              p_http_statuses[i:i], p_delays_ms[i:i]);
        EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
            PERFORM _nexus_hub.write_outcomes(p_ids[i:i], p_leases[i:i], ARRAY['failed'], ARRAY[NULL::text],
                                              ARRAY['the answer cannot be stored as jsonb: ' || SQLERRM],
                                              p_http_statuses[i:i], ARRAY[NULL::bigint]);
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION _nexus_hub.complete_jobs(uuid[], uuid[], text[], text[], text[], integer[], bigint[]) IS
    'Writes the outcomes of jobs that are still running under the lease they were claimed with, and returns those whose rows are locked, to be written later. Others (cancelled meanwhile, say) stay as they are. Status completed; failed; pending: to be tried again after so many milliseconds; running: handed over to an executor elsewhere.';

CREATE FUNCTION _nexus_hub.release_jobs(p_leases uuid[], p_max_crashes integer) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    released integer;
BEGIN
    WITH held AS (
        SELECT j.id, j.attempt, j.started_at, p_max_crashes IS NOT NULL AND j.crashes + 1 >= p_max_crashes AS is_poison
          FROM _nexus_hub.job_results j
         WHERE j.status = 'running' AND j.lease = ANY (p_leases)
           FOR UPDATE SKIP LOCKED),
    kept AS (
        INSERT INTO _nexus_hub.job_attempts (job_id, attempt, started_at, error)
        SELECT h.id, h.attempt, h.started_at, 'the worker was gone before the answer was there'
          FROM held h
         WHERE p_max_crashes IS NOT NULL)
    UPDATE _nexus_hub.job_results j
       SET status = CASE WHEN h.is_poison THEN 'failed' ELSE 'pending' END,
           error = CASE WHEN h.is_poison THEN
               format('set aside: the worker crashed %s times while this job was in flight (nexus_hub.max_crashes)', j.crashes + 1) END,
           completed_at = CASE WHEN h.is_poison THEN clock_timestamp() END,
           started_at = CASE WHEN h.is_poison THEN j.started_at END,
           attempt = greatest(j.attempt - (p_max_crashes IS NULL)::integer, 0),
           crashes = j.crashes + (p_max_crashes IS NOT NULL)::integer,
           lease = NULL
      FROM held h
     WHERE j.id = h.id;
    GET DIAGNOSTICS released = ROW_COUNT;
    RETURN released;
END
$$;
COMMENT ON FUNCTION _nexus_hub.release_jobs(uuid[], integer) IS
    'Gives back the jobs held under these leases. p_max_crashes NULL: by a worker that ends in order, and the attempt counts for nothing. Else by a worker that is gone: a job in as many crashes is set aside as failed.';

CREATE FUNCTION _nexus_hub.held_leases() RETURNS SETOF uuid
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT DISTINCT j.lease FROM @extschema@.job_results j WHERE j.status = 'running' AND j.lease IS NOT NULL;
END;
COMMENT ON FUNCTION _nexus_hub.held_leases() IS 'The leases of all running jobs.';

CREATE FUNCTION _nexus_hub.write_breakers(p_worker integer, p_workers integer, p_hosts text[], p_states text[], p_failures integer[], p_probe_in_ms bigint[], p_errors text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- No hosts: the worker starts, with all of them closed.
    DELETE FROM _nexus_hub.circuit_breakers b
     WHERE CASE
               WHEN p_hosts IS NULL THEN b.worker = p_worker OR b.worker >= p_workers
               ELSE b.worker = p_worker AND EXISTS (SELECT FROM unnest(p_hosts, p_states) AS c (host, state)
                                                     WHERE c.host = b.host AND c.state = 'closed')
           END;
    INSERT INTO _nexus_hub.circuit_breakers AS b (host, worker, state, failures, probe_at, error)
    SELECT c.host, p_worker, c.state, c.failures, clock_timestamp() + c.probe_in_ms * interval '1 millisecond', c.error
      FROM unnest(p_hosts, p_states, p_failures, p_probe_in_ms, p_errors) AS c (host, state, failures, probe_in_ms, error)
     WHERE c.state <> 'closed'
    ON CONFLICT (host, worker) DO UPDATE
       SET state = excluded.state, failures = excluded.failures, probe_at = excluded.probe_at, error = excluded.error;
EXCEPTION WHEN OTHERS THEN
    -- What is only shown must not keep outcomes from being written.
    RAISE LOG 'nexus_hub: circuit_breakers could not be written: %', SQLERRM;
END
$$;
COMMENT ON FUNCTION _nexus_hub.write_breakers(integer, integer, text[], text[], integer[], bigint[], text[]) IS
    'Shows how the circuit breakers of a worker''s hosts stand now, those that changed; NULL for p_hosts: all are closed.';

-- Users' own API keys ("bring your own key"), gateways, and which of them serves a model.

CREATE FUNCTION _nexus_hub.api_key_context(user_id uuid, service text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT 'api_key:' || coalesce(user_id::text, 'team') || ':' || service;
END;
COMMENT ON FUNCTION _nexus_hub.api_key_context(uuid, text) IS 'The context that an API key is encrypted with, so that it opens in its own row alone.';

CREATE FUNCTION _nexus_hub.api_key_object(user_id uuid, service text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce(user_id::text, 'team') || '/' || service;
END;
COMMENT ON FUNCTION _nexus_hub.api_key_object(uuid, text) IS 'What the audit calls an API key.';

CREATE FUNCTION _nexus_hub.gateway_base_url(base_url text) RETURNS text
LANGUAGE c IMMUTABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'gateway_base_url_wrapper';
COMMENT ON FUNCTION _nexus_hub.gateway_base_url(text) IS
    'Its argument without blanks around it; raises 22023 with a helpful text for what is no base URL.';

CREATE TABLE @extschema@.api_keys (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    user_id uuid,
    service text NOT NULL
        CONSTRAINT api_keys_service_known CHECK (service IN ('openai', 'anthropic', 'xai', 'openrouter', 'gateway')),
    api_key_encrypted bytea NOT NULL
        CONSTRAINT api_keys_api_key_encrypted_length CHECK (octet_length(api_key_encrypted) BETWEEN 28 AND 40028),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz
);
COMMENT ON TABLE @extschema@.api_keys IS 'API keys of users and of the team, encrypted, one for each service.';
COMMENT ON COLUMN @extschema@.api_keys.id IS 'The row''s id (UUIDv7); stays when the key is replaced.';
COMMENT ON COLUMN @extschema@.api_keys.user_id IS 'The user whose key it is. NULL: the team''s, which users cannot see.';
COMMENT ON COLUMN @extschema@.api_keys.service IS 'What the key is for: openai, anthropic, xai, openrouter or gateway.';
COMMENT ON COLUMN @extschema@.api_keys.api_key_encrypted IS 'The key as encrypt_token seals it with the context api_key:<user_id, or team>:<service>: it opens in no other row. 28 to 40028 bytes.';
COMMENT ON COLUMN @extschema@.api_keys.created_at IS 'When the first key was put in.';
COMMENT ON COLUMN @extschema@.api_keys.updated_at IS 'When this key was put in.';
COMMENT ON COLUMN @extschema@.api_keys.last_used_at IS 'When touch_user_api_key was called last for this key; NULL: not yet.';

CREATE TABLE @extschema@.api_gateway_configs (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    user_id uuid,
    base_url text NOT NULL
        CONSTRAINT api_gateway_configs_base_url_valid CHECK (base_url = _nexus_hub.gateway_base_url(base_url)),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE @extschema@.api_gateway_configs IS 'Where the gateways of users and of the team are: services that pass calls on to any provider. Their keys are in api_keys.';
COMMENT ON COLUMN @extschema@.api_gateway_configs.id IS 'The row''s id (UUIDv7).';
COMMENT ON COLUMN @extschema@.api_gateway_configs.user_id IS 'The user whose gateway it is. NULL: the team''s, which users cannot see.';
COMMENT ON COLUMN @extschema@.api_gateway_configs.base_url IS 'An http or https URL of up to 2000 characters, without user name, password, query and fragment; stored in clear.';
COMMENT ON COLUMN @extschema@.api_gateway_configs.created_at IS 'When the row was made.';
COMMENT ON COLUMN @extschema@.api_gateway_configs.updated_at IS 'When upsert_user_gateway_config wrote the row last.';

CREATE TABLE @extschema@.user_settings (
    user_id uuid PRIMARY KEY,
    allow_gateway_fallback boolean NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE @extschema@.user_settings IS 'What users choose for themselves. A user without a row has the defaults.';
COMMENT ON COLUMN @extschema@.user_settings.user_id IS 'The user.';
COMMENT ON COLUMN @extschema@.user_settings.allow_gateway_fallback IS 'Whether the team''s gateway and keys may be used where the user has none of the own.';
COMMENT ON COLUMN @extschema@.user_settings.created_at IS 'When the row was made.';
COMMENT ON COLUMN @extschema@.user_settings.updated_at IS 'When the row was changed last; set by a trigger.';

-- Two each, because NULLs are distinct in a unique index.
CREATE UNIQUE INDEX api_keys_user_service ON @extschema@.api_keys (user_id, service) WHERE user_id IS NOT NULL;
CREATE UNIQUE INDEX api_keys_team_service ON @extschema@.api_keys (service) WHERE user_id IS NULL;
CREATE UNIQUE INDEX api_gateway_configs_user ON @extschema@.api_gateway_configs (user_id) WHERE user_id IS NOT NULL;
CREATE UNIQUE INDEX api_gateway_configs_team ON @extschema@.api_gateway_configs ((user_id IS NULL)) WHERE user_id IS NULL;

SELECT pg_catalog.pg_extension_config_dump('@extschema@.api_keys', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.api_gateway_configs', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.user_settings', '');

CREATE FUNCTION _nexus_hub.set_updated_at() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION _nexus_hub.set_updated_at() IS 'Trigger: updated_at is the time of the change, whoever makes it.';

CREATE TRIGGER user_settings_set_updated_at BEFORE UPDATE ON @extschema@.user_settings
    FOR EACH ROW EXECUTE FUNCTION _nexus_hub.set_updated_at();

ALTER TABLE @extschema@.api_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE @extschema@.api_gateway_configs ENABLE ROW LEVEL SECURITY;
ALTER TABLE @extschema@.user_settings ENABLE ROW LEVEL SECURITY;

-- "=" and nothing that takes NULL for a value: somebody without an id is not the team.
CREATE POLICY api_keys_owner_select ON @extschema@.api_keys
    FOR SELECT USING (user_id = (SELECT @extschema@.nexus_hub_uid()));
CREATE POLICY api_gateway_configs_owner_select ON @extschema@.api_gateway_configs
    FOR SELECT USING (user_id = (SELECT @extschema@.nexus_hub_uid()));
CREATE POLICY user_settings_owner_all ON @extschema@.user_settings
    FOR ALL USING (user_id = (SELECT @extschema@.nexus_hub_uid()))
    WITH CHECK (user_id = (SELECT @extschema@.nexus_hub_uid()));

CREATE POLICY api_keys_service_all ON @extschema@.api_keys
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));
CREATE POLICY api_gateway_configs_service_all ON @extschema@.api_gateway_configs
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));
CREATE POLICY user_settings_service_all ON @extschema@.user_settings
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));

CREATE FUNCTION _nexus_hub.require_service_role(bound boolean) RETURNS void
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'require_service_role_wrapper';
COMMENT ON FUNCTION _nexus_hub.require_service_role(boolean) IS
    'Raises 42501 Must be called as service role when the caller is bound by row-level security.';

CREATE FUNCTION _nexus_hub.require_service_role_for(bound boolean, kind text, user_id uuid, service text) RETURNS void
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'require_service_role_for_wrapper';
COMMENT ON FUNCTION _nexus_hub.require_service_role_for(boolean, text, uuid, text) IS
    'require_service_role for the use of an API key: the audit has the refusal as one of that kind.';

CREATE FUNCTION _nexus_hub.api_service(service text) RETURNS text
LANGUAGE c IMMUTABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'api_service_wrapper';
COMMENT ON FUNCTION _nexus_hub.api_service(text) IS
    'Its argument in lower case and without blanks around it; raises 22023 when keys are not kept for such a service.';

CREATE FUNCTION _nexus_hub.api_key(key text) RETURNS text
LANGUAGE c IMMUTABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'api_key_wrapper';
COMMENT ON FUNCTION _nexus_hub.api_key(text) IS
    'Its argument; raises 22023 when it is empty or has control characters, 54000 when it has more than 10000 characters.';

CREATE FUNCTION _nexus_hub.model_provider(model text) RETURNS text
LANGUAGE c IMMUTABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'model_provider_wrapper';
COMMENT ON FUNCTION _nexus_hub.model_provider(text) IS
    'Whose a model is: openai, anthropic, xai, or openrouter for everybody else''s; raises 22023 when the name does not tell.';

CREATE FUNCTION _nexus_hub.model_name(model text, service text) RETURNS text
LANGUAGE c IMMUTABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'model_name_wrapper';
COMMENT ON FUNCTION _nexus_hub.model_name(text, text) IS
    'What a service calls a model: providers their own without the provider in front, openrouter and gateway with it.';

CREATE FUNCTION _nexus_hub.no_api_key(provider text, user_id uuid, may_fall_back boolean) RETURNS text
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'no_api_key_wrapper';
COMMENT ON FUNCTION _nexus_hub.no_api_key(text, uuid, boolean) IS
    'Raises 55000: there is no key for the provider''s models, the user''s or the team''s.';

-- ── What the back end calls: caller's rights, bodies bound at creation (see servers.sql) ──

-- Anybody may execute these, and is told at once whom they are for: their first statement raises the error before any
-- argument is looked at. They are several statements with a SET, so they are never inlined.

CREATE FUNCTION @extschema@.insert_user_api_key(p_user_id uuid, p_service text, p_api_key text) RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.require_service_role_for(row_security_active('@extschema@.api_keys'::regclass) AND NOT _nexus_hub.is_service_role(),
                                               'change', p_user_id, p_service);
    SELECT _nexus_hub.api_service(p_service), _nexus_hub.api_key(p_api_key) IS NULL;
    SELECT _nexus_hub.note_vault_use('change', _nexus_hub.api_key_object(p_user_id, _nexus_hub.api_service(p_service)));
    WITH sealed AS MATERIALIZED (
        SELECT _nexus_hub.api_service(p_service) AS service,
               @extschema@.encrypt_token(
                   p_api_key, _nexus_hub.api_key_context(p_user_id, _nexus_hub.api_service(p_service))) AS api_key),
    users AS (
        INSERT INTO @extschema@.api_keys AS k (user_id, service, api_key_encrypted)
        SELECT p_user_id, s.service, s.api_key FROM sealed s WHERE p_user_id IS NOT NULL
        ON CONFLICT (user_id, service) WHERE user_id IS NOT NULL
        DO UPDATE SET api_key_encrypted = excluded.api_key_encrypted, updated_at = now(), last_used_at = NULL
        RETURNING k.id),
    teams AS (
        INSERT INTO @extschema@.api_keys AS k (user_id, service, api_key_encrypted)
        SELECT NULL, s.service, s.api_key FROM sealed s WHERE p_user_id IS NULL
        ON CONFLICT (service) WHERE user_id IS NULL
        DO UPDATE SET api_key_encrypted = excluded.api_key_encrypted, updated_at = now(), last_used_at = NULL
        RETURNING k.id)
    SELECT id FROM users UNION ALL SELECT id FROM teams;
END;
COMMENT ON FUNCTION @extschema@.insert_user_api_key(uuid, text, text) IS
    'Stores a user''s API key for a service, in the place of the one before, and returns the row''s id. Service role only. p_user_id: the user (NULL: the team). p_service: openai, anthropic, xai, openrouter or gateway, in any case. p_api_key: up to 10000 characters, encrypted before anything is written. Errors: 42501 not the service role, 22023 unknown service, empty key or control characters in it, 54000 key too long, F0000 no vault key.';

CREATE FUNCTION @extschema@.get_user_api_key(p_user_id uuid, p_service text) RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.require_service_role_for(row_security_active('@extschema@.api_keys'::regclass) AND NOT _nexus_hub.is_service_role(),
                                               'get', p_user_id, p_service);
    SELECT _nexus_hub.api_service(p_service);
    SELECT _nexus_hub.open_secret(k.api_key_encrypted, _nexus_hub.api_key_context(k.user_id, k.service),
                                  _nexus_hub.api_key_object(k.user_id, k.service))
      FROM @extschema@.api_keys k
     WHERE k.service = _nexus_hub.api_service(p_service)
       AND (k.user_id = p_user_id OR (k.user_id IS NULL AND p_user_id IS NULL));
END;
COMMENT ON FUNCTION @extschema@.get_user_api_key(uuid, text) IS
    'A user''s API key for a service, in clear; NULL when there is none. Service role only. p_user_id: the user (NULL: the team). p_service: openai, anthropic, xai, openrouter or gateway, in any case. Errors: 42501 not the service role, 22023 unknown service, 22000 no vault key opens it, F0000 no vault key.';

CREATE FUNCTION @extschema@.delete_user_api_key(p_user_id uuid, p_service text) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.require_service_role_for(row_security_active('@extschema@.api_keys'::regclass) AND NOT _nexus_hub.is_service_role(),
                                               'change', p_user_id, p_service);
    SELECT _nexus_hub.api_service(p_service);
    WITH deleted AS (
        DELETE FROM @extschema@.api_keys k
         WHERE k.service = _nexus_hub.api_service(p_service)
           AND (k.user_id = p_user_id OR (k.user_id IS NULL AND p_user_id IS NULL))
        RETURNING _nexus_hub.note_vault_use('change', _nexus_hub.api_key_object(k.user_id, k.service)))
    SELECT count(*) > 0 FROM deleted;
END;
COMMENT ON FUNCTION @extschema@.delete_user_api_key(uuid, text) IS
    'Deletes a user''s API key for a service; false when there was none. Service role only. p_user_id: the user (NULL: the team). p_service: openai, anthropic, xai, openrouter or gateway, in any case. Errors: 42501 not the service role, 22023 unknown service.';

CREATE FUNCTION @extschema@.touch_user_api_key(p_user_id uuid, p_service text) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.require_service_role(row_security_active('@extschema@.api_keys'::regclass) AND NOT _nexus_hub.is_service_role());
    SELECT _nexus_hub.api_service(p_service);
    UPDATE @extschema@.api_keys k
       SET last_used_at = now()
     WHERE k.service = _nexus_hub.api_service(p_service)
       AND (k.user_id = p_user_id OR (k.user_id IS NULL AND p_user_id IS NULL));
END;
COMMENT ON FUNCTION @extschema@.touch_user_api_key(uuid, text) IS
    'Notes that a user''s API key has been used: last_used_at is now. Without such a key, does nothing. Service role only. p_user_id: the user (NULL: the team). p_service: openai, anthropic, xai, openrouter or gateway, in any case. Errors: 42501 not the service role, 22023 unknown service.';

CREATE FUNCTION @extschema@.upsert_user_gateway_config(p_user_id uuid, p_base_url text) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.require_service_role(row_security_active('@extschema@.api_gateway_configs'::regclass)
                                           AND NOT _nexus_hub.is_service_role());
    INSERT INTO @extschema@.api_gateway_configs (user_id, base_url)
    SELECT p_user_id, _nexus_hub.gateway_base_url(p_base_url) WHERE p_user_id IS NOT NULL
    ON CONFLICT (user_id) WHERE user_id IS NOT NULL
    DO UPDATE SET base_url = excluded.base_url, updated_at = now();
    INSERT INTO @extschema@.api_gateway_configs (user_id, base_url)
    SELECT NULL, _nexus_hub.gateway_base_url(p_base_url) WHERE p_user_id IS NULL
    ON CONFLICT ((user_id IS NULL)) WHERE user_id IS NULL
    DO UPDATE SET base_url = excluded.base_url, updated_at = now();
END;
COMMENT ON FUNCTION @extschema@.upsert_user_gateway_config(uuid, text) IS
    'Sets where a user''s gateway is, in the place of what was there before. Its key is stored with insert_user_api_key. Service role only. p_user_id: the user (NULL: the team). p_base_url: an http or https URL of up to 2000 characters, without user name, password, query and fragment. Errors: 42501 not the service role, 22023 bad URL.';

CREATE FUNCTION @extschema@.delete_user_gateway_config(p_user_id uuid) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.require_service_role(row_security_active('@extschema@.api_gateway_configs'::regclass)
                                           AND NOT _nexus_hub.is_service_role());
    DELETE FROM @extschema@.api_gateway_configs g WHERE g.user_id = p_user_id OR (g.user_id IS NULL AND p_user_id IS NULL);
END;
COMMENT ON FUNCTION @extschema@.delete_user_gateway_config(uuid) IS
    'Forgets where a user''s gateway is; its key stays. Service role only. p_user_id: the user (NULL: the team). Errors: 42501 not the service role.';

CREATE FUNCTION @extschema@.get_user_gateway_base_url(p_user_id uuid) RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.require_service_role(row_security_active('@extschema@.api_gateway_configs'::regclass)
                                           AND NOT _nexus_hub.is_service_role());
    SELECT g.base_url
      FROM @extschema@.api_gateway_configs g
     WHERE g.user_id = p_user_id OR (g.user_id IS NULL AND p_user_id IS NULL);
END;
COMMENT ON FUNCTION @extschema@.get_user_gateway_base_url(uuid) IS
    'Where a user''s gateway is; NULL when that is not set. Service role only. p_user_id: the user (NULL: the team). Errors: 42501 not the service role.';

CREATE FUNCTION @extschema@.get_user_allow_gateway_fallback(p_user_id uuid) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.require_service_role(row_security_active('@extschema@.user_settings'::regclass)
                                           AND NOT _nexus_hub.is_service_role());
    SELECT coalesce((SELECT s.allow_gateway_fallback FROM @extschema@.user_settings s WHERE s.user_id = p_user_id), true);
END;
COMMENT ON FUNCTION @extschema@.get_user_allow_gateway_fallback(uuid) IS
    'Whether the team''s gateway and keys may be used for a user who has none; true when the user has not chosen. Service role only. p_user_id: the user. Errors: 42501 not the service role.';

CREATE FUNCTION @extschema@.resolve_provider(p_user_id uuid, p_model text)
RETURNS TABLE (provider text, model text, source text, service text, base_url text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.require_service_role(row_security_active('@extschema@.api_keys'::regclass) AND NOT _nexus_hub.is_service_role());
    WITH wanted AS MATERIALIZED (
        SELECT _nexus_hub.model_provider(p_model) AS provider,
               coalesce((SELECT s.allow_gateway_fallback FROM @extschema@.user_settings s WHERE s.user_id = p_user_id),
                        true) AS may_fall_back),
    chosen AS (
        SELECT k.user_id IS NULL AS is_teams, k.service, g.base_url
          FROM wanted w
         CROSS JOIN @extschema@.api_keys k
          LEFT JOIN @extschema@.api_gateway_configs g
                 ON k.service = 'gateway' AND (g.user_id = k.user_id OR (g.user_id IS NULL AND k.user_id IS NULL))
         WHERE (k.user_id = p_user_id OR (k.user_id IS NULL AND w.may_fall_back))
           AND (k.service IN (w.provider, 'openrouter') OR g.base_url IS NOT NULL)
         -- The user's before the team's; of each, the gateway, the provider itself, OpenRouter.
         ORDER BY k.user_id IS NULL, k.service <> 'gateway', k.service <> w.provider
         LIMIT 1)
    SELECT w.provider,
           _nexus_hub.model_name(p_model, coalesce(c.service, _nexus_hub.no_api_key(w.provider, p_user_id, w.may_fall_back))),
           CASE WHEN c.is_teams THEN 'team'::text WHEN c.service = 'gateway' THEN 'gateway'::text ELSE 'user'::text END,
           c.service,
           c.base_url
      FROM wanted w
      LEFT JOIN chosen c ON true;
END;
COMMENT ON FUNCTION @extschema@.resolve_provider(uuid, text) IS
    'Which key serves a model for a user, as one row, never the key itself: fetch that with get_user_api_key(p_user_id, service), or get_user_api_key(NULL, service) where source is team. Service role only. p_user_id: the user (NULL: the team). p_model: openai/…, anthropic/…, xai/…, other names with a slash (by way of OpenRouter), or a name whose beginning tells (gpt-4o, o3, claude-…, grok-…). Result: provider: whose the model is; model: what the service calls it; source: gateway (the user''s), user or team; service: openai, anthropic, xai, openrouter or gateway; base_url: the gateway''s, NULL for a service''s own. Order: the user''s gateway (key and base URL), key for the provider, key for openrouter; then the team''s in the same order, if the user allows it. Errors: 42501 not the service role, 22023 unknown model, 55000 no key.';

-- The columns that hold the vault's ciphertexts: the extension's own, and those that users have registered.

CREATE TABLE _nexus_hub.registered_columns (
    relation regclass NOT NULL,
    column_name name NOT NULL,
    context text,
    owner_name name NOT NULL,
    registered_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (relation, column_name)
);
COMMENT ON TABLE _nexus_hub.registered_columns IS 'Columns of users'' own tables that hold ciphertexts of the vault, which rotations take along.';
COMMENT ON COLUMN _nexus_hub.registered_columns.relation IS 'The table, with its partitions and the tables that inherit from it.';
COMMENT ON COLUMN _nexus_hub.registered_columns.column_name IS 'The column, of type bytea.';
COMMENT ON COLUMN _nexus_hub.registered_columns.context IS 'An SQL expression over a row: what encrypt_token was given as context. NULL: nothing.';
COMMENT ON COLUMN _nexus_hub.registered_columns.owner_name IS 'Who owned the table then. The expression runs with that role''s rights, and under no other owner.';
COMMENT ON COLUMN _nexus_hub.registered_columns.registered_at IS 'When the column was registered.';
-- Of a table that is gone only a number would be left, which is another table's elsewhere.
SELECT pg_catalog.pg_extension_config_dump('_nexus_hub.registered_columns',
                                           'WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = relation)');

CREATE FUNCTION _nexus_hub.known_columns()
RETURNS TABLE (relation regclass, column_name name, context text, noun text, owner_name name)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT '@extschema@.user_servers'::regclass, 'config_encrypted'::name, NULL::text, 'Server'::text, NULL::name
    UNION ALL
    SELECT '@extschema@.api_keys'::regclass, 'api_key_encrypted'::name, '_nexus_hub.api_key_context(user_id, service)'::text, 'API key'::text, NULL::name
    UNION ALL
    SELECT '_nexus_hub.secrets'::regclass, 'value_encrypted'::name, '_nexus_hub.secret_context(user_id, name)'::text, 'Secret'::text, NULL::name
    UNION ALL
    SELECT r.relation, r.column_name, r.context, NULL::text, r.owner_name
      FROM _nexus_hub.registered_columns r
     WHERE EXISTS (SELECT FROM pg_class c WHERE c.oid = r.relation);
END;
COMMENT ON FUNCTION _nexus_hub.known_columns() IS
    'All columns that hold ciphertexts. noun and owner_name are NULL, the one or the other: the extension''s own columns have a noun for errors, registered ones a role that must own the table.';

CREATE FUNCTION _nexus_hub.vault_leaves()
RETURNS TABLE (relation oid, column_name name, noun text, owner oid, is_registered boolean, blocks bigint,
               look_statement text, lock_statement text, pass_statement text, write_statement text, problem text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH RECURSIVE tree (relation, column_name, context, noun, owner_name, depth) AS (
        SELECT k.relation::oid, k.column_name, k.context, k.noun, k.owner_name, 0 FROM _nexus_hub.known_columns() k
         UNION
        SELECT i.inhrelid, t.column_name, t.context, t.noun, t.owner_name, t.depth + 1
          FROM tree t
          JOIN pg_inherits i ON i.inhparent = t.relation),
    leaf AS (
        -- A partition may be registered by itself, too: the nearest registration counts.
        SELECT DISTINCT ON (t.relation, t.column_name)
               t.relation, t.column_name, t.noun, t.owner_name, c.relowner, c.relkind,
               format('SELECT ctid::text, %1$I, (%2$s)::text, concat_ws('', '', %3$s) FROM ONLY %4$s'
                      ' WHERE ctid >= $1::tid AND ctid < $2::tid AND %1$I IS NOT NULL',
                      t.column_name, coalesce(t.context, 'NULL'), coalesce(k.columns, 'ctid'), t.relation::regclass) AS statement
          FROM tree t
          JOIN pg_class c ON c.oid = t.relation AND c.relkind <> 'p'
          LEFT JOIN LATERAL (
                    SELECT string_agg(format('%I', a.attname), ', ' ORDER BY p.place) AS columns
                      FROM pg_index x
                     CROSS JOIN unnest(x.indkey) WITH ORDINALITY AS p (number, place)
                      JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = p.number
                     -- Without what the index includes, which may be anything.
                     WHERE x.indrelid = t.relation AND x.indisprimary AND p.place <= x.indnkeyatts) AS k ON true
         ORDER BY t.relation, t.column_name, t.noun NULLS LAST, t.depth)
    SELECT l.relation, l.column_name, coalesce(l.noun, format('%s.%I', l.relation::regclass, l.column_name)), l.relowner,
           l.owner_name IS NOT NULL,
           -- NULL: dropped a moment ago.
           coalesce(pg_relation_size(l.relation), 0) / current_setting('block_size')::integer,
           l.statement, l.statement || ' FOR NO KEY UPDATE', l.statement || ' FOR NO KEY UPDATE SKIP LOCKED',
           format('UPDATE ONLY %1$s AS t SET %2$I = v.sealed FROM unnest($1::tid[], $2) AS v (row_id, sealed)'
                  ' WHERE t.ctid = v.row_id RETURNING t.%2$I = v.sealed', l.relation::regclass, l.column_name),
           CASE
               WHEN l.relkind <> 'r' THEN 'it is no ordinary table'
               WHEN a.attnum IS NULL THEN 'there is no such column of type bytea any more: unregister it'
               WHEN l.owner_name <> pg_get_userbyid(l.relowner) THEN
                   format('it was registered when %I owned the table: the owner must register it again', l.owner_name)
           END
      FROM leaf l
      LEFT JOIN pg_attribute a ON a.attrelid = l.relation AND a.attname = l.column_name AND NOT a.attisdropped AND a.atttypid = 'bytea'::regtype
     ORDER BY l.relation, l.column_name;
END;
COMMENT ON FUNCTION _nexus_hub.vault_leaves() IS
    'The tables that really hold the rows of the columns, the statements that read, lock (waiting for others, or passing over what they have locked) and write a range of their blocks, and why they cannot be run, if so. They are to be run with the rights of owner.';

CREATE FUNCTION _nexus_hub.put_registered_column(p_relation oid, p_column name, p_context text) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    DELETE FROM _nexus_hub.registered_columns r WHERE NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = r.relation);
    INSERT INTO _nexus_hub.registered_columns AS r (relation, column_name, context, owner_name)
    SELECT p_relation, p_column, p_context, pg_get_userbyid(c.relowner) FROM pg_class c WHERE c.oid = p_relation
    ON CONFLICT (relation, column_name)
    DO UPDATE SET context = excluded.context, owner_name = excluded.owner_name, registered_at = now();
END;
COMMENT ON FUNCTION _nexus_hub.put_registered_column(oid, name, text) IS 'Notes a column, which was found to be fit. The caller was found to own the table.';

CREATE FUNCTION _nexus_hub.drop_registered_column(p_relation oid, p_column name) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH dropped AS (DELETE FROM _nexus_hub.registered_columns r WHERE r.relation = p_relation AND r.column_name = p_column RETURNING 1)
    SELECT count(*) > 0 FROM dropped;
END;
COMMENT ON FUNCTION _nexus_hub.drop_registered_column(oid, name) IS 'Forgets a column. The caller was found to own the table.';

CREATE FUNCTION _nexus_hub.column_fault(p_relation oid, p_column name) RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT CASE
               WHEN c.relkind NOT IN ('r', 'p') OR c.relpersistence = 't' THEN 'it is no permanent table'
               WHEN c.relkind = 'r' AND m.amname <> 'heap' THEN format('its access method is %s, not heap', m.amname)
               WHEN a.attnum IS NULL THEN 'there is no such column'
               WHEN a.atttypid <> 'bytea'::regtype THEN format('the column''s type is %s, not bytea', format_type(a.atttypid, a.atttypmod))
               WHEN a.attgenerated <> '' THEN 'the column is generated'
               WHEN EXISTS (SELECT FROM _nexus_hub.known_columns() k WHERE k.relation = c.oid AND k.noun IS NOT NULL) THEN
                   'it is the extension''s own, and every rotation takes it along'
           END
      FROM pg_class c
      LEFT JOIN pg_am m ON m.oid = c.relam
      LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = p_column AND a.attnum > 0 AND NOT a.attisdropped
     WHERE c.oid = p_relation;
END;
COMMENT ON FUNCTION _nexus_hub.column_fault(oid, name) IS 'Why a column cannot be registered; NULL: it can.';

CREATE FUNCTION @extschema@.register_vault_column(p_table regclass, p_column text, p_context text DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'register_vault_column_wrapper';
COMMENT ON FUNCTION @extschema@.register_vault_column(regclass, text, text) IS
    'Has rotations of the vault''s keys take along a column of the caller''s own table, with its partitions; another call changes it. p_table: an ordinary table. p_column: a column of type bytea that holds what encrypt_token or encrypt_config made. p_context: an SQL expression over the row''s columns, what the values were given as context (NULL: none), such as ''user_id::text''; it runs with the rights of the table''s owner, and functions in it need their schema. Gives a WARNING when none of the first values can be decrypted. For whoever is granted EXECUTE, and owns the table. Errors: 42501 not the owner, 22023 not such a column, or the expression fails.';

CREATE FUNCTION @extschema@.unregister_vault_column(p_table regclass, p_column text) RETURNS boolean
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'unregister_vault_column_wrapper';
COMMENT ON FUNCTION @extschema@.unregister_vault_column(regclass, text) IS
    'Has rotations leave a column alone that was registered; false when it was not. Its values stay under the key that they are under. p_table: the table; the caller must own it. p_column: the column. Errors: 42501 not the owner.';

CREATE FUNCTION _nexus_hub.vault_column_list()
RETURNS TABLE (table_name text, column_name name, context text, is_registered boolean, problem text)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT k.relation::text, k.column_name, k.context, k.noun IS NULL,
           (SELECT l.problem FROM _nexus_hub.vault_leaves() l WHERE l.relation = k.relation AND l.column_name = k.column_name)
      FROM _nexus_hub.known_columns() k
     ORDER BY 4, 1, 2;
END;
COMMENT ON FUNCTION _nexus_hub.vault_column_list() IS 'What the view vault_columns shows.';

CREATE VIEW @extschema@.vault_columns WITH (security_barrier) AS
    SELECT c.table_name, c.column_name, c.context, c.is_registered, c.problem FROM _nexus_hub.vault_column_list() AS c;
COMMENT ON VIEW @extschema@.vault_columns IS 'The columns that rotations of the vault''s keys take along.';
COMMENT ON COLUMN @extschema@.vault_columns.table_name IS 'The table.';
COMMENT ON COLUMN @extschema@.vault_columns.column_name IS 'The column.';
COMMENT ON COLUMN @extschema@.vault_columns.context IS 'The SQL expression of the context that the values are bound to; NULL: none.';
COMMENT ON COLUMN @extschema@.vault_columns.is_registered IS 'Whether it was registered with register_vault_column; else it is the extension''s own.';
COMMENT ON COLUMN @extschema@.vault_columns.problem IS 'Why rotations cannot take it along; NULL: they can.';

-- The view of the vault's keys.

CREATE FUNCTION _nexus_hub.count_values(p_relation oid, p_column text) RETURNS TABLE (fingerprint text, value_count bigint)
LANGUAGE c STABLE
AS 'MODULE_PATHNAME', 'count_values_wrapper';
COMMENT ON FUNCTION _nexus_hub.count_values(oid, text) IS
    'How many values of a column are under each key; NULL: those that no key of the server opens. Read with the rights of the table''s owner.';

CREATE FUNCTION _nexus_hub.values_by_vault_key() RETURNS TABLE (fingerprint text, value_count bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET row_security = off
AS $$
DECLARE
    -- Not a loop over a query: its cursor would be open while the owners' expressions run, which could read it empty.
    leaves jsonb := (SELECT coalesce(jsonb_agg(to_jsonb(l)), '[]') FROM _nexus_hub.vault_leaves() l);
    leaf jsonb;
    is_complete boolean := true;
BEGIN
    FOR i IN 0 .. jsonb_array_length(leaves) - 1 LOOP
        leaf := leaves -> i;
        BEGIN
            IF leaf ->> 'problem' IS NOT NULL THEN
                RAISE EXCEPTION '%', leaf ->> 'problem';
            END IF;
            RETURN QUERY SELECT c.fingerprint, c.value_count FROM _nexus_hub.count_values((leaf ->> 'relation')::oid, leaf ->> 'column_name') AS c;
        EXCEPTION WHEN OTHERS THEN
            RAISE WARNING 'the values of % are not counted: %', leaf ->> 'noun', SQLERRM;
            is_complete := false;
        END;
    END LOOP;
    IF NOT is_complete THEN
        RETURN QUERY SELECT ''::text, NULL::bigint;
    END IF;
END
$$;
COMMENT ON FUNCTION _nexus_hub.values_by_vault_key() IS
    'How many values are under each key, of each column by itself; a NULL fingerprint: those that no key of the server opens; a NULL count: some columns could not be read. Tries them all: a second for a million or so.';

CREATE FUNCTION _nexus_hub.vault_key_state()
RETURNS TABLE (fingerprint text, is_primary boolean, source text, first_seen timestamptz, value_count bigint, encrypted_count bigint)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH counted AS MATERIALIZED (SELECT b.fingerprint, b.value_count FROM _nexus_hub.values_by_vault_key() b)
    SELECT coalesce(r.fingerprint, k.fingerprint, v.fingerprint), coalesce(r.place = 1, false), r.source, k.first_seen,
           -- What could not be read may be under any key.
           CASE WHEN NOT EXISTS (SELECT FROM counted c WHERE c.value_count IS NULL) THEN coalesce(v.value_count, 0) END,
           k.encrypted_count
      FROM _nexus_hub.vault_key_ring() r
      FULL JOIN (SELECT n.fingerprint, min(n.first_seen) AS first_seen, sum(n.encrypted_count)::bigint AS encrypted_count
                   FROM _nexus_hub.known_vault_keys n GROUP BY n.fingerprint) AS k
             ON k.fingerprint = r.fingerprint
      FULL JOIN (SELECT c.fingerprint, sum(c.value_count)::bigint AS value_count
                   FROM counted c WHERE c.value_count IS NOT NULL GROUP BY c.fingerprint) AS v
             ON v.fingerprint = r.fingerprint
     ORDER BY r.place, k.first_seen;
END;
COMMENT ON FUNCTION _nexus_hub.vault_key_state() IS 'What the view vault_keys shows. The caller has been found to be trusted.';

CREATE VIEW @extschema@.vault_keys WITH (security_barrier) AS
    SELECT s.fingerprint, s.is_primary, s.source, s.first_seen, s.value_count, s.encrypted_count,
           coalesce(s.encrypted_count >= 2147483648, false) AS is_worn FROM _nexus_hub.vault_key_state() AS s;
COMMENT ON VIEW @extschema@.vault_keys IS
    'The vault''s keys, never the keys themselves: those of the server, and those that this database has encrypted under. Errors: F0000 the keys'' source cannot be used.';
COMMENT ON COLUMN @extschema@.vault_keys.fingerprint IS 'The key''s fingerprint. NULL: the values that no key of the server opens.';
COMMENT ON COLUMN @extschema@.vault_keys.is_primary IS 'Whether it is the key that encrypts.';
COMMENT ON COLUMN @extschema@.vault_keys.source IS 'What the server has it from; NULL: the server does not have it.';
COMMENT ON COLUMN @extschema@.vault_keys.first_seen IS 'When it encrypted here first; NULL: never yet.';
COMMENT ON COLUMN @extschema@.vault_keys.value_count IS 'Values of the vault''s tables and of registered columns that are under it. At 0 an older key can be removed; values elsewhere are not counted. NULL: some columns could not be read, as a WARNING says. Counted anew at each look: a second for a million or so.';
COMMENT ON COLUMN @extschema@.vault_keys.encrypted_count IS 'Values that were encrypted under it in this database since it was used here first, about: those of the last nexus_hub.poll_interval, and those before a crash of the server, are missing. NULL: none, or nexus_hub is not preloaded.';
COMMENT ON COLUMN @extschema@.vault_keys.is_worn IS 'Whether it has encrypted 2^31 values or more, of the 2^32 for which AES-GCM with random IVs is safe: time to put a new key above it and to rotate.';

-- Rotation of the vault's keys, in one transaction. Values are opened and sealed in Rust (src/vault/rotation.rs).

CREATE FUNCTION _nexus_hub.begin_key_rotation() RETURNS void
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'begin_key_rotation_wrapper';
COMMENT ON FUNCTION _nexus_hub.begin_key_rotation() IS
    'Takes the keys of a rotation up, until the transaction ends: app.vault_old_key and app.vault_new_key, or where neither is set those of the vault. Errors: F0000 one of the two is missing, or there is no older key.';

CREATE FUNCTION _nexus_hub.reseal(encrypted bytea, context text, kind text, id uuid) RETURNS bytea
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'reseal_wrapper';
COMMENT ON FUNCTION _nexus_hub.reseal(bytea, text, text, uuid) IS
    'A ciphertext encrypted anew under the new key of the rotation; as it was when it is under that already, or cannot be decrypted, which is noted as an error of the kind and id. Errors: 55000 no rotation is going on.';

CREATE FUNCTION _nexus_hub.resealed() RETURNS integer
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'resealed_wrapper';
COMMENT ON FUNCTION _nexus_hub.resealed() IS 'How many values reseal has encrypted anew since this was called last.';

CREATE FUNCTION _nexus_hub.reseal_column(p_relation oid, p_column text) RETURNS void
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'reseal_column_wrapper';
COMMENT ON FUNCTION _nexus_hub.reseal_column(oid, text) IS
    'Encrypts the values of a registered column anew, with the rights of the table''s owner. Errors: 55000 no rotation is going on, or rows cannot be written.';

CREATE FUNCTION _nexus_hub.note_rotation_error(p_item text, p_reason text) RETURNS void
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'note_rotation_error_wrapper';
COMMENT ON FUNCTION _nexus_hub.note_rotation_error(text, text) IS 'Notes what could not be encrypted anew. Errors: 55000 no rotation is going on.';

CREATE FUNCTION _nexus_hub.reseal_registered_columns() RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- Not a loop over a query: its cursor would be open while the owners' expressions run.
    leaves jsonb := (SELECT coalesce(jsonb_agg(to_jsonb(l)), '[]') FROM _nexus_hub.vault_leaves() l WHERE l.is_registered);
    leaf jsonb;
BEGIN
    FOR i IN 0 .. jsonb_array_length(leaves) - 1 LOOP
        leaf := leaves -> i;
        -- What goes wrong in one owner's column does not stop the others.
        BEGIN
            IF leaf ->> 'problem' IS NOT NULL THEN
                RAISE EXCEPTION '%', leaf ->> 'problem';
            END IF;
            PERFORM _nexus_hub.reseal_column((leaf ->> 'relation')::oid, leaf ->> 'column_name');
        EXCEPTION WHEN OTHERS THEN
            PERFORM _nexus_hub.note_rotation_error(leaf ->> 'noun', SQLERRM);
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION _nexus_hub.reseal_registered_columns() IS
    'Encrypts the values of the columns that users have registered anew; what cannot be is noted. The tables are locked.';

CREATE FUNCTION _nexus_hub.end_key_rotation() RETURNS text[]
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'end_key_rotation_wrapper';
COMMENT ON FUNCTION _nexus_hub.end_key_rotation() IS
    'Forgets the keys of the rotation, and returns what could not be encrypted anew: the first 1000 one by one.';

CREATE FUNCTION _nexus_hub.rotate_values() RETURNS TABLE (servers_updated integer, errors text[])
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- The same plaintexts as before: no trigger needs to know. A policy that hides rows from their table's owner is an error.
SET session_replication_role = replica
SET row_security = off
-- Rows are found by their places.
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    servers integer;
    failed text[];
    registered regclass[] := ARRAY(SELECT DISTINCT k.relation FROM _nexus_hub.known_columns() k WHERE k.noun IS NULL ORDER BY 1);
BEGIN
    PERFORM _nexus_hub.begin_key_rotation();
    -- Nobody may write a value under the old key into a row that was passed already. Reading goes on.
    LOCK TABLE @extschema@.user_servers, @extschema@.api_keys, _nexus_hub.secrets IN SHARE ROW EXCLUSIVE MODE;
    UPDATE @extschema@.user_servers s
       SET config_encrypted = _nexus_hub.reseal(s.config_encrypted, NULL, 'Server', s.id)
     WHERE s.config_encrypted IS NOT NULL;
    servers := _nexus_hub.resealed();
    UPDATE @extschema@.api_keys k
       SET api_key_encrypted = _nexus_hub.reseal(k.api_key_encrypted, _nexus_hub.api_key_context(k.user_id, k.service), 'API key', k.id);
    UPDATE _nexus_hub.secrets s
       SET value_encrypted = _nexus_hub.reseal(s.value_encrypted, _nexus_hub.secret_context(s.user_id, s.name), 'Secret', s.id);
    FOR i IN 1 .. cardinality(registered) LOOP
        EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', registered[i]);
    END LOOP;
    PERFORM _nexus_hub.reseal_registered_columns();
    failed := _nexus_hub.end_key_rotation();
    IF failed = '{}' THEN
        RAISE NOTICE 'all values are under the new key: when this is committed, the older ones are free to be removed';
    END IF;
    RETURN QUERY SELECT servers, failed;
END
$$;
COMMENT ON FUNCTION _nexus_hub.rotate_values() IS 'What rotate_vault_key does. The caller has been found to be trusted.';

CREATE FUNCTION @extschema@.rotate_vault_key() RETURNS TABLE (servers_updated integer, errors text[])
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT r.servers_updated, r.errors FROM _nexus_hub.rotate_values() AS r;
END;
COMMENT ON FUNCTION @extschema@.rotate_vault_key() IS
    'Encrypts everything in the vault''s tables and registered columns anew, in one transaction: from app.vault_old_key to app.vault_new_key, or where neither is set under the first key of the vault. servers_updated: servers'' configs that were encrypted anew; those under the new key already are not counted. errors: "Server <id>: <reason>", "API key <id>: <reason>", "Secret <id>: <reason>" or, of registered columns, "<schema.table.column> <primary key>: <reason>" for each value that cannot be decrypted, and the column''s name alone where it cannot be read: all of these stay as they are. Writers wait until the transaction ends, readers do not. Errors: F0000 the keys are not set.';

-- Rotation of the vault's keys in the background, in small batches (src/vault/online.rs, src/worker/rotate.rs).

CREATE TABLE _nexus_hub.vault_rotation_state (
    is_only boolean PRIMARY KEY DEFAULT true
        CONSTRAINT vault_rotation_state_is_only CHECK (is_only),
    state text NOT NULL
        CONSTRAINT vault_rotation_state_known CHECK (state IN ('running', 'paused', 'done', 'incomplete')),
    fingerprint text NOT NULL,
    ring text[] NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    swept_at timestamptz,
    ended_at timestamptz,
    relation oid NOT NULL DEFAULT 0,
    column_name name NOT NULL DEFAULT '',
    next_block bigint NOT NULL DEFAULT 0,
    end_block bigint NOT NULL DEFAULT 0,
    done bigint NOT NULL DEFAULT 0,
    total bigint NOT NULL DEFAULT 0,
    resealed bigint NOT NULL DEFAULT 0,
    unopened bigint NOT NULL DEFAULT 0,
    failed_columns integer NOT NULL DEFAULT 0,
    spent interval NOT NULL DEFAULT '0',
    problem text,
    CONSTRAINT vault_rotation_state_ended CHECK ((ended_at IS NOT NULL) = (state IN ('done', 'incomplete')))
);
COMMENT ON TABLE _nexus_hub.vault_rotation_state IS 'The rotation that is going on, or was the last, and where it stands. Written with each batch: a crash loses nothing of it.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.is_only IS 'There is one row.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.state IS 'running, paused, done, or incomplete: some columns could not be taken along, or hold values that no key opens.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.fingerprint IS 'The key that everything comes under.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.ring IS 'The keys that the server had when it was started, that one among them: none may be missing, or values under it would look like rubbish.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.started_at IS 'When it was started.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.swept_at IS 'When it had been through all tables; what follows is the check.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.ended_at IS 'When it ended.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.relation IS 'The table that it is at.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.column_name IS 'The column that it is at.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.next_block IS 'The block of the table that comes next.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.end_block IS 'The block that the table ended before when its turn came. What is written behind it is found by the check.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.done IS 'Values looked at.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.total IS 'Values there are, as far as can be told by now.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.resealed IS 'Values encrypted anew.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.unopened IS 'Values that no key opens.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.failed_columns IS 'Columns that could not be taken along.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.spent IS 'Time it has been at it, its pauses between batches included.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_state.problem IS 'What it waits for, or what went wrong last.';

CREATE TABLE _nexus_hub.vault_rotation_errors (
    item text PRIMARY KEY,
    reason text NOT NULL
);
COMMENT ON TABLE _nexus_hub.vault_rotation_errors IS 'What the last rotation could not encrypt anew: values, the first 1000 of them, and columns.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_errors.item IS 'Server <id>, API key <id>, Secret <id>, <schema.table.column> <primary key>, or a column alone.';
COMMENT ON COLUMN _nexus_hub.vault_rotation_errors.reason IS 'Why it could not be encrypted anew.';

CREATE FUNCTION _nexus_hub.begin_rotation(p_ring text[]) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE _nexus_hub.vault_rotation_state s
       SET state = 'running', ring = p_ring
     WHERE s.state IN ('running', 'paused') AND s.fingerprint = p_ring[1];
    IF FOUND THEN
        RETURN false;
    END IF;
    DELETE FROM _nexus_hub.vault_rotation_errors;
    -- Not a row in the place of the old one: the process may wait for that.
    UPDATE _nexus_hub.vault_rotation_state s
       SET state = 'running', fingerprint = p_ring[1], ring = p_ring, started_at = clock_timestamp(), swept_at = NULL, ended_at = NULL,
           relation = 0, column_name = '', next_block = 0, end_block = 0,
           done = 0, total = 0, resealed = 0, unopened = 0, failed_columns = 0, spent = '0', problem = NULL;
    IF NOT FOUND THEN
        INSERT INTO _nexus_hub.vault_rotation_state (state, fingerprint, ring, started_at) VALUES ('running', p_ring[1], p_ring, clock_timestamp());
    END IF;
    RETURN true;
END
$$;
COMMENT ON FUNCTION _nexus_hub.begin_rotation(text[]) IS 'Begins a rotation to the first of the keys; false when there is one to that key already, which goes on.';

CREATE FUNCTION _nexus_hub.launch_rotation() RETURNS text
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'launch_rotation_wrapper';
COMMENT ON FUNCTION _nexus_hub.launch_rotation() IS 'What start_vault_rotation does. The caller has been found to be trusted.';

CREATE FUNCTION _nexus_hub.set_rotation_paused(p_paused boolean) RETURNS boolean
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'set_rotation_paused_wrapper';
COMMENT ON FUNCTION _nexus_hub.set_rotation_paused(boolean) IS
    'What pause_vault_rotation and resume_vault_rotation do. The caller has been found to be trusted.';

CREATE FUNCTION _nexus_hub.switch_rotation(p_paused boolean) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH switched AS (
        UPDATE _nexus_hub.vault_rotation_state s
           SET state = CASE WHEN p_paused THEN 'paused' ELSE 'running' END
         WHERE s.state = CASE WHEN p_paused THEN 'running' ELSE 'paused' END
        RETURNING 1)
    SELECT count(*) > 0 FROM switched;
END;
COMMENT ON FUNCTION _nexus_hub.switch_rotation(boolean) IS 'Pauses or resumes the rotation, if it is not so already.';

CREATE FUNCTION _nexus_hub.running_transactions() RETURNS text[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- Not by their beginnings, which pg_stat_activity does not know under track_activities = off.
    SELECT coalesce(array_agg(format('%s %s', l.virtualxid, l.pid)), '{}')
      FROM pg_locks l
      JOIN pg_stat_activity a ON a.pid = l.pid
     WHERE l.locktype = 'virtualxid' AND l.mode = 'ExclusiveLock' AND l.granted AND l.pid <> pg_backend_pid()
       AND a.datid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
       AND a.backend_type NOT IN ('autovacuum worker', 'nexus_hub worker');
END;
COMMENT ON FUNCTION _nexus_hub.running_transactions() IS
    'The transactions of the database, as "<virtual id> <process id>"; without those that encrypt nothing.';

CREATE FUNCTION _nexus_hub.prepared_transactions() RETURNS text[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce(array_agg(format('%s %s', p.transaction, p.gid)), '{}') FROM pg_prepared_xacts p WHERE p.database = current_database();
END;
COMMENT ON FUNCTION _nexus_hub.prepared_transactions() IS 'The prepared transactions of the database, as "<id> <name>".';

CREATE FUNCTION _nexus_hub.may_check_on() RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT EXISTS (SELECT FROM _nexus_hub.vault_rotation_state s WHERE s.state = 'running')
       AND NOT EXISTS (SELECT FROM pg_locks l WHERE NOT l.granted AND pg_backend_pid() = ANY (pg_blocking_pids(l.pid)));
END;
COMMENT ON FUNCTION _nexus_hub.may_check_on() IS 'Whether the rotation is still wanted, and nobody waits for a lock of this process.';

CREATE FUNCTION @extschema@.start_vault_rotation() RETURNS text
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.launch_rotation();
END;
COMMENT ON FUNCTION @extschema@.start_vault_rotation() IS
    'Has everything in the vault''s tables and registered columns encrypted anew under the first key of the vault, in the background, in small batches, at the pace of nexus_hub.vault_rotation_pace; goes on with one that was paused. Returns the key''s fingerprint; vault_rotation shows how far it is. Put the new key on top of the older ones and reload before. Errors: F0000 no vault key, or no older one below it; 55000 not preloaded, or the keys come from app.vault_key.';

CREATE FUNCTION @extschema@.pause_vault_rotation() RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.set_rotation_paused(true);
END;
COMMENT ON FUNCTION @extschema@.pause_vault_rotation() IS
    'Pauses the rotation that start_vault_rotation has begun, until resume_vault_rotation; false when none is running. Old and new values can be read meanwhile, as long as both keys are there.';

CREATE FUNCTION @extschema@.resume_vault_rotation() RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.set_rotation_paused(false);
END;
COMMENT ON FUNCTION @extschema@.resume_vault_rotation() IS 'Has a paused rotation go on where it was; false when none is paused.';

CREATE FUNCTION _nexus_hub.primary_vault_key() RETURNS text
LANGUAGE c STABLE
AS 'MODULE_PATHNAME', 'primary_vault_key_wrapper';
COMMENT ON FUNCTION _nexus_hub.primary_vault_key() IS 'The fingerprint of the key that encrypts; NULL where none can be used.';

CREATE VIEW @extschema@.vault_rotation WITH (security_barrier) AS
    SELECT CASE WHEN s.state = 'running' AND s.swept_at IS NOT NULL THEN 'checking' ELSE s.state END AS state,
           s.fingerprint, s.started_at, s.ended_at, s.done, s.total, s.resealed,
           CASE WHEN s.spent > '0' THEN round((s.done / extract(epoch FROM s.spent))::numeric, 1) END AS rate,
           CASE WHEN s.swept_at IS NULL AND s.done > 0 AND s.ended_at IS NULL THEN
               date_trunc('second', s.spent * (greatest(s.total - s.done, 0)::double precision / s.done)) END AS eta,
           s.unopened + s.failed_columns AS errors,
           s.problem,
           s.state = 'done' AND s.fingerprint = _nexus_hub.primary_vault_key()
               AND NOT EXISTS (SELECT FROM _nexus_hub.registered_columns r WHERE r.registered_at > s.swept_at) AS old_keys_are_free
      FROM _nexus_hub.vault_rotation_state s;
COMMENT ON VIEW @extschema@.vault_rotation IS 'The rotation that start_vault_rotation has begun, or the last one; no row: there was none.';
COMMENT ON COLUMN @extschema@.vault_rotation.state IS 'running: goes through the tables; checking: looks whether anything is left, under one snapshot; paused; done; incomplete: ended, but columns could not be taken along, or registered ones hold values that no key opens with their context: see vault_rotation_errors.';
COMMENT ON COLUMN @extschema@.vault_rotation.fingerprint IS 'The key that everything comes under.';
COMMENT ON COLUMN @extschema@.vault_rotation.started_at IS 'When it was started.';
COMMENT ON COLUMN @extschema@.vault_rotation.ended_at IS 'When it ended; NULL: it has not yet.';
COMMENT ON COLUMN @extschema@.vault_rotation.done IS 'Values looked at.';
COMMENT ON COLUMN @extschema@.vault_rotation.total IS 'Values there are: an estimate until all have been looked at.';
COMMENT ON COLUMN @extschema@.vault_rotation.resealed IS 'Values encrypted anew; the others were under the key already, or cannot be decrypted.';
COMMENT ON COLUMN @extschema@.vault_rotation.rate IS 'Values looked at in a second, the pauses between batches included.';
COMMENT ON COLUMN @extschema@.vault_rotation.eta IS 'Time until all have been looked at, at that rate; the check comes on top.';
COMMENT ON COLUMN @extschema@.vault_rotation.errors IS 'Values that no key opens, and columns that could not be taken along.';
COMMENT ON COLUMN @extschema@.vault_rotation.problem IS 'What it waits for, or what went wrong last; it is tried again.';
COMMENT ON COLUMN @extschema@.vault_rotation.old_keys_are_free IS 'Whether all keys but this one can be removed: nothing that can be decrypted is under them, but in columns that are not in vault_columns. False again when another key encrypts, or a column was registered since.';

CREATE VIEW @extschema@.vault_rotation_errors WITH (security_barrier) AS
    SELECT e.item, e.reason FROM _nexus_hub.vault_rotation_errors e;
COMMENT ON VIEW @extschema@.vault_rotation_errors IS 'What the last rotation in the background could not encrypt anew: columns, and of the values the first 1000.';
COMMENT ON COLUMN @extschema@.vault_rotation_errors.item IS 'Server <id>, API key <id>, Secret <id>, <schema.table.column> <primary key>, or a column alone.';
COMMENT ON COLUMN @extschema@.vault_rotation_errors.reason IS 'Why it could not be encrypted anew.';

-- Rate limits. They are counted in shared memory (src/pg/shmem/rates.rs); the tables are for rules, for minutes that are
-- over, and for servers where the library is not preloaded.

CREATE FUNCTION @extschema@.check_rate_limit(p_server_id text, p_user_id uuid, p_limit_per_minute integer) RETURNS boolean
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'check_rate_limit';
COMMENT ON FUNCTION @extschema@.check_rate_limit(text, uuid, integer) IS
    'Counts this call in the running clock minute of the server and the user, denied calls too, and tells whether the count is within p_limit_per_minute. A limit of 0 or less allows nothing; a NULL user is a key of its own. Works in read-only transactions, and a rollback gives nothing back. Errors: 22023 p_server_id NULL or empty, p_limit_per_minute NULL; where the library is not preloaded, 55000 in read-only transactions.';

CREATE FUNCTION @extschema@.rate_limit(
    p_key text, p_limit integer, p_window_seconds integer DEFAULT 60, p_cost integer DEFAULT 1, p_burst integer DEFAULT NULL,
    OUT allowed boolean, OUT "limit" integer, OUT remaining integer, OUT retry_after_seconds double precision, OUT reset_seconds double precision)
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'rate_limit_wrapper';
COMMENT ON FUNCTION @extschema@.rate_limit(text, integer, integer, integer, integer) IS
    'Charges p_cost (0 or more) to a key that may use up p_limit in p_window_seconds (1 or more), evenly, and p_burst (1 or more; NULL: p_limit) at once. A call that is denied is charged nothing. remaining: calls of cost 1 that would be allowed next. retry_after_seconds: until this call would be allowed; 0 if it is, NULL if it never will be (p_limit is 0 or less, p_cost is above the burst). reset_seconds: until the limit is full again. Windows of different length have states of their own. Errors: 22023 bad argument; where the library is not preloaded, 55000 in read-only transactions.';

CREATE FUNCTION @extschema@.rate_limit_peek(
    p_key text, p_limit integer, p_window_seconds integer DEFAULT 60, p_cost integer DEFAULT 1, p_burst integer DEFAULT NULL,
    OUT allowed boolean, OUT "limit" integer, OUT remaining integer, OUT retry_after_seconds double precision, OUT reset_seconds double precision)
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'rate_limit_peek_wrapper';
COMMENT ON FUNCTION @extschema@.rate_limit_peek(text, integer, integer, integer, integer) IS
    'What rate_limit with the same arguments would answer now, without a charge. Errors: 22023 bad argument.';

CREATE FUNCTION @extschema@.rate_limit_all(
    p_keys text[], p_limits integer[], p_windows_seconds integer[] DEFAULT NULL, p_costs integer[] DEFAULT NULL, p_bursts integer[] DEFAULT NULL)
RETURNS TABLE (key text, allowed boolean, "limit" integer, remaining integer, retry_after_seconds double precision, reset_seconds double precision)
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'rate_limit_all_wrapper';
COMMENT ON FUNCTION @extschema@.rate_limit_all(text[], integer[], integer[], integer[], integer[]) IS
    'rate_limit for several policies, up to 64: all are charged, or none where one of them denies. The n-th elements belong together; an array that is NULL stands for 60 seconds, cost 1, the limit as burst. One row for each policy, in order; the call is allowed when all are. Errors: 22023 bad argument, arrays of different length, a key twice with the same window; 54000 too many; where the library is not preloaded, 55000 in read-only transactions.';

CREATE FUNCTION @extschema@.reset_rate_limit(p_key text) RETURNS boolean
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'reset_rate_limit_wrapper';
COMMENT ON FUNCTION @extschema@.reset_rate_limit(text) IS
    'Forgets what rate_limit has charged to a key, under all windows. Returns false when there was nothing. Errors: 22023 p_key NULL or empty.';

CREATE FUNCTION @extschema@.reset_server_rate_limit(p_server_id text, p_user_id uuid) RETURNS boolean
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'reset_server_rate_limit_wrapper';
COMMENT ON FUNCTION @extschema@.reset_server_rate_limit(text, uuid) IS
    'Forgets the calls that check_rate_limit has counted for the server and the user in the running minute. Returns false when there were none. Errors: 22023 p_server_id NULL or empty.';

-- ── Exemptions and overrides ──

CREATE TABLE @extschema@.rate_limit_exemptions (
    identifier text PRIMARY KEY
        CONSTRAINT rate_limit_exemptions_identifier_length CHECK (length(identifier) BETWEEN 1 AND 500),
    reason text,
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE @extschema@.rate_limit_exemptions IS 'Who has no rate limit. Changes count for all sessions from their commit on. Each session keeps a copy in memory.';
COMMENT ON COLUMN @extschema@.rate_limit_exemptions.identifier IS 'A key of rate_limit, a server''s id, or a user''s id; 1 to 500 characters, the whole of it.';
COMMENT ON COLUMN @extschema@.rate_limit_exemptions.reason IS 'Why, for people.';
COMMENT ON COLUMN @extschema@.rate_limit_exemptions.created_at IS 'When the row was made.';

CREATE TABLE @extschema@.rate_limit_overrides (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    key text
        CONSTRAINT rate_limit_overrides_key_length CHECK (length(key) BETWEEN 1 AND 500),
    server_id text
        CONSTRAINT rate_limit_overrides_server_id_length CHECK (length(server_id) BETWEEN 1 AND 500),
    user_id uuid,
    request_limit integer NOT NULL
        CONSTRAINT rate_limit_overrides_request_limit_range CHECK (request_limit >= 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT rate_limit_overrides_target CHECK ((key IS NULL) = (server_id IS NOT NULL OR user_id IS NOT NULL))
);
-- An unset part counts as a value: one row for a server, one for a user, one for both.
CREATE UNIQUE INDEX rate_limit_overrides_target_key ON @extschema@.rate_limit_overrides
    ((coalesce(key, '')), (coalesce(server_id, '')), (coalesce(user_id::text, '')));
COMMENT ON TABLE @extschema@.rate_limit_overrides IS 'Limits that count instead of those that callers pass: of a key of rate_limit, or of a server, a user, or a user at a server, which goes before the user''s, and that before the server''s. Changes count for all sessions from their commit on. Each session keeps a copy in memory.';
COMMENT ON COLUMN @extschema@.rate_limit_overrides.id IS 'The row''s id.';
COMMENT ON COLUMN @extschema@.rate_limit_overrides.key IS 'The key of rate_limit, 1 to 500 characters; NULL for a server or a user.';
COMMENT ON COLUMN @extschema@.rate_limit_overrides.server_id IS 'The server of check_rate_limit; NULL: any.';
COMMENT ON COLUMN @extschema@.rate_limit_overrides.user_id IS 'The user of check_rate_limit; NULL: any.';
COMMENT ON COLUMN @extschema@.rate_limit_overrides.request_limit IS 'Calls that are allowed, 0 or more: in a clock minute, or in the window that the caller of rate_limit passes.';
COMMENT ON COLUMN @extschema@.rate_limit_overrides.created_at IS 'When the row was made.';

ALTER TABLE @extschema@.rate_limit_exemptions ENABLE ROW LEVEL SECURITY;
ALTER TABLE @extschema@.rate_limit_overrides ENABLE ROW LEVEL SECURITY;
CREATE POLICY rate_limit_exemptions_service_all ON @extschema@.rate_limit_exemptions
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));
CREATE POLICY rate_limit_overrides_service_all ON @extschema@.rate_limit_overrides
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));
SELECT pg_catalog.pg_extension_config_dump('@extschema@.rate_limit_exemptions', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.rate_limit_overrides', '');

CREATE FUNCTION _nexus_hub.rate_limit_rules_changed() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'rate_limit_rules_changed_wrapper';
COMMENT ON FUNCTION _nexus_hub.rate_limit_rules_changed() IS
    'Trigger: has all sessions read the exemptions and overrides of rate limits again when the transaction has ended.';
CREATE TRIGGER rate_limit_exemptions_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON @extschema@.rate_limit_exemptions
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.rate_limit_rules_changed();
CREATE TRIGGER rate_limit_overrides_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON @extschema@.rate_limit_overrides
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.rate_limit_rules_changed();

CREATE FUNCTION _nexus_hub.rate_limit_rules()
RETURNS TABLE (is_exempt boolean, identifier text, server_id text, user_id uuid, request_limit integer)
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
    SELECT true, e.identifier, NULL::text, NULL::uuid, NULL::integer FROM @extschema@.rate_limit_exemptions e
    UNION ALL
    SELECT false, o.key, o.server_id, o.user_id, o.request_limit FROM @extschema@.rate_limit_overrides o;
END;
COMMENT ON FUNCTION _nexus_hub.rate_limit_rules() IS 'The exemptions and overrides of rate limits.';

-- ── What was counted ──

CREATE TABLE _nexus_hub.rate_limit_windows (
    server_id text NOT NULL,
    user_id uuid,
    window_start timestamptz NOT NULL,
    request_count integer NOT NULL
);
-- By time first: what is old is deleted.
CREATE UNIQUE INDEX rate_limit_windows_key ON _nexus_hub.rate_limit_windows (window_start, server_id, (coalesce(user_id::text, '')));
COMMENT ON TABLE _nexus_hub.rate_limit_windows IS 'The calls of clock minutes that are over.';
COMMENT ON COLUMN _nexus_hub.rate_limit_windows.server_id IS 'The server; of a name of more than 180 bytes the beginning and a hash.';
COMMENT ON COLUMN _nexus_hub.rate_limit_windows.user_id IS 'The user, if the calls were one''s.';
COMMENT ON COLUMN _nexus_hub.rate_limit_windows.window_start IS 'When the minute began.';
COMMENT ON COLUMN _nexus_hub.rate_limit_windows.request_count IS 'The calls, denied ones too.';

CREATE FUNCTION _nexus_hub.minute_start(minute integer) RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
    SELECT '2000-01-01 00:00:00+00'::timestamptz + minute * '1 minute'::interval;
END;
COMMENT ON FUNCTION _nexus_hub.minute_start(integer) IS 'When a minute begins that is given by its number since 2000-01-01 UTC.';

CREATE FUNCTION _nexus_hub.record_rate_limit_windows(servers text[], users uuid[], minutes integer[], counts integer[]) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- The same again, after a crash, changes nothing.
    INSERT INTO _nexus_hub.rate_limit_windows AS w (server_id, user_id, window_start, request_count)
    SELECT n.server_id, n.user_id, _nexus_hub.minute_start(n.minute), max(n.request_count)
      FROM unnest(servers, users, minutes, counts) AS n (server_id, user_id, minute, request_count)
     GROUP BY 1, 2, 3
    ON CONFLICT (window_start, server_id, (coalesce(user_id::text, ''))) DO UPDATE
       SET request_count = excluded.request_count WHERE w.request_count < excluded.request_count;
END;
COMMENT ON FUNCTION _nexus_hub.record_rate_limit_windows(text[], uuid[], integer[], integer[]) IS 'Writes down the calls of minutes that are over.';

-- ── Without shared memory ──

CREATE UNLOGGED TABLE _nexus_hub.rate_limit_entries (
    id bytea NOT NULL,
    window_seconds integer NOT NULL,
    kind integer NOT NULL,
    name text NOT NULL,
    user_id uuid,
    state bigint NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (id, window_seconds)
);
CREATE INDEX rate_limit_entries_expires_at_idx ON _nexus_hub.rate_limit_entries (expires_at);
COMMENT ON TABLE _nexus_hub.rate_limit_entries IS 'The states of rate limits, where the library is not preloaded.';
COMMENT ON COLUMN _nexus_hub.rate_limit_entries.id IS 'SHA-256 of kind, user and name.';
COMMENT ON COLUMN _nexus_hub.rate_limit_entries.window_seconds IS 'The window of a key of rate_limit; 0 for a server''s.';
COMMENT ON COLUMN _nexus_hub.rate_limit_entries.kind IS '1: a server''s, 2: a server''s and user''s, 3: a key of rate_limit.';
COMMENT ON COLUMN _nexus_hub.rate_limit_entries.name IS 'The server or the key; of a long one the beginning and a hash.';
COMMENT ON COLUMN _nexus_hub.rate_limit_entries.user_id IS 'The user, if it is one''s.';
COMMENT ON COLUMN _nexus_hub.rate_limit_entries.state IS 'As in shared memory: see src/domain/rate.rs.';
COMMENT ON COLUMN _nexus_hub.rate_limit_entries.expires_at IS 'When the state says no more than none would.';

CREATE FUNCTION _nexus_hub.rate_limit_entry_id(kind integer, name text, user_id uuid) RETURNS bytea
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT sha256(convert_to(kind || ' ' || coalesce(user_id::text, '-') || ' ', 'UTF8') || convert_to(name, 'UTF8'));
END;
COMMENT ON FUNCTION _nexus_hub.rate_limit_entry_id(integer, text, uuid) IS 'The id of a row of rate_limit_entries.';

CREATE FUNCTION _nexus_hub.rate_limit_name(name text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT CASE WHEN octet_length(name) <= 180 THEN name ELSE left(name, 40) || '…' || encode(sha256(convert_to(name, 'UTF8')), 'hex') END;
END;
COMMENT ON FUNCTION _nexus_hub.rate_limit_name(text) IS 'A name that fits into an index.';

CREATE FUNCTION _nexus_hub.rate_limit_state(kind integer, name text, user_id uuid, window_seconds integer) RETURNS bigint
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT max(e.state) FROM _nexus_hub.rate_limit_entries e
     WHERE e.id = _nexus_hub.rate_limit_entry_id(rate_limit_state.kind, rate_limit_state.name, rate_limit_state.user_id)
       AND e.window_seconds = rate_limit_state.window_seconds;
END;
COMMENT ON FUNCTION _nexus_hub.rate_limit_state(integer, text, uuid, integer) IS 'The state of a key; NULL: none.';

CREATE FUNCTION _nexus_hub.lock_rate_limit_state(kind integer, name text, user_id uuid, window_seconds integer) RETURNS bigint
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO _nexus_hub.rate_limit_entries AS e (id, window_seconds, kind, name, user_id, state, expires_at)
    VALUES (_nexus_hub.rate_limit_entry_id(lock_rate_limit_state.kind, lock_rate_limit_state.name, lock_rate_limit_state.user_id),
            lock_rate_limit_state.window_seconds, lock_rate_limit_state.kind, _nexus_hub.rate_limit_name(lock_rate_limit_state.name),
            lock_rate_limit_state.user_id, 0, clock_timestamp())
    ON CONFLICT (id, window_seconds) DO UPDATE SET kind = e.kind
    RETURNING e.state;
END;
COMMENT ON FUNCTION _nexus_hub.lock_rate_limit_state(integer, text, uuid, integer) IS
    'The state of a key, made if there is none; nobody else gets at it until the transaction ends.';

CREATE FUNCTION _nexus_hub.set_rate_limit_state(kind integer, name text, user_id uuid, window_seconds integer, state bigint, expires bigint) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE _nexus_hub.rate_limit_entries AS e
       SET state = set_rate_limit_state.state,
           expires_at = '2000-01-01 00:00:00+00'::timestamptz + set_rate_limit_state.expires / 1000000 * '1 second'::interval
     WHERE e.id = _nexus_hub.rate_limit_entry_id(set_rate_limit_state.kind, set_rate_limit_state.name, set_rate_limit_state.user_id)
       AND e.window_seconds = set_rate_limit_state.window_seconds;
END;
COMMENT ON FUNCTION _nexus_hub.set_rate_limit_state(integer, text, uuid, integer, bigint, bigint) IS
    'Sets the state of a key that was locked; expires: when it is of no more use, in microseconds since 2000-01-01 UTC.';

CREATE FUNCTION _nexus_hub.record_rate_limit_window(server_id text, user_id uuid, minute integer, request_count integer) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.record_rate_limit_windows(ARRAY[_nexus_hub.rate_limit_name(server_id)], ARRAY[user_id], ARRAY[minute], ARRAY[request_count]);
END;
COMMENT ON FUNCTION _nexus_hub.record_rate_limit_window(text, uuid, integer, integer) IS 'Writes down the calls of a minute that is over.';

CREATE FUNCTION _nexus_hub.forget_rate_limit_state(key text) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH gone AS (
        DELETE FROM _nexus_hub.rate_limit_entries e WHERE e.id = _nexus_hub.rate_limit_entry_id(3, key, NULL) RETURNING 1)
    SELECT count(*) > 0 FROM gone;
END;
COMMENT ON FUNCTION _nexus_hub.forget_rate_limit_state(text) IS 'Forgets a key of rate_limit, under all windows; false: there was none.';

CREATE FUNCTION _nexus_hub.counted_minutes() RETURNS TABLE (server_id text, user_id uuid, minute integer, request_count integer)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- A standby cannot read unlogged tables.
    IF NOT pg_is_in_recovery() THEN
        -- The minute is above, the count in the lower 31 bits.
        RETURN QUERY SELECT e.name, e.user_id, (e.state >> 32)::integer, (e.state & 2147483647)::integer
                       FROM _nexus_hub.rate_limit_entries e WHERE e.kind < 3 AND e.state & 2147483647 > 0;
    END IF;
END
$$;
COMMENT ON FUNCTION _nexus_hub.counted_minutes() IS 'The minutes in rate_limit_entries.';

CREATE FUNCTION _nexus_hub.tidy_rate_limits(retention integer) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    gone integer;
    old integer;
BEGIN
    WITH expired AS (
        DELETE FROM _nexus_hub.rate_limit_entries AS e
         WHERE (e.id, e.window_seconds) IN (
            SELECT x.id, x.window_seconds FROM _nexus_hub.rate_limit_entries x
             WHERE x.expires_at < clock_timestamp() - interval '1 minute' ORDER BY x.expires_at LIMIT 1000 FOR UPDATE SKIP LOCKED)
        RETURNING e.kind, e.name, e.user_id, e.state),
    recorded AS (
        INSERT INTO _nexus_hub.rate_limit_windows AS w (server_id, user_id, window_start, request_count)
        SELECT x.name, x.user_id, _nexus_hub.minute_start((x.state >> 32)::integer), (x.state & 2147483647)::integer
          FROM expired x WHERE x.kind < 3 AND x.state & 2147483647 > 0
        ON CONFLICT (window_start, server_id, (coalesce(user_id::text, ''))) DO UPDATE
           SET request_count = excluded.request_count WHERE w.request_count < excluded.request_count)
    SELECT count(*) INTO gone FROM expired;
    DELETE FROM _nexus_hub.rate_limit_windows AS w
     WHERE w.ctid = ANY (ARRAY(
        SELECT x.ctid FROM _nexus_hub.rate_limit_windows x
         WHERE x.window_start < clock_timestamp() - retention * interval '1 second'
         ORDER BY x.window_start LIMIT 1000 FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS old = ROW_COUNT;
    RETURN greatest(gone, old);
END
$$;
COMMENT ON FUNCTION _nexus_hub.tidy_rate_limits(integer) IS
    'Deletes up to 1000 minutes that are older than so many seconds, and as many expired entries. Returns how many: at 1000 there may be more.';

-- ── Views ──

CREATE FUNCTION _nexus_hub.running_rate_limit_windows() RETURNS TABLE (server_id text, user_id uuid, minute integer, request_count integer)
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'running_rate_limit_windows_wrapper';
COMMENT ON FUNCTION _nexus_hub.running_rate_limit_windows() IS
    'The minutes of this database in shared memory: those that go on, and those that are over and not written down yet.';

CREATE FUNCTION _nexus_hub.rate_limit_statistics()
RETURNS TABLE (allowed bigint, denied bigint, exempt bigint, evicted bigint, full_table bigint, unrecorded bigint, keys integer, max_keys integer)
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'rate_limit_statistics_wrapper';
COMMENT ON FUNCTION _nexus_hub.rate_limit_statistics() IS 'What the view rate_limit_stats shows; no row without shared memory.';

CREATE FUNCTION _nexus_hub.rate_limit_minutes()
RETURNS TABLE (server_id text, user_id uuid, window_start timestamptz, request_count integer)
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- What has just been written down may still be in shared memory, too.
    SELECT server_id, user_id, window_start, max(request_count)
      FROM (SELECT w.server_id, w.user_id, w.window_start, w.request_count FROM _nexus_hub.rate_limit_windows w
            UNION ALL
            SELECT m.server_id, m.user_id, _nexus_hub.minute_start(m.minute), m.request_count FROM _nexus_hub.running_rate_limit_windows() m
            UNION ALL
            SELECT m.server_id, m.user_id, _nexus_hub.minute_start(m.minute), m.request_count FROM _nexus_hub.counted_minutes() m) AS counted
     GROUP BY 1, 2, 3;
END;
COMMENT ON FUNCTION _nexus_hub.rate_limit_minutes() IS 'What the view rate_limit_tracking shows.';

CREATE VIEW @extschema@.rate_limit_tracking WITH (security_barrier) AS
    SELECT m.server_id, m.user_id, m.window_start, m.request_count FROM _nexus_hub.rate_limit_minutes() AS m;
COMMENT ON VIEW @extschema@.rate_limit_tracking IS
    'The calls that check_rate_limit has counted, the running minute included; older ones for as long as nexus_hub.rate_limit_retention says. After a restart the running minute starts anew.';
COMMENT ON COLUMN @extschema@.rate_limit_tracking.server_id IS 'The server; of a name of more than 180 bytes the beginning and a hash.';
COMMENT ON COLUMN @extschema@.rate_limit_tracking.user_id IS 'The user; NULL: the calls were nobody''s.';
COMMENT ON COLUMN @extschema@.rate_limit_tracking.window_start IS 'When the clock minute began.';
COMMENT ON COLUMN @extschema@.rate_limit_tracking.request_count IS 'The calls, denied ones too.';

CREATE VIEW @extschema@.rate_limit_stats WITH (security_barrier) AS
    SELECT s.allowed, s.denied, s.exempt, s.evicted, s.full_table AS "full", s.unrecorded, s.keys, s.max_keys
      FROM _nexus_hub.rate_limit_statistics() AS s;
COMMENT ON VIEW @extschema@.rate_limit_stats IS
    'Counters of rate limits, of all databases, since the server started; no row where the library is not preloaded.';
COMMENT ON COLUMN @extschema@.rate_limit_stats.allowed IS 'Calls within their limits.';
COMMENT ON COLUMN @extschema@.rate_limit_stats.denied IS 'Calls over their limits.';
COMMENT ON COLUMN @extschema@.rate_limit_stats.exempt IS 'Calls of those who have no limit.';
COMMENT ON COLUMN @extschema@.rate_limit_stats.evicted IS 'Entries of no more use that made room for other keys.';
COMMENT ON COLUMN @extschema@.rate_limit_stats."full" IS 'Calls that there was no room for: allowed or refused as nexus_hub.rate_limit_when_full says.';
COMMENT ON COLUMN @extschema@.rate_limit_stats.unrecorded IS 'Minutes that were forgotten before they were written down.';
COMMENT ON COLUMN @extschema@.rate_limit_stats.keys IS 'Keys in the table, those of no more use included.';
COMMENT ON COLUMN @extschema@.rate_limit_stats.max_keys IS 'Keys there is room for: nexus_hub.rate_limit_max_keys.';

-- Rate limits of PostgREST's requests, for a function that its setting db-pre-request names.

CREATE FUNCTION _nexus_hub.limit_request(p_policies text[], p_keys text[], p_limits integer[], p_windows_seconds integer[], p_costs integer[], p_bursts integer[])
RETURNS TABLE (allowed boolean, policy_field text, limit_field text, retry_after bigint, details text)
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'limit_request_wrapper';
COMMENT ON FUNCTION _nexus_hub.limit_request(text[], text[], integer[], integer[], integer[], integer[]) IS
    'rate_limit_all for policies with names: one row that says what the answer to the request has to. policy_field and limit_field: the HTTP fields RateLimit-Policy and RateLimit. retry_after: seconds, NULL when the request is allowed or never will be. details: the policies that deny it.';

CREATE FUNCTION _nexus_hub.answer_request(allowed boolean, policy_field text, limit_field text, retry_after bigint, details text) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    fields jsonb := jsonb_build_object('RateLimit-Policy', policy_field, 'RateLimit', limit_field);
    set_before text := nullif(current_setting('response.headers', true), '');
BEGIN
    IF policy_field = '' THEN
        RETURN;
    ELSIF allowed THEN
        -- An array of objects with one field each is what PostgREST takes.
        PERFORM set_config('response.headers',
                           (coalesce(set_before::jsonb, '[]')
                            || jsonb_build_array(jsonb_build_object('RateLimit-Policy', policy_field), jsonb_build_object('RateLimit', limit_field)))::text,
                           true);
        RETURN;
    END IF;
    IF retry_after IS NOT NULL THEN
        fields := fields || jsonb_build_object('Retry-After', retry_after::text);
    END IF;
    -- PostgREST makes the answer of this SQLSTATE's message and detail.
    RAISE SQLSTATE 'PGRST' USING
        MESSAGE = jsonb_build_object(
            'code', 'PT429', 'message', 'rate limit exceeded', 'details', details,
            'hint', CASE WHEN retry_after IS NULL THEN 'no such request will be allowed'
                         ELSE 'try again in ' || retry_after || CASE retry_after WHEN 1 THEN ' second' ELSE ' seconds' END END)::text,
        DETAIL = jsonb_build_object('status', 429, 'headers', fields)::text;
END
$$;
COMMENT ON FUNCTION _nexus_hub.answer_request(boolean, text, text, bigint, text) IS
    'Adds the fields to those of PostgREST''s answer (the setting response.headers, of this transaction), or raises what PostgREST makes 429 of.';

CREATE FUNCTION @extschema@.enforce_rate_limits(
    p_policies text[], p_keys text[], p_limits integer[], p_windows_seconds integer[] DEFAULT NULL, p_costs integer[] DEFAULT NULL,
    p_bursts integer[] DEFAULT NULL)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.answer_request(l.allowed, l.policy_field, l.limit_field, l.retry_after, l.details)
      FROM _nexus_hub.limit_request(p_policies, p_keys, p_limits, p_windows_seconds, p_costs, p_bursts) AS l;
END;
COMMENT ON FUNCTION @extschema@.enforce_rate_limits(text[], text[], integer[], integer[], integer[], integer[]) IS
    'rate_limit_all for PostgREST''s db-pre-request: when one of the policies denies the request, none is charged and PostgREST answers 429 with the fields RateLimit-Policy, RateLimit and Retry-After and a body that names the policy; else the answer gets the first two. p_policies: names that clients see, 1 to 64 printable ASCII characters, each another one; the other arguments are those of rate_limit_all. Errors: SQLSTATE PGRST when denied, message and detail being JSON for PostgREST; those of rate_limit_all.';

-- Runs last: who may do what.

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
            _nexus_hub.rate_limit_minutes(),
            _nexus_hub.rate_limit_statistics()
            TO service_role;
        GRANT SELECT ON @extschema@.vault_keys, @extschema@.vault_columns, @extschema@.vault_rotation, @extschema@.vault_rotation_errors,
              @extschema@.vault_audit
           TO service_role;
    END IF;
END
$$;
COMMENT ON FUNCTION _nexus_hub.grant_api() IS
    'Gives the roles authenticated and service_role, as far as they exist, their rights. Runs at install; run it again as a superuser when the roles were made later.';

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

SELECT _nexus_hub.grant_api();

-- The worker of this database starts when this transaction commits.
SELECT _nexus_hub.extension_created();
