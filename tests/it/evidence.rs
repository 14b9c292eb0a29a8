//! Comparisons over prompts and noises: confidence intervals, the noise floor, and judging in
//! parts, also by Slurm.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::synth::{Preset, synthesize};
use serde_json::Value;
use tch::Kind;

use crate::squeeze::Squeeze;
use crate::support::repo;

/// A small model, prompts and a folder for results.
struct Scene {
    folder: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        synthesize(Preset::Tiny, &folder.path().join("model"), 0, Kind::Half, &Silent).unwrap();
        std::fs::write(folder.path().join("judge.txt"), "an owl\na rocket\na tulip\n").unwrap();
        Scene { folder }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A comparison of two configs that need no calibration.
    fn compare(&self) -> Squeeze {
        Squeeze::new("compare")
            .args(["dense-8bit", "dense-4bit"].map(|name| repo(&format!("configs/{name}.yaml"))))
            .model(self.at("model"))
            .with("--judge", self.at("judge.txt"))
            .args(["--steps", "2", "--held-out", "5"])
    }

    fn report(&self, out: &str) -> Value {
        serde_json::from_str(&std::fs::read_to_string(self.at(out).join("report.json")).unwrap()).unwrap()
    }

    /// The files of the report in `out`.
    fn files(&self, out: &str) -> BTreeMap<&'static str, Vec<u8>> {
        let read = |name| (name, std::fs::read(self.at(out).join(name)).unwrap());
        ["report.html", "report.json", "table.md", "sheet.png"].map(read).into()
    }
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap_or(f64::NAN)).collect()
}

#[test]
fn further_noises_add_to_the_first_and_intervals_hold_the_means() {
    let scene = Scene::new();
    let one = scene.compare().out(scene.at("one")).arg("--no-noise-floor").succeeds();
    let two =
        scene.compare().out(scene.at("two")).args(["--seeds", "2", "--baseline", "dense-4bit", "--pictures", "4"]).succeeds();
    let (first, both) = (scene.report("one"), scene.report("two"));
    let seeds: Vec<u64> = both["judged"].as_array().unwrap().iter().map(|judged| judged["seed"].as_u64().unwrap()).collect();
    assert_eq!(seeds, [231, 232, 233, 231 + (1 << 20), 232 + (1 << 20), 233 + (1 << 20)]);
    for row in 0..2 {
        for measure in ["psnr", "ssim", "latent_error"] {
            let [one, two] = [&first, &both].map(|report| numbers(&report["rows"][row][measure]["each"]));
            assert_eq!((one.len(), two.len()), (3, 6));
            assert_eq!(one, two[..3], "{measure}");
        }
        let row = &both["rows"][row];
        assert_eq!(numbers(&row["unet_error_by_prompt"]).len(), 3);
        for measure in ["unet_error", "latent_error", "psnr", "ssim"] {
            let mean = row[measure].as_f64().or_else(|| row[measure]["mean"].as_f64()).unwrap();
            let [value, low, high] = ["value", "low", "high"].map(|key| row["intervals"][measure][key].as_f64().unwrap());
            assert!((value - mean).abs() <= 1e-9 * mean.abs(), "{measure}: {value}, {mean}");
            assert!(low <= value && value <= high, "{measure}: {low}, {value}, {high}");
        }
    }
    // The first is compared with the baseline, and the baseline with nothing.
    let difference = |row: usize, key: &str| both["rows"][row]["differences"]["psnr"][key].as_f64();
    let mean = |row: usize| both["rows"][row]["psnr"]["mean"].as_f64().unwrap();
    assert!((difference(0, "value").unwrap() - (mean(0) - mean(1))).abs() < 1e-9);
    assert!(difference(0, "low").unwrap() > 0.0);
    assert_eq!(difference(1, "value"), None);
    assert!(two.text().contains("95 % confidence intervals; differences to dense-4bit"));
    // The dense model in fp16 is nearer to itself than any compressed one.
    assert!(first["noise_floor"].is_null() && !one.text().contains("dense, fp16"));
    assert_eq!(both["noise_floor"]["name"], "dense, fp16");
    assert!(both["noise_floor"]["psnr"]["mean"].as_f64().unwrap() > mean(0).max(mean(1)));
    assert!(both["noise_floor"]["unet_error"].as_f64().unwrap() > 0.0);
    let page = std::fs::read_to_string(scene.at("two").join("report.html")).unwrap();
    assert!(page.contains("The first 4 of 6.") && page.contains("Confidence") && page.contains("dense, fp16"));

    scene.compare().out(scene.at("no")).args(["--baseline", "dense-5bit"]).is_refused(&["no config is named `dense-5bit`"]);
    scene.compare().out(scene.at("no")).args(["--seeds", "0"]).is_refused(&["0 noises"]);
    assert!(!scene.at("no").exists());
}

#[test]
fn parts_make_the_report_of_one_piece() {
    let scene = Scene::new();
    let compare = || scene.compare().out(scene.at("out")).args(["--seeds", "2", "--pictures", "3"]);
    let part = |part: &str| compare().with("--part", part);
    part("1/4").is_refused(&["dense-8bit.squeezed.safetensors is missing", "--containers-only"]);
    compare().arg("--containers-only").succeeds();
    assert!(!scene.at("out").join("report.json").exists());
    let container = scene.at("out/dense-4bit.squeezed.safetensors");
    let made = std::fs::metadata(&container).unwrap().modified().unwrap();
    compare().succeeds();
    assert_eq!(std::fs::metadata(&container).unwrap().modified().unwrap(), made, "the container was made again");
    let whole = scene.files("out");

    let merge = || Squeeze::new("compare").with("--merge", scene.at("out")).out(scene.at("merged"));
    merge().is_refused(&["has no parts"]);
    for number in ["1/4", "3/4", "4/4"] {
        part(number).succeeds();
    }
    merge().is_refused(&["lacks 1 of 4 parts", "--part 2/4"]);
    assert!(!scene.at("merged").exists());
    part("2/4").succeeds();
    merge().succeeds();
    assert!(scene.files("merged") == whole);

    // A part that is there is not drawn again; one that is damaged is, with the same bytes.
    let path = scene.at("out/part-2-of-4.json");
    let (content, written) = (std::fs::read(&path).unwrap(), std::fs::metadata(&path).unwrap().modified().unwrap());
    part("2/4").succeeds();
    assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), written);
    std::fs::write(&path, &content[..content.len() / 2]).unwrap();
    merge().is_refused(&["part-2-of-4.json", "draw it again"]);
    part("2/4").succeeds();
    assert!(std::fs::read(&path).unwrap() == content);

    // Parts of another comparison are not mixed in.
    compare().with("--part", "2/4").args(["--judge-seed", "7"]).succeeds();
    merge().is_refused(&["part-1-of-4.json", "part-2-of-4.json", "different comparisons"]);
    part("1/3").succeeds();
    merge().is_refused(&["parts of 3 and of 4"]);
    merge().args(["--steps", "3"]).is_refused(&["--merge takes no flags of runs"]);
    for text in ["0/4", "5/4", "x"] {
        part(text).is_refused(&["is not K/N"]);
    }
    // A container of another config is not taken.
    compare().args(["--part", "1/4", "--n-bits", "6"]).is_refused(&["--containers-only"]);
}

/// A Slurm of one node, whose daemons end with it.
struct Slurm {
    conf: PathBuf,
    daemons: Vec<Child>,
}

impl Slurm {
    /// `None` if Slurm is not installed, or the user may not run its daemons.
    fn start(folder: &Path) -> Option<Self> {
        let is_there = |name: &str| ["/usr/sbin", "/usr/bin"].iter().any(|bin| Path::new(bin).join(name).is_file());
        if !["slurmctld", "slurmd", "sbatch", "squeue", "sinfo"].into_iter().all(is_there) {
            return None;
        }
        let text = |output: std::process::Output| String::from_utf8(output.stdout).unwrap().trim().to_owned();
        let (host, user) =
            (text(Command::new("hostname").arg("-s").output().ok()?), text(Command::new("id").arg("-un").output().ok()?));
        // Ports that are free now.
        let listeners = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let [controller, node] = listeners.each_ref().map(|listener| listener.local_addr().unwrap().port());
        drop(listeners);
        for name in ["state", "spool"] {
            std::fs::create_dir(folder.join(name)).unwrap();
        }
        let here = folder.display();
        let conf = folder.join("slurm.conf");
        let lines = format!(
            "ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser={user}\nSlurmdUser={user}\nSlurmctldPort={controller}\n\
             SlurmdPort={node}\nAuthType=auth/none\nCredType=cred/none\nProctrackType=proctrack/pgid\nTaskPlugin=task/none\n\
             JobAcctGatherType=jobacct_gather/none\nAccountingStorageType=accounting_storage/none\nMpiDefault=none\n\
             SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nStateSaveLocation={here}/state\n\
             SlurmdSpoolDir={here}/spool\nSlurmctldPidFile={here}/slurmctld.pid\nSlurmdPidFile={here}/slurmd.pid\n\
             SchedulerParameters=sched_interval=1,batch_sched_delay=0\n\
             SlurmctldLogFile={here}/slurmctld.log\nSlurmdLogFile={here}/slurmd.log\n\
             NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN\nPartitionName=all Nodes=ALL Default=YES State=UP\n"
        );
        std::fs::write(&conf, lines).unwrap();
        let mut slurm = Slurm { conf, daemons: Vec::new() };
        for name in ["slurmctld", "slurmd"] {
            let daemon = slurm.command(name).arg("-D").stdout(Stdio::null()).stderr(Stdio::null()).spawn();
            slurm.daemons.push(daemon.unwrap());
        }
        let idle = || text(slurm.command("sinfo").args(["-h", "-o", "%t"]).output().unwrap()) == "idle";
        wait_until(Duration::from_secs(60), idle).then_some(slurm)
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("SLURM_CONF", &self.conf).env("PATH", format!("{path}:/usr/sbin:/usr/bin"));
        command
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            // A daemon that has ended by itself cannot be killed.
            let _ended = daemon.kill();
            let _status = daemon.wait();
        }
    }
}

fn wait_until(limit: Duration, condition: impl Fn() -> bool) -> bool {
    let begin = Instant::now();
    while begin.elapsed() < limit {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    false
}

/// The script for Slurm in docs/cluster.md.
fn documented_script() -> String {
    let page = std::fs::read_to_string(repo("docs/cluster.md")).unwrap();
    let begin = page.find("#!/bin/bash").unwrap();
    page[begin..].split("```").next().unwrap().to_owned()
}

#[test]
fn a_slurm_array_judges_what_one_process_does() {
    let scene = Scene::new();
    std::fs::create_dir(scene.at("slurm")).unwrap();
    let Some(slurm) = Slurm::start(&scene.at("slurm")) else {
        use std::io::Write;
        writeln!(std::io::stderr(), "a_slurm_array_judges_what_one_process_does: skipped, there is no Slurm that starts")
            .expect("standard error is open");
        return;
    };
    let program = Path::new(env!("CARGO_BIN_EXE_sdxl-squeeze"));
    let words: Vec<String> =
        scene.compare().args(["--seeds", "2"]).command().get_args().map(|word| word.to_str().unwrap().to_owned()).collect();
    let submit = || {
        let mut command = slurm.command("bash");
        command.args(["-c", &documented_script()]).current_dir(scene.at("slurm"));
        let path = format!("{}:{}:/usr/sbin:/usr/bin", program.parent().unwrap().display(), std::env::var("PATH").unwrap());
        command.env("PATH", path).env("COMMAND", format!("sdxl-squeeze {}", words.join(" ")));
        command.env("OUT", scene.at("out")).env("PARTS", "3").env("STEP", "--cpus-per-task=1");
        let ended = command.output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    };
    let is_over = || slurm.command("squeue").arg("-h").output().unwrap().stdout.is_empty();
    let logs = || {
        let entries = std::fs::read_dir(scene.at("slurm")).unwrap().map(|entry| entry.unwrap().path());
        let logs = entries.filter(|path| path.extension().is_some_and(|end| end == "out"));
        logs.map(|path| std::fs::read_to_string(path).unwrap()).collect::<Vec<_>>().join("\n")
    };
    submit();
    assert!(wait_until(Duration::from_secs(300), || scene.at("out/report.json").is_file() && is_over()), "{}", logs());
    let by_slurm = scene.files("out");

    // A part is lost, as if it had been killed: the same script draws it again, and nothing else.
    let kept = std::fs::metadata(scene.at("out/part-1-of-3.json")).unwrap().modified().unwrap();
    std::fs::remove_file(scene.at("out/part-2-of-3.json")).unwrap();
    std::fs::remove_file(scene.at("out/report.json")).unwrap();
    submit();
    assert!(wait_until(Duration::from_secs(300), || scene.at("out/report.json").is_file() && is_over()), "{}", logs());
    assert_eq!(std::fs::metadata(scene.at("out/part-1-of-3.json")).unwrap().modified().unwrap(), kept);
    assert!(scene.files("out") == by_slurm);

    let here = scene.compare().args(["--seeds", "2"]).out(scene.at("out"));
    here.succeeds();
    let here = scene.files("out");
    // The line of the device has the number of threads.
    let measured = |files: &BTreeMap<&str, Vec<u8>>| {
        let mut report: Value = serde_json::from_slice(&files["report.json"]).unwrap();
        report["device"] = Value::Null;
        (report, files["table.md"].clone(), files["sheet.png"].clone())
    };
    assert!(measured(&here) == measured(&by_slurm));
}
