-- backup_preflight: what it says of a database as it comes, and of one that somebody has worked on.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();
CREATE FUNCTION pg_temp.said(what text) RETURNS SETOF text LANGUAGE sql AS $$ SELECT state || ': ' || advice FROM backup_preflight() WHERE item = what ORDER BY 1 $$;

SELECT set_eq('SELECT item FROM backup_preflight()', ARRAY['server settings', 'roles'], 'as it comes, there are the server''s settings and the roles');
SELECT matches(pg_temp.said('server settings'), '^save: .*nexus_hub\.egress_allow.*nexus_hub\.vault_key_file.*shared_preload_libraries', 'settings of the server are named');
SELECT is(pg_temp.said('roles'), 'save: only pg_dumpall holds roles, which have to be there before the extension is restored: '
          || (SELECT string_agg(rolname, ', ' ORDER BY rolname) FROM pg_roles WHERE rolname IN ('anon', 'authenticated', 'service_role', 'authenticator')), 'and roles');

SELECT create_secret('s', 'v'), insert_user_api_key(NULL, 'openai', 'k');
SELECT matches(pg_temp.said('vault key'), '^save: 2 values are under the key [0-9a-f]{16} \(nexus_hub\.vault_key_file\): save it', 'where something is encrypted, the key has to be saved');
UPDATE _nexus_hub.secrets SET value_encrypted = overlay(value_encrypted PLACING '\x00000000' FROM 20);
SELECT results_eq($$SELECT pg_temp.said('vault key') ~ '^problem: 1 values are under a key that the server does not have'$$, 'VALUES (true), (false)', 'values that no key opens are a problem');

INSERT INTO job_results (job_type, server_id, tool_name, status) SELECT 'tool_invoke', 's', 't', state FROM unnest(ARRAY['pending', 'running', 'completed']) AS state;
SELECT matches(pg_temp.said('jobs'), '^know: 2 are pending or running', 'jobs that run again are told');

CREATE FUNCTION pg_temp.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER added_trigger BEFORE INSERT ON job_results FOR EACH ROW EXECUTE FUNCTION pg_temp.f();
CREATE INDEX added_index ON job_results (tool_name);
CREATE POLICY added_policy ON tool_cache AS RESTRICTIVE FOR SELECT TO authenticated USING (enabled);
ALTER TABLE user_servers ADD CONSTRAINT added_constraint CHECK (name <> '');
ALTER TABLE user_servers ADD COLUMN added_column integer NOT NULL DEFAULT 7;
CREATE PUBLICATION added_publication FOR TABLE job_results;
SELECT alike(pg_temp.said('trigger'), 'redo: % after the restore: CREATE TRIGGER added_trigger BEFORE INSERT ON %job_results FOR EACH ROW EXECUTE FUNCTION %', 'a dump leaves added triggers out');
SELECT alike(pg_temp.said('index'), 'redo: % CREATE INDEX added_index ON %job_results USING btree (tool_name)', 'and indexes');
SELECT alike(pg_temp.said('policy'), 'redo: % CREATE POLICY added_policy ON %tool_cache AS RESTRICTIVE FOR SELECT TO authenticated USING (enabled)', 'and policies');
SELECT alike(pg_temp.said('constraint'), 'redo: % ADD CONSTRAINT added_constraint CHECK %', 'and constraints');
SELECT alike(pg_temp.said('column'), 'problem: % create the extension first, then this, then restore: ALTER TABLE %user_servers ADD COLUMN added_column integer DEFAULT 7 NOT NULL', 'with a column the restore would fail');
SELECT alike(pg_temp.said('publication'), 'redo: % ALTER PUBLICATION added_publication ADD TABLE %job_results', 'tables of publications are told');
SELECT is((SELECT count(*) FROM backup_preflight() WHERE item IN ('trigger', 'index', 'policy', 'constraint', 'column')), 5::bigint, 'and nothing else');
-- What says so has to be true.
DO $$
DECLARE
    again record;
BEGIN
    FOR again IN SELECT p.kind, p.name, p.relation::regclass AS relation, p.statement FROM _nexus_hub.added_parts p LOOP
        EXECUTE CASE again.kind WHEN 'index' THEN format('DROP INDEX %I', again.name) WHEN 'trigger' THEN format('DROP TRIGGER %I ON %s', again.name, again.relation)
                                WHEN 'policy' THEN format('DROP POLICY %I ON %s', again.name, again.relation) WHEN 'constraint' THEN format('ALTER TABLE %s DROP CONSTRAINT %I', again.relation, again.name)
                                ELSE format('ALTER TABLE %s DROP COLUMN %I', again.relation, again.name) END;
        EXECUTE again.statement;
    END LOOP;
END
$$;
SELECT is((SELECT count(*) FROM _nexus_hub.added_parts), 5::bigint, 'its statements make them again');

ALTER INDEX job_results_pending RENAME TO elsewhere;
SELECT is((SELECT count(*) FROM backup_preflight() WHERE state = 'problem' AND advice LIKE 'job_results_pending of %job_results is not there under its name%'), 1::bigint, 'of what is missing it says so');

SELECT * FROM finish();
ROLLBACK;
