//! The crate inside a Python process, called with Python's lock held: nothing waits for ever. Needs the real library and
//! TRTXPY_PYTHON; skipped without them, but for TRTXPY_REQUIRE_LIBRARY=1.

mod common;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn python() -> Option<PathBuf> {
    let python = PathBuf::from(std::env::var_os("TRTXPY_PYTHON")?);
    let python = if python.is_dir() { python.join("bin/python3") } else { python };
    let library = std::env::var_os("TRTXPY_LIBRARY").map(PathBuf::from)?;
    (python.is_file() && library.is_file()).then_some(python)
}

/// The extension, and the crate in it.
fn host() -> PathBuf {
    let rustc = || {
        let mut command = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        command.args(["--edition", "2021", "-C", "opt-level=1", "-A", "warnings"]);
        command
    };
    let (crate_, host) = (common::scratch("libtrtxpy.rlib"), common::scratch("libhost.so"));
    common::run(
        rustc()
            .args(["--crate-type", "rlib", "--crate-name", "trtxpy", "--cfg", "feature=\"mock\""])
            .arg(common::manifest().join("src/lib.rs"))
            .arg("-o")
            .arg(&crate_),
    );
    common::run(
        rustc()
            .args(["--crate-type", "cdylib", "--extern"])
            .arg(format!("trtxpy={}", crate_.display()))
            .arg(common::manifest().join("tests/inside/host.rs"))
            .arg("-o")
            .arg(&host),
    );
    host
}

fn finish(mut command: Command, within: Duration) -> String {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + within;
    while child.try_wait().unwrap().is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let hangs = child.try_wait().unwrap().is_none();
    if hangs {
        child.kill().unwrap();
    }
    let output = child.wait_with_output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!hangs, "it hangs: {said}");
    assert!(output.status.success(), "{}: {said}", output.status);
    said
}

#[test]
fn pythons_lock_blocks_nobody() {
    let Some(python) = python() else {
        let required = std::env::var("TRTXPY_REQUIRE_LIBRARY").is_ok_and(|value| value == "1");
        assert!(!required, "TRTXPY_REQUIRE_LIBRARY is 1, and TRTXPY_LIBRARY or TRTXPY_PYTHON names nothing");
        println!("skipped: TRTXPY_LIBRARY or TRTXPY_PYTHON names nothing");
        return;
    };
    let model = common::scratch("identity.onnx");
    std::fs::write(&model, common::onnx::identity(trtxpy::DType::Float32, &[-1, 4])).unwrap();
    let mut command = Command::new(python);
    command.arg(common::manifest().join("tests/inside/inside.py")).arg(host()).arg(&model);
    assert!(finish(command, Duration::from_secs(120)).contains("all rounds"));
}

/// The examples are programs without Python of their own.
#[cfg(feature = "mock")]
#[test]
fn examples_run() {
    let Some(_) = python() else {
        println!("skipped: TRTXPY_LIBRARY or TRTXPY_PYTHON names nothing");
        return;
    };
    let folder = std::env::current_exe().unwrap().parent().and_then(std::path::Path::parent).unwrap().join("examples");
    let model = common::manifest().join("../../examples/digits/digits.onnx");
    for (example, expected) in [("dispatch", "output probabilities: float32 [1, 10]: ["), ("async", "32 requests in ")]
    {
        let mut command = Command::new(folder.join(example));
        command.arg(&model);
        let said = finish(command, Duration::from_secs(120));
        assert!(said.contains(expected), "{said}");
    }
    let said = Command::new(folder.join("dispatch")).output().unwrap();
    assert_eq!(said.status.code(), Some(2));
}
