//! Somebody else reads the topic: kcat fetches the records, and Python, with code that protoc made
//! from the schema, rebuilds a table.

use std::path::Path;
use std::process::{Command, Stdio};

use walferry::demo::kafka::Broker;

use crate::kafka::broker;
use crate::support::job::Ends;

/// Standard output of a program; panics with what it says where it fails.
fn output(command: &mut Command) -> Vec<u8> {
    let output = command.stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    output.stdout
}

fn rebuilt(broker: &Broker, topic: &str, dir: &Path) -> String {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let proto = top.join("proto");
    let mut protoc = Command::new("protoc");
    protoc.arg("-I").arg(&proto).arg(format!("--python_out={}", dir.display()));
    output(protoc.arg(proto.join("envelope.proto")));
    let (records, errors) = (dir.join("records"), dir.join("errors"));
    let read = Command::new("kcat")
        .args(["-C", "-q", "-e", "-o", "beginning", "-f", "%R%s", "-t", topic, "-b"])
        .arg(broker.address())
        .stdout(std::fs::File::create(&records).unwrap())
        .stderr(std::fs::File::create(&errors).unwrap())
        .status();
    assert!(read.unwrap().success(), "{}", std::fs::read_to_string(errors).unwrap());
    let mut python = Command::new("/usr/bin/python3");
    python.arg(top.join("tests/it/kafka/outside.py")).arg(dir).args(["public", "outside"]);
    let rows = output(python.stdin(std::fs::File::open(records).unwrap()));
    String::from_utf8(rows).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn kcat_and_protoc_code_in_python_rebuild_a_table() {
    let ends = Ends::start(15, 15).with_kafka(&broker().address());
    let sql =
        "create table outside (id int, part text, note text, big text, primary key (id, part))";
    ends.source.psql("app", sql).unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let random = "(select string_agg(md5(random()::text), '') from generate_series(1, 400))";
    for sql in [
        "insert into outside select i, 'p' || i % 3, nullif('n' || i, 'n7'), null \
         from generate_series(1, 3000) i",
        // A value of 13 kB that lies outside of its row, and updates that leave it alone.
        &format!("update outside set big = {random} where id % 500 = 0"),
        "update outside set note = 'später | \\x5c' where id % 250 = 0",
        // Keys that change, and what TOAST holds with them.
        "update outside set id = id + 10000 where id % 1000 = 0",
        "delete from outside where id % 3 = 1",
        "begin; insert into outside values (-1, 'x', 'never', null); rollback",
        // One value larger than a record.
        "insert into outside values (0, 'huge', null, repeat('0123456789', 300000))",
    ] {
        ends.source.psql("app", sql).unwrap();
    }
    // A second writer, and a transaction that the first may have left unfinished.
    run.kill9().await;
    ends.source.psql("app", "insert into outside values (1, 'again', 'after a kill', '')").unwrap();
    let run = ends.spawn(&["run"]);
    ends.done(&["verify"]).await;
    let wanted = ends.source.psql(
        "app",
        "select string_agg(line || E'\\n', '' order by line collate \"C\") from (select \
         concat_ws('|', id::text, part, coalesce(note, '\\N'), coalesce(big, '\\N')) from outside) \
         l (line)",
    );
    let (_, topic) = ends.buffer.as_deref().unwrap().rsplit_once('/').unwrap();
    std::fs::create_dir_all(&ends.spool_dir).unwrap();
    let rows = rebuilt(broker(), topic, &ends.spool_dir);
    assert!(rows.lines().count() > 2000, "{} rows", rows.lines().count());
    assert!(rows.trim_end() == wanted.unwrap().trim_end(), "the table is another");
    run.signal("INT");
    run.ended().await.expect_success();
}
