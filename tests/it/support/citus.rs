//! Plain PostgreSQL servers with catalogs of Citus's shape: the columns, names and placements that
//! the extension's own tables have, filled as `create_distributed_table` would. The function that
//! locks shards' metadata is there and locks each by itself; routing is not.

use std::fmt::Write;

use walferry::demo::server::Server;

/// The catalogs of release 13, whose extra columns older ones lack.
const CATALOGS: &str = "set allow_system_table_mods = on;
create table pg_catalog.pg_dist_node (nodeid int primary key, groupid int not null,
  nodename text not null, nodeport int not null, noderack text not null default 'default',
  hasmetadata bool not null default true, isactive bool not null default true,
  noderole text not null default 'primary', nodecluster name not null default 'default',
  metadatasynced bool not null default true, shouldhaveshards bool not null default true,
  nodeisclone bool not null default false, nodeprimarynodeid int not null default 0);
create table pg_catalog.pg_dist_partition (logicalrelid regclass not null,
  partmethod \"char\" not null, partkey text, colocationid int not null default 0,
  repmodel \"char\" not null default 'c', autoconverted bool not null default false);
create table pg_catalog.pg_dist_shard (logicalrelid regclass not null, shardid bigint primary key,
  shardstorage \"char\" not null default 't', shardminvalue text, shardmaxvalue text);
create table pg_catalog.pg_dist_placement (placementid bigserial, shardid bigint not null,
  shardstate int not null default 1, shardlength bigint not null default 0, groupid int not null);
create table pg_catalog.pg_dist_colocation (colocationid int primary key, shardcount int not null,
  replicationfactor int not null, distributioncolumntype oid not null,
  distributioncolumncollation oid not null);
create table pg_catalog.pg_dist_local_group (groupid int primary key);
create function pg_catalog.lock_shard_metadata(mode int, shards bigint[]) returns void
  language plpgsql as $$ declare shard bigint; begin
    foreach shard in array shards loop
      if mode = 7 then perform pg_advisory_xact_lock(shard);
      else perform pg_advisory_xact_lock_shared(shard); end if;
    end loop; end $$;
insert into pg_catalog.pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)
  values (99990, 'citus', 10, 11, false, '13.2-1');";

/// A coordinator and workers, all with the same metadata, as Citus 11 and later sync it.
#[derive(Debug)]
pub struct Citus {
    pub coordinator: Server,
    pub workers: Vec<Server>,
    next_shard: u64,
}

impl Citus {
    /// That many workers and no tables.
    pub fn start(workers: usize) -> Citus {
        let bin = Server::default_bin().unwrap();
        let start = || Server::start(&bin, &[]).unwrap();
        let coordinator = start();
        coordinator.psql("postgres", CATALOGS).unwrap();
        coordinator.psql("postgres", "insert into pg_dist_local_group values (0)").unwrap();
        let mut cluster = Citus { coordinator, workers: Vec::new(), next_shard: 102_008 };
        for _ in 0..workers {
            cluster.add_worker();
        }
        cluster
    }

    pub fn uri(&self) -> String {
        self.coordinator.uri("postgres")
    }

    /// The cluster as `--cluster` takes it.
    pub fn address(&self) -> String {
        format!("citus:{}", self.uri())
    }

    /// The name of a worker's node, counted from 0.
    pub fn node(&self, worker: usize) -> String {
        format!("127.0.0.1:{}", self.workers[worker].port())
    }

    /// An empty one; its group id is its place counted from 1.
    pub fn add_worker(&mut self) {
        let worker = Server::start(self.coordinator.bin_dir(), &[]).unwrap();
        worker.psql("postgres", CATALOGS).unwrap();
        let group = self.workers.len() + 1;
        let local = format!("insert into pg_dist_local_group values ({group})");
        worker.psql("postgres", &local).unwrap();
        let sql = format!(
            "insert into pg_dist_node (nodeid, groupid, nodename, nodeport) \
             values ({group}, {group}, '127.0.0.1', {})",
            worker.port()
        );
        self.workers.push(worker);
        self.everywhere(&sql);
    }

    /// Runs a statement on the coordinator and all workers.
    pub fn everywhere(&self, sql: &str) {
        for server in std::iter::once(&self.coordinator).chain(&self.workers) {
            server.psql("postgres", &format!("set allow_system_table_mods = on; {sql}")).unwrap();
        }
    }

    /// A table of that definition with so many shards, the first on the first of `on`, and so on
    /// round and round. Gives the shards' numbers.
    pub fn distribute(
        &mut self,
        name: &str,
        definition: &str,
        colocation: u32,
        count: u32,
        on: &[usize],
    ) -> Vec<u64> {
        let table = format!("create table public.{name} ({definition});");
        self.everywhere(&table);
        let mut metadata = format!(
            "insert into pg_dist_partition (logicalrelid, partmethod, colocationid, repmodel) \
             values ('public.{name}', 'h', {colocation}, 's');"
        );
        let width = (1u64 << 32) / u64::from(count);
        let mut ids = Vec::new();
        for (index, worker) in (0..count).zip(on.iter().cycle()) {
            let id = self.next_shard;
            self.next_shard += 1;
            let least = i64::from(i32::MIN) + (u64::from(index) * width) as i64;
            let most = least + width as i64 - 1;
            write!(
                metadata,
                "insert into pg_dist_shard (logicalrelid, shardid, shardminvalue, shardmaxvalue) \
                 values ('public.{name}', {id}, '{least}', '{most}'); \
                 insert into pg_dist_placement (shardid, groupid) values ({id}, {});",
                worker + 1
            )
            .unwrap();
            let shard = format!("create table public.{name}_{id} ({definition})");
            self.workers[*worker].psql("postgres", &shard).unwrap();
            ids.push(id);
        }
        self.everywhere(&metadata);
        ids
    }

    /// Where each of the shards is, by the metadata of this server: group ids.
    pub fn placements(server: &Server) -> String {
        let sql = "select string_agg(shardid || ':' || groupid, ' ' order by shardid, groupid) \
             from pg_dist_placement";
        server.psql("postgres", sql).unwrap()
    }
}
