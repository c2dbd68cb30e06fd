//! Listing of current objects: one iterator over 'O' with an upper bound; under a delimiter one seek per common prefix.
//!
//! 'O' has no delete markers, so every entry met is an item or the first key of a common prefix: the work is bounded by
//! the limit. Order is the byte order of whole keys: `skel.other/x` comes before `skel/x`.

use crate::codec::ObjectHead;
use crate::keys::{after_prefix, kind, Keys};
use crate::kv::{Kv, StateError};
use crate::record::BucketId;
use crate::{Answer, ListFrom, ListItem};

/// What to list.
pub struct Listing<'a> {
    /// Only keys that begin with it.
    pub prefix: &'a str,
    /// Folds keys; may be empty.
    pub delimiter: &'a str,
    /// Where to go on.
    pub from: &'a ListFrom,
    /// Most items; at least 1.
    pub limit: usize,
}

/// The common prefix that folds `key`: up to and with the first delimiter behind `prefix`. None: the key stands for
/// itself.
pub fn common_prefix<'k>(key: &'k str, prefix: &str, delimiter: &str) -> Option<&'k str> {
    if delimiter.is_empty() {
        return None;
    }
    let rest = key.strip_prefix(prefix)?;
    let at = rest.find(delimiter)?;
    key.get(..prefix.len() + at + delimiter.len())
}

/// Where the iterator begins.
fn start(keys: &Keys, bucket: BucketId, listing: &Listing<'_>) -> Vec<u8> {
    let first = keys.bucket_range(kind::OBJECT, bucket, listing.prefix).from;
    let ListFrom::After(after) = listing.from else { return first };
    let mut from = keys.object(bucket, after);
    if common_prefix(after, listing.prefix, listing.delimiter) == Some(after.as_str()) {
        // A folded prefix was the last item: everything under it is done. It has a last byte below 0xFF (the bucket's
        // kind byte at the least), so there always is a key behind it.
        from = after_prefix(&from).unwrap_or(from);
    } else {
        from.push(0);
    }
    from.max(first)
}

/// One page.
pub fn list_objects<K: Kv + ?Sized>(
    kv: &K,
    keys: &Keys,
    bucket: BucketId,
    listing: &Listing<'_>,
) -> Result<Answer, StateError> {
    let end = keys.bucket_range(kind::OBJECT, bucket, listing.prefix).to;
    let mut cursor = kv.cursor(&end);
    cursor.seek(&start(keys, bucket, listing))?;
    let mut items = Vec::new();
    while let Some((entry_key, value)) = cursor.entry() {
        if items.len() == listing.limit {
            return Ok(Answer::Listing { items, more: true });
        }
        let key = entry_key.get(Keys::BUCKET_PREFIX_BYTES..).unwrap_or_default();
        let key = std::str::from_utf8(key).map_err(|_| StateError::Value("object key is not UTF-8".to_owned()))?;
        match common_prefix(key, listing.prefix, listing.delimiter) {
            Some(prefix) => {
                let prefix = prefix.to_owned();
                let behind = after_prefix(&keys.object(bucket, &prefix));
                items.push(ListItem::Prefix(prefix));
                match behind {
                    Some(behind) if behind < end => cursor.seek(&behind)?,
                    _ => return Ok(Answer::Listing { items, more: false }),
                }
            }
            None => {
                let key = key.to_owned();
                items.push(ListItem::Object(ObjectHead::decode(value)?.summary(key)));
                cursor.next()?;
            }
        }
    }
    Ok(Answer::Listing { items, more: false })
}
