//! The egress policy and redirects.

use crate::support::*;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{TcpListener, ToSocketAddrs};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// The cluster that opens nothing, as it is by default.
fn closed() -> &'static Cluster {
    static CLOSED: OnceLock<Cluster> = OnceLock::new();
    CLOSED.get_or_init(|| Cluster::start(&["nexus_hub.egress_allow = ''"]))
}

/// Sockets at one port of both loopback addresses, where nobody shall come.
struct Trap {
    sockets: Vec<TcpListener>,
    port: u16,
}

impl Trap {
    fn set() -> Self {
        let v4 = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = v4.local_addr().expect("an address").port();
        let sockets: Vec<_> = [Some(v4), TcpListener::bind(("::1", port)).ok()].into_iter().flatten().collect();
        for socket in &sockets {
            socket.set_nonblocking(true).expect("nonblocking");
        }
        Self { sockets, port }
    }

    /// Nobody waits to be accepted, so nobody has connected: the kernel connects without waiting for this process.
    fn has_seen_nobody(&self) -> bool {
        self.sockets.iter().all(|socket| matches!(socket.accept(), Err(error) if error.kind() == ErrorKind::WouldBlock))
    }
}

fn port_of(url: &str) -> u16 {
    url.trim_end_matches('/').rsplit_once(':').expect("a port").1.parse().expect("a number")
}

/// How a job ended, and in how many attempts.
struct End {
    url: String,
    status: String,
    error: String,
    attempts: i32,
}

impl End {
    /// The policy refused it, and it was not tried again.
    fn is_denied(&self, kind: &str) {
        let Self { url, status, error, attempts } = self;
        assert_eq!(status, "failed", "{url}");
        assert!(error.starts_with("the egress policy does not allow \""), "{url}: {error}");
        assert!(error.ends_with(&format!("which is {kind} (nexus_hub.egress_allow)")), "{url}: {error}");
        assert_eq!(*attempts, 1, "{url}: {error}");
    }
}

/// Runs HTTP jobs with as many attempts as they have by default.
fn run_all(client: &mut postgres::Client, params: &[Value]) -> Vec<End> {
    let jobs: Vec<uuid::Uuid> = params.iter().map(|_| uuid::Uuid::new_v4()).collect();
    client
        .execute(
            "INSERT INTO job_results (id, job_type, params)
             SELECT id, 'http_request', params FROM unnest($1::uuid[], $2::jsonb[]) AS j (id, params)",
            &[&jobs, &params],
        )
        .expect("a plain INSERT is enough");
    jobs.iter().map(|job| end_of(client, *job)).collect()
}

fn end_of(client: &mut postgres::Client, job: uuid::Uuid) -> End {
    let Job { status, error, .. } = wait_for_job(client, job);
    let row = client
        .query_one("SELECT params ->> 'url', attempt FROM job_results WHERE id = $1", &[&job])
        .expect("the job's row");
    End {
        url: row.get::<_, Option<String>>(0).unwrap_or_default(),
        status,
        error: error.unwrap_or_default(),
        attempts: row.get(1),
    }
}

fn get(url: impl std::fmt::Display) -> Value {
    json!({"url": url.to_string()})
}

/// An answer that leads elsewhere.
fn redirect(status: &'static str, location: impl Into<String>) -> Answer {
    Answer { status, headers: vec![("Location", location.into())], body: Vec::new() }
}

/// The path of a request.
fn path(request: &str) -> &str {
    request.split(' ').nth(1).unwrap_or_default()
}

#[test]
fn by_default_no_address_is_reached_that_is_not_public_however_it_is_written() {
    let trap = Trap::set();
    let port = trap.port;
    let database = closed().database();
    let mut client = database.connect();
    let mut expected = Vec::new();
    for (kind, hosts) in [
        ("a loopback address", "127.0.0.1 127.0.0.1. 127.1 127.0.1 127.255.255.254"),
        ("a loopback address", "2130706433 017700000001 0x7f000001 0x7f.1 0x7f.0.0.0x1 0177.0.0.1 0177.0x0.1"),
        ("a loopback address", "[::1] [0:0:0:0:0:0:0:1] [0000::0001] [::ffff:127.0.0.1] [::FFFF:7F00:1]"),
        ("a loopback address", "[64:ff9b::7f00:1] [64:ff9b::127.0.0.1] [2002:7f00:1::] [::127.0.0.1]"),
        ("a loopback address", "127。0。0。1 １２７.0.0.1 ①②⑦.0.0.1 %31%32%37.0.0.1 127%2e0%2E0.1"),
        ("a loopback address", "example.com@127.0.0.1 example.com:80@127.0.0.1 me:example.com@[::1]"),
        ("an unspecified address", "0.0.0.0 0 0x0 00.0 [::] [::ffff:0.0.0.0] [0::0]"),
        (
            "a private address",
            "10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.254 192.168.1.1 167772161 0xc0.0xa8.0x1.1",
        ),
        ("a private address", "[fc00::1] [fd12:3456::1] [::ffff:10.0.0.1] [64:ff9b::192.168.0.1]"),
        ("a link-local address", "169.254.1.1 [fe80::1] [febf::1] [::ffff:169.254.1.1]"),
        ("a cloud metadata address", "169.254.169.254 2852039166 0xa9fea9fe 0251.0376.0251.0376 [::ffff:a9fe:a9fe]"),
        ("a cloud metadata address", "169.254.170.2 100.100.100.200 168.63.129.16 192.0.0.192 [fd00:ec2::254]"),
        ("a carrier-grade NAT address", "100.64.0.1 100.127.255.254 1681915905"),
        ("a multicast address", "224.0.0.1 239.255.255.250 [ff02::1] [ff05::2]"),
        ("a broadcast address", "255.255.255.255 0xffffffff"),
        ("a benchmarking address", "198.18.0.1"),
        ("a documentation address", "192.0.2.1 [2001:db8::1]"),
        ("a reserved address", "240.0.0.1 0.1.2.3 [4000::1] [::ffff:0:127.0.0.1]"),
    ] {
        expected.extend(hosts.split(' ').map(|host| (kind, format!("http://{host}:{port}/"))));
    }
    for beginning in [
        "HTTP://",
        "https://",
        "http:",
        "http:/",
        "http:\\\\",
        "http://///",
        "  http://",
        "ht\ntp:/\t/",
        "http://8.8.8.8@",
    ] {
        expected.push(("a loopback address", format!("{beginning}127.0.0.1:{port}")));
    }
    for end in ["#@8.8.8.8/", "?@8.8.8.8/", "/@8.8.8.8/", "\\@8.8.8.8/"] {
        expected.push(("a loopback address", format!("http://127.0.0.1:{port}{end}")));
    }
    let params: Vec<_> = expected.iter().map(|(_, url)| get(url)).collect();
    for ((kind, _), end) in expected.iter().zip(run_all(&mut client, &params)) {
        end.is_denied(kind);
    }
    assert!(trap.has_seen_nobody());
}

#[test]
fn by_default_a_name_that_leads_to_no_public_address_is_not_reached() {
    let trap = Trap::set();
    let database = closed().database();
    let mut client = database.connect();
    let hostname = Command::new("hostname").output().expect("hostname").stdout;
    let hostname = String::from_utf8_lossy(&hostname).trim().to_owned();
    let is_loopback = |name: &&str| {
        (*name, 0).to_socket_addrs().is_ok_and(|mut addresses| addresses.all(|address| address.ip().is_loopback()))
    };
    let names = ["localhost", "LOCALHOST", "localhost.", "ｌocalhost", "ip6-localhost", &hostname];
    let params: Vec<_> = names
        .iter()
        .filter(|name| is_loopback(name))
        .map(|name| get(format!("http://{name}:{}/", trap.port)))
        .collect();
    assert!(params.len() >= 2, "localhost is this machine");
    for end in run_all(&mut client, &params) {
        end.is_denied("a loopback address");
    }
    assert!(trap.has_seen_nobody());
}

#[test]
fn what_the_policy_denies_is_refused_where_it_is_asked_for_as_far_as_that_can_be_told() {
    let database = closed().database();
    let mut client = database.connect();
    for statement in [
        "SELECT http_get('http://127.0.0.1:1/')",
        "SELECT create_job(NULL, 'http_request', NULL, NULL, '{\"url\": \"http://0x7f.1:1/\"}')",
        &format!("SELECT add_server('s', 's', '{{\"url\": \"http://[::ffff:127.0.0.1]:1/\"}}', '{ALICE}')"),
    ] {
        let error = client.simple_query(statement).expect_err("denied");
        let error = error.as_db_error().expect("an SQL error");
        assert_eq!(error.code().code(), "42501");
        assert_eq!(error.message(), "the egress policy does not allow a loopback address");
        assert!(error.hint().is_some_and(|hint| hint.contains("nexus_hub.egress_allow")), "{error:?}");
    }
    assert_eq!(value::<i64>(&mut client, "SELECT count(*) FROM job_results"), 0);
    add_server(&mut client, "by-name", json!({"url": "http://localhost:1/"}));
}

#[test]
fn by_default_mcp_servers_are_not_reached_there_either() {
    let trap = Trap::set();
    let database = closed().database();
    let mut client = database.connect();
    let user: uuid::Uuid = ALICE.parse().expect("a uuid");
    for (name, host) in [("address", "127.0.0.1"), ("number", "2130706433"), ("v6", "[::1]"), ("name", "localhost")] {
        let config = json!({"url": format!("http://{host}:{}/mcp", trap.port)});
        // As it may have been sealed before the policy was narrowed.
        client
            .execute(
                "INSERT INTO user_servers (user_id, server_id, name, config_encrypted) VALUES ($1, $2, $2, encrypt_config($3))",
                &[&user, &name, &config],
            )
            .expect("a user's server");
        client
            .execute(
                "INSERT INTO system_servers (id, name, config) VALUES ('system-' || $1::text, $1, $2)",
                &[&name, &config],
            )
            .expect("a system server");
        for server in [name.to_owned(), format!("system-{name}")] {
            // It would have three attempts.
            let job = create_job(&mut client, "resource_fetch", &server, None, json!({"uri": "note://x"}));
            end_of(&mut client, job).is_denied("a loopback address");
        }
    }
    assert!(trap.has_seen_nobody());
}

#[test]
fn the_policy_holds_at_every_redirect() {
    let trap = Trap::set();
    let (port, loopback) = (trap.port, "a loopback address");
    let targets: Arc<OnceLock<Vec<String>>> = Arc::default();
    let locations = Arc::clone(&targets);
    // Each target is behind one redirect, and behind two.
    let server = FakeServer::start(move |request| {
        let (hops, target) = path(request).trim_start_matches('/').split_once('/')?;
        Some(match hops {
            "2" => redirect("307 Temporary Redirect", format!("/1/{target}")),
            _ => redirect("302 Found", locations.get()?.get(target.parse::<usize>().ok()?)?),
        })
    });
    let cluster = Cluster::start(&[&format!("nexus_hub.egress_allow = '127.0.0.1:{}'", port_of(&server.url))]);
    let expected = [
        (loopback, format!("http://127.0.0.1:{port}/")),
        (loopback, format!("//127.0.0.1:{port}/")),
        (loopback, format!("http://2130706433:{port}/")),
        (loopback, format!("http://127.0.0.2:{}/", port_of(&server.url))),
        (loopback, format!("http://localhost:{port}/")),
        (loopback, format!("http://[::1]:{port}/")),
        (loopback, format!("http://[::1]:{}/", port_of(&server.url))),
        ("a cloud metadata address", "http://169.254.169.254/latest/meta-data/".into()),
        ("a private address", "//10.0.0.1".into()),
        ("an unspecified address", format!("http://0.0.0.0:{}/", port_of(&server.url))),
    ];
    targets.set(expected.iter().map(|(_, target)| target.clone()).collect()).expect("set once");
    let database = cluster.database();
    let mut client = database.connect();
    for hops in 1..=2 {
        let params: Vec<_> = (0..expected.len()).map(|target| get(format!("{}{hops}/{target}", server.url))).collect();
        for ((kind, _), end) in expected.iter().zip(run_all(&mut client, &params)) {
            end.is_denied(kind);
        }
    }
    assert_eq!(server.requests().len(), 3 * expected.len());
    assert!(trap.has_seen_nobody());
}

/// Sets what the policy opens, and waits until that is so: until a URL is reached that was closed before.
fn open(client: &mut postgres::Client, cluster: &Cluster, entries: &str, url: &str) {
    cluster.configure(&[&format!("nexus_hub.egress_allow = '{entries}'")]);
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until(&format!("{entries} opens {url}"), || run_http(client, get(url)).status == "completed");
}

#[test]
fn a_reload_opens_and_closes_hosts_networks_and_ports() {
    let servers: Vec<_> = (0..5).map(|_| FakeServer::start(|_| Some(Answer::json("{}")))).collect();
    let port: Vec<_> = servers.iter().map(|server| port_of(&server.url)).collect();
    let cluster = Cluster::start(&["nexus_hub.egress_allow = ''"]);
    let database = cluster.database();
    let mut client = database.connect();
    let url = |host: &str, server: usize| format!("http://{host}:{}/", port[server]);
    for (entries, opened, denied) in [
        // What is opened first was closed before.
        (format!("localhost:{}", port[0]), vec![url("localhost", 0)], vec![url("localhost", 1), url("127.0.0.1", 0)]),
        (
            "LocalHost".into(),
            vec![url("localhost", 1), url("LOCALHOST", 0)],
            vec![url("127.0.0.1", 0), url("[::1]", 0)],
        ),
        (
            format!("*.example.com, 127.0.0.1:{}", port[2]),
            vec![url("127.0.0.1", 2), url("localhost", 2), url("2130706433", 2), url("[::ffff:127.0.0.1]", 2)],
            vec![url("127.0.0.1", 1), url("127.0.0.2", 2), url("localhost", 0)],
        ),
        (
            format!("127.0.0.0/31:{}-{}", port[3], port[3]),
            vec![url("127.0.0.1", 3)],
            vec![url("127.0.0.1", 2), url("127.0.0.2", 3)],
        ),
        (
            "10.0.0.0/8 127.0.0.0/8".into(),
            vec![url("127.0.0.1", 4), url("127.0.0.1", 0), url("localhost", 3)],
            vec![url("[::1]", 4), "http://192.168.0.1:1/".into(), "http://169.254.169.254/".into()],
        ),
        (
            format!("localhost:{}-{}", port[0], port[0]),
            vec![url("localhost", 0)],
            vec![url("127.0.0.1", 4), url("127.0.0.1", 0), url("localhost", 4)],
        ),
    ] {
        open(&mut client, &cluster, &entries, &opened[0]);
        for url in opened {
            run_http(&mut client, get(url)).completed();
        }
        let before: Vec<_> = servers.iter().map(|server| server.requests().len()).collect();
        for end in run_all(&mut client, &denied.iter().map(get).collect::<Vec<_>>()) {
            assert!(end.error.contains("nexus_hub.egress_allow") && end.attempts == 1, "{}: {}", end.url, end.error);
        }
        assert_eq!(before, servers.iter().map(|server| server.requests().len()).collect::<Vec<_>>(), "{entries}");
    }
}

/// A server that answers every request on the connection it came over, and counts the connections.
fn keeping_alive() -> RawServer {
    RawServer::start(|mut stream| {
        while read_request(&mut stream).is_some() {
            if stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").is_err() {
                return;
            }
        }
    })
}

#[test]
fn no_connection_that_was_kept_outlives_the_reload_that_closes_it() {
    let (kept, witness) = (keeping_alive(), keeping_alive());
    let cluster = Cluster::start(&[&format!("nexus_hub.egress_allow = '127.0.0.1:{}'", port_of(&kept.url))]);
    let database = cluster.database();
    let mut client = database.connect();
    for _ in 0..3 {
        run_http(&mut client, get(&kept.url)).completed();
    }
    assert_eq!(kept.connections(), 1, "the connection is kept");
    open(&mut client, &cluster, &format!("127.0.0.1:{}", port_of(&witness.url)), &witness.url);
    let end = run_all(&mut client, &[get(&kept.url)]).remove(0);
    end.is_denied("a loopback address");
    open(&mut client, &cluster, &format!("127.0.0.1:{}", port_of(&kept.url)), &kept.url);
    assert_eq!(kept.connections(), 2, "and a new one is opened");
}

#[test]
fn a_reload_with_a_list_that_can_not_be_read_changes_nothing() {
    let server = FakeServer::start(|_| Some(Answer::json("{}")));
    let cluster = Cluster::start(&[&format!("nexus_hub.egress_allow = '127.0.0.1:{}'", port_of(&server.url))]);
    let database = cluster.database();
    let mut client = database.connect();
    cluster.configure(&["nexus_hub.egress_allow = '10.1.2.3/8'"]);
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("the log says why", || {
        cluster.log().contains("it has bits set after its prefix, the network is 10.0.0.0/8")
    });
    run_http(&mut client, get(&server.url)).completed();
    let end = run_all(&mut client, &[get("http://10.0.0.1/")]).remove(0);
    end.is_denied("a private address");
}

#[test]
fn an_entry_that_can_not_be_read_is_refused_by_alter_system_with_the_reason() {
    let mut client = shared().connect("postgres");
    for (entries, reason) in [
        ("127.0.0.1, https://a.example", "cannot read \"https://a.example\": write it without the scheme"),
        ("10.1.2.3/8", "cannot read \"10.1.2.3/8\": it has bits set after its prefix, the network is 10.0.0.0/8"),
        ("127.0.0.1:0", "cannot read \"127.0.0.1:0\": a port is a number from 1 to 65535"),
        ("127.0.0.1:9-8", "cannot read \"127.0.0.1:9-8\": the port range 9-8 is empty"),
        ("0x7f.1", "cannot read \"0x7f.1\": it ends in a number, as only addresses do"),
        ("*", "cannot read \"*\": to open every address, write 0.0.0.0/0 and ::/0"),
    ] {
        let error = client
            .batch_execute(&format!("ALTER SYSTEM SET nexus_hub.egress_allow = '{entries}'"))
            .expect_err("an entry that cannot be read");
        let error = error.as_db_error().expect("an SQL error");
        assert_eq!(error.code().code(), "22023");
        let detail = error.detail().unwrap_or_default();
        assert!(detail.starts_with(reason) && detail.contains("an entry looks like example.com, "), "{detail}");
    }
}

#[test]
fn only_http_and_https_are_spoken_and_nothing_else_is_redirected_to() {
    let trap = Trap::set();
    let port = trap.port;
    let targets =
        ["ftp", "ftps", "gopher", "ws", "wss", "dict", "ldap", "tftp", "smb", "jar:http", "unix", "http+unix"]
            .map(|scheme| format!("{scheme}://127.0.0.1:{port}/"));
    let others =
        ["file:///etc/passwd", "javascript:alert(1)", "data:text/plain,x", "about:blank", "mailto:a@b.example"];
    let targets: Vec<_> = targets.into_iter().chain(others.map(str::to_owned)).collect();
    let locations = targets.clone();
    let server = FakeServer::start(move |request| {
        let target = path(request).trim_start_matches('/').parse::<usize>().ok()?;
        Some(redirect("302 Found", locations.get(target)?))
    });
    let database = shared().database();
    let mut client = database.connect();
    for end in run_all(&mut client, &targets.iter().map(get).collect::<Vec<_>>()) {
        assert_eq!(end.error, "bad request: \"url\" must begin with http:// or https://", "{}", end.url);
        assert_eq!(end.attempts, 1);
    }
    let params: Vec<_> = (0..targets.len()).map(|target| get(format!("{}{target}", server.url))).collect();
    for (end, target) in run_all(&mut client, &params).iter().zip(&targets) {
        let expected = "the redirect was not followed: it does not lead to an http or https URL";
        assert_eq!((end.error.as_str(), end.attempts), (expected, 1), "{target}");
    }
    assert!(trap.has_seen_nobody());
}

/// A server that redirects `/from` with a status to where it is told, and answers everything else.
fn redirecting(status: &'static str, location: impl Into<String>) -> FakeServer {
    let location = location.into();
    FakeServer::start(move |request| {
        Some(if path(request) == "/from" { redirect(status, location.clone()) } else { Answer::json("{\"there\": 1}") })
    })
}

fn head(request: &str) -> String {
    request.split_once("\r\n\r\n").map_or(request, |(head, _)| head).to_ascii_lowercase()
}

#[test]
fn redirects_keep_or_change_method_and_body_as_browsers_do() {
    let database = shared().database();
    let mut client = database.connect();
    for (status, method, then) in [
        ("301 Moved Permanently", "POST", "GET"),
        ("301 Moved Permanently", "PUT", "PUT"),
        ("301 Moved Permanently", "GET", "GET"),
        ("302 Found", "POST", "GET"),
        ("302 Found", "PATCH", "PATCH"),
        ("303 See Other", "POST", "GET"),
        ("303 See Other", "PUT", "GET"),
        ("303 See Other", "DELETE", "GET"),
        ("307 Temporary Redirect", "POST", "POST"),
        ("307 Temporary Redirect", "DELETE", "DELETE"),
        ("308 Permanent Redirect", "POST", "POST"),
        ("308 Permanent Redirect", "PUT", "PUT"),
    ] {
        let server = redirecting(status, "/to?q=1");
        let body = if method == "GET" { Value::Null } else { json!({"a": 1}) };
        let params = json!({"url": format!("{}from", server.url), "method": method, "body": body});
        let result = run_http(&mut client, params).completed();
        assert_eq!((&result["status"], &result["body"]), (&json!(200), &json!({"there": 1})));
        let requests = server.requests();
        assert_eq!(requests.len(), 2, "{status} {method}");
        assert!(requests[0].starts_with(&format!("{method} /from HTTP/1.1\r\n")), "{}", requests[0]);
        assert!(requests[1].starts_with(&format!("{then} /to?q=1 HTTP/1.1\r\n")), "{status} {method}: {}", requests[1]);
        let keeps_body = then == method && method != "GET";
        assert_eq!(requests[1].ends_with("\r\n\r\n{\"a\": 1}"), keeps_body, "{status}: {}", requests[1]);
        assert_eq!(head(&requests[1]).contains("\r\ncontent-type: application/json"), keeps_body, "{}", requests[1]);
        assert_eq!(head(&requests[1]).contains("\r\ncontent-length: 8"), keeps_body, "{}", requests[1]);
    }
}

#[test]
fn a_redirect_within_the_origin_keeps_the_headers_and_one_to_another_drops_what_may_be_a_credential() {
    let database = shared().database();
    let mut client = database.connect();
    let (back, seen) = (Arc::new(OnceLock::<String>::new()), Arc::new(Mutex::new(Vec::new())));
    let (to, noted) = (Arc::clone(&back), Arc::clone(&seen));
    let other = FakeServer::start(move |request| {
        noted.lock().expect("not poisoned").push(request.to_owned());
        Some(redirect("307 Temporary Redirect", format!("{}again", to.get()?)))
    });
    let elsewhere = other.url.clone();
    let server = FakeServer::start(move |request| {
        Some(match path(request) {
            "/from" => redirect("308 Permanent Redirect", "./there"),
            "/there" => redirect("307 Temporary Redirect", &elsewhere),
            _ => Answer::json("{}"),
        })
    });
    back.set(server.url.clone()).expect("set once");
    let secrets = [
        ("authorization", "Bearer t0ken"),
        ("cookie", "session=t0ken"),
        ("x-api-key", "t0ken"),
        ("referer", "http://t0ken/"),
    ];
    let harmless = [("content-type", "text/x-note"), ("accept", "text/plain"), ("accept-language", "de")];
    let headers: serde_json::Map<_, _> =
        secrets.iter().chain(&harmless).map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    let params = json!({"url": format!("{}from", server.url), "headers": headers, "body": "hello"});
    run_http(&mut client, params).completed();
    let job: uuid::Uuid = value(&mut client, "SELECT id FROM job_results");
    let own = server.requests();
    assert_eq!(own.iter().map(|request| path(request)).collect::<Vec<_>>(), ["/from", "/there", "/again"]);
    let elsewhere = seen.lock().expect("not poisoned").clone();
    for (request, has_secrets) in [(&own[0], true), (&own[1], true), (&elsewhere[0], false), (&own[2], false)] {
        let head = head(request);
        for (name, value) in secrets {
            assert_eq!(head.contains(&format!("\r\n{name}: {}", value.to_lowercase())), has_secrets, "{request}");
        }
        assert_eq!(head.contains("t0ken"), has_secrets, "{request}");
        for (name, value) in harmless {
            assert!(
                head.contains(&format!("\r\n{name}: {value}\r\n")) || head.ends_with(&format!("{name}: {value}")),
                "{request}"
            );
        }
        assert!(head.contains(&format!("\r\nidempotency-key: {job}")), "{request}");
        assert!(request.starts_with("POST ") && request.ends_with("\r\n\r\nhello"), "{request}");
    }
}

#[test]
fn a_loop_of_redirects_ends_at_the_limit_and_is_not_tried_again() {
    let server = FakeServer::start(|_| Some(redirect("302 Found", "/")));
    let database = shared().database();
    let mut client = database.connect();
    let end = run_all(&mut client, &[get(&server.url)]).remove(0);
    assert_eq!(end.error, "the redirect was not followed: there are more than 5 of them");
    assert_eq!((end.attempts, server.requests().len()), (1, 6));
}

#[test]
fn as_many_redirects_as_are_allowed_are_followed() {
    let server = FakeServer::start(|request| {
        let hop: usize = path(request).trim_start_matches('/').parse().ok()?;
        Some(if hop == 5 { Answer::json("{}") } else { redirect("302 Found", format!("/{}", hop + 1)) })
    });
    let database = shared().database();
    let mut client = database.connect();
    let result = run_http(&mut client, get(format!("{}0", server.url))).completed();
    assert_eq!((&result["status"], server.requests().len()), (&json!(200), 6));
}

#[test]
fn a_redirect_that_leads_nowhere_is_an_answer_or_an_error() {
    let database = shared().database();
    let mut client = database.connect();
    for garbage in
        ["http://", "http://[::1", "http://127.0.0.1:99999/", "//", "http://a b/", "http://\u{e4}\u{fc}/", "https://"]
    {
        let server = redirecting("302 Found", garbage);
        let end = run_all(&mut client, &[get(format!("{}from", server.url))]).remove(0);
        assert_eq!(end.error, "the redirect was not followed: its location is not a valid URL", "{garbage}");
        assert_eq!((end.attempts, server.requests().len()), (1, 1), "{garbage}");
    }
    // Without a location, or with a status that is none of those that redirect, it is an answer like any other.
    for (status, headers) in [
        ("302 Found", vec![]),
        ("300 Multiple Choices", vec![("Location", "/other".to_owned())]),
        ("304 Not Modified", vec![]),
        ("305 Use Proxy", vec![("Location", "http://127.0.0.1:1/".to_owned())]),
        ("200 OK", vec![("Location", "/other".to_owned())]),
    ] {
        let server = FakeServer::start(move |_| Some(Answer { status, headers: headers.clone(), body: Vec::new() }));
        let result = run_http(&mut client, get(&server.url)).completed();
        assert_eq!(result["status"].to_string(), status[..3]);
        assert_eq!(server.requests().len(), 1, "{status}");
    }
}

/// The answer of an MCP server of the older protocol that knows one tool, which says hello.
fn mcp_answer(request: &str) -> Option<Answer> {
    let message: Value = serde_json::from_str(request.split_once("\r\n\r\n")?.1).ok()?;
    let reply = match message["method"].as_str()? {
        "server/discover" => json!({"error": {"code": -32601, "message": "unknown method"}}),
        "initialize" => json!({"result": {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                                          "serverInfo": {"name": "hello", "version": "1"}}}),
        "tools/call" => json!({"result": {"content": [{"type": "text", "text": "hello"}]}}),
        _ => return Some(Answer::new("202 Accepted", "text/plain", "")),
    };
    let mut reply = reply;
    reply["jsonrpc"] = json!("2.0");
    reply["id"] = message["id"].clone();
    Some(Answer::json(&reply.to_string()))
}

#[test]
fn an_mcp_call_follows_a_redirect_that_keeps_method_and_origin() {
    for status in ["307 Temporary Redirect", "308 Permanent Redirect"] {
        let server = FakeServer::start(move |request| {
            if path(request) == "/mcp" { mcp_answer(request) } else { Some(redirect(status, "/mcp")) }
        });
        let database = shared().database();
        let mut client = database.connect();
        let headers = json!({"Authorization": "Bearer t0ken", "X-Tenant": "a"});
        add_server(&mut client, "s", json!({"url": format!("{}old/mcp", server.url), "headers": headers}));
        let result = run_job(&mut client, "tool_invoke", "s", Some("t"), json!({})).completed();
        assert_eq!(result["content"][0]["text"], "hello");
        for request in server.requests() {
            assert!(head(&request).contains("\r\nauthorization: bearer t0ken"), "{request}");
            assert!(head(&request).contains("\r\nx-tenant: a"), "{request}");
        }
    }
}

#[test]
fn an_mcp_call_follows_no_redirect_to_another_origin_and_none_that_makes_it_a_get() {
    let trap = Trap::set();
    let database = shared().database();
    let mut client = database.connect();
    let port = trap.port;
    for (number, (status, location, problem)) in [
        (
            "307 Temporary Redirect",
            format!("http://127.0.0.1:{port}/mcp"),
            format!("it leads to http://127.0.0.1:{port};"),
        ),
        (
            "308 Permanent Redirect",
            format!("http://localhost:{port}/mcp"),
            format!("it leads to http://localhost:{port};"),
        ),
        ("302 Found", format!("//127.0.0.1:{port}/mcp"), format!("it leads to http://127.0.0.1:{port};")),
        ("307 Temporary Redirect", "http://169.254.169.254/".into(), "it leads to http://169.254.169.254;".into()),
        ("302 Found", "/mcp".into(), "it leads to another path;".into()),
        ("303 See Other", "/mcp".into(), "it leads to another path;".into()),
        ("307 Temporary Redirect", "gopher://127.0.0.1/".into(), "it does not lead to an http or https URL".into()),
        ("307 Temporary Redirect", "http://[".into(), "its location is not a valid URL".into()),
        ("307 Temporary Redirect", "/from".into(), "there are more than 5 of them".into()),
    ]
    .into_iter()
    .enumerate()
    {
        let server = redirecting(status, location);
        let name = format!("s{number}");
        let headers = json!({"Authorization": "Bearer t0ken"});
        add_server(&mut client, &name, json!({"url": format!("{}from", server.url), "headers": headers}));
        let job = create_job(&mut client, "resource_fetch", &name, None, json!({"uri": "note://x"}));
        let end = end_of(&mut client, job);
        let expected = format!("the redirect was not followed: {problem}");
        assert!(end.error.starts_with(&expected), "{} instead of {expected}", end.error);
        assert_eq!(end.attempts, 1);
        let requests = server.requests();
        assert!(requests.iter().all(|request| path(request) == "/from"), "{requests:?}");
    }
    assert!(trap.has_seen_nobody());
}

#[test]
fn control_characters_end_no_header_line_neither_of_a_job_nor_of_a_server() {
    let server = FakeServer::start(|_| Some(Answer::json("{}")));
    let database = shared().database();
    let mut client = database.connect();
    // jsonb has no zero character.
    let characters = (1..32).filter(|code| *code != 9).chain([127]).map(|code| char::from(code as u8));
    let mut headers: Vec<Value> = characters.map(|character| json!({"X-Note": format!("a{character}b")})).collect();
    headers.extend([json!({"X-Note": "a\r\nX-Evil: 1"}), json!({"X-Note": "a\r\n\r\nGET /evil HTTP/1.1"})]);
    let values = headers.len();
    headers.extend(
        ["X\r\nX-Evil", "X\nEvil", "X Evil", "X:Evil", "X\tEvil", "X\u{7f}", "X-\u{e4}", ""]
            .map(|name| json!({name: "1"})),
    );
    let params: Vec<_> = headers.iter().map(|headers| json!({"url": server.url, "headers": headers})).collect();
    let problem = |number| {
        if number < values {
            "the header \"X-Note\" has characters that are not allowed in a header"
        } else {
            "\"headers\" has a name that is not a valid header name"
        }
    };
    for (number, end) in run_all(&mut client, &params).iter().enumerate() {
        let expected = format!("bad request: {}", problem(number));
        assert_eq!((end.error.as_str(), end.attempts), (expected.as_str(), 1), "{}", headers[number]);
    }
    for (number, config) in params.iter().enumerate() {
        let added = client.query("SELECT add_server('s', 's', $1, $2)", &[config, &uuid::Uuid::nil()]);
        let error = added.expect_err("refused");
        let error = error.as_db_error().expect("an SQL error");
        assert_eq!(error.message(), format!("bad server config: {}", problem(number)));
        client
            .execute(
                "INSERT INTO system_servers (id, name, config) VALUES ('s', 's', $1)
                 ON CONFLICT (id) DO UPDATE SET config = excluded.config",
                &[config],
            )
            .expect("a system server");
        let job = run_job(&mut client, "tool_invoke", "s", Some("t"), json!({}));
        assert_eq!(job.failed(), format!("the config of server \"s\" cannot be used: {}", problem(number)));
    }
    assert!(server.requests().is_empty());
    // Neither do those in a URL and in a method.
    run_http(&mut client, get(format!("{}a\r\nX-Evil: 1\r\n\r\nGET /evil?b\r\nc", server.url))).completed();
    assert!(!head(&server.requests()[0]).contains("\nx-evil"), "{}", server.requests()[0]);
    let error =
        run_http(&mut client, json!({"url": server.url, "method": "GET / HTTP/1.1\r\nX-Evil: 1\r\n\r\nGET"})).failed();
    assert_eq!(error, "bad request: \"method\" is not an HTTP method");
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn proxies_of_the_environment_are_not_used() {
    let trap = Trap::set();
    let server =
        FakeServer::start(
            |request| if path(request) == "/mcp" { mcp_answer(request) } else { Some(Answer::json("{}")) },
        );
    let cluster = Cluster::create(&[]);
    cluster.start_with_environment("http_proxy", &format!("http://127.0.0.1:{}", trap.port));
    let database = cluster.database();
    let mut client = database.connect();
    run_http(&mut client, get(&server.url)).completed();
    add_server(&mut client, "s", json!({"url": format!("{}mcp", server.url)}));
    run_job(&mut client, "tool_invoke", "s", Some("t"), json!({})).completed();
    assert!(trap.has_seen_nobody());
}

#[test]
fn with_no_redirects_allowed_the_redirect_itself_is_the_answer() {
    let server = redirecting("302 Found", "/to");
    let cluster = Cluster::start(&["nexus_hub.max_redirects = 0"]);
    let database = cluster.database();
    let result = run_http(&mut database.connect(), get(format!("{}from", server.url))).completed();
    assert_eq!((&result["status"], &result["headers"]["location"]), (&json!(302), &json!("/to")));
    assert_eq!(server.requests().len(), 1);
}

/// A folder that is removed with the value.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("nexus_hub_tls.{}.{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("a new folder");
        Self(path)
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.0.join(name)).expect("a file")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Makes an authority, a certificate of it for 127.0.0.1, and one that nobody vouches for.
fn certificates() -> Folder {
    let folder = Folder::new();
    let script = "set -e
        new='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes'
        printf 'subjectAltName=IP:127.0.0.1,DNS:localhost\\nbasicConstraints=CA:FALSE\\n' >leaf.ext
        openssl req -x509 $new -keyout ca.key -out ca.pem -subj /CN=authority -days 2
        openssl req $new -keyout good.key -out good.csr -subj /CN=good
        openssl x509 -req -in good.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out good.pem -days 2 -extfile leaf.ext
        openssl req $new -keyout self.key -out self.csr -subj /CN=self
        openssl x509 -req -in self.csr -signkey self.key -out self.pem -days 2 -extfile leaf.ext";
    let made = Command::new("sh").args(["-c", script]).current_dir(&folder.0).output().expect("openssl");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    folder
}

/// An HTTPS server, which redirects `/down` to a URL; ended with the value.
struct TlsServer {
    process: Child,
    url: String,
}

impl TlsServer {
    fn start(folder: &Folder, name: &str, down: &str) -> Self {
        let script = "const [name, down] = process.argv.slice(1), fs = require('fs');
            const files = {key: fs.readFileSync(name + '.key'), cert: fs.readFileSync(name + '.pem')};
            const server = require('https').createServer(files, (request, response) => {
                if (request.url == '/down') response.writeHead(302, {Location: down});
                response.end('secure');
            });
            server.listen(0, '127.0.0.1', () => console.log(server.address().port));";
        let mut process = Command::new("node")
            .args(["-e", script, name, down])
            .current_dir(&folder.0)
            .stdout(Stdio::piped())
            .spawn()
            .expect("node");
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("piped")).read_line(&mut line).expect("its port");
        Self { process, url: format!("https://127.0.0.1:{}/", line.trim()) }
    }
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_certificate_is_trusted_when_the_administrator_says_so_and_never_because_a_job_does() {
    let plain = FakeServer::start(|_| Some(Answer::json("{}")));
    let folder = certificates();
    let (good, unknown) = (TlsServer::start(&folder, "good", &plain.url), TlsServer::start(&folder, "self", ""));
    // Refused again and again, the host shall not be taken for one that is gone.
    let never = "nexus_hub.breaker_threshold = 0";
    let cluster = Cluster::start(&[never]);
    let database = cluster.database();
    let mut client = database.connect();
    for server in [&good, &unknown] {
        let error = run_http(&mut client, get(&server.url)).failed();
        assert!(error.starts_with("the certificate of 127.0.0.1:"), "{error}");
        assert!(error.contains("certificate") && error.contains("nexus_hub.ca_file"), "it helps: {error}");
    }
    cluster.write_file("data/ca.pem", &folder.read("ca.pem"), "0600");
    cluster.configure(&[never, "nexus_hub.ca_file = 'ca.pem'"]);
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("the authority is trusted", || run_http(&mut client, get(&good.url)).status == "completed");
    let result = run_http(&mut client, get(good.url.replace("127.0.0.1", "127.0.0.1."))).completed();
    assert_eq!(result["body"], "secure");
    let end = run_all(&mut client, &[get(format!("{}down", good.url))]).remove(0);
    assert_eq!(end.error, "the redirect was not followed: it leads from https to http");
    assert!(plain.requests().is_empty());
    let options = json!({"url": unknown.url, "ca_file": "self.pem", "insecure": true, "verify": false, "verify_tls": false,
                         "tls": {"verify": false}, "rejectUnauthorized": false, "danger_accept_invalid_certs": true});
    assert!(run_http(&mut client, options.clone()).failed().contains("certificate"));
    add_server(&mut client, "s", options);
    assert!(run_job(&mut client, "tool_invoke", "s", Some("t"), json!({})).failed().contains("certificate"));
    cluster.configure(&[never]);
    client.batch_execute("SELECT pg_reload_conf()").expect("reload");
    wait_until("the authority is trusted no more", || run_http(&mut client, get(&good.url)).status == "failed");
}
