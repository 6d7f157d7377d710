//! Changes against a table of what must come of them, with the server's answers given.

use bytes::Bytes;

use super::super::outline::Type;
use super::*;
use crate::change::{Column, ReplicaIdentity};
use crate::id::QualifiedName;
use crate::map::{Map, Section};
use crate::pg;

fn outline(identity: ReplicaIdentity, toml: &str) -> Arc<Outline> {
    let column = |name: &str, key| Column {
        name: name.to_string(),
        type_oid: 25,
        type_modifier: -1,
        key: key || identity == ReplicaIdentity::Full,
    };
    let name = QualifiedName::new("a", "t");
    let columns = vec![column("id", true), column("b", false), column("c", false)];
    let from = Arc::new(Relation { oid: 7, name: name.clone(), identity, columns });
    let section: Section = toml::from_str(&format!("table = 'a.t'\n{toml}")).unwrap();
    let map = Map::read(&[section], Some("0123456789abcdef".into())).unwrap().unwrap();
    let text = || Type { name: "text".to_string(), collation: String::new() };
    let types = [text(), text(), text()];
    Arc::new(Outline::of(&from, &map.of(&name).unwrap(), &types).unwrap())
}

fn row(values: &[&str]) -> Row {
    let mut builder = RowBuilder::new();
    for value in values {
        builder.push(match *value {
            "-" => Value::Null,
            "?" => Value::Unchanged,
            text => Value::Text(text.as_bytes()),
        });
    }
    builder.finish()
}

fn shown(row: &Row) -> String {
    let value = |value: Value<'_>| match value {
        Value::Null => "-".to_string(),
        Value::Unchanged => "?".to_string(),
        Value::Text(bytes) | Value::Binary(bytes) => String::from_utf8_lossy(bytes).into_owned(),
    };
    row.values().map(value).collect::<Vec<_>>().join(" ")
}

fn told(change: &Change) -> String {
    match change {
        Change::Insert { relation, .. } if crate::map::is_left_out(&relation.name) => {
            "left out".to_string()
        }
        Change::Insert { relation, new } => format!("{}: insert {}", relation.name, shown(new)),
        Change::Update { old: Some(old), new, .. } => {
            format!("update {} to {}", shown(old.row()), shown(new))
        }
        Change::Update { new, .. } => format!("update {}", shown(new)),
        Change::Delete { old, .. } => format!("delete {}", shown(old.row())),
        other => format!("{other:?}"),
    }
}

/// What becomes of a change where the server answers each group so, one row of answers an image.
fn becomes(outline: &Arc<Outline>, change: &Change, answers: &[&[&[&str]]]) -> Result<String> {
    let mut images = Images::default();
    let reshaped = reshape(outline, change, &mut images)?;
    let cell = |text: &&str| match *text {
        "-" => None,
        text => Some(Bytes::copy_from_slice(text.as_bytes())),
    };
    let answer = |row: &&[&str]| pg::Row::new(row.iter().map(cell).collect());
    let answers = answers.iter().map(|group| group.iter().map(answer).collect()).collect();
    reshaped.finish(&Answers(answers)).map(|change| told(&change))
}

fn update(outline: &Outline, old: Option<OldRow>, new: &[&str]) -> Change {
    Change::Update { relation: outline.from.clone(), old, new: row(new) }
}

#[test]
fn a_row_that_crosses_the_filter_comes_or_goes() {
    let full = outline(ReplicaIdentity::Full, "to = 'x.y'\nwhere = \"b = 'in'\"");
    let old = |values: &[&str]| Some(OldRow::Full(row(values)));
    let cases = [
        ("t", "t", "update 1 old c to 1 new c"),
        ("t", "f", "delete 1 old c"),
        ("f", "t", "x.y: insert 1 new c"),
        ("f", "f", "left out"),
    ];
    for (was_in, is_in, due) in cases {
        let change = update(&full, old(&["1", "old", "c"]), &["1", "new", "?"]);
        let got = becomes(&full, &change, &[&[&[was_in], &[is_in]]]).unwrap();
        assert_eq!(got, due, "{was_in} {is_in}");
    }
    let relation = full.from.clone();
    let insert = Change::Insert { relation: relation.clone(), new: row(&["1", "b", "c"]) };
    assert_eq!(becomes(&full, &insert, &[&[&["f"]]]).unwrap(), "left out");
    let delete = Change::Delete { relation, old: OldRow::Full(row(&["1", "b", "c"])) };
    assert_eq!(becomes(&full, &delete, &[&[&["f"]]]).unwrap(), "left out");
    assert_eq!(becomes(&full, &delete, &[&[&["t"]]]).unwrap(), "delete 1 b c");
}

#[test]
fn a_filter_of_the_key_needs_no_row_before_and_any_other_does() {
    let key = outline(ReplicaIdentity::Default, "where = \"id > 'a'\"");
    let same = update(&key, None, &["1", "b", "?"]);
    assert_eq!(becomes(&key, &same, &[&[&["t"]]]).unwrap(), "update 1 b ?");
    assert_eq!(becomes(&key, &same, &[&[&["f"]]]).unwrap(), "left out");
    let moved = update(&key, Some(OldRow::Key(row(&["0", "-", "-"]))), &["1", "b", "?"]);
    assert_eq!(becomes(&key, &moved, &[&[&["t"]], &[&["f"]]]).unwrap(), "delete 0 - -");
    let into = becomes(&key, &moved, &[&[&["f"]], &[&["t"]]]).unwrap_err().to_string();
    assert!(into.contains("replica identity full"), "{into}");
    let other = outline(ReplicaIdentity::Default, "where = \"b > 'a'\"");
    let blind = becomes(&other, &update(&other, None, &["1", "b", "c"]), &[]).unwrap_err();
    assert!(blind.to_string().contains("\"a\".\"t\" replica identity full"), "{blind}");
    let insert = Change::Insert { relation: other.from.clone(), new: row(&["1", "b", "c"]) };
    assert_eq!(becomes(&other, &insert, &[&[&["t"]]]).unwrap(), "a.t: insert 1 b c");
}

#[test]
fn masked_keys_and_values_that_did_not_change_stay_what_they_are() {
    let masks = outline(
        ReplicaIdentity::Default,
        "rename = {b = 'bb'}\nmask = {id = 'hash', b = 'sql:upper(b)', c = 'sql:b || c'}",
    );
    let names: Vec<&str> = masks.to.columns.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, ["id", "bb", "c"]);
    let delete =
        Change::Delete { relation: masks.from.clone(), old: OldRow::Key(row(&["1", "-", "-"])) };
    assert_eq!(becomes(&masks, &delete, &[&[&["h1"]]]).unwrap(), "delete h1 - -");
    let both = update(&masks, None, &["1", "?", "?"]);
    assert_eq!(becomes(&masks, &both, &[&[&["h1", "-", "-"]]]).unwrap(), "update h1 ? ?");
    let one = update(&masks, None, &["1", "b", "?"]);
    let blind = becomes(&masks, &one, &[&[&["h1", "B", "-"]]]).unwrap_err().to_string();
    assert!(blind.contains("mask of other columns"), "{blind}");
    let moved = update(&masks, Some(OldRow::Key(row(&["0", "-", "-"]))), &["1", "b", "c"]);
    let got = becomes(&masks, &moved, &[&[&["h0"]], &[&["h1", "B", "bc"]]]).unwrap();
    assert_eq!(got, "update h0 - - to h1 B bc");
}

#[test]
fn rows_of_a_slice_are_told_without_asking_and_cross_it_as_they_cross_a_filter() {
    let typed = crate::map::Typed { name: "id", type_name: "text", type_oid: 25 };
    let toml = "table = 'a.t'\ncolumn = 'id'\nby = 'lookup'\nlookup = {x = 2}\notherwise = 1";
    let shard: crate::map::Shard = toml::from_str(toml).unwrap();
    let second = shard.slices(&typed, 2).unwrap().remove(1);
    let plain = Arc::try_unwrap(outline(ReplicaIdentity::Default, "")).unwrap();
    let sliced = Arc::new(plain.sliced(second).unwrap());
    let key = |id: &str| Some(OldRow::Key(row(&[id, "-", "-"])));
    let at = |old: Option<OldRow>, id: &str| {
        becomes(&sliced, &update(&sliced, old, &[id, "b", "c"]), &[]).unwrap()
    };
    assert_eq!(at(None, "x"), "update x b c");
    assert_eq!(at(None, "y"), "left out");
    assert_eq!(at(key("x"), "y"), "delete x - -");
    assert_eq!(at(key("y"), "x"), "a.t: insert x b c");
    assert_eq!(at(key("y"), "z"), "left out");
    let toasted = update(&sliced, key("y"), &["x", "?", "c"]);
    let into = becomes(&sliced, &toasted, &[]).unwrap_err().to_string();
    assert!(into.contains("replica identity full"), "{into}");
    let delete =
        Change::Delete { relation: sliced.from.clone(), old: OldRow::Key(row(&["y", "-", "-"])) };
    assert_eq!(becomes(&sliced, &delete, &[]).unwrap(), "left out");
}

#[test]
fn renames_alone_ask_nobody_and_columns_that_are_gone_stop() {
    let plain = outline(ReplicaIdentity::Default, "to = 'x.y'\nexclude-columns = ['b']");
    let insert = Change::Insert { relation: plain.from.clone(), new: row(&["1", "b", "c"]) };
    let mut images = Images::default();
    let reshaped = reshape(&plain, &insert, &mut images).unwrap();
    assert_eq!(told(&reshaped.finish(&Answers(Vec::new())).unwrap()), "x.y: insert 1 c");
    let section: Section = toml::from_str("table = 'a.t'\nexclude-columns = ['gone']").unwrap();
    let map = Map::read(&[section], None).unwrap().unwrap();
    let gone = Outline::of(&plain.from, &map.of(&plain.from.name).unwrap(), &[]).unwrap_err();
    assert!(matches!(&gone, Error::Gone { column, .. } if column == "gone"), "{gone}");
}

#[test]
fn a_query_asks_with_the_types_of_the_source_and_masks_only_what_goes_along() {
    let both = outline(ReplicaIdentity::Full, "where = 'id > b'\nmask = {c = 'sql:c || 1'}");
    let sql = &both.asks(Kind::Whole).sql;
    assert_eq!(
        sql.replace('\n', ""),
        "select ((id > b) is true), case when ((id > b) is true) then (c || 1)::text end from \
         (select v.n as \"walferry n\", v.c0::text as \"id\", v.c1::text as \"b\", \
         v.c2::text as \"c\" from unnest($1::int4[], $2::text[], $3::text[], \
         $4::text[]) as v(n, c0, c1, c2)) as walferry_row order by walferry_row.\"walferry n\""
    );
}
