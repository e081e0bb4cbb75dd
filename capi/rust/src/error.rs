//! What can go wrong, in one type.

use std::fmt;

use crate::ffi;

macro_rules! statuses {
    ($($(#[$doc:meta])* $variant:ident = $constant:ident;)*) => {
        /// Why a call failed: the library's statuses, and two of the crate's own.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Status {
            $($(#[$doc])* $variant,)*
            /// The crate's own: libtrtxpy was not found, cannot be loaded, is another ABI, or lacks a function.
            Library,
            /// The crate's own: the backend that was asked for is not compiled in; see the Cargo features.
            Feature,
            /// A status that a newer library has and this crate does not know.
            Unknown(i32),
        }

        impl Status {
            /// Of the library's number; `None` for success.
            pub fn from_raw(raw: i32) -> Option<Status> {
                match raw {
                    ffi::TRTXPY_OK => None,
                    $(ffi::$constant => Some(Status::$variant),)*
                    other => Some(Status::Unknown(other)),
                }
            }

            /// The library's number; `None` for the crate's own statuses.
            pub fn raw(self) -> Option<i32> {
                match self {
                    $(Status::$variant => Some(ffi::$constant),)*
                    Status::Library | Status::Feature => None,
                    Status::Unknown(raw) => Some(raw),
                }
            }

            /// `"TRTXPY_SHAPE"`, say.
            pub fn name(self) -> &'static str {
                match self {
                    $(Status::$variant => stringify!($constant),)*
                    Status::Library => "TRTXPY_RUST_LIBRARY",
                    Status::Feature => "TRTXPY_RUST_FEATURE",
                    Status::Unknown(_) => "TRTXPY_UNKNOWN",
                }
            }
        }
    };
}

statuses! {
    /// A size that overflows, a name given twice, an option that does not exist, a tensor of another context.
    InvalidArgument = TRTXPY_INVALID_ARGUMENT;
    /// A handle that was destroyed: cannot happen with this crate's types alone.
    InvalidHandle = TRTXPY_INVALID_HANDLE;
    /// Something open still uses it.
    Borrowed = TRTXPY_BORROWED;
    /// There is no tensor or file of that name.
    NotFound = TRTXPY_NOT_FOUND;
    /// A shape does not fit the graph, its profiles or the tensor.
    Shape = TRTXPY_SHAPE;
    /// A tensor has another data type than is expected.
    DType = TRTXPY_DTYPE;
    /// A value does not fit the type that it must be converted to.
    Range = TRTXPY_RANGE;
    /// A buffer has another size than the tensor.
    BufferSize = TRTXPY_BUFFER_SIZE;
    /// Host, pinned or device memory is used up, or the context's budget for it.
    OutOfMemory = TRTXPY_OUT_OF_MEMORY;
    /// No TensorRT or GPU here can do this.
    Unavailable = TRTXPY_UNAVAILABLE;
    /// Python was not found, could not be started, or lacks trtx_py.
    Python = TRTXPY_PYTHON;
    /// The model is damaged, or has what this TensorRT cannot do.
    Parse = TRTXPY_PARSE;
    /// TensorRT could not build it.
    Build = TRTXPY_BUILD;
    /// The plan is damaged, or carries code for the CPU.
    Plan = TRTXPY_PLAN;
    /// The plan is for another TensorRT or GPU; or trtx_py is of another version than the library.
    VersionMismatch = TRTXPY_VERSION_MISMATCH;
    /// The request was accepted and failed.
    Execution = TRTXPY_EXECUTION;
    /// A call of the CUDA driver failed.
    Cuda = TRTXPY_CUDA;
    /// The request was cancelled.
    Cancelled = TRTXPY_CANCELLED;
    /// No result in time.
    Timeout = TRTXPY_TIMEOUT;
    /// In use by a request in flight or another call.
    Busy = TRTXPY_BUSY;
    /// The library was shut down.
    Closed = TRTXPY_CLOSED;
    /// This call would wait, and a callback or a waker must not.
    InCallback = TRTXPY_IN_CALLBACK;
    /// This process was forked from the one that started the library.
    Forked = TRTXPY_FORKED;
    /// Still in flight.
    NotReady = TRTXPY_NOT_READY;
    /// This kind of graph or tensor cannot do that.
    Unsupported = TRTXPY_UNSUPPORTED;
    /// A fault of the library; please report it with the text.
    Internal = TRTXPY_INTERNAL;
}

/// A call that failed, or a request: why, and a text that says what was found, what was expected and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// Why.
    pub status: Status,
    /// For people.
    pub message: String,
}

/// What functions of this crate return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(status: Status, message: impl Into<String>) -> Error {
        Error { status, message: message.into() }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Error {
        Error::new(Status::InvalidArgument, message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.status.name(), self.message)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_the_headers() {
        let statuses: Vec<_> = ffi::CONSTANTS.iter().filter(|(_, value)| (1..=26).contains(value)).collect();
        for raw in 1..=26 {
            let status = Status::from_raw(raw).expect("a failure");
            assert_eq!(status.raw(), Some(raw));
            assert!(
                statuses.iter().any(|(name, value)| *name == status.name() && *value == i64::from(raw)),
                "{status:?}"
            );
        }
        assert_eq!(Status::from_raw(0), None);
        assert_eq!(Status::from_raw(99), Some(Status::Unknown(99)));
        assert_eq!(Status::Unknown(99).raw(), Some(99));
        assert_eq!(Status::Library.raw(), None);
    }

    #[test]
    fn errors_say_status_and_text() {
        let error: Box<dyn std::error::Error + Send + Sync> = Box::new(Error::new(Status::Shape, "a shape"));
        assert_eq!(error.to_string(), "TRTXPY_SHAPE: a shape");
    }
}
