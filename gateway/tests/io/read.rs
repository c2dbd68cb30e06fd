use crate::cluster::{losses, payload, random_range, seed, Cluster, UNIT};
use crate::node::Damage;
use futures::StreamExt;
use granary_gateway::object::{chunk_id, ObjectSettings, ReadError};
use granary_meta::record::ObjectData;
use granary_placement::id::ShardId;
use std::sync::atomic::Ordering;

const LEN: u64 = 3 * 4 * UNIT + 100_003;

/// Two extents, small windows: every kind of edge within a payload of a few megabytes.
fn small() -> ObjectSettings {
    ObjectSettings { extent_bytes: 11 * UNIT + 77, window_bytes: 2 * UNIT, ..ObjectSettings::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_range_of_a_healthy_payload_is_read_without_decoding() {
    let mut draw = seed("any_range_of_a_healthy_payload_is_read_without_decoding");
    let cluster = Cluster::start(4, 2, small()).await;
    let payload = payload(LEN, &mut draw);
    let data = cluster.put(&payload, &mut draw).await;
    for _ in 0..200 {
        cluster.check(&data, &payload, random_range(LEN, &mut draw)).await;
    }
    cluster.check(&data, &payload, 5..5).await;
    // A busy machine may make a read late and hedge it; decoding is then right, but never for want of a chunk.
    let counters = cluster.store.counters();
    assert!(
        counters.blocks_decoded.load(Ordering::Relaxed) == 0 || counters.chunk_reads_hedged.load(Ordering::Relaxed) > 0
    );
    assert_eq!(cluster.store.reports().waiting(), 0);
    assert!(matches!(cluster.read(&data, 0..LEN + 1).await, Err(ReadError::Range { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_loss_of_one_or_two_chunks_reads_the_same_bytes() {
    let mut draw = seed("every_loss_of_one_or_two_chunks_reads_the_same_bytes");
    let cluster = Cluster::start(4, 2, small()).await;
    let payload = payload(LEN, &mut draw);
    let data = cluster.put(&payload, &mut draw).await;
    for loss in losses(6) {
        for place in &loss {
            cluster.disks[*place].blind.store(true, Ordering::SeqCst);
        }
        cluster.check(&data, &payload, 0..LEN).await;
        for _ in 0..20 {
            cluster.check(&data, &payload, random_range(LEN, &mut draw)).await;
        }
        for place in &loss {
            cluster.disks[*place].blind.store(false, Ordering::SeqCst);
        }
    }
    assert!(cluster.store.counters().blocks_decoded.load(Ordering::Relaxed) > 0);
    let reports = cluster.store.reports().take(1000);
    assert!(!reports.is_empty() && reports.iter().all(|report| report.owner == Some(ShardId(1))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_death_of_two_disks_reads_the_same_bytes() {
    let mut draw = seed("every_death_of_two_disks_reads_the_same_bytes");
    let cluster = Cluster::start(4, 2, small()).await;
    let payload = payload(LEN, &mut draw);
    let data = cluster.put(&payload, &mut draw).await;
    for loss in losses(6).into_iter().filter(|loss| loss.len() == 2) {
        // Killed without waiting for anybody to notice: the reads find out.
        loss.iter().for_each(|place| cluster.disks[*place].kill());
        for _ in 0..5 {
            cluster.check(&data, &payload, random_range(LEN, &mut draw)).await;
        }
        for place in loss {
            cluster.revive(place).await;
        }
    }
    assert_eq!(cluster.store.reports().waiting(), 0, "a disk that does not answer has lost no chunk");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_blocks_never_reach_the_reader() {
    let mut draw = seed("damaged_blocks_never_reach_the_reader");
    let kinds = [Damage::Flip, Damage::Noticed, Damage::Misplaced];
    let cluster = Cluster::start(4, 2, small()).await;
    let payload = payload(LEN, &mut draw);
    let data = cluster.put(&payload, &mut draw).await;
    for round in 0..60 {
        for extent in data.extents() {
            let blocks = extent.layout().chunk_len().div_ceil(UNIT) as u32;
            for block in 0..blocks {
                // Up to two bad cells in any column, in any chunks.
                for _ in 0..draw.number() % 3 {
                    cluster.damage(extent, (draw.number() % 6) as u8, block, kinds[(draw.number() % 3) as usize]);
                }
            }
        }
        let range = if round % 3 == 0 { 0..LEN } else { random_range(LEN, &mut draw) };
        cluster.check(&data, &payload, range).await;
        cluster.disks.iter().for_each(|disk| disk.damage.lock().unwrap().clear());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_damage_than_the_code_can_bear_is_an_error_and_never_data_and_never_cleaned_away() {
    let mut draw = seed("more_damage_than_the_code_can_bear_is_an_error_and_never_data_and_never_cleaned_away");
    let cluster = Cluster::start(4, 2, small()).await;
    let payload = payload(LEN, &mut draw);
    let data = cluster.put(&payload, &mut draw).await;
    let extent = &data.extents()[0];
    for index in [0, 2, 5] {
        cluster.damage(extent, index, 1, Damage::Flip);
    }
    let stripe = 4 * UNIT;
    assert_eq!(
        cluster.read(&data, 0..LEN).await,
        Err(ReadError::Lost { extent: extent.extent, good: 3, needed: 4 }),
        "known before the first byte"
    );
    // What does not need the damaged column, or not the damaged cells of it, is still there.
    cluster.check(&data, &payload, 0..stripe).await;
    cluster.check(&data, &payload, stripe + UNIT..stripe + 2 * UNIT).await;
    assert_eq!(cluster.chunks(), data.extents().len() * 6);
    assert_eq!(cluster.disks.iter().map(|disk| disk.deletes.load(Ordering::SeqCst)).sum::<u64>(), 0);
    assert!(cluster.store.counters().extents_lost_seen.load(Ordering::Relaxed) > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_that_do_not_answer_are_told_apart_from_loss() {
    let mut draw = seed("disks_that_do_not_answer_are_told_apart_from_loss");
    let cluster = Cluster::start(4, 2, small()).await;
    let payload = payload(LEN, &mut draw);
    let data = cluster.put(&payload, &mut draw).await;
    for place in 0..3 {
        cluster.kill(place).await;
    }
    assert!(matches!(cluster.read(&data, 0..LEN).await, Err(ReadError::Unreachable { good: 3, needed: 4, .. })));
    cluster.revive(1).await;
    cluster.check(&data, &payload, 0..LEN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_disk_is_not_waited_for() {
    let mut draw = seed("a_slow_disk_is_not_waited_for");
    let cluster = Cluster::start(4, 2, small()).await;
    let payload = payload(LEN, &mut draw);
    let data = cluster.put(&payload, &mut draw).await;
    let slow = &cluster.disks[1];
    slow.read_delay_ms.store(600_000, Ordering::SeqCst);
    cluster.check(&data, &payload, 0..LEN).await;
    assert!(slow.reads_begun.load(Ordering::SeqCst) > 0);
    assert_eq!(slow.reads_ended.load(Ordering::SeqCst), 0);
    let counters = cluster.store.counters();
    let (reads, hedged) =
        (counters.chunk_reads.load(Ordering::Relaxed), counters.chunk_reads_hedged.load(Ordering::Relaxed));
    assert!(hedged > 0 && hedged < reads / 2, "{hedged} of {reads}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_that_die_in_mid_read_are_read_around() {
    let mut draw = seed("disks_that_die_in_mid_read_are_read_around");
    let cluster = Cluster::start(4, 2, ObjectSettings { window_bytes: UNIT, ..small() }).await;
    let payload = payload(8 * LEN, &mut draw);
    let data = cluster.put(&payload, &mut draw).await;
    let mut reader = cluster.store.read(&data, 0..8 * LEN);
    let mut got = Vec::new();
    while let Some(piece) = reader.next().await {
        let before = got.len() as u64;
        got.extend_from_slice(&piece.unwrap());
        for (at, place) in [(LEN, 0), (3 * LEN, 4)] {
            if before < at && got.len() as u64 >= at {
                cluster.disks[place].kill();
            }
        }
    }
    assert!(got == payload);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_that_says_it_is_of_another_extent_shape_is_not_used() {
    let mut draw = seed("a_chunk_that_says_it_is_of_another_extent_shape_is_not_used");
    let cluster = Cluster::start(4, 2, small()).await;
    let payload = payload(4 * UNIT, &mut draw);
    let data = cluster.put(&payload, &mut draw).await;
    let extent = &data.extents()[0];
    for index in [1, 3] {
        let mut chunks = cluster.holder(extent, index).chunks.lock().unwrap();
        chunks.get_mut(&chunk_id(extent, index)).unwrap().spec.extent_len_bytes -= 1;
    }
    cluster.check(&data, &payload, 0..4 * UNIT).await;
    let mut reported: Vec<u8> = cluster.store.reports().take(10).iter().map(|report| report.chunk.index).collect();
    reported.sort_unstable();
    assert_eq!(reported, [1, 3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_inline_payload_is_an_error() {
    let mut draw = seed("a_damaged_inline_payload_is_an_error");
    let cluster = Cluster::start(2, 1, small()).await;
    let payload = payload(777, &mut draw);
    let data = cluster.put(&payload, &mut draw).await;
    cluster.check(&data, &payload, 100..777).await;
    let ObjectData::Inline { bytes, crc32 } = data else { panic!("not inline") };
    let mut flipped = bytes.to_vec();
    flipped[500] ^= 4;
    let data = ObjectData::Inline { bytes: flipped.into(), crc32 };
    assert_eq!(cluster.read(&data, 0..10).await, Err(ReadError::InlineCorrupt));
}
