//! A stand-in for Google Cloud Storage, for want of a server that speaks its XML API.
//!
//! It holds one bucket in memory and does what Google's documentation says of the requests that the client makes: generations that
//! grow, `x-goog-if-generation-match` decided in one step, pages of listings, ranges, uploads in parts, bearer tokens. It shows that
//! our side of the conversation is right. It cannot show that Google's is.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufReader, Result, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use chrono::{DateTime, SecondsFormat, Utc};

use crate::http::Message;

/// Objects on a page of a listing: few, so that every longer listing has several.
const PAGE: usize = 7;

#[derive(Debug, Clone)]
struct Object {
    generation: u64,
    bytes: Vec<u8>,
    written: DateTime<Utc>,
}

impl Object {
    fn now(generation: u64, bytes: Vec<u8>) -> Self {
        Self { generation, bytes, written: Utc::now() }
    }
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Object>,
    /// Parts of each upload, by their numbers.
    uploads: BTreeMap<String, BTreeMap<u32, Vec<u8>>>,
    /// The newest generation, and the newest upload.
    newest: u64,
}

/// Starts the stand-in for one bucket; returns its port. It ends with the tests.
pub(crate) fn start(bucket: &'static str, token: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let state = Arc::new(Mutex::new(State::default()));
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let state = Arc::clone(&state);
            // A client that goes away in the middle is no concern of a server.
            std::thread::spawn(move || client.and_then(|client| serve(&client, bucket, token, &state)).ok());
        }
    });
    port
}

fn serve(client: &TcpStream, bucket: &str, token: &str, state: &Mutex<State>) -> Result<()> {
    client.set_nodelay(true)?;
    let mut from = BufReader::new(client);
    while let Some(request) = Message::read(&mut from, true)? {
        let is_known = request.header("authorization") == Some(&format!("Bearer {token}"));
        let answer = if is_known { answer(&request, bucket, &mut state.lock().unwrap()) } else { Answer::error(401) };
        let mut text = format!("HTTP/1.1 {} status\r\ncontent-length: {}\r\n", answer.status, answer.body.len());
        for (name, value) in &answer.headers {
            write!(text, "{name}: {value}\r\n").unwrap();
        }
        let body = if request.method() == "HEAD" { &[] } else { answer.body.as_slice() };
        (&*client).write_all(&[text.as_bytes(), b"\r\n", body].concat())?;
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn error(status: u16) -> Self {
        Self { status, body: b"<Error><Code>Refused</Code></Error>".to_vec(), ..Self::default() }
    }

    fn xml(root: &str, content: &str) -> Self {
        let body = format!("<?xml version='1.0' encoding='UTF-8'?><{root}>{content}</{root}>").into_bytes();
        Self { status: 200, body, ..Self::default() }
    }

    fn about(object: &Object) -> Self {
        let headers = vec![
            ("etag", etag(object)),
            ("last-modified", object.written.format("%a, %d %b %Y %H:%M:%S GMT").to_string()),
            ("x-goog-generation", object.generation.to_string()),
        ];
        Self { status: 200, headers, ..Self::default() }
    }
}

fn etag(object: &Object) -> String {
    format!("\"generation-{}\"", object.generation)
}

fn answer(request: &Message, bucket: &str, state: &mut State) -> Answer {
    let target = request.line.split(' ').nth(1).unwrap();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query: BTreeMap<String, String> =
        url::form_urlencoded::parse(query.as_bytes()).map(|(name, value)| (name.into(), value.into())).collect();
    let path = percent_encoding::percent_decode_str(path).decode_utf8().unwrap();
    let Some(name) = path.strip_prefix(&format!("/{bucket}")) else { return Answer::error(404) };
    let name = name.trim_start_matches('/');
    let upload = query.get("uploadId");
    match (request.method(), upload) {
        ("GET", None) if name.is_empty() => list(&query, state),
        ("GET" | "HEAD", None) => state.objects.get(name).map_or(Answer::error(404), |object| get(request, object)),
        ("PUT", None) => put(request, name, request.body.clone(), state),
        ("DELETE", None) => {
            let is_there = state.objects.remove(name).is_some();
            if is_there { Answer { status: 204, ..Answer::default() } } else { Answer::error(404) }
        }
        ("POST", None) if query.contains_key("uploads") => {
            state.newest += 1;
            let upload = format!("upload-{}", state.newest);
            state.uploads.insert(upload.clone(), BTreeMap::new());
            Answer::xml("InitiateMultipartUploadResult", &format!("<UploadId>{upload}</UploadId>"))
        }
        (method, Some(upload)) => upload_parts(request, method, name, upload, &query, state),
        _ => Answer::error(501),
    }
}

fn list(query: &BTreeMap<String, String>, state: &State) -> Answer {
    let of = |name: &str| query.get(name).map_or("", String::as_str);
    assert_eq!(of("list-type"), "2");
    let (prefix, delimiter) = (of("prefix"), of("delimiter"));
    let after = of("continuation-token").max(of("start-after"));
    let size = query.get("max-keys").map_or(PAGE, |keys| PAGE.min(keys.parse().unwrap()));
    // What is listed: objects, and in their place the folders that the delimiter makes of them.
    let mut entries: BTreeMap<String, Option<&Object>> = BTreeMap::new();
    for (name, object) in state.objects.iter().filter(|(name, _)| name.starts_with(prefix)) {
        match name[prefix.len()..].split_once(delimiter) {
            Some((folder, _)) if !delimiter.is_empty() => entries.insert(format!("{prefix}{folder}{delimiter}"), None),
            _ => entries.insert(name.clone(), Some(object)),
        };
    }
    let mut entries = entries.into_iter().filter(|(name, _)| name.as_str() > after).peekable();
    let mut content = String::new();
    let mut last = String::new();
    for (name, object) in entries.by_ref().take(size) {
        let shown = name.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        match object {
            Some(object) => write!(
                content,
                "<Contents><Key>{shown}</Key><Size>{}</Size><LastModified>{}</LastModified><ETag>{}</ETag></Contents>",
                object.bytes.len(),
                object.written.to_rfc3339_opts(SecondsFormat::Millis, true),
                etag(object)
            ),
            None => write!(content, "<CommonPrefixes><Prefix>{shown}</Prefix></CommonPrefixes>"),
        }
        .unwrap();
        last = name;
    }
    if entries.peek().is_some() {
        let token = last.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        write!(content, "<NextContinuationToken>{token}</NextContinuationToken>").unwrap();
    }
    Answer::xml("ListBucketResult", &content)
}

fn get(request: &Message, object: &Object) -> Answer {
    let mut answer = Answer::about(object);
    let size = object.bytes.len();
    let Some(range) = request.header("range").and_then(|range| range.strip_prefix("bytes=")) else {
        return Answer { body: object.bytes.clone(), ..answer };
    };
    let (start, end) = range.split_once('-').unwrap();
    let (start, end) = match (start.parse::<usize>(), end.parse::<usize>()) {
        (Ok(start), Ok(end)) => (start, size.min(end + 1)),
        (Ok(start), Err(_)) => (start, size),
        (Err(_), Ok(last)) => (size.saturating_sub(last), size),
        (Err(_), Err(_)) => return Answer::error(400),
    };
    if start >= end {
        return Answer::error(416);
    }
    answer.status = 206;
    answer.headers.push(("content-range", format!("bytes {start}-{}/{size}", end - 1)));
    Answer { body: object.bytes[start..end].to_vec(), ..answer }
}

/// Puts an object, where the generation is as the request wants it: 0 for none.
fn put(request: &Message, name: &str, bytes: Vec<u8>, state: &mut State) -> Answer {
    let generation = state.objects.get(name).map_or(0, |object| object.generation);
    let wanted = request.header("x-goog-if-generation-match");
    if wanted.is_some_and(|wanted| wanted != generation.to_string()) {
        return Answer::error(412);
    }
    state.newest += 1;
    let object = Object::now(state.newest, bytes);
    let answer = Answer::about(&object);
    state.objects.insert(name.to_owned(), object);
    answer
}

fn upload_parts(
    request: &Message,
    method: &str,
    name: &str,
    upload: &str,
    query: &BTreeMap<String, String>,
    state: &mut State,
) -> Answer {
    let Some(parts) = state.uploads.get_mut(upload) else { return Answer::error(404) };
    match method {
        "PUT" => {
            parts.insert(query["partNumber"].parse().unwrap(), request.body.clone());
            state.newest += 1;
            Answer::about(&Object::now(state.newest, Vec::new()))
        }
        "POST" => {
            let wanted = String::from_utf8_lossy(&request.body);
            let wanted =
                wanted.split("<PartNumber>").skip(1).map(|part| part.split('<').next().unwrap().parse().unwrap());
            let Some(bytes) = wanted.map(|number| parts.get(&number).cloned()).collect::<Option<Vec<_>>>() else {
                return Answer::error(400);
            };
            state.uploads.remove(upload);
            let done = put(request, name, bytes.concat(), state);
            let tag = etag(&state.objects[name]);
            Answer {
                headers: done.headers,
                ..Answer::xml("CompleteMultipartUploadResult", &format!("<ETag>{tag}</ETag>"))
            }
        }
        "DELETE" => {
            state.uploads.remove(upload);
            Answer { status: 204, ..Answer::default() }
        }
        _ => Answer::error(501),
    }
}
