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
