-- The tables the writer writes to: every kind that has broken a mover of databases.
-- :scale, :branches and the lines marked with a version are filled in by dataset.rs.
create schema bank;
create schema shop;
create schema "Odd ""Schema";

-- A bank whose balances must always sum up equal, whatever transaction one looks after.
create table bank.branches (bid int not null, bbalance bigint not null, filler char(88));
create table bank.tellers (tid int not null, bid int not null, tbalance bigint not null, filler char(84));
create table bank.accounts (aid bigint not null, bid int not null, abalance bigint not null, filler char(84));
-- Without a key, as pgbench has it: a row applied twice shows in the sums.
create table bank.history (tid int, bid int, aid bigint, delta bigint, mtime timestamptz, filler char(22));
-- A row per committed transaction. No unique index, which would hide or refuse what comes twice.
create table bank.ledger (writer int not null, seq bigint not null, kind text not null,
    at timestamptz not null default clock_timestamp());

create type shop.order_state as enum ('new', 'paid', 'sent', 'returned');
create type shop.address as (street text, town text, zip int);
create domain shop.quantity as int check (value >= 0);

-- Identity, enum, array of an enum, range, composite, and values at the edge of their types.
create table shop.orders (
    id bigint generated always as identity, customer int not null,
    state shop.order_state not null default 'new', past shop.order_state[] not null default '{}',
    placed timestamptz not null, valid tstzrange, tags text[], ship_to shop.address, note text,
    urgent boolean, weight double precision, discount numeric, paid_on date, took interval, mac macaddr);
-- A generated column, and rows that go by cascade.
create table shop.items (
    order_id bigint not null, line int not null, sku text not null, qty shop.quantity not null,
    price numeric(12,2) not null,
    total numeric generated always as (qty * price) stored, -- from 12
    primary key (order_id, line));
-- Filled by a trigger, which must not fire again on the other side.
create table shop.order_log (id bigserial, order_id bigint, state shop.order_state, at timestamptz);
-- Long values out of line that most updates leave alone.
create table shop.documents (id bigint not null, title varchar(200), body text, meta jsonb, raw json,
    seal bytea, views int not null default 0);
alter table shop.documents alter column body set storage external;
create table shop.stock (sku text not null, qty int not null, updated timestamptz);
-- No key: duplicates and NULLs, told apart by nothing.
create table shop.audit (at date, who text, what text, n int, amount numeric);
-- Rows move between partitions.
create sequence shop.event_id;
create table shop.events (id bigint not null default nextval('shop.event_id'), region text not null,
    at timestamptz not null, level smallint, payload jsonb)
    partition by list (region) -- from 11
;
create table shop.events_north partition of shop.events for values in ('north'); -- from 11
create table shop.events_south partition of shop.events for values in ('south'); -- from 11
create table shop.events_rest partition of shop.events default; -- from 11
-- Small, and truncated now and then.
create table shop.scratch (id serial, t text);
-- Identified by a unique index that is not the primary key, under names that need quotes.
create sequence "Odd ""Schema"."The Keys";
create table "Odd ""Schema"."Key ""Changes""" ("The Key" bigint not null, slot int not null,
    "sélect" text, "Größe" real);
create sequence shop.ticket increment by 7 cache 10;
create sequence shop.countdown increment by -3;

insert into bank.branches select g, 0, 'branch' from generate_series(1, :branches) g;
insert into bank.tellers select g, (g - 1) / 10 + 1, 0, 'teller' from generate_series(1, :branches * 10) g;
insert into bank.accounts select g, g % :branches + 1, 0, md5(g::text) from generate_series(1, 10000 * :scale) g;
insert into shop.orders (customer, state, placed, valid, tags, ship_to, note, urgent, weight, discount, paid_on, took)
    select g % 997, (array['new', 'paid', 'sent', 'returned'])[g % 4 + 1]::shop.order_state,
        '2024-01-01'::timestamptz + g * interval '1 minute',
        tstzrange('2024-01-01'::timestamptz, '2024-01-01'::timestamptz + g * interval '1 hour'),
        array['a', md5(g::text), null], row('Main Street ' || g, 'Town, "the" one', g)::shop.address,
        'note ' || md5(g::text), g % 2 = 0, g / 7.0, g / 3.0, '2024-01-01'::date + g % 1000, g * interval '1 s'
    from generate_series(1, 2000 * :scale) g;
insert into shop.items (order_id, line, sku, qty, price)
    select o, l, 'sku-' || (o * 3 + l) % 1000, l * 2, o % 100 + l / 100.0
    from generate_series(1, 2000 * :scale) o, generate_series(1, 3) l;
insert into shop.documents
    select g, 'document ' || g, (select string_agg(md5(g::text || i::text), '') from generate_series(1, 200) i),
        jsonb_build_object('id', g, 'tags', array[md5(g::text)], 'text', repeat(md5(g::text), 40)),
        json_build_object('id', g), decode(md5(g::text), 'hex'), 0
    from generate_series(1, 100 * :scale) g;
insert into shop.stock select 'sku-' || g, 1000, null from generate_series(0, 999) g;
insert into shop.audit select '2024-01-01'::date + g % 10, nullif('user ' || g % 5, 'user 0'), 'did', g % 3, null
    from generate_series(1, 1000 * :scale) g;
insert into shop.events (region, at, level, payload)
    select (array['north', 'south', 'east', 'west'])[g % 4 + 1], '2024-01-01'::timestamptz + g * interval '1 s',
        g % 5, jsonb_build_object('n', g, 'digest', md5(g::text)) from generate_series(1, 4000 * :scale) g;
insert into "Odd ""Schema"."Key ""Changes""" select nextval('"Odd ""Schema"."The Keys"'), g, 'x' || g, g / 3.0
    from generate_series(1, 500 * :scale) g;

alter table bank.branches add primary key (bid);
alter table bank.tellers add primary key (tid), add foreign key (bid) references bank.branches;
alter table bank.accounts add primary key (aid), add foreign key (bid) references bank.branches;
create index on bank.ledger (writer, seq);
alter table shop.orders add primary key (id);
create index on shop.orders (state) where state <> 'sent';
alter table shop.items add foreign key (order_id) references shop.orders on delete cascade
    deferrable initially deferred;
alter table shop.order_log add primary key (id);
alter table shop.documents add primary key (id);
create index on shop.documents (lower(title));
alter table shop.stock add primary key (sku);
alter table shop.events add primary key (id, region);
alter table shop.scratch add primary key (id);
create unique index "Key's index" on "Odd ""Schema"."Key ""Changes""" ("The Key");
create index on "Odd ""Schema"."Key ""Changes""" (slot);
alter table "Odd ""Schema"."Key ""Changes""" replica identity using index "Key's index";
alter table bank.history replica identity full;
alter table bank.ledger replica identity full;
alter table shop.audit replica identity full;

create function shop.log_order() returns trigger language plpgsql as $$ begin
    insert into shop.order_log (order_id, state, at) values (new.id, new.state, clock_timestamp());
    return new;
end $$;
create trigger log_order after insert or update of state on shop.orders
    for each row execute procedure shop.log_order();
create view bank.totals as
    select (select coalesce(sum(bbalance), 0) from bank.branches) as branches,
        (select coalesce(sum(tbalance), 0) from bank.tellers) as tellers,
        (select coalesce(sum(abalance), 0) from bank.accounts) as accounts,
        (select coalesce(sum(delta), 0) from bank.history) as history;
