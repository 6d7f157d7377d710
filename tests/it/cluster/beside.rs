//! Tasks beside each other, within what nodes may bear, and what is told of how far they are.

use serde_json::Value;
use walferry::demo::proxy::Proxy;

use super::{asked, refused};
use crate::support::{self, Walferry};

/// Rows of the tables whose copy takes its time: 8 MB.
const ROWS: u32 = 75_000;

/// Bytes a second of each connection with the source: such a copy takes eight seconds.
const RATE: u64 = 1_000_000;

/// When a task first came to a state.
fn at(job: &Value, task: u32, state: &str) -> String {
    let history = job["history"].as_array().unwrap();
    let line = history.iter().find(|line| line["task"] == task && line["state"] == state);
    line.unwrap_or_else(|| panic!("{task} {state}: {job}"))["at"].as_str().unwrap().to_string()
}

/// Every task of these numbers has `of MB`, a percentage below 100 and the time left; so has all.
fn tells(said: &str, tasks: &[u32]) -> bool {
    let told = |begins: String| {
        said.lines().any(|line| {
            let percent = line.split(", ").find_map(|part| part.strip_suffix(" %"));
            let percent = percent.and_then(|text| text.parse::<f64>().ok());
            line.starts_with(&begins)
                && line.contains(" MB of ")
                && percent.is_some_and(|percent| percent > 0.0 && percent < 100.0)
                && line.split(", ").any(|part| part.ends_with(" left"))
        })
    };
    tasks.iter().all(|task| told(format!("task {task}: copying ")))
        && told(format!("0 of {} tasks, ", tasks.len()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_run_beside_each_other_as_far_as_is_allowed_and_tell_how_far_they_are() {
    let [a, b] = std::array::from_fn(|_| support::server());
    for server in [&a, &b] {
        server.psql("postgres", "create database app").unwrap();
    }
    let (mut text, proxy) = (String::new(), Proxy::start(a.port()).unwrap());
    for (table, rows) in [("t_1", ROWS), ("t_2", 10), ("t_3", ROWS), ("t_4", 10), ("t_5", 10)] {
        let sql = format!("create table {table} (id int primary key, v text not null)");
        a.psql("app", &sql).unwrap();
        let sql = format!(
            "insert into {table} select i, repeat(md5(i::text), 3) from generate_series(1, {rows}) i"
        );
        a.psql("app", &sql).unwrap();
        text += &format!("[[group]]\nnode = \"a\"\ntables = [\"public.{table}\"]\n");
    }
    a.psql("app", "vacuum analyze").unwrap();
    let nodes = [("a", proxy.uri(&a.uri("app"))), ("b", b.uri("app"))]
        .map(|(name, uri)| format!("[[node]]\nname = \"{name}\"\nuri = \"{uri}\"\n"));
    let path = a.dir().join("nodes.toml");
    let text = format!("home = \"{}\"\n{}{text}", b.uri("app"), nodes.concat());
    std::fs::write(&path, text).unwrap();
    let address = format!("file:{}", path.display());
    let planned = asked(&address, &["replace", "a", "b"]).await;
    assert_eq!(planned["tasks"].as_array().unwrap().len(), 5, "{planned}");
    let of = |table: &str| -> u32 {
        let tasks = planned["tasks"].as_array().unwrap().iter();
        let mut named = tasks.filter(|task| task["tables"][0] == format!("public.{table}"));
        named.next().unwrap()["task"].as_u64().unwrap() as u32
    };
    let [first, left, third, fourth, fifth] = ["t_1", "t_2", "t_3", "t_4", "t_5"].map(of);
    let run = |tasks: [u32; 2], more: &[&str]| {
        let tasks = tasks.map(|task| task.to_string()).join(",");
        let words = ["cluster", "--cluster", &address, "run", "1", "--tasks", &tasks];
        Walferry::spawn(&[&words, more].concat())
    };

    proxy.throttle(RATE);
    let beside = run([first, third], &["--per-node", "2", "--jobs", "1"]);
    support::until("progress is told", || {
        std::future::ready(tells(&beside.so_far(), &[first, third]))
    })
    .await;
    proxy.restore();
    let ended = beside.ended().await.expect_success();
    assert!(ended.out.contains("2 of 2 tasks are completed"), "{ended:?}");
    // One after the other, though their nodes had room for both.
    let words = ["--per-node", "2", "--parallel", "1", "--finish"];
    run([fourth, fifth], &words).ended().await.expect_success();
    let job = asked(&address, &["job", "1"]).await;
    assert!(at(&job, first.max(third), "running") < at(&job, first.min(third), "completed"));
    let [before, after] = [fourth.min(fifth), fourth.max(fifth)];
    assert!(at(&job, before, "completed") < at(&job, after, "running"), "{job}");
    let row = |task: u32| job["tasks"].as_array().unwrap()[task as usize - 1].clone();
    assert_eq!((&row(left)["state"], &row(first)["way_back"]), (&"init".into(), &true.into()));
    assert_eq!((&job["state"], &row(fifth)["phase"]), (&"running".into(), &"finished".into()));
    let said = refused(&address, &["run", "1", "--tasks", "1,9"]).await;
    assert!(said.contains("has no task 9"), "{said}");
}
