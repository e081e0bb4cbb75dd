//! What the integration tests share.
#![allow(dead_code)] // each test program uses a part

pub mod onnx;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::Command;
use std::sync::{Arc, MutexGuard};
use std::task::{Context, Poll, Wake};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use trtxpy::{DType, Runtime};

/// A library to test, the tests of which run one after the other: they count what is open in the process.
pub struct Kit {
    pub runtime: &'static Runtime,
    /// A model whose output y is its input x; -1: any.
    pub identity: fn(DType, &[i64]) -> Vec<u8>,
    pub fake: bool,
    pub _alone: MutexGuard<'static, ()>,
}

pub fn manifest() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Run a compiler, and fail with what it said.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout.into_owned()
}

/// A file of this test program in the target folder.
pub fn scratch(name: &str) -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(program.file_name().unwrap());
    std::fs::create_dir_all(&folder).unwrap();
    folder.join(name)
}

pub fn compiler() -> Command {
    Command::new(std::env::var("CC").unwrap_or_else(|_| "gcc".into()))
}

/// The fake library, compiled with these options: where it is.
pub fn fake_library(name: &str, options: &[&str]) -> PathBuf {
    let library = scratch(name);
    let fresh = scratch(&format!("{name}.{}", std::process::id()));
    run(compiler()
        .args([
            "-std=gnu11",
            "-g",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fPIC",
            "-shared",
            "-pthread",
            "-fvisibility=hidden",
        ])
        .args(options)
        .arg("-I")
        .arg(manifest().join("../include"))
        .args(["fake.c", "fake_graphs.c", "fake_requests.c"].map(|file| manifest().join("tests/fake").join(file)))
        .arg("-o")
        .arg(&fresh));
    std::fs::rename(&fresh, &library).unwrap(); // another process of this program may have the old one loaded
    library
}

/// Wait for what comes on another thread.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The least executor.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut context = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}
