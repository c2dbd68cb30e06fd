//! openraft's own conformance suite over our log and state machine.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use granary_placement::id::ShardId;
use granary_replica::fatal::Fatal;
use granary_replica::log::ShardLog;
use granary_replica::raft::machine::Machine;
use granary_replica::raft::TypeConfig;
use granary_replica::store::{LogDb, StateDb};
use granary_replica::writer::LogWriter;
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::StorageError;
use std::sync::Arc;

struct Builder;

impl StoreBuilder<TypeConfig, ShardLog, Machine, tempfile::TempDir> for Builder {
    async fn build(&self) -> Result<(tempfile::TempDir, ShardLog, Machine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let fatal = Fatal::new(Arc::new(|why| panic!("{why}")));
        let db = Arc::new(LogDb::open(&dir.path().join("log")).unwrap());
        let state = Arc::new(StateDb::open(&dir.path().join("state"), fatal.clone()).unwrap());
        let (writer, _) = LogWriter::start(db.clone(), fatal).unwrap();
        let machine = Machine::open(
            ShardId(1),
            state.clone(),
            dir.path().to_owned(),
            granary_replica::Space::without_reserve(),
            None,
            Arc::default(),
        )
        .unwrap();
        let log = ShardLog::open(ShardId(1), db, writer, state).unwrap();
        Ok((dir, log, machine))
    }
}

#[test]
fn log_and_state_machine_pass_the_conformance_suite() {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(async {
        Suite::test_all(Builder).await.unwrap();
    });
}
