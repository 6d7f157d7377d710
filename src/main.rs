//! Arguments, run, exit code.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use walferry::cli::{self, Cli};

// Rows are many small allocations on two threads; mimalloc frees across threads cheaply.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// As after SIGPIPE.
const PIPE_CLOSED: i32 = 141;

fn main() -> ExitCode {
    end_with_the_reader();
    cli::take_small_pages(true);
    let cli = Cli::parse_from(cli::command_first(std::env::args_os().collect()));
    let level = match cli.verbose {
        0 => "walferry=error",
        1 => "walferry=info",
        _ => "walferry=debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("WALFERRY_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("walferry: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(cli::run(cli));
    // A blocking read of a child or a resolver must not hold the exit up.
    runtime.shutdown_background();
    code
}

/// `walferry status | head -1`: println panics once its reader has gone, which is nobody's fault.
/// The signal that ends other programs then is turned off in Rust's.
fn end_with_the_reader() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let said = panic.payload().downcast_ref::<String>();
        if said.is_some_and(|said| said.starts_with("failed printing to stdout")) {
            std::process::exit(PIPE_CLOSED);
        }
        tell(panic);
    }));
}
