//! Checksums that clients send and get back: Content-MD5, x-amz-checksum-*, and the trailer that brings one at the end
//! of a body.

use super::error;
use crate::digest::{self, Digester, Digests, MD5_BYTES};
use base64::engine::general_purpose::STANDARD as BASE64;
use base64::Engine;
use granary_meta::record::{Checksum, ChecksumAlgorithm, ChecksumKind};
use http::HeaderMap;
use s3s::{s3_error, S3Error, S3Result, TrailingHeaders};

const PREFIX: &str = "x-amz-checksum-";

/// All algorithms, with the end of their header's name and the name in XML.
const ALGORITHMS: [(ChecksumAlgorithm, &str, &str); 5] = [
    (ChecksumAlgorithm::Crc32, "crc32", "CRC32"),
    (ChecksumAlgorithm::Crc32c, "crc32c", "CRC32C"),
    (ChecksumAlgorithm::Crc64Nvme, "crc64nvme", "CRC64NVME"),
    (ChecksumAlgorithm::Sha1, "sha1", "SHA1"),
    (ChecksumAlgorithm::Sha256, "sha256", "SHA256"),
];

/// The algorithm's name in headers and XML: `CRC32C`.
pub(super) fn name(algorithm: ChecksumAlgorithm) -> &'static str {
    ALGORITHMS.iter().find(|(have, ..)| *have == algorithm).map_or("", |(_, _, name)| name)
}

/// The algorithm a client names.
///
/// # Errors
/// InvalidRequest for one we do not know.
pub(super) fn parse_name(text: &str) -> S3Result<ChecksumAlgorithm> {
    ALGORITHMS.iter().find(|(_, _, name)| name.eq_ignore_ascii_case(text)).map(|(algorithm, ..)| *algorithm).ok_or_else(|| {
        s3_error!(
            InvalidRequest,
            "Checksum algorithm provided is unsupported. Please try again with any of the valid types: [CRC32, CRC32C, CRC64NVME, SHA1, SHA256]"
        )
    })
}

/// Whether a multipart checksum of that algorithm may cover the whole object, the parts' checksums, or which of both
/// when nothing is said.
///
/// # Errors
/// InvalidRequest for a combination that cannot be.
pub(super) fn kind_of(algorithm: ChecksumAlgorithm, asked: Option<&str>) -> S3Result<ChecksumKind> {
    let sha = matches!(algorithm, ChecksumAlgorithm::Sha1 | ChecksumAlgorithm::Sha256);
    let wrong = |kind: &str| {
        s3_error!(
            InvalidRequest,
            "The {kind} checksum type cannot be used with the {} checksum algorithm.",
            name(algorithm)
        )
    };
    match asked {
        Some("FULL_OBJECT") if sha => Err(wrong("FULL_OBJECT")),
        Some("COMPOSITE") if algorithm == ChecksumAlgorithm::Crc64Nvme => Err(wrong("COMPOSITE")),
        Some("FULL_OBJECT") => Ok(ChecksumKind::FullObject),
        Some("COMPOSITE") => Ok(ChecksumKind::Composite),
        None if algorithm == ChecksumAlgorithm::Crc64Nvme => Ok(ChecksumKind::FullObject),
        None => Ok(ChecksumKind::Composite),
        Some(_) => Err(s3_error!(InvalidRequest, "Value for x-amz-checksum-type header is invalid.")),
    }
}

/// The kind's name in headers and XML.
pub(super) fn kind_name(kind: ChecksumKind) -> &'static str {
    match kind {
        ChecksumKind::FullObject => "FULL_OBJECT",
        ChecksumKind::Composite => "COMPOSITE",
    }
}

/// Text of a checksum as clients see it; a composite one of N parts ends in `-N`.
pub(super) fn text(checksum: &Checksum, parts: usize) -> String {
    let value = BASE64.encode(&checksum.value);
    match checksum.kind {
        ChecksumKind::FullObject => value,
        ChecksumKind::Composite => format!("{value}-{parts}"),
    }
}

/// Sets the field of the checksum's algorithm in an s3s output.
macro_rules! put_checksum {
    ($out:expr, $algorithm:expr, $text:expr) => {{
        let text = Some($text);
        match $algorithm {
            granary_meta::record::ChecksumAlgorithm::Crc32 => $out.checksum_crc32 = text,
            granary_meta::record::ChecksumAlgorithm::Crc32c => $out.checksum_crc32c = text,
            granary_meta::record::ChecksumAlgorithm::Crc64Nvme => $out.checksum_crc64nvme = text,
            granary_meta::record::ChecksumAlgorithm::Sha1 => $out.checksum_sha1 = text,
            granary_meta::record::ChecksumAlgorithm::Sha256 => $out.checksum_sha256 = text,
        }
    }};
}
pub(super) use put_checksum;

/// Reads the field of an algorithm in an s3s input.
macro_rules! get_checksum {
    ($input:expr, $algorithm:expr) => {
        match $algorithm {
            granary_meta::record::ChecksumAlgorithm::Crc32 => $input.checksum_crc32.as_deref(),
            granary_meta::record::ChecksumAlgorithm::Crc32c => $input.checksum_crc32c.as_deref(),
            granary_meta::record::ChecksumAlgorithm::Crc64Nvme => $input.checksum_crc64nvme.as_deref(),
            granary_meta::record::ChecksumAlgorithm::Sha1 => $input.checksum_sha1.as_deref(),
            granary_meta::record::ChecksumAlgorithm::Sha256 => $input.checksum_sha256.as_deref(),
        }
    };
}
pub(super) use get_checksum;

/// The checksums that a client promised for a body.
#[derive(Debug, Clone, Default)]
pub(super) struct PromisedChecksums {
    md5: Option<[u8; MD5_BYTES]>,
    checksums: Vec<(ChecksumAlgorithm, Vec<u8>)>,
    /// Comes in a trailer.
    trailer: Option<ChecksumAlgorithm>,
}

/// One header's value as text. None when it is absent.
///
/// # Errors
/// InvalidRequest when it is there twice or is no text.
fn single<'a>(headers: &'a HeaderMap, name: &str) -> S3Result<Option<&'a str>> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(s3_error!(InvalidRequest, "The header {name} is there more than once."));
    }
    value.to_str().map(Some).map_err(|_| s3_error!(InvalidRequest, "The header {name} is not text."))
}

fn promised_md5(headers: &HeaderMap) -> S3Result<Option<[u8; MD5_BYTES]>> {
    let Some(text) = single(headers, "content-md5")? else { return Ok(None) };
    let raw = BASE64.decode(text.trim()).ok().and_then(|raw| <[u8; MD5_BYTES]>::try_from(raw).ok());
    raw.map(Some).ok_or_else(|| s3_error!(InvalidDigest))
}

impl PromisedChecksums {
    /// Reads Content-MD5, x-amz-checksum-* and x-amz-trailer.
    ///
    /// # Errors
    /// InvalidDigest for a malformed MD5, InvalidRequest for a malformed, unknown or ambiguous checksum.
    pub(super) fn from_headers(headers: &HeaderMap) -> S3Result<PromisedChecksums> {
        let mut promised = PromisedChecksums { md5: promised_md5(headers)?, ..PromisedChecksums::default() };
        for header in headers.keys() {
            let Some(end) = header.as_str().strip_prefix(PREFIX) else { continue };
            if matches!(end, "algorithm" | "mode" | "type") {
                continue;
            }
            let Some((algorithm, ..)) = ALGORITHMS.iter().find(|(_, have, _)| *have == end) else {
                return Err(parse_name(end).err().unwrap_or_else(|| s3_error!(InvalidRequest)));
            };
            let text = single(headers, header.as_str())?.unwrap_or_default();
            promised.checksums.push((*algorithm, decode(*algorithm, text)?));
        }
        if let Some(trailer) = single(headers, "x-amz-trailer")? {
            let names: Vec<&str> = trailer.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
            for name in names {
                let end = name.to_ascii_lowercase();
                let Some(end) = end.strip_prefix(PREFIX) else {
                    return Err(s3_error!(
                        InvalidRequest,
                        "The value specified in the x-amz-trailer header is not supported"
                    ));
                };
                if promised.trailer.replace(parse_name(end)?).is_some() {
                    return Err(s3_error!(
                        InvalidRequest,
                        "Expecting a single x-amz-checksum- header. Multiple checksum Types are not allowed."
                    ));
                }
            }
        }
        Ok(promised)
    }

    /// The one checksum of an object's body.
    ///
    /// # Errors
    /// InvalidRequest when there are several, when the algorithm named by x-amz-sdk-checksum-algorithm is another one,
    /// or when one is named and none comes.
    pub(super) fn algorithm(&self, headers: &HeaderMap) -> S3Result<Option<ChecksumAlgorithm>> {
        let several = || {
            s3_error!(
                InvalidRequest,
                "Expecting a single x-amz-checksum- header. Multiple checksum Types are not allowed."
            )
        };
        let mut all = self.checksums.iter().map(|(algorithm, _)| *algorithm).chain(self.trailer);
        let found = all.next();
        if all.next().is_some() {
            return Err(several());
        }
        match (single(headers, "x-amz-sdk-checksum-algorithm")?, found) {
            (None, found) => Ok(found),
            (Some(named), None) => {
                parse_name(named)?;
                Err(s3_error!(
                    InvalidRequest,
                    "x-amz-sdk-checksum-algorithm specified, but no corresponding x-amz-checksum-* or x-amz-trailer headers were found."
                ))
            }
            (Some(named), Some(found)) if parse_name(named)? == found => Ok(Some(found)),
            (Some(_), Some(_)) => {
                Err(s3_error!(InvalidRequest, "Value for x-amz-sdk-checksum-algorithm header is invalid."))
            }
        }
    }

    /// Is there anything to verify?
    pub(super) fn is_empty(&self) -> bool {
        self.md5.is_none() && self.checksums.is_empty() && self.trailer.is_none()
    }

    /// Compares what was promised with what came. A body counts as good only after this.
    ///
    /// # Errors
    /// BadDigest when one differs, InvalidRequest when the trailer that was announced is missing or malformed.
    pub(super) fn verify(&self, digests: &Digests, trailers: Option<&TrailingHeaders>) -> S3Result<()> {
        if self.md5.is_some_and(|md5| md5 != digests.md5) {
            return Err(s3_error!(BadDigest, "The Content-MD5 you specified did not match what we received."));
        }
        for (algorithm, value) in &self.checksums {
            compare(*algorithm, value, digests)?;
        }
        if let Some(algorithm) = self.trailer {
            let header = format!("{PREFIX}{}", name(algorithm).to_ascii_lowercase());
            let text = trailers
                .and_then(|trailers| trailers.read(|trailers| single(trailers, &header).map(|text| text.map(str::to_owned))))
                .transpose()?
                .flatten()
                .ok_or_else(|| error::custom("MalformedTrailerError", http::StatusCode::BAD_REQUEST, "The request contained trailing data that was not well-formed or did not conform to our published schema."))?;
            compare(algorithm, &decode(algorithm, &text)?, digests)?;
        }
        Ok(())
    }
}

fn decode(algorithm: ChecksumAlgorithm, text: &str) -> S3Result<Vec<u8>> {
    BASE64.decode(text.trim()).ok().filter(|raw| raw.len() == digest::checksum_bytes(algorithm)).ok_or_else(|| {
        s3_error!(
            InvalidRequest,
            "Value for x-amz-checksum-{} header is invalid.",
            name(algorithm).to_ascii_lowercase()
        )
    })
}

fn compare(algorithm: ChecksumAlgorithm, value: &[u8], digests: &Digests) -> S3Result<()> {
    match digests.checksum(algorithm) {
        Some(have) if have == value => Ok(()),
        Some(_) => {
            Err(s3_error!(BadDigest, "The {} you specified did not match the calculated checksum.", name(algorithm)))
        }
        None => Err(error::internal("a promised checksum was not computed")),
    }
}

/// Verifies the checksums of the XML body of a verb while it is read.
pub(super) struct BodyCheck {
    promised: PromisedChecksums,
    digester: Digester,
}

impl BodyCheck {
    /// Begins; None when the headers promise nothing. `of_body`: x-amz-checksum-* speak of this body, and not of an
    /// object.
    ///
    /// # Errors
    /// As [`PromisedChecksums::from_headers`]; a trailer cannot be checked here and is refused.
    pub(super) fn begin(headers: &HeaderMap, of_body: bool) -> S3Result<Option<BodyCheck>> {
        let promised = if of_body {
            PromisedChecksums::from_headers(headers)?
        } else {
            PromisedChecksums { md5: promised_md5(headers)?, ..PromisedChecksums::default() }
        };
        if promised.trailer.is_some() {
            return Err(error::not_implemented("A trailing checksum on a request that is not an object upload"));
        }
        if promised.is_empty() {
            return Ok(None);
        }
        let algorithms: Vec<_> = promised.checksums.iter().map(|(algorithm, _)| *algorithm).collect();
        Ok(Some(BodyCheck { promised, digester: Digester::new(&algorithms) }))
    }

    /// Takes the next bytes.
    pub(super) fn update(&mut self, data: &[u8]) {
        self.digester.update(data);
    }

    /// Ends.
    ///
    /// # Errors
    /// BadDigest.
    pub(super) fn verify(self) -> Result<(), S3Error> {
        self.promised.verify(&self.digester.finish(), None)
    }
}
