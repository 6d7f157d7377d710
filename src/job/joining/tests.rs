use super::*;
use crate::change::ReplicaIdentity;

fn table(oid: u32, name: &str, kind: TableKind, parent: &str) -> Table {
    Table {
        oid,
        name: QualifiedName::new("s", name),
        kind,
        partition_of: Some(QualifiedName::new("s", parent)).filter(|_| !parent.is_empty()),
        unlogged: false,
        identity: ReplicaIdentity::Default,
        identity_columns: Vec::new(),
        key: Vec::new(),
        columns: Vec::new(),
        blocks: 0,
        bytes: 0,
        rows_estimate: 0.0,
        published: catalog::Published::default(),
        mapped: None,
    }
}

fn told(found: &[&str], all: &[Table], there: &[&str]) -> Vec<String> {
    let found: Vec<_> = found.iter().map(|name| QualifiedName::new("s", *name)).collect();
    let there = |table: &&Table| there.contains(&&*table.name.name);
    let there: Vec<Table> = all.iter().filter(there).cloned().collect();
    let names = |tables: &[Table]| {
        tables.iter().map(|table| &*table.name.name).collect::<Vec<_>>().join(" ")
    };
    families(&found, all, &there)
        .iter()
        .map(|f| format!("{} joins, {} lacks", names(&f.joining), names(&f.lacking)))
        .collect()
}

#[test]
fn a_tree_comes_whole_or_by_the_leaves_that_are_new() {
    use TableKind::{Partitioned, Plain};
    let all = [
        table(1, "leaf", Plain, "branch"),
        table(2, "branch", Partitioned, "root"),
        table(3, "root", Partitioned, ""),
        table(4, "twig", Plain, "root"),
        table(5, "alone", Plain, ""),
    ];
    // What the stream carries is made where its parent is; what has another name is not.
    assert_eq!(told(&[], &all, &["root", "branch", "alone"]), [" joins, twig leaf lacks"]);
    assert_eq!(told(&[], &all, &["alone"]), Vec::<String>::new());
    // A publication from 13 on has the root, which stands for all.
    let whole =
        ["alone joins, alone lacks", "root branch twig leaf joins, root branch twig leaf lacks"];
    assert_eq!(told(&["root", "alone"], &all, &[]), whole);
    assert_eq!(
        told(&["root"], &all, &["root", "branch", "twig", "leaf"])[0],
        "root branch twig leaf joins,  lacks"
    );
    // Before, it has each leaf; parents that are new have to be there for them.
    assert_eq!(told(&["leaf"], &all, &["root", "twig"]), ["leaf joins, branch leaf lacks"]);
    assert_eq!(
        told(&["leaf", "twig"], &all, &["root", "branch"]),
        ["twig leaf joins, twig leaf lacks"]
    );
}
