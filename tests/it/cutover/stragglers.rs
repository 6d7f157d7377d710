//! Who was connected before the switch cannot write to the old side after it.

use super::{Hook, Load, Stage, assert_all_there, refused, session};

const MOVED: &str = "this database has moved";

#[tokio::test(flavor = "multi_thread")]
async fn vitess_9453_no_session_of_before_writes_to_the_old_side_after_the_switch() {
    let stage = Stage::start().await;
    let source = stage.ends.source_uri();
    let mut idle = session(&source).await;
    let mut old = session(&source).await;
    old.execute("begin isolation level repeatable read").await.unwrap();
    old.query("select count(*) from public.t").await.unwrap();
    let mut serializable = session(&source).await;
    serializable.execute("begin isolation level serializable").await.unwrap();
    serializable.query("select count(*) from public.t").await.unwrap();
    let mut prepared = session(&source).await;
    let prepare = "prepare p as insert into public.t values ($1, 'prepared')";
    prepared.execute(prepare).await.unwrap();
    // Six runs make the plan a cached, generic one.
    for id in 0..6 {
        prepared.execute(&format!("execute p(-{id})")).await.unwrap();
    }
    // This one goes on writing and so waits for the lock at the moment of the switch.
    let load = Load::start(&stage.ends.source, &source).await;
    load.more(20).await;
    stage.ends.done(&["cutover"]).await;

    let insert = "insert into public.t values (-100, 'late')";
    for session in [&mut idle, &mut old, &mut serializable] {
        let said = refused(session, insert).await;
        assert!(said.contains(MOVED) && said.contains("public.t"), "{said}");
    }
    old.execute("rollback").await.unwrap();
    serializable.execute("rollback").await.unwrap();
    let said = refused(&mut prepared, "execute p(-200)").await;
    assert!(said.contains(MOVED), "{said}");
    for sql in [
        "update public.t set v = 'late'",
        "delete from public.t",
        "truncate public.t",
        "truncate public.parts",
        "insert into public.parts values (1)",
        "insert into public.parts_high values (101)",
        "copy public.t from program 'echo 7'",
        "insert into public.log (line) values ('late')",
        "insert into public.scratch values (1)",
        "with w as (insert into public.side values (1, 'late') returning id) select * from w",
    ] {
        let said = refused(&mut idle, sql).await;
        assert!(said.contains(MOVED), "{sql}: {said}");
    }
    idle.query("select * from public.t for share").await.unwrap();
    let seen = load.stop().await;
    assert!(seen.errors.iter().all(|error| error.contains(MOVED)), "{:?}", seen.errors);
    assert!(!seen.errors.is_empty());
    assert_all_there(&stage.ends.target, &seen, 0);

    let mut there = session(&stage.ends.target_uri()).await;
    there.execute("insert into public.t values (-300, 'there')").await.unwrap();
    there.execute("insert into public.log (line) values ('there')").await.unwrap();
    stage.ends.done(&["rollback"]).await;
    let said = refused(&mut there, "insert into public.t values (-400, 'late')").await;
    assert!(said.contains(MOVED), "{said}");
    let said = refused(&mut there, "insert into public.log (line) values ('late')").await;
    assert!(said.contains(MOVED), "{said}");
    // The session that was refused before goes on as if nothing had been.
    idle.execute(insert).await.unwrap();
    prepared.execute("execute p(-200)").await.unwrap();
    idle.execute("insert into public.parts values (1), (101)").await.unwrap();
    stage.ends.done(&["verify"]).await;
    let sql = "select string_agg(id::text, ',' order by id desc) from public.t where id <= -100";
    for server in [&stage.ends.source, &stage.ends.target] {
        assert_eq!(server.psql("app", sql).unwrap(), "-100,-200,-300");
    }
    stage.end().await;
}

/// The position up to which the target must come is read after the last writer has ended.
#[tokio::test(flavor = "multi_thread")]
async fn vitess_16563_a_transaction_that_ends_as_the_fence_goes_up_is_not_lost() {
    let stage = Stage::start().await;
    let load = Load::start(&stage.ends.source, &stage.ends.source_uri()).await;
    let hook = Hook::new(&stage, Some(&load));
    let route = hook.route();
    for command in ["cutover", "rollback", "cutover"] {
        let (live, dest) = stage.side(command);
        load.more(10).await;
        let mut open = session(&live.uri("app")).await;
        open.execute("begin; update public.t set v = v; insert into public.side values (1, 'x')")
            .await
            .unwrap();
        hook.stop_at("hold");
        let arguments = [command, "--route", &*route];
        tokio::join!(stage.ends.done(&arguments), async {
            hook.reached().await;
            hook.go();
            // The lock is being asked for, or about to be.
            open.execute("commit").await.unwrap();
        });
        load.more(10).await;
        assert_eq!(dest.psql("app", "delete from public.side returning id").unwrap(), "1");
    }
    let seen = load.stop().await;
    assert!(seen.errors.iter().all(|error| error.contains(MOVED)), "{:?}", seen.errors);
    assert_all_there(&stage.ends.target, &seen, 0);
    stage.end().await;
}
