use super::*;

/// What is changed in a replica's facts.
type Change = fn(&mut Facts);

const SHARD: ShardId = ShardId(3);
const TIMING: SleepTiming = SleepTiming { after: Duration::from_secs(10), lost: Duration::from_secs(1) };
const AT: Asleep = Asleep { shard: SHARD, term: 4, index: 70 };

fn disk(id: u32) -> DiskId {
    DiskId(id)
}

/// Disk 1 leads, disks 2 and 3 follow.
fn facts(me: u32) -> Facts {
    Facts {
        shard: SHARD,
        running: true,
        leads: me == 1,
        leader: Some(disk(1)),
        term: 4,
        last: 70,
        applied: 70,
        settled: me == 1,
        others: [1, 2, 3].into_iter().filter(|id| *id != me).map(disk).collect(),
        rest: Rest::Awake,
        commands: 9,
    }
}

fn agreed() -> LinkBeat {
    LinkBeat { asleep: Vec::new(), agreed: vec![AT], clock_ms: 0, is_full: false }
}

/// A leader's view after its shard has rested long enough, and when that is.
fn rested(all: &[Facts]) -> (Sleepers, Instant) {
    let mut sleepers = Sleepers::new(TIMING);
    let begin = Instant::now();
    assert_eq!(sleepers.observe(begin, all), []);
    assert_eq!(sleepers.beat_for(disk(2), all), LinkBeat::default(), "named before it rested");
    let now = begin + TIMING.after;
    assert_eq!(sleepers.observe(now, all), []);
    (sleepers, now)
}

#[test]
fn a_leader_sleeps_when_all_others_agree_and_not_before() {
    let all = [facts(1)];
    let (mut sleepers, now) = rested(&all);
    assert_eq!(sleepers.beat_for(disk(2), &all).asleep, [AT]);
    assert_eq!(sleepers.beat_for(disk(9), &all).asleep, [], "told a disk without a replica");
    assert_eq!(sleepers.take(now, disk(9), &agreed(), &all), [], "took the word of a disk without a replica");
    assert_eq!(sleepers.take(now, disk(2), &agreed(), &all), []);
    assert_eq!(sleepers.take(now, disk(3), &agreed(), &all), [Action::SleepAsLeader(AT, 9)]);
}

#[test]
fn a_shard_with_one_member_sleeps_alone_and_the_root_shard_never() {
    let mut all = [facts(1)];
    all[0].others.clear();
    let mut sleepers = Sleepers::new(TIMING);
    let begin = Instant::now();
    assert_eq!(sleepers.observe(begin, &all), []);
    assert_eq!(sleepers.observe(begin + TIMING.after, &all), [Action::SleepAsLeader(AT, 9)]);
    all[0].shard = ShardId::ROOT;
    let mut sleepers = Sleepers::new(TIMING);
    sleepers.observe(begin, &all);
    assert_eq!(sleepers.observe(begin + TIMING.after * 2, &all), []);
}

#[test]
fn whatever_is_under_way_keeps_a_leader_awake() {
    let changes: [(&str, Change); 6] = [
        ("a command", |facts| facts.commands += 1),
        ("an entry", |facts| (facts.last, facts.applied) = (71, 71)),
        ("another term", |facts| facts.term += 1),
        ("not applied", |facts| facts.applied -= 1),
        ("a member lags", |facts| facts.settled = false),
        ("stopped", |facts| facts.running = false),
    ];
    for (what, change) in changes {
        let mut all = [facts(1)];
        let (mut sleepers, now) = rested(&all);
        assert_eq!(sleepers.take(now, disk(2), &agreed(), &all), []);
        change(&mut all[0]);
        assert_eq!(sleepers.observe(now, &all), [], "{what}");
        assert_eq!(sleepers.beat_for(disk(2), &all).asleep, [], "{what}");
        assert_eq!(sleepers.take(now, disk(3), &agreed(), &all), [], "{what}");
    }
}

#[test]
fn a_sleeping_leader_wakes_when_a_member_leaves_its_agreement_or_its_link_is_lost() {
    let mut all = [facts(1)];
    let (mut sleepers, now) = rested(&all);
    sleepers.take(now, disk(2), &agreed(), &all);
    sleepers.take(now, disk(3), &agreed(), &all);
    all[0].rest = Rest::Leading { term: 4 };
    assert_eq!(sleepers.observe(now + TIMING.lost / 2, &all), []);
    assert!(matches!(sleepers.observe(now + TIMING.lost, &all)[..], [Action::Wake(SHARD, _)]));
    let later = now + TIMING.lost;
    assert_eq!(sleepers.take(later, disk(2), &agreed(), &all), []);
    assert!(matches!(sleepers.take(later, disk(3), &LinkBeat::default(), &all)[..], [Action::Wake(SHARD, _)]));
    all[0].leads = false;
    assert!(matches!(sleepers.observe(later, &all)[..], [Action::Wake(SHARD, _)]), "it was deposed");
}

#[test]
fn a_follower_agrees_only_where_the_leader_stands() {
    let beat = LinkBeat { asleep: vec![AT], agreed: Vec::new(), clock_ms: 0, is_full: false };
    let now = Instant::now();
    let all = [facts(2)];
    let mut sleepers = Sleepers::new(TIMING);
    assert_eq!(sleepers.take(now, disk(1), &beat, &all), [Action::SleepAsFollower(AT, disk(1))]);
    assert_eq!(sleepers.beat_for(disk(1), &all).agreed, [AT]);
    let changes: [(&str, Change); 6] = [
        ("lags", |facts| (facts.last, facts.applied) = (69, 69)),
        ("not applied", |facts| facts.applied = 69),
        ("another term", |facts| facts.term = 5),
        ("another leader", |facts| facts.leader = Some(disk(3))),
        ("no leader", |facts| facts.leader = None),
        ("leads itself", |facts| facts.leads = true),
    ];
    for (what, change) in changes {
        let mut all = all.clone();
        change(&mut all[0]);
        let mut sleepers = Sleepers::new(TIMING);
        assert_eq!(sleepers.take(now, disk(1), &beat, &all), [], "{what}");
        assert_eq!(sleepers.beat_for(disk(1), &all).agreed, [], "{what}");
    }
}

#[test]
fn a_sleeping_follower_wakes_without_its_leaders_word() {
    let beat = LinkBeat { asleep: vec![AT], agreed: Vec::new(), clock_ms: 0, is_full: false };
    let now = Instant::now();
    let mut all = [facts(2)];
    let mut sleepers = Sleepers::new(TIMING);
    sleepers.take(now, disk(1), &beat, &all);
    all[0].rest = Rest::Following { leader: disk(1), term: 4 };
    assert_eq!(sleepers.observe(now + TIMING.lost / 2, &all), []);
    // Another disk's beat does not name the shard, and says nothing about its leader.
    assert_eq!(sleepers.take(now, disk(3), &LinkBeat::default(), &all), []);
    assert!(matches!(sleepers.observe(now + TIMING.lost, &all)[..], [Action::Wake(SHARD, _)]), "the link is lost");
    assert!(matches!(sleepers.take(now, disk(1), &LinkBeat::default(), &all)[..], [Action::Wake(SHARD, _)]));
    let mut deposed = all.clone();
    deposed[0].term = 5;
    assert!(matches!(sleepers.take(now, disk(1), &beat, &deposed)[..], [Action::Wake(SHARD, _)]), "a later term");
}
