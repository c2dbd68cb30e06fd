//! All settings in one table: name, default, bounds, scope, meaning. Nothing else in Granary knows a default.
//!
//! - [`table`]: the settings themselves;
//! - this file: one setting, its value as text and back, and what is said about a wrong name or value;
//! - [`values`]: what an operator gave, from the command line, the environment, a file or the root shard.
//!
//! ```
//! use granary_placement::settings::{find, Value};
//! use std::time::Duration;
//!
//! let setting = find("heal.interval").unwrap();
//! assert_eq!(setting.parse("90s").unwrap(), Value::Time(Duration::from_secs(90)));
//! assert_eq!(
//!     find("heal.intervall").unwrap_err().to_string(),
//!     "there is no setting `heal.intervall`; did you mean `heal.interval`?"
//! );
//! ```

pub mod table;
pub mod values;

pub use table::TABLE;
pub use values::{Layers, LoadError, Program, Row, Source, Values};

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

/// Longest text that is taken for a value, in bytes.
pub const MAX_VALUE_BYTES: usize = 1024;

/// One setting.
#[derive(Debug, PartialEq)]
pub struct Setting {
    /// `section.name`, lower case. Settings of the section `node` are read by disk nodes, all others by gateways.
    pub name: &'static str,
    /// What it is when nobody says otherwise.
    pub default: Value,
    /// What it may be.
    pub kind: Kind,
    /// For whom it holds.
    pub scope: Scope,
    /// What it does, in a sentence or two.
    pub meaning: &'static str,
}

/// For whom a setting holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// One value for the whole cluster, kept in the root shard: `granary config set`.
    Cluster,
    /// Each process has its own: `--set`, environment, file.
    Process,
}

/// Form and bounds of a value; both ends are allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A length of time.
    Time(Duration, Duration),
    /// A number of bytes.
    Bytes(u64, u64),
    /// Bytes per second.
    BytesPerSecond(u64, u64),
    /// A number of things.
    Count(u64, u64),
    /// A part of a hundred.
    Percent(u64, u64),
    /// Yes or no.
    Flag,
    /// Printable characters, at most so many bytes.
    Text(usize),
}

/// A value that fits its setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// The program works it out. Only where the default says so.
    Auto,
    /// Of [`Kind::Time`].
    Time(Duration),
    /// Of [`Kind::Bytes`], [`Kind::BytesPerSecond`], [`Kind::Count`] and [`Kind::Percent`].
    Number(u64),
    /// Of [`Kind::Flag`].
    Flag(bool),
    /// Of [`Kind::Text`].
    Text(Cow<'static, str>),
}

/// A name or value that makes no sense. The text says what would.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// No setting has that name.
    #[error("there is no setting `{name}`; {}", hint(.nearest))]
    Unknown {
        /// The name given, cut to a bearable length.
        name: String,
        /// The setting that was probably meant.
        nearest: Option<&'static str>,
    },
    /// A value that the setting cannot have.
    #[error("`{name}` cannot be `{given}`: it is {expected}")]
    Value {
        /// Which setting.
        name: &'static str,
        /// The value given, cut to a bearable length.
        given: String,
        /// What it can be.
        expected: String,
    },
}

fn hint(nearest: &Option<&'static str>) -> String {
    match nearest {
        Some(name) => format!("did you mean `{name}`?"),
        None => "`granary config` lists all".to_owned(),
    }
}

/// The setting of that name.
///
/// # Errors
/// [`SettingError::Unknown`] with the nearest name there is, if any is near.
pub fn find(name: &str) -> Result<&'static Setting, SettingError> {
    TABLE
        .iter()
        .find(|setting| setting.name == name)
        .ok_or_else(|| SettingError::Unknown { name: cut(name), nearest: nearest(name) })
}

/// Checks a value that somebody wants to give to a setting of the whole cluster.
///
/// # Errors
/// No such setting, or it cannot have this value.
pub fn check(name: &str, value: &str) -> Result<(&'static Setting, Value), SettingError> {
    let setting = find(name)?;
    Ok((setting, setting.parse(value)?))
}

/// The name that was probably meant: few slips away, counted over the whole name or over what follows the section.
fn nearest(name: &str) -> Option<&'static str> {
    if name.len() > MAX_VALUE_BYTES {
        return None;
    }
    let name = name.to_ascii_lowercase().replace(['-', ' '], "_");
    let slips = |setting: &Setting| {
        let bare = setting.name.split_once('.').map_or(setting.name, |(_, bare)| bare);
        strsim::damerau_levenshtein(&name, setting.name).min(strsim::damerau_levenshtein(&name, bare))
    };
    let (slips, setting) = TABLE.iter().map(|setting| (slips(setting), setting)).min_by_key(|(slips, _)| *slips)?;
    (slips <= 2.max(name.len() / 4)).then_some(setting.name)
}

/// For messages: text from outside, at most 80 characters of it, without control characters.
fn cut(text: &str) -> String {
    text.chars().take(80).map(|char| if char.is_control() { '\u{fffd}' } else { char }).collect()
}

const TIMES: &[(&str, u64)] = &[("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1_000), ("ms", 1)];
const SIZES: &[(&str, u64)] = &[("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// A number and its unit, if both stand there.
fn split_unit(text: &str) -> Option<(u64, &str)> {
    let end = text.find(|char: char| !char.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit.trim_start()))
}

fn parse_with(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let (number, unit) = split_unit(text)?;
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.checked_mul(*factor)
}

/// The number in the largest unit that leaves no rest.
fn render_with(number: u64, units: &[(&str, u64)]) -> String {
    let unit = units.iter().find(|(_, factor)| number != 0 && number.is_multiple_of(*factor));
    match unit.or(units.last()) {
        Some((name, factor)) => format!("{}{name}", number / factor),
        None => number.to_string(),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Kind {
    /// Word for the unit, for lists.
    pub fn unit(self) -> &'static str {
        match self {
            Kind::Time(..) => "time",
            Kind::Bytes(..) => "bytes",
            Kind::BytesPerSecond(..) => "bytes per second",
            Kind::Count(..) => "number",
            Kind::Percent(..) => "percent",
            Kind::Flag => "true or false",
            Kind::Text(_) => "text",
        }
    }

    fn parse(self, text: &str) -> Option<Value> {
        let within = |low: u64, high: u64, number: u64| (low..=high).contains(&number).then_some(Value::Number(number));
        match self {
            Kind::Time(low, high) => {
                let time = Duration::from_millis(parse_with(text, TIMES)?);
                (low..=high).contains(&time).then_some(Value::Time(time))
            }
            Kind::Bytes(low, high) => within(low, high, parse_with(text, SIZES).or_else(|| text.parse().ok())?),
            Kind::BytesPerSecond(low, high) => {
                let size = text.strip_suffix("/s").unwrap_or(text);
                within(low, high, parse_with(size, SIZES).or_else(|| size.parse().ok())?)
            }
            Kind::Count(low, high) => within(low, high, text.parse().ok()?),
            Kind::Percent(low, high) => within(low, high, text.trim_end_matches('%').parse().ok()?),
            Kind::Flag => match text {
                "true" | "yes" | "on" => Some(Value::Flag(true)),
                "false" | "no" | "off" => Some(Value::Flag(false)),
                _ => None,
            },
            Kind::Text(most) => (text.len() <= most && !text.chars().any(char::is_control))
                .then(|| Value::Text(Cow::Owned(text.to_owned()))),
        }
    }

    fn render_number(self, number: u64) -> String {
        match self {
            Kind::Bytes(..) => render_with(number, SIZES),
            Kind::BytesPerSecond(..) => format!("{}/s", render_with(number, SIZES)),
            Kind::Percent(..) => format!("{number}%"),
            _ => number.to_string(),
        }
    }
}

/// What a value can be, in words: `a time from 10ms to 1h, such as 2s`.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |number: u64| self.render_number(number);
        match *self {
            Kind::Time(low, high) => {
                let time = |time| render_with(millis(time), TIMES);
                write!(f, "a time from {} to {}, with its unit: ms, s, min, h or d", time(low), time(high))
            }
            Kind::Bytes(low, high) => {
                write!(f, "a size from {} to {}, such as 512 or 64MiB", number(low), number(high))
            }
            Kind::BytesPerSecond(low, high) => {
                write!(f, "bytes per second from {} to {}, such as 64MiB/s", number(low), number(high))
            }
            Kind::Count(low, high) => write!(f, "a number from {low} to {high}"),
            Kind::Percent(low, high) => write!(f, "a percentage from {low}% to {high}%"),
            Kind::Flag => f.write_str("true or false"),
            Kind::Text(most) => write!(f, "text of at most {most} bytes without control characters"),
        }
    }
}

impl Setting {
    /// The value that this text means.
    ///
    /// # Errors
    /// [`SettingError::Value`].
    pub fn parse(&self, text: &str) -> Result<Value, SettingError> {
        let text = text.trim();
        if self.default == Value::Auto && text == "auto" {
            return Ok(Value::Auto);
        }
        let value = if text.len() > MAX_VALUE_BYTES { None } else { self.kind.parse(text) };
        value.ok_or_else(|| {
            let or_auto = if self.default == Value::Auto { "auto, or " } else { "" };
            SettingError::Value { name: self.name, given: cut(text), expected: format!("{or_auto}{}", self.kind) }
        })
    }

    /// A value as the text that [`Setting::parse`] reads.
    pub fn render(&self, value: &Value) -> String {
        match value {
            Value::Auto => "auto".to_owned(),
            Value::Time(time) => render_with(millis(*time), TIMES),
            Value::Number(number) => self.kind.render_number(*number),
            Value::Flag(flag) => flag.to_string(),
            Value::Text(text) => text.clone().into_owned(),
        }
    }

    /// What comes before the point.
    pub fn section(&self) -> &'static str {
        self.name.split_once('.').map_or(self.name, |(section, _)| section)
    }

    /// The environment variable: `GRANARY_HEAL_INTERVAL`.
    pub fn variable(&self) -> String {
        format!("{}{}", values::VARIABLE_PREFIX, self.name.replace('.', "_").to_ascii_uppercase())
    }

    /// Do disk nodes read it? If not, gateways do.
    pub fn is_for_disk_nodes(&self) -> bool {
        self.section() == "node"
    }
}

impl Scope {
    /// Word for lists.
    pub fn name(self) -> &'static str {
        match self {
            Scope::Cluster => "cluster",
            Scope::Process => "process",
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use std::collections::BTreeSet;

    fn scene(kind: Kind, default: Value) -> Setting {
        Setting { name: "scene.name", default, kind, scope: Scope::Process, meaning: "" }
    }

    #[test]
    fn the_table_is_sound() {
        let names: BTreeSet<&str> = TABLE.iter().map(|setting| setting.name).collect();
        assert_eq!(names.len(), TABLE.len(), "two settings of one name");
        let variables: BTreeSet<String> = TABLE.iter().map(Setting::variable).collect();
        assert_eq!(variables.len(), TABLE.len(), "two settings of one variable");
        for setting in TABLE {
            let parts: Vec<&str> = setting.name.split('.').collect();
            let word = |part: &&str| {
                !part.is_empty()
                    && part.bytes().all(|byte| byte == b'_' || byte.is_ascii_lowercase() || byte.is_ascii_digit())
            };
            assert!(parts.len() == 2 && parts.iter().all(word), "{}", setting.name);
            assert!(!setting.meaning.is_empty() && !setting.meaning.contains('|'), "{}", setting.name);
            // The default is within its own bounds, and what is shown for it can be given back.
            let shown = setting.render(&setting.default);
            assert_eq!(setting.parse(&shown).as_ref(), Ok(&setting.default), "{} = {shown}", setting.name);
        }
    }

    #[test]
    fn values_are_read_with_their_units_and_shown_in_the_largest_that_fits() {
        let hour = Duration::from_secs(3600);
        let time = scene(Kind::Time(Duration::ZERO, hour), Value::Time(hour));
        for (text, ms, shown) in [
            ("15s", 15_000, "15s"),
            ("10min", 600_000, "10min"),
            ("90 s", 90_000, "90s"),
            (" 60s ", 60_000, "1min"),
            ("1h", 3_600_000, "1h"),
            ("0ms", 0, "0ms"),
            ("1500ms", 1500, "1500ms"),
        ] {
            let value = time.parse(text).unwrap();
            assert_eq!(value, Value::Time(Duration::from_millis(ms)), "{text}");
            assert_eq!(time.render(&value), shown);
        }
        let size = scene(Kind::Bytes(0, 1 << 40), Value::Auto);
        for (text, value, shown) in [
            ("64MiB", Value::Number(64 << 20), "64MiB"),
            ("512", Value::Number(512), "512B"),
            ("1024 KiB", Value::Number(1 << 20), "1MiB"),
            ("auto", Value::Auto, "auto"),
            ("0", Value::Number(0), "0B"),
        ] {
            assert_eq!(size.parse(text).as_ref(), Ok(&value), "{text}");
            assert_eq!(size.render(&value), shown);
        }
        let rate = scene(Kind::BytesPerSecond(0, 1 << 40), Value::Number(0));
        assert_eq!(rate.parse("64MiB/s"), rate.parse("64MiB"));
        assert_eq!(rate.render(&rate.parse("64MiB").unwrap()), "64MiB/s");
        let flag = scene(Kind::Flag, Value::Flag(false));
        assert_eq!((flag.parse("true"), flag.parse("no")), (Ok(Value::Flag(true)), Ok(Value::Flag(false))));
        let text = scene(Kind::Text(5), Value::Text("".into()));
        assert_eq!(text.parse("abcde"), Ok(Value::Text("abcde".into())));
    }

    #[test]
    fn a_wrong_value_is_refused_with_what_would_be_right() {
        let minute = Duration::from_secs(60);
        let time = scene(Kind::Time(Duration::from_millis(10), minute), Value::Time(minute));
        for text in ["", "5", "5x", "-5s", "1.5s", "2min", "9ms", "s", "99999999999999999999s", "18446744073709551615d"]
        {
            let error = time.parse(text).unwrap_err().to_string();
            assert!(error.contains("a time from 10ms to 1min, with its unit"), "{text}: {error}");
        }
        let size = scene(Kind::Bytes(1024, 1 << 30), Value::Number(1024));
        for text in ["64MB", "1023", "2GiB", "auto", "lots", "18446744073709551615TiB"] {
            let error = size.parse(text).unwrap_err().to_string();
            assert!(error.contains("a size from 1KiB to 1GiB, such as 512 or 64MiB"), "{text}: {error}");
        }
        let count = scene(Kind::Count(1, 8), Value::Number(1));
        assert_eq!(count.parse("0").unwrap_err().to_string(), "`scene.name` cannot be `0`: it is a number from 1 to 8");
        assert!(scene(Kind::Flag, Value::Flag(true)).parse("maybe").is_err());
        assert!(scene(Kind::Percent(0, 100), Value::Number(1)).parse("101").is_err());
        assert!(scene(Kind::Text(5), Value::Text("".into())).parse("abcdef").is_err());
        assert!(scene(Kind::Text(5), Value::Text("".into())).parse("a\nb").is_err());
        // What is said stays short and printable.
        let error = count.parse(&"\u{1b}9".repeat(100_000)).unwrap_err().to_string();
        assert!(error.len() < 400 && !error.contains('\u{1b}'), "{error}");
    }

    #[test]
    fn a_wrong_name_is_answered_with_the_nearest_right_one() {
        for (given, meant) in [
            ("heal.intervall", Some("heal.interval")),
            ("heal_interval", Some("heal.interval")),
            ("HEAL.INTERVAL", Some("heal.interval")),
            ("garbage_grace", Some("heal.garbage_grace")),
            ("heal.extents-at-once", Some("heal.extents_at_once")),
            ("object.hedge_percnt", Some("object.hedge_percent")),
            ("colour", None),
            ("", None),
        ] {
            match find(given) {
                Err(SettingError::Unknown { nearest, .. }) => assert_eq!(nearest, meant, "{given}"),
                other => panic!("{given}: {other:?}"),
            }
        }
        assert!(find(&"x".repeat(1_000_000)).unwrap_err().to_string().len() < 200);
    }
}
