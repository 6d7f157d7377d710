//! Every type of the servers' own catalogs, so that a new version's cannot be forgotten.

use std::fmt::Write;

use super::*;

/// Values of each type, with the first major version that has them. Between two versions a value is
/// written that both have.
const SAMPLES: &[(&str, u32, &[&str])] = &[
    ("abstime", 10, &["2001-02-03 04:05:06+00", "infinity", "-infinity"]),
    ("aclitem", 10, &["postgres=r*w/postgres", "=X/postgres"]),
    ("bit", 10, &["101", "", "11111111000000001"]),
    ("bool", 10, &["t", "f"]),
    ("box", 10, &["(0.1,1e300),(-1,-0)", "(NaN,Infinity),(-Infinity,0)"]),
    ("bpchar", 10, &["pad   ", "", " \\ \" ' , {} NULL"]),
    ("bytea", 10, &["\\x", "\\x00ff5c2722", "\\x5c78"]),
    ("char", 10, &["x", "", "\\", "'"]),
    ("cid", 10, &["0", "4294967295"]),
    ("cidr", 10, &["10.0.0.0/8", "2001:db8::/32", "0.0.0.0/0"]),
    ("circle", 10, &["<(0.1,-0),1e-300>", "<(1,2),0>"]),
    ("date", 10, &["infinity", "-infinity", "4713-01-01 BC", "5874897-12-31", "2024-02-29"]),
    ("daterange", 10, &["empty", "[2024-01-01,infinity)", "(,)", "[0044-03-15 BC,0001-01-01)"]),
    ("datemultirange", 14, &["{}", "{(,0001-01-01 BC),[2024-01-01,2024-01-02)}"]),
    (
        "float4",
        10,
        &[
            "0.1",
            "NaN",
            "Infinity",
            "-Infinity",
            "-0",
            "1e-45",
            "3.4028235e38",
            "16777217",
            "1.17549435e-38",
        ],
    ),
    (
        "float8",
        10,
        &[
            "0.30000000000000004",
            "NaN",
            "Infinity",
            "-Infinity",
            "-0",
            "4.9406564584124654e-324",
            "1.7976931348623157e308",
            "2.2250738585072014e-308",
            "123456789.123456789",
        ],
    ),
    ("inet", 10, &["10.1.2.3/8", "::ffff:1.2.3.4/128", "192.168.0.1", "fe80::1/64"]),
    ("int2", 10, &["-32768", "32767"]),
    ("int2vector", 10, &["1 2 -3", ""]),
    ("int4", 10, &["-2147483648", "2147483647"]),
    ("int4range", 10, &["empty", "[1,5)", "(,7)", "(,)"]),
    ("int4multirange", 14, &["{}", "{[1,2),[5,9)}", "{(,)}"]),
    ("int8", 10, &["-9223372036854775808", "9223372036854775807"]),
    ("int8range", 10, &["[-9223372036854775808,9223372036854775807)", "[3,)"]),
    ("int8multirange", 14, &["{[1,2),[5,)}"]),
    (
        "interval",
        10,
        &[
            "1 year 2 mons -3 days +04:05:06.7",
            "-178000000 years",
            "00:00:00",
            "-1 mons +30 days -00:00:01.000001",
            "1 day -00:00:00.1",
        ],
    ),
    ("interval", 17, &["infinity", "-infinity"]),
    (
        "json",
        10,
        &["{\"a\":  1, \"a\":2}", " null ", "\"\\u0000\"", "123456789012345678901234567890e-5"],
    ),
    ("jsonb", 10, &["{\"b\": 1.10, \"\": [null, \"\\\"\"]}", "\"x\"", "null", "-0.0"]),
    ("jsonpath", 12, &["$.\"a b\"[*]?(@ > 1 && @ like_regex \"^x\")", "strict $"]),
    ("line", 10, &["{1,-1,0.1}", "{0,1e300,-0}"]),
    ("lseg", 10, &["[(0.1,0),(1e-300,-0)]"]),
    ("macaddr", 10, &["08:00:2b:01:02:03"]),
    ("macaddr8", 10, &["08:00:2b:01:02:03:04:05"]),
    ("money", 10, &["-92233720368547758.08", "92233720368547758.07", "0.01"]),
    ("name", 10, &["a name, 'quoted' \"twice\"", "", "\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}"]),
    ("numeric", 10, &["NaN", "0.000", "-1e-1000", "1e10000", "123456789012345678901234567890.10"]),
    ("numeric", 14, &["Infinity", "-Infinity"]),
    ("nummultirange", 14, &["{[1.0,1.00],(2,NaN]}"]),
    ("numrange", 10, &["(1.10,1.2]", "[0.1,NaN]"]),
    ("oid", 10, &["0", "4294967295"]),
    ("oidvector", 10, &["1 4294967295", ""]),
    ("path", 10, &["[(0.1,2),(3,4)]", "((1,-0),(1e-300,4))"]),
    ("pg_lsn", 10, &["0/0", "FFFFFFFF/FFFFFFFF", "16/B374D848"]),
    ("pg_snapshot", 13, &["10:20:10,14,15", "1:1:"]),
    ("point", 10, &["(0.1,1e300)", "(-0,NaN)", "(Infinity,-Infinity)"]),
    ("polygon", 10, &["((1,2),(3,4),(0.1,-0))"]),
    ("refcursor", 10, &["<unnamed portal 1>", ""]),
    ("regclass", 10, &["pg_catalog.pg_class", "public.\"Held by name\"", "-", "4000000000"]),
    ("regcollation", 13, &["pg_catalog.\"C\""]),
    ("regconfig", 10, &["simple", "pg_catalog.english"]),
    ("regdictionary", 10, &["simple"]),
    ("regnamespace", 10, &["pg_catalog", "public"]),
    ("regoper", 10, &["||/", "0"]),
    ("regoperator", 10, &["+(integer,integer)", "!~~(text,text)"]),
    ("regproc", 10, &["pg_catalog.now", "public.\"F n\""]),
    ("regprocedure", 10, &["abs(integer)", "public.\"F n\"(integer)"]),
    ("regrole", 10, &["postgres", "-"]),
    (
        "regtype",
        10,
        &["integer", "character varying", "text[]", "public.\"Held by name\"", "\"char\""],
    ),
    ("reltime", 10, &["1 year 2 days", "-1 hour"]),
    ("smgr", 10, &["magnetic disk"]),
    (
        "text",
        10,
        &[
            "",
            "NULL",
            "\\N",
            "\\.",
            "tab\tline\nreturn\r",
            "it's \"quoted\" {a,b} \\",
            "\u{1f600}\u{e4}\u{1}\u{7f}",
        ],
    ),
    ("tid", 10, &["(0,1)", "(4294967295,65535)"]),
    ("time", 10, &["00:00:00", "24:00:00", "23:59:59.999999"]),
    (
        "timestamp",
        10,
        &[
            "infinity",
            "-infinity",
            "4713-01-01 00:00:00 BC",
            "294276-12-31 23:59:59.999999",
            "10000-01-01 00:00:00.000001",
            "1582-10-10",
        ],
    ),
    (
        "timestamptz",
        10,
        &[
            "infinity",
            "-infinity",
            "4713-12-31 00:00:00+00 BC",
            "2024-10-27 02:30:00.5+02",
            "294276-12-31 23:59:59.999999+00",
            "1890-01-01 00:00:00+05:53:28",
        ],
    ),
    ("timetz", 10, &["24:00:00-15:59", "01:02:03.456789+05:30", "00:00:00+15:59:59"]),
    ("tinterval", 10, &["[\"2001-01-01 00:00:00+00\" \"2002-01-01 00:00:00+00\"]"]),
    ("tsmultirange", 14, &["{[2024-01-01,2024-01-02)}", "{(,infinity)}"]),
    ("tsquery", 10, &["'a b' & !c:*A | (d <-> e)", ""]),
    ("tsrange", 10, &["[\"2024-01-01 00:00:00.000001\",infinity]", "(,)"]),
    ("tstzmultirange", 14, &["{[2024-01-01 00:00+00,2024-01-02 00:00+00)}"]),
    ("tstzrange", 10, &["[-infinity,\"0044-03-15 00:00+00 BC\")", "empty"]),
    ("tsvector", 10, &["'a b':1A,2B,3 'it''s':4", "", "'back\\\\slash' 'x':16383"]),
    ("txid_snapshot", 10, &["10:20:10,14,15"]),
    ("uuid", 10, &["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "00000000-0000-0000-0000-000000000000"]),
    ("varbit", 10, &["", "10101"]),
    ("varchar", 10, &["", "\u{e9} ", "{\"a\"}"]),
    ("xid", 10, &["0", "4294967295"]),
    ("xid8", 13, &["18446744073709551615", "3"]),
    ("xml", 10, &["<a b=\"1\">\u{e4} &lt;</a>", "text <b/> and more", "<?pi x?><a/>"]),
    ("information_schema.cardinal_number", 10, &["0", "7"]),
    ("information_schema.character_data", 10, &["x"]),
    ("information_schema.sql_identifier", 10, &["An identifier"]),
    ("information_schema.time_stamp", 10, &["2024-01-01 00:00:00.12+00"]),
    ("information_schema.yes_or_no", 10, &["YES", "NO"]),
];

/// Of these no value can be written by anybody: their input functions refuse every text. What the
/// catalogs hold of them is made by the server itself.
const UNWRITABLE: &[&str] = &[
    "gtsvector",
    "pg_brin_bloom_summary",
    "pg_brin_minmax_multi_summary",
    "pg_dependencies",
    "pg_mcv_list",
    "pg_ndistinct",
    "pg_node_tree",
];

/// Base types, ranges, multiranges, domains and enums of the system's schemas; arrays come with
/// their elements.
const TYPES: &str = "select case n.nspname when 'pg_catalog' then t.typname::text \
    else n.nspname || '.' || t.typname end, n.nspname || '.' || quote_ident(t.typname), \
        t.typdelim, \
    t.typarray <> 0, t.typtype from pg_type t join pg_namespace n on n.oid = t.typnamespace \
    where n.nspname in ('pg_catalog', 'information_schema') \
    and t.typtype in ('b', 'r', 'm', 'd', 'e') \
    and not exists (select from pg_type e where e.typarray = t.oid) order by 1";

struct Type {
    name: String,
    quoted: String,
    delimiter: String,
    has_array: bool,
    values: Vec<&'static str>,
}

impl Type {
    fn table(&self) -> String {
        self.name.replace('.', "_")
    }

    /// By their numbers those of two servers differ; their texts are what has to be the same.
    fn is_text_only(&self) -> bool {
        self.name.starts_with("reg")
            || self.name.contains("information_schema")
            || ["aclitem", "smgr"].contains(&&*self.name)
    }

    fn columns(&self) -> String {
        let array = if self.has_array { format!(", a {}[]", self.quoted) } else { String::new() };
        format!("v {}{array}", self.quoted)
    }

    /// `(1, 'value'::type, 'array'::type[]), ...` with a NULL at the end.
    fn rows(&self, first: usize) -> String {
        let mut rows = String::new();
        for (i, value) in self.values.iter().enumerate() {
            let array = if self.has_array {
                format!(", {}::{}[]", literal(&self.array(i)), self.quoted)
            } else {
                String::new()
            };
            write!(rows, "({}, {}::{}{array}), ", first + i, literal(value), self.quoted).unwrap();
        }
        let nulls = if self.has_array { ", null, null" } else { ", null" };
        rows + &format!("({}{nulls})", first + self.values.len())
    }

    /// Of one dimension with a NULL, and of two with bounds of its own.
    fn array(&self, i: usize) -> String {
        let element =
            |value: &str| format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""));
        let (value, first) = (element(self.values[i]), element(self.values[0]));
        let d = &self.delimiter;
        match i % 3 {
            0 => format!("{{{value}{d}NULL{d}{first}}}"),
            1 => format!("[-1:0][5:6]={{{{{value}{d}{first}}}{d}{{NULL{d}{value}}}}}"),
            _ => "{}".to_string(),
        }
    }
}

fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// The types that both servers have, with the values that both have. Panics if one has no sample.
async fn types_of(story: &Story, majors: (u32, u32)) -> Vec<Type> {
    let known = |name: &str| SAMPLES.iter().any(|(n, _, _)| *n == name);
    let mut source = session(story.source, &story.name).await;
    let mut target = session(story.target, &story.name).await;
    let theirs = target.query(TYPES).await.unwrap();
    let mut types = Vec::new();
    for row in source.query(TYPES).await.unwrap().iter().chain(&theirs) {
        let name = row.str(0).unwrap();
        assert!(known(name) || UNWRITABLE.contains(&name), "no sample of type {name}: add one");
    }
    for row in source.query(TYPES).await.unwrap() {
        let name = row.str(0).unwrap();
        let other = theirs.iter().find(|r| r.str(0).unwrap() == name);
        let Some(other) = other else { continue };
        let fits =
            |(n, since, _): &&(&str, u32, &[&str])| *n == name && *since <= majors.0.min(majors.1);
        let values: Vec<&str> = SAMPLES.iter().filter(fits).flat_map(|s| s.2).copied().collect();
        if !values.is_empty() {
            types.push(Type {
                name: name.to_string(),
                quoted: row.string(1).unwrap(),
                delimiter: row.string(2).unwrap(),
                has_array: row.bool(3).unwrap() && other.bool(3).unwrap(),
                values,
            });
        }
    }
    types
}

/// Two tables a type: one by its key, one without any, whose rows are found by all they hold.
fn schema(types: &[Type]) -> String {
    let mut sql = "create table \"Held by name\" (n int); \
        create function \"F n\"(int) returns int language sql as 'select $1'; "
        .to_string();
    for t in types {
        let (table, columns, rows) = (t.table(), t.columns(), t.rows(0));
        write!(
            sql,
            "create table k_{table} (id int primary key, {columns}); \
             insert into k_{table} values {rows}; \
             create table f_{table} (n int, {columns}); \
             alter table f_{table} replica identity full; insert into f_{table} values {rows}; "
        )
        .unwrap();
    }
    sql
}

/// Inserts of every value, updates from and to every value and NULL, deletes.
fn writes(types: &[Type], first: usize) -> String {
    let mut sql = String::new();
    for t in types {
        let (table, rows) = (t.table(), t.rows(first));
        let set = if t.has_array { "v = w.v, a = w.a" } else { "v = w.v" };
        let count = t.values.len();
        write!(
            sql,
            "insert into k_{table} values {rows}; insert into f_{table} values {rows}; \
             update k_{table} t set {set} from k_{table} w \
                 where t.id < {count} and w.id = (t.id + 1) % {} + {first}; \
             update f_{table} t set n = n + 10, {set} from k_{table} w \
                 where t.n < {count} and w.id = (t.n + 1) % {} + {first}; \
             update f_{table} set n = -n where n = {first}; \
             delete from k_{table} where id = {first} + 1; \
             delete from f_{table} where n = {first} + 1; ",
            count + 1,
            count + 1,
        )
        .unwrap();
    }
    sql
}

/// The rows of both sides as COPY sends them: in binary, bit by bit, between any versions; as text
/// too where both sides print alike.
async fn same(story: &Story, types: &[Type], is_text_alike: bool) {
    let mut source = session(story.source, &story.name).await;
    let mut target = session(story.target, &story.name).await;
    for t in types {
        let mut formats = vec![if t.is_text_only() { "text" } else { "binary" }];
        if is_text_alike {
            formats.push("text");
        }
        for (table, order) in [("k_", "id"), ("f_", "n, v::text")] {
            for format in &formats {
                let sql = format!(
                    "copy (select * from public.{table}{} order by {order}) \
                    to stdout (format {format})",
                    t.table()
                );
                let ours = bytes(&mut source, &sql).await;
                assert!(ours.len() > 40 || *format == "text", "{}: {} bytes", t.name, ours.len());
                let theirs = bytes(&mut target, &sql).await;
                assert_eq!(
                    String::from_utf8_lossy(&ours),
                    String::from_utf8_lossy(&theirs),
                    "{table}{}",
                    t.table()
                );
                assert!(ours == theirs, "{table}{}", t.table());
            }
        }
    }
}

async fn bytes(session: &mut walferry::pg::Session, sql: &str) -> Vec<u8> {
    let mut copy = session.copy_out(sql).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
    let mut all = Vec::new();
    while let Some(part) = copy.next().await.unwrap() {
        all.extend_from_slice(&part);
    }
    all
}

/// What changes how values are printed or read, for every session of the database.
const HOSTILE: &[(&str, &str)] = &[
    ("datestyle", "SQL, DMY"),
    ("intervalstyle", "sql_standard"),
    ("extra_float_digits", "-5"),
    ("bytea_output", "escape"),
    ("timezone", "Asia/Kathmandu"),
    ("xmlbinary", "hex"),
    ("xmloption", "document"),
    ("array_nulls", "off"),
    ("lc_monetary", "C.UTF-8"),
    ("standard_conforming_strings", "off"),
    ("quote_all_identifiers", "on"),
];

/// Psql's sessions undo what the database would have them do.
const PLAIN: &str = "set datestyle = iso; set intervalstyle = postgres; set array_nulls = on; \
    set xmloption = content; set timezone = utc; set extra_float_digits = 3; ";

/// Types that a later version dropped have no way there, and go between servers of the old one.
const DROPPED: &[&str] = &["abstime", "reltime", "tinterval", "smgr"];

async fn there_and_back(name: &str, majors: (u32, u32), keep: impl Fn(&Type) -> bool) {
    let story = Story::between(servers(majors.0, majors.1), name, "template template0", "select 1");
    story_of_types(story, majors, &[], keep).await;
}

/// `how` goes with the first run.
async fn story_of_types(
    story: Story,
    majors: (u32, u32),
    how: &[&str],
    keep: impl Fn(&Type) -> bool,
) {
    let name = story.name.clone();
    let mut types = types_of(&story, majors).await;
    types.retain(keep);
    assert!(types.len() >= DROPPED.len(), "{} types", types.len());
    println!(
        "{}: {} types, {} values",
        name,
        types.len(),
        types.iter().map(|t| t.values.len()).sum::<usize>()
    );
    story.source(&format!("{PLAIN}{}", schema(&types)));
    for server in [story.source, story.target] {
        for (setting, value) in HOSTILE {
            let sql = format!("alter database {name} set {setting} = '{value}'");
            server.psql("postgres", &sql).unwrap();
        }
    }
    let alike = majors.0 == majors.1;
    story.done(&[&["run", "--until", "following"], how].concat()).await;
    same(&story, &types, alike).await;
    story.source(&format!("{PLAIN}{}", writes(&types, 100)));
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    same(&story, &types, alike).await;
    story.source(&format!("{PLAIN}{}", writes(&types, 200)));
    story.arrived(&mut run).await;
    same(&story, &types, alike).await;
    story.done(&["verify"]).await;
    story.done(&["cutover"]).await;
    story.target(&format!("{PLAIN}{}", writes(&types, 300)));
    story.done(&["rollback"]).await;
    same(&story, &types, alike).await;
    story.done(&["finish"]).await;
    run.ended().await.expect_success();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_of_the_catalog_goes_there_and_back() {
    there_and_back("every_type", (15, 15), |_| true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_of_the_catalog_goes_from_10_to_18_and_back() {
    there_and_back("every_type_10_18", (10, 18), |_| true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn types_that_later_versions_dropped_go_there_and_back() {
    there_and_back("types_dropped", (10, 10), |t| DROPPED.contains(&&*t.name)).await;
}

/// By each textual decoder too: the one over SQL, the other over the replication protocol. (Before
/// 2.6 wal2json has no NaN and no infinities of numbers, and the values then are none of those.)
#[tokio::test(flavor = "multi_thread")]
async fn every_type_of_the_catalog_goes_there_and_back_by_textual_decoders() {
    // Other stories make origins, which test_decoding cannot tell apart.
    let servers = alone((15, 15));
    let story = Story::between(servers, "every_type_td", "template template0", "select 1");
    let how = ["--decoder", "test_decoding", "--transport", "pull"];
    story_of_types(story, (15, 15), &how, |_| true).await;
    let story = Story::between(servers, "every_type_w2j", "template template0", "select 1");
    let how = ["--decoder", "wal2json", "--transport", "stream", "--no-nan"];
    let numbers = ["float4", "float8", "numeric"];
    story_of_types(story, (15, 15), &how, |t| !numbers.contains(&&*t.name)).await;
}

/// No version has a type that the samples lack.
#[tokio::test(flavor = "multi_thread")]
async fn every_type_of_every_version_has_a_sample() {
    for major in (10..=18).filter(|major| binaries::is_installed(*major)) {
        let server = Server::start(&Server::bin_of(major).unwrap(), &[]).unwrap();
        let mut session = session(&server, "postgres").await;
        let rows = session.query(TYPES).await.unwrap();
        let names = rows.iter().map(|row| row.str(0).unwrap());
        let known = |name: &&str| {
            SAMPLES.iter().any(|(n, since, _)| n == name && *since <= major)
                || UNWRITABLE.contains(name)
        };
        let without: Vec<&str> = names.filter(|name| !known(name)).collect();
        assert_eq!(without, Vec::<&str>::new(), "{major}");
        assert!(rows.len() > 60, "{major}: {}", rows.len());
    }
}
