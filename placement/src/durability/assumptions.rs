//! What the numbers rest on, as sentences for those who read them.

use super::input::Cluster;

/// The assumptions behind a [`super::report`] on that cluster, each a sentence. The first ones say what was put in.
pub fn assumptions(cluster: &Cluster) -> Vec<String> {
    let Cluster { scheme, layout, failures, repair, latent, metadata } = cluster;
    let percent = |part: f64| part * 100.0;
    let given = [
        format!(
            "Data lie as {scheme} on {} disks in {} servers, in {} groups with at most {} chunks of a group on one server.",
            layout.disks, layout.servers, layout.groups, layout.chunks_per_server
        ),
        format!("{:.2} % of the disks die within a year, each at any time and alone.", percent(failures.disk_afr)),
        format!(
            "A server is lost for good with all its disks {} times a year, and is away for {} hours {} times a year.",
            failures.server_losses_per_year, failures.server_return_hours, failures.server_outages_per_year
        ),
        format!(
            "Rebuilding begins {:.2} hours after a loss and takes {:.2} hours more for a disk, {:.2} for a server.",
            repair.grace_hours, repair.disk_hours, repair.server_hours
        ),
        format!(
            "On each disk {} chunks go bad unnoticed in a year, and a scrub finds them every {} hours.",
            latent.errors_per_disk_year, latent.scrub_hours
        ),
        format!(
            "Each of {} metadata shards has {} voters on different servers; a lost one is replaced in {:.2} hours.",
            metadata.shards, metadata.voters, metadata.repair_hours
        ),
    ];
    let always = [
        "All slots of a lost disk count as missing until the last of them is rebuilt.",
        "Groups that miss more chunks are rebuilt before others; each missing chunk of a group is rebuilt by itself, and \
         the grace time passes for each.",
        "Times to rebuild are spread around their mean as by chance (exponentially).",
        "Rebuilding goes on at its pace whatever clients do, and there is always room and a disk for what is rebuilt.",
        "A server that is away and comes back with its disks loses nothing; it counts for what cannot be read only.",
        "A latent error is a bad chunk in one extent; only a scrub finds it, half a scrub interval after it came on \
         average, and it is mended at once. That rebuilding and reads find some earlier is not counted.",
        "Disks that share a group do so by chance: which sets of more than M disks lie together in a group is estimated \
         from their number.",
        "What a metadata shard has acknowledged is lost for good only when all voters that hold it are lost; after the \
         loss of a majority the shard waits for an operator, who brings it back from one that is left.",
        "All voters of a shard hold what it has acknowledged: that some are behind for a moment is not counted.",
        "A given object is one extent of at most 64 MiB; an object of n extents is lost up to n times as often.",
        "Bad batches of disks, faults of software, mistakes of operators, fire, theft and the loss of a rack or a site \
         are not counted: they decide in practice once the hardware's own nines are many.",
    ];
    given.into_iter().chain(always.map(str::to_owned)).collect()
}
