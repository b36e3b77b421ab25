-- What is sealed comes back, and what cannot be opened says so without telling anything.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

-- "SQLSTATE: message | detail | hint" of a statement, and with_context all that the client gets to see.
CREATE FUNCTION pg_temp.error_of(statement text, with_context boolean DEFAULT false) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    state text; message text; detail text; hint text; context text;
BEGIN
    EXECUTE statement;
    RETURN 'no error';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL,
        hint = PG_EXCEPTION_HINT, context = PG_EXCEPTION_CONTEXT;
    RETURN concat_ws(' | ', state || ': ' || message, nullif(detail, ''), nullif(hint, ''), CASE WHEN with_context THEN context END);
END
$$;
-- What a config comes back as, or the error.
CREATE FUNCTION pg_temp.round_trip(config jsonb) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    RETURN decrypt_config(encrypt_config(config, 'c'), 'c');
EXCEPTION WHEN OTHERS THEN
    RETURN format('%s: %s', SQLSTATE, SQLERRM);
END
$$;
CREATE TEMP TABLE sealed AS
    SELECT encrypt_token('token') AS plain, encrypt_token('token', 'row 1') AS bound;

-- ── NULL, lengths, texts ──

SELECT is(encrypt_token(NULL, 'c'), NULL, 'encrypt_token: NULL in, NULL out');
SELECT is(decrypt_token(NULL, 'c'), NULL, 'decrypt_token: NULL in, NULL out');
SELECT is(encrypt_config(NULL, 'c'), NULL, 'encrypt_config: NULL in, NULL out');
SELECT is(decrypt_config(NULL, 'c'), NULL, 'decrypt_config: NULL in, NULL out');

SELECT ok(decrypt_token(encrypt_token(token)) = token AND decrypt_token(encrypt_token(token, context), context) = token,
          format('comes back with and without a context: %s', name))
  FROM (VALUES ('an ASCII text', 'sk-123', 'row 1'),
               ('an empty text', '', 'row 1'),
               ('a text of many scripts', E'Grüße, мир, 世界, 🗝️ \u200d\u0301', 'Zeile ü 🗝️'),
               ('quotes, back-slashes, line ends', E'a''"\\\\\\u0000\r\n\t\x7f', E'''\\\n'),
               ('1 MB of text', repeat('0123456789abcdef', 65536), repeat('c', 100000))) AS t (name, token, context);
SELECT is(octet_length(encrypt_token(token)), octet_length(token) + 28, format('a ciphertext is 28 bytes longer than its %s bytes', octet_length(token)))
  FROM (VALUES (''), ('a'), ('äöü'), (repeat('x', 1000))) AS t (token);
SELECT is((SELECT count(DISTINCT encrypt_token('same', 'same')) FROM generate_series(1, 100)), 100::bigint,
          'a text sealed again is another ciphertext each time');
SELECT is((SELECT count(DISTINCT substr(encrypt_token('same'), 1, 12)) FROM generate_series(1, 100)), 100::bigint,
          'no IV is used twice');
SELECT is(position('token'::bytea IN plain), 0, 'the text cannot be read in its ciphertext') FROM sealed;

-- ── Configs ──

SELECT is(left(pg_temp.round_trip(config), 500), left(config::text, 500), format('comes back as it was: %s', left(config::text, 60)))
  FROM (VALUES ('{"url": "https://host/mcp", "headers": {"Authorization": "Bearer t"}, "timeout_ms": 30000}'::jsonb),
               ('{"price": 1.10, "big": 123456789012345678901234567890, "small": 0.00000000000000000001}'),
               ('{"ü": "世界 🗝️", "escapes": "\" \\ \n \t", "path": "C:\\users\\u00e4"}'),
               ('[]'), ('{}'), ('"text"'), ('1.10'), ('true'), ('null'),
               (('[' || repeat('[', 200) || repeat(']', 200) || ']')::jsonb),
               ('{"a back-slash and u0000": "\\u0000"}'),
               ('{"a half pair in letters": "\\ud800"}'),
               ('{"back-slash u": "\\u", "beyond a double": 1e400}'),
               (('{"back-slash u": "\\u", "deep": ' || repeat('[', 200) || repeat(']', 200) || '}')::jsonb)) AS t (config);
SELECT isnt(encrypt_config('null'), NULL, 'a JSON null is a value, and sealed');
SELECT is(decrypt_token(encrypt_config('{"a":1.10}')), '{"a": 1.10}', 'a config is a token that holds JSON');
SELECT is(decrypt_config(encrypt_token(' {"b" : 1, "a":"\u00e4\ud83d\udddd"} ')), '{"a": "ä🗝", "b": 1}', 'any JSON text opens as a config');

CREATE TEMP TABLE not_json AS
    SELECT name, text, encrypt_token(text) AS sealed
      FROM (VALUES ('a bare token', 'sk-verysecret'), ('an empty text', ''), ('broken JSON', '{"token": "sk-verysecret"'),
                   ('two values', '"sk-verysecret" 1'), ('a zero character', '{"token": "sk-verysecret\u0000"}'),
                   ('half a pair', '{"token": "sk-verysecret\ud800"}'), ('a control character', E'{"token": "sk-verysecret\n"}'),
                   ('beyond jsonb: a number', '{"token": "sk-verysecret", "n": 1e200000}'),
                   ('beyond jsonb: nesting', '{"token": "sk-verysecret", "n": ' || repeat('[', 1000000) || repeat(']', 1000000) || '}')) AS t (name, text);
SELECT is(pg_temp.error_of(format('SELECT decrypt_config(sealed) FROM pg_temp.not_json WHERE name = %L', name)),
          '22023: the decrypted value is not JSON | decrypt_token opens values that are plain text.',
          format('decrypt_config refuses %s', name))
  FROM not_json WHERE name NOT LIKE 'beyond jsonb:%';
SELECT is(position('sk-verysecret' IN pg_temp.error_of(format('SELECT decrypt_config(sealed) FROM pg_temp.not_json WHERE name = %L', name), true)), 0,
          format('decrypt_config quotes nothing of it: %s', name))
  FROM not_json;

-- ── What cannot be opened ──

SELECT is(decrypt_token(bound, 'row 1'), 'token', 'the context of the sealing opens') FROM sealed;
CREATE TEMP VIEW unopenable AS
    SELECT 'another context' AS name, bound AS value, 'row 2' AS context FROM sealed UNION ALL
    SELECT 'no context', bound, NULL FROM sealed UNION ALL
    SELECT 'a context too many', plain, 'row 1' FROM sealed UNION ALL
    SELECT format('bit %s flipped', bit), set_bit(plain, bit, 1 - get_bit(plain, bit)), NULL
      FROM sealed, generate_series(0, octet_length(plain) * 8 - 1) AS bit UNION ALL
    SELECT format('truncated to %s bytes', length), substr(plain, 1, length), NULL
      FROM sealed, generate_series(28, octet_length(plain) - 1) AS length UNION ALL
    SELECT 'a byte too many', plain || '\x00', NULL FROM sealed UNION ALL
    SELECT 'two in one', plain || plain, NULL FROM sealed UNION ALL
    SELECT 'not ours', decode(repeat('5a', length), 'hex'), NULL FROM unnest(ARRAY[28, 29, 100, 100000]) AS length;
SELECT results_eq(
    $$SELECT DISTINCT pg_temp.error_of(format('SELECT decrypt_token(%L::bytea, %L)', value, context)) FROM unopenable$$,
    $$VALUES ('22000: the value cannot be decrypted | No vault key opens it with this context: it was encrypted under another key or context, or was changed. | Check that every key still in use is in the vault key file, and that the context is the one given to encrypt.')$$,
    'wrong context, flipped bit, truncated, foreign: one and the same error');
SELECT is(
    (SELECT string_agg(DISTINCT pg_temp.error_of(format('SELECT decrypt_config(%L::bytea, %L)', value, context)), E'\n') FROM unopenable),
    (SELECT pg_temp.error_of('SELECT decrypt_token(bound) FROM sealed')),
    'decrypt_config raises that error too');
SELECT is(
    (SELECT count(*) FROM generate_series(0, 27) AS length
      WHERE pg_temp.error_of(format('SELECT decrypt_token(%L::bytea)', substr(plain, 1, length)))
            = format('22023: the value is too short to be a ciphertext | It has %s bytes; a ciphertext has at least 28: 12 of IV and 16 of authentication tag.', length)),
    28::bigint, 'what is shorter than 28 bytes is called too short')
  FROM sealed;
SELECT throws_ok('SELECT decrypt_config(''\x00'')', '22023', 'the value is too short to be a ciphertext', 'decrypt_config calls it so too');

-- ── The key ──

SELECT is_empty($$SELECT name FROM pg_settings WHERE name ~ 'nexus_hub|vault' AND setting ~* '[0-9a-f]{64}'$$, 'no setting shows a key');

SELECT * FROM finish();
ROLLBACK;
