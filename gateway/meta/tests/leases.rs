//! Leases in the root shard: one holder at a time, epochs that only rise, and no clock.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod scenery;

use bytes::Bytes;
use granary_meta::leases::{MAX_LEASES, MAX_PROGRESS_BYTES};
use granary_meta::memory::MemoryShard;
use granary_meta::record::LeaseRecord;
use granary_meta::{Answer, Command, Query, Reply};
use granary_placement::id::ShardId;
use scenery::{request, seed, Random};
use std::collections::BTreeMap;

const A: [u8; 16] = [0xa; 16];
const B: [u8; 16] = [0xb; 16];

fn take(holder: [u8; 16], seen_epoch: u64, seen_renewals: u64) -> Command {
    let (task, address) = ("heal".to_owned(), "gateway:9000".to_owned());
    Command::TakeLease { task, holder, address, ttl_ms: 15_000, seen_epoch, seen_renewals }
}

fn renew(holder: [u8; 16], epoch: u64) -> Command {
    let progress = Bytes::from_static(b"{\"at\":1}");
    Command::RenewLease { task: "heal".to_owned(), holder, epoch, ttl_ms: 60_000, progress }
}

fn release(holder: [u8; 16], epoch: u64) -> Command {
    Command::ReleaseLease { task: "heal".to_owned(), holder, epoch }
}

struct Root {
    shard: MemoryShard,
    random: Random,
    now_ms: u64,
}

impl Root {
    fn new(seed: u64) -> Root {
        Root { shard: MemoryShard::new(ShardId::ROOT), random: Random(seed), now_ms: 100 }
    }

    fn send(&mut self, command: Command) -> Reply {
        self.now_ms += 1;
        let sent = request(&mut self.random, self.now_ms, command);
        self.shard.apply(&sent).unwrap()
    }

    fn leases(&self) -> Vec<LeaseRecord> {
        match self.shard.answer(&Query::ListLeases).unwrap() {
            Answer::Leases(leases) => leases,
            other => panic!("{other:?}"),
        }
    }
}

fn lease(reply: Reply) -> LeaseRecord {
    match reply {
        Reply::Lease(lease) => lease,
        other => panic!("{other:?}"),
    }
}

fn held(reply: Reply) -> LeaseRecord {
    match reply {
        Reply::LeaseHeld(lease) => lease,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_lease_is_taken_by_who_saw_it_stand_still() {
    let mut root = Root::new(1);
    assert_eq!(root.send(take(A, 1, 0)), Reply::NoSuchLease);
    let first = lease(root.send(take(A, 0, 0)));
    assert_eq!((first.epoch, first.renewals, first.holder), (1, 0, Some(A)));
    assert_eq!((first.taken_ms, first.address.as_str()), (102, "gateway:9000"));
    assert_eq!(held(root.send(take(B, 0, 0))), first, "what B saw is over");

    let renewed = lease(root.send(renew(A, 1)));
    assert_eq!((renewed.epoch, renewed.renewals), (1, 1));
    let listed = root.leases().remove(0);
    assert_eq!(listed.progress.as_ref(), b"{\"at\":1}");
    assert_eq!(LeaseRecord { progress: Bytes::new(), ..listed }, renewed, "replies are without the progress");
    assert_eq!(held(root.send(take(B, 1, 0))), renewed, "A was alive in between");

    let second = lease(root.send(take(B, 1, 1)));
    assert_eq!((second.epoch, second.renewals, second.holder), (2, 0, Some(B)));
    assert!(root.leases()[0].progress.is_empty(), "the progress is the new holder's");
    assert_eq!(held(root.send(renew(A, 1))), second);
    assert_eq!(held(root.send(release(A, 1))), second);
    assert_eq!(root.leases(), [second]);
}

#[test]
fn a_released_lease_keeps_its_epoch_and_is_taken_at_once() {
    let mut root = Root::new(2);
    assert_eq!(root.send(release(A, 1)), Reply::NoSuchLease);
    assert_eq!(root.send(renew(A, 1)), Reply::NoSuchLease);
    root.send(take(A, 0, 0));
    root.send(renew(A, 1));
    let released = lease(root.send(release(A, 1)));
    assert_eq!((released.epoch, released.renewals, released.holder), (1, 1, None));
    assert_eq!(lease(root.send(release(A, 1))), released, "a repeated release changes nothing");
    assert_eq!(held(root.send(renew(A, 1))), released, "a renewal behind a release does not bring it back");
    assert_eq!(lease(root.send(take(B, 1, 1))).epoch, 2);
}

#[test]
fn malformed_lease_commands_are_refused_and_leases_are_bounded() {
    let mut root = Root::new(3);
    let named = |task: &str| Command::TakeLease {
        task: task.to_owned(),
        holder: A,
        address: String::new(),
        ttl_ms: 15_000,
        seen_epoch: 0,
        seen_renewals: 0,
    };
    for task in ["", "a\0b", &"t".repeat(65)] {
        assert!(matches!(root.send(named(task)), Reply::Refused(_)), "{task:?}");
    }
    let mut long_address = take(A, 0, 0);
    if let Command::TakeLease { address, .. } = &mut long_address {
        *address = "a".repeat(257);
    }
    assert!(matches!(root.send(long_address), Reply::Refused(_)));
    for number in 0..MAX_LEASES {
        lease(root.send(named(&format!("task.{number}"))));
    }
    assert!(matches!(root.send(named("one.more")), Reply::Refused(_)));
    let progress = Bytes::from(vec![0; MAX_PROGRESS_BYTES + 1]);
    let long = Command::RenewLease { task: "task.0".to_owned(), holder: A, epoch: 1, ttl_ms: 1, progress };
    assert!(matches!(root.send(long), Reply::Refused(_)));
    assert_eq!(root.leases().len(), MAX_LEASES);
    let mut object_shard = MemoryShard::new(ShardId(1));
    let sent = request(&mut Random(9), 1, take(A, 0, 0));
    assert!(matches!(object_shard.apply(&sent).unwrap(), Reply::Refused(_)), "leases are the root shard's");
}

/// Holders that take, renew and release at random, by what they last saw, with commands that come late and twice.
/// Whoever was told that it has an epoch is the only one ever told so.
#[test]
fn an_epoch_has_one_holder_in_any_order_of_commands() {
    let seed = seed("an_epoch_has_one_holder_in_any_order_of_commands");
    let (mut taken, mut late) = (0, 0);
    for round in 0..200 {
        let mut root = Root::new(seed.wrapping_add(round));
        let mut random = Random(seed ^ round);
        let mut seen = [(0u64, 0u64); 3];
        let mut holds: [Option<u64>; 3] = [None; 3];
        let mut owner: BTreeMap<u64, [u8; 16]> = BTreeMap::new();
        let mut sent: Vec<Command> = Vec::new();
        for _ in 0..100 {
            let who = random.below(3) as usize;
            let id = [who as u8; 16];
            if random.chance(4) {
                let leases = root.leases();
                seen[who] = leases.first().map_or((0, 0), |lease| (lease.epoch, lease.renewals));
            }
            let command = match (random.below(5), holds[who]) {
                (0, _) if !sent.is_empty() => random.pick(&sent).clone(),
                (1 | 2, Some(epoch)) => renew(id, epoch),
                (3, Some(epoch)) => release(id, epoch),
                _ => take(id, seen[who].0, seen[who].1),
            };
            let reply = root.send(command.clone());
            let (Command::TakeLease { holder, .. }
            | Command::RenewLease { holder, .. }
            | Command::ReleaseLease { holder, .. }) = &command
            else {
                unreachable!()
            };
            match (&command, reply) {
                (Command::TakeLease { .. }, Reply::Lease(lease)) => {
                    assert_eq!(owner.insert(lease.epoch, *holder), None, "seed {seed} round {round}: handed out twice");
                    holds[usize::from(holder[0])] = Some(lease.epoch);
                    taken += 1;
                }
                (_, Reply::Lease(lease)) => assert_eq!(owner[&lease.epoch], *holder, "seed {seed} round {round}"),
                (_, Reply::LeaseHeld(_) | Reply::NoSuchLease) => late += 1,
                (_, other) => panic!("{other:?}"),
            }
            let last = owner.keys().next_back().copied().unwrap_or(0);
            assert_eq!(root.leases().first().map_or(0, |lease| lease.epoch), last, "seed {seed} round {round}");
            sent.push(command);
        }
    }
    assert!(taken > 500 && late > 500, "{taken} {late}");
}
