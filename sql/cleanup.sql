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
