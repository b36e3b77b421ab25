-- Rate limits for requests through PostgREST: run this as a superuser in the database that PostgREST serves, where the roles
-- anon, authenticated and service_role are, then set
--   db-pre-request = "hooks.before_request"     (on Supabase: ALTER ROLE authenticator SET pgrst.db_pre_request = 'hooks.before_request')
-- and have PostgREST read its configuration again: NOTIFY pgrst.
-- It takes nexus_hub to be installed in the schema public, and users' ids to be uuids (the claim sub). Change the numbers and
-- the keys as you like. Callers without an id and an address share one limit: behind no proxy, all that are not signed in.

BEGIN;

-- Not among PostgREST's db-schemas, so that nobody calls the hook through it.
CREATE SCHEMA IF NOT EXISTS hooks;
GRANT USAGE ON SCHEMA hooks TO anon, authenticated, service_role;

-- With its owner's rights: limits are not for signed-in users to call with any key they like.
CREATE OR REPLACE FUNCTION hooks.before_request() RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    headers json := nullif(current_setting('request.headers', true), '')::json;
    -- The last address is the one that your own proxy has seen; those before it are the client's word. Without a proxy of
    -- your own, all of it is.
    address text := substring(headers ->> 'x-forwarded-for' FROM '[^,\s]+\s*$');
    caller text;
BEGIN
    IF current_setting('role') = 'service_role' THEN
        RETURN;
    END IF;
    -- Some proxies add a port, or write IPv4 as IPv6.
    address := regexp_replace(address, '^(\[([^\]]*)\]|(\d+\.\d+\.\d+\.\d+))(:\d+)?$', '\2\3');
    address := regexp_replace(address, '^::ffff:(?=\d+\.)', '', 'i');
    -- Who has one address of IPv6 has 2^64 of them.
    IF address LIKE '%:%' THEN
        BEGIN
            address := network(set_masklen(address::inet, 64));
        EXCEPTION WHEN data_exception THEN
            -- No address; as it is.
        END;
    END IF;
    caller := coalesce('user ' || public.nexus_hub_uid(), 'address ' || address, 'nobody');
    PERFORM public.enforce_rate_limits(
        p_policies        => ARRAY['burst',          'hour'],
        p_keys            => ARRAY[caller,           caller],
        p_limits          => ARRAY[20,               5000],
        p_windows_seconds => ARRAY[1,                3600]);
END
$$;
REVOKE EXECUTE ON FUNCTION hooks.before_request() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION hooks.before_request() TO anon, authenticated, service_role;

COMMIT;
