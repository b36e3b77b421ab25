-- Rate limits. They are counted in shared memory (src/pg/shmem/rates.rs); the tables are for rules, for minutes that are
-- over, and for servers where the library is not preloaded.

CREATE FUNCTION @extschema@.check_rate_limit(p_server_id text, p_user_id uuid, p_limit_per_minute integer) RETURNS boolean
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'check_rate_limit';
COMMENT ON FUNCTION @extschema@.check_rate_limit(text, uuid, integer) IS
    'Counts this call in the running clock minute of the server and the user, denied calls too, and tells whether the count is within p_limit_per_minute. A limit of 0 or less allows nothing; a NULL user is a key of its own. Works in read-only transactions, and a rollback gives nothing back. Errors: 22023 p_server_id NULL or empty, p_limit_per_minute NULL; where the library is not preloaded, 55000 in read-only transactions.';

CREATE FUNCTION @extschema@.rate_limit(
    p_key text, p_limit integer, p_window_seconds integer DEFAULT 60, p_cost integer DEFAULT 1, p_burst integer DEFAULT NULL,
    OUT allowed boolean, OUT "limit" integer, OUT remaining integer, OUT retry_after_seconds double precision, OUT reset_seconds double precision)
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'rate_limit_wrapper';
COMMENT ON FUNCTION @extschema@.rate_limit(text, integer, integer, integer, integer) IS
    'Charges p_cost (0 or more) to a key that may use up p_limit in p_window_seconds (1 or more), evenly, and p_burst (1 or more; NULL: p_limit) at once. A call that is denied is charged nothing. remaining: calls of cost 1 that would be allowed next. retry_after_seconds: until this call would be allowed; 0 if it is, NULL if it never will be (p_limit is 0 or less, p_cost is above the burst). reset_seconds: until the limit is full again. Windows of different length have states of their own. Errors: 22023 bad argument; where the library is not preloaded, 55000 in read-only transactions.';

CREATE FUNCTION @extschema@.rate_limit_peek(
    p_key text, p_limit integer, p_window_seconds integer DEFAULT 60, p_cost integer DEFAULT 1, p_burst integer DEFAULT NULL,
    OUT allowed boolean, OUT "limit" integer, OUT remaining integer, OUT retry_after_seconds double precision, OUT reset_seconds double precision)
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'rate_limit_peek_wrapper';
COMMENT ON FUNCTION @extschema@.rate_limit_peek(text, integer, integer, integer, integer) IS
    'What rate_limit with the same arguments would answer now, without a charge. Errors: 22023 bad argument.';

CREATE FUNCTION @extschema@.rate_limit_all(
    p_keys text[], p_limits integer[], p_windows_seconds integer[] DEFAULT NULL, p_costs integer[] DEFAULT NULL, p_bursts integer[] DEFAULT NULL)
RETURNS TABLE (key text, allowed boolean, "limit" integer, remaining integer, retry_after_seconds double precision, reset_seconds double precision)
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'rate_limit_all_wrapper';
COMMENT ON FUNCTION @extschema@.rate_limit_all(text[], integer[], integer[], integer[], integer[]) IS
    'rate_limit for several policies, up to 64: all are charged, or none where one of them denies. The n-th elements belong together; an array that is NULL stands for 60 seconds, cost 1, the limit as burst. One row for each policy, in order; the call is allowed when all are. Errors: 22023 bad argument, arrays of different length, a key twice with the same window; 54000 too many; where the library is not preloaded, 55000 in read-only transactions.';

CREATE FUNCTION @extschema@.reset_rate_limit(p_key text) RETURNS boolean
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'reset_rate_limit_wrapper';
COMMENT ON FUNCTION @extschema@.reset_rate_limit(text) IS
    'Forgets what rate_limit has charged to a key, under all windows. Returns false when there was nothing. Errors: 22023 p_key NULL or empty.';

CREATE FUNCTION @extschema@.reset_server_rate_limit(p_server_id text, p_user_id uuid) RETURNS boolean
LANGUAGE c VOLATILE PARALLEL SAFE
AS 'MODULE_PATHNAME', 'reset_server_rate_limit_wrapper';
COMMENT ON FUNCTION @extschema@.reset_server_rate_limit(text, uuid) IS
    'Forgets the calls that check_rate_limit has counted for the server and the user in the running minute. Returns false when there were none. Errors: 22023 p_server_id NULL or empty.';

-- ── Exemptions and overrides ──

CREATE TABLE @extschema@.rate_limit_exemptions (
    identifier text PRIMARY KEY
        CONSTRAINT rate_limit_exemptions_identifier_length CHECK (length(identifier) BETWEEN 1 AND 500),
    reason text,
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE @extschema@.rate_limit_exemptions IS 'Who has no rate limit. Changes count for all sessions from their commit on. Each session keeps a copy in memory.';
COMMENT ON COLUMN @extschema@.rate_limit_exemptions.identifier IS 'A key of rate_limit, a server''s id, or a user''s id; 1 to 500 characters, the whole of it.';
COMMENT ON COLUMN @extschema@.rate_limit_exemptions.reason IS 'Why, for people.';
COMMENT ON COLUMN @extschema@.rate_limit_exemptions.created_at IS 'When the row was made.';

CREATE TABLE @extschema@.rate_limit_overrides (
    id uuid PRIMARY KEY DEFAULT _nexus_hub.uuid_v7(),
    key text
        CONSTRAINT rate_limit_overrides_key_length CHECK (length(key) BETWEEN 1 AND 500),
    server_id text
        CONSTRAINT rate_limit_overrides_server_id_length CHECK (length(server_id) BETWEEN 1 AND 500),
    user_id uuid,
    request_limit integer NOT NULL
        CONSTRAINT rate_limit_overrides_request_limit_range CHECK (request_limit >= 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT rate_limit_overrides_target CHECK ((key IS NULL) = (server_id IS NOT NULL OR user_id IS NOT NULL))
);
-- An unset part counts as a value: one row for a server, one for a user, one for both.
CREATE UNIQUE INDEX rate_limit_overrides_target_key ON @extschema@.rate_limit_overrides
    ((coalesce(key, '')), (coalesce(server_id, '')), (coalesce(user_id::text, '')));
COMMENT ON TABLE @extschema@.rate_limit_overrides IS 'Limits that count instead of those that callers pass: of a key of rate_limit, or of a server, a user, or a user at a server, which goes before the user''s, and that before the server''s. Changes count for all sessions from their commit on. Each session keeps a copy in memory.';
COMMENT ON COLUMN @extschema@.rate_limit_overrides.id IS 'The row''s id.';
COMMENT ON COLUMN @extschema@.rate_limit_overrides.key IS 'The key of rate_limit, 1 to 500 characters; NULL for a server or a user.';
COMMENT ON COLUMN @extschema@.rate_limit_overrides.server_id IS 'The server of check_rate_limit; NULL: any.';
COMMENT ON COLUMN @extschema@.rate_limit_overrides.user_id IS 'The user of check_rate_limit; NULL: any.';
COMMENT ON COLUMN @extschema@.rate_limit_overrides.request_limit IS 'Calls that are allowed, 0 or more: in a clock minute, or in the window that the caller of rate_limit passes.';
COMMENT ON COLUMN @extschema@.rate_limit_overrides.created_at IS 'When the row was made.';

ALTER TABLE @extschema@.rate_limit_exemptions ENABLE ROW LEVEL SECURITY;
ALTER TABLE @extschema@.rate_limit_overrides ENABLE ROW LEVEL SECURITY;
CREATE POLICY rate_limit_exemptions_service_all ON @extschema@.rate_limit_exemptions
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));
CREATE POLICY rate_limit_overrides_service_all ON @extschema@.rate_limit_overrides
    FOR ALL USING ((SELECT _nexus_hub.is_service_role())) WITH CHECK ((SELECT _nexus_hub.is_service_role()));
SELECT pg_catalog.pg_extension_config_dump('@extschema@.rate_limit_exemptions', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.rate_limit_overrides', '');

CREATE FUNCTION _nexus_hub.rate_limit_rules_changed() RETURNS trigger
LANGUAGE c AS 'MODULE_PATHNAME', 'rate_limit_rules_changed_wrapper';
COMMENT ON FUNCTION _nexus_hub.rate_limit_rules_changed() IS
    'Trigger: has all sessions read the exemptions and overrides of rate limits again when the transaction has ended.';
CREATE TRIGGER rate_limit_exemptions_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON @extschema@.rate_limit_exemptions
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.rate_limit_rules_changed();
CREATE TRIGGER rate_limit_overrides_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON @extschema@.rate_limit_overrides
    FOR EACH STATEMENT EXECUTE FUNCTION _nexus_hub.rate_limit_rules_changed();

CREATE FUNCTION _nexus_hub.rate_limit_rules()
RETURNS TABLE (is_exempt boolean, identifier text, server_id text, user_id uuid, request_limit integer)
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
    SELECT true, e.identifier, NULL::text, NULL::uuid, NULL::integer FROM @extschema@.rate_limit_exemptions e
    UNION ALL
    SELECT false, o.key, o.server_id, o.user_id, o.request_limit FROM @extschema@.rate_limit_overrides o;
END;
COMMENT ON FUNCTION _nexus_hub.rate_limit_rules() IS 'The exemptions and overrides of rate limits.';

-- ── What was counted ──

CREATE TABLE _nexus_hub.rate_limit_windows (
    server_id text NOT NULL,
    user_id uuid,
    window_start timestamptz NOT NULL,
    request_count integer NOT NULL
);
-- By time first: what is old is deleted.
CREATE UNIQUE INDEX rate_limit_windows_key ON _nexus_hub.rate_limit_windows (window_start, server_id, (coalesce(user_id::text, '')));
COMMENT ON TABLE _nexus_hub.rate_limit_windows IS 'The calls of clock minutes that are over.';
COMMENT ON COLUMN _nexus_hub.rate_limit_windows.server_id IS 'The server; of a name of more than 180 bytes the beginning and a hash.';
COMMENT ON COLUMN _nexus_hub.rate_limit_windows.user_id IS 'The user, if the calls were one''s.';
COMMENT ON COLUMN _nexus_hub.rate_limit_windows.window_start IS 'When the minute began.';
COMMENT ON COLUMN _nexus_hub.rate_limit_windows.request_count IS 'The calls, denied ones too.';

CREATE FUNCTION _nexus_hub.minute_start(minute integer) RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
    SELECT '2000-01-01 00:00:00+00'::timestamptz + minute * '1 minute'::interval;
END;
COMMENT ON FUNCTION _nexus_hub.minute_start(integer) IS 'When a minute begins that is given by its number since 2000-01-01 UTC.';

CREATE FUNCTION _nexus_hub.record_rate_limit_windows(servers text[], users uuid[], minutes integer[], counts integer[]) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- The same again, after a crash, changes nothing.
    INSERT INTO _nexus_hub.rate_limit_windows AS w (server_id, user_id, window_start, request_count)
    SELECT n.server_id, n.user_id, _nexus_hub.minute_start(n.minute), max(n.request_count)
      FROM unnest(servers, users, minutes, counts) AS n (server_id, user_id, minute, request_count)
     GROUP BY 1, 2, 3
    ON CONFLICT (window_start, server_id, (coalesce(user_id::text, ''))) DO UPDATE
       SET request_count = excluded.request_count WHERE w.request_count < excluded.request_count;
END;
COMMENT ON FUNCTION _nexus_hub.record_rate_limit_windows(text[], uuid[], integer[], integer[]) IS 'Writes down the calls of minutes that are over.';

-- ── Without shared memory ──

CREATE UNLOGGED TABLE _nexus_hub.rate_limit_entries (
    id bytea NOT NULL,
    window_seconds integer NOT NULL,
    kind integer NOT NULL,
    name text NOT NULL,
    user_id uuid,
    state bigint NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (id, window_seconds)
);
CREATE INDEX rate_limit_entries_expires_at_idx ON _nexus_hub.rate_limit_entries (expires_at);
COMMENT ON TABLE _nexus_hub.rate_limit_entries IS 'The states of rate limits, where the library is not preloaded.';
COMMENT ON COLUMN _nexus_hub.rate_limit_entries.id IS 'SHA-256 of kind, user and name.';
COMMENT ON COLUMN _nexus_hub.rate_limit_entries.window_seconds IS 'The window of a key of rate_limit; 0 for a server''s.';
COMMENT ON COLUMN _nexus_hub.rate_limit_entries.kind IS '1: a server''s, 2: a server''s and user''s, 3: a key of rate_limit.';
COMMENT ON COLUMN _nexus_hub.rate_limit_entries.name IS 'The server or the key; of a long one the beginning and a hash.';
COMMENT ON COLUMN _nexus_hub.rate_limit_entries.user_id IS 'The user, if it is one''s.';
COMMENT ON COLUMN _nexus_hub.rate_limit_entries.state IS 'As in shared memory: see src/domain/rate.rs.';
COMMENT ON COLUMN _nexus_hub.rate_limit_entries.expires_at IS 'When the state says no more than none would.';

CREATE FUNCTION _nexus_hub.rate_limit_entry_id(kind integer, name text, user_id uuid) RETURNS bytea
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT sha256(convert_to(kind || ' ' || coalesce(user_id::text, '-') || ' ', 'UTF8') || convert_to(name, 'UTF8'));
END;
COMMENT ON FUNCTION _nexus_hub.rate_limit_entry_id(integer, text, uuid) IS 'The id of a row of rate_limit_entries.';

CREATE FUNCTION _nexus_hub.rate_limit_name(name text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT CASE WHEN octet_length(name) <= 180 THEN name ELSE left(name, 40) || '…' || encode(sha256(convert_to(name, 'UTF8')), 'hex') END;
END;
COMMENT ON FUNCTION _nexus_hub.rate_limit_name(text) IS 'A name that fits into an index.';

CREATE FUNCTION _nexus_hub.rate_limit_state(kind integer, name text, user_id uuid, window_seconds integer) RETURNS bigint
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT max(e.state) FROM _nexus_hub.rate_limit_entries e
     WHERE e.id = _nexus_hub.rate_limit_entry_id(rate_limit_state.kind, rate_limit_state.name, rate_limit_state.user_id)
       AND e.window_seconds = rate_limit_state.window_seconds;
END;
COMMENT ON FUNCTION _nexus_hub.rate_limit_state(integer, text, uuid, integer) IS 'The state of a key; NULL: none.';

CREATE FUNCTION _nexus_hub.lock_rate_limit_state(kind integer, name text, user_id uuid, window_seconds integer) RETURNS bigint
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO _nexus_hub.rate_limit_entries AS e (id, window_seconds, kind, name, user_id, state, expires_at)
    VALUES (_nexus_hub.rate_limit_entry_id(lock_rate_limit_state.kind, lock_rate_limit_state.name, lock_rate_limit_state.user_id),
            lock_rate_limit_state.window_seconds, lock_rate_limit_state.kind, _nexus_hub.rate_limit_name(lock_rate_limit_state.name),
            lock_rate_limit_state.user_id, 0, clock_timestamp())
    ON CONFLICT (id, window_seconds) DO UPDATE SET kind = e.kind
    RETURNING e.state;
END;
COMMENT ON FUNCTION _nexus_hub.lock_rate_limit_state(integer, text, uuid, integer) IS
    'The state of a key, made if there is none; nobody else gets at it until the transaction ends.';

CREATE FUNCTION _nexus_hub.set_rate_limit_state(kind integer, name text, user_id uuid, window_seconds integer, state bigint, expires bigint) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE _nexus_hub.rate_limit_entries AS e
       SET state = set_rate_limit_state.state,
           expires_at = '2000-01-01 00:00:00+00'::timestamptz + set_rate_limit_state.expires / 1000000 * '1 second'::interval
     WHERE e.id = _nexus_hub.rate_limit_entry_id(set_rate_limit_state.kind, set_rate_limit_state.name, set_rate_limit_state.user_id)
       AND e.window_seconds = set_rate_limit_state.window_seconds;
END;
COMMENT ON FUNCTION _nexus_hub.set_rate_limit_state(integer, text, uuid, integer, bigint, bigint) IS
    'Sets the state of a key that was locked; expires: when it is of no more use, in microseconds since 2000-01-01 UTC.';

CREATE FUNCTION _nexus_hub.record_rate_limit_window(server_id text, user_id uuid, minute integer, request_count integer) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT _nexus_hub.record_rate_limit_windows(ARRAY[_nexus_hub.rate_limit_name(server_id)], ARRAY[user_id], ARRAY[minute], ARRAY[request_count]);
END;
COMMENT ON FUNCTION _nexus_hub.record_rate_limit_window(text, uuid, integer, integer) IS 'Writes down the calls of a minute that is over.';

CREATE FUNCTION _nexus_hub.forget_rate_limit_state(key text) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH gone AS (
        DELETE FROM _nexus_hub.rate_limit_entries e WHERE e.id = _nexus_hub.rate_limit_entry_id(3, key, NULL) RETURNING 1)
    SELECT count(*) > 0 FROM gone;
END;
COMMENT ON FUNCTION _nexus_hub.forget_rate_limit_state(text) IS 'Forgets a key of rate_limit, under all windows; false: there was none.';

CREATE FUNCTION _nexus_hub.counted_minutes() RETURNS TABLE (server_id text, user_id uuid, minute integer, request_count integer)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- A standby cannot read unlogged tables.
    IF NOT pg_is_in_recovery() THEN
        -- The minute is above, the count in the lower 31 bits.
        RETURN QUERY SELECT e.name, e.user_id, (e.state >> 32)::integer, (e.state & 2147483647)::integer
                       FROM _nexus_hub.rate_limit_entries e WHERE e.kind < 3 AND e.state & 2147483647 > 0;
    END IF;
END
$$;
COMMENT ON FUNCTION _nexus_hub.counted_minutes() IS 'The minutes in rate_limit_entries.';

CREATE FUNCTION _nexus_hub.tidy_rate_limits(retention integer) RETURNS integer
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    gone integer;
    old integer;
BEGIN
    WITH expired AS (
        DELETE FROM _nexus_hub.rate_limit_entries AS e
         WHERE (e.id, e.window_seconds) IN (
            SELECT x.id, x.window_seconds FROM _nexus_hub.rate_limit_entries x
             WHERE x.expires_at < clock_timestamp() - interval '1 minute' ORDER BY x.expires_at LIMIT 1000 FOR UPDATE SKIP LOCKED)
        RETURNING e.kind, e.name, e.user_id, e.state),
    recorded AS (
        INSERT INTO _nexus_hub.rate_limit_windows AS w (server_id, user_id, window_start, request_count)
        SELECT x.name, x.user_id, _nexus_hub.minute_start((x.state >> 32)::integer), (x.state & 2147483647)::integer
          FROM expired x WHERE x.kind < 3 AND x.state & 2147483647 > 0
        ON CONFLICT (window_start, server_id, (coalesce(user_id::text, ''))) DO UPDATE
           SET request_count = excluded.request_count WHERE w.request_count < excluded.request_count)
    SELECT count(*) INTO gone FROM expired;
    DELETE FROM _nexus_hub.rate_limit_windows AS w
     WHERE w.ctid = ANY (ARRAY(
        SELECT x.ctid FROM _nexus_hub.rate_limit_windows x
         WHERE x.window_start < clock_timestamp() - retention * interval '1 second'
         ORDER BY x.window_start LIMIT 1000 FOR UPDATE SKIP LOCKED));
    GET DIAGNOSTICS old = ROW_COUNT;
    RETURN greatest(gone, old);
END
$$;
COMMENT ON FUNCTION _nexus_hub.tidy_rate_limits(integer) IS
    'Deletes up to 1000 minutes that are older than so many seconds, and as many expired entries. Returns how many: at 1000 there may be more.';

-- ── Views ──

CREATE FUNCTION _nexus_hub.running_rate_limit_windows() RETURNS TABLE (server_id text, user_id uuid, minute integer, request_count integer)
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'running_rate_limit_windows_wrapper';
COMMENT ON FUNCTION _nexus_hub.running_rate_limit_windows() IS
    'The minutes of this database in shared memory: those that go on, and those that are over and not written down yet.';

CREATE FUNCTION _nexus_hub.rate_limit_statistics()
RETURNS TABLE (allowed bigint, denied bigint, exempt bigint, evicted bigint, full_table bigint, unrecorded bigint, keys integer, max_keys integer)
LANGUAGE c VOLATILE
AS 'MODULE_PATHNAME', 'rate_limit_statistics_wrapper';
COMMENT ON FUNCTION _nexus_hub.rate_limit_statistics() IS 'What the view rate_limit_stats shows; no row without shared memory.';

CREATE FUNCTION _nexus_hub.rate_limit_minutes()
RETURNS TABLE (server_id text, user_id uuid, window_start timestamptz, request_count integer)
LANGUAGE sql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- What has just been written down may still be in shared memory, too.
    SELECT server_id, user_id, window_start, max(request_count)
      FROM (SELECT w.server_id, w.user_id, w.window_start, w.request_count FROM _nexus_hub.rate_limit_windows w
            UNION ALL
            SELECT m.server_id, m.user_id, _nexus_hub.minute_start(m.minute), m.request_count FROM _nexus_hub.running_rate_limit_windows() m
            UNION ALL
            SELECT m.server_id, m.user_id, _nexus_hub.minute_start(m.minute), m.request_count FROM _nexus_hub.counted_minutes() m) AS counted
     GROUP BY 1, 2, 3;
END;
COMMENT ON FUNCTION _nexus_hub.rate_limit_minutes() IS 'What the view rate_limit_tracking shows.';

CREATE VIEW @extschema@.rate_limit_tracking WITH (security_barrier) AS
    SELECT m.server_id, m.user_id, m.window_start, m.request_count FROM _nexus_hub.rate_limit_minutes() AS m;
COMMENT ON VIEW @extschema@.rate_limit_tracking IS
    'The calls that check_rate_limit has counted, the running minute included; older ones for as long as nexus_hub.rate_limit_retention says. After a restart the running minute starts anew.';
COMMENT ON COLUMN @extschema@.rate_limit_tracking.server_id IS 'The server; of a name of more than 180 bytes the beginning and a hash.';
COMMENT ON COLUMN @extschema@.rate_limit_tracking.user_id IS 'The user; NULL: the calls were nobody''s.';
COMMENT ON COLUMN @extschema@.rate_limit_tracking.window_start IS 'When the clock minute began.';
COMMENT ON COLUMN @extschema@.rate_limit_tracking.request_count IS 'The calls, denied ones too.';

CREATE VIEW @extschema@.rate_limit_stats WITH (security_barrier) AS
    SELECT s.allowed, s.denied, s.exempt, s.evicted, s.full_table AS "full", s.unrecorded, s.keys, s.max_keys
      FROM _nexus_hub.rate_limit_statistics() AS s;
COMMENT ON VIEW @extschema@.rate_limit_stats IS
    'Counters of rate limits, of all databases, since the server started; no row where the library is not preloaded.';
COMMENT ON COLUMN @extschema@.rate_limit_stats.allowed IS 'Calls within their limits.';
COMMENT ON COLUMN @extschema@.rate_limit_stats.denied IS 'Calls over their limits.';
COMMENT ON COLUMN @extschema@.rate_limit_stats.exempt IS 'Calls of those who have no limit.';
COMMENT ON COLUMN @extschema@.rate_limit_stats.evicted IS 'Entries of no more use that made room for other keys.';
COMMENT ON COLUMN @extschema@.rate_limit_stats."full" IS 'Calls that there was no room for: allowed or refused as nexus_hub.rate_limit_when_full says.';
COMMENT ON COLUMN @extschema@.rate_limit_stats.unrecorded IS 'Minutes that were forgotten before they were written down.';
COMMENT ON COLUMN @extschema@.rate_limit_stats.keys IS 'Keys in the table, those of no more use included.';
COMMENT ON COLUMN @extschema@.rate_limit_stats.max_keys IS 'Keys there is room for: nexus_hub.rate_limit_max_keys.';
