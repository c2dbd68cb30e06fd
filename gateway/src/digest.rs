//! Digests of payloads: the MD5 behind ETags and the five checksum algorithms of S3.
//!
//! A [`Digester`] takes the bytes once and gives [`Digests`]. Checksums of multipart objects are made from those of the
//! parts:
//! [`combine_crc`] for a checksum of the whole object, [`composite`] for a checksum of the parts' checksums.

use crc_fast::CrcAlgorithm;
use granary_meta::record::ChecksumAlgorithm;
use md5_simd::Md5;
use sha2::Digest as _;

/// Bytes of an MD5.
pub(crate) const MD5_BYTES: usize = 16;

enum Hasher {
    Crc(crc_fast::Digest),
    Sha1(sha1::Sha1),
    Sha256(sha2::Sha256),
}

/// Computes the MD5 and any of the S3 checksums of one stream of bytes.
pub(crate) struct Digester {
    md5: Md5,
    hashers: Vec<(ChecksumAlgorithm, Hasher)>,
}

/// What a [`Digester`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Digests {
    /// MD5 of the bytes.
    pub(crate) md5: [u8; MD5_BYTES],
    /// The checksums asked for, raw bytes, big-endian for the CRCs.
    pub(crate) checksums: Vec<(ChecksumAlgorithm, Vec<u8>)>,
}

impl Digests {
    /// The checksum of that algorithm, if it was asked for.
    pub(crate) fn checksum(&self, algorithm: ChecksumAlgorithm) -> Option<&[u8]> {
        self.checksums.iter().find(|(have, _)| *have == algorithm).map(|(_, value)| value.as_slice())
    }
}

impl Digester {
    /// Begins a stream; each algorithm is computed once, however often it is named.
    pub(crate) fn new(algorithms: &[ChecksumAlgorithm]) -> Digester {
        let mut hashers: Vec<(ChecksumAlgorithm, Hasher)> = Vec::new();
        for algorithm in algorithms {
            if hashers.iter().all(|(have, _)| have != algorithm) {
                let hasher = match (algorithm, crc_of(*algorithm)) {
                    (_, Some(crc)) => Hasher::Crc(crc_fast::Digest::new(crc)),
                    (ChecksumAlgorithm::Sha1, None) => Hasher::Sha1(sha1::Sha1::new()),
                    (_, None) => Hasher::Sha256(sha2::Sha256::new()),
                };
                hashers.push((*algorithm, hasher));
            }
        }
        Digester { md5: Md5::new(), hashers }
    }

    /// Takes the next bytes.
    pub(crate) fn update(&mut self, data: &[u8]) {
        self.md5.update(data);
        for (_, hasher) in &mut self.hashers {
            match hasher {
                Hasher::Crc(crc) => crc.update(data),
                Hasher::Sha1(sha1) => sha1.update(data),
                Hasher::Sha256(sha256) => sha256.update(data),
            }
        }
    }

    /// Ends the stream.
    pub(crate) fn finish(self) -> Digests {
        let checksums = self.hashers.into_iter().map(|(algorithm, hasher)| {
            let value = match hasher {
                Hasher::Crc(crc) => crc_bytes(algorithm, crc.finalize()),
                Hasher::Sha1(sha1) => sha1.finalize().to_vec(),
                Hasher::Sha256(sha256) => sha256.finalize().to_vec(),
            };
            (algorithm, value)
        });
        Digests { md5: self.md5.finalize(), checksums: checksums.collect() }
    }
}

/// Digests of bytes that are all at hand.
#[cfg(test)]
pub(crate) fn digest(data: &[u8], algorithms: &[ChecksumAlgorithm]) -> Digests {
    let mut digester = Digester::new(algorithms);
    digester.update(data);
    digester.finish()
}

fn crc_of(algorithm: ChecksumAlgorithm) -> Option<CrcAlgorithm> {
    match algorithm {
        ChecksumAlgorithm::Crc32 => Some(CrcAlgorithm::Crc32IsoHdlc),
        ChecksumAlgorithm::Crc32c => Some(CrcAlgorithm::Crc32Iscsi),
        ChecksumAlgorithm::Crc64Nvme => Some(CrcAlgorithm::Crc64Nvme),
        ChecksumAlgorithm::Sha1 | ChecksumAlgorithm::Sha256 => None,
    }
}

/// Bytes of a checksum of that algorithm.
pub(crate) fn checksum_bytes(algorithm: ChecksumAlgorithm) -> usize {
    match algorithm {
        ChecksumAlgorithm::Crc32 | ChecksumAlgorithm::Crc32c => 4,
        ChecksumAlgorithm::Crc64Nvme => 8,
        ChecksumAlgorithm::Sha1 => 20,
        ChecksumAlgorithm::Sha256 => 32,
    }
}

fn crc_bytes(algorithm: ChecksumAlgorithm, value: u64) -> Vec<u8> {
    let bytes = value.to_be_bytes();
    bytes.iter().skip(bytes.len() - checksum_bytes(algorithm)).copied().collect()
}

/// The CRC of all bytes from the CRCs and lengths of consecutive pieces. None when the algorithm is no CRC, or a value
/// has the wrong length.
pub(crate) fn combine_crc<'a>(
    algorithm: ChecksumAlgorithm,
    pieces: impl IntoIterator<Item = (&'a [u8], u64)>,
) -> Option<Vec<u8>> {
    let crc = crc_of(algorithm)?;
    let mut whole: Option<u64> = None;
    for (value, len_bytes) in pieces {
        if value.len() != checksum_bytes(algorithm) {
            return None;
        }
        let value = value.iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
        whole = Some(match whole {
            None => value,
            // Nothing follows: the library's combine is not defined for a length of zero.
            Some(before) if len_bytes == 0 => before,
            Some(before) => crc_fast::checksum_combine(crc, before, value, len_bytes),
        });
    }
    Some(crc_bytes(algorithm, whole.unwrap_or(0)))
}

/// The checksum over the concatenated checksums of the parts.
pub(crate) fn composite<'a>(algorithm: ChecksumAlgorithm, parts: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut digester = Digester::new(&[algorithm]);
    for part in parts {
        digester.update(part);
    }
    digester.finish().checksum(algorithm).map(<[u8]>::to_vec).unwrap_or_default()
}

/// The ETag of a multipart object: hex MD5 of the parts' binary MD5s, a dash, their number. None when an ETag is no hex
/// MD5.
pub(crate) fn multipart_etag<'a>(part_etags: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let mut md5 = Md5::new();
    let mut parts = 0u32;
    for etag in part_etags {
        let mut binary = [0u8; MD5_BYTES];
        hex::decode_to_slice(etag, &mut binary).ok()?;
        md5.update(&binary);
        parts += 1;
    }
    Some(format!("{}-{parts}", hex::encode(md5.finalize())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    const ALL: [ChecksumAlgorithm; 5] = [
        ChecksumAlgorithm::Crc32,
        ChecksumAlgorithm::Crc32c,
        ChecksumAlgorithm::Crc64Nvme,
        ChecksumAlgorithm::Sha1,
        ChecksumAlgorithm::Sha256,
    ];

    /// Published check values of "123456789" (the CRC catalogue, RFC 1321, and NIST's algorithms run by hand).
    #[test]
    fn the_check_values_come_out() {
        let digests = digest(b"123456789", &ALL);
        let hex_of = |algorithm| hex::encode(digests.checksum(algorithm).unwrap());
        assert_eq!(hex::encode(digests.md5), "25f9e794323b453885f5181f1b624d0b");
        assert_eq!(hex_of(ChecksumAlgorithm::Crc32), "cbf43926");
        assert_eq!(hex_of(ChecksumAlgorithm::Crc32c), "e3069283");
        assert_eq!(hex_of(ChecksumAlgorithm::Crc64Nvme), "ae8b14860a799888");
        assert_eq!(hex_of(ChecksumAlgorithm::Sha1), "f7c3bc1d808e04732adf679965ccc34ca7ae3441");
        assert_eq!(
            hex_of(ChecksumAlgorithm::Sha256),
            "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225"
        );
    }

    #[test]
    fn combined_crcs_equal_the_crc_of_all_bytes() {
        let data: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) % 251) as u8).collect();
        for algorithm in [ChecksumAlgorithm::Crc32, ChecksumAlgorithm::Crc32c, ChecksumAlgorithm::Crc64Nvme] {
            let whole = digest(&data, &[algorithm]);
            for cuts in [vec![0], vec![1], vec![50_000], vec![100_000], vec![7, 7, 4096, 99_999], vec![]] {
                let mut pieces = Vec::new();
                let mut from = 0;
                for cut in cuts.iter().copied().chain([data.len()]) {
                    let piece = &data[from..cut];
                    pieces
                        .push((digest(piece, &[algorithm]).checksum(algorithm).unwrap().to_vec(), piece.len() as u64));
                    from = cut;
                }
                let combined = combine_crc(algorithm, pieces.iter().map(|(crc, len)| (crc.as_slice(), *len))).unwrap();
                assert_eq!(combined, whole.checksum(algorithm).unwrap(), "{algorithm:?} cut at {cuts:?}");
            }
        }
        assert_eq!(combine_crc(ChecksumAlgorithm::Sha1, [(&[0u8; 20][..], 1)]), None);
        assert_eq!(combine_crc(ChecksumAlgorithm::Crc32, [(&[0u8; 3][..], 1)]), None);
    }

    #[test]
    fn a_multipart_etag_hashes_the_binary_md5s() {
        let one = hex::encode(digest(b"a", &[]).md5);
        let two = hex::encode(digest(b"b", &[]).md5);
        // md5(md5("a") + md5("b")) in binary.
        assert_eq!(
            multipart_etag([one.as_str(), two.as_str()]).unwrap(),
            "96e024ba2074fe77e8e965ba43a704be-2".to_owned()
        );
        assert_eq!(multipart_etag(["zz"]), None);
    }
}
