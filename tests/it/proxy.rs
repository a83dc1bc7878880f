//! A network that can be told to fail: a proxy on loopback in front of a server of the tests.

use std::io::{BufReader, ErrorKind, Result, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::http::Message;

/// How often the proxy looks for new connections.
const POLL: Duration = Duration::from_millis(1);

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It reaches the server, and the answer the client.
    Passes,
    /// The connection is reset before the server hears of the request.
    LostBefore,
    /// The server does what it is asked, and the connection is reset before its answer.
    LostAfter,
    /// The connection is reset in the middle of the answer.
    LostWithin,
    /// This is answered, with this status, and the server does not hear of the request.
    Answered(&'static str, &'static str),
    /// Nobody answers, until the proxy ends.
    Held,
    /// From now on there is no network: connections are reset and refused, until it is [`Proxy::restored`].
    NetworkLost,
}

type Plan = Box<dyn FnMut(&Message) -> Fate + Send>;

/// A proxy, from its start until it is dropped.
pub(crate) struct Proxy {
    /// Its port on loopback.
    pub(crate) port: u16,
    network: Arc<Network>,
    listening: Option<JoinHandle<()>>,
}

struct Network {
    server: u16,
    plan: Mutex<Plan>,
    is_lost: AtomicBool,
    is_over: AtomicBool,
    connections: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    /// Starts a proxy to a port on loopback; `plan` says what becomes of each request.
    pub(crate) fn start(server: u16, plan: impl FnMut(&Message) -> Fate + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let network = Arc::new(Network {
            server,
            plan: Mutex::new(Box::new(plan)),
            is_lost: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            connections: Mutex::default(),
        });
        let listening = std::thread::spawn({
            let network = Arc::clone(&network);
            move || network.listen(listener, port)
        });
        Self { port, network, listening: Some(listening) }
    }

    /// The network is there again, and every request passes.
    pub(crate) fn restored(&self) {
        *self.network.plan.lock().unwrap() = Box::new(|_| Fate::Passes);
        self.network.is_lost.store(false, Ordering::SeqCst);
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.network.is_over.store(true, Ordering::SeqCst);
        self.network.reset_all();
        self.listening.take().unwrap().join().unwrap();
    }
}

impl Network {
    fn listen(self: Arc<Self>, first: TcpListener, port: u16) {
        let mut listener = Some(first);
        while !self.is_over.load(Ordering::SeqCst) {
            if self.is_lost.load(Ordering::SeqCst) {
                listener = None;
                std::thread::sleep(POLL);
                continue;
            }
            // The port was ours a moment ago; until it is free again, nobody gets through.
            let Some(open) = listener.take().or_else(|| TcpListener::bind(("127.0.0.1", port)).ok()) else {
                std::thread::sleep(POLL);
                continue;
            };
            open.set_nonblocking(true).unwrap();
            match open.accept() {
                Ok((client, _)) => {
                    client.set_nonblocking(false).unwrap();
                    client.set_nodelay(true).unwrap();
                    self.connections.lock().unwrap().push(client.try_clone().unwrap());
                    let network = Arc::clone(&self);
                    std::thread::spawn(move || network.serve(&client));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(POLL),
                Err(error) => panic!("{error}"),
            }
            listener = Some(open);
        }
    }

    /// Serves one connection until either end closes it, or its fate does.
    fn serve(&self, client: &TcpStream) {
        let id = client.peer_addr();
        let passed = self.pass_on(client);
        // The list holds the connection too; both must go for it to be closed.
        self.connections.lock().unwrap().retain(|other| other.peer_addr().ok() != id.as_ref().ok().copied());
        if !passed.unwrap_or(false) {
            reset(client);
        }
    }

    /// Returns whether the connection ended well.
    fn pass_on(&self, client: &TcpStream) -> Result<bool> {
        let server = TcpStream::connect(("127.0.0.1", self.server))?;
        server.set_nodelay(true)?;
        let (mut from_client, mut from_server) = (BufReader::new(client), BufReader::new(&server));
        while let Some(request) = Message::read(&mut from_client, true)? {
            let fate = self.plan.lock().unwrap()(&request);
            match fate {
                Fate::LostBefore => return Ok(false),
                Fate::Held => {
                    while !self.is_over.load(Ordering::SeqCst) {
                        std::thread::sleep(POLL);
                    }
                    return Ok(false);
                }
                Fate::NetworkLost => {
                    self.is_lost.store(true, Ordering::SeqCst);
                    self.reset_all();
                    return Ok(false);
                }
                Fate::Answered(status, body) => {
                    let head = format!("HTTP/1.1 {status}\r\ncontent-type: application/xml\r\n");
                    write!(&mut &*client, "{head}content-length: {}\r\n\r\n{body}", body.len())?;
                    continue;
                }
                Fate::Passes | Fate::LostAfter | Fate::LostWithin => {}
            }
            (&server).write_all(&request.raw)?;
            let Some(answer) = Message::read(&mut from_server, request.method() != "HEAD")? else { return Ok(false) };
            match fate {
                Fate::LostAfter => return Ok(false),
                Fate::LostWithin => {
                    (&*client).write_all(&answer.raw[..answer.raw.len() / 2])?;
                    return Ok(false);
                }
                _ => (&*client).write_all(&answer.raw)?,
            }
        }
        Ok(true)
    }

    fn reset_all(&self) {
        for connection in self.connections.lock().unwrap().drain(..) {
            reset(&connection);
        }
    }
}

/// Has a connection reset, and not merely ended, once everybody has let go of it.
fn reset(connection: &TcpStream) {
    // Whoever it is that closed it already, it is closed.
    socket2::SockRef::from(connection).set_linger(Some(Duration::ZERO)).ok();
    connection.shutdown(Shutdown::Read).ok();
}
