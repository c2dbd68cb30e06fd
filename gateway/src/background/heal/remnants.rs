//! Remnants: chunks of extents that were deleted everywhere else while their disk was away.
//!
//! When an object is deleted, its chunks go from all disks of their group. A disk that was out of service meanwhile
//! keeps its own, and no shard knows of them any more. A fault of the metadata looks the same on this one disk, but not
//! on the others: there, the rest of the extent is still where it was written. So the others are asked. Where all disks
//! of the group answer and none has any chunk of the extent, somebody deleted it, which only happens when its shard
//! says so; and one chunk alone is good for nothing.

use super::look::BATCH;
use super::Inner;
use granary_placement::id::{DiskId, ExtentId, PlacementGroupId};
use granary_placement::map::{ClusterMap, PlacementGroup};
use granary_wire::chunk::{ChunkId, ChunkInfo};
use granary_wire::control::{ControlRequest, ControlResponse};
use std::collections::{BTreeMap, HashMap, HashSet};

/// An extent of a group.
pub(super) type Extent = (PlacementGroupId, ExtentId);

impl Inner {
    /// Of these chunks on a disk, which no shard knows: the extents of which no other disk of their group has a chunk.
    pub(super) async fn remnants(&self, map: &ClusterMap, disk: DiskId, unknown: &[ChunkInfo]) -> HashSet<Extent> {
        let mut by_group: HashMap<PlacementGroupId, Vec<&ChunkInfo>> = HashMap::new();
        unknown.iter().for_each(|chunk| by_group.entry(chunk.id.group).or_default().push(chunk));
        let mut remnants = HashSet::new();
        for (id, chunks) in by_group {
            let Some(group) = map.group(id) else { continue };
            let mut gone: HashSet<Extent> = chunks.iter().map(|chunk| (id, chunk.id.extent)).collect();
            for (other, asked) in questions(group, disk, &chunks) {
                match self.there(other, &asked).await {
                    Some(there) => {
                        let there: HashSet<ExtentId> = there.iter().map(|chunk| chunk.extent).collect();
                        gone.retain(|(_, extent)| !there.contains(extent));
                    }
                    // Who does not answer may have it.
                    None => gone.clear(),
                }
                if gone.is_empty() {
                    break;
                }
            }
            remnants.extend(gone);
        }
        remnants
    }

    /// Which of these chunks a disk has; None: it does not answer.
    async fn there(&self, disk: DiskId, chunks: &[ChunkId]) -> Option<Vec<ChunkId>> {
        let client = self.store.disks().client(disk)?;
        let mut there = Vec::new();
        for part in chunks.chunks(BATCH) {
            let asked = client.control(ControlRequest::HaveChunks(part.to_vec()), self.settings().control_deadline);
            match asked.await {
                Ok(ControlResponse::Have(have)) if have.len() == part.len() => {
                    there.extend(part.iter().zip(have).filter(|(_, have)| *have).map(|(chunk, _)| *chunk));
                }
                Ok(_) => return None,
                Err(error) => {
                    tracing::debug!(%disk, %error, "a disk was not asked for the rest of what no shard knows");
                    return None;
                }
            }
        }
        Some(there)
    }
}

/// Whom to ask for which other chunks of these extents. An extent as wide as its group has chunk i in slot i; of a
/// narrower one any chunk may be in any slot.
fn questions(group: &PlacementGroup, disk: DiskId, chunks: &[&ChunkInfo]) -> BTreeMap<DiskId, Vec<ChunkId>> {
    let mut questions: BTreeMap<DiskId, Vec<ChunkId>> = BTreeMap::new();
    for (slot, entry) in (0u8..).zip(&group.slots) {
        for other in entry.disks().filter(|other| *other != disk) {
            let asked = questions.entry(other).or_default();
            for chunk in chunks {
                let width = chunk.spec.k.saturating_add(chunk.spec.m);
                let indices =
                    if usize::from(width) == group.slots.len() { slot..slot.saturating_add(1) } else { 0..width };
                asked.extend(indices.map(|index| ChunkId { index, ..chunk.id }));
            }
        }
    }
    questions
}
