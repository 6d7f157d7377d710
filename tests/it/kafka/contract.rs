//! A topic keeps the contract of every buffer, and of durable ones.

use walferry::buffer::kafka::{KafkaFeed, KafkaSink, Log, Opened, Options, Properties, cost};
use walferry::buffer::spool::Identity;
use walferry::buffer::{Ends, Make, MakeDurable, contract};
use walferry::change::{Feed, Item};
use walferry::lsn::Lsn;

use super::{broker, topic};

pub fn options(topic: &str, limit_bytes: u64) -> Options {
    Options {
        brokers: broker().address(),
        topic: topic.to_string(),
        properties: Properties::default(),
        identity: Identity {
            job: "it".to_string(),
            stream: "forward".to_string(),
            system: "7".to_string(),
            timeline: 1,
            slot: "walferry_it_forward".to_string(),
            made_lsn: Lsn::ZERO,
        },
        limit_bytes,
    }
}

pub fn open(options: &Options, progress_lsn: Lsn) -> Log {
    match Log::open_at(options, progress_lsn, Lsn::ZERO).unwrap() {
        Opened::Open(log) => log,
        Opened::Lost(held) => panic!("lost: {held:?}"),
    }
}

/// A topic behaves as a queue where its owner releases what was read, and closes it when the reader
/// goes.
struct Attached {
    feed: KafkaFeed,
    log: Log,
}

impl Attached {
    fn note(&self, item: Option<Item>) -> Option<Item> {
        if let Some(end_lsn) = item.as_ref().and_then(Item::end_lsn) {
            self.log.release(end_lsn);
        }
        if let Some(failure) = self.log.failure() {
            println!("failed: {failure}");
        }
        item
    }
}

impl Feed for Attached {
    async fn pop(&mut self) -> Option<Item> {
        let item = self.feed.pop().await;
        self.note(item)
    }

    fn try_pop(&mut self) -> Option<Item> {
        let item = self.feed.try_pop();
        self.note(item)
    }
}

struct Topics;

impl Make for Topics {
    type Sink = KafkaSink;
    type Feed = Attached;

    fn make(&self, limit_bytes: usize) -> Ends<KafkaSink, Attached> {
        let log = open(&options(&topic(), limit_bytes as u64), Lsn::ZERO);
        let (sink, feed) = (log.sink().unwrap(), log.feed(Lsn::ZERO).unwrap());
        (sink, Attached { feed, log })
    }

    fn bytes(&self, outlet: &Attached) -> usize {
        outlet.log.bytes() as usize
    }

    fn cost(&self, item: &Item) -> usize {
        cost(item)
    }
}

impl MakeDurable for Topics {
    type Place = String;
    type Buffer = Log;
    type Sink = KafkaSink;
    type Feed = KafkaFeed;

    fn place(&self) -> String {
        topic()
    }

    fn open(&self, place: &String) -> Log {
        open(&options(place, 1 << 30), Lsn::ZERO)
    }

    fn sink(&self, log: &Log) -> KafkaSink {
        log.sink().unwrap()
    }

    fn feed(&self, log: &Log, from_lsn: Lsn) -> KafkaFeed {
        log.feed(from_lsn).unwrap()
    }

    fn durable(&self, log: &Log) -> tokio::sync::watch::Receiver<Lsn> {
        log.durable()
    }

    fn release(&self, log: &Log, lsn: Lsn) {
        log.release(lsn);
    }

    async fn close(&self, log: Log) {
        tokio::task::spawn_blocking(|| log.close()).await.unwrap();
    }
}

#[tokio::test]
async fn a_topic_keeps_the_contract() {
    contract::check(&Topics).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_keeps_the_contract_of_a_durable_buffer() {
    contract::check_durable(&Topics).await.unwrap();
}
