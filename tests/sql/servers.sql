-- add_server, update_server, delete_server, and what the server tables refuse.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

CREATE FUNCTION pg_temp.error_of(statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    state text; message text; detail text; hint text; context text;
BEGIN
    EXECUTE statement;
    RETURN 'no error';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL,
        hint = PG_EXCEPTION_HINT, context = PG_EXCEPTION_CONTEXT;
    RETURN concat_ws(' | ', state || ': ' || message, nullif(detail, ''), nullif(hint, ''), context);
END
$$;
\set a '''aaaaaaaa-0000-4000-8000-000000000001'''
\set good '''{"url": "https://host.example/mcp", "headers": {"Authorization": "Bearer sk-verysecret"}, "timeout_ms": 30000, "price": 1.10, "note": [null]}'''
SELECT set_config('request.jwt.claims', format('{"sub": "%s"}', :a), true);

-- ── add_server ──

CREATE TEMP TABLE added AS SELECT add_server('github', 'GitHub', :good) AS id;
CREATE FUNCTION pg_temp.server() RETURNS user_servers LANGUAGE sql STABLE AS $$ SELECT s FROM user_servers s JOIN pg_temp.added USING (id) $$;
SELECT results_eq('SELECT user_id, server_id, name, transport, enabled, rate_limit_per_minute, created_at = now(), updated_at = now() FROM pg_temp.server()',
                  format($$SELECT %L::uuid, 'github', 'GitHub', 'http', true, NULL::integer, true, true$$, :a),
                  'add_server returns the id of a row with the defaults');
SELECT is(decrypt_config((pg_temp.server()).config_encrypted)::text, (:good)::jsonb::text, 'the config comes back whole, unknown keys and 1.10 too');
SELECT is(position('sk-verysecret'::bytea IN (pg_temp.server()).config_encrypted), 0, 'the config is not stored in clear');
SELECT isnt(add_server('again', NULL, :good), NULL, 'a server needs no name');
SELECT is((SELECT name FROM user_servers WHERE server_id = 'again'), 'again', 'without one it is called by its server_id');
SELECT isnt((SELECT config_encrypted FROM user_servers WHERE server_id = 'again'), (pg_temp.server()).config_encrypted,
            'the same config is another ciphertext in another row');
SELECT isnt(add_server('least', 'Least', '{"url": " http://host:8080 "}'), NULL, 'only the url is required');
SELECT isnt(add_server('nulls', 'Nulls', '{"url": "http://host", "headers": null, "timeout_ms": null}'), NULL, 'headers and timeout_ms may be null');
SELECT isnt(add_server('limits', 'Limits', format('{"url": "http://host", "timeout_ms": %s}', timeout)::jsonb, gen_random_uuid()), NULL,
            format('timeout_ms may be %s', timeout))
  FROM unnest(ARRAY[1, 3600000]) AS timeout;
SELECT isnt(add_server('github', 'GitHub', :good, 'bbbbbbbb-0000-4000-8000-000000000002'), NULL, 'two users may have a server of one server_id');

SELECT throws_ok(format($$SELECT add_server('github', 'GitHub again', %L)$$, :good), '23505', NULL, 'a user has a server_id once');
SELECT isnt(add_server(id, 'Long', '{"url": "http://host"}'), NULL, format('a server_id may have %s characters', length(id)))
  FROM (VALUES ('x'), (repeat('ü', 200))) AS t (id);
SELECT throws_ok(format($$SELECT add_server(%L, 'Name', %L)$$, id, :good), '22023',
                 format('p_server_id must have 1 to 200 characters, not %s', length(coalesce(id, ''))), format('a server_id of %s characters is refused', length(id)))
  FROM (VALUES (''), (repeat('ü', 201)), (NULL)) AS t (id);

SELECT set_config('request.jwt.claims', '', true);
SELECT throws_ok(format($$SELECT add_server('x', 'X', %L)$$, :good), '22023', 'the owner is not known', 'a server needs an owner');

-- ── Bad configs ──

CREATE TEMP TABLE bad (config jsonb, problem text);
INSERT INTO bad
    SELECT jsonb_build_object('url', 'http://host', 'headers', jsonb_build_object('Authorization', value)),
           'the header "Authorization" has characters that are not allowed in a header'
      FROM unnest(ARRAY[E'sk-verysecret\r\nX-Evil: 1', E'sk-verysecret\n', E'\rsk-verysecret', E'sk-verysecret\x7f', E'sk-verysecret\x01']) AS value;
INSERT INTO bad VALUES
    (NULL, 'it is not a JSON object'),
    ('null', 'it is not a JSON object'),
    ('["sk-verysecret"]', 'it is not a JSON object'),
    ('"https://host/mcp"', 'it is not a JSON object'),
    ('{"token": "sk-verysecret"}', '"url" is missing'),
    ('{"url": null}', '"url" is not a string'),
    ('{"url": 1}', '"url" is not a string'),
    ('{"url": ""}', '"url" is not a valid URL: relative URL without a base'),
    ('{"url": "host.example/sk-verysecret"}', '"url" is not a valid URL: relative URL without a base'),
    ('{"url": "http://"}', '"url" is not a valid URL: empty host'),
    ('{"url": "http://[::1"}', '"url" is not a valid URL: invalid IPv6 address'),
    ('{"url": "https://sk-verysecret host/"}', '"url" is not a valid URL: invalid international domain name'),
    ('{"url": "http://host:99999/"}', '"url" is not a valid URL: invalid port number'),
    ('{"url": "file:///etc/sk-verysecret"}', '"url" must begin with http:// or https://'),
    ('{"url": "ftp://host/"}', '"url" must begin with http:// or https://'),
    ('{"url": "http://host", "headers": ["sk-verysecret"]}', '"headers" is not a JSON object'),
    ('{"url": "http://host", "headers": "sk-verysecret"}', '"headers" is not a JSON object'),
    ('{"url": "http://host", "headers": {"X-Token": 1}}', 'the header "X-Token" is not a string'),
    ('{"url": "http://host", "headers": {"X-Token": null}}', 'the header "X-Token" is not a string'),
    ('{"url": "http://host", "headers": {"": "sk-verysecret"}}', '"headers" has a name that is not a valid header name'),
    ('{"url": "http://host", "headers": {"X sk-verysecret": "1"}}', '"headers" has a name that is not a valid header name'),
    ('{"url": "http://host", "headers": {"X\r\nEvil": "sk-verysecret"}}', '"headers" has a name that is not a valid header name'),
    ('{"url": "http://host", "headers": {"Mcp-Session-Id": "sk-verysecret"}}', 'the header "mcp-session-id" is set by the protocol and cannot be given'),
    ('{"url": "http://host", "headers": {"HOST": "sk-verysecret"}}', 'the header "host" is set by the protocol and cannot be given'),
    ('{"url": "http://host", "headers": {"Content-Length": "7"}}', 'the header "Content-Length" cannot be given'),
    ('{"url": "http://host", "headers": {"transfer-encoding": "sk-verysecret"}}', 'the header "transfer-encoding" cannot be given'),
    ('{"url": "http://host", "headers": {"Connection": "sk-verysecret"}}', 'the header "Connection" cannot be given'),
    ('{"url": "http://host", "max_in_flight": 0}', '"max_in_flight" is not a whole number from 1 to 100000'),
    ('{"url": "http://host", "max_in_flight": 100001}', '"max_in_flight" is not a whole number from 1 to 100000'),
    ('{"url": "http://host", "max_in_flight": "sk-verysecret"}', '"max_in_flight" is not a whole number from 1 to 100000'),
    ('{"url": "http://host", "timeout_ms": 0}', '"timeout_ms" is not a whole number from 1 to 3600000'),
    ('{"url": "http://host", "timeout_ms": -1}', '"timeout_ms" is not a whole number from 1 to 3600000'),
    ('{"url": "http://host", "timeout_ms": 1.5}', '"timeout_ms" is not a whole number from 1 to 3600000'),
    ('{"url": "http://host", "timeout_ms": "9"}', '"timeout_ms" is not a whole number from 1 to 3600000'),
    ('{"url": "http://host", "timeout_ms": 3600001}', '"timeout_ms" is not a whole number from 1 to 3600000'),
    ('{"url": "http://host", "timeout_ms": 1e400}', '"timeout_ms" cannot be read'),
    ('{"url": ["http://host"]}', '"url" is not a string');

ALTER TABLE bad ADD error text;
UPDATE bad SET error = pg_temp.error_of(format('SELECT add_server(''bad'', ''Bad'', config, %L) FROM pg_temp.bad WHERE ctid = %L', :a, ctid));
SELECT is(split_part(error, ' | ', 1), '22023: bad server config: ' || problem, format('add_server refuses %s', left(coalesce(config::text, 'NULL'), 80)))
  FROM bad ORDER BY config;
SELECT is_empty($$SELECT config, error FROM bad WHERE error LIKE '%verysecret%'$$, 'and quotes no value of it');
SELECT is_empty(
    $$SELECT config, error FROM bad
       WHERE split_part(error, ' | ', 2) <> 'A config is {"url": "https://host/mcp", "headers": {"Authorization": "Bearer …"}, "timeout_ms": 30000}; only url is required.'
         AND problem NOT LIKE '%nested%'$$,
    'and the hint shows how a config looks');
SELECT throws_ok(format('SELECT update_server((SELECT id FROM added), p_config => config) FROM pg_temp.bad WHERE ctid = %L', ctid), '22023',
                 'bad server config: ' || problem, format('update_server refuses %s', left(config::text, 80)))
  FROM bad WHERE config IS NOT NULL ORDER BY config;
SELECT isnt(add_server('flight ' || most, NULL, format('{"url": "http://host", "max_in_flight": %s}', most)::jsonb, :a), NULL, format('max_in_flight may be %s', most))
  FROM unnest(ARRAY['1', '100000', 'null']) AS most;
SELECT lives_ok(format($$SELECT add_server('big number', 'Big', '{"url": "http://host", "big": 1e400}', %L)$$, :a),
                'a number beyond a double is kept in an unknown key');

-- ── Where a server may not be ──

CREATE TEMP TABLE denied (url text, what text);
INSERT INTO denied VALUES
    ('http://10.0.0.1/sk-verysecret', 'a private address'), ('https://192.168.1.1:8443/mcp', 'a private address'), ('http://[fd00::1]/', 'a private address'),
    ('http://[::1]/', 'a loopback address'), ('http://0x7f000002/', 'a loopback address'), ('http://127.1.1.1:80/', 'a loopback address'), ('http://[::ffff:127.0.0.2]/', 'a loopback address'),
    ('http://169.254.169.254/latest/', 'a cloud metadata address'), ('http://169.254.1.1/', 'a link-local address'), ('http://0/', 'an unspecified address');
SELECT is(split_part(pg_temp.error_of(format($$SELECT add_server('denied', 'Denied', %L, %L)$$, jsonb_build_object('url', url), :a)), ' | SQL', 1),
          format('42501: the egress policy does not allow %s | A superuser opens hosts, addresses and networks with the setting nexus_hub.egress_allow.', what),
          format('add_server refuses %s', url))
  FROM denied;
SELECT throws_ok(format($$SELECT update_server((SELECT id FROM added), p_config => %L)$$, jsonb_build_object('url', url)), '42501',
                 'the egress policy does not allow ' || what, format('update_server refuses %s', url))
  FROM denied;
SELECT isnt(add_server(url, NULL, jsonb_build_object('url', url), :a), NULL, format('add_server takes %s', url))
  FROM unnest(ARRAY['http://127.0.0.1/mcp', 'http://2130706433:8080/', 'http://8.8.8.8/', 'http://[2606:4700::1111]/', 'http://localhost/', 'http://name.internal/']) AS url;
SELECT is_empty($$SELECT FROM user_servers WHERE server_id = 'denied'$$, 'and a server that was refused is not there');

-- ── update_server, delete_server ──

UPDATE user_servers SET updated_at = '2000-01-01' WHERE id = (SELECT id FROM added);
CREATE TEMP TABLE before AS SELECT * FROM pg_temp.server();
SELECT is(update_server(id), true, 'update_server with nothing to change finds the server') FROM added;
SELECT results_eq('SELECT name, enabled, config_encrypted FROM pg_temp.server()', 'SELECT name, enabled, config_encrypted FROM before',
                  'and what is NULL stays, the ciphertext included');
SELECT is((pg_temp.server()).updated_at, now(), 'updated_at is the time of the update');
SELECT is(update_server(id, p_name => 'New'), true, 'the name alone is changed') FROM added;
SELECT results_eq('SELECT name, enabled, config_encrypted FROM pg_temp.server()', $$SELECT 'New', enabled, config_encrypted FROM before$$, 'and the rest stays');
SELECT is(update_server(id, p_enabled => false), true, 'enabled alone is changed') FROM added;
SELECT results_eq('SELECT name, enabled, config_encrypted FROM pg_temp.server()', $$SELECT 'New', false, config_encrypted FROM before$$, 'and the rest stays');
SELECT is(update_server(id, p_config => '{"url": "https://new.example/mcp"}'), true, 'the config alone is changed') FROM added;
SELECT results_eq('SELECT name, enabled, decrypt_config(config_encrypted) FROM pg_temp.server()',
                  $$VALUES ('New', false, '{"url": "https://new.example/mcp"}'::jsonb)$$, 'and replaced as a whole');
SELECT throws_ok($$SELECT update_server((SELECT id FROM added), 'Newer', '{}', true)$$, '22023', NULL, 'a bad config stops the update');
SELECT results_eq('SELECT name, enabled, decrypt_config(config_encrypted) FROM pg_temp.server()',
                  $$VALUES ('New', false, '{"url": "https://new.example/mcp"}'::jsonb)$$, 'and nothing of it is done');
SELECT is(update_server('dddddddd-0000-4000-8000-000000000004', 'X', :good), false, 'update_server returns false where there is no such server');
SELECT is(update_server(NULL, 'X', :good), false, 'update_server returns false for NULL');
SELECT is(delete_server(id), true, 'delete_server deletes') FROM added;
SELECT is(delete_server(id), false, 'and returns false where there is no such server') FROM added;
SELECT is(delete_server(NULL), false, 'delete_server returns false for NULL');

-- ── What the tables refuse ──

CREATE TEMP TABLE refused (name text, statement text);
INSERT INTO refused VALUES
    ('system_servers_id_length', $$INSERT INTO system_servers (id, name, config) VALUES ('', 'n', '{}')$$),
    ('system_servers_id_length', $$INSERT INTO system_servers (id, name, config) VALUES (repeat('x', 201), 'n', '{}')$$),
    ('system_servers_config_object', $$INSERT INTO system_servers (id, name, config) VALUES ('x', 'n', '[]')$$),
    ('system_servers_rate_limit_range', $$INSERT INTO system_servers (id, name, config, rate_limit_per_minute) VALUES ('x', 'n', '{}', -1)$$),
    ('user_servers_server_id_length', $$INSERT INTO user_servers (user_id, server_id, name) VALUES (gen_random_uuid(), '', 'n')$$),
    ('user_servers_server_id_length', $$INSERT INTO user_servers (user_id, server_id, name) VALUES (gen_random_uuid(), repeat('x', 201), 'n')$$),
    ('user_servers_transport_known', $$INSERT INTO user_servers (user_id, server_id, name, transport) VALUES (gen_random_uuid(), 'x', 'n', 'stdio')$$),
    ('user_servers_config_encrypted_length', $$INSERT INTO user_servers (user_id, server_id, name, config_encrypted) VALUES (gen_random_uuid(), 'x', 'n', '\x00')$$),
    ('user_servers_config_encrypted_length', $$INSERT INTO user_servers (user_id, server_id, name, config_encrypted) VALUES (gen_random_uuid(), 'x', 'n', convert_to(repeat('x', 100001), 'UTF8'))$$),
    ('user_servers_rate_limit_range', $$INSERT INTO user_servers (user_id, server_id, name, rate_limit_per_minute) VALUES (gen_random_uuid(), 'x', 'n', -1)$$);
SELECT throws_ok(statement, '23514', NULL, format('%s refuses: %s', name, statement)) FROM refused;
SELECT throws_ok($$SELECT add_server('x', 'n', jsonb_build_object('url', 'https://h/', 'note', repeat('x', 65536)), gen_random_uuid())$$, '54000',
                 NULL, 'a config of more than 64 kB is refused');
SELECT throws_ok($$SELECT add_server('x', 'n', jsonb_build_object('url', 'https://' || repeat('x', 254) || '/'), gen_random_uuid())$$, '22023',
                 'bad server config: "url" has a host name of more than 253 characters', 'a host name has 253 characters at most');
SELECT set_eq($$SELECT conname::text FROM pg_constraint WHERE contype = 'c' AND conrelid IN ('system_servers'::regclass, 'user_servers'::regclass)$$,
              'SELECT name FROM refused', 'every CHECK of the server tables is tested');

SELECT * FROM finish();
ROLLBACK;
