//! A store on the simulated disk, and the operations of a sequence, which note in the model what must hold after them.

use super::check::{check, contents, Model};
use super::engine::{EngineFaults, FailingEngine};
use super::{FailedSync, SimDevice};
use bytes::Bytes;
use granary_disk_node::metrics::Metrics;
use granary_disk_node::store::core::{Core, Done, Op, Ticket, Whose};
use granary_disk_node::store::index::Index;
use granary_disk_node::store::index_memory::MemoryEngine;
use granary_disk_node::store::recover::recover;
use granary_disk_node::store::shared::Shared;
use granary_disk_node::store::{OpenError, StoreError, StoreSettings};
use granary_placement::id::{DiskUuid, ExtentId, PlacementGroupId};
use granary_wire::chunk::{block_crc, ChunkId, BLOCK_BYTES};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

#[path = "../scenery/spec.rs"]
mod spec;
pub use spec::spec;

const DISK: DiskUuid = DiskUuid([7; 16]);

/// How long chunks and segments are.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// Factor of the chunks that are written whole.
    pub short: u64,
    /// Factor of those that come in pieces.
    pub long: u64,
    /// Length of a segment, in bytes.
    pub segment_bytes: u64,
    /// Shortest segment, in bytes.
    pub min_segment_bytes: u64,
    /// Size of the disk, in bytes: one that no sequence fills.
    pub capacity: u64,
}

/// Chunks of one block, most of them of one page: quick, so that everything can be tried.
pub const PAGES: Scale =
    Scale { short: 1, long: 1, segment_bytes: 48 << 10, min_segment_bytes: 16 << 10, capacity: 1 << 20 };

/// Chunks of several blocks.
pub const BLOCKS: Scale =
    Scale { short: 100, long: 30, segment_bytes: 1 << 20, min_segment_bytes: 256 << 10, capacity: 32 << 20 };

/// Long chunks have so many blocks that their header takes two pages. Short ones lie with them in a segment.
pub const TWO_PAGE_HEADERS: Scale =
    Scale { short: 20, long: 7253, segment_bytes: 68 << 20, min_segment_bytes: 1 << 20, capacity: 2 << 30 };

impl Scale {
    fn settings(&self) -> StoreSettings {
        StoreSettings {
            segment_bytes: self.segment_bytes,
            min_segment_bytes: self.min_segment_bytes,
            reserve_bytes: 0,
            flush_interval: Duration::from_secs(1 << 30),
            punch_interval: Duration::ZERO,
            ..StoreSettings::default()
        }
    }

    /// Length of a chunk that comes in pieces, in bytes.
    pub fn long_bytes(&self) -> u64 {
        9000 * self.long
    }
}

fn metrics() -> Arc<Metrics> {
    static METRICS: OnceLock<Arc<Metrics>> = OnceLock::new();
    METRICS.get_or_init(|| Arc::new(Metrics::new().unwrap())).clone()
}

pub fn chunk(number: u8) -> ChunkId {
    ChunkId { group: PlacementGroupId(1), extent: ExtentId([number; 16]), index: 0, generation: 1 }
}

/// Bytes that no other write has; no two pages of them are the same.
pub fn payload(write: u64, len_bytes: u64) -> Bytes {
    let mut state = write.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let page: Vec<u8> = (0..512).flat_map(|_| next().to_le_bytes()).collect();
    let mut bytes = Vec::with_capacity(len_bytes as usize + page.len());
    for number in 0..len_bytes.div_ceil(page.len() as u64) {
        bytes.extend_from_slice(&(next() ^ number).to_le_bytes());
        bytes.extend_from_slice(&page[8..]);
    }
    bytes.truncate(len_bytes as usize);
    bytes.into()
}

pub fn crcs(id: &ChunkId, data: &Bytes) -> Vec<u32> {
    data.chunks(BLOCK_BYTES as usize).enumerate().map(|(block, bytes)| block_crc(id, block as u32, bytes)).collect()
}

/// One step of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// A chunk that comes whole.
    PutSmall(u8),
    /// A chunk that comes in pieces.
    PutBig(u8),
    /// Two chunks and a deletion that share a group.
    Together(u8, u8),
    /// An upload that is given up half-way while another chunk goes past it.
    Abort(u8),
    /// A long upload with others of its own and another chunk, a flush and a deletion going past it: the watermark must
    /// wait for it, and a record that lies further back in the segment is the newer one.
    Interleaved(u8),
    Delete(u8),
    /// A chunk is read and compared.
    Read(u8),
    Flush,
    /// A clean stop and start.
    Reopen,
    /// The process is killed, half-way in an upload, and starts again: the page cache outlives it. The index keeps all
    /// its batches or only the flushed ones.
    Kill {
        keeps: bool,
    },
    /// The next sync fails; from then on a process that ended starts again on the page cache of before.
    FailSync(FailedSync),
}

/// The disk and the index below a store.
pub struct Scene {
    pub device: SimDevice,
    pub engine: MemoryEngine,
    /// How the index fails, if it does.
    pub faults: EngineFaults,
    /// Why the store ended or did not open, each time.
    pub told: Arc<Mutex<Vec<String>>>,
    pub scale: Scale,
}

pub struct World {
    pub core: Core,
    pub shared: Arc<Shared>,
}

/// The store has ended.
struct Ended;

impl From<StoreError> for Ended {
    fn from(error: StoreError) -> Ended {
        assert!(matches!(error, StoreError::Failed(_)), "unexpected {error}");
        Ended
    }
}

/// A sequence as it is carried out.
struct Run<'a> {
    scene: &'a Scene,
    actions: &'a [Action],
    world: World,
    model: Model,
    /// Chunks whose contents the step changes, in order.
    under_way: Vec<(u8, Option<Bytes>)>,
}

impl Scene {
    pub fn new(scale: Scale) -> Scene {
        Scene::of(SimDevice::new(scale.capacity), MemoryEngine::default(), scale)
    }

    pub fn of(device: SimDevice, engine: MemoryEngine, scale: Scale) -> Scene {
        Scene { device, engine, faults: EngineFaults::default(), told: Arc::default(), scale }
    }

    /// The power goes; all but the first `survive` batches of the index that were not flushed are lost.
    pub fn after_crash(&self, pick: &mut dyn FnMut(u64) -> u64, survive: usize) -> Scene {
        Scene::of(self.device.after_crash(pick), self.engine.after_crash(survive), self.scale)
    }

    /// The same disk with an index that does not fail, after a process that lost what it had not flushed.
    pub fn started_again(&self) -> Scene {
        Scene::of(self.device.clone(), self.engine.after_crash(0), self.scale)
    }

    /// The same disk without its index.
    pub fn without_index(&self) -> Scene {
        Scene::of(self.device.clone(), MemoryEngine::default(), self.scale)
    }

    /// # Errors
    /// When the store does not open.
    pub fn open(&self) -> Result<World, OpenError> {
        let told = self.told.clone();
        let shared = Shared::new(
            Arc::new(self.device.clone()),
            Index::new(Box::new(FailingEngine { inner: self.engine.clone(), faults: self.faults.clone() })),
            DISK,
            self.scale.settings(),
            metrics(),
            Arc::new(move |reason| told.lock().unwrap().push(reason.to_owned())),
        );
        let shared = Arc::new(shared);
        match recover(shared.clone()) {
            Ok((core, _)) => Ok(World { core, shared }),
            Err(error) => {
                self.told.lock().unwrap().push(error.to_string());
                Err(error)
            }
        }
    }

    /// Carries out a sequence until the power goes or, unless the sequence itself makes syncs fail, the store ends.
    /// Returns what must hold afterwards.
    pub fn run(&self, actions: &[Action]) -> Model {
        let model: Model = (0..3).map(|number| (number, BTreeSet::from([None]))).collect();
        let Ok(world) = self.open() else { return model };
        let starts_again = actions.iter().any(|action| matches!(action, Action::FailSync(_)));
        let mut run = Run { scene: self, actions, world, model, under_way: Vec::new() };
        for (step, action) in actions.iter().enumerate() {
            if run.step(*action, step as u64 * 10).is_ok() {
                continue;
            }
            run.check_refusals();
            if !starts_again || run.start_again(false).is_err() {
                break;
            }
        }
        run.model
    }
}

impl Run<'_> {
    fn put(number: u8, data: &Bytes) -> Op {
        Op::Put {
            id: chunk(number),
            spec: spec(data.len() as u64),
            whose: Whose::Client,
            payload: vec![data.clone()],
            crcs: crcs(&chunk(number), data),
        }
    }

    /// None when there is no room.
    fn reserve(&mut self, number: u8, len_bytes: u64) -> Result<Option<Ticket>, Ended> {
        match self.world.core.reserve(chunk(number), spec(len_bytes), Whose::Client) {
            Ok(ticket) => Ok(Some(ticket)),
            Err(StoreError::DiskFull) => Ok(None),
            Err(other) => Err(other.into()),
        }
    }

    /// `write` is a number that no other step's writes have.
    fn step(&mut self, action: Action, write: u64) -> Result<(), Ended> {
        let Scale { short, long, .. } = self.scene.scale;
        let mut group = Vec::new();
        self.under_way.clear();
        match action {
            Action::PutSmall(number) => {
                let data = payload(write, 700 * short);
                group.push(Run::put(number, &data));
                self.under_way.push((number, Some(data)));
            }
            Action::PutBig(number) => {
                let data = payload(write, 9000 * long);
                let Some(ticket) = self.reserve(number, 9000 * long)? else { return Ok(()) };
                // The second piece of a long chunk begins within a page.
                let middle = 4096 * long as usize + usize::from(long > 1);
                for (piece, at) in [(data.slice(..middle), 0), (data.slice(middle..), middle as u64)] {
                    self.world.core.write_piece(ticket, at, &[piece])?;
                }
                group.push(Op::Commit { ticket, crcs: crcs(&chunk(number), &data) });
                self.under_way.push((number, Some(data)));
            }
            Action::Together(one, two) => {
                let (first, second) = (payload(write, 500 * short), payload(write + 1, 600 * short));
                group.push(Run::put(one, &first));
                group.push(Run::put(two, &second));
                group.push(Op::Delete { ids: vec![chunk(one)] });
                self.under_way.extend([(one, Some(first)), (two, Some(second)), (one, None)]);
            }
            Action::Abort(number) => {
                let Some(ticket) = self.reserve(number, 5000 * short)? else { return Ok(()) };
                self.world.core.write_piece(ticket, 0, &[payload(write, 3000 * short)])?;
                // Something is committed behind it while it is open, so that the watermark cannot pass.
                let data = payload(write + 1, 300 * short);
                self.under_way.push((2, Some(data.clone())));
                let carried_out = self.carry_out(vec![Run::put(2, &data)]);
                self.world.core.abort(ticket);
                carried_out?;
            }
            Action::Interleaved(number) => {
                let Some(ticket) = self.reserve(number, 9000 * long)? else { return Ok(()) };
                let (data, other) = (payload(write + 1, 400 * short), payload(write + 2, 450 * short));
                self.under_way.extend([(number, Some(data.clone())), (2, Some(other.clone()))]);
                self.carry_out(vec![Run::put(number, &data), Run::put(2, &other)])?;
                self.under_way.push((2, None));
                self.carry_out(vec![Op::Delete { ids: vec![chunk(2)] }])?;
                self.world.core.flush()?;
                let data = payload(write, 9000 * long);
                self.world.core.write_piece(ticket, 0, std::slice::from_ref(&data))?;
                group.push(Op::Commit { ticket, crcs: crcs(&chunk(number), &data) });
                self.under_way.push((number, Some(data)));
            }
            Action::Delete(number) => {
                group.push(Op::Delete { ids: vec![chunk(number)] });
                self.under_way.push((number, None));
            }
            Action::Read(number) => {
                let read = self.world.shared.read_blocks(&chunk(number), 0, u32::MAX);
                let found = match read {
                    Ok(blocks) => Some(blocks.data.concat().into()),
                    Err(StoreError::NotFound) => None,
                    Err(other) => return Err(other.into()),
                };
                assert!(self.model[&number].contains(&found), "chunk {number} is read wrong in {:?}", self.actions);
            }
            Action::Flush => self.world.core.flush()?,
            Action::Reopen => {
                self.world.core.flush()?;
                self.world = self.scene.open().map_err(|_| Ended)?;
            }
            Action::Kill { keeps } => {
                if let Some(ticket) = self.reserve(0, 9000 * long)? {
                    self.world.core.write_piece(ticket, 0, &[payload(write, 5000 * long)])?;
                }
                self.start_again(keeps)?;
            }
            Action::FailSync(reached) => self.scene.device.fail_next_sync(reached),
        }
        self.carry_out(group)?;
        Ok(self.world.core.housekeep(Instant::now()).map(|_| ())?)
    }

    /// Commits a group and notes in the model what was acknowledged and what is open.
    fn carry_out(&mut self, group: Vec<Op>) -> Result<(), Ended> {
        let (model, under_way) = (&mut self.model, std::mem::take(&mut self.under_way));
        for (number, contents) in &under_way {
            model.get_mut(number).unwrap().insert(contents.clone());
        }
        let (mut alive, mut full) = (true, Vec::new());
        let mut acknowledged = vec![false; group.len()];
        self.world.core.commit(group, &mut |place, outcome| match outcome {
            Ok(Done::Stored | Done::Deleted(_)) => acknowledged[place] = true,
            Err(StoreError::Failed(_)) => alive = false,
            Err(StoreError::DiskFull) => full.push(place),
            Err(other) => panic!("unexpected {other}"),
        });
        for place in full {
            // Refused: it must never be seen.
            let (number, contents) = &under_way[place];
            model.get_mut(number).unwrap().remove(contents);
        }
        for (place, (number, contents)) in under_way.iter().enumerate() {
            if acknowledged.get(place).copied().unwrap_or(false) {
                // From now on this, or what comes later in the group and may have happened.
                let later = under_way
                    .iter()
                    .skip(place + 1)
                    .filter(|(other, _)| other == number)
                    .map(|(_, contents)| contents.clone());
                model.insert(*number, std::iter::once(contents.clone()).chain(later).collect());
            }
        }
        if alive {
            Ok(())
        } else {
            Err(Ended)
        }
    }

    /// A store that has failed answers nothing any more.
    fn check_refusals(&mut self) {
        let World { core, shared } = &mut self.world;
        let Err(reason) = shared.check_running() else { return };
        assert_eq!(shared.read_blocks(&chunk(0), 0, 1).err().as_ref(), Some(&reason));
        assert_eq!(core.reserve(chunk(0), spec(5000), Whose::Client).as_ref(), Err(&reason));
        assert_eq!(core.flush().as_ref(), Err(&reason));
        assert_eq!(core.housekeep(Instant::now()).as_ref(), Err(&reason));
        let late = vec![Run::put(0, &payload(1_000_000, 700)), Op::Delete { ids: vec![chunk(1)] }];
        core.commit(late, &mut |_, outcome| assert_eq!(outcome.as_ref(), Err(&reason)));
    }

    /// The process has ended and starts again; the page cache is the same. What it finds then is certain from now on.
    fn start_again(&mut self, keeps: bool) -> Result<(), Ended> {
        let Scene { device, engine, .. } = self.scene;
        if device.is_dead() {
            return Err(Ended);
        }
        engine.crash(if keeps { engine.unflushed() } else { 0 });
        // A sync of the first start may be the one that fails.
        let opened = self.scene.open().or_else(|_| self.scene.open());
        if device.is_dead() {
            return Err(Ended);
        }
        let tell = || format!("{:?}, started again on the page cache of before", self.actions);
        self.world = opened.unwrap_or_else(|error| panic!("{error}: {}", tell()));
        let found = contents(&self.world);
        check(&self.model, &found, &tell);
        for (number, allowed) in &mut self.model {
            *allowed = BTreeSet::from([found.get(&chunk(*number)).cloned()]);
        }
        Ok(())
    }
}
