use crate::cluster::{body, losses, payload, seed, Cluster, OWNER, UNIT};
use bytes::Bytes;
use futures::stream::{self, StreamExt};
use granary_gateway::object::{BodyError, ObjectSettings, StageError};
use granary_meta::record::ObjectData;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Every chunk streams unit by unit, however short.
fn streaming() -> ObjectSettings {
    ObjectSettings { whole_chunk_bytes: 0, ..ObjectSettings::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_size_around_a_boundary_comes_back_the_same() {
    let mut draw = seed("every_size_around_a_boundary_comes_back_the_same");
    for (k, m) in [(4, 2), (3, 2), (1, 1), (2, 1)] {
        for settings in [ObjectSettings::default(), streaming()] {
            let cluster = Cluster::start(k, m, settings).await;
            let stripe = UNIT * u64::from(k);
            let edges = [0, 8192, 8192 + 128, UNIT, stripe, stripe + UNIT, 2 * stripe, 1024 * 1024 * u64::from(k)];
            for edge in edges {
                for len in edge.saturating_sub(1)..=edge + 1 {
                    let payload = payload(len, &mut draw);
                    let data = cluster.put(&payload, &mut draw).await;
                    assert_eq!(matches!(data, ObjectData::Inline { .. }), len <= 8192);
                    cluster.check(&data, &payload, 0..len).await;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn payloads_around_the_longest_extent_come_back_the_same() {
    let mut draw = seed("payloads_around_the_longest_extent_come_back_the_same");
    let cluster = Cluster::start(4, 2, ObjectSettings::default()).await;
    let longest = 64 * 1024 * 1024;
    for (len, extents) in [(longest - 1, 1), (longest, 1), (longest + 1, 2)] {
        let payload = payload(len, &mut draw);
        let staged = cluster.stage(&payload, &mut draw).await.unwrap();
        assert_eq!(staged.data.extents().len(), extents);
        cluster.check(&staged.data, &payload, 0..len).await;
        cluster.check(&staged.data, &payload, longest - 100_000..len).await;
        drop(staged);
        cluster.until("the chunks are deleted", || cluster.chunks() == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn staged_chunks_go_unless_the_commit_may_have_happened() {
    let mut draw = seed("staged_chunks_go_unless_the_commit_may_have_happened");
    let cluster = Cluster::start(4, 2, ObjectSettings::default()).await;
    let payload = payload(300_000, &mut draw);

    let staged = cluster.stage(&payload, &mut draw).await.unwrap();
    assert_eq!(cluster.chunks(), 6);
    drop(staged);
    cluster.until("dropped: deleted", || cluster.chunks() == 0).await;

    let mut staged = cluster.stage(&payload, &mut draw).await.unwrap();
    staged.committing();
    staged.refused();
    cluster.until("refused: deleted", || cluster.chunks() == 0).await;

    let mut staged = cluster.stage(&payload, &mut draw).await.unwrap();
    staged.committing();
    drop(staged);
    cluster.stage(&payload, &mut draw).await.unwrap().unknown();
    cluster.stage(&payload, &mut draw).await.unwrap().committed();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(cluster.chunks(), 18);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_fails_leaves_nothing_and_its_error_comes_back_untouched() {
    let mut draw = seed("a_body_that_fails_leaves_nothing_and_its_error_comes_back_untouched");
    for settings in [ObjectSettings::default(), streaming()] {
        let cluster = Cluster::start(4, 2, settings).await;
        for len in [100u64, 300_000, 6_000_000] {
            for got in [0, len / 2, len - 1, len] {
                let payload = payload(len, &mut draw);
                let error: BodyError = "the digest is wrong".into();
                let failing = body(&payload.slice(..got as usize), &mut draw).chain(stream::iter([Err(error)]));
                let result = cluster.store.stage(None, OWNER, len, failing).await;
                assert!(matches!(result, Err(StageError::Body(error)) if error.to_string() == "the digest is wrong"));

                let short = body(&payload.slice(..got as usize), &mut draw);
                match cluster.store.stage(None, OWNER, len, short).await {
                    Err(StageError::TooShort { expected, got: had }) => assert_eq!((expected, had), (len, got)),
                    Err(other) => panic!("{other}"),
                    Ok(_) => assert_eq!(got, len),
                }
                let long = body(&payload, &mut draw).chain(stream::iter([Ok(Bytes::from_static(b"!"))]));
                let result = cluster.store.stage(None, OWNER, len, long).await;
                assert!(matches!(result, Err(StageError::TooLong { expected }) if expected == len));
            }
        }
        cluster.until("nothing is left", || cluster.chunks() == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_is_given_up_in_the_middle_leaves_nothing() {
    let mut draw = seed("an_upload_that_is_given_up_in_the_middle_leaves_nothing");
    let settings = ObjectSettings { extent_bytes: 1024 * 1024, ..streaming() };
    let cluster = Cluster::start(4, 2, settings).await;
    let payload = payload(3_500_000, &mut draw);
    let stuck = body(&payload, &mut draw).chain(stream::pending());
    let upload = cluster.store.stage(None, OWNER, 9_000_000, stuck);
    assert!(tokio::time::timeout(Duration::from_secs(2), upload).await.is_err());
    assert!(cluster.store.counters().extents_written.load(Ordering::Relaxed) >= 3);
    cluster.until("nothing is left", || cluster.chunks() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_dies_in_mid_write_is_named_and_the_payload_is_safe() {
    let mut draw = seed("a_disk_that_dies_in_mid_write_is_named_and_the_payload_is_safe");
    for place in 0..6 {
        let cluster = Cluster::start(4, 2, streaming()).await;
        let payload = payload(20_000_000, &mut draw);
        cluster.disks[place].die_after_bytes.store(draw.number() % 4_000_000, Ordering::SeqCst);
        let staged = cluster.stage(&payload, &mut draw).await.unwrap();
        let missing: Vec<usize> = staged.missing.iter().map(|chunk| usize::from(chunk.index)).collect();
        assert_eq!(missing, [place]);
        assert_eq!(cluster.chunks(), 5);
        assert_eq!((staged.data.extents()[0].k, staged.data.extents()[0].m), (4, 2));
        cluster.check(&staged.data, &payload, 0..20_000_000).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_fewer_than_k_plus_one_disks_left_in_mid_write_nothing_is_acknowledged() {
    let mut draw = seed("with_fewer_than_k_plus_one_disks_left_in_mid_write_nothing_is_acknowledged");
    // Nothing may be replayed: the first attempt is all there is.
    let cluster = Cluster::start(4, 2, ObjectSettings { replay_bytes: 0, ..streaming() }).await;
    let payload = payload(20_000_000, &mut draw);
    for place in [1, 4] {
        cluster.disks[place].die_after_bytes.store(2_000_000, Ordering::SeqCst);
    }
    let result = cluster.stage(&payload, &mut draw).await;
    assert!(matches!(result, Err(StageError::Unavailable(_))));
    cluster.until("nothing is left", || cluster.chunks() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_still_in_memory_is_written_again_narrower_when_disks_die() {
    let mut draw = seed("a_payload_still_in_memory_is_written_again_narrower_when_disks_die");
    for settings in [ObjectSettings::default(), streaming()] {
        let cluster = Cluster::start(4, 2, settings).await;
        let payload = payload(2_000_000, &mut draw);
        for place in [0, 5] {
            cluster.disks[place].die_after_bytes.store(100_000, Ordering::SeqCst);
        }
        let staged = cluster.stage(&payload, &mut draw).await.unwrap();
        let extent = &staged.data.extents()[0];
        assert_eq!((extent.k, extent.m, &extent.slots[..], staged.missing.len()), (2, 2, &[1, 2, 3, 4][..], 0));
        cluster.check(&staged.data, &payload, 0..2_000_000).await;
        cluster.until("the first attempt is cleaned away", || cluster.chunks() == 4).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_two_of_six_disks_dead_any_two_more_may_die() {
    let mut draw = seed("with_two_of_six_disks_dead_any_two_more_may_die");
    let cluster = Cluster::start(4, 2, ObjectSettings::default()).await;
    cluster.kill(1).await;
    cluster.kill(3).await;
    let payload = payload(3_000_001, &mut draw);
    let data = cluster.put(&payload, &mut draw).await;
    let extent = data.extents()[0].clone();
    assert_eq!((extent.k, extent.m, &extent.slots[..]), (2, 2, &[0, 2, 4, 5][..]));
    let alive = [0, 2, 4, 5];
    for pair in losses(4).into_iter().filter(|loss| loss.len() == 2) {
        for place in &pair {
            cluster.kill(alive[*place]).await;
        }
        cluster.check(&data, &payload, 0..3_000_001).await;
        for place in &pair {
            cluster.revive(alive[*place]).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_one_disk_left_writes_are_refused_and_inline_payloads_are_not() {
    let mut draw = seed("with_one_disk_left_writes_are_refused_and_inline_payloads_are_not");
    let cluster = Cluster::start(4, 2, ObjectSettings::default()).await;
    for place in 0..5 {
        cluster.kill(place).await;
    }
    let long = payload(100_000, &mut draw);
    assert!(matches!(cluster.stage(&long, &mut draw).await, Err(StageError::Unavailable(_))));
    assert_eq!(cluster.chunks(), 0);
    assert!(cluster.stage(&payload(100, &mut draw), &mut draw).await.is_ok());
    assert!(matches!(
        cluster.store.stage(Some("none"), OWNER, long.len() as u64, body(&long, &mut draw)).await,
        Err(StageError::UnknownScheme(_))
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_hangs_is_left_behind_long_before_its_deadline() {
    let mut draw = seed("a_disk_that_hangs_is_left_behind_long_before_its_deadline");
    for settings in [ObjectSettings::default(), streaming()] {
        let settings = ObjectSettings { write_deadline: Duration::from_secs(600), ..settings };
        let cluster = Cluster::start(4, 2, settings).await;
        let payload = payload(8_000_000, &mut draw);
        cluster.disks[2].hung.store(true, Ordering::SeqCst);
        let staged = cluster.stage(&payload, &mut draw).await.unwrap();
        assert_eq!(staged.missing.iter().map(|chunk| chunk.index).collect::<Vec<_>>(), [2]);
        cluster.check(&staged.data, &payload, 0..8_000_000).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_named_as_missing_and_left_out_of_the_next_write() {
    let mut draw = seed("a_full_disk_is_named_as_missing_and_left_out_of_the_next_write");
    let cluster = Cluster::start(4, 2, ObjectSettings::default()).await;
    cluster.disks[0].full.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        let staged = cluster.stage(&payload(500_000, &mut draw), &mut draw).await.unwrap();
        assert_eq!(staged.missing.iter().map(|chunk| chunk.index).collect::<Vec<_>>(), [0]);
        staged.committed();
    }
    assert_eq!(cluster.chunks(), 10);
}
