//! The Unix socket of the engine's connectors: its file, its connections, and the messages on them.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};

use baton_proto::connector::{MAX_MESSAGE, ToAgent, ToConnector};
use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SocketAddrUnix,
    SocketFlags, SocketType, bind, listen, recvmsg, socket_with,
};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

/// File descriptors that may come with one read, and that may wait for their messages.
const MAX_FDS: usize = 64;
/// Bytes taken from a socket at a time.
const READ: usize = 64 << 10;

/// A socket that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A file of another kind is in the way.
    #[error("engine.socket: {}: is there and is no socket; name another path or remove it", .0.display())]
    InTheWay(PathBuf),
    /// An agent listens there.
    #[error("engine.socket: {}: another agent listens on it; give each engine its own", .0.display())]
    InUse(PathBuf),
    /// The system refused.
    #[error("engine.socket: {}: {error}; its folder must exist and be writable", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// The listening socket. Its file is removed when it is dropped, unless another has taken its place.
#[derive(Debug)]
pub(super) struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    file: (u64, u64),
}

impl Listener {
    /// Listens on `path`, with a file that only this user may use. A file that a dead agent left is removed.
    pub(super) fn bind(path: &Path) -> Result<Self, SocketError> {
        let io = |error: io::Error| SocketError::Io { path: path.to_owned(), error };
        match std::fs::symlink_metadata(path) {
            Ok(file) if !file.file_type().is_socket() => return Err(SocketError::InTheWay(path.to_owned())),
            Ok(_) => match StdStream::connect(path) {
                Ok(_) => return Err(SocketError::InUse(path.to_owned())),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(io)?;
                }
                Err(error) => return Err(io(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
        }
        let bound = || -> io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // Before the file exists, so that it is never open to others: it takes over the socket's mode.
            fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            bind(&socket, &SocketAddrUnix::new(path)?)?;
            listen(&socket, 64)?;
            Ok(socket)
        };
        let listener = UnixListener::from_std(StdListener::from(bound().map_err(io)?)).map_err(io)?;
        let file = file_of(path).map_err(io)?;
        Ok(Self { listener, path: path.to_owned(), file })
    }

    /// The next connection.
    ///
    /// # Cancel safety
    /// Safe to drop.
    pub(super) async fn accept(&self) -> io::Result<UnixStream> {
        Ok(self.listener.accept().await?.0)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if file_of(&self.path).is_ok_and(|file| file == self.file) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn file_of(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

/// A connection that cannot be read on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Longer than [`MAX_MESSAGE`].
    #[error("message of {0} bytes, at most {MAX_MESSAGE} may be sent")]
    TooLong(usize),
    /// Not a message of the protocol.
    #[error("message: {0}")]
    Malformed(#[from] rmp_serde::decode::Error),
    /// More descriptors than messages that take one.
    #[error("file descriptors came without a storage message, or more than the agent may open")]
    Descriptors,
}

/// Reads messages, and the file descriptors that come with them, from one connection. Buffers at most one message
/// and one read.
pub(super) struct Reader<'a> {
    stream: &'a UnixStream,
    buffer: Vec<u8>,
    start: usize,
    fds: VecDeque<OwnedFd>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(stream: &'a UnixStream) -> Self {
        Self { stream, buffer: Vec::new(), start: 0, fds: VecDeque::new() }
    }

    /// The next message, with the descriptor of a `Storage`; `None` at the end.
    ///
    /// # Cancel safety
    /// Safe to drop: what was read stays.
    pub(super) async fn next(&mut self) -> Result<Option<(ToAgent, Option<OwnedFd>)>, ReadError> {
        loop {
            if let Some(message) = self.parse()? {
                let fd = match message {
                    ToAgent::Storage { .. } => self.fds.pop_front(),
                    _ => None,
                };
                return Ok(Some((message, fd)));
            }
            if self
                .stream
                .async_io(Interest::READABLE, || receive(self.stream, &mut self.buffer, &mut self.fds))
                .await?
                == 0
            {
                return Ok(None);
            }
            if self.fds.len() > MAX_FDS {
                return Err(ReadError::Descriptors);
            }
        }
    }

    fn parse(&mut self) -> Result<Option<ToAgent>, ReadError> {
        let unread = &self.buffer[self.start..];
        let Some((length, rest)) = unread.split_first_chunk::<4>() else {
            self.compact();
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_MESSAGE {
            return Err(ReadError::TooLong(length));
        }
        let Some(body) = rest.get(..length) else {
            self.compact();
            return Ok(None);
        };
        let message = rmp_serde::from_slice(body)?;
        self.start += 4 + length;
        Ok(Some(message))
    }

    fn compact(&mut self) {
        self.buffer.drain(..self.start);
        self.start = 0;
    }
}

/// Appends what the socket has, at most [`READ`] bytes.
fn receive(stream: &UnixStream, buffer: &mut Vec<u8>, fds: &mut VecDeque<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let filled = buffer.len();
    buffer.resize(filled + READ, 0);
    let received = recvmsg(
        stream.as_fd(),
        &mut [IoSliceMut::new(&mut buffer[filled..])],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    );
    buffer.truncate(filled + received.as_ref().map_or(0, |message| message.bytes));
    let received = received?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other(
            "file descriptors were lost: more than the agent may open came; raise its limit of open files",
        ));
    }
    Ok(received.bytes)
}

/// A message as it is written.
pub(super) fn encode(message: &ToConnector) -> Result<Vec<u8>, rmp_serde::encode::Error> {
    let mut bytes = vec![0; 4];
    rmp_serde::encode::write_named(&mut bytes, message)?;
    let length = (bytes.len() - 4) as u32;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}
