//! Who may come in: keys, and the checks of a signed request that s3s leaves to us.

use super::call::Caller;
use super::context::S3Context;
use super::error;
use super::request::RequestInfo;
use super::strict;
use super::verbs::{verb, BodyKind};
use async_trait::async_trait;
use granary_meta::record::AccountId;
use http::{HeaderMap, Uri};
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::{S3Auth, SecretKey};
use s3s::{s3_error, S3Result};
use std::sync::Arc;

/// An access key: its secret, and the account it acts for.
#[derive(Clone)]
pub struct AccessKey {
    /// What clients sign with.
    pub secret: String,
    /// Whose it is.
    pub account: AccountId,
}

impl std::fmt::Debug for AccessKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessKey").field("account", &self.account).finish_non_exhaustive()
    }
}

/// An account as S3 shows it: twelve digits.
pub(super) fn account_text(account: AccountId) -> String {
    format!("{:012}", account.0)
}

/// Finds secrets by access key.
pub(super) struct Keys(pub(super) Arc<S3Context>);

#[async_trait]
impl S3Auth for Keys {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        match self.0.settings.keys.get(access_key) {
            Some(key) => Ok(SecretKey::from(key.secret.clone())),
            None => Err(s3_error!(InvalidAccessKeyId)),
        }
    }
}

/// Checks a request after its signature: nothing of it has been acted on yet.
pub(super) struct AccessCheck {
    pub(super) cx: Arc<S3Context>,
    /// Only this verb may pass; see [`super::service`].
    pub(super) only: Option<&'static str>,
}

#[async_trait]
impl S3Access for AccessCheck {
    async fn check(&self, cx: &mut S3AccessContext<'_>) -> S3Result<()> {
        let Some(access_key_id) = cx.credentials().map(|credentials| credentials.access_key.clone()) else {
            return Err(s3_error!(AccessDenied, "Anonymous access is not allowed."));
        };
        let Some(account) = self.cx.settings.keys.get(&access_key_id).map(|key| key.account) else {
            return Err(s3_error!(InvalidAccessKeyId));
        };
        let verb = verb(cx.s3_op().name());
        if self.only.is_some_and(|only| only != verb.name()) {
            return Err(s3_error!(AuthorizationHeaderMalformed));
        }
        host_is_signed(cx.headers(), cx.uri())?;
        if cx.headers().contains_key("x-amz-security-token") || query_has(cx.uri(), "x-amz-security-token") {
            return Err(s3_error!(InvalidToken, "This server gives out no session tokens."));
        }
        refuse_headers(cx.headers())?;
        let owner = account_text(account);
        strict::check(verb.name(), cx.uri().query().unwrap_or_default(), cx.headers(), &owner)?;
        // An account uses its own buckets only, so whoever expects another owner cannot be right.
        for header in ["x-amz-expected-bucket-owner", "x-amz-source-expected-bucket-owner"] {
            if cx.headers().get(header).is_some_and(|value| value.as_bytes() != owner.as_bytes()) {
                return Err(error::other_owner());
            }
        }
        if cx.s3_path().get_object_key().is_some_and(|key| key.contains('\0')) {
            return Err(s3_error!(InvalidArgument, "A key must not contain the NUL character."));
        }
        let headers = cx.headers().clone();
        let Some(info) = RequestInfo::of(cx.extensions_mut()).cloned() else {
            return Err(error::internal("a request came around the service"));
        };
        match verb.body {
            BodyKind::Xml => info.verify_xml(&headers, true)?,
            BodyKind::XmlOfObject => info.verify_xml(&headers, false)?,
            BodyKind::Payload => {}
        }
        let request_id = info.id.clone();
        info.authorised(verb.name(), Caller { account, access_key_id, request_id });
        Ok(())
    }
}

/// `host` must be among the signed headers: s3s does not look, and a request for one host must not be replayed at
/// another.
fn host_is_signed(headers: &HeaderMap, uri: &Uri) -> S3Result<()> {
    let unsigned = || s3_error!(AccessDenied, "The host header must be among the signed headers.");
    let list = match headers.get(http::header::AUTHORIZATION) {
        Some(value) => {
            let value = value.to_str().map_err(|_| unsigned())?;
            let (_, rest) = value.split_once("SignedHeaders=").ok_or_else(unsigned)?;
            rest.split([',', ' ']).next().unwrap_or_default().to_owned()
        }
        None => {
            let query = form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
            let mut lists = query.filter(|(name, _)| name.eq_ignore_ascii_case("x-amz-signedheaders"));
            lists.next().ok_or_else(unsigned)?.1.into_owned()
        }
    };
    if list.split(';').any(|name| name.eq_ignore_ascii_case("host")) {
        Ok(())
    } else {
        Err(unsigned())
    }
}

/// Whether a query has a parameter of that name, however its letters are written.
pub(super) fn query_has(uri: &Uri, name: &str) -> bool {
    form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).any(|(have, _)| have.eq_ignore_ascii_case(name))
}

/// Headers that ask for something we do not do, and that would change what is stored, are refused, never ignored.
fn refuse_headers(headers: &HeaderMap) -> S3Result<()> {
    for name in headers.keys() {
        let name = name.as_str();
        if name.starts_with("x-amz-server-side-encryption")
            || name.starts_with("x-amz-copy-source-server-side-encryption")
        {
            return Err(error::not_implemented("Server-side encryption"));
        }
        if name == "x-amz-bucket-object-lock-enabled"
            && headers.get(name).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"true"))
        {
            return Err(error::not_implemented("Object lock"));
        }
        if name.starts_with("x-amz-object-lock-") {
            return Err(s3_error!(InvalidRequest, "Bucket is missing Object Lock Configuration"));
        }
        if name.starts_with("x-amz-grant-") {
            return Err(s3_error!(AccessControlListNotSupported, "The bucket does not allow ACLs"));
        }
        if name == "x-amz-acl" {
            let accepted =
                headers.get_all(name).iter().all(|v| matches!(v.as_bytes(), b"private" | b"bucket-owner-full-control"));
            if !accepted {
                return Err(s3_error!(AccessControlListNotSupported, "The bucket does not allow ACLs"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn host_must_be_signed_in_both_forms() {
        let uri: Uri = "/b/k".parse().unwrap();
        let auth = |list: &str| {
            let mut headers = HeaderMap::new();
            let value =
                format!("AWS4-HMAC-SHA256 Credential=a/20260101/r/s3/aws4_request, SignedHeaders={list}, Signature=00");
            headers.insert("authorization", value.parse().unwrap());
            headers
        };
        assert!(host_is_signed(&auth("host;x-amz-date"), &uri).is_ok());
        assert!(host_is_signed(&auth("x-amz-date"), &uri).is_err());
        assert!(host_is_signed(&auth("x-host;xhost"), &uri).is_err());
        let presigned = |list: &str| format!("/b/k?X-Amz-SignedHeaders={list}&a=host").parse::<Uri>().unwrap();
        assert!(host_is_signed(&HeaderMap::new(), &presigned("content-md5%3Bhost")).is_ok());
        assert!(host_is_signed(&HeaderMap::new(), &presigned("content-md5")).is_err());
        assert!(host_is_signed(&HeaderMap::new(), &uri).is_err());
    }

    #[test]
    fn a_key_never_shows_its_secret() {
        let key = AccessKey { secret: "do-not-show".to_owned(), account: AccountId::ROOT };
        assert!(!format!("{key:?}").contains("do-not-show"));
    }
}
