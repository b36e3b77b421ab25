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
