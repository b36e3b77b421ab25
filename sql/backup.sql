-- Backups: what a dump of the database leaves out.

CREATE TABLE _nexus_hub.parts (
    relation oid NOT NULL,
    kind text NOT NULL,
    name text NOT NULL,
    PRIMARY KEY (relation, kind, name)
);
COMMENT ON TABLE _nexus_hub.parts IS 'What the extension''s own scripts have made of its tables. Whatever else there is, somebody has added, and a dump leaves it out.';
COMMENT ON COLUMN _nexus_hub.parts.relation IS 'The table''s oid.';
COMMENT ON COLUMN _nexus_hub.parts.kind IS 'column, index, trigger, policy or constraint.';
COMMENT ON COLUMN _nexus_hub.parts.name IS 'Its name.';

CREATE FUNCTION _nexus_hub.present_parts()
RETURNS TABLE (relation oid, kind text, name text, made_by xid, statement text)
LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH own AS (
        SELECT c.oid
          FROM pg_depend d
          JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND e.extname = 'nexus_hub'
          JOIN pg_class c ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND c.relkind = 'r'
         WHERE d.deptype = 'e')
    SELECT a.attrelid, 'column'::text, a.attname::text, a.xmin, format('ALTER TABLE %s ADD COLUMN %I %s', a.attrelid::regclass, a.attname, format_type(a.atttypid, a.atttypmod))
      FROM pg_attribute a JOIN own o ON o.oid = a.attrelid
     WHERE a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT c.conrelid, 'constraint'::text, c.conname::text, c.xmin, format('ALTER TABLE %s ADD CONSTRAINT %I %s', c.conrelid::regclass, c.conname, pg_get_constraintdef(c.oid))
      FROM pg_constraint c JOIN own o ON o.oid = c.conrelid
     -- Those that go with columns come with them.
     WHERE c.contype IN ('c', 'f', 'p', 'u', 'x')
    UNION ALL
    SELECT i.indrelid, 'index'::text, r.relname::text, i.xmin, pg_get_indexdef(i.indexrelid)
      FROM pg_index i JOIN own o ON o.oid = i.indrelid JOIN pg_class r ON r.oid = i.indexrelid
     WHERE NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conindid = i.indexrelid AND c.conrelid = i.indrelid)
    UNION ALL
    SELECT t.tgrelid, 'trigger'::text, t.tgname::text, t.xmin, pg_get_triggerdef(t.oid)
      FROM pg_trigger t JOIN own o ON o.oid = t.tgrelid
     WHERE NOT t.tgisinternal
    UNION ALL
    SELECT p.polrelid, 'policy'::text, p.polname::text, p.xmin,
           concat_ws(' ', format('CREATE POLICY %I ON %s', p.polname, p.polrelid::regclass),
                     CASE WHEN NOT p.polpermissive THEN 'AS RESTRICTIVE' END,
                     'FOR ' || CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
                     'TO ' || (SELECT string_agg(CASE u.role WHEN 0 THEN 'PUBLIC' ELSE u.role::regrole::text END, ', ') FROM unnest(p.polroles) AS u (role)),
                     'USING (' || pg_get_expr(p.polqual, p.polrelid) || ')', 'WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')')
      FROM pg_policy p JOIN own o ON o.oid = p.polrelid;
END;
COMMENT ON FUNCTION _nexus_hub.present_parts() IS 'What there is of the extension''s tables, the transaction that made it, and a statement that makes it again.';

CREATE FUNCTION _nexus_hub.note_parts() RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO _nexus_hub.parts (relation, kind, name)
    SELECT p.relation, p.kind, p.name
      FROM _nexus_hub.present_parts() p
     WHERE p.made_by = (SELECT f.xmin FROM pg_proc f JOIN pg_namespace n ON n.oid = f.pronamespace
                         WHERE n.nspname = '_nexus_hub' AND f.proname = 'note_parts')
        ON CONFLICT DO NOTHING;
END;
COMMENT ON FUNCTION _nexus_hub.note_parts() IS
    'Called at the end of the scripts that install and update, each of which makes this function anew: notes what the same transaction has made.';

CREATE VIEW _nexus_hub.added_parts AS
    SELECT p.relation, p.kind, p.name, p.statement
      FROM _nexus_hub.present_parts() p
     WHERE NOT EXISTS (SELECT FROM _nexus_hub.parts o WHERE o.relation = p.relation AND o.kind = p.kind AND o.name = p.name);
COMMENT ON VIEW _nexus_hub.added_parts IS 'What others have added to the extension''s tables.';
COMMENT ON COLUMN _nexus_hub.added_parts.relation IS 'The table''s oid.';
COMMENT ON COLUMN _nexus_hub.added_parts.kind IS 'column, index, trigger, policy or constraint.';
COMMENT ON COLUMN _nexus_hub.added_parts.name IS 'Its name.';
COMMENT ON COLUMN _nexus_hub.added_parts.statement IS 'What makes it again.';

CREATE FUNCTION _nexus_hub.backup_items() RETURNS TABLE (item text, state text, advice text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    BEGIN
        RETURN QUERY
        SELECT 'vault key'::text,
               CASE WHEN k.value_count IS NULL OR k.fingerprint IS NULL OR k.source IS NULL THEN 'problem' ELSE 'save' END,
               CASE
                   WHEN k.value_count IS NULL THEN 'not all values could be read, so it is not known which keys they are under: see the warnings'
                   WHEN k.fingerprint IS NULL THEN format('%s values are under a key that the server does not have: no backup brings them back without it', k.value_count)
                   WHEN k.source IS NULL THEN format('%s values are under the key %s, which the server does not have: put it into the key source again', k.value_count, k.fingerprint)
                   ELSE format('%s values are under the key %s (%s): save it, and not beside the dump; without it nobody reads them again', k.value_count, k.fingerprint, k.source)
               END
          FROM _nexus_hub.vault_key_state() k
         WHERE k.value_count IS DISTINCT FROM 0;
    EXCEPTION WHEN config_file_error THEN
        RETURN QUERY SELECT 'vault key'::text, 'problem'::text, 'the vault''s keys cannot be used, so it is not known which ones are needed: ' || SQLERRM;
    END;
    RETURN QUERY
    SELECT 'server settings'::text, 'save'::text, 'no dump holds what the server''s configuration says: ' || string_agg(s.name, ', ' ORDER BY s.name)
      FROM pg_settings s
     WHERE (s.name LIKE 'nexus\_hub.%' OR s.name = 'shared_preload_libraries') AND s.source IN ('configuration file', 'command line', 'environment variable')
    HAVING count(*) > 0;
    RETURN QUERY
    SELECT 'database settings'::text, 'save'::text,
           'only pg_dump --create and pg_dumpall hold what ALTER DATABASE … SET says: ' || string_agg(split_part(c.setting, '=', 1), ', ' ORDER BY c.setting)
      FROM pg_db_role_setting r
     CROSS JOIN LATERAL unnest(r.setconfig) AS c (setting)
     WHERE r.setdatabase = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()) AND c.setting ~ '^(nexus_hub|app)\.'
    HAVING count(*) > 0;
    RETURN QUERY
    SELECT 'roles'::text, 'save'::text, 'only pg_dumpall holds roles, which have to be there before the extension is restored: ' || string_agg(r.rolname, ', ' ORDER BY r.rolname)
      FROM pg_roles r
     WHERE r.rolname IN ('anon', 'authenticated', 'service_role', 'authenticator')
    HAVING count(*) > 0;
    RETURN QUERY
    SELECT 'publication'::text, 'redo'::text,
           format('a dump leaves the extension''s tables out of it; after the restore: %s',
                  CASE p.pubname WHEN 'supabase_realtime' THEN 'SELECT _nexus_hub.grant_api()'
                                 ELSE format('ALTER PUBLICATION %I ADD TABLE %s', p.pubname, string_agg(r.prrelid::regclass::text, ', ')) END)
      FROM pg_publication p
      JOIN pg_publication_rel r ON r.prpubid = p.oid
     WHERE EXISTS (SELECT FROM pg_depend d JOIN pg_extension e ON d.refobjid = e.oid AND d.refclassid = 'pg_extension'::regclass
                    WHERE d.classid = 'pg_class'::regclass AND d.objid = r.prrelid AND d.deptype = 'e' AND e.extname = 'nexus_hub')
     GROUP BY p.pubname;
    RETURN QUERY
    SELECT p.kind, CASE p.kind WHEN 'column' THEN 'problem' ELSE 'redo' END,
           CASE p.kind
               WHEN 'column' THEN 'a dump holds its values but not the column, and the restore of the table fails; restore --section=pre-data first, then: ' || p.statement
               ELSE 'somebody has added it to a table of the extension, and a dump leaves it out; after the restore: ' || p.statement
           END
      FROM _nexus_hub.added_parts p
     ORDER BY p.kind, p.statement;
    RETURN QUERY
    SELECT 'jobs'::text, 'know'::text, format('%s are pending or running, and run again where the dump is restored; not in a copy with ALTER DATABASE … SET nexus_hub.enabled = off', count(*))
      FROM _nexus_hub.job_places j
     WHERE j.status IN ('pending', 'running')
    HAVING count(*) > 0;
END
$$;
COMMENT ON FUNCTION _nexus_hub.backup_items() IS 'What backup_preflight returns.';

CREATE FUNCTION @extschema@.backup_preflight() RETURNS TABLE (item text, state text, advice text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT b.item, b.state, b.advice FROM _nexus_hub.backup_items() b;
END;
COMMENT ON FUNCTION @extschema@.backup_preflight() IS
    'What a dump of this database leaves out, before it is trusted: a row each. state: save (to be saved besides the dump), redo (to be done again after the restore), problem (the backup is not good as things are), know. Tries the vault''s values: a second for a million or so. For the owner alone.';
