//! Values that another tool printed, parsed or rounded.

use super::*;

/// Rows of one column's values, by copy, by insert and by update: the three ways a value travels.
async fn values(name: &str, column: &str, values: &[&str]) -> Story {
    let rows = |first: usize| -> String {
        let row = |(i, value): (usize, &&str)| format!("({}, {value}::{column})", first + i);
        values.iter().enumerate().map(row).collect::<Vec<_>>().join(", ")
    };
    let story = Story::copied(
        name,
        &format!(
            "create table v (id int primary key, v {column}); insert into v values {}",
            rows(0)
        ),
    )
    .await;
    let many = values.len();
    story.source(&format!("insert into v values {}", rows(1000)));
    story
        .follows(&format!(
            "insert into v select 2000 + id, null from v where id < {many}; \
             update v set v = w.v from v w where v.id >= 2000 and w.id = v.id - 2000"
        ))
        .await;
    assert_eq!(story.target("select count(v) from v"), (many * 3).to_string());
    story
}

/// `%f` loses digits.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_980_floats_keep_their_last_bit() {
    let bits = [
        "0.1::float8 + 0.2",
        "1e-320",
        "'2.2250738585072014e-308'",
        "1.7976931348623157e308",
        "'-0'",
        "'NaN'",
        "'-Infinity'",
        "'4.9406564584124654e-324'",
        "123456789.123456789",
        "1e23",
    ];
    let story = values("pgcopydb_980", "float8", &bits).await;
    assert_eq!(story.target("select count(*) from v where v::text = '0.30000000000000004'"), "3");
    let sent = "select string_agg(encode(float8send(v), 'hex'), ',' order by id) from v";
    assert_eq!(story.target(sent), story.source(sent));
}

#[tokio::test(flavor = "multi_thread")]
async fn peerdb_1226_numeric_nan_and_infinity() {
    let special = [
        "'NaN'",
        "'Infinity'",
        "'-Infinity'",
        "0.00",
        "-0.000",
        "1e-30",
        "'1e1000'",
        "123456789012345678901234567890.123456789012345678901234567890",
    ];
    let story = values("peerdb_1226", "numeric", &special).await;
    assert_eq!(story.target("select count(*) from v where v = 'Infinity' or v = 'NaN'"), "6");
}

/// Of the same kind as peerdb_1226, in columns with a precision, where infinity is not allowed.
#[tokio::test(flavor = "multi_thread")]
async fn dbz_6758_numeric_nan_with_a_precision() {
    let story = values("dbz_6758", "numeric(30,5)", &["'NaN'", "1", "-99999.99999"]).await;
    assert_eq!(story.target("select count(*) from v where v = 'NaN'"), "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn dbz_5014_infinite_dates() {
    let story = values("dbz_5014", "date", &["'infinity'", "'-infinity'", "'2024-02-29'"]).await;
    assert_eq!(story.target("select count(*) from v where not isfinite(v)"), "6");
}

#[tokio::test(flavor = "multi_thread")]
async fn peerdb_3572_infinite_timestamps_and_ranges_of_them() {
    let ends = ["'[-infinity,infinity]'", "'(,infinity)'", "'[2024-01-01,)'", "'empty'", "'(,)'"];
    values("peerdb_3572", "tstzrange", &ends).await;
    let story = values("peerdb_3572_points", "timestamptz", &["'infinity'", "'-infinity'"]).await;
    assert_eq!(story.target("select count(*) from v where v = 'infinity'"), "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn estuary_five_digit_years_and_years_before_christ() {
    let years = [
        "'12024-01-01'",
        "'294276-12-31 23:59:59.999999'",
        "'4713-01-01 00:00:00 BC'",
        "'0001-01-01'",
        "'0001-12-31 BC'",
        "'1582-10-10'",
        "'9999-12-31 23:59:59.999999'",
    ];
    let story = values("estuary_five_digit_years", "timestamp", &years).await;
    assert_eq!(story.target("select count(*) from v where extract(year from v) > 9999"), "6");
}

/// The hexadecimal digits themselves were stored. That was wal2json's way of printing; through
/// pgoutput the first two bytes tell it all the same.
#[tokio::test(flavor = "multi_thread")]
async fn pgstream_1090_bytea_is_bytes_and_not_their_digits() {
    let bytes = [
        "'\\x'",
        "'\\x00'",
        "'\\x5c78'",
        "'\\xdeadbeef'",
        "decode('5c', 'hex')",
        "'\\x27225c0a09'",
        "decode(repeat('00ff', 5000), 'hex')",
    ];
    let story = values("pgstream_1090", "bytea", &bytes).await;
    assert_eq!(story.target("select length(v), get_byte(v, 0) from v where id = 1003"), "4|222");
}

/// A parser of hexadecimal digits cut text in the middle of a character, and died of it.
#[tokio::test(flavor = "multi_thread")]
async fn etl_849_text_that_looks_like_bytes_but_has_wide_characters() {
    let texts = [
        "'\\x\u{e9}\u{e9}'",
        "'\\x0\u{1f600}'",
        "'\\xz'",
        "'\\x\u{20ac}f'",
        "'\u{301}'",
        "repeat('\u{1f600}', 3000)",
        "'a' || repeat('\u{e9}', 5000)",
    ];
    values("etl_849", "text", &texts).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_979_quotes_in_varchar_are_kept() {
    let quotes = [
        "'it''s'",
        "'\"\"'",
        "'''''''' || '\"'",
        "E'back\\\\slash\\\\'",
        "E'\\\\N'",
        "'\\.'",
        "E'tab\\there\\nline\\r'",
        "''",
        "' pad '",
        "'NULL'",
        "E'\\x01\\x7f'",
        "'{\"a\",''b''}'",
    ];
    let story = values("pgcopydb_979", "varchar(40)", &quotes).await;
    assert_eq!(story.target("select count(*) from v where v = ''"), "3");
}

/// pgstream: a document was encoded again, and became one long string.
#[tokio::test(flavor = "multi_thread")]
async fn pgstream_jsonb_is_not_encoded_twice() {
    let documents = [
        "'{\"a\": \"b\\\"c\"}'",
        "'\"text\"'",
        "'null'",
        "'[1.10, 1e400, -0]'",
        "'{\"\": {\"x\": []}}'",
        "'\"\\\\u20ac\\n\"'",
    ];
    let story = values("pgstream_jsonb", "jsonb", &documents).await;
    assert_eq!(story.target("select count(*) from v where jsonb_typeof(v) = 'object'"), "6");
}

/// What PostgreSQL takes for JSON, and a parser of the tool did not: spaces, a key twice, numbers
/// that no machine word holds, an escaped NUL.
#[tokio::test(flavor = "multi_thread")]
async fn etl_79_valid_json_that_parsers_refuse_is_kept_to_the_letter() {
    let documents = [
        "'{\"a\":  1, \"a\":2}'",
        "' [ ] '",
        "'123456789012345678901234567890e5'",
        "'\"\\u0000\"'",
        "'\"\\ud83d\\ude00\"'",
        "'1E+2'",
        "(repeat('[', 500) || repeat(']', 500))",
    ];
    let story = values("etl_79", "json", &documents).await;
    assert_eq!(story.target("select count(*) from v where v::text = '{\"a\":  1, \"a\":2}'"), "3");
}

/// Binary COPY of tsvector died of an alignment that other processors forgive. What is not proven
/// equal on both sides travels as text.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_994_tsvector_is_copied_and_followed() {
    let vectors = [
        "'fat:2,4 cat:1A ''a b'':3B'",
        "''",
        "to_tsvector('simple', repeat('word x ', 900))",
        "'a'",
    ];
    let story = values("pgcopydb_994", "tsvector", &vectors).await;
    assert_eq!(story.target("select count(*) from v where v @@ 'cat & fat'"), "3");
}

/// No report of it was found: settings that change how values are printed, of the role on either
/// side, of the role in the database, and of the database.
#[tokio::test(flavor = "multi_thread")]
async fn settings_per_role_change_no_byte() {
    let mut story = Story::of(
        "settings_per_role",
        "create table v (id int primary key, f float8, r real, d date, t timestamptz, i interval, \
            b bytea, m money, x xml, a text[]); \
         insert into v values (1, 0.1::float8 + 0.2, 1.1, '2024-02-03', '2024-02-03 04:05:06+07', \
            '1 year -2 days 03:04:05.678', '\\x00ff5c27', 12.34, '<a/>text', '{NULL,\"NULL\"}')",
    );
    story.role = "mover_of_settings";
    for (server, style) in [(story.source, "SQL, DMY"), (story.target, "German, YMD")] {
        let hostile = [
            ("datestyle", style),
            ("intervalstyle", "sql_standard"),
            ("extra_float_digits", "-5"),
            ("bytea_output", "escape"),
            ("timezone", "Asia/Kathmandu"),
            ("xmlbinary", "hex"),
            ("lc_monetary", "C.UTF-8"),
            ("array_nulls", "off"),
            ("xmloption", "document"),
        ];
        server.psql("postgres", &format!("create role {} superuser login", story.role)).unwrap();
        for (name, value) in hostile {
            let alter = format!(
                "alter role {} set {name} = '{value}'; \
                alter role {0} in database {} set {name} = '{value}'; \
                alter database {1} set {name} = '{value}'",
                story.role, story.name
            );
            server.psql("postgres", &alter).unwrap();
        }
    }
    story.done(&["run", "--until", "following"]).await;
    let plain = "set extra_float_digits = 1; set datestyle = iso; set array_nulls = on; \
        set xmloption = content;";
    story.source(&format!("{plain} insert into v select 2, f, r, d, t, i, b, m, x, a from v"));
    story
        .follows(&format!(
            "{plain} insert into v select 3, f * 3, r, d - 40, t, -i, b || b, m * 2, x, a || \
            null::text \
         from v where id = 1; update v set f = f + 1, i = i * 2 where id = 2"
        ))
        .await;
    story.done(&["verify"]).await;
    let exact = format!("{plain} select f, d, i from v where id = 1");
    assert_eq!(story.target(&exact), story.source(&exact));
}

/// No report of it was found: types of extensions, whose numbers differ on the two sides.
#[tokio::test(flavor = "multi_thread")]
async fn types_of_extensions_are_followed_by_name() {
    let story = Story::of(
        "types_of_extensions",
        "create extension hstore; create extension citext; \
        create table v (id citext primary key, h hstore, hs hstore[]); \
        insert into v values ('Key', 'a=>1, \"b c\"=>NULL', array['x=>y'::hstore, ''])",
    );
    // Other numbers on the target than on the source.
    story.target(
        "create type filler as enum ('a'); create table filled (f filler); \
        drop table filled; drop type filler",
    );
    story.done(&["run", "--until", "following"]).await;
    story.source(
        "insert into v values ('two', '\"q\\\"\"=>\"\\\\\"', null); \
        update v set h = h || 'n=>2' where id = 'KEY'",
    );
    story.follows("update v set id = 'KEY' where id = 'key'; delete from v where id = 'TWO'").await;
    story.done(&["verify"]).await;
}
