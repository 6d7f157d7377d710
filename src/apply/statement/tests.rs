use super::super::target::Column;
use super::*;
use crate::change;
use crate::id::QualifiedName;

const EQUAL: &str = "operator(pg_catalog.=)";

/// A table `"s"."t"` with a key column, a comparable one, one that is not, and a generated one.
fn mapping(identity: ReplicaIdentity, kind: &str, key: &[&str]) -> Mapping {
    let column = |name: &str, type_name: &str, equality: Option<&str>| Column {
        name: name.to_string(),
        type_name: type_name.to_string(),
        base_type_name: type_name.to_string(),
        equality: equality.map(str::to_string),
        carrier: Carrier::Text,
        plain_carrier: Carrier::Text,
        native: None,
        generated: name == "g",
        identity_always: name == "id",
        deterministic: true,
    };
    let table = Table {
        name: QualifiedName::new("s", "t"),
        kind: kind.to_string(),
        counts_inserts: false,
        takes_copy: true,
        deletes_by_array: true,
        counts_by_server: true,
        unnests_in_select: true,
        unique_indexes: 1,
        acts: false,
        owned: true,
        key: key.iter().map(|k| k.to_string()).collect(),
        columns: vec![
            column("id", "integer", Some(EQUAL)),
            column("n", "numeric", Some(EQUAL)),
            column("j", "json", None),
            column("g", "text", Some(EQUAL)),
        ],
    };
    let columns = ["j", "n", "id", "g"].map(|name| change::Column {
        name: name.to_string(),
        type_oid: 0,
        type_modifier: -1,
        key: name == "id",
    });
    let name = QualifiedName::new("s", "t");
    let relation = Relation { oid: 1, name, identity, columns: columns.to_vec() };
    Mapping::new(&relation, table).unwrap()
}

#[test]
fn an_insert_names_its_columns_and_overrides_identity() {
    let insert = mapping(ReplicaIdentity::Default, "r", &[]).insert();
    assert_eq!(
        insert.sql,
        "insert into \"s\".\"t\" (\"j\", \"n\", \"id\") overriding system value \
         values ($1::json, $2::numeric, $3::integer)"
    );
    assert_eq!(insert.binds, [Bind::New(0), Bind::New(1), Bind::New(2)]);
}

#[test]
fn an_update_by_key_sets_what_it_is_told_and_is_guarded() {
    let mapping = mapping(ReplicaIdentity::Default, "r", &[]);
    let update = mapping.update(&[1], &|_| false, Source::New);
    assert_eq!(
        update.sql,
        format!(
            "with u as (update only \"s\".\"t\" as t set \"n\" = $1::numeric \
             where t.\"id\" {EQUAL} $2::integer returning 1) {GUARD}"
        )
    );
    assert_eq!(update.binds, [Bind::New(1), Bind::New(2)]);
    let touch = mapping.update(&[], &|_| false, Source::Old);
    assert!(touch.sql.starts_with("with u as (select 1 from only \"s\".\"t\" as t where"));
    assert_eq!(touch.binds, [Bind::Old(2)]);
}

#[test]
fn a_row_without_key_is_found_by_all_its_columns_and_one_of_equals_is_taken() {
    let delete = mapping(ReplicaIdentity::Full, "p", &[]).delete(&|c| c == 2, Source::Old);
    assert_eq!(
        delete.sql,
        format!(
            "with u as (delete from \"s\".\"t\" as t where (t.tableoid, t.ctid) = \
             (select s.tableoid, s.ctid from \"s\".\"t\" as s \
             where s.\"j\"::text = $1::json::text and s.\"n\" {EQUAL} $2::numeric \
             and s.\"id\" is not distinct from null \
             order by (s.\"n\"::text = $2::numeric::text) desc limit 1) \
             returning 1) {GUARD}"
        )
    );
    assert_eq!(delete.binds, [Bind::Old(0), Bind::Old(1)]);
}

#[test]
fn full_identity_uses_the_key_of_the_target_where_there_is_one() {
    let by = |key: &[&str]| mapping(ReplicaIdentity::Full, "r", key).locator;
    assert_eq!(by(&["n", "id"]), Locator::Key(vec![1, 2]));
    assert_eq!(by(&["n", "elsewhere"]), Locator::Whole);
    assert_eq!(by(&[]), Locator::Whole);
}

#[test]
fn every_parameter_of_a_replacement_has_a_bind() {
    let mapping = mapping(ReplicaIdentity::Default, "r", &[]);
    for change in [IdentityChange::Unknown, IdentityChange::Changed] {
        let statement = mapping.replace(&[1], 2, change, &|_| false, Source::Old);
        for number in 1..=statement.binds.len() {
            assert!(statement.sql.contains(&format!("${number}::")), "{}", statement.sql);
        }
        assert!(!statement.sql.contains(&format!("${}", statement.binds.len() + 1)));
        // The column that TOAST left unchanged comes from the deleted row.
        assert!(statement.sql.contains("d.\"j\""), "{}", statement.sql);
    }
}

#[test]
fn truncate_takes_partitions_along_and_heirs_not() {
    let [plain, tree] = ["r", "p"].map(|k| mapping(ReplicaIdentity::Full, k, &[]).table);
    assert_eq!(
        truncate(&[&plain, &tree], true),
        "truncate only \"s\".\"t\", \"s\".\"t\" restart identity restrict"
    );
}
