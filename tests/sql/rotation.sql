-- rotate_vault_key with the seeds' settings. (With the vault's own keys: tests/blackbox/rotation.rs.)
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

\ir error_with_hint.psql
\set a '''aaaaaaaa-0000-4000-8000-000000000001'''
\set old '''1111111111111111111111111111111111111111111111111111111111111111'''
\set new '''2222222222222222222222222222222222222222222222222222222222222222'''

-- The key that cluster has, and with which add_server encrypts.
CREATE FUNCTION pg_temp.add(name text) RETURNS uuid LANGUAGE sql
AS $$ SELECT add_server(name, name, '{"url": "http://127.0.0.1/"}', 'aaaaaaaa-0000-4000-8000-000000000001') $$;

-- ── Which keys ──

SELECT is(pg_temp.error_of('SELECT rotate_vault_key()'),
          'F0000: Both app.vault_old_key and app.vault_new_key must be set for rotation | Put the new key above the old one in the vault''s key file and reload; or set both settings as a superuser.',
          'with neither set, and one key known, there is nothing to rotate');
SELECT set_config('app.vault_old_key', :old, true);
SELECT is(left(pg_temp.error_of('SELECT rotate_vault_key()'), 76), 'F0000: Both app.vault_old_key and app.vault_new_key must be set for rotation', 'nor with one of the two');
SELECT set_config('app.vault_new_key', 'c0ffee', true);
SELECT is(pg_temp.error_of('SELECT rotate_vault_key()'), 'F0000: app.vault_new_key is not 64 hex characters | A key is 64 hex characters, as `openssl rand -hex 32` makes them.',
          'a malformed key is named by its setting, and not quoted');
SELECT set_config('app.vault_new_key', :new || E'\n' || :new, true);
SELECT is(left(pg_temp.error_of('SELECT rotate_vault_key()'), 50), 'F0000: app.vault_new_key is not 64 hex characters ', 'two keys are not one');
SELECT set_config('app.vault_new_key', :new, true);

-- ── What it does ──

-- The cluster's own key was first.
SELECT encrypt_token('x');
SELECT results_eq('SELECT * FROM rotate_vault_key()', $$VALUES (0, '{}'::text[])$$, 'with no servers there is nothing to do');

-- Under the cluster's key, which is not the old one.
SELECT pg_temp.add('one'), pg_temp.add('two'), pg_temp.add('three');
INSERT INTO user_servers (user_id, server_id, name) VALUES (:a, 'without a config', 'x');
SELECT results_eq('SELECT servers_updated, cardinality(errors) FROM rotate_vault_key()', 'VALUES (0, 3)', 'values under another key than the old one are errors');
SELECT is((SELECT errors FROM rotate_vault_key()),
          (SELECT array_agg(format('Server %s: the value cannot be decrypted', id) ORDER BY ctid) FROM user_servers WHERE config_encrypted IS NOT NULL),
          'each with its id and reason');
SELECT is(decrypt_config(config_encrypted), '{"url": "http://127.0.0.1/"}', format('%s is as it was', server_id)) FROM user_servers WHERE config_encrypted IS NOT NULL;

-- The shared cluster's key.
SELECT set_config('app.vault_old_key', '00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff', true);
UPDATE user_servers SET config_encrypted = decode(repeat('ab', 40), 'hex') WHERE server_id = 'two';
CREATE TEMP TABLE before AS SELECT * FROM user_servers;
SELECT results_eq('SELECT * FROM rotate_vault_key()',
                  $$SELECT 2, ARRAY[format('Server %s: the value cannot be decrypted', id)] FROM user_servers WHERE server_id = 'two'$$,
                  'what the old key opens is encrypted anew, and what it does not is told');
SELECT results_eq('SELECT s.server_id FROM user_servers s JOIN before b USING (id) WHERE s.config_encrypted <> b.config_encrypted ORDER BY 1', $$VALUES ('one'), ('three')$$,
                  'no other value is touched');
SELECT results_eq('SELECT count(*) FROM user_servers s JOIN before b USING (id) WHERE (s.updated_at, s.name, s.enabled) IS DISTINCT FROM (b.updated_at, b.name, b.enabled)', 'VALUES (0::bigint)',
                  'nor is another column');
SELECT is(pg_temp.error_of(format('SELECT decrypt_config(%L::bytea)', config_encrypted)), '22000: the value cannot be decrypted | Check that every key still in use is in the vault key file, and that the context is the one given to encrypt.',
          format('the old key does not open %s any more', server_id))
  FROM user_servers WHERE server_id IN ('one', 'three');
SELECT results_eq('SELECT servers_updated, cardinality(errors) FROM rotate_vault_key()', 'VALUES (0, 1)', 'a second call finds them done');

-- ── Back ──

SELECT set_config('app.vault_old_key', :new, true),
       set_config('app.vault_new_key', '00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff', true);
SELECT results_eq('SELECT servers_updated, cardinality(errors) FROM rotate_vault_key()', 'VALUES (2, 1)', 'with the keys exchanged it goes back');
SELECT is(decrypt_config(config_encrypted), '{"url": "http://127.0.0.1/"}', format('%s opens as before', server_id)) FROM user_servers WHERE server_id IN ('one', 'three');

-- ── Who may ──

SELECT set_config('role', 'service_role', true);
SELECT results_eq('SELECT servers_updated, cardinality(errors) FROM rotate_vault_key()', 'VALUES (0, 1)', 'service_role may rotate');
RESET ROLE;
SELECT is(pg_temp.error_of($$SELECT _nexus_hub.reseal('\x00', NULL, 'x', NULL)$$), '55000: no rotation is going on | Call rotate_vault_key().', 'a rotation''s keys are gone when it is over');

SELECT * FROM finish();
ROLLBACK;
