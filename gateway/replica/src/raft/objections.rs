//! What no replica that is in its right mind says. In release builds openraft takes the word of another replica for
//! much that only debug builds assert; what gets as far as the log on disk stays there.

use crate::message::{PeerRequest, WireEntry, WireLogId, WireVote};

/// Furthest that a term is ahead of the one that is known here. Each election adds one.
const MAX_TERMS_AHEAD: u64 = 1 << 32;
/// No term and no index of a log is as high.
const END: u64 = 1 << 63;

/// Why a request is not even shown to the Raft library; None when it may be. `term`: the latest that is known here.
pub fn objection(request: &PeerRequest, term: u64) -> Option<&'static str> {
    let vote = request.claim()?;
    if vote.term >= END || vote.term > term.saturating_add(MAX_TERMS_AHEAD) {
        return Some("the term is far ahead of any that can be");
    }
    let is_candidates = matches!(request, PeerRequest::Vote { .. });
    if vote.committed == is_candidates {
        return Some("a leader speaks as a candidate, or a candidate as a leader");
    }
    match request {
        PeerRequest::Append { vote, previous, entries, committed } => {
            let named = [previous, committed].into_iter().flatten();
            if named.chain(entries.iter().map(|entry| &entry.id)).any(|id| !may_know(vote, id)) {
                return Some("an entry from after the leader's term");
            }
            (!are_in_order(previous.as_ref(), entries)).then_some("the entries do not follow each other")
        }
        PeerRequest::Vote { last, .. } | PeerRequest::Transfer { last, .. } => {
            last.as_ref().is_some_and(|last| !may_know(vote, last)).then_some("an entry from after the sender's term")
        }
        _ => None,
    }
}

fn may_know(vote: &WireVote, id: &WireLogId) -> bool {
    id.term <= vote.term && id.index < END
}

/// Does each entry follow the one before it, with no hole between and in no earlier term?
fn are_in_order(previous: Option<&WireLogId>, entries: &[WireEntry]) -> bool {
    let mut before = previous;
    entries.iter().all(|entry| {
        let follows = match before {
            Some(before) => entry.id.index == before.index.saturating_add(1) && entry.id.term >= before.term,
            None => entry.id.index == 0,
        };
        before = Some(&entry.id);
        follows
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{ReplicaId, WirePayload};
    use granary_placement::id::DiskId;

    const NODE: ReplicaId = ReplicaId { disk: DiskId(1), incarnation: 7 };

    fn id(term: u64, index: u64) -> WireLogId {
        WireLogId { term, node: NODE, index }
    }

    fn leads(term: u64) -> WireVote {
        WireVote { term, node: NODE, committed: true }
    }

    fn append(term: u64, previous: Option<WireLogId>, entries: &[WireLogId]) -> PeerRequest {
        let entry = |id: &WireLogId| WireEntry { id: *id, payload: WirePayload::Blank };
        PeerRequest::Append {
            vote: leads(term),
            previous,
            entries: entries.iter().map(entry).collect(),
            committed: None,
        }
    }

    fn vote(term: u64, committed: bool, last: Option<WireLogId>) -> PeerRequest {
        let vote = WireVote { term, node: NODE, committed };
        PeerRequest::Vote { vote, last, transfer: false, pre_vote: false }
    }

    #[test]
    fn what_leaders_and_candidates_say_passes() {
        for request in [
            append(5, None, &[]),
            append(5, Some(id(4, 9)), &[]),
            append(5, None, &[id(0, 0), id(1, 1), id(5, 2)]),
            append(5, Some(id(4, 9)), &[id(4, 10), id(5, 11)]),
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
            append(END, None, &[]),
            append(5 + MAX_TERMS_AHEAD + 1, None, &[]),
            vote(u64::MAX, false, None),
            // A hole at the beginning, between, and after what was before.
            append(5, None, &[id(1, 1)]),
            append(5, None, &[id(1, 0), id(1, 2)]),
            append(5, Some(id(1, 9)), &[id(1, 11)]),
            append(5, Some(id(1, 9)), &[id(1, 9)]),
            append(5, Some(id(1, u64::MAX)), &[id(1, u64::MAX)]),
            // Terms that go back, or are later than the leader's.
            append(5, Some(id(4, 9)), &[id(3, 10)]),
            append(5, None, &[id(6, 0)]),
            append(5, Some(id(6, 9)), &[]),
            PeerRequest::Append { vote: leads(5), previous: None, entries: Vec::new(), committed: Some(id(6, 1)) },
            vote(5, false, Some(id(6, 1))),
            PeerRequest::Transfer { vote: leads(5), to: NODE, last: Some(id(5, END)) },
            // A leader that was not elected, and a candidate that was.
            vote(5, true, None),
            PeerRequest::Append {
                vote: WireVote { committed: false, ..leads(5) },
                previous: None,
                entries: Vec::new(),
                committed: None,
            },
        ] {
            assert!(objection(&request, 5).is_some(), "{request:?}");
        }
    }
}
