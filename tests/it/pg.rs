//! Tests of the wire against real servers.

use crate::support;

#[tokio::test]
async fn a_session_asks_and_is_answered() {
    let server = support::server();
    let mut session = support::session(&server, "postgres").await;
    let rows = session.query("select 1, null, 'x'; select 2, 'y', null").await.unwrap();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0].str(2).unwrap(), "x");
    let row = session.query_one("select $1::int + 1, $2::text", &[Some("4"), None]).await.unwrap();
    assert_eq!(row.parse::<i32>(0).unwrap(), 5);
    assert_eq!(row.opt(1).unwrap(), None);
    let error = session.query("select * from nowhere").await.unwrap_err();
    assert_eq!(error.code(), Some("42P01"));
    assert_eq!(session.major_version(), 15);
    session.execute("create table public.t (a int, b text)").await.unwrap();
    let mut copy = session.copy_in("copy public.t from stdin").await.unwrap();
    copy.write(b"1\tx\n2\ty\n").await.unwrap();
    assert_eq!(copy.finish().await.unwrap(), 2);
}
