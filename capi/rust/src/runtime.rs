//! The library, started.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::context::{Context, Options};
use crate::error::{Error, Result};
use crate::ffi;
use crate::library::{text, Library};
use crate::object;
use crate::shape;

/// Where the library and Python are. By default both are looked for; see [`Runtime::with_options`].
#[derive(Debug, Clone, Default)]
pub struct RuntimeOptions {
    /// The library's file.
    pub library: Option<PathBuf>,
    /// An interpreter, a virtual environment, an installation's prefix or a libpython.
    pub python: Option<PathBuf>,
}

/// libtrtxpy, loaded, and Python started in it. The process has one library, however many values of this type.
///
/// Dropping it ends nothing: the library lives as long as the process, and ends by itself at exit.
pub struct Runtime {
    library: &'static Library,
}

impl Runtime {
    /// With what is found; see [`Runtime::with_options`].
    pub fn new() -> Result<Runtime> {
        Runtime::with_options(&RuntimeOptions::default())
    }

    /// Load the library and start it. Takes a second or so the first time.
    ///
    /// The library is `options.library`; else what TRTXPY_LIBRARY names; else what `python -m trtx_py.capi --path` says, with
    /// the Python of `options.python`, TRTXPY_PYTHON, VIRTUAL_ENV or `python3` on PATH; else `libtrtxpy.so`, as the dynamic
    /// linker finds it. In a process that runs Python the library uses that interpreter.
    ///
    /// # Errors
    /// [`Status::Library`](crate::Status::Library) if the library is not found, of another ABI, or not the one that was
    /// loaded already; [`Status::Python`](crate::Status::Python) if it finds no Python that has `trtx_py`.
    pub fn with_options(options: &RuntimeOptions) -> Result<Runtime> {
        let library = Library::get(options.library.as_deref(), options.python.as_deref())?;
        let python = match &options.python {
            Some(path) => {
                let path = path.to_str().ok_or_else(|| Error::invalid(format!("{path:?} is not UTF-8")))?;
                Some(shape::name("RuntimeOptions::python", path)?)
            }
            None => None,
        };
        let mut raw = ffi::trtxpy_init_options::default();
        if let Some(python) = &python {
            raw.python = python.as_ptr();
        }
        // SAFETY: the struct and the string outlive the call.
        library.check(unsafe { (library.api.trtxpy_init)(&raw) })?;
        Ok(Runtime { library })
    }

    /// A device and a TensorRT, as the options choose.
    pub fn context(&self, options: &Options) -> Result<Context<'_>> {
        object::sweep();
        Context::create(self.library, options)
    }

    /// The library's ABI: major, minor.
    pub fn abi_version(&self) -> (u16, u16) {
        // SAFETY: has no conditions.
        let version = unsafe { (self.library.api.trtxpy_abi_version)() };
        ((version >> 16) as u16, version as u16)
    }

    /// The version of trtx_py that the library was built with.
    pub fn version(&self) -> String {
        // SAFETY: has no conditions; the text is valid for ever.
        unsafe { text((self.library.api.trtxpy_version)()) }
    }

    /// The file that was loaded; a plain name if the dynamic linker found it.
    pub fn library_path(&self) -> &Path {
        self.library.path()
    }

    /// How many contexts, graphs, tensors, queues, requests and results are open in the process.
    pub fn live_objects(&self) -> Result<usize> {
        object::sweep();
        let mut count = 0;
        // SAFETY: the count outlives the call.
        self.library.check(unsafe { (self.library.api.trtxpy_live_objects)(&mut count) })?;
        Ok(count)
    }

    /// The raw functions, for what this crate does not wrap.
    pub fn api(&self) -> &'static ffi::Api {
        &self.library.api
    }

    /// End the library's threads, and Python if the library started it. Not needed: this happens at exit by itself.
    ///
    /// # Errors
    /// [`Status::Borrowed`](crate::Status::Borrowed) while objects are open, those of [`crate::executor`] among them.
    ///
    /// # Safety
    /// No other thread calls the library meanwhile.
    pub unsafe fn shutdown(self) -> Result<()> {
        object::sweep();
        // SAFETY: the caller's word.
        self.library.check(unsafe { (self.library.api.trtxpy_shutdown)() })
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Runtime")
            .field("library", &self.library.path())
            .field("version", &self.version())
            .finish()
    }
}
