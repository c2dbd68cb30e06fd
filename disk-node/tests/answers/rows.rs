//! What a disk node answers, as a table: requests in order, each with its answer. The real node is asked in
//! `disk-node/tests/answers/main.rs`, and the imitation that the gateway's tests use in `gateway/tests/io/healers.rs`.
//! So what those tests show of healers on chunks that are replaced, damaged or deleted holds for the real store too.
//!
//! A request names chunks by numbers. `v1`, `v2` are two payloads that one chunk may have; `half` sends the first part
//! of one and `rest` the other. `@3` is the third holder of the heal lease, and `*` marks a chunk in quarantine.

use bytes::Bytes;
use granary_placement::id::{ExtentId, PlacementGroupId};
use granary_placement::lease::LeaseStamp;
use granary_wire::chunk::{ChunkHealth, ChunkId, BLOCK_BYTES};
use granary_wire::client::ChunkWriter;
use granary_wire::control::{ControlError, ControlRequest, ControlResponse};
use granary_wire::{ChunkError, NodeClient};
use std::collections::HashMap;
use std::time::Duration;

// The gateway's tests take this file without the scenery that has it, too.
#[allow(clippy::duplicate_mod)]
#[path = "../scenery/spec.rs"]
mod spec;
use spec::spec;

const ROWS: &[(&str, &str)] = &[
    // What is not there.
    ("read 1 0 1", "not found"),
    ("have 1 2", "no no"),
    ("verify 1 2", "missing missing"),
    ("delete 1", "deleted 0"),
    ("list 0 10", "nothing"),
    // A chunk is there when it is whole, and not before.
    ("begin 1 v1", "ok"),
    ("half 1", "ok"),
    ("have 1", "no"),
    ("rest 1", "ok"),
    ("have 1", "no"),
    ("finish 1", "ok"),
    ("have 1", "yes"),
    ("read 1 0 1", "v1"),
    ("read 1 0 64", "v1"),
    ("read 1 1 1", "v1"),
    ("read 1 3 1", "rejected"),
    ("verify 1", "good"),
    // A sender that goes away in the middle leaves nothing.
    ("begin 2 v1", "ok"),
    ("half 2", "ok"),
    ("leave 2", "ok"),
    ("have 2", "no"),
    // What cannot be a chunk.
    ("put 3 empty", "rejected"),
    ("put 3 beyond", "rejected"),
    ("have 3", "no"),
    // A chunk is replaced in one step: until then the old one is read.
    ("begin 1 v2", "ok"),
    ("half 1", "ok"),
    ("read 1 0 64", "v1"),
    ("rest 1", "ok"),
    ("read 1 0 64", "v1"),
    ("finish 1", "ok"),
    ("read 1 0 64", "v2"),
    ("list 0 10", "1"),
    // Of two senders of one chunk the one that ends last counts.
    ("put 1 v1", "ok"),
    ("begin 1 v2", "ok"),
    ("put 1 v1", "ok"),
    ("rest 1", "ok"),
    ("finish 1", "ok"),
    ("read 1 0 64", "v2"),
    // A block that is damaged is never given; the others are, and they stay until a whole replacement is there.
    ("put 4 v1", "ok"),
    ("damage 4 1", "ok"),
    ("have 4", "yes"),
    ("verify 4 1", "corrupt good"),
    ("read 4 0 1", "v1"),
    ("read 4 1 1", "corrupt 1"),
    ("read 4 0 64", "corrupt 1"),
    ("read 4 2 1", "v1"),
    ("begin 4 v1 @3", "ok"),
    ("half 4", "ok"),
    ("read 4 0 1", "v1"),
    ("verify 4", "corrupt"),
    ("leave 4", "ok"),
    ("read 4 2 1", "v1"),
    ("verify 4", "corrupt"),
    ("put 4 v1 @3", "ok"),
    ("verify 4", "good"),
    ("read 4 0 64", "v1"),
    // A holder of a lease that was taken over is refused: at the beginning, at the end, and wherever it deletes.
    ("begin 5 v1 @3", "ok"),
    ("half 5", "ok"),
    ("delete 9 @4", "deleted 0"),
    ("rest 5", "ok"),
    ("finish 5", "stale 4"),
    ("have 5", "no"),
    ("put 4 v2 @3", "stale 4"),
    ("delete 4 @3", "stale 4"),
    ("mark 4 @3", "stale 4"),
    ("read 4 0 64", "v1"),
    ("delete 4 @", "bad request"),
    ("put 5 v1 @4", "ok"),
    // What is no background work needs no lease.
    ("delete 5", "deleted 1"),
    // After a kill everything is as it was, and so are the leases. What was on the way is not there.
    ("begin 4 v2 @4", "ok"),
    ("half 4", "ok"),
    ("kill", "ok"),
    ("read 4 0 64", "v1"),
    ("read 1 0 64", "v2"),
    ("put 4 v2 @3", "stale 4"),
    // Quarantine is a mark: it stays when the chunk is written again, and goes with it. What is not there has none.
    ("mark 4 9 @4", "ok"),
    ("list 0 10", "1 4*"),
    ("read 4 0 64", "v1"),
    ("put 4 v2 @4", "ok"),
    ("list 0 10", "1 4*"),
    ("delete 4 @4", "deleted 1"),
    ("put 4 v1 @4", "ok"),
    ("put 9 v1", "ok"),
    ("list 0 10", "1 4 9"),
    ("mark 9 @4", "ok"),
    ("release 9 8 @4", "ok"),
    ("list 0 10", "1 4 9"),
    // Pages.
    ("list 0 2", "1 4 and more"),
    ("list 4 2", "9"),
    ("list 0 0", "1 and more"),
    // How much one request may ask for.
    ("many have 1000", "ok"),
    ("many have 1001", "bad request"),
    ("many verify 256", "ok"),
    ("many verify 257", "bad request"),
    ("many delete 1000", "ok"),
    ("many delete 1001", "bad request"),
    ("read 4 0 64", "not found"),
    ("list 0 10", "nothing"),
];

/// A disk node that is asked.
pub trait Node {
    fn client(&self) -> NodeClient;
    /// Has this block of a chunk rot, whose bytes are these.
    fn damage(&mut self, id: ChunkId, block: u32, bytes: &[u8]);
    /// Ends the node as a kill does, and starts it again.
    async fn kill(&mut self);
}

/// Asks the whole table, in order.
pub async fn ask_all(node: &mut impl Node) {
    let mut writers: HashMap<u8, (ChunkWriter, Bytes)> = HashMap::new();
    for (number, (request, expected)) in ROWS.iter().enumerate() {
        let words: Vec<&str> = request.split(' ').collect();
        let answer = ask(node, &mut writers, &words).await;
        assert_eq!(answer, *expected, "row {number}: {request}");
    }
}

fn chunk(number: u8) -> ChunkId {
    ChunkId { group: PlacementGroupId(1), extent: ExtentId([number; 16]), index: 2, generation: 1 }
}

/// Two blocks and a bit.
const LEN: usize = 2 * BLOCK_BYTES as usize + 1000;

fn payload(number: u8, version: &str) -> Bytes {
    let salt = u32::from(number) * 2 + u32::from(version == "v2");
    let mut state = salt.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_be_bytes()[0]
    };
    (0..LEN).map(|_| next()).collect()
}

fn block_of(number: u8, version: &str, block: u32) -> Bytes {
    let start = block as usize * BLOCK_BYTES as usize;
    payload(number, version).slice(start..LEN.min(start + BLOCK_BYTES as usize))
}

fn said<T>(answer: Result<T, ChunkError>) -> String {
    match answer {
        Ok(_) => "ok".to_owned(),
        Err(ChunkError::NotFound) => "not found".to_owned(),
        Err(ChunkError::Corrupt { block }) => format!("corrupt {block}"),
        Err(ChunkError::StaleLease { current }) => format!("stale {current}"),
        Err(ChunkError::Rejected(_)) => "rejected".to_owned(),
        Err(other) => format!("{other:?}"),
    }
}

fn told(answer: ControlResponse) -> String {
    let words = |words: Vec<&str>| words.join(" ");
    match answer {
        ControlResponse::Done => "ok".to_owned(),
        ControlResponse::Deleted(count) => format!("deleted {count}"),
        ControlResponse::Have(have) => words(have.iter().map(|have| if *have { "yes" } else { "no" }).collect()),
        ControlResponse::Health(health) => words(
            (health.iter())
                .map(|health| match health {
                    ChunkHealth::Good => "good",
                    ChunkHealth::Missing => "missing",
                    ChunkHealth::Corrupt => "corrupt",
                })
                .collect(),
        ),
        ControlResponse::Chunks { chunks, .. } if chunks.is_empty() => "nothing".to_owned(),
        ControlResponse::Chunks { chunks, more } => {
            let mark = |quarantined: bool| if quarantined { "*" } else { "" };
            let named =
                chunks.iter().map(|info| format!("{}{}", info.id.extent.0[0], mark(info.quarantined_ms.is_some())));
            let all = named.collect::<Vec<_>>().join(" ");
            if more {
                format!("{all} and more")
            } else {
                all
            }
        }
        ControlResponse::Error(ControlError::StaleLease { current }) => format!("stale {current}"),
        ControlResponse::Error(ControlError::BadRequest(_)) => "bad request".to_owned(),
        other => format!("{other:?}"),
    }
}

async fn ask(node: &mut impl Node, writers: &mut HashMap<u8, (ChunkWriter, Bytes)>, words: &[&str]) -> String {
    let client = node.client();
    let control = async |request| told(client.control(request, Duration::from_secs(60)).await.unwrap());
    let lease = words.last().and_then(|word| word.strip_prefix('@')).map(|epoch| match epoch {
        "" => LeaseStamp { task: String::new(), epoch: 1 },
        epoch => LeaseStamp { task: "heal".to_owned(), epoch: epoch.parse().unwrap() },
    });
    let numbers: Vec<u64> = words.iter().filter_map(|word| word.parse().ok()).collect();
    let first = numbers.first().map_or(0, |number| *number as u8);
    let ids = || numbers.iter().map(|number| chunk(*number as u8)).collect::<Vec<_>>();
    match words[0] {
        "put" => {
            let (id, len) = match words[2] {
                "empty" => (chunk(first), 0),
                "beyond" => (ChunkId { index: 6, ..chunk(first) }, LEN),
                _ => (chunk(first), LEN),
            };
            let data = vec![payload(first, words[2]).slice(..len)];
            said(match &lease {
                Some(lease) => client.put_chunk_under(lease, id, spec(len as u64), data).await,
                None => client.put_chunk(id, spec(len as u64), data).await,
            })
        }
        "begin" => {
            let begun = match &lease {
                Some(lease) => client.begin_chunk_under(lease, chunk(first), spec(LEN as u64)).await,
                None => client.begin_chunk(chunk(first), spec(LEN as u64)).await,
            };
            let answer = said(begun.as_ref().map_err(Clone::clone));
            writers.extend(begun.ok().map(|writer| (first, (writer, payload(first, words[2])))));
            answer
        }
        "half" | "rest" => {
            let (writer, left) = writers.get_mut(&first).unwrap();
            let now = if words[0] == "half" { LEN / 2 } else { left.len() };
            said(writer.write(left.split_to(now)).await)
        }
        "finish" => said(writers.remove(&first).unwrap().0.finish().await),
        "leave" => {
            drop(writers.remove(&first));
            "ok".to_owned()
        }
        "read" => {
            let (block, blocks) = (numbers[1] as u32, numbers[2] as u32);
            match client.read_blocks(chunk(first), block, blocks).await {
                Err(error) => said(Err::<(), _>(error)),
                Ok(read) => {
                    let is = |version: &&&str| {
                        (block..).zip(&read.data).all(|(at, got)| *got == block_of(first, version, at))
                    };
                    let known = ["v1", "v2"];
                    known.iter().find(is).map_or("other bytes", |version| *version).to_owned()
                }
            }
        }
        "have" => control(ControlRequest::HaveChunks(ids())).await,
        "verify" => control(ControlRequest::VerifyChunks(ids())).await,
        "delete" => control(ControlRequest::DeleteChunks { chunks: ids(), lease }).await,
        "mark" | "release" => {
            let into = words[0] == "mark";
            control(ControlRequest::Quarantine { chunks: ids(), into, lease: lease.unwrap() }).await
        }
        "list" => {
            let after = Some(first).filter(|first| *first > 0).map(chunk);
            control(ControlRequest::ListChunks { after, limit: numbers[1] as u32 }).await
        }
        "many" => {
            let chunks = (0..numbers[0]).map(|number| chunk(number as u8)).collect();
            let answer = match words[1] {
                "have" => control(ControlRequest::HaveChunks(chunks)).await,
                "verify" => control(ControlRequest::VerifyChunks(chunks)).await,
                _ => control(ControlRequest::DeleteChunks { chunks, lease }).await,
            };
            if answer == "bad request" {
                answer
            } else {
                "ok".to_owned()
            }
        }
        "damage" => {
            let block = numbers[1] as u32;
            node.damage(chunk(first), block, &block_of(first, "v1", block));
            "ok".to_owned()
        }
        "kill" => {
            node.kill().await;
            writers.clear();
            "ok".to_owned()
        }
        other => panic!("no request is called {other}"),
    }
}
