//! `DIR/cluster.json`: what runs where, for operators, tests and the admin verbs; and what is printed at the start.

use super::layout::{write_json, Layout};
use super::supervisor::SlotHandle;
use crate::settings::RootCredentials;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What does not change while a cluster runs.
#[derive(Debug, Clone)]
pub struct Places {
    /// Files and directories.
    pub layout: Layout,
    /// Where S3 is spoken.
    pub s3: SocketAddr,
    /// Where the admin API is.
    pub admin: SocketAddr,
    /// Region that clients sign for.
    pub region: String,
    /// Where the root credentials lie; None: they came from the environment.
    pub credentials_file: Option<PathBuf>,
}

/// `cluster.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClusterJson {
    /// Of this form.
    pub version: u32,
    /// Which cluster.
    pub cluster_id: String,
    /// `granary dev` runs.
    pub running: bool,
    /// `host:port` of S3.
    pub s3: String,
    /// `host:port` of the admin API.
    pub admin: String,
    /// The status page.
    pub admin_url: String,
    /// What opens the admin API.
    pub admin_token_file: PathBuf,
    /// Keys of the root account; None: they came from the environment.
    pub root_credentials_file: Option<PathBuf>,
    /// The cluster secret.
    pub secret_file: PathBuf,
    /// The newest cluster map.
    pub map_file: PathBuf,
    /// Addresses in use.
    pub addresses_file: PathBuf,
    /// `granary` itself, and a process per disk.
    pub processes: Vec<ProcessJson>,
}

/// A process of `cluster.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProcessJson {
    /// granary or disk-node.
    pub role: Cow<'static, str>,
    /// The disk it serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<u32>,
    /// UUID on its label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Null while it does not run.
    pub pid: Option<u32>,
    /// Where it listens.
    pub address: String,
    /// Its directory.
    pub dir: PathBuf,
    /// Its log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<PathBuf>,
    /// running, stopped, ...
    pub state: Cow<'static, str>,
    /// How often it was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub starts: Option<u64>,
    /// Why it does not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

impl Places {
    fn cluster_json(&self, cluster_id: &str, slots: &[Arc<SlotHandle>], running: bool) -> ClusterJson {
        let file = |name: &str| self.layout.file(name);
        let mut processes = vec![ProcessJson {
            role: "granary".into(),
            disk: None,
            uuid: None,
            pid: running.then(std::process::id),
            address: self.s3.to_string(),
            dir: self.layout.dir.clone(),
            log: None,
            state: if running { "running".into() } else { "stopped".into() },
            starts: None,
            detail: None,
        }];
        processes.extend(slots.iter().map(|slot| {
            let state = slot.state();
            ProcessJson {
                role: "disk-node".into(),
                disk: state.disk.map(|disk| disk.0),
                uuid: state.uuid.map(|uuid| uuid.to_string()),
                pid: state.pid.filter(|_| running),
                address: state.address,
                dir: slot.dir.clone(),
                log: Some(slot.log.clone()),
                state: if running { state.phase.name().into() } else { "stopped".into() },
                starts: Some(state.starts),
                detail: state.detail,
            }
        }));
        ClusterJson {
            version: 1,
            cluster_id: cluster_id.to_owned(),
            running,
            s3: self.s3.to_string(),
            admin: self.admin.to_string(),
            admin_url: format!("http://{}", self.admin),
            admin_token_file: file("admin-token"),
            root_credentials_file: self.credentials_file.clone(),
            secret_file: file("cluster-secret"),
            map_file: file("map.json"),
            addresses_file: file("addresses.json"),
            processes,
        }
    }

    /// Keeps `cluster.json` true until `stop`, then says that nothing runs.
    pub async fn keep_cluster_json(self, cluster_id: String, slots: Vec<Arc<SlotHandle>>, stop: CancellationToken) {
        let path = self.layout.file("cluster.json");
        let write = |running| {
            if let Err(error) = write_json(&path, &self.cluster_json(&cluster_id, &slots, running)) {
                tracing::warn!(%error, "cluster.json is not up to date");
            }
        };
        let mut watches: Vec<watch::Receiver<_>> = slots.iter().map(|slot| slot.watch()).collect();
        loop {
            for watch in &mut watches {
                watch.mark_unchanged();
            }
            write(true);
            let changes = watches.iter_mut().map(|watch| Box::pin(watch.changed()));
            tokio::select! {
                (changed, ..) = futures::future::select_all(changes) => if changed.is_err() {
                    // A directory's task ended: the cluster is stopping.
                    stop.cancelled().await;
                    break;
                },
                () = stop.cancelled() => break,
            }
        }
        write(false);
    }

    /// What an operator needs at the start, ready to paste.
    pub fn banner(&self, root: &RootCredentials, fresh: bool) -> String {
        let endpoint = format!("http://{}", self.s3);
        let mut text = format!(
            "\nGranary is ready.\n  S3        {endpoint}\n  console   http://{}\n  data      {}\n  logs      {}\n",
            self.admin,
            self.layout.dir.display(),
            self.layout.logs().display()
        );
        let secret = match (&self.credentials_file, fresh) {
            (Some(path), true) => {
                text += &format!("  root keys made just now, kept in {}\n", path.display());
                root.secret_key.reveal().to_owned()
            }
            (Some(path), false) => {
                text += &format!("  root keys in {}\n", path.display());
                format!(
                    "$(sed -E 's/.*\"secret_key\":\"([^\"]*)\".*/\\1/' {})",
                    shell_quote(&path.display().to_string())
                )
            }
            (None, _) => {
                text += "  root keys from the environment\n";
                "\"$GRANARY_ROOT_SECRET_KEY\"".to_owned()
            }
        };
        text += &format!(
            "\nPaste into another terminal:\n  export AWS_ACCESS_KEY_ID={} AWS_SECRET_ACCESS_KEY={secret}\n  \
             export AWS_ENDPOINT_URL={endpoint} AWS_DEFAULT_REGION={}\n\nThen back something up:\n  \
             export RESTIC_PASSWORD=choose-one; restic -r s3:{endpoint}/backup init && restic -r s3:{endpoint}/backup backup ~/Documents\n  \
             aws s3 mb s3://photos && aws s3 sync ~/Pictures s3://photos/\n",
            root.access_key, self.region
        );
        text
    }
}

fn shell_quote(text: &str) -> String {
    if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte)) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}
