//! Rate limits of requests through a real PostgREST: 429, fields of the answer, and which policy it was.

use crate::support::*;
use serde_json::{Value, json};

const HOOK: &str = include_str!("../../examples/postgrest_rate_limits.sql");

/// A database with the example's hook, and PostgREST before it. `change`: from what to what in the example.
fn served(change: &[(&str, &str)]) -> (Database<'static>, PostgRest) {
    let database = shared().database();
    let hook = change.iter().fold(HOOK.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{from} is not in the example");
        text.replace(from, to)
    });
    let mut client = database.connect();
    client.batch_execute(&hook).expect("the example");
    client
        .batch_execute(
            "CREATE TABLE things (name text NOT NULL);
             INSERT INTO things VALUES ('a thing');
             GRANT SELECT, INSERT ON things TO anon, authenticated, service_role;
             CREATE FUNCTION is_read_only() RETURNS boolean LANGUAGE sql VOLATILE AS
                 $$SELECT current_setting('transaction_read_only')::boolean$$;
             CREATE FUNCTION with_a_header() RETURNS void LANGUAGE sql VOLATILE AS
                 $$SELECT set_config('response.headers',
                       (current_setting('response.headers')::jsonb || '[{\"X-Mine\": \"yes\"}]')::text, true)$$;",
        )
        .expect("tables");
    let postgrest = PostgRest::start(&database, &[("PGRST_DB_PRE_REQUEST", "hooks.before_request")]);
    (database, postgrest)
}

/// Five in two hours, and a hundred in a hundred: nothing comes back while a test runs.
const FIVE: &[(&str, &str)] =
    &[("ARRAY[20,               5000]", "ARRAY[5, 100]"), ("ARRAY[1, ", "ARRAY[7200, "), ("3600]", "360000]")];

#[test]
fn gets_and_posts_are_counted_together_and_one_too_many_is_answered_with_429() {
    let (_database, postgrest) = served(FIVE);
    let from = |address: &'static str| [("X-Forwarded-For", address)];
    // Read-only, and not.
    let first = postgrest.ask("GET", "/rpc/is_read_only", &from("203.0.113.1"), "");
    assert_eq!((first.status, &first.body), (200, &json!(true)));
    assert_eq!(first.header("RateLimit-Policy"), Some("\"burst\";q=5;w=7200, \"hour\";q=100;w=360000"));
    assert_eq!(first.header("RateLimit"), Some("\"burst\";r=4;t=1440, \"hour\";r=99;t=3600"));
    assert_eq!(first.header("Retry-After"), None);
    let post = postgrest.ask("POST", "/rpc/is_read_only", &from("203.0.113.1"), "{}");
    assert_eq!((post.status, &post.body), (200, &json!(false)));
    assert_eq!(postgrest.ask("POST", "/things", &from("203.0.113.1"), "{\"name\": \"another\"}").status, 201);
    assert_eq!(
        postgrest.ask("GET", "/things?name=eq.another", &from("203.0.113.1"), "").body,
        json!([{"name": "another"}])
    );
    // The statement fails and its transaction is rolled back: it counts.
    assert_eq!(postgrest.ask("POST", "/things", &from("203.0.113.1"), "{\"name\": null}").status, 400);
    for (method, path, body) in
        [("GET", "/things", ""), ("POST", "/things", "{\"name\": \"x\"}"), ("HEAD", "/things", "")]
    {
        let denied = postgrest.ask(method, path, &from("203.0.113.1"), body);
        assert_eq!(denied.status, 429, "{denied:?}");
        let wait: u32 = denied.header("Retry-After").expect("Retry-After").parse().expect("seconds");
        assert!((1200..=1440).contains(&wait), "{wait}");
        assert_eq!(denied.header("RateLimit-Policy"), first.header("RateLimit-Policy"));
        let left = denied.header("RateLimit").expect("RateLimit");
        assert!(left.starts_with("\"burst\";r=0;t=7") && left.contains(", \"hour\";r=95;t="), "{left}");
        if method != "HEAD" {
            assert_eq!(denied.body["code"], "PT429");
            assert_eq!(denied.body["message"], "rate limit exceeded");
            assert_eq!(denied.body["details"], "policy \"burst\" allows 5 in 7200 seconds");
            assert_eq!(denied.body["hint"], format!("try again in {wait} seconds"));
        }
    }
    // What another one has forwarded in front of the address helps nobody.
    assert_eq!(postgrest.ask("GET", "/things", &from("198.51.100.7, 203.0.113.1"), "").status, 429);
    assert_eq!(postgrest.ask("GET", "/things", &from("203.0.113.2"), "").status, 200);
    // Of IPv6, a network counts as one.
    let statuses: Vec<_> = (0..6)
        .map(|n| {
            postgrest.ask("GET", "/things", &[("X-Forwarded-For", format!("2001:db8::{n}:1").as_str())], "").status
        })
        .collect();
    assert_eq!(statuses, [200, 200, 200, 200, 200, 429]);
    assert_eq!(postgrest.ask("GET", "/things", &from("2001:db8:0:1::1"), "").status, 200);
    assert_eq!(postgrest.ask("GET", "/things", &from(":::not an address:"), "").status, 200);
    for same in ["::ffff:203.0.113.1", "203.0.113.1:4711", "::FFFF:203.0.113.1", "[2001:db8::7]:443"] {
        assert_eq!(postgrest.ask("GET", "/things", &from(same), "").status, 429, "{same}");
    }
    assert_eq!(postgrest.ask("GET", "/things", &from("::ffff:203.0.113.9"), "").status, 200);
    assert_eq!(postgrest.ask("GET", "/things", &[], "").status, 200, "without an address");
}

#[test]
fn users_are_apart_and_the_back_end_has_no_limit() {
    let (database, postgrest) = served(FIVE);
    let mut client = database.connect();
    let mut authorized = |role, user| bearer(&mut client, role, user);
    let (alice, bob, service) =
        (authorized("authenticated", ALICE), authorized("authenticated", BOB), authorized("service_role", ALICE));
    let status = |token: &str| postgrest.ask("GET", "/things", &[("Authorization", token)], "").status;
    let statuses: Vec<_> = (0..6).map(|_| status(&alice)).collect();
    assert_eq!(statuses, [200, 200, 200, 200, 200, 429]);
    assert_eq!(status(&bob), 200);
    assert!((0..9).all(|_| status(&service) == 200));
    // Nobody spends what is another's: neither the hook nor the limiter is to be had through PostgREST.
    for function in ["enforce_rate_limits", "rate_limit_all", "rate_limit"] {
        let body = format!("{{\"p_policies\": [\"x\"], \"p_keys\": [\"user {BOB}\"], \"p_limits\": [1]}}");
        let refused = postgrest.ask("POST", &format!("/rpc/{function}"), &[("Authorization", bob.as_str())], &body);
        assert!([403, 404].contains(&refused.status), "{function}: {refused:?}");
    }
    assert_eq!(postgrest.ask("POST", "/rpc/before_request", &[("Authorization", bob.as_str())], "{}").status, 404);
    // Until somebody is let off.
    client.execute("INSERT INTO rate_limit_exemptions (identifier) VALUES ('user ' || $1)", &[&ALICE]).expect("INSERT");
    assert_eq!(status(&alice), 200);
}

#[test]
fn fields_that_others_set_stay_and_odd_names_stay_in_their_quotes() {
    let odd = [("ARRAY['burst',          'hour']", r#"ARRAY['a "b\"', 'hour']"#)];
    let (_database, postgrest) = served(&odd);
    let answer = postgrest.ask("POST", "/rpc/with_a_header", &[], "{}");
    assert_eq!((answer.status, answer.header("X-Mine")), (204, Some("yes")), "{answer:?}");
    assert_eq!(answer.header("RateLimit-Policy"), Some(r#""a \"b\\\"";q=20;w=1, "hour";q=5000;w=3600"#));
}

#[test]
fn what_will_never_be_allowed_says_so() {
    let (_database, postgrest) = served(&[("ARRAY[20,               5000]", "ARRAY[0, 10]")]);
    let never = postgrest.ask("GET", "/things", &[], "");
    assert_eq!((never.status, never.header("Retry-After")), (429, None));
    assert_eq!(never.header("RateLimit"), Some("\"burst\";r=0, \"hour\";r=10;t=0"));
    assert_eq!(never.body["hint"], "no such request will be allowed");
    assert_eq!(never.body["details"], "policy \"burst\" allows 0 in 1 second");
}

#[test]
fn many_at_once_get_exactly_the_limit() {
    let (_database, postgrest) =
        served(&[("ARRAY[20,               5000]", "ARRAY[30, 5000]"), ("ARRAY[1, ", "ARRAY[7200, ")]);
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| (0..10).map(|_| postgrest.ask("GET", "/things", &[], "").status).collect::<Vec<_>>())
            })
            .collect();
        clients.into_iter().flat_map(|client| client.join().expect("a client")).collect()
    });
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 30);
    assert_eq!(statuses.iter().filter(|status| **status == 429).count(), 50);
}

#[test]
fn outside_of_postgrest_the_error_is_what_postgrest_would_get() {
    let database = shared().database();
    let mut client = database.connect();
    let call = "SELECT enforce_rate_limits('{p}', '{k}', '{1}')";
    client.batch_execute(call).expect("the first call");
    let error = client.batch_execute(call).expect_err("the second");
    let error = error.as_db_error().expect("an SQL error");
    assert_eq!(error.code().code(), "PGRST");
    let (message, detail): (Value, Value) = (
        serde_json::from_str(error.message()).expect("JSON"),
        serde_json::from_str(error.detail().expect("DETAIL")).expect("JSON"),
    );
    assert_eq!((&message["code"], &detail["status"]), (&json!("PT429"), &json!(429)));
    let setting: Option<String> = value(&mut client, "SELECT nullif(current_setting('response.headers', true), '')");
    assert_eq!(setting, None, "it lasts as long as the transaction");
}
