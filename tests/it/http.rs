//! As much of HTTP/1.1 as the tests need between a client and a server: whole messages, one after the other.

use std::io::{BufRead, BufReader, Error, Read, Result, Write};
use std::net::TcpStream;

/// A request or a response.
#[derive(Debug, Default)]
pub(crate) struct Message {
    /// The first line, without its end.
    pub(crate) line: String,
    /// Names, lower case, and values.
    pub(crate) headers: Vec<(String, String)>,
    /// The body, taken out of its chunks.
    pub(crate) body: Vec<u8>,
    /// The bytes of head and body as they were received.
    pub(crate) raw: Vec<u8>,
}

impl Message {
    /// Reads a message; `None` where the other end has closed the connection. The response to a `HEAD` request has no body, whatever
    /// its length says.
    pub(crate) fn read(from: &mut impl BufRead, has_body: bool) -> Result<Option<Self>> {
        let mut message = Self::default();
        message.line = message.read_line(from)?;
        if message.line.is_empty() {
            return Ok(None);
        }
        loop {
            let line = message.read_line(from)?;
            let Some((name, value)) = line.split_once(':') else { break };
            message.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        if !has_body || message.status() == "204" || message.status() == "304" {
            return Ok(Some(message));
        }
        if message.header("transfer-encoding") == Some("chunked") {
            loop {
                let size = message.read_line(from)?;
                let size =
                    usize::from_str_radix(size.split(';').next().unwrap_or_default(), 16).map_err(Error::other)?;
                message.read_bytes(from, size)?;
                message.read_line(from)?;
                if size == 0 {
                    break;
                }
            }
        } else {
            let size = message.header("content-length").unwrap_or("0").parse().map_err(Error::other)?;
            message.read_bytes(from, size)?;
        }
        Ok(Some(message))
    }

    fn read_line(&mut self, from: &mut impl BufRead) -> Result<String> {
        let start = self.raw.len();
        from.read_until(b'\n', &mut self.raw)?;
        Ok(String::from_utf8_lossy(&self.raw[start..]).trim_end().to_owned())
    }

    fn read_bytes(&mut self, from: &mut impl Read, size: usize) -> Result<()> {
        let start = self.raw.len();
        self.raw.resize(start + size, 0);
        from.read_exact(&mut self.raw[start..])?;
        self.body.extend_from_slice(&self.raw[start..]);
        Ok(())
    }

    /// The value of a header.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The method of a request.
    pub(crate) fn method(&self) -> &str {
        self.line.split(' ').next().unwrap_or_default()
    }

    /// The status of a response.
    pub(crate) fn status(&self) -> &str {
        self.line.split(' ').nth(1).unwrap_or_default()
    }
}

/// Sends a request without a body to a port on loopback, and reads the answer.
pub(crate) fn ask(port: u16, head: &str) -> Result<Message> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.write_all(head.as_bytes())?;
    Message::read(&mut BufReader::new(stream), true)?.ok_or_else(|| Error::other("no answer"))
}
