//! `walferry demo`: the whole move on two throw-away servers, with the commands a user would type.
//!
//! Every step runs this same binary as a child, prints the command, and shows what it says. A
//! writer works through pgbouncer all the while; it knows which of its transactions were
//! acknowledged, so the end is not "looks fine" but a count. The two final compares read both
//! databases whole and do not use walferry's own verify. Everything lives in temporary directories
//! and is gone afterwards.

use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;
use tokio::process::{Child, Command};

use super::print;
use crate::demo::compare::compare;
use crate::demo::kafka::{self, Broker};
use crate::demo::ledger;
use crate::demo::pgbouncer::PgBouncer;
use crate::demo::server::Server;
use crate::demo::writer::{Options, Report, Writer, broken_invariants, create_schema};
use crate::pg::{Config, Purpose, Session};

/// Transactions written on each side after each switch; ten seconds at the default rate.
const WORK_TRANSACTIONS: u64 = 3000;

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Size of the database, about 5 MB for each
    #[arg(long, value_name = "N", default_value_t = 60,
        value_parser = clap::value_parser!(u32).range(1..))]
    scale: u32,
    /// Transactions a second that the writer aims at
    #[arg(long, value_name = "N", default_value_t = 300.0, value_parser = rate)]
    rate: f64,
    /// Move through a throw-away Apache Kafka (Java 17 and Maven are needed)
    #[arg(long)]
    kafka: bool,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err("is not a number of transactions a second, such as 300".to_string()),
    }
}

/// The stage: two servers, a pooler, and this binary.
struct Stage {
    source: Server,
    target: Server,
    pooler: PgBouncer,
    broker: Option<Broker>,
    program: PathBuf,
    started: Instant,
}

/// Moves a database there and back. 0 only if both compares are exact and nothing was lost.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let stage = Stage::build(&args).await?;
    let writer = Writer::start(Options {
        tx_per_second: Some(args.rate),
        ..Options::new(&stage.pooler.uri("app"))
    })
    .await?;
    stage.say(&format!("a writer is at work through pgbouncer, {} transactions/s", args.rate));
    let mut runner = stage.start_run().await?;
    let outcome = stage.play(&writer).await;
    let report = writer.stop().await;
    let exact = match outcome {
        Ok(story) => stage.end(&story, &report).await,
        Err(error) => Err(error),
    };
    let _ = runner.kill().await;
    Ok(if exact? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What is told at the end.
struct Story {
    rows_copied: u64,
    applied: u64,
    cutover: Value,
    rollback: Value,
    there_exact: bool,
    back_exact: bool,
}

impl Stage {
    async fn build(args: &Args) -> anyhow::Result<Stage> {
        let started = Instant::now();
        let bin = Server::default_bin()?;
        println!("starting two PostgreSQL servers and a pgbouncer in temporary directories");
        let source = Server::start(&bin, &[]).context("starting the source")?;
        let target = Server::start(&bin, &[]).context("starting the target")?;
        for server in [&source, &target] {
            server.psql("postgres", "create database app")?;
        }
        let pooler = PgBouncer::start(&source, &["app"]).context("starting pgbouncer")?;
        let broker = match args.kafka {
            true => {
                println!("starting Apache Kafka {}", kafka::VERSION);
                Some(Broker::start(&[]).context("starting Kafka")?)
            }
            false => None,
        };
        let program = std::env::current_exe()?;
        let stage = Stage { source, target, pooler, broker, program, started };
        stage.say("filling the source");
        create_schema(&stage.source.uri("app"), args.scale).await?;
        let size = stage.source.psql("app", "select pg_database_size('app')")?;
        stage.say(&format!("the source holds {}", print::bytes(size.parse()?)));
        Ok(stage)
    }

    fn say(&self, text: &str) {
        println!("[{:>5.1} s] {text}", self.started.elapsed().as_secs_f64());
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).env("WALFERRY_SOURCE", self.source.uri("app"));
        command.env("WALFERRY_TARGET", self.target.uri("app")).env("WALFERRY_NAME", "demo");
        if let Some(broker) = &self.broker {
            command.env("WALFERRY_BUFFER", format!("kafka:{}/walferry-demo", broker.address()));
        }
        command.stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    /// Runs a command to its end; its standard output, if it succeeded.
    async fn walferry(&self, args: &[&str]) -> anyhow::Result<String> {
        self.say(&format!("$ walferry {}", args.join(" ")));
        let output = self.command(args).stderr(Stdio::inherit()).output().await?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!("walferry {} failed: {text}", args.join(" "));
        }
        Ok(text)
    }

    async fn start_run(&self) -> anyhow::Result<Child> {
        self.walferry(&["check"]).await?;
        self.say("$ walferry run &");
        Ok(self.command(&["run"]).spawn()?)
    }

    async fn status(&self) -> anyhow::Result<Value> {
        let output = self.command(&["status", "--json"]).stderr(Stdio::null()).output().await?;
        Ok(serde_json::from_slice(&output.stdout).unwrap_or(Value::Null))
    }

    async fn until_phase(&self, phase: &str) -> anyhow::Result<()> {
        loop {
            let status = self.status().await?;
            if print::text(&status, "/phase") == phase {
                return Ok(());
            }
            let error = print::text(&status, "/error");
            if !error.is_empty() && print::text(&status, "/runner").is_empty() {
                bail!("the run stopped: {error}");
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn play(&self, writer: &Writer) -> anyhow::Result<Story> {
        self.until_phase("following").await?;
        self.say("the target follows");
        self.verify().await?;
        let route = format!(
            "pgbouncer:{},{},app",
            self.pooler.admin_uri(),
            self.pooler.ini_path().display()
        );
        let (there, back) = ((&self.source, &self.target), (&self.target, &self.source));
        let cutover = self.flip("cutover", &route).await?;
        self.work_on(writer).await?;
        self.verify().await?;
        let there_exact = self.compare_at_rest(writer, there, "after the cutover").await?;
        let rollback = self.flip("rollback", &route).await?;
        self.work_on(writer).await?;
        self.verify().await?;
        let back_exact = self.compare_at_rest(writer, back, "after the rollback").await?;
        let (rows_copied, applied) = self.counted().await?;
        self.walferry(&["finish"]).await?;
        Ok(Story { rows_copied, applied, cutover, rollback, there_exact, back_exact })
    }

    /// The application works for a while on the side it is on.
    async fn work_on(&self, writer: &Writer) -> anyhow::Result<()> {
        self.say("the writer goes on there");
        if !writer.committed_more(WORK_TRANSACTIONS).await {
            bail!("the writer is stuck");
        }
        Ok(())
    }

    async fn verify(&self) -> anyhow::Result<()> {
        let report: Value = serde_json::from_str(&self.walferry(&["verify", "--json"]).await?)?;
        let rows = sum(&report, "/tables", "/rows");
        self.say(&format!("equal, {} rows, both sides live", print::count(rows)));
        Ok(())
    }

    async fn flip(&self, command: &str, route: &str) -> anyhow::Result<Value> {
        let text = self.walferry(&[command, "--route", route, "--json"]).await?;
        let outcome: Value = serde_json::from_str(&text)?;
        self.say(&format!(
            "switched; writers were held for {:.1} ms",
            print::number(&outcome, "/fenced_ms")
        ));
        Ok(outcome)
    }

    /// The writer rests while both databases are read whole; verify's aligned point makes sure that
    /// the stream has brought everything over.
    async fn compare_at_rest(
        &self,
        writer: &Writer,
        (old, live): (&Server, &Server),
        when: &str,
    ) -> anyhow::Result<bool> {
        writer.pause().await;
        self.verify().await?;
        let comparison = compare(&old.uri("app"), &live.uri("app")).await?;
        writer.resume();
        for difference in comparison.differences.iter().take(10) {
            self.say(difference);
        }
        let verdict = if comparison.is_equal() { "exact" } else { "DIFFERENT" };
        let rows = print::count(comparison.rows());
        self.say(&format!("compare {when}, read row by row: {verdict}, {rows} rows"));
        Ok(comparison.is_equal())
    }

    async fn counted(&self) -> anyhow::Result<(u64, u64)> {
        let status = self.status().await?;
        let there = sum(&status, "/tables", "/applied");
        let back = sum(&status, "/reverse/tables", "/applied");
        Ok((sum(&status, "/tables", "/rows_copied"), there + back))
    }

    async fn end(&self, story: &Story, report: &Report) -> anyhow::Result<bool> {
        let check = ledger::check(&self.source.uri("app"), &report.ledger).await?;
        let broken = broken_invariants(&self.source.uri("app")).await?;
        let left = self.leftovers().await?;
        let good = |yes: bool| if yes { "exact" } else { "DIFFERENT" };
        println!();
        println!("rows moved             {}", print::count(story.rows_copied));
        println!("changes applied        {}", print::count(story.applied));
        println!("transactions           {}", print::count(report.committed));
        println!("failed statements      {}", report.failed_statements);
        println!("longest write stall    {:.1} ms", report.longest_stall.as_secs_f64() * 1e3);
        println!(
            "writers held           {:.1} ms at cutover, {:.1} ms at rollback",
            print::number(&story.cutover, "/fenced_ms"),
            print::number(&story.rollback, "/fenced_ms")
        );
        println!("compare after cutover  {}", good(story.there_exact));
        println!("compare after rollback {}", good(story.back_exact));
        println!(
            "ledger                 {} acknowledged, {} lost, {} twice",
            print::count(report.ledger.acknowledged()),
            check.lost.len(),
            check.duplicated.len()
        );
        for line in broken.iter().chain(&left) {
            println!("wrong                  {line}");
        }
        println!("time                   {:.0} s", self.started.elapsed().as_secs_f64());
        Ok(story.there_exact
            && story.back_exact
            && check.is_exact()
            && broken.is_empty()
            && left.is_empty()
            && report.failed_statements == 0)
    }

    /// What of walferry is left on either side; nothing is good.
    async fn leftovers(&self) -> anyhow::Result<Vec<String>> {
        let mut left = Vec::new();
        for (side, server) in [("source", &self.source), ("target", &self.target)] {
            let config = Config::parse(&server.uri("app"))?;
            let mut session = Session::connect(&config, Purpose::Sql).await?;
            let rows = session
                .query(
                    "select 'slot ' || slot_name from pg_catalog.pg_replication_slots \
                     union all select 'publication ' || pubname from pg_catalog.pg_publication \
                     union all select 'origin ' || roname from pg_catalog.pg_replication_origin \
                     union all select 'schema ' || nspname from pg_catalog.pg_namespace \
                        where nspname = 'walferry' \
                     union all select 'trigger ' || tgname from pg_catalog.pg_trigger \
                        where tgname like 'walferry%'",
                )
                .await?;
            for row in &rows {
                left.push(format!("{} is left on the {side}", row.str(0)?));
            }
        }
        Ok(left)
    }
}

/// The sum of one figure over a list of tables.
fn sum(value: &Value, list: &str, figure: &str) -> u64 {
    print::list(value, list).iter().map(|table| print::number(table, figure) as u64).sum()
}
