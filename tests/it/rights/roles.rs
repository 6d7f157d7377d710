//! Roles with exactly the rights of a profile, made by a superuser who is not heard of again.

use serde_json::Value;
use walferry::demo::server::Server;
use walferry::demo::writer::create_schema;
use walferry::pg::{Config, Purpose, Session};

use crate::support::job::Ends;

/// The role that walferry connects as, on both sides, and that owns what is moved.
pub const ROLE: &str = "mover";

/// Owner of the tables, with REPLICATION, on the source; owner of the database, with REPLICATION,
/// on the target. No CREATE on the source's database, no superuser, no grants.
pub async fn owner(majors: (u32, u32)) -> Ends {
    let ends = ends(majors);
    let may = |may: &str| ends.source.psql("app", may).unwrap();
    may(&format!("grant create on database app to {ROLE}"));
    create_schema(&ends.source_via, 1).await.unwrap();
    may(&format!("revoke create on database app from {ROLE}"));
    ends
}

/// The same with tables of one's own.
pub async fn owner_of(majors: (u32, u32), sql: &str) -> Ends {
    let ends = ends(majors);
    let own = format!(
        "grant create on database app to {ROLE}; set role {ROLE}; {sql}; reset role; \
         revoke create on database app from {ROLE}"
    );
    ends.source.psql("app", &own).unwrap();
    ends
}

/// A managed cloud's: on the source REPLICATION and SELECT, and nothing is the role's own there; on
/// the target owner of the database, with REPLICATION. No foreign keys and triggers on the source:
/// who neither owns its tables nor may set the replica role cannot lead a way back to those.
pub async fn managed(majors: (u32, u32)) -> Ends {
    managed_of(Ends::start(majors.0, majors.1)).await
}

/// The same on servers that run already.
pub async fn managed_of(ends: Ends) -> Ends {
    let ends = with_role(ends);
    let may = |may: &str| ends.source.psql("app", may).unwrap();
    may("create role owner login; grant create on database app to owner");
    create_schema(&ends.source.uri_as("owner", "app"), 1).await.unwrap();
    may("alter table bank.tellers drop constraint tellers_bid_fkey; \
         alter table bank.accounts drop constraint accounts_bid_fkey; \
         alter table shop.items drop constraint items_order_id_fkey; \
         drop trigger log_order on shop.orders");
    for schema in ["bank", "shop", "\"Odd \"\"Schema\""] {
        may(&format!(
            "grant usage on schema {schema} to {ROLE}; \
             grant select on all tables in schema {schema} to {ROLE}; \
             grant select on all sequences in schema {schema} to {ROLE}"
        ));
    }
    ends
}

fn ends(majors: (u32, u32)) -> Ends {
    with_role(Ends::start(majors.0, majors.1))
}

fn with_role(mut ends: Ends) -> Ends {
    let make = format!("create role {ROLE} login replication");
    for server in [&ends.source, &ends.target] {
        server.psql("postgres", &make).unwrap();
    }
    ends.target.psql("app", &format!("alter database app owner to {ROLE}")).unwrap();
    ends.source_via = ends.source.uri_as(ROLE, "app");
    ends.target_via = ends.target.uri_as(ROLE, "app");
    ends
}

/// What `check` prints as mending findings of these levels (and, if any, codes), by side.
pub async fn printed(ends: &Ends, levels: &[&str], codes: &[&str]) -> Vec<(String, String)> {
    printed_by(ends, &[], levels, codes).await
}

/// The same of a check that is asked for more.
pub async fn printed_by(
    ends: &Ends,
    asked: &[&str],
    levels: &[&str],
    codes: &[&str],
) -> Vec<(String, String)> {
    let report = ends.walferry(&[&["check", "--json"], asked].concat()).await.json();
    let findings = report["findings"].as_array().unwrap().clone();
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_string();
    let wanted = findings.iter().filter(|finding| {
        levels.contains(&&*text(finding, "level"))
            && (codes.is_empty() || codes.contains(&&*text(finding, "code")))
    });
    wanted
        .map(|finding| {
            assert!(finding["fix"].is_string(), "no way to mend {finding}");
            (text(finding, "side"), text(finding, "fix"))
        })
        .collect()
}

/// Does what was printed, as the superuser, and nothing else.
pub fn grant(ends: &Ends, printed: &[(String, String)]) {
    for (side, fix) in printed {
        let server: &Server = if side == "source" { &ends.source } else { &ends.target };
        server.psql("app", fix).unwrap();
    }
}

/// Without pg_read_all_stats the server hides what other roles' sessions are.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_fence_ends_sessions_it_may_not_look_into_or_refuses() {
    let ends = owner((15, 15)).await;
    let needed = printed(&ends, &["error"], &[]).await;
    grant(&ends, &needed);
    ends.source.psql("app", &format!("alter database app owner to {ROLE}")).unwrap();
    let other = "create role other login; grant all on all tables in schema bank to other; \
                 grant usage on schema bank to other";
    ends.source.psql("app", other).unwrap();
    ends.target.psql("app", "create role other login").unwrap();
    let config = Config::parse(&ends.source.uri_as("other", "app")).unwrap();
    let config = config.with_application_name("app");
    let mut client = Session::connect(&config, Purpose::Sql).await.unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let ended = ends.walferry(&["cutover", "--fence", "read-only"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("of role other"), "{ended:?}");
    client.execute("delete from bank.accounts where false").await.unwrap();
    ends.source.psql("app", "grant pg_signal_backend to mover").unwrap();
    ends.done(&["cutover", "--fence", "read-only"]).await;
    client.execute("delete from bank.accounts where false").await.unwrap_err();
    run.signal("INT");
    run.ended().await.expect_success();
}
