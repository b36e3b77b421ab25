-- register_vault_column, and rotate_vault_key over columns of users' own tables. (In the background: tests/blackbox/online_rotation.rs.)
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

\ir error_with_hint.psql
\set old '''00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff'''
\set new '''2222222222222222222222222222222222222222222222222222222222222222'''

CREATE ROLE keeper;
CREATE ROLE other;
CREATE SCHEMA kept AUTHORIZATION keeper;
GRANT USAGE ON SCHEMA kept TO other;
GRANT USAGE ON SCHEMA :"schema" TO keeper, other;
GRANT EXECUTE ON FUNCTION register_vault_column(regclass, text, text), unregister_vault_column(regclass, text) TO keeper, other;
CREATE TABLE kept.notes (part integer, id integer, "the text" bytea, plain text, PRIMARY KEY (part, id)) PARTITION BY LIST (part);
CREATE TABLE kept.notes_1 PARTITION OF kept.notes FOR VALUES IN (1);
CREATE TABLE kept.notes_2 PARTITION OF kept.notes FOR VALUES IN (2);
ALTER TABLE kept.notes OWNER TO keeper;
ALTER TABLE kept.notes_1 OWNER TO keeper;
ALTER TABLE kept.notes_2 OWNER TO keeper;
INSERT INTO kept.notes SELECT n % 2 + 1, n, encrypt_token('note ' || n, 'note/' || n) FROM generate_series(1, 5) AS n;
CREATE VIEW kept.shown AS SELECT * FROM kept.notes;
ALTER VIEW kept.shown OWNER TO keeper;
CREATE TABLE kept.derived (a bytea, b bytea GENERATED ALWAYS AS (a) STORED);
ALTER TABLE kept.derived OWNER TO keeper;

-- ── Registration ──

CREATE FUNCTION pg_temp.register(p_table text, p_column text, p_context text) RETURNS text LANGUAGE plpgsql AS
$$ BEGIN RETURN pg_temp.error_of(format('SELECT register_vault_column(%L, %L, %L)', p_table, p_column, p_context)); END $$;
SET LOCAL ROLE keeper;
SELECT is(pg_temp.register(NULL, 'a', NULL), '22023: p_table is NULL | Pass a table and its column.', 'a table is needed');
SELECT is(pg_temp.register('kept.notes', NULL, NULL), '22023: p_column is NULL | Pass a table and its column.', 'and a column');
SELECT is(pg_temp.register('kept.nothing', 'a', NULL), '42P01: relation "kept.nothing" does not exist', 'that there are');
SELECT is(split_part(pg_temp.register('kept.notes', 'nothing', NULL), ' | ', 1), '22023: the column "nothing" cannot be registered: there is no such column', 'a missing column is named');
SELECT is(split_part(pg_temp.register('kept.notes', 'plain', NULL), ' | ', 1), '22023: the column "plain" cannot be registered: the column''s type is text, not bytea', 'so is one of another type');
SELECT is(split_part(pg_temp.register('kept.derived', 'b', NULL), ' | ', 1), '22023: the column "b" cannot be registered: the column is generated', 'a generated one');
SELECT is(split_part(pg_temp.register('kept.shown', 'the text', NULL), ' | ', 1), '22023: the column "the text" cannot be registered: it is no permanent table', 'one of a view');
CREATE TEMP TABLE fleeting (a bytea);
SELECT is(split_part(pg_temp.register('fleeting', 'a', NULL), ' | ', 1), '22023: the column "a" cannot be registered: it is no permanent table', 'one of a temporary table');
SELECT is(split_part(pg_temp.register('kept.notes', 'the text', 'nothing'), ' | ', 1), '22023: p_context cannot be evaluated: column "nothing" does not exist', 'a context that cannot be evaluated is told');
SELECT is(split_part(pg_temp.register('kept.notes', 'the text', '1) FROM kept.notes; SELECT (1'), ' | ', 1), '22023: p_context cannot be evaluated: cannot open multi-query plan as cursor', 'it is one expression, not statements');
SELECT is(split_part(pg_temp.register('user_servers', 'config_encrypted', NULL), ' | ', 1), '42501: only a table''s owner can say what is in its columns', 'another''s table is refused');
RESET ROLE;
SET LOCAL ROLE other;
SELECT is(split_part(pg_temp.register('kept.notes', 'the text', NULL), ' | ', 1), '42501: only a table''s owner can say what is in its columns', 'whoever may call the function');
SELECT is(pg_temp.error_of('SELECT unregister_vault_column(''kept.notes'', ''the text'')'), '42501: only a table''s owner can say what is in its columns', 'nor can others unregister it');
RESET ROLE;
SELECT is(split_part(pg_temp.register('user_servers', 'config_encrypted', NULL), ' | ', 1), '22023: the column "config_encrypted" cannot be registered: it is the extension''s own, and every rotation takes it along', 'the extension''s own need no registration');
SELECT is_empty('SELECT * FROM vault_columns WHERE is_registered', 'nothing of this has left a trace');

SET LOCAL ROLE keeper;
SELECT register_vault_column('kept.notes', 'the text', '''note/'' || id');
RESET ROLE;
SELECT results_eq('SELECT table_name, column_name, context, problem FROM vault_columns WHERE is_registered',
                  $$VALUES ('kept.notes', 'the text'::name, '''note/'' || id', NULL::text)$$, 'a registered column is shown');

-- ── It counts, and is rotated ──

SELECT is((SELECT value_count FROM vault_keys WHERE is_primary), 5::bigint, 'its values are counted under their key');
SELECT set_config('app.vault_old_key', :old, true), set_config('app.vault_new_key', :new, true);
UPDATE kept.notes SET "the text" = '\x00' WHERE id = 4;
CREATE TEMP TABLE before AS SELECT * FROM kept.notes;
CREATE FUNCTION kept.forbidden() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'a trigger ran'; END $$;
CREATE TRIGGER forbidden BEFORE UPDATE ON kept.notes FOR EACH ROW EXECUTE FUNCTION kept.forbidden();
SELECT results_eq('SELECT * FROM rotate_vault_key()',
                  $$VALUES (0, ARRAY['kept.notes_1."the text" 1, 4: the value is too short to be a ciphertext'])$$,
                  'what cannot be decrypted is told by table, column and primary key, and no trigger runs');
SELECT results_eq('SELECT id FROM kept.notes n JOIN before b USING (id) WHERE n."the text" <> b."the text" ORDER BY id', 'VALUES (1), (2), (3), (5)', 'all others are encrypted anew');
SELECT set_config('app.vault_old_key', :new, true), set_config('app.vault_new_key', :old, true);
SELECT rotate_vault_key();
SELECT is(decrypt_token("the text", 'note/' || id), 'note ' || id, format('note %s is back under the first key', id)) FROM kept.notes WHERE id <> 4;
DROP TRIGGER forbidden ON kept.notes;

-- ── What can go wrong with it ──

CREATE FUNCTION pg_temp.problem() RETURNS text LANGUAGE sql AS $$ SELECT problem FROM vault_columns WHERE is_registered $$;
CREATE FUNCTION pg_temp.faults() RETURNS text LANGUAGE sql AS
$$ SELECT string_agg(e, '; ' ORDER BY e) FROM rotate_vault_key() r, unnest(r.errors) AS e WHERE e !~ 'too short' $$;
-- Everything is under the first key: a rotation has nothing to do but find what is wrong.
SELECT is(pg_temp.faults(), NULL, 'nothing is wrong as yet');
ALTER TABLE kept.notes_2 OWNER TO other;
SELECT is(pg_temp.faults(), 'kept.notes_2."the text": it was registered when keeper owned the table: the owner must register it again',
          'an expression is not run with the rights of a later owner');
SELECT is((SELECT value_count FROM vault_keys WHERE is_primary), NULL, 'and what cannot be read is not counted as nothing');
ALTER TABLE kept.notes_2 OWNER TO keeper;
ALTER TABLE kept.notes RENAME "the text" TO body;
SELECT is(pg_temp.faults(), 'kept.notes_1."the text": there is no such column of type bytea any more: unregister it; '
                            'kept.notes_2."the text": there is no such column of type bytea any more: unregister it',
          'a column that is gone is told by its name');
ALTER TABLE kept.notes RENAME body TO "the text";
-- The expression runs as the table's owner, whoever rotates, and can change neither that nor the session.
CREATE FUNCTION kept.who(id integer) RETURNS text LANGUAGE plpgsql AS
$$ BEGIN
    IF current_user <> 'keeper' THEN RAISE EXCEPTION 'it runs as %', current_user; END IF;
    PERFORM set_config('work_mem', '123MB', false);
    RETURN 'note/' || id;
END $$;
ALTER FUNCTION kept.who(integer) OWNER TO keeper;
SET LOCAL ROLE keeper;
SELECT register_vault_column('kept.notes', 'the text', 'kept.who(id)');
RESET ROLE;
SELECT is(pg_temp.faults(), NULL, 'the owner''s expression runs as the owner');
SELECT isnt(current_setting('work_mem'), '123MB', 'and leaves the session''s settings as they were');
SET LOCAL ROLE keeper;
CREATE OR REPLACE FUNCTION kept.who(id integer) RETURNS text LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'RESET ROLE'; RETURN ''; END $$;
RESET ROLE;
SELECT alike(pg_temp.faults(), 'kept.notes_1."the text": cannot set parameter "role" within security-%', 'it cannot become somebody else');
SET LOCAL ROLE keeper;
CREATE OR REPLACE FUNCTION kept.who(id integer) RETURNS text LANGUAGE plpgsql AS $$ BEGIN CREATE TABLE kept.more (); RETURN ''; END $$;
RESET ROLE;
SELECT is((SELECT value_count FROM vault_keys WHERE is_primary), NULL, 'nor write where it is only to be read');
SET LOCAL ROLE keeper;
SELECT register_vault_column('kept.notes', 'the text', '''note/'' || id');
ALTER TABLE kept.notes_1 ENABLE ROW LEVEL SECURITY;
ALTER TABLE kept.notes_1 FORCE ROW LEVEL SECURITY;
RESET ROLE;
SELECT is(pg_temp.faults(), 'kept.notes_1."the text": query would be affected by row-level security policy for table "notes_1"', 'rows that a policy hides from the owner are not passed over');
SET LOCAL ROLE keeper;
ALTER TABLE kept.notes_1 NO FORCE ROW LEVEL SECURITY;
-- A trigger that is enabled always, and puts back what was there.
CREATE FUNCTION kept.keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN OLD; END $$;
CREATE TRIGGER keep BEFORE UPDATE ON kept.notes_2 FOR EACH ROW EXECUTE FUNCTION kept.keep();
ALTER TABLE kept.notes_2 ENABLE ALWAYS TRIGGER keep;
RESET ROLE;
SELECT set_config('app.vault_old_key', :old, true), set_config('app.vault_new_key', :new, true);
SELECT is(pg_temp.faults(), 'kept.notes_2."the text": only 0 of 3 rows could be written', 'what is not written is told');
SELECT set_config('app.vault_old_key', :new, true), set_config('app.vault_new_key', :old, true);
SELECT rotate_vault_key();
-- What is called like a type, where the caller looks first.
SET LOCAL ROLE keeper;
CREATE FUNCTION kept.boom(v pg_catalog.text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'it runs as %', current_user; END $$;
CREATE DOMAIN pg_temp.name AS pg_catalog.name CHECK (kept.boom(value::pg_catalog.text));
SELECT lives_ok($$SELECT register_vault_column('kept.notes', 'the text', '''note/'' || id')$$, 'it is not taken for one of PostgreSQL''s');
DROP DOMAIN pg_temp.name;
RESET ROLE;

SET LOCAL ROLE keeper;
SELECT is(unregister_vault_column('kept.notes', 'the text'), true, 'it can be unregistered');
SELECT is(unregister_vault_column('kept.notes', 'the text'), false, 'once');
SELECT register_vault_column('kept.derived', 'a');
RESET ROLE;
DROP TABLE kept.derived;
SELECT is_empty('SELECT * FROM vault_columns WHERE is_registered', 'a table that is dropped takes its columns along');
SELECT lives_ok('SELECT rotate_vault_key()', 'and rotations go on without it');

SELECT * FROM finish();
ROLLBACK;
