//! A schema for a server that is older than the one it was read from. Pure.
//!
//! pg_dump writes for servers of its source's version or later. Of what an older one refuses, this
//! knows three kinds: what says nothing of rows and is left out or written the old way (storage,
//! planner, a right that is not there yet); what would mean something else without its clause, and
//! is refused by name, by `check` before anything is made; and what nobody listed, which the server
//! itself refuses when it is made, with nothing left behind.
//!
//! <https://www.postgresql.org/docs/release/>

use std::ops::Range;

use super::lex::{Cursor, LexError, Token};
use super::{Dump, script};
use crate::id::QualifiedName;

/// What an older server will not take.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TooNew {
    /// The object, as in `table public.t`.
    pub object: String,
    /// What of it, in SQL's words.
    pub what: &'static str,
    /// The first major version that has it.
    pub since: u32,
}

/// A schema for an older server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fitted {
    /// The statements that are left.
    pub dump: Dump,
    /// What was left out of them, as it says nothing of rows; a sentence each.
    pub left_out: Vec<String>,
    /// What cannot be left out.
    pub refused: Vec<TooNew>,
}

/// In statements that begin so, this clause is refused before that major version. In clauses, `*`
/// is any token, `@` an identifier.
type Rule = (&'static [&'static str], &'static str, &'static str, u32);

const REFUSED: &[Rule] = &[
    (&["create procedure"], "", "a procedure", 11),
    (&["create table"], "partition by hash", "PARTITION BY HASH", 11),
    (&["alter table"], "attach partition @ . @ default", "a DEFAULT partition", 11),
    (&["create index", "create unique index", "alter table"], ") include (", "INCLUDE", 11),
    (&["create collation"], "deterministic = false", "a nondeterministic collation", 12),
    (&["create function", "create procedure"], "begin atomic", "BEGIN ATOMIC", 14),
    (&["create unique index", "alter table"], "nulls not distinct", "NULLS NOT DISTINCT", 15),
    (&["create view"], "security_invoker =", "security_invoker", 15),
    (&["alter table"], "on delete set null (", "ON DELETE SET NULL of columns", 15),
    (&["alter table"], "on delete set default (", "ON DELETE SET DEFAULT of columns", 15),
    (&["create collation"], "rules =", "a collation's rules", 16),
    (&["create collation"], "provider = builtin", "a builtin collation", 17),
    (&["create event trigger"], "on login", "an event trigger ON login", 17),
    (&["alter table", "create table"], "not enforced", "NOT ENFORCED", 18),
    (&["alter table"], "without overlaps", "WITHOUT OVERLAPS", 18),
    (&["alter table"], ", period @", "a PERIOD foreign key", 18),
    (&["alter table", "create table"], "not null no inherit", "NOT NULL NO INHERIT", 18),
    (&["alter table"], "add constraint @ not null", "NOT NULL as a constraint", 18),
    (&["create table"], ", constraint @ not null @", "NOT NULL as a constraint", 18),
    (&["create table"], "( constraint @ not null @", "NOT NULL as a constraint", 18),
];

/// Statements that are of no matter to rows.
const DROPPED: &[(&str, &str, u32)] = &[
    ("alter index", "set statistics", 11),
    ("create statistics", "mcv", 12),
    ("alter statistics", "set statistics", 13),
    ("alter table", "set compression", 14),
    ("alter materialized view", "set compression", 14),
    ("alter sequence", "set logged", 15),
    ("alter sequence", "set unlogged", 15),
];

/// Storage parameters by the version that has them; those of a table's TOAST as well.
const PARAMETERS: &[(&str, u32)] = &[
    ("toast_tuple_target", 11),
    ("vacuum_index_cleanup", 12),
    ("vacuum_truncate", 12),
    ("deduplicate_items", 13),
    ("autovacuum_vacuum_insert_threshold", 13),
    ("autovacuum_vacuum_insert_scale_factor", 13),
    ("autovacuum_vacuum_max_threshold", 18),
    ("vacuum_max_eager_freeze_failure_rate", 18),
];

/// The schema as a server of major version `major` can take it, as far as is known here.
pub fn fit(dump: &Dump, major: u32) -> Result<Fitted, LexError> {
    let mut fit = Fit { major, ..Fit::default() };
    let pre = fit.script(&dump.pre)?;
    let post = fit.script(&dump.post)?;
    fit.refused.sort();
    fit.refused.dedup();
    Ok(Fitted { dump: Dump { pre, post }, left_out: fit.left_out, refused: fit.refused })
}

/// What is known so far of the statements read.
#[derive(Default)]
struct Fit {
    major: u32,
    /// Partitioned tables.
    trees: Vec<QualifiedName>,
    /// Statistics objects that were left out.
    gone: Vec<QualifiedName>,
    left_out: Vec<String>,
    refused: Vec<TooNew>,
}

impl Fit {
    fn script(&mut self, text: &str) -> Result<String, LexError> {
        let mut out = String::with_capacity(text.len());
        for sql in script::split(text)? {
            let cursor = Cursor::new(sql);
            self.refuse(&cursor);
            if self.is_dropped(&cursor) {
                self.left_out.push(brief(sql));
                continue;
            }
            let edits = edits(sql, &cursor, self.major);
            for what in edits.iter().filter_map(|edit| edit.lost.as_ref()) {
                self.left_out.push(format!("{what} of {}", object(&cursor)));
            }
            if let Some(sql) = edited(sql, edits) {
                out.push_str(&sql);
                out.push_str(";\n");
            }
        }
        Ok(out)
    }

    fn refuse(&mut self, cursor: &Cursor<'_>) {
        let mut refuse = |what, since| {
            if self.major < since {
                self.refused.push(TooNew { object: object(cursor), what, since });
            }
        };
        for (starts, clause, what, since) in REFUSED {
            if starts.iter().any(|start| begins(cursor, start).is_some()) && has(cursor, clause) {
                refuse(what, *since);
            }
        }
        match generated(cursor.tokens()) {
            Some(true) => refuse("GENERATED ... STORED", 12),
            Some(false) => refuse("GENERATED ... VIRTUAL", 18),
            None => {}
        }
        let Some((table, what)) = table_of(cursor) else { return };
        if begins(cursor, "create table").is_some() && has(cursor, "partition by") {
            self.trees.push(table);
            return;
        }
        let key = has(cursor, "add constraint @ foreign key");
        let mut referenced = cursor.clone();
        if key
            && referenced.find("references")
            && referenced.name().is_some_and(|t| self.trees.contains(&t))
        {
            refuse("a foreign key to a partitioned table", 12);
        }
        if !self.trees.contains(&table) {
            return;
        }
        if key || ["primary key", "unique"].iter().any(|k| has(cursor, &format!("@ {k}"))) {
            refuse("a key of a partitioned table", 11);
        } else if has(cursor, "add constraint @ exclude") {
            refuse("an exclusion constraint of a partitioned table", 17);
        } else if what == "index" {
            refuse("an index of a partitioned table", 11);
        } else if what == "trigger" && has(cursor, "for each row") {
            let before = has(cursor, "before");
            refuse("a row trigger of a partitioned table", if before { 13 } else { 11 });
        }
    }

    fn is_dropped(&mut self, cursor: &Cursor<'_>) -> bool {
        let statistics = statistics_of(cursor);
        if statistics.as_ref().is_some_and(|name| self.gone.contains(name)) {
            return true;
        }
        let dropped = DROPPED.iter().any(|(start, clause, since)| {
            self.major < *since && begins(cursor, start).is_some() && has(cursor, clause)
        });
        let makes = begins(cursor, "create statistics").is_some();
        // Its kinds are in parentheses too, but before ON.
        let of_expressions = makes && after(cursor.tokens(), "on").iter().any(|t| t.is_sign('('));
        if !(dropped || of_expressions && self.major < 14) {
            return false;
        }
        if makes {
            self.gone.extend(statistics);
        }
        true
    }
}

/// A piece of a statement that is written in another way.
struct Edit {
    range: Range<usize>,
    text: String,
    /// What is left out by it; `None` if it means the same.
    lost: Option<String>,
}

/// What of a statement an older server wants in another way.
fn edits(sql: &str, cursor: &Cursor<'_>, major: u32) -> Vec<Edit> {
    let tokens = cursor.tokens();
    let mut edits = Vec::new();
    let begins = |start: &str| begins(cursor, start).is_some();
    if major < 11 && begins("create") && !begins("create function") {
        // Two words for the same.
        edits.extend(find(tokens, "execute function").and_then(|at| {
            let range = tokens.get(at + 1)?.start..tokens.get(at + 1)?.end();
            Some(Edit { range, text: "PROCEDURE".to_string(), lost: None })
        }));
    }
    if major < 15 && begins("create unlogged sequence") {
        edits.extend(tokens.get(1).map(|token| Edit {
            range: token.start..token.end(),
            text: String::new(),
            lost: Some("UNLOGGED".to_string()),
        }));
    }
    if major < 14 && begins("create type") {
        let known =
            |item: &[Token<'_>]| !item.first().is_some_and(|t| t.is("multirange_type_name"));
        edits.extend(
            find(tokens, "as range (")
                .and_then(|at| List { sql, tokens, end: ")" }.without(at + 2, at + 3, known)),
        );
    }
    let stores = ["create table", "create unlogged table", "create index", "create unique index"];
    if stores.into_iter().chain(["create materialized view"]).any(begins) {
        let known = |item: &[Token<'_>]| {
            let name = item.iter().take_while(|token| !token.is_sign('=')).last();
            !PARAMETERS.iter().any(|(p, since)| major < *since && name.is_some_and(|n| n.is(p)))
        };
        edits.extend(
            find(tokens, "with (")
                .and_then(|at| List { sql, tokens, end: ")" }.without(at, at + 2, known)),
        );
    }
    if major < 17 && (begins("grant") || begins("revoke") || begins("alter default privileges")) {
        let at = tokens.iter().position(|token| token.is("grant") || token.is("revoke"));
        let known = |item: &[Token<'_>]| !item.last().is_some_and(|token| token.is("maintain"));
        edits.extend(
            at.and_then(|at| List { sql, tokens, end: "on" }.without(at + 1, at + 1, known)),
        );
    }
    edits
}

/// A list in a statement.
struct List<'a> {
    sql: &'a str,
    tokens: &'a [Token<'a>],
    /// What ends it: a parenthesis or a keyword.
    end: &'static str,
}

impl List<'_> {
    /// The list whose first item begins with the token `first`, without the items that are not
    /// known; nothing at all from the token `whole` on if none is left. `None` if all are known.
    fn without(
        &self,
        whole: usize,
        first: usize,
        known: impl Fn(&[Token<'_>]) -> bool,
    ) -> Option<Edit> {
        let rest = self.tokens.get(first..)?;
        let mut depth = 0_usize;
        let length = rest.iter().position(|token| {
            let ends = depth == 0 && (token.text.eq_ignore_ascii_case(self.end));
            depth += usize::from(token.is_sign('('));
            depth = depth.saturating_sub(usize::from(token.is_sign(')')));
            ends
        })?;
        let items = rest.get(..length)?.split(|token| token.is_sign(','));
        let (kept, lost): (Vec<_>, Vec<_>) = items.partition(|item| known(item));
        if lost.is_empty() {
            return None;
        }
        let end = rest.get(length)?;
        let range = if kept.is_empty() {
            let end = if end.is_sign(')') { end.end() } else { end.start };
            self.tokens.get(whole)?.start..end
        } else {
            rest.first()?.start..rest.get(length - 1)?.end()
        };
        Some(Edit { range, text: self.text(&kept), lost: Some(self.text(&lost)) })
    }

    fn text(&self, items: &[&[Token<'_>]]) -> String {
        let texts =
            items.iter().filter_map(|item| self.sql.get(item.first()?.start..item.last()?.end()));
        texts.collect::<Vec<_>>().join(", ")
    }
}

/// The statement with its edits; `None` if a GRANT grants nothing any more.
fn edited(sql: &str, edits: Vec<Edit>) -> Option<String> {
    if edits.is_empty() {
        return Some(sql.to_string());
    }
    let mut out = String::with_capacity(sql.len());
    let mut at = 0;
    for edit in edits {
        out.push_str(sql.get(at..edit.range.start)?);
        out.push_str(&edit.text);
        at = edit.range.end;
    }
    out.push_str(sql.get(at..)?);
    let cursor = Cursor::new(&out);
    (!has(&cursor, "grant on") && !has(&cursor, "revoke on")).then_some(out)
}

/// The cursor behind these words, if the statement begins with them.
fn begins<'a>(cursor: &Cursor<'a>, words: &str) -> Option<Cursor<'a>> {
    let mut cursor = cursor.clone();
    cursor.eat(words).then_some(cursor)
}

fn has(cursor: &Cursor<'_>, clause: &str) -> bool {
    find(cursor.tokens(), clause).is_some()
}

/// Where a clause is; see [`Rule`].
fn find(tokens: &[Token<'_>], clause: &str) -> Option<usize> {
    let words: Vec<&str> = clause.split(' ').filter(|word| !word.is_empty()).collect();
    (0..tokens.len()).find(|at| {
        let tokens = tokens.get(*at..).unwrap_or_default();
        tokens.len() >= words.len()
            && words.iter().zip(tokens).all(|(word, token)| match word.chars().next() {
                Some('*') => true,
                Some('@') => token.ident().is_some(),
                Some(sign) if sign.is_ascii_punctuation() => token.is_sign(sign),
                _ => token.is(word),
            })
    })
}

/// What stands behind a keyword.
fn after<'a, 'b>(tokens: &'b [Token<'a>], keyword: &str) -> &'b [Token<'a>] {
    let at = tokens.iter().position(|token| token.is(keyword));
    at.and_then(|at| tokens.get(at + 1..)).unwrap_or_default()
}

/// Whether a generated column is stored; of several the newest kind.
fn generated(tokens: &[Token<'_>]) -> Option<bool> {
    let mut found = None;
    let mut rest = tokens;
    while let Some(at) = find(rest, "generated always as (") {
        rest = rest.get(at + 4..).unwrap_or_default();
        let mut depth = 1_usize;
        let close = rest.iter().position(|token| {
            depth += usize::from(token.is_sign('('));
            depth -= usize::from(token.is_sign(')'));
            depth == 0
        });
        let stored = close.and_then(|at| rest.get(at + 1)).is_some_and(|t| t.is("stored"));
        found = Some(found.unwrap_or(true) && stored);
    }
    found
}

fn statistics_of(cursor: &Cursor<'_>) -> Option<QualifiedName> {
    let starts = ["create statistics", "alter statistics", "comment on statistics"];
    starts.iter().find_map(|start| begins(cursor, start))?.name()
}

/// The table that a statement makes, changes or adds to, and the word for what it adds.
fn table_of(cursor: &Cursor<'_>) -> Option<(QualifiedName, &'static str)> {
    for start in ["create table", "create unlogged table", "alter table only", "alter table"] {
        if let Some(mut rest) = begins(cursor, start) {
            return Some((rest.name()?, "table"));
        }
    }
    for (start, what) in [
        ("create index", "index"),
        ("create unique index", "index"),
        ("create trigger", "trigger"),
        ("create constraint trigger", "trigger"),
    ] {
        if let Some(mut rest) = begins(cursor, start) {
            rest.find("on");
            rest.eat("only");
            return Some((rest.name()?, what));
        }
    }
    None
}

/// The object that a statement is about, for a message.
fn object(cursor: &Cursor<'_>) -> String {
    if let Some((table, what)) = table_of(cursor) {
        let tokens = cursor.tokens();
        let name = match what {
            "table" => find(tokens, "add constraint @").and_then(|at| tokens.get(at + 2)),
            "index" => find(tokens, "index @").and_then(|at| tokens.get(at + 1)),
            _ => find(tokens, "trigger @").and_then(|at| tokens.get(at + 1)),
        };
        let what = if what == "table" { "constraint" } else { what };
        return match name.and_then(Token::ident) {
            Some(name) => format!("{what} {name} of table {table}"),
            None => format!("table {table}"),
        };
    }
    let mut rest = cursor.clone();
    for word in ["create", "or", "replace", "unlogged", "procedural"] {
        rest.eat(word);
    }
    let mut kind = Vec::new();
    while let Some(word) = rest.ident() {
        if rest.peek().is_some_and(|token| token.is_sign('.')) {
            rest.step();
            let name = QualifiedName::new(word, rest.ident().unwrap_or_default());
            return format!("{} {name}", kind.join(" "));
        }
        kind.push(word);
        if kind.len() == 3 {
            break;
        }
    }
    kind.join(" ")
}

/// The start of a statement, in one line.
fn brief(sql: &str) -> String {
    const SHOWN: usize = 100;
    let line = sql.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{} ...", line.get(..at).unwrap_or_default()),
        None => line,
    }
}

#[cfg(test)]
mod tests;
