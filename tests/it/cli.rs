//! The command line as people and scripts meet it: options, files, variables, output, exit codes.

use serde_json::Value;
use walferry::demo::proxy::Proxy;

use crate::support::Walferry;
use crate::support::job::Ends;

const SECRET: &str = "s3cr3t-Pa55";

async fn usage(arguments: &[&str], environment: &[(&str, &str)], texts: &[&str]) {
    let ended = Walferry::spawn_with(arguments, environment).ended().await;
    assert_eq!(ended.code, Some(2), "{arguments:?}: {}\n{}", ended.out, ended.err);
    assert_eq!(ended.out, "", "{arguments:?}");
    for text in texts {
        assert!(ended.err.contains(text), "{arguments:?}: no \"{text}\" in: {}", ended.err);
    }
    assert!(!ended.err.contains(SECRET), "{}", ended.err);
}

#[tokio::test]
async fn mistakes_of_usage_are_told_with_exit_code_2() {
    let good = format!("postgres://u:{SECRET}@127.0.0.1:1/d");
    let both = [("WALFERRY_SOURCE", &*good), ("WALFERRY_TARGET", &*good)];
    usage(&["check"], &[], &["the source is missing", "--source", "WALFERRY_SOURCE"]).await;
    usage(&["check"], &both[..1], &["the target is missing", "--target"]).await;
    usage(&["check", "--inclde", "a"], &both, &["--inclde", "--include"]).await;
    usage(&["chek"], &both, &["chek", "check"]).await;
    usage(&[], &both, &["Usage"]).await;
    usage(&["run", "--until", "nowhere"], &both, &["nowhere", "copied, following"]).await;
    for bad in ["Has Space", "", "a-b", "UPPER"] {
        usage(&["check", "--name", bad], &both, &["--name"]).await;
    }
    for option in ["--include", "--exclude", "--schema-only"] {
        usage(&["run", option, ""], &both, &["not a table pattern", "schema.table"]).await;
        usage(&["check", option, "a.b.c"], &both, &["a.b.c"]).await;
    }
    usage(&["cutover", "--fence", "wall"], &both, &["--fence", "wall"]).await;
    usage(&["cutover", "--route", "carrier:pigeon"], &both, &["--route", "hook:COMMAND"]).await;
    usage(&["cutover", "--timeout", "1 fortnight"], &both, &["fortnight"]).await;
    usage(&["cluster", "show"], &both, &["--cluster", "WALFERRY_CLUSTER"]).await;
}

#[tokio::test]
async fn typos_in_connection_strings_are_named_without_their_secrets() {
    let good = "postgres://u@127.0.0.1:1/d";
    for (bad, texts) in [
        (format!("postgres://u:{SECRET}@h/d?sslmod=require"), vec!["sslmod"]),
        (format!("postgres://u:{SECRET}@h:54x2/d"), vec!["port", "1 to 65535"]),
        (format!("postgres://u:{SECRET}@h:99999/d"), vec!["port", "1 to 65535"]),
        (format!("postgres://u:{SECRET}%zz@h/d"), vec!["two hex digits"]),
        (format!("postgres://u:{SECRET}@h/d?sslmode=sometimes"), vec!["sslmode must be one of"]),
        (format!("host=h passwrd={SECRET}"), vec!["passwrd"]),
        (format!("host=h port=x password={SECRET}"), vec!["port"]),
        (format!("mysql://u:{SECRET}@h/d"), vec!["postgres"]),
    ] {
        usage(&["check", "--source", &bad, "--target", good], &[], &texts).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn options_come_from_the_line_then_variables_then_the_file() {
    let ends = Ends::start(15, 15);
    ends.source.psql("app", "create table t (id int primary key)").unwrap();
    let dir = ends.source.dir().join("options");
    std::fs::create_dir(&dir).unwrap();
    let file = dir.join("mine.toml");
    let write = |text: &str| std::fs::write(&file, text).unwrap();
    let path = file.to_str().unwrap();
    let (source, target) = (ends.source_uri(), ends.target_uri());
    write(&format!("source = '{source}'\ntarget = '{target}'\nname = 'filed'\n"));
    let says_job = async |arguments: &[&str], environment: &[(&str, &str)], name: &str| {
        let all = [&["status", "-c", path], arguments].concat();
        let ended = Walferry::spawn_with(&all, environment).ended().await;
        assert_eq!(ended.code, Some(1), "{}", ended.err);
        assert!(ended.err.contains(&format!("no job \"{name}\"")), "{}", ended.err);
    };
    says_job(&[], &[], "filed").await;
    says_job(&[], &[("WALFERRY_NAME", "varied")], "varied").await;
    says_job(&["--name", "lined"], &[("WALFERRY_NAME", "varied")], "lined").await;
    // What lists nothing because there is nothing does not say so of a job that is not there.
    let none = Walferry::run(&["quarantine", "list", "-c", path]).await;
    assert!(none.code == Some(1) && none.err.contains("no job \"filed\""), "{none:?}");
    // Whose database and role it is where both sides have the same.
    let same = ["check", "-c", path, "--target", &source, "--buffer", "spool:/proc/nowhere"];
    let same = Walferry::run(&same).await;
    for said in [
        "target: app: source and target are the same",
        "info  source: role postgres",
        "error  directory /proc/nowhere: the spool cannot be kept there",
    ] {
        assert!(same.code == Some(1) && same.out.contains(said), "no {said}: {}", same.out);
    }
    write("sorce = 'x'\n");
    usage(&["status", "-c", path], &[], &["mine.toml", "line 1", "sorce"]).await;
    usage(&["status", "-c", "/nowhere.toml"], &[], &["cannot read /nowhere.toml"]).await;
    // What a connection string leaves out comes from libpq's variables.
    let port = ends.target.port().to_string();
    let pg = [("PGUSER", "postgres"), ("PGHOST", "127.0.0.1"), ("PGPORT", &*port)];
    let arguments = ["status", "--source", &source, "--target", "dbname=app"];
    let ended = Walferry::spawn_with(&arguments, &pg).ended().await;
    assert!(ended.err.contains("there is no job \"main\""), "{}", ended.err);
    let nobody = [("PGUSER", "nobody_here"), pg[1], pg[2]];
    let ended = Walferry::spawn_with(&arguments, &nobody).ended().await;
    assert!(ended.err.contains("nobody_here"), "{}", ended.err);
}

#[tokio::test]
async fn every_command_explains_itself() {
    let all = Walferry::run(&["--help"]).await;
    assert_eq!(all.code, Some(0));
    for command in
        ["demo", "check", "run", "status", "verify", "cutover", "rollback", "finish", "cancel"]
    {
        assert!(all.out.lines().any(|l| l.trim().starts_with(command)), "{}", all.out);
        let help = Walferry::run(&[command, "--help"]).await;
        assert_eq!((help.code, &*help.err), (Some(0), ""), "{command}");
        // Every option says what it is for.
        for line in help.out.lines().filter(|l| l.trim_start().starts_with("--")) {
            let said = line.trim().split("  ").filter(|part| !part.trim().is_empty()).count();
            assert!(said >= 2 || help.out.contains(&format!("{line}\n          ")), "{line}");
        }
        if command != "demo" {
            let words: Vec<&str> = help.out.split_whitespace().collect();
            assert!(words.join(" ").contains("[env: WALFERRY_SOURCE]"), "{}", help.out);
        }
    }
}

/// Both servers ask for a password, which is in every connection string.
fn with_secret() -> Ends {
    let mut ends = Ends::start(15, 15);
    ends.source
        .psql(
            "app",
            "create table t (id int primary key, v text); \
             insert into t select i, 'v' from generate_series(1, 1000) i",
        )
        .unwrap();
    for server in [&ends.source, &ends.target] {
        let role = format!("create role mover login superuser password '{SECRET}'");
        server.psql("postgres", &role).unwrap();
        let hba = "host all mover all scram-sha-256\nhost replication mover all scram-sha-256\n\
                   host all all all trust\nlocal all all trust\n";
        server.write_data_file("pg_hba.conf", hba).unwrap();
        server.reload().unwrap();
    }
    let role = format!("mover:{SECRET}");
    ends.source_via = ends.source.uri_as(&role, "app");
    ends.target_via = ends.target.uri_as(&role, "app");
    ends
}

#[tokio::test(flavor = "multi_thread")]
async fn no_output_and_no_table_holds_a_secret_and_json_is_one_document() {
    let ends = with_secret();
    let mut said = String::new();
    let mut keep = |ended: crate::support::Ended| {
        said.push_str(&format!("{}\n{}\n", ended.out, ended.err));
        ended
    };
    let report = keep(ends.done(&["check", "--json", "-vv"]).await).json();
    assert_eq!(report["ready"], Value::Bool(true));
    for finding in report["findings"].as_array().unwrap() {
        for key in ["level", "side", "code", "object", "message"] {
            assert!(finding[key].is_string(), "{finding}");
        }
        assert!(finding["fix"].is_string() || finding["fix"].is_null(), "{finding}");
    }
    keep(ends.done(&["check"]).await);
    let run = keep(ends.done(&["run", "--until", "copied", "-vv"]).await);
    assert_eq!(run.out, "");
    assert!(run.err.contains("copied 1,000 rows"), "{}", run.err);
    let mut run = ends.spawn(&["run", "-vv"]);
    ends.until_phase(&mut run, "following").await;
    // A running job's own objects are no obstacles.
    let report = keep(ends.done(&["check", "--json"]).await).json();
    let codes: Vec<&Value> =
        report["findings"].as_array().unwrap().iter().map(|f| &f["code"]).collect();
    assert!(codes.iter().any(|code| *code == "job-has-begun"), "{codes:?}");
    let verified = keep(ends.done(&["verify", "--json", "-v"]).await).json();
    assert_eq!(verified["equal"], Value::Bool(true));
    assert_eq!(verified["tables"][0]["name"], "public.t");
    assert_eq!(verified["tables"][0]["rows"], 1000);
    let dry = keep(ends.done(&["cutover", "--dry-run", "--json"]).await).json();
    assert!(dry["steps"].as_array().is_some_and(|steps| !steps.is_empty()), "{dry}");
    let cut = keep(ends.done(&["cutover", "--json", "-vv"]).await).json();
    assert!(cut["steps"][0]["name"].is_string() && cut["steps"][0]["ms"].is_number(), "{cut}");
    let status = keep(ends.done(&["status", "--json"]).await).json();
    assert!(status["reverse"].is_object() && status["lag_bytes"].is_number(), "{status}");
    let text = keep(ends.done(&["status"]).await);
    for word in ["job      main", "phase    switched", "runner   alive", "forward", "public.t"] {
        assert!(text.out.contains(word), "{}", text.out);
    }
    keep(ends.walferry(&["rollback", "--route", "hook:exit 7"]).await);
    let broken = ends.source.uri_as(&format!("mover:{SECRET}-not"), "app");
    let arguments = ["check", "--source", &broken];
    keep(ends.walferry(&arguments).await);
    let dump = "select string_agg(j::text || s::text, '') from walferry.job j, walferry.stream s";
    let stored = ends.target.psql("app", dump).unwrap();
    let commands = ends.target.psql("app", "select c from walferry.command c").unwrap();
    run.signal("INT");
    keep(run.ended().await.expect_success());
    for text in [&said, &stored, &commands] {
        assert!(!text.contains(SECRET), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_names_the_keys_that_differ_in_both_directions() {
    let ends = Ends::start(15, 15);
    let table = "create table t (id int primary key, v text); \
                 insert into t select i, 'v' from generate_series(1, 500) i";
    ends.source.psql("app", table).unwrap();
    let mut run = ends.spawn(&["run"]);
    ends.until_phase(&mut run, "following").await;
    let differs = async || {
        let ended = ends.walferry(&["verify", "--json"]).await;
        assert_eq!(ended.code, Some(1), "{}", ended.err);
        let report = ended.json();
        assert_eq!(report["equal"], Value::Bool(false));
        assert_eq!(report["tables"][0]["differing"], 3, "{report}");
        let text = ends.walferry(&["verify"]).await;
        assert_eq!(text.code, Some(1));
        for line in ["id=7", "id=8", "id=900", "different values", "missing on the", "only on the"]
        {
            assert!(text.out.contains(line), "no \"{line}\" in: {}", text.out);
        }
    };
    let spoil = "update t set v = 'spoilt' where id = 7; delete from t where id = 8; \
                 insert into t values (900, 'rogue')";
    let mend = "update t set v = 'v' where id = 7; insert into t values (8, 'v'); \
                delete from t where id = 900";
    // No way back is armed yet: nothing carries this to the source.
    ends.target.psql("app", spoil).unwrap();
    differs().await;
    ends.target.psql("app", mend).unwrap();
    ends.done(&["verify"]).await;
    ends.done(&["cutover"]).await;
    run.signal("INT");
    run.ended().await.expect_success();
    // Tagged as carried over from the source, it does not flow back to it.
    let origin = "select pg_replication_origin_session_setup('walferry_main_forward')";
    ends.target.psql("app", &format!("{origin}; {spoil}")).unwrap();
    differs().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nobody_watches_progress_is_lines_with_speed_and_time_left() {
    let mut ends = Ends::start(15, 15);
    let table = "create table t (id int primary key, v text); \
                 insert into t select i, repeat('v', 1000) from generate_series(1, 9000) i";
    ends.source.psql("app", table).unwrap();
    let proxy = Proxy::start(ends.source.port()).unwrap();
    ends.source_via = proxy.uri(&ends.source_uri());
    proxy.throttle(900_000);
    let run = ends.done(&["run", "--until", "following"]).await;
    let line = run.err.lines().find(|line| line.starts_with("copying, ")).unwrap_or_default();
    for part in [" %: ", " rows, ", " rows/s, ", "/s", " left"] {
        assert!(line.contains(part), "no \"{part}\" in \"{line}\" of:\n{}", run.err);
    }
    assert!(run.err.contains("copied 9,000 rows, "), "{}", run.err);
    assert!(!run.err.contains('\x1b') && !run.err.contains('\r'), "{:?}", run.err);
}

/// `walferry check | head -1`.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_away_ends_a_command_in_silence() {
    let ends = Ends::start(15, 15);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_walferry"));
    command.args(["check", "--json", "--source", &ends.source_uri()]);
    command.args(["--target", &ends.target_uri()]);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "");
    assert_eq!(ended.status.code(), Some(141));
}
