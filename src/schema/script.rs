//! pg_dump's output as statements. Pure.
//!
//! Cutting at every `;` would break function bodies, rules and quoted names, so the text is read
//! the way psql reads it: quotes, dollar quotes, comments, parentheses (the actions of a rule), and
//! the `BEGIN ATOMIC ... END` bodies of SQL functions.

use super::lex::{Cursor, Kind, LexError, Lexer, Token};

/// A statement and the settings that were in force where it stood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// The text, without the semicolon and without leading comments.
    pub sql: String,
    /// `name = value` of the SETs before it, newest value only, in order of first appearance.
    pub settings: Vec<(String, String)>,
}

/// Cuts a script into statements, without their semicolons. psql's own lines (`\restrict`,
/// `\unrestrict`: pgcopydb#947) and comments between statements are dropped.
pub fn split(text: &str) -> Result<Vec<&str>, LexError> {
    let mut statements = Vec::new();
    let mut lexer = Lexer::new(text);
    let mut open: Option<Open> = None;
    while let Some(token) = lexer.next() {
        let token = token?;
        let Some(statement) = &mut open else {
            match token.kind {
                Kind::Space | Kind::Comment => {}
                Kind::Sign if token.is_sign('\\') => lexer.skip_line(token.start),
                Kind::Sign if token.is_sign(';') => {}
                _ => open = Some(Open::new(&token)),
            }
            continue;
        };
        if token.is_sign(';') && statement.is_level() {
            statements.extend(text.get(statement.start..statement.end));
            open = None;
        } else {
            statement.see(&token);
        }
    }
    if let Some(statement) = open {
        statements.extend(text.get(statement.start..statement.end));
    }
    Ok(statements)
}

/// A statement whose end has not been seen.
struct Open {
    start: usize,
    end: usize,
    parentheses: usize,
    /// Depth of BEGIN ATOMIC and CASE inside of it.
    blocks: usize,
    words: usize,
    creates: bool,
    routine: bool,
    after_begin: bool,
}

impl Open {
    fn new(first: &Token<'_>) -> Self {
        let mut open = Open {
            start: first.start,
            end: first.end(),
            parentheses: 0,
            blocks: 0,
            words: 0,
            creates: false,
            routine: false,
            after_begin: false,
        };
        open.see(first);
        open
    }

    fn is_level(&self) -> bool {
        self.parentheses == 0 && self.blocks == 0
    }

    fn see(&mut self, token: &Token<'_>) {
        match token.kind {
            Kind::Space | Kind::Comment => return,
            Kind::Sign if token.is_sign('(') => self.parentheses += 1,
            Kind::Sign if token.is_sign(')') => {
                self.parentheses = self.parentheses.saturating_sub(1);
            }
            Kind::Word => self.word(token),
            _ => {}
        }
        self.after_begin = token.is("begin");
        self.end = token.end();
    }

    fn word(&mut self, token: &Token<'_>) {
        self.words += 1;
        self.creates |= self.words == 1 && token.is("create");
        // CREATE [OR REPLACE] FUNCTION | PROCEDURE
        let named = token.is("function") || token.is("procedure");
        self.routine |= self.creates && self.words <= 4 && named;
        if !self.routine {
            return;
        }
        if self.blocks == 0 {
            self.blocks = usize::from(self.after_begin && token.is("atomic"));
        } else if token.is("case") {
            self.blocks += 1;
        } else if token.is("end") {
            self.blocks -= 1;
        }
    }
}

/// The statements of a dump with the settings each was meant to run under. SETs themselves are
/// taken out: statements are later run in another order and by several sessions.
///
/// `search_path` and `client_encoding` are left out: every session of ours has the same ones.
pub fn statements(text: &str) -> Result<Vec<Statement>, LexError> {
    let mut statements = Vec::new();
    let mut settings: Vec<(String, String)> = Vec::new();
    for sql in split(text)? {
        match setting(sql) {
            Some((name, _)) if name == "search_path" || name == "client_encoding" => {}
            Some((name, value)) => match settings.iter_mut().find(|(known, _)| *known == name) {
                Some(known) => known.1 = value,
                None => settings.push((name, value)),
            },
            None => statements.push(Statement { sql: sql.to_string(), settings: settings.clone() }),
        }
    }
    Ok(statements)
}

/// The statement without a column's `pg_attver`; none if it sets nothing else.
///
/// Minor releases of November 2026 (15.20) keep a column's version among its options, and a pg_dump
/// from before prints it as one. Such a server sets its own; any other refuses the name.
pub fn without_column_version(sql: &str) -> Option<String> {
    let Some((before, rest)) = sql.split_once("pg_attver=") else {
        return Some(sql.to_string());
    };
    let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit());
    if let Some(rest) = rest.strip_prefix(", ") {
        return Some(format!("{before}{rest}"));
    }
    before.strip_suffix(", ").map(|before| format!("{before}{rest}"))
}

/// The name and the value, as written, of `SET name = value` or of pg_dump's
/// `SELECT pg_catalog.set_config('search_path', '', false)`.
pub fn setting(sql: &str) -> Option<(String, String)> {
    let mut cursor = Cursor::new(sql);
    if cursor.eat("select pg_catalog") {
        cursor.step();
        cursor.eat("set_config").then_some(())?;
        cursor.step();
        let name = cursor.peek()?.text.trim_matches('\'').to_string();
        cursor.step();
        cursor.step();
        return Some((name, cursor.peek()?.text.to_string()));
    }
    cursor.eat("set").then_some(())?;
    if cursor.peek()?.is("session") || cursor.peek()?.is("local") {
        return None;
    }
    let name = cursor.ident()?;
    let sign = *cursor.peek()?;
    (sign.is_sign('=') || sign.is("to")).then_some(())?;
    Some((name, sql.get(sign.end()..)?.trim().to_string()))
}

/// Roles that a statement names as owner, grantee, or subject of a policy, PUBLIC and the like
/// left out.
pub fn roles(sql: &str) -> Vec<String> {
    let mut cursor = Cursor::new(sql);
    let mut roles = Vec::new();
    if cursor.eat("grant") || cursor.eat("revoke") {
        last_list(&mut cursor, &["to", "from"], &mut roles);
    } else if cursor.eat("alter default privileges") {
        if cursor.find("role") {
            list(&mut cursor, &mut roles);
        }
        last_list(&mut cursor, &["to", "from"], &mut roles);
    } else if cursor.eat("create policy") {
        cursor.step();
        let mut depth = 0_usize;
        while let Some(token) = cursor.peek().copied() {
            cursor.step();
            depth += usize::from(token.is_sign('('));
            depth = depth.saturating_sub(usize::from(token.is_sign(')')));
            if depth == 0 && token.is("to") {
                list(&mut cursor, &mut roles);
                break;
            }
            if token.is("using") || token.is("with") {
                break;
            }
        }
    } else if cursor.eat("alter") {
        while cursor.find("owner") {
            if cursor.eat("to") {
                list(&mut cursor, &mut roles);
            }
        }
    }
    let special = ["public", "current_user", "current_role", "session_user"];
    roles.retain(|role| !special.contains(&role.as_str()));
    roles
}

/// The list behind the last of these keywords.
fn last_list(cursor: &mut Cursor<'_>, keywords: &[&str], roles: &mut Vec<String>) {
    let mut last = None;
    while let Some(token) = cursor.peek().copied() {
        cursor.step();
        if keywords.iter().any(|k| token.is(k)) {
            last = Some(cursor.clone());
        }
    }
    if let Some(mut cursor) = last {
        list(&mut cursor, roles);
    }
}

fn list(cursor: &mut Cursor<'_>, roles: &mut Vec<String>) {
    while let Some(role) = cursor.ident() {
        roles.push(role);
        if !cursor.peek().is_some_and(|t| t.is_sign(',')) {
            return;
        }
        cursor.step();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn versions_of_columns_are_cut_out_of_their_options() {
        let cut = |options: &str| {
            without_column_version(&format!("ALTER TABLE ONLY t ALTER COLUMN a SET ({options})"))
        };
        assert_eq!(cut("pg_attver=12"), None);
        for options in ["pg_attver=12, n_distinct=5", "n_distinct=5, pg_attver=12"] {
            assert_eq!(cut(options), cut("n_distinct=5"));
        }
        assert!(cut("n_distinct=5").unwrap().ends_with("(n_distinct=5)"));
    }

    #[test]
    fn semicolons_inside_of_things_do_not_cut() {
        let whole = [
            "SELECT 'a;b', 'it''s; -- no comment', \"x;\"\"y\"",
            "SELECT E'a\\';b\\\\', e'\\\\'",
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS $_$ select 1; select $$;$$; $_$",
            "SELECT a$b$c, $1 /* one /* two; */ ; */ + 2 -- three;\n + 3",
            "CREATE RULE r AS ON INSERT TO t DO ALSO ( DELETE FROM a; DELETE FROM b; )",
            "CREATE TABLE \"odd\n;name\" (\"a;b\" int)",
            "CREATE OR REPLACE PROCEDURE p()\n BEGIN ATOMIC\n SELECT CASE WHEN true THEN 1 \
             ELSE CASE 2 WHEN 2 THEN 3 END END;\n INSERT INTO t VALUES (1);\nEND",
            "CREATE TABLE case_begin (begin int, atomic int)",
        ];
        let script = whole.join(";\n-- between; them\n") + ";\n";
        assert_eq!(split(&script).unwrap(), whole);
    }

    #[test]
    fn pgcopydb_947_lines_for_psql_are_dropped() {
        let script =
            "--\n-- dump\n--\n\n\\restrict aB;c'1\n\nSET a = 1;\nSELECT 1;\n\n\\unrestrict x\n";
        assert_eq!(split(script).unwrap(), ["SET a = 1", "SELECT 1"]);
    }

    #[test]
    fn what_is_never_closed_is_an_error_with_its_line() {
        for (text, line) in
            [("select 1;\nselect 'x", 2), ("/* /* */", 1), ("\n\n$a$ x $b$", 3), ("\"", 1)]
        {
            assert_eq!(split(text).unwrap_err().line, line, "{text}");
        }
    }

    #[test]
    fn settings_travel_with_the_statements_they_were_meant_for() {
        let script = "SET a = 'x;y';\nSELECT pg_catalog.set_config('search_path', '', false);\n\
                      SET client_encoding = 'UTF8';\nCREATE TABLE t ();\nSET b = '';SET a = on;\n\
                      CREATE INDEX i;";
        let statements = statements(script).unwrap();
        let pair = |a: &str, b: &str| (a.to_string(), b.to_string());
        assert_eq!(statements.len(), 2);
        assert_eq!(statements[0].settings, [pair("a", "'x;y'")]);
        assert_eq!(statements[1].settings, [pair("a", "on"), pair("b", "''")]);
    }

    #[test]
    fn roles_are_found_where_pg_dump_names_them() {
        let cases: [(&str, &[&str]); 7] = [
            ("ALTER TABLE public.t OWNER TO \"Bob\"", &["Bob"]),
            (
                "GRANT SELECT(\"to\"),UPDATE(b) ON TABLE public.t TO alice WITH GRANT OPTION",
                &["alice"],
            ),
            ("REVOKE ALL ON SCHEMA public FROM PUBLIC", &[]),
            (
                "ALTER DEFAULT PRIVILEGES FOR ROLE a IN SCHEMA s GRANT SELECT ON TABLES TO b",
                &["a", "b"],
            ),
            ("CREATE POLICY p ON public.t FOR SELECT TO x, \"Y\" USING ((a = 1))", &["x", "Y"]),
            ("CREATE POLICY p ON public.t USING ((a = 1))", &[]),
            ("ALTER TABLE public.t ADD COLUMN owner int", &[]),
        ];
        for (sql, expected) in cases {
            assert_eq!(roles(sql), expected, "{sql}");
        }
    }

    fn piece() -> impl Strategy<Value = String> {
        let body = "[a-z0-9;'\"$ \n\\-/*().\\\\é]{0,12}";
        prop_oneof![
            body.prop_map(|s| format!("'{}'", s.replace('\'', "''"))),
            body.prop_map(|s| format!("\"{}\"", s.replace('"', "\"\""))),
            body.prop_map(|s| format!("E'{}'", s.replace('\\', "\\\\").replace('\'', "\\'"))),
            body.prop_map(|s| format!("$q${}$q$", s.replace('$', ""))),
            body.prop_map(|s| format!("/*{}*/", s.replace(['*', '/'], ""))),
            body.prop_map(|s| format!("--{}\nx", s.replace('\n', ""))),
            "[a-z_][a-z0-9_$]{0,5}".prop_map(|s| s),
            Just("(;)".to_string()),
            Just("$1 + 2".to_string()),
        ]
    }

    proptest! {
        #[test]
        fn what_was_joined_is_split_again(
            parts in prop::collection::vec(prop::collection::vec(piece(), 1..6), 0..6)
        ) {
            // A statement starts and ends with a word: comments at its ends are not part of it.
            let parts: Vec<String> =
                parts.iter().map(|p| format!("ALTER {} x", p.join(" "))).collect();
            let script: String = parts.iter().map(|p| format!("{p};\n")).collect();
            prop_assert_eq!(split(&script).unwrap(), parts);
        }

        #[test]
        fn any_text_is_read_without_panic(text in ".{0,80}") {
            let _ = statements(&text);
            let _ = roles(&text);
        }

        #[test]
        fn tokens_cover_the_text(text in "[a-z'\"$ ;\n\\-/*(é]{0,40}") {
            let tokens: Result<Vec<_>, _> = Lexer::new(&text).collect();
            if let Ok(tokens) = tokens {
                let joined: String = tokens.iter().map(|t| t.text).collect();
                prop_assert_eq!(joined, text);
            }
        }
    }
}
