//! DDL captured on the source by an event trigger, and carried in the stream at its place.
//!
//! An event trigger runs inside the statement's own transaction, so a row that it writes stands in
//! the log just behind what the statement did, and goes if the statement is rolled back. The row
//! has the text of what the client sent, and the search_path and role it was run under. A table
//! that is new is added to the publication there and then, so that its very first row is in the
//! stream.
//!
//! What a client sent may be several statements; the event trigger is told only of each that there
//! was one. So the row also counts how many came before it in the same text, and the statement is
//! found again by its place, here. Where that is not certain (a function or a DO block ran it,
//! something in the text was rolled back) it is said so, and never guessed.
//!
//! The function never fails the statement that it looks at: what it cannot write down is a WARNING
//! to the client, and is noticed by the stream when it shows in a row.
//!
//! <https://www.postgresql.org/docs/current/event-triggers.html>

use super::altered::Unclear;
use super::lex::Cursor;
use super::{Error, Result, script};
use crate::change::Captured;
use crate::id::{JobName, quote_ident, quote_literal};
use crate::pg::{self, Session};

/// What it does. `walferry.counted` has the time of the text under way and how many of its
/// statements there were; `walferry.only_temporary` whether what was dropped last was in no log.
const FUNCTION: &str = "
create or replace function {function}() returns event_trigger
language plpgsql security definer as $capture$
declare
    -- No type or operator may be looked up before the caller's own search_path is out of the way:
    -- this is compiled, and begins to run, under it.
    before pg_catalog.text;
    counted pg_catalog.text[];
    place pg_catalog.int4;
    rewrite pg_catalog.text;
    made pg_catalog.record;
begin
    before := pg_catalog.current_setting('search_path');
    perform pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    <<looking>> begin
        exit looking when current_setting('application_name') like 'walferry%'
            or current_setting('walferry.ours', true) = 'on';
        if tg_event = 'table_rewrite' then
            perform set_config('walferry.rewrite',
                pg_event_trigger_table_rewrite_reason()::text, true);
            exit looking;
        end if;
        if tg_event = 'sql_drop' then
            perform set_config('walferry.only_temporary', (select bool_and(d.is_temporary)::text
                from pg_event_trigger_dropped_objects() d), true);
            exit looking;
        end if;
        rewrite := coalesce(nullif(current_setting('walferry.rewrite', true), ''), '0');
        perform set_config('walferry.rewrite', '0', true);
        counted := string_to_array(current_setting('walferry.counted', true), '@');
        place := case when counted[1] = statement_timestamp()::text
            then counted[2]::int + 1 else 0 end;
        perform set_config('walferry.counted', concat(statement_timestamp(), '@', place), false);
        exit looking when tg_tag like '%PUBLICATION' or tg_tag like '%SUBSCRIPTION'
            or tg_tag = 'REFRESH MATERIALIZED VIEW'
            or (select bool_and(c.schema_name in ('pg_temp', 'walferry'))
                from pg_event_trigger_ddl_commands() c)
            or (tg_tag like 'DROP%'
                and current_setting('walferry.only_temporary', true) = 'true');
        insert into {table} (tag, place, text, search_path, role, rewrite)
        values (tg_tag, place, current_query(), before,
            case current_setting('role') when 'none' then session_user::text
                else current_setting('role') end, rewrite::int);
        exit looking when {publication} is null;
        -- What is run here is no statement of the client's text.
        perform set_config('walferry.ours', 'on', true);
        for made in select c.objid from pg_event_trigger_ddl_commands() c
            join pg_class r on r.oid = c.objid
            where c.command_tag = 'CREATE TABLE' and c.object_type = 'table'
                and r.relpersistence = 'p'
                -- Before 13 a publication lists leaves, not trees.
                and case when current_setting('server_version_num')::int < 130000
                    then r.relkind = 'r' else not r.relispartition end
        loop
            execute format('alter publication %I add table only %s', {publication},
                made.objid::regclass);
        end loop;
        perform set_config('walferry.ours', 'off', true);
    exception when others then
        raise warning 'walferry: % was not captured: %', tg_tag, sqlerrm;
    end looking;
    perform pg_catalog.set_config('search_path', before, true);
end $capture$;
";

fn names(job: &JobName) -> (String, String, [String; 3]) {
    let function = format!("walferry.{}", quote_ident(&format!("capture_{job}")));
    let trigger = |what| quote_ident(&format!("walferry_{job}_{what}"));
    (job.captured().quoted(), function, ["end", "drop", "rewrite"].map(trigger))
}

/// Makes the table that the event triggers write to, so that it can be published. Idempotent.
pub async fn make_table(session: &mut Session, job: &JobName) -> Result<()> {
    let sql = format!(
        "create table if not exists {} (id bigint generated always as identity primary key, \
           tag text not null, place int not null, text text not null, search_path text not null, \
           role text not null, rewrite int not null)",
        job.captured().quoted()
    );
    session.execute(&sql).await.map_err(|error| Error::statement(&sql, error))?;
    Ok(())
}

/// Makes function and event triggers on the source; [`make_table`] comes first. `publication` is
/// the one that takes tables that are new, where there is one. Idempotent, all of it or nothing.
///
/// Gives false where the role may make no event trigger, which takes a superuser.
pub async fn install(
    session: &mut Session,
    job: &JobName,
    publication: Option<&str>,
) -> Result<bool> {
    let (table, function, [end, drop, rewrite]) = names(job);
    let named = publication.map_or("null::text".to_string(), quote_literal);
    let made = FUNCTION
        .replace("{function}", &function)
        .replace("{table}", &table)
        .replace("{publication}", &named);
    // From 11 on they run FUNCTIONs; PROCEDURE is understood by all.
    let sql = format!(
        "begin; set local client_min_messages = error; \
         {made} \
         drop event trigger if exists {end}; drop event trigger if exists {drop}; \
         drop event trigger if exists {rewrite}; \
         create event trigger {end} on ddl_command_end execute procedure {function}(); \
         create event trigger {drop} on sql_drop execute procedure {function}(); \
         create event trigger {rewrite} on table_rewrite execute procedure {function}(); commit"
    );
    match session.execute(&sql).await {
        Ok(_) => Ok(true),
        Err(error) => {
            let denied = error.code() == Some("42501");
            if session.in_transaction() {
                session.execute("rollback").await?;
            }
            if denied { Ok(false) } else { Err(Error::statement("create event trigger", error)) }
        }
    }
}

/// True if the source has them.
pub async fn is_installed(session: &mut Session, job: &JobName) -> pg::Result<bool> {
    let name = format!("walferry_{job}_end");
    let sql = "select 1 from pg_catalog.pg_event_trigger where evtname = $1";
    Ok(session.query_opt(sql, &[Some(&name)]).await?.is_some())
}

/// Drops them, but for the table. Harmless if there are none.
pub async fn remove(session: &mut Session, job: &JobName) -> pg::Result<()> {
    if !is_installed(session, job).await? {
        return Ok(());
    }
    let (_, function, [end, drop, rewrite]) = names(job);
    let sql = format!(
        "drop event trigger if exists {end}; drop event trigger if exists {drop}; \
         drop event trigger if exists {rewrite}; drop function if exists {function}()"
    );
    session.execute(&sql).await?;
    Ok(())
}

/// First words of statements that fire an event trigger.
const COMMANDS: [&str; 8] =
    ["create", "alter", "drop", "comment", "grant", "revoke", "security", "import"];

/// Second words of those that do not, as they are of the server and not of the database.
const SHARED: [&str; 7] = ["role", "user", "group", "database", "tablespace", "system", "event"];

/// The statement alone, as it is to be run inside a transaction.
pub fn statement(captured: &Captured) -> std::result::Result<String, Unclear> {
    let Captured { tag, place, text, .. } = captured;
    let unclear = |why: &str| Unclear(format!("{tag} was run by a text of which {why}"));
    if captured.rewrite & REWRITE_DEFAULT != 0 {
        return Err(unclear("rows were given values that the source made"));
    }
    let Ok(all) = script::split(text) else { return Err(unclear("the end is missing")) };
    let first = |sql: &&str, word: &str| Cursor::new(sql).eat(word);
    if all.iter().any(|sql| first(sql, "rollback") || first(sql, "abort")) {
        return Err(unclear("a part was rolled back"));
    }
    let mut commands = all.iter().filter(|sql| is_command(sql));
    let word = tag.split(' ').next().unwrap_or_default().to_lowercase();
    match commands.nth(*place) {
        Some(sql) if Cursor::new(sql).eat(&word) => Ok(not_concurrently(sql)),
        _ => Err(unclear("it is not a statement of its own (a function or DO block ran it)")),
    }
}

fn is_command(sql: &str) -> bool {
    let mut cursor = Cursor::new(sql);
    let Some(word) = COMMANDS.iter().find(|word| cursor.eat(word)) else { return false };
    match *word {
        // Of roles, unless ON says of what.
        "grant" | "revoke" => cursor.find("on"),
        "comment" => {
            cursor.eat("on");
            !SHARED.iter().any(|word| cursor.eat(word))
        }
        _ => !SHARED.iter().any(|word| cursor.eat(word)),
    }
}

/// CONCURRENTLY is for those beside whom an index is built, and cannot be in a transaction; its
/// rows wait behind it here either way.
fn not_concurrently(sql: &str) -> String {
    let cursor = Cursor::new(sql);
    let mut starts = ["create index", "create unique index", "drop index", "alter table"].iter();
    let waits = starts.any(|start| Cursor::new(sql).eat(start));
    let found = cursor.tokens().iter().find(|token| token.is("concurrently")).filter(|_| waits);
    match found.and_then(|token| Some((sql.get(..token.start)?, sql.get(token.end()..)?))) {
        Some((before, after)) => format!("{before}{}", after.trim_start()),
        None => sql.to_string(),
    }
}

/// AT_REWRITE_DEFAULT_VAL: a new column's default was evaluated for each row. From 11 on that is
/// only done for one that may give each another value.
const REWRITE_DEFAULT: u32 = 2;

/// True if it adds a label to an enum, which is of no use in the transaction that adds it.
pub fn adds_label(sql: &str) -> bool {
    let mut cursor = Cursor::new(sql);
    cursor.eat("alter type") && cursor.find("add") && cursor.eat("value")
}

/// True if its rows are not in the stream: they were there before the table was published.
pub fn fills(tag: &str) -> bool {
    matches!(tag, "CREATE TABLE AS" | "SELECT INTO")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn captured(tag: &str, place: usize, text: &str) -> Captured {
        let (tag, text) = (tag.to_string(), text.to_string());
        Captured { tag, place, text, ..Captured::default() }
    }

    fn found(tag: &str, place: usize, text: &str) -> Option<String> {
        statement(&captured(tag, place, text)).ok()
    }

    #[test]
    fn a_statement_is_found_by_its_place_in_the_text() {
        let text = "begin; create temp table x (a int); grant admin to me; insert into t values \
                    (';'); alter table t add c int; -- ; alter\n create role r; \
                    create function f() returns int language sql as $$ select 1; $$; commit";
        assert_eq!(found("ALTER TABLE", 1, text).as_deref(), Some("alter table t add c int"));
        assert!(found("CREATE FUNCTION", 2, text).unwrap().ends_with("$$ select 1; $$"));
        assert_eq!(found("ALTER TABLE", 0, text), None);
        assert_eq!(found("ALTER TABLE", 3, text), None);
        let grant = "grant select on t to r";
        assert_eq!(found("GRANT", 0, grant).as_deref(), Some(grant));
    }

    #[test]
    fn what_is_not_certain_is_not_found() {
        assert_eq!(found("ALTER TABLE", 0, "do $$ begin alter table t add c int; end $$"), None);
        assert_eq!(found("ALTER TABLE", 0, "select f()"), None);
        let undone = "begin; alter table t add c int; rollback; alter table t add d int";
        assert_eq!(found("ALTER TABLE", 0, undone), None);
        assert_eq!(found("ALTER TABLE", 0, "alter table t add c text default 'x"), None);
    }

    #[test]
    fn values_that_the_source_made_are_not_made_again() {
        let text = "alter table t add column c uuid default gen_random_uuid()";
        let rewrite = |rewrite| Captured { rewrite, ..captured("ALTER TABLE", 0, text) };
        assert!(statement(&rewrite(2)).is_err() && statement(&rewrite(4)).is_ok());
    }

    #[test]
    fn what_cannot_be_in_a_transaction_is_run_as_what_can() {
        let index = "create index concurrently i on t (a)";
        assert_eq!(found("CREATE INDEX", 0, index).as_deref(), Some("create index i on t (a)"));
        let kept = "create view v as select 1 as concurrently";
        assert_eq!(found("CREATE VIEW", 0, kept).as_deref(), Some(kept));
        assert!(adds_label("alter type s.mood add value if not exists 'x'"));
        assert!(!adds_label("alter type s.mood rename value 'add' to 'value'"));
        assert!(fills("CREATE TABLE AS") && !fills("CREATE TABLE"));
    }
}
