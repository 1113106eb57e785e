//! Unix sockets between agents of one host.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};

use baton_kernels::{MAX_SHARED_FILES, Shared};
use baton_proto::wire::{Frame, SharedMemory, WireError};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recvmsg, sendmsg, socket_with,
};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};

/// Longest description of a memory: some thousand pieces and allocations.
const MAX_DESCRIPTION: usize = 1 << 20;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 256;

fn address(name: &[u8; 16]) -> io::Result<SocketAddrUnix> {
    let name = format!("baton-kv-{:032x}", u128::from_be_bytes(*name));
    Ok(SocketAddrUnix::new_abstract_name(name.as_bytes())?)
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// Listens on the abstract socket of this name. Must be called within the runtime that is to drive it.
pub(crate) fn listen(name: &[u8; 16]) -> io::Result<UnixListener> {
    let socket = socket()?;
    rustix::net::bind(&socket, &address(name)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    UnixListener::from_std(StdListener::from(socket))
}

/// Connects, and sees to it that a process of the same user listens. Does not wait: where too many do already, it fails.
pub(super) fn connect(name: &[u8; 16]) -> io::Result<UnixStream> {
    let socket = socket()?;
    rustix::net::connect(&socket, &address(name)?)?;
    let stream = UnixStream::from_std(StdStream::from(socket))?;
    same_user(&stream)?;
    Ok(stream)
}

/// Fails where the other side is another user's.
pub(super) fn same_user(stream: &UnixStream) -> io::Result<()> {
    let (theirs, ours) = (stream.peer_cred()?.uid(), rustix::process::geteuid().as_raw());
    if theirs == ours {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("a process of user {theirs}, not {ours}")))
}

/// Sends a memory and its files.
pub(super) async fn give(stream: &mut UnixStream, shared: Shared) -> io::Result<()> {
    let body = rmp_serde::to_vec_named(&shared.memory).map_err(io::Error::other)?;
    let len = u32::try_from(body.len()).ok().filter(|len| *len as usize <= MAX_DESCRIPTION);
    let len = len.ok_or_else(|| io::Error::other("a memory of too many pieces"))?;
    let head = Frame::Memory(len).encode();
    let files: Vec<_> = shared.files.iter().map(AsFd::as_fd).collect();
    let sent = stream.async_io(Interest::WRITABLE, || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SHARED_FILES))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(io::Error::other("too many files"));
        }
        Ok(sendmsg(
            stream.as_fd(),
            &[IoSlice::new(head.as_ref())],
            &mut ancillary,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        )?)
    });
    let sent = sent.await?;
    stream.write_all(&head.as_ref()[sent..]).await?;
    stream.write_all(&body).await
}

/// What the holder said instead.
pub(super) enum NotGiven {
    Refused(WireError),
    Failed(io::Error),
}

impl From<io::Error> for NotGiven {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// Receives a memory and its files, or the word that there is none.
pub(super) async fn take(stream: &UnixStream) -> Result<Shared, NotGiven> {
    let unreadable = || io::Error::new(io::ErrorKind::InvalidData, "no description of a memory");
    let (mut bytes, mut files) = (Vec::new(), Vec::new());
    loop {
        let read = stream.async_io(Interest::READABLE, || receive(stream, &mut bytes, &mut files)).await?;
        if let Some((frame, start)) = Frame::decode(&bytes).map_err(|_| unreadable())? {
            let len = match frame {
                Frame::Memory(len) if len as usize <= MAX_DESCRIPTION => len as usize,
                Frame::Refused(error) => return Err(NotGiven::Refused(error)),
                _ => return Err(unreadable().into()),
            };
            if let Some(body) = bytes.get(start..start + len) {
                let memory: SharedMemory = rmp_serde::from_slice(body).map_err(io::Error::other)?;
                return Ok(Shared { memory, files });
            }
        }
        if files.len() > MAX_SHARED_FILES {
            return Err(unreadable().into());
        }
        if read == 0 {
            return Err(NotGiven::Failed(io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

/// Appends what the socket has.
fn receive(stream: &UnixStream, bytes: &mut Vec<u8>, files: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SHARED_FILES))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = [0; 16 << 10];
    let received = recvmsg(
        stream.as_fd(),
        &mut [IoSliceMut::new(&mut buffer)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )?;
    bytes.extend_from_slice(&buffer[..received.bytes]);
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            files.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other(
            "more files came than the agent may open: raise its limit of open files",
        ));
    }
    Ok(received.bytes)
}
