//! What the real disk node answers, by the table in [`rows`].

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod rows;
#[path = "../scenery/mod.rs"]
mod scenery;

use granary_wire::chunk::ChunkId;
use granary_wire::NodeClient;
use scenery::{Disk, Running};
use std::os::unix::fs::FileExt;

/// The real node, for the table of answers.
struct Asked {
    disk: Disk,
    running: Running,
}

impl rows::Node for Asked {
    fn client(&self) -> NodeClient {
        self.running.client()
    }

    fn damage(&mut self, _: ChunkId, _: u32, bytes: &[u8]) {
        let mut found = 0;
        for entry in std::fs::read_dir(self.disk.dir().join("segments")).unwrap() {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(entry.unwrap().path()).unwrap();
            let mut begin = vec![0; 16 << 20];
            let len = file.read_at(&mut begin, 0).unwrap();
            for at in
                begin[..len].windows(64).enumerate().filter(|(_, window)| *window == &bytes[..64]).map(|(at, _)| at)
            {
                file.write_all_at(&[!bytes[0]], at as u64).unwrap();
                found += 1;
            }
        }
        assert_eq!(found, 1);
    }

    async fn kill(&mut self) {
        self.running.signal("KILL");
        self.running.wait();
        self.running = self.disk.serve();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_real_node_answers_as_the_table_says() {
    let disk = Disk::new();
    let running = disk.serve();
    rows::ask_all(&mut Asked { disk, running }).await;
}
