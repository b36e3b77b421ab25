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
