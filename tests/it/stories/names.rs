//! Enums, quoted names and bytes of other encodings.

use super::*;

const MOODS: &str = "
    create type mood as enum ('sad', 'happy');
    alter type mood add value 'Neutral ''q''' before 'happy';
    create table felt (m mood, n int, tags mood[], primary key (m, n))";
const FELT: &str = "insert into felt values ('sad', 1, '{happy,sad}'), ('happy', 2, '{}'), \
    ('Neutral ''q''', 3, null), ('happy', 4, '{NULL,\"Neutral ''q''\"}')";

/// Labels added later sort elsewhere than their number in the catalog says.
#[tokio::test(flavor = "multi_thread")]
async fn estuary_112f44594_enum_keys_in_another_order_than_the_catalogs() {
    let story = Story::of("estuary_112f44594", MOODS);
    story.source(FELT);
    story.source("alter type mood add value 'first' before 'sad'");
    story.source("insert into felt select 'first', i, '{first}' from generate_series(1, 500) i");
    story.done(&["run", "--until", "following"]).await;
    story.source(
        "delete from felt where m > 'sad' and n = 3; update felt set m = 'happy' where n < 9 \
         and m = 'first' and n > 4; update felt set m = 'first', n = -9 where m = 'sad'",
    );
    story
        .follows(
            "update felt set n = n - 5000 where m = 'first'; delete from felt where m >= 'happy'",
        )
        .await;
    assert_eq!(
        story.target("select enum_range(null::mood)"),
        story.source("select enum_range(null::mood)")
    );
    story.done(&["verify"]).await;
}

/// An enum as a key could not be encoded.
#[tokio::test(flavor = "multi_thread")]
async fn sequin_2149_enum_keys_find_their_rows() {
    told(
        "sequin_2149",
        "create type state as enum ('new', 'done'); create domain stage as state; \
         create table task (s state primary key, n int); \
         create table step (s stage, k int, n int, primary key (s, k)); \
         insert into task values ('new', 1), ('done', 2); insert into step values ('new', 1, 1)",
        "update task set n = 9 where s = 'new'; update step set n = 9; \
         update step set s = 'done'; delete from task where s = 'done'",
        "insert into task values ('done', 3); update task set n = n + 1; delete from step",
    )
    .await;
}

/// The label that the table's own schema knows, whatever other type bears the same name.
#[tokio::test(flavor = "multi_thread")]
async fn pgstream_1038_enums_of_one_name_in_two_schemas() {
    told(
        "pgstream_1038",
        "create schema \"S 2\"; create type kind as enum ('a', 'b'); \
         create type \"S 2\".kind as enum ('B', 'A'); \
         create table one (id int primary key, k kind default 'a'); \
         create table \"S 2\".one (id int primary key, k \"S 2\".kind default 'A'); \
         insert into one values (1); insert into \"S 2\".one values (1)",
        "insert into one values (2, 'b'); insert into \"S 2\".one values (2, 'B'); \
         update one set k = 'b'; update \"S 2\".one set k = 'B' where k = 'A'",
        "delete from \"S 2\".one where k = 'B' and id = 1; insert into one values (3)",
    )
    .await;
}

/// Arrays of enums came as text of an unknown type.
#[tokio::test(flavor = "multi_thread")]
async fn pgstream_696_arrays_of_enums_go_both_ways() {
    let story = Story::of("pgstream_696", MOODS);
    story.source(FELT);
    story.done(&["run", "--until", "following"]).await;
    story.source(
        "update felt set tags = tags || array['happy', null]::mood[]; \
        insert into felt values ('sad', 10, '[3:4]={sad,happy}')",
    );
    story
        .follows(
            "update felt set tags = array[tags, tags] where n = 1; \
        update felt set tags = null where n = 10",
        )
        .await;
    let tags = story.target("select tags from felt where n = 4");
    assert_eq!(tags, "{NULL,\"Neutral 'q'\",happy,NULL}");
}

/// Names in camel case were folded to lower case.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_852_camel_case_names_are_kept() {
    told(
        "pgcopydb_852",
        "create schema \"SomeSchema\"; \
         create table \"SomeSchema\".\"OrderLine\" (\"orderId\" int, \"lineNo\" int, \"Qty\" int, \
             qty int, primary key (\"orderId\", \"lineNo\")); \
         create table \"SomeSchema\".orderline (orderid int primary key); \
         create index \"byQty\" on \"SomeSchema\".\"OrderLine\" (\"Qty\"); \
         insert into \"SomeSchema\".\"OrderLine\" values (1, 1, 5, 6), (1, 2, 7, 8); \
         insert into \"SomeSchema\".orderline values (1)",
        "update \"SomeSchema\".\"OrderLine\" set \"Qty\" = qty, qty = \"Qty\"; \
         update \"SomeSchema\".orderline set orderid = 2",
        "delete from \"SomeSchema\".\"OrderLine\" where \"lineNo\" = 1; \
         truncate \"SomeSchema\".orderline; insert into \"SomeSchema\".orderline values (3)",
    )
    .await;
}

/// The sequence and the default of a quoted table.
#[tokio::test(flavor = "multi_thread")]
async fn peerdb_4234_quoted_columns_defaults_and_sequences() {
    let story = Story::copied(
        "peerdb_4234",
        "create table \"User Table\" (\"Id\" serial primary key, \"select\" text default 'x''y', \
             \"a.b\" int, \"%s\" int, \"q\"\"q\" int); \
         insert into \"User Table\" (\"a.b\", \"%s\", \"q\"\"q\") values (1, 2, 3), (4, 5, 6)",
    )
    .await;
    story.source(
        "insert into \"User Table\" (\"a.b\") values (9); \
        update \"User Table\" set \"q\"\"q\" = 0, \"select\" = 'from'",
    );
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    story.same().await;
    story.done(&["cutover"]).await;
    story.target("insert into \"User Table\" (\"%s\") values (1)");
    assert_eq!(
        story.target("select \"Id\" > 3, \"select\" from \"User Table\" where \"%s\" = 1"),
        "t|x'y"
    );
    run.signal("INT");
    run.ended().await.expect_success();
}

/// Citus: one place that did not quote was enough. Names of every nasty kind, in every place.
#[tokio::test(flavor = "multi_thread")]
async fn citus_quote_all_identifiers_of_every_kind() {
    let longest = "\u{e9}".repeat(31) + "x";
    let names = [
        "a \"b\" c",
        "semi; drop table mark",
        "dot.dot",
        "new\nline",
        "tab\tback\\slash",
        "\u{1f600}\u{1f680}",
        "'quote'",
        "$1",
        "%I",
        "-- no",
        "user",
        &longest,
    ];
    let quoted: Vec<String> =
        names.iter().map(|name| format!("\"{}\"", name.replace('"', "\"\""))).collect();
    let mut schema = "create function act() returns trigger language plpgsql as \
         'begin return new; end'; "
        .to_string();
    for (i, name) in quoted.iter().enumerate() {
        let (other, third) = (&quoted[(i + 1) % quoted.len()], &quoted[(i + 2) % quoted.len()]);
        schema += &format!(
            "create schema {name}; create type {name}.{other} as enum ({}); \
             create table {name}.{name} ({name} int, {other} {name}.{other}, \
                 {third} int generated by default as identity, \
                 constraint {name} check ({name} <> 0), constraint {third} primary key ({name})); \
             create index {other} on {name}.{name} ({other}); \
             create sequence {name}.\"s {i}\" owned by {name}.{name}.{name}; \
             create trigger {name} before insert on {name}.{name} for each row \
                 execute procedure act(); \
             create view {name}.\"v {i}\" as select {other} as {name} from {name}.{name}; \
             comment on constraint {name} on {name}.{name} is {0}; \
             insert into {name}.{name} values (1, {0}), (2, null); ",
            format_args!("'{}'", names[i].replace('\'', "''")),
        );
    }
    let each = |sql: &str| -> String {
        let of = |i: usize| {
            sql.replace("{n}", &quoted[i]).replace("{o}", &quoted[(i + 1) % quoted.len()])
        };
        (0..quoted.len()).map(of).collect()
    };
    let at_once = each(
        "insert into {n}.{n} values (3, null); update {n}.{n} set {o} = null where {n} = 1; \
         update {n}.{n} set {n} = 20 where {n} = 2;",
    );
    let live = each(
        "delete from {n}.{n} where {n} = 3; truncate {n}.{n}; insert into {n}.{n} values (4);",
    );
    let full = each(
        "alter table {n}.{n} replica identity full; insert into {n}.{n} values (5); \
         update {n}.{n} set {n} = 6 where {n} = 5; delete from {n}.{n} where {n} = 4;",
    );
    // Textual decoders print and quote each name, and read it again.
    let servers = alone((15, 15));
    for (decoder, transport) in
        [("pgoutput", "pull"), ("test_decoding", "stream"), ("wal2json", "pull")]
    {
        let story = Story::between(servers, &format!("citus_quote_all_{decoder}"), "", &schema);
        let how = ["--decoder", decoder, "--transport", transport];
        story.done(&[&["run", "--until", "following"], &how[..]].concat()).await;
        story.source(&at_once);
        let mut run = story.spawn(&["run"]);
        story.arrived(&mut run).await;
        story.source(&live);
        // What was deleted before may not be read any more once the catalog has FULL.
        story.arrived(&mut run).await;
        story.source(&full);
        story.arrived(&mut run).await;
        story.same().await;
        story.done(&["cutover"]).await;
        story.target(&each("insert into {n}.{n} values (7); update {n}.{n} set {n} = {n} + 10;"));
        story.done(&["rollback"]).await;
        story.same().await;
        story.done(&["finish"]).await;
        run.ended().await.expect_success();
    }
}

/// Bytes that are no UTF-8 are SQL_ASCII's good right.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_874_bytes_of_sql_ascii_arrive_as_they_are() {
    let story = Story::made(
        "pgcopydb_874",
        "encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C' template template0",
        "create table raw (id int primary key, v text, k varchar(10)); \
         insert into raw values (1, E'\\xff\\xfe caf\\xe9', E'\\xe9'), (2, 'plain', E'\\xc3\\xa9')",
    );
    story.done(&["run", "--until", "following"]).await;
    story.source(
        "insert into raw values (3, E'\\x80\\x81', null); \
        update raw set v = v || E'\\xfc' where id = 1",
    );
    story
        .follows("update raw set k = E'\\xa0' where id = 3; delete from raw where v = 'plain'")
        .await;
    let bytes = "select string_agg(encode(v::bytea, 'hex'), ',' order by id) from raw";
    assert_eq!(story.target(bytes), "fffe20636166e9fc,8081");
}
