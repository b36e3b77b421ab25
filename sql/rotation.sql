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
