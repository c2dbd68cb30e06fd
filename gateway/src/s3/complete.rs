//! CompleteMultipartUpload: parts become an object.

use super::call::Call;
use super::checksums::{self, get_checksum, put_checksum};
use super::commit::settle;
use super::multipart::{parse_upload, MAX_PARTS};
use super::{error, meta, put};
use crate::digest;
use crate::object::Placement;
use crate::shards::now_ms;
use base64::engine::general_purpose::STANDARD as BASE64;
use base64::Engine;
use granary_meta::record::{
    BucketRecord, Checksum, ChecksumAlgorithm, ChecksumKind, ObjectData, ObjectRecord, PartRecord, UploadId,
    UploadRecord, VersionSeq,
};
use granary_meta::{Answer, Command, Query, Reply};
use s3s::dto::{CompleteMultipartUploadInput, CompleteMultipartUploadOutput, CompletedPart, ETag};
use s3s::{s3_error, S3Error, S3Request, S3Response, S3Result};
use std::time::Duration;

/// Smallest part but the last, in bytes.
const MIN_PART_BYTES: u64 = 5 * 1024 * 1024;
/// Largest object, in bytes: 10,000 parts of 5 GiB, as S3 allows since 2025.
const MAX_OBJECT_BYTES: u64 = MAX_PARTS as u64 * put::MAX_PUT_BYTES;
/// Parts asked for at a time.
const QUERY_PARTS: u32 = 1000;
/// A completion that takes longer answers 200 at once, with white space until the result follows, so that no client
/// gives up waiting.
const PATIENCE: Duration = Duration::from_secs(10);

/// Completes an upload. Repeated with the same parts it gives the same answer.
pub(super) async fn complete_multipart_upload(
    call: &Call,
    req: S3Request<CompleteMultipartUploadInput>,
) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
    let call = call.clone();
    let input = req.input;
    meta::check_key(&input.key)?;
    let mut task = tokio::spawn(async move { complete(&call, input).await });
    match tokio::time::timeout(PATIENCE, &mut task).await {
        Ok(outcome) => Ok(S3Response::new(outcome.map_err(error::internal)??)),
        Err(_) => {
            let future = Box::pin(async move { task.await.map_err(error::internal)? });
            Ok(S3Response::new(CompleteMultipartUploadOutput { future: Some(future), ..Default::default() }))
        }
    }
}

/// The parts a client names, in ascending order.
fn named_parts(input: &CompleteMultipartUploadInput) -> S3Result<Vec<(u16, String, &CompletedPart)>> {
    let parts =
        input.multipart_upload.as_ref().and_then(|upload| upload.parts.as_ref()).filter(|parts| !parts.is_empty());
    let parts = parts.ok_or_else(|| s3_error!(MalformedXML))?;
    if parts.len() > usize::from(MAX_PARTS) {
        return Err(s3_error!(MalformedXML));
    }
    let mut named: Vec<(u16, String, &CompletedPart)> = Vec::with_capacity(parts.len());
    for part in parts {
        let number = part
            .part_number
            .and_then(|number| u16::try_from(number).ok())
            .filter(|number| (1..=MAX_PARTS).contains(number));
        let number = number.ok_or_else(|| {
            s3_error!(InvalidArgument, "Part number must be an integer between 1 and 10000, inclusive")
        })?;
        let etag = part.e_tag.as_ref().ok_or_else(|| s3_error!(MalformedXML))?.value().to_owned();
        if named.last().is_some_and(|(before, ..)| *before >= number) {
            return Err(s3_error!(InvalidPartOrder));
        }
        named.push((number, etag, part));
    }
    Ok(named)
}

/// All parts of an upload. None when it does not exist (any more).
async fn stored_parts(
    call: &Call,
    bucket: &str,
    key: &str,
    upload: UploadId,
) -> S3Result<Option<(BucketRecord, UploadRecord, Vec<PartRecord>)>> {
    let mut all: Vec<PartRecord> = Vec::new();
    loop {
        let after = all.last().map_or(0, |part| part.number);
        let query = |bucket: &BucketRecord| Query::ListParts {
            bucket: bucket.id,
            key: key.to_owned(),
            upload,
            after,
            limit: QUERY_PARTS,
        };
        match call.ask(bucket, key, query).await? {
            (bucket, Answer::Parts { upload, parts, more }) => {
                // A page that does not advance would loop for ever.
                let more = more && !parts.is_empty();
                all.extend(parts);
                if !more {
                    return Ok(Some((bucket, upload, all)));
                }
            }
            (_, Answer::NoSuchUpload) => return Ok(None),
            (_, other) => return Err(error::answer(other)),
        }
    }
}

async fn complete(call: &Call, input: CompleteMultipartUploadInput) -> S3Result<CompleteMultipartUploadOutput> {
    let upload = parse_upload(&input.upload_id)?;
    let conditions = meta::write_conditions(input.if_match.as_ref(), input.if_none_match.as_ref())?;
    let named = named_parts(&input)?;
    let parts: Vec<(u16, String)> = named.iter().map(|(number, etag, _)| (*number, etag.clone())).collect();

    let Some((bucket, record, stored)) = stored_parts(call, &input.bucket, &input.key, upload).await? else {
        return again(call, &input, upload, &parts).await;
    };
    let chosen = choose(&named, &stored, record.checksum)?;
    let size_bytes = check_sizes(&chosen, input.mpu_object_size)?;
    let etag = digest::multipart_etag(chosen.iter().map(|part| part.etag.as_str()))
        .ok_or_else(|| error::internal("a part's ETag is no MD5"))?;
    let checksum = whole_checksum(&chosen, record.checksum);
    check_promise(&input, checksum.as_ref(), chosen.len())?;

    let part_checksums = match &checksum {
        Some(checksum) => chosen
            .iter()
            .filter_map(|part| part.checksum.as_ref())
            .filter(|found| found.algorithm == checksum.algorithm)
            .map(|found| found.value.clone())
            .collect(),
        None => Vec::new(),
    };
    let object = ObjectRecord {
        version: VersionSeq(0),
        null_version: true,
        delete_marker: false,
        modified_ms: now_ms(),
        size_bytes,
        etag,
        part_sizes: chosen.iter().map(|part| part.size_bytes).collect(),
        checksum: checksum.clone(),
        part_checksums,
        meta: record.meta,
        owner: record.owner,
        data: ObjectData::Extents(Vec::new()),
    };
    let (key, named) = (input.key.clone(), parts.clone());
    let command = move |bucket: &BucketRecord, _: &Placement| Command::CompleteUpload {
        bucket: bucket.id,
        key: key.clone(),
        upload,
        parts: named.clone(),
        record: object.clone(),
        conditions: conditions.clone(),
        rule_epoch: bucket.rule.epoch,
    };
    let accepted = |reply: &Reply| matches!(reply, Reply::Put { .. } | Reply::NoSuchUpload);
    let under = bucket.clone();
    let etag = match settle(call, bucket, input.key.clone(), command, None, accepted).await? {
        Reply::Put { etag, .. } => etag,
        // Another completion was faster.
        Reply::NoSuchUpload => return again(call, &input, upload, &parts).await,
        other => return Err(error::reply(other)),
    };
    call.forget_upload(&under, &input.key, upload);
    let mut output = answer(&input, etag);
    if let Some(checksum) = &checksum {
        put_checksum!(output, checksum.algorithm, checksums::text(checksum, chosen.len()));
        output.checksum_type = Some(checksums::kind_name(checksum.kind).to_owned().into());
    }
    Ok(output)
}

fn answer(input: &CompleteMultipartUploadInput, etag: String) -> CompleteMultipartUploadOutput {
    CompleteMultipartUploadOutput {
        bucket: Some(input.bucket.clone()),
        key: meta::xml_key(&input.key),
        location: Some(format!("/{}/{}", input.bucket, super::list::url_encode(&input.key))),
        e_tag: Some(ETag::Strong(etag)),
        ..Default::default()
    }
}

/// The upload is gone. Completed with these very parts, it gets its answer again: the first one may have been lost on
/// its way.
async fn again(
    call: &Call,
    input: &CompleteMultipartUploadInput,
    upload: UploadId,
    parts: &[(u16, String)],
) -> S3Result<CompleteMultipartUploadOutput> {
    let query = |bucket: &BucketRecord| Query::CompletedUpload { bucket: bucket.id, key: input.key.clone(), upload };
    match call.ask(&input.bucket, &input.key, query).await? {
        (_, Answer::Completed { etag, parts: completed, .. }) if completed == parts => Ok(answer(input, etag)),
        (_, Answer::Completed { .. } | Answer::NoSuchUpload) => Err(error::no_such_upload()),
        (_, other) => Err(error::answer(other)),
    }
}

/// The stored parts that are named, each with the ETag and checksum that the client names.
fn choose<'a>(
    named: &[(u16, String, &CompletedPart)],
    stored: &'a [PartRecord],
    checksum: Option<(ChecksumAlgorithm, ChecksumKind)>,
) -> S3Result<Vec<&'a PartRecord>> {
    let invalid = |number: u16| error::reply(Reply::InvalidPart { number });
    let mut chosen = Vec::with_capacity(named.len());
    for (number, etag, part) in named {
        let found = stored.binary_search_by_key(number, |part| part.number).ok().and_then(|index| stored.get(index));
        let found = found.filter(|found| found.etag == *etag).ok_or_else(|| invalid(*number))?;
        let algorithm = checksum.map(|(algorithm, _)| algorithm).or(found.checksum.as_ref().map(|sum| sum.algorithm));
        if let (Some(algorithm), Some(have)) = (algorithm, &found.checksum) {
            let differs = |text: &str| {
                BASE64.decode(text).map_or(true, |value| have.algorithm == algorithm && value != have.value)
            };
            if get_checksum!(part, algorithm).is_some_and(differs) {
                return Err(invalid(*number));
            }
        }
        chosen.push(found);
    }
    Ok(chosen)
}

fn check_sizes(parts: &[&PartRecord], promised: Option<i64>) -> S3Result<u64> {
    let all_but_last = parts.split_last().map_or(&[][..], |(_, before)| before);
    if all_but_last.iter().any(|part| part.size_bytes < MIN_PART_BYTES) {
        return Err(s3_error!(EntityTooSmall));
    }
    let size: u64 = parts.iter().map(|part| part.size_bytes).sum();
    if size > MAX_OBJECT_BYTES {
        return Err(s3_error!(EntityTooLarge));
    }
    if promised.is_some_and(|promised| u64::try_from(promised) != Ok(size)) {
        return Err(s3_error!(
            InvalidRequest,
            "The provided 'x-amz-mp-object-size' header does not match what was computed."
        ));
    }
    Ok(size)
}

/// The object's checksum: as the upload asked, or over the whole object when all parts happen to have the same CRC.
fn whole_checksum(parts: &[&PartRecord], asked: Option<(ChecksumAlgorithm, ChecksumKind)>) -> Option<Checksum> {
    let first = parts.first()?.checksum.as_ref()?.algorithm;
    let (algorithm, kind) = asked.unwrap_or((first, ChecksumKind::FullObject));
    let mut values: Vec<(&[u8], u64)> = Vec::with_capacity(parts.len());
    for part in parts {
        let checksum = part.checksum.as_ref().filter(|checksum| checksum.algorithm == algorithm)?;
        values.push((&checksum.value, part.size_bytes));
    }
    let value = match kind {
        ChecksumKind::FullObject => digest::combine_crc(algorithm, values)?,
        ChecksumKind::Composite => digest::composite(algorithm, values.into_iter().map(|(value, _)| value)),
    };
    Some(Checksum { algorithm, kind, value })
}

/// The checksum of the object that the client sent along must be the one we found.
fn check_promise(input: &CompleteMultipartUploadInput, found: Option<&Checksum>, parts: usize) -> S3Result<()> {
    let bad = |algorithm| -> S3Error {
        s3_error!(BadDigest, "The {} you specified did not match the calculated checksum.", checksums::name(algorithm))
    };
    if let (Some(kind), Some(found)) = (&input.checksum_type, found) {
        if kind.as_str() != checksums::kind_name(found.kind) {
            return Err(s3_error!(
                InvalidRequest,
                "The upload was created using the {} checksum mode. The complete request must use the same checksum mode.",
                checksums::kind_name(found.kind)
            ));
        }
    }
    for algorithm in [
        ChecksumAlgorithm::Crc32,
        ChecksumAlgorithm::Crc32c,
        ChecksumAlgorithm::Crc64Nvme,
        ChecksumAlgorithm::Sha1,
        ChecksumAlgorithm::Sha256,
    ] {
        let Some(sent) = get_checksum!(input, algorithm) else { continue };
        let Some(found) = found.filter(|found| found.algorithm == algorithm) else {
            return Err(s3_error!(
                InvalidRequest,
                "The upload has no {} checksum to compare with.",
                checksums::name(algorithm)
            ));
        };
        // The number of parts may be left off a composite one.
        if sent != checksums::text(found, parts) && sent != BASE64.encode(&found.value) {
            return Err(bad(algorithm));
        }
    }
    Ok(())
}
