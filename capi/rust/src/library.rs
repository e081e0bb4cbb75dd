//! Finding and loading libtrtxpy, once for the process.

use std::env;
use std::ffi::{c_char, c_int, c_void, CStr, CString, OsStr, OsString};
use std::fmt::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use crate::error::{Error, Result, Status};
use crate::ffi::{self, Api};

/// Where the library is; see [`crate::RuntimeOptions`].
const LIBRARY_VARIABLE: &str = "TRTXPY_LIBRARY";
/// Which Python has `trtx_py`.
const PYTHON_VARIABLE: &str = "TRTXPY_PYTHON";
/// What the dynamic linker is asked for if nothing else leads to the library.
const PLAIN_NAME: &str = "libtrtxpy.so";

extern "C" {
    fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, symbol: *const c_char) -> *mut c_void;
    fn dlclose(library: *mut c_void) -> c_int;
    fn dlerror() -> *const c_char;
}

const RTLD_NOW: c_int = 2;

/// The library, loaded for the life of the process.
pub(crate) struct Library {
    pub(crate) api: Api,
    path: PathBuf,
}

impl Library {
    /// The process's library, loaded by the first who asks. `path`: this one, or an error.
    pub(crate) fn get(path: Option<&Path>, python: Option<&Path>) -> Result<&'static Library> {
        static LOADED: Mutex<Option<&'static Library>> = Mutex::new(None);
        let mut loaded = LOADED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(library) = *loaded {
            return match path {
                Some(other) if !same_file(other, &library.path) => Err(Error::new(
                    Status::Library,
                    format!(
                        "{} was asked for, but {} is loaded already; a process has one library",
                        other.display(),
                        library.path.display()
                    ),
                )),
                _ => Ok(library),
            };
        }
        let library: &'static Library = Box::leak(Box::new(find(path, python)?));
        *loaded = Some(library);
        Ok(library)
    }

    /// As it was found; a plain name if the dynamic linker found it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The error of a call that this thread just made.
    pub(crate) fn check(&self, status: ffi::trtxpy_status) -> Result<()> {
        match Status::from_raw(status) {
            None => Ok(()),
            Some(status) => Err(Error::new(status, self.last_error())),
        }
    }

    fn last_error(&self) -> String {
        // SAFETY: never NULL; the text stays until this thread's next call.
        unsafe { text((self.api.trtxpy_last_error)()) }
    }

    fn open(name: &OsStr) -> Result<Library> {
        let symbol_error = |what: String| Error::new(Status::Library, format!("{}: {what}", name.to_string_lossy()));
        let file = CString::new(name.as_bytes()).map_err(|_| symbol_error("the path has a NUL".into()))?;
        // SAFETY: a NUL-terminated path; the library's constructors are trusted.
        let handle = unsafe { dlopen(file.as_ptr(), RTLD_NOW) };
        if handle.is_null() {
            // SAFETY: NULL or a text that stays until this thread's next call of dl*.
            let why = unsafe { text(dlerror()) };
            return Err(Error::new(Status::Library, why));
        }
        // SAFETY: the handle is open, the names are NUL-terminated.
        let find = |symbol: &CStr| unsafe { dlsym(handle, symbol.as_ptr()) };
        let checked = check_version(&find).and_then(|()| {
            // SAFETY: a library of this ABI, whose functions are the header's.
            unsafe { Api::load(find) }.map_err(|missing| format!("it lacks {}", missing.join(", ")))
        });
        match checked {
            Ok(api) => Ok(Library { api, path: PathBuf::from(name) }),
            Err(why) => {
                // SAFETY: nothing of it is in use.
                unsafe { dlclose(handle) };
                Err(symbol_error(why))
            }
        }
    }
}

/// Another major may declare the same names otherwise: this comes before they are looked up.
fn check_version(find: &impl Fn(&CStr) -> *mut c_void) -> std::result::Result<(), String> {
    let version = find(c"trtxpy_abi_version");
    if version.is_null() {
        return Err("it is no libtrtxpy: it lacks trtxpy_abi_version".into());
    }
    // SAFETY: this function is the same in every version.
    let version = unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> u32>(version)() };
    let (major, minor) = (version >> 16, version & 0xffff);
    if major != ffi::TRTXPY_ABI_MAJOR {
        return Err(format!(
            "its ABI is {major}.{minor}; this crate was written for {}.x: install a crate and a trtx_py that fit",
            ffi::TRTXPY_ABI_MAJOR
        ));
    }
    Ok(())
}

/// # Safety
/// NULL, or a NUL-terminated string.
pub(crate) unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: the caller's word.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

fn same_file(one: &Path, other: &Path) -> bool {
    one == other || matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

fn find(path: Option<&Path>, python: Option<&Path>) -> Result<Library> {
    if let Some(path) = path {
        return Library::open(path.as_os_str());
    }
    if let Some(path) = variable(LIBRARY_VARIABLE) {
        return Library::open(&path)
            .map_err(|error| Error::new(error.status, format!("{} ({LIBRARY_VARIABLE})", error.message)));
    }
    let mut tried = String::new();
    for (interpreter, source) in interpreters(python) {
        match ask(&interpreter) {
            Ok(path) => return Library::open(path.as_os_str()),
            Err(why) => {
                let _ = write!(tried, "\n  {} ({source}): {why}", interpreter.display());
            }
        }
    }
    Library::open(OsStr::new(PLAIN_NAME)).map_err(|error| {
        Error::new(
            Status::Library,
            format!(
                "libtrtxpy was not found; set {LIBRARY_VARIABLE} to the file, or {PYTHON_VARIABLE} to an interpreter or a \
                 virtual environment that has trtx_py. Tried:{tried}\n  the dynamic linker: {}",
                error.message
            ),
        )
    })
}

fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

/// Interpreters that may have `trtx_py`. What the caller or TRTXPY_PYTHON names is taken at its word, as the library does.
fn interpreters(python: Option<&Path>) -> Vec<(PathBuf, &'static str)> {
    if let Some(python) = python {
        return vec![(interpreter_of(python), "RuntimeOptions::python")];
    }
    if let Some(python) = variable(PYTHON_VARIABLE) {
        return vec![(interpreter_of(Path::new(&python)), PYTHON_VARIABLE)];
    }
    let mut found = Vec::new();
    if let Some(environment) = variable("VIRTUAL_ENV") {
        found.push((Path::new(&environment).join("bin").join("python3"), "VIRTUAL_ENV"));
    }
    found.push((PathBuf::from("python3"), "PATH"));
    found
}

/// The interpreter of an interpreter, a virtual environment, an installation's prefix or a libpython.
fn interpreter_of(python: &Path) -> PathBuf {
    if python.is_dir() {
        return python.join("bin").join("python3");
    }
    let name = python.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if name.starts_with("libpython") && python.is_file() {
        for folder in python.ancestors().skip(1) {
            let candidate = folder.join("bin").join("python3");
            if candidate.is_file() {
                return candidate;
            }
        }
    }
    python.to_path_buf()
}

/// Where this interpreter's `trtx_py` has the library. Isolated, as the library starts Python: what lies in the current
/// folder is not imported.
fn ask(interpreter: &Path) -> std::result::Result<PathBuf, String> {
    let output = Command::new(interpreter)
        .args(["-I", "-m", "trtx_py.capi", "--path"])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().last().unwrap_or("").trim();
        return Err(if last.is_empty() { output.status.to_string() } else { last.to_owned() });
    }
    let line = output.stdout.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let path = PathBuf::from(OsString::from_vec(line.to_vec()));
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(format!("it printed {:?}; expected a path", path.display().to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_library_is_refused() {
        let error = Library::open(OsStr::new("/nowhere/libtrtxpy.so")).err().expect("there is none");
        assert_eq!(error.status, Status::Library);
        assert!(error.message.contains("/nowhere/libtrtxpy.so"), "{error}");
        let error = Library::open(OsStr::new("libc.so.6")).err().expect("it is another");
        assert!(error.message.contains("lacks trtxpy_abi_version"), "{error}");
        let error = Library::open(OsStr::new("a\0b")).err().expect("it has a NUL");
        assert!(error.message.contains("NUL"), "{error}");
    }

    #[test]
    fn an_interpreter_is_found_in_what_is_named() {
        let root = env::temp_dir().join(format!("trtxpy-interpreters-{}", std::process::id()));
        std::fs::create_dir_all(root.join("bin")).unwrap();
        std::fs::create_dir_all(root.join("lib")).unwrap();
        std::fs::write(root.join("bin/python3"), "").unwrap();
        std::fs::write(root.join("lib/libpython3.11.so.1.0"), "").unwrap();
        let python = root.join("bin/python3");
        assert_eq!(interpreter_of(&root), python);
        assert_eq!(interpreter_of(&python), python);
        assert_eq!(interpreter_of(&root.join("lib/libpython3.11.so.1.0")), python);
        assert_eq!(interpreter_of(Path::new("python3.12")), Path::new("python3.12"));
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn an_interpreter_without_the_package_says_so() {
        assert!(ask(Path::new("/nowhere/python3")).is_err());
        let error = ask(Path::new("/bin/false")).expect_err("it fails");
        assert!(error.contains('1'), "{error}");
        let error = ask(Path::new("/bin/echo")).expect_err("it prints its arguments");
        assert!(error.contains("expected a path"), "{error}");
    }
}
