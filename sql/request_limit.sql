-- Rate limits of PostgREST's requests, for a function that its setting db-pre-request names.

CREATE FUNCTION _nexus_hub.limit_request(p_policies text[], p_keys text[], p_limits integer[], p_windows_seconds integer[], p_costs integer[], p_bursts integer[])
RETURNS TABLE (allowed boolean, policy_field text, limit_field text, retry_after bigint, details text)
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'limit_request_wrapper';
COMMENT ON FUNCTION _nexus_hub.limit_request(text[], text[], integer[], integer[], integer[], integer[]) IS
    'rate_limit_all for policies with names: one row that says what the answer to the request has to. policy_field and limit_field: the HTTP fields RateLimit-Policy and RateLimit. retry_after: seconds, NULL when the request is allowed or never will be. details: the policies that deny it.';

CREATE FUNCTION _nexus_hub.answer_request(allowed boolean, policy_field text, limit_field text, retry_after bigint, details text) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    fields jsonb := jsonb_build_object('RateLimit-Policy', policy_field, 'RateLimit', limit_field);
    set_before text := nullif(current_setting('response.headers', true), '');
BEGIN
    IF policy_field = '' THEN
        RETURN;
    ELSIF allowed THEN
        -- An array of objects with one field each is what PostgREST takes.
        PERFORM set_config('response.headers',
                           (coalesce(set_before::jsonb, '[]')
                            || jsonb_build_array(jsonb_build_object('RateLimit-Policy', policy_field), jsonb_build_object('RateLimit', limit_field)))::text,
                           true);
        RETURN;
    END IF;
    IF retry_after IS NOT NULL THEN
        fields := fields || jsonb_build_object('Retry-After', retry_after::text);
    END IF;
    -- PostgREST makes the answer of this SQLSTATE's message and detail.
    RAISE SQLSTATE 'PGRST' USING
        MESSAGE = jsonb_build_object(
            'code', 'PT429', 'message', 'rate limit exceeded', 'details', details,
            'hint', CASE WHEN retry_after IS NULL THEN 'no such request will be allowed'
                         ELSE 'try again in ' || retry_after || CASE retry_after WHEN 1 THEN ' second' ELSE ' seconds' END END)::text,
        DETAIL = jsonb_build_object('status', 429, 'headers', fields)::text;
END
$$;
COMMENT ON FUNCTION _nexus_hub.answer_request(boolean, text, text, bigint, text) IS
    'Adds the fields to those of PostgREST''s answer (the setting response.headers, of this transaction), or raises what PostgREST makes 429 of.';

CREATE FUNCTION @extschema@.enforce_rate_limits(
    p_policies text[], p_keys text[], p_limits integer[], p_windows_seconds integer[] DEFAULT NULL, p_costs integer[] DEFAULT NULL,
    p_bursts integer[] DEFAULT NULL)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.answer_request(l.allowed, l.policy_field, l.limit_field, l.retry_after, l.details)
      FROM _nexus_hub.limit_request(p_policies, p_keys, p_limits, p_windows_seconds, p_costs, p_bursts) AS l;
END;
COMMENT ON FUNCTION @extschema@.enforce_rate_limits(text[], text[], integer[], integer[], integer[], integer[]) IS
    'rate_limit_all for PostgREST''s db-pre-request: when one of the policies denies the request, none is charged and PostgREST answers 429 with the fields RateLimit-Policy, RateLimit and Retry-After and a body that names the policy; else the answer gets the first two. p_policies: names that clients see, 1 to 64 printable ASCII characters, each another one; the other arguments are those of rate_limit_all. Errors: SQLSTATE PGRST when denied, message and detail being JSON for PostgREST; those of rate_limit_all.';
