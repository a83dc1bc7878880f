//! The report as one HTML file that needs nothing else: style, script, the library that draws, and the data are in it.
//!
//! Ids, messages and values come from whoever made the images. They are in the page as data that the script puts in as text, the two
//! scripts are named by their hashes, and nothing else may run or be fetched.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};

use super::data::Report;
use crate::error::Error;

const TEMPLATE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Apache `ECharts`, as much of it as is used; see `vendor/README.md`.
const LIBRARY: &str = include_str!("vendor/echarts.min.js");

/// The report as JSON.
pub(super) fn json(report: &Report) -> Result<String, Error> {
    serde_json::to_string(report)
        .map_err(|error| Error::Io { action: "write a report as JSON".to_owned(), source: error.into() })
}

/// The page.
pub(super) fn html(report: &Report) -> Result<String, Error> {
    let hash = |script: &str| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(script)));
    let policy = format!(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {} {}",
        hash(LIBRARY),
        hash(SCRIPT)
    );
    // Both are of signs that mean nothing in HTML.
    let title =
        format!("{}, {} - lookalike", report.pipeline, report.finished_at.split('T').next().unwrap_or_default());
    let data = within_script(&json(report)?);
    let parts = [
        ("{{title}}", title.as_str()),
        ("{{csp}}", policy.as_str()),
        ("{{style}}", STYLE),
        ("{{library}}", LIBRARY),
        ("{{data}}", data.as_str()),
        ("{{script}}", SCRIPT),
    ];
    // Each mark is looked for in what follows the one before, so that nothing which was put in is taken for a mark.
    let mut page = String::with_capacity(TEMPLATE.len() + parts.iter().map(|(_, part)| part.len()).sum::<usize>());
    let mut rest = TEMPLATE;
    while let Some((before, after)) = rest.split_once("{{") {
        let Some((mark, after)) = after.split_once("}}") else { break };
        page.push_str(before);
        let part = parts.iter().find(|(name, _)| name.trim_matches(['{', '}']) == mark);
        page.push_str(part.map_or("", |(_, part)| part));
        rest = after;
    }
    page.push_str(rest);
    Ok(page)
}

/// JSON as it may stand within a script element: what could end it, or a line of it, is escaped.
fn within_script(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for sign in json.chars() {
        match sign {
            '<' => escaped.push_str("\\u003c"),
            '>' => escaped.push_str("\\u003e"),
            '&' => escaped.push_str("\\u0026"),
            '\u{2028}' => escaped.push_str("\\u2028"),
            '\u{2029}' => escaped.push_str("\\u2029"),
            sign => escaped.push(sign),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_cannot_leave_its_place_on_the_page() {
        let hostile = "</script><script>alert(1)</script>{{script}}\u{2028}";
        let report = Report { pipeline: "p".to_owned(), left_out: vec![hostile.to_owned()], ..Report::default() };
        let page = html(&report).unwrap();
        assert_eq!(page.matches("<script").count(), 3, "the library, the script and the data");
        assert!(!page.contains("alert(1)</script>"));
        let data = page.split_once("type=\"application/json\"").unwrap().1;
        let data = data.split_once('>').unwrap().1.split_once("</script>").unwrap().0;
        let read: serde_json::Value = serde_json::from_str(data).unwrap();
        assert_eq!(read["left_out"][0], hostile);
    }

    #[test]
    fn every_mark_of_the_template_is_filled() {
        let page = html(&Report::default()).unwrap();
        for part in [STYLE, SCRIPT, LIBRARY] {
            assert_eq!(page.matches(part).count(), 1);
        }
        assert!(page.contains("script-src 'sha256-"));
        assert_eq!(TEMPLATE.matches("{{").count(), 6);
    }
}
