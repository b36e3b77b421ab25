//! Caches of what servers offer: syncs of real servers, their pages, and what becomes of the entries when one fails.

use crate::support::*;
use postgres::Client;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use uuid::Uuid;

/// Settings under which the worker looks at once for what expires.
const SWIFT: &str = "nexus_hub.poll_interval = 100";

fn sync(client: &mut Client, server: Uuid) -> Uuid {
    client.query_one("SELECT sync_server($1)", &[&server]).expect("sync_server").get(0)
}

fn synced(client: &mut Client, server: Uuid) -> Value {
    let job = sync(client, server);
    wait_for_job(client, job).completed()
}

/// Why the last sync of the only server failed.
fn error(client: &mut Client) -> Option<String> {
    value(client, "SELECT error FROM server_syncs")
}

fn tools(client: &mut Client) -> Vec<String> {
    let rows = client.query("SELECT tool_name FROM tool_cache ORDER BY tool_name", &[]).expect("tool_cache");
    rows.iter().map(|row| row.get(0)).collect()
}

fn count(client: &mut Client, relation: &str) -> i64 {
    value(client, &format!("SELECT count(*) FROM {relation}"))
}

/// An MCP server of the older protocol with these capabilities. `list` answers what is listed, given the method and
/// the cursor.
fn listing(capabilities: Value, list: impl Fn(&str, Option<&str>) -> Value + Send + Sync + 'static) -> FakeServer {
    FakeServer::start(move |request| {
        let message: Value = serde_json::from_str(request.split_once("\r\n\r\n")?.1).ok()?;
        let mut reply = match message["method"].as_str()? {
            "server/discover" => json!({"error": {"code": -32601, "message": "unknown method"}}),
            "initialize" => json!({"result": {"protocolVersion": "2025-06-18", "capabilities": capabilities,
                                              "serverInfo": {"name": "lists", "version": "1"}}}),
            method if method.ends_with("/list") => list(method, message["params"]["cursor"].as_str()),
            "tools/call" => json!({"result": {"content": []}}),
            _ => return Some(Answer::new("202 Accepted", "text/plain", "")),
        };
        reply["jsonrpc"] = json!("2.0");
        reply["id"] = message["id"].clone();
        Some(Answer::json(&reply.to_string()))
    })
}

/// One that has these tools.
fn with_tools(tools: Value) -> FakeServer {
    listing(json!({"tools": {}}), move |_, _| json!({"result": {"tools": tools}}))
}

fn scene(server: &FakeServer) -> (Database<'static>, Client, Uuid) {
    let database = shared().database();
    let mut client = database.connect();
    let id = add_server(&mut client, "demo", json!({"url": server.url}));
    (database, client, id)
}

/// Makes everything that is cached expire.
fn expire(client: &mut Client) {
    client
        .batch_execute(
            "UPDATE tool_cache SET expires_at = now() - interval '1 second';
             UPDATE server_syncs SET expires_at = now() - interval '1 second'",
        )
        .expect("UPDATE");
}

#[test]
fn everything_that_the_reference_server_offers_is_cached() {
    let server = EverythingServer::start();
    let database = shared().database();
    let mut client = database.connect();
    let id = add_server(&mut client, "everything", json!({"url": server.url}));
    let found = synced(&mut client, id);
    for (kind, relation) in [
        ("tools", "tool_cache"),
        ("resources", "resource_cache WHERE NOT is_template"),
        ("resource_templates", "resource_cache WHERE is_template"),
        ("prompts", "prompt_cache"),
    ] {
        assert_eq!(found[kind], count(&mut client, relation), "{found}");
        assert!(found[kind].as_i64() > Some(0), "{found}");
    }
    assert_eq!(found["left_out"], 0);
    let row = client
        .query_one("SELECT namespaced_name, description, input_schema FROM tool_cache WHERE tool_name = 'echo'", &[])
        .expect("the tool");
    assert_eq!(row.get::<_, &str>(0), "everything__echo");
    assert_eq!(row.get::<_, &str>(1), "Echoes back the input string");
    assert_eq!(row.get::<_, Value>(2)["required"], json!(["message"]));
    // What is cached is what can be called.
    let uri: String = value(&mut client, "SELECT uri FROM resource_cache WHERE NOT is_template ORDER BY 1 LIMIT 1");
    run_job(&mut client, "resource_fetch", "everything", None, json!({"uri": uri})).completed();
}

#[test]
fn a_server_of_the_stateless_protocol_is_synced() {
    let server = McpServer::start(&[]);
    let database = shared().database();
    let mut client = database.connect();
    let id = add_server(&mut client, "demo", server.config());
    let found = synced(&mut client, id);
    assert!(found["tools"].as_i64() > Some(0) && found["prompts"].as_i64() > Some(0), "{found}");
    assert!(tools(&mut client).contains(&"add".to_owned()));
    assert_eq!(server.stats()["initialize"], 0);
}

#[test]
fn a_system_server_is_synced_with_a_shared_secret() {
    let server = McpServer::start(&[]);
    let database = shared().database();
    let mut client = database.connect();
    let config = json!({"url": server.url, "headers": {"Authorization": "Bearer {{secret:demo}}"}});
    client.execute("SELECT create_secret('demo', $1)", &[&TOKEN]).expect("create_secret");
    client
        .execute("INSERT INTO system_servers (id, name, config) VALUES ('demo', 'D', $1)", &[&config])
        .expect("INSERT");
    let id: Uuid = value(&mut client, "SELECT ref_id FROM system_servers");
    synced(&mut client, id);
    let all = "tool_cache WHERE server_type = 'system' AND user_id IS NULL";
    assert!(count(&mut client, all) > 0 && count(&mut client, all) == count(&mut client, "tool_cache"));
}

#[test]
fn all_pages_of_all_lists_are_fetched_by_requests_that_are_no_repetitions_of_each_other() {
    let capabilities = json!({"tools": {}, "resources": {}, "prompts": {}});
    let server = listing(capabilities, |method, cursor| {
        let page = cursor.map_or(0, |cursor| cursor.parse::<usize>().expect("ours"));
        let (kind, key) = match method {
            "tools/list" => ("tools", "name"),
            "resources/list" => ("resources", "uri"),
            "resources/templates/list" => ("resourceTemplates", "uriTemplate"),
            _ => ("prompts", "name"),
        };
        let entries: Vec<_> = (0..7)
            .map(
                |number| json!({key: format!("{page}-{number}"), "name": page.to_string() + "-" + &number.to_string()}),
            )
            .collect();
        let mut result = json!({kind: entries});
        if page < 9 {
            result["nextCursor"] = json!((page + 1).to_string());
        }
        json!({"result": result})
    });
    let (_database, mut client, id) = scene(&server);
    let found = synced(&mut client, id);
    assert_eq!(found, json!({"tools": 70, "resources": 70, "resource_templates": 70, "prompts": 70, "left_out": 0}));
    let lists: Vec<_> = server.requests().into_iter().filter(|request| request.contains("/list\"")).collect();
    assert_eq!(lists.len(), 40);
    assert!(!lists.iter().any(|request| request.contains("\r\nidempotency-key:")));
}

#[test]
fn only_what_a_server_says_it_has_is_asked_for_and_templates_may_be_missing() {
    let server = listing(json!({"resources": {}}), |method, _| match method {
        "resources/list" => json!({"result": {"resources": [{"uri": "a://b", "name": "b"}], "nextCursor": ""}}),
        _ => json!({"error": {"code": -32601, "message": "unknown method"}}),
    });
    let (_database, mut client, id) = scene(&server);
    let found = synced(&mut client, id);
    assert_eq!(found, json!({"tools": 0, "resources": 1, "resource_templates": 0, "prompts": 0, "left_out": 0}));
    assert!(
        !server.requests().iter().any(|request| request.contains("tools/list") || request.contains("prompts/list"))
    );
}

#[test]
fn an_unreachable_server_keeps_its_stale_entries_and_says_so() {
    let server = McpServer::start(&[]);
    let database = shared().database();
    let mut client = database.connect();
    let id = add_server(&mut client, "demo", server.config());
    synced(&mut client, id);
    let before = tools(&mut client);
    drop(server);
    expire(&mut client);
    client
        .batch_execute("UPDATE resource_cache SET expires_at = now(); UPDATE prompt_cache SET expires_at = now()")
        .expect("UPDATE");
    let job = sync(&mut client, id);
    wait_until("the failure is told", || error(&mut client).is_some());
    assert!(error(&mut client).is_some_and(|error| error.contains("could not connect")), "{:?}", error(&mut client));
    assert_eq!(tools(&mut client), before);
    let row = client
        .query_one("SELECT synced_at < failed_at, expires_at < now(), job_id FROM server_syncs", &[])
        .expect("a row");
    assert_eq!((row.get(0), row.get(1), row.get(2)), (true, true, job));
    // It is tried again, and the alerts tell.
    let status: String =
        client.query_one("SELECT status FROM job_results WHERE id = $1", &[&job]).expect("the job").get(0);
    assert_eq!(status, "pending");
    assert!(value::<bool>(&mut client, "SELECT firing FROM nexus_hub_alerts WHERE name = 'cache_expired'"));
    let health: Value = value(&mut client, "SELECT nexus_hub_health() -> 'cache'");
    assert_eq!((&health["expired_share"], &health["failing_syncs"]), (&json!(1.0), &json!(1)), "{health}");
}

#[test]
fn a_list_that_breaks_off_does_not_end_or_is_none_changes_nothing_and_is_a_failed_job_that_says_why() {
    let answers = Arc::new(Mutex::new(json!({"result": {"tools": [{"name": "first"}]}})));
    let server = listing(json!({"tools": {}, "prompts": {}}), {
        let answers = Arc::clone(&answers);
        move |method, _| match method {
            // The tools of the first page are there when the second list fails.
            "tools/list" => json!({"result": {"tools": [{"name": "another"}]}}),
            _ => answers.lock().expect("not poisoned").clone(),
        }
    });
    let (_database, mut client, id) = scene(&server);
    *answers.lock().expect("not poisoned") = json!({"result": {"prompts": []}});
    synced(&mut client, id);
    client.batch_execute("UPDATE tool_cache SET tool_name = 'kept'").expect("UPDATE");
    for (answer, told) in [
        (json!({"result": {"prompts": [], "nextCursor": "again"}}), "its list of prompts does not end"),
        (json!({"result": {"tools": []}}), "its list of prompts is not an object of the expected form"),
        (json!({"result": {"prompts": [], "resultType": "input_required"}}), "not an object of the expected form"),
        (json!({"error": {"code": -32603, "message": "out of order"}}), "out of order (MCP error -32603)"),
    ] {
        *answers.lock().expect("not poisoned") = answer;
        let job = sync(&mut client, id);
        let error = wait_for_job(&mut client, job).failed();
        assert!(error.contains(told), "{error}");
        assert_eq!(self::error(&mut client), Some(error));
        assert_eq!(tools(&mut client), ["kept"]);
    }
}

#[test]
fn lists_are_bounded_in_size_and_number() {
    let cluster = Cluster::start(&["nexus_hub.max_response_bytes = '100kB'"]);
    let database = cluster.database();
    let mut client = database.connect();
    let large = listing(json!({"tools": {}}), |_, cursor| {
        let page = cursor.map_or(0, |cursor| cursor.parse::<usize>().expect("ours"));
        let tool = json!({"name": page.to_string(), "description": "x".repeat(10_000)});
        json!({"result": {"tools": [tool], "nextCursor": (page + 1).to_string()}})
    });
    let id = add_server(&mut client, "large", json!({"url": large.url}));
    let job = sync(&mut client, id);
    let error = wait_for_job(&mut client, job).failed();
    assert!(error.contains("what it lists is larger than 102400 bytes"), "{error}");
    assert!(large.requests().len() < 20, "it was not asked for more than can be taken");
    let endless = listing(json!({"tools": {}}), |_, cursor| {
        let page = cursor.map_or(0, |cursor| cursor.parse::<usize>().expect("ours"));
        json!({"result": {"tools": [], "nextCursor": (page + 1).to_string()}})
    });
    let id = add_server(&mut client, "endless", json!({"url": endless.url}));
    let job = sync(&mut client, id);
    assert!(wait_for_job(&mut client, job).failed().contains("its list of tools does not end"));
    assert_eq!(count(&mut client, "tool_cache"), 0);
}

#[test]
fn a_credential_that_a_server_repeats_is_not_cached() {
    let server = listing(
        json!({"tools": {}}),
        |_, _| json!({"result": {"tools": [{"name": "t", "description": "you are k3y-5up3r-s3cr3t, right?"}]}}),
    );
    let database = shared().database();
    let mut client = database.connect();
    client
        .execute("SELECT create_secret('key', 'k3y-5up3r-s3cr3t', $1::text::uuid)", &[&ALICE])
        .expect("create_secret");
    let id = add_server(&mut client, "demo", json!({"url": server.url, "headers": {"X-Key": "{{secret:key}}"}}));
    synced(&mut client, id);
    let description: String = value(&mut client, "SELECT description FROM tool_cache");
    assert_eq!(description, "you are {{secret:key}}, right?");
    assert_eq!(count(&mut client, "tool_cache c WHERE c::text LIKE '%s3cr3t%'"), 0);
}

#[test]
fn who_locks_an_entry_holds_up_that_sync_and_no_other_job() {
    let server = with_tools(json!([{"name": "a"}]));
    let (database, mut client, id) = scene(&server);
    synced(&mut client, id);
    let mut other = database.connect();
    other.batch_execute("BEGIN; UPDATE tool_cache SET enabled = false").expect("UPDATE");
    let job = sync(&mut client, id);
    for _ in 0..3 {
        run_job(&mut client, "tool_invoke", "demo", Some("a"), json!({})).completed();
    }
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM job_results WHERE status = 'running'"), 1);
    other.batch_execute("COMMIT").expect("COMMIT");
    wait_for_job(&mut client, job).completed();
    assert!(!value::<bool>(&mut client, "SELECT enabled FROM tool_cache"), "a sync leaves that alone");
}

#[test]
fn what_a_trigger_of_the_users_does_not_want_fails_that_sync_alone() {
    let server = with_tools(json!([{"name": "a"}]));
    let (_database, mut client, id) = scene(&server);
    client
        .batch_execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'not %', NEW.tool_name; END $$;
             CREATE TRIGGER refuse BEFORE INSERT ON tool_cache FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
        .expect("a trigger");
    let job = sync(&mut client, id);
    let call = create_job(&mut client, "tool_invoke", "demo", Some("a"), json!({}));
    assert_eq!(wait_for_job(&mut client, job).failed(), "what the server lists cannot be stored: not a");
    wait_for_job(&mut client, call).completed();
}

#[test]
fn a_cancelled_sync_writes_nothing() {
    let gate = Gate::default();
    let begun = Arc::new(AtomicUsize::new(0));
    let server = listing(json!({"tools": {}}), {
        let (gate, begun) = (gate.clone(), Arc::clone(&begun));
        move |_, _| {
            begun.fetch_add(1, SeqCst);
            gate.pass();
            json!({"result": {"tools": [{"name": "late"}]}})
        }
    });
    let (_database, mut client, id) = scene(&server);
    let job = sync(&mut client, id);
    wait_until("it has begun", || begun.load(SeqCst) == 1);
    assert!(client.query_one("SELECT cancel_job($1)", &[&job]).expect("cancel_job").get::<_, bool>(0));
    gate.open();
    run_job(&mut client, "tool_invoke", "demo", Some("t"), json!({})).completed();
    assert_eq!((wait_for_job(&mut client, job).status.as_str(), count(&mut client, "tool_cache")), ("cancelled", 0));
}

#[test]
fn a_disabled_server_is_not_synced_by_a_system_server_of_its_name() {
    let gate = Gate::default();
    let held = gate.server();
    let server = with_tools(json!([{"name": "of everybody"}]));
    let (_database, mut client, id) = scene(&server);
    client
        .execute(
            "INSERT INTO system_servers (id, name, config) VALUES ('demo', 'D', $1)",
            &[&json!({"url": server.url})],
        )
        .expect("INSERT");
    client.batch_execute("ALTER TABLE user_servers DISABLE TRIGGER USER").expect("ALTER TABLE");
    let mut transaction = client.transaction().expect("BEGIN");
    transaction.execute("SELECT sync_server($1)", &[&id]).expect("sync_server");
    transaction.execute("SELECT update_server($1, p_enabled => false)", &[&id]).expect("update_server");
    transaction.commit().expect("COMMIT");
    let job: Uuid = value(&mut client, "SELECT id FROM job_results");
    assert_eq!(wait_for_job(&mut client, job).failed(), "the server \"demo\" is disabled or gone");
    assert_eq!(count(&mut client, "tool_cache"), 0);
    drop(held);
}

#[test]
fn two_who_ask_at_a_time_get_one_job() {
    let gate = Gate::default();
    let held = gate.server();
    let database = shared().database();
    let mut client = database.connect();
    let id = add_server(&mut client, "demo", json!({"url": held.url}));
    client.batch_execute("BEGIN").expect("BEGIN");
    let first = sync(&mut client, id);
    let other = std::thread::spawn({
        let mut client = database.connect();
        move || sync(&mut client, id)
    });
    let mut watcher = database.connect();
    wait_until("the other waits", || {
        value(
            &mut watcher,
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%sync_server%')",
        )
    });
    client.batch_execute("COMMIT").expect("COMMIT");
    assert_eq!(other.join().expect("no panic"), first);
    gate.open();
}

#[test]
fn the_worker_syncs_again_before_entries_expire_and_those_that_have() {
    let cluster = Cluster::start(&[SWIFT, "nexus_hub.cache_ttl = '10min'"]);
    let database = cluster.database();
    let mut client = database.connect();
    let listed = Arc::new(AtomicUsize::new(0));
    let server = listing(json!({"tools": {}}), {
        let listed = Arc::clone(&listed);
        move |_, _| json!({"result": {"tools": [{"name": format!("t{}", listed.fetch_add(1, SeqCst))}]}})
    });
    let id = add_server(&mut client, "demo", json!({"url": server.url}));
    synced(&mut client, id);
    let ttl: f64 = value(&mut client, "SELECT extract(epoch FROM expires_at - updated_at)::float8 FROM tool_cache");
    assert_eq!(ttl, 600.0);
    client.batch_execute("UPDATE tool_cache SET expires_at = now() + interval '119 seconds'").expect("UPDATE");
    let looks = |client: &mut Client| value::<i64>(client, "SELECT count(*) FROM job_results");
    // In a minute a tenth of the time is left. What shows that it has looked meanwhile is the server that is due.
    let second = add_server(&mut client, "second", json!({"url": server.url}));
    synced(&mut client, second);
    client
        .execute(
            "UPDATE tool_cache SET expires_at = now() + interval '50 seconds' WHERE server_ref_id = $1",
            &[&second],
        )
        .expect("UPDATE");
    wait_until("the one that is due is synced", || looks(&mut client) == 3);
    let again: String = value(&mut client, "SELECT server_id FROM job_results ORDER BY id DESC LIMIT 1");
    assert_eq!(again, "second");
    client
        .execute("UPDATE server_syncs SET expires_at = now() - interval '1 day' WHERE server_ref_id = $1", &[&id])
        .expect("UPDATE");
    wait_until("one of which only that is known is synced, too", || {
        value(&mut client, "SELECT bool_and(expires_at > now() + interval '2 minutes') FROM server_syncs")
    });
    wait_until("it is fresh", || {
        value(&mut client, "SELECT bool_and(expires_at > now() + interval '2 minutes') FROM tool_cache")
    });
    assert_eq!(looks(&mut client), 4);
    let priority: i16 = value(&mut client, "SELECT priority FROM job_results ORDER BY id DESC LIMIT 1");
    assert_eq!(priority, 7, "behind what users ask for");
}

#[test]
fn a_sync_that_fails_is_tried_again_less_and_less_often() {
    let cluster = Cluster::start(&[SWIFT, "nexus_hub.retry_base_delay = '1ms'", "nexus_hub.retry_max_delay = '1ms'"]);
    let database = cluster.database();
    let mut client = database.connect();
    let working = Arc::new(AtomicUsize::new(1));
    let server = listing(json!({"tools": {}}), {
        let working = Arc::clone(&working);
        move |_, _| match working.load(SeqCst) {
            0 => json!({"error": {"code": -32603, "message": "out of order"}}),
            _ => json!({"result": {"tools": [{"name": "t"}]}}),
        }
    });
    let id = add_server(&mut client, "demo", json!({"url": server.url}));
    synced(&mut client, id);
    working.store(0, SeqCst);
    let jobs = |client: &mut Client| count(client, "job_results WHERE status = 'failed'");
    let tries = |client: &mut Client| value::<i32>(client, "SELECT tries FROM server_syncs");
    expire(&mut client);
    wait_until("it has failed", || jobs(&mut client) == 1 && error(&mut client).is_some());
    assert_eq!(tries(&mut client), 1);
    for (tries_before, too_early, late_enough) in [(1, "200 seconds", "301 seconds"), (2, "500 seconds", "601 seconds")]
    {
        // Another server's sync shows that the worker has looked.
        let other =
            add_server(&mut client, &format!("other {tries_before}"), json!({"url": with_tools(json!([])).url}));
        synced(&mut client, other);
        client
            .execute(
                &format!(
                    "UPDATE server_syncs SET requested_at = now() - interval '{too_early}' WHERE server_ref_id = $1"
                ),
                &[&id],
            )
            .expect("UPDATE");
        client
            .execute("UPDATE server_syncs SET expires_at = now() WHERE server_ref_id = $1", &[&other])
            .expect("UPDATE");
        wait_until("it has looked", || {
            let fresh = "SELECT EXISTS (SELECT FROM server_syncs WHERE server_ref_id = $1 AND expires_at > now())";
            client.query_one(fresh, &[&other]).expect("server_syncs").get(0)
        });
        let row = client.query_one("SELECT tries FROM server_syncs WHERE server_ref_id = $1", &[&id]).expect("a row");
        assert_eq!(row.get::<_, i32>(0), tries_before);
        client
            .execute(
                &format!(
                    "UPDATE server_syncs SET requested_at = now() - interval '{late_enough}' WHERE server_ref_id = $1"
                ),
                &[&id],
            )
            .expect("UPDATE");
        wait_until("it is tried again", || jobs(&mut client) == i64::from(tries_before) + 1);
    }
    working.store(1, SeqCst);
    client
        .execute("UPDATE server_syncs SET requested_at = now() - interval '6 hours' WHERE server_ref_id = $1", &[&id])
        .expect("UPDATE");
    wait_until("it is well again", || {
        value(&mut client, "SELECT bool_and(error IS NULL AND tries = 0) FROM server_syncs")
    });
}

#[test]
fn switched_off_the_worker_syncs_nothing_by_itself() {
    let cluster = Cluster::start(&[SWIFT, "nexus_hub.auto_refresh = off"]);
    let database = cluster.database();
    let mut client = database.connect();
    let server = with_tools(json!([{"name": "a"}]));
    let id = add_server(&mut client, "demo", json!({"url": server.url}));
    synced(&mut client, id);
    expire(&mut client);
    // Old jobs that it deletes show that it goes on.
    client
        .batch_execute(
            "INSERT INTO job_results (job_type, server_id, tool_name, status, created_at, completed_at)
             VALUES ('tool_invoke', 's', 't', 'completed', now() - interval '9 days', now() - interval '8 days')",
        )
        .expect("INSERT");
    wait_until("the old job is gone", || count(&mut client, "job_results") == 1);
    assert_eq!(count(&mut client, "server_syncs WHERE expires_at < now()"), 1);
    cluster.configure(&[SWIFT]);
    cluster.pg_ctl(&["reload"]);
    wait_until("switched on it does", || count(&mut client, "server_syncs WHERE expires_at > now()") == 1);
}

#[test]
fn caches_survive_a_dump() {
    let server = with_tools(json!([{"name": "a", "title": "A"}, {"name": "b"}]));
    let (database, mut client, id) = scene(&server);
    synced(&mut client, id);
    client.batch_execute("UPDATE tool_cache SET enabled = false WHERE tool_name = 'a'").expect("UPDATE");
    let restored = shared().empty_database();
    database.copy_to(&restored);
    let all = "SELECT concat_ws(' ', (SELECT string_agg(t::text, ',' ORDER BY id) FROM tool_cache t), (SELECT y::text FROM server_syncs y))";
    assert_eq!(value::<String>(&mut client, all), value::<String>(&mut restored.connect(), all));
}

#[test]
fn a_sync_asks_the_server_as_it_is_now_and_one_that_asked_another_writes_nothing() {
    let gate = Gate::default();
    let begun = Arc::new(AtomicUsize::new(0));
    let old = listing(json!({"tools": {}}), {
        let (gate, begun) = (gate.clone(), Arc::clone(&begun));
        move |_, _| {
            begun.fetch_add(1, SeqCst);
            gate.pass();
            json!({"result": {"tools": [{"name": "old"}]}})
        }
    });
    let new = with_tools(json!([{"name": "new"}]));
    let (_database, mut client, id) = scene(&old);
    let first = sync(&mut client, id);
    wait_until("the first has begun", || begun.load(SeqCst) == 1);
    client
        .execute("SELECT update_server($1, p_config => $2)", &[&id, &json!({"url": new.url})])
        .expect("update_server");
    let second = sync(&mut client, id);
    assert_ne!(first, second);
    wait_for_job(&mut client, second).completed();
    gate.open();
    assert_eq!(wait_for_job(&mut client, first).failed(), "the server was deleted, or is synced anew");
    assert_eq!(tools(&mut client), ["new"]);
    // Another server of the same name gets nothing of what the one before it has listed.
    let gate = Gate::default();
    let begun = Arc::new(AtomicUsize::new(0));
    let slow = listing(json!({"tools": {}}), {
        let (gate, begun) = (gate.clone(), Arc::clone(&begun));
        move |_, _| {
            begun.fetch_add(1, SeqCst);
            gate.pass();
            json!({"result": {"tools": [{"name": "slow"}]}})
        }
    });
    client
        .execute("SELECT update_server($1, p_config => $2)", &[&id, &json!({"url": slow.url})])
        .expect("update_server");
    let job = sync(&mut client, id);
    wait_until("it has begun", || begun.load(SeqCst) == 1);
    client.execute("SELECT delete_server($1)", &[&id]).expect("delete_server");
    add_server(&mut client, "demo", json!({"url": new.url}));
    gate.open();
    assert_eq!(wait_for_job(&mut client, job).failed(), "the server was deleted, or is synced anew");
    assert_eq!((count(&mut client, "tool_cache"), count(&mut client, "server_syncs")), (0, 0));
}

#[test]
fn what_was_listed_before_a_change_of_the_server_is_not_fresh() {
    let gate = Gate::default();
    let begun = Arc::new(AtomicUsize::new(0));
    let server = listing(json!({"tools": {}}), {
        let (gate, begun) = (gate.clone(), Arc::clone(&begun));
        move |_, _| {
            begun.fetch_add(1, SeqCst);
            gate.pass();
            json!({"result": {"tools": [{"name": "t"}]}})
        }
    });
    let (_database, mut client, id) = scene(&server);
    let job = sync(&mut client, id);
    wait_until("it has begun", || begun.load(SeqCst) == 1);
    client
        .execute("SELECT update_server($1, p_config => $2)", &[&id, &json!({"url": "https://host.example/"})])
        .expect("update_server");
    gate.open();
    wait_for_job(&mut client, job).completed();
    assert_eq!(count(&mut client, "tool_cache WHERE expires_at <= now()"), 1);
}

#[test]
fn large_syncs_do_not_hold_up_other_jobs() {
    let large: Vec<_> =
        (0..2000).map(|number| json!({"name": format!("tool {number}"), "description": "x".repeat(1500)})).collect();
    let large = with_tools(json!(large));
    let database = shared().database();
    let mut client = database.connect();
    let good = FakeServer::start(|_| Some(Answer::json("{}")));
    let syncs: Vec<_> = (0..20)
        .map(|number| {
            let id = add_server(&mut client, &format!("large {number}"), json!({"url": large.url}));
            sync(&mut client, id)
        })
        .collect();
    wait_until("the first is written", || count(&mut client, "server_syncs WHERE synced_at IS NOT NULL") > 0);
    for _ in 0..5 {
        run_http(&mut client, json!({"url": good.url})).completed();
    }
    let written = count(&mut client, "server_syncs WHERE synced_at IS NOT NULL");
    assert!(written < 20, "the jobs waited for all syncs");
    for job in syncs {
        assert_eq!(wait_for_job(&mut client, job).completed()["tools"], 2000);
    }
}

#[test]
fn syncs_that_wait_are_not_begun_anew_and_keep_no_other_server_from_being_synced() {
    let cluster = Cluster::start(&[SWIFT]);
    let database = cluster.database();
    let mut client = database.connect();
    let server = with_tools(json!([{"name": "a"}]));
    let honest = add_server(&mut client, "honest", json!({"url": server.url}));
    synced(&mut client, honest);
    // Others wait for their rate limit, longer than the time after which a failed sync is tried again.
    for number in 0..60 {
        let id = add_server(&mut client, &format!("waits {number}"), json!({"url": server.url}));
        synced(&mut client, id);
    }
    client
        .batch_execute("UPDATE user_servers SET rate_limit_per_minute = 0 WHERE server_id <> 'honest'")
        .expect("UPDATE");
    client.batch_execute("UPDATE server_syncs SET expires_at = now() WHERE server_id <> 'honest'").expect("UPDATE");
    wait_until("syncs of all of them wait", || count_jobs(&mut client, "pending") == 60);
    client
        .batch_execute(
            "UPDATE server_syncs SET requested_at = now() - interval '7 hours' WHERE server_id <> 'honest';
             UPDATE server_syncs SET expires_at = now() WHERE server_id = 'honest'",
        )
        .expect("UPDATE");
    wait_until("the honest one is synced", || {
        count(&mut client, "server_syncs WHERE server_id = 'honest' AND expires_at > now()") == 1
    });
    assert_eq!((count_jobs(&mut client, "pending"), count(&mut client, "server_syncs WHERE tries > 1")), (60, 0));
}
