//! Which bucket a Host header names.

use s3s::host::{S3Host, SingleDomain, VirtualHost};
use s3s::S3Result;

/// Buckets as names under one domain, written as names of hosts may be: in any letter case, and with the dot of the
/// root at the end. A host that is not under the domain names no bucket: the path does.
pub(super) struct AnyCase(SingleDomain);

impl AnyCase {
    /// For that domain; None when it is not one.
    pub(super) fn new(domain: &str) -> Option<AnyCase> {
        let domain = SingleDomain::new(&plain(domain)).ok()?;
        Some(AnyCase(domain.with_cname_fallback(false)))
    }
}

/// A host in lower case, without the dot of the root; its port stays.
fn plain(host: &str) -> String {
    let host = host.to_ascii_lowercase();
    let (name, port) = match host.split_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (host.as_str(), None),
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    port.map_or_else(|| name.to_owned(), |port| format!("{name}:{port}"))
}

impl S3Host for AnyCase {
    fn parse_host_header<'a>(&'a self, host: &'a str) -> S3Result<VirtualHost<'a>> {
        let host = plain(host);
        let found = self.0.parse_host_header(&host)?;
        let named = VirtualHost::new(found.domain().to_owned());
        Ok(match found.bucket() {
            Some(bucket) => named.with_bucket(bucket.to_owned()),
            None => named,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_host_names_the_same_bucket_however_it_is_written() {
        for domain in ["s3.test", "S3.Test", "s3.test."] {
            let hosts = AnyCase::new(domain).unwrap();
            for (host, bucket) in [
                ("bucket.s3.test", Some("bucket")),
                ("BUCKET.S3.TEST", Some("bucket")),
                ("bucket.s3.Test:9000", Some("bucket")),
                ("bucket.s3.test.", Some("bucket")),
                ("Bucket.s3.test.:443", Some("bucket")),
                ("a.b.s3.test", Some("a.b")),
                ("s3.TEST", None),
                ("other.example", None),
                ("127.0.0.1:9000", None),
            ] {
                assert_eq!(hosts.parse_host_header(host).unwrap().bucket(), bucket, "{domain} {host}");
            }
        }
        assert!(AnyCase::new("s3 test").is_none() && AnyCase::new("").is_none());
    }
}
