//! In which order, and beside what, each post-data statement may run. Pure.
//!
//! pg_dump's order is right for one session. Here only what is safe to move is moved: index builds
//! and constraints go in parallel, foreign keys wait for every unique constraint, everything else
//! keeps its order, and event triggers come last so that they do not fire for the rest.

use std::collections::HashMap;

use super::lex::{Cursor, LexError};
use super::script::{self, Statement};
use crate::id::QualifiedName;

/// The two halves of post-data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PostPhase {
    /// Indexes, primary, unique and exclusion constraints, replica identity: what the applier
    /// needs to find rows.
    Indexes,
    /// Foreign keys, then views held back, triggers, rules, policies, refreshes, event triggers.
    Rest,
}

/// What a statement is, as far as order goes. Waves run in the order of the variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wave {
    /// CREATE INDEX and constraints with an index: parallel.
    Build,
    /// Constraints over indexes that were built beside others: see `pack::keys_beside`.
    Adopt,
    /// ALTER INDEX ... ATTACH PARTITION: after both indexes exist (pgstream#1094).
    Attach,
    /// What is said of an index that exists: CLUSTER ON, REPLICA IDENTITY, statistics targets.
    Mark,
    /// FOREIGN KEY: after every unique constraint, parallel where no table is shared.
    ForeignKey,
    /// All the rest, in pg_dump's order.
    Rest,
    /// Event triggers and what is said of them.
    EventTrigger,
}

impl Wave {
    /// The half it belongs to.
    pub fn phase(self) -> PostPhase {
        match self {
            Wave::Build | Wave::Adopt | Wave::Attach | Wave::Mark => PostPhase::Indexes,
            Wave::ForeignKey | Wave::Rest | Wave::EventTrigger => PostPhase::Rest,
        }
    }

    /// True if its steps may run beside each other, locks permitting.
    pub fn is_parallel(self) -> bool {
        matches!(self, Wave::Build | Wave::ForeignKey)
    }
}

/// A table that a step locks for as long as it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lock {
    /// The table.
    pub table: QualifiedName,
    /// False for CREATE INDEX, whose SHARE lock lets another CREATE INDEX in.
    pub exclusive: bool,
}

/// A statement to run once.
#[derive(Clone, Debug)]
pub struct Step {
    /// Names the statement across runs: its hash, and its ordinal among equal ones.
    pub id: String,
    /// What to run.
    pub statement: Statement,
    /// When.
    pub wave: Wave,
    /// Locks it holds while it runs; empty for waves that are not parallel.
    pub locks: Vec<Lock>,
}

impl Step {
    /// True if the two may run at the same time without one waiting for the other.
    pub fn is_free_of(&self, other: &Step) -> bool {
        self.locks.iter().all(|mine| {
            other
                .locks
                .iter()
                .all(|theirs| mine.table != theirs.table || !(mine.exclusive || theirs.exclusive))
        })
    }
}

/// The steps of post-data, wave by wave; inside parallel waves the largest table first, elsewhere
/// in pg_dump's order. `bytes` gives the size of tables that are not empty.
pub fn steps(post: &str, bytes: &HashMap<QualifiedName, u64>) -> Result<Vec<Step>, LexError> {
    let statements = script::statements(post)?;
    let late = Late::of(&statements);
    let mut seen: HashMap<u128, u32> = HashMap::new();
    let mut steps: Vec<Step> = statements
        .into_iter()
        .map(|statement| {
            let (mut wave, locks) = classify(&statement.sql);
            if matches!(wave, Wave::Build | Wave::Mark) && late.touches(&statement.sql, &locks) {
                wave = Wave::Rest;
            }
            let hash = fnv(statement.sql.as_bytes());
            let nth = seen.entry(hash).or_default();
            *nth += 1;
            Step { id: format!("{hash:032x}.{nth}"), statement, wave, locks }
        })
        .collect();
    let sizes = |step: &Step| -> u64 {
        let tables = step.locks.iter().map(|lock| size(bytes, lock));
        if step.wave.is_parallel() { tables.sum() } else { 0 }
    };
    steps.sort_by_key(|step| (step.wave, std::cmp::Reverse(sizes(step))));
    Ok(steps)
}

/// Bytes of the table; 0 where it has no rows.
pub(super) fn size(bytes: &HashMap<QualifiedName, u64>, lock: &Lock) -> u64 {
    bytes.get(&lock.table).copied().unwrap_or(0)
}

/// FNV-1a with 128 bits: a collision would skip a statement, so 64 are too few to be calm about.
fn fnv(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash, byte| {
        (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013B)
    })
}

/// The wave of a statement, and the tables it locks.
fn classify(sql: &str) -> (Wave, Vec<Lock>) {
    let mut cursor = Cursor::new(sql);
    if cursor.eat("create event trigger")
        || cursor.eat("alter event trigger")
        || cursor.eat("comment on event trigger")
    {
        return (Wave::EventTrigger, Vec::new());
    }
    if cursor.eat("create index") || cursor.eat("create unique index") {
        return match index_table(&mut cursor) {
            Some(table) => (Wave::Build, vec![Lock { table, exclusive: false }]),
            None => (Wave::Rest, Vec::new()),
        };
    }
    if cursor.eat("alter index") {
        let _ = cursor.name();
        let attach = cursor.eat("attach partition");
        return (if attach { Wave::Attach } else { Wave::Mark }, Vec::new());
    }
    if (cursor.eat("alter table only") || cursor.eat("alter table"))
        && let Some(found) = alter_table(&mut cursor)
    {
        return found;
    }
    (Wave::Rest, Vec::new())
}

fn index_table(cursor: &mut Cursor<'_>) -> Option<QualifiedName> {
    cursor.ident()?;
    cursor.eat("on").then_some(())?;
    cursor.eat("only");
    cursor.name()
}

fn alter_table(cursor: &mut Cursor<'_>) -> Option<(Wave, Vec<Lock>)> {
    let table = cursor.name()?;
    if cursor.eat("cluster on") || cursor.eat("replica identity") {
        return Some((Wave::Mark, vec![Lock { table, exclusive: true }]));
    }
    cursor.eat("add constraint").then_some(())?;
    cursor.ident()?;
    if cursor.eat("primary key") || cursor.eat("unique") || cursor.eat("exclude") {
        return Some((Wave::Build, vec![Lock { table, exclusive: true }]));
    }
    cursor.eat("foreign key").then_some(())?;
    cursor.find("references").then_some(())?;
    let other = cursor.name()?;
    let mut locks = vec![Lock { table, exclusive: true }];
    if locks.iter().all(|lock| lock.table != other) {
        locks.push(Lock { table: other, exclusive: true });
    }
    Some((Wave::ForeignKey, locks))
}

/// The table that a FOREIGN KEY or ATTACH PARTITION statement needs beside its own; of indexes
/// that are attached, both.
pub fn other_tables(sql: &str) -> Vec<QualifiedName> {
    let mut cursor = Cursor::new(sql);
    if cursor.eat("alter index") {
        let index = cursor.name();
        let attached = cursor.eat("attach partition").then(|| cursor.name()).flatten();
        return attached
            .map_or(Vec::new(), |attached| index.into_iter().chain([attached]).collect());
    }
    if !(cursor.eat("alter table only") || cursor.eat("alter table")) {
        return Vec::new();
    }
    let Some(table) = cursor.name() else { return Vec::new() };
    let other = if cursor.eat("attach partition") {
        cursor.name()
    } else if cursor.eat("add constraint") {
        cursor.step();
        let is_key = cursor.eat("foreign key");
        (is_key && cursor.find("references")).then(|| cursor.name()).flatten()
    } else {
        None
    };
    other.map_or(Vec::new(), |other| vec![table, other])
}

/// True for what acts on rows as they are written, or is said of something that does: what must not
/// be there while rows are applied without the replica role.
pub fn acts(sql: &str) -> bool {
    let mut cursor = Cursor::new(sql);
    if cursor.eat("create") {
        cursor.eat("or replace");
        return ["trigger", "constraint trigger", "rule"].iter().any(|what| cursor.eat(what));
    }
    if ["trigger", "rule", "constraint"]
        .iter()
        .any(|what| Cursor::new(sql).eat(&format!("comment on {what}")))
    {
        return true;
    }
    if !(cursor.eat("alter table only") || cursor.eat("alter table")) || cursor.name().is_none() {
        return false;
    }
    if cursor.eat("enable") || cursor.eat("disable") {
        return true;
    }
    cursor.eat("add constraint") && cursor.ident().is_some() && cursor.eat("foreign key")
}

/// True for a foreign key one of whose tables is not kept, and for what may be said of one.
pub fn crosses(sql: &str, keeps: impl Fn(&QualifiedName) -> bool) -> bool {
    let is_key = acts(sql) && other_tables(sql).iter().any(|table| !keeps(table));
    is_key || Cursor::new(sql).eat("comment on constraint")
}

/// Table, name and definition of a foreign key that can be made NOT VALID first: one that is not so
/// anyway, and not of a partitioned table, which cannot have such before 18.
pub fn foreign_key(sql: &str) -> Option<(QualifiedName, String, &str)> {
    let mut cursor = Cursor::new(sql);
    cursor.eat("alter table only").then_some(())?;
    let table = cursor.name()?;
    cursor.eat("add constraint").then_some(())?;
    let name = cursor.ident()?;
    let definition = sql.get(cursor.peek()?.start..)?;
    cursor.eat("foreign key").then_some(())?;
    let ends = |words: &str| sql.trim_end().to_ascii_uppercase().ends_with(words);
    (!ends("NOT VALID") && !ends("NOT ENFORCED")).then_some((table, name, definition))
}

/// Matviews and functions that pg_dump held back to post-data because they need a primary key.
/// What is built on them has to come after them.
#[derive(Default)]
struct Late {
    relations: Vec<QualifiedName>,
    functions: Vec<String>,
}

impl Late {
    fn of(statements: &[Statement]) -> Late {
        let mut late = Late::default();
        for statement in statements {
            let mut cursor = Cursor::new(&statement.sql);
            if !cursor.eat("create") {
                continue;
            }
            cursor.eat("or replace");
            if cursor.eat("materialized view") {
                late.relations.extend(cursor.name());
            } else if cursor.eat("function") || cursor.eat("procedure") {
                late.functions.extend(cursor.name().map(|name| name.name));
            }
        }
        late
    }

    /// Constraints never wait: they cannot be on a matview, and a foreign key may need them.
    fn touches(&self, sql: &str, locks: &[Lock]) -> bool {
        if locks.iter().any(|lock| self.relations.contains(&lock.table)) {
            return true;
        }
        let is_index = locks.iter().any(|lock| !lock.exclusive);
        is_index
            && !self.functions.is_empty()
            && Cursor::new(sql)
                .tokens()
                .iter()
                .filter_map(|token| token.ident())
                .any(|ident| self.functions.contains(&ident))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waves(post: &str) -> Vec<(Wave, String)> {
        let steps = steps(post, &HashMap::new()).unwrap();
        steps.into_iter().map(|s| (s.wave, s.statement.sql)).collect()
    }

    #[test]
    fn statements_are_put_in_the_wave_they_belong_to() {
        let cases = [
            ("CREATE UNIQUE INDEX i ON public.t USING btree (a)", Wave::Build),
            ("ALTER TABLE ONLY public.t ADD CONSTRAINT \"c d\" PRIMARY KEY (a)", Wave::Build),
            ("ALTER TABLE ONLY a.t ADD CONSTRAINT c EXCLUDE USING gist (r WITH &&)", Wave::Build),
            ("ALTER INDEX public.p_i ATTACH PARTITION public.\"P1 i\"", Wave::Attach),
            ("ALTER INDEX public.i ALTER COLUMN 1 SET STATISTICS 9", Wave::Mark),
            ("ALTER TABLE public.t CLUSTER ON i", Wave::Mark),
            ("ALTER TABLE ONLY public.t REPLICA IDENTITY USING INDEX i", Wave::Mark),
            (
                "ALTER TABLE a.t ADD CONSTRAINT f FOREIGN KEY (x) REFERENCES b.u(y)",
                Wave::ForeignKey,
            ),
            ("ALTER TABLE public.t ADD CONSTRAINT c CHECK ((a > 0)) NOT VALID", Wave::Rest),
            ("CREATE TRIGGER r BEFORE UPDATE ON public.t EXECUTE FUNCTION f()", Wave::Rest),
            ("ALTER TABLE public.t ENABLE ROW LEVEL SECURITY", Wave::Rest),
            ("COMMENT ON CONSTRAINT c ON public.t IS 'x'", Wave::Rest),
            ("CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION f()", Wave::EventTrigger),
            ("COMMENT ON EVENT TRIGGER e IS 'x'", Wave::EventTrigger),
        ];
        for (sql, wave) in cases {
            assert_eq!(classify(sql).0, wave, "{sql}");
        }
    }

    #[test]
    fn pgstream_1094_partition_indexes_are_attached_after_all_are_built() {
        let order = waves(
            "CREATE INDEX p_i ON ONLY public.p (a); ALTER INDEX public.p_i ATTACH PARTITION \
             public.c_i; CREATE INDEX c_i ON public.c (a); \
             ALTER TABLE public.x ADD CONSTRAINT f FOREIGN KEY (a) REFERENCES public.p(a); \
             ALTER TABLE ONLY public.p ADD CONSTRAINT u UNIQUE (a)",
        );
        let order: Vec<Wave> = order.into_iter().map(|(wave, _)| wave).collect();
        assert_eq!(order, [Wave::Build, Wave::Build, Wave::Build, Wave::Attach, Wave::ForeignKey]);
    }

    #[test]
    fn what_a_primary_key_held_back_keeps_its_order() {
        let order = waves(
            "CREATE INDEX m_i ON public.m (a); CREATE INDEX t_i ON public.t (late(a)); \
             CREATE INDEX u_i ON public.u (a); \
             CREATE MATERIALIZED VIEW public.m AS SELECT 1 a; CREATE FUNCTION public.late(int)",
        );
        assert_eq!(order[0], (Wave::Build, "CREATE INDEX u_i ON public.u (a)".to_string()));
        assert!(order[1..].iter().all(|(wave, _)| *wave == Wave::Rest));
    }

    #[test]
    fn the_largest_table_comes_first_and_locks_tell_what_may_run_beside_it() {
        let bytes = HashMap::from([(QualifiedName::new("public", "big"), 1000)]);
        let post = "CREATE INDEX a ON public.small (a); CREATE INDEX b ON public.big (a); \
                    CREATE INDEX c ON public.big (b); \
                    ALTER TABLE ONLY public.big ADD CONSTRAINT d UNIQUE (c)";
        let steps = steps(post, &bytes).unwrap();
        assert_eq!(steps[3].statement.sql, "CREATE INDEX a ON public.small (a)");
        assert!(steps[0].is_free_of(&steps[1]), "two CREATE INDEX on one table");
        assert!(!steps[0].is_free_of(&steps[2]), "CREATE INDEX beside ADD CONSTRAINT");
        assert!(steps[2].is_free_of(&steps[3]), "different tables");
    }

    #[test]
    fn what_acts_on_written_rows_is_told_from_the_rest() {
        let key =
            "ALTER TABLE ONLY a.t\n    ADD CONSTRAINT \"f k\" FOREIGN KEY (x) REFERENCES b.u(y)";
        for sql in [
            key,
            "CREATE TRIGGER r BEFORE UPDATE ON public.t EXECUTE FUNCTION f()",
            "CREATE CONSTRAINT TRIGGER r AFTER UPDATE ON public.t EXECUTE FUNCTION f()",
            "CREATE RULE r AS ON INSERT TO public.t DO INSTEAD NOTHING",
            "ALTER TABLE public.t DISABLE TRIGGER r",
            "ALTER TABLE public.t ENABLE ROW LEVEL SECURITY",
            "COMMENT ON TRIGGER r ON public.t IS 'x'",
        ] {
            assert!(acts(sql), "{sql}");
        }
        for sql in [
            "CREATE POLICY p ON public.t",
            "CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION f()",
            "ALTER TABLE public.t ADD CONSTRAINT c CHECK ((a > 0)) NOT VALID",
            "REFRESH MATERIALIZED VIEW public.m",
            "COMMENT ON TABLE public.t IS 'x'",
        ] {
            assert!(!acts(sql), "{sql}");
        }
        let keeps = |kept: &'static str| move |table: &QualifiedName| table.schema == kept;
        assert!(crosses(key, keeps("a")) && !crosses(key, |_| true));
        assert!(!crosses("CREATE RULE r AS ON INSERT TO public.t DO INSTEAD NOTHING", |_| false));
        assert!(!crosses("ALTER TABLE ONLY a.p ATTACH PARTITION b.c DEFAULT", keeps("a")));
        let (table, name, definition) = foreign_key(key).unwrap();
        assert_eq!((table.to_string(), &*name), ("a.t".to_string(), "f k"));
        assert_eq!(definition, "FOREIGN KEY (x) REFERENCES b.u(y)");
        assert_eq!(foreign_key(&format!("{key} NOT VALID")), None);
        assert_eq!(foreign_key(&key.replace(" ONLY", "")), None);
    }

    #[test]
    fn equal_statements_have_ids_of_their_own_and_keep_them() {
        let ids = |post: &str| -> Vec<String> {
            steps(post, &HashMap::new()).unwrap().into_iter().map(|s| s.id).collect()
        };
        let twice = ids("SELECT 1; SELECT 1; SELECT 2");
        assert_eq!(twice, ids("SELECT 1; SELECT 1; SELECT 2"));
        assert_ne!(twice[0], twice[1]);
        assert_ne!(twice[0], twice[2]);
    }

    #[test]
    fn tables_a_statement_needs_beside_its_own_are_told() {
        let names =
            |sql| -> Vec<String> { other_tables(sql).iter().map(ToString::to_string).collect() };
        assert_eq!(
            names("ALTER TABLE ONLY a.t ADD CONSTRAINT f FOREIGN KEY (x) REFERENCES b.u(y)"),
            ["a.t", "b.u"]
        );
        assert_eq!(names("ALTER INDEX a.i ATTACH PARTITION a.j"), ["a.i", "a.j"]);
        assert_eq!(names("ALTER TABLE ONLY a.p ATTACH PARTITION a.c DEFAULT"), ["a.p", "a.c"]);
        assert!(names("ALTER TABLE a.p ADD CONSTRAINT c CHECK (true)").is_empty());
    }
}
