-- From 0.1.0 to 0.2.0: cleanup, caches, health, metrics, backups, realtime, and restores that lose no job.

-- As at the install: every name of ours is written with its schema, and others' are not found.
SELECT pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);

-- All at once, in the order in which transactions usually come to them: one after the other, they would get in each other's
-- way. A short lock_timeout, and another try, spare those who come behind.
LOCK TABLE @extschema@.system_servers, @extschema@.user_servers, @extschema@.job_results, @extschema@.job_attempts IN ACCESS EXCLUSIVE MODE;

-- ── Jobs ──

ALTER TABLE @extschema@.job_results ADD COLUMN failures integer NOT NULL DEFAULT 0;
COMMENT ON COLUMN @extschema@.job_results.failures IS 'How many of the job''s attempts have failed, those before retry_job included: they are in job_attempts.';
COMMENT ON COLUMN @extschema@.job_results.job_type IS 'tool_invoke, resource_fetch, prompt_execute (MCP, by server_id), server_sync (MCP, made by sync_server) or http_request (plain HTTP, not for users).';
COMMENT ON COLUMN @extschema@.job_results.result IS 'MCP: the result object as the server sent it; server_sync: how much it has found; http_request: {"status", "headers", "body" or "body_base64"}.';
COMMENT ON COLUMN @extschema@.job_results.max_attempts IS 'Attempts that are made at most, 1 to 100. NULL: 5 for http_request, 3 for resource_fetch, prompt_execute and server_sync, 1 for tool_invoke.';
UPDATE @extschema@.job_results j SET failures = a.failures
  FROM (SELECT job_id, count(*)::integer AS failures FROM @extschema@.job_attempts GROUP BY job_id) AS a
 WHERE j.id = a.job_id;
ALTER TABLE @extschema@.job_results DROP CONSTRAINT job_results_counts;
ALTER TABLE @extschema@.job_results ADD CONSTRAINT job_results_counts CHECK (least(attempt, crashes, failures) >= 0);
DROP INDEX @extschema@.job_results_failed;
CREATE INDEX idx_job_results_cleanup ON @extschema@.job_results (status, completed_at, id) WHERE status IN ('completed', 'failed', 'cancelled');
CREATE INDEX idx_job_results_orphaned ON @extschema@.job_results (status, created_at) WHERE status IN ('pending', 'running');
CREATE INDEX job_attempts_finished ON @extschema@.job_attempts (finished_at);
ALTER TABLE @extschema@.job_attempts DROP CONSTRAINT job_attempts_job_id_fkey;
ALTER POLICY job_results_owner_insert ON @extschema@.job_results
    WITH CHECK (
        user_id = (SELECT @extschema@.nexus_hub_uid())
        AND status = 'pending' AND job_type NOT IN ('http_request', 'server_sync') AND priority >= 5);
CREATE OR REPLACE VIEW _nexus_hub.job_results AS SELECT * FROM @extschema@.job_results;
COMMENT ON COLUMN _nexus_hub.job_results.job_type IS 'tool_invoke, resource_fetch, prompt_execute (MCP, by server_id), server_sync (MCP, made by sync_server) or http_request (plain HTTP, not for users).';
COMMENT ON COLUMN _nexus_hub.job_results.result IS 'MCP: the result object as the server sent it; server_sync: how much it has found; http_request: {"status", "headers", "body" or "body_base64"}.';
COMMENT ON COLUMN _nexus_hub.job_results.max_attempts IS 'Attempts that are made at most, 1 to 100. NULL: 5 for http_request, 3 for resource_fetch, prompt_execute and server_sync, 1 for tool_invoke.';
COMMENT ON COLUMN _nexus_hub.job_results.failures IS 'How many of the job''s attempts have failed, those before retry_job included: they are in job_attempts.';

CREATE OR REPLACE FUNCTION _nexus_hub.settle_job() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NEW.status IN ('completed', 'failed', 'cancelled') THEN
        NEW.completed_at := coalesce(NEW.completed_at, now());
    ELSE
        NEW.completed_at := NULL;
    END IF;
    IF NEW.status = 'running' THEN
        -- A row that is brought in from elsewhere has been running since it was made, as far as anybody knows.
        NEW.started_at := coalesce(NEW.started_at, CASE TG_OP WHEN 'INSERT' THEN least(NEW.created_at, now()) END, now());
    ELSE
        NEW.lease := NULL;
    END IF;
    -- A new row with a result that does not fit its status is a mistake, for the CHECK to refuse: clearing would lose it.
    IF TG_OP = 'UPDATE' AND NEW.status IN ('pending', 'running') THEN
        NEW.result := NULL;
        NEW.error := NULL;
    END IF;
    IF NEW.status = 'pending' THEN
        NEW.started_at := NULL;
        -- Run again by hand: with all its attempts.
        IF TG_OP = 'UPDATE' AND OLD.status IN ('completed', 'failed', 'cancelled') THEN
            NEW.attempt := 0;
            NEW.crashes := 0;
        END IF;
    END IF;
    RETURN NEW;
END
$$;

-- The age of a job that nobody runs counts from when it was due.
CREATE FUNCTION _nexus_hub.settle_run_at() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.run_at := NEW.created_at;
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION _nexus_hub.settle_run_at() IS 'Trigger: a job for which nobody has said a run_at (or the time of the very transaction) is due since its created_at, also where that is set by hand.';
CREATE TRIGGER job_results_settle_run_at BEFORE INSERT ON @extschema@.job_results
    FOR EACH ROW WHEN (NEW.created_at < NEW.run_at AND NEW.run_at = now() AND isfinite(NEW.created_at))
    EXECUTE FUNCTION _nexus_hub.settle_run_at();
CREATE TRIGGER job_results_settle_run_at_again BEFORE UPDATE OF created_at ON @extschema@.job_results
    FOR EACH ROW WHEN (NEW.created_at < OLD.created_at AND OLD.run_at = OLD.created_at AND NEW.run_at = OLD.run_at AND isfinite(NEW.created_at))
    EXECUTE FUNCTION _nexus_hub.settle_run_at();

CREATE FUNCTION _nexus_hub.note_restore() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'note_restore_wrapper';
COMMENT ON FUNCTION _nexus_hub.note_restore() IS
    'Trigger: a session that loads a dump is known from its first row on, and the worker takes no job until it ends. wake_on_change does the same.';
CREATE TRIGGER system_servers_note_restore BEFORE INSERT ON @extschema@.system_servers
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.note_restore();
CREATE TRIGGER user_servers_note_restore BEFORE INSERT ON @extschema@.user_servers
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.note_restore();

CREATE FUNCTION _nexus_hub.delete_attempts() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        DELETE FROM _nexus_hub.job_attempts;
    ELSE
        DELETE FROM _nexus_hub.job_attempts a WHERE a.job_id = OLD.id;
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION _nexus_hub.delete_attempts() IS 'Trigger: the attempts of a job go with it.';
CREATE TRIGGER job_results_delete_attempts AFTER DELETE ON @extschema@.job_results
    FOR EACH ROW WHEN (OLD.failures > 0) EXECUTE FUNCTION _nexus_hub.delete_attempts();
CREATE TRIGGER job_results_truncate_attempts AFTER TRUNCATE ON @extschema@.job_results
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.delete_attempts();

CREATE OR REPLACE FUNCTION _nexus_hub.write_outcomes(p_ids uuid[], p_leases uuid[], p_statuses text[], p_results text[], p_errors text[],
                                          p_http_statuses integer[], p_delays_ms bigint[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    -- Only a running job has a lease. Said again with its status, the index of running jobs would look better to the
    -- planner than it is for a join.
    IF 'completed' = ALL (p_statuses) THEN
        UPDATE _nexus_hub.job_results j
           SET status = 'completed', result = o.result::jsonb, completed_at = clock_timestamp(), lease = NULL
          FROM unnest(p_ids, p_leases, p_results) AS o (id, lease, result)
         WHERE j.id = o.id AND j.lease = o.lease;
        RETURN;
    END IF;
    WITH written AS (
        UPDATE _nexus_hub.job_results j
           SET status = o.status, lease = NULL,
               failures = j.failures + (o.status IN ('failed', 'pending'))::integer,
               result = CASE WHEN o.status <> 'pending' THEN o.result::jsonb END,
               error = CASE WHEN o.status = 'failed' THEN o.error END,
               completed_at = CASE WHEN o.status IN ('completed', 'failed') THEN clock_timestamp() END,
               started_at = CASE WHEN o.status <> 'pending' THEN j.started_at END,
               run_at = CASE WHEN o.status = 'pending' THEN clock_timestamp() + o.delay_ms * interval '1 millisecond' ELSE j.run_at END
          FROM unnest(p_ids, p_leases, p_statuses, p_results, p_errors, p_http_statuses, p_delays_ms)
                 AS o (id, lease, status, result, error, http_status, delay_ms)
          -- The row as it was, for the time the attempt was started.
          JOIN _nexus_hub.job_results b ON b.id = o.id
         WHERE j.id = o.id AND j.lease = o.lease
        RETURNING j.id, j.attempt, b.started_at, o.status, o.http_status, o.error)
    INSERT INTO _nexus_hub.job_attempts (job_id, attempt, started_at, http_status, error)
    SELECT w.id, w.attempt, w.started_at, w.http_status, w.error
      FROM written w
     WHERE w.status IN ('failed', 'pending');
END
$$;

CREATE OR REPLACE FUNCTION _nexus_hub.release_jobs(p_leases uuid[], p_max_crashes integer) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    released integer;
BEGIN
    WITH held AS (
        SELECT j.id, j.attempt, j.started_at, p_max_crashes IS NOT NULL AND j.crashes + 1 >= p_max_crashes AS is_poison
          FROM _nexus_hub.job_results j
         WHERE j.status = 'running' AND j.lease = ANY (p_leases)
           FOR UPDATE SKIP LOCKED),
    kept AS (
        INSERT INTO _nexus_hub.job_attempts (job_id, attempt, started_at, error)
        SELECT h.id, h.attempt, h.started_at, 'the worker was gone before the answer was there'
          FROM held h
         WHERE p_max_crashes IS NOT NULL)
    UPDATE _nexus_hub.job_results j
       SET status = CASE WHEN h.is_poison THEN 'failed' ELSE 'pending' END,
           error = CASE WHEN h.is_poison THEN
               format('set aside: the worker crashed %s times while this job was in flight (nexus_hub.max_crashes)', j.crashes + 1) END,
           completed_at = CASE WHEN h.is_poison THEN clock_timestamp() END,
           started_at = CASE WHEN h.is_poison THEN j.started_at END,
           attempt = greatest(j.attempt - (p_max_crashes IS NULL)::integer, 0),
           crashes = j.crashes + (p_max_crashes IS NOT NULL)::integer,
           failures = j.failures + (p_max_crashes IS NOT NULL)::integer,
           lease = NULL
      FROM held h
     WHERE j.id = h.id;
    GET DIAGNOSTICS released = ROW_COUNT;
    RETURN released;
END
$$;

-- Cleanup: jobs that nobody asks for any more. The worker does it by itself, in small batches (src/worker/prune.rs); the
-- functions do it at once.

CREATE FUNCTION _nexus_hub.is_lease_live(lease uuid) RETURNS boolean
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'is_lease_live_wrapper';
COMMENT ON FUNCTION _nexus_hub.is_lease_live(uuid) IS
    'Whether a worker that is alive has claimed jobs of this database under the lease. False for NULL.';

CREATE FUNCTION _nexus_hub.job_retention(kind text) RETURNS interval
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'job_retention_wrapper';
COMMENT ON FUNCTION _nexus_hub.job_retention(text) IS
    'What the setting nexus_hub.<kind>_retention says; kind: completed, orphaned. NULL: for ever. Errors: 22023 unknown kind.';

CREATE FUNCTION _nexus_hub.days(days integer, argument text) RETURNS interval
LANGUAGE c IMMUTABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'days_wrapper';
COMMENT ON FUNCTION _nexus_hub.days(integer, text) IS
    'So many days. NULL in, NULL out. Errors: 22023 less than 0.';

-- The place is known as long as the transaction sees the row: to delete by it is quicker than by the id.
CREATE VIEW _nexus_hub.job_places AS
    SELECT j.ctid AS place, j.id, j.status, j.priority, j.created_at, j.run_at, j.started_at, j.completed_at, j.lease,
           CASE j.status
               WHEN 'pending' THEN greatest(j.created_at, j.run_at)
               WHEN 'running' THEN greatest(j.created_at, j.run_at, j.started_at)
               ELSE j.completed_at
           END AS since,
           coalesce(pg_column_size(j.params), 0) + coalesce(pg_column_size(j.result), 0) + coalesce(pg_column_size(j.error), 0) AS bytes
      FROM @extschema@.job_results AS j;
COMMENT ON VIEW _nexus_hub.job_places IS 'Jobs as cleanup sees them.';
COMMENT ON COLUMN _nexus_hub.job_places.place IS 'Where the row is.';
COMMENT ON COLUMN _nexus_hub.job_places.id IS 'The job''s id.';
COMMENT ON COLUMN _nexus_hub.job_places.status IS 'The job''s status.';
COMMENT ON COLUMN _nexus_hub.job_places.priority IS 'The job''s priority.';
COMMENT ON COLUMN _nexus_hub.job_places.created_at IS 'When the job was made.';
COMMENT ON COLUMN _nexus_hub.job_places.run_at IS 'Not before this time.';
COMMENT ON COLUMN _nexus_hub.job_places.started_at IS 'When it was taken.';
COMMENT ON COLUMN _nexus_hub.job_places.completed_at IS 'When it was finished.';
COMMENT ON COLUMN _nexus_hub.job_places.lease IS 'Under which claim it runs.';
COMMENT ON COLUMN _nexus_hub.job_places.since IS 'Since when it is finished, or runs, or could be taken.';
COMMENT ON COLUMN _nexus_hub.job_places.bytes IS 'What its values take.';

CREATE FUNCTION _nexus_hub.old_jobs(p_status text, p_priority integer, p_before timestamptz, p_from timestamptz, p_from_id uuid, p_limit integer)
RETURNS TABLE (place tid, at timestamptz, id uuid, bytes_before bigint)
-- STABLE, with neither SET nor SECURITY DEFINER: inlined. Each branch in the order of an index, so that a batch costs the
-- same whatever the size of the table.
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT c.place, c.at, c.id, sum(c.bytes) OVER (ORDER BY c.at, c.id ROWS UNBOUNDED PRECEDING) - c.bytes
      FROM (
        (SELECT p.place, p.completed_at AS at, p.id, p.bytes
           FROM _nexus_hub.job_places p
          WHERE p_status IN ('completed', 'failed', 'cancelled') AND p.status = p_status
            AND p.status IN ('completed', 'failed', 'cancelled')
            AND (p.completed_at, p.id) > (p_from, p_from_id) AND p.completed_at < p_before
          ORDER BY p.completed_at, p.id
          LIMIT p_limit)
        UNION ALL
        (SELECT p.place, p.run_at, p.id, p.bytes
           FROM _nexus_hub.job_places p
          WHERE p_status = 'pending' AND p.status = 'pending' AND p.priority = p_priority
            AND (p.run_at, p.id) > (p_from, p_from_id) AND p.run_at < p_before AND p.since < p_before
          ORDER BY p.run_at, p.id
          LIMIT p_limit)
        UNION ALL
        (SELECT p.place, p.started_at, p.id, p.bytes
           FROM _nexus_hub.job_places p
          WHERE p_status = 'running' AND p.status = 'running'
            AND (p.started_at, p.id) > (p_from, p_from_id) AND p.since < p_before AND NOT _nexus_hub.is_lease_live(p.lease)
          ORDER BY p.started_at, p.id
          LIMIT p_limit)) AS c;
END;
COMMENT ON FUNCTION _nexus_hub.old_jobs(text, integer, timestamptz, timestamptz, uuid, integer) IS
    'Jobs that have had a status (if it is pending: of one priority) since before a time, by time and id, the first ones after p_from and p_from_id, at most p_limit. bytes_before: what the values of those before it take.';

CREATE FUNCTION _nexus_hub.delete_old_jobs(
    p_status text, p_priority integer, p_before timestamptz, p_from timestamptz, p_from_id uuid, p_limit integer, p_bytes bigint, p_time interval,
    OUT deleted integer, OUT kept integer, OUT problem text, OUT next timestamptz, OUT next_id uuid, OUT more boolean)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
-- In the order of an index, whatever the statistics say, which may be of an empty table.
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET jit = off
SET lock_timeout = '20ms'
AS $$
DECLARE
    begin_at constant timestamptz := clock_timestamp();
    old record;
    is_there boolean;
BEGIN
    kept := 0;
    next := p_from;
    next_id := p_from_id;
    BEGIN
        WITH old AS MATERIALIZED (
            SELECT o.place, o.at, o.id, o.bytes_before < p_bytes AS fits
              FROM _nexus_hub.old_jobs(p_status, p_priority, p_before, p_from, p_from_id, p_limit) o),
        gone AS (
            DELETE FROM _nexus_hub.job_places p
             WHERE p.place = ANY (ARRAY(SELECT o.place FROM old o WHERE o.fits))
               -- Said again, because somebody may have had the job run again since it was found.
               AND p.status = p_status AND p.since < p_before AND (p.status <> 'running' OR NOT _nexus_hub.is_lease_live(p.lease))
            RETURNING 1),
        last AS (
            SELECT o.at, o.id FROM old o WHERE o.fits ORDER BY o.at DESC, o.id DESC LIMIT 1)
        SELECT (SELECT count(*) FROM gone), coalesce((SELECT l.at FROM last l), p_from), coalesce((SELECT l.id FROM last l), p_from_id),
               count(*) = p_limit OR coalesce(bool_or(NOT o.fits), false)
          INTO deleted, next, next_id, more
          FROM old o;
        RETURN;
    EXCEPTION
        WHEN serialization_failure OR invalid_transaction_state OR operator_intervention THEN
            RAISE;
        WHEN OTHERS OR assert_failure THEN
            -- A row that a session keeps locked, or that a foreign key or trigger of the user's holds, must hold up no other:
            -- one by one.
            NULL;
    END;
    deleted := 0;
    more := false;
    FOR old IN
        SELECT o.place, o.at, o.id, o.bytes_before < p_bytes AS fits, count(*) OVER () = p_limit AS is_full
          FROM _nexus_hub.old_jobs(p_status, p_priority, p_before, p_from, p_from_id, p_limit) o
         ORDER BY o.at, o.id
    LOOP
        more := old.is_full;
        -- Each may have waited for a lock, of its own or of a row that goes with it.
        IF NOT old.fits OR clock_timestamp() > begin_at + p_time THEN
            more := true;
            EXIT;
        END IF;
        next := old.at;
        next_id := old.id;
        BEGIN
            PERFORM FROM _nexus_hub.job_places p WHERE p.place = old.place AND p.status = p_status FOR UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                -- Or it is gone, or runs again.
                SELECT EXISTS (SELECT FROM _nexus_hub.job_places p WHERE p.id = old.id AND p.status = p_status AND p.since < p_before) INTO is_there;
                IF is_there THEN
                    kept := kept + 1;
                    problem := coalesce(problem, 'a session keeps the row locked');
                END IF;
                CONTINUE;
            END IF;
            DELETE FROM _nexus_hub.job_places p
             WHERE p.place = old.place
               AND p.status = p_status AND p.since < p_before AND (p.status <> 'running' OR NOT _nexus_hub.is_lease_live(p.lease));
            IF FOUND THEN
                deleted := deleted + 1;
            END IF;
        EXCEPTION
            WHEN serialization_failure OR invalid_transaction_state OR operator_intervention THEN
                RAISE;
            WHEN OTHERS OR assert_failure THEN
                kept := kept + 1;
                problem := coalesce(problem, SQLERRM);
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION _nexus_hub.delete_old_jobs(text, integer, timestamptz, timestamptz, uuid, integer, bigint, interval) IS
    'Deletes those jobs of old_jobs until their values have p_bytes. Where one cannot be deleted, the others are, one by one, for p_time at most (NULL: all). kept: those that could not be deleted, and problem: why the first could not. next, next_id: where to go on. more: whether there may be more.';

CREATE FUNCTION _nexus_hub.prune_jobs(
    p_status text, p_minutes integer, p_from timestamptz, p_from_id uuid, p_limit integer, p_bytes bigint, p_time interval,
    OUT deleted integer, OUT kept integer, OUT problem text, OUT next timestamptz, OUT next_id uuid, OUT more boolean)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Or what a deferred foreign key of the user's holds would be known at the commit only, and hold up all others.
    SET CONSTRAINTS ALL IMMEDIATE;
    SELECT d.deleted, d.kept, d.problem, d.next, d.next_id, d.more INTO deleted, kept, problem, next, next_id, more
      FROM _nexus_hub.delete_old_jobs(p_status, NULL, now() - make_interval(mins => p_minutes), p_from, p_from_id, p_limit, p_bytes, p_time) d;
END
$$;
COMMENT ON FUNCTION _nexus_hub.prune_jobs(text, integer, timestamptz, uuid, integer, bigint, interval) IS
    'Called by the worker: delete_old_jobs for jobs that ended in a way so many minutes ago.';

CREATE FUNCTION _nexus_hub.delete_old_attempts(p_before timestamptz, p_limit integer) RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '50ms'
BEGIN ATOMIC
    WITH deleted AS (
        DELETE FROM @extschema@.job_attempts a
         WHERE a.ctid = ANY (ARRAY(
                   SELECT o.ctid FROM @extschema@.job_attempts o
                    WHERE o.finished_at < p_before
                    ORDER BY o.finished_at
                    LIMIT p_limit
                      FOR UPDATE SKIP LOCKED))
        RETURNING 1)
    SELECT count(*)::integer FROM deleted;
END;
COMMENT ON FUNCTION _nexus_hub.delete_old_attempts(timestamptz, integer) IS
    'Called by the worker: deletes attempts that have failed before a time, the oldest first and so many at most, and returns how many. Passes over those that a session keeps locked.';

CREATE FUNCTION _nexus_hub.fail_orphans(p_after interval, p_limit integer) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '50ms'
AS $$
DECLARE
    failed integer;
BEGIN
    WITH orphan AS MATERIALIZED (
        SELECT p.id, p.started_at
          FROM _nexus_hub.job_places p
         WHERE p.status = 'running' AND p.lease IS NULL AND p.since < now() - p_after
         LIMIT p_limit
           FOR UPDATE SKIP LOCKED),
    ended AS (
        UPDATE _nexus_hub.job_results j
           SET status = 'failed', completed_at = clock_timestamp(), failures = j.failures + 1,
               error = format('given up: whoever runs this job has not written its end for %s (nexus_hub.orphaned_retention)', p_after)
          FROM orphan o
         WHERE j.id = o.id
        RETURNING j.id, j.attempt, o.started_at, j.error)
    INSERT INTO _nexus_hub.job_attempts (job_id, attempt, started_at, error)
    SELECT e.id, e.attempt, e.started_at, e.error FROM ended e;
    GET DIAGNOSTICS failed = ROW_COUNT;
    RETURN failed;
END
$$;
COMMENT ON FUNCTION _nexus_hub.fail_orphans(interval, integer) IS
    'Called by the worker: ends jobs that were handed over to an executor elsewhere, or set to running by hand, so long ago without an end; so many at most. Returns how many.';

CREATE FUNCTION _nexus_hub.delete_all_old_jobs(p_are_orphans boolean, p_before timestamptz) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '50ms'
AS $$
DECLARE
    deleted integer;
BEGIN
    IF p_are_orphans THEN
        DELETE FROM _nexus_hub.job_places p
         WHERE p.status IN ('pending', 'running') AND p.created_at < p_before AND p.since < p_before
           AND (p.status <> 'running' OR NOT _nexus_hub.is_lease_live(p.lease));
    ELSE
        DELETE FROM _nexus_hub.job_places p WHERE p.status IN ('completed', 'failed', 'cancelled') AND p.completed_at < p_before;
    END IF;
    GET DIAGNOSTICS deleted = ROW_COUNT;
    RETURN deleted;
END
$$;
COMMENT ON FUNCTION _nexus_hub.delete_all_old_jobs(boolean, timestamptz) IS
    'Deletes all jobs that have been finished, or orphans, since before a time, and returns how many. Errors: 55P03 a session keeps one locked; whatever triggers and foreign keys raise.';

-- A SECURITY DEFINER function in a schema that is exposed to nobody: names of tables would need rights on _nexus_hub.
CREATE FUNCTION _nexus_hub.cleanup_jobs(p_completed interval, p_orphaned interval, OUT deleted_completed integer, OUT deleted_orphaned integer)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    sweep record;
    batch record;
    place timestamptz;
    place_id uuid;
    kept bigint := 0;
    problem text;
BEGIN
    deleted_completed := 0;
    deleted_orphaned := 0;
    -- Waits for others as long as the caller wants to. A row that is locked is passed over soon.
    LOCK TABLE _nexus_hub.job_places IN ROW EXCLUSIVE MODE;
    BEGIN
        deleted_completed := coalesce(_nexus_hub.delete_all_old_jobs(false, now() - p_completed), 0);
        deleted_orphaned := coalesce(_nexus_hub.delete_all_old_jobs(true, now() - p_orphaned), 0);
        RETURN;
    EXCEPTION
        WHEN serialization_failure OR invalid_transaction_state OR operator_intervention THEN
            RAISE;
        WHEN OTHERS OR assert_failure THEN
            deleted_completed := 0;
            deleted_orphaned := 0;
    END;
    -- A row cannot be deleted: all that can be, in batches.
    FOR sweep IN
        SELECT s.status, NULL::integer AS priority, false AS is_orphan, now() - p_completed AS before
          FROM unnest(ARRAY['completed', 'failed', 'cancelled']) AS s (status)
        UNION ALL
        SELECT 'running', NULL, true, now() - p_orphaned
        UNION ALL
        SELECT 'pending', p.priority, true, now() - p_orphaned FROM generate_series(1, 9) AS p (priority)
    LOOP
        CONTINUE WHEN sweep.before IS NULL;
        place := '-infinity';
        place_id := '00000000-0000-0000-0000-000000000000';
        LOOP
            SELECT * INTO batch
              FROM _nexus_hub.delete_old_jobs(sweep.status, sweep.priority, sweep.before, place, place_id, 1000, 67108864, NULL);
            IF sweep.is_orphan THEN
                deleted_orphaned := deleted_orphaned + batch.deleted;
            ELSE
                deleted_completed := deleted_completed + batch.deleted;
            END IF;
            kept := kept + batch.kept;
            problem := coalesce(problem, batch.problem);
            place := batch.next;
            place_id := batch.next_id;
            EXIT WHEN NOT batch.more;
        END LOOP;
    END LOOP;
    IF kept > 0 THEN
        RAISE WARNING USING
            MESSAGE = format('%s old jobs could not be deleted, all others were', kept),
            DETAIL = format('Of the first: %s', problem);
    END IF;
END
$$;
COMMENT ON FUNCTION _nexus_hub.cleanup_jobs(interval, interval) IS
    'Deletes finished jobs that ended longer ago than p_completed, and orphans older than p_orphaned; NULL: none. Jobs that a live worker runs and those of a later run_at are no orphans. A job that cannot be deleted (locked by a session, held by a foreign key) holds up no other, and a warning tells of it; what a deferred foreign key holds is known at the commit only, which then fails.';

CREATE FUNCTION @extschema@.cleanup_old_job_results() RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT c.deleted_completed + c.deleted_orphaned
      FROM _nexus_hub.cleanup_jobs(_nexus_hub.job_retention('completed'), _nexus_hub.job_retention('orphaned')) AS c;
END;
COMMENT ON FUNCTION @extschema@.cleanup_old_job_results() IS
    'Deletes jobs that ended longer ago than nexus_hub.completed_retention (7 days), and orphans older than nexus_hub.orphaned_retention (1 day): pending ones that have been due for so long, running ones that no living worker runs. Returns how many rows were deleted in all. A job that cannot be deleted is left, with a warning.';

CREATE FUNCTION @extschema@.cleanup_job_results_manual(p_days_completed integer DEFAULT 7, p_days_orphaned integer DEFAULT 1)
RETURNS TABLE (deleted_completed integer, deleted_orphaned integer, total_deleted integer)
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT c.deleted_completed, c.deleted_orphaned, c.deleted_completed + c.deleted_orphaned
      FROM _nexus_hub.cleanup_jobs(_nexus_hub.days(p_days_completed, 'p_days_completed'),
                                   _nexus_hub.days(p_days_orphaned, 'p_days_orphaned')) AS c;
END;
COMMENT ON FUNCTION @extschema@.cleanup_job_results_manual(integer, integer) IS
    'Deletes jobs that ended more than p_days_completed days ago, and orphans older than p_days_orphaned days: pending ones that have been due for so long, running ones that no living worker runs. 0: whatever their age; NULL: none. Returns how many rows were deleted. A job that cannot be deleted is left, with a warning. Errors: 22023 days below 0.';

CREATE FUNCTION @extschema@.cleanup_rate_limit_tracking(p_days integer DEFAULT 1) RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH deleted AS (
        DELETE FROM _nexus_hub.rate_limit_windows w WHERE w.window_start < now() - _nexus_hub.days(p_days, 'p_days') RETURNING 1)
    SELECT count(*)::integer FROM deleted;
END;
COMMENT ON FUNCTION @extschema@.cleanup_rate_limit_tracking(integer) IS
    'Deletes closed minutes of rate_limit_tracking that began more than p_days days ago (0: all; NULL: none), and returns how many. For the owner alone. The worker does the same after nexus_hub.rate_limit_retention. Errors: 22023 days below 0.';

-- Caches of what MCP servers offer: tools, resources and prompts. A sync is a job (server_sync) that lists all of it, and
-- whose end is written together with the entries (src/cache.rs).

CREATE TABLE @extschema@.tool_cache (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    server_ref_id uuid NOT NULL,
    server_type text NOT NULL
        CONSTRAINT tool_cache_server_type_known CHECK (server_type IN ('system', 'user')),
    user_id uuid,
    tool_name text NOT NULL
        CONSTRAINT tool_cache_tool_name_length CHECK (length(tool_name) BETWEEN 1 AND 200),
    namespaced_name text NOT NULL,
    title text,
    description text,
    input_schema jsonb NOT NULL DEFAULT '{"type": "object"}',
    definition jsonb NOT NULL DEFAULT '{}',
    enabled boolean NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT now(),
    changed_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL DEFAULT now() + interval '24 hours',
    CONSTRAINT tool_cache_owner CHECK ((server_type = 'system') = (user_id IS NULL)),
    CONSTRAINT tool_cache_server_ref_id_tool_name_key UNIQUE (server_ref_id, tool_name)
);
COMMENT ON TABLE @extschema@.tool_cache IS 'The tools that MCP servers have listed. Written by syncs (see sync_server); of an unreachable server the last ones stay, expired.';
COMMENT ON COLUMN @extschema@.tool_cache.id IS 'The entry''s id (UUIDv7). It stays as long as the server lists the tool.';
COMMENT ON COLUMN @extschema@.tool_cache.server_ref_id IS 'The server: user_servers.id or system_servers.ref_id.';
COMMENT ON COLUMN @extschema@.tool_cache.server_type IS 'user or system: in which of the two tables.';
COMMENT ON COLUMN @extschema@.tool_cache.user_id IS 'The server''s owner; NULL: a system server, whose entries all signed-in users see.';
COMMENT ON COLUMN @extschema@.tool_cache.tool_name IS 'The tool''s name, what create_job takes as p_tool_name. Tools with longer names than 200 characters are left out.';
COMMENT ON COLUMN @extschema@.tool_cache.namespaced_name IS 'The server''s id, two underscores, and the tool''s name: tells the tools of several servers apart.';
COMMENT ON COLUMN @extschema@.tool_cache.title IS 'A name for people, if the server gives one.';
COMMENT ON COLUMN @extschema@.tool_cache.description IS 'What the tool does, in the server''s words, which are not to be trusted.';
COMMENT ON COLUMN @extschema@.tool_cache.input_schema IS 'JSON Schema of the arguments.';
COMMENT ON COLUMN @extschema@.tool_cache.definition IS 'All that the server says of the tool.';
COMMENT ON COLUMN @extschema@.tool_cache.enabled IS 'Whether it is to be offered: the owner''s choice, which a sync leaves alone. It bars nobody from calling the tool.';
COMMENT ON COLUMN @extschema@.tool_cache.created_at IS 'When a sync found it first.';
COMMENT ON COLUMN @extschema@.tool_cache.changed_at IS 'When a sync found another definition than before: a tool that was trusted may have become another.';
COMMENT ON COLUMN @extschema@.tool_cache.updated_at IS 'When a sync found it last.';
COMMENT ON COLUMN @extschema@.tool_cache.expires_at IS 'Until when it counts as fresh (nexus_hub.cache_ttl after the sync).';

CREATE TABLE @extschema@.resource_cache (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    server_ref_id uuid NOT NULL,
    server_type text NOT NULL
        CONSTRAINT resource_cache_server_type_known CHECK (server_type IN ('system', 'user')),
    user_id uuid,
    uri text NOT NULL
        CONSTRAINT resource_cache_uri_length CHECK (octet_length(uri) BETWEEN 1 AND 2000),
    is_template boolean NOT NULL DEFAULT false,
    name text,
    title text,
    description text,
    mime_type text,
    definition jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    changed_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL DEFAULT now() + interval '24 hours',
    CONSTRAINT resource_cache_owner CHECK ((server_type = 'system') = (user_id IS NULL)),
    CONSTRAINT resource_cache_server_ref_id_uri_is_template_key UNIQUE (server_ref_id, uri, is_template)
);
COMMENT ON TABLE @extschema@.resource_cache IS 'The resources, and templates of resources, that MCP servers have listed. As tool_cache.';
COMMENT ON COLUMN @extschema@.resource_cache.id IS 'The entry''s id (UUIDv7). It stays as long as the server lists the resource.';
COMMENT ON COLUMN @extschema@.resource_cache.server_ref_id IS 'The server: user_servers.id or system_servers.ref_id.';
COMMENT ON COLUMN @extschema@.resource_cache.server_type IS 'user or system: in which of the two tables.';
COMMENT ON COLUMN @extschema@.resource_cache.user_id IS 'The server''s owner; NULL: a system server, whose entries all signed-in users see.';
COMMENT ON COLUMN @extschema@.resource_cache.uri IS 'What a resource_fetch job takes as uri; of a template, with its variables in braces (RFC 6570). Those of more than 2000 bytes are left out.';
COMMENT ON COLUMN @extschema@.resource_cache.is_template IS 'Whether it is a template.';
COMMENT ON COLUMN @extschema@.resource_cache.name IS 'The server''s name for it.';
COMMENT ON COLUMN @extschema@.resource_cache.title IS 'A name for people, if the server gives one.';
COMMENT ON COLUMN @extschema@.resource_cache.description IS 'What it is, in the server''s words, which are not to be trusted.';
COMMENT ON COLUMN @extschema@.resource_cache.mime_type IS 'Its media type, if the server says.';
COMMENT ON COLUMN @extschema@.resource_cache.definition IS 'All that the server says of it.';
COMMENT ON COLUMN @extschema@.resource_cache.created_at IS 'When a sync found it first.';
COMMENT ON COLUMN @extschema@.resource_cache.changed_at IS 'When a sync found another definition than before.';
COMMENT ON COLUMN @extschema@.resource_cache.updated_at IS 'When a sync found it last.';
COMMENT ON COLUMN @extschema@.resource_cache.expires_at IS 'Until when it counts as fresh (nexus_hub.cache_ttl after the sync).';

CREATE TABLE @extschema@.prompt_cache (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    server_ref_id uuid NOT NULL,
    server_type text NOT NULL
        CONSTRAINT prompt_cache_server_type_known CHECK (server_type IN ('system', 'user')),
    user_id uuid,
    prompt_name text NOT NULL
        CONSTRAINT prompt_cache_prompt_name_length CHECK (length(prompt_name) BETWEEN 1 AND 200),
    namespaced_name text NOT NULL,
    title text,
    description text,
    arguments jsonb NOT NULL DEFAULT '[]',
    definition jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    changed_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL DEFAULT now() + interval '24 hours',
    CONSTRAINT prompt_cache_owner CHECK ((server_type = 'system') = (user_id IS NULL)),
    CONSTRAINT prompt_cache_server_ref_id_prompt_name_key UNIQUE (server_ref_id, prompt_name)
);
COMMENT ON TABLE @extschema@.prompt_cache IS 'The prompts that MCP servers have listed. As tool_cache.';
COMMENT ON COLUMN @extschema@.prompt_cache.id IS 'The entry''s id (UUIDv7). It stays as long as the server lists the prompt.';
COMMENT ON COLUMN @extschema@.prompt_cache.server_ref_id IS 'The server: user_servers.id or system_servers.ref_id.';
COMMENT ON COLUMN @extschema@.prompt_cache.server_type IS 'user or system: in which of the two tables.';
COMMENT ON COLUMN @extschema@.prompt_cache.user_id IS 'The server''s owner; NULL: a system server, whose entries all signed-in users see.';
COMMENT ON COLUMN @extschema@.prompt_cache.prompt_name IS 'The prompt''s name, what create_job takes as p_tool_name. Prompts with longer names than 200 characters are left out.';
COMMENT ON COLUMN @extschema@.prompt_cache.namespaced_name IS 'The server''s id, two underscores, and the prompt''s name.';
COMMENT ON COLUMN @extschema@.prompt_cache.title IS 'A name for people, if the server gives one.';
COMMENT ON COLUMN @extschema@.prompt_cache.description IS 'What it is for, in the server''s words, which are not to be trusted.';
COMMENT ON COLUMN @extschema@.prompt_cache.arguments IS 'Its arguments, an array of {"name", "description", "required"}.';
COMMENT ON COLUMN @extschema@.prompt_cache.definition IS 'All that the server says of the prompt.';
COMMENT ON COLUMN @extschema@.prompt_cache.created_at IS 'When a sync found it first.';
COMMENT ON COLUMN @extschema@.prompt_cache.changed_at IS 'When a sync found another definition than before.';
COMMENT ON COLUMN @extschema@.prompt_cache.updated_at IS 'When a sync found it last.';
COMMENT ON COLUMN @extschema@.prompt_cache.expires_at IS 'Until when it counts as fresh (nexus_hub.cache_ttl after the sync).';

CREATE TABLE @extschema@.server_syncs (
    server_ref_id uuid PRIMARY KEY,
    server_type text NOT NULL
        CONSTRAINT server_syncs_server_type_known CHECK (server_type IN ('system', 'user')),
    user_id uuid,
    server_id text NOT NULL,
    job_id uuid,
    requested_at timestamptz NOT NULL DEFAULT now(),
    tries integer NOT NULL DEFAULT 0,
    synced_at timestamptz,
    expires_at timestamptz,
    failed_at timestamptz,
    error text,
    CONSTRAINT server_syncs_owner CHECK ((server_type = 'system') = (user_id IS NULL))
);
COMMENT ON TABLE @extschema@.server_syncs IS 'How the caches of each server stand that was ever to be synced: when that went well last, and why it does not now.';
COMMENT ON COLUMN @extschema@.server_syncs.server_ref_id IS 'The server: user_servers.id or system_servers.ref_id.';
COMMENT ON COLUMN @extschema@.server_syncs.server_type IS 'user or system: in which of the two tables.';
COMMENT ON COLUMN @extschema@.server_syncs.user_id IS 'The server''s owner; NULL: a system server, of which users do not see this row.';
COMMENT ON COLUMN @extschema@.server_syncs.server_id IS 'The name that jobs use as server_id.';
COMMENT ON COLUMN @extschema@.server_syncs.job_id IS 'The last sync''s job.';
COMMENT ON COLUMN @extschema@.server_syncs.requested_at IS 'When that job was made.';
COMMENT ON COLUMN @extschema@.server_syncs.tries IS 'Syncs that were begun since the last one that went well.';
COMMENT ON COLUMN @extschema@.server_syncs.synced_at IS 'When a sync went well last; NULL: never.';
COMMENT ON COLUMN @extschema@.server_syncs.expires_at IS 'Until when what it found counts as fresh.';
COMMENT ON COLUMN @extschema@.server_syncs.failed_at IS 'When an attempt of the last sync failed last; NULL: it did not.';
COMMENT ON COLUMN @extschema@.server_syncs.error IS 'Why. The entries of the caches are then those of synced_at.';

CREATE INDEX idx_tool_cache_expires ON @extschema@.tool_cache (expires_at) WHERE enabled;
CREATE INDEX idx_resource_cache_expires ON @extschema@.resource_cache (expires_at);
CREATE INDEX idx_prompt_cache_expires ON @extschema@.prompt_cache (expires_at);
CREATE INDEX server_syncs_expires ON @extschema@.server_syncs (expires_at);
CREATE INDEX server_syncs_failed ON @extschema@.server_syncs (failed_at) WHERE error IS NOT NULL;
-- For row-level security, and for those who ask for theirs and everybody's.
CREATE INDEX tool_cache_user ON @extschema@.tool_cache (user_id);
CREATE INDEX resource_cache_user ON @extschema@.resource_cache (user_id);
CREATE INDEX prompt_cache_user ON @extschema@.prompt_cache (user_id);
CREATE INDEX server_syncs_user ON @extschema@.server_syncs (user_id);

-- Or a sync could write what the dump brings, too.
CREATE TRIGGER tool_cache_note_restore BEFORE INSERT ON @extschema@.tool_cache
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.note_restore();
CREATE TRIGGER resource_cache_note_restore BEFORE INSERT ON @extschema@.resource_cache
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.note_restore();
CREATE TRIGGER prompt_cache_note_restore BEFORE INSERT ON @extschema@.prompt_cache
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.note_restore();
CREATE TRIGGER server_syncs_note_restore BEFORE INSERT ON @extschema@.server_syncs
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.note_restore();

SELECT pg_catalog.pg_extension_config_dump('@extschema@.tool_cache', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.resource_cache', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.prompt_cache', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.server_syncs', '');

ALTER TABLE @extschema@.tool_cache ENABLE ROW LEVEL SECURITY;
ALTER TABLE @extschema@.resource_cache ENABLE ROW LEVEL SECURITY;
ALTER TABLE @extschema@.prompt_cache ENABLE ROW LEVEL SECURITY;
ALTER TABLE @extschema@.server_syncs ENABLE ROW LEVEL SECURITY;

-- Of servers that the user sees: these tables have policies of their own.
CREATE POLICY tool_cache_select ON @extschema@.tool_cache
    FOR SELECT USING ((user_id = (SELECT @extschema@.nexus_hub_uid()) AND server_ref_id IN (SELECT u.id FROM @extschema@.user_servers u))
                      OR (user_id IS NULL AND server_ref_id IN (SELECT s.ref_id FROM @extschema@.system_servers s)));
CREATE POLICY resource_cache_select ON @extschema@.resource_cache
    FOR SELECT USING ((user_id = (SELECT @extschema@.nexus_hub_uid()) AND server_ref_id IN (SELECT u.id FROM @extschema@.user_servers u))
                      OR (user_id IS NULL AND server_ref_id IN (SELECT s.ref_id FROM @extschema@.system_servers s)));
CREATE POLICY prompt_cache_select ON @extschema@.prompt_cache
    FOR SELECT USING ((user_id = (SELECT @extschema@.nexus_hub_uid()) AND server_ref_id IN (SELECT u.id FROM @extschema@.user_servers u))
                      OR (user_id IS NULL AND server_ref_id IN (SELECT s.ref_id FROM @extschema@.system_servers s)));
CREATE POLICY tool_cache_owner_update ON @extschema@.tool_cache
    FOR UPDATE USING (user_id = (SELECT @extschema@.nexus_hub_uid()))
    WITH CHECK (user_id = (SELECT @extschema@.nexus_hub_uid()));
CREATE POLICY server_syncs_owner_select ON @extschema@.server_syncs
    FOR SELECT USING (user_id = (SELECT @extschema@.nexus_hub_uid()));
CREATE POLICY tool_cache_service_all ON @extschema@.tool_cache
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));
CREATE POLICY resource_cache_service_all ON @extschema@.resource_cache
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));
CREATE POLICY prompt_cache_service_all ON @extschema@.prompt_cache
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));
CREATE POLICY server_syncs_service_all ON @extschema@.server_syncs
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));

-- ── A server that goes takes its caches with it ──

CREATE FUNCTION _nexus_hub.forget_server(p_server_ref_id uuid) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    DELETE FROM @extschema@.tool_cache c WHERE c.server_ref_id = p_server_ref_id;
    DELETE FROM @extschema@.resource_cache c WHERE c.server_ref_id = p_server_ref_id;
    DELETE FROM @extschema@.prompt_cache c WHERE c.server_ref_id = p_server_ref_id;
    DELETE FROM @extschema@.server_syncs y WHERE y.server_ref_id = p_server_ref_id;
END;
COMMENT ON FUNCTION _nexus_hub.forget_server(uuid) IS 'Deletes what is cached of a server.';

CREATE FUNCTION _nexus_hub.forget_servers_cache() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF TG_ARGV[0] = 'system' THEN
        PERFORM _nexus_hub.forget_server(OLD.ref_id);
    ELSE
        PERFORM _nexus_hub.forget_server(OLD.id);
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION _nexus_hub.forget_servers_cache() IS 'Trigger: what is cached of a server goes with it, and where it gets another owner or name, which the caches hold.';
CREATE TRIGGER user_servers_forget_cache AFTER DELETE ON @extschema@.user_servers
    FOR EACH ROW EXECUTE FUNCTION _nexus_hub.forget_servers_cache('user');
CREATE TRIGGER user_servers_forget_cache_of_another AFTER UPDATE OF id, user_id, server_id ON @extschema@.user_servers
    FOR EACH ROW WHEN (OLD.id <> NEW.id OR OLD.user_id <> NEW.user_id OR OLD.server_id <> NEW.server_id)
    EXECUTE FUNCTION _nexus_hub.forget_servers_cache('user');
CREATE TRIGGER system_servers_forget_cache AFTER DELETE ON @extschema@.system_servers
    FOR EACH ROW EXECUTE FUNCTION _nexus_hub.forget_servers_cache('system');
CREATE TRIGGER system_servers_forget_cache_of_another AFTER UPDATE OF id, ref_id ON @extschema@.system_servers
    FOR EACH ROW WHEN (OLD.id <> NEW.id OR OLD.ref_id <> NEW.ref_id)
    EXECUTE FUNCTION _nexus_hub.forget_servers_cache('system');

-- ── Syncs begin ──

CREATE FUNCTION _nexus_hub.server(p_server_ref_id uuid)
RETURNS TABLE (server_ref_id uuid, server_type text, user_id uuid, server_id text, enabled boolean)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT u.id, 'user'::text, u.user_id, u.server_id, u.enabled FROM @extschema@.user_servers u WHERE u.id = p_server_ref_id
    UNION ALL
    SELECT s.ref_id, 'system'::text, NULL::uuid, s.id, s.enabled FROM @extschema@.system_servers s WHERE s.ref_id = p_server_ref_id;
END;
COMMENT ON FUNCTION _nexus_hub.server(uuid) IS 'The server of a user''s or of everybody''s with this id.';

CREATE FUNCTION _nexus_hub.cannot_sync(server_id text, is_theirs boolean) RETURNS uuid
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'cannot_sync_wrapper';
COMMENT ON FUNCTION _nexus_hub.cannot_sync(text, boolean) IS
    'Raises 42501 when the server is not theirs, the caller being a user and it everybody''s; else 22023: it is disabled.';

CREATE FUNCTION _nexus_hub.begin_sync(p_server_ref_id uuid, p_priority integer) RETURNS uuid
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- Whoever comes at the same time waits here, and then finds the job.
    INSERT INTO @extschema@.server_syncs AS y (server_ref_id, server_type, user_id, server_id)
    SELECT v.server_ref_id, v.server_type, v.user_id, v.server_id FROM _nexus_hub.server(p_server_ref_id) v
        ON CONFLICT (server_ref_id) DO UPDATE SET server_id = excluded.server_id;
    WITH added AS (
        INSERT INTO @extschema@.job_results (user_id, job_type, server_id, priority)
        SELECT y.user_id, 'server_sync', y.server_id, p_priority::smallint
          FROM @extschema@.server_syncs y
         WHERE y.server_ref_id = p_server_ref_id
           AND NOT EXISTS (SELECT FROM @extschema@.job_results j
                            WHERE j.id = y.job_id
                              -- One that runs asks as the server's config was when it was taken.
                              AND (j.status = 'pending'
                                   OR (j.status = 'running'
                                       AND NOT EXISTS (SELECT FROM @extschema@.user_servers u
                                                        WHERE u.id = p_server_ref_id AND u.updated_at > j.started_at))))
        RETURNING id)
    UPDATE @extschema@.server_syncs y
       SET job_id = a.id, requested_at = now(), tries = y.tries + 1
      FROM added a
     WHERE y.server_ref_id = p_server_ref_id;
    SELECT y.job_id FROM @extschema@.server_syncs y WHERE y.server_ref_id = p_server_ref_id;
END;
COMMENT ON FUNCTION _nexus_hub.begin_sync(uuid, integer) IS
    'The job that syncs a server: the one that is pending or running already, else a new one. The caller has been found entitled to it.';

CREATE FUNCTION @extschema@.sync_server(p_server_ref_id uuid) RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT CASE
               WHEN NOT v.enabled OR v.is_foreign THEN _nexus_hub.cannot_sync(v.server_id, NOT v.is_foreign)
               ELSE _nexus_hub.begin_sync(v.id, 5)
           END
      FROM (SELECT u.id, u.server_id, u.enabled, false AS is_foreign FROM @extschema@.user_servers u WHERE u.id = p_server_ref_id
            UNION ALL
            SELECT s.ref_id, s.id, s.enabled,
                   row_security_active('@extschema@.system_servers'::regclass) AND NOT _nexus_hub.is_service_role()
              FROM @extschema@.system_servers s
             WHERE s.ref_id = p_server_ref_id) AS v;
END;
COMMENT ON FUNCTION @extschema@.sync_server(uuid) IS
    'Has a server''s tools, resources (templates, too) and prompts listed anew, and the caches filled with them, in a background job whose id it returns; when that is pending or running already, that job''s. Its result is {"tools": 3, "resources": …, "resource_templates": …, "prompts": …, "left_out": …}. p_server_ref_id: user_servers.id, or, not for users, system_servers.ref_id. NULL: the caller has no such server. Errors: 22023 the server is disabled, 42501 a system server.';

CREATE FUNCTION _nexus_hub.expired_servers(p_at timestamptz)
RETURNS TABLE (server_ref_id uuid, server_type text, user_id uuid)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT c.server_ref_id, c.server_type, c.user_id FROM @extschema@.tool_cache c WHERE c.expires_at < p_at AND c.enabled
    UNION
    SELECT c.server_ref_id, c.server_type, c.user_id FROM @extschema@.resource_cache c WHERE c.expires_at < p_at
    UNION
    SELECT c.server_ref_id, c.server_type, c.user_id FROM @extschema@.prompt_cache c WHERE c.expires_at < p_at
    UNION
    -- One that has listed nothing.
    SELECT y.server_ref_id, y.server_type, y.user_id FROM @extschema@.server_syncs y WHERE y.expires_at < p_at;
END;
COMMENT ON FUNCTION _nexus_hub.expired_servers(timestamptz) IS 'The servers of which something in the caches is expired at a time.';

CREATE FUNCTION _nexus_hub.refresh_expired()
RETURNS TABLE (server_ref_id uuid, server_type text, user_id uuid)
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH expired AS MATERIALIZED (
        SELECT x.server_ref_id, x.server_type, x.user_id,
               (SELECT _nexus_hub.begin_sync(v.server_ref_id, 7) FROM _nexus_hub.server(x.server_ref_id) v WHERE v.enabled) AS job_id
          FROM (SELECT o.server_ref_id, o.server_type, o.user_id
                  FROM _nexus_hub.expired_servers(now()) o
                 -- In one order, or two at a time would wait for each other.
                 ORDER BY o.server_ref_id) AS x)
    SELECT e.server_ref_id, e.server_type, e.user_id FROM expired e;
END;
COMMENT ON FUNCTION _nexus_hub.refresh_expired() IS 'What refresh_expired_cache_entries does.';

CREATE FUNCTION @extschema@.refresh_expired_cache_entries()
RETURNS TABLE (server_ref_id uuid, server_type text, user_id uuid)
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT e.server_ref_id, e.server_type, e.user_id FROM _nexus_hub.refresh_expired() e;
END;
COMMENT ON FUNCTION @extschema@.refresh_expired_cache_entries() IS
    'The servers of which entries in the caches are expired; those that are enabled are synced, each in a background job, where that is not under way already. The worker does so by itself, before entries expire (nexus_hub.auto_refresh). For service_role.';

CREATE FUNCTION _nexus_hub.refresh_due(p_limit integer, p_lead interval) RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '20ms'
BEGIN ATOMIC
    -- Servers that went without a word: their table was emptied, and not for a moment.
    SELECT _nexus_hub.forget_server(y.server_ref_id)
      FROM (SELECT o.server_ref_id
              FROM @extschema@.server_syncs o
             WHERE greatest(o.requested_at, o.synced_at) < now() - interval '1 day' AND NOT EXISTS (SELECT FROM _nexus_hub.server(o.server_ref_id))
             LIMIT p_limit
               FOR UPDATE SKIP LOCKED) AS y;
    WITH expired AS MATERIALIZED (
        SELECT e.server_ref_id FROM _nexus_hub.expired_servers(now() + p_lead) e),
    due AS MATERIALIZED (
        SELECT y.server_ref_id
          FROM @extschema@.server_syncs y
         WHERE y.server_ref_id IN (SELECT e.server_ref_id FROM expired e)
           -- What does not go well is tried less and less often.
           AND (y.tries = 0 OR y.requested_at < now() - least(interval '5 minutes' * (2 ^ least(y.tries - 1, 10)), interval '6 hours'))
           AND EXISTS (SELECT FROM _nexus_hub.server(y.server_ref_id) v WHERE v.enabled)
           AND NOT EXISTS (SELECT FROM @extschema@.job_results j WHERE j.id = y.job_id AND j.status IN ('pending', 'running'))
         ORDER BY y.requested_at
         LIMIT p_limit
           FOR UPDATE OF y SKIP LOCKED)
    SELECT count(_nexus_hub.begin_sync(d.server_ref_id, 7))::integer FROM due d;
END;
COMMENT ON FUNCTION _nexus_hub.refresh_due(integer, interval) IS
    'Called by the worker: begins syncs of servers that were synced once, and of which something expires within p_lead, p_limit at most, those first that have waited longest, and tells how many. One that fails is tried again after 5 minutes, and then after twice as long each time, up to 6 hours.';

-- ── Syncs end ──

CREATE VIEW _nexus_hub.server_syncs AS
    SELECT y.server_ref_id, y.job_id FROM @extschema@.server_syncs y;
COMMENT ON VIEW _nexus_hub.server_syncs IS 'The table of that name, for the worker.';
COMMENT ON COLUMN _nexus_hub.server_syncs.server_ref_id IS 'The server.';
COMMENT ON COLUMN _nexus_hub.server_syncs.job_id IS 'The last sync''s job.';

CREATE FUNCTION _nexus_hub.synced_server(p_job_id uuid, p_lease uuid)
RETURNS TABLE (server_ref_id uuid, server_type text, user_id uuid, server_id text, is_changed boolean)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Locked, so that it does not go while its entries are written. By its id: another one of the name may be there by now.
    RETURN QUERY
    SELECT u.id, 'user'::text, u.user_id, u.server_id, u.updated_at > j.started_at
      FROM _nexus_hub.job_results j
      JOIN _nexus_hub.server_syncs y ON y.job_id = j.id
      JOIN _nexus_hub.user_servers u ON u.id = y.server_ref_id
     WHERE j.id = p_job_id AND j.lease = p_lease AND u.user_id = j.user_id AND u.server_id = j.server_id
       FOR KEY SHARE OF u;
    IF NOT FOUND THEN
        RETURN QUERY
        SELECT s.ref_id, 'system'::text, NULL::uuid, s.id, false
          FROM _nexus_hub.job_results j
          JOIN _nexus_hub.server_syncs y ON y.job_id = j.id
          JOIN _nexus_hub.system_servers s ON s.ref_id = y.server_ref_id
         WHERE j.id = p_job_id AND j.lease = p_lease AND j.user_id IS NULL AND s.id = j.server_id
           FOR KEY SHARE OF s;
    END IF;
END
$$;
COMMENT ON FUNCTION _nexus_hub.synced_server(uuid, uuid) IS 'The server that a sync''s job is about, if it runs under that lease, is the server''s last one, and the server is there; and whether it was changed since the job was taken.';

CREATE FUNCTION _nexus_hub.listed(p_list jsonb, p_key text) RETURNS TABLE (name text, definition jsonb)
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT DISTINCT ON (1) l.definition ->> p_key, l.definition
      FROM jsonb_array_elements(p_list) WITH ORDINALITY AS l (definition, place)
     WHERE jsonb_typeof(l.definition -> p_key) = 'string'
     ORDER BY 1, l.place;
END;
COMMENT ON FUNCTION _nexus_hub.listed(jsonb, text) IS 'What a server has listed, by name, the first where there are two of one name; what has no name is left out.';

CREATE FUNCTION _nexus_hub.write_tools(p_server_ref_id uuid, p_server_type text, p_user_id uuid, p_server_id text, p_list jsonb, p_at timestamptz, p_expires_at timestamptz)
RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO @extschema@.tool_cache AS c (server_ref_id, server_type, user_id, tool_name, namespaced_name, title, description,
                                             input_schema, definition, created_at, changed_at, updated_at, expires_at)
    SELECT p_server_ref_id, p_server_type, p_user_id, l.name, p_server_id || '__' || l.name, l.definition ->> 'title', l.definition ->> 'description',
           coalesce(l.definition -> 'inputSchema', '{"type": "object"}'), l.definition, p_at, p_at, p_at, p_expires_at
      FROM _nexus_hub.listed(p_list, 'name') l
     WHERE length(l.name) BETWEEN 1 AND 200
        ON CONFLICT (server_ref_id, tool_name) DO UPDATE
           SET server_type = excluded.server_type, user_id = excluded.user_id, namespaced_name = excluded.namespaced_name,
               title = excluded.title, description = excluded.description, input_schema = excluded.input_schema,
               changed_at = CASE WHEN c.definition IS DISTINCT FROM excluded.definition THEN p_at ELSE c.changed_at END,
               definition = excluded.definition, updated_at = p_at, expires_at = p_expires_at;
    DELETE FROM @extschema@.tool_cache c WHERE c.server_ref_id = p_server_ref_id AND c.updated_at <> p_at;
    SELECT count(*)::integer FROM @extschema@.tool_cache c WHERE c.server_ref_id = p_server_ref_id;
END;
COMMENT ON FUNCTION _nexus_hub.write_tools(uuid, text, uuid, text, jsonb, timestamptz, timestamptz) IS 'Makes a server''s entries in tool_cache those of p_list, and tells how many these are.';

CREATE FUNCTION _nexus_hub.write_resources(p_server_ref_id uuid, p_server_type text, p_user_id uuid, p_are_templates boolean, p_list jsonb, p_at timestamptz, p_expires_at timestamptz)
RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO @extschema@.resource_cache AS c (server_ref_id, server_type, user_id, uri, is_template, name, title, description, mime_type,
                                                 definition, created_at, changed_at, updated_at, expires_at)
    SELECT p_server_ref_id, p_server_type, p_user_id, l.name, p_are_templates, l.definition ->> 'name', l.definition ->> 'title',
           l.definition ->> 'description', l.definition ->> 'mimeType', l.definition, p_at, p_at, p_at, p_expires_at
      FROM _nexus_hub.listed(p_list, CASE WHEN p_are_templates THEN 'uriTemplate' ELSE 'uri' END) l
     WHERE octet_length(l.name) BETWEEN 1 AND 2000
        ON CONFLICT (server_ref_id, uri, is_template) DO UPDATE
           SET server_type = excluded.server_type, user_id = excluded.user_id, name = excluded.name,
               title = excluded.title, description = excluded.description, mime_type = excluded.mime_type,
               changed_at = CASE WHEN c.definition IS DISTINCT FROM excluded.definition THEN p_at ELSE c.changed_at END,
               definition = excluded.definition, updated_at = p_at, expires_at = p_expires_at;
    DELETE FROM @extschema@.resource_cache c
     WHERE c.server_ref_id = p_server_ref_id AND c.is_template = p_are_templates AND c.updated_at <> p_at;
    SELECT count(*)::integer FROM @extschema@.resource_cache c WHERE c.server_ref_id = p_server_ref_id AND c.is_template = p_are_templates;
END;
COMMENT ON FUNCTION _nexus_hub.write_resources(uuid, text, uuid, boolean, jsonb, timestamptz, timestamptz) IS 'Makes a server''s entries in resource_cache those of p_list, and tells how many these are.';

CREATE FUNCTION _nexus_hub.write_prompts(p_server_ref_id uuid, p_server_type text, p_user_id uuid, p_server_id text, p_list jsonb, p_at timestamptz, p_expires_at timestamptz)
RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO @extschema@.prompt_cache AS c (server_ref_id, server_type, user_id, prompt_name, namespaced_name, title, description,
                                               arguments, definition, created_at, changed_at, updated_at, expires_at)
    SELECT p_server_ref_id, p_server_type, p_user_id, l.name, p_server_id || '__' || l.name, l.definition ->> 'title', l.definition ->> 'description',
           coalesce(l.definition -> 'arguments', '[]'), l.definition, p_at, p_at, p_at, p_expires_at
      FROM _nexus_hub.listed(p_list, 'name') l
     WHERE length(l.name) BETWEEN 1 AND 200
        ON CONFLICT (server_ref_id, prompt_name) DO UPDATE
           SET server_type = excluded.server_type, user_id = excluded.user_id, namespaced_name = excluded.namespaced_name,
               title = excluded.title, description = excluded.description, arguments = excluded.arguments,
               changed_at = CASE WHEN c.definition IS DISTINCT FROM excluded.definition THEN p_at ELSE c.changed_at END,
               definition = excluded.definition, updated_at = p_at, expires_at = p_expires_at;
    DELETE FROM @extschema@.prompt_cache c WHERE c.server_ref_id = p_server_ref_id AND c.updated_at <> p_at;
    SELECT count(*)::integer FROM @extschema@.prompt_cache c WHERE c.server_ref_id = p_server_ref_id;
END;
COMMENT ON FUNCTION _nexus_hub.write_prompts(uuid, text, uuid, text, jsonb, timestamptz, timestamptz) IS 'Makes a server''s entries in prompt_cache those of p_list, and tells how many these are.';

CREATE FUNCTION _nexus_hub.note_sync(p_server_ref_id uuid, p_at timestamptz, p_expires_at timestamptz, p_error text)
RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE @extschema@.server_syncs y
       SET tries = CASE WHEN p_error IS NULL THEN 0 ELSE y.tries END,
           synced_at = CASE WHEN p_error IS NULL THEN p_at ELSE y.synced_at END,
           expires_at = coalesce(p_expires_at, y.expires_at),
           failed_at = CASE WHEN p_error IS NOT NULL THEN p_at END,
           error = p_error
     WHERE y.server_ref_id = p_server_ref_id;
END;
COMMENT ON FUNCTION _nexus_hub.note_sync(uuid, timestamptz, timestamptz, text) IS 'Writes down how a sync went.';

CREATE FUNCTION _nexus_hub.settle_sync(p_job_id uuid, p_lease uuid, p_catalogue text, p_error text, p_ttl_minutes integer,
                                       OUT outcome text, OUT answer text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '20ms'
AS $$
DECLARE
    v record;
    catalogue jsonb;
    listed integer;
    tools integer;
    resources integer;
    templates integer;
    prompts integer;
    at constant timestamptz := clock_timestamp();
    expires_at timestamptz := at + make_interval(mins => p_ttl_minutes);
BEGIN
    BEGIN
        SELECT * INTO v FROM _nexus_hub.synced_server(p_job_id, p_lease);
        IF NOT FOUND THEN
            outcome := 'gone';
            RETURN;
        END IF;
    EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
        outcome := 'locked';
        RETURN;
    END;
    -- What the server lists now may be something else.
    IF v.is_changed THEN
        expires_at := at;
    END IF;
    outcome := 'written';
    BEGIN
        IF p_error IS NULL THEN
            catalogue := p_catalogue::jsonb;
            tools := _nexus_hub.write_tools(v.server_ref_id, v.server_type, v.user_id, v.server_id, catalogue -> 'tools', at, expires_at);
            resources := _nexus_hub.write_resources(v.server_ref_id, v.server_type, v.user_id, false, catalogue -> 'resources', at, expires_at);
            templates := _nexus_hub.write_resources(v.server_ref_id, v.server_type, v.user_id, true, catalogue -> 'resourceTemplates', at, expires_at);
            prompts := _nexus_hub.write_prompts(v.server_ref_id, v.server_type, v.user_id, v.server_id, catalogue -> 'prompts', at, expires_at);
            SELECT sum(jsonb_array_length(l.value)) INTO listed FROM jsonb_each(catalogue) l;
            answer := jsonb_build_object('tools', tools, 'resources', resources, 'resource_templates', templates, 'prompts', prompts,
                                         'left_out', listed - tools - resources - templates - prompts);
        END IF;
        PERFORM _nexus_hub.note_sync(v.server_ref_id, at, CASE WHEN p_error IS NULL THEN expires_at END, p_error);
        RETURN;
    EXCEPTION
        WHEN lock_not_available OR deadlock_detected THEN
            outcome := 'locked';
            RETURN;
        WHEN serialization_failure OR operator_intervention THEN
            RAISE;
        WHEN OTHERS OR assert_failure THEN
            -- What cannot be stored, or a trigger of the user's does not want.
            outcome := 'failed';
            answer := 'what the server lists cannot be stored: ' || SQLERRM;
    END;
    BEGIN
        PERFORM _nexus_hub.note_sync(v.server_ref_id, at, NULL, answer);
    EXCEPTION
        WHEN serialization_failure OR operator_intervention THEN
            RAISE;
        WHEN OTHERS OR assert_failure THEN
            NULL;
    END;
END
$$;
COMMENT ON FUNCTION _nexus_hub.settle_sync(uuid, uuid, text, text, integer) IS
    'Writes what a sync''s job has found (p_catalogue: a JSON object with the arrays tools, resources, resourceTemplates and prompts), or why it found nothing (p_error), before the job''s end is written. outcome written: answer is the job''s result, if it has one; failed: answer is the job''s error; locked: a session keeps rows locked, and it is to be tried again; gone: the job, or its server, is not there any more, or another sync was begun.';

-- ── How the caches stand ──

CREATE FUNCTION _nexus_hub.pages_percent(p_table regclass, p_pages integer) RETURNS real
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT least(100, 100.0 * p_pages / greatest(pg_relation_size(p_table) / current_setting('block_size')::integer, 1))::real;
END;
COMMENT ON FUNCTION _nexus_hub.pages_percent(regclass, integer) IS 'The share of a table, in percent, that is so many pages; 100: it has no more.';

CREATE FUNCTION _nexus_hub.cache_situation(p_pages integer, OUT entries bigint, OUT expired_share double precision, OUT failing_syncs bigint)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
SET jit = off
BEGIN ATOMIC
    WITH percent (tools, resources, prompts) AS MATERIALIZED (
        SELECT _nexus_hub.pages_percent('@extschema@.tool_cache'::regclass, p_pages),
               _nexus_hub.pages_percent('@extschema@.resource_cache'::regclass, p_pages),
               _nexus_hub.pages_percent('@extschema@.prompt_cache'::regclass, p_pages)),
    seen AS (
        SELECT c.server_ref_id, (SELECT p.tools FROM percent p) AS percent, count(*) AS entries, count(*) FILTER (WHERE c.expires_at < now()) AS expired
          FROM @extschema@.tool_cache c TABLESAMPLE system ((SELECT p.tools FROM percent p))
         WHERE c.enabled
         GROUP BY c.server_ref_id
        UNION ALL
        SELECT c.server_ref_id, (SELECT p.resources FROM percent p), count(*), count(*) FILTER (WHERE c.expires_at < now())
          FROM @extschema@.resource_cache c TABLESAMPLE system ((SELECT p.resources FROM percent p))
         GROUP BY c.server_ref_id
        UNION ALL
        SELECT c.server_ref_id, (SELECT p.prompts FROM percent p), count(*), count(*) FILTER (WHERE c.expires_at < now())
          FROM @extschema@.prompt_cache c TABLESAMPLE system ((SELECT p.prompts FROM percent p))
         GROUP BY c.server_ref_id),
    total AS (
        SELECT coalesce(sum(s.entries * 100 / s.percent), 0) AS entries, coalesce(sum(s.expired * 100 / s.percent), 0) AS expired
          FROM seen s
         -- What nobody keeps fresh, and nobody can call, is no news.
         WHERE EXISTS (SELECT FROM _nexus_hub.server(s.server_ref_id) v WHERE v.enabled))
    SELECT t.entries::bigint, coalesce(t.expired / nullif(t.entries, 0), 0),
           (SELECT count(*)
              FROM (SELECT FROM @extschema@.server_syncs y
                     WHERE y.error IS NOT NULL AND EXISTS (SELECT FROM _nexus_hub.server(y.server_ref_id) v WHERE v.enabled)
                     LIMIT 1000) AS f)
      FROM total t;
END;
COMMENT ON FUNCTION _nexus_hub.cache_situation(integer) IS
    'Entries in the caches of servers that are enabled, which share of them is expired (0 to 1), and how many of these servers could not be synced last (1000: or more). Of each table so many pages are looked at, in larger ones at random, and the rest estimated.';

-- Health: how things stand, what of it is worth waking somebody, and both as one document.

CREATE FUNCTION _nexus_hub.is_preloaded() RETURNS boolean
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'is_preloaded_wrapper';
COMMENT ON FUNCTION _nexus_hub.is_preloaded() IS 'Whether the library is in shared_preload_libraries, so that there are workers and shared memory.';

CREATE FUNCTION _nexus_hub.library_version() RETURNS text
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'library_version_wrapper';
COMMENT ON FUNCTION _nexus_hub.library_version() IS 'The version of the library that the server has loaded.';

CREATE FUNCTION _nexus_hub.workers_wanted() RETURNS integer
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'workers_wanted_wrapper';
COMMENT ON FUNCTION _nexus_hub.workers_wanted() IS 'The setting nexus_hub.workers_per_database.';

CREATE FUNCTION _nexus_hub.workers()
RETURNS TABLE (database oid, number integer, workers integer, state text, pid integer, last_loop timestamptz, in_flight integer)
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'workers_wrapper';
COMMENT ON FUNCTION _nexus_hub.workers() IS
    'The workers of all databases: which of how many of its database, whether it is starting, running, stuck (it fails again and again, or has done nothing for a minute and three poll intervals), draining (another one takes its place, and it finishes its requests) or has ended, its process, when it had done its work last, and its requests in flight.';

CREATE FUNCTION _nexus_hub.vault_problem() RETURNS text
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'vault_problem_wrapper';
COMMENT ON FUNCTION _nexus_hub.vault_problem() IS
    'Why values cannot be encrypted in this database, in words without a secret; NULL: they can, or nobody ever has, and no key is configured.';

CREATE FUNCTION _nexus_hub.job_rows() RETURNS bigint
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- After a crash the statistics are empty, and what the last vacuum or analyze has found is better than nothing.
    SELECT CASE
               WHEN pg_stat_get_tuples_inserted(c.oid) + pg_stat_get_tuples_deleted(c.oid) + pg_stat_get_live_tuples(c.oid) > 0
                   THEN pg_stat_get_live_tuples(c.oid)
               ELSE greatest(c.reltuples, 0)::bigint
           END
      FROM pg_class c
     WHERE c.oid = '@extschema@.job_results'::regclass;
END;
COMMENT ON FUNCTION _nexus_hub.job_rows() IS 'About how many rows job_results has, as PostgreSQL''s statistics know it.';

CREATE FUNCTION _nexus_hub.rate_violators() RETURNS bigint
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT count(*)
      FROM (SELECT
              FROM (SELECT w.server_id, w.user_id, w.request_count
                      FROM _nexus_hub.rate_limit_windows w
                     WHERE w.window_start >= now() - interval '11 minutes'
                     ORDER BY w.window_start DESC
                     LIMIT 100000) AS w
              LEFT JOIN @extschema@.rate_limit_overrides b ON b.server_id = w.server_id AND b.user_id = w.user_id
              LEFT JOIN @extschema@.rate_limit_overrides o ON o.user_id = w.user_id AND o.server_id IS NULL
              LEFT JOIN @extschema@.rate_limit_overrides a ON a.server_id = w.server_id AND a.user_id IS NULL
              LEFT JOIN @extschema@.user_servers u ON u.user_id = w.user_id AND u.server_id = w.server_id
              LEFT JOIN @extschema@.system_servers s ON s.id = w.server_id AND u.id IS NULL
             WHERE w.request_count > coalesce(b.request_limit, o.request_limit, a.request_limit, u.rate_limit_per_minute, s.rate_limit_per_minute)
             GROUP BY w.server_id, w.user_id
            HAVING count(*) >= 5) AS v;
END;
COMMENT ON FUNCTION _nexus_hub.rate_violators() IS
    'Servers'' users that were over the limit of the server''s row, or the override''s, in five of the last ten minutes. Limits that callers of check_rate_limit bring are not known.';

CREATE FUNCTION _nexus_hub.pending_jobs(p_most integer, OUT pending bigint, OUT oldest_pending_seconds double precision)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
-- In the order of an index, whatever the statistics say, which may be of an empty table.
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET jit = off
AS $$
BEGIN
    -- By priority, or those of a small number would hide the others.
    SELECT extract(epoch FROM now() - min(o.since)) INTO oldest_pending_seconds
      FROM generate_series(1, 9) AS p (priority)
     CROSS JOIN LATERAL (
               SELECT j.since FROM _nexus_hub.job_places j
                WHERE j.status = 'pending' AND j.priority = p.priority::smallint AND j.run_at <= now()
                ORDER BY j.run_at
                LIMIT 1) AS o
     WHERE o.since <= now();
    SELECT count(*) FILTER (WHERE d.since <= now()) INTO pending
      FROM (SELECT j.since
              FROM generate_series(1, 9) AS p (priority)
             CROSS JOIN LATERAL (
                       SELECT j.since FROM _nexus_hub.job_places j
                        WHERE j.status = 'pending' AND j.priority = p.priority::smallint AND j.run_at <= now()
                        ORDER BY j.run_at
                        LIMIT p_most) AS j
             LIMIT p_most) AS d;
END
$$;
COMMENT ON FUNCTION _nexus_hub.pending_jobs(integer) IS
    'How many jobs are due and wait, p_most at most, and for how many seconds the first of them has been due; NULL: none waits.';

CREATE FUNCTION _nexus_hub.job_situation(
    OUT pending bigint, OUT scheduled bigint, OUT running bigint, OUT oldest_pending_seconds double precision, OUT stuck_jobs bigint,
    OUT ended_last_hour bigint, OUT failed_last_hour bigint, OUT failure_rate double precision, OUT denied_last_hour bigint, OUT open_hosts bigint)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
-- In the order of an index, whatever the statistics say, which may be of an empty table.
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
SET jit = off
AS $$
DECLARE
    -- Whatever there is, the answer comes soon: nothing is counted beyond this.
    most constant integer := 10000;
    most_each constant integer := 1000;
    hour_ago constant timestamptz := now() - interval '1 hour';
BEGIN
    SELECT p.pending, p.oldest_pending_seconds INTO pending, oldest_pending_seconds FROM _nexus_hub.pending_jobs(most) p;
    SELECT count(*) INTO stuck_jobs
      FROM generate_series(1, 9) AS p (priority)
     CROSS JOIN LATERAL (
               SELECT j.since FROM _nexus_hub.job_places j
                WHERE j.status = 'pending' AND j.priority = p.priority::smallint AND j.run_at <= hour_ago
                ORDER BY j.run_at
                LIMIT most_each) AS d
     WHERE d.since <= hour_ago;
    SELECT count(*) INTO scheduled
      FROM (SELECT
              FROM generate_series(1, 9) AS p (priority)
             CROSS JOIN LATERAL (
                       SELECT FROM _nexus_hub.job_places j
                        WHERE j.status = 'pending' AND j.priority = p.priority::smallint AND j.run_at > now()
                        ORDER BY j.run_at
                        LIMIT most) AS j
             LIMIT most) AS s;
    SELECT count(*), stuck_jobs + count(*) FILTER (WHERE r.since <= hour_ago) INTO running, stuck_jobs
      FROM (SELECT j.since FROM _nexus_hub.job_places j WHERE j.status = 'running' LIMIT most) AS r;
    SELECT count(*), count(*) FILTER (WHERE e.status = 'failed') INTO ended_last_hour, failed_last_hour
      FROM (SELECT n.status
              FROM unnest(ARRAY['completed', 'failed']) AS s (status)
             CROSS JOIN LATERAL (
                       SELECT j.status, j.completed_at FROM _nexus_hub.job_places j
                        WHERE j.status = s.status AND j.status IN ('completed', 'failed', 'cancelled') AND j.completed_at > hour_ago
                        ORDER BY j.completed_at DESC
                        LIMIT most) AS n
             ORDER BY n.completed_at DESC
             LIMIT most) AS e;
    failure_rate := CASE WHEN ended_last_hour >= 10 THEN failed_last_hour::double precision / ended_last_hour ELSE 0 END;
    SELECT count(*) INTO denied_last_hour
      FROM (SELECT a.error FROM _nexus_hub.job_attempts a WHERE a.finished_at > hour_ago ORDER BY a.finished_at DESC LIMIT most) AS f
     WHERE f.error LIKE 'the egress policy does not allow %';
    SELECT count(DISTINCT b.host) INTO open_hosts FROM _nexus_hub.circuit_breakers b;
END
$$;
COMMENT ON FUNCTION _nexus_hub.job_situation() IS 'How the job tables stand. Counts end at 10000. Failures are those of the last hour, of the last 10000 jobs in it; the rate is 0 of fewer than ten jobs.';

CREATE FUNCTION _nexus_hub.situation(
    OUT is_preloaded boolean, OUT is_standby boolean, OUT is_enabled boolean, OUT missing_workers integer, OUT stuck_workers integer,
    OUT are_tables_locked boolean, OUT restoring_sessions bigint,
    OUT pending bigint, OUT scheduled bigint, OUT running bigint, OUT oldest_pending_seconds double precision, OUT stuck_jobs bigint,
    OUT ended_last_hour bigint, OUT failed_last_hour bigint, OUT failure_rate double precision, OUT denied_last_hour bigint, OUT open_hosts bigint,
    OUT table_rows bigint, OUT vault_problem text, OUT vault_uses bigint,
    OUT rate_keys integer, OUT rate_max_keys integer, OUT rate_allowed bigint, OUT rate_denied bigint, OUT rate_full bigint, OUT rate_violators bigint,
    OUT cache_entries bigint, OUT cache_expired_share double precision, OUT failing_syncs bigint)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- Who watches must not wait for what is wrong.
SET lock_timeout = '100ms'
AS $$
BEGIN
    is_preloaded := _nexus_hub.is_preloaded();
    is_standby := pg_is_in_recovery();
    is_enabled := coalesce(current_setting('nexus_hub.enabled', true)::boolean, true);
    SELECT greatest(_nexus_hub.workers_wanted() - count(*) FILTER (WHERE w.state NOT IN ('ended', 'draining')), 0), count(*) FILTER (WHERE w.state = 'stuck')
      INTO missing_workers, stuck_workers
      FROM _nexus_hub.workers() w
     WHERE w.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());
    IF is_standby THEN
        -- It has none, and is to have none.
        missing_workers := 0;
    END IF;
    SELECT count(*) INTO restoring_sessions
      FROM pg_locks l
     WHERE l.locktype = 'advisory' AND l.classid = 'pg_extension'::regclass AND l.objid = 0 AND l.objsubid = 3 AND l.mode = 'ShareLock'
       AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());
    are_tables_locked := false;
    BEGIN
        SELECT j.pending, j.scheduled, j.running, j.oldest_pending_seconds, j.stuck_jobs, j.ended_last_hour, j.failed_last_hour,
               j.failure_rate, j.denied_last_hour, j.open_hosts
          INTO pending, scheduled, running, oldest_pending_seconds, stuck_jobs, ended_last_hour, failed_last_hour,
               failure_rate, denied_last_hour, open_hosts
          FROM _nexus_hub.job_situation() j;
        rate_violators := _nexus_hub.rate_violators();
        SELECT c.entries, c.expired_share, c.failing_syncs INTO cache_entries, cache_expired_share, failing_syncs
          FROM _nexus_hub.cache_situation(300) c;
        SELECT max(k.uses) INTO vault_uses
          FROM (SELECT sum(n.encrypted_count)::bigint AS uses FROM _nexus_hub.known_vault_keys n GROUP BY n.fingerprint) AS k;
        vault_problem := _nexus_hub.vault_problem();
    EXCEPTION WHEN lock_not_available THEN
        are_tables_locked := true;
    END;
    table_rows := _nexus_hub.job_rows();
    SELECT s.keys, s.max_keys, s.allowed, s.denied, s.full_table INTO rate_keys, rate_max_keys, rate_allowed, rate_denied, rate_full
      FROM _nexus_hub.rate_limit_statistics() s;
END
$$;
COMMENT ON FUNCTION _nexus_hub.situation() IS 'How things stand in this database. NULL: not known, because somebody has the tables locked.';

CREATE FUNCTION _nexus_hub.judge(p_situation jsonb)
RETURNS TABLE (name text, severity text, value double precision, threshold double precision, firing boolean, description text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT a.name, a.severity, a.value, a.threshold, a.value > a.threshold, a.description
      FROM jsonb_to_record(p_situation) AS s (
               is_preloaded boolean, is_standby boolean, is_enabled boolean, missing_workers integer, stuck_workers integer,
               are_tables_locked boolean, restoring_sessions bigint, pending bigint, oldest_pending_seconds double precision, stuck_jobs bigint, failure_rate double precision,
               table_rows bigint, denied_last_hour bigint, open_hosts bigint, vault_problem text, vault_uses bigint, rate_violators bigint,
               cache_expired_share double precision)
     CROSS JOIN LATERAL (VALUES
        ('worker_down', 'critical', s.missing_workers::double precision, 0::double precision,
            CASE WHEN s.is_preloaded THEN 'workers are missing: see the server''s log, and max_worker_processes'
                 ELSE 'nexus_hub is not preloaded: add it to shared_preload_libraries and restart the server' END),
        ('worker_stuck', 'critical', s.stuck_workers, 0,
            'workers fail again and again, or were not seen at work for long: look at the server''s log, and for locks on job_results in pg_locks'),
        ('tables_locked', 'critical', s.are_tables_locked::integer, 0,
            'a session keeps nexus_hub''s tables locked, and jobs wait for it: see pg_locks'),
        ('vault_key_unusable', 'critical', (s.vault_problem IS NOT NULL)::integer, 0,
            coalesce(s.vault_problem, 'the vault''s keys cannot be used')),
        ('jobs_disabled', 'warning', (NOT s.is_enabled AND NOT s.is_standby)::integer, 0,
            'nexus_hub.enabled is off: jobs stay pending'),
        ('restoring', 'warning', coalesce(s.restoring_sessions, 0), 0,
            'sessions that load a dump are there, and jobs wait until they end: SELECT pid FROM pg_locks WHERE locktype = ''advisory'' AND objsubid = 3 AND mode = ''ShareLock'''),
        ('oldest_pending_age', 'warning', coalesce(s.oldest_pending_seconds, 0), 300,
            'a job has been due for so many seconds: look at circuit_breakers, rate limits, and nexus_hub.max_in_flight'),
        ('stuck_jobs', 'warning', coalesce(s.stuck_jobs, 0), 0,
            'jobs have been running, or due, for more than an hour'),
        ('job_failure_rate', 'warning', coalesce(s.failure_rate, 0), 0.1,
            'of the jobs that ended in the last hour, so many have failed: look at job_attempts'),
        ('circuit_breakers_open', 'warning', coalesce(s.open_hosts, 0), 0,
            'hosts cannot be reached: see circuit_breakers'),
        ('rate_limit_violations', 'warning', coalesce(s.rate_violators, 0), 0,
            'servers'' callers were over their limit in five of the last ten minutes: see rate_limit_tracking'),
        ('cache_expired', 'warning', coalesce(s.cache_expired_share, 0), 0.5,
            'of what the caches hold, so much is expired: server_syncs says why servers cannot be synced; see nexus_hub.auto_refresh, too'),
        ('egress_denials', 'warning', coalesce(s.denied_last_hour, 0), 10,
            'attempts to reach what nexus_hub.egress_allow does not open, in the last hour: see job_attempts'),
        ('vault_key_worn', 'warning', coalesce(s.vault_uses, 0), 2147483647,
            'a vault key has encrypted half of the values for which it is safe: put a new key above it, and rotate'),
        ('upgrade_pending', 'warning', (_nexus_hub.library_version() IS DISTINCT FROM (
                SELECT e.extversion FROM pg_extension e WHERE e.extname = 'nexus_hub'))::integer, 0,
            'the library and the extension are of different versions: ALTER EXTENSION nexus_hub UPDATE, and restart the server'),
        ('job_table_size', 'info', s.table_rows, 1000000,
            'job_results has so many rows: shorten nexus_hub.completed_retention, or call cleanup_job_results_manual()'))
        AS a (name, severity, value, threshold, description);
END;
COMMENT ON FUNCTION _nexus_hub.judge(jsonb) IS 'What of a situation is worth an alert; see the view nexus_hub_alerts.';

CREATE FUNCTION _nexus_hub.alerts()
RETURNS TABLE (name text, severity text, value double precision, threshold double precision, firing boolean, description text)
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT j.name, j.severity, j.value, j.threshold, j.firing, j.description
      FROM _nexus_hub.situation() AS s
     CROSS JOIN LATERAL _nexus_hub.judge(to_jsonb(s)) AS j;
END;
COMMENT ON FUNCTION _nexus_hub.alerts() IS 'What the view nexus_hub_alerts shows.';

CREATE VIEW @extschema@.nexus_hub_alerts WITH (security_barrier) AS
    SELECT a.name, a.severity, a.value, a.threshold, a.firing, a.description FROM _nexus_hub.alerts() AS a;
COMMENT ON VIEW @extschema@.nexus_hub_alerts IS
    'The alerts worth having, judged now: a row each, whether it fires or not. Answers soon, whatever the size of the tables and whoever has them locked. For the owner, service_role and pg_monitor.';
COMMENT ON COLUMN @extschema@.nexus_hub_alerts.name IS 'The alert.';
COMMENT ON COLUMN @extschema@.nexus_hub_alerts.severity IS 'critical: wake somebody; warning: look at it today; info: know it.';
COMMENT ON COLUMN @extschema@.nexus_hub_alerts.value IS 'What was measured. Counts of jobs end at 10000.';
COMMENT ON COLUMN @extschema@.nexus_hub_alerts.threshold IS 'It fires above this.';
COMMENT ON COLUMN @extschema@.nexus_hub_alerts.firing IS 'Whether it fires.';
COMMENT ON COLUMN @extschema@.nexus_hub_alerts.description IS 'What it means, and where to look.';

CREATE FUNCTION _nexus_hub.health(p_answers boolean) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    s record;
    status text;
    reasons jsonb;
BEGIN
    SELECT * INTO s FROM _nexus_hub.situation();
    SELECT CASE WHEN bool_or(j.name IN ('worker_down', 'worker_stuck')) THEN 'down' WHEN count(*) > 0 THEN 'degraded' ELSE 'ok' END,
           coalesce(jsonb_agg(jsonb_build_object('name', j.name, 'severity', j.severity, 'value', j.value,
                                                 'threshold', j.threshold, 'reason', j.description)), '[]')
      INTO status, reasons
      FROM _nexus_hub.judge(to_jsonb(s)) AS j
     WHERE j.firing AND j.severity <> 'info';
    -- What PostgREST answers with. Elsewhere it is a setting of this transaction that nobody reads.
    IF p_answers AND status = 'down' THEN
        PERFORM set_config('response.status', '503', true);
    END IF;
    RETURN jsonb_build_object(
        'status', status,
        'reasons', reasons,
        'version', (SELECT e.extversion FROM pg_extension e WHERE e.extname = 'nexus_hub'),
        'library_version', _nexus_hub.library_version(),
        'preloaded', s.is_preloaded,
        'standby', s.is_standby,
        'enabled', s.is_enabled,
        'workers', (SELECT coalesce(jsonb_agg(jsonb_build_object(
                               'database', d.datname, 'number', w.number, 'of', w.workers, 'state', w.state, 'pid', w.pid,
                               'last_loop', w.last_loop,
                               'seconds_since_last_loop', round(extract(epoch FROM clock_timestamp() - w.last_loop), 3),
                               'in_flight', w.in_flight) ORDER BY d.datname, w.number), '[]')
                      FROM _nexus_hub.workers() w
                      JOIN pg_database d ON d.oid = w.database
                     WHERE w.state <> 'ended'),
        'jobs', jsonb_build_object(
            'pending', s.pending, 'scheduled', s.scheduled, 'running', s.running,
            'oldest_pending_seconds', round(s.oldest_pending_seconds::numeric, 3), 'stuck', s.stuck_jobs,
            'ended_last_hour', s.ended_last_hour, 'failed_last_hour', s.failed_last_hour, 'rows', s.table_rows),
        'vault', jsonb_build_object('usable', s.vault_problem IS NULL AND NOT s.are_tables_locked, 'problem', s.vault_problem, 'encrypted_count', s.vault_uses),
        'rate_limits', jsonb_build_object(
            'keys', s.rate_keys, 'max_keys', s.rate_max_keys, 'fill', round(s.rate_keys / s.rate_max_keys::numeric, 4),
            'allowed', s.rate_allowed, 'denied', s.rate_denied, 'no_room', s.rate_full),
        'cache', jsonb_build_object(
            'entries', s.cache_entries, 'expired_share', round(s.cache_expired_share::numeric, 4), 'failing_syncs', s.failing_syncs),
        'egress', jsonb_build_object('denied_last_hour', coalesce(s.denied_last_hour, 0), 'unreachable_hosts', s.open_hosts));
END
$$;
COMMENT ON FUNCTION _nexus_hub.health(boolean) IS 'What nexus_hub_health returns. p_answers: sets the HTTP status of the answer, too.';

CREATE FUNCTION @extschema@.nexus_hub_health() RETURNS jsonb
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.health(true);
END;
COMMENT ON FUNCTION @extschema@.nexus_hub_health() IS
    'How things stand in this database, as one document: status is ok; degraded: something needs a look; or down: no job runs. reasons says why it is not ok: the alerts of nexus_hub_alerts that fire, those of severity info left out. Through PostgREST the HTTP status is 503 when it is down, else 200. Counts of jobs end at 10000. Works on a standby and in read-only transactions. For the owner, service_role and pg_monitor.';

CREATE FUNCTION _nexus_hub.health_summary()
RETURNS TABLE (status text, reasons text[], pending bigint, running bigint, oldest_pending_seconds double precision,
               messages_last_hour bigint, recent_function_errors bigint, active_sessions bigint)
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT h.health ->> 'status', ARRAY(SELECT r ->> 'name' FROM jsonb_array_elements(h.health -> 'reasons') AS r),
           (h.health -> 'jobs' ->> 'pending')::bigint, (h.health -> 'jobs' ->> 'running')::bigint,
           (h.health -> 'jobs' ->> 'oldest_pending_seconds')::double precision,
           (h.health -> 'jobs' ->> 'ended_last_hour')::bigint, (h.health -> 'jobs' ->> 'failed_last_hour')::bigint,
           (SELECT coalesce(sum((w ->> 'in_flight')::bigint), 0)::bigint FROM jsonb_array_elements(h.health -> 'workers') AS w WHERE w ->> 'database' = current_database())
      FROM (SELECT _nexus_hub.health(false) AS health) AS h;
END;
COMMENT ON FUNCTION _nexus_hub.health_summary() IS 'What the view system_health_summary shows.';

CREATE VIEW @extschema@.system_health_summary WITH (security_barrier) AS
    SELECT h.status, h.reasons, h.pending, h.running, h.oldest_pending_seconds, h.messages_last_hour, h.recent_function_errors, h.active_sessions
      FROM _nexus_hub.health_summary() AS h;
COMMENT ON VIEW @extschema@.system_health_summary IS 'nexus_hub_health() in one row, under names that runbooks know. For the owner, service_role and pg_monitor.';
COMMENT ON COLUMN @extschema@.system_health_summary.status IS 'ok, degraded or down.';
COMMENT ON COLUMN @extschema@.system_health_summary.reasons IS 'The alerts that fire.';
COMMENT ON COLUMN @extschema@.system_health_summary.pending IS 'Jobs that are due and wait; 10000: or more.';
COMMENT ON COLUMN @extschema@.system_health_summary.running IS 'Jobs that run; 10000: or more.';
COMMENT ON COLUMN @extschema@.system_health_summary.oldest_pending_seconds IS 'How long the job that has waited longest has been due; NULL: none waits.';
COMMENT ON COLUMN @extschema@.system_health_summary.messages_last_hour IS 'Jobs that completed or failed in the last hour; 10000: or more.';
COMMENT ON COLUMN @extschema@.system_health_summary.recent_function_errors IS 'Of these, those that failed.';
COMMENT ON COLUMN @extschema@.system_health_summary.active_sessions IS 'Requests that the workers of this database have in flight.';

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

-- Backups: what a dump of the database leaves out.

CREATE TABLE _nexus_hub.parts (
    relation oid NOT NULL,
    kind text NOT NULL,
    name text NOT NULL,
    PRIMARY KEY (relation, kind, name)
);
COMMENT ON TABLE _nexus_hub.parts IS 'What the extension''s own scripts have made of its tables. Whatever else there is, somebody has added, and a dump leaves it out.';
COMMENT ON COLUMN _nexus_hub.parts.relation IS 'The table''s oid.';
COMMENT ON COLUMN _nexus_hub.parts.kind IS 'column, index, trigger, policy or constraint.';
COMMENT ON COLUMN _nexus_hub.parts.name IS 'Its name.';

CREATE FUNCTION _nexus_hub.present_parts()
RETURNS TABLE (relation oid, kind text, name text, made_by xid, statement text)
LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH own AS (
        SELECT c.oid
          FROM pg_depend d
          JOIN pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND e.extname = 'nexus_hub'
          JOIN pg_class c ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND c.relkind = 'r'
         WHERE d.deptype = 'e')
    SELECT a.attrelid, 'column'::text, a.attname::text, a.xmin,
           concat_ws(' ', format('ALTER TABLE %s ADD COLUMN %I %s', a.attrelid::regclass, a.attname, format_type(a.atttypid, a.atttypmod)),
                     (SELECT format('COLLATE %I.%I', n.nspname, l.collname) FROM pg_collation l JOIN pg_namespace n ON n.oid = l.collnamespace
                       WHERE l.oid = a.attcollation AND a.attcollation <> t.typcollation),
                     CASE a.attidentity WHEN 'a' THEN 'GENERATED ALWAYS AS IDENTITY' WHEN 'd' THEN 'GENERATED BY DEFAULT AS IDENTITY' END,
                     CASE a.attgenerated WHEN 's' THEN format('GENERATED ALWAYS AS (%s) STORED', pg_get_expr(x.adbin, x.adrelid))
                                         WHEN 'v' THEN format('GENERATED ALWAYS AS (%s) VIRTUAL', pg_get_expr(x.adbin, x.adrelid))
                                         ELSE 'DEFAULT ' || pg_get_expr(x.adbin, x.adrelid) END,
                     CASE WHEN a.attnotnull THEN 'NOT NULL' END)
      FROM pg_attribute a JOIN own o ON o.oid = a.attrelid JOIN pg_type t ON t.oid = a.atttypid
      LEFT JOIN pg_attrdef x ON x.adrelid = a.attrelid AND x.adnum = a.attnum
     WHERE a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT c.conrelid, 'constraint'::text, c.conname::text, c.xmin, format('ALTER TABLE %s ADD CONSTRAINT %I %s', c.conrelid::regclass, c.conname, pg_get_constraintdef(c.oid))
      FROM pg_constraint c JOIN own o ON o.oid = c.conrelid
     -- Those that go with columns come with them.
     WHERE c.contype IN ('c', 'f', 'p', 'u', 'x')
    UNION ALL
    SELECT i.indrelid, 'index'::text, r.relname::text, i.xmin, pg_get_indexdef(i.indexrelid)
      FROM pg_index i JOIN own o ON o.oid = i.indrelid JOIN pg_class r ON r.oid = i.indexrelid
     WHERE NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conindid = i.indexrelid AND c.conrelid = i.indrelid)
    UNION ALL
    SELECT t.tgrelid, 'trigger'::text, t.tgname::text, t.xmin, pg_get_triggerdef(t.oid)
      FROM pg_trigger t JOIN own o ON o.oid = t.tgrelid
     WHERE NOT t.tgisinternal
    UNION ALL
    SELECT p.polrelid, 'policy'::text, p.polname::text, p.xmin,
           concat_ws(' ', format('CREATE POLICY %I ON %s', p.polname, p.polrelid::regclass),
                     CASE WHEN NOT p.polpermissive THEN 'AS RESTRICTIVE' END,
                     'FOR ' || CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
                     'TO ' || (SELECT string_agg(CASE u.role WHEN 0 THEN 'PUBLIC' ELSE u.role::regrole::text END, ', ') FROM unnest(p.polroles) AS u (role)),
                     'USING (' || pg_get_expr(p.polqual, p.polrelid) || ')', 'WITH CHECK (' || pg_get_expr(p.polwithcheck, p.polrelid) || ')')
      FROM pg_policy p JOIN own o ON o.oid = p.polrelid;
END;
COMMENT ON FUNCTION _nexus_hub.present_parts() IS 'What there is of the extension''s tables, the transaction that made it, and a statement that makes it again.';

CREATE FUNCTION _nexus_hub.note_parts() RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO _nexus_hub.parts (relation, kind, name)
    SELECT p.relation, p.kind, p.name
      FROM _nexus_hub.present_parts() p
     WHERE p.made_by = (SELECT f.xmin FROM pg_proc f JOIN pg_namespace n ON n.oid = f.pronamespace
                         WHERE n.nspname = '_nexus_hub' AND f.proname = 'note_parts')
        ON CONFLICT DO NOTHING;
END;
COMMENT ON FUNCTION _nexus_hub.note_parts() IS
    'Called at the end of the scripts that install and update, each of which makes this function anew: notes what the same transaction has made.';

CREATE VIEW _nexus_hub.added_parts AS
    SELECT p.relation, p.kind, p.name, p.statement
      FROM _nexus_hub.present_parts() p
     WHERE NOT EXISTS (SELECT FROM _nexus_hub.parts o WHERE o.relation = p.relation AND o.kind = p.kind AND o.name = p.name);
COMMENT ON VIEW _nexus_hub.added_parts IS 'What others have added to the extension''s tables.';
COMMENT ON COLUMN _nexus_hub.added_parts.relation IS 'The table''s oid.';
COMMENT ON COLUMN _nexus_hub.added_parts.kind IS 'column, index, trigger, policy or constraint.';
COMMENT ON COLUMN _nexus_hub.added_parts.name IS 'Its name.';
COMMENT ON COLUMN _nexus_hub.added_parts.statement IS 'What makes it again.';

CREATE FUNCTION _nexus_hub.backup_items() RETURNS TABLE (item text, state text, advice text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    BEGIN
        RETURN QUERY
        SELECT 'vault key'::text,
               CASE WHEN k.value_count IS NULL OR k.fingerprint IS NULL OR k.source IS NULL THEN 'problem' ELSE 'save' END,
               CASE
                   WHEN k.value_count IS NULL THEN 'not all values could be read, so it is not known which keys they are under: see the warnings'
                   WHEN k.fingerprint IS NULL THEN format('%s values are under a key that the server does not have: no backup brings them back without it', k.value_count)
                   WHEN k.source IS NULL THEN format('%s values are under the key %s, which the server does not have: put it into the key source again', k.value_count, k.fingerprint)
                   ELSE format('%s values are under the key %s (%s): save it, and not beside the dump; without it nobody reads them again', k.value_count, k.fingerprint, k.source)
               END
          FROM _nexus_hub.vault_key_state() k
         WHERE k.value_count IS DISTINCT FROM 0;
    EXCEPTION WHEN config_file_error THEN
        RETURN QUERY SELECT 'vault key'::text, 'problem'::text, 'the vault''s keys cannot be used, so it is not known which ones are needed: ' || SQLERRM;
    END;
    RETURN QUERY
    SELECT 'server settings'::text, 'save'::text, 'no dump holds what the server''s configuration says: ' || string_agg(s.name, ', ' ORDER BY s.name)
      FROM pg_settings s
     WHERE (s.name LIKE 'nexus\_hub.%' OR s.name = 'shared_preload_libraries') AND s.source IN ('configuration file', 'command line', 'environment variable')
    HAVING count(*) > 0;
    RETURN QUERY
    SELECT 'database settings'::text, 'save'::text,
           'only pg_dump --create and pg_dumpall hold what ALTER DATABASE … SET says: ' || string_agg(split_part(c.setting, '=', 1), ', ' ORDER BY c.setting)
      FROM pg_db_role_setting r
     CROSS JOIN LATERAL unnest(r.setconfig) AS c (setting)
     WHERE r.setdatabase = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()) AND c.setting ~ '^(nexus_hub|app)\.'
    HAVING count(*) > 0;
    RETURN QUERY
    SELECT 'roles'::text, 'save'::text, 'only pg_dumpall holds roles, which have to be there before the extension is restored: ' || string_agg(r.rolname, ', ' ORDER BY r.rolname)
      FROM pg_roles r
     WHERE r.rolname IN ('anon', 'authenticated', 'service_role', 'authenticator')
    HAVING count(*) > 0;
    RETURN QUERY
    SELECT 'publication'::text, 'redo'::text,
           format('a dump leaves the extension''s tables out of it; after the restore, with the column lists and filters that \dRp+ shows now: ALTER PUBLICATION %I ADD TABLE %s',
                  p.pubname, string_agg(r.prrelid::regclass::text, ', ' ORDER BY r.prrelid::regclass::text))
      FROM pg_publication p
      JOIN pg_publication_rel r ON r.prpubid = p.oid
     WHERE EXISTS (SELECT FROM pg_depend d JOIN pg_extension e ON d.refobjid = e.oid AND d.refclassid = 'pg_extension'::regclass
                    WHERE d.classid = 'pg_class'::regclass AND d.objid = r.prrelid AND d.deptype = 'e' AND e.extname = 'nexus_hub')
     GROUP BY p.pubname;
    RETURN QUERY
    SELECT p.kind, CASE p.kind WHEN 'column' THEN 'problem' ELSE 'redo' END,
           CASE p.kind
               WHEN 'column' THEN 'a dump holds its values but not the column, and the restore of the table fails; in the new database create the extension first, then this, then restore: ' || p.statement
               ELSE 'somebody has added it to a table of the extension, and a dump leaves it out; after the restore: ' || p.statement
           END
      FROM _nexus_hub.added_parts p
     ORDER BY p.kind, p.statement;
    RETURN QUERY
    SELECT o.kind, 'problem'::text, format('%s of %s is not there under its name: somebody has renamed or dropped it, and a restore brings it back as it was made', o.name, o.relation::regclass)
      FROM _nexus_hub.parts o
     WHERE EXISTS (SELECT FROM pg_class c WHERE c.oid = o.relation)
       AND NOT EXISTS (SELECT FROM _nexus_hub.present_parts() p WHERE p.relation = o.relation AND p.kind = o.kind AND p.name = o.name)
     ORDER BY o.relation::regclass::text, o.name;
    RETURN QUERY
    SELECT 'jobs'::text, 'know'::text, format('%s are pending or running, and run again where the dump is restored: with ALTER DATABASE … SET nexus_hub.enabled = off before it, not until that is reset', count(*))
      FROM _nexus_hub.job_places j
     WHERE j.status IN ('pending', 'running')
    HAVING count(*) > 0;
END
$$;
COMMENT ON FUNCTION _nexus_hub.backup_items() IS 'What backup_preflight returns.';

CREATE FUNCTION @extschema@.backup_preflight() RETURNS TABLE (item text, state text, advice text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT b.item, b.state, b.advice FROM _nexus_hub.backup_items() b;
END;
COMMENT ON FUNCTION @extschema@.backup_preflight() IS
    'What a dump of this database leaves out, before it is trusted: a row each. state: save (to be saved besides the dump), redo (to be done again after the restore), problem (the backup is not good as things are), know. It does not look at changed defaults, storage parameters, replica identities, rules and disabled triggers. Tries the vault''s values: a second for a million or so. For the owner alone.';

-- What 0.1.0 has made of its tables.
INSERT INTO _nexus_hub.parts (relation, kind, name)
SELECT p.relation::regclass, p.kind, n.name
  FROM (VALUES
        ('@extschema@.api_gateway_configs', 'column', '{base_url,created_at,id,updated_at,user_id}'),
        ('@extschema@.api_gateway_configs', 'constraint', '{api_gateway_configs_base_url_valid,api_gateway_configs_pkey}'),
        ('@extschema@.api_gateway_configs', 'index', '{api_gateway_configs_team,api_gateway_configs_user}'),
        ('@extschema@.api_gateway_configs', 'policy', '{api_gateway_configs_owner_select,api_gateway_configs_service_all}'),
        ('@extschema@.api_keys', 'column', '{api_key_encrypted,created_at,id,last_used_at,service,updated_at,user_id}'),
        ('@extschema@.api_keys', 'constraint', '{api_keys_api_key_encrypted_length,api_keys_pkey,api_keys_service_known}'),
        ('@extschema@.api_keys', 'index', '{api_keys_team_service,api_keys_user_service}'),
        ('@extschema@.api_keys', 'policy', '{api_keys_owner_select,api_keys_service_all}'),
        ('@extschema@.circuit_breakers', 'column', '{error,failures,host,opened_at,probe_at,state,worker}'),
        ('@extschema@.circuit_breakers', 'constraint', '{circuit_breakers_pkey,circuit_breakers_state_known}'),
        ('@extschema@.circuit_breakers', 'policy', '{circuit_breakers_service_select}'),
        ('@extschema@.job_attempts', 'column', '{attempt,error,finished_at,http_status,id,job_id,started_at}'),
        ('@extschema@.job_attempts', 'constraint', '{job_attempts_pkey}'),
        ('@extschema@.job_attempts', 'index', '{job_attempts_job}'),
        ('@extschema@.job_attempts', 'policy', '{job_attempts_of_visible_jobs}'),
        ('@extschema@.job_results', 'column', '{attempt,completed_at,crashes,created_at,error,id,idempotency_key,job_type,lease,max_attempts,params,priority,result,run_at,server_id,started_at,status,target,timeout_ms,tool_name,user_id}'),
        ('@extschema@.job_results', 'constraint', '{job_results_counts,job_results_job,job_results_options,job_results_params_object,job_results_params_size,job_results_pkey,job_results_state}'),
        ('@extschema@.job_results', 'index', '{job_results_nobodys_idempotency_key,job_results_pending,job_results_running,job_results_user,job_results_user_idempotency_key}'),
        ('@extschema@.job_results', 'policy', '{job_results_owner_insert,job_results_owner_select,job_results_service_all}'),
        ('@extschema@.job_results', 'trigger', '{job_results_settle,job_results_settle_again,job_results_wake_delete,job_results_wake_insert,job_results_wake_update}'),
        ('@extschema@.rate_limit_exemptions', 'column', '{created_at,identifier,reason}'),
        ('@extschema@.rate_limit_exemptions', 'constraint', '{rate_limit_exemptions_identifier_length,rate_limit_exemptions_pkey}'),
        ('@extschema@.rate_limit_exemptions', 'policy', '{rate_limit_exemptions_service_all}'),
        ('@extschema@.rate_limit_exemptions', 'trigger', '{rate_limit_exemptions_changed}'),
        ('@extschema@.rate_limit_overrides', 'column', '{created_at,id,key,request_limit,server_id,user_id}'),
        ('@extschema@.rate_limit_overrides', 'constraint', '{rate_limit_overrides_key_length,rate_limit_overrides_pkey,rate_limit_overrides_request_limit_range,rate_limit_overrides_server_id_length,rate_limit_overrides_target}'),
        ('@extschema@.rate_limit_overrides', 'index', '{rate_limit_overrides_target_key}'),
        ('@extschema@.rate_limit_overrides', 'policy', '{rate_limit_overrides_service_all}'),
        ('@extschema@.rate_limit_overrides', 'trigger', '{rate_limit_overrides_changed}'),
        ('@extschema@.system_servers', 'column', '{config,created_at,enabled,id,name,rate_limit_per_minute,ref_id}'),
        ('@extschema@.system_servers', 'constraint', '{system_servers_config_object,system_servers_id_length,system_servers_pkey,system_servers_rate_limit_range,system_servers_ref_id_key}'),
        ('@extschema@.system_servers', 'policy', '{system_servers_enabled_select,system_servers_service_all}'),
        ('@extschema@.user_servers', 'column', '{config_encrypted,created_at,enabled,id,name,rate_limit_per_minute,server_id,transport,updated_at,user_id}'),
        ('@extschema@.user_servers', 'constraint', '{user_servers_config_encrypted_length,user_servers_pkey,user_servers_rate_limit_range,user_servers_server_id_length,user_servers_transport_known,user_servers_user_id_server_id_key}'),
        ('@extschema@.user_servers', 'policy', '{user_servers_owner_all,user_servers_service_all}'),
        ('@extschema@.user_settings', 'column', '{allow_gateway_fallback,created_at,updated_at,user_id}'),
        ('@extschema@.user_settings', 'constraint', '{user_settings_pkey}'),
        ('@extschema@.user_settings', 'policy', '{user_settings_owner_all,user_settings_service_all}'),
        ('@extschema@.user_settings', 'trigger', '{user_settings_set_updated_at}'),
        ('_nexus_hub.known_vault_keys', 'column', '{encrypted_count,fingerprint,first_seen}'),
        ('_nexus_hub.known_vault_keys', 'constraint', '{known_vault_keys_fingerprint_form}'),
        ('_nexus_hub.rate_limit_entries', 'column', '{expires_at,id,kind,name,state,user_id,window_seconds}'),
        ('_nexus_hub.rate_limit_entries', 'constraint', '{rate_limit_entries_pkey}'),
        ('_nexus_hub.rate_limit_entries', 'index', '{rate_limit_entries_expires_at_idx}'),
        ('_nexus_hub.rate_limit_windows', 'column', '{request_count,server_id,user_id,window_start}'),
        ('_nexus_hub.rate_limit_windows', 'index', '{rate_limit_windows_key}'),
        ('_nexus_hub.registered_columns', 'column', '{column_name,context,owner_name,registered_at,relation}'),
        ('_nexus_hub.registered_columns', 'constraint', '{registered_columns_pkey}'),
        ('_nexus_hub.secrets', 'column', '{created_at,id,name,updated_at,user_id,value_encrypted}'),
        ('_nexus_hub.secrets', 'constraint', '{secrets_name_form,secrets_pkey,secrets_value_encrypted_length}'),
        ('_nexus_hub.secrets', 'index', '{secrets_shared_name,secrets_user_name}'),
        ('_nexus_hub.secrets', 'policy', '{secrets_owner_all,secrets_service_all}'),
        ('_nexus_hub.vault_audit_log', 'column', '{at,count,kind,object,outcome,role,sub}'),
        ('_nexus_hub.vault_audit_log', 'constraint', '{vault_audit_log_count_positive,vault_audit_log_kind_known,vault_audit_log_object_length,vault_audit_log_outcome_known,vault_audit_log_outcome_there}'),
        ('_nexus_hub.vault_audit_log', 'index', '{vault_audit_log_at}'),
        ('_nexus_hub.vault_rotation_errors', 'column', '{item,reason}'),
        ('_nexus_hub.vault_rotation_errors', 'constraint', '{vault_rotation_errors_pkey}'),
        ('_nexus_hub.vault_rotation_state', 'column', '{column_name,done,end_block,ended_at,failed_columns,fingerprint,is_only,next_block,problem,relation,resealed,ring,spent,started_at,state,swept_at,total,unopened}'),
        ('_nexus_hub.vault_rotation_state', 'constraint', '{vault_rotation_state_ended,vault_rotation_state_is_only,vault_rotation_state_known,vault_rotation_state_pkey}')) AS p (relation, kind, names)
 CROSS JOIN LATERAL unnest(p.names::text[]) AS n (name);

-- ── Who may do what ──

CREATE FUNCTION _nexus_hub.join_realtime() RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_publication p WHERE p.pubname = 'supabase_realtime')
       -- By whatever way: of all tables, or of the schema.
       AND NOT EXISTS (SELECT FROM pg_publication_tables t
                        WHERE t.pubname = 'supabase_realtime'
                          AND format('%I.%I', t.schemaname, t.tablename)::regclass = '@extschema@.job_results'::regclass) THEN
        EXECUTE 'ALTER PUBLICATION supabase_realtime ADD TABLE @extschema@.job_results';
    END IF;
END
$$;
COMMENT ON FUNCTION _nexus_hub.join_realtime() IS
    'Adds job_results to the publication supabase_realtime, if there is one, for those who watch their jobs instead of asking. The primary key is its replica identity: new rows are complete but for large arguments that have not changed.';

CREATE OR REPLACE FUNCTION _nexus_hub.grant_api() RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    grantee text;
BEGIN
    FOR grantee IN SELECT rolname FROM pg_roles WHERE rolname IN ('authenticated', 'service_role') LOOP
        -- No format(): a schema's name may hold a per cent sign.
        EXECUTE 'GRANT USAGE ON SCHEMA @extschema@ TO ' || grantee;
        EXECUTE 'GRANT EXECUTE ON FUNCTION
            @extschema@.add_server(text, text, jsonb, uuid),
            @extschema@.update_server(uuid, text, jsonb, boolean),
            @extschema@.delete_server(uuid),
            @extschema@.list_servers(),
            @extschema@.sync_server(uuid),
            _nexus_hub.begin_sync(uuid, integer),
            _nexus_hub.cannot_sync(text, boolean),
            @extschema@.create_secret(text, text, uuid),
            @extschema@.update_secret(text, text, uuid),
            @extschema@.delete_secret(text, uuid),
            @extschema@.list_secrets(),
            @extschema@.create_job(uuid, text, text, text, jsonb, integer, timestamptz, integer, integer, text),
            @extschema@.get_job_status(uuid),
            @extschema@.wait_for_job(uuid, integer),
            @extschema@.cancel_job(uuid),
            @extschema@.retry_job(uuid),
            @extschema@.retry_failed_jobs(text, text, timestamptz, timestamptz),
            @extschema@.get_job_attempts(uuid),
            @extschema@.execute_job_via_pg_net(uuid),
            _nexus_hub.owner(uuid, uuid, boolean, boolean),
            _nexus_hub.server_exists(text),
            _nexus_hub.server_id(text),
            _nexus_hub.seal_server_config(text),
            _nexus_hub.check_secret(text, text),
            _nexus_hub.seal_secret(text, text),
            _nexus_hub.secret_context(uuid, text),
            _nexus_hub.secret_exists(text),
            _nexus_hub.secret_owner(uuid),
            _nexus_hub.check_job(text, text, text, text, boolean),
            _nexus_hub.wake_worker(),
            _nexus_hub.job_not_found(uuid),
            _nexus_hub.await_job(uuid, integer),
            _nexus_hub.check_job_options(integer, timestamptz, integer, integer, text, boolean),
            _nexus_hub.job_of_key(uuid, text),
            _nexus_hub.job_of_key_gone(text),
            _nexus_hub.cancel_unfinished_job(uuid),
            _nexus_hub.retry_finished_jobs(uuid[])
            TO ' || grantee;
    END LOOP;

    -- A signed-in user: own rows by row-level security, and of those never a ciphertext, never a result to write.
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'authenticated') THEN
        GRANT SELECT (id, user_id, server_id, name, transport, enabled, rate_limit_per_minute, created_at, updated_at),
              INSERT (user_id, server_id, name, transport, config_encrypted, enabled),
              UPDATE (name, config_encrypted, enabled, updated_at),
              DELETE
           ON @extschema@.user_servers TO authenticated;
        GRANT SELECT (id, user_id, name, created_at, updated_at),
              INSERT (user_id, name, value_encrypted),
              UPDATE (value_encrypted, updated_at),
              DELETE
           ON _nexus_hub.secrets TO authenticated;
        GRANT SELECT (id, ref_id, name, enabled, rate_limit_per_minute, created_at) ON @extschema@.system_servers TO authenticated;
        GRANT SELECT,
              INSERT (user_id, job_type, server_id, tool_name, params, status, priority, run_at, timeout_ms, max_attempts, idempotency_key)
           ON @extschema@.job_results TO authenticated;
        GRANT SELECT ON @extschema@.job_attempts TO authenticated;
        GRANT SELECT ON @extschema@.tool_cache, @extschema@.resource_cache, @extschema@.prompt_cache, @extschema@.server_syncs TO authenticated;
        GRANT UPDATE (enabled) ON @extschema@.tool_cache TO authenticated;
        GRANT SELECT (id, user_id, service, created_at, updated_at, last_used_at) ON @extschema@.api_keys TO authenticated;
        GRANT SELECT ON @extschema@.api_gateway_configs TO authenticated;
        -- UPDATE of user_id, because an upsert of PostgREST writes all columns it is given; row-level security keeps it the user's.
        GRANT SELECT, INSERT (user_id, allow_gateway_fallback), UPDATE (user_id, allow_gateway_fallback)
           ON @extschema@.user_settings TO authenticated;
    END IF;

    -- The trusted back end: everything public.
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'service_role') THEN
        GRANT SELECT, INSERT, UPDATE, DELETE
           ON @extschema@.system_servers, @extschema@.user_servers, @extschema@.job_results,
              @extschema@.api_keys, @extschema@.api_gateway_configs, @extschema@.user_settings,
              @extschema@.tool_cache, @extschema@.resource_cache, @extschema@.prompt_cache, @extschema@.server_syncs,
              @extschema@.rate_limit_exemptions, @extschema@.rate_limit_overrides, _nexus_hub.secrets TO service_role;
        GRANT SELECT ON @extschema@.rate_limit_tracking, @extschema@.rate_limit_stats TO service_role;
        GRANT SELECT ON @extschema@.job_attempts, @extschema@.circuit_breakers TO service_role;
        GRANT EXECUTE ON FUNCTION
            @extschema@.http_request(text, text, text, jsonb, integer, integer, timestamptz, integer, text),
            @extschema@.http_get(text, jsonb, integer, integer, timestamptz, integer, text),
            @extschema@.http_post(text, jsonb, jsonb, integer, integer, timestamptz, integer, text),
            @extschema@.encrypt_token(text, text),
            @extschema@.decrypt_token(bytea, text),
            @extschema@.encrypt_config(jsonb, text),
            @extschema@.decrypt_config(bytea, text),
            _nexus_hub.decrypt_json(bytea, text),
            @extschema@.rotate_vault_key(),
            _nexus_hub.rotate_values(),
            _nexus_hub.vault_key_state(),
            @extschema@.start_vault_rotation(),
            @extschema@.pause_vault_rotation(),
            @extschema@.resume_vault_rotation(),
            _nexus_hub.launch_rotation(),
            _nexus_hub.set_rotation_paused(boolean),
            _nexus_hub.primary_vault_key(),
            _nexus_hub.vault_column_list(),
            _nexus_hub.open_secret(bytea, text, text),
            _nexus_hub.api_key_object(uuid, text),
            _nexus_hub.api_key_context(uuid, text),
            _nexus_hub.api_service(text),
            _nexus_hub.api_key(text),
            _nexus_hub.model_provider(text),
            _nexus_hub.model_name(text, text),
            _nexus_hub.no_api_key(text, uuid, boolean),
            @extschema@.check_rate_limit(text, uuid, integer),
            @extschema@.rate_limit(text, integer, integer, integer, integer),
            @extschema@.rate_limit_peek(text, integer, integer, integer, integer),
            @extschema@.rate_limit_all(text[], integer[], integer[], integer[], integer[]),
            @extschema@.reset_rate_limit(text),
            @extschema@.reset_server_rate_limit(text, uuid),
            @extschema@.enforce_rate_limits(text[], text[], integer[], integer[], integer[], integer[]),
            _nexus_hub.limit_request(text[], text[], integer[], integer[], integer[], integer[]),
            _nexus_hub.answer_request(boolean, text, text, bigint, text),
            @extschema@.nexus_hub_health(),
            @extschema@.nexus_hub_metrics(),
            _nexus_hub.metrics_page(),
            _nexus_hub.health(boolean),
            _nexus_hub.alerts(),
            _nexus_hub.health_summary(),
            @extschema@.refresh_expired_cache_entries(),
            _nexus_hub.refresh_expired(),
            @extschema@.cleanup_old_job_results(),
            @extschema@.cleanup_job_results_manual(integer, integer),
            _nexus_hub.cleanup_jobs(interval, interval),
            _nexus_hub.job_retention(text),
            _nexus_hub.days(integer, text),
            _nexus_hub.rate_limit_minutes(),
            _nexus_hub.rate_limit_statistics()
            TO service_role;
        GRANT USAGE ON SCHEMA nexus_hub_media_types TO service_role;
        GRANT SELECT ON @extschema@.nexus_hub_alerts, @extschema@.system_health_summary TO service_role;
        GRANT SELECT ON @extschema@.vault_keys, @extschema@.vault_columns, @extschema@.vault_rotation, @extschema@.vault_rotation_errors,
              @extschema@.vault_audit
           TO service_role;
    END IF;
    PERFORM _nexus_hub.join_realtime();
END
$$;
COMMENT ON FUNCTION _nexus_hub.grant_api() IS
    'Gives the roles authenticated and service_role, as far as they exist, their rights, and calls join_realtime. Runs at install; run it again as a superuser when roles or publication were made later, or after a restore, which forgets the publication''s tables.';

-- Default privileges (those of Supabase, say) may have opened what was just made: begin with the owner alone. What was there
-- before keeps the rights that somebody may have given.
DO $$
DECLARE
    grantee record;
BEGIN
    FOR grantee IN
        SELECT DISTINCT
               CASE d.classid WHEN 'pg_proc'::regclass THEN format('FUNCTION %s', d.objid::regprocedure)
                              WHEN 'pg_namespace'::regclass THEN format('SCHEMA %s', d.objid::regnamespace)
                              ELSE format('TABLE %s', d.objid::regclass) END AS object,
               CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END AS role
          FROM pg_catalog.pg_depend d
          JOIN pg_catalog.pg_extension e ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND e.extname = 'nexus_hub'
          LEFT JOIN pg_catalog.pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
          LEFT JOIN pg_catalog.pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid AND c.relkind IN ('r', 'p', 'v')
          LEFT JOIN pg_catalog.pg_namespace n ON d.classid = 'pg_namespace'::regclass AND n.oid = d.objid
         CROSS JOIN LATERAL pg_catalog.aclexplode(CASE d.classid
                   WHEN 'pg_proc'::regclass THEN coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))
                   WHEN 'pg_namespace'::regclass THEN coalesce(n.nspacl, pg_catalog.acldefault('n', n.nspowner))
                   ELSE coalesce(c.relacl, pg_catalog.acldefault('r', c.relowner)) END) a
         WHERE d.deptype = 'e'
           AND (p.proname IN ('alerts', 'backup_items', 'backup_preflight', 'begin_sync', 'cache_situation', 'cannot_sync',
                   'cleanup_job_results_manual', 'cleanup_jobs', 'cleanup_old_job_results', 'cleanup_rate_limit_tracking', 'days', 'delete_all_old_jobs',
                   'delete_attempts', 'delete_old_attempts', 'delete_old_jobs', 'expired_servers', 'fail_orphans', 'forget_server',
                   'forget_servers_cache', 'gauges', 'health', 'health_summary', 'is_lease_live', 'is_preloaded',
                   'job_bytes', 'job_retention', 'job_rows', 'job_situation', 'join_realtime', 'judge',
                   'library_version', 'listed', 'metrics_page', 'nexus_hub_health', 'nexus_hub_metrics', 'note_parts',
                   'note_restore', 'note_sync', 'old_jobs', 'pages_percent', 'pending_jobs', 'pending_rows',
                   'present_parts', 'prune_jobs', 'rate_violators', 'refresh_due', 'refresh_expired', 'refresh_expired_cache_entries',
                   'server', 'settle_run_at', 'settle_sync', 'situation', 'sync_server', 'synced_server',
                   'vault_problem', 'workers', 'workers_wanted', 'write_prompts', 'write_resources', 'write_tools')
                OR c.relname IN ('added_parts', 'job_places', 'nexus_hub_alerts', 'parts', 'prompt_cache', 'resource_cache',
                   'server_syncs', 'system_health_summary', 'tool_cache')
                OR n.nspname = 'nexus_hub_media_types')
           AND coalesce(p.oid, c.oid, n.oid) IS NOT NULL
           AND a.grantee <> coalesce(p.proowner, c.relowner, n.nspowner)
    LOOP
        EXECUTE pg_catalog.format('REVOKE ALL ON %s FROM %s', grantee.object, grantee.role);
    END LOOP;
END
$$;

-- PostgreSQL's own role for those who watch.
GRANT USAGE ON SCHEMA @extschema@, nexus_hub_media_types TO pg_monitor;
GRANT EXECUTE ON FUNCTION @extschema@.nexus_hub_health(), _nexus_hub.health(boolean), _nexus_hub.alerts(), _nexus_hub.health_summary(),
        @extschema@.nexus_hub_metrics(), _nexus_hub.metrics_page() TO pg_monitor;
GRANT SELECT ON @extschema@.nexus_hub_alerts, @extschema@.system_health_summary TO pg_monitor;

SELECT _nexus_hub.grant_api();
SELECT _nexus_hub.note_parts();

-- The worker looks at everything when this transaction commits.
SELECT _nexus_hub.extension_created();
