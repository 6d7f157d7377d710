//! Random maps of random tables, copied and then followed: the target is the map applied by SQL,
//! after the copy and after the stream, and verify agrees.
//!
//! `WALFERRY_MAPS` says how many maps (10 without), `WALFERRY_SEED` repeats a run.

use std::fmt::Write as _;
use std::time::Duration;

use walferry::id::{quote_ident, quote_literal};
use walferry::pg::{Config, Purpose, Session};

use super::{KEY, Toml, VARIABLES, done, hashed, rows};
use crate::support::Walferry;
use crate::support::job::{Ends, conserved};

/// Maps of one job.
const MAPS_A_JOB: usize = 30;

/// What a column is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Short,
    Int,
    Big,
    Number,
    Flag,
    Day,
    Time,
    Uuid,
    Json,
    List,
    Long,
}

const KINDS: [Kind; 12] = [
    Kind::Text,
    Kind::Short,
    Kind::Int,
    Kind::Big,
    Kind::Number,
    Kind::Flag,
    Kind::Day,
    Kind::Time,
    Kind::Uuid,
    Kind::Json,
    Kind::List,
    Kind::Long,
];

impl Kind {
    fn type_name(self) -> &'static str {
        match self {
            Kind::Text | Kind::Long => "text",
            Kind::Short => "character varying(40)",
            Kind::Int => "integer",
            Kind::Big => "bigint",
            Kind::Number => "numeric",
            Kind::Flag => "boolean",
            Kind::Day => "date",
            Kind::Time => "timestamp with time zone",
            Kind::Uuid => "uuid",
            Kind::Json => "jsonb",
            Kind::List => "text[]",
        }
    }

    /// A value that no other of this number is equal to.
    fn value(self, rng: &mut fastrand::Rng, n: u32) -> String {
        match self {
            Kind::Text => quote_literal(&format!("{}{n}", WORDS[rng.usize(..WORDS.len())])),
            Kind::Short => format!("'s{n}'"),
            Kind::Int | Kind::Big => format!("{n}"),
            Kind::Number => format!("{n}.{}0", rng.u32(0..10)),
            Kind::Flag => rng.bool().to_string(),
            Kind::Day => format!("date '2000-01-01' + {}", rng.u32(0..5000)),
            Kind::Time => format!("timestamptz '2020-02-29 12:00+02' + {} * interval '1.5 s'", n),
            Kind::Uuid => format!("md5('{n}')::uuid"),
            Kind::Json => format!("'{{\"k1\": {n}, \"k2\": \"x\\\"y\"}}'"),
            Kind::List => format!("array['a,b', null, '{n}', '\"q\"']"),
            Kind::Long => format!(
                "(select string_agg(md5('{n}' || j), '') from generate_series(1, {}) j)",
                rng.u32(1..200)
            ),
        }
    }
}

const WORDS: [&str; 6] = ["Alpha ", "it's ", "back\\slash", "ünï çode ", "", "NULL"];

const NAMES: [&str; 10] =
    ["a", "select", "Odd Name", "qu\"ote", "ünï", "b", "walferry n", "num", "c_1", "Id"];

#[derive(Clone, Debug)]
struct Column {
    name: String,
    kind: Kind,
    not_null: bool,
}

/// A table, its map as it is written, and as SQL.
#[derive(Debug)]
struct Case {
    name: String,
    columns: Vec<Column>,
    /// How many of the columns are the key; none if there is none.
    key: usize,
    section: String,
    due: String,
    target: String,
    next: u32,
}

/// Columns of the map under way.
struct Drawn<'a> {
    rng: &'a mut fastrand::Rng,
    /// The source can hash.
    hashes: bool,
    full: bool,
    columns: &'a [Column],
}

impl Drawn<'_> {
    fn pick(&mut self, fits: impl Fn(&Column) -> bool) -> Option<Column> {
        let fitting: Vec<&Column> = self.columns.iter().filter(|c| fits(c)).collect();
        (!fitting.is_empty()).then(|| fitting[self.rng.usize(..fitting.len())].clone())
    }

    /// A mask as it is written, and as SQL of the test's own.
    fn mask(&mut self, column: &Column, is_key: bool) -> Option<(String, String)> {
        let name = quote_ident(&column.name);
        let text = matches!(column.kind, Kind::Text | Kind::Short | Kind::Long);
        let hash = match column.kind {
            _ if !self.hashes => None,
            Kind::Text | Kind::Long => Some(hashed(&name)),
            Kind::Short => Some(format!("left({}, 40)", hashed(&name))),
            Kind::Uuid => Some(format!("left({}, 32)::uuid", hashed(&format!("{name}::text")))),
            Kind::Big | Kind::Number => Some(format!(
                "(('x' || left({}, 16))::bit(64)::bigint & 9223372036854775807)::{}",
                hashed(&format!("{name}::text")),
                column.kind.type_name()
            )),
            Kind::Int if !is_key => Some(format!(
                "('x' || left({}, 8))::bit(32)::int & 2147483647",
                hashed(&format!("{name}::text"))
            )),
            _ => None,
        };
        if is_key {
            return hash.map(|sql| ("hash".to_string(), sql));
        }
        match self.rng.u32(0..5) {
            0 if !column.not_null => {
                Some(("null".to_string(), format!("null::{}", column.kind.type_name())))
            }
            1 if text => Some(("constant:it's \\ x".to_string(), "'it''s \\ x'::text".to_string())),
            2 if text => {
                let (first, last) = (self.rng.u32(0..4), self.rng.u32(0..4));
                let sql = format!(
                    "(select string_agg(case when n <= {first} or n > length({name}) - {last} \
                     then c else '*' end, '' order by n) filter (where length({name}) > \
                     {first} + {last}) from unnest(string_to_array({name}, null)) \
                     with ordinality u(c, n))",
                );
                let all = format!("repeat('*', length({name}))");
                let sql = format!("coalesce({sql}, {all})");
                Some((format!("partial:{first},{last}"), sql))
            }
            3 => hash.map(|sql| ("hash".to_string(), sql)),
            _ => self.expression(column, &name).map(|sql| (format!("sql:{sql}"), sql)),
        }
    }

    fn expression(&mut self, column: &Column, name: &str) -> Option<String> {
        let other = match self.full {
            true => self.pick(|c| c.name != column.name && c.kind == Kind::Int),
            false => None,
        };
        let other = other.map_or("1".to_string(), |c| quote_ident(&c.name));
        Some(match column.kind {
            Kind::Text | Kind::Long => {
                format!("upper({name}) || '-' || coalesce({other}, 0)::text")
            }
            Kind::Short => format!("left({name} || {name}, 30)"),
            Kind::Int => format!("{name} / 2 + coalesce({other}, 7)"),
            Kind::Big => format!("case when {name} > 50 then {name} else -1 end"),
            Kind::Number => format!("round({name} * 1.10, 2)"),
            Kind::Flag => format!("{name} is not true -- so it is"),
            Kind::Day => format!("{name} - ({name} - date '2000-01-01') % 30"),
            Kind::Time => {
                format!("date_trunc('hour', {name} at time zone 'UTC') at time zone 'UTC'")
            }
            Kind::Json => format!("{name} - 'k1'"),
            Kind::List => format!("{name} || 'more'::text"),
            Kind::Uuid => return None,
        })
    }

    fn filter(&mut self, key: usize) -> Option<String> {
        let long = |c: &Column| {
            !matches!(
                c.kind,
                Kind::Int | Kind::Big | Kind::Flag | Kind::Day | Kind::Time | Kind::Uuid
            )
        };
        let column = match self.full {
            true => self.columns[self.rng.usize(..self.columns.len())].clone(),
            false if key > 0 && !self.columns.iter().skip(key).any(long) => self.columns[0].clone(),
            false => return None,
        };
        let name = quote_ident(&column.name);
        let sql = match column.kind {
            Kind::Text | Kind::Long | Kind::Short => {
                format!("length({name}) % 3 <> 0 and {name} > 'Be'")
            }
            Kind::Int | Kind::Big => format!("{name} % 3 <> 1"),
            Kind::Number => format!("{name} % 2 < 1 or {name} is null"),
            Kind::Flag => name,
            Kind::Day => format!("{name} < '2006-06-06'"),
            Kind::Time => format!("{name} is null or {name} > '2020-02-29 10:02+00'::timestamptz"),
            Kind::Uuid => format!("left({name}::text, 1) < '9'"),
            Kind::Json => format!("({name} ->> 'k1')::int % 2 = 0"),
            Kind::List => format!("{name} @> array['a,b'] and ({name})[3] < '4'"),
        };
        let and = match self.full {
            true => self.pick(|c| c.kind == Kind::Flag).map(|c| quote_ident(&c.name)),
            false => None,
        };
        Some(and.map_or(sql.clone(), |flag| format!("({sql}) or {flag}")))
    }
}

fn toml_text(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn case(rng: &mut fastrand::Rng, hashes: bool, number: usize) -> Case {
    let name = format!("{} {number}", ["t", "T", "order"][rng.usize(..3)]);
    let mut names = NAMES;
    rng.shuffle(&mut names);
    let key = rng.usize(0..3);
    let count = rng.usize(key.max(1) + 1..8);
    let columns: Vec<Column> = (0..count)
        .map(|at| {
            let kinds: &[Kind] = match at < key {
                true => &[Kind::Int, Kind::Big, Kind::Text, Kind::Uuid, Kind::Short],
                false => &KINDS,
            };
            let kind = kinds[rng.usize(..kinds.len())];
            let not_null = at < key || rng.u32(0..4) == 0;
            Column { name: names[at].to_string(), kind, not_null }
        })
        .collect();
    let full = key == 0 || rng.bool();
    let mut case = Case {
        name,
        columns: columns.clone(),
        key,
        section: String::new(),
        due: String::new(),
        target: String::new(),
        next: 100,
    };
    draw(&mut case, &mut Drawn { rng, hashes, full, columns: &columns });
    if full {
        case.section.push_str("# replica identity full\n");
    }
    case
}

fn draw(case: &mut Case, drawn: &mut Drawn<'_>) {
    let renamed = drawn.rng.bool();
    let to = if renamed { format!("to {}", case.name) } else { case.name.clone() };
    let (mut due, mut target) = (Vec::new(), Vec::new());
    let (mut rename, mut mask, mut exclude, mut include) =
        (String::new(), String::new(), Vec::new(), Vec::new());
    let columns = case.columns.clone();
    for (at, column) in columns.iter().enumerate() {
        let is_key = at < case.key;
        if !is_key && at > 0 && drawn.rng.u32(0..4) == 0 {
            exclude.push(toml_text(&column.name));
            continue;
        }
        include.push(toml_text(&column.name));
        let written = match drawn.rng.u32(0..3) {
            0 => format!("new {}", column.name),
            _ => column.name.clone(),
        };
        if written != column.name {
            let _ = write!(rename, "{} = {}, ", toml_text(&column.name), toml_text(&written));
        }
        let masked = (drawn.rng.bool()).then(|| drawn.mask(column, is_key)).flatten();
        let value = match masked {
            Some((text, sql)) => {
                let _ = write!(mask, "{} = {}, ", toml_text(&column.name), toml_text(&text));
                format!("({sql}\n)::{}", column.kind.type_name())
            }
            None => quote_ident(&column.name),
        };
        due.push(format!("{value} as c{at}"));
        target.push(format!("{} as c{at}", quote_ident(&written)));
    }
    let filter = (drawn.rng.u32(0..3) > 0).then(|| drawn.filter(case.key)).flatten();
    let mut section = format!("[[map]]\ntable = {}\n", toml_text(&format!("s.\"{}\"", case.name)));
    if renamed {
        let _ = writeln!(section, "to = {}", toml_text(&format!("m.\"{to}\"")));
    }
    match exclude.is_empty() {
        false if drawn.rng.bool() => {
            let _ = writeln!(section, "include-columns = [{}]", include.join(", "));
        }
        false => {
            let _ = writeln!(section, "exclude-columns = [{}]", exclude.join(", "));
        }
        true => {}
    }
    if let Some(filter) = &filter {
        let _ = writeln!(section, "where = {}", toml_text(filter));
    }
    let table = |entries: &str| format!("{{ {} }}", entries.trim_end_matches(", "));
    if !rename.is_empty() {
        let _ = writeln!(section, "rename = {}", table(&rename));
    }
    if !mask.is_empty() {
        let _ = writeln!(section, "mask = {}", table(&mask));
    }
    let filter = filter.map_or(String::new(), |filter| format!(" where {filter}"));
    case.due = format!("select {} from s.{}{filter}", due.join(", "), quote_ident(&case.name));
    let schema = if renamed { "m" } else { "s" };
    case.target = format!("select {} from {schema}.{}", target.join(", "), quote_ident(&to));
    case.section = section;
}

impl Case {
    fn table(&self) -> String {
        format!("s.{}", quote_ident(&self.name))
    }

    fn ddl(&self) -> String {
        let mut lines: Vec<String> = self
            .columns
            .iter()
            .map(|column| {
                let not_null = if column.not_null { " not null" } else { "" };
                format!("{} {}{not_null}", quote_ident(&column.name), column.kind.type_name())
            })
            .collect();
        if self.key > 0 {
            let key: Vec<String> =
                self.columns.iter().take(self.key).map(|c| quote_ident(&c.name)).collect();
            lines.push(format!("primary key ({})", key.join(", ")));
        }
        let table = self.table();
        let full = match self.section.contains("# replica identity full") {
            true => format!("alter table {table} replica identity full; "),
            false => String::new(),
        };
        format!("create table {table} ({}); {full}", lines.join(", "))
    }

    fn value(&mut self, rng: &mut fastrand::Rng, at: usize) -> String {
        let column = &self.columns[at];
        self.next += 1;
        match !column.not_null && rng.u32(0..5) == 0 {
            true => "null".to_string(),
            false => column.kind.value(rng, self.next),
        }
    }

    fn insert(&mut self, rng: &mut fastrand::Rng) -> String {
        let values: Vec<String> = (0..self.columns.len()).map(|at| self.value(rng, at)).collect();
        format!("insert into {} values ({}); ", self.table(), values.join(", "))
    }

    /// Any change of it, of one row or of some.
    fn change(&mut self, rng: &mut fastrand::Rng) -> String {
        let table = self.table();
        let one = format!(
            "ctid = (select ctid from {table} order by md5(ctid::text || '{}') limit 1)",
            rng.u32(..)
        );
        match rng.u32(0..10) {
            0..3 => self.insert(rng),
            3 => format!("delete from {table} where {one}; "),
            4..9 => {
                let at = rng.usize(..self.columns.len());
                let value = self.value(rng, at);
                format!("update {table} set {} = {value} where {one}; ", {
                    quote_ident(&self.columns[at].name)
                })
            }
            _ => {
                let at = self.key.min(self.columns.len() - 1);
                if at < self.key {
                    return self.insert(rng);
                }
                let value = self.value(rng, at);
                let name = quote_ident(&self.columns[at].name);
                format!("update {table} set {name} = {value} where length(ctid::text) % 2 = 0; ")
            }
        }
    }

    fn assert_same(&self, ends: &Ends, when: &str) {
        let (due, is) = (rows(&ends.source, &self.due), rows(&ends.target, &self.target));
        let extra: Vec<_> = is.iter().filter(|row| !due.contains(row)).take(2).collect();
        let missing: Vec<_> = due.iter().filter(|row| !is.contains(row)).take(2).collect();
        assert!(
            due == is,
            "{when}: {} rows due, {} there\nmissing {missing:#?}\nextra {extra:#?}\n{}\n{}\n{}",
            due.len(),
            is.len(),
            self.ddl(),
            self.section,
            self.due
        );
    }
}

/// Transactions of changes of all tables in any order.
fn changes(cases: &mut [Case], rng: &mut fastrand::Rng) -> String {
    let mut sql = String::new();
    for _ in 0..cases.len() * 3 {
        sql.push_str("begin; ");
        for _ in 0..rng.usize(1..15) {
            let at = rng.usize(..cases.len());
            sql.push_str(&cases[at].change(rng));
        }
        sql.push_str("commit; ");
    }
    sql
}

/// How the job reads, keeps and writes.
fn way(round: usize) -> &'static [&'static str] {
    match round % 4 {
        0 => &[],
        1 => &["--decoder", "test_decoding", "--transport", "pull"],
        2 => &["--apply", "set", "--buffer", "spool"],
        _ => &["--decoder", "test_decoding", "--apply", "row"],
    }
}

async fn round(ends: &Ends, rng: &mut fastrand::Rng, number: usize, maps: usize) {
    let major = "select current_setting('server_version_num')::int >= 110000";
    let hashes = ends.source.psql("app", major).unwrap() == "t";
    let mut cases: Vec<Case> = (0..maps).map(|number| case(rng, hashes, number)).collect();
    let mut sql = "drop schema if exists s cascade; create schema s; ".to_string();
    for case in &mut cases {
        sql.push_str(&case.ddl());
        // Some are filled by the stream alone.
        for _ in 0..if rng.u32(0..4) == 0 { 0 } else { rng.usize(1..40) } {
            sql.push_str(&case.insert(rng));
        }
    }
    execute(&ends.source_uri(), &sql).await;
    let fresh = "drop schema if exists s cascade; drop schema if exists m cascade";
    execute(&ends.target_uri(), fresh).await;
    let sections: Vec<&str> = cases.iter().map(|case| case.section.as_str()).collect();
    let toml = Toml::of(ends, &format!("one-way = true\n{}", sections.join("\n")));
    let spool = [&ends.spool_dir.display().to_string(), "/s"].concat();
    let (spool, name) = (format!("spool:{spool}"), format!("maps{number}"));
    let mut way: Vec<&str> =
        way(number).iter().map(|word| if *word == "spool" { &spool } else { *word }).collect();
    way.extend(["--name", &name]);
    let with = |word: &'static str| [&[word], way.as_slice()].concat();
    let mut run = ends.spawn_on(&toml.with(&with("run")), VARIABLES);
    until_following(ends, &mut run, &name).await;
    cases.iter().for_each(|case| case.assert_same(ends, "copied"));
    execute(&ends.source_uri(), &changes(&mut cases, rng)).await;
    let verified = ends.spawn_on(&toml.with(&with("verify")), VARIABLES).ended().await;
    cases.iter().for_each(|case| case.assert_same(ends, "followed"));
    verified.expect_success();
    let status = ends.walferry(&["status", "--name", &name, "--json"]).await.json();
    conserved(&status["tables"]);
    done(ends, &toml, &with("cancel")).await;
    let _ = run.ended().await;
}

async fn until_following(ends: &Ends, run: &mut Walferry, name: &str) {
    for _ in 0..600 {
        assert!(!run.has_ended(), "the run ended: {}", run.so_far());
        let ended = ends.walferry(&["status", "--name", name, "--json"]).await;
        if ended.code == Some(0) && ended.json()["phase"] == "following" {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("it does not follow: {}", run.so_far());
}

/// Any number of statements; what psql takes as an argument has an end.
async fn execute(uri: &str, sql: &str) {
    let config = Config::parse(uri).unwrap();
    let mut session = Session::connect(&config, Purpose::Sql).await.unwrap();
    session.execute(sql).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn any_map_gives_the_same_by_copy_by_stream_and_by_sql() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let maps = number("WALFERRY_MAPS").unwrap_or(10) as usize;
    let seed = number("WALFERRY_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("seed {seed}, {maps} maps, key of {} bytes", KEY.len());
    let mut rng = fastrand::Rng::with_seed(seed);
    let pair = std::env::var("WALFERRY_MAPS_PAIR").unwrap_or("15-15".to_string());
    let (from, to) = pair.split_once('-').unwrap();
    let ends = Ends::start(from.parse().unwrap(), to.parse().unwrap());
    let a_job = MAPS_A_JOB.min(maps.div_ceil(2)).max(1);
    let mut left = maps;
    for turn in 0.. {
        if left == 0 {
            break;
        }
        let now = a_job.min(left);
        round(&ends, &mut rng, turn, now).await;
        left -= now;
        println!("{} of {maps} maps", maps - left);
    }
}
