//! The CUDA kernels, run on the CPU: a C++ program stands in for the GPU. It needs the C++ compiler
//! that building torch-sys needs.

use std::path::Path;
use std::process::Command;

#[test]
fn kernels_compute_what_plain_loops_do() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("kernels");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels.cpp");
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let flags = ["-std=c++20", "-O1", "-pthread", "-ffp-contract=off", "-Wno-unknown-pragmas", "-o"];
    let compiled = Command::new(compiler).args(flags).arg(&program).arg(&source).output().unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let run = Command::new(&program).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
    assert!(String::from_utf8_lossy(&run.stdout).contains("16 cases, 0 failures"));
}
