-- http_request, http_get, http_post: the jobs they make, and what they refuse. Nothing is sent, for nothing commits.
-- Needs nexus_hub.egress_allow = '127.0.0.1'.
BEGIN;
SET LOCAL search_path = :"schema", pgtap, public;
SELECT no_plan();

\ir error_with_hint.psql
-- The row that a call has made.
CREATE FUNCTION pg_temp.job_of(call text) RETURNS job_results LANGUAGE plpgsql AS $$
DECLARE
    made uuid; job job_results;
BEGIN
    EXECUTE 'SELECT ' || call INTO made;
    SELECT * INTO STRICT job FROM job_results WHERE id = made;
    RETURN job;
END
$$;
-- Its params, without the headers when there are none.
CREATE FUNCTION pg_temp.params_of(call text) RETURNS jsonb LANGUAGE sql
AS $$ SELECT CASE params -> 'headers' WHEN '{}' THEN params - 'headers' ELSE params END FROM pg_temp.job_of(call) $$;
\set a '''aaaaaaaa-0000-4000-8000-000000000001'''

-- ── The jobs ──

SELECT results_eq($$SELECT user_id, job_type, server_id, tool_name, status, priority::integer, run_at, timeout_ms, max_attempts, idempotency_key, target, params
                      FROM pg_temp.job_of('http_get(''https://host/x?y=1'')')$$,
                  $$VALUES (NULL::uuid, 'http_request', NULL, NULL, 'pending', 5, now(), NULL::integer, NULL::integer, NULL, 'host:443',
                            '{"method": "GET", "url": "https://host/x?y=1", "headers": {}}'::jsonb)$$,
                  'http_get makes a job of nobody that is due at once');
SELECT results_eq(format('SELECT timeout_ms, priority::integer, run_at, max_attempts, idempotency_key FROM pg_temp.job_of(%L)',
                         format('%s url => ''http://host'', timeout_ms => 2000, priority => 1, run_at => ''2031-02-03 04:05Z'', max_attempts => 7, idempotency_key => %L)', call, call)),
                  format($$VALUES (2000, 1, '2031-02-03 04:05Z'::timestamptz, 7, %L)$$, call), format('%s …) hands its options on', call))
  FROM unnest(ARRAY['http_get(', 'http_post(', 'http_request(method => ''PUT'',']) AS call;
SELECT is(http_get('http://host/other', idempotency_key => 'http_get('), (SELECT id FROM job_results WHERE idempotency_key = 'http_get('),
          'a key that was given gives back the first job''s id');

CREATE TEMP TABLE calls (call text, params jsonb);
INSERT INTO calls VALUES
    ($$http_get('http://host')$$, '{"method": "GET", "url": "http://host"}'),
    ($$http_get('http://host', '{"X-A": "1", "x-b": ""}')$$, '{"method": "GET", "url": "http://host", "headers": {"X-A": "1", "x-b": ""}}'),
    ($$http_get(url => 'http://host', headers => NULL)$$, '{"method": "GET", "url": "http://host"}'),
    ($$http_post('http://host')$$, '{"method": "POST", "url": "http://host", "body": "{}", "headers": {"Content-Type": "application/json"}}'),
    ($$http_post('http://host', '{"a": [1.10, null, "ü"]}')$$,
     '{"method": "POST", "url": "http://host", "body": "{\"a\": [1.10, null, \"ü\"]}", "headers": {"Content-Type": "application/json"}}'),
    ($$http_post('http://host', '"text"')$$, '{"method": "POST", "url": "http://host", "body": "\"text\"", "headers": {"Content-Type": "application/json"}}'),
    ($$http_post('http://host', '""')$$, '{"method": "POST", "url": "http://host", "body": "\"\"", "headers": {"Content-Type": "application/json"}}'),
    ($$http_post('http://host', 'null')$$, '{"method": "POST", "url": "http://host", "body": "null", "headers": {"Content-Type": "application/json"}}'),
    ($$http_post('http://host', '7')$$, '{"method": "POST", "url": "http://host", "body": "7", "headers": {"Content-Type": "application/json"}}'),
    ($$http_post('http://host', '{}', '{"X-A": "1"}')$$,
     '{"method": "POST", "url": "http://host", "body": "{}", "headers": {"Content-Type": "application/json", "X-A": "1"}}'),
    ($$http_post('http://host', '{}', NULL)$$, '{"method": "POST", "url": "http://host", "body": "{}", "headers": {"Content-Type": "application/json"}}'),
    ($$http_post('http://host', '{}', '{"Content-Type": "application/vnd.x+json"}')$$,
     '{"method": "POST", "url": "http://host", "body": "{}", "headers": {"Content-Type": "application/vnd.x+json"}}'),
    ($$http_request('DELETE', 'http://host')$$, '{"method": "DELETE", "url": "http://host"}'),
    ($$http_request('patch', 'http://host', 'a=1&b')$$, '{"method": "patch", "url": "http://host", "body": "a=1&b"}'),
    ($$http_request('PURGE', 'http://host', '')$$, '{"method": "PURGE", "url": "http://host", "body": ""}'),
    ($$http_request('PUT', 'http://host', '{"a": null}', '{"Content-Type": "text/plain"}')$$,
     '{"method": "PUT", "url": "http://host", "body": "{\"a\": null}", "headers": {"Content-Type": "text/plain"}}'),
    ($$http_request(method => 'PUT', url => 'http://host', body => 'x', headers => NULL)$$, '{"method": "PUT", "url": "http://host", "body": "x"}'),
    ($$http_request(NULL, 'http://host', 'x')$$, '{"url": "http://host", "body": "x"}');
SELECT is(pg_temp.params_of(call), params, format('the params of %s', call)) FROM calls;
SELECT results_eq($$SELECT timeout_ms, params FROM pg_temp.job_of('http_get(''http://host'', timeout_ms => 5)')$$,
                  $$VALUES (5, '{"method": "GET", "url": "http://host", "headers": {}}'::jsonb)$$, 'the time-out is the job''s, not in its params');
SELECT is((SELECT array_agg(value) FROM jsonb_each_text(pg_temp.params_of(format($$http_post('http://host', '{}', '{"%s": "text/plain"}')$$, name)) -> 'headers') WHERE lower(key) = 'content-type'),
          ARRAY['text/plain'], format('a Content-Type that is given wins, written %s', name))
  FROM unnest(ARRAY['Content-Type', 'content-type', 'CONTENT-TYPE', 'Content-type']) AS name;

-- ── What is refused ──

CREATE TEMP TABLE refused (request text, problem text);
INSERT INTO refused VALUES
    ($$'GET', NULL$$, 'p_params has no "url" that is a string | An http_request job takes {"url": "…", "method": "GET", …}.'),
    ($$'GET', ''$$, 'bad request in p_params: "url" is not a valid URL: relative URL without a base'),
    ($$'GET', 'host/x'$$, 'bad request in p_params: "url" is not a valid URL: relative URL without a base'),
    ($$'GET', 'http://'$$, 'bad request in p_params: "url" is not a valid URL: empty host'),
    ($$'GET', 'http://host:65536/'$$, 'bad request in p_params: "url" is not a valid URL: invalid port number'),
    ($$'GET', 'http://256.1.1.1/'$$, 'bad request in p_params: "url" is not a valid URL: invalid IPv4 address'),
    ($$'GET', 'ftp://host/'$$, 'bad request in p_params: "url" must begin with http:// or https://'),
    ($$'GET', 'file:///etc/passwd'$$, 'bad request in p_params: "url" must begin with http:// or https://'),
    ($$'', 'http://host'$$, 'bad request in p_params: "method" is not an HTTP method'),
    ($$'G T', 'http://host'$$, 'bad request in p_params: "method" is not an HTTP method'),
    ($$E'GET\r\nX: 1', 'http://host'$$, 'bad request in p_params: "method" is not an HTTP method'),
    ($$'GÉT', 'http://host'$$, 'bad request in p_params: "method" is not an HTTP method'),
    ($$'GET', 'http://host', NULL, '[]'$$, 'bad request in p_params: "headers" is not a JSON object'),
    ($$'GET', 'http://host', NULL, '"X-A: 1"'$$, 'bad request in p_params: "headers" is not a JSON object'),
    ($$'GET', 'http://host', NULL, '{"X-A": 1}'$$, 'bad request in p_params: the header "X-A" is not a string'),
    ($$'GET', 'http://host', NULL, '{"X-A": null}'$$, 'bad request in p_params: the header "X-A" is not a string'),
    ($$'GET', 'http://host', NULL, '{"X A": "1"}'$$, 'bad request in p_params: "headers" has a name that is not a valid header name'),
    ($$'GET', 'http://host', NULL, '{"": "1"}'$$, 'bad request in p_params: "headers" has a name that is not a valid header name'),
    ($$'GET', 'http://host', NULL, '{"X-A": "sk-verysecret\r\nX-B: 1"}'$$, 'bad request in p_params: the header "X-A" has characters that are not allowed in a header'),
    ($$'GET', 'http://host', NULL, '{"Content-Length": "1"}'$$, 'bad request in p_params: the header "Content-Length" cannot be given'),
    ($$'GET', 'http://host', NULL, '{"connection": "close"}'$$, 'bad request in p_params: the header "connection" cannot be given'),
    ($$'GET', 'http://host', timeout_ms => 0$$, 'p_timeout_ms must be between 1 and 3600000, not 0 | It is the time an attempt may take in all, in milliseconds.'),
    ($$'GET', 'http://host', timeout_ms => 3600001$$, 'p_timeout_ms must be between 1 and 3600000, not 3600001 | It is the time an attempt may take in all, in milliseconds.'),
    ($$'GET', 'http://host', priority => 10$$, 'p_priority must be between 1 and 9, not 10 | 1 is first, 5 is usual, 9 is last.'),
    ($$'GET', 'http://host', max_attempts => 101$$, 'p_max_attempts must be between 1 and 100, not 101 | 1 means that the job is not tried again.'),
    ($$'GET', 'http://host', run_at => 'infinity'$$, 'p_run_at must be a time, not infinity | A job that shall not run for now is one that has not been made yet.'),
    ($$'GET', 'http://host', idempotency_key => ''$$, 'p_idempotency_key must have 1 to 255 characters, not 0 | Leave it NULL where the job may be made twice.');
CREATE TEMP TABLE before AS SELECT count(*) FROM job_results;
SELECT is(pg_temp.error_of(format('SELECT http_request(%s)', request)), '22023: ' || problem, format('http_request refuses %s', request)) FROM refused;
SELECT is(pg_temp.error_of(format('SELECT %s(''http://host'', headers => %L)', name, headers)), '22023: bad request in p_params: "headers" is not a JSON object',
          format('%s refuses the headers %s', name, headers))
  FROM unnest(ARRAY['http_get', 'http_post']) AS name, unnest(ARRAY['[]', '"X-A: 1"', '[{"X-A": "1"}]', '7']) AS headers;
SELECT is(left(pg_temp.error_of(format('SELECT %s(%L)', name, url)), 6), '22023:', format('%s refuses the url %s', name, url))
  FROM unnest(ARRAY['http_get', 'http_post']) AS name, unnest(ARRAY[NULL, '', 'host/x', 'ftp://host/']) AS url;

-- ── Where a request may not go ──

CREATE TEMP TABLE denied (url text, what text);
INSERT INTO denied VALUES
    ('http://10.0.0.1/', 'a private address'), ('https://172.16.0.1/', 'a private address'), ('http://192.168.0.1:8080/x', 'a private address'), ('http://[fd00::1]/', 'a private address'),
    ('http://[::1]/', 'a loopback address'), ('http://0x7f000002/', 'a loopback address'), ('http://127.2/', 'a loopback address'), ('http://[::ffff:127.0.0.2]/', 'a loopback address'),
    ('http://user:pw@127.0.0.2/', 'a loopback address'), ('http://①②⑦.0.0.2/', 'a loopback address'), ('http://2130706434/', 'a loopback address'),
    ('http://169.254.169.254/', 'a cloud metadata address'), ('http://[fd00:ec2::254]/', 'a cloud metadata address'), ('http://169.254.1.1/', 'a link-local address'),
    ('http://[fe80::1]/', 'a link-local address'), ('http://100.64.0.1/', 'a carrier-grade NAT address'), ('http://0/', 'an unspecified address'), ('http://[::]/', 'an unspecified address'),
    ('http://224.0.0.1/', 'a multicast address'), ('http://255.255.255.255/', 'a broadcast address'), ('http://192.0.2.1/', 'a documentation address');
SELECT is(pg_temp.error_of(format(call, url)),
          format('42501: the egress policy does not allow %s | A superuser opens hosts, addresses and networks with the setting nexus_hub.egress_allow.', what),
          format('%s is denied to %s', url, split_part(call, '(', 1)))
  FROM denied, unnest(ARRAY['SELECT http_get(%L)', 'SELECT http_post(%L)', 'SELECT http_request(''PUT'', %L)',
                            'SELECT create_job(NULL, ''http_request'', NULL, NULL, jsonb_build_object(''url'', %L))']) AS call;
SELECT results_eq('SELECT count(*) FROM job_results', 'SELECT * FROM before', 'what is refused makes no job');
SELECT isnt(http_get(url), NULL, format('%s is allowed', url))
  FROM unnest(ARRAY['http://127.0.0.1/', 'http://127.0.0.1:1/', 'https://2130706433/', 'http://0x7f.1/', 'http://[::ffff:127.0.0.1]/', 'http://8.8.8.8/', 'http://[2606:4700::1111]/',
                    'http://localhost/', 'http://metadata.google.internal/']) AS url;

-- ── Who may ──

CREATE FUNCTION pg_temp.as_role(role text) RETURNS void LANGUAGE sql
AS $$ SELECT set_config('request.jwt.claims', '{"sub": "aaaaaaaa-0000-4000-8000-000000000001"}', true), set_config('role', role, true) $$;
CREATE TEMP TABLE public_calls AS SELECT unnest(ARRAY[$$http_get('http://host')$$, $$http_post('http://host')$$, $$http_request('GET', 'http://host')$$]) AS call;
GRANT SELECT ON public_calls TO PUBLIC;
GRANT USAGE ON SCHEMA :"schema" TO anon;
SELECT pg_temp.as_role('anon');
SELECT throws_ok('SELECT ' || call, '42501', NULL, format('anon cannot call %s', call)) FROM public_calls;
SELECT pg_temp.as_role('authenticated');
SELECT throws_ok('SELECT ' || call, '42501', NULL, format('authenticated cannot call %s', call)) FROM public_calls;
SELECT throws_ok($$SELECT create_job(NULL, 'http_request', NULL, NULL, '{"url": "http://host"}')$$, '42501', 'http_request jobs are not for users', 'nor make such a job by create_job');
SELECT pg_temp.as_role('service_role');
SELECT lives_ok('SELECT ' || call, format('service_role can call %s', call)) FROM public_calls;
SELECT is((pg_temp.job_of($$http_get('http://host', priority => 1)$$)).user_id, :a, 'where the caller has an id, the job is the caller''s');
SELECT set_config('request.jwt.claims', '', true);
SELECT is((pg_temp.job_of($$http_get('http://host', priority => 1)$$)).user_id, NULL, 'where it has none, the job is nobody''s');
SELECT is(left(pg_temp.error_of($$SELECT http_get('http://10.0.0.1/')$$), 6), '42501:', 'the egress policy holds for service_role');

RESET ROLE;
SELECT * FROM finish();
ROLLBACK;
