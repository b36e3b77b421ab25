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
