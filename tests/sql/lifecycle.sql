-- DROP EXTENSION and CREATE EXTENSION again, elsewhere and under other circumstances.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SET LOCAL client_min_messages = warning;
SELECT no_plan();

CREATE FUNCTION pg_temp.create_in(schema text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DROP EXTENSION IF EXISTS nexus_hub;
    EXECUTE format('CREATE SCHEMA IF NOT EXISTS %I', schema);
    EXECUTE format('CREATE EXTENSION nexus_hub SCHEMA %I', schema);
END
$$;
-- One round through the public API, with nothing on the search path that could help.
CREATE FUNCTION pg_temp.works_in(schema text) RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    a uuid := 'aaaaaaaa-0000-4000-8000-000000000001';
    server uuid; job uuid; state text; url text; target text;
BEGIN
    EXECUTE format($q$SELECT %I.add_server('s', 'S', '{"url": "https://host/mcp"}', $1)$q$, schema) INTO server USING a;
    EXECUTE format($q$SELECT %1$I.decrypt_config(config_encrypted) ->> 'url' FROM %1$I.user_servers WHERE id = $1$q$, schema) INTO url USING server;
    EXECUTE format($q$SELECT %I.create_job($1, 'tool_invoke', 's', 't')$q$, schema) INTO job USING a;
    EXECUTE format($q$SELECT %1$I.execute_job_via_pg_net($1), %1$I.cancel_job($1)$q$, schema) USING job;
    EXECUTE format('SELECT status FROM %I.get_job_status($1)', schema) INTO state USING job;
    EXECUTE format('SELECT %I.retry_job($1)', schema) USING job;
    EXECUTE format('SELECT %1$I.retry_failed_jobs(), (SELECT count(*) FROM %1$I.get_job_attempts($1))', schema) USING job;
    EXECUTE format($q$SELECT %1$I.http_get('http://host/'), %1$I.http_post('http://host/')$q$, schema);
    EXECUTE format($q$SELECT target FROM %I.job_results WHERE status = 'pending' AND job_type = 'http_request' LIMIT 1$q$, schema) INTO target;
    EXECUTE format('SELECT %I.delete_server($1)', schema) USING server;
    RETURN url = 'https://host/mcp' AND state = 'cancelled' AND target = 'host:80';
END
$$;
-- Every right and policy, in words.
CREATE FUNCTION pg_temp.grants() RETURNS SETOF text LANGUAGE sql AS $$
    SELECT format('%s %s %s', o.name, a.grantee::regrole, a.privilege_type)
      FROM (SELECT p.oid::regprocedure::text, p.proacl, p.proowner FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid
                JOIN pg_extension e ON d.refobjid = e.oid AND e.extname = 'nexus_hub'
            UNION ALL
            SELECT c.relname, c.relacl, c.relowner FROM pg_class c WHERE c.relname IN ('job_results', 'job_attempts', 'circuit_breakers', 'user_servers', 'system_servers')
            UNION ALL
            SELECT c.relname || '.' || t.attname, t.attacl, c.relowner FROM pg_class c JOIN pg_attribute t ON t.attrelid = c.oid
             WHERE c.relname IN ('job_results', 'job_attempts', 'circuit_breakers', 'user_servers', 'system_servers')) AS o (name, acl, owner), aclexplode(o.acl) AS a
     WHERE a.grantee NOT IN (0, o.owner)
    UNION ALL
    SELECT format('policy %s %s', policyname, roles) FROM pg_policies WHERE tablename IN ('job_results', 'job_attempts', 'circuit_breakers', 'user_servers', 'system_servers')
$$;
CREATE TEMP TABLE at_install AS SELECT pg_temp.grants() AS line;

SELECT ok(pg_temp.works_in(:'schema'), 'the extension works where it was installed');
SELECT throws_ok('ALTER EXTENSION nexus_hub SET SCHEMA pg_temp', '0A000', NULL, 'it cannot be moved to another schema');

DROP EXTENSION nexus_hub;
SELECT is_empty($$SELECT nspname FROM pg_namespace WHERE nspname = '_nexus_hub'
                  UNION ALL SELECT relname FROM pg_class WHERE relname ~ '^(system_servers|user_servers|job_results|job_attempts|circuit_breakers)'
                  UNION ALL SELECT proname FROM pg_proc WHERE probin LIKE '%nexus_hub%'$$,
                'DROP EXTENSION leaves nothing behind');

SELECT pg_temp.create_in('other schema');
SELECT ok(pg_temp.works_in('other schema'), 'it works in a schema with a blank in its name');
SELECT pg_temp.create_in('Größe');
SELECT ok(pg_temp.works_in('Größe'), 'and in one with capitals and umlauts');
SELECT lives_ok($$SELECT pg_temp.create_in('50% off')$$, 'and in one with a per cent sign');

DROP EXTENSION IF EXISTS nexus_hub;
CREATE SCHEMA _nexus_hub;
SELECT throws_ok('CREATE EXTENSION nexus_hub', '42P06', NULL, 'a schema _nexus_hub of somebody else is not taken over');
DROP SCHEMA _nexus_hub;

-- ── Without the roles ──

ALTER ROLE anon RENAME TO nexus_hub_test_1;
ALTER ROLE authenticated RENAME TO nexus_hub_test_2;
ALTER ROLE service_role RENAME TO nexus_hub_test_3;
SELECT lives_ok(format('CREATE EXTENSION nexus_hub SCHEMA %I', :'schema'), 'it installs where anon, authenticated and service_role are missing');
SELECT ok(pg_temp.works_in(:'schema'), 'and works there');
ALTER ROLE nexus_hub_test_1 RENAME TO anon;
ALTER ROLE nexus_hub_test_2 RENAME TO authenticated;
ALTER ROLE nexus_hub_test_3 RENAME TO service_role;
SELECT ok(NOT has_table_privilege('service_role', 'job_results', 'SELECT'), 'roles that come later have nothing at first');
SELECT lives_ok('SELECT _nexus_hub.grant_api()', 'grant_api gives them their rights');
SELECT lives_ok('SELECT _nexus_hub.grant_api()', 'and can be run again');
SELECT set_eq('SELECT pg_temp.grants()', 'SELECT line FROM at_install', 'the same as when they are there at install');

SELECT * FROM finish();
ROLLBACK;
