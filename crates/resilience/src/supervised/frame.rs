//! What the two processes say to each other, and how it is cut into frames.
//!
//! A frame is its length in bytes as a little-endian `u32`, and as many bytes of JSON.

use std::io::{self, Read};

use mlx_engine_core::{
    Backend, EngineError, EngineStatistics, GenerateParams, GenerationEvent, LoadProgress,
    ModelConfiguration, Prompt,
};
use mlx_engine_monitor::{ErrorClass, ErrorKind};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Both sides have to be of one version.
pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The longest frame that is taken: a prompt of 64 million characters.
const LONGEST: usize = 256 << 20;

/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;

/// From the program to the engine's process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ToChild {
    /// The first frame: what to load.
    Load {
        version: String,
        setup: Value,
    },
    Generate {
        id: u64,
        prompt: Prompt,
        params: Box<GenerateParams>,
    },
    Cancel {
        id: u64,
    },
    Call {
        id: u64,
        method: String,
        argument: Value,
    },
}

/// From the engine's process to the program.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FromChild {
    Progress(LoadProgress),
    /// What the engine says of itself now.
    Details {
        details: Value,
        statistics: Option<Box<EngineStatistics>>,
    },
    Ready(Box<Ready>),
    /// The process runs, also where nothing else is to be said.
    Alive,
    /// The model could not be loaded; the process ends.
    Failed(EngineError),
    /// The engine took the request.
    Admitted {
        id: u64,
    },
    Event {
        id: u64,
        event: GenerationEvent,
    },
    /// The request or the call is over.
    Error {
        id: u64,
        error: EngineError,
    },
    Answer {
        id: u64,
        value: Value,
    },
}

impl FromChild {
    /// Whether the engine over there has done something. That its process runs, and what a caller did wrong, which is found before
    /// the engine's work begins, say nothing of that.
    pub(super) fn is_answer(&self) -> bool {
        match self {
            Self::Alive | Self::Details { .. } => false,
            Self::Error { error, .. } => ErrorKind::of(error).class() != ErrorClass::Caller,
            _ => true,
        }
    }
}

/// What was loaded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Ready {
    pub(super) backend: Option<Backend>,
    pub(super) model: Option<ModelConfiguration>,
    /// What else the engine says of itself.
    pub(super) details: Value,
    pub(super) statistics: Option<EngineStatistics>,
}

/// Why there is no frame.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    /// Nothing came in the time that the reader waits. Reading can go on.
    #[error("nothing came in time")]
    Silent,
    #[error("connection failed")]
    Io(#[source] io::Error),
    #[error("connection ended within a frame")]
    Cut,
    #[error("frame of {0} bytes is longer than any may be")]
    TooLong(usize),
    #[error("frame is not of the protocol")]
    Malformed(#[source] serde_json::Error),
}

/// Adds a frame to `bytes`.
pub(super) fn encode<T: Serialize>(frame: &T, bytes: &mut Vec<u8>) -> Result<(), FrameError> {
    let start = bytes.len();
    bytes.extend_from_slice(&[0; 4]);
    serde_json::to_writer(&mut *bytes, frame).map_err(FrameError::Malformed)?;
    let length = bytes.len() - start - 4;
    let header = u32::try_from(length).ok().filter(|_| length <= LONGEST);
    let Some(header) = header else {
        bytes.truncate(start);
        return Err(FrameError::TooLong(length));
    };
    bytes[start..start + 4].copy_from_slice(&header.to_le_bytes());
    Ok(())
}

/// Reads frames. What has come of one survives a read that waited in vain.
#[derive(Debug)]
pub(super) struct Frames<R> {
    reader: R,
    bytes: Vec<u8>,
    /// Bytes of it that were taken, and those that were read; the rest is room.
    taken: usize,
    read: usize,
}

impl<R: Read> Frames<R> {
    pub(super) fn new(reader: R) -> Self {
        Self {
            reader,
            bytes: Vec::new(),
            taken: 0,
            read: 0,
        }
    }

    /// The next frame; `None` at the end.
    pub(super) fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        loop {
            if let Some(frame) = self.whole()? {
                return serde_json::from_slice(frame)
                    .map(Some)
                    .map_err(FrameError::Malformed);
            }
            self.bytes.copy_within(self.taken..self.read, 0);
            self.read -= self.taken;
            self.taken = 0;
            if self.bytes.len() - self.read < CHUNK {
                self.bytes.resize(self.read + 2 * CHUNK, 0);
            }
            match self.reader.read(&mut self.bytes[self.read..]) {
                Ok(0) if self.read == 0 => return Ok(None),
                Ok(0) => return Err(FrameError::Cut),
                Ok(more) => self.read += more,
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => return Err(FrameError::Silent),
                    _ => return Err(FrameError::Io(error)),
                },
            }
        }
    }

    /// The bytes of the next frame, where they are all there. They count as taken.
    fn whole(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let Some((header, rest)) = self.bytes[self.taken..self.read].split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*header) as usize;
        if length > LONGEST {
            return Err(FrameError::TooLong(length));
        }
        if rest.len() < length {
            return Ok(None);
        }
        let start = self.taken + 4;
        self.taken = start + length;
        Ok(Some(&self.bytes[start..start + length]))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Gives bytes in pieces, with a wait in vain before each.
    struct Pieces(VecDeque<Vec<u8>>, bool);

    impl Read for Pieces {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 && !self.0.is_empty() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let Some(piece) = self.0.pop_front() else {
                return Ok(0);
            };
            buffer[..piece.len()].copy_from_slice(&piece);
            Ok(piece.len())
        }
    }

    fn read_all(frames: &mut Frames<Pieces>) -> Result<Vec<Value>, FrameError> {
        let mut found = Vec::new();
        loop {
            match frames.next::<Value>() {
                Ok(Some(frame)) => found.push(frame),
                Ok(None) => return Ok(found),
                Err(FrameError::Silent) => {}
                Err(error) => return Err(error),
            }
        }
    }

    proptest! {
        #[test]
        fn frames_are_the_same_however_they_are_cut(
            texts in prop::collection::vec(".{0,40}", 0..20), pieces in prop::collection::vec(1..50_usize, 1..30),
        ) {
            let mut bytes = Vec::new();
            for text in &texts {
                encode(&text, &mut bytes).unwrap();
            }
            let mut cut = VecDeque::new();
            let mut sizes = pieces.iter().cycle();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (piece, after) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
                cut.push_back(piece.to_vec());
                rest = after;
            }
            let found = read_all(&mut Frames::new(Pieces(cut, false))).unwrap();
            prop_assert_eq!(found, texts.into_iter().map(Value::from).collect::<Vec<_>>());
        }

        #[test]
        fn any_bytes_are_frames_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let pieces = if bytes.is_empty() { VecDeque::new() } else { VecDeque::from([bytes]) };
            // It returns, and nothing is allocated for a length that was only claimed.
            let mut frames = Frames::new(Pieces(pieces, false));
            let _ = read_all(&mut frames);
            prop_assert!(frames.bytes.len() <= 3 * CHUNK);
        }
    }

    #[test]
    fn a_frame_that_is_cut_and_one_that_is_too_long_are_errors() {
        let frames =
            |bytes: &[u8]| read_all(&mut Frames::new(Pieces(VecDeque::from([bytes.to_vec()]), false)));
        assert!(matches!(frames(&[9, 0, 0, 0, b'1']), Err(FrameError::Cut)));
        assert!(matches!(frames(&[0, 0, 0, 255]), Err(FrameError::TooLong(_))));
        assert!(matches!(
            frames(&[1, 0, 0, 0, b'{']),
            Err(FrameError::Malformed(_))
        ));
    }
}
