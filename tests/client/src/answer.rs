//! What comes back: an answer, or the reason why there is none.

use crate::{Client, Sender};
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;

/// Any failure before an answer arrived. An answer of any status is not a failure.
#[derive(Debug)]
pub struct NoAnswer(pub String);

impl std::fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no answer: {}", self.0)
    }
}

impl std::error::Error for NoAnswer {}

pub(crate) fn no_answer(what: &str) -> impl Fn(&dyn std::fmt::Display) -> NoAnswer + '_ {
    move |error| NoAnswer(format!("{what}: {error}"))
}

/// An answer, read whole.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
}

impl Answer {
    /// The `<Code>` of an S3 error, or nothing.
    pub fn code(&self) -> &str {
        let text = std::str::from_utf8(&self.body).unwrap_or("");
        between(text, "<Code>", "</Code>").unwrap_or("")
    }

    /// A header's text, or nothing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// All texts between `<tag>` and `</tag>`, unescaped.
    pub fn all(&self, tag: &str) -> Vec<String> {
        let text = self.text();
        let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
        let mut found = Vec::new();
        let mut rest = text.as_str();
        while let Some(at) = rest.find(&open) {
            rest = &rest[at + open.len()..];
            let Some(end) = rest.find(&close) else { break };
            found.push(unescape(&rest[..end]));
            rest = &rest[end..];
        }
        found
    }
}

fn between<'a>(text: &'a str, open: &str, close: &str) -> Option<&'a str> {
    let start = text.find(open)? + open.len();
    let end = text[start..].find(close)?;
    Some(&text[start..start + end])
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&apos;", "'")
        .replace("&#39;", "'")
        .replace("&amp;", "&")
}

/// An answer whose body is still to be read.
pub struct Streaming {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    pub(crate) body: Incoming,
    pub(crate) sender: Option<Sender>,
    pub(crate) client: Client,
}

impl Streaming {
    /// The next bytes; None at the end.
    ///
    /// # Errors
    /// The connection broke before the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, NoAnswer> {
        loop {
            match self.body.frame().await {
                None => {
                    if let Some(sender) = self.sender.take() {
                        self.client.give_back(sender);
                    }
                    return Ok(None);
                }
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Some(Err(error)) => return Err(NoAnswer(format!("body: {error}"))),
            }
        }
    }

    /// The rest of the body.
    ///
    /// # Errors
    /// The connection broke before the end.
    pub async fn read(mut self) -> Result<Answer, NoAnswer> {
        let mut body = Vec::new();
        while let Some(data) = self.next().await? {
            body.extend_from_slice(&data);
        }
        Ok(Answer { status: self.status, headers: self.headers.clone(), body: body.into() })
    }
}
