-- Metrics for Prometheus. What is counted is in shared memory (src/pg/shmem/counters.rs); the page is written by
-- src/domain/metrics.rs.

CREATE FUNCTION _nexus_hub.pending_rows() RETURNS bigint
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT greatest(c.reltuples, 0)::bigint FROM pg_class c WHERE c.oid = '@extschema@.job_results_pending'::regclass;
END;
COMMENT ON FUNCTION _nexus_hub.pending_rows() IS 'About how many jobs were pending when job_results was vacuumed or analyzed last.';

CREATE FUNCTION _nexus_hub.job_bytes() RETURNS bigint
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT pg_total_relation_size('@extschema@.job_results'::regclass);
END;
COMMENT ON FUNCTION _nexus_hub.job_bytes() IS 'What job_results takes on disk.';

CREATE FUNCTION _nexus_hub.gauges(
    OUT database text, OUT pending bigint, OUT oldest_pending_seconds double precision, OUT job_rows bigint, OUT job_bytes bigint,
    OUT unreachable_hosts bigint, OUT cache_entries bigint, OUT cache_expired_share double precision, OUT failing_syncs bigint)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
-- Who watches must not wait for what is wrong.
SET lock_timeout = '100ms'
AS $$
DECLARE
    most constant integer := 1000;
BEGIN
    database := current_database();
    job_rows := _nexus_hub.job_rows();
    SELECT p.pending, p.oldest_pending_seconds INTO pending, oldest_pending_seconds FROM _nexus_hub.pending_jobs(most) p;
    IF pending >= most THEN
        pending := greatest(pending, _nexus_hub.pending_rows());
    END IF;
    SELECT count(DISTINCT b.host) INTO unreachable_hosts FROM _nexus_hub.circuit_breakers b;
    SELECT c.entries, c.expired_share, c.failing_syncs INTO cache_entries, cache_expired_share, failing_syncs
      FROM _nexus_hub.cache_situation(50) c;
    job_bytes := _nexus_hub.job_bytes();
EXCEPTION WHEN lock_not_available THEN
    NULL;
END
$$;
COMMENT ON FUNCTION _nexus_hub.gauges() IS 'What metrics need of the tables. Looks at a thousand jobs and fifty pages of each cache at most; above that numbers are estimates. NULL: not known, because somebody has the tables locked.';

CREATE FUNCTION _nexus_hub.metrics_page() RETURNS text
LANGUAGE c VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS 'MODULE_PATHNAME', 'metrics_page_wrapper';
COMMENT ON FUNCTION _nexus_hub.metrics_page() IS 'What nexus_hub_metrics returns.';

-- PostgREST answers with a media type when a function returns a domain of that name, which the caller must be able to
-- reach. In a schema of its own, because the one that is installed into may have such a domain of its own.
CREATE SCHEMA nexus_hub_media_types;
COMMENT ON SCHEMA nexus_hub_media_types IS 'Types by whose names PostgREST knows what a function answers with. Belongs to the extension nexus_hub.';
CREATE DOMAIN nexus_hub_media_types."text/plain" AS text;
COMMENT ON DOMAIN nexus_hub_media_types."text/plain" IS 'A text that PostgREST sends as it is.';

CREATE FUNCTION @extschema@.nexus_hub_metrics() RETURNS nexus_hub_media_types."text/plain"
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.metrics_page()::nexus_hub_media_types."text/plain";
END;
COMMENT ON FUNCTION @extschema@.nexus_hub_metrics() IS
    'What Prometheus reads, in its text format 0.0.4: counters of this database since the server started, and how things stand. A few milliseconds, whatever is in the tables. Through PostgREST it is text/plain where the request accepts that. For the owner, service_role and pg_monitor.';
