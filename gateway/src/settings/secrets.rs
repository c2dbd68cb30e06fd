//! Secrets: the keys of the root account and tokens. There are no default credentials: they come from the environment,
//! from a file, or are made fresh from the operating system.

use super::files::read_small;
use super::SettingsError;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;

/// Environment variable of the root account's access key.
pub const ROOT_ACCESS_KEY_VAR: &str = "GRANARY_ROOT_ACCESS_KEY";
/// Environment variable of the root account's secret key.
pub const ROOT_SECRET_KEY_VAR: &str = "GRANARY_ROOT_SECRET_KEY";

const MIN_ACCESS_KEY_CHARS: usize = 3;
const MIN_SECRET_KEY_CHARS: usize = 8;
const MAX_KEY_CHARS: usize = 128;

/// A secret in memory. `Debug` and logs show only that there is one.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps it.
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// The secret itself; the name is long so that a use stands out.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Compares in a time that depends on the lengths only.
    pub fn matches(&self, other: &str) -> bool {
        subtle::ConstantTimeEq::ct_eq(self.0.as_bytes(), other.as_bytes()).into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The key pair of the root account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootCredentials {
    /// Access key: 3 to 128 characters, no blanks.
    pub access_key: String,
    /// Secret key: 8 to 128 characters.
    pub secret_key: Secret,
}

impl RootCredentials {
    /// Checks both keys; `access_name` and `secret_name` say in the error where they came from.
    ///
    /// # Errors
    /// [`SettingsError::Invalid`]; never shows the secret.
    pub fn new(
        access_key: &str,
        secret_key: &str,
        access_name: &str,
        secret_name: &str,
    ) -> Result<RootCredentials, SettingsError> {
        check_key(access_key, access_name, MIN_ACCESS_KEY_CHARS)?;
        check_key(secret_key, secret_name, MIN_SECRET_KEY_CHARS)?;
        // A slash in the access key would make the credential scope of a signature ambiguous.
        if access_key.contains(['/', '=', ',']) {
            return Err(SettingsError::invalid(access_name, "must not contain `/`, `=` or `,`"));
        }
        Ok(RootCredentials { access_key: access_key.to_owned(), secret_key: Secret::new(secret_key) })
    }

    /// From the two environment variables; None when neither is set.
    ///
    /// # Errors
    /// One of them alone, or a bad value.
    pub fn from_env() -> Result<Option<RootCredentials>, SettingsError> {
        let value = |name: &str| match std::env::var(name) {
            Ok(value) => Ok(Some(value)),
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(std::env::VarError::NotUnicode(_)) => Err(SettingsError::invalid(name, "is not valid UTF-8")),
        };
        Self::from_values(value(ROOT_ACCESS_KEY_VAR)?, value(ROOT_SECRET_KEY_VAR)?)
    }

    fn from_values(access: Option<String>, secret: Option<String>) -> Result<Option<RootCredentials>, SettingsError> {
        match (access, secret) {
            (None, None) => Ok(None),
            (Some(access), Some(secret)) => {
                Self::new(&access, &secret, ROOT_ACCESS_KEY_VAR, ROOT_SECRET_KEY_VAR).map(Some)
            }
            (Some(_), None) => {
                Err(SettingsError::invalid(ROOT_SECRET_KEY_VAR, format!("must be set when {ROOT_ACCESS_KEY_VAR} is")))
            }
            (None, Some(_)) => {
                Err(SettingsError::invalid(ROOT_ACCESS_KEY_VAR, format!("must be set when {ROOT_SECRET_KEY_VAR} is")))
            }
        }
    }

    /// From a JSON file `{"access_key": .., "secret_key": ..}`.
    ///
    /// # Errors
    /// The file cannot be read, is no such JSON, or holds bad values.
    pub fn read_file(path: &Path) -> Result<RootCredentials, SettingsError> {
        let text = read_small(path)?;
        let read: RootCredentials = serde_json::from_slice(&text)
            .map_err(|error| SettingsError::invalid(path.display().to_string(), describe_json(&error)))?;
        let name = path.display();
        Self::new(
            &read.access_key,
            read.secret_key.reveal(),
            &format!("{name}: access_key"),
            &format!("{name}: secret_key"),
        )
    }

    /// A fresh pair: 20 and 40 characters from the operating system's randomness.
    ///
    /// # Errors
    /// [`SettingsError::Random`].
    pub fn generate() -> Result<RootCredentials, SettingsError> {
        let access_key = format!("GR{}", random_text(18, b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")?);
        let secret_key =
            Secret::new(random_text(40, b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")?);
        Ok(RootCredentials { access_key, secret_key })
    }

    /// The JSON that [`RootCredentials::read_file`] reads.
    pub fn to_json(&self) -> String {
        format!("{}\n", serde_json::json!({ "access_key": self.access_key, "secret_key": self.secret_key.reveal() }))
    }
}

/// Only the place and the kind: serde's own text may quote what it read, and that may be a secret.
fn describe_json(error: &serde_json::Error) -> String {
    format!("not a JSON object with access_key and secret_key (line {}, column {})", error.line(), error.column())
}

fn check_key(key: &str, name: &str, min_chars: usize) -> Result<(), SettingsError> {
    let chars = key.chars().count();
    if chars < min_chars {
        return Err(SettingsError::invalid(name, format!("must have at least {min_chars} characters, it has {chars}")));
    }
    if chars > MAX_KEY_CHARS {
        return Err(SettingsError::invalid(
            name,
            format!("must have at most {MAX_KEY_CHARS} characters, it has {chars}"),
        ));
    }
    if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(SettingsError::invalid(name, "must be printable ASCII without blanks"));
    }
    Ok(())
}

/// `chars` characters drawn evenly from `alphabet`, whose length must divide 256.
fn random_text(chars: usize, alphabet: &[u8]) -> Result<String, SettingsError> {
    let mut bytes = vec![0u8; chars];
    getrandom::fill(&mut bytes).map_err(SettingsError::Random)?;
    Ok(bytes
        .iter()
        .filter_map(|byte| alphabet.get(usize::from(*byte) % alphabet.len()))
        .map(|byte| char::from(*byte))
        .collect())
}

/// 256 random bits as 64 hex digits: the admin token.
///
/// # Errors
/// [`SettingsError::Random`].
pub fn random_token() -> Result<String, SettingsError> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).map_err(SettingsError::Random)?;
    Ok(hex::encode(bytes))
}

/// A token from a file, blanks at its end cut off.
///
/// # Errors
/// The file cannot be read or holds fewer than 32 characters.
pub fn read_token(path: &Path) -> Result<Secret, SettingsError> {
    let bytes = read_small(path)?;
    let text = std::str::from_utf8(&bytes).unwrap_or_default().trim();
    if text.len() < 32 || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(SettingsError::invalid(
            path.display().to_string(),
            "must hold a token of at least 32 printable characters",
        ));
    }
    Ok(Secret::new(text))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::super::files::write_atomic;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn bad_root_credentials_are_refused_by_name_and_without_showing_the_secret() {
        let bad = [
            (Some("ab"), Some("long-enough-secret"), ROOT_ACCESS_KEY_VAR, "at least 3"),
            (Some("abc"), Some("hunter2"), ROOT_SECRET_KEY_VAR, "at least 8"),
            (Some("abc"), None, ROOT_SECRET_KEY_VAR, "must be set"),
            (None, Some("long-enough-secret"), ROOT_ACCESS_KEY_VAR, "must be set"),
            (Some("a c d"), Some("long-enough-secret"), ROOT_ACCESS_KEY_VAR, "without blanks"),
            (Some("abc/def"), Some("long-enough-secret"), ROOT_ACCESS_KEY_VAR, "must not contain"),
            (Some(""), Some(""), ROOT_ACCESS_KEY_VAR, "at least 3"),
        ];
        for (access, secret, name, why) in bad {
            let error = RootCredentials::from_values(access.map(str::to_owned), secret.map(str::to_owned))
                .unwrap_err()
                .to_string();
            assert!(error.contains(name) && error.contains(why), "{access:?}: {error}");
            assert!(!error.contains("hunter2") && !error.contains("long-enough"), "{error}");
        }
        assert_eq!(RootCredentials::from_values(None, None).unwrap(), None);
        assert!(RootCredentials::from_values(Some("abc".into()), Some("12345678".into())).unwrap().is_some());
    }

    #[test]
    fn fresh_credentials_differ_come_back_from_their_file_and_stay_out_of_debug() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("root-credentials");
        let made = RootCredentials::generate().unwrap();
        assert_ne!(made, RootCredentials::generate().unwrap());
        write_atomic(&path, made.to_json().as_bytes(), 0o600).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(RootCredentials::read_file(&path).unwrap(), made);
        assert!(!format!("{made:?}").contains(made.secret_key.reveal()));

        std::fs::write(&path, r#"{"access_key":"abc","secret_key":"super-secret-value","x":"super-secret-value"}"#)
            .unwrap();
        let error = RootCredentials::read_file(&path).unwrap_err().to_string();
        assert!(error.contains("root-credentials") && !error.contains("super-secret"), "{error}");
    }
}
