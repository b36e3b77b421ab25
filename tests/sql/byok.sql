-- Users' own API keys: what is stored, who gets it back, and whose key serves a model.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

\ir error_with_hint.psql
\set a '''aaaaaaaa-0000-4000-8000-000000000001'''
\set b '''bbbbbbbb-0000-4000-8000-000000000002'''

CREATE FUNCTION pg_temp.as_role(role text, sub text DEFAULT 'aaaaaaaa-0000-4000-8000-000000000001') RETURNS void LANGUAGE sql
AS $$ SELECT set_config('request.jwt.claims', json_build_object('sub', sub, 'role', role)::text, true), set_config('role', role, true) $$;
CREATE TEMP TABLE service AS SELECT unnest(ARRAY['openai', 'anthropic', 'xai', 'openrouter', 'gateway']) AS name;
CREATE TEMP TABLE owner (name text, id uuid);
INSERT INTO owner VALUES ('a user', :a), ('another user', :b), ('the team', NULL), ('a user with the nil uuid', '00000000-0000-0000-0000-000000000000');

-- ── Keys ──

CREATE TEMP TABLE first AS
    SELECT o.name AS owner, o.id AS user_id, s.name AS service, insert_user_api_key(o.id, s.name, format('key of %s for %s', o.name, s.name)) AS id
      FROM owner o, service s;
GRANT ALL ON service, owner, first TO service_role;
SELECT pg_temp.as_role('service_role');
SELECT is(get_user_api_key(user_id, service), format('key of %s for %s', owner, service), format('the key of %s for %s comes back', owner, service)) FROM first;
SELECT results_eq('SELECT id, user_id, service FROM api_keys ORDER BY id', 'SELECT id, user_id, service FROM first ORDER BY id',
                  'each is a row of its own, whose id insert_user_api_key returns');
SELECT is_empty($$SELECT FROM api_keys WHERE created_at <> now() OR updated_at <> now() OR last_used_at IS NOT NULL$$, 'new keys have not been used');
SELECT is_empty($$SELECT FROM api_keys WHERE position('key of'::bytea IN api_key_encrypted) > 0$$, 'and are not stored in clear');

SELECT is(get_user_api_key(:a, name), 'key of a user for openai', format('the service may be written %L', name))
  FROM unnest(ARRAY['OpenAI', ' openai', E'\topenai\n', ' OPENAI  ']) AS name;
SELECT is(insert_user_api_key(:a, E' OpenRouter\n', 'new'), (SELECT id FROM first WHERE user_id = :a AND service = 'openrouter'), 'when a key is put in, too');
SELECT is(get_user_api_key('cccccccc-0000-4000-8000-000000000003', name), NULL, format('a user without a key for %s has none, not the team''s', name)) FROM service;

UPDATE api_keys SET created_at = '2000-01-01', updated_at = '2000-01-01';
SELECT lives_ok(format('SELECT touch_user_api_key(%L, '' XAI '')', :a), 'a key is touched');
SELECT results_eq('SELECT user_id, service, updated_at FROM api_keys WHERE last_used_at = now()', format('SELECT %L::uuid, ''xai'', ''2000-01-01''::timestamptz', :a),
                  'and that one alone has been used, and is as old as it was');
SELECT lives_ok('SELECT touch_user_api_key(NULL, ''openai'')', 'the team''s key is touched');
SELECT set_eq('SELECT user_id, service FROM api_keys WHERE last_used_at = now()', format('VALUES (%L::uuid, ''xai''), (NULL, ''openai'')', :a), 'and no user''s with it');
SELECT lives_ok('SELECT touch_user_api_key(''cccccccc-0000-4000-8000-000000000003'', ''xai'')', 'touching a key that is not there does nothing');
SELECT is((SELECT count(*) FROM api_keys WHERE last_used_at IS NOT NULL), 2::bigint, 'to anybody else''s');

CREATE FUNCTION pg_temp.key_row(owner uuid, name text) RETURNS api_keys LANGUAGE sql STABLE
AS $$ SELECT k FROM api_keys k WHERE k.user_id IS NOT DISTINCT FROM owner AND k.service = name $$;
CREATE TEMP TABLE before AS SELECT * FROM api_keys;
SELECT is(insert_user_api_key(:a, 'xai', 'replaced'), (SELECT id FROM first WHERE user_id = :a AND service = 'xai'), 'a second key for a service takes the row of the first');
SELECT is(get_user_api_key(:a, 'xai'), 'replaced', 'and its place');
SELECT results_eq(format('SELECT created_at, updated_at, last_used_at FROM pg_temp.key_row(%L, ''xai'')', :a), $$VALUES ('2000-01-01'::timestamptz, now(), NULL::timestamptz)$$,
                  'it is new, and has not been used');
SELECT results_eq(format('SELECT * FROM api_keys WHERE (user_id, service) IS DISTINCT FROM (%L::uuid, ''xai'') ORDER BY id', :a),
                  format('SELECT * FROM before WHERE (user_id, service) IS DISTINCT FROM (%L::uuid, ''xai'') ORDER BY id', :a), 'all other keys are as they were');
SELECT is(insert_user_api_key(NULL, 'openai', 'replaced'), (SELECT id FROM first WHERE user_id IS NULL AND service = 'openai'), 'the team''s second key takes the row of the first');
SELECT results_eq('SELECT user_id, updated_at, last_used_at FROM pg_temp.key_row(NULL, ''openai'')', $$VALUES (NULL::uuid, now(), NULL::timestamptz)$$, 'and is new, too');
SELECT is((SELECT count(*) FROM api_keys), 20::bigint, 'no rows were added');

SELECT is(delete_user_api_key(:a, ' Anthropic'), true, 'a key is deleted');
SELECT is(get_user_api_key(:a, 'anthropic'), NULL, 'and gone');
SELECT is(delete_user_api_key(:a, 'anthropic'), false, 'once');
SELECT is(delete_user_api_key(NULL, 'anthropic'), true, 'the team''s key is deleted');
SELECT set_eq($$SELECT user_id FROM api_keys WHERE service = 'anthropic'$$, format('VALUES (%L::uuid), (''00000000-0000-0000-0000-000000000000'')', :b), 'and nobody else''s is');

CREATE FUNCTION pg_temp.round_trip(key text) RETURNS text LANGUAGE plpgsql
AS $$ BEGIN PERFORM insert_user_api_key(NULL, 'xai', key); RETURN get_user_api_key(NULL, 'xai'); END $$;
SELECT ok(pg_temp.round_trip(key) = key, format('a key may be %s', left(key, 40)))
  FROM (VALUES ('x'), ('sk-proj-Ab_9'), ('a key with blanks'), ('''"\%$1;--'), ('ключ 🗝'), (repeat('x', 10000)), (repeat('🗝', 10000))) AS t (key);

-- ── What is refused ──

CREATE TEMP TABLE refused (call text, error text);
INSERT INTO refused
    SELECT format(call, :'a', service), '22023: p_service is not a service that keys are kept for | The services are openai, anthropic, xai, openrouter, gateway.'
      FROM unnest(ARRAY['insert_user_api_key(%s, %L, ''key'')', 'get_user_api_key(%s, %L)', 'delete_user_api_key(%s, %L)', 'touch_user_api_key(%s, %L)']) AS call,
           unnest(ARRAY['mistral', 'sk-verysecret', 'open ai', 'openai,xai', '', '  ', repeat('openai', 10000), NULL]) AS service;
INSERT INTO refused
    SELECT format('insert_user_api_key(%s, ''openai'', %L)', :'a', key), error
      FROM (VALUES
        (NULL, '22023: p_api_key is empty | Pass the key that the service gave out; delete_user_api_key takes a key away.'),
        ('', '22023: p_api_key is empty | Pass the key that the service gave out; delete_user_api_key takes a key away.'),
        (E' \t\n', '22023: p_api_key is empty | Pass the key that the service gave out; delete_user_api_key takes a key away.'),
        (E'sk-verysecret\n', '22023: p_api_key has control characters | It will be sent in a header: pass it without the end of line it was read with.'),
        (E'sk-verysecret\r\nX-Evil: 1', '22023: p_api_key has control characters | It will be sent in a header: pass it without the end of line it was read with.'),
        (repeat('x', 10001), '54000: p_api_key has 10001 characters, and at most 10000 are allowed'),
        (repeat('ü', 1000000), '54000: p_api_key has 1000000 characters, and at most 10000 are allowed')) AS t (key, error);
INSERT INTO refused
    SELECT format('upsert_user_gateway_config(%s, %L)', owner, url),
           format('22023: bad base URL: %s | A base URL is such as "https://gateway.example/v1"; its key goes into insert_user_api_key.', problem)
      FROM (VALUES
        (NULL, 'it is empty'), ('', 'it is empty'), ('  ', 'it is empty'),
        ('gateway.example/v1', 'it must begin with http:// or https://'), ('ftp://gateway.example', 'it must begin with http:// or https://'),
        ('file:///etc/passwd', 'it must begin with http:// or https://'), ('javascript:alert(1)', 'it must begin with http:// or https://'),
        ('https://user:sk-verysecret@host/', 'it must not hold a user name or password'), ('https://sk-verysecret@host', 'it must not hold a user name or password'),
        ('https:///v1', 'it has no host'), ('https://', 'it has no host'),
        (E'https://host/\r\nX-Evil: 1', 'it has characters that are not allowed in a URL'), ('https://host/a b', 'it has characters that are not allowed in a URL'),
        ('https://host\@evil.example/', 'it has characters that are not allowed in a URL'), (E'https://host/\x7f', 'it has characters that are not allowed in a URL'),
        ('https://host/?key=sk-verysecret', 'it must not have a query or a fragment'), ('https://host/#sk-verysecret', 'it must not have a query or a fragment'),
        ('https://host:99999/', 'it is not a valid URL: invalid port number'), ('https://[::1/', 'it is not a valid URL: invalid IPv6 address'),
        ('https://' || repeat('x', 1993), 'it has 2001 bytes, and at most 2000 are allowed')) AS t (url, problem),
       unnest(ARRAY[:'a', 'NULL']) AS owner;
SELECT is(pg_temp.error_of('SELECT ' || call), error, 'refused: ' || translate(left(call, 100), E'\r\n\t', '   ')) FROM refused;
SELECT is_empty('SELECT FROM refused WHERE pg_temp.error_of(''SELECT '' || call) LIKE ''%verysecret%''', 'and no error quotes what it was given');
SELECT is_empty('SELECT FROM api_gateway_configs', 'nothing of it was stored');

RESET ROLE;
CREATE TEMP TABLE refused_row (statement text, name text);
INSERT INTO refused_row VALUES
    ('INSERT INTO api_keys (service, api_key_encrypted) VALUES (''mistral'', decode(repeat(''00'', 28), ''hex''))', 'api_keys_service_known'),
    ('INSERT INTO api_keys (service, api_key_encrypted) VALUES (''OpenAI'', decode(repeat(''00'', 28), ''hex''))', 'api_keys_service_known'),
    ('UPDATE api_keys SET api_key_encrypted = decode(repeat(''00'', 27), ''hex'')', 'api_keys_api_key_encrypted_length'),
    ('UPDATE api_keys SET api_key_encrypted = decode(repeat(''00'', 40029), ''hex'')', 'api_keys_api_key_encrypted_length'),
    ('INSERT INTO api_gateway_configs (user_id, base_url) VALUES (gen_random_uuid(), '' https://host/ '')', 'api_gateway_configs_base_url_valid');
SELECT throws_ok(statement, '23514', NULL, format('%s refuses: %s', name, statement)) FROM refused_row;
SELECT set_eq($$SELECT conname::text FROM pg_constraint
                 WHERE contype = 'c' AND conrelid IN ('api_keys'::regclass, 'api_gateway_configs'::regclass, 'user_settings'::regclass)$$,
              'SELECT name FROM refused_row', 'every CHECK of these tables is tested');
SELECT is(left(pg_temp.error_of(format('INSERT INTO api_gateway_configs (user_id, base_url) VALUES (gen_random_uuid(), %L)', url)), 20), '22023: bad base URL:',
          format('the table refuses the base URL %L', url))
  FROM unnest(ARRAY['', 'x', 'https://u:p@host/', 'https://host/?key=1']) AS url;
SELECT is(left(pg_temp.error_of(statement), 6), '23505:', 'there is one: ' || statement)
  FROM unnest(ARRAY[
    'INSERT INTO api_keys (user_id, service, api_key_encrypted) SELECT user_id, service, api_key_encrypted FROM api_keys WHERE user_id IS NOT NULL LIMIT 1',
    'INSERT INTO api_keys (user_id, service, api_key_encrypted) SELECT user_id, service, api_key_encrypted FROM api_keys WHERE user_id IS NULL LIMIT 1',
    'INSERT INTO api_gateway_configs (base_url) VALUES (''http://h''), (''http://i'')',
    'INSERT INTO api_gateway_configs (user_id, base_url) VALUES (''aaaaaaaa-0000-4000-8000-000000000001'', ''http://h''), (''aaaaaaaa-0000-4000-8000-000000000001'', ''http://i'')']) AS statement;

-- ── What a ciphertext is bound to ──

SELECT pg_temp.as_role('service_role');
SELECT is(decrypt_token((pg_temp.key_row(:a, 'openai')).api_key_encrypted, 'api_key:aaaaaaaa-0000-4000-8000-000000000001:openai'), 'key of a user for openai',
          'a user''s key is sealed with the context api_key:<user_id>:<service>');
SELECT is(decrypt_token((pg_temp.key_row(NULL, 'gateway')).api_key_encrypted, 'api_key:team:gateway'), 'key of the team for gateway',
          'the team''s with api_key:team:<service>');
SELECT insert_user_api_key(:a, 'xai', 'the same'), insert_user_api_key(:b, 'xai', 'the same');
SELECT isnt((pg_temp.key_row(:a, 'xai')).api_key_encrypted, (pg_temp.key_row(:b, 'xai')).api_key_encrypted, 'two users'' same key is two ciphertexts');

\set unopenable '''22000: the value cannot be decrypted | Check that every key still in use is in the vault key file, and that the context is the one given to encrypt.'''
CREATE FUNCTION pg_temp.error_when_moved(statement text, owner uuid, service text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    error text;
BEGIN
    EXECUTE statement;
    error := pg_temp.error_of(format('SELECT get_user_api_key(%L, %L)', owner, service));
    RAISE EXCEPTION 'take it back';
EXCEPTION WHEN raise_exception THEN
    RETURN error;
END
$$;
SELECT is(pg_temp.error_when_moved(statement, owner::uuid, service), :unopenable, description)
  FROM (VALUES
    (format($$UPDATE api_keys SET user_id = 'cccccccc-0000-4000-8000-000000000003' WHERE user_id = %L AND service = 'openai'$$, :b),
     'cccccccc-0000-4000-8000-000000000003', 'openai', 'a row that is given to another user does not open'),
    ($$UPDATE api_keys SET user_id = 'cccccccc-0000-4000-8000-000000000003' WHERE user_id IS NULL AND service = 'openai'$$,
     'cccccccc-0000-4000-8000-000000000003', 'openai', 'nor the team''s that is given to a user'),
    (format($$DELETE FROM api_keys WHERE user_id IS NULL; UPDATE api_keys SET user_id = NULL WHERE user_id = %L AND service = 'openai'$$, :b),
     NULL, 'openai', 'nor a user''s that is given to the team'),
    (format($$UPDATE api_keys SET service = 'anthropic' WHERE user_id = %L AND service = 'openai'$$, :a), :a, 'anthropic', 'nor one that is given to another service'),
    (format($$UPDATE api_keys SET api_key_encrypted = (pg_temp.key_row(%L, 'openai')).api_key_encrypted WHERE user_id = %L AND service = 'openai'$$, :b, :a),
     :a, 'openai', 'nor a ciphertext copied from another user'),
    (format($$UPDATE api_keys SET api_key_encrypted = encrypt_token('key') WHERE user_id = %L AND service = 'openai'$$, :a), :a, 'openai', 'nor one that was sealed without a context'),
    (format($$UPDATE api_keys SET api_key_encrypted = decode(repeat('00', 28), 'hex') WHERE user_id = %L AND service = 'openai'$$, :a), :a, 'openai', 'nor what is no ciphertext')
    ) AS t (statement, owner, service, description);
SELECT is(get_user_api_key(:a, 'openai'), 'key of a user for openai', 'where it was, it opens');

-- ── Gateways and settings ──

SELECT is(get_user_gateway_base_url(id), NULL, format('%s has no gateway yet', name)) FROM owner;
SELECT lives_ok(format('SELECT upsert_user_gateway_config(%L, %L)', id, url), format('%s gets a gateway at %s', name, left(url, 40)))
  FROM owner JOIN (VALUES ('a user', ' https://my-gateway.vercel.sh/v1 '), ('another user', 'HTTP://[::1]:8080'), ('the team', 'https://' || repeat('x', 1992)))
             AS t (name, url) USING (name);
SELECT is(get_user_gateway_base_url(:a), 'https://my-gateway.vercel.sh/v1', 'it comes back as it was, without blanks around it');
SELECT is(get_user_gateway_base_url(:b), 'HTTP://[::1]:8080', 'another''s is another');
SELECT is(length(get_user_gateway_base_url(NULL)), 2000, 'and so is the team''s, of 2000 characters');
SELECT is(get_user_gateway_base_url('00000000-0000-0000-0000-000000000000'), NULL, 'a user without one has none, not the team''s');
CREATE TEMP TABLE gateway AS SELECT id, user_id FROM api_gateway_configs;
UPDATE api_gateway_configs SET created_at = '2000-01-01', updated_at = '2000-01-01';
SELECT upsert_user_gateway_config(:a, 'https://new.example'), upsert_user_gateway_config(NULL, 'https://team.example');
SELECT results_eq('SELECT g.user_id, g.base_url, g.created_at, g.updated_at = now() FROM api_gateway_configs g JOIN gateway USING (id) ORDER BY base_url COLLATE "C"',
                  format($$VALUES (%L::uuid, 'HTTP://[::1]:8080', '2000-01-01'::timestamptz, false), (%L, 'https://new.example', '2000-01-01', true), (NULL, 'https://team.example', '2000-01-01', true)$$, :b, :a),
                  'a second one takes the row of the first, the user''s or the team''s');
SELECT is(get_user_api_key(:a, 'gateway'), 'key of a user for gateway', 'a gateway''s key is apart');
SELECT lives_ok(format('SELECT delete_user_gateway_config(%L)', :a), 'a user''s gateway is forgotten');
SELECT set_eq('SELECT user_id FROM api_gateway_configs', format('VALUES (%L::uuid), (NULL)', :b), 'and nobody else''s');
SELECT lives_ok('SELECT delete_user_gateway_config(NULL)', 'the team''s is forgotten');
SELECT set_eq('SELECT user_id FROM api_gateway_configs', format('VALUES (%L::uuid)', :b), 'and no user''s');
SELECT lives_ok('SELECT delete_user_gateway_config(NULL)', 'what is not there can be forgotten, too');
SELECT is(get_user_api_key(NULL, 'gateway'), 'key of the team for gateway', 'the keys stay');

SELECT is(get_user_allow_gateway_fallback(id), true, format('the fallback is allowed for %s, who has not chosen', name)) FROM owner;
INSERT INTO user_settings (user_id) VALUES (:b);
SELECT is(get_user_allow_gateway_fallback(:b), true, 'and for one with the defaults');
INSERT INTO user_settings (user_id, allow_gateway_fallback, updated_at) VALUES (:a, false, '2000-01-01');
SELECT is(get_user_allow_gateway_fallback(:a), false, 'but not for one who does not want it');
SELECT is(get_user_allow_gateway_fallback(:b), true, 'which is nothing to another');
SELECT is(get_user_allow_gateway_fallback(NULL), true, 'or to the team');
UPDATE user_settings SET allow_gateway_fallback = true, updated_at = '2000-01-01' WHERE user_id = :a;
SELECT is((SELECT updated_at FROM user_settings WHERE user_id = :a), now(), 'updated_at is the time of the change, whatever is said');
DELETE FROM user_settings;
DELETE FROM api_gateway_configs;

-- ── Whose key serves a model ──

-- Nobody's key opens: what is decrypted on the way would raise an error.
UPDATE api_keys SET api_key_encrypted = decode(repeat('00', 28), 'hex');
DELETE FROM api_keys WHERE user_id IS NOT DISTINCT FROM :a OR user_id IS NULL;
SELECT upsert_user_gateway_config(:b, 'https://b.example');

CREATE FUNCTION pg_temp.given(users text, teams text, fallback boolean) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM api_keys WHERE user_id IS NULL OR user_id = 'aaaaaaaa-0000-4000-8000-000000000001';
    DELETE FROM api_gateway_configs WHERE user_id IS NULL OR user_id = 'aaaaaaaa-0000-4000-8000-000000000001';
    DELETE FROM user_settings;
    INSERT INTO api_keys (user_id, service, api_key_encrypted)
        SELECT 'aaaaaaaa-0000-4000-8000-000000000001'::uuid, s, decode(repeat('00', 28), 'hex') FROM string_to_table(users, ' ') AS s WHERE s NOT IN ('url', '') UNION ALL
        SELECT NULL, s, decode(repeat('00', 28), 'hex') FROM string_to_table(teams, ' ') AS s WHERE s NOT IN ('url', '');
    INSERT INTO api_gateway_configs (user_id, base_url)
        SELECT 'aaaaaaaa-0000-4000-8000-000000000001'::uuid, 'https://a.example' WHERE users ~ '\murl\M' UNION ALL
        SELECT NULL, 'https://team.example' WHERE teams ~ '\murl\M';
    INSERT INTO user_settings (user_id, allow_gateway_fallback)
        SELECT 'aaaaaaaa-0000-4000-8000-000000000001', fallback WHERE fallback IS NOT NULL;
    INSERT INTO user_settings (user_id, allow_gateway_fallback) VALUES ('bbbbbbbb-0000-4000-8000-000000000002', NOT coalesce(fallback, true));
END
$$;
-- The row, or the error without its hint.
CREATE FUNCTION pg_temp.resolved(owner uuid, model text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    RETURN (SELECT concat_ws(' ', r.provider, r.model, r.source, r.service, coalesce(r.base_url, '-')) FROM resolve_provider(owner, resolved.model) r);
EXCEPTION WHEN OTHERS THEN
    RETURN SQLSTATE || ': ' || SQLERRM;
END
$$;
CREATE FUNCTION pg_temp.resolved_given(users text, teams text, fallback boolean, model text) RETURNS text LANGUAGE sql
AS $$ SELECT pg_temp.given(users, teams, fallback); SELECT pg_temp.resolved('aaaaaaaa-0000-4000-8000-000000000001', model) $$;

SELECT is(pg_temp.resolved_given(users, teams, fallback, 'gpt-4o'), resolved, format('user: %s; team: %s; fallback %s', users, teams, coalesce(fallback::text, 'not chosen')))
  FROM (VALUES
    ('gateway url openai openrouter', 'gateway url openai openrouter', NULL, 'openai openai/gpt-4o gateway gateway https://a.example'),
    ('gateway url', 'gateway url openai', false, 'openai openai/gpt-4o gateway gateway https://a.example'),
    ('gateway openai openrouter', 'gateway url', NULL, 'openai gpt-4o user openai -'),
    ('url openai', 'gateway url', NULL, 'openai gpt-4o user openai -'),
    ('openai anthropic xai', 'gateway url', false, 'openai gpt-4o user openai -'),
    ('openrouter anthropic', 'gateway url openai', true, 'openai openai/gpt-4o user openrouter -'),
    ('anthropic xai', 'gateway url openai', NULL, 'openai openai/gpt-4o team gateway https://team.example'),
    ('gateway', 'gateway url openai', true, 'openai openai/gpt-4o team gateway https://team.example'),
    ('gateway', 'url openai', true, 'openai gpt-4o team openai -'),
    ('url', 'gateway openai openrouter', NULL, 'openai gpt-4o team openai -'),
    ('', 'openrouter', NULL, 'openai openai/gpt-4o team openrouter -'),
    ('', 'gateway url openai', false, '55000: the user has no key for openai, and fallback to the team''s keys is off'),
    ('gateway anthropic', 'openai', false, '55000: the user has no key for openai, and fallback to the team''s keys is off'),
    ('', '', false, '55000: the user has no key for openai, and fallback to the team''s keys is off'),
    ('', '', NULL, '55000: neither the user nor the team has a key for openai'),
    ('gateway', 'url', true, '55000: neither the user nor the team has a key for openai')) AS t (users, teams, fallback, resolved);

-- The same, said in another way, for everything that can be there.
CREATE FUNCTION pg_temp.expected(users text[], teams text[], fallback boolean, model text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    provider text := CASE model WHEN 'gpt-4o' THEN 'openai' ELSE 'openrouter' END;
    full_name text := CASE model WHEN 'gpt-4o' THEN 'openai/gpt-4o' ELSE model END;
BEGIN
    IF users @> '{gateway,url}' THEN
        RETURN format('%s %s gateway gateway https://a.example', provider, full_name);
    ELSIF users @> ARRAY[provider] THEN
        RETURN format('%s %s user %s -', provider, model, provider);
    ELSIF users @> '{openrouter}' THEN
        RETURN format('%s %s user openrouter -', provider, full_name);
    ELSIF NOT coalesce(fallback, true) THEN
        RETURN format('55000: the user has no key for %s, and fallback to the team''s keys is off', provider);
    ELSIF teams @> '{gateway,url}' THEN
        RETURN format('%s %s team gateway https://team.example', provider, full_name);
    ELSIF teams @> ARRAY[provider] THEN
        RETURN format('%s %s team %s -', provider, model, provider);
    ELSIF teams @> '{openrouter}' THEN
        RETURN format('%s %s team openrouter -', provider, full_name);
    END IF;
    RETURN format('55000: neither the user nor the team has a key for %s', provider);
END
$$;
CREATE TEMP TABLE possession AS
    SELECT array_remove(ARRAY[CASE WHEN n & 1 > 0 THEN 'gateway' END, CASE WHEN n & 2 > 0 THEN 'url' END, CASE WHEN n & 4 > 0 THEN 'openai' END,
                              CASE WHEN n & 8 > 0 THEN 'openrouter' END, 'xai'], NULL) AS has
      FROM generate_series(0, 15) AS n;
CREATE TEMP TABLE decision AS
    SELECT u.has AS users, t.has AS teams, fallback, model,
           pg_temp.resolved_given(array_to_string(u.has, ' '), array_to_string(t.has, ' '), fallback, model) AS found
      FROM possession u, possession t, unnest(ARRAY[NULL, true, false]) AS fallback, unnest(ARRAY['gpt-4o', 'meta-llama/llama-4']) AS model;
SELECT is((SELECT count(*) FROM decision), 1536::bigint, 'there are 1536 cases');
SELECT is_empty('SELECT *, pg_temp.expected(users, teams, fallback, model) FROM decision WHERE found <> pg_temp.expected(users, teams, fallback, model)',
                'each is decided in that order');

SELECT pg_temp.given('gateway url openai', 'gateway openai', false);
SELECT is(pg_temp.resolved(NULL, 'gpt-4o'), 'openai gpt-4o team openai -', 'for nobody the team''s keys serve, and nobody''s choice forbids it');
SELECT is(pg_temp.resolved(NULL, 'claude-3'), '55000: the team has no key for anthropic', 'and no user''s');
SELECT pg_temp.given('openai anthropic xai', '', NULL);
SELECT is(pg_temp.resolved(:a, model), resolved, format('the model %L', model))
  FROM (VALUES
    ('gpt-4o-mini', 'openai gpt-4o-mini user openai -'), (' GPT-5 ', 'openai GPT-5 user openai -'), ('chatgpt-4o-latest', 'openai chatgpt-4o-latest user openai -'),
    ('o1', 'openai o1 user openai -'), ('o3-mini', 'openai o3-mini user openai -'), ('o4-mini', 'openai o4-mini user openai -'),
    ('text-embedding-3-small', 'openai text-embedding-3-small user openai -'), ('dall-e-3', 'openai dall-e-3 user openai -'),
    ('claude-sonnet-4-5', 'anthropic claude-sonnet-4-5 user anthropic -'), ('grok-4', 'xai grok-4 user xai -'),
    ('openai/gpt-4o', 'openai gpt-4o user openai -'), ('Anthropic/claude-3', 'anthropic claude-3 user anthropic -'), ('xai/grok-4', 'xai grok-4 user xai -'),
    ('openai/made-up', 'openai made-up user openai -'),
    ('meta-llama/llama-4', '55000: neither the user nor the team has a key for openrouter'),
    ('x-ai/grok-4', '55000: neither the user nor the team has a key for openrouter')) AS t (model, resolved);
SELECT is(pg_temp.error_of(format('SELECT * FROM resolve_provider(%L, %L)', :a, model)),
          '22023: the provider of p_model is not known | Put it in front, as in openai/gpt-4o or meta-llama/llama-4 (by way of OpenRouter); gpt-…, o3…, claude… and grok… need none.',
          format('the model %L is refused', left(model, 40)))
  FROM unnest(ARRAY[NULL, '', ' ', 'llama-4', '/', 'openai/', '/gpt-4', 'gpt-4 o', E'gpt\n-4', 'sk-verysecret', 'gpt-' || repeat('4', 200)]) AS model;

\set any_model 'A key for openrouter serves any model, and so does one for gateway once upsert_user_gateway_config has set where it is.'
SELECT pg_temp.given('', '', false);
SELECT is(pg_temp.error_of(format('SELECT * FROM resolve_provider(%L, ''grok-4'')', :a)),
          format('55000: the user has no key for xai, and fallback to the team''s keys is off | insert_user_api_key(%L, ''xai'', …) adds one, user_settings.allow_gateway_fallback = true allows the team''s. %s', :a, :'any_model'),
          'where nothing serves a model, the error says what is missing and how to add it');
SELECT pg_temp.given('', '', true);
SELECT is(pg_temp.error_of(format('SELECT * FROM resolve_provider(%L, ''grok-4'')', :a)),
          format('55000: neither the user nor the team has a key for xai | insert_user_api_key(%L, ''xai'', …) adds the user''s, insert_user_api_key(NULL, ''xai'', …) the team''s. %s', :a, :'any_model'),
          'for the user and the team');
SELECT is(pg_temp.error_of('SELECT * FROM resolve_provider(NULL, ''grok-4'')'),
          format('55000: the team has no key for xai | insert_user_api_key(NULL, ''xai'', …) adds one. %s', :'any_model'), 'or the team alone');
RESET ROLE;
DELETE FROM api_keys;
DELETE FROM api_gateway_configs;
DELETE FROM user_settings;

-- ── Who may call ──

CREATE TEMP TABLE call (name text, good text, bad text);
INSERT INTO call VALUES
    ('insert_user_api_key', 'insert_user_api_key(%1$L, ''openai'', ''key'') IS NOT NULL', 'insert_user_api_key(NULL, ''mistral'', NULL)'),
    ('get_user_api_key', 'get_user_api_key(%1$L, ''openai'') = ''key''', 'get_user_api_key(NULL, ''mistral'')'),
    ('touch_user_api_key', 'touch_user_api_key(%1$L, ''openai'') IS NULL', 'touch_user_api_key(NULL, ''mistral'')'),
    ('upsert_user_gateway_config', 'upsert_user_gateway_config(%1$L, ''https://a.example'') IS NULL', 'upsert_user_gateway_config(NULL, NULL)'),
    ('get_user_gateway_base_url', 'get_user_gateway_base_url(%1$L) = ''https://a.example''', 'get_user_gateway_base_url(NULL)'),
    ('get_user_allow_gateway_fallback', 'get_user_allow_gateway_fallback(%1$L)', 'get_user_allow_gateway_fallback(NULL)'),
    ('resolve_provider', '(SELECT r.source = CASE WHEN %1$L IS NULL THEN ''team'' ELSE ''user'' END FROM resolve_provider(%1$L, ''gpt-4o'') r)', 'resolve_provider(NULL, NULL)'),
    ('delete_user_gateway_config', 'delete_user_gateway_config(%1$L) IS NULL', 'delete_user_gateway_config(NULL)'),
    ('delete_user_api_key', 'delete_user_api_key(%1$L, ''openai'')', 'delete_user_api_key(NULL, ''mistral'')');
GRANT SELECT ON call TO PUBLIC;
SELECT set_eq($$SELECT p.proname::text FROM pg_proc p WHERE p.pronamespace = (SELECT extnamespace FROM pg_extension WHERE extname = 'nexus_hub')
                    AND pg_get_functiondef(p.oid) LIKE '%require_service_role%'$$, 'SELECT name FROM call', 'all functions that are for the service role alone are called below');

CREATE ROLE nexus_hub_test_bypass NOLOGIN BYPASSRLS;
CREATE ROLE nexus_hub_test_owner NOLOGIN;
CREATE ROLE nexus_hub_test_plain NOLOGIN;
CREATE ROLE nexus_hub_test_rich NOLOGIN;
CREATE ROLE nexus_hub_test_heir NOLOGIN INHERIT IN ROLE service_role;
CREATE ROLE nexus_hub_test_member NOLOGIN NOINHERIT IN ROLE service_role;
GRANT USAGE ON SCHEMA :"schema" TO anon, nexus_hub_test_bypass, nexus_hub_test_owner, nexus_hub_test_plain, nexus_hub_test_rich, nexus_hub_test_heir, nexus_hub_test_member;
GRANT USAGE ON SCHEMA _nexus_hub TO nexus_hub_test_rich;
GRANT ALL ON api_keys, api_gateway_configs, user_settings TO nexus_hub_test_bypass, nexus_hub_test_rich;
GRANT EXECUTE ON FUNCTION encrypt_token(text, text), _nexus_hub.open_secret(bytea, text, text), _nexus_hub.api_key_object(uuid, text), _nexus_hub.api_key_context(uuid, text), _nexus_hub.api_service(text), _nexus_hub.api_key(text),
        _nexus_hub.model_provider(text), _nexus_hub.model_name(text, text), _nexus_hub.no_api_key(text, uuid, boolean)
   TO nexus_hub_test_bypass, nexus_hub_test_owner, nexus_hub_test_rich;

CREATE FUNCTION pg_temp.error_as(role text, statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    error text;
BEGIN
    PERFORM pg_temp.as_role(role);
    BEGIN
        EXECUTE statement;
        error := 'no error';
    EXCEPTION WHEN OTHERS THEN
        error := SQLSTATE || ': ' || SQLERRM;
    END;
    RESET ROLE;
    RETURN error;
END
$$;
SELECT insert_user_api_key(:a, 'openai', 'key'), insert_user_api_key(NULL, 'openai', 'key'), upsert_user_gateway_config(:a, 'https://a.example');
SELECT is(pg_temp.error_as(role, 'SELECT ' || statement), '42501: Must be called as service role', format('%s is told so: %s', role, statement))
  FROM unnest(ARRAY['anon', 'authenticated', 'nexus_hub_test_plain', 'nexus_hub_test_rich', 'nexus_hub_test_member']) AS role, call,
       LATERAL (VALUES (format(good, :a)), (format(good, :b)), (format(good, NULL)), (bad)) AS t (statement);
SELECT set_eq('SELECT user_id, service FROM api_keys', format('VALUES (%L::uuid, ''openai''), (NULL, ''openai'')', :a), 'and has changed nothing');
SELECT is(left(pg_temp.error_as('authenticated', 'SET LOCAL row_security = off; SELECT get_user_api_key(NULL, ''openai'')'), 6), '42501:',
          'row_security = off makes no service role of a user');
SET LOCAL row_security = on;
SELECT pg_temp.as_role('authenticated');
SELECT set_config('request.jwt.claims', '{"role": "service_role"}', true);
SELECT is(pg_temp.error_of('SELECT get_user_api_key(NULL, ''openai'')'),
          '42501: Must be called as service role | Call it as the role service_role: over PostgREST, with a JWT whose role is service_role.',
          'nor does a claim; the hint says how to call');
SELECT is(pg_temp.error_of('SELECT count(*) FROM (SELECT get_user_api_key(NULL, ''openai'') IS NULL AS is_null OFFSET 0) AS t WHERE is_null'),
          pg_temp.error_of('SELECT get_user_api_key(NULL, ''openai'')'), 'also from within a query that only counts');
RESET ROLE;
DELETE FROM api_keys;
DELETE FROM api_gateway_configs;

CREATE FUNCTION pg_temp.result_as(role text, statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    result text;
BEGIN
    PERFORM set_config('role', role, true);
    BEGIN
        EXECUTE 'SELECT ' || statement INTO result;
    EXCEPTION WHEN OTHERS THEN
        result := SQLSTATE || ': ' || SQLERRM;
    END;
    RESET ROLE;
    RETURN result;
END
$$;
-- In their order: from a key's insertion to its deletion.
CREATE FUNCTION pg_temp.may_call_all(role text) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    c record;
    owner uuid;
BEGIN
    FOREACH owner IN ARRAY ARRAY['aaaaaaaa-0000-4000-8000-000000000001', NULL]::uuid[] LOOP
        FOR c IN SELECT * FROM pg_temp.call ORDER BY ctid LOOP
            RETURN NEXT is(pg_temp.result_as(role, format(c.good, owner)), 'true', format('%s may call %s for %s', role, c.name, coalesce('a user ' || owner, 'the team')));
        END LOOP;
    END LOOP;
    RETURN NEXT is_empty('SELECT FROM api_keys UNION ALL SELECT FROM api_gateway_configs', role || ' leaves nothing behind');
END
$$;
SELECT pg_temp.may_call_all('service_role');
SELECT pg_temp.may_call_all('nexus_hub_test_heir');
SELECT pg_temp.may_call_all('nexus_hub_test_bypass');
SELECT pg_temp.may_call_all('none');
ALTER TABLE api_keys OWNER TO nexus_hub_test_owner;
ALTER TABLE api_gateway_configs OWNER TO nexus_hub_test_owner;
ALTER TABLE user_settings OWNER TO nexus_hub_test_owner;
SELECT pg_temp.may_call_all('nexus_hub_test_owner');
ALTER TABLE api_keys FORCE ROW LEVEL SECURITY;
SELECT is(pg_temp.error_as('nexus_hub_test_owner', 'SELECT get_user_api_key(NULL, ''openai'')'), '42501: Must be called as service role',
          'an owner who wants to be held by row-level security is');
ALTER TABLE api_keys NO FORCE ROW LEVEL SECURITY;
ALTER TABLE api_keys OWNER TO CURRENT_USER;
ALTER TABLE api_gateway_configs OWNER TO CURRENT_USER;
ALTER TABLE user_settings OWNER TO CURRENT_USER;

-- ── Rotation ──

-- The shared cluster's key, and another.
\set cluster_key '''00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff'''
\set new_key '''2222222222222222222222222222222222222222222222222222222222222222'''
SELECT insert_user_api_key(:a, 'openai', 'key of a'), insert_user_api_key(:b, 'openai', 'key of b'), insert_user_api_key(NULL, 'gateway', 'key of the team');
UPDATE api_keys SET service = 'xai' WHERE user_id = :b;
DROP TABLE before;
CREATE TEMP TABLE before AS SELECT * FROM api_keys;
SELECT set_config('app.vault_old_key', :cluster_key, true), set_config('app.vault_new_key', :new_key, true);
SELECT results_eq('SELECT servers_updated, errors FROM rotate_vault_key()',
                  format($$SELECT 0, ARRAY[format('API key %%s: the value cannot be decrypted', id)] FROM api_keys WHERE user_id = %L$$, :b),
                  'rotate_vault_key encrypts API keys anew, too, and tells which it cannot');
SELECT set_eq('SELECT user_id FROM api_keys k JOIN before b USING (id, user_id) WHERE k.api_key_encrypted <> b.api_key_encrypted', format('VALUES (%L::uuid)', :a),
              'a user''s key is under the new key');
SELECT is(pg_temp.error_of(format('SELECT get_user_api_key(%L, %L)', owner, name)), :unopenable, 'the old key opens it no more: ' || name)
  FROM (VALUES (:a, 'openai'), (NULL, 'gateway')) AS t (owner, name);
SELECT set_config('app.vault_old_key', :new_key, true), set_config('app.vault_new_key', :cluster_key, true);
SELECT is(cardinality(errors), 1, 'with the keys exchanged it goes back') FROM rotate_vault_key();
SELECT is(get_user_api_key(:a, 'openai'), 'key of a', 'the user''s key opens as before');
SELECT is(get_user_api_key(NULL, 'gateway'), 'key of the team', 'and so does the team''s');
SELECT is_empty('SELECT to_jsonb(k) - ''api_key_encrypted'' FROM api_keys k EXCEPT SELECT to_jsonb(b) - ''api_key_encrypted'' FROM before b', 'nothing else has changed');
DELETE FROM api_keys;

-- ── After a breach: what the runbook runs, for the vault of this extension ──

SELECT insert_user_api_key(:a, 'openai', 'key'), insert_user_api_key(NULL, 'openai', 'key'), upsert_user_gateway_config(NULL, 'https://team.example');
INSERT INTO user_settings (user_id, allow_gateway_fallback) VALUES (:a, false), (:b, true);
SELECT pg_temp.as_role('service_role');
SELECT lives_ok(statement, 'service_role may: ' || statement)
  FROM unnest(ARRAY['DELETE FROM api_keys', 'UPDATE user_settings SET allow_gateway_fallback = true', 'DELETE FROM api_gateway_configs']) AS statement;
SELECT is_empty('SELECT FROM api_keys UNION ALL SELECT FROM api_gateway_configs', 'no keys and gateways are left');
SELECT set_eq('SELECT user_id, allow_gateway_fallback FROM user_settings', format('VALUES (%L::uuid, true), (%L, true)', :a, :b), 'and all users may fall back to the team''s');
SELECT is(pg_temp.resolved(:a, 'gpt-4o'), '55000: neither the user nor the team has a key for openai', 'which has none until it gets a new one');
SELECT insert_user_api_key(NULL, 'openai', 'new key');
SELECT is(pg_temp.resolved(:a, 'gpt-4o'), 'openai gpt-4o team openai -', 'and then serves');

RESET ROLE;
SELECT * FROM finish();
ROLLBACK;
