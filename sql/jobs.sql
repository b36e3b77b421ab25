-- Jobs: the table, its state machine, what users call, and what the worker calls.

CREATE FUNCTION _nexus_hub.uuid_v7() RETURNS uuid
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'uuid_v7_wrapper';
COMMENT ON FUNCTION _nexus_hub.uuid_v7() IS
    'A new UUIDv7 (RFC 9562): ids that sort by the time they were made.';

CREATE TABLE @extschema@.job_results (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    user_id uuid,
    job_type text NOT NULL
        CONSTRAINT job_results_job_type_known
        CHECK (job_type IN ('tool_invoke', 'resource_fetch', 'prompt_execute', 'http_request')),
    server_id text,
    tool_name text,
    params jsonb NOT NULL DEFAULT '{}'
        CONSTRAINT job_results_params_object CHECK (jsonb_typeof(params) = 'object'),
    status text NOT NULL DEFAULT 'pending'
        CONSTRAINT job_results_status_known
        CHECK (status IN ('pending', 'running', 'completed', 'failed', 'cancelled')),
    result jsonb,
    error text,
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    completed_at timestamptz,
    lease uuid,
    CONSTRAINT job_results_server_named
        CHECK (job_type = 'http_request' OR coalesce(server_id, '') <> ''),
    CONSTRAINT job_results_tool_named
        CHECK (job_type NOT IN ('tool_invoke', 'prompt_execute') OR coalesce(tool_name, '') <> ''),
    CONSTRAINT job_results_uri_given
        CHECK (job_type <> 'resource_fetch' OR (params ->> 'uri') IS NOT NULL),
    CONSTRAINT job_results_url_given
        CHECK (job_type <> 'http_request' OR (params ->> 'url') IS NOT NULL),
    CONSTRAINT job_results_finished_has_time
        CHECK ((status IN ('completed', 'failed', 'cancelled')) = (completed_at IS NOT NULL)),
    CONSTRAINT job_results_running_has_time
        CHECK (status <> 'running' OR started_at IS NOT NULL),
    CONSTRAINT job_results_lease_while_running
        CHECK (lease IS NULL OR status = 'running'),
    CONSTRAINT job_results_result_when_finished
        CHECK ((result IS NULL AND error IS NULL) OR status IN ('completed', 'failed', 'cancelled'))
) WITH (
    -- Each job is three row versions in quick succession: leave room on the page, and let autovacuum keep up.
    fillfactor = 70,
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_cost_delay = 0
);
COMMENT ON TABLE @extschema@.job_results IS 'Background jobs and their results. Any committed row with status pending is run by the worker.';
COMMENT ON COLUMN @extschema@.job_results.id IS 'The job''s id (UUIDv7), also sent as Idempotency-Key with its requests.';
COMMENT ON COLUMN @extschema@.job_results.user_id IS 'The user whose job it is: who may see it, and whose servers it uses. NULL: nobody''s, system servers only.';
COMMENT ON COLUMN @extschema@.job_results.job_type IS 'tool_invoke, resource_fetch, prompt_execute (MCP, by server_id) or http_request (plain HTTP, not for users).';
COMMENT ON COLUMN @extschema@.job_results.server_id IS 'The MCP server: looked up among the user''s enabled user_servers, then among enabled system_servers.';
COMMENT ON COLUMN @extschema@.job_results.tool_name IS 'tool_invoke: the tool; prompt_execute: the prompt.';
COMMENT ON COLUMN @extschema@.job_results.params IS 'A JSON object. tool_invoke, prompt_execute: the arguments; resource_fetch: {"uri": …}; http_request: {"url": …, "method": …, "headers": {…}, "body": …, "timeout_ms": …}.';
COMMENT ON COLUMN @extschema@.job_results.status IS 'pending (waits), running, completed, failed or cancelled.';
COMMENT ON COLUMN @extschema@.job_results.result IS 'MCP: the result object as the server sent it; http_request: {"status", "headers", "body" or "body_base64"}.';
COMMENT ON COLUMN @extschema@.job_results.error IS 'Why the job failed, for people.';
COMMENT ON COLUMN @extschema@.job_results.created_at IS 'When the job was made; jobs start in this order.';
COMMENT ON COLUMN @extschema@.job_results.started_at IS 'When a worker took the job (the last time).';
COMMENT ON COLUMN @extschema@.job_results.completed_at IS 'When the job was completed, failed or cancelled; set in these states and in no other.';
COMMENT ON COLUMN @extschema@.job_results.lease IS 'The fencing token of the claim that runs the job: only an outcome of that very claim is written.';

CREATE INDEX job_results_pending ON @extschema@.job_results (created_at, id) WHERE status = 'pending';
CREATE INDEX job_results_running ON @extschema@.job_results (lease) WHERE status = 'running';
CREATE INDEX job_results_user ON @extschema@.job_results (user_id, created_at);

SELECT pg_catalog.pg_extension_config_dump('@extschema@.job_results', '');

ALTER TABLE @extschema@.job_results ENABLE ROW LEVEL SECURITY;

CREATE POLICY job_results_owner_select ON @extschema@.job_results
    FOR SELECT USING (user_id = (SELECT @extschema@.nexus_hub_uid()));
CREATE POLICY job_results_owner_insert ON @extschema@.job_results
    FOR INSERT WITH CHECK (
        user_id = (SELECT @extschema@.nexus_hub_uid())
        AND status = 'pending' AND job_type <> 'http_request');
CREATE POLICY job_results_service_all ON @extschema@.job_results
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));

-- Hand-written updates (cancel all that is stuck, run that one again) set the status alone; the rest follows from it.
CREATE FUNCTION _nexus_hub.settle_job() RETURNS trigger
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
        NEW.started_at := coalesce(NEW.started_at, now());
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
    END IF;
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION _nexus_hub.settle_job() IS 'Trigger: makes times, lease and result follow a status that was set by hand.';

-- The condition spares the worker's own updates, which are settled already, the call.
CREATE TRIGGER job_results_settle BEFORE INSERT OR UPDATE ON @extschema@.job_results
    FOR EACH ROW
    WHEN ((NEW.status IN ('completed', 'failed', 'cancelled')) <> (NEW.completed_at IS NOT NULL)
          OR (NEW.status = 'running' AND NEW.started_at IS NULL)
          OR (NEW.status <> 'running' AND NEW.lease IS NOT NULL)
          OR (NEW.status = 'pending' AND NEW.started_at IS NOT NULL)
          OR (NEW.status IN ('pending', 'running') AND (NEW.result IS NOT NULL OR NEW.error IS NOT NULL)))
    EXECUTE FUNCTION _nexus_hub.settle_job();

CREATE FUNCTION _nexus_hub.wake_on_change() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'wake_on_change_wrapper';
COMMENT ON FUNCTION _nexus_hub.wake_on_change() IS 'Trigger: wakes the worker of this database when the transaction commits.';

CREATE TRIGGER job_results_wake_insert AFTER INSERT ON @extschema@.job_results
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.wake_on_change();
CREATE TRIGGER job_results_wake_update AFTER UPDATE OF status ON @extschema@.job_results
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.wake_on_change();

-- ── What the public functions need ──

CREATE FUNCTION _nexus_hub.check_job(job_type text, server_id text, tool_name text, params text, bound boolean) RETURNS void
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'check_job_wrapper';
COMMENT ON FUNCTION _nexus_hub.check_job(text, text, text, text, boolean) IS
    'Raises 22023 with a helpful text when a job''s fields do not fit its type, and 42501 for a type that is not for callers bound to own rows.';

CREATE FUNCTION _nexus_hub.wake_worker() RETURNS void
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'wake_worker_wrapper';
COMMENT ON FUNCTION _nexus_hub.wake_worker() IS
    'Wakes the worker of this database when the transaction commits. Errors: 55000 not preloaded.';

CREATE FUNCTION _nexus_hub.job_not_found(job_id uuid) RETURNS void
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'job_not_found_wrapper';
COMMENT ON FUNCTION _nexus_hub.job_not_found(uuid) IS
    'Raises 22023 Job <id> not found.';

CREATE FUNCTION _nexus_hub.await_job(job_id uuid, timeout_ms integer) RETURNS void
LANGUAGE c VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS 'MODULE_PATHNAME', 'await_job_wrapper';
COMMENT ON FUNCTION _nexus_hub.await_job(uuid, integer) IS
    'Blocks until a job is finished or the milliseconds have passed. The caller has been found entitled to it.';

CREATE FUNCTION _nexus_hub.cancel_pending_job(p_job_id uuid) RETURNS boolean
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH cancelled AS (
        UPDATE @extschema@.job_results
           SET status = 'cancelled', completed_at = clock_timestamp()
         WHERE id = p_job_id AND status = 'pending'
        RETURNING 1)
    SELECT count(*) > 0 FROM cancelled;
END;
COMMENT ON FUNCTION _nexus_hub.cancel_pending_job(uuid) IS 'Cancels a job that is still pending. The caller has been found entitled to it.';

CREATE FUNCTION _nexus_hub.job_progress(p_job_id uuid, OUT finished boolean, OUT writer bigint)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT j.status IN ('completed', 'failed', 'cancelled'), j.xmin::text::bigint
      FROM @extschema@.job_results j
     WHERE j.id = p_job_id;
END;
COMMENT ON FUNCTION _nexus_hub.job_progress(uuid) IS 'Whether a job is finished, and which transaction wrote its row: the running one itself waits in vain.';

-- ── What users call: caller's rights, row-level security decides, bodies bound at creation (see servers.sql) ──

CREATE FUNCTION @extschema@.create_job(p_user_id uuid, p_job_type text, p_server_id text, p_tool_name text DEFAULT NULL, p_params jsonb DEFAULT '{}')
RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.check_job(p_job_type, p_server_id, p_tool_name, p_params::text,
                                row_security_active('@extschema@.job_results'::regclass) AND NOT _nexus_hub.is_service_role());
    INSERT INTO @extschema@.job_results (user_id, job_type, server_id, tool_name, params)
    VALUES (_nexus_hub.owner(p_user_id, @extschema@.nexus_hub_uid(), row_security_active('@extschema@.job_results'::regclass)
                             AND NOT _nexus_hub.is_service_role(), false), p_job_type, p_server_id, p_tool_name, coalesce(p_params, '{}'))
    RETURNING id;
END;
COMMENT ON FUNCTION @extschema@.create_job(uuid, text, text, text, jsonb) IS
    'Adds a job, to be run when this transaction commits, and returns its id. p_user_id: whose job (NULL: the caller''s nexus_hub_uid()). p_job_type: tool_invoke, resource_fetch, prompt_execute or http_request. p_server_id: the MCP server. p_tool_name: the tool or prompt. p_params: the arguments; resource_fetch: {"uri"}; http_request: {"url", …}. Errors: 22023 bad argument, 42501 not the caller''s own.';

CREATE FUNCTION @extschema@.get_job_status(p_job_id uuid)
RETURNS TABLE (id uuid, job_type text, server_id text, tool_name text, status text, result jsonb, error text,
               created_at timestamptz, started_at timestamptz, completed_at timestamptz)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT j.id, j.job_type, j.server_id, j.tool_name, j.status, j.result, j.error, j.created_at, j.started_at, j.completed_at
      FROM @extschema@.job_results j
     WHERE j.id = p_job_id;
END;
COMMENT ON FUNCTION @extschema@.get_job_status(uuid) IS
    'A job''s state and result: one row, or none when the caller has no such job.';

CREATE FUNCTION @extschema@.wait_for_job(p_job_id uuid, p_timeout_ms integer DEFAULT 30000)
RETURNS TABLE (id uuid, job_type text, server_id text, tool_name text, status text, result jsonb, error text,
               created_at timestamptz, started_at timestamptz, completed_at timestamptz)
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.await_job(j.id, p_timeout_ms) FROM @extschema@.job_results j WHERE j.id = p_job_id;
    SELECT s.id, s.job_type, s.server_id, s.tool_name, s.status, s.result, s.error, s.created_at, s.started_at, s.completed_at
      FROM @extschema@.get_job_status(p_job_id) s;
END;
COMMENT ON FUNCTION @extschema@.wait_for_job(uuid, integer) IS
    'Waits until a job is finished, at most p_timeout_ms (0 to 3600000) milliseconds, and returns what get_job_status returns; the status tells whether it is finished. Call it in a transaction of its own, after the one that made the job. Errors: 22023 bad time-out, 55000 the job is not committed yet, the isolation level hides its end, or the worker is not there.';

CREATE FUNCTION @extschema@.cancel_job(p_job_id uuid) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce((SELECT _nexus_hub.cancel_pending_job(j.id) FROM @extschema@.job_results j WHERE j.id = p_job_id), false);
END;
COMMENT ON FUNCTION @extschema@.cancel_job(uuid) IS
    'Cancels a job that has not started. Returns false when it runs or is finished already, or the caller has no such job.';

CREATE FUNCTION @extschema@.execute_job_via_pg_net(job_id uuid) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT CASE
        WHEN EXISTS (SELECT FROM @extschema@.job_results j WHERE j.id = job_id) THEN _nexus_hub.wake_worker()
        ELSE _nexus_hub.job_not_found(job_id)
    END;
END;
COMMENT ON FUNCTION @extschema@.execute_job_via_pg_net(uuid) IS
    'Wakes the worker for a job. Kept for code that was written for pg_net: a pending job needs no such call. Errors: 22023 no such job, 55000 the worker is not there.';

-- ── What only the worker calls ──

-- The worker is a superuser, so it must reach these tables and no others, whoever renames schemas: a view is bound to
-- its table for good, while a name in plpgsql is looked up anew.
CREATE VIEW _nexus_hub.job_results AS SELECT * FROM @extschema@.job_results;
CREATE VIEW _nexus_hub.user_servers AS SELECT * FROM @extschema@.user_servers;
CREATE VIEW _nexus_hub.system_servers AS SELECT * FROM @extschema@.system_servers;
COMMENT ON VIEW _nexus_hub.job_results IS 'The table of that name, for the worker.';
COMMENT ON VIEW _nexus_hub.user_servers IS 'The table of that name, for the worker.';
COMMENT ON VIEW _nexus_hub.system_servers IS 'The table of that name, for the worker.';

DO $$
DECLARE
    mirrored record;
BEGIN
    FOR mirrored IN
        SELECT v.oid::regclass AS view, a.attname, col_description(d.refobjid, a.attnum) AS comment
          FROM pg_class v
          JOIN pg_rewrite r ON r.ev_class = v.oid
          JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass
          JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
         WHERE v.relnamespace = '_nexus_hub'::regnamespace AND v.relkind = 'v' AND d.refobjsubid > 0
    LOOP
        EXECUTE format('COMMENT ON COLUMN %s.%I IS %L', mirrored.view, mirrored.attname, mirrored.comment);
    END LOOP;
END
$$;

-- Plans are made once and kept, perhaps while the table is empty: without enable_seqscan = off they would go on reading
-- all of it when it has millions of rows. A join can go wrong in more ways, so that of complete_jobs is planned anew.

CREATE FUNCTION _nexus_hub.claim_jobs(p_lease uuid, p_limit integer)
RETURNS TABLE (id uuid, job_type text, server_id text, tool_name text, params text,
               user_config bytea, user_enabled boolean, system_config text, system_enabled boolean)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH claimed AS (
        UPDATE _nexus_hub.job_results j
           SET status = 'running', started_at = clock_timestamp(), lease = p_lease
         WHERE j.id = ANY (ARRAY(
                   SELECT p.id FROM _nexus_hub.job_results p
                    WHERE p.status = 'pending'
                    ORDER BY p.created_at, p.id
                    LIMIT p_limit
                      FOR UPDATE SKIP LOCKED))
        RETURNING j.id, j.user_id, j.job_type, j.server_id, j.tool_name, j.params)
    SELECT c.id, c.job_type, c.server_id, c.tool_name, c.params::text,
           u.config_encrypted, u.enabled, s.config::text, s.enabled
      FROM claimed c
      LEFT JOIN _nexus_hub.user_servers u ON u.user_id = c.user_id AND u.server_id = c.server_id AND c.job_type <> 'http_request'
      LEFT JOIN _nexus_hub.system_servers s ON s.id = c.server_id AND c.job_type <> 'http_request';
END
$$;
COMMENT ON FUNCTION _nexus_hub.claim_jobs(uuid, integer) IS
    'Takes up to p_limit pending jobs, oldest first, under the lease p_lease, together with their server''s config.';

CREATE FUNCTION _nexus_hub.complete_jobs(p_ids uuid[], p_leases uuid[], p_statuses text[], p_results text[], p_errors text[])
RETURNS SETOF uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
SET plan_cache_mode = force_custom_plan
SET lock_timeout = '20ms'
AS $$
BEGIN
    BEGIN
        UPDATE _nexus_hub.job_results j
           SET status = o.status, result = o.result::jsonb, error = o.error, completed_at = clock_timestamp(), lease = NULL
          FROM unnest(p_ids, p_leases, p_statuses, p_results, p_errors) AS o (id, lease, status, result, error)
         -- Only a running job has a lease. Said again with its status, the index of running jobs would look better to
         -- the planner than it is for a join.
         WHERE j.id = o.id AND j.lease = o.lease;
        RETURN;
    EXCEPTION WHEN data_exception OR program_limit_exceeded OR lock_not_available THEN
        -- One answer that jsonb can't hold, or one row that a session keeps locked, must not hold up the others: one by
        -- one, passing over what is locked.
        NULL;
    END;
    FOR i IN 1 .. cardinality(p_ids) LOOP
        PERFORM FROM _nexus_hub.job_results j
          WHERE j.id = p_ids[i] AND j.status = 'running' AND j.lease = p_leases[i]
            FOR NO KEY UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            RETURN QUERY SELECT j.id FROM _nexus_hub.job_results j
              WHERE j.id = p_ids[i] AND j.status = 'running' AND j.lease = p_leases[i];
            CONTINUE;
        END IF;
        BEGIN
            UPDATE _nexus_hub.job_results j
               SET status = p_statuses[i], result = p_results[i]::jsonb, error = p_errors[i],
                   completed_at = clock_timestamp(), lease = NULL
             WHERE j.id = p_ids[i];
        EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
            UPDATE _nexus_hub.job_results j
               SET status = 'failed', error = 'the answer cannot be stored as jsonb: ' || SQLERRM,
                   completed_at = clock_timestamp(), lease = NULL
             WHERE j.id = p_ids[i];
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION _nexus_hub.complete_jobs(uuid[], uuid[], text[], text[], text[]) IS
    'Writes the outcomes of jobs that are still running under the lease they were claimed with, and returns those whose rows are locked, to be written later. Others (cancelled meanwhile, say) stay as they are.';

CREATE FUNCTION _nexus_hub.release_jobs(p_leases uuid[]) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    released integer;
BEGIN
    UPDATE _nexus_hub.job_results
       SET status = 'pending', started_at = NULL, lease = NULL
     WHERE id = ANY (ARRAY(
               SELECT j.id FROM _nexus_hub.job_results j
                WHERE j.status = 'running' AND j.lease IS NOT NULL AND j.lease <> ALL (p_leases)
                  FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS released = ROW_COUNT;
    RETURN released;
END
$$;
COMMENT ON FUNCTION _nexus_hub.release_jobs(uuid[]) IS
    'Gives back the jobs held under other leases than these, which are the ones of the database''s only worker.';
