//! What stands at the end of a command's help: how it is used, and what its numbers may be.

/// The examples, then what holds for all commands.
macro_rules! help {
    ($($line:literal)*) => {
        concat!(
            "Examples:\n",
            $("  ", $line, "\n",)*
            "\nTIME is 200ms, 1.5s, 10m, 1h or 7d; a number alone is seconds.\n",
            "SIZE is 512kB, 64MB, 1.5GB or 1TB, in powers of 1024; a number alone is bytes.\n",
            "What is not given is taken from walferry.toml, where options have the same names.\n",
            "Exit codes: 0 done, 1 not, 2 wrong usage."
        )
    };
}

pub const CHECK: &str = help!(
    "walferry check --source postgres://admin@old/shop --target postgres://admin@new/shop"
    "walferry check --json | jq -r '.findings[] | select(.level == \"error\") | .fix'"
);
pub const SLOT: &str = help!(
    "walferry slot create"
    "walferry slot create --hold        # and pg_dump --snapshot=... meanwhile"
);
pub const RUN: &str = help!(
    "walferry run                       # until Ctrl-C; the same command goes on from there"
    "walferry run --until following     # for scripts: returns once the target is level"
    "walferry run --include 'public.order*' --exclude public.order_log"
    "walferry run --buffer spool:/var/lib/walferry --wal-budget 20GB"
);
pub const CAPTURE: &str = help!(
    "walferry capture --buffer kafka:broker1:9092,broker2:9092/shop"
    "walferry capture --take-over       # waits until another one ends"
);
pub const APPLY: &str = help!(
    "walferry apply --buffer kafka:broker1:9092,broker2:9092/shop"
    "walferry apply --take-over         # waits until another one ends"
);
pub const STATUS: &str = help!(
    "walferry status --watch"
    "walferry status --json | jq .lag_bytes"
);
pub const VERIFY: &str = help!(
    "walferry verify && echo equal"
    "walferry verify --json --timeout 1h"
);
pub const QUARANTINE: &str = help!(
    "walferry quarantine list --json"
    "walferry quarantine retry public.orders"
    "walferry quarantine drop --id 17"
);
pub const CUTOVER: &str = help!(
    "walferry cutover --dry-run"
    "walferry cutover --route pgbouncer:postgres://admin@pooler/pgbouncer,/etc/pgbouncer.ini,shop"
    "walferry cutover --route 'hook:/opt/point-clients' --max-hold 2s"
    "walferry cutover --tables 'public.items_00*' --route 'hook:/opt/point-clients'"
);
pub const ROLLBACK: &str = help!(
    "walferry rollback                  # by the routes of the cutover"
    "walferry rollback --route 'hook:/opt/point-clients'"
);
pub const FINISH: &str = help!(
    "walferry finish"
    "walferry finish --keep-history"
);
pub const CANCEL: &str = help!(
    "walferry cancel"
    "walferry cancel --source-is-gone   # the old server will never come back"
);
pub const CLUSTER: &str = help!(
    "walferry cluster --cluster citus:postgres://admin@coordinator/shop show"
    "walferry cluster rebalance --dry-run"
    "walferry cluster run 1 --parallel 4"
);
pub const RESHARD: &str = help!(
    "walferry reshard -c reshard.toml check"
    "walferry reshard -c reshard.toml run"
    "walferry reshard -c reshard.toml cutover --one-way"
);
pub const DEMO: &str = "Examples:
  walferry demo
  walferry demo --scale 10 --rate 100

Exit codes: 0 both compares exact and nothing lost, 1 not, 2 wrong usage.";

/// Of the program itself.
pub const ALL: &str = "A move is check, run, verify and cutover, in this order; then rollback, or \
     finish. `walferry COMMAND --help` has each command's options and examples.";
