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
