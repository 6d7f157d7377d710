//! Where a value goes, told here and by servers: the same for every value.

use serde_json::json;
use walferry::demo::server::Server;
use walferry::id::QualifiedName;
use walferry::map::{Map, Shard, Slice, Typed};
use walferry::pg::Session;

use crate::support::session;

const VALUES: usize = 1500;

fn text() -> String {
    let letters: Vec<char> =
        "abcXYZ 019'\"\\%_{},\u{e9}\u{df}\u{4e2d}\u{1f680}\n\t".chars().collect();
    (0..fastrand::usize(0..40)).map(|_| letters[fastrand::usize(0..letters.len())]).collect()
}

fn value(type_name: &str) -> String {
    let near = fastrand::i64(-3..=3);
    match type_name {
        "smallint" => fastrand::i16(..).to_string(),
        "integer" if fastrand::bool() => near.to_string(),
        "integer" => fastrand::i32(..).to_string(),
        "bigint" if fastrand::bool() => near.to_string(),
        "bigint" => fastrand::i64(..).to_string(),
        "uuid" => format!("{:032x}", fastrand::u128(..)),
        _ => text(),
    }
}

/// Each value's places by the server's conditions and by our own.
async fn compare(session: &mut Session, (type_name, oid): (&str, u32), shard: &Shard) {
    let targets = fastrand::u32(1..8);
    let typed = Typed { name: "k", type_name, type_oid: oid };
    let shard = match shard.by.as_str() {
        "lookup" => Shard { lookup: [("7".to_string(), targets)].into(), ..shard.clone() },
        _ => shard.clone(),
    };
    let slices: Vec<Slice> = shard.slices(&typed, targets).unwrap();
    let conditions = slices.iter().map(|slice| {
        let name = QualifiedName::new("public", "t");
        let map = Map::sliced(&[(name.clone(), Some(slice.clone()))].into(), true);
        format!("({})::int", map.of(&name).unwrap().condition().unwrap())
    });
    let sql = format!(
        "select k, array[{}] from (select x::{type_name} as k \
         from pg_catalog.jsonb_array_elements_text($1::jsonb) x union all select null) t",
        conditions.collect::<Vec<_>>().join(", ")
    );
    let mut values: Vec<String> = (0..VALUES).map(|_| value(type_name)).collect();
    if matches!(oid, 25 | 1042 | 1043) {
        values.extend(["", " ", "a ", "7"].map(str::to_string));
    }
    let rows = session.query_params(&sql, &[Some(&json!(values).to_string())]).await.unwrap();
    assert_eq!(rows.len(), values.len() + 1);
    for row in rows {
        let value = row.bytes(0).map(|bytes| &**bytes);
        let ours: Vec<&str> =
            slices.iter().map(|slice| if slice.has(value).unwrap() { "1" } else { "0" }).collect();
        let ours = format!("{{{}}}", ours.join(","));
        assert_eq!(row.str(1).unwrap(), ours, "{shard:?} of {targets}: {value:?}");
        assert_eq!(ours.matches('1').count(), 1, "{ours}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_server_and_walferry_send_a_value_to_the_same_target() {
    for major in [10, 15, 18] {
        let server = Server::start(&Server::bin_of(major).unwrap(), &[]).unwrap();
        let mut session = session(&server, "postgres").await;
        let types = [
            ("smallint", 21),
            ("integer", 23),
            ("bigint", 20),
            ("text", 25),
            ("character varying", 1043),
            ("character(9)", 1042),
            ("uuid", 2950),
        ];
        for (type_name, oid) in types {
            for by in ["citus", "hashtext-mod", "mod", "lookup"] {
                let lookup = by == "lookup";
                let shard = Shard {
                    table: "public.t".to_string(),
                    column: "k".to_string(),
                    by: by.to_string(),
                    otherwise: lookup.then_some(1),
                    ..Shard::default()
                };
                let number = matches!(oid, 20 | 21 | 23);
                if by == "mod" && !number {
                    continue;
                }
                if type_name == "character(9)" {
                    // What does not fit is refused by the cast's own rule, and of no use here.
                    session.execute("set client_min_messages = error").await.unwrap();
                }
                compare(&mut session, (type_name, oid), &shard).await;
            }
        }
    }
}
