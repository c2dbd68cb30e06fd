//! How a request is signed: AWS Signature Version 4, in its header or in its query.

use crate::answer::{no_answer, NoAnswer};
use crate::Client;
use aws_sigv4::http_request::{
    sign, PayloadChecksumKind, PercentEncodingMode, SignableBody, SignableRequest, SignatureLocation, SigningSettings,
    UriPathNormalizationMode,
};
use aws_sigv4::sign::v4;
use http::{Method, Request};
use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

impl Client {
    /// A presigned URL's path and query, valid for `expires`.
    ///
    /// # Errors
    /// The signer refused.
    pub fn presign(&self, method: &Method, path: &str, expires: Duration) -> Result<String, NoAnswer> {
        let mut settings = settings();
        settings.signature_location = SignatureLocation::QueryParams;
        settings.payload_checksum_kind = PayloadChecksumKind::NoHeader;
        settings.expires_in = Some(expires);
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://{}{}", self.inner.address, uri(path, &[])))
            .header("host", &self.inner.address)
            .body(())
            .map_err(|error| no_answer("presign")(&error))?;
        self.sign(&mut request, settings, SignableBody::UnsignedPayload)?;
        Ok(request.uri().path_and_query().map(|path| path.to_string()).unwrap_or_default())
    }

    pub(crate) fn signed(
        &self,
        method: Method,
        uri: &str,
        headers: &[(&str, &str)],
        body: SignableBody<'static>,
        length: u64,
    ) -> Result<Request<()>, NoAnswer> {
        let mut builder = Request::builder()
            .method(method)
            .uri(format!("http://{}{uri}", self.inner.address))
            .header("host", &self.inner.address)
            .header("content-length", length);
        for (name, value) in headers {
            builder = builder.header(
                *name,
                http::HeaderValue::from_bytes(value.as_bytes()).map_err(|error| no_answer("header")(&error))?,
            );
        }
        let mut request = builder.body(()).map_err(|error| no_answer("build")(&error))?;
        self.sign(&mut request, settings(), body)?;
        // hyper wants the origin form; the signature does not care.
        let origin = request.uri().path_and_query().map(|path| path.as_str().to_owned()).unwrap_or_else(|| "/".into());
        *request.uri_mut() = origin.parse().map_err(|error| no_answer("uri")(&error))?;
        Ok(request)
    }

    fn sign(
        &self,
        request: &mut Request<()>,
        settings: SigningSettings,
        body: SignableBody<'static>,
    ) -> Result<(), NoAnswer> {
        let identity = self.inner.credentials.clone().into();
        let params = v4::SigningParams::builder()
            .identity(&identity)
            .region(&self.inner.region)
            .name("s3")
            .time(SystemTime::now())
            .settings(settings)
            .build()
            .map_err(|error| no_answer("sign")(&error))?
            .into();
        let headers: Vec<(String, String)> = request
            .headers()
            .iter()
            .filter(|(name, _)| *name != "content-length")
            .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect();
        let method = request.method().to_string();
        let uri = request.uri().to_string();
        let signable = SignableRequest::new(
            &method,
            &uri,
            headers.iter().map(|(name, value)| (name.as_str(), value.as_str())),
            body,
        )
        .map_err(|error| no_answer("sign")(&error))?;
        let (instructions, _) = sign(signable, &params).map_err(|error| no_answer("sign")(&error))?.into_parts();
        instructions.apply_to_request_http1x(request);
        Ok(())
    }
}

fn settings() -> SigningSettings {
    let mut settings = SigningSettings::default();
    settings.percent_encoding_mode = PercentEncodingMode::Single;
    settings.uri_path_normalization_mode = UriPathNormalizationMode::Disabled;
    settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
    settings
}

/// Path and query, percent-encoded as S3 signs them: everything but unreserved characters, slashes of the path kept.
pub fn uri(path: &str, query: &[(&str, &str)]) -> String {
    let mut uri = encode(path, true);
    for (place, (name, value)) in query.iter().enumerate() {
        uri.push(if place == 0 { '?' } else { '&' });
        uri.push_str(&encode(name, false));
        uri.push('=');
        uri.push_str(&encode(value, false));
    }
    uri
}

fn encode(text: &str, keep_slash: bool) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => encoded.push(byte as char),
            b'/' if keep_slash => encoded.push('/'),
            _ => {
                let _infallible = write!(encoded, "%{byte:02X}");
            }
        }
    }
    encoded
}
