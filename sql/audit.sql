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
