//! Keeps secrets out of everything that leaves the process as text: log lines, errors, panics, summaries, rows.
//!
//! Two things are hidden, with an asterisk for every byte, so that offsets stay valid and lines stay lines:
//!
//! - **Known secrets**: the values of the variables by which the clouds' credentials come ([`learn`]), by exact value, however the
//!   text around them is encoded (percent signs, backslashes, both, twice).
//! - **What looks like one**: user parts and queries of URLs, signatures, tokens and account keys after their usual names.
//!
//! What is written knows nothing of this; it passes through [`redact`] (or [`redact_line`], which keeps JSON valid) where text leaves.
//! A line without anything to hide is scanned twice and not copied.

use std::borrow::Cow;
use std::ffi::OsString;
use std::io::Write;
use std::ops::Range;
use std::sync::{LazyLock, OnceLock};

use aho_corasick::{AhoCorasick, MatchKind};
use object_store::aws::AmazonS3ConfigKey;
use object_store::azure::AzureConfigKey;
use object_store::gcp::GoogleConfigKey;
use serde_json::Value;

/// Shorter values are not hidden: they would hide words that are no secrets, and no cloud hands out such keys.
const MIN_SECRET_BYTES: usize = 8;

/// Settings of the stores' clients that are secrets, by the names that the clients give them. Each may be set by several variables.
const SECRET_SETTINGS: [&str; 11] = [
    "aws_secret_access_key",
    "aws_session_token",
    "aws_sse_customer_key_base64",
    "azure_storage_account_key",
    "azure_storage_client_secret",
    "azure_storage_sas_key",
    "azure_storage_token",
    "azure_storage_encryption_key",
    "azure_fabric_session_token",
    "google_service_account_key",
    "google_bearer_token",
];

/// Variables with secrets that the clients read by other ways, or that the clouds' own tools read beside us.
const OTHER_SECRET_VARIABLES: [&str; 7] = [
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AZURE_CLIENT_CERTIFICATE_PASSWORD",
    "AZURE_PASSWORD",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_KEY",
    "IDENTITY_HEADER",
    crate::lineage::API_KEY_VARIABLE,
];

/// Members of a JSON document of credentials (a Google service account, an authorized user) that are secrets by themselves.
const SECRET_MEMBERS: [&str; 5] = ["private_key", "private_key_id", "client_secret", "refresh_token", "access_token"];

/// Names after which a secret stands, in any case, with the sign between: parameters of presigned URLs, headers, connection strings.
/// What ends so (`X-Amz-Signature=`, `X-Goog-Credential=`) is meant too.
const SECRET_NAMES: [&str; 14] = [
    "sig=",
    "signature=",
    "credential=",
    "x-amz-security-token=",
    "x-amz-security-token:",
    "accountkey=",
    "sharedaccesskey=",
    "sharedaccesssignature=",
    "access_token=",
    "refresh_token=",
    "client_secret=",
    "client_assertion=",
    "authorization: basic",
    "bearer ",
];

/// Schemes whose user part names a container, as in `abfss://container@account.dfs.core.windows.net/path`.
pub(crate) const CONTAINER_SCHEMES: [&str; 3] = ["az", "abfs", "abfss"];

/// Levels of encoding that are taken off: a log line in JSON that quotes JSON, a URL within a URL.
const MAX_LEVELS: usize = 2;

/// What the process has learned; without it, only what looks like a secret is hidden.
static LEARNED: OnceLock<Redactor> = OnceLock::new();

/// Learns the secrets of the process's environment, once, before anything is said.
pub fn learn(variables: impl IntoIterator<Item = (OsString, OsString)>) {
    let secrets = variables.into_iter().filter_map(|(name, value)| {
        // The clients of the stores skip variables that are not Unicode, too.
        is_secret_variable(name.to_str()?).then(|| value.into_string().ok()).flatten()
    });
    // Whoever comes second (a test in the same process) has the same environment.
    let _ = LEARNED.set(Redactor::new(secrets));
}

/// `text` with asterisks over everything that may be a secret, byte for byte.
pub fn redact(text: &str) -> Cow<'_, str> {
    redactor().redact(text)
}

/// The same for a line of output, which, if it is JSON, stays JSON.
pub fn redact_line(line: &str) -> Cow<'_, str> {
    redactor().redact_line(line)
}

/// Writes what passes through it redacted. Each call of `write` must bring whole lines, as the log does: a secret in two halves would
/// pass.
#[derive(Debug)]
pub struct Redacting<W>(pub W);

impl<W: Write> Write for Redacting<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write_all(redact_line(&String::from_utf8_lossy(bytes)).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

/// Puts asterisks over `range`, which lies on character boundaries. Lines stay lines.
pub(crate) fn hide(text: &mut String, range: Range<usize>) {
    let asterisks = asterisks(&text[range.clone()]);
    text.replace_range(range, &asterisks);
}

fn redactor() -> &'static Redactor {
    static UNLEARNED: LazyLock<Redactor> = LazyLock::new(|| Redactor::new([]));
    LEARNED.get().unwrap_or_else(|| &UNLEARNED)
}

/// Whether a variable holds a secret.
fn is_secret_variable(name: &str) -> bool {
    let is = |setting: &str| SECRET_SETTINGS.contains(&setting);
    let key = name.to_ascii_lowercase();
    let setting = match name.split_once('_') {
        Some(("AWS", _)) => key.parse().is_ok_and(|key: AmazonS3ConfigKey| is(key.as_ref())),
        Some(("AZURE", _)) => key.parse().is_ok_and(|key: AzureConfigKey| is(key.as_ref())),
        Some(("GOOGLE", _)) => key.parse().is_ok_and(|key: GoogleConfigKey| is(key.as_ref())),
        _ => false,
    };
    setting || OTHER_SECRET_VARIABLES.contains(&name)
}

/// Finds secrets: the known ones by value, others by their looks.
#[derive(Debug)]
struct Redactor {
    /// The known values; `None` where there are none.
    values: Option<AhoCorasick>,
    names: AhoCorasick,
}

impl Redactor {
    fn new(secrets: impl IntoIterator<Item = String>) -> Self {
        let mut values: Vec<String> = secrets.into_iter().flat_map(|secret| parts(&secret)).collect();
        values.retain(|value| value.len() >= MIN_SECRET_BYTES);
        values.sort_unstable();
        values.dedup();
        let build = |patterns: &[String], ignore_case| {
            AhoCorasick::builder().match_kind(MatchKind::Standard).ascii_case_insensitive(ignore_case).build(patterns)
        };
        // Building fails where the patterns are gigabytes; an environment is not that large.
        let values = if values.is_empty() { None } else { build(&values, false).ok() };
        let names = SECRET_NAMES.map(str::to_owned);
        #[expect(clippy::expect_used, reason = "the names are constants, and a test builds them")]
        let names = build(&names, true).expect("a few short names make an automaton");
        Self { values, names }
    }

    fn redact<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut found = self.find(text);
        if found.is_empty() {
            return Cow::Borrowed(text);
        }
        found.sort_unstable_by_key(|range| (range.start, range.end));
        let mut shown = String::with_capacity(text.len());
        let mut done = 0;
        for range in found {
            let start = range.start.max(done);
            let end = range.end.max(done);
            shown.push_str(&text[done..start]);
            shown.push_str(&asterisks(&text[start..end]));
            done = end;
        }
        shown.push_str(&text[done..]);
        Cow::Owned(shown)
    }

    fn redact_line<'a>(&self, line: &'a str) -> Cow<'a, str> {
        let shown = self.redact(line);
        if matches!(shown, Cow::Borrowed(_)) || !line.trim_start().starts_with(['{', '[']) {
            return shown;
        }
        let Ok(mut value) = serde_json::from_str::<Value>(line) else { return shown };
        self.redact_json(&mut value);
        let ending = &line[line.trim_end().len()..];
        Cow::Owned(format!("{value}{ending}"))
    }

    fn redact_json(&self, value: &mut Value) {
        match value {
            Value::String(text) => {
                if let Cow::Owned(shown) = self.redact(text) {
                    *text = shown;
                }
            }
            Value::Array(values) => values.iter_mut().for_each(|value| self.redact_json(value)),
            Value::Object(members) => {
                *members = std::mem::take(members)
                    .into_iter()
                    .map(|(name, mut value)| {
                        self.redact_json(&mut value);
                        (self.redact(&name).into_owned(), value)
                    })
                    .collect();
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// Byte ranges of `text` to hide, in no order; they may overlap.
    fn find(&self, text: &str) -> Vec<Range<usize>> {
        let mut found = self.find_as_written(text);
        let mut quoted = if text.contains('\\') { unescape(text) } else { None };
        for _ in 0..MAX_LEVELS {
            let Some(view) = quoted else { break };
            found.extend(self.find_as_written(&view.text).into_iter().map(|range| view.origin(range)));
            quoted = unescape(&view.text).map(|inner| inner.within(&view));
        }
        found
    }

    /// The same for a text without backslashes, or one in which they mean nothing.
    fn find_as_written(&self, text: &str) -> Vec<Range<usize>> {
        let mut found = urls(text);
        found.extend(self.named(text));
        let Some(values) = &self.values else { return found };
        found.extend(values.find_overlapping_iter(text).map(|value| value.range()));
        let mut encoded = if text.contains('%') { percent_decode(text) } else { None };
        for _ in 0..MAX_LEVELS {
            let Some(view) = encoded else { break };
            found.extend(values.find_overlapping_iter(&view.text).map(|value| view.origin(value.range())));
            encoded = percent_decode(&view.text).map(|inner| inner.within(&view));
        }
        found
    }

    /// Secrets after their usual names.
    fn named(&self, text: &str) -> impl Iterator<Item = Range<usize>> {
        self.names.find_overlapping_iter(text).filter_map(|name| {
            // `design=` is not `sign=`.
            let before = text[..name.start()].bytes().next_back();
            if before.is_some_and(|before| before.is_ascii_alphanumeric() || before == b'_') {
                return None;
            }
            let rest = &text[name.end()..];
            let start = text.len() - rest.trim_start_matches([' ', '"', '\'', '\\']).len();
            let ends =
                |c: char| c.is_whitespace() || matches!(c, '&' | '"' | '\'' | '<' | '>' | ',' | ';' | ')' | '\\');
            let length = text[start..].find(ends).unwrap_or(text.len() - start);
            (length >= MIN_SECRET_BYTES).then_some(start..start + length)
        })
    }
}

/// The texts that give a secret away: itself, the lines of a key, the secret members of a JSON document, the signature of a token.
fn parts(secret: &str) -> Vec<String> {
    let secret = secret.trim();
    let mut parts = vec![secret.to_owned()];
    if let Ok(Value::Object(members)) = serde_json::from_str(secret) {
        let members = SECRET_MEMBERS.iter().filter_map(|name| members.get(*name)?.as_str());
        parts.extend(members.flat_map(lines));
    } else {
        parts.extend(lines(secret));
    }
    // A shared access signature or a connection string: the value that signs, as it is written and as it is meant.
    let mut named = Vec::new();
    for part in secret.split(['&', ';', '?']) {
        if let Some((name, value)) = part.split_once('=')
            && SECRET_NAMES.contains(&format!("{}=", name.to_ascii_lowercase()).as_str())
        {
            named.push(value.to_owned());
        }
    }
    parts.extend(named);
    let decoded: Vec<String> = parts.iter().filter_map(|part| Some(percent_decode(part)?.text)).collect();
    parts.extend(decoded);
    // The views of a text decode ASCII alone, so other letters are also looked for as URLs have them.
    let others = parts.iter().filter(|part| !part.is_ascii());
    let others: Vec<String> =
        others.map(|part| percent_encoding::utf8_percent_encode(part, NOT_ASCII).to_string()).collect();
    parts.extend(others);
    parts
}

/// Encodes what is not ASCII, and nothing else.
const NOT_ASCII: &percent_encoding::AsciiSet = &percent_encoding::AsciiSet::EMPTY;

/// A key of several lines, whole and line by line, without the lines that all keys have (`-----BEGIN PRIVATE KEY-----`).
fn lines(secret: &str) -> Vec<String> {
    let lines = secret.lines().map(str::trim).filter(|line| !line.starts_with("-----"));
    std::iter::once(secret.trim()).chain(lines).map(str::to_owned).collect()
}

/// Byte ranges of the user parts and queries of all URLs in `text`.
fn urls(text: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    for (at, separator) in text.match_indices("://") {
        let start = at + separator.len();
        let rest = &text[start..];
        let end = rest.find(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '<' | '>')).unwrap_or(rest.len());
        // A backslash there belongs to the quotation mark after it.
        let end = if rest[end..].starts_with('"') { rest[..end].trim_end_matches('\\').len() } else { end };
        let secrets = secrets(scheme_before(text, at), &rest[..end]);
        found.extend(secrets.into_iter().map(|secret| start + secret.start..start + secret.end));
    }
    found
}

/// The scheme that ends at byte `at` of `text`.
fn scheme_before(text: &str, at: usize) -> &str {
    let before = &text[..at];
    let start = before
        .rfind(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.')))
        .map_or(0, |index| index + before[index..].chars().next().map_or(0, char::len_utf8));
    &before[start..]
}

/// Byte ranges of the user part and the query in what follows `scheme://`.
fn secrets(scheme: &str, after_scheme: &str) -> Vec<Range<usize>> {
    let user = user_part(scheme, after_scheme);
    let from = user.as_ref().map_or(0, |user| user.end);
    let query = after_scheme[from..].find('?').map(|at| from + at + 1..after_scheme.len());
    user.into_iter().chain(query).collect()
}

/// Byte range of the user name and password, if any, in what follows `scheme://`.
///
/// Cloud keys contain slashes, which end the authority in the eyes of a URL parser: `s3://KEY:abc/def@bucket`. What
/// follows the colon is then no port, and the secret reaches to the last `@`.
pub(crate) fn user_part(scheme: &str, after_scheme: &str) -> Option<Range<usize>> {
    let scheme = scheme.to_ascii_lowercase();
    let authority_end = after_scheme.find(['/', '?', '#']).unwrap_or(after_scheme.len());
    let authority = &after_scheme[..authority_end];
    if let Some(at) = authority.rfind('@') {
        let names_container = CONTAINER_SCHEMES.contains(&scheme.as_str());
        let is_container = names_container && !authority[..at].contains(':');
        return (!is_container).then_some(0..at);
    }
    let (_, port) = authority.split_once(':')?;
    let is_port = matches!(scheme.as_str(), "http" | "https")
        && !port.is_empty()
        && port.bytes().all(|byte| byte.is_ascii_digit());
    if is_port {
        return None;
    }
    after_scheme.rfind('@').map(|at| 0..at)
}

fn asterisks(text: &str) -> String {
    text.bytes().map(|byte| if byte == b'\n' { '\n' } else { '*' }).collect()
}

/// What an encoded text means, and where each byte of it came from.
struct View {
    text: String,
    /// Where in the encoded text each byte begins, and, last, its length.
    origins: Vec<usize>,
}

impl View {
    fn push(&mut self, c: char, origin: usize) {
        self.text.push(c);
        self.origins.extend(std::iter::repeat_n(origin, c.len_utf8()));
    }

    /// The bytes of the encoded text behind a range of the decoded one.
    fn origin(&self, range: Range<usize>) -> Range<usize> {
        self.origins[range.start]..self.origins[range.end]
    }

    /// The same view, decoded from the text of `outer`, with origins in the text that `outer` was decoded from.
    fn within(mut self, outer: &Self) -> Self {
        self.origins.iter_mut().for_each(|origin| *origin = outer.origins[*origin]);
        self
    }
}

/// Decodes `text` with `escape`, which says what an escape sequence at the start of a text stands for, and its length. `None`: there is
/// no escape sequence.
fn decode(text: &str, sign: char, escape: impl Fn(&str) -> Option<(char, usize)>) -> Option<View> {
    let mut view = View { text: String::with_capacity(text.len()), origins: Vec::with_capacity(text.len() + 1) };
    let mut rest = text;
    let mut any = false;
    while let Some(next) = rest.chars().next() {
        let at = text.len() - rest.len();
        let decoded = if next == sign { escape(rest) } else { None };
        any |= decoded.is_some();
        let (decoded, length) = decoded.unwrap_or((next, next.len_utf8()));
        view.push(decoded, at);
        rest = &rest[length..];
    }
    view.origins.push(text.len());
    any.then_some(view)
}

/// Takes off the escapes of JSON and of Rust's debug format: `\n`, `\"`, `\/`, `\u00e9`, `\u{e9}`.
fn unescape(text: &str) -> Option<View> {
    decode(text, '\\', |escape| {
        let letter = escape[1..].chars().next()?;
        Some(match letter {
            'n' => ('\n', 2),
            'r' => ('\r', 2),
            't' => ('\t', 2),
            '"' | '\'' | '\\' | '/' => (letter, 2),
            'u' => {
                let (digits, length) = match escape.strip_prefix("\\u{") {
                    Some(rest) => rest.split_once('}').map(|(digits, _)| (digits, "\\u{}".len() + digits.len()))?,
                    None => (escape.get(2..6)?, 6),
                };
                (char::from_u32(u32::from_str_radix(digits, 16).ok()?)?, length)
            }
            _ => return None,
        })
    })
}

/// Takes off percent-encoding, of ASCII alone.
fn percent_decode(text: &str) -> Option<View> {
    decode(text, '%', |escape| {
        let digits = escape.get(1..3).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
        let byte = u8::from_str_radix(digits, 16).ok().filter(u8::is_ascii)?;
        Some((char::from(byte), 3))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With what a base64 secret may have in it, and what JSON and URLs escape.
    const SECRET: &str = "wJalr/XUtn+FEMI=K7MD\"ENG";

    fn shown(secrets: &[&str], text: &str) -> String {
        Redactor::new(secrets.iter().map(|secret| (*secret).to_owned())).redact(text).into_owned()
    }

    #[track_caller]
    fn assert_hidden(secret: &str, text: &str) {
        let found = shown(&[secret], text);
        assert_eq!(found.len(), text.len(), "{found}");
        let expected = format!("[{}]", "*".repeat(text.len() - 2));
        assert_eq!(found, expected);
    }

    #[test]
    fn urls_lose_their_user_parts_and_queries_and_nothing_else() {
        let shown = |text| Redactor::new([]).redact(text).into_owned();
        assert_eq!(
            shown("é s3://KEY:a/b@lake/x # https://h/p?sig=1&b=2 'abfs://c@a/x' me@home"),
            "é s3://*******@lake/x # https://h/p?********* 'abfs://c@a/x' me@home"
        );
        assert_eq!(shown("s3://lake/x ü://u:p@h"), "s3://lake/x ü://***@h");
        assert_eq!(shown("http://127.0.0.1:8333/lake/a@b.png"), "http://127.0.0.1:8333/lake/a@b.png");
        assert_eq!(shown(r#"{"url":"https:\/\/u:p@h\/x"}"#), r#"{"url":"https:\/\/***@h\/x"}"#);
        assert!(matches!(redact("s3://lake/ds=12%3A00/what%3F.png"), Cow::Borrowed(_)));
    }

    #[test]
    fn signatures_and_tokens_are_hidden_without_a_url_around_them() {
        let shown = |text| Redactor::new([]).redact(text).into_owned();
        for (text, expected) in [
            ("sv=2026&sig=abcdefgh%3D&se=x", "sv=2026&sig=***********&se=x"),
            ("&X-Amz-Signature=0123456789&a=b", "&X-Amz-Signature=**********&a=b"),
            ("&X-Amz-Credential=AKIA/2026/x&a=b", "&X-Amz-Credential=***********&a=b"),
            ("&X-Amz-Security-Token=FwoGZXIvYXdz&a=b", "&X-Amz-Security-Token=************&a=b"),
            ("&x-goog-signature=0123456789", "&x-goog-signature=**********"),
            ("AccountName=me;AccountKey=c2VjcmV0cw==;x", "AccountName=me;AccountKey=************;x"),
            ("x-amz-security-token: FwoGZXIvYXdz", "x-amz-security-token: ************"),
            ("Authorization: Bearer ya29.abcdef", "Authorization: Bearer ***********"),
            ("Authorization: Basic dXNlcjpw", "Authorization: Basic ********"),
            ("sig=\"0123456789\"", "sig=\"**********\""),
        ] {
            assert_eq!(shown(text), expected);
        }
        for harmless in ["design=0123456789", "sig=short", "the bearer of news", "my_signature=0123456789"] {
            assert_eq!(shown(harmless), harmless);
        }
    }

    #[test]
    fn a_known_secret_is_hidden_in_every_encoding() {
        let json = |text: &str| Value::from(text).to_string().trim_matches('"').to_owned();
        let percent =
            |text: &str| percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string();
        for encoded in [
            SECRET.to_owned(),
            percent(SECRET),
            percent(SECRET)
                .to_lowercase()
                .replace("wjalr", "wJalr")
                .replace("xutn", "XUtn")
                .replace("femi", "FEMI")
                .replace("k7md", "K7MD")
                .replace("eng", "ENG"),
            percent(&percent(SECRET)),
            SECRET.replace('+', "%2B"),
            SECRET.replace('/', "\\/"),
            SECRET.replace('/', "\\u002f"),
            SECRET.replace('=', "\\u{3d}"),
            json(SECRET),
            json(&json(SECRET)),
            json(&percent(SECRET)),
            format!("{SECRET:?}").trim_matches('"').to_owned(),
        ] {
            assert_hidden(SECRET, &format!("[{encoded}]"));
        }
        assert_hidden("héllo-wörld", "[héllo-wörld]");
        assert_hidden("héllo-wörld", "[h%C3%A9llo-w%C3%B6rld]");
        assert_hidden("héllo-wörld", "[h\\u00e9llo-w\\u00F6rld]");
    }

    #[test]
    fn secrets_that_overlap_touch_or_repeat_are_all_hidden() {
        let secrets = ["abcdefgh", "efghijkl", "ijklmnop"];
        assert_eq!(shown(&secrets, "-abcdefghijklmnop-abcdefgh-"), format!("-{}-{}-", "*".repeat(16), "*".repeat(8)));
        assert_eq!(shown(&["12345678", "1234567890"], "1234567890 12345678"), "********** ********");
    }

    #[test]
    fn a_key_of_several_lines_is_hidden_whole_and_line_by_line() {
        let key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkq\nhkiG9w0BAQEFAASC\n-----END PRIVATE KEY-----\n";
        let document = serde_json::json!({
            "type": "service_account", "private_key_id": "0123456789abcdef", "private_key": key, "client_email": "me@lake.example",
        });
        for secret in [key.to_owned(), document.to_string(), serde_json::to_string_pretty(&document).unwrap()] {
            for text in [key.to_owned(), format!("{key:?}"), document.to_string(), "a MIIEvQIBADANBgkq b".to_owned()] {
                let shown = shown(&[&secret], &text);
                assert!(!shown.contains("MIIE") && !shown.contains("hkiG"), "{shown}");
                assert_eq!(shown.lines().count(), text.lines().count());
            }
        }
        // Who it was is no secret, and what one wants to know of an error.
        assert_eq!(shown(&[&document.to_string()], "denied to me@lake.example"), "denied to me@lake.example");
        assert_eq!(shown(&[&document.to_string()], "key 0123456789abcdef"), "key ****************");
    }

    #[test]
    fn a_shared_access_signature_is_hidden_by_its_signature_alone() {
        let token = "?sv=2026-01-01&se=2026-12-31&sig=aBcD%2FeFgH%3D";
        for text in ["no aBcD%2FeFgH%3D", "no aBcD/eFgH="] {
            assert!(!shown(&[token], text).contains("eFgH"));
        }
        assert_eq!(shown(&[token], "sv=2026-01-01"), "sv=2026-01-01");
    }

    #[test]
    fn json_stays_json() {
        let redactor = Redactor::new([SECRET.to_owned()]);
        for text in [
            format!("a {SECRET}"),
            "https://h/p?x=1\"".to_owned(),
            "https://h/p?x=\\".to_owned(),
            "\\sig=0123456789\\".to_owned(),
        ] {
            let line = serde_json::json!({"n": 1.5, "list": [{"text": text}], &text: null}).to_string() + "\n";
            let shown = redactor.redact_line(&line).into_owned();
            assert!(shown.ends_with('\n'));
            assert!(!shown.contains("wJalr") && !shown.contains("x=") && !shown.contains("0123"), "{shown}");
            let value: Value = serde_json::from_str(&shown).unwrap();
            assert_eq!(
                (value["n"].as_f64(), value["list"][0]["text"].as_str().unwrap().len()),
                (Some(1.5), text.len())
            );
        }
        assert!(matches!(redactor.redact_line("{\"rows_in\": 3}"), Cow::Borrowed(_)));
        assert_eq!(redactor.redact_line("{not JSON: https://u:p@h}"), "{not JSON: https://***@h}");
    }

    #[test]
    fn every_variable_that_sets_a_secret_is_known_and_others_are_not() {
        for name in [
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "AWS_TOKEN",
            "AWS_SSE_CUSTOMER_KEY_BASE64",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN",
            "AZURE_STORAGE_ACCOUNT_KEY",
            "AZURE_STORAGE_ACCESS_KEY",
            "AZURE_STORAGE_MASTER_KEY",
            "AZURE_STORAGE_SAS_KEY",
            "AZURE_STORAGE_SAS_TOKEN",
            "AZURE_STORAGE_TOKEN",
            "AZURE_CLIENT_SECRET",
            "AZURE_STORAGE_CLIENT_SECRET",
            "AZURE_FABRIC_SESSION_TOKEN",
            "GOOGLE_SERVICE_ACCOUNT_KEY",
            "GOOGLE_BEARER_TOKEN",
            "IDENTITY_HEADER",
        ] {
            assert!(is_secret_variable(name), "{name}");
        }
        for name in [
            "AWS_ACCESS_KEY_ID",
            "AWS_REGION",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_SSE_KMS_KEY_ID",
            "AZURE_STORAGE_ACCOUNT_NAME",
            "AZURE_TENANT_ID",
            "GOOGLE_APPLICATION_CREDENTIALS",
            "GOOGLE_SERVICE_ACCOUNT",
            "PATH",
            "HOME",
        ] {
            assert!(!is_secret_variable(name), "{name}");
        }
    }

    #[test]
    fn short_values_hide_nothing() {
        assert_eq!(shown(&["", "lake", "1234567"], "s3://lake/1234567"), "s3://lake/1234567");
    }
}
