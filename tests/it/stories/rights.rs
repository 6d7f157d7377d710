//! Roles with few rights, programs that print what they did not use to, clients and neighbours.

use std::os::unix::fs::PermissionsExt;

use super::*;

const OWNED: &str = "create table item (id serial primary key, note text, amount numeric); \
    insert into item (note, amount) select 'row ' || i, i from generate_series(1, 200) i; \
    create function touched() returns trigger language plpgsql as \
        $$ begin new.note := new.note || '*'; return new; end $$; \
    create trigger touched before insert on item for each row execute function touched()";

/// What a role needs that is no superuser: the grants that check prints.
fn mover(story: &mut Story, role: &'static str) {
    story.role = role;
    for server in [story.source, story.target] {
        let sql = format!(
            "create role {role} login replication; \
            alter database {} owner to {role}",
            story.name
        );
        server.psql("postgres", &sql).unwrap();
    }
    story.source(&format!(
        "alter table item owner to {role}; alter table mark owner to {role}; \
        alter function touched owner to {role}; alter schema public owner to {role}"
    ));
    let functions = [
        "create(text)",
        "drop(text)",
        "oid(text)",
        "progress(text, boolean)",
        "advance(text, pg_lsn)",
        "session_setup(text)",
        "session_reset()",
        "session_progress(boolean)",
        "session_is_setup()",
        "xact_setup(pg_lsn, timestamptz)",
        "xact_reset()",
    ];
    for server in [story.source, story.target] {
        for function in functions {
            let sql =
                format!("grant execute on function pg_replication_origin_{function} to {role}");
            server.psql(&story.name, &sql).unwrap();
        }
        let sql = format!("grant set on parameter session_replication_role to {role}");
        server.psql(&story.name, &sql).unwrap();
    }
    story.target(&format!("alter schema public owner to {role}"));
}

/// pg_authid, with everybody's passwords, was read, which a managed cloud lets nobody do. A role
/// that is no superuser anywhere, with the grants that check prints, moves there and back.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_135_a_role_that_may_not_read_passwords_moves_a_database() {
    let mut story = Story::of("pgcopydb_135", OWNED);
    mover(&mut story, "mover_135");
    let denied = story.source.psql(&story.name, "set role mover_135; select * from pg_authid");
    assert!(denied.unwrap_err().to_string().contains("permission denied"));
    story.done(&["run", "--until", "following"]).await;
    story.source("update item set amount = -1 where id = 1; insert into item (note) values ('x')");
    let mut run = story.spawn(&["run"]);
    story.arrived(&mut run).await;
    story.done(&["verify"]).await;
    story.same().await;
    story.done(&["cutover"]).await;
    story.target("insert into item (note) values ('over there'); delete from item where id = 2");
    story.done(&["rollback"]).await;
    story.same().await;
    assert_eq!(story.source("select note from item where id > 201"), "over there*");
    story.done(&["finish"]).await;
    run.ended().await.expect_success();
}

/// From CVE-2025-8714 on pg_dump's text begins and ends with a line for psql. The one that is
/// installed may not print it yet, so one that does is given.
#[tokio::test(flavor = "multi_thread")]
async fn pgcopydb_947_restrict_lines_of_pg_dump_break_nothing() {
    let story = Story::of("pgcopydb_947", OWNED);
    let real = walferry::demo::binaries::client("pg_dump").unwrap();
    let restricting = story.source.dir().join("restricting");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *version*) exec {0} \"$@\";; esac\necho >>\"$0.used\"\n\
         printf '%s\\n' '\\restrict k3yk3y'\n{0} \"$@\" || exit\nprintf '%s\\n' '\\unrestrict \
         k3yk3y'\n",
        real.display()
    );
    std::fs::write(&restricting, script).unwrap();
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&restricting, mode).unwrap();
    let (source, target) = story.uris();
    let environment = [
        ("WALFERRY_SOURCE", &*source),
        ("WALFERRY_TARGET", &*target),
        ("WALFERRY_NAME", &*story.name),
        ("WALFERRY_PG_DUMP", restricting.to_str().unwrap()),
    ];
    let ended = Walferry::spawn_with(&["run", "--until", "following"], &environment).ended().await;
    assert!(restricting.with_extension("used").exists(), "{}", ended.err);
    ended.expect_success();
    story.follows("insert into item (note) values ('y')").await;
    assert_eq!(story.target("select count(*) from pg_trigger where not tgisinternal"), "1");
}

/// An underscore in a name is any letter to LIKE: the slots of a sibling were dropped.
#[tokio::test(flavor = "multi_thread")]
async fn etl_679_a_cancelled_job_leaves_a_sibling_of_nearly_its_name_alone() {
    let gone = Story::copied("etl_679_a", OWNED).await;
    let kept = Story::copied("etl_679xa", OWNED).await;
    let slots = "select count(*) from pg_replication_slots where database like 'etl%679%a'";
    assert_eq!(gone.source(slots), "2");
    gone.done(&["cancel"]).await;
    assert_eq!(gone.source(slots), "1");
    kept.source("insert into item (note) values ('still here')");
    kept.follows("delete from item where id = 3").await;
    kept.done(&["cancel"]).await;
    assert_eq!(gone.source(slots), "0");
}
