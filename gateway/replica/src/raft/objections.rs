//! What no replica that is in its right mind says, and answers. In release builds openraft takes the word of another
//! replica for much that only debug builds assert; what gets as far as the log on disk stays there.
//!
//! A message is judged by itself and by the latest term that is known here. Where it contradicts what was committed
//! here, nobody can tell which of the two is damaged: openraft asserts it, and the replica ends for everybody to see.

use crate::message::{
    AppliedState, PeerRequest, PeerResponse, ReplicaId, WireEntry, WireLogId, WireMembership, WirePayload, WireVote,
};
use std::cmp::Ordering;

/// Furthest that a term is ahead of the one that is known here. Each election adds one.
const MAX_TERMS_AHEAD: u64 = 1 << 32;
/// No term and no index of a log is as high.
const END: u64 = 1 << 63;

/// Why a request is not even shown to the Raft library; None when it may be. `term`: the latest that is known here.
pub fn objection(request: &PeerRequest, term: u64) -> Option<&'static str> {
    let vote = request.claim()?;
    if is_too_far(vote, term) {
        return Some("the term is far ahead of any that can be");
    }
    let is_candidates = matches!(request, PeerRequest::Vote { .. });
    if vote.committed == is_candidates {
        return Some("a leader speaks as a candidate, or a candidate as a leader");
    }
    match request {
        PeerRequest::Append { vote, previous, entries, committed } => {
            let sent = || previous.iter().chain(entries.iter().map(|entry| &entry.id));
            if sent().chain(committed).any(|id| !may_know(vote, id)) {
                return Some("an entry from after the leader's term");
            }
            if !are_in_order(previous.as_ref(), entries) {
                return Some("the entries do not follow each other");
            }
            if committed.is_some_and(|committed| sent().any(|id| !are_of_one_log(&committed, id))) {
                return Some("what is committed is of another log than the entries");
            }
            let names_nobody = |entry: &WireEntry| match &entry.payload {
                WirePayload::Membership(membership) => !has_voters(membership),
                WirePayload::Blank | WirePayload::Batch(_) => false,
            };
            entries.iter().any(names_nobody).then_some("members without voters")
        }
        PeerRequest::Vote { last, .. } | PeerRequest::Transfer { last, .. } => {
            last.as_ref().is_some_and(|last| !may_know(vote, last)).then_some("an entry from after the sender's term")
        }
        _ => None,
    }
}

/// Why a snapshot that is applied so far is not installed for the leader with this vote; None when it may be.
pub fn objection_to_snapshot(vote: &WireVote, applied: &AppliedState) -> Option<&'static str> {
    // The first entry of every log makes the first members.
    let (Some(last), Some(membership_at)) = (&applied.last, &applied.membership_at) else {
        return Some("a snapshot of nothing");
    };
    if !may_know(vote, last) {
        return Some("a snapshot from after the leader's term");
    }
    if membership_at.index > last.index || !are_of_one_log(membership_at, last) {
        return Some("members of a later entry than the snapshot's last, or of another log");
    }
    (!has_voters(&applied.membership)).then_some("members without voters")
}

/// Why an answer is not shown to the Raft library, which asked this; None when it may be.
pub fn objection_to_answer(asked: &PeerRequest, answer: &PeerResponse) -> Option<&'static str> {
    let mine = asked.claim()?;
    let vote = match answer {
        PeerResponse::HigherVote(vote) | PeerResponse::Voted { vote, .. } | PeerResponse::Installed(vote) => Some(vote),
        _ => None,
    };
    if vote.is_some_and(|vote| is_too_far(vote, mine.term)) {
        return Some("the term is far ahead of any that can be");
    }
    // Nobody can know of a later vote for whoever asks than it does itself: the library would lead without an election,
    // or keep a vote that it never gave. To a question from before a later candidacy it is the right answer, and of no
    // use any more.
    if vote.is_some_and(|vote| vote.node == mine.node && vote.term > mine.term) {
        return Some("whoever asks is said to stand or lead in a later term than it asks in");
    }
    match (asked, answer) {
        (PeerRequest::Vote { .. }, PeerResponse::Voted { vote, last: Some(last), .. }) => {
            (!may_know(vote, last)).then_some("an entry from after the voter's term")
        }
        (PeerRequest::Append { previous, entries, .. }, PeerResponse::AppendedTo(Some(to))) => {
            let mut sent = previous.iter().chain(entries.iter().map(|entry| &entry.id));
            (!sent.any(|id| id == to)).then_some("an entry that was not sent")
        }
        (PeerRequest::Append { previous: None, .. }, PeerResponse::Conflict) => {
            Some("a conflict with the beginning of the log")
        }
        _ => None,
    }
}

fn is_too_far(vote: &WireVote, term: u64) -> bool {
    vote.term >= END || vote.term > term.saturating_add(MAX_TERMS_AHEAD)
}

/// Leaders follow each other in this order: there may be several in one term.
fn leader(id: &WireLogId) -> (u64, ReplicaId) {
    (id.term, id.node)
}

fn may_know(vote: &WireVote, id: &WireLogId) -> bool {
    leader(id) <= (vote.term, vote.node) && id.index < END
}

/// Can two entries be of one log? The later one is not of an earlier leader.
fn are_of_one_log(one: &WireLogId, other: &WireLogId) -> bool {
    match one.index.cmp(&other.index) {
        Ordering::Less => leader(one) <= leader(other),
        Ordering::Equal => one == other,
        Ordering::Greater => leader(one) >= leader(other),
    }
}

/// Does each entry follow the one before it, with no hole between and of no earlier leader?
fn are_in_order(previous: Option<&WireLogId>, entries: &[WireEntry]) -> bool {
    let mut before = previous;
    entries.iter().all(|entry| {
        let follows = match before {
            Some(before) => entry.id.index == before.index.saturating_add(1) && are_of_one_log(before, &entry.id),
            None => entry.id.index == 0,
        };
        before = Some(&entry.id);
        follows
    })
}

/// One set of voters, or two while it changes, all of them members.
fn has_voters(membership: &WireMembership) -> bool {
    let is_set =
        |voters: &Vec<ReplicaId>| !voters.is_empty() && voters.iter().all(|voter| membership.nodes.contains(voter));
    (1..=2).contains(&membership.configs.len()) && membership.configs.iter().all(is_set)
}

#[cfg(test)]
mod tests {
    use super::*;
    use granary_placement::id::DiskId;

    const NODE: ReplicaId = replica(1);

    const fn replica(disk: u32) -> ReplicaId {
        ReplicaId { disk: DiskId(disk), incarnation: 7 }
    }

    fn id(term: u64, index: u64) -> WireLogId {
        WireLogId { term, node: NODE, index }
    }

    /// Of the leader that came after [`NODE`] in the same term.
    fn id_of_next(term: u64, index: u64) -> WireLogId {
        WireLogId { node: replica(2), ..id(term, index) }
    }

    fn leads(term: u64) -> WireVote {
        WireVote { term, node: NODE, committed: true }
    }

    fn append(term: u64, previous: Option<WireLogId>, entries: &[WireLogId]) -> PeerRequest {
        append_of(term, previous, entries, None)
    }

    fn append_of(
        term: u64,
        previous: Option<WireLogId>,
        entries: &[WireLogId],
        committed: Option<WireLogId>,
    ) -> PeerRequest {
        let entry = |id: &WireLogId| WireEntry { id: *id, payload: WirePayload::Blank };
        PeerRequest::Append { vote: leads(term), previous, entries: entries.iter().map(entry).collect(), committed }
    }

    fn vote(term: u64, committed: bool, last: Option<WireLogId>) -> PeerRequest {
        let vote = WireVote { term, node: NODE, committed };
        PeerRequest::Vote { vote, last, transfer: false, pre_vote: false }
    }

    fn members(configs: &[&[u32]], nodes: &[u32]) -> WireMembership {
        let ids = |disks: &[u32]| disks.iter().copied().map(replica).collect();
        WireMembership { configs: configs.iter().map(|voters| ids(voters)).collect(), nodes: ids(nodes) }
    }

    fn first_members(membership: WireMembership) -> PeerRequest {
        let entry = WireEntry { id: id(0, 0), payload: WirePayload::Membership(membership) };
        PeerRequest::Append { vote: leads(5), previous: None, entries: vec![entry], committed: None }
    }

    #[test]
    fn what_leaders_and_candidates_say_passes() {
        for request in [
            append(5, None, &[]),
            append(5, Some(id(4, 9)), &[]),
            append(5, None, &[id(0, 0), id(1, 1), id(5, 2)]),
            append(5, Some(id(4, 9)), &[id(4, 10), id_of_next(4, 11), id(5, 12)]),
            append_of(5, None, &[], Some(id(4, 9))),
            append_of(5, Some(id(4, 9)), &[id(5, 10)], Some(id(3, 8))),
            append_of(5, Some(id(4, 9)), &[id(5, 10)], Some(id(4, 9))),
            append_of(5, Some(id(2, 3)), &[id(2, 4)], Some(id(5, 100))),
            first_members(members(&[&[1]], &[1, 2])),
            first_members(members(&[&[1, 2, 3], &[2, 3, 4]], &[1, 2, 3, 4])),
            vote(5, false, None),
            vote(9, false, Some(id(8, 100))),
            PeerRequest::Transfer { vote: leads(5), to: NODE, last: Some(id(5, 3)) },
            PeerRequest::Members,
            PeerRequest::Identify,
            PeerRequest::Rebuild,
        ] {
            assert_eq!(objection(&request, 5), None, "{request:?}");
        }
    }

    #[test]
    fn holes_later_terms_and_terms_that_end_all_elections_are_refused() {
        for request in [
            append(u64::MAX, None, &[]),
            append(5 + MAX_TERMS_AHEAD + 1, None, &[]),
            vote(u64::MAX, false, None),
            // A hole at the beginning, between, and after what was before.
            append(5, None, &[id(1, 1)]),
            append(5, None, &[id(1, 0), id(1, 2)]),
            append(5, Some(id(1, 9)), &[id(1, 11)]),
            append(5, Some(id(1, 9)), &[id(1, 9)]),
            append(5, Some(id(1, u64::MAX)), &[id(1, u64::MAX)]),
            // Leaders that go back, or come after the one that speaks.
            append(5, Some(id(4, 9)), &[id(3, 10)]),
            append(5, Some(id_of_next(4, 9)), &[id(4, 10)]),
            append(5, None, &[id(6, 0)]),
            append(5, Some(id(6, 9)), &[]),
            append(5, Some(id_of_next(5, 9)), &[]),
            append_of(5, None, &[], Some(id(6, 1))),
            vote(5, false, Some(id(6, 1))),
            PeerRequest::Transfer { vote: leads(5), to: NODE, last: Some(id(5, END)) },
            // Committed after the last entry and before its leader, or in another entry's place.
            append_of(5, Some(id(4, 9)), &[], Some(id(3, 1000))),
            append_of(5, Some(id(4, 9)), &[], Some(id(5, 8))),
            append_of(5, Some(id(4, 9)), &[id(5, 10)], Some(id(4, 10))),
            // A leader that was not elected, and a candidate that was.
            vote(5, true, None),
            PeerRequest::Append {
                vote: WireVote { committed: false, ..leads(5) },
                previous: None,
                entries: Vec::new(),
                committed: None,
            },
            // Members of whom nobody votes, and voters that are no members.
            first_members(members(&[], &[1])),
            first_members(members(&[&[1], &[]], &[1])),
            first_members(members(&[&[1, 2]], &[1])),
            first_members(members(&[&[1], &[1], &[1]], &[1])),
        ] {
            assert!(objection(&request, 5).is_some(), "{request:?}");
        }
        // By itself, however far elections have come.
        assert!(objection(&append(END, None, &[]), END - 1).is_some());
    }

    #[test]
    fn snapshots_that_no_leader_has_are_refused() {
        let at = |membership_at, last, membership: &WireMembership| AppliedState {
            last,
            membership_at,
            membership: membership.clone(),
        };
        let sound = members(&[&[1, 2, 3]], &[1, 2, 3]);
        for applied in [
            at(Some(id(0, 0)), Some(id(0, 0)), &sound),
            at(Some(id(2, 7)), Some(id(5, 9)), &sound),
            at(Some(id(2, 7)), Some(id(4, 9)), &members(&[&[1, 2], &[2, 3]], &[1, 2, 3, 4])),
        ] {
            assert_eq!(objection_to_snapshot(&leads(5), &applied), None, "{applied:?}");
        }
        for applied in [
            AppliedState::default(),
            at(None, Some(id(4, 9)), &sound),
            at(Some(id(0, 0)), None, &sound),
            at(Some(id(2, 7)), Some(id(6, 9)), &sound),
            at(Some(id(2, 7)), Some(id_of_next(5, 9)), &sound),
            at(Some(id(2, 7)), Some(id(5, u64::MAX)), &sound),
            at(Some(id(4, 10)), Some(id(4, 9)), &sound),
            at(Some(id(5, 7)), Some(id(4, 9)), &sound),
            at(Some(id(3, 9)), Some(id(4, 9)), &sound),
            at(Some(id(2, 7)), Some(id(4, 9)), &WireMembership::default()),
            at(Some(id(2, 7)), Some(id(4, 9)), &members(&[&[1, 4]], &[1])),
        ] {
            assert!(objection_to_snapshot(&leads(5), &applied).is_some(), "{applied:?}");
        }
    }

    #[test]
    fn answers_that_no_replica_gives_are_refused() {
        let ask = append(5, Some(id(4, 9)), &[id(5, 10), id(5, 11)]);
        let from_the_beginning = append(5, None, &[id(0, 0)]);
        let candidacy = vote(5, false, Some(id(4, 9)));
        let of = |term, disk, committed| WireVote { term, node: replica(disk), committed };
        let voted = |vote, last| PeerResponse::Voted { vote, granted: false, last };
        for (asked, answer) in [
            (&ask, PeerResponse::Appended),
            (&ask, PeerResponse::AppendedTo(None)),
            (&ask, PeerResponse::AppendedTo(Some(id(4, 9)))),
            (&ask, PeerResponse::AppendedTo(Some(id(5, 11)))),
            (&ask, PeerResponse::Conflict),
            (&ask, PeerResponse::HigherVote(of(6, 2, true))),
            (&ask, PeerResponse::HigherVote(of(5 + MAX_TERMS_AHEAD, 2, false))),
            (&candidacy, voted(of(5, 1, false), Some(id(4, 9)))),
            (&candidacy, voted(of(4, 2, true), Some(id_of_next(4, 100)))),
            (&candidacy, voted(of(0, 0, false), None)),
            (&PeerRequest::Members, PeerResponse::Conflict),
        ] {
            assert_eq!(objection_to_answer(asked, &answer), None, "{answer:?}");
        }
        for (asked, answer) in [
            (&ask, PeerResponse::HigherVote(of(u64::MAX, 2, true))),
            (&ask, PeerResponse::HigherVote(of(5 + MAX_TERMS_AHEAD + 1, 2, false))),
            (&ask, PeerResponse::Installed(of(u64::MAX, 2, true))),
            (&candidacy, voted(of(u64::MAX, 2, false), None)),
            (&ask, PeerResponse::HigherVote(of(6, 1, true))),
            (&ask, PeerResponse::HigherVote(of(6, 1, false))),
            (&candidacy, voted(of(6, 1, false), None)),
            (&candidacy, voted(of(4, 2, true), Some(id(5, 9)))),
            (&candidacy, voted(of(4, 2, true), Some(id(4, u64::MAX)))),
            (&ask, PeerResponse::AppendedTo(Some(id(5, 12)))),
            (&ask, PeerResponse::AppendedTo(Some(id(4, 10)))),
            (&from_the_beginning, PeerResponse::Conflict),
        ] {
            assert!(objection_to_answer(asked, &answer).is_some(), "{answer:?}");
        }
    }
}
