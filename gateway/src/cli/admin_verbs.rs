//! The verbs that talk to the admin API.

use super::http::call;
use crate::admin::page::bytes;
use crate::dev::layout::read_json;
use crate::settings::{read_token, SettingsError};
use clap::Args;
use http::Method;
use serde_json::Value;
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

const QUICK: Duration = Duration::from_secs(120);
const CENSUS: Duration = Duration::from_secs(24 * 3600);
/// Exit code of a census that found something wrong.
const NOT_WHOLE: u8 = 3;

/// Which cluster.
#[derive(Debug, Clone, Args)]
pub struct Target {
    /// Directory of a `granary dev` cluster.
    #[arg(long, conflicts_with_all = ["admin", "token_file"])]
    dir: Option<PathBuf>,
    /// HOST:PORT of a gateway's admin API.
    #[arg(long, requires = "token_file", value_parser = without_scheme)]
    admin: Option<String>,
    /// File of its admin token.
    #[arg(long, requires = "admin")]
    token_file: Option<PathBuf>,
}

fn without_scheme(text: &str) -> Result<String, String> {
    let address = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
    if address.contains('/') || !address.contains(':') {
        return Err("must be HOST:PORT".to_owned());
    }
    Ok(address.to_owned())
}

impl Target {
    async fn ask(&self, method: Method, path: &str, body: Vec<u8>, limit: Duration) -> Result<Value, Box<dyn Error>> {
        let (address, token_file) = match (&self.dir, &self.admin, &self.token_file) {
            (Some(dir), _, _) => {
                let path = dir.join("cluster.json");
                if !path.exists() {
                    let why = "no cluster.json there: has `granary dev` been started on it?";
                    return Err(SettingsError::invalid(format!("--dir {}", dir.display()), why).into());
                }
                let cluster: Value = read_json(&path)?;
                let text =
                    |name: &str| cluster.get(name).and_then(Value::as_str).map(str::to_owned).unwrap_or_default();
                (text("admin"), PathBuf::from(text("admin_token_file")))
            }
            (None, Some(address), Some(file)) => (address.clone(), file.clone()),
            _ => return Err(SettingsError::invalid("--dir, --admin", "name one: the directory, or the address").into()),
        };
        let token = read_token(&token_file)?;
        Ok(call(&address, token.reveal(), method, path, body, limit).await?)
    }
}

/// `granary status`.
///
/// # Errors
/// No answer.
pub async fn status(target: &Target, json: bool) -> Result<ExitCode, Box<dyn Error>> {
    let status = target.ask(Method::GET, "/v1/status", Vec::new(), QUICK).await?;
    if json {
        println!("{status:#}");
        return Ok(ExitCode::SUCCESS);
    }
    let text = |name: &str| status.get(name).map(plain).unwrap_or_default();
    println!("cluster {}  epoch {}  scheme {}", text("cluster_id"), text("epoch"), text("default_scheme"));
    print_disks(&status);
    for disk in rows(&status, "disks") {
        let text = |name: &str| disk.get(name).map(plain).unwrap_or_default();
        if text("health") != "up" {
            println!("disk {} is {}: {}", text("disk"), text("health"), text("last_error"));
        }
    }
    let shards = rows(&status, "shards");
    let led = shards.iter().filter(|shard| shard.get("leader").is_some_and(|leader| !leader.is_null())).count();
    println!("shards with a leader: {led} of {}", shards.len());
    let queue = status.get("repair_queue");
    let count = queue.and_then(|queue| queue.get("count")).map(plain).unwrap_or_default();
    let more = queue.and_then(|queue| queue.get("more")).and_then(Value::as_bool).unwrap_or_default();
    println!("chunks waiting for repair: {count}{}", if more { " or more" } else { "" });
    Ok(ExitCode::SUCCESS)
}

/// `granary disk list`.
///
/// # Errors
/// No answer.
pub async fn disk_list(target: &Target, json: bool) -> Result<ExitCode, Box<dyn Error>> {
    let status = target.ask(Method::GET, "/v1/status", Vec::new(), QUICK).await?;
    if json {
        println!("{:#}", status.get("disks").unwrap_or(&Value::Null));
    } else {
        print_disks(&status);
    }
    Ok(ExitCode::SUCCESS)
}

fn print_disks(status: &Value) {
    println!(
        "{:>5}  {:8} {:9} {:22} {:>10} {:>10} {:>10}  roles",
        "disk", "health", "state", "address", "chunks", "stored", "free"
    );
    for disk in rows(status, "disks") {
        let text = |name: &str| disk.get(name).map(plain).unwrap_or_default();
        let size = |name: &str| disk.get(name).and_then(Value::as_u64).map_or_else(|| "-".to_owned(), bytes);
        println!(
            "{:>5}  {:8} {:9} {:22} {:>10} {:>10} {:>10}  {}",
            text("disk"),
            text("health"),
            text("state"),
            text("address"),
            text("chunks"),
            size("chunk_bytes"),
            size("free_bytes"),
            rows(disk, "roles").iter().map(plain).collect::<Vec<_>>().join(",")
        );
    }
}

/// `granary census`.
///
/// # Errors
/// No answer, or the census could not be made.
pub async fn census(target: &Target, json: bool) -> Result<ExitCode, Box<dyn Error>> {
    let census = target.ask(Method::POST, "/v1/census", Vec::new(), CENSUS).await?;
    if json {
        println!("{census:#}");
    } else if let Some(fields) = census.as_object() {
        for (name, value) in fields.iter().filter(|(_, value)| !value.is_array() && !value.is_object()) {
            println!("{:>14}  {}", plain(value), name.replace('_', " "));
        }
    }
    let bad = ["missing", "corrupt", "unreachable", "extents_lost"];
    let whole = bad.iter().all(|name| census.get(name).and_then(Value::as_u64).unwrap_or_default() == 0);
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::from(NOT_WHOLE) })
}

/// `granary map`.
///
/// # Errors
/// No answer.
pub async fn map(target: &Target) -> Result<ExitCode, Box<dyn Error>> {
    println!("{:#}", target.ask(Method::GET, "/v1/map", Vec::new(), QUICK).await?);
    Ok(ExitCode::SUCCESS)
}

/// `granary disk replace`.
///
/// # Errors
/// Not confirmed, no answer, or refused.
pub async fn disk_replace(
    target: &Target,
    id: u32,
    uuid: Option<String>,
    address: Option<String>,
    yes: bool,
) -> Result<ExitCode, Box<dyn Error>> {
    if !yes {
        let map = target.ask(Method::GET, "/v1/map", Vec::new(), QUICK).await?;
        let Some(disk) = map.get("disks").and_then(|disks| disks.get(id.to_string())) else {
            return Err(SettingsError::invalid("ID", format!("there is no disk {id} in the cluster map")).into());
        };
        println!(
            "Disk {id} would leave the cluster for good, and a new disk would take its place. What it holds is rebuilt from the\n\
             other disks; until that is done the cluster stands one more failure less."
        );
        if target.dir.is_some() {
            println!("Repeat with --yes to do it.");
        } else {
            let text = |value: Option<&Value>| value.map(plain).unwrap_or_default();
            let address = address.unwrap_or_else(|| text(disk.get("address")));
            println!(
                "First, where the new disk is:\n  \
                 granary-disk-node format --dir DIR --cluster {} --disk {}\n  \
                 granary-disk-node serve --dir DIR --listen {address} --secret-file FILE\n\
                 Then repeat this command with --uuid and the UUID that `format` printed, and --yes.",
                text(map.get("cluster_id")),
                text(map.get("next_disk_id")),
            );
        }
        return Ok(ExitCode::FAILURE);
    }
    let body = uuid.map(|uuid| serde_json::json!({ "uuid": uuid, "address": address }).to_string().into_bytes());
    target.ask(Method::POST, &format!("/v1/disks/{id}/replace"), body.unwrap_or_default(), QUICK).await?;
    println!("disk {id} is replaced; `granary status` shows the repair, `granary census` proves it");
    Ok(ExitCode::SUCCESS)
}

/// `granary disk start` and `stop`.
///
/// # Errors
/// No answer, or refused.
pub async fn disk_order(target: &Target, id: u32, verb: &str) -> Result<ExitCode, Box<dyn Error>> {
    target.ask(Method::POST, &format!("/v1/disks/{id}/{verb}"), Vec::new(), QUICK).await?;
    println!("disk {id}: {verb} done");
    Ok(ExitCode::SUCCESS)
}

fn rows<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value.get(name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}
