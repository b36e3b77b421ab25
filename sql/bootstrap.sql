-- Runs first: what must hold before anything is created, and the schema of the internals.

-- Nothing below may be found in the schema that is installed into: others may have put functions and operators there,
-- and this script runs as a superuser. Every name of ours is written with its schema.
SELECT pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);

DO $$
BEGIN
    IF pg_catalog.getdatabaseencoding() <> 'UTF8' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'feature_not_supported',
            MESSAGE = 'nexus_hub needs a database with encoding UTF8',
            DETAIL = pg_catalog.format('This database has encoding %s.', pg_catalog.getdatabaseencoding()),
            HINT = 'Create a database with ENCODING ''UTF8'' and install the extension there.';
    END IF;
END
$$;

-- A plain CREATE: an existing schema of that name could belong to somebody else.
CREATE SCHEMA _nexus_hub;
COMMENT ON SCHEMA _nexus_hub IS
    'Internals of the extension nexus_hub. Granted to nobody; the public functions reach in through bodies bound at install time.';

CREATE FUNCTION @extschema@.nexus_hub_uid() RETURNS uuid
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- The pattern keeps a foreign subject (an e-mail address, say) from raising an error in every policy.
    SELECT CASE
        WHEN claim.sub ~* '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$' THEN claim.sub::uuid
    END
    FROM (SELECT coalesce(
        nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub',
        nullif(current_setting('request.jwt.claim.sub', true), ''))) AS claim (sub);
END;
COMMENT ON FUNCTION @extschema@.nexus_hub_uid() IS
    'The calling user''s id: "sub" of the setting request.jwt.claims, else the setting request.jwt.claim.sub; NULL when neither holds a uuid.';

CREATE FUNCTION _nexus_hub.is_service_role() RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- The role need not exist, now or ever.
    SELECT EXISTS (SELECT FROM pg_roles r WHERE r.rolname = 'service_role' AND pg_has_role(r.oid, 'USAGE'));
END;
COMMENT ON FUNCTION _nexus_hub.is_service_role() IS 'Whether the current user has the rights of the role service_role: the trusted back end, which sees all rows.';
