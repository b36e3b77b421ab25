-- Jobs: the table, its state machine, what users call, and what the worker calls.

CREATE FUNCTION _nexus_hub.uuid_v7() RETURNS uuid
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'uuid_v7_wrapper';
COMMENT ON FUNCTION _nexus_hub.uuid_v7() IS
    'A new UUIDv7 (RFC 9562): ids that sort by the time they were made.';

CREATE FUNCTION _nexus_hub.url_authority(url text) RETURNS text
LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE
AS 'MODULE_PATHNAME', 'url_authority_wrapper';
COMMENT ON FUNCTION _nexus_hub.url_authority(text) IS
    'The host and port a URL leads to, as the worker reads it; the empty string for what is no http or https URL. NULL in, NULL out.';

-- A CHECK's expression is parsed anew for each statement that writes a row, which for twenty of them takes longer than
-- writing it. So there are few, and what they have in common is in functions, whose errors say more, too.

CREATE FUNCTION _nexus_hub.is_job(job_type text, server_id text, tool_name text, has_uri boolean, has_url boolean) RETURNS boolean
LANGUAGE c IMMUTABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'is_job_wrapper';
COMMENT ON FUNCTION _nexus_hub.is_job(text, text, text, boolean, boolean) IS
    'For CHECK: true, or raises 22023 with a helpful text when a job''s columns do not fit its type.';

CREATE FUNCTION _nexus_hub.are_job_options(priority integer, run_at timestamptz, timeout_ms integer, max_attempts integer, idempotency_key text) RETURNS boolean
LANGUAGE c IMMUTABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'are_job_options_wrapper';
COMMENT ON FUNCTION _nexus_hub.are_job_options(integer, timestamptz, integer, integer, text) IS
    'For CHECK: true, or raises 22023 with a helpful text when an option is out of its range.';

CREATE FUNCTION _nexus_hub.is_job_state(status text, started boolean, ended boolean, leased boolean, has_outcome boolean) RETURNS boolean
LANGUAGE c IMMUTABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'is_job_state_wrapper';
COMMENT ON FUNCTION _nexus_hub.is_job_state(text, boolean, boolean, boolean, boolean) IS
    'For CHECK: whether there is such a status, and a job''s times, lease, result and error fit it. completed, failed and cancelled jobs, and no others, have a completed_at, and may have a result and an error; running ones have a started_at, and may have a lease.';

CREATE TABLE @extschema@.job_results (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    user_id uuid,
    job_type text NOT NULL,
    server_id text,
    tool_name text,
    params jsonb NOT NULL DEFAULT '{}'
        CONSTRAINT job_results_params_object CHECK (jsonb_typeof(params) = 'object')
        CONSTRAINT job_results_params_size CHECK (pg_column_size(params) <= 16777216),
    status text NOT NULL DEFAULT 'pending',
    result jsonb,
    error text,
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    completed_at timestamptz,
    lease uuid,
    priority smallint NOT NULL DEFAULT 5,
    run_at timestamptz NOT NULL DEFAULT now(),
    timeout_ms integer,
    max_attempts integer,
    attempt integer NOT NULL DEFAULT 0,
    crashes integer NOT NULL DEFAULT 0,
    idempotency_key text,
    target text GENERATED ALWAYS AS (
        CASE WHEN job_type = 'http_request' THEN _nexus_hub.url_authority(params ->> 'url') ELSE server_id END) STORED,
    failures integer NOT NULL DEFAULT 0,
    CONSTRAINT job_results_job
        CHECK (_nexus_hub.is_job(job_type, server_id, tool_name, (params ->> 'uri') IS NOT NULL, (params ->> 'url') IS NOT NULL)),
    CONSTRAINT job_results_options
        CHECK (_nexus_hub.are_job_options(priority, run_at, timeout_ms, max_attempts, idempotency_key)),
    CONSTRAINT job_results_state
        CHECK (_nexus_hub.is_job_state(status, started_at IS NOT NULL, completed_at IS NOT NULL, lease IS NOT NULL,
                                       result IS NOT NULL OR error IS NOT NULL)),
    CONSTRAINT job_results_counts CHECK (least(attempt, crashes, failures) >= 0)
) WITH (
    -- Each job is three row versions in quick succession: leave room on the page, and let autovacuum keep up.
    fillfactor = 70,
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_cost_delay = 0
);
-- The worker bounds what it claims at a time by the size of the arguments, which is not to be had of compressed ones.
ALTER TABLE @extschema@.job_results ALTER COLUMN params SET STORAGE EXTERNAL;
COMMENT ON TABLE @extschema@.job_results IS 'Background jobs and their results. Any committed row with status pending is run by the worker.';
COMMENT ON COLUMN @extschema@.job_results.id IS 'The job''s id (UUIDv7), also sent as Idempotency-Key with its requests.';
COMMENT ON COLUMN @extschema@.job_results.user_id IS 'The user whose job it is: who may see it, and whose servers it uses. NULL: nobody''s, system servers only.';
COMMENT ON COLUMN @extschema@.job_results.job_type IS 'tool_invoke, resource_fetch, prompt_execute (MCP, by server_id), server_sync (MCP, made by sync_server) or http_request (plain HTTP, not for users).';
COMMENT ON COLUMN @extschema@.job_results.server_id IS 'The MCP server: looked up among the user''s enabled user_servers, then among enabled system_servers.';
COMMENT ON COLUMN @extschema@.job_results.tool_name IS 'tool_invoke: the tool; prompt_execute: the prompt. Up to 200 characters.';
COMMENT ON COLUMN @extschema@.job_results.params IS 'A JSON object of up to 16 MB. tool_invoke, prompt_execute: the arguments; resource_fetch: {"uri": …}; http_request: {"url": …, "method": …, "headers": {…}, "body": …, "timeout_ms": …}, with {{secret:name}} for a named secret in the URL or a header''s value.';
COMMENT ON COLUMN @extschema@.job_results.status IS 'pending (waits), running, completed, failed or cancelled.';
COMMENT ON COLUMN @extschema@.job_results.result IS 'MCP: the result object as the server sent it; server_sync: how much it has found; http_request: {"status", "headers", "body" or "body_base64"}.';
COMMENT ON COLUMN @extschema@.job_results.error IS 'Why the job failed, for people.';
COMMENT ON COLUMN @extschema@.job_results.created_at IS 'When the job was made.';
COMMENT ON COLUMN @extschema@.job_results.started_at IS 'When a worker took the job (the last time).';
COMMENT ON COLUMN @extschema@.job_results.completed_at IS 'When the job was completed, failed or cancelled; set in these states and in no other.';
COMMENT ON COLUMN @extschema@.job_results.lease IS 'The fencing token of the claim that runs the job: only an outcome of that very claim is written.';
COMMENT ON COLUMN @extschema@.job_results.priority IS '1 (first) to 9 (last). A job waits for those of a smaller number that can run; users get 5 or more.';
COMMENT ON COLUMN @extschema@.job_results.run_at IS 'Not before this time: a schedule, or when a failed attempt is made again. Jobs of one priority and one target start in this order.';
COMMENT ON COLUMN @extschema@.job_results.timeout_ms IS 'Milliseconds an attempt may take in all, 1 to 3600000. NULL: what params or the server''s config say, else nexus_hub.request_timeout.';
COMMENT ON COLUMN @extschema@.job_results.max_attempts IS 'Attempts that are made at most, 1 to 100. NULL: 5 for http_request, 3 for resource_fetch, prompt_execute and server_sync, 1 for tool_invoke.';
COMMENT ON COLUMN @extschema@.job_results.attempt IS 'How often the job was started, in crashes of the worker, too.';
COMMENT ON COLUMN @extschema@.job_results.crashes IS 'How often a worker was gone while it ran the job; these do not count towards max_attempts. At nexus_hub.max_crashes the job is set aside as failed.';
COMMENT ON COLUMN @extschema@.job_results.idempotency_key IS '1 to 255 characters, unique for the user: create_job with the same key gives this job''s id instead of a second job. Not what is sent: that is the job''s id.';
COMMENT ON COLUMN @extschema@.job_results.target IS 'Where the job goes: the server_id, or the host and port of an http_request''s URL (with the scheme before them where it is not the usual one of the port). Jobs of one target and user wait in one lane.';
COMMENT ON COLUMN @extschema@.job_results.failures IS 'How many of the job''s attempts have failed, those before retry_job included: they are in job_attempts.';

CREATE INDEX job_results_pending ON @extschema@.job_results (priority, run_at, id) WHERE status = 'pending';
CREATE INDEX job_results_running ON @extschema@.job_results (lease) WHERE status = 'running';
-- These two under the names that operational guides know. The first serves cleanup, which goes by time and id, and
-- retry_failed_jobs; the second looks for jobs that are stuck.
CREATE INDEX idx_job_results_cleanup ON @extschema@.job_results (status, completed_at, id) WHERE status IN ('completed', 'failed', 'cancelled');
CREATE INDEX idx_job_results_orphaned ON @extschema@.job_results (status, created_at) WHERE status IN ('pending', 'running');
-- Partial, because jobs of nobody need not pay for it.
CREATE INDEX job_results_user ON @extschema@.job_results (user_id, created_at) WHERE user_id IS NOT NULL;
-- Two, because NULLs are distinct in a unique index.
CREATE UNIQUE INDEX job_results_user_idempotency_key ON @extschema@.job_results (user_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL AND user_id IS NOT NULL;
CREATE UNIQUE INDEX job_results_nobodys_idempotency_key ON @extschema@.job_results (idempotency_key)
    WHERE idempotency_key IS NOT NULL AND user_id IS NULL;

SELECT pg_catalog.pg_extension_config_dump('@extschema@.job_results', '');

ALTER TABLE @extschema@.job_results ENABLE ROW LEVEL SECURITY;

CREATE POLICY job_results_owner_select ON @extschema@.job_results
    FOR SELECT USING (user_id = (SELECT @extschema@.nexus_hub_uid()));
CREATE POLICY job_results_owner_insert ON @extschema@.job_results
    FOR INSERT WITH CHECK (
        user_id = (SELECT @extschema@.nexus_hub_uid())
        AND status = 'pending' AND job_type NOT IN ('http_request', 'server_sync') AND priority >= 5);
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
COMMENT ON FUNCTION _nexus_hub.settle_job() IS 'Trigger: makes times, lease, attempts and result follow a status that was set by hand.';

-- The conditions spare the worker's own updates, which are settled already, the call.
CREATE TRIGGER job_results_settle_again BEFORE UPDATE OF status ON @extschema@.job_results
    FOR EACH ROW
    WHEN (OLD.completed_at IS NOT NULL AND NEW.status = 'pending')
    EXECUTE FUNCTION _nexus_hub.settle_job();
CREATE TRIGGER job_results_settle BEFORE INSERT OR UPDATE ON @extschema@.job_results
    FOR EACH ROW
    -- Not pending with a started_at: that of an attempt that has failed.
    WHEN (NOT _nexus_hub.is_job_state(NEW.status, NEW.started_at IS NOT NULL, NEW.completed_at IS NOT NULL, NEW.lease IS NOT NULL,
                                      NEW.result IS NOT NULL OR NEW.error IS NOT NULL))
    EXECUTE FUNCTION _nexus_hub.settle_job();

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

CREATE FUNCTION _nexus_hub.wake_on_change() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'wake_on_change_wrapper';
COMMENT ON FUNCTION _nexus_hub.wake_on_change() IS 'Trigger: wakes the worker of this database when the transaction commits.';

CREATE FUNCTION _nexus_hub.note_restore() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'note_restore_wrapper';
COMMENT ON FUNCTION _nexus_hub.note_restore() IS
    'Trigger: a session that loads a dump is known from its first row on, and the worker takes no job until it ends. wake_on_change does the same.';
CREATE TRIGGER system_servers_note_restore BEFORE INSERT ON @extschema@.system_servers
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.note_restore();
CREATE TRIGGER user_servers_note_restore BEFORE INSERT ON @extschema@.user_servers
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.note_restore();

CREATE TRIGGER job_results_wake_insert AFTER INSERT ON @extschema@.job_results
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.wake_on_change();
CREATE TRIGGER job_results_wake_update AFTER UPDATE OF status, run_at, priority ON @extschema@.job_results
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.wake_on_change();
CREATE TRIGGER job_results_wake_delete AFTER DELETE ON @extschema@.job_results
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.wake_on_change();

-- ── Attempts that failed ──

CREATE TABLE @extschema@.job_attempts (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    -- No foreign key: looking for the attempts of each job, of which most have none, would make a cleanup four times as
    -- long. Triggers do what it would.
    job_id uuid NOT NULL,
    attempt integer NOT NULL,
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    http_status integer,
    error text NOT NULL
);
COMMENT ON TABLE @extschema@.job_attempts IS 'The attempts that failed, of jobs that were made again and of those that failed in the end. A job that succeeds at once has none.';
COMMENT ON COLUMN @extschema@.job_attempts.id IS 'The row''s id (UUIDv7).';
COMMENT ON COLUMN @extschema@.job_attempts.job_id IS 'The job; its attempts are deleted with it.';
COMMENT ON COLUMN @extschema@.job_attempts.attempt IS 'The how-manyth attempt it was; begins at 1 again after retry_job.';
COMMENT ON COLUMN @extschema@.job_attempts.started_at IS 'When the worker took the job.';
COMMENT ON COLUMN @extschema@.job_attempts.finished_at IS 'When the failure was written.';
COMMENT ON COLUMN @extschema@.job_attempts.http_status IS 'The HTTP status that the attempt failed with, if there was an answer.';
COMMENT ON COLUMN @extschema@.job_attempts.error IS 'Why it failed, for people.';

CREATE INDEX job_attempts_job ON @extschema@.job_attempts (job_id, attempt);
CREATE INDEX job_attempts_finished ON @extschema@.job_attempts (finished_at);
SELECT pg_catalog.pg_extension_config_dump('@extschema@.job_attempts', '');
ALTER TABLE @extschema@.job_attempts ENABLE ROW LEVEL SECURITY;
-- Who sees a job sees its attempts: the subquery is subject to the policies of job_results.
CREATE POLICY job_attempts_of_visible_jobs ON @extschema@.job_attempts
    FOR SELECT USING (EXISTS (SELECT FROM @extschema@.job_results j WHERE j.id = job_id));

-- ── Hosts that cannot be reached ──

CREATE TABLE @extschema@.circuit_breakers (
    host text NOT NULL,
    worker smallint NOT NULL,
    state text NOT NULL
        CONSTRAINT circuit_breakers_state_known CHECK (state IN ('open', 'half-open')),
    failures integer NOT NULL,
    opened_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    probe_at timestamptz NOT NULL,
    error text NOT NULL,
    PRIMARY KEY (host, worker)
);
COMMENT ON TABLE @extschema@.circuit_breakers IS 'Hosts whose jobs wait because connections to them failed again and again. No row: all is well. Written by the worker alone; deleting a row changes nothing.';
COMMENT ON COLUMN @extschema@.circuit_breakers.host IS 'Host and port.';
COMMENT ON COLUMN @extschema@.circuit_breakers.worker IS 'Which of the database''s workers says so, 0 for the first.';
COMMENT ON COLUMN @extschema@.circuit_breakers.state IS 'open: no job is sent; half-open: one is sent as a probe.';
COMMENT ON COLUMN @extschema@.circuit_breakers.failures IS 'Connections that failed in a row.';
COMMENT ON COLUMN @extschema@.circuit_breakers.opened_at IS 'When the host''s jobs began to wait.';
COMMENT ON COLUMN @extschema@.circuit_breakers.probe_at IS 'When one job is sent to see whether the host is back.';
COMMENT ON COLUMN @extschema@.circuit_breakers.error IS 'The last failure.';
ALTER TABLE @extschema@.circuit_breakers ENABLE ROW LEVEL SECURITY;
CREATE POLICY circuit_breakers_service_select ON @extschema@.circuit_breakers
    FOR SELECT USING ((SELECT _nexus_hub.is_service_role()));

-- ── What the public functions need ──

CREATE FUNCTION _nexus_hub.check_job(job_type text, server_id text, tool_name text, params text, bound boolean) RETURNS void
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'check_job_wrapper';
COMMENT ON FUNCTION _nexus_hub.check_job(text, text, text, text, boolean) IS
    'Raises 22023 with a helpful text when a job''s fields do not fit its type, and 42501 for a type that is not for callers bound to own rows and for a URL that the egress policy denies.';

CREATE FUNCTION _nexus_hub.check_job_options(priority integer, run_at timestamptz, timeout_ms integer, max_attempts integer, idempotency_key text, bound boolean) RETURNS void
LANGUAGE c STABLE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'check_job_options_wrapper';
COMMENT ON FUNCTION _nexus_hub.check_job_options(integer, timestamptz, integer, integer, text, boolean) IS
    'Raises 22023 with a helpful text when an option is out of its range, and 42501 for a priority that is not for callers bound to own rows.';

CREATE FUNCTION _nexus_hub.job_of_key(p_user_id uuid, p_idempotency_key text) RETURNS uuid
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT j.id FROM @extschema@.job_results j
     WHERE j.idempotency_key = p_idempotency_key AND j.user_id = p_user_id AND p_user_id IS NOT NULL
    UNION ALL
    SELECT j.id FROM @extschema@.job_results j
     WHERE j.idempotency_key = p_idempotency_key AND j.user_id IS NULL AND p_user_id IS NULL;
END;
COMMENT ON FUNCTION _nexus_hub.job_of_key(uuid, text) IS
    'The id of the job that a user has made with an idempotency key. Volatile, to see what was committed during the statement. The caller has been found to be the user, or trusted.';

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

CREATE FUNCTION _nexus_hub.job_of_key_gone(idempotency_key text) RETURNS uuid
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'job_of_key_gone_wrapper';
COMMENT ON FUNCTION _nexus_hub.job_of_key_gone(text) IS
    'Raises 40001: the job that had the key was deleted while a new one was to be made; the same call will succeed.';

CREATE FUNCTION _nexus_hub.cancel_unfinished_job(p_job_id uuid) RETURNS boolean
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH cancelled AS (
        UPDATE @extschema@.job_results
           SET status = 'cancelled', completed_at = clock_timestamp(), lease = NULL
         WHERE id = p_job_id AND status IN ('pending', 'running')
        RETURNING 1)
    SELECT count(*) > 0 FROM cancelled;
END;
COMMENT ON FUNCTION _nexus_hub.cancel_unfinished_job(uuid) IS 'Cancels a job that is pending or running. The caller has been found entitled to it.';

CREATE FUNCTION _nexus_hub.retry_finished_jobs(p_job_ids uuid[]) RETURNS integer
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH retried AS (
        UPDATE @extschema@.job_results
           SET status = 'pending', run_at = clock_timestamp()
         WHERE id = ANY (p_job_ids) AND status IN ('failed', 'cancelled')
        RETURNING 1)
    SELECT count(*)::integer FROM retried;
END;
COMMENT ON FUNCTION _nexus_hub.retry_finished_jobs(uuid[]) IS 'Has failed or cancelled jobs run again, with all their attempts. The caller has been found entitled to them.';

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

CREATE FUNCTION @extschema@.create_job(
    p_user_id uuid, p_job_type text, p_server_id text, p_tool_name text DEFAULT NULL, p_params jsonb DEFAULT '{}',
    p_priority integer DEFAULT NULL, p_run_at timestamptz DEFAULT NULL, p_timeout_ms integer DEFAULT NULL,
    p_max_attempts integer DEFAULT NULL, p_idempotency_key text DEFAULT NULL)
RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.check_job(p_job_type, p_server_id, p_tool_name, p_params::text,
                                row_security_active('@extschema@.job_results'::regclass) AND NOT _nexus_hub.is_service_role()),
           _nexus_hub.check_job_options(p_priority, p_run_at, p_timeout_ms, p_max_attempts, p_idempotency_key,
                                row_security_active('@extschema@.job_results'::regclass) AND NOT _nexus_hub.is_service_role());
    WITH added AS (
        INSERT INTO @extschema@.job_results
               (user_id, job_type, server_id, tool_name, params, priority, run_at, timeout_ms, max_attempts, idempotency_key)
        VALUES (_nexus_hub.owner(p_user_id, @extschema@.nexus_hub_uid(), row_security_active('@extschema@.job_results'::regclass)
                                 AND NOT _nexus_hub.is_service_role(), false),
                p_job_type, p_server_id, p_tool_name, coalesce(p_params, '{}'), coalesce(p_priority, 5)::smallint,
                coalesce(p_run_at, now()), p_timeout_ms, p_max_attempts, p_idempotency_key)
        ON CONFLICT DO NOTHING
        RETURNING id)
    SELECT coalesce((SELECT id FROM added),
                    _nexus_hub.job_of_key(coalesce(p_user_id, @extschema@.nexus_hub_uid()), p_idempotency_key),
                    _nexus_hub.job_of_key_gone(p_idempotency_key));
END;
COMMENT ON FUNCTION @extschema@.create_job(uuid, text, text, text, jsonb, integer, timestamptz, integer, integer, text) IS
    'Adds a job, to be run when this transaction commits, and returns its id. p_user_id: whose job (NULL: the caller''s nexus_hub_uid()). p_job_type: tool_invoke, resource_fetch, prompt_execute or http_request. p_server_id: the MCP server. p_tool_name: the tool or prompt. p_params: the arguments; resource_fetch: {"uri"}; http_request: {"url", …}. p_priority: 1 (first) to 9 (last), users 5 or more (NULL: 5). p_run_at: not before this time. p_timeout_ms: what an attempt may take, 1 to 3600000. p_max_attempts: 1 to 100 (NULL: 5 for http_request, 3 for resource_fetch and prompt_execute, 1 for tool_invoke). p_idempotency_key: 1 to 255 characters; the same key of the same user gives back the first job''s id. Errors: 22023 bad argument, 42501 not the caller''s own, not for users, or denied by the egress policy.';

CREATE FUNCTION @extschema@.http_request(
    method text, url text, body text DEFAULT NULL, headers jsonb DEFAULT '{}', timeout_ms integer DEFAULT NULL,
    priority integer DEFAULT NULL, run_at timestamptz DEFAULT NULL, max_attempts integer DEFAULT NULL, idempotency_key text DEFAULT NULL)
RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT @extschema@.create_job(NULL, 'http_request', NULL, NULL,
        jsonb_strip_nulls(jsonb_build_object('method', http_request.method, 'url', http_request.url, 'body', http_request.body))
            || jsonb_build_object('headers', coalesce(http_request.headers, '{}')),
        http_request.priority, http_request.run_at, http_request.timeout_ms, http_request.max_attempts, http_request.idempotency_key);
END;
COMMENT ON FUNCTION @extschema@.http_request(text, text, text, jsonb, integer, integer, timestamptz, integer, text) IS
    'Adds an HTTP request as a job and returns its id; it is sent when this transaction commits. method: GET, POST, … url: http or https. body: sent as it is. headers: an object of strings. timeout_ms: what an attempt may take, 1 to 3600000. priority, run_at, max_attempts, idempotency_key: as in create_job. Errors: 22023 bad argument, 42501 denied by the egress policy.';

CREATE FUNCTION @extschema@.http_get(
    url text, headers jsonb DEFAULT '{}', timeout_ms integer DEFAULT NULL,
    priority integer DEFAULT NULL, run_at timestamptz DEFAULT NULL, max_attempts integer DEFAULT NULL, idempotency_key text DEFAULT NULL)
RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT @extschema@.http_request('GET', http_get.url, NULL, http_get.headers, http_get.timeout_ms,
        http_get.priority, http_get.run_at, http_get.max_attempts, http_get.idempotency_key);
END;
COMMENT ON FUNCTION @extschema@.http_get(text, jsonb, integer, integer, timestamptz, integer, text) IS
    'Adds a GET request as a job and returns its id; see http_request.';

CREATE FUNCTION @extschema@.http_post(
    url text, body jsonb DEFAULT '{}', headers jsonb DEFAULT '{}', timeout_ms integer DEFAULT NULL,
    priority integer DEFAULT NULL, run_at timestamptz DEFAULT NULL, max_attempts integer DEFAULT NULL, idempotency_key text DEFAULT NULL)
RETURNS uuid
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- As text, or a JSON string would be sent without its quotes.
    SELECT @extschema@.http_request('POST', http_post.url, http_post.body::text,
        CASE
            WHEN jsonb_path_exists(http_post.headers, '$.keyvalue() ? (@.key like_regex "^content-type$" flag "i")', silent => true)
              OR jsonb_typeof(http_post.headers) NOT IN ('object', 'null') OR http_post.body IS NULL THEN http_post.headers
            ELSE jsonb_build_object('Content-Type', 'application/json') || coalesce(nullif(http_post.headers, 'null'), '{}')
        END,
        http_post.timeout_ms,
        http_post.priority, http_post.run_at, http_post.max_attempts, http_post.idempotency_key);
END;
COMMENT ON FUNCTION @extschema@.http_post(text, jsonb, jsonb, integer, integer, timestamptz, integer, text) IS
    'Adds a POST request with a JSON body as a job and returns its id; see http_request.';

CREATE FUNCTION @extschema@.get_job_status(p_job_id uuid)
RETURNS TABLE (id uuid, job_type text, server_id text, tool_name text, status text, result jsonb, error text,
               created_at timestamptz, started_at timestamptz, completed_at timestamptz, attempt integer, run_at timestamptz)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT j.id, j.job_type, j.server_id, j.tool_name, j.status, j.result, j.error, j.created_at, j.started_at, j.completed_at,
           j.attempt, j.run_at
      FROM @extschema@.job_results j
     WHERE j.id = p_job_id;
END;
COMMENT ON FUNCTION @extschema@.get_job_status(uuid) IS
    'A job''s state and result: one row, or none when the caller has no such job. A pending job with attempt above 0 has failed so often and is tried again at run_at.';

CREATE FUNCTION @extschema@.wait_for_job(p_job_id uuid, p_timeout_ms integer DEFAULT 30000)
RETURNS TABLE (id uuid, job_type text, server_id text, tool_name text, status text, result jsonb, error text,
               created_at timestamptz, started_at timestamptz, completed_at timestamptz, attempt integer, run_at timestamptz)
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.await_job(j.id, p_timeout_ms) FROM @extschema@.job_results j WHERE j.id = p_job_id;
    SELECT s.id, s.job_type, s.server_id, s.tool_name, s.status, s.result, s.error, s.created_at, s.started_at, s.completed_at,
           s.attempt, s.run_at
      FROM @extschema@.get_job_status(p_job_id) s;
END;
COMMENT ON FUNCTION @extschema@.wait_for_job(uuid, integer) IS
    'Waits until a job is finished, at most p_timeout_ms (0 to 3600000) milliseconds, and returns what get_job_status returns; the status tells whether it is finished. Call it in a transaction of its own, after the one that made the job. Errors: 22023 bad time-out, 55000 the job is not committed yet, the isolation level hides its end, or the worker is not there.';

CREATE FUNCTION @extschema@.cancel_job(p_job_id uuid) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce((SELECT _nexus_hub.cancel_unfinished_job(j.id) FROM @extschema@.job_results j WHERE j.id = p_job_id), false);
END;
COMMENT ON FUNCTION @extschema@.cancel_job(uuid) IS
    'Cancels a job that is pending or running; the request of a running one is broken off, but its server may have done the work. Returns false when it is finished already, or the caller has no such job.';

CREATE FUNCTION @extschema@.retry_job(p_job_id uuid) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.retry_finished_jobs(ARRAY(SELECT j.id FROM @extschema@.job_results j WHERE j.id = p_job_id)) > 0;
END;
COMMENT ON FUNCTION @extschema@.retry_job(uuid) IS
    'Has a failed or cancelled job run again, with all its attempts and the same Idempotency-Key. Returns false when it is neither, or the caller has no such job.';

CREATE FUNCTION @extschema@.retry_failed_jobs(
    p_server_id text DEFAULT NULL, p_job_type text DEFAULT NULL, p_since timestamptz DEFAULT NULL, p_until timestamptz DEFAULT NULL)
RETURNS integer
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.retry_finished_jobs(ARRAY(
        SELECT j.id FROM @extschema@.job_results j
         WHERE j.status = 'failed'
           AND (p_server_id IS NULL OR j.server_id = p_server_id)
           AND (p_job_type IS NULL OR j.job_type = p_job_type)
           AND j.completed_at >= coalesce(p_since, '-infinity')
           AND j.completed_at < coalesce(p_until, 'infinity')));
END;
COMMENT ON FUNCTION @extschema@.retry_failed_jobs(text, text, timestamptz, timestamptz) IS
    'Has the caller''s failed jobs run again (the redrive of dead letters), and returns how many. p_server_id, p_job_type: only of these. p_since, p_until: only those that failed at or after p_since and before p_until. NULL: no such condition.';

CREATE FUNCTION @extschema@.get_job_attempts(p_job_id uuid)
RETURNS TABLE (attempt integer, started_at timestamptz, finished_at timestamptz, http_status integer, error text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT a.attempt, a.started_at, a.finished_at, a.http_status, a.error
      FROM @extschema@.job_attempts a
     WHERE a.job_id = p_job_id
     ORDER BY a.started_at, a.id;
END;
COMMENT ON FUNCTION @extschema@.get_job_attempts(uuid) IS
    'The attempts of a job that failed, in their order; none when the caller has no such job.';

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
CREATE VIEW _nexus_hub.job_attempts AS SELECT * FROM @extschema@.job_attempts;
CREATE VIEW _nexus_hub.circuit_breakers AS SELECT * FROM @extschema@.circuit_breakers;
COMMENT ON VIEW _nexus_hub.job_results IS 'The table of that name, for the worker.';
COMMENT ON VIEW _nexus_hub.user_servers IS 'The table of that name, for the worker.';
COMMENT ON VIEW _nexus_hub.system_servers IS 'The table of that name, for the worker.';
COMMENT ON VIEW _nexus_hub.job_attempts IS 'The table of that name, for the worker.';
COMMENT ON VIEW _nexus_hub.circuit_breakers IS 'The table of that name, for the worker.';

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

CREATE FUNCTION _nexus_hub.read_pending(p_priorities smallint[], p_run_ats timestamptz[], p_ids uuid[], p_limits integer[], p_worker integer, p_workers integer)
RETURNS TABLE (read integer, run_at timestamptz, id uuid, user_id uuid, is_mcp boolean, target text, bytes integer)
-- STABLE, with neither SET nor SECURITY DEFINER: inlined into the worker's statement.
LANGUAGE sql STABLE
BEGIN ATOMIC
    -- The share is looked at after the limit, or a worker would read all jobs of the others in search of its own.
    SELECT r.read::integer, p.run_at, p.id, p.user_id, p.is_mcp,
           CASE WHEN p_workers = 1 OR (hashtext(p.target)::bigint + 2147483648) % p_workers = p_worker THEN p.target END, p.bytes
      FROM unnest(p_priorities, p_run_ats, p_ids, p_limits) WITH ORDINALITY AS r (priority, run_at, id, rows, read)
     CROSS JOIN LATERAL (
               SELECT j.run_at, j.id, j.user_id, j.job_type <> 'http_request' AS is_mcp, j.target, pg_column_size(j.params) AS bytes
                 FROM @extschema@.job_results j
                WHERE j.status = 'pending' AND j.priority = r.priority
                  AND (j.run_at, j.id) >= (r.run_at, r.id) AND j.run_at <= now()
                ORDER BY j.run_at, j.id
                LIMIT r.rows) p;
END;
COMMENT ON FUNCTION _nexus_hub.read_pending(smallint[], timestamptz[], uuid[], integer[], integer, integer) IS
    'Due pending jobs: for each of several reads (numbered from 1) of one priority, those at or after a position, in their order, at most so many. Of the database''s p_workers workers each sees the targets that are its own; others are NULL.';

CREATE FUNCTION _nexus_hub.next_due() RETURNS TABLE (seconds double precision)
-- Inlined, like read_pending: a function that gives one value would be planned at every call.
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT extract(epoch FROM min(n.run_at) - now())::double precision
      FROM generate_series(1, 9) AS p (priority)
     CROSS JOIN LATERAL (
               SELECT j.run_at
                 FROM @extschema@.job_results j
                WHERE j.status = 'pending' AND j.priority = p.priority::smallint AND j.run_at > now()
                ORDER BY j.run_at
                LIMIT 1) n;
END;
COMMENT ON FUNCTION _nexus_hub.next_due() IS 'Seconds until the next pending job is due that is not due yet; NULL when there is none.';

CREATE FUNCTION _nexus_hub.read_servers(p_user_ids uuid[], p_server_ids text[])
RETURNS TABLE (lane integer, user_config bytea, user_enabled boolean, user_rate_limit integer,
               system_config text, system_enabled boolean, system_rate_limit integer)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT l.lane::integer, u.config_encrypted, u.enabled, u.rate_limit_per_minute, s.config::text, s.enabled, s.rate_limit_per_minute
      FROM unnest(p_user_ids, p_server_ids) WITH ORDINALITY AS l (user_id, server_id, lane)
      LEFT JOIN @extschema@.user_servers u ON u.user_id = l.user_id AND u.server_id = l.server_id
      LEFT JOIN @extschema@.system_servers s ON s.id = l.server_id;
END;
COMMENT ON FUNCTION _nexus_hub.read_servers(uuid[], text[]) IS 'The servers that jobs of these users with these server ids go to; lane is the place in the arrays.';

CREATE FUNCTION _nexus_hub.claim_jobs(p_lease uuid, p_ids uuid[], p_careful boolean)
RETURNS TABLE (id uuid, user_id uuid, job_type text, server_id text, tool_name text, params text, timeout_ms integer,
               attempts integer, max_attempts integer)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '20ms'
AS $$
#variable_conflict use_column
BEGIN
    -- Locking each row first costs as much as claiming it: done only when somebody was in the way.
    IF p_careful THEN
        p_ids := ARRAY(SELECT p.id FROM _nexus_hub.job_results p WHERE p.id = ANY (p_ids) FOR UPDATE SKIP LOCKED);
    END IF;
    RETURN QUERY
    UPDATE _nexus_hub.job_results j
       SET status = 'running', started_at = clock_timestamp(), lease = p_lease, attempt = j.attempt + 1
     -- Not status = 'pending': that would let a plan that was made when few jobs were pending read all of them.
     WHERE j.id = ANY (p_ids) AND j.status || '' = 'pending' AND j.run_at <= clock_timestamp()
    RETURNING j.id, j.user_id, j.job_type, j.server_id, j.tool_name, j.params::text, j.timeout_ms, j.attempt - j.crashes, j.max_attempts;
END
$$;
COMMENT ON FUNCTION _nexus_hub.claim_jobs(uuid, uuid[], boolean) IS
    'Takes those of the jobs p_ids that are still pending and due, under the lease p_lease. p_careful: passes over rows that a session keeps locked, instead of failing with 55P03. attempts counts this one, and those that ended in a crash of the worker not.';

CREATE FUNCTION _nexus_hub.unclaim_jobs(p_lease uuid, p_ids uuid[]) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE _nexus_hub.job_results AS j
       SET status = 'pending', started_at = NULL, lease = NULL, attempt = j.attempt - 1
     WHERE j.id = ANY (p_ids) AND j.lease = p_lease;
END;
COMMENT ON FUNCTION _nexus_hub.unclaim_jobs(uuid, uuid[]) IS
    'Gives jobs back that the running transaction has claimed under the lease, as if it had not: they are over their server''s rate limit.';

CREATE FUNCTION _nexus_hub.lost_jobs(p_ids uuid[], p_leases uuid[]) RETURNS TABLE (id uuid, lease uuid)
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT o.id, o.lease
      FROM unnest(p_ids, p_leases) AS o (id, lease)
     WHERE NOT EXISTS (SELECT FROM @extschema@.job_results j WHERE j.id = o.id AND j.lease = o.lease);
END;
COMMENT ON FUNCTION _nexus_hub.lost_jobs(uuid[], uuid[]) IS 'Those of the jobs that are no longer held under the leases: cancelled, deleted or changed by hand.';

CREATE FUNCTION _nexus_hub.write_outcomes(p_ids uuid[], p_leases uuid[], p_statuses text[], p_results text[], p_errors text[],
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
COMMENT ON FUNCTION _nexus_hub.write_outcomes(uuid[], uuid[], text[], text[], text[], integer[], bigint[]) IS
    'complete_jobs for rows that nobody keeps locked, with answers that jsonb takes.';

CREATE FUNCTION _nexus_hub.complete_jobs(p_ids uuid[], p_leases uuid[], p_statuses text[], p_results text[], p_errors text[],
                                         p_http_statuses integer[], p_delays_ms bigint[])
RETURNS TABLE (id uuid, lease uuid)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '20ms'
AS $$
#variable_conflict use_column
BEGIN
    BEGIN
        IF cardinality(p_ids) = 1 AND p_statuses[1] = 'completed' THEN
            -- The usual case of a quiet server, without a join that has to be planned.
            UPDATE _nexus_hub.job_results j
               SET status = 'completed', result = p_results[1]::jsonb, completed_at = clock_timestamp(), lease = NULL
             WHERE j.id = p_ids[1] AND j.lease = p_leases[1];
        ELSE
            PERFORM _nexus_hub.write_outcomes(p_ids, p_leases, p_statuses, p_results, p_errors, p_http_statuses, p_delays_ms);
        END IF;
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
            RETURN QUERY SELECT j.id, j.lease FROM _nexus_hub.job_results j
              WHERE j.id = p_ids[i] AND j.status = 'running' AND j.lease = p_leases[i];
            CONTINUE;
        END IF;
        BEGIN
            PERFORM _nexus_hub.write_outcomes(p_ids[i:i], p_leases[i:i], p_statuses[i:i], p_results[i:i], p_errors[i:i],
                                              p_http_statuses[i:i], p_delays_ms[i:i]);
        EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
            PERFORM _nexus_hub.write_outcomes(p_ids[i:i], p_leases[i:i], ARRAY['failed'], ARRAY[NULL::text],
                                              ARRAY['the answer cannot be stored as jsonb: ' || SQLERRM],
                                              p_http_statuses[i:i], ARRAY[NULL::bigint]);
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION _nexus_hub.complete_jobs(uuid[], uuid[], text[], text[], text[], integer[], bigint[]) IS
    'Writes the outcomes of jobs that are still running under the lease they were claimed with, and returns those whose rows are locked, to be written later. Others (cancelled meanwhile, say) stay as they are. Status completed; failed; pending: to be tried again after so many milliseconds; running: handed over to an executor elsewhere.';

CREATE FUNCTION _nexus_hub.release_jobs(p_leases uuid[], p_max_crashes integer) RETURNS integer
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
COMMENT ON FUNCTION _nexus_hub.release_jobs(uuid[], integer) IS
    'Gives back the jobs held under these leases. p_max_crashes NULL: by a worker that ends in order, and the attempt counts for nothing. Else by a worker that is gone: a job in as many crashes is set aside as failed.';

CREATE FUNCTION _nexus_hub.held_leases() RETURNS SETOF uuid
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT DISTINCT j.lease FROM @extschema@.job_results j WHERE j.status = 'running' AND j.lease IS NOT NULL;
END;
COMMENT ON FUNCTION _nexus_hub.held_leases() IS 'The leases of all running jobs.';

CREATE FUNCTION _nexus_hub.write_breakers(p_worker integer, p_workers integer, p_hosts text[], p_states text[], p_failures integer[], p_probe_in_ms bigint[], p_errors text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- No hosts: the worker starts, with all of them closed.
    DELETE FROM _nexus_hub.circuit_breakers b
     WHERE CASE
               WHEN p_hosts IS NULL THEN b.worker = p_worker OR b.worker >= p_workers
               ELSE b.worker = p_worker AND EXISTS (SELECT FROM unnest(p_hosts, p_states) AS c (host, state)
                                                     WHERE c.host = b.host AND c.state = 'closed')
           END;
    INSERT INTO _nexus_hub.circuit_breakers AS b (host, worker, state, failures, probe_at, error)
    SELECT c.host, p_worker, c.state, c.failures, clock_timestamp() + c.probe_in_ms * interval '1 millisecond', c.error
      FROM unnest(p_hosts, p_states, p_failures, p_probe_in_ms, p_errors) AS c (host, state, failures, probe_in_ms, error)
     WHERE c.state <> 'closed'
    ON CONFLICT (host, worker) DO UPDATE
       SET state = excluded.state, failures = excluded.failures, probe_at = excluded.probe_at, error = excluded.error;
EXCEPTION WHEN OTHERS THEN
    -- What is only shown must not keep outcomes from being written.
    RAISE LOG 'nexus_hub: circuit_breakers could not be written: %', SQLERRM;
END
$$;
COMMENT ON FUNCTION _nexus_hub.write_breakers(integer, integer, text[], text[], integer[], bigint[], text[]) IS
    'Shows how the circuit breakers of a worker''s hosts stand now, those that changed; NULL for p_hosts: all are closed.';
