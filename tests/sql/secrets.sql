-- Named secrets: what is stored, whose it is, who may do what to it, and what is refused.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

\ir error_with_hint.psql
\set a '''aaaaaaaa-0000-4000-8000-000000000001'''
\set b '''bbbbbbbb-0000-4000-8000-000000000002'''

CREATE FUNCTION pg_temp.as_role(role text, sub text DEFAULT NULL) RETURNS void LANGUAGE sql
AS $$ SELECT set_config('request.jwt.claims', json_strip_nulls(json_build_object('sub', sub, 'role', role))::text, true), set_config('role', role, true) $$;
-- What is in the table, for the owner of the extension alone.
CREATE FUNCTION pg_temp.opened(owner uuid, wanted text) RETURNS text LANGUAGE sql STABLE SECURITY DEFINER
AS $$ SELECT decrypt_token(s.value_encrypted, _nexus_hub.secret_context(s.user_id, s.name))
        FROM _nexus_hub.secrets s WHERE s.name = wanted AND s.user_id IS NOT DISTINCT FROM owner $$;
SELECT set_config('search_path', format('%I, pgtap, public', :'schema'), true);
SELECT format('ALTER FUNCTION pg_temp.opened(uuid, text) SET search_path = %I', :'schema') \gexec

-- ── The owner of the extension and the service role: shared secrets, and everybody's ──

CREATE TEMP TABLE made (owner uuid, name text, id uuid);
GRANT ALL ON made TO PUBLIC;
INSERT INTO made VALUES (NULL, 'of.owner', create_secret('of.owner', 'value of the owner'));
SELECT is(pg_temp.opened(NULL, 'of.owner'), 'value of the owner', 'what the owner creates is shared');
SELECT pg_temp.as_role('service_role');
INSERT INTO made VALUES (NULL, 'token', create_secret('token', 'shared value')),
                        (:a, 'token', create_secret('token', 'value of A', :a)),
                        (:b, 'token', create_secret('token', 'value of B', :b));
SELECT is(pg_temp.opened(NULL, 'token'), 'shared value', 'so is what the service role creates');
SELECT is(pg_temp.opened(:a, 'token'), 'value of A', 'but for a secret that it creates for a user');
SELECT is(pg_temp.opened(:b, 'token'), 'value of B', 'several users may have secrets of one name');
SELECT results_eq('SELECT user_id, name, id FROM list_secrets()', format($$SELECT owner, name, id FROM made ORDER BY owner NULLS FIRST, name$$),
                  'the service role sees the names of all, shared ones first');
SELECT results_eq('SELECT DISTINCT created_at, updated_at FROM list_secrets()', 'SELECT now(), now()', 'and since when they are');
SELECT pg_temp.as_role('service_role', :a);
SELECT is(update_secret('token', 'shared value 2'), true, 'even with a user''s id in its claims the service role means what is shared');
SELECT is(pg_temp.opened(NULL, 'token'), 'shared value 2', 'and changes that');
SELECT is(pg_temp.opened(:a, 'token'), 'value of A', 'not the user''s own');
SELECT pg_temp.as_role('service_role');

SELECT is(pg_temp.error_of(call), '23505: there is a secret "token" already | update_secret changes its value; list_secrets shows whose it is.', call || ' is refused')
  FROM unnest(ARRAY['SELECT create_secret(''token'', ''verysecret'')', format('SELECT create_secret(''token'', ''verysecret'', %L)', :a)]) AS call;
SELECT is(pg_temp.opened(NULL, 'token'), 'shared value 2', 'which changes nothing');

RESET ROLE;
UPDATE _nexus_hub.secrets SET created_at = '2000-01-01', updated_at = '2000-01-01';
CREATE TEMP TABLE before AS SELECT * FROM _nexus_hub.secrets;
SELECT pg_temp.as_role('service_role');
SELECT is(update_secret('token', 'new value of A', :a), true, 'update_secret finds the secret');
SELECT is(pg_temp.opened(:a, 'token'), 'new value of A', 'and gives it its value');
RESET ROLE;
SELECT results_eq(format('SELECT id, user_id, name, created_at, updated_at FROM _nexus_hub.secrets WHERE user_id = %L', :a),
                  format('SELECT id, owner, name, ''2000-01-01''::timestamptz, now() FROM made WHERE owner = %L', :a), 'the row stays, and is new as of now');
SELECT results_eq(format('SELECT * FROM _nexus_hub.secrets WHERE user_id IS DISTINCT FROM %L ORDER BY id', :a),
                  format('SELECT * FROM before WHERE user_id IS DISTINCT FROM %L ORDER BY id', :a), 'all others are as they were');
SELECT is_empty($$SELECT FROM _nexus_hub.secrets WHERE position('value'::bytea IN value_encrypted) > 0$$, 'no value is stored in clear');
SELECT throws_ok(format('SELECT decrypt_token(value_encrypted, _nexus_hub.secret_context(%L, ''token'')) FROM _nexus_hub.secrets WHERE user_id = %L', :b, :a), '22000', NULL,
                 'a ciphertext does not open in another user''s row');
SELECT throws_ok(format('SELECT decrypt_token(value_encrypted, _nexus_hub.secret_context(NULL, ''token'')) FROM _nexus_hub.secrets WHERE user_id = %L', :a), '22000', NULL,
                 'nor as a shared one');
SELECT throws_ok(format('SELECT decrypt_token(value_encrypted, _nexus_hub.secret_context(%L, ''other'')) FROM _nexus_hub.secrets WHERE user_id = %1$L', :a), '22000', NULL,
                 'nor under another name');

SELECT pg_temp.as_role('service_role');
SELECT is(delete_secret('token', :a), true, 'delete_secret deletes');
SELECT is(delete_secret('token', :a), false, 'once');
SELECT is(pg_temp.opened(NULL, 'token'), 'shared value 2', 'the shared secret of that name stays');
SELECT is(update_secret('token', 'x', :a), false, 'what is deleted cannot be updated');
SELECT is(update_secret('nothing', 'x'), false, 'nor what never was');
SELECT is(delete_secret(name), false, format('there is nothing of the name %L to delete', left(name, 20)))
  FROM unnest(ARRAY[NULL, '', 'nothing', 'TOKEN', 'tok%', repeat('x', 100000), 'ключ']) AS name;
SELECT isnt(create_secret('token', 'value of A', :a), NULL, 'a deleted secret can be made again');

-- ── Names and values ──

CREATE FUNCTION pg_temp.round_trip(value text) RETURNS text LANGUAGE plpgsql
AS $$ BEGIN PERFORM create_secret('round.trip', value); PERFORM delete_secret('gone'); RETURN pg_temp.opened(NULL, 'round.trip'); END $$;
SELECT ok(pg_temp.round_trip(value) = value AND delete_secret('round.trip'), format('a value may be %L', left(value, 40)))
  FROM (VALUES ('x'), (' '), ('two words'), ('''"\%$1;--{}'), ('{{secret:token}}'), ('ключ 🗝'), (repeat('x', 10000)), (repeat('🗝', 10000))) AS t (value);
SELECT isnt(create_secret(name, 'x'), NULL, format('a name may be %L', left(name, 20)))
  FROM unnest(ARRAY['a', 'A', '0', '_', '.', '-', '..', '--', 'Az09_.-', repeat('x', 100)]) AS name;

CREATE TEMP TABLE refused (arguments text, error text);
INSERT INTO refused
    SELECT format('(%L, ''verysecret'')', name),
           '22023: p_name must have 1 to 100 letters, digits, "_", "." and "-", and no other characters | It is what placeholders call the secret, such as "github_token" in {{secret:github_token}}.'
      FROM unnest(ARRAY[NULL, '', ' ', 'verysecret value', 'a b', 'a/b', 'a:b', '{{secret:a}}', 'a}}', E'a\n', E'\na', 'ä', 'а', '％', repeat('x', 101), repeat('x', 1000000), ''';DROP TABLE x--']) AS name;
INSERT INTO refused
    SELECT format('(''name'', %L)', value), error
      FROM (VALUES
        (NULL, '22023: p_value is empty | Pass the secret itself; delete_secret takes one away.'),
        ('', '22023: p_value is empty | Pass the secret itself; delete_secret takes one away.'),
        (E'verysecret\n', '22023: p_value has control characters | It will be sent in a header or a URL: pass it without the end of line it was read with.'),
        (E'verysecret\r\nX-Evil: 1', '22023: p_value has control characters | It will be sent in a header or a URL: pass it without the end of line it was read with.'),
        (E'very\tsecret', '22023: p_value has control characters | It will be sent in a header or a URL: pass it without the end of line it was read with.'),
        (E'verysecret\x7f', '22023: p_value has control characters | It will be sent in a header or a URL: pass it without the end of line it was read with.'),
        (E'verysecret\u0085', '22023: p_value has control characters | It will be sent in a header or a URL: pass it without the end of line it was read with.'),
        ('verysecret' || repeat('x', 9991), '54000: p_value has 10001 characters, and at most 10000 are allowed'),
        (repeat('verysecret', 1000000), '54000: p_value has 10000000 characters, and at most 10000 are allowed')) AS t (value, error);
GRANT ALL ON refused TO PUBLIC;
SELECT is(pg_temp.error_of('SELECT create_secret' || arguments), error, format('create_secret%s is refused', left(arguments, 50))) FROM refused;
SELECT is(pg_temp.error_of('SELECT update_secret' || arguments), error, format('update_secret%s is refused', left(arguments, 50))) FROM refused;
SELECT is_empty($$SELECT error FROM refused WHERE error LIKE '%verysecret%'$$, 'and nothing of it is quoted');
RESET ROLE;
SELECT throws_ok(format('INSERT INTO _nexus_hub.secrets (name, value_encrypted) VALUES (%L, encrypt_token(''x''))', name), '23514', NULL, format('the table refuses the name %L', name))
  FROM unnest(ARRAY['', 'a b', E'a\n', 'ä', repeat('x', 101)]) AS name;
SELECT throws_ok($$INSERT INTO _nexus_hub.secrets (name, value_encrypted) VALUES ('plain', 'plain text')$$, '23514', NULL, 'and what is too short to be a ciphertext');
SELECT throws_ok($$INSERT INTO _nexus_hub.secrets (name, value_encrypted) VALUES ('token', encrypt_token('x'))$$, '23505', NULL, 'and a second shared secret of a name');

-- ── A user ──

SELECT pg_temp.as_role('authenticated', :a);
SELECT results_eq('SELECT user_id, name FROM list_secrets()', format('SELECT %L::uuid, ''token''', :a), 'a user sees the own secrets alone, not what is shared');
SELECT isnt(create_secret('mine', 'value 1'), NULL, 'a user creates a secret');
SELECT isnt(create_secret('of.owner', 'value 2', :a), NULL, 'which may be called what a shared one is, and may be said to be the own');
SELECT is(pg_temp.opened(:a, 'mine'), 'value 1', 'it is the user''s own');
SELECT is(update_secret('mine', 'value 3'), true, 'a user changes an own secret');
SELECT is(pg_temp.opened(:a, 'mine'), 'value 3', 'to the new value');
SELECT is(update_secret('a', 'evil'), false, 'but no shared one');
SELECT is(delete_secret('a'), false, 'and deletes no shared one');
SELECT is(pg_temp.opened(NULL, 'a'), 'x', 'which is as it was');
SELECT is(pg_temp.error_of(call), '42501: p_user_id is not the caller''s own | Leave p_user_id NULL, or act as service_role.', format('a user cannot %s', call))
  FROM unnest(ARRAY[format('SELECT create_secret(''new'', ''x'', %L)', :b), format('SELECT update_secret(''token'', ''x'', %L)', :b), format('SELECT delete_secret(''token'', %L)', :b),
                    format('SELECT delete_secret(NULL, %L)', :b)]) AS call;
SELECT is(delete_secret('mine'), true, 'a user deletes an own secret');
SELECT pg_temp.as_role('authenticated', :b);
SELECT results_eq('SELECT user_id, name FROM list_secrets()', format('SELECT %L::uuid, ''token''', :b), 'another user sees other secrets');
SELECT is(delete_secret('of.owner'), false, 'and has none of the first user''s');
SELECT throws_ok(statement, '42501', NULL, format('a user cannot %s', statement))
  FROM unnest(ARRAY['SELECT * FROM _nexus_hub.secrets', 'SELECT id FROM _nexus_hub.secrets', 'DELETE FROM _nexus_hub.secrets',
                    'SELECT _nexus_hub.seal_secret(''x'', ''secret:shared:token'')', 'SELECT _nexus_hub.secret_context(NULL, ''token'')',
                    'SELECT * FROM _nexus_hub.read_secrets(ARRAY[NULL::uuid], ARRAY[true], ARRAY[''token''])']) AS statement;
-- Were the schema open, the rights to the table would still hold.
RESET ROLE;
GRANT USAGE ON SCHEMA _nexus_hub TO authenticated, anon;
SELECT pg_temp.as_role('authenticated', :b);
SELECT throws_ok(statement, '42501', NULL, format('a user who could reach the table cannot %s', statement))
  FROM unnest(ARRAY['SELECT value_encrypted FROM _nexus_hub.secrets', 'SELECT * FROM _nexus_hub.secrets', 'SELECT id FROM _nexus_hub.secrets WHERE value_encrypted IS NOT NULL',
                    'SELECT s FROM _nexus_hub.secrets s', 'UPDATE _nexus_hub.secrets SET updated_at = now() RETURNING value_encrypted',
                    'UPDATE _nexus_hub.secrets SET user_id = user_id', 'UPDATE _nexus_hub.secrets SET name = ''x''', 'TRUNCATE _nexus_hub.secrets',
                    'INSERT INTO _nexus_hub.secrets (user_id, name, value_encrypted) VALUES (NULL, ''n'', decode(repeat(''00'', 29), ''hex''))',
                    'SELECT * FROM _nexus_hub.read_secrets(ARRAY[NULL::uuid], ARRAY[true], ARRAY[''token''])']) AS statement;
SELECT results_eq('SELECT user_id, name FROM _nexus_hub.secrets', format('SELECT %L::uuid, ''token''', :b), 'and sees own rows alone');
RESET ROLE;
REVOKE USAGE ON SCHEMA _nexus_hub FROM authenticated, anon;

-- ── Somebody without an id, and anon ──

CREATE TEMP TABLE call AS SELECT unnest(ARRAY['SELECT create_secret(''new'', ''x'')', 'SELECT update_secret(''token'', ''x'')', 'SELECT delete_secret(''token'')']) AS statement;
GRANT ALL ON call TO PUBLIC;
SELECT pg_temp.as_role('authenticated', sub) FROM (VALUES (NULL)) AS t (sub);
SELECT throws_ok(statement, '22023', 'the owner is not known', format('without an id, %s is refused', statement)) FROM call;
SELECT throws_ok(format('SELECT create_secret(''new'', ''x'', %L)', :a), '42501', NULL, 'nor is there anybody else to be');
SELECT is_empty('SELECT * FROM list_secrets()', 'and no secrets are seen');
RESET ROLE;
GRANT USAGE ON SCHEMA :"schema" TO anon;
SELECT pg_temp.as_role('anon', :a);
SELECT throws_ok(statement, '42501', NULL, format('anon: %s is refused', statement)) FROM call;
SELECT throws_ok('SELECT * FROM list_secrets()', '42501', NULL, 'anon lists none');
RESET ROLE;

-- ── Placeholders where configs and jobs are written ──

CREATE TEMP TABLE malformed (member text, what text);
INSERT INTO malformed VALUES
    ('"url": "https://host/{{secret:}}"', '"url"'), ('"url": "https://host/{{secret:a b}}"', '"url"'), ('"url": "https://host/?k={{secret:a"', '"url"'),
    ('"url": "https://host/{{secret:a}}{{secret:"', '"url"'),
    ('"url": "https://host/", "headers": {"X-Token": "{{secret:a} }"}', 'the header "X-Token"'),
    ('"url": "https://host/", "headers": {"X-Token": "Bearer {{secret:{{secret:a}}}}"}', 'the header "X-Token"');
SELECT throws_ok(format('SELECT add_server(''s'', ''S'', %L, %L)', '{' || member || '}', :a), '22023',
                 format('bad server config: %s has a placeholder that is not {{secret:name}} with a name of 1 to 100 of A-Z a-z 0-9 _ . -', what), format('add_server refuses %s', member)) FROM malformed;
SELECT throws_ok(format('SELECT create_job(NULL, ''http_request'', NULL, NULL, %L)', '{' || member || '}'), '22023',
                 format('bad request in p_params: %s has a placeholder that is not {{secret:name}} with a name of 1 to 100 of A-Z a-z 0-9 _ . -', what), format('create_job refuses %s', member)) FROM malformed;
SELECT throws_ok(format('SELECT add_server(''s'', ''S'', %L, %L)', jsonb_build_object('url', url), :a), '22023', NULL, format('add_server refuses %s', url))
  FROM unnest(ARRAY['https://{{secret:a}}/', 'https://{{secret:a}}.example/', 'https://host:{{secret:a}}/', '{{secret:a}}', '{{secret:a}}://host/', 'https://host/{{secret:a}}/../']) AS url;
SELECT isnt(add_server(url, NULL, jsonb_build_object('url', url, 'headers', jsonb_build_object('X', 'a {{secret:a}} b {{ x }}')), :a), NULL, format('add_server takes %s', url))
  FROM unnest(ARRAY['https://host/{{secret:a}}/mcp', 'https://host/mcp?key={{secret:a}}', 'https://{{secret:a}}:{{secret:a}}@host/mcp', 'https://host/{{other}}']) AS url;
SELECT throws_ok(format('SELECT add_server(''s'', ''S'', ''{"url": "https://host/", "headers": {"{{secret:a}}": "x"}}'', %L)', :a), '22023', NULL, 'a header''s name has no placeholder');
SELECT isnt(create_job(NULL, 'http_request', NULL, NULL, '{"url": "https://host/", "body": "{{secret:"}'), NULL, 'what is in a body is no placeholder');
CREATE TEMP TABLE got AS SELECT http_get('https://u:{{secret:a}}@host.example:8443/{{secret:a}}?{{secret:a}}') AS id;
SELECT is(target, 'https://host.example:8443', 'where a job goes is known without its secrets') FROM job_results JOIN got USING (id);

SELECT * FROM finish();
ROLLBACK;
