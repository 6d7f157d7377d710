//! `--include`, `--exclude` and `--schema-only`, from run to rollback.

use super::*;

const SCHEMA: &str = "
create table customer (id int primary key, name text);
create table orders (id serial primary key, customer int references customer, note text);
create table audit (id bigserial primary key, what text);
create table session_log (id int generated always as identity primary key, what text);
create table audit_link (id int primary key, audit bigint references audit);
create view recent as select * from audit;
create table event (id int, day date, primary key (id, day)) partition by range (day);
create table event_old partition of event for values from ('2020-01-01') to ('2021-01-01');
create table event_new partition of event for values from ('2021-01-01') to ('2022-01-01')
    partition by range (id);
create table event_new_low partition of event_new for values from (0) to (100);
create table metric (id int, day date, primary key (id, day)) partition by range (day);
create table metric_1 partition of metric for values from ('2020-01-01') to ('2021-01-01');
insert into customer values (1, 'a'), (2, 'b');
insert into orders (customer, note) select 1, i::text from generate_series(1, 50) i;
insert into audit (what) select 'x' from generate_series(1, 40);
insert into session_log (what) select 'x' from generate_series(1, 30);
insert into audit_link values (1, 1);
insert into event select i, '2020-02-02' from generate_series(1, 20) i;
insert into event select i, '2021-02-02' from generate_series(1, 20) i;
insert into metric select i, '2020-02-02' from generate_series(1, 10) i;
";

fn count(ends: &Ends, table: &str) -> String {
    ends.target.psql("app", &format!("select count(*) from {table}")).unwrap()
}

fn exists(ends: &Ends, table: &str) -> bool {
    let sql = format!("select to_regclass('{table}') is not null");
    ends.target.psql("app", &sql).unwrap() == "t"
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_left_out_and_kept_empty_stay_so_there_and_back() {
    let ends = Ends::start(15, 15);
    source(&ends, SCHEMA);
    let tables = ["--exclude", "audit", "--exclude", "metric", "--schema-only", "session_log"];
    let with = |command: &[&'static str]| [command, &tables].concat();
    ends.done(&with(&["check"])).await;
    let mut run = ends.spawn(&with(&["run"]));
    ends.until_phase(&mut run, "following").await;
    for table in ["audit", "metric", "metric_1", "recent"] {
        assert!(!exists(&ends, table), "{table}");
    }
    assert_eq!(count(&ends, "session_log"), "0");
    assert_eq!(count(&ends, "audit_link"), "1");
    source(
        &ends,
        "insert into audit (what) values ('late'); insert into session_log (what) values ('late'); \
         insert into metric values (99, '2020-03-03'); insert into audit_link values (2, 41); \
         insert into orders (customer, note) values (2, 'late'); \
         insert into event values (99, '2021-03-03')",
    );
    arrives(&ends, "select exists (select from event_new_low where id = 99)").await;
    assert_eq!((count(&ends, "session_log"), count(&ends, "audit_link")), ("0".into(), "2".into()));
    ends.done(&["verify"]).await;
    // Sequences of tables left out are no reason to fail (and those that stay are set).
    ends.done(&["cutover"]).await;
    target(&ends, "insert into orders (customer, note) values (1, 'on the target')");
    target(&ends, "insert into session_log (what) values ('there')");
    // A table left out is not fenced: it still lives on the source.
    source(&ends, "insert into audit (what) values ('still here')");
    ends.done(&["rollback"]).await;
    let back = "select count(*) from orders where note = 'on the target'";
    assert_eq!(ends.source.psql("app", back).unwrap(), "1");
    let kept = "select count(*) from session_log";
    assert_eq!(ends.source.psql("app", kept).unwrap(), "31");
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pattern_of_a_partitioned_table_takes_its_partitions_along_new_ones_too() {
    let ends = Ends::start(15, 15);
    source(&ends, SCHEMA);
    ends.done(&["run", "--until", "following", "--include", "event"]).await;
    let relations = "select string_agg(relname, ' ' order by relname) from pg_class \
                     where relkind in ('r', 'p') and relnamespace = 'public'::regnamespace";
    assert_eq!(
        ends.target.psql("app", relations).unwrap(),
        "event event_new event_new_low event_old"
    );
    assert_eq!(count(&ends, "event"), "40");
    // A partition made later is published with its parent. Its rows are not dropped in silence.
    let partition = "create table event_next partition of event \
                     for values from ('2022-01-01') to ('2023-01-01')";
    source(&ends, partition);
    source(&ends, "insert into event values (1, '2022-02-02')");
    let run = ["run", "--include", "event"];
    fails(&ends, &run, &["event_next", "does not exist on the target", "create it"]).await;
    target(&ends, partition);
    let run = ends.spawn(&run);
    arrives(&ends, "select exists (select from event_next)").await;
    stop(run).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_is_left_out_or_taken_alone_by_its_own_name() {
    let ends = Ends::start(15, 15);
    source(&ends, SCHEMA);
    let alone = ["run", "--until", "following", "--include", "event_old"];
    ends.done(&alone).await;
    assert!(exists(&ends, "event_old") && !exists(&ends, "event"));
    assert_eq!(count(&ends, "event_old"), "20");
    ends.done(&["cancel"]).await;
    target(&ends, "drop table event_old; drop sequence audit_id_seq, orders_id_seq");
    let without = ["run", "--name", "b", "--include", "event", "--exclude", "event_new"];
    ends.done(&[&without[..], &["--until", "following"]].concat()).await;
    assert!(exists(&ends, "event") && !exists(&ends, "event_new_low"));
    source(&ends, "insert into event values (50, '2021-02-02'), (50, '2020-02-02')");
    let run = ends.spawn(&without);
    arrives(&ends, "select count(*) = 21 from event").await;
    stop(run).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_that_should_be_on_the_target_and_is_not_stops_the_cutover() {
    let ends = small();
    source(&ends, "create sequence ticket");
    let run = following(&ends).await;
    target(&ends, "drop sequence ticket");
    fails(&ends, &["cutover"], &["ticket"]).await;
    // Undone: the source takes writes.
    source(&ends, "insert into item values (1000)");
    target(&ends, "create sequence ticket");
    ends.done(&["cutover"]).await;
    stop(run).await;
}
