//! The whole job as a role of a managed cloud: nothing on the source is its own.

use walferry::demo::compare::compare;
use walferry::demo::ledger;
use walferry::demo::pgbouncer::PgBouncer;
use walferry::demo::writer::{Options, Writer};

use super::{moved_on, roles};
use crate::job::writer;
use crate::support::Walferry;
use crate::support::job::{Ends, route_of};

/// The whole job under one writer, whom a pooler holds at each switch, so many times there and back;
/// `asked` goes with each command.
async fn there_and_back(ends: &Ends, asked: &[&str], times: usize) -> Walferry {
    let done = async |command: &[&str]| ends.done(&[command, asked].concat()).await;
    let pooler = PgBouncer::start(&ends.source, &["app"]).unwrap();
    let options = Options { tx_per_second: Some(100.0), ..Options::new(&pooler.uri("app")) };
    let writer = Writer::start(options).await.unwrap();
    let mut run = ends.spawn(&[&["run", "--no-owner"], asked].concat());
    ends.until_phase(&mut run, "following").await;
    done(&["verify"]).await;
    let refused =
        ends.walferry(&[&["cutover", "--route", &route_of(&pooler)], asked].concat()).await;
    assert!(refused.err.contains("--fence none"), "{refused:?}");
    for _ in 0..times {
        for command in ["cutover", "rollback"] {
            moved_on(&writer).await;
            done(&[command, "--fence", "none", "--route", &route_of(&pooler)]).await;
            moved_on(&writer).await;
            done(&["verify"]).await;
        }
    }
    let report = writer.stop().await;
    assert_eq!((report.failed_statements, report.failed_connects), (0, 0), "{:?}", report.errors);
    done(&["verify"]).await;
    // (The application's own promise of items with orders went with its foreign key.)
    let compared = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    let rows = compared.differences.iter().filter(|line| !line.starts_with("sequence "));
    assert_eq!(rows.collect::<Vec<_>>(), Vec::<&String>::new());
    for uri in [ends.source_uri(), ends.target_uri()] {
        let check = ledger::check(&uri, &report.ledger).await.unwrap();
        assert!(check.is_exact(), "{check:?}");
    }
    run
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_owns_nothing_moves_a_database_with_what_check_prints() {
    let ends = roles::managed((15, 15)).await;
    // Without being asked for pgoutput, check chooses a decoder that needs no publication.
    let asked = ["--decoder", "pgoutput"];
    let mut needed = roles::printed_by(&ends, &asked, &["error"], &[]).await;
    needed.extend(roles::printed_by(&ends, &asked, &["warning"], &["write-right"]).await);
    let sql: Vec<&str> = needed.iter().map(|(_, fix)| fix.as_str()).collect();
    let sql = sql.join("\n");
    assert!(needed.iter().all(|(side, _)| side == "source"), "{needed:?}");
    for given in ["CREATE SCHEMA walferry AUTHORIZATION", "CREATE PUBLICATION", "TRUNCATE ON"] {
        assert!(sql.contains(given), "{given}: {sql}");
    }
    for asked in ["GRANT CREATE ON DATABASE", "SUPERUSER", "GRANT \"owner\""] {
        assert!(!sql.contains(asked), "{asked}: {sql}");
    }
    roles::grant(&ends, &needed);
    ends.done(&["check"]).await;
    let before = ends.inventories().await;

    let run = there_and_back(&ends, &[], 2).await;
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    // The administrator's schema and publication stay as he made them.
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.leftovers(&after.1), Vec::<String>::new());
    assert_eq!(ends.source.psql("app", "select count(*) from walferry.progress").unwrap(), "0");
}

/// With SELECT alone rows are copied, followed and compared; the cutover says what is missing.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_with_select_alone_follows_and_is_told_what_a_cutover_needs() {
    let ends = roles::managed((15, 15)).await;
    let asked = ["--decoder", "pgoutput"];
    let needed = roles::printed_by(&ends, &asked, &["error"], &["publication-right"]).await;
    assert_eq!(needed.len(), 1);
    roles::grant(&ends, &needed);
    let first = writer(&ends.source.uri_as("owner", "app"), 100.0, 1).await;
    let mut run = ends.spawn(&["run", "--no-owner"]);
    ends.until_phase(&mut run, "following").await;
    ends.done(&["verify"]).await;
    let refused = ends.walferry(&["cutover", "--fence", "none", "--route", "hook:true"]).await;
    assert_eq!(refused.code, Some(1));
    let grant = "GRANT INSERT, UPDATE, DELETE, TRUNCATE ON bank.accounts TO mover;";
    assert!(refused.err.contains(grant), "{refused:?}");
    assert!(first.committed_more(50).await, "the writer is stuck");
    first.stop().await;
    ends.done(&["verify"]).await;
    ends.done(&["cancel"]).await;
    run.ended().await;
}

/// SELECT by membership in pg_read_all_data, and the publication that an administrator made of the
/// tables alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_of_pg_read_all_data_moves_a_database_by_an_administrators_publication() {
    let ends = roles::managed((15, 15)).await;
    let may = |sql: &str| ends.source.psql("app", sql).unwrap();
    for schema in ["bank", "shop", "\"Odd \"\"Schema\""] {
        may(&format!(
            "revoke all on all tables in schema {schema} from mover; \
             revoke all on all sequences in schema {schema} from mover; \
             revoke all on schema {schema} from mover"
        ));
    }
    may("create publication given for tables in schema bank, shop, \"Odd \"\"Schema\"");
    let asked = ["--publication", "given"];
    let lacking = roles::printed_by(&ends, &asked, &["error"], &["select-right"]).await;
    assert_eq!(lacking.len(), 3, "{lacking:?}");
    may("grant pg_read_all_data to mover");
    assert_eq!(roles::printed_by(&ends, &asked, &["error"], &["select-right"]).await, []);
    let mut needed = roles::printed_by(&ends, &asked, &["error"], &[]).await;
    needed.extend(roles::printed_by(&ends, &asked, &["warning"], &["write-right"]).await);
    assert!(needed.iter().all(|(side, _)| side == "source"), "{needed:?}");
    let sql: Vec<&str> = needed.iter().map(|(_, fix)| fix.as_str()).collect();
    let sql = sql.join("\n");
    for given in ["ALTER PUBLICATION \"given\" ADD TABLE", "TRUNCATE ON"] {
        assert!(sql.contains(given), "{given}: {sql}");
    }
    for asked in ["CREATE PUBLICATION", "SUPERUSER", "GRANT \"owner\"", "GRANT SELECT"] {
        assert!(!sql.contains(asked), "{asked}: {sql}");
    }
    roles::grant(&ends, &needed);
    let before = ends.inventories().await;
    let run = there_and_back(&ends, &asked, 1).await;
    ends.done(&["finish", "--publication", "given"]).await;
    run.ended().await.expect_success();
    let after = ends.inventories().await;
    assert_eq!(before.0.diff(&after.0), Vec::<String>::new());
    assert_eq!(before.1.leftovers(&after.1), Vec::<String>::new());
}

/// Who sees a part of the rows copies none of them: check says so, and at a time when it could not
/// know it is the server that refuses, as sessions ask it not to hide.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_from_which_rows_are_hidden_is_refused_and_never_copies_a_part() {
    let ends = roles::managed((15, 15)).await;
    let may = |sql: &str| ends.source.psql("app", sql).unwrap();
    may("alter table bank.accounts enable row level security; \
         create policy even on bank.accounts for select to mover using (aid % 2 = 0); \
         alter table shop.orders enable row level security; \
         alter table shop.orders force row level security; \
         create policy anybody on shop.orders using (true)");
    let asked = ["--decoder", "test_decoding"];
    let hidden = roles::printed_by(&ends, &asked, &["error"], &["row-security"]).await;
    let bypass = |side: &str| (side.to_string(), "ALTER ROLE \"mover\" BYPASSRLS;".to_string());
    assert_eq!(hidden, [bypass("source"), bypass("target")]);
    let refused = ends.walferry(&["run", "--no-owner", "--decoder", "test_decoding"]).await;
    let said = format!("{refused:?}");
    assert!(refused.code == Some(1) && said.contains("would hide rows of bank.accounts"), "{said}");
    assert_eq!(ends.target.psql("app", "select to_regclass('bank.accounts')").unwrap(), "");

    // Unseen by check: it was made when all had been looked at.
    may("alter table bank.accounts disable row level security; \
         alter table shop.orders no force row level security; \
         alter table shop.orders disable row level security");
    let first = writer(&ends.source.uri_as("owner", "app"), 50.0, 1).await;
    ends.done(&["run", "--no-owner", "--until", "following", "--decoder", "test_decoding"]).await;
    may("alter table bank.accounts enable row level security");
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let verified = ends.walferry(&["verify"]).await;
    let said = format!("{verified:?}");
    assert!(verified.code != Some(0) && said.contains("row-level security"), "{said}");
    // The stream shows all rows to whoever may read it.
    roles::grant(&ends, &hidden);
    assert!(first.committed_more(30).await, "the writer is stuck");
    ends.done(&["verify"]).await;
    first.stop().await;
    ends.done(&["verify"]).await;
    ends.done(&["cancel"]).await;
    run.ended().await;
}

/// Policies that are forced upon owners, on both sides, once both roles may pass them.
#[tokio::test(flavor = "multi_thread")]
async fn tables_with_forced_policies_move_once_the_roles_pass_them() {
    let forced = "create schema story; create table story.secret (id int primary key, v text); \
         alter table story.secret enable row level security; \
         alter table story.secret force row level security; \
         create policy none on story.secret using (false)";
    let ends = roles::owner_of((15, 15), forced).await;
    let insert = "insert into story.secret select i, 'v' from generate_series(1, 500) i";
    ends.source.psql("app", insert).unwrap();
    let asked = ["--decoder", "pgoutput"];
    let needed = roles::printed_by(&ends, &asked, &["error"], &[]).await;
    assert_eq!(needed.iter().filter(|(_, fix)| fix.contains("BYPASSRLS")).count(), 2, "{needed:?}");
    roles::grant(&ends, &needed);
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let change = "update story.secret set v = 'w' where id < 9; delete from story.secret where id > 450; \
         insert into story.secret values (1000, 'x'); update story.secret set id = -id where id = 100";
    ends.source.psql("app", change).unwrap();
    ends.done(&["verify"]).await;
    ends.done(&["cutover"]).await;
    ends.target.psql("app", "update story.secret set v = 'back' where id < 20").unwrap();
    ends.done(&["verify"]).await;
    ends.done(&["rollback"]).await;
    let compared = compare(&ends.source_uri(), &ends.target_uri()).await.unwrap();
    assert_eq!((compared.rows(), compared.differences), (451, Vec::<String>::new()));
    ends.done(&["finish"]).await;
    run.ended().await.expect_success();
}
