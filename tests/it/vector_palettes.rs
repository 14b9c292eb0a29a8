//! A run with palettes of vectors, from the plan to every export.

use std::path::Path;

use half::f16;
use sdxl_squeeze::checkpoint::SafetensorsFile;
use sdxl_squeeze::container::Container;
use serde_json::Value;

use crate::squeeze::Squeeze;
use crate::support::{container, report, tiny};

const RULE: &str = "n_bits: 3, cluster_dim: 2, granularity: per_grouped_channel, group_size: 4";

/// Writes a config; half of the vectors of the stages are pruned if `pruned`.
fn config(folder: &Path, pruned: bool) -> std::path::PathBuf {
    let prune = if pruned { "prune: {global_config: {target_sparsity: 0.5}}\n" } else { "" };
    let path = folder.join(if pruned { "pruned.yaml" } else { "dense.yaml" });
    std::fs::write(&path, format!("{prune}palettize: {{on_misfit: smaller_group, global_config: {{{RULE}}}}}\n")).unwrap();
    path
}

#[test]
fn a_run_with_vectors_is_planned_stored_and_exported() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for (pruned, out) in [(false, path("dense")), (true, path("pruned"))] {
        let run = Squeeze::new("compress").with("--config", config(folder.path(), pruned)).model(tiny()).out(&out);
        run.samples(2, 2).succeeds();
        let stored = out.join("unet.squeezed.safetensors");
        let found = Container::open(&stored).unwrap();
        let report = report(&out);
        let planned = report["plan"]["payload_bytes"].as_f64().unwrap();
        let bytes = report["payload_bytes"].as_f64().unwrap();
        assert!((planned / bytes - 1.0).abs() < 1e-3, "{planned} bytes were planned, and there are {bytes}");
        assert_eq!(found.verify().unwrap().version, 2);
        let mut vectors = 0;
        for layer in found.layers().filter(|layer| layer.vector_length == Some(2)) {
            let weight = found.weight(&layer.name).unwrap();
            let dense = weight.decode().unwrap();
            // Both channels of a vector are kept or pruned, and neighbours are an entry together.
            let columns = dense.len() / layer.shape[0] as usize;
            let mask = weight.mask.as_ref();
            assert!(mask.is_none_or(|mask| 2 * mask.len() == dense.len()));
            for (vector, pair) in dense.chunks(2 * columns).enumerate() {
                for column in 0..columns {
                    let kept = mask.is_none_or(|mask| mask.get(vector * columns + column));
                    assert!(kept || (pair[column] == f16::ZERO && pair[columns + column] == f16::ZERO), "{}", layer.name);
                }
            }
            vectors += 1;
        }
        assert!(vectors > 20, "{vectors}");

        let said = Squeeze::new("inspect").arg(&stored).succeeds().text();
        assert!(said.contains("3 V2"), "{said}");
        let layers: Vec<Value> = Squeeze::new("inspect").arg(&stored).arg("--json").succeeds().json();
        assert_eq!(layers.iter().filter(|layer| layer["vector_length"] == 2).count(), vectors);

        let package = out.join("unet.mlpackage");
        let export = Squeeze::new("export").arg(&stored);
        let needs = format!("needs iOS 18.2 or macOS 15.2: {vectors} weights have vector palettes");
        export.clone().with("--to", "coreml").out(&package).succeeds().says(&[&needs]);
        Squeeze::new("verify").arg(&package).succeeds().says(&["every hash holds", &needs]);

        let decoded = out.join("diffusers");
        export.clone().with("--to", "diffusers").model(tiny()).out(&decoded).succeeds();
        let file = SafetensorsFile::open(&decoded.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
        for layer in found.layers() {
            let bytes: Vec<u8> = found.decode(&layer.name).unwrap().iter().flat_map(|value| value.to_le_bytes()).collect();
            assert!(file.read(&layer.name).unwrap() == bytes, "{}", layer.name);
        }
        export.clone().with("--to", "single-file").model(tiny()).out(out.join("single.safetensors")).succeeds();
        let buffers = export.with("--to", "coremltools").with("--small-weights", "move").out(out.join("buffers.safetensors"));
        match pruned {
            true => drop(buffers.is_refused(&["cannot convert weights that are pruned and have vector palettes"])),
            false => drop(buffers.succeeds()),
        }
    }
}

/// The same settings without vectors give what they gave: the container says version 1, and nothing
/// in it mentions vectors.
#[test]
fn a_run_without_vectors_writes_version_1() {
    let folder = tempfile::tempdir().unwrap();
    let scalar = config(folder.path(), false);
    let yaml = std::fs::read_to_string(&scalar).unwrap();
    let run = |name: &str, yaml: &str| {
        let (config, out) = (folder.path().join(format!("{name}.yaml")), folder.path().join(name));
        std::fs::write(&config, yaml).unwrap();
        Squeeze::new("compress").with("--config", config).model(tiny()).out(&out).samples(2, 2).succeeds();
        container(&out)
    };
    let without = run("a", &yaml.replace("cluster_dim: 2, ", ""));
    assert!(run("b", &yaml.replace("cluster_dim: 2", "cluster_dim: 1")) == without);
    let text = String::from_utf8_lossy(&without);
    assert!(text.contains(r#""version":"1""#) && !text.contains("vector_length") && !text.contains("cluster_dim"));
}
