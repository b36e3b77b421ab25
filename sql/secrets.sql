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
