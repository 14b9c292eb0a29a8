//! Paths, tensors and runs that several tests use.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::Value;
use tch::{Kind, Tensor};

/// Completes a path that is relative to the root of the repository.
pub(crate) fn repo(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The bundled model.
pub(crate) fn emoji() -> PathBuf {
    repo("models/emoji-sdxl")
}

/// All tensors of a file, as they are stored.
pub(crate) fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

/// ‖ours - theirs‖ / ‖theirs‖ in fp64, or ‖ours‖ if `theirs` is zero.
pub(crate) fn relative_error(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    let (ours, theirs) = (ours.to_kind(Kind::Double), theirs.to_kind(Kind::Double));
    let norm = |x: &Tensor| x.square().sum(Kind::Double).sqrt().double_value(&[]);
    let scale = norm(&theirs);
    norm(&(&ours - &theirs)) / if scale > 0.0 { scale } else { 1.0 }
}

/// Compares tensors with a reference file, remembers which tensors were compared, and reports all
/// differences at once.
pub(crate) struct Checker {
    pub reference: BTreeMap<String, Tensor>,
    bound: f64,
    seen: BTreeSet<String>,
    failures: Vec<String>,
}

impl Checker {
    pub(crate) fn new(file: &Path, bound: f64) -> Self {
        Checker { reference: tensors(file), bound, seen: BTreeSet::new(), failures: Vec::new() }
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.reference.contains_key(key)
    }

    pub(crate) fn get(&self, key: &str) -> &Tensor {
        self.reference.get(key).unwrap_or_else(|| panic!("the reference has no {key}"))
    }

    /// Records a failure if the relative error exceeds the bound, in the norm or at the worst
    /// element.
    pub(crate) fn close(&mut self, key: &str, ours: &Tensor) {
        let theirs = self.get(key).shallow_clone();
        self.seen.insert(key.to_owned());
        if ours.size() != theirs.size() {
            self.failures.push(format!("{key}: {:?}, not {:?}", ours.size(), theirs.size()));
            return;
        }
        let error = relative_error(ours, &theirs);
        let difference = (ours.to_kind(Kind::Double) - theirs.to_kind(Kind::Double)).abs().max().double_value(&[]);
        let at_worst = difference / theirs.abs().max().double_value(&[]).max(1e-30);
        if !(error <= self.bound && at_worst <= self.bound) && difference > 0.0 {
            self.failures.push(format!("{key}: relative error {error:.2e}, at worst {at_worst:.2e}"));
        }
    }

    /// Records a failure if the tensors are not equal.
    pub(crate) fn equal(&mut self, key: &str, ours: &Tensor) {
        self.seen.insert(key.to_owned());
        if ours != self.get(key) {
            self.failures.push(format!("{key}: not equal"));
        }
    }

    /// Fails with all differences, and with all reference tensors that were not compared.
    /// `uncompared` selects tensors that need not be compared.
    pub(crate) fn finish(mut self, name: &str, uncompared: impl Fn(&str) -> bool) {
        let forgotten = self.reference.keys().filter(|key| !self.seen.contains(*key) && !uncompared(key));
        self.failures.extend(forgotten.map(|key| format!("{key}: not compared")));
        assert!(self.failures.is_empty(), "{name}:\n{}", self.failures.join("\n"));
    }
}

/// The program with arguments. Its threads wait without spinning, because many tests share the
/// cores.
pub(crate) fn squeezing(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sdxl-squeeze"));
    command.args(args).env("OMP_WAIT_POLICY", "PASSIVE");
    command
}

/// Runs the program with arguments.
pub(crate) fn squeeze(args: &[&str]) -> Output {
    squeezing(args).output().unwrap()
}

/// Starts a run with progress in JSON and interrupts it after some layers. The run must end with
/// the exit code 1 after the current layer. Its output is returned.
#[cfg(unix)]
pub(crate) fn interrupted_among_the_layers(mut run: Command) -> Output {
    let mut child = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
    let mut seen = 0;
    for line in lines.by_ref().map_while(Result::ok) {
        seen += usize::from(line.contains("attn1.to_q"));
        if seen > 2 {
            break;
        }
    }
    // SAFETY: the child has not been waited for, so its id is not in use by another process.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    lines.for_each(drop);
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    ended
}

/// The output of a command, which must have ended with `code`.
pub(crate) fn ended_with(code: i32, output: &Output) -> String {
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{text}");
    text
}

/// The pixels of a PNG file, and their width and height.
pub(crate) fn pixels(path: &Path) -> (Vec<u8>, [u32; 2]) {
    let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(path).unwrap()));
    let mut reader = decoder.read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let frame = reader.next_frame(&mut pixels).unwrap();
    (pixels, [frame.width, frame.height])
}

/// The report of a run that was written to the folder `out`.
pub(crate) fn report(out: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(out.join("report.json")).unwrap()).unwrap()
}

/// The container of a run that was written to the folder `out`.
pub(crate) fn container(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("unet.squeezed.safetensors")).unwrap()
}

/// A small pipeline of SDXL's architecture with random weights.
pub(crate) fn tiny() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("tiny");
        ended_with(0, &squeeze(&["synth", "--preset", "tiny", "--out", model.to_str().unwrap()]));
        folder
    });
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| folder.path().join("tiny"))
}

/// Copies a folder.
pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &target) } else { std::fs::copy(&path, &target).map(drop).unwrap() }
    }
}
