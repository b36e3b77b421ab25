-- What the limiters answer, to good arguments and bad ones. Concurrency, windows and kills are in tests/blackbox.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

CREATE FUNCTION pg_temp.error_of(statement text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    hint text;
BEGIN
    EXECUTE statement;
    RETURN 'no error';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS hint = PG_EXCEPTION_HINT;
    RETURN format('%s: %s%s', SQLSTATE, SQLERRM, CASE WHEN hint <> '' THEN ' (with a hint)' END);
END
$$;
-- How many of so many calls were allowed; counted by a limit that is the same in every minute.
CREATE FUNCTION pg_temp.allowed(server text, user_id uuid, call_limit integer, calls integer) RETURNS bigint LANGUAGE sql AS $$
    SELECT count(*) FILTER (WHERE check_rate_limit(server, user_id, call_limit)) FROM generate_series(1, calls)
$$;
-- Not so late in a minute that it ends among the calls.
CREATE FUNCTION pg_temp.early_in_a_minute() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF extract(second FROM clock_timestamp()) > 20 THEN
        PERFORM pg_sleep(60.1 - extract(second FROM clock_timestamp()));
    END IF;
END
$$;

-- ── check_rate_limit ──

SELECT pg_temp.early_in_a_minute();
SELECT date_trunc('minute', clock_timestamp()) AS minute \gset
SELECT is(pg_temp.allowed('exact', NULL, 5, 20), 5::bigint, 'as many calls as the limit, and no more');
SELECT is(pg_temp.allowed('exact', '00000000-0000-0000-0000-000000000000', 5, 20), 5::bigint, 'no user is not the user of zeros');
SELECT is(pg_temp.allowed('exact', 'a11ce000-0000-4000-8000-000000000001', 5, 20), 5::bigint, 'each user has calls of their own');
SELECT is(pg_temp.allowed('Exact', NULL, 5, 20), 5::bigint, 'and each server; case counts');
SELECT is(pg_temp.allowed(repeat('x', 300) || n, NULL, 2, 3), 2::bigint, 'also with long names that end differently') FROM generate_series(1, 3) AS n;
SELECT is(pg_temp.allowed(repeat('ü', 10000000), NULL, 2, 3), 2::bigint, 'and with 20 MB of name');
SELECT is(pg_temp.allowed(name, NULL, 2, 3), 2::bigint, format('and with %s', name)) FROM unnest(ARRAY[' ', 'a b', '世界 🗝️', E'\n', '''; --']) AS name;
-- However a text or a user comes: as a constant, with a short header, compressed, stored elsewhere, built anew.
CREATE TEMPORARY TABLE named (how text, name text, user_id uuid);
ALTER TABLE named ALTER name SET STORAGE EXTERNAL;
INSERT INTO named VALUES ('short', 'stored', 'a11ce000-0000-4000-8000-000000000001'), ('elsewhere', repeat('stored', 1000), NULL);
ALTER TABLE named ALTER name SET STORAGE EXTENDED;
INSERT INTO named VALUES ('compressed', repeat('stored', 1000), NULL);
SELECT is(check_rate_limit(name, user_id, 100), true, how) FROM named;
SELECT is(check_rate_limit('stored', 'a11ce000-0000-4000-8000-000000000001', 100), true, 'the same as a constant');
SELECT is(check_rate_limit(format('%s', 'stored'), user_id, 100), true, 'and built') FROM named WHERE how = 'short';
SELECT is(check_rate_limit(repeat('stored', 1000), NULL, 100), true, 'a long one that is built');
SELECT set_eq($$SELECT left(server_id, 12), user_id, request_count FROM rate_limit_tracking WHERE server_id LIKE 'stored%'$$,
              $$VALUES ('stored', 'a11ce000-0000-4000-8000-000000000001'::uuid, 3), ('storedstored', NULL, 3)$$, 'is the same key in any form');
SELECT is(pg_temp.allowed(repeat('y', length), user_id, 2, 3), 2::bigint, format('a name of %s bytes', length))
  FROM unnest(ARRAY[1, 183, 184, 185, 199, 200, 201]) AS length, unnest(ARRAY[NULL, 'a11ce000-0000-4000-8000-000000000002']::uuid[]) AS user_id;
SELECT is((SELECT count(*) FROM rate_limit_tracking WHERE server_id ~ '^y+(…|$)' AND request_count = 3), 14::bigint, 'of each length and user one');
SELECT is(pg_temp.allowed('limit ' || call_limit, NULL, call_limit, 3), 0::bigint, format('a limit of %s allows nothing', call_limit))
  FROM unnest(ARRAY[0, -1, -2147483648]) AS call_limit;
SELECT is(pg_temp.allowed('limit max', NULL, 2147483647, 100), 100::bigint, 'the highest limit allows');
SELECT is(check_rate_limit('exact', NULL, 21), true, 'a call counts by the limit that it brings');
SELECT is((SELECT request_count FROM rate_limit_tracking WHERE server_id = 'exact' AND user_id IS NULL), 21, 'denied calls are counted, too');
SELECT is((SELECT request_count FROM rate_limit_tracking WHERE server_id = 'limit 0'), 3, 'and those that no limit would allow');
SELECT is((SELECT count(*) FROM rate_limit_tracking WHERE server_id LIKE 'xxx%' AND length(server_id) < 250 AND request_count = 3), 3::bigint,
          'long names are shown by their beginnings and a hash');
SELECT is((SELECT window_start FROM rate_limit_tracking WHERE server_id = 'limit 0'), :'minute'::timestamptz, 'a window is a clock minute');
SELECT is(reset_server_rate_limit('exact', NULL), true, 'the running minute can be reset');
SELECT is(reset_server_rate_limit('exact', NULL), false, 'once');
SELECT is(pg_temp.allowed('exact', NULL, 5, 20), 5::bigint, 'and begins anew');
SELECT is(reset_server_rate_limit('never seen', NULL), false, 'where there is nothing, nothing is reset');

-- ── rate_limit ──

SELECT results_eq($$SELECT r.allowed, r."limit", r.remaining, r.retry_after_seconds > 0, ceil(r.reset_seconds / 20)
                      FROM generate_series(1, 4) AS n, LATERAL rate_limit(left('gcra' || n, 4), 3) AS r$$,
                  $$VALUES (true, 3, 2, false, 1::float8), (true, 3, 1, false, 2), (true, 3, 0, false, 3), (false, 3, 0, true, 3)$$,
                  'a burst of the limit, then nothing for a while');
SELECT cmp_ok((rate_limit('gcra', 3)).retry_after_seconds, '<=', 20::float8, 'the next call is allowed in a third of the window');
SELECT is((rate_limit_peek('gcra', 3)).allowed, false, 'peek says so');
SELECT is((rate_limit_peek('fresh', 3)).remaining, 2, 'peek says what would be');
SELECT is((rate_limit_peek('fresh', 3)).remaining, 2, 'and charges nothing');
SELECT is((rate_limit('gcra', 3, 61)).remaining, 2, 'another window has a state of its own');
SELECT is(reset_rate_limit('gcra'), true, 'reset forgets both');
SELECT is((rate_limit_peek('gcra', 3, w)).remaining, 2, format('that of %s seconds', w)) FROM unnest(ARRAY[60, 61]) AS w;
SELECT is(reset_rate_limit('gcra'), false, 'and then there is nothing to be reset');
SELECT is(r.remaining, 6, 'a cost counts for as many calls') FROM rate_limit('cost', 10, 86400, 4) AS r;
SELECT is((r.allowed, r.remaining), (false, 6), 'a call that costs too much is charged nothing') FROM rate_limit('cost', 10, 86400, 7) AS r;
SELECT is((r.allowed, r.retry_after_seconds), (false, NULL::float8), 'one that costs more than a burst will never be allowed') FROM rate_limit('cost', 10, 86400, 11) AS r;
SELECT is((r.allowed, r.remaining), (true, 6), 'one that costs nothing always is') FROM rate_limit('cost', 10, 86400, 0) AS r;
SELECT is((r.allowed, r."limit", r.remaining), (true, 10, 1), 'a burst below the limit') FROM rate_limit('burst', 10, 60, 1, 2) AS r;
SELECT is((r.allowed, r.remaining), (true, 19), 'and above it') FROM rate_limit('burst 2', 10, 60, 1, 20) AS r;
SELECT is((r.allowed, r."limit", r.remaining, r.retry_after_seconds), (false, n, 0, NULL::float8), format('a limit of %s allows nothing', n))
  FROM unnest(ARRAY[0, -1, -2147483648]) AS n, rate_limit('none', n) AS r;
SELECT is((r.allowed, r.remaining), (true, 2147483646), 'the highest limit') FROM rate_limit('most', 2147483647) AS r;
SELECT is((r.allowed, r.remaining), (true, 0), 'the longest window') FROM rate_limit('long', 1, 2147483647) AS r;
SELECT is((r.allowed, r.remaining), (true, 0), 'the highest cost') FROM rate_limit('dear', 2147483647, 1, 2147483647) AS r;
SELECT is((rate_limit('check_rate_limit''s', 1)).allowed AND check_rate_limit('check_rate_limit''s', NULL, 1), true, 'a key is no server');
SELECT is((rate_limit(repeat('k', 5000000) || n, 1)).allowed, true, 'large keys are told apart by their ends') FROM generate_series(1, 2) AS n;
SELECT is((rate_limit(repeat('k', 5000000) || 1, 1)).allowed, false, 'and found again');

-- ── rate_limit_all ──

SELECT results_eq($$SELECT key, allowed, "limit", remaining FROM rate_limit_all('{user,address}', '{2,10}', '{86400,86400}')$$,
                  $$VALUES ('user', true, 2, 1), ('address', true, 10, 9)$$, 'all are charged, in order');
SELECT results_eq($$SELECT key, allowed, "limit", remaining FROM rate_limit_all('{user,address}', '{2,10}', '{86400,86400}', '{2,1}')$$,
                  $$VALUES ('user', false, 2, 1), ('address', true, 10, 9)$$, 'or none');
SELECT results_eq($$SELECT key, allowed, "limit", remaining FROM rate_limit_all('{none,address}', '{0,10}', '{86400,86400}')$$,
                  $$VALUES ('none', false, 0, 0), ('address', true, 10, 9)$$, 'also beside a limit of 0');
SELECT is((rate_limit_peek('address', 10, 86400)).remaining, 8, 'which was not charged, indeed');
SELECT results_eq($$SELECT remaining FROM rate_limit_all('{same,same,same}', '{5,10,20}', '{1,60,3600}', '{1,2,3}', '{NULL,4,NULL}')$$,
                  $$VALUES (4), (2), (17)$$, 'policies of one key with different windows, costs and bursts');
SELECT is_empty($$SELECT * FROM rate_limit_all('{}', '{}')$$, 'no policy, no row');
SELECT is((SELECT count(*) FROM rate_limit_all(ARRAY(SELECT 'k' || n FROM generate_series(1, 64) n), array_fill(1, ARRAY[64])) WHERE allowed), 64::bigint, '64 policies');

-- ── Bad arguments ──

SELECT matches(pg_temp.error_of('SELECT ' || call), '^' || error || ' \(with a hint\)$', call)
  FROM (VALUES
    ($$check_rate_limit(NULL, NULL, 1)$$, '22023: p_server_id is NULL'),
    ($$check_rate_limit('', NULL, 1)$$, '22023: p_server_id is empty'),
    ($$check_rate_limit('s', NULL, NULL)$$, '22023: p_limit_per_minute is NULL'),
    ($$reset_server_rate_limit(NULL, NULL)$$, '22023: p_server_id is NULL'),
    ($$reset_rate_limit(NULL)$$, '22023: p_key is NULL'),
    ($$reset_rate_limit('')$$, '22023: p_key is empty'),
    ($$rate_limit(NULL, 1)$$, '22023: p_key is NULL'),
    ($$rate_limit('', 1)$$, '22023: p_key is empty'),
    ($$rate_limit('k', NULL)$$, '22023: p_limit is NULL'),
    ($$rate_limit('k', 1, NULL)$$, '22023: p_window_seconds is NULL'),
    ($$rate_limit('k', 1, 0)$$, '22023: p_window_seconds is 0, and must be at least 1'),
    ($$rate_limit('k', 1, -2147483648)$$, '22023: p_window_seconds is -2147483648, and must be at least 1'),
    ($$rate_limit('k', 1, 60, NULL)$$, '22023: p_cost is NULL'),
    ($$rate_limit('k', 1, 60, -1)$$, '22023: p_cost is -1, and must be at least 0'),
    ($$rate_limit('k', 1, 60, 1, 0)$$, '22023: p_burst is 0, and must be at least 1'),
    ($$rate_limit('k', 1, 2147483647, 1, 2147483647)$$, '22023: the burst takes more than a hundred years to refill'),
    ($$rate_limit_peek('k', 1, 60, -1)$$, '22023: p_cost is -1, and must be at least 0'),
    ($$rate_limit_all(NULL, '{1}')$$, '22023: p_keys is NULL'),
    ($$rate_limit_all('{k}', NULL)$$, '22023: p_limits is NULL'),
    ($$rate_limit_all('{k}', '{1,2}')$$, '22023: p_limits has 2 elements, and p_keys has 1'),
    ($$rate_limit_all('{k}', '{1}', '{}')$$, '22023: p_windows_seconds has 0 elements, and p_keys has 1'),
    ($$rate_limit_all('{NULL}', '{1}')$$, '22023: p_key is NULL'),
    ($$rate_limit_all('{k}', '{NULL}')$$, '22023: p_limit is NULL'),
    ($$rate_limit_all('{k,k}', '{1,2}')$$, '22023: a key is there twice with the same window')) AS t (call, error);
SELECT is(pg_temp.error_of($$SELECT rate_limit_all(array_fill('k'::text, ARRAY[65]), array_fill(1, ARRAY[65]))$$),
          '54000: p_keys has 65 keys, and at most 64 are allowed', 'more policies than one call may have');

-- ── enforce_rate_limits ──

SELECT lives_ok($$SELECT enforce_rate_limits('{burst,"per day"}', '{web,web}', '{2,100}', '{7200,86400}')$$, 'a request within its limits');
SELECT is(current_setting('response.headers')::jsonb,
          '[{"RateLimit-Policy": "\"burst\";q=2;w=7200, \"per day\";q=100;w=86400"}, {"RateLimit": "\"burst\";r=1;t=3600, \"per day\";r=99;t=864"}]',
          'the answer says what is left');
SELECT set_config('response.headers', '[{"X-Mine": "yes"}]', true);
SELECT lives_ok($$SELECT enforce_rate_limits('{burst}', '{web}', '{2}', '{7200}')$$, 'the second');
SELECT is(current_setting('response.headers')::jsonb -> 0, '{"X-Mine": "yes"}', 'fields that are there stay');
SELECT matches(pg_temp.error_of($$SELECT enforce_rate_limits('{burst}', '{web}', '{2}', '{7200}')$$),
               '^PGRST: \{.*"details": "policy \\"burst\\" allows 2 in 7200 seconds"', 'the third is refused, by name');
SELECT is((rate_limit_peek('web', 100, 86400)).remaining, 98, 'and charged to none');
SELECT lives_ok($$SELECT enforce_rate_limits('{}', '{}', '{}')$$, 'no policy, no limit');
SELECT lives_ok($$SELECT enforce_rate_limits('{cost,burst}', '{dear,dear}', '{10,10}', '{86400,86401}', '{4,1}', '{NULL,2}')$$, 'costs and bursts');
SELECT is((rate_limit_peek('dear', 10, 86400, 0)).remaining, 6, 'are charged');
SELECT matches(pg_temp.error_of('SELECT enforce_rate_limits(' || arguments || ')'), '^' || error || ' \(with a hint\)$', arguments)
  FROM (VALUES
    ($$NULL, '{k}', '{1}'$$, '22023: p_policies is NULL'),
    ($$'{p}', NULL, '{1}'$$, '22023: p_keys is NULL'),
    ($$'{p}', '{k}', NULL$$, '22023: p_limits is NULL'),
    ($$'{p,q}', '{k}', '{1}'$$, '22023: p_policies has 2 elements, and p_keys has 1'),
    ($$'{p}', '{k}', '{1,2}'$$, '22023: p_limits has 2 elements, and p_keys has 1'),
    ($$'{NULL}', '{k}', '{1}'$$, '22023: an element of p_policies is NULL'),
    ($$'{""}', '{k}', '{1}'$$, '22023: an element of p_policies is not fit to be a policy''s name'),
    ($$'{é}', '{k}', '{1}'$$, '22023: an element of p_policies is not fit to be a policy''s name'),
    ($$ARRAY[E'a\r\nSet-Cookie: b'], '{k}', '{1}'$$, '22023: an element of p_policies is not fit to be a policy''s name'),
    ($$ARRAY[repeat('x', 65)], '{k}', '{1}'$$, '22023: an element of p_policies is not fit to be a policy''s name'),
    ($$'{p,p}', '{k,l}', '{1,1}'$$, '22023: p_policies has "p" twice'),
    ($$'{p}', '{""}', '{1}'$$, '22023: p_key is empty'),
    ($$'{p}', '{k}', '{1}', '{0}'$$, '22023: p_window_seconds is 0, and must be at least 1')) AS t (arguments, error);

-- ── The tables ──

SELECT throws_ok($$INSERT INTO rate_limit_exemptions (identifier) VALUES ('')$$, '23514', NULL, 'an exemption is somebody''s');
SELECT throws_ok(format('INSERT INTO rate_limit_overrides (key, server_id, user_id, request_limit) VALUES (%s)', v), state, NULL, format('no override (%s)', v))
  FROM (VALUES ('NULL, NULL, NULL, 1', '23514'), ($$'k', 's', NULL, 1$$, '23514'), ($$'k', NULL, gen_random_uuid(), 1$$, '23514'),
               ($$'', NULL, NULL, 1$$, '23514'), ($$NULL, '', NULL, 1$$, '23514'), ($$'k', NULL, NULL, -1$$, '23514'), ($$'k', NULL, NULL, NULL$$, '23502')) AS t (v, state);
SELECT lives_ok($$INSERT INTO rate_limit_overrides (key, server_id, user_id, request_limit)
                  VALUES ('k', NULL, NULL, 1), (NULL, 's', NULL, 0), (NULL, NULL, 'a11ce000-0000-4000-8000-000000000001', 1), (NULL, 's', 'a11ce000-0000-4000-8000-000000000001', 1)$$,
                'a key, a server, a user, a user at a server');
SELECT throws_ok($$INSERT INTO rate_limit_overrides (server_id, request_limit) VALUES ('s', 1)$$, '23505', NULL, 'each of them once');

-- ── The guide's query, as written ──

INSERT INTO system_servers (id, name, config, rate_limit_per_minute) VALUES ('exact', 'S', '{}', 4), ('limit max', 'S', '{}', 1000);
SELECT results_eq($$SELECT 
  server_id,
  COUNT(*) as violations,
  MAX(window_start) as last_violation
FROM rate_limit_tracking
WHERE request_count > (
  SELECT rate_limit_per_minute 
  FROM system_servers 
  WHERE id = rate_limit_tracking.server_id
)
GROUP BY server_id
ORDER BY violations DESC$$, format($$VALUES ('exact', 3::bigint, %L::timestamptz)$$, :'minute'), 'the operational guide''s query shows who went over a limit');

SELECT * FROM finish();
ROLLBACK;
