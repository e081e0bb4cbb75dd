//! What must not compile does not, and for the right reason: parents that go before their children.
//!
//! Each file under `compile_fail/` names the compiler's error in its first line, `//! E0505`. It compiles as it is, and with
//! `--cfg fail` it has that error and no other: so it is the marked line that is refused.

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn rustc() -> Command {
    let mut command = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    command.args(["--edition", "2021", "--emit", "metadata"]);
    command
}

/// The crate, as rustc reads it.
fn metadata() -> PathBuf {
    let metadata = common::scratch("libtrtxpy.rmeta");
    common::run(
        rustc()
            .args(["--crate-type", "rlib", "--crate-name", "trtxpy", "--cfg", "feature=\"mock\"", "-A", "warnings"])
            .arg(common::manifest().join("src/lib.rs"))
            .arg("-o")
            .arg(&metadata),
    );
    metadata
}

fn compile(file: &Path, crate_: &Path, fails: bool) -> Output {
    let mut command = rustc();
    command.args(["--crate-type", "lib", "-A", "warnings", "--check-cfg", "cfg(fail)"]);
    if fails {
        command.args(["--cfg", "fail"]);
    }
    let name = file.file_stem().unwrap().to_str().unwrap();
    command
        .arg("--extern")
        .arg(format!("trtxpy={}", crate_.display()))
        .arg(file)
        .arg("-o")
        .arg(common::scratch(&format!("lib{name}.rmeta")))
        .output()
        .unwrap()
}

fn errors(output: &Output) -> BTreeSet<String> {
    let text = String::from_utf8_lossy(&output.stderr);
    text.lines().filter_map(|line| Some(line.strip_prefix("error[")?.split_once(']')?.0.to_owned())).collect()
}

#[test]
fn children_cannot_outlive_their_parents() {
    let crate_ = metadata();
    let folder = common::manifest().join("tests/compile_fail");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 10, "{files:?}");
    for file in files {
        let source = std::fs::read_to_string(&file).unwrap();
        let expected = source.lines().next().unwrap().trim_start_matches("//! ").to_owned();
        assert!(expected.starts_with('E'), "{}: its first line names no error", file.display());
        let control = compile(&file, &crate_, false);
        assert!(control.status.success(), "{}: {}", file.display(), String::from_utf8_lossy(&control.stderr));
        let output = compile(&file, &crate_, true);
        assert!(!output.status.success(), "{} compiles", file.display());
        let found = errors(&output);
        assert_eq!(
            found,
            BTreeSet::from([expected]),
            "{}: {}",
            file.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
