//! Which statements share a transaction, and which keys are built beside other indexes. Pure.
//!
//! Both change how post-data is run and not what comes of it, and both can be turned off.

use std::collections::{HashMap, HashSet};

use super::lex::Cursor;
use super::plan::{Lock, Step, Wave, size};
use crate::id::QualifiedName;

/// Indexes of tables up to this size, in bytes, are built with others in one transaction; keys of
/// larger ones beside other indexes.
const SMALL_BYTES: u64 = 1 << 20;

/// Ends the id of the step that builds a constraint's index.
const INDEX: &str = ".index";

/// What runs in one transaction each, in the order of `steps`, which are all of one wave: steps
/// about small tables together, up to `count` of them, all that one table needs in the same; but
/// with several such transactions for each of `parallel` sessions. For a small index the commit
/// and the round trip are most of the work. Anything else is by itself.
pub fn bundles(
    steps: Vec<Step>,
    bytes: &HashMap<QualifiedName, u64>,
    (count, parallel): (usize, usize),
) -> Vec<Vec<Step>> {
    let is_small = |step: &Step| match step.wave {
        Wave::Build => step.locks.iter().all(|lock| size(bytes, lock) <= SMALL_BYTES),
        Wave::Attach => true,
        _ => false,
    };
    let mut bundles: Vec<Vec<Step>> = Vec::new();
    let mut tables: Vec<Vec<Step>> = Vec::new();
    let mut places: HashMap<QualifiedName, usize> = HashMap::new();
    for step in steps {
        if count < 2 || !is_small(&step) {
            bundles.push(vec![step]);
            continue;
        }
        let table = step.locks.first().map(|lock| lock.table.clone());
        let place = table.map_or(tables.len(), |t| *places.entry(t).or_insert(tables.len()));
        match tables.get_mut(place) {
            Some(steps) => steps.push(step),
            None => tables.push(vec![step]),
        }
    }
    let small: usize = tables.iter().map(Vec::len).sum();
    let count = count.min(small.div_ceil(4 * parallel.max(1))).max(1);
    let mut open: Vec<Step> = Vec::new();
    for steps in tables {
        if !open.is_empty() && open.len() + steps.len() > count {
            bundles.push(std::mem::take(&mut open));
        }
        open.extend(steps);
    }
    bundles.extend((!open.is_empty()).then_some(open));
    bundles
}

/// ALTER TABLE ... ADD PRIMARY KEY shuts every other CREATE INDEX out of its table for as long as
/// it sorts. Of a large table that gets other indexes too, a key becomes a unique index, built
/// beside those, and a constraint made of it afterwards, which takes no time. So does a large
/// table's only key where the table `is_early`, built while others are copied: everybody may read
/// it meanwhile. `done` are ids of an earlier run: what was begun so is ended so.
///
/// <https://www.postgresql.org/docs/current/sql-altertable.html> (ADD table_constraint_using_index)
pub fn keys_beside(
    steps: Vec<Step>,
    bytes: &HashMap<QualifiedName, u64>,
    done: &HashSet<String>,
    is_early: impl Fn(&QualifiedName) -> bool,
) -> Vec<Step> {
    let mut builds: HashMap<QualifiedName, usize> = HashMap::new();
    for lock in steps.iter().filter(|step| step.wave == Wave::Build).flat_map(|step| &step.locks) {
        *builds.entry(lock.table.clone()).or_default() += 1;
    }
    let mut planned = Vec::with_capacity(steps.len());
    for mut step in steps {
        let index_id = format!("{}{INDEX}", step.id);
        let pays = step.wave == Wave::Build
            && step.locks.iter().all(|lock| {
                lock.exclusive
                    && size(bytes, lock) > SMALL_BYTES
                    && (builds.get(&lock.table) > Some(&1) || is_early(&lock.table))
            });
        let wanted = !done.contains(&step.id) && (pays || done.contains(&index_id));
        if let Some((index, adopt)) = wanted.then(|| as_index(&step.statement.sql)).flatten() {
            let locks = step.locks.iter();
            let locks = locks.map(|l| Lock { table: l.table.clone(), exclusive: false }).collect();
            let mut statement = step.statement.clone();
            statement.sql = index;
            planned.push(Step { id: index_id, statement, wave: Wave::Build, locks });
            step.statement.sql = adopt;
            step.wave = Wave::Adopt;
        }
        planned.push(step);
    }
    planned.sort_by_key(|step| step.wave);
    planned
}

/// CREATE UNIQUE INDEX and ALTER TABLE ... USING INDEX for a statement that adds a primary key or
/// a unique constraint; `None` for any other, and for what no index can be made for beforehand.
fn as_index(sql: &str) -> Option<(String, String)> {
    let mut cursor = Cursor::new(sql);
    cursor.eat("alter table only").then_some(())?;
    let table = cursor.name()?.quoted();
    cursor.eat("add constraint").then_some(())?;
    let name = crate::id::quote_ident(&cursor.ident()?);
    let kind = if cursor.eat("primary key") {
        "PRIMARY KEY"
    } else if cursor.eat("unique") {
        "UNIQUE"
    } else {
        return None;
    };
    let nulls = if cursor.eat("nulls not distinct") { " NULLS NOT DISTINCT" } else { "" };
    let columns = parentheses(sql, &mut cursor)?;
    // A temporal key is no btree index.
    if columns.to_ascii_uppercase().contains("WITHOUT OVERLAPS") {
        return None;
    }
    let mut list = |keyword: &str| -> Option<String> {
        if !cursor.eat(keyword) {
            return Some(String::new());
        }
        let words = parentheses(sql, &mut cursor)?;
        Some(format!(" {} {words}", keyword.to_ascii_uppercase()))
    };
    let (include, with) = (list("include")?, list("with")?);
    let rest = match cursor.peek() {
        None => "",
        Some(token) if token.is("deferrable") || token.is("initially") => sql.get(token.start..)?,
        Some(_) => return None,
    };
    Some((
        format!(
            "CREATE UNIQUE INDEX {name} ON {table} USING btree {columns}{include}{nulls}{with}"
        ),
        format!("ALTER TABLE ONLY {table} ADD CONSTRAINT {name} {kind} USING INDEX {name} {rest}")
            .trim_end()
            .to_string(),
    ))
}

/// `( ... )`, which has to come next; steps over it.
fn parentheses<'a>(sql: &'a str, cursor: &mut Cursor<'_>) -> Option<&'a str> {
    let start = cursor.peek().filter(|token| token.is_sign('('))?.start;
    let mut depth = 0_usize;
    loop {
        let token = *cursor.peek()?;
        cursor.step();
        depth += usize::from(token.is_sign('('));
        depth -= usize::from(token.is_sign(')'));
        if depth == 0 {
            return sql.get(start..token.end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::plan::steps;

    #[test]
    fn statements_about_small_tables_share_a_transaction() {
        let bytes = HashMap::from([(QualifiedName::new("s", "big"), 9 << 20)]);
        let mut post = "CREATE INDEX b1 ON s.big (a); ALTER TABLE s.t0 CLUSTER ON i;".to_string();
        for t in 0..40 {
            post.push_str(&format!(
                "CREATE INDEX i{t} ON s.t{t} (a); ALTER INDEX s.p ATTACH PARTITION s.i{t};"
            ));
        }
        post.push_str("ALTER TABLE s.t0 ADD CONSTRAINT k PRIMARY KEY (a)");
        let steps = steps(&post, &bytes).unwrap();
        let sizes = |wave: Wave, options| -> Vec<usize> {
            let steps = steps.iter().filter(|step| step.wave == wave).cloned().collect();
            bundles(steps, &bytes, options).iter().map(Vec::len).collect()
        };
        assert_eq!(sizes(Wave::Build, (64, 1)), [1, 11, 11, 11, 8], "the big one is by itself");
        assert_eq!(sizes(Wave::Build, (4, 1))[..3], [1, 4, 4]);
        assert_eq!(sizes(Wave::Attach, (64, 1)), [10; 4]);
        assert_eq!(sizes(Wave::Mark, (64, 1)), [1]);
        assert_eq!(sizes(Wave::Build, (1, 1)), [1; 42], "switched off");
        let builds = steps.iter().filter(|step| step.wave == Wave::Build).cloned().collect();
        for (nth, bundle) in bundles(builds, &bytes, (2, 1)).iter().enumerate() {
            let is_first = bundle.iter().any(|step| step.statement.sql.contains("s.t0 "));
            assert_eq!(is_first, nth == 1, "what a table needs is in one place");
        }
    }

    #[test]
    fn a_key_of_a_large_table_is_built_beside_its_other_indexes() {
        let bytes = ["big", "sole"].map(|name| (QualifiedName::new("s", name), 9 << 20)).into();
        let post = "ALTER TABLE ONLY s.big ADD CONSTRAINT k PRIMARY KEY (a); \
                    ALTER TABLE ONLY s.sole ADD CONSTRAINT o PRIMARY KEY (a); \
                    ALTER TABLE ONLY s.small ADD CONSTRAINT m PRIMARY KEY (a); \
                    CREATE INDEX i ON s.big (b); CREATE INDEX j ON s.small (b); \
                    ALTER INDEX s.p ATTACH PARTITION s.k";
        let plan = |done: &[&String]| -> Vec<(Wave, String, String)> {
            let done = done.iter().map(ToString::to_string).collect();
            let planned = keys_beside(steps(post, &bytes).unwrap(), &bytes, &done, |_| false);
            planned.into_iter().map(|s| (s.wave, s.statement.sql, s.id)).collect()
        };
        let planned = plan(&[]);
        let (_, index, index_id) = &planned[0];
        assert_eq!(index, "CREATE UNIQUE INDEX \"k\" ON \"s\".\"big\" USING btree (a)");
        let (wave, key, key_id) = &planned[5];
        assert_eq!(*wave, Wave::Adopt);
        assert!(
            key.ends_with("\"big\" ADD CONSTRAINT \"k\" PRIMARY KEY USING INDEX \"k\""),
            "{key}"
        );
        assert_eq!(planned.iter().filter(|(_, sql, _)| sql.contains("ADD CONST")).count(), 3);
        assert_eq!(planned[6].0, Wave::Attach);
        assert_eq!(plan(&[index_id]), planned, "a run that was stopped between the two");
        let statements = plan(&[index_id, key_id]);
        assert_eq!(statements.len(), 6, "a key that is there is not taken apart");
        let early = keys_beside(steps(post, &bytes).unwrap(), &bytes, &HashSet::new(), |_| true);
        let adopted = early.iter().filter(|step| step.wave == Wave::Adopt);
        assert_eq!(adopted.count(), 2, "an only key of a large table that is early");
        let late: Vec<&str> = early
            .iter()
            .filter(|step| step.locks.iter().any(|lock| lock.exclusive))
            .filter(|step| step.wave == Wave::Build)
            .map(|step| step.statement.sql.as_str())
            .collect();
        assert_eq!(late, ["ALTER TABLE ONLY s.small ADD CONSTRAINT m PRIMARY KEY (a)"]);
    }

    #[test]
    fn constraints_become_indexes_with_all_that_is_said_of_them() {
        let cases = [
            (
                "UNIQUE NULLS NOT DISTINCT (a, \"b)\") INCLUDE (c) WITH (fillfactor='70') \
                 DEFERRABLE INITIALLY DEFERRED",
                "(a, \"b)\") INCLUDE (c) NULLS NOT DISTINCT WITH (fillfactor='70')",
                "UNIQUE USING INDEX \"K\" DEFERRABLE INITIALLY DEFERRED",
            ),
            ("PRIMARY KEY (a)", "(a)", "PRIMARY KEY USING INDEX \"K\""),
        ];
        for (constraint, columns, adopt) in cases {
            let sql = format!("ALTER TABLE ONLY s.t ADD CONSTRAINT \"K\" {constraint}");
            let (index, constraint) = as_index(&sql).unwrap();
            let create = "CREATE UNIQUE INDEX \"K\" ON \"s\".\"t\" USING btree";
            assert_eq!(index, format!("{create} {columns}"));
            let add = "ALTER TABLE ONLY \"s\".\"t\" ADD CONSTRAINT \"K\"";
            assert_eq!(constraint, format!("{add} {adopt}"));
        }
        for sql in [
            "ALTER TABLE ONLY s.t ADD CONSTRAINT k PRIMARY KEY (a, b WITHOUT OVERLAPS)",
            "ALTER TABLE ONLY s.t ADD CONSTRAINT k EXCLUDE USING gist (r WITH &&)",
            "ALTER TABLE ONLY s.t ADD CONSTRAINT k UNIQUE (a) USING INDEX TABLESPACE x",
            "CREATE INDEX i ON s.t (a)",
        ] {
            assert_eq!(as_index(sql), None, "{sql}");
        }
    }
}
