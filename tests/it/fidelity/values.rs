//! Types that users make, extensions bring and modifiers narrow; values of every size and encoding.

use super::*;

const MADE: &str = "
    create schema \"My S\";
    create type \"My S\".mood as enum ('sad', 'happy');
    alter type \"My S\".mood add value 'first' before 'sad';
    create domain \"My S\".word as varchar(10) check (value <> 'bad');
    create domain \"My S\".short as \"My S\".word not null default 'none' check (length(value) < 9);
    create domain \"My S\".moods as \"My S\".mood[];
    create type \"My S\".pair as (a int, gone text, b \"My S\".mood, c text[]);
    alter type \"My S\".pair drop attribute gone;
    alter type \"My S\".pair add attribute \"D d\" numeric(9,2);
    create type \"My S\".nest as (p \"My S\".pair, ps \"My S\".pair[]);
    create domain \"My S\".checked as \"My S\".pair check ((value).a > 0);
    create type \"My S\".frange as range (subtype = float8);
    create type \"My S\".mrange as range (subtype = \"My S\".mood);
    create table made (id int primary key, m \"My S\".mood, w \"My S\".word, s \"My S\".short,
        ms \"My S\".moods, p \"My S\".pair, n \"My S\".nest, c \"My S\".checked, f \"My S\".frange,
        fm \"My S\".fmultirange, mr \"My S\".mrange[], ss \"My S\".short[])";

/// Composites whose attributes were dropped and added, domains over domains and arrays, ranges of
/// enums; the numbers of all of them differ between the two sides.
#[tokio::test(flavor = "multi_thread")]
async fn types_that_users_made_go_there_and_back() {
    let story = Story::of("types_made", MADE);
    story.target(
        "create type filler as enum ('a'); create table f (f filler); drop table f; \
        drop type filler",
    );
    let rows = |first: usize| {
        format!(
            "insert into made values \
             ({first}, 'first', 'w', 's', '{{sad,NULL,first}}', \
                 '(1,happy,\"{{x,\"\"y,z\"\"}}\",1.10)', \
              '(\"(2,sad,,)\",\"{{\"\"(,,,)\"\",NULL}}\")', '(5,,,)', '[0.1,0.30000000000000004)', \
              '{{[1,2),(3,)}}', '{{\"[first,sad]\"}}', '{{a,b}}'), \
             ({first} + 1, null, null, default, null, null, null, null, 'empty', '{{}}', '{{}}', \
             null)"
        )
    };
    story.source(&rows(0));
    story.done(&["run", "--until", "following"]).await;
    story.source(&rows(10));
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    story.source(
        "update made t set m = w.m, p = w.p, n = w.n, ms = w.ms, c = w.c, fm = w.fm \
        from made w where w.id = t.id + 1 or t.id = w.id + 1; delete from made where id = 10",
    );
    story.arrived(&mut run).await;
    story.same().await;
    story.done(&["verify"]).await;
    story.done(&["cutover"]).await;
    story.target(&rows(20));
    story.done(&["rollback"]).await;
    story.same().await;
    story.done(&["finish"]).await;
    run.ended().await.expect_success();
}

/// Rows of such types without a key, which are found by all they hold.
#[tokio::test(flavor = "multi_thread")]
async fn types_that_users_made_find_their_rows_without_a_key() {
    let schema = MADE.replace("id int primary key", "id int");
    told(
        "types_made_full",
        &format!(
            "{schema}; commit; alter table made replica identity full; insert into made values \
            (1, 'first', 'w', 's', '{{sad,NULL}}', '(1,happy,{{x}},1.10)', '(\"(2,sad,,)\",{{}})', \
             '(5,,,)', '[0.1,0.3)', '{{[1,2)}}', '{{\"[first,sad]\"}}', '{{a,b}}'), \
            (2, null, null, 't', null, null, null, null, null, null, null, null)"
        ),
        "update made set id = 10 where id = 1; update made set m = 'sad' where id = 2",
        "update made set p = null, f = 'empty' where id = 10; delete from made where id = 2",
    )
    .await;
}

/// `row(null) is null`, yet it is a value. PostgreSQL's regression suite has both (test_tbl3).
#[tokio::test(flavor = "multi_thread")]
async fn null_and_a_composite_of_nulls_are_told_apart_without_a_key() {
    told(
        "null_composites",
        "create type pair as (a int, b text); \
         create table t (c pair); alter table t replica identity full; \
         insert into t values (row(null, null)), (null), (row(null, null)), (null), \
             (row(null, null)), (null), (row(1, null))",
        "delete from t where ctid = '(0,2)'; delete from t where ctid = '(0,3)'; \
         update t set c = row(2, 'x') where ctid = '(0,4)'",
        "update t set c = row(3, 'y') where ctid = '(0,1)'; delete from t where ctid = '(0,6)'",
    )
    .await;
}

/// Padding, lengths, precisions: what a modifier did to a value is done.
#[tokio::test(flavor = "multi_thread")]
async fn modifiers_and_padding_are_kept() {
    let row = "'ab', 'ab  ', B'101', B'1', 1.5, 1234567.891, '1:2:3.456789', '2024-01-02 3:4:5.6', \
        '1 year 2 mons 3 days 4:05:06.789', '5 years 6 mons', '{a,\"b \"}', '', E'\\t '";
    told(
        "modifiers",
        &format!(
            "create table v (c char(5), vc varchar(4), b bit(3), vb varbit(5), n \
            numeric(10,2), \
            nm numeric(10,-2), t time(3), ts timestamp(0), i interval(2), iy interval year to \
                month, \
            ca char(3)[], e char(4), x char(6), primary key (c, n)); \
            insert into v values ({row})"
        ),
        &format!(
            "insert into v values ({}); update v set c = 'ab ', e = ' ' where n = 1.5",
            row.replacen("'ab'", "'b'", 1).replacen("1.5", "2.5", 1)
        ),
        "update v set c = 'z', x = 'é', ca = '{}' where c = 'b'; delete from v where c = 'ab'",
    )
    .await;
}

/// Types of contrib that keys, arrays and text are made of.
#[tokio::test(flavor = "multi_thread")]
async fn types_of_extensions_there_and_back() {
    let extensions = ["hstore", "citext", "ltree", "cube", "seg", "isn", "intarray", "lo"];
    let made: String = extensions.iter().map(|e| format!("create extension {e}; ")).collect();
    let row = "'Key', 'a=>1, \"b c\"=>NULL', 'Top.Sub', '*.x|y{1,}', '(1,0.1),(2,3)', '0.10 .. \
        4.00', \
        '978-0-393-04002-9', '{1,2}', array['X'::citext, null], array['x=>y'::hstore], '12345'";
    let story = Story::of(
        "extensions",
        &format!(
            "{made} create table v (id citext, h hstore, l ltree, q lquery, c cube, s seg, \
            i isbn13, a int[], ca citext[], ha hstore[], o lo, primary key (id, l)); \
            create table f (like v); alter table f replica identity full; \
            insert into v values ({row}); insert into f values ({row})"
        ),
    );
    story.done(&["run", "--until", "following"]).await;
    story.source(&format!(
        "insert into v values ({}); insert into f select * from v; \
        update v set h = h || 'n=>2', l = 'Top' where id = 'KEY'; update f set c = null where s is \
        not null and id = 'key'",
        row.replacen("'Key'", "'two'", 1)
    ));
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    story.same().await;
    story.done(&["verify"]).await;
    story.done(&["cutover"]).await;
    story.target("update v set id = 'KEY' where id = 'key'; delete from f where id = 'TWO'");
    story.done(&["rollback"]).await;
    story.same().await;
    story.done(&["finish"]).await;
    run.ended().await.expect_success();
}

/// Much more than any buffer in one value, in a row with others and in a key's neighbourhood.
#[tokio::test(flavor = "multi_thread")]
async fn values_of_100_mb_are_copied_and_followed() {
    let story = Story::copied(
        "values_100_mb",
        "create table v (id int primary key, t text, b bytea, n int); \
         insert into v values (1, repeat('copied ', 14000000), null, 0)",
    )
    .await;
    assert_eq!(story.target("select length(t) from v"), "98000000");
    story.source("insert into v values (2, repeat(E'\\\\\\n\u{e9}', 25000000), null, 1)");
    story.source("insert into v values (3, null, decode(repeat('00ff', 25000000), 'hex'), 2)");
    story.source("update v set n = 5");
    story.source("update v set b = decode(repeat('5c', 9000000), 'hex') where id = 1");
    story.follows("").await;
    let sizes = "select string_agg(coalesce(length(t), 0) || '/' || coalesce(length(b), 0), ' ' \
        order by id) from v";
    assert_eq!(story.target(sizes), "98000000/9000000 75000000/0 0/50000000");
}

/// What LATIN1 has, UTF-8 has too, in values, in names and in labels.
#[tokio::test(flavor = "multi_thread")]
async fn latin1_becomes_utf8_in_values_names_and_labels() {
    latin1(servers(15, 15), "latin", &[]).await;
}

/// What a textual decoder prints has to be read in the encoding that it comes in: of LATIN1 only a
/// pull has it converted, and bytes of SQL_ASCII are no text at all.
#[tokio::test(flavor = "multi_thread")]
async fn encodings_of_databases_are_kept_by_textual_decoders() {
    let servers = alone((15, 15));
    for decoder in ["test_decoding", "wal2json"] {
        let how = ["--decoder", decoder];
        latin1(servers, &format!("latin_{decoder}"), &how).await;
        for transport in ["stream", "pull"] {
            let name = format!("ascii_{decoder}_{transport}");
            sql_ascii(servers, &name, &["--decoder", decoder, "--transport", transport]).await;
        }
    }
}

async fn sql_ascii(servers: (&'static Server, &'static Server), name: &str, how: &[&str]) {
    let options = "encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C' template template0";
    let schema = "create table raw (id int primary key, v text, k varchar(10)); \
         insert into raw values (1, E'\\xff\\xfe caf\\xe9', E'\\xe9'), (2, 'plain', E'\\xc3\\xa9')";
    let story = Story::between(servers, name, options, schema);
    story.done(&[&["run", "--until", "following"], how].concat()).await;
    story.source(
        "insert into raw values (3, E'\\x80\\x81\"\\\\\\x27', null); \
         update raw set v = v || E'\\xfc' where id = 1",
    );
    story.follows("update raw set k = E'\\xa0' where id = 3; delete from raw where id = 2").await;
    let bytes = "select string_agg(encode(v::bytea, 'hex') || encode(k::bytea, 'hex'), ',' \
         order by id) from raw where id = 1";
    assert_eq!(story.target(bytes), "fffe20636166e9fce9");
}

async fn latin1(servers: (&'static Server, &'static Server), name: &str, how: &[&str]) {
    let (source, target) = servers;
    let made = format!(
        "create database {name} encoding 'LATIN1' lc_collate 'C' lc_ctype 'C' template template0"
    );
    source.psql("postgres", &made).unwrap();
    target.psql("postgres", &format!("create database {name} template template0")).unwrap();
    let story = Story::there((source, target), name);
    // psql would take its own encoding for granted.
    let mut source = session(source, name).await;
    let mut write = async |sql: &str| source.execute(sql).await.unwrap();
    write(
        "set search_path = public; create table mark (n int primary key); \
        create type \"f\u{fc}r\" as enum ('\u{e4}', 'b'); create table \"stra\u{df}e\" \
            (\"schl\u{fc}ssel\" varchar(4) primary key, v text, f \"f\u{fc}r\"); \
        insert into \"stra\u{df}e\" values ('\u{e4}\u{f6}\u{fc}\u{df}', '\u{bf}\u{d8}?', '\u{e4}')",
    )
    .await;
    story.done(&[&["run", "--until", "following"], how].concat()).await;
    write(
        "insert into \"stra\u{df}e\" values ('\u{e9}', 'caf\u{e9}', 'b'); \
        update \"stra\u{df}e\" set v = v || '\u{ff}' where \"schl\u{fc}ssel\" like '\u{e4}%'",
    )
    .await;
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    story.same().await;
    story.done(&["verify"]).await;
    assert_eq!(
        story.target("select v from \"stra\u{df}e\" where f = '\u{e4}'"),
        "\u{bf}\u{d8}?\u{ff}"
    );
    story.done(&["cutover"]).await;
    story.target(
        "update \"stra\u{df}e\" set v = '\u{e7}', f = '\u{e4}' where \"schl\u{fc}ssel\" = '\u{e9}'",
    );
    story.done(&["rollback"]).await;
    story.same().await;
    story.done(&["finish"]).await;
    run.ended().await.expect_success();
}

/// Money is printed by lc_monetary, which differs on the two sides and from C: by copy, in the
/// stream, with a key and without one, and back, it stays the same number.
#[tokio::test(flavor = "multi_thread")]
async fn money_under_an_lc_monetary_of_its_own_stays_the_same() {
    let story = Story::of(
        "monetary",
        "alter database monetary set lc_monetary = 'de_DE.UTF-8'; \
         create table keyed (m money primary key, a money[]); create table plain (m money); \
         alter table plain replica identity full",
    );
    assert_eq!(story.source("select 1234567.89::numeric::money"), "1.234.567,89 €");
    let rows = "select (n * 1234.56)::numeric::money, array[(-n)::money, null] \
         from generate_series(-5, 5) n";
    story.source(&format!("insert into keyed {rows}; insert into plain select m from keyed"));
    story.done(&["run", "--until", "following"]).await;
    let live = "update keyed set m = m + 0.01::numeric::money, a = a || 99999.99::numeric::money where m <> 0::money; \
         update plain set m = m + 0.01::numeric::money; delete from plain where m < 0::money; \
         insert into plain values ('12.345,67 €'), (null)";
    let mut run = story.spawn(&["run"]);
    story.source(live);
    story.arrived(&mut run).await;
    let numbers = "select m::numeric, a::numeric[] from keyed union all \
         select m::numeric, null from plain order by 1, 2";
    assert_eq!(story.target(numbers), story.source(numbers));
    assert_eq!(story.target("select max(m) from plain"), "$12,345.67");
    story.done(&["verify"]).await;
    story.done(&["cutover"]).await;
    story.target("update plain set m = m * 3; insert into keyed values ((-0.01)::numeric::money)");
    story.done(&["rollback"]).await;
    assert_eq!(story.target(numbers), story.source(numbers));
    story.done(&["finish"]).await;
    run.ended().await.expect_success();
}
