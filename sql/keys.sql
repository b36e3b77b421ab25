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
