//! Starts disk-node processes that cannot outlive us, and keeps their logs bounded.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, PipeReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc;
use tokio::process::Child;
use tokio::sync::oneshot;

/// A log grows to this many bytes, then becomes `.old` and a new one begins.
const LOG_BYTES: u64 = 64 * 1024 * 1024;

/// What to start.
#[derive(Debug)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Where its output goes, appended.
    pub log: PathBuf,
}

/// Starts processes from one thread. The kernel ends a child that asked for it when the *thread* that started it ends;
/// worker threads of a runtime come and go, this one stays until the process ends.
#[derive(Debug, Clone)]
pub struct Spawner {
    requests: mpsc::SyncSender<(Program, oneshot::Sender<io::Result<Child>>)>,
}

impl Spawner {
    /// Begins the thread; must be called inside a tokio runtime.
    ///
    /// # Errors
    /// No thread can be made.
    pub fn new() -> io::Result<Spawner> {
        let (requests, waiting) = mpsc::sync_channel::<(Program, oneshot::Sender<io::Result<Child>>)>(16);
        let runtime = tokio::runtime::Handle::current();
        std::thread::Builder::new().name("spawner".into()).spawn(move || {
            let _inside = runtime.enter();
            for (program, reply) in waiting {
                // A caller that went away drops the child, which kills it.
                let _ = reply.send(spawn(program));
            }
            // All senders are gone: the process is ending. To end this thread now would kill children that are stopping
            // in peace.
            loop {
                std::thread::park();
            }
        })?;
        Ok(Spawner { requests })
    }

    /// Starts a process. It is killed when the [`Child`] is dropped and when this process dies, however it dies.
    ///
    /// # Errors
    /// It cannot be started.
    pub async fn start(&self, program: Program) -> io::Result<Child> {
        let gone = || io::Error::other("the spawner thread is gone");
        let (reply, answer) = oneshot::channel();
        self.requests
            .try_send((program, reply))
            .map_err(|_| io::Error::other("too many processes are being started"))?;
        answer.await.map_err(|_| gone())?
    }
}

fn spawn(program: Program) -> io::Result<Child> {
    let (output, writer) = io::pipe()?;
    let log = RotatingLog::open(&program.log, LOG_BYTES)?;
    let mut command = std::process::Command::new(&program.path);
    command.args(&program.args).stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    // The root account's keys are the gateway's business.
    command.env_remove(crate::settings::ROOT_ACCESS_KEY_VAR).env_remove(crate::settings::ROOT_SECRET_KEY_VAR);
    // A group of its own: Ctrl-C at the terminal goes to us, and we stop the disks after the gateway has drained.
    command.process_group(0);
    // Settings were read by us; what is meant for disk nodes stands among the arguments.
    for variable in granary_placement::settings::TABLE.iter().map(|setting| setting.variable()) {
        command.env_remove(variable);
    }
    command.env_remove(crate::settings::given::CONFIG_VAR);
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are two plain system calls without
    // allocation.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            // If we died before the call above, nobody will tell the child.
            if rustix::process::getppid() == Some(parent) {
                Ok(())
            } else {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        });
    }
    let mut command = tokio::process::Command::from(command);
    let child = command.kill_on_drop(true).spawn()?;
    // Ours are the last copies of the pipe's writing end beside the child's: without them the log thread ends with the
    // child.
    drop(command);
    std::thread::Builder::new().name("disk-log".into()).spawn(move || copy_log(output, log))?;
    Ok(child)
}

/// Copies until the writing end closes. A log that cannot be written must not stop the process that writes it: what
/// fails is dropped.
fn copy_log(mut output: PipeReader, mut log: RotatingLog) {
    let mut buffer = [0u8; 16 * 1024];
    loop {
        match output.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => log.write(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// A log file of bounded length with one predecessor.
struct RotatingLog {
    path: PathBuf,
    file: Option<File>,
    len_bytes: u64,
    limit_bytes: u64,
}

impl RotatingLog {
    fn open(path: &Path, limit_bytes: u64) -> io::Result<RotatingLog> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let len_bytes = file.metadata()?.len();
        Ok(RotatingLog { path: path.to_owned(), file: Some(file), len_bytes, limit_bytes })
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.len_bytes >= self.limit_bytes || self.file.is_none() {
            let mut old = self.path.clone().into_os_string();
            old.push(".old");
            if self.len_bytes >= self.limit_bytes {
                let _ = std::fs::rename(&self.path, old);
            }
            self.file = OpenOptions::new().create(true).append(true).open(&self.path).ok();
            self.len_bytes =
                self.file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |metadata| metadata.len());
        }
        if let Some(file) = &mut self.file {
            if file.write_all(bytes).is_err() {
                self.file = None;
            }
            self.len_bytes += bytes.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn output_goes_to_the_log_and_keys_stay_out_of_the_environment() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("disk-1.log");
        let spawner = Spawner::new().unwrap();
        let args = ["-c", "echo out; echo err >&2; env | grep -c GRANARY_ROOT; echo end"].map(OsString::from).to_vec();
        let mut child = spawner.start(Program { path: "/bin/sh".into(), args, log: log.clone() }).await.unwrap();
        assert!(child.wait().await.unwrap().success());
        for _ in 0..200 {
            if std::fs::read_to_string(&log).unwrap().ends_with("end\n") {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "out\nerr\n0\nend\n");
        let missing = Program { path: "/no/such/program".into(), args: vec![], log };
        assert_eq!(spawner.start(missing).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_log_keeps_at_most_itself_and_one_predecessor() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = RotatingLog::open(&path, 1000).unwrap();
        for _ in 0..100 {
            log.write(&[b'x'; 100]);
        }
        let sizes: Vec<u64> = std::fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .collect();
        assert_eq!(sizes.len(), 2);
        assert!(sizes.iter().all(|size| *size <= 1100), "{sizes:?}");
    }
}
