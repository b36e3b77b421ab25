//! Watching jobs over logical replication, as Supabase Realtime does.

use crate::support::*;
use postgres::Client;
use uuid::Uuid;

const PUBLISHED: &str =
    "SELECT count(*) FROM pg_publication_tables WHERE pubname = 'supabase_realtime' AND tablename = 'job_results'";

#[test]
fn a_subscriber_sees_a_job_go_from_pending_over_running_to_completed() {
    let publisher = Cluster::start(&["wal_level = logical", "nexus_hub.request_timeout = '10min'"]);
    let database = publisher.empty_database();
    let mut client = database.connect();
    client.batch_execute("CREATE PUBLICATION supabase_realtime; CREATE EXTENSION nexus_hub").expect("CREATE EXTENSION");
    assert_eq!(value::<i64>(&mut client, PUBLISHED), 1);

    let subscriber = Cluster::start(&["shared_preload_libraries = ''"]);
    let mut watcher = subscriber.connect("postgres");
    let columns: String = value(
        &mut client,
        "SELECT string_agg(format('%I %s', attname, format_type(atttypid, atttypmod)), ', ') FROM pg_attribute
          WHERE attrelid = 'job_results'::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''",
    );
    watcher
        .batch_execute(&format!(
            "CREATE TABLE job_results ({columns}, PRIMARY KEY (id));
             CREATE TABLE seen (number serial, id uuid, user_id uuid, status text, has_result boolean);
             CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$
                 BEGIN INSERT INTO public.seen (id, user_id, status, has_result) VALUES (NEW.id, NEW.user_id, NEW.status, NEW.result IS NOT NULL); RETURN NEW; END $$;
             CREATE TRIGGER see AFTER INSERT OR UPDATE ON job_results FOR EACH ROW EXECUTE FUNCTION see();
             ALTER TABLE job_results ENABLE ALWAYS TRIGGER see"
        ))
        .expect("the subscriber's tables");
    let [(_, socket), ..] = publisher.environment();
    watcher
        .batch_execute(&format!(
            "CREATE SUBSCRIPTION jobs CONNECTION 'host={socket} port=5432 user=postgres dbname={}' PUBLICATION supabase_realtime",
            database.name
        ))
        .expect("CREATE SUBSCRIPTION");
    let ready = "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate = 'r'";
    wait_until("the subscriber is ready", || value::<i64>(&mut watcher, ready) == 1);

    let gate = Gate::default();
    let server = gate.server();
    let job: Uuid = client
        .query_one(
            "INSERT INTO job_results (user_id, job_type, params) VALUES ($1, 'http_request', jsonb_build_object('url', $2::text)) RETURNING id",
            &[&ALICE.parse::<Uuid>().expect("a uuid"), &server.url],
        )
        .expect("INSERT")
        .get(0);
    let seen = |watcher: &mut Client| -> String {
        let query = "SELECT coalesce(string_agg(status || CASE WHEN has_result THEN ' with result' ELSE '' END, ', ' ORDER BY number), '')
                       FROM seen WHERE id = $1 AND user_id = $2";
        watcher.query_one(query, &[&job, &ALICE.parse::<Uuid>().expect("a uuid")]).expect("seen").get(0)
    };
    wait_until("it is seen to run", || seen(&mut watcher) == "pending, running");
    gate.open();
    wait_until("it is seen to be completed", || seen(&mut watcher) == "pending, running, completed with result");
    watcher.batch_execute("DROP SUBSCRIPTION jobs").expect("DROP SUBSCRIPTION");
}

#[test]
fn job_results_joins_the_publication_once_whichever_way_it_is_there() {
    let cluster = Cluster::start(&["wal_level = logical"]);
    let database = cluster.empty_database();
    let mut client = database.connect();
    client.batch_execute("CREATE EXTENSION nexus_hub").expect("without a publication");
    for publication in
        ["supabase_realtime", "supabase_realtime FOR ALL TABLES", "supabase_realtime FOR TABLE job_results"]
    {
        client
            .batch_execute(&format!(
                "CREATE PUBLICATION {publication}; SELECT _nexus_hub.grant_api(), _nexus_hub.grant_api()"
            ))
            .expect(publication);
        assert_eq!(value::<i64>(&mut client, PUBLISHED), 1, "{publication}");
        client.batch_execute("DROP PUBLICATION supabase_realtime").expect("DROP");
    }
    client.batch_execute("CREATE PUBLICATION supabase_realtime").expect("CREATE");
    client
        .batch_execute(
            "DROP EXTENSION nexus_hub; CREATE SCHEMA \"hub API\"; CREATE EXTENSION nexus_hub SCHEMA \"hub API\"",
        )
        .expect("another schema");
    assert_eq!(value::<i64>(&mut client, PUBLISHED), 1);
    let others = "SELECT count(*) FROM pg_publication_tables WHERE pubname = 'supabase_realtime'";
    assert_eq!(value::<i64>(&mut client, others), 1, "and nothing else does");
    client.batch_execute("DROP EXTENSION nexus_hub").expect("DROP EXTENSION");
    assert_eq!(value::<i64>(&mut client, others), 0);
}
