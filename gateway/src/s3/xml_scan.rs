//! XML that its reader would misunderstand.

/// What s3s's reader of XML leaves out without a word: text in CDATA sections, and document types with what they
/// define. A key without a part of it is another key.
const LEFT_OUT: [&[u8]; 2] = [b"<![CDATA[", b"<!DOCTYPE"];

/// Longest of them.
const LONGEST: usize = 9;

/// Looks at an XML body as it passes.
#[derive(Default)]
pub(super) struct XmlScan {
    /// The last bytes seen: what is looked for may lie across two pieces.
    tail: Vec<u8>,
    found: bool,
}

impl XmlScan {
    /// Takes in a piece. True once something was seen that the reader would leave out.
    pub(super) fn see(&mut self, data: &[u8]) -> bool {
        self.tail.extend_from_slice(data);
        self.found |=
            LEFT_OUT.iter().any(|what| self.tail.windows(what.len()).any(|window| window.eq_ignore_ascii_case(what)));
        self.tail.drain(..self.tail.len().saturating_sub(LONGEST - 1));
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_seen_however_the_body_is_cut() {
        let seen = |text: &[u8], piece: usize| {
            let mut scan = XmlScan::default();
            text.chunks(piece).fold(false, |_, piece| scan.see(piece))
        };
        for text in [&b"<Key>a<![CDATA[b]]></Key>"[..], b"<!DOCTYPE x []><Delete/>", b"12345678901234567890<!doctype"] {
            for piece in 1..text.len() + 1 {
                assert!(seen(text, piece), "{} in pieces of {piece}", String::from_utf8_lossy(text));
            }
        }
        for text in [&b"<Key>CDATA[</Key><!-- a --><![CDAT A["[..], b"", b"<!DOC", b"DOCTYPE"] {
            for piece in 1..text.len() + 1 {
                assert!(!seen(text, piece), "{} in pieces of {piece}", String::from_utf8_lossy(text));
            }
        }
    }
}
