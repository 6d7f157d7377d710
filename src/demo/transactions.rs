//! What the writer's transactions do: plans of statements made from a seed, without any I/O.
//!
//! No plan fails or deadlocks on its own, so every failure the writer sees was done to it. That
//! takes an order of locks (account, teller, branch; shop.scratch before anything else) and rows
//! that one connection has to itself where two movers of one row would collide.

use fastrand::Rng;

use crate::id::quote_literal;

/// A kind of transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// pgbench's: one account, teller and branch, and a row of history.
    Transfer,
    /// An order with its items; a trigger writes a log.
    Order,
    /// An order changes state, an item its quantity.
    OrderUpdate,
    /// An order goes, its items by cascade.
    OrderDelete,
    /// INSERT ... ON CONFLICT DO UPDATE of several rows.
    Upsert,
    /// A document's counter; its long values stay as they are.
    DocumentView,
    /// A document's long values themselves, or its key while they stay.
    DocumentEdit,
    /// Insert, update and delete among the duplicates of a table without a key.
    Audit,
    /// The key of an identity index changes.
    KeyChange,
    /// An event moves to another partition, is changed, deleted or made.
    Event,
    /// Savepoints, some rolled back to.
    Savepoint,
    /// Everything is rolled back.
    Rollback,
    /// TRUNCATE of a small table.
    Truncate,
    /// Some hundred rows in one transaction.
    Burst,
}

/// Kinds and how many of a thousand transactions are of them.
const WEIGHTS: [(Kind, u32); 14] = [
    (Kind::Transfer, 400),
    (Kind::Order, 120),
    (Kind::OrderUpdate, 100),
    (Kind::OrderDelete, 20),
    (Kind::Upsert, 60),
    (Kind::DocumentView, 60),
    (Kind::DocumentEdit, 30),
    (Kind::Audit, 50),
    (Kind::KeyChange, 40),
    (Kind::Event, 60),
    (Kind::Savepoint, 30),
    (Kind::Rollback, 20),
    (Kind::Truncate, 3),
    (Kind::Burst, 7),
];

/// What there is to write to, asked once when the writer starts. Highest numbers, 0 where empty.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub branches: i64,
    pub accounts: i64,
    pub orders: i64,
    pub documents: i64,
    pub events: i64,
    pub slots: i64,
    /// False where TRUNCATE is not decoded, before 11: rows are deleted instead.
    pub truncates: bool,
}

/// Which connection plans, of how many, and the number of its transaction.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    pub writer: i32,
    pub index: i64,
    pub connections: i64,
    pub seq: i64,
}

/// One transaction: what stands between BEGIN and its end.
#[derive(Clone, Debug)]
pub struct Plan {
    pub kind: Kind,
    pub statements: Vec<String>,
    /// COMMIT, or ROLLBACK on purpose.
    pub commits: bool,
}

/// The next transaction. The same seed gives the same sequence.
pub fn plan(rng: &mut Rng, world: &World, turn: Turn) -> Plan {
    let kind = pick(rng);
    let mut statements = body(kind, rng, world, turn);
    let commits = kind != Kind::Rollback;
    let name = format!("{kind:?}").to_lowercase();
    statements.push(format!(
        "insert into bank.ledger (writer, seq, kind) values ({}, {}, '{name}')",
        turn.writer, turn.seq
    ));
    Plan { kind, statements, commits }
}

fn pick(rng: &mut Rng) -> Kind {
    let total: u32 = WEIGHTS.iter().map(|(_, weight)| weight).sum();
    let mut left = rng.u32(0..total);
    for (kind, weight) in WEIGHTS {
        if left < weight {
            return kind;
        }
        left -= weight;
    }
    Kind::Transfer
}

fn body(kind: Kind, rng: &mut Rng, world: &World, turn: Turn) -> Vec<String> {
    match kind {
        Kind::Transfer => transfer(rng, world),
        Kind::Order => vec![order(rng), "select nextval('shop.ticket')".to_string()],
        Kind::OrderUpdate => order_update(rng, world),
        Kind::OrderDelete => {
            vec![format!("delete from shop.orders where id = {}", some_order(rng, world))]
        }
        Kind::Upsert => vec![upsert(rng)],
        Kind::DocumentView => vec![format!(
            "update shop.documents set views = views + 1 where id = {}",
            upto(rng, world.documents)
        )],
        Kind::DocumentEdit => document_edit(rng, world, turn),
        Kind::Audit => audit(rng),
        Kind::KeyChange => key_change(rng, world),
        Kind::Event => vec![event(rng, world, turn)],
        Kind::Savepoint => savepoint(rng, world),
        Kind::Rollback => {
            let mut statements = transfer(rng, world);
            statements.push(order(rng));
            statements.push("select nextval('shop.countdown')".to_string());
            statements
        }
        Kind::Truncate => {
            let clear = match (world.truncates, rng.bool()) {
                (false, _) => "delete from shop.scratch",
                (true, false) => "truncate shop.scratch",
                (true, true) => "truncate shop.scratch restart identity",
            };
            vec![clear.to_string(), scratch(rng, 3)]
        }
        Kind::Burst => burst(rng, world, turn),
    }
}

fn transfer(rng: &mut Rng, world: &World) -> Vec<String> {
    let delta = rng.i64(-5000..=5000);
    let (aid, tid) = (upto(rng, world.accounts), upto(rng, world.branches * 10));
    let bid = (tid - 1) / 10 + 1;
    vec![
        format!("update bank.accounts set abalance = abalance + {delta} where aid = {aid}"),
        format!("select abalance from bank.accounts where aid = {aid}"),
        format!("update bank.tellers set tbalance = tbalance + {delta} where tid = {tid}"),
        format!("update bank.branches set bbalance = bbalance + {delta} where bid = {bid}"),
        format!(
            "insert into bank.history (tid, bid, aid, delta, mtime) \
             select {tid}, {bid}, {aid}, {delta}, clock_timestamp() \
             where exists (select 1 from bank.accounts where aid = {aid})"
        ),
    ]
}

fn order(rng: &mut Rng) -> String {
    let state = any(rng, &["new", "paid", "sent", "returned"]);
    let weight = any(rng, &["0.1::float8 + 0.2", "'NaN'", "'-Infinity'", "1e-300", "null", "'-0'"]);
    let discount = any(rng, &["'NaN'", "12345678901234567890.123456789", "0.00", "-1e-20", "null"]);
    let paid_on = any(rng, &["'infinity'", "'0044-03-15 BC'", "'12024-02-29'", "null", "'today'"]);
    let took = any(rng, &["'1 mon -1 day 00:00:00.000001'", "'-178000000 years'", "null"]);
    let valid = any(rng, &["'empty'", "'[2024-01-01,infinity)'", "'(,)'", "null"]);
    let past = any(rng, &["'{}'", "'{new,paid}'", "array['sent']::shop.order_state[]"]);
    format!(
        "with made as (insert into shop.orders (customer, state, past, placed, valid, tags, \
         ship_to, note, urgent, weight, discount, paid_on, took, mac) values ({}, '{state}', \
         {past}, clock_timestamp(), {valid}, array[{}, null, {}], \
         row({}, null, {})::shop.address, {}, {}, {weight}, {discount}, {paid_on}, {took}, \
         '08:00:2b:01:02:03') returning id) \
         insert into shop.items (order_id, line, sku, qty, price) \
         select id, l, 'sku-' || l * {}, l, l * 1.25 from made, generate_series(1, {}) l",
        rng.u32(1..997),
        text(rng),
        text(rng),
        text(rng),
        rng.u32(..) / 4,
        text(rng),
        any(rng, &["true", "false", "null"]),
        rng.u32(1..100),
        rng.u32(1..6)
    )
}

fn order_update(rng: &mut Rng, world: &World) -> Vec<String> {
    let id = some_order(rng, world);
    let state = any(rng, &["new", "paid", "sent", "returned"]);
    vec![
        format!("update shop.orders set past = past || state, state = '{state}' where id = {id}"),
        format!("update shop.items set qty = qty + 1 where order_id = {id} and line = 1"),
    ]
}

/// An order that was there at the start, or the next one that still is.
fn some_order(rng: &mut Rng, world: &World) -> String {
    let id = upto(rng, world.orders);
    format!("(select id from shop.orders where id >= {id} order by id limit 1)")
}

fn upsert(rng: &mut Rng) -> String {
    let (first, count) = (rng.u32(0..2000), rng.u32(1..5));
    // Ordered, so that two of these never wait for each other in a circle.
    format!(
        "insert into shop.stock select 'sku-' || g, 1, clock_timestamp() \
         from generate_series({first}, {first} + {count}) g order by ('sku-' || g) collate \"C\" \
         on conflict (sku) do update set qty = stock.qty - 1, updated = excluded.updated"
    )
}

fn document_edit(rng: &mut Rng, world: &World, turn: Turn) -> Vec<String> {
    let id = upto(rng, world.documents);
    let long = format!(
        "(select string_agg(md5(g::text || {}), '') from generate_series(1, {}) g)",
        quote_literal(&rng.u32(..).to_string()),
        rng.u32(1..400)
    );
    // Numbers above a billion are the writers' own: writer and seq make them unique.
    let fresh = 1_000_000_000 + i64::from(turn.writer) * 1_000_000_000_000 + turn.seq;
    vec![match rng.u32(0..6) {
        0 => format!("update shop.documents set body = {long} where id = {id}"),
        1 => format!(
            "update shop.documents set meta = jsonb_set(meta, '{{text}}', to_jsonb({long})), \
             raw = '{{\"a\" :  1, \"a\": 2}}' where id = {id}"
        ),
        2 => {
            format!("update shop.documents set body = null, title = {} where id = {id}", text(rng))
        }
        // The key changes, and none of the long values does.
        3 => format!("update shop.documents set id = {fresh} where id = {id}"),
        4 => "delete from shop.documents where id = \
              (select id from shop.documents where id >= 1000000000 order by id limit 1)"
            .to_string(),
        _ => format!(
            "insert into shop.documents (id, title, body, meta, seal) \
             values ({fresh}, {}, {long}, '{{\"n\": 1e400, \"u\": \"\\u00e9\"}}', '\\x00ff5c27')",
            text(rng)
        ),
    }]
}

fn audit(rng: &mut Rng) -> Vec<String> {
    let who = any(rng, &["is null", "= 'user 1'", "= 'user 2'"]);
    let one =
        format!("(select ctid from shop.audit where who {who} limit 1 for update skip locked)");
    let name = any(rng, &["null", "'user 1'", "'user 2'"]);
    vec![match rng.u32(0..4) {
        0 => format!("update shop.audit set n = n + 1 where ctid = {one}"),
        1 => format!("delete from shop.audit where ctid = {one}"),
        // Nothing changes; a new version of the row is written all the same.
        2 => format!("update shop.audit set n = n where ctid = {one}"),
        _ => format!(
            "insert into shop.audit select '2024-01-01', {name}, 'did', null, 'NaN' \
             from generate_series(1, 2)"
        ),
    }]
}

fn key_change(rng: &mut Rng, world: &World) -> Vec<String> {
    let slot = upto(rng, world.slots);
    let table = "\"Odd \"\"Schema\".\"Key \"\"Changes\"\"\"";
    let fresh = "nextval('\"Odd \"\"Schema\".\"The Keys\"')";
    vec![match rng.u32(0..4) {
        0 => format!(
            "update {table} set \"sélect\" = {}, \"Größe\" = 0.1 where slot = {slot}",
            text(rng)
        ),
        // A slot of its own: rows that share one could be locked in two orders.
        1 => format!(
            "insert into {table} select k, k, {}, '-infinity' from (select {fresh} as k) f",
            text(rng)
        ),
        _ => format!("update {table} set \"The Key\" = {fresh} where slot = {slot}"),
    }]
}

fn event(rng: &mut Rng, world: &World, turn: Turn) -> String {
    // Two who move one row at once would be told to try again; each connection has its own rows.
    let id = upto(rng, world.events) / turn.connections * turn.connections + turn.index;
    let region = any(rng, &["north", "south", "east"]);
    match rng.u32(0..8) {
        0 => format!("delete from shop.events where id = {id}"),
        1 => format!("update shop.events set payload = payload || '{{\"x\": 1}}' where id = {id}"),
        2..=4 => format!("update shop.events set region = '{region}' where id = {id}"),
        _ => format!(
            "insert into shop.events (region, at, level) \
             values ('{region}', clock_timestamp(), {})",
            rng.u32(0..5)
        ),
    }
}

fn savepoint(rng: &mut Rng, world: &World) -> Vec<String> {
    let mut statements = vec![scratch(rng, 1), "savepoint a".to_string(), scratch(rng, 2)];
    statements.extend(key_change(rng, world));
    statements.push("savepoint b".to_string());
    statements.push(order(rng));
    let back = any(rng, &["a", "b"]);
    statements.push(format!("rollback to savepoint {back}"));
    statements.push(scratch(rng, 1));
    if rng.bool() {
        statements.push("release savepoint a".to_string());
    }
    statements
}

fn scratch(rng: &mut Rng, rows: u32) -> String {
    format!("insert into shop.scratch (t) select {} from generate_series(1, {rows})", text(rng))
}

fn burst(rng: &mut Rng, world: &World, turn: Turn) -> Vec<String> {
    let rows = rng.u32(100..800);
    if rng.bool() {
        return vec![scratch(rng, rows), scratch(rng, rows)];
    }
    // A hundred accounts that no other connection's burst touches.
    let hundred =
        upto(rng, world.accounts) / 100 / turn.connections * turn.connections + turn.index;
    let first = hundred * 100;
    vec![format!(
        "update bank.accounts set filler = {} where aid >= {first} and aid < {first} + 100",
        text(rng)
    )]
}

/// 1 to `last`.
fn upto(rng: &mut Rng, last: i64) -> i64 {
    rng.i64(1..=last.max(1))
}

fn any<'a>(rng: &mut Rng, from: &[&'a str]) -> &'a str {
    rng.choice(from).copied().unwrap_or_default()
}

/// A literal that is easy to get wrong on the way.
fn text(rng: &mut Rng) -> String {
    let texts = [
        "plain",
        "",
        "it's \"quoted\"",
        "back\\slash \\N \\. end",
        "tab\tline\nreturn\r",
        "ünïcödé 🐘 {a,b} (c)",
        "null",
        " spaces ",
        "%s $1 :x ?",
    ];
    match rng.u32(0..12) {
        0 => "null".to_string(),
        1 => format!("repeat('x{}', 7)", rng.u32(..)),
        _ => quote_literal(any(rng, &texts)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_one_sequence_and_every_kind() {
        let world = World { branches: 10, accounts: 100, ..World::default() };
        let sequence = |seed| {
            let mut rng = Rng::with_seed(seed);
            let turn = |seq| Turn { writer: 1, index: 0, connections: 2, seq };
            (1..2000).map(|seq| plan(&mut rng, &world, turn(seq))).collect::<Vec<_>>()
        };
        let (one, two) = (sequence(7), sequence(7));
        assert!(one.iter().zip(&two).all(|(a, b)| a.statements == b.statements));
        for (kind, _) in WEIGHTS {
            assert!(one.iter().any(|plan| plan.kind == kind), "{kind:?}");
        }
    }
}
