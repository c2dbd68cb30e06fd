//! What a request that changes something may ask for: [`check`], by one table.
//!
//! A write or delete that carries something we do not know would do something else than it says when the rest of it
//! were carried out: an append that replaces, `DELETE /b/k?acl` that deletes the object, a presigned `x-amz-tagging`
//! that is dropped. So such requests are refused before anything happens. Reads ignore what they do not know: the
//! worst they do is to answer less than was asked.
//!
//! | what a write carries | what comes of it |
//! |---|---|
//! | a query name of its verb, of a presigned signature, or `x-id` | fine |
//! | another query name of S3, in any letter case | 405 for a sub-resource, 400 for a parameter |
//! | `x-amz-*` in the query: a header that was presigned | 501, but for values that ask for what is done anyway |
//! | any other query name | fine with a value, 501 without |
//! | an `x-amz-*` header of its verb, or one that says nothing about what to do | fine |
//! | any other `x-amz-*` header | 501 |
//! | a condition, or a part of a body, that the verb does not weigh | 501 |
//! | any other header | fine |

use super::error;
use http::HeaderMap;
use s3s::{s3_error, S3Result};

/// What a verb that changes something takes, beside what all of them take.
struct Takes {
    verb: &'static str,
    query: &'static [&'static str],
    /// Lower case; names that end in `-` are prefixes.
    headers: &'static [&'static str],
}

const fn takes(verb: &'static str, query: &'static [&'static str], headers: &'static [&'static str]) -> Takes {
    Takes { verb, query, headers }
}

#[rustfmt::skip] // one row a line
static WRITES: &[Takes] = &[
    takes("AbortMultipartUpload", &["uploadId"], &["x-amz-if-match-initiated-time"]),
    takes("CompleteMultipartUpload", &["uploadId"], &["x-amz-mp-object-size", "if-match", "if-none-match"]),
    takes("CopyObject", &[], &["x-amz-copy-source", "x-amz-copy-source-if-", "x-amz-meta-", "x-amz-metadata-directive",
        "x-amz-tagging", "x-amz-tagging-directive", "x-amz-storage-class", "x-amz-website-redirect-location",
        "x-amz-source-expected-bucket-owner", "if-match", "if-none-match"]),
    takes("CreateBucket", &[], &["x-amz-bucket-object-lock-enabled", "x-amz-object-ownership"]),
    takes("CreateMultipartUpload", &["uploads"], &["x-amz-meta-", "x-amz-tagging", "x-amz-storage-class",
        "x-amz-website-redirect-location"]),
    takes("DeleteBucket", &[], &[]),
    takes("DeleteObject", &["versionId"], &["x-amz-bypass-governance-retention", "x-amz-if-match-last-modified-time",
        "x-amz-if-match-size", "if-match"]),
    takes("DeleteObjects", &["delete"], &["x-amz-bypass-governance-retention"]),
    takes("PutBucketAcl", &["acl"], &[]),
    takes("PutObject", &[], &["x-amz-meta-", "x-amz-tagging", "x-amz-storage-class", "x-amz-website-redirect-location",
        "if-match", "if-none-match"]),
    takes("PutObjectAcl", &["acl", "versionId"], &[]),
    takes("UploadPart", &["partNumber", "uploadId"], &[]),
    takes("UploadPartCopy", &["partNumber", "uploadId"], &["x-amz-copy-source", "x-amz-copy-source-if-",
        "x-amz-copy-source-range", "x-amz-source-expected-bucket-owner"]),
];

/// `x-amz-*` headers of all writes: about the signature, the body's framing and checksums, who pays and who owns;
/// or traces of the way that a request came. What is refused of them by value is refused elsewhere: see `access`.
const HEADERS: [&str; 15] = [
    "x-amz-acl",
    "x-amz-cf-id",
    "x-amz-checksum-",
    "x-amz-content-sha256",
    "x-amz-date",
    "x-amz-decoded-content-length",
    "x-amz-expected-bucket-owner",
    "x-amz-id-2",
    "x-amz-request-id",
    "x-amz-request-payer",
    "x-amz-sdk-",
    "x-amz-security-token",
    "x-amz-trace-id",
    "x-amz-trailer",
    "x-amz-user-agent",
];

/// Headers without `x-amz-` that would change what a write does, were they heeded.
const CONDITIONS: [&str; 6] =
    ["if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "if-range", "content-range"];

/// Query names of a presigned request, in lower case.
const PRESIGNED: [&str; 8] = [
    "x-amz-algorithm",
    "x-amz-content-sha256",
    "x-amz-credential",
    "x-amz-date",
    "x-amz-expires",
    "x-amz-security-token",
    "x-amz-signature",
    "x-amz-signedheaders",
];

/// Sub-resources of S3.
#[rustfmt::skip] // a list of names
const SUB_RESOURCES: [&str; 48] = [
    "abac", "accelerate", "acl", "analytics", "annotation", "annotations", "attributes", "cors", "delete",
    "encryption", "events", "intelligent-tiering", "inventory", "legal-hold", "lifecycle", "location", "logging",
    "metadataAnnotationTable", "metadataConfiguration", "metadataInventoryTable", "metadataJournalTable",
    "metadataTable", "metrics", "notification", "object-lock", "ownershipControls", "policy", "policyStatus",
    "publicAccessBlock", "renameObject", "replication", "requestPayment", "restore", "retention", "select", "session",
    "tagging", "torrent", "uploads", "versioning", "versions", "website", "append", "compose", "copy", "force",
    "move", "rename",
];

/// Query parameters of S3 that have a value. What only shapes an answer is not among them, but for listings: a
/// `prefix` on a delete means something else than all that a delete can do.
#[rustfmt::skip] // a list of names
const PARAMETERS: [&str; 14] = [
    "continuation-token", "delimiter", "encoding-type", "key-marker", "list-type", "marker", "max-keys", "partNumber",
    "position", "prefix", "select-type", "start-after", "uploadId", "versionId",
];

fn has(list: &[&str], name: &str) -> bool {
    list.iter().any(|have| match have.strip_suffix('-') {
        Some(_) => name.starts_with(have),
        None => *have == name,
    })
}

fn has_in_any_case(list: &[&str], name: &str) -> bool {
    list.iter().any(|have| have.eq_ignore_ascii_case(name))
}

/// Whether a presigned `x-amz-*` query parameter asks for nothing but what is done without it.
fn is_harmless(name: &str, value: &str, account: &str) -> bool {
    match name {
        "x-amz-acl" => matches!(value, "private" | "bucket-owner-full-control"),
        "x-amz-storage-class" => value == "STANDARD",
        "x-amz-expected-bucket-owner" => value == account,
        // It names an algorithm; without a checksum beside it there is nothing to verify.
        "x-amz-sdk-checksum-algorithm" | "x-amz-user-agent" | "x-amz-request-payer" => true,
        _ => false,
    }
}

fn check_query(takes: &Takes, query: &str, account: &str) -> S3Result<()> {
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        if takes.query.contains(&name.as_ref()) || name == "x-id" {
            continue;
        }
        if has_in_any_case(&SUB_RESOURCES, &name) {
            return Err(s3_error!(MethodNotAllowed, "The specified method is not allowed against this resource."));
        }
        if has_in_any_case(&PARAMETERS, &name) {
            return Err(s3_error!(InvalidArgument, "{} does not take the query parameter '{name}'.", takes.verb));
        }
        let lower = name.to_ascii_lowercase();
        let refused = if lower.starts_with("x-amz-") {
            !PRESIGNED.contains(&lower.as_str()) && !is_harmless(&lower, &value, account)
        } else {
            value.is_empty() && !name.is_empty()
        };
        if refused {
            return Err(s3_error!(
                NotImplemented,
                "A query parameter you provided implies functionality that is not implemented: {}",
                shown(&name)
            ));
        }
    }
    Ok(())
}

fn check_headers(takes: &Takes, headers: &HeaderMap) -> S3Result<()> {
    for name in headers.keys() {
        let name = name.as_str();
        let matters = name.starts_with("x-amz-") || CONDITIONS.contains(&name);
        if matters && !has(takes.headers, name) && !has(&HEADERS, name) {
            return Err(s3_error!(
                NotImplemented,
                "A header you provided implies functionality that is not implemented: {}",
                shown(name)
            ));
        }
    }
    // The only ownership there is: all objects of a bucket are its owner's.
    if headers.get_all("x-amz-object-ownership").iter().any(|value| value != "BucketOwnerEnforced") {
        return Err(error::not_implemented("Another object ownership than BucketOwnerEnforced"));
    }
    Ok(())
}

/// A name from outside, for a message.
fn shown(name: &str) -> String {
    name.chars().filter(|c| c.is_ascii_graphic()).take(64).collect()
}

/// Checks a request of that verb; verbs that change nothing pass. `account` is who signed it, as S3 shows accounts.
///
/// # Errors
/// MethodNotAllowed, InvalidArgument, NotImplemented: see the table at the head of this module.
pub(super) fn check(verb: &str, query: &str, headers: &HeaderMap, account: &str) -> S3Result<()> {
    let Some(takes) = WRITES.iter().find(|takes| takes.verb == verb) else { return Ok(()) };
    check_query(takes, query, account)?;
    check_headers(takes, headers)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::super::verbs::implemented;
    use super::*;
    use http::{HeaderName, HeaderValue};

    /// What becomes of a request: `fine`, or the error's code. Headers are given as `name` or `name=value`.
    fn outcome(verb: &str, query: &str, headers: &[&str]) -> String {
        let mut map = HeaderMap::new();
        for header in headers {
            let (name, value) = header.split_once('=').unwrap_or((header, "v"));
            map.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        match check(verb, query, &map, "000000000001") {
            Ok(()) => "fine".to_owned(),
            Err(error) => error.code().as_str().to_owned(),
        }
    }

    #[test]
    fn every_verb_that_changes_something_has_its_row() {
        let reads = |verb: &str| ["Get", "Head", "List"].iter().any(|begin| verb.starts_with(begin));
        let mut writes: Vec<&str> = implemented().filter(|verb| !reads(verb)).collect();
        writes.sort_unstable();
        let rows: Vec<&str> = WRITES.iter().map(|takes| takes.verb).collect();
        assert_eq!(rows, writes);
    }

    #[test]
    fn queries_of_writes_are_understood_or_refused() {
        for (verb, query, expected) in [
            ("PutObject", "", "fine"),
            ("PutObject", "x-id=PutObject", "fine"),
            ("PutObject", "trace=abc", "fine"),
            ("PutObject", "trace", "NotImplemented"),
            ("PutObject", "trace=", "NotImplemented"),
            ("PutObject", "append", "MethodNotAllowed"),
            ("PutObject", "append&position=5", "MethodNotAllowed"),
            ("PutObject", "uploads", "MethodNotAllowed"),
            ("PutObject", "Tagging", "MethodNotAllowed"),
            ("PutObject", "versionId=null", "InvalidArgument"),
            ("PutObject", "uploadId=5", "InvalidArgument"),
            ("PutObject", "partNumber=1", "InvalidArgument"),
            ("PutObject", "partnumber=1&uploadid=5", "InvalidArgument"),
            ("UploadPart", "partNumber=1&uploadId=5&x-id=UploadPart", "fine"),
            ("UploadPart", "partNumber=1&uploadId=5&acl", "MethodNotAllowed"),
            ("DeleteObject", "acl", "MethodNotAllowed"),
            ("DeleteObject", "acl=", "MethodNotAllowed"),
            ("DeleteObject", "retention", "MethodNotAllowed"),
            ("DeleteObject", "versionId=null&x-id=DeleteObject", "fine"),
            ("DeleteObject", "versionid=null", "InvalidArgument"),
            ("DeleteObject", "uploadid=5", "InvalidArgument"),
            ("DeleteObject", "prefix=a", "InvalidArgument"),
            ("AbortMultipartUpload", "uploadId=5&versionId=null", "InvalidArgument"),
            ("DeleteBucket", "versioning", "MethodNotAllowed"),
            ("DeleteBucket", "force=true", "MethodNotAllowed"),
            ("DeleteObjects", "delete", "fine"),
            ("CreateBucket", "object-Lock", "MethodNotAllowed"),
            ("CompleteMultipartUpload", "uploadId=5&uploads", "MethodNotAllowed"),
            ("PutObject", "X-Amz-Algorithm=a&X-Amz-Credential=b&X-Amz-Date=c&X-Amz-Expires=1&X-Amz-SignedHeaders=host&X-Amz-Signature=d", "fine"),
            ("PutObject", "x-amz-acl=private&x-amz-storage-class=STANDARD&x-amz-expected-bucket-owner=000000000001", "fine"),
            ("PutObject", "x-amz-sdk-checksum-algorithm=CRC32", "fine"),
            ("PutObject", "x-amz-acl=public-read", "NotImplemented"),
            ("PutObject", "x-amz-storage-class=GLACIER", "NotImplemented"),
            ("PutObject", "x-amz-expected-bucket-owner=000000000002", "NotImplemented"),
            ("PutObject", "X-Amz-Meta-Color=red", "NotImplemented"),
            ("PutObject", "x-amz-tagging=a%3Db", "NotImplemented"),
            ("PutObject", "x-amz-server-side-encryption=AES256", "NotImplemented"),
            ("PutObject", "x-amz-object-lock-mode=COMPLIANCE", "NotImplemented"),
            ("PutObject", "x-amz-checksum-crc32=AAAAAA%3D%3D", "NotImplemented"),
            // Reads ignore what they do not know; so do verbs that answer 501 by themselves.
            ("GetObject", "acl2&trace&x-amz-meta-color=red&uploadid=5", "fine"),
            ("ListObjectsV2", "list-type=2&metadata=true&force", "fine"),
            ("PutBucketVersioning", "versioning", "fine"),
        ] {
            assert_eq!(outcome(verb, query, &[]), expected, "{verb} ?{query}");
        }
    }

    #[test]
    fn headers_of_writes_are_understood_or_refused() {
        // What real clients send with an upload: AWS SDKs, minio-go, s3cmd, pgBackRest, image registries.
        let sent = [
            "host",
            "authorization",
            "content-length",
            "content-type",
            "content-md5",
            "content-encoding",
            "expect",
            "accept-encoding",
            "user-agent",
            "transfer-encoding",
            "amz-sdk-invocation-id",
            "amz-sdk-request",
            "x-amzn-trace-id",
            "x-amz-date",
            "x-amz-content-sha256",
            "x-amz-decoded-content-length",
            "x-amz-trailer",
            "x-amz-checksum-crc32",
            "x-amz-checksum-algorithm",
            "x-amz-sdk-checksum-algorithm",
            "x-amz-acl",
            "x-amz-expected-bucket-owner",
            "x-amz-request-payer",
            "x-amz-user-agent",
            "x-forwarded-for",
            "traceparent",
            "x-minio-source-mtime",
            "x-goog-meta-a",
            "cache-control",
        ];
        for takes in WRITES {
            assert_eq!(outcome(takes.verb, "", &sent), "fine", "{}", takes.verb);
        }
        for (verb, header, expected) in [
            ("PutObject", "x-amz-meta-mtime", "fine"),
            ("PutObject", "x-amz-storage-class", "fine"),
            ("PutObject", "x-amz-tagging", "fine"),
            ("PutObject", "if-none-match", "fine"),
            ("PutObject", "x-amz-write-offset-bytes", "NotImplemented"),
            ("PutObject", "x-amz-copy-source-range", "NotImplemented"),
            ("PutObject", "x-amz-metadata-directive", "NotImplemented"),
            ("PutObject", "x-amz-new-in-2031", "NotImplemented"),
            ("PutObject", "content-range", "NotImplemented"),
            ("PutObject", "if-unmodified-since", "NotImplemented"),
            ("CopyObject", "x-amz-copy-source", "fine"),
            ("CopyObject", "x-amz-copy-source-if-match", "fine"),
            ("CopyObject", "x-amz-object-annotation-directive", "NotImplemented"),
            ("UploadPartCopy", "x-amz-copy-source-range", "fine"),
            ("UploadPart", "x-amz-meta-a", "NotImplemented"),
            ("UploadPart", "if-match", "NotImplemented"),
            ("DeleteObject", "if-match", "fine"),
            ("DeleteObject", "x-amz-bypass-governance-retention", "fine"),
            ("DeleteObject", "if-none-match", "NotImplemented"),
            ("DeleteObject", "if-unmodified-since", "NotImplemented"),
            ("DeleteObject", "x-amz-copy-source", "NotImplemented"),
            ("DeleteObject", "x-amz-mfa", "NotImplemented"),
            ("DeleteObjects", "if-match", "NotImplemented"),
            ("CreateBucket", "x-amz-bucket-object-lock-enabled", "fine"),
            ("CreateBucket", "x-amz-bucket-namespace", "NotImplemented"),
            ("CreateBucket", "x-amz-object-ownership=BucketOwnerEnforced", "fine"),
            ("CreateBucket", "x-amz-object-ownership=ObjectWriter", "NotImplemented"),
            ("GetObject", "x-amz-write-offset-bytes", "fine"),
            ("GetObject", "if-modified-since", "fine"),
        ] {
            assert_eq!(outcome(verb, "", &[header]), expected, "{verb} {header}");
        }
    }
}
